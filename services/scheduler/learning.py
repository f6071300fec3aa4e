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
KEPT_OF_CHANGED: Final = 0.1  # the same, at the second odd point in a row on the same side
BELIEF: Final = 0.1  # the weight of what is believed before the first point
BELIEF_LEAST: Final = 0.002  # the same after many; never nothing, or points of one x only would be no line
SMALL: Final = 0.05  # of the scale: errors grow with x from there on, and count by what part of it they are


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
    """A straight line through points, by weighted least squares with exponential forgetting.

    It begins with a belief, that counts as a fraction of one point at 0 and one at `scale`: points of one x only do not
    tilt the line. Times are off by parts of themselves, so errors weigh less the larger x is: small points say what the
    base is, large ones the slope, and neither spoils the other.
    """

    __slots__ = ("_belief", "_belief_weight", "_line", "_odd", "_scale", "_sums", "points")

    def __init__(self, belief: Straight, scale: float) -> None:
        self._belief = belief
        self._line: Straight | None = belief
        self.points = 0
        self._belief_weight = BELIEF
        self._scale = scale
        self._odd = 0
        self._sums: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)  # of weights, x, y, x·x, x·y

    def learn(self, x: float, y: float) -> None:
        """One more point; x in units of `scale`'s, both not negative."""
        known = self.line.at(x)
        side = _side(y, known) if self.points >= FEW else 0
        weight, kept = 1.0, KEPT
        if side and side == self._odd:
            kept = KEPT_OF_CHANGED
        elif side:
            weight = SHY_WEIGHT
            y = min(max(y, known / CLIP), known * CLIP)
        self._odd = side
        self.points += 1
        self._belief_weight = max(BELIEF_LEAST, KEPT * self._belief_weight)
        self._line = None
        self._sums = _added(tuple(kept * one for one in self._sums), weight, x / self._scale, y)

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
        sums = self._sums
        for x, y in ((0.0, self._belief.base), (1.0, self._belief.at(self._scale))):
            sums = _added(sums, self._belief_weight, x, y)
        n, sx, sy, sxx, sxy = sums
        slope = (n * sxy - sx * sy) / (n * sxx - sx * sx)
        base = (sy - slope * sx) / n
        if slope < 0.0:
            slope, base = 0.0, sy / n
        elif base < 0.0:
            slope, base = sxy / sxx, 0.0
        return Straight(slope / self._scale, base)


def _added(sums: tuple[float, ...], weight: float, x: float, y: float) -> tuple[float, ...]:
    weight /= (SMALL + x) ** 2
    return tuple(one + weight * more for one, more in zip(sums, (1.0, x, y, x * x, x * y), strict=True))


def _side(figure: float, known: float) -> int:
    """1: far more than what is known; -1: far less; 0: about as much."""
    if figure > ODD * known:
        return 1
    return -1 if figure < known / ODD else 0
