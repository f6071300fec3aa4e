"""Which requests run nowhere, and what the scheduler has been told of them. Pure.

The first request that waits is told at once. As long as some of a deployment's requests run nowhere this is repeated
every `repeat_s`, with how many they are and how long the oldest has waited; that none does any more is told once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.gateway.events import Hint
from services.gateway.ownership import Live


@dataclass(slots=True)
class Wait:
    """Requests of one deployment that run nowhere, by id, since when, the longest wait first. Monotonic seconds.

    `told` is how many the scheduler believes to wait (0: it has heard of none); `due_at` is when it is told again.
    """

    deployment: str
    since: dict[str, float] = field(default_factory=dict)
    told: int = 0
    due_at: float | None = None


class Demands:
    """Waits by the slug of their deployment. `due_at` of a wait is when `tell` shall be called."""

    def __init__(self, *, repeat_s: float, clear_s: float) -> None:
        self._repeat_s = repeat_s
        self._clear_s = clear_s
        self._waits: dict[str, Wait] = {}

    def add(self, live: Live, now: float) -> float | None:
        """A request runs nowhere from now on. When the scheduler is to be told of it, unless that is clear already."""
        call = live.call
        wait = self._waits.setdefault(call.slug, Wait(call.deployment))
        wait.since.setdefault(live.request_id, now)
        if wait.due_at is None:
            wait.due_at = now + self._repeat_s
            return wait.due_at
        return None

    def remove(self, live: Live, now: float) -> float | None:
        """A request runs, or is over. When the scheduler is to be told of it, unless that is clear already."""
        slug = live.call.slug
        wait = self._waits.get(slug)
        if wait is None or wait.since.pop(live.request_id, None) is None or wait.since:
            return None
        if not wait.told:
            del self._waits[slug]
            return None
        # Not at once: where much is asked for, somebody waits again in a moment.
        clear_at = now + self._clear_s
        if wait.due_at is not None and wait.due_at <= clear_at:
            return None
        wait.due_at = clear_at
        return clear_at

    def tell(self, slug: str, now: float) -> Hint | None:
        """What the scheduler shall hear of this deployment now; sets when it shall hear more."""
        wait = self._waits.get(slug)
        if wait is None:
            return None
        wait.told = len(wait.since)
        if not wait.since:
            del self._waits[slug]
            return Hint(wait.deployment, 0, 0.0)
        wait.due_at = now + self._repeat_s
        return Hint(wait.deployment, wait.told, now - next(iter(wait.since.values())))

    def due_at(self, slug: str) -> float | None:
        """When the scheduler shall be told of this deployment again; None: there is nothing to tell."""
        wait = self._waits.get(slug)
        return None if wait is None else wait.due_at

    def waiting(self) -> dict[str, float]:
        """Every request that runs nowhere, and since when, for invariants."""
        for wait in self._waits.values():
            assert wait.since or wait.told, "nothing is kept of a deployment that nobody waits for"
            assert wait.due_at is not None
            assert list(wait.since.values()) == sorted(wait.since.values())
        return {id: since for wait in self._waits.values() for id, since in wait.since.items()}
