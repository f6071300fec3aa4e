"""How each deployment is asked for: the times between its requests, its rate, its bursts. Pure.

Each deployment has a histogram of the times between its arrivals, as in the hybrid histogram policy of Shahrad et al.,
"Serverless in the Wild" (USENIX ATC 2020, section 4.2), with three changes. Bins are spaced by equal ratios, not by
minutes, because a model is worth holding for anything between a second and hours. Old observations fade, so that
a deployment whose habits change is believed again after a few hundred requests. And a keep-alive is not a percentile
of the histogram but the one that costs least, see `keep_alive_s`.

What is heard are hints of demand: the first request that waits at a gateway at once, later ones as a count. So a burst
is seen as a few gaps of the same length, not one by one; a histogram over equal ratios does not mind.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

FIRST_S: Final = 0.1  # the end of the first bin; nobody is held by the tenth of a second
RATIO: Final = 1.3
BINS: Final = 52  # the last ends after almost a day
EDGES_S: Final = tuple(FIRST_S * RATIO**number for number in range(BINS))
MIDDLE: Final = RATIO**-0.5  # the middle of a bin, as a part of its end
FULL: Final = 1e9  # weights are scaled down beyond this


@dataclass(frozen=True, slots=True)
class ArrivalRules:
    """`fade`: what an observation weighs less with each later one. `rate_s`: the time over which the rate is averaged
    (an arrival counts 1/e after it). `enough`: observations before anything is believed. `least_s`: the least
    keep-alive. `most`: deployments remembered, those heard last."""

    fade: float = 1.0 / 256.0
    rate_s: float = 300.0
    enough: float = 8.0
    doubt: float = 2.0
    least_s: float = 1.0
    most: int = 20_000


@dataclass(slots=True)
class _Waiting:
    """What a gateway last said: so many wait, heard at that second."""

    count: int
    at: float


@dataclass(slots=True)
class _History:
    """One deployment. Weights grow with each observation instead of the older ones' fading: the ratios are the same.

    `bins` has the weights of gaps up to each edge, and of longer ones at its end. `gap_s` and `gap_s2` are the sums of
    weight x gap and weight x gap². `recent` is the decayed count of arrivals as of `last_at`, since `first_at`.
    """

    first_at: float
    last_at: float
    bins: list[float] = field(default_factory=lambda: [0.0] * (BINS + 1))
    weight: float = 1.0  # of the next observation
    total: float = 0.0
    gap_s: float = 0.0
    gap_s2: float = 0.0
    recent: float = 0.0
    gateways: dict[str, _Waiting] = field(default_factory=dict)


class Arrivals:
    """Histories by deployment; moments are monotonic seconds. Memory: `most` histories of some 60 numbers each."""

    def __init__(self, rules: ArrivalRules | None = None) -> None:
        self.rules = rules or ArrivalRules()
        self._histories: dict[str, _History] = {}  # heard last at the end

    def __len__(self) -> int:
        return len(self._histories)

    def heard(self, name: str, now: float, *, gateway_id: str = "", waiting: int = 1, oldest_s: float = 0.0) -> int:
        """A gateway says how many wait, the oldest for so long; how many of them are new.

        Those are new that came after its last word: all, if even the oldest did; else the difference. What waited
        and began to run between two words is missed, which only makes a busy deployment look a little less so.
        """
        history = self._histories.get(name)
        before = history.gateways.get(gateway_id) if history is not None else None
        if before is None or now - oldest_s > before.at:
            new = waiting
        else:
            new = max(0, waiting - before.count)
        if new > 0:
            history = self.came(name, now, new)
        if history is not None:
            if waiting > 0:
                history.gateways[gateway_id] = _Waiting(waiting, now)
                if len(history.gateways) > 64:  # gateways come and go
                    del history.gateways[next(iter(history.gateways))]
            else:
                history.gateways.pop(gateway_id, None)
        return new

    def came(self, name: str, now: float, count: int = 1) -> _History:
        """So many requests came since the last ones, evenly as far as is known."""
        history = self._histories.pop(name, None)
        if history is None:
            history = _History(now, now, recent=float(count))
        else:
            self._observe(history, max(0.0, now - history.last_at) / count, count)
            history.recent = history.recent * self._decay(history, now) + count
            history.last_at = max(history.last_at, now)
        self._histories[name] = history
        if len(self._histories) > self.rules.most:
            del self._histories[next(iter(self._histories))]
        return history

    def forget(self, name: str) -> None:
        """This deployment is gone."""
        self._histories.pop(name, None)

    def keep_only(self, names: Iterable[str]) -> None:
        """All others are gone."""
        kept = dict.fromkeys(names)
        self._histories = {name: one for name, one in self._histories.items() if name in kept}

    def recent(self, most: int) -> list[str]:
        """The deployments that were asked for last, latest first."""
        return list(itertools.islice(reversed(self._histories), most))

    # -- what is known -------------------------------------------------------------------------------------------

    def keep_alive_s(self, name: str, most_s: float) -> float:
        """How long an idle replica is worth holding, at most `most_s`.

        By `most_s` the operator says what a cold start is worth: so many seconds of a replica that stands idle. The
        keep-alive k that then costs least is the one with the least E[min(gap, k)] + most_s · P(gap > k), what is held
        and what starts cold, over the gaps on record. (Not knowing the gaps, holding for exactly what a cold start is
        worth never costs more than twice the least possible, the ski rental bound; knowing them, it costs no more than
        that.) Few gaps say little about how long the next ones may be, so `doubt` more are added that are spread evenly
        over the logarithms up to `most_s`. A deployment that has told less than `enough` is held for `most_s`.
        """
        history = self._histories.get(name)
        if history is None or self._observations(history) < self.rules.enough:
            return most_s
        least_s = min(most_s, self.rules.least_s)
        doubt = self.rules.doubt * history.weight
        best_s, best_cost = most_s, math.inf
        held, below = 0.0, 0.0  # weight x seconds, and weight, of the gaps in bins that end before k
        number = 0
        for keep_s in (
            least_s,
            *EDGES_S[bisect.bisect_right(EDGES_S, least_s) : bisect.bisect_left(EDGES_S, most_s)],
            most_s,
        ):
            while number < BINS and EDGES_S[number] <= keep_s:
                held += history.bins[number] * EDGES_S[number] * MIDDLE
                below += history.bins[number]
                number += 1
            part = self._part(history, number, keep_s)
            cost = held + part * keep_s + (history.total - below - part) * (keep_s + most_s)
            cost += doubt * _unknown_cost(keep_s, least_s, most_s)
            if cost < best_cost * (1.0 - 1e-9):
                best_s, best_cost = keep_s, cost
        return best_s

    def rate(self, name: str, now: float) -> float:
        """Requests per second, averaged over the last `rate_s` or so; 0 for a deployment that was never asked for."""
        history = self._histories.get(name)
        if history is None:
            return 0.0
        # A young history is averaged over its own age, but for one that begins just now.
        seen_s = max(1.0, now - history.first_at)
        over_s = self.rules.rate_s * -math.expm1(-seen_s / self.rules.rate_s)
        return history.recent * self._decay(history, now) / over_s

    def burstiness(self, name: str) -> float:
        """The coefficient of variation of the times between arrivals: 0 a clock, 1 chance (Poisson), more: bursts."""
        history = self._histories.get(name)
        if history is None or self._observations(history) < self.rules.enough or history.gap_s <= 0.0:
            return 1.0
        mean_s = history.gap_s / history.total
        return math.sqrt(max(0.0, history.gap_s2 / history.total - mean_s * mean_s)) / mean_s

    def next_within(self, name: str, horizon_s: float, now: float) -> float:
        """The probability that the next request comes within `horizon_s`, given how long there has been none.

        The histogram says it, weighed against chance at the present rate as if that were one more observation: that is
        all there is when nearly all gaps on record are shorter than the present one.
        """
        history = self._histories.get(name)
        if history is None or history.total <= 0.0:
            return 0.0  # one request alone says nothing of a next one
        chance = -math.expm1(-self.rate(name, now) * horizon_s)
        since_s = max(0.0, now - history.last_at)
        longer = history.total - self._up_to(history, since_s)
        within = max(0.0, self._up_to(history, since_s + horizon_s) - self._up_to(history, since_s))
        one = history.weight
        return min(1.0, (within + one * chance) / (max(longer, within) + one))

    def last_at(self, name: str) -> float | None:
        """When it was last asked for."""
        history = self._histories.get(name)
        return None if history is None else history.last_at

    def __iter__(self) -> Iterator[str]:
        return iter(self._histories)

    # -- the arithmetic ------------------------------------------------------------------------------------------

    def _observe(self, history: _History, gap_s: float, count: int) -> None:
        history.weight *= (1.0 - self.rules.fade) ** -min(count, 1024)
        weight = history.weight * min(count, 1024)
        history.bins[bisect.bisect_left(EDGES_S, gap_s)] += weight
        history.total += weight
        history.gap_s += weight * gap_s
        history.gap_s2 += weight * gap_s * gap_s
        if history.weight > FULL:
            scale = 1.0 / history.weight
            history.bins = [one * scale for one in history.bins]
            history.weight, history.total = 1.0, history.total * scale
            history.gap_s, history.gap_s2 = history.gap_s * scale, history.gap_s2 * scale

    def _observations(self, history: _History) -> float:
        """How many observations the faded ones come to."""
        return history.total / history.weight

    def _decay(self, history: _History, now: float) -> float:
        return math.exp(-max(0.0, now - history.last_at) / self.rules.rate_s)

    def _up_to(self, history: _History, gap_s: float) -> float:
        """The weight of gaps up to this long."""
        number = bisect.bisect_right(EDGES_S, gap_s)
        return sum(history.bins[:number]) + self._part(history, number, gap_s)

    def _part(self, history: _History, number: int, gap_s: float) -> float:
        """The weight of gaps up to this long in the bin in which it lies; they are spread evenly over its logarithm."""
        if number >= BINS:
            return 0.0
        if number == 0:
            return history.bins[0] * gap_s / FIRST_S
        return history.bins[number] * math.log(gap_s / EDGES_S[number - 1]) / math.log(RATIO)


def _unknown_cost(keep_s: float, least_s: float, most_s: float) -> float:
    """What holding for `keep_s` costs, if gaps are spread evenly over the logarithms from `least_s` to `most_s`."""
    if most_s <= least_s:
        return 0.0
    spread = math.log(most_s / least_s)
    longer = math.log(most_s / keep_s) / spread
    return (keep_s - least_s) / spread + longer * (keep_s + most_s)
