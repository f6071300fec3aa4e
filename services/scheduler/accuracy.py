"""How far estimates were from what happened. Pure."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

KEPT: Final = 256  # startups


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of `loads` startups: the median and the 95th percentile (None: none yet). `by_tier` the same."""

    loads: int = 0
    median: float | None = None
    p95: float | None = None
    by_tier: dict[str, Errors] = field(default_factory=dict)


class Accuracy:
    """The last `KEPT` startups."""

    def __init__(self) -> None:
        self._last: collections.deque[tuple[str, float]] = collections.deque(maxlen=KEPT)

    def observed(self, tier: str, error: float) -> None:
        """One more startup, from this tier, was off by this part of what it took."""
        self._last.append((tier, error))

    def errors(self) -> Errors:
        """Of the last startups."""
        tiers = sorted({tier for tier, _ in self._last})
        by_tier = {one: _errors(error for tier, error in self._last if tier == one) for one in tiers}
        total = _errors(error for _, error in self._last)
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
