"""Which copies a tier lets go when it needs room: the policy, for DRAM and SSD alike. Pure.

A copy is worth keeping for the waiting that it saves: how often it is used, times the seconds that bringing it back
would take, for every byte of room that it takes:

    keep value = uses per second × seconds to bring it back ÷ bytes of room

The copies of least value go first. This is the family of GreedyDual-Size-Frequency (Cherkasova, "Improving WWW Proxies
Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998: frequency × cost ÷ size), with one change:
GDSF ages its copies by an inflating clock that is added to the value at every access, which loses the unit; here the
frequency itself decays, so that the value stays a rate of seconds saved and can be shown to an operator.

Cost matters because it differs by orders of magnitude inside one tier: 10 GB that the disk gives back in five seconds
are not 10 GB that have to be converted anew from a hub in five minutes. Where the costs per byte are equal (all copies
in DRAM come back from the same disk) the bytes cancel out and what is left is "least frequently used, with decay".
Copies of equal value, among them all that were not used yet, go by recency: least recently used first. What cannot be
brought back at all (`bring_back_s` is None) is worth more than anything that can.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Final, Generic, TypeVar

import msgspec

# A use counts half after this long. Requests for one model come in bursts of minutes and return by the hour or the
# working day; an hour forgets yesterday's favourite before noon and still sees through a pause of ten minutes.
HALF_LIFE_S: Final = 3600.0
REMEMBERED: Final = 10_000  # checkpoints whose uses are known, on the server or not

K = TypeVar("K", bound=Hashable)


class Uses(Generic[K]):
    """How often each key is used: exponentially decayed counts, time as an argument in seconds.

    With a steady rate r the decayed count tends to r × half_life_s ÷ ln 2, which `rate` divides out again. What has
    left the server is remembered too: a checkpoint that comes back is worth what it was used, not one use (in the
    replay of `benchmarks/eviction.py` that saves up to an eighth of the waiting where the SSD tier is small). The least
    used are forgotten when there are more than `remembered` keys.
    """

    def __init__(self, half_life_s: float = HALF_LIFE_S, *, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._half_lives_per_s = 1.0 / half_life_s
        self._uses_per_s = math.log(2) / half_life_s  # of a decayed count of 1
        self._counts: dict[K, tuple[float, float]] = {}  # key → (count at that time, time of its last use)

    def record(self, key: K, now: float) -> None:
        """One use."""
        self._counts[key] = (self._count(key, now) + 1.0, now)
        if len(self._counts) > self._remembered:  # half of them go at once, so that sorting is seldom
            in_order = sorted(self._counts, key=lambda one: (self._count(one, now), self._counts[one][1]))
            for one in in_order[: len(in_order) - max(1, self._remembered // 2)]:
                if one != key:
                    del self._counts[one]

    def rate(self, key: K, now: float) -> float:
        """Uses per second; 0.0 for what was not used yet."""
        return self._count(key, now) * self._uses_per_s

    def last(self, key: K) -> float | None:
        """When it was used last, if ever."""
        found = self._counts.get(key)
        return None if found is None else found[1]

    def _count(self, key: K, now: float) -> float:
        found = self._counts.get(key)
        if found is None:
            return 0.0
        return found[0] * math.exp2((found[1] - now) * self._half_lives_per_s)


class Candidate(msgspec.Struct, Generic[K], frozen=True):
    """A copy that may go. `recency` grows with the order of use; `bring_back_s` is None when it cannot come back."""

    key: K
    room_bytes: int
    uses_per_s: float
    bring_back_s: float | None
    recency: int = 0


def keep_value(candidate: Candidate[K]) -> float:
    """Seconds of waiting that a byte of it saves per second."""
    if candidate.bring_back_s is None:
        return math.inf
    return candidate.uses_per_s * candidate.bring_back_s / max(1, candidate.room_bytes)


def ranked(candidates: Iterable[Candidate[K]]) -> list[Candidate[K]]:
    """In the order in which they would go."""
    return sorted(candidates, key=lambda one: (keep_value(one), one.recency))


def choose_victims(candidates: Iterable[Candidate[K]], needed: int) -> list[Candidate[K]] | None:
    """Whom to evict so that `needed` bytes become free; None if all of them together would not do.

    The least valuable go until there is room; of those, the most valuable ones without which there is still room stay.
    """
    victims: list[Candidate[K]] = []
    freed = 0
    for one in ranked(candidates):
        if freed >= needed:
            break
        victims.append(one)
        freed += one.room_bytes
    if freed < needed:
        return None
    for one in reversed(victims[:-1]):  # without the last one there would be too little
        if freed - one.room_bytes >= needed:
            victims.remove(one)
            freed -= one.room_bytes
    return victims
