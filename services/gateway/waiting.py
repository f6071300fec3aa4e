"""Who waits for a cold start and hears how far it is. Pure."""

from __future__ import annotations

from typing import Final

from services.gateway.events import Inform
from services.gateway.ownership import Call
from shared.contracts.residency import LoadProgress, Progress

MOST_DEPLOYMENTS: Final = 4096


class Waiting:
    """Calls that stream and have nothing yet, by the slug of their deployment. Seconds are monotonic."""

    def __init__(self, *, inform_s: float, fresh_s: float) -> None:
        self._inform_s = inform_s
        self._fresh_s = fresh_s
        self._calls: dict[str, dict[str, Call]] = {}
        self._progress: dict[str, tuple[Progress, float]] = {}
        self._informed: dict[str, float] = {}

    def add(self, call: Call, now: float) -> list[Inform]:
        """A call waits from now on; what is known already it hears at once."""
        self._calls.setdefault(call.slug, {})[call.call_id] = call
        known = self._progress.get(call.slug)
        if known is not None and now - known[1] <= self._fresh_s:
            return [Inform(call.call_id, known[0])]
        return []

    def remove(self, call: Call) -> None:
        """A call has something, or is over."""
        waiting = self._calls.get(call.slug)
        if waiting is not None and waiting.pop(call.call_id, None) is not None and not waiting:
            del self._calls[call.slug]

    def progressed(self, message: LoadProgress, now: float) -> list[Inform]:
        """A cold start got further: at most five comments a second and stream, and fewer when very many wait."""
        slug, progress = message.deployment, message.progress
        if slug not in self._progress and len(self._progress) >= MOST_DEPLOYMENTS:
            self._progress.clear()
            self._informed.clear()
        before = self._progress.get(slug)
        self._progress[slug] = (progress, now)
        waiting = self._calls.get(slug)
        if not waiting:
            return []
        interval = max(self._inform_s, len(waiting) / 1000)
        same_phase = before is not None and before[0].phase == progress.phase
        if same_phase and now - self._informed.get(slug, -interval) < interval:
            return []
        self._informed[slug] = now
        return [Inform(call_id, progress) for call_id in waiting]

    def calls(self) -> list[Call]:
        """Everyone who waits, for invariants."""
        assert all(self._calls.values()), "nobody is kept at zero"
        return [call for calls in self._calls.values() for call in calls.values()]
