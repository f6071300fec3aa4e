"""Moves chunks: threads that take the next chunk of the most urgent job, fetch it, verify it, announce it, store it.

Loading, importing, fetching, verifying and exporting are all jobs of a mover; they differ in where their chunks come
from (`ChunkOrigin`) and where they go (the pool, a `ChunkSink`).
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import xxhash

from services.store.chunk_queue import ChunkQueue, ChunkSink, Job, Report, Task
from services.store.pool import Pool
from shared.contracts.residency import Extent
from shared.errors import Code, Failure, HearthError

_REPAIRABLE: Final = (Code.CHECKPOINT_CORRUPT, Code.CHECKPOINT_UNAVAILABLE)
_ENDING: Final = (Code.DRAINING, Code.CANCELLED)
WRITERS: Final = 2  # keep a disk busy with writes


def checksum(view: memoryview) -> str:
    """The checksum of a chunk: its xxh3_64, 16 hex digits.

    Why this one: it finds what disks, networks and memory do to bytes (no adversary: what a chunk is believed by is the
    manifest, whose digest names the checkpoint), and it is the cheapest there is. On one core of an EPYC (Zen 4), GB/s
    over 1 GiB in chunks of 16 MiB: xxh3_64 28, xxh3_128 28, xxh64 14, CRC-32 (zlib) 4, SHA-256 1.8, BLAKE2b 0.9. So it
    takes about 0.04 CPU seconds per GB, as much as reading does, and it lets other threads run meanwhile.
    """
    digest = xxhash.xxh3_64()
    digest.update(view)  # releases the interpreter's lock, in every version of the library, unlike its constructor
    return digest.hexdigest()


class Mover:
    """`threads` threads that carry out jobs. With a pool they may put chunks there and announce them on its board.

    A chunk that has its place in the pool is given to the job's sink by threads of their own, behind the others: it
    waits where it lies, so what comes fast is usable as fast as it comes, however slow the disk is.

    Memory besides the pool: one chunk per thread, while there are jobs that need it.
    """

    def __init__(self, pool: Pool | None, *, threads: int, name: str) -> None:
        self._pool = pool
        self._queue = ChunkQueue(
            pool_bytes=pool.data_bytes if pool else 0, pool_chunk_bytes=pool.chunk_bytes if pool else 1
        )
        self._condition = threading.Condition()
        self._over: dict[str, threading.Event] = {}
        self._behind: deque[tuple[Task, memoryview]] = deque()  # chunks that their sinks have yet to get
        self._closed = False
        self._bug: BaseException | None = None
        # Daemons: a store that crashes must not wait for threads that wait for work.
        self._threads = [
            threading.Thread(target=self._live, args=(self._work,), name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        if pool is not None:
            self._threads += [
                threading.Thread(target=self._live, args=(self._write,), name=f"{name}-writer-{number}", daemon=True)
                for number in range(WRITERS)
            ]
        for thread in self._threads:
            thread.start()

    # -- for callers -----------------------------------------------------------------------------------------------

    def run(self, job: Job) -> Report:
        """Carry out a job; blocks. When it returns or raises, no thread touches the job's extents.

        Raises `HearthError`: checkpoint_corrupt (a chunk differs from its checksum and could not be repaired),
        cancelled (stopped), draining (closed), whatever origin, sink and rewrite raise; then every word of the board
        that belongs to the extents says so. ValueError if the job's numbers cannot be.
        """
        over = threading.Event()
        with self._condition:
            self._refuse()
            self._queue.add(job, time.monotonic())
            self._over[job.key] = over
            if self._queue.is_over(job.key):
                over.set()
            self._condition.notify_all()
        over.wait()
        with self._condition:
            del self._over[job.key]
            report, failure, words = self._queue.end(job.key, time.monotonic())
            self._condition.notify_all()  # buffers may go
        self._announce(words)
        if self._bug is not None and failure is not None and failure.code is Code.INTERNAL:
            raise RuntimeError("a thread of the mover has died") from self._bug
        if failure is not None:
            raise HearthError.of(failure)
        return report

    def set_priority(self, key: str, priority: int) -> None:
        """A job goes before or after others from its next chunk on. It need not have begun."""
        with self._condition:
            self._queue.set_priority(key, priority)

    def advance(self, key: str, chunks: int) -> None:
        """The holder of a job's window has taken the first `chunks` chunks (of the pool's size) of the image."""
        with self._condition:
            self._queue.advance(key, chunks)
            self._condition.notify_all()

    def stop(self, key: str) -> None:
        """End a job when the chunks under way are through; `run` raises cancelled. It need not have begun."""
        with self._condition:
            self._queue.stop(key)
            self._wake(key)

    def fail(self, extents: Sequence[Extent], tag: int) -> None:
        """Say on the board that nothing (more) comes into these extents: for what failed before or after its job."""
        if self._pool is not None:
            self._pool.fail(extents, tag)

    def close(self) -> None:
        """End all jobs when the chunks under way are through (`run` raises draining), and the threads."""
        with self._condition:
            self._closed = True
            self._queue.fail_all(Failure(code=Code.DRAINING, message="The store is shutting down."))
            for key in self._over:
                self._wake(key)
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    # -- threads ---------------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        if self._bug is not None:
            raise RuntimeError("a thread of the mover has died") from self._bug
        if self._closed:
            raise HearthError(Code.DRAINING)

    def _wake(self, key: str) -> None:
        """Let the caller of `run` go if its job is over."""
        if key in self._over and self._queue.is_over(key):
            self._over[key].set()

    def _announce(self, words: list[tuple[int, int]]) -> None:
        for chunk, word in words:
            assert self._pool is not None, "extents without a pool"
            self._pool.announce(chunk, word)

    def _live(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            if (bug := sys.exception()) is not None:  # ours: every job ends, and `run` raises it to the top
                with self._condition:
                    self._bug = bug
                    self._queue.fail_all(Failure(code=Code.INTERNAL, message="A thread of the mover has died."))
                    while self._behind:
                        self._queue.leave(self._behind.popleft()[0], time.monotonic(), failure=None)
                    for key in self._over:
                        self._wake(key)

    def _work(self) -> None:
        bounce = _Bounce()
        while True:
            with self._condition:
                while (task := self._queue.take(now := time.monotonic())) is None:
                    if self._closed:
                        return
                    if self._queue.is_empty:
                        bounce = _Bounce()
                    wake_at = self._queue.wake_at(now)
                    self._condition.wait(None if wake_at is None else wake_at - now)
            self._step(task, partial(self._carry, task, bounce))

    def _write(self) -> None:
        """Give chunks that lie in the pool to their sinks, until the mover is closed."""
        while True:
            with self._condition:
                while not self._behind:
                    if self._closed and self._queue.is_empty:
                        return
                    self._condition.wait()
                task, view = self._behind.popleft()
            self._step(task, partial(self._store, task, view))

    def _step(self, task: Task, step: Callable[[], bool]) -> None:
        """A step of moving one chunk; it returns whether the chunk is everywhere where it shall be."""
        began = time.thread_time()
        over = True
        failure: Failure | None = Failure(code=Code.INTERNAL, message="A chunk could not be moved.")
        try:
            over = step()
            failure = None
        except HearthError as error:
            failure = error.failure
        except OSError as error:
            failure = Failure(code=Code.CHECKPOINT_UNAVAILABLE, message=f"Chunk {task.index} cannot be moved: {error}.")
        finally:
            with self._condition:
                self._queue.spend(task, time.thread_time() - began)
                if over:
                    self._queue.leave(task, time.monotonic(), failure=failure)
                    self._wake(task.job.key)
                    if task.job.window_chunks:
                        self._condition.notify_all()  # the place may be filled again

    def _store(self, task: Task, view: memoryview) -> bool:
        """Give a chunk to the job's sink, unless nobody wants it any more."""
        with self._condition:
            wanted = self._queue.is_wanted(task)
        if wanted:
            if task.job.sink is not None:
                task.job.sink.write(task.index, view)
            with self._condition:
                done_bytes = self._queue.stored(task)
            task.job.progressed(done_bytes)
        return True

    def _carry(self, task: Task, bounce: _Bounce) -> bool:
        """Bring one chunk where it shall be; False if its sink gets it later."""
        job = task.job
        if len(task.spans) == 1:
            assert self._pool is not None, "extents without a pool"
            ((offset, length),) = task.spans
            target = self._pool.memory[offset : offset + length]
        else:
            target = bounce.view(task.length)
        digest, repaired = _fill(task, target)
        if len(task.spans) > 1:
            assert self._pool is not None, "extents without a pool"
            at = 0
            for offset, length in task.spans:
                self._pool.memory[offset : offset + length] = target[at : at + length]
                at += length
        with self._condition:
            words = self._queue.arrived(task, digest, repaired=repaired)
        # A processor that reorders stores cannot move this one before the bytes: the lock lies between.
        self._announce(words)
        if repaired and job.rewrite is not None:
            job.rewrite(task.index, target)
        if job.sink is not None and len(task.spans) == 1 and not job.window_chunks:
            with self._condition:
                behind = self._bug is None  # otherwise there may be no writer any more
                if behind:
                    self._behind.append((task, target))
                    self._condition.notify_all()
            if behind:
                return False
        return self._store(task, target)


def _fill(task: Task, target: memoryview) -> tuple[str, bool]:
    """Bring a sound chunk into `target`: its checksum, and whether it had to be repaired. Raises `HearthError`."""
    job, index = task.job, task.index
    fault = HearthError(Code.CHECKPOINT_CORRUPT, f"Chunk {index} of the checkpoint does not match its checksum.")
    wanted = job.checksums[index] if job.checksums is not None else ""
    for _ in range(2):  # what is wrong once may be right the second time: memory and cables fail, too
        try:
            job.origin.read(index, target)
        except HearthError as error:
            if job.repair is None or error.failure.code not in _REPAIRABLE:
                raise
            fault = error
        else:
            if wanted and not job.verify:
                return wanted, False
            digest = checksum(target)
            if not wanted or digest == wanted:
                return digest, False
    if job.repair is None:
        raise fault
    try:
        found = job.repair(index, target)
    except HearthError as error:
        if error.failure.code in _ENDING:
            raise
        message = f"{fault.failure.message} It cannot be repaired: {error.failure.message}"
        raise HearthError(fault.failure.code, message) from error
    if not found:
        raise HearthError(fault.failure.code, f"{fault.failure.message} Nobody has a sound copy of it.")
    digest = checksum(target)
    if wanted and digest != wanted:
        raise HearthError(
            Code.CHECKPOINT_CORRUPT, f"Chunk {index} of the checkpoint does not match its checksum, nor does its copy."
        )
    return digest, True


class _Bounce:
    """A thread's own memory for chunks that have no place, or several, in the pool."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None

    def view(self, size_bytes: int) -> memoryview:
        """`size_bytes` at a page boundary. Raises OSError."""
        if self._map is None or len(self._map) < size_bytes:
            self._map = mmap.mmap(-1, size_bytes)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(self._map)[:size_bytes]


__all__ = ["ChunkSink", "Job", "Mover", "Report", "checksum"]
