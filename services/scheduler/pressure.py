"""How long requests wait at the gateways, and whether a deployment needs one more replica because of that. Pure.

The target concurrency says how many replicas so many requests need if all are alike. Where they are not (long outputs,
few slots), requests wait although the count is right. So age decides as well: when the oldest request has waited
as long as loading another replica takes, that replica would have been there by now, and one more is wanted.

One at a time, and without oscillation. The next one is wanted only when the last has been ready for a load time and the
oldest still waits too long, and no less long than then: else it is working. What was wanted stays wanted until nobody
has waited half that long for `hold_s`; after that the count of requests and the keep-alive decide as ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PressureRules:
    """`least_s`: no age below it calls for a replica. `hold_s`: how long calm lasts before a replica more is wanted
    no more. `stale_s`: a gateway that has said nothing for so long has nobody waiting, or is gone."""

    least_s: float = 1.0
    hold_s: float = 10.0
    stale_s: float = 5.0
    most_gateways: int = 256


@dataclass(slots=True)
class _Word:
    """What a gateway said last: so many wait, the oldest since that second; heard at `at`."""

    waiting: int
    since: float
    at: float


@dataclass(slots=True)
class _Pressure:
    """One deployment. `level` is the number of replicas wanted for its age (0: none); `ready` as seen last. At
    `looked_at`, when that grew or was to grow or had helped, the oldest had waited for `age_s`. `calm_since`: from then
    on nobody has waited long."""

    words: dict[str, _Word] = field(default_factory=dict)
    level: int = 0
    ready: int = 0
    looked_at: float = -math.inf
    age_s: float = 0.0
    calm_since: float | None = None
    due_at: float | None = None


class Pressure:
    """Waits by deployment; moments are monotonic seconds of the scheduler's clock."""

    def __init__(self, rules: PressureRules | None = None) -> None:
        self.rules = rules or PressureRules()
        self._all: dict[str, _Pressure] = {}

    def __len__(self) -> int:
        return len(self._all)

    def heard(self, name: str, gateway_id: str, waiting: int, oldest_s: float, now: float) -> None:
        """A gateway says how many of its requests run nowhere, and how long the oldest of them has waited."""
        if waiting <= 0:
            one = self._all.get(name)
            if one is not None:
                one.words.pop(gateway_id, None)
            return
        one = self._all.setdefault(name, _Pressure())
        one.words.pop(gateway_id, None)
        one.words[gateway_id] = _Word(waiting, now - max(0.0, oldest_s), now)
        if len(one.words) > self.rules.most_gateways:
            del one.words[next(iter(one.words))]

    def gone(self, name: str) -> None:
        """This deployment is gone."""
        self._all.pop(name, None)

    def keep_only(self, names: Iterable[str]) -> None:
        """All others are gone."""
        kept = dict.fromkeys(names)
        self._all = {name: one for name, one in self._all.items() if name in kept}

    def waiting(self, name: str, now: float) -> int:
        """How many of its requests run nowhere, as far as the gateways have said."""
        return sum(word.waiting for word in self._fresh(name, now))

    def since(self, name: str, now: float) -> float | None:
        """Since when the oldest of them waits; None: none does."""
        return min((word.since for word in self._fresh(name, now)), default=None)

    def floor(self, name: str, *, ready: int, coming: int, load_s: float, now: float) -> int:
        """The replicas wanted because of the age of its queue, 0 if it says nothing.

        `ready` and `coming` are those that it has, `load_s` is what another one would take. The first replica is not
        age's business: any request wants it.
        """
        one = self._all.get(name)
        if one is None:
            return 0
        late_s = max(self.rules.least_s, load_s)
        since = self.since(name, now)
        age_s = 0.0 if since is None else now - since
        if ready > one.ready:
            one.looked_at, one.age_s = now, age_s
        one.ready = ready
        due_at: float | None = None
        if age_s < 0.5 * late_s:
            due_at = self._calm(one, now)
            if one.level == 0 and not one.words:
                del self._all[name]
                return 0
        else:
            one.calm_since = None
        if since is not None and ready > 0 and coming == 0:
            at = max(since, one.looked_at) + late_s
            if at <= now:
                if age_s >= one.age_s:
                    one.level = ready + 1
                one.looked_at, one.age_s, at = now, age_s, now + late_s
            due_at = at if due_at is None else min(due_at, at)
        one.due_at = due_at
        return one.level

    def due_at(self, name: str) -> float | None:
        """When time alone changes what `floor` says, as of its last answer; None: only events do."""
        one = self._all.get(name)
        return None if one is None else one.due_at

    def _calm(self, one: _Pressure, now: float) -> float | None:
        """Nobody has waited long; until when what was wanted stays wanted."""
        if one.calm_since is None:
            one.calm_since = now
        until = one.calm_since + self.rules.hold_s
        if until <= now:
            one.level = 0
        return until if one.level > 0 else None

    def _fresh(self, name: str, now: float) -> list[_Word]:
        one = self._all.get(name)
        if one is None:
            return []
        old = [id for id, word in one.words.items() if now - word.at > self.rules.stale_s]
        for id in old:
            del one.words[id]
        return list(one.words.values())
