"""Who waits for room, and when it is worth asking again where it could go. Pure.

A decision costs milliseconds, and in an overloaded cluster something comes free all the time. So whoever waits is asked
about again only if a worker that has given something back since could take it, with nobody leaving but idle replicas;
that is found out in microseconds. Room that has to be made by moving, awaiting or parking what runs opens with time and
in many ways. It is looked for anew by the first in line after `DISTURB_S` if anything was given back anywhere, and
every `look_interval_s` whatever has happened; by those behind them ever less often, but at least every
`MOST_IDLE_LOOKS` looks; and where the bound on waiting is at stake by everybody whom it concerns at every look. So
nobody is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from services.scheduler.cluster import Cluster
from services.scheduler.fairness import Fairness
from services.scheduler.rules import Rules

# Whether a deployment could be loaded on one of these workers now, with nobody leaving but idle replicas.
Frees = Callable[[str, Sequence[str], float], bool]

RETRY_S: Final = 0.1  # those behind the first in line do not ask more often than this what has come free
DISTURB_S: Final = 0.5
FIRST: Final = 2  # in line, who know at once
MOST_RELEASES: Final = 64  # workers that are looked at one by one; after more releases it is decided anew
MOST_IDLE_LOOKS: Final = 4


@dataclass(slots=True)
class Deferral:
    """A deployment that waits for room. Moments are monotonic seconds.

    `releases` is the count up to which nothing that came free could serve it; `again_at` when it may ask next what
    has. At `tried_at` it was decided last, `times` times in a row for nothing; `latest_at`: it is decided again by
    then, whatever has happened. `roomed`: room is being made for it. `kinds` are the reasons, roughly: the log wants
    to know when they change, and until `explained_until` they are not asked for anew.
    """

    releases: int
    again_at: float
    tried_at: float
    latest_at: float = math.inf
    times: int = 0
    roomed: bool = False
    kinds: str = ""
    explained_until: float = -math.inf


class Deferrals:
    """See the module. `wake` is the monotonic second at which to ask again about somebody; whoever asks resets it."""

    def __init__(self, rules: Rules, cluster: Cluster, fairness: Fairness, frees: Frees) -> None:
        self.wake = math.inf
        self._rules = rules
        self._cluster = cluster
        self._fairness = fairness
        self._frees = frees
        self._all: dict[str, Deferral] = {}

    @property
    def helpless(self) -> bool:
        """Whether there is somebody for whom nothing is being done."""
        return any(not one.roomed for one in self._all.values())

    def get(self, name: str) -> Deferral | None:
        """How this deployment waits; None: it was not deferred."""
        return self._all.get(name)

    def drop(self, name: str) -> None:
        """It waits no more, or something about itself has changed."""
        self._all.pop(name, None)

    def put(self, name: str, now: float, *, latest_at: float, roomed: bool = False) -> Deferral:
        """It was decided that nothing can be done for it now, or (`roomed`) not before its room is made."""
        known = self._all.get(name)
        one = Deferral(self._cluster.releases.count, now + RETRY_S, now, latest_at, roomed=roomed)
        if known is not None:
            one.kinds, one.explained_until, one.times = known.kinds, known.explained_until, known.times + 1
        self._all[name] = one
        self.wake = min(self.wake, latest_at, now + self._rules.look_interval_s)
        return one

    def older(self, name: str, now: float) -> bool:
        """Whether the last decision about it is from before this moment."""
        one = self._all.get(name)
        return one is None or one.tried_at + RETRY_S <= now

    def due(self, name: str, rank: int, now: float) -> bool:
        """Whether it is to be decided now about the deployment that has this rank in line."""
        one = self._all.get(name)
        if one is None or (one.roomed and name not in self._cluster.rooms):
            return True
        latest_at = self._latest_at(one, name, rank)
        if latest_at <= now:
            return True
        first = rank < FIRST
        count = self._cluster.releases.count
        if one.releases != count:
            if not first and now < one.again_at:
                latest_at = min(latest_at, one.again_at)
            elif self._could(one, name, now):
                return True
            else:
                one.releases, one.again_at = count, now + RETRY_S
                if first and not one.roomed:
                    one.latest_at = min(one.latest_at, one.tried_at + DISTURB_S)
                    latest_at = min(latest_at, one.latest_at)
                    if latest_at <= now:
                        return True
        self.wake = min(self.wake, latest_at)
        return False

    def _latest_at(self, one: Deferral, name: str, rank: int) -> float:
        looks = 1
        if rank >= FIRST and not self._fairness.urgent(name, one.tried_at + self._rules.look_interval_s):
            looks = min(MOST_IDLE_LOOKS, 1 + one.times)
        # All on one beat, so that the first in line are asked about once for all behind them.
        beat_s = self._rules.look_interval_s
        on_beat = beat_s * math.floor((one.tried_at + looks * beat_s) / beat_s)
        return min(one.latest_at, max(on_beat, one.tried_at + RETRY_S))

    def _could(self, one: Deferral, name: str, now: float) -> bool:
        ids = self._cluster.releases.since(one.releases, MOST_RELEASES)
        return ids is None or (bool(ids) and self._frees(name, ids, now))
