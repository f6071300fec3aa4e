"""Figures that are learnt from what is measured: a level, and a straight line. Pure.

Both forget exponentially, so that they follow what changes, and both are shy of what is odd: a figure far from what is
known counts little, until the next one says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ODD: Final = 1.6  # a figure is odd if it is this many times what is known, or as small a part of it
CLIP: Final = 4.0  # an odd figure is not taken for more than this many times what is known
PLAIN_WEIGHT: Final = 0.4  # of the newest figure
SHY_WEIGHT: Final = 0.1  # of an odd one
SURE_WEIGHT: Final = 0.8  # of the second odd one in a row on the same side: it has changed
KEPT: Final = 0.9  # of the weight of what a fit knows, at every new point


class Level:
    """An exponentially weighted mean of positive figures. `value` is None before the first."""

    __slots__ = ("_odd", "value")

    def __init__(self, value: float | None = None) -> None:
        self.value = value
        self._odd = 0

    def learn(self, figure: float, share: float = 1.0) -> None:
        """One more figure. `share` (0 … 1) is how much it says, compared to others."""
        if self.value is None:
            self.value = figure
            return
        side = _side(figure, self.value)
        if side == 0:
            weight = PLAIN_WEIGHT
        elif side == self._odd:
            weight = SURE_WEIGHT
        else:
            weight = SHY_WEIGHT
            figure = min(max(figure, self.value / CLIP), self.value * CLIP)
        if share >= 0.5:  # what says little confirms nothing either
            self._odd = side
        elif side:
            weight = min(weight, PLAIN_WEIGHT)
        self.value += weight * share * (figure - self.value)


class MovingSpeed:
    """Seconds per byte of one tier's transfers. Larger ones say more, for a small one measures latencies.

    It begins with what others know.
    """

    __slots__ = ("_level", "_typical_bytes")

    WEIGHTY_BYTES: Final = 32 << 20  # what the first transfer must bring to outweigh what others know
    DRIFT: Final = 0.2  # how far a transfer moves, on a logarithmic scale, what counts as an ordinary size

    def __init__(self, known: float) -> None:
        self._level = Level(known)
        self._typical_bytes = 0.0

    @property
    def seconds_per_byte(self) -> float:
        """The present figure."""
        assert self._level.value is not None
        return self._level.value

    def learn(self, moved_bytes: int, seconds: float) -> None:
        """So many bytes (> 0) took so long (> 0)."""
        figure, size = seconds / moved_bytes, float(moved_bytes)
        weighty = size / (size + self.WEIGHTY_BYTES)
        if self._typical_bytes == 0.0:
            known = self.seconds_per_byte
            self._level = Level(known + weighty * (figure - known))
            self._typical_bytes = size
            return
        self._level.learn(figure, min(1.0, size / self._typical_bytes, 2 * weighty))
        self._typical_bytes *= (size / self._typical_bytes) ** self.DRIFT


@dataclass(frozen=True, slots=True)
class Straight:
    """y = slope · x + base; neither is negative."""

    slope: float
    base: float

    def at(self, x: float) -> float:
        """y of this x."""
        return self.slope * x + self.base


class Fit:
    """A straight line through points, by least squares with exponential forgetting, around what is believed before.

    The belief weighs as much as one point at 0 and one at `scale`, so that points of one x only do not tilt the line.
    """

    __slots__ = ("_odd", "_scale", "_sums", "belief", "points")

    def __init__(self, belief: Straight, scale: float) -> None:
        self.belief = belief
        self.points = 0
        self._scale = scale
        self._odd = 0
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of weights, x, y, x·x, x·y

    def learn(self, x: float, y: float) -> None:
        """One more point; x in units of `scale`'s, both not negative."""
        weight = 1.0
        side = _side(y, self.line.at(x)) if self.points else 0
        if side and side != self._odd:
            weight = SHY_WEIGHT
        self._odd = side
        self.points += 1
        x /= self._scale
        n, sx, sy, sxx, sxy = (KEPT * one for one in self._sums)
        self._sums = (n + weight, sx + weight * x, sy + weight * y, sxx + weight * x * x, sxy + weight * x * y)

    @property
    def line(self) -> Straight:
        """The present line."""
        ends = (self.belief.base, self.belief.at(self._scale))
        n, sx, sy, sxx, sxy = self._sums
        # The belief: a point at 0, and one at 1 (in units of the scale).
        n, sx, sy, sxx, sxy = n + 2.0, sx + 1.0, sy + ends[0] + ends[1], sxx + 1.0, sxy + ends[1]
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
