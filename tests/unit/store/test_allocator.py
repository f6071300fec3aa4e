"""The pool's allocator: whole chunks, one run where possible, nothing lost or handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.allocator import Allocator
from shared.contracts.residency import Extent

CHUNK = 4096


def pool(chunks: int = 10) -> Allocator:
    return Allocator(chunk_bytes=CHUNK, chunk_count=chunks)


def take(allocator: Allocator, chunks: int) -> tuple[Extent, ...]:
    extents = allocator.allocate(chunks * CHUNK)
    assert extents is not None
    return extents


def test_sizes_are_rounded_up_to_whole_chunks() -> None:
    allocator = pool()
    extents = allocator.allocate(CHUNK + 1)
    assert extents == (Extent(offset=0, length=2 * CHUNK),)
    assert allocator.free_chunks == 8


def test_the_smallest_run_that_fits_is_taken() -> None:
    allocator = pool()
    first, _, third, _ = (take(allocator, chunks) for chunks in (4, 1, 2, 1))
    allocator.free(first)
    allocator.free(third)
    assert take(allocator, 2) == third
    assert take(allocator, 3) == (Extent(offset=0, length=3 * CHUNK),)


def test_several_extents_when_no_run_is_long_enough() -> None:
    allocator = pool(6)
    pieces = [take(allocator, 1) for _ in range(6)]
    for index in (0, 1, 3, 5):
        allocator.free(pieces[index])
    extents = take(allocator, 4)
    assert extents[0] == Extent(offset=0, length=2 * CHUNK)
    assert sum(extent.length for extent in extents) == 4 * CHUNK
    assert allocator.free_chunks == 0
    assert allocator.allocate(1) is None


@pytest.mark.parametrize(
    "extent",
    [
        Extent(offset=0, length=CHUNK),
        Extent(offset=1, length=CHUNK),
        Extent(offset=5 * CHUNK, length=CHUNK - 1),
        Extent(offset=9 * CHUNK, length=2 * CHUNK),
    ],
)
def test_free_of_what_was_not_allocated_is_refused(extent: Extent) -> None:
    allocator = pool()
    allocator.free(take(allocator, 5)[:1])
    with pytest.raises(ValueError):
        allocator.free([extent])


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 8)), max_size=80))
def test_nothing_is_lost_or_handed_out_twice(steps: list[tuple[bool, int]]) -> None:
    allocator = pool(16)
    held: list[tuple[Extent, ...]] = []
    for allocate, number in steps:
        if allocate:
            before = allocator.free_chunks
            extents = allocator.allocate(number * CHUNK)
            assert (extents is None) == (before < number)
            if extents is not None:
                held.append(extents)
        elif held:
            allocator.free(held.pop(number % len(held)))
        allocator.check()
        chunks = [
            at for extents in held for e in extents for at in range(e.offset // CHUNK, (e.offset + e.length) // CHUNK)
        ]
        assert len(chunks) == len(set(chunks))
        assert len(chunks) + allocator.free_chunks == 16
