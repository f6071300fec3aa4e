"""Who was told to stop, and when: nobody is told the same thing with every frame that he sends. Pure."""

from __future__ import annotations

from typing import Final

MOST: Final = 65_536


class Reminders:
    """At most one word per (request, epoch) every `every_s` seconds; remembers no longer than that."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._told: dict[tuple[str, int], float] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._told)

    def told(self, request_id: str, epoch: int, now: float) -> None:
        """It was said just now."""
        self._told.pop((request_id, epoch), None)
        self._told[(request_id, epoch)] = now
        while self._told:
            oldest, at = next(iter(self._told.items()))
            if now - at < self._every_s and len(self._told) <= MOST:
                break
            del self._told[oldest]

    def due(self, request_id: str, epoch: int, now: float) -> bool:
        """Whether to say it now; if so, it counts as said."""
        at = self._told.get((request_id, epoch))
        if at is not None and now - at < self._every_s:
            return False
        self.told(request_id, epoch, now)
        return True
