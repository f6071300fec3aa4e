"""Which chunk is moved next, where it goes, and what its arrival completes. Pure: time is an argument.

A *job* moves the chunks of one image. Jobs with the least priority number go first, among equals the oldest; a job that
must wait (for the holder of its window, for its rate) lets others go ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from services.store.ports import ChunkOrigin
from shared.contracts.residency import FAILED_TURN, Extent, arrival_word
from shared.errors import Code, Failure, HearthError

PICK_AGAIN_S: Final = 0.02
_LOST: Final = (Code.CANCELLED, Code.DRAINING, Code.NO_CAPACITY, Code.INTERNAL)
ORDERS_LIMIT: Final = 256  # jobs that orders are remembered for before they begin


class ChunkSink(Protocol):
    """Where the chunks of an image go besides the pool. Thread-safe."""

    def write(self, index: int, view: memoryview) -> None:
        """Take chunk `index` of the image, padding included. Raises `HearthError`."""


def _nothing(done_bytes: int) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Job:
    """An image to be moved, chunk by chunk.

    * `key` names the job while it runs and is never used again; `priority`: the least goes first.
    * `image_bytes` is a multiple of the page size, `chunk_bytes` the image's chunk size (the pool's may differ).
    * `checksums` has one xxh3_64 per chunk, or is None: then they are computed. With `verify` every chunk is compared.
    * `extents` are whole chunks of the pool (the last may be cut off after the image); none: through a buffer only.
      Arrivals are announced on the board under `tag`. With `window_chunks` the image streams through as many chunks
      of the pool, as `Mover.advance` allows.
    * `sink` is given every chunk once it is verified and announced.
    * `repair(index, buffer)` fills the buffer with a sound chunk in place of one that is corrupt or cannot be read,
      or returns False. `rewrite(index, view)` then puts it where the corrupt one was.
    * `bytes_per_s` bounds the rate (0: nothing does). `progressed` hears the bytes done, on the mover's threads.
    * `pick(left)` chooses the next of the chunks that are left (the last of `left` is the first of the image); without
      it, and in a window, they go in order. None: none just now, ask again in a moment. It is called with the mover's
      lock held.
    * `skip`: chunks that need not move. They are taken to be there, and are not announced.
    """

    key: str
    priority: int
    image_bytes: int
    chunk_bytes: int
    origin: ChunkOrigin
    checksums: Sequence[str] | None = None
    verify: bool = True
    extents: Sequence[Extent] = ()
    tag: int = 0
    window_chunks: int = 0
    sink: ChunkSink | None = None
    repair: Callable[[int, memoryview], bool] | None = None
    rewrite: Callable[[int, memoryview], None] | None = None
    bytes_per_s: int = 0
    progressed: Callable[[int], None] = _nothing
    pick: Callable[[Sequence[int]], int | None] | None = None
    skip: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Report:
    """What a job took.

    `waited_s` of `seconds` no chunk of it was under way: others went first, its window was full, its rate spent.
    `cpu_s` is the processor time of the mover's threads. `checksums` are the image's, given or computed (of a skipped
    chunk without one: ""). `repaired` chunks were corrupt and have been replaced, at the origin too if it could be.
    """

    seconds: float
    waited_s: float
    cpu_s: float
    checksums: tuple[str, ...]
    moved_bytes: int
    repaired: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One chunk to be moved: `spans` are its places in the pool (offset, length), in the order of the image."""

    job: Job
    index: int
    length: int
    spans: tuple[tuple[int, int], ...]


@dataclass
class _Orders:
    """What was said to a job, perhaps before it began."""

    priority: int | None = None
    consumed: int = 0
    stopped: bool = False


@dataclass
class _Running:
    """A job between its first and its last chunk."""

    job: Job
    priority: int
    arrival: int
    began: float
    idle_since: float | None
    slots: tuple[int, ...]  # chunks of the pool, in the order of the extents
    missing: list[int]  # bytes that each pool chunk of the image still lacks
    checksums: list[str]
    chunks: list[int]  # indices, the last goes first
    consumed: int = 0
    ready_at: float = 0.0
    under_way: set[int] = field(default_factory=set)
    waited_s: float = 0.0
    cpu_s: float = 0.0
    done_bytes: int = 0
    moved_bytes: int = 0
    repaired: list[int] = field(default_factory=list)
    failure: Failure | None = None


class ChunkQueue:
    """The jobs of one mover. Not thread-safe: whoever calls holds a lock."""

    def __init__(self, *, pool_bytes: int, pool_chunk_bytes: int) -> None:
        self._pool_bytes = pool_bytes
        self._pool_chunk_bytes = pool_chunk_bytes
        self._running: dict[str, _Running] = {}
        self._orders: dict[str, _Orders] = {}
        self._arrivals = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is no job."""
        return not self._running

    # -- jobs ------------------------------------------------------------------------------------------------------

    def add(self, job: Job, now: float) -> None:
        """A job begins.

        Raises `conflict` if one of this key runs, `no_capacity` if its window is too small for a chunk of the image,
        ValueError if its numbers cannot be.
        """
        if job.key in self._running:
            raise HearthError(Code.CONFLICT, f"The job {job.key} is running already.")
        count = -(-job.image_bytes // job.chunk_bytes)
        if job.checksums is not None and len(job.checksums) != count:
            raise ValueError(f"{len(job.checksums)} checksums for {count} chunks")
        slots, missing = self._places(job)
        orders = self._orders.pop(job.key, _Orders())
        self._arrivals += 1
        running = self._running[job.key] = _Running(
            job=job,
            priority=job.priority if orders.priority is None else orders.priority,
            arrival=self._arrivals,
            began=now,
            idle_since=now,
            slots=slots,
            missing=missing,
            checksums=list(job.checksums) if job.checksums is not None else [""] * count,
            chunks=[index for index in reversed(range(count)) if index not in job.skip],
            consumed=orders.consumed,
        )
        for index in job.skip:
            self._count(running, index)
            running.done_bytes += self._length(job, index)
        if orders.stopped:
            self.stop(job.key)

    def _places(self, job: Job) -> tuple[tuple[int, ...], list[int]]:
        """The pool's chunks that a job may use, and how many bytes of the image each turn of each holds."""
        if not job.extents:
            if job.window_chunks:
                raise ValueError("a window without extents")
            return (), []
        size = self._pool_chunk_bytes
        slots: list[int] = []
        for extent in job.extents:
            if extent.offset % size or not 0 <= extent.offset < extent.offset + extent.length <= self._pool_bytes:
                raise ValueError(f"{extent} is no part of the pool")
            slots += range(extent.offset // size, -(-(extent.offset + extent.length) // size))
        if any(extent.length % size for extent in job.extents[:-1]) or len(set(slots)) < len(slots):
            raise ValueError("the extents are no whole chunks of the pool")
        turns = -(-job.image_bytes // size)
        if not job.window_chunks:
            if sum(extent.length for extent in job.extents) < job.image_bytes:
                raise ValueError("the extents are too short for the image")
        else:
            if not 0 < job.window_chunks <= len(slots):
                raise ValueError(f"{len(slots)} chunks of the pool are no window of {job.window_chunks}")
            for index in range(-(-job.image_bytes // job.chunk_bytes)):
                first, last = self._turns(job, index)
                if last - first >= job.window_chunks:
                    raise HearthError(
                        Code.NO_CAPACITY,
                        f"A chunk of {job.chunk_bytes} bytes does not fit into {job.window_chunks} chunks of the pool.",
                    )
            slots = slots[: job.window_chunks]
        return tuple(slots), [min(size, job.image_bytes - turn * size) for turn in range(turns)]

    def _length(self, job: Job, index: int) -> int:
        return min(job.chunk_bytes, job.image_bytes - index * job.chunk_bytes)

    def _turns(self, job: Job, index: int) -> tuple[int, int]:
        """The first and the last of the pool chunks, counted along the image, that hold bytes of an image chunk."""
        begin = index * job.chunk_bytes
        return begin // self._pool_chunk_bytes, (begin + self._length(job, index) - 1) // self._pool_chunk_bytes

    def _count(self, running: _Running, index: int) -> list[int]:
        """A chunk is there; the pool chunks, counted along the image, that are complete with it."""
        if not running.slots:
            return []
        begin = index * running.job.chunk_bytes
        end, size = begin + self._length(running.job, index), self._pool_chunk_bytes
        complete: list[int] = []
        for turn in range(begin // size, (end - 1) // size + 1):
            running.missing[turn] -= min(end, (turn + 1) * size) - max(begin, turn * size)
            if running.missing[turn] == 0:
                complete.append(turn)
        return complete

    # -- orders ----------------------------------------------------------------------------------------------------

    def _order(self, key: str) -> _Orders:
        """Where to note what is said to a job that has not begun; the oldest such notes are forgotten."""
        orders = self._orders.setdefault(key, _Orders())
        while len(self._orders) > ORDERS_LIMIT:
            del self._orders[next(iter(self._orders))]
        return orders

    def set_priority(self, key: str, priority: int) -> None:
        """A job goes before or after others from now on, perhaps before it begins."""
        if (running := self._running.get(key)) is not None:
            running.priority = priority
        else:
            self._order(key).priority = priority

    def advance(self, key: str, chunks: int) -> None:
        """The holder of a window has taken the first `chunks` pool chunks of the image."""
        if (running := self._running.get(key)) is not None:
            running.consumed = max(running.consumed, chunks)
        else:
            orders = self._order(key)
            orders.consumed = max(orders.consumed, chunks)

    def stop(self, key: str) -> None:
        """Nobody needs this job any more: it ends at its next chunk, as failed, perhaps before it begins."""
        if key in self._running:
            self.fail(key, Failure(code=Code.CANCELLED, message="Nobody needs these bytes any more."))
        else:
            self._order(key).stopped = True

    def fail(self, key: str, failure: Failure) -> None:
        """A job takes no further chunk. The first failure is the one that counts."""
        running = self._running[key]
        running.failure = running.failure or failure
        running.chunks.clear()

    def fail_all(self, failure: Failure) -> None:
        """Every job takes no further chunk."""
        for key in self._running:
            self.fail(key, failure)

    # -- chunks ----------------------------------------------------------------------------------------------------

    def take(self, now: float) -> Task | None:
        """The chunk that shall be moved now, or None: there is none, or all must wait."""
        for running in sorted(self._running.values(), key=lambda one: (one.priority, one.arrival)):
            if running.chunks and running.ready_at <= now and self._has_room(running):
                task = self._take(running, now)
                if task is not None:
                    return task
        return None

    def wake_at(self, now: float) -> float | None:
        """When a job that is ahead of its rate may go on; None: no job waits for that."""
        moments = (one.ready_at for one in self._running.values() if one.chunks and one.ready_at > now)
        return min(moments, default=None)

    def _has_room(self, running: _Running) -> bool:
        """Whether the place of a window's next chunk is free: taken by the holder, and no thread works on it."""
        job = running.job
        if not job.window_chunks:
            return True
        _, last = self._turns(job, running.chunks[-1])
        before = last - job.window_chunks  # what lay in that place
        busy = min((self._turns(job, index)[0] for index in running.under_way), default=last)
        return before < running.consumed and before < busy

    def _take(self, running: _Running, now: float) -> Task | None:
        job = running.job
        if job.pick is not None and not job.window_chunks:
            picked = job.pick(running.chunks)
            if picked is None:
                running.ready_at = now + PICK_AGAIN_S
                return None
            index = picked
            running.chunks.remove(index)
        else:
            index = running.chunks.pop()
        length = self._length(job, index)
        if running.idle_since is not None:
            running.waited_s += now - running.idle_since
            running.idle_since = None
        if job.bytes_per_s:
            running.ready_at = max(running.ready_at, now) + length / job.bytes_per_s
        running.under_way.add(index)
        spans: list[tuple[int, int]] = []
        size, begin = self._pool_chunk_bytes, index * job.chunk_bytes
        first, last = self._turns(job, index)
        for turn in range(first, last + 1) if running.slots else ():
            low, high = max(begin, turn * size), min(begin + length, (turn + 1) * size)
            slot = running.slots[turn % job.window_chunks if job.window_chunks else turn]
            offset = slot * size + low - turn * size
            if spans and sum(spans[-1]) == offset:
                spans[-1] = (spans[-1][0], spans[-1][1] + high - low)
            else:
                spans.append((offset, high - low))
        return Task(job=job, index=index, length=length, spans=tuple(spans))

    def arrived(self, task: Task, checksum: str, *, repaired: bool) -> list[tuple[int, int]]:
        """A chunk lies verified in its place: (pool chunk, word) of what the board shall say now."""
        running = self._running[task.job.key]
        running.checksums[task.index] = checksum
        running.moved_bytes += task.length
        if repaired:
            running.repaired.append(task.index)
        words: list[tuple[int, int]] = []
        for turn in self._count(running, task.index):
            if task.job.window_chunks:
                lap, place = divmod(turn, task.job.window_chunks)
            else:
                lap, place = 0, turn
            words.append((running.slots[place], arrival_word(task.job.tag, lap)))
        return words

    def is_wanted(self, task: Task) -> bool:
        """Whether a chunk that has arrived shall be stored: also that of a job whose other chunks did not come, for a
        later one goes on from there, but not what was stopped, or that of a full disk.
        """
        failure = self._running[task.job.key].failure
        return failure is None or failure.code not in _LOST

    def stored(self, task: Task) -> int:
        """A chunk is everywhere where it shall be; the job's bytes done."""
        running = self._running[task.job.key]
        running.done_bytes += task.length
        return running.done_bytes

    def spend(self, task: Task, cpu_s: float) -> None:
        """A thread has spent processor time on a chunk, which others may have brought to its end meanwhile."""
        if (running := self._running.get(task.job.key)) is not None:
            running.cpu_s += cpu_s

    def leave(self, task: Task, now: float, *, failure: Failure | None) -> None:
        """No thread works on this chunk any more, and none will."""
        running = self._running[task.job.key]
        running.under_way.discard(task.index)
        if failure is not None:
            self.fail(task.job.key, failure)
        if not running.under_way:
            running.idle_since = now

    def is_over(self, key: str) -> bool:
        """Whether no thread works on a job and none will."""
        running = self._running[key]
        return not running.under_way and not running.chunks

    def end(self, key: str, now: float) -> tuple[Report, Failure | None, list[tuple[int, int]]]:
        """Forget a job that is over: what it took, how it failed, and what the board shall say then."""
        running = self._running.pop(key)
        self._orders.pop(key, None)
        report = Report(
            seconds=now - running.began,
            waited_s=running.waited_s,
            cpu_s=running.cpu_s,
            checksums=tuple(running.checksums),
            moved_bytes=running.moved_bytes,
            repaired=tuple(sorted(running.repaired)),
        )
        failed = arrival_word(running.job.tag, FAILED_TURN)
        words = [(slot, failed) for slot in running.slots] if running.failure is not None else []
        return report, running.failure, words


__all__ = ["ChunkQueue", "ChunkSink", "Job", "Report", "Task"]
