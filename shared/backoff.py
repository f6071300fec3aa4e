"""How long to wait before the next try: exponential, bounded, without randomness of its own."""

from __future__ import annotations


def delay_s(tries: int, *, first_s: float = 0.2, factor: float = 2.0, most_s: float = 30.0) -> float:
    """Seconds to wait after the `tries`-th failure in a row (counted from 1)."""
    if tries < 1:
        return 0.0
    # The exponent is bounded so that a long outage cannot overflow.
    return min(most_s, first_s * factor ** min(tries - 1, 64))
