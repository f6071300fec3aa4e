"""What is asked of a fleet: "p99 startup 5s", "p95 ttft 800ms", "mean startup 1s". Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared.errors import Code, HearthError
from simulator.report.intervals import Estimate

_WORDS: Final = re.compile(
    r"\s*(mean|p50|p95|p99)\s+(startup|ttft)\s*(?:<=?|≤)?\s*([0-9.]+)\s*(ms|s)\s*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Slo:
    """A figure of `simulator.report.figures` that must not be above `limit_s`."""

    figure: str
    limit_s: float
    words: str

    def met(self, found: Mapping[str, Estimate]) -> bool:
        """Whether the upper end of the figure's 95 % interval is within the limit, and no request failed; with a single
        run the figure itself."""
        one = found[self.figure]
        high = one.high if one.runs > 1 else one.mean
        return high <= self.limit_s and found["failed"].mean == 0


def slo(text: str) -> Slo:
    """Raises HearthError: INVALID_REQUEST."""
    match = _WORDS.fullmatch(text)
    try:
        limit = float(match[3]) if match else 0.0
    except ValueError:
        limit = 0.0
    if match is None or limit <= 0:
        raise HearthError(
            Code.INVALID_REQUEST,
            f"{text!r} is no SLO; write mean, p50, p95 or p99, then startup or ttft, then a time: p99 startup 5s.",
        )
    limit_s = limit / 1000 if match[4].lower() == "ms" else limit
    figure = f"{match[2].lower()}_{match[1].lower()}_s"
    return Slo(figure, limit_s, f"{match[1].lower()} {match[2].lower()} ≤ {limit_s:g} s")
