"""How far estimates were from what happened. Pure."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from services.scheduler.terms import Startup
from shared.contracts.placement import ReplicaLoaded

KEPT: Final = 256  # loads


@dataclass(frozen=True, slots=True)
class Missed:
    """A load as it was estimated and as it was, without making room. `id` is the replica's, or the decision's."""

    id: str
    server_id: str
    tier: str
    predicted: Startup
    actual: Startup
    actual_s: float

    @property
    def error(self) -> float:
        """|estimate − actual| / actual, in total."""
        return abs(self.predicted.load_s - self.actual_s) / self.actual_s if self.actual_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of `loads` loads: the median and the 95th percentile (None: no load yet). `by_tier` the same."""

    loads: int = 0
    median: float | None = None
    p95: float | None = None
    by_tier: dict[str, Errors] = field(default_factory=dict)


class Accuracy:
    """The last `KEPT` loads."""

    def __init__(self) -> None:
        self._last: collections.deque[Missed] = collections.deque(maxlen=KEPT)

    def observed(self, id: str, predicted: Startup, report: ReplicaLoaded) -> Missed:
        """One more load has ended."""
        actual = Startup(report.wait_s, report.move_s, report.attach_s)
        missed = Missed(id, report.server_id, report.tier, predicted, actual, report.total_s)
        self._last.append(missed)
        return missed

    def errors(self) -> Errors:
        """Of the last loads."""
        tiers = sorted({one.tier for one in self._last})
        by_tier = {tier: _errors(one.error for one in self._last if one.tier == tier) for tier in tiers}
        total = _errors(one.error for one in self._last)
        return Errors(total.loads, total.median, total.p95, by_tier)


def _errors(errors: Iterable[float]) -> Errors:
    ordered = sorted(errors)
    if not ordered:
        return Errors()
    return Errors(len(ordered), _percentile(ordered, 0.5), _percentile(ordered, 0.95))


def _percentile(ordered: list[float], part: float) -> float:
    """With linear interpolation between the two nearest."""
    at = part * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
