"""Which chunks of the DRAM pool are free: whole chunks, contiguous where possible. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from shared.contracts.residency import Extent


class Allocator:
    """A pool of `chunk_count` chunks of `chunk_bytes` each.

    One run is better than several (a worker's views on one run need no copy), so a request takes the smallest run
    that holds it, and only when there is none, the largest runs one after another.
    """

    def __init__(self, *, chunk_bytes: int, chunk_count: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.chunk_count = chunk_count
        self._free: list[tuple[int, int]] = [(0, chunk_count)] if chunk_count else []  # (first, count), sorted, merged

    @property
    def free_chunks(self) -> int:
        """Chunks that nobody has."""
        return sum(count for _, count in self._free)

    @property
    def capacity_bytes(self) -> int:
        """Size of the pool."""
        return self.chunk_count * self.chunk_bytes

    def chunks_for(self, size_bytes: int) -> int:
        """Chunks that `size_bytes` need."""
        return -(-size_bytes // self.chunk_bytes)

    def allocate(self, size_bytes: int) -> tuple[Extent, ...] | None:
        """Extents of whole chunks for `size_bytes`, or None if there are too few free chunks."""
        wanted = self.chunks_for(size_bytes)
        if wanted > self.free_chunks:
            return None
        fitting = [run for run in self._free if run[1] >= wanted]
        if fitting:
            first, count = min(fitting, key=lambda run: (run[1], run[0]))
            taken = [(first, wanted)]
        else:
            taken = []
            for first, count in sorted(self._free, key=lambda run: (-run[1], run[0])):
                take = min(count, wanted)
                taken.append((first, take))
                wanted -= take
                if not wanted:
                    break
        for run in taken:
            self._take(*run)
        return tuple(
            Extent(offset=first * self.chunk_bytes, length=count * self.chunk_bytes) for first, count in taken if count
        )

    def reserve(self, extents: Iterable[Extent]) -> None:
        """Take exactly these chunks. Raises ValueError, having taken none, if they are not free or no whole chunks."""
        runs = [self._run(extent) for extent in extents]
        before = self._free
        for first, count in runs:
            if not any(other <= first and first + count <= other + length for other, length in self._free):
                self._free = before
                raise ValueError(f"chunks {first} to {first + count - 1} are not free")
            self._take(first, count)

    def free(self, extents: Iterable[Extent]) -> None:
        """Give chunks back. Raises ValueError if some are free already or no whole chunks."""
        for extent in extents:
            first, count = self._run(extent)
            for other, length in self._free:
                if first < other + length and other < first + count:
                    raise ValueError(f"{extent} is free already")
            self._free.append((first, count))
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for first, count in self._free:
            if merged and merged[-1][0] + merged[-1][1] == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            else:
                merged.append((first, count))
        self._free = merged

    def _run(self, extent: Extent) -> tuple[int, int]:
        first, misfit = divmod(extent.offset, self.chunk_bytes)
        count, misfit_too = divmod(extent.length, self.chunk_bytes)
        if misfit or misfit_too or first < 0 or count <= 0 or first + count > self.chunk_count:
            raise ValueError(f"{extent} is no run of chunks")
        return first, count

    def _take(self, first: int, count: int) -> None:
        left: list[tuple[int, int]] = []
        for other, length in self._free:
            if other <= first and first + count <= other + length:
                if other < first:
                    left.append((other, first - other))
                if first + count < other + length:
                    left.append((first + count, other + length - first - count))
            else:
                left.append((other, length))
        self._free = left

    def check(self) -> None:
        """Assert that the free runs are sorted, merged and inside of the pool."""
        end = -1
        for first, count in self._free:
            assert count > 0, "an empty run"
            assert first > end, "free runs overlap or touch"
            end = first + count
        assert end <= self.chunk_count, "a free run outside of the pool"
