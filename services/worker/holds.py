"""Tells each gateway, every few seconds, what runs for it: a request that nobody wants must not cost compute. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from shared.contracts.requests import Holds, Owned


class Holdings:
    """When to tell whom, what was told, and who has been silent since when. Seconds are monotonic."""

    def __init__(self, *, hold_s: float, lost_s: float) -> None:
        self.due_at: float | None = None
        self._hold_s: Final = hold_s
        self._lost_s: Final = lost_s
        self._asked: dict[str, dict[str, int]] = {}
        self._silent_since: dict[str, float] = {}

    def began(self, gateway_id: str, now: float) -> None:
        """A request of this gateway runs here."""
        if self.due_at is None:
            self.due_at = now + self._hold_s

    def ask(self, worker_id: str, owned: Mapping[str, Sequence[Owned]], now: float) -> list[tuple[str, Holds]]:
        """It is time: what to tell which gateway. One that has not answered the last time yet is not asked again."""
        self.due_at = now + self._hold_s if owned else None
        for gateway_id in [one for one in self._silent_since if one not in owned]:
            del self._silent_since[gateway_id]
        told: list[tuple[str, Holds]] = []
        for gateway_id, requests in owned.items():
            if gateway_id not in self._asked:
                self._asked[gateway_id] = {one.request_id: one.epoch for one in requests}
                self._silent_since.setdefault(gateway_id, now)
                told.append((gateway_id, Holds(worker_id=worker_id, requests=tuple(requests))))
        return told

    def answered(self, gateway_id: str, now: float) -> dict[str, int]:
        """An answer came, or none will: the epochs of the requests that were told."""
        return self._asked.pop(gateway_id, {})

    def heard(self, gateway_id: str) -> None:
        """The gateway lives."""
        self._silent_since.pop(gateway_id, None)

    def lost(self, gateway_id: str, now: float, bus_back_at: float) -> bool:
        """Whether a gateway has been silent for too long, the time without a bus not counted."""
        since = max(self._silent_since.get(gateway_id, now), bus_back_at)
        return now - since >= self._lost_s
