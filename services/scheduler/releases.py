"""On which workers something may have come free, in the order in which it did. Pure.

Whoever waits for room remembers `count` and asks later what is new since.
"""

from __future__ import annotations

from collections.abc import Iterable


class Releases:
    """One entry per worker: when it gave something back last."""

    def __init__(self) -> None:
        self.count = 0
        self._last: dict[str, int] = {}  # by worker, the latest release last

    def __len__(self) -> int:
        return len(self._last)

    def put(self, worker_ids: Iterable[str]) -> None:
        """Something may have come free there."""
        self.count += 1
        for id in worker_ids:
            self._last.pop(id, None)
            self._last[id] = self.count

    def forget(self, worker_id: str) -> None:
        """This worker is gone."""
        self._last.pop(worker_id, None)

    def since(self, count: int, most: int) -> list[str] | None:
        """The workers that have given something back since then, the latest first; None: more than `most`."""
        found: list[str] = []
        for id in reversed(self._last):
            if self._last[id] <= count:
                break
            if len(found) == most:
                return None
            found.append(id)
        return found
