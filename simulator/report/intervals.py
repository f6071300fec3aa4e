"""The mean over independent runs, and the interval in which the true mean lies with 95 % confidence. Pure.

Student's t: the seeds of an experiment are few, and their figures are means or percentiles of many requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# The 0.975 quantile of Student's t for 1, 2, 3, … degrees of freedom; beyond, that of the normal distribution, which is
# 2 % lower at the most.
T_975: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
Z_975: Final = 1.960


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `runs`, and half the width of its interval (NaN for a single run: nothing is known about it)."""

    mean: float
    half: float
    runs: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half

    def text(self, digits: int = 2) -> str:
        """`1.23 ± 0.04`; without an interval only the mean, a dash for nothing."""
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.{digits}f}" + ("" if math.isnan(self.half) else f" ± {self.half:.{digits}f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Of one figure of independent runs; runs that do not have it (NaN) are left out."""
    known = [value for value in values if not math.isnan(value)]
    count = len(known)
    if count == 0:
        return Estimate(math.nan, math.nan, 0)
    mean = math.fsum(known) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (count - 1))
    quantile = T_975[count - 2] if count - 2 < len(T_975) else Z_975
    return Estimate(mean, quantile * deviation / math.sqrt(count), count)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """How many times larger, seed by seed: the runs of one seed share their workload, so the pairs are compared.

    The mean is geometric; the interval is that of the logarithms, made symmetric by its wider side.
    """
    logs = [
        math.log(above / below)
        for above, below in zip(numerators, denominators, strict=True)
        if above > 0 and below > 0 and math.isfinite(above) and math.isfinite(below)
    ]
    found = estimate(logs)
    if found.runs == 0:
        return found
    mean = math.exp(found.mean)
    return Estimate(mean, mean * (math.exp(found.half) - 1), found.runs)
