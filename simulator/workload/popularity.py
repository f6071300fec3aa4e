"""Which part of all requests each deployment gets. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.errors import Code, HearthError

Shares = NDArray[np.float64]


def uniform(count: int) -> Shares:
    """All the same."""
    _some(count)
    return np.full(count, 1.0 / count)


def zipf(count: int, exponent: float) -> Shares:
    """The deployment of rank r gets a part in proportion to r^-exponent; 0 is uniform."""
    _some(count)
    if not 0 <= exponent <= 10:
        raise HearthError(Code.INVALID_REQUEST, f"A Zipf exponent of {exponent:g} is not within 0 to 10.")
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    shares: Shares = weights / weights.sum()
    return shares


def by_counts(count: int, calls: Sequence[int] | NDArray[np.int64]) -> Shares:
    """As a recorded fleet: deployment i gets the part of the function that `functions_of` names."""
    _some(count)
    weights = np.asarray(calls, dtype=np.float64)[functions_of(count, calls)]
    if not weights.sum() > 0:
        raise HearthError(Code.INVALID_REQUEST, "The trace has no calls in this time.")
    shares: Shares = weights / weights.sum()
    return shares


def functions_of(count: int, calls: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Which recorded function is which deployment: evenly spaced ranks of popularity, so that few deployments have
    busy, middling and rare ones among them as the whole fleet has. Beyond the number of functions they begin again."""
    ranked = np.argsort(-np.asarray(calls), kind="stable")
    if count >= len(ranked):
        return ranked[np.arange(count) % len(ranked)]
    return ranked[(np.arange(count) * len(ranked)) // count]


def _some(count: int) -> None:
    if count < 1:
        raise HearthError(Code.INVALID_REQUEST, "A workload needs at least one deployment.")
