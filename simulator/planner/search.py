"""The least servers for each size of DRAM. Pure: what a fleet does is asked of a function.

More servers, or more DRAM, are taken to be no worse: then what fits is an upper set of the grid servers × DRAM, and its
edge is found by bisection, each row beginning where the row with less DRAM has ended. Chance can break that near the
edge, so the plan's neighbours are looked at as well: one server more has to fit, too, and one less must not (bisection
has looked at that itself).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Fits = Callable[[int, int], bool]  # (servers, DRAM bytes of each)


@dataclass(frozen=True, slots=True)
class Row:
    """For a size of DRAM: the least servers that fit, None if not even the most do. `steady`: one more fits as well."""

    dram_bytes: int
    servers: int | None
    steady: bool = True


def least(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number in low…high that fits, None if `high` does not. All below `low` are known not to fit."""
    if low > high or not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low


def frontier(fits: Fits, dram_bytes: Sequence[int], max_servers: int) -> list[Row]:
    """One row per size of DRAM, the largest first.

    With the most DRAM the fewest servers do, so every further row begins at the number before it.
    """
    rows: list[Row] = []
    low = 1
    for dram in sorted(frozenset(dram_bytes), reverse=True):
        found = least(lambda servers, dram=dram: fits(servers, dram), low, max_servers)  # type: ignore[misc]
        if found is None:
            rows.append(Row(dram, None))
            low = max_servers + 1
            continue
        rows.append(Row(dram, found, found == max_servers or fits(found + 1, dram)))
        low = found
    return rows


def smallest(rows: Sequence[Row]) -> Row | None:
    """The fewest servers, and of these the one with the least DRAM; None if nothing fits."""
    fitting = [row for row in rows if row.servers is not None]
    return min(fitting, key=lambda row: (row.servers or 0, row.dram_bytes), default=None)


def worthwhile(rows: Sequence[Row]) -> list[Row]:
    """Those rows that no other one beats in both: fewer servers and no more DRAM, or as many and less."""
    kept: list[Row] = []
    for row in sorted(
        (row for row in rows if row.servers is not None), key=lambda row: (row.servers or 0, row.dram_bytes)
    ):
        if not kept or row.dram_bytes < kept[-1].dram_bytes:
            kept.append(row)
    return kept
