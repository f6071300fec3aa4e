"""The line of those who wait for a first replica, longest wait first, and how much slack the whole of it has. Pure.

With M places, a promise of W seconds, and turns of `startup + tenure` seconds, the k-th in line starts in time if
nobody delays it and

    slack_k = M·(since_k + W − startup_k) − Σ_{i<k} (startup_i + tenure)

place-seconds are not yet spent by then (`docs/placement.md` derives it). Whoever asks wants the least slack from some
contender on to the end. It is kept per block of neighbours, so that a change costs O(√n) for n contenders.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from typing import Final, TypeAlias

BLOCK: Final = 128

Key: TypeAlias = tuple[float, str]  # since, name
Slack: TypeAlias = tuple[float, float]  # place-seconds, for the low and the high tenure

FRONT: Final[Key] = (-math.inf, "")
END: Final[Key] = (math.inf, "")


class Line:
    """Contenders by (`since`, name). `places`, `within_s`, `low_s` and `high_s` (tenures) are set by `suit`."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._since: dict[str, float] = {}
        self._places = 1
        self._within_s = math.inf
        self._tenures = (0.0, 0.0)

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, name: str) -> bool:
        return name in self._since

    def __iter__(self) -> Iterator[str]:
        """Names, the longest wait first."""
        return (name for block in self._blocks for _, name in block.keys)

    def suit(self, *, places: int, within_s: float, low_s: float, high_s: float) -> None:
        """Reckon with these numbers from now on."""
        now = (places, within_s, (low_s, high_s))
        if now != (self._places, self._within_s, self._tenures):
            self._places, self._within_s, self._tenures = now
            for block in self._blocks:
                block.stale = True

    def put(self, name: str, since: float, startup_s: float) -> None:
        """This one waits; it must not be in line already."""
        assert name not in self._since, f"{name} waits already"
        self._since[name] = since
        key = (since, name)
        if not self._blocks:
            self._blocks.append(_Block([key], [startup_s]))
            return
        at = self._block_of(key)
        block = self._blocks[at]
        index = bisect.bisect_left(block.keys, key)
        block.keys.insert(index, key)
        block.startups.insert(index, startup_s)
        block.stale = True
        if len(block.keys) > 2 * BLOCK:
            self._blocks.insert(at + 1, _Block(block.keys[BLOCK:], block.startups[BLOCK:]))
            del block.keys[BLOCK:], block.startups[BLOCK:]

    def drop(self, name: str) -> None:
        """This one waits no more, if it did."""
        since = self._since.pop(name, None)
        if since is None:
            return
        at = self._block_of((since, name))
        block = self._blocks[at]
        index = bisect.bisect_left(block.keys, (since, name))
        del block.keys[index], block.startups[index]
        block.stale = True
        if not block.keys:
            del self._blocks[at]

    def since(self, name: str) -> float:
        """The monotonic second from which this one waits."""
        return self._since[name]

    def first(self) -> str | None:
        """Whose wait is the longest."""
        return self._blocks[0].keys[0][1] if self._blocks else None

    def slack(self, name: str = "") -> Slack:
        """The least slack of this one and of all behind it ("": of all); infinite where nobody waits."""
        return self._least((self._since[name], name) if name else FRONT, END)

    def slack_before(self, name: str, since: float) -> Slack:
        """The least slack of those before this one (not in line: of all) that wait since that moment or later."""
        return self._least((since, ""), (self._since[name], name) if name in self._since else END)

    def _least(self, first: Key, end: Key) -> Slack:
        """The least slack from one key on and before another."""
        self._refresh()
        spent_low, spent_high = 0.0, 0.0
        low, high = math.inf, math.inf
        for block in self._blocks:
            if block.keys[0] >= end:
                break
            if block.keys[-1] >= first:
                least = block.least
                if block.keys[0] < first or block.keys[-1] >= end:
                    least = block.slack(self._places, self._within_s, self._tenures, first, end)
                low, high = min(low, least[0] - spent_low), min(high, least[1] - spent_high)
            spent_low += block.turns[0]
            spent_high += block.turns[1]
        return low, high

    def _refresh(self) -> None:
        for block in self._blocks:
            if block.stale:
                block.refresh(self._places, self._within_s, self._tenures)

    def _block_of(self, key: Key) -> int:
        at = bisect.bisect_left(self._blocks, key, key=lambda block: block.keys[-1])
        return min(at, len(self._blocks) - 1)


class _Block:
    """Neighbours in line. `least` is the least slack among them and `turns` what all their turns take, as if nobody
    stood before them; both for either tenure, and wrong while `stale`."""

    __slots__ = ("keys", "least", "stale", "startups", "turns")

    def __init__(self, keys: list[Key], startups: list[float]) -> None:
        self.keys = keys
        self.startups = startups
        self.stale = True
        self.least: Slack = (math.inf, math.inf)
        self.turns: Slack = (0.0, 0.0)

    def refresh(self, places: int, within_s: float, tenures: Slack) -> None:
        """Sum up anew."""
        self.stale = False
        self.least = self.slack(places, within_s, tenures, FRONT, END)
        startup_s = sum(self.startups)
        self.turns = (startup_s + len(self.keys) * tenures[0], startup_s + len(self.keys) * tenures[1])

    def slack(self, places: int, within_s: float, tenures: Slack, first: Key, end: Key) -> Slack:
        """The least slack from one key on and before another."""
        low, high = math.inf, math.inf
        low_s, high_s = tenures
        spent = 0.0
        for number, key in enumerate(self.keys):
            if key >= end:
                break
            startup_s = self.startups[number]
            if key >= first:
                whole = places * (key[0] + within_s - startup_s) - spent
                low, high = min(low, whole - number * low_s), min(high, whole - number * high_s)
            spent += startup_s
        return low, high
