"""Figures that are learnt from what is measured: a level, and a straight line. Pure.

Both forget exponentially, so that they follow what changes, and both are shy of what is odd: a figure far from what is
known counts little, until the next one says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ODD: Final = 2.0  # a figure is odd if it is this many times what is known, or as small a part of it
CLIP: Final = 4.0  # an odd figure is not taken for more than this many times what is known
PLAIN_WEIGHT: Final = 0.2  # of the newest figure
SHY_WEIGHT: Final = 0.1  # of an odd one
SURE_WEIGHT: Final = 0.6  # of the second odd one in a row on the same side: it has changed
FEW: Final = 3  # so many figures do not say yet what is odd
LEAST: Final = 1e-6  # seconds, or whatever a figure is
KEPT: Final = 0.85  # of the weight of what a fit knows, at every new point
KEPT_OF_CHANGED: Final = 0.02  # the same, at the second odd point in a row on the same side
BELIEF: Final = 0.1  # the weight of what is believed of slope and base, in points, before the first one
BELIEF_LEAST: Final = 0.002  # the same after many; never nothing, or points of one x only would be no line
SMALL: Final = 0.01  # of a line at its scale: less than that is believed of neither part to be nothing


class Level:
    """An exponentially weighted mean of figures, None before the first.

    It is the geometric mean: now and then something takes far longer than it should, never far less, and what is most
    often right is the middle.
    """

    __slots__ = ("_figures", "_odd", "value")

    def __init__(self, value: float | None = None) -> None:
        self.value = value
        self._figures = 0 if value is None else 1
        self._odd = 0

    def learn(self, figure: float) -> None:
        """One more figure, not negative."""
        figure = max(figure, LEAST)
        self._figures += 1
        if self.value is None:
            self.value = figure
            return
        side = _side(figure, self.value) if self._figures > FEW else 0
        if side == 0:
            weight = max(PLAIN_WEIGHT, 1.0 / self._figures)
        elif side == self._odd:
            weight, self._figures = SURE_WEIGHT, 1  # it has changed: what comes next counts as at the beginning
        else:
            weight = SHY_WEIGHT
            figure = min(max(figure, self.value / CLIP), self.value * CLIP)
        self._odd = side
        self.value *= (figure / self.value) ** weight


@dataclass(frozen=True, slots=True)
class Straight:
    """y = slope · x + base; neither is negative."""

    slope: float
    base: float

    def at(self, x: float) -> float:
        """y of this x."""
        return self.slope * x + self.base


class Fit:
    """A straight line through points, by weighted least squares with exponential forgetting (a ridge regression).

    It begins with a belief and leaves it no further than the points ask for: slope and base are each pulled towards
    what is believed of them, in parts of themselves. So what points of one x only say goes to that part of the line
    which matters most at that x: small ones tell the base, and leave the slope as it is believed to be.

    Times are off by parts of themselves: a point weighs by its own size and by what was expected of it.
    """

    __slots__ = ("_before", "_belief", "_belief_weight", "_line", "_odd", "_scale", "_sums", "points")

    def __init__(self, belief: Straight, scale: float) -> None:
        self._belief = self._before = belief
        self._line: Straight | None = belief
        self.points = 0
        self._belief_weight = BELIEF
        self._scale = scale
        self._odd = 0
        self._sums: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)  # of weights, x, y, x·x, x·y

    def learn(self, x: float, y: float) -> None:
        """One more point; x in units of `scale`'s, both not negative."""
        self._before = self.line
        known = max(LEAST, self._before.at(x))
        side = _side(y, known) if self.points >= FEW else 0
        part, kept = 1.0, KEPT
        if side and side == self._odd:  # it has changed, but only so far as the points say
            kept, self._belief, self._belief_weight = KEPT_OF_CHANGED, self._before, BELIEF / 2
        elif side:
            part = SHY_WEIGHT
            y = min(max(y, known / CLIP), known * CLIP)
        self._odd = side
        self.points += 1
        self._belief_weight = max(BELIEF_LEAST, KEPT * self._belief_weight)
        self._line = None
        weight = part / (known * max(LEAST, y))
        more = (1.0, x / self._scale, y, (x / self._scale) ** 2, x / self._scale * y)
        self._sums = tuple(kept * one + weight * new for one, new in zip(self._sums, more, strict=True))

    def believe(self, belief: Straight) -> None:
        """What is believed besides the points is this now."""
        if belief != self._belief:
            self._belief = belief
            self._line = None

    @property
    def line(self) -> Straight:
        """The present line."""
        if self._line is None:
            self._line = self._fitted()
        return self._line

    def _fitted(self) -> Straight:
        n, sx, sy, sxx, sxy = self._sums
        slope, base = self._belief.slope * self._scale, self._belief.base
        before, least = self._before, max(LEAST, SMALL * (slope + base))
        pull_slope = self._belief_weight / (max(slope, least) * max(before.slope * self._scale, least))
        pull_base = self._belief_weight / (max(base, least) * max(before.base, least))
        n, sy = n + pull_base, sy + pull_base * base
        sxx, sxy = sxx + pull_slope, sxy + pull_slope * slope
        slope = (n * sxy - sx * sy) / (n * sxx - sx * sx)
        base = (sy - slope * sx) / n
        if slope < 0.0:
            slope, base = 0.0, sy / n
        elif base < 0.0:
            slope, base = sxy / sxx, 0.0
        return Straight(slope / self._scale, base)


def _side(figure: float, known: float) -> int:
    """1: far more than what is known; -1: far less; 0: about as much."""
    if figure > ODD * known:
        return 1
    return -1 if figure < known / ODD else 0
