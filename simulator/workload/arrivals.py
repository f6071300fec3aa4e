"""When requests come: a Poisson process, a gamma renewal process with a CV, counts per minute. Pure.

Seconds from 0; all functions return ascending times within [0, duration). A rate is requests per second.

**One continuous process.** A renewal process that begins with a full interval at second 0 has an arrival there as its
past. With CV > 1 arrivals come in clusters, so it sees more than its rate: (CV² - 1) / 2 requests more in every window
that is begun anew (31 for CV 8). So every process here is drawn once for the whole duration, and begins in equilibrium:
its first interval is what is left of one that began long before (Cox, *Renewal Theory*, 1962, §2.2 and §4.4). Then
the expected number of requests in any window of d seconds is exactly rate · d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import Code, HearthError

Times = NDArray[np.float64]
MOST_ARRIVALS: Final = 50_000_000
_BLOCK: Final = 4096
MINUTE_S: Final = 60.0


def poisson(rate: float, duration_s: float, generator: np.random.Generator) -> Times:
    """A Poisson process: memoryless, so it is always in equilibrium. Raises what `check_size` raises."""
    check_size(rate, duration_s)
    count = int(generator.poisson(rate * duration_s))
    return np.sort(generator.uniform(0.0, duration_s, count))


def gamma(rate: float, cv: float, duration_s: float, generator: np.random.Generator) -> Times:
    """A renewal process whose intervals are gamma distributed with mean 1 / rate and this coefficient of variation.

    Shape k = 1 / CV², scale θ = 1 / (rate · k). The interval in which an equilibrium process is looked at is drawn in
    proportion to its length: gamma(k + 1, θ); the look falls anywhere in it. Raises HearthError: INVALID_REQUEST.
    """
    if not 0 < cv <= 100:
        raise HearthError(Code.INVALID_REQUEST, f"A CV of {cv:g} makes no arrivals; it is above 0 and at most 100.")
    check_size(rate, duration_s)
    if rate * duration_s == 0:
        return np.zeros(0)
    shape = 1.0 / cv**2
    scale = 1.0 / (rate * shape)
    at = float(generator.uniform() * generator.gamma(shape + 1.0, scale))
    blocks: list[Times] = []
    while at < duration_s:
        times = at + np.concatenate(([0.0], np.cumsum(generator.gamma(shape, scale, _BLOCK))))
        blocks.append(times[:-1])
        at = float(times[-1])
        check_count(len(blocks) * _BLOCK)
    if not blocks:
        return np.zeros(0)
    found = np.concatenate(blocks)
    return found[found < duration_s]


def in_minutes(
    counts: Sequence[int] | NDArray[np.int64], generator: np.random.Generator, *, factor: float = 1.0
) -> Times:
    """So many requests in each minute, each anywhere in it with the same probability.

    `factor` thins or thickens: a count c becomes c · factor, rounded up with the probability of its fraction, so that
    the expected number is exact. Raises what `check_count` raises.
    """
    wanted = np.asarray(counts, dtype=np.float64) * factor
    whole = np.floor(wanted + generator.uniform(size=len(wanted))).astype(np.int64)
    check_count(int(whole.sum()))
    minutes = np.repeat(np.arange(len(whole), dtype=np.float64), whole)
    return np.sort((minutes + generator.uniform(size=len(minutes))) * MINUTE_S)


def check_size(rate: float, duration_s: float) -> None:
    """Raises HearthError: INVALID_REQUEST for a rate or duration that is none, or too many arrivals to be held."""
    if not (0 <= rate < float("inf") and 0 <= duration_s < float("inf")):
        raise HearthError(Code.INVALID_REQUEST, f"{rate:g} requests a second for {duration_s:g} s are no workload.")
    check_count(rate * duration_s)


def check_count(count: float) -> None:
    """Raises HearthError: INVALID_REQUEST for more arrivals than can be held."""
    if count > MOST_ARRIVALS:
        raise HearthError(
            Code.INVALID_REQUEST, f"{count:.0f} requests are too many for one run; the most are {MOST_ARRIVALS}."
        )
