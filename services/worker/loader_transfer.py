"""The bytes of an image on their way to where a model can use them: in the pool, or copied by a thread of its own."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from services.worker.arrival import Arrivals, Piece, Time, image_bytes, pieces_of, stream, streams
from services.worker.loader_memory import Image, Mappings
from services.worker.ports import LoadWatch
from shared.contracts.residency import Lease

REAL_TIME: Final = Time(now=time.perf_counter, sleep=time.sleep)
SLOW_BYTES_PER_S: Final = 1e9  # copying within memory, if it has to wait for large pages


class Placed:
    """Where the bytes of an image are or will be.

    `address` (CPU) is where they lie as one range; `memory_bytes` are memory of this worker's own. `waited_s` is how
    long nothing was left to do but to wait for bytes that were still arriving, `arrived_at` when the last of them was
    there (None: they were there before).
    """

    def __init__(self, address: int, size_bytes: int, *, memory_bytes: int = 0, arriving: bool = True) -> None:
        self.address: Final = address
        self.size_bytes: Final = size_bytes
        self.memory_bytes: Final = memory_bytes
        self.waited_s = 0.0
        self.arrived_at: float | None = None
        self._arriving = arriving
        self._stop = False
        self._threads: ThreadPoolExecutor | None = None
        self._coming: Callable[[], float | None] | None = None

    def meanwhile(self, bring: Callable[[LoadWatch], float | None], watch: LoadWatch) -> Placed:
        """`bring` runs on a thread of its own, from now on; `wait` is for its end. It returns `arrived_at`."""
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="transfer")
        future: Future[float | None] = self._threads.submit(bring, _Stoppable(watch, self))
        self._coming = future.result
        return self

    @property
    def stopped(self) -> bool:
        """Whether `cancel` was called."""
        return self._stop

    def wait(self) -> None:
        """Until all bytes are there. Raises what `Arrivals` and copying raise."""
        if self._coming is None:
            return
        started = time.perf_counter()
        self.arrived_at = self._coming()
        self._coming = None
        if self._arriving:
            self.waited_s += time.perf_counter() - started
        self.cancel()

    def cancel(self) -> None:
        """Nobody needs the bytes any more, or all are there: when this returns, no thread touches them."""
        self._stop = True
        if self._threads is not None:
            self._threads.shutdown(wait=True)


class _Stoppable:
    """A watch of which the load itself can stop its transfer. See `LoadWatch`."""

    def __init__(self, watch: LoadWatch, placed: Placed) -> None:
        self._watch = watch
        self._placed = placed

    @property
    def stopped(self) -> bool:
        """See `LoadWatch`."""
        return self._placed.stopped or self._watch.stopped

    def arrived(self, done_bytes: int, total_bytes: int) -> None:
        """See `LoadWatch`."""
        self._watch.arrived(done_bytes, total_bytes)

    def consumed(self, chunks: int) -> None:
        """See `LoadWatch`."""
        self._watch.consumed(chunks)


class MemoryCopier:
    """Copies from a segment at `source` to an image at `target`, at once. See `Copier`.

    `slow` is called with an offset in the image, once, when copying has been slow up to there.
    """

    def __init__(self, source: int, target: int, slow: Callable[[int], None], time: Time = REAL_TIME) -> None:
        self._source = source
        self._target = target
        self._slow: Callable[[int], None] | None = slow
        self._time = time
        self._finished = 0

    def start(self, piece: Piece) -> None:
        """See `Copier`; ctypes lets go of the interpreter lock meanwhile."""
        started = self._time.now()
        ctypes.memmove(self._target + piece.image_offset, self._source + piece.segment_offset, piece.length)
        self._finished += 1
        if self._slow is not None and piece.length < SLOW_BYTES_PER_S * (self._time.now() - started):
            self._slow(piece.image_offset + piece.length)
            self._slow = None

    def finished(self) -> int:
        """See `Copier`."""
        return self._finished

    def finish(self) -> None:
        """See `Copier`."""


def in_memory(lease: Lease, mappings: Mappings, watch: LoadWatch) -> tuple[Image, Placed]:
    """Where a model on the CPU finds its bytes: in the pool, or in memory of its own if they only stream through it.

    The image is released after `Placed.cancel` or `Placed.wait`, when no view on it is alive. Raises what
    `Mappings.map` raises, and `MemoryError`.
    """
    pieces, size_bytes = pieces_of(lease), image_bytes(lease)
    if not streams(lease):
        image = mappings.map(lease)
        placed = Placed(image.address, min(size_bytes, image.size_bytes))

        def look(own: LoadWatch) -> float | None:
            arrivals = Arrivals(pieces, image.word, own, REAL_TIME)
            arrivals.wait_all()
            return arrivals.complete_at

        return image, placed.meanwhile(look, watch) if lease.arrival is not None else placed
    image = mappings.own(size_bytes)

    def copy(own: LoadWatch) -> float | None:
        segment = mappings.hold(lease)
        try:
            arrivals = Arrivals(pieces, segment.word, own, REAL_TIME)
            copier = MemoryCopier(
                segment.address, image.address, lambda offset: mappings.ask_large_pages(image, offset, wanted=False)
            )
            stream(arrivals, copier, own, REAL_TIME, windowed=True)
            mappings.ask_large_pages(image, 0, wanted=True)  # the kernel makes them in its own time
            return arrivals.complete_at
        finally:
            mappings.release(segment)

    return image, Placed(image.address, size_bytes, memory_bytes=size_bytes).meanwhile(copy, watch)
