"""How many accesses any cache could have served, knowing the future. Pure.

For objects of one size Belady's rule (the furthest next use leaves; 1966) is the optimum. With sizes that differ the
optimum is NP-hard, so it is enclosed from both sides (Berger, Beckmann, Harchol-Balter, "Practical Bounds on Optimal
Caching with Variable Object Sizes", SIGMETRICS 2018):

* `belady_hits`: the furthest next use leaves until the rest fits: a schedule that could be, so the optimum has at least
  so many hits.
* `most_hits` (their PFOO-L): keeping an object from one use to the next takes size × steps of the cache's size × steps;
  the cheapest are taken until all is used up. No schedule can have more hits.

Both may leave an object out that is used only much later, which a real load cannot: its bytes go through DRAM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def next_uses(sequence: Sequence[int]) -> list[float]:
    """For every access the index of the next one to the same object; infinity if there is none."""
    found: list[float] = [math.inf] * len(sequence)
    seen: dict[int, int] = {}
    for index in range(len(sequence) - 1, -1, -1):
        found[index] = seen.get(sequence[index], math.inf)
        seen[sequence[index]] = index
    return found


def belady_hits(sequence: Sequence[int], size_bytes: Mapping[int, int], capacity_bytes: int) -> int:
    """Hits of the furthest-next-use rule, from an empty cache."""
    following = next_uses(sequence)
    held: dict[int, float] = {}  # object → its next use
    used = hits = 0
    for index, item in enumerate(sequence):
        size = size_bytes[item]
        if item in held:
            hits += 1
        elif size > capacity_bytes:
            continue
        else:
            used += size
        held[item] = following[index]
        while used > capacity_bytes:
            # Of equals the largest leaves, then the one that came first: no order is left to chance.
            victim = max(held, key=lambda one: (held[one], size_bytes[one]))
            used -= size_bytes[victim]
            del held[victim]
    return hits


def most_hits(sequence: Sequence[int], size_bytes: Mapping[int, int], capacity_bytes: int) -> int:
    """More hits than this no schedule has, from an empty cache."""
    costs = sorted(
        size_bytes[item] * (following - index)
        for index, (item, following) in enumerate(zip(sequence, next_uses(sequence), strict=True))
        if following < math.inf and size_bytes[item] <= capacity_bytes
    )
    left = float(capacity_bytes) * len(sequence)
    hits = 0
    for cost in costs:
        if cost > left:
            break
        left -= cost
        hits += 1
    return hits
