"""Who was evicted for whom: a model is not reloaded at once to evict its evictor. Pure.

Two models that share one place, each called in short intervals, could evict each other with every request, and serve
hardly any between two loads. So a replica is spared for its tenure, unless its burst is over: its queue is
empty and it has been idle for `linger_s`. Idle replicas of anybody else leave at once, as waiting for them
would gain nothing.

Sparing is bounded by the tenure, which is that of `fairness`: no bound on waiting gets worse by it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EvictionRules:
    """`tenure_s`: nobody is spared longer than this after becoming ready. `linger_s`: so long without a request ends a
    burst. `likely`: a replica that is asked again within the newcomer's load time with this probability is spared too.
    `remember_s`: who was evicted for whom is forgotten after it."""

    tenure_s: float = 5.0
    linger_s: float = 0.5
    likely: float = 0.5
    remember_s: float = 600.0
    most: int = 20_000


class Evictions:
    """The last evictor of each deployment. Bounded: `most` of them, the latest."""

    def __init__(self, rules: EvictionRules | None = None) -> None:
        self.rules = rules or EvictionRules()
        self.count = 0
        self._by: dict[str, tuple[str, float]] = {}  # evicted → its evictor, when; latest last

    def evicted(self, name: str, by: str, now: float) -> None:
        """A replica of this deployment was stopped, moved or parked for the sake of another one's."""
        self.count += 1
        self._by.pop(name, None)
        self._by[name] = (by, now)
        if len(self._by) > self.rules.most:
            del self._by[next(iter(self._by))]

    def gone(self, name: str) -> None:
        """This deployment is gone."""
        self._by.pop(name, None)

    def evictor(self, name: str, now: float) -> str:
        """For whom this deployment was evicted last; "": not lately."""
        by, at = self._by.get(name, ("", now))
        return by if now - at < self.rules.remember_s else ""

    def spared_until(
        self,
        name: str,
        *,
        for_name: str,
        ready_at: float,
        idle_s: float,
        outstanding: int,
        soon: float,
        now: float,
    ) -> float | None:
        """Until when an idle replica of `name` is not evicted for `for_name`; None: it may be evicted now.

        `idle_s` since its last request ended, `outstanding` requests of its deployment wait or run anywhere, `soon` is
        the probability that it is asked again before the newcomer would have been loaded.
        """
        spared = self.evictor(for_name, now) == name or soon >= self.rules.likely
        until = ready_at + self.rules.tenure_s
        if not spared or until <= now:
            return None
        if outstanding > 0:
            return until
        over_at = now + self.rules.linger_s - idle_s
        return None if over_at <= now else min(until, over_at)
