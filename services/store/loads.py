"""What is read from the SSD into the pool, in which order: whole images, and those that stream through a window. Pure.

One user's load reads at a time, for finishing one sooner beats sharing the disk: in order of priority, then of arrival.
A load of less priority that has begun goes on beside it (the mover gives it what is left over), and is raised when
somebody asks for what it brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.store.events import (
    PRIORITY_PREFETCH,
    PRIORITY_USER,
    AdvanceWindow,
    ClearBoard,
    Facts,
    ReadDone,
    ReadFailed,
    ReadImage,
    ReadProgressed,
    SetPriority,
    StopJob,
)
from services.store.holdings import Copy, OnSsd, Stream, total_bytes
from services.store.room import Room
from services.store.tiers import Tiers
from services.store.wants import Wants
from services.store.work import Want, WantKey, Work
from shared.contracts.residency import Consumed, Extent
from shared.errors import Code, Failure

ROOM_GRACE_S: Final = 1.0  # a load whose room is leased waits this long: the release may be on its way
WINDOW_CHUNKS: Final = 8  # enough for the copying side to work on some while the disk fills others
WINDOW_CHUNKS_LEAST: Final = 2
STREAMS_LIMIT: Final = 8  # images that stream at once: each has a job, and all share one disk
PIN_RETRY_S: Final = 30.0  # a pinned checkpoint that could not be brought into DRAM is tried again after this


@dataclass(slots=True, eq=False, kw_only=True)
class Load(Work):
    """The read of an image into chunks of its own (`copy`, from its start on), or the wait for a window.

    `stopped`: its chunks are wanted by somebody who goes first; it begins anew afterwards.
    """

    on: OnSsd
    copy: Copy | None = None
    streams: bool = False
    pinned: bool = False
    blocked_until: float | None = None
    stopped: bool = False


class Loads:
    """The queue of loads."""

    def __init__(self, tiers: Tiers, room: Room, wants: Wants) -> None:
        self._tiers = tiers
        self._room = room
        self._wants = wants
        self.images: dict[str, Load] = {}  # by checkpoint id
        self._windows: dict[WantKey, Load] = {}  # of images that stream, by want
        self._reading: dict[str, Load] = {}  # by job
        self._readers: dict[str, OnSsd] = {}  # of streams, by job
        self._unpromoted: dict[str, float] = {}  # pinned in DRAM and not there → when to try

    # -- asking --------------------------------------------------------------------------------------------------

    def want(self, want: Want, on: OnSsd) -> None:
        """Somebody wants a checkpoint of the SSD tier in DRAM."""
        stored, copy = on.stored, self._tiers.dram.copies.get(on.stored.id)
        if copy is not None and copy.work is not None and not isinstance(copy.work, Load):
            self.join(want, copy.work)  # an import brings it there
            self.arriving(want)
        elif on.condemned:
            failure = Failure(code=Code.CHECKPOINT_CORRUPT, message=f"Checkpoint {stored.id}: {on.condemned}")
            self._wants.fail(want, failure)
        elif stored.image_bytes <= self._tiers.pool_bytes:
            self._attach(want, self._load(on, want.priority))
        elif want.arriving and self._tiers.shows_arrival(stored.chunk_bytes):
            self._want_window(want, on)
        else:
            self._wants.fail(want, self._tiers.too_large_for_pool(stored.image_bytes))

    def join(self, want: Want, load: Work) -> None:
        """Somebody wants what is being brought already."""
        self._wants.attach(want, load)
        self.raise_priority(load, want.priority)

    def raise_priority(self, work: Work, priority: int) -> None:
        """It goes at least as early as this from now on."""
        if priority < work.priority:
            work.priority = priority
            if work.begun:
                self._tiers.out.add(SetPriority(work.job, priority))

    def settle(self, work: Work, copy: Copy | None) -> None:
        """Work that has begun goes on when nobody waits for it any more, but behind what somebody waits for."""
        if copy is not None and copy.leases:
            return
        wanted = min((want.priority for want in work.wants.values()), default=PRIORITY_PREFETCH)
        if wanted > work.priority:
            work.priority = wanted
            self._tiers.out.add(SetPriority(work.job, wanted))

    def promote(self, checkpoint_id: str) -> None:
        """It is pinned in DRAM: bring it there, when there is room."""
        self._unpromoted[checkpoint_id] = self._tiers.out.now

    def arriving(self, want: Want) -> bool:
        """Whether a lease can be given on what arrives of this want's image now; if so it is given."""
        copy = self._tiers.dram.copies.get(want.checkpoint_id)
        if copy is None or not want.arriving or not self.is_early(copy):
            return False
        self._wants.serve(want, copy)
        if copy.work is not None:
            self.raise_priority(copy.work, PRIORITY_USER)
        return True

    def is_early(self, copy: Copy) -> bool:
        """Whether others can see a copy arrive."""
        if copy.ready or not self._tiers.shows_arrival(copy.stored.chunk_bytes):
            return False
        return not (isinstance(copy.work, Load) and copy.work.stopped)

    def _attach(self, want: Want, load: Load) -> None:
        self.join(want, load)
        if load.copy is not None:
            self.arriving(want)

    def _load(self, on: OnSsd, priority: int) -> Load:
        load = self.images.get(on.stored.id)
        if load is None:
            load = self._new(on, priority)
            self.images[on.stored.id] = load
        return load

    def _want_window(self, want: Want, on: OnSsd) -> None:
        load = self._new(on, want.priority)
        load.streams = True
        self._windows[want.key] = load
        self._wants.attach(want, load)

    def _new(self, on: OnSsd, priority: int) -> Load:
        number = next(self._tiers.numbers)
        on.readers += 1
        return Load(
            job=f"load-{number}",
            number=number,
            priority=priority,
            phase="reading",
            total_bytes=on.stored.image_bytes,
            on=on,
        )

    # -- order ---------------------------------------------------------------------------------------------------

    def queued(self) -> list[Load]:
        """What has not begun. A window is worth nothing to a caller that is between two polls."""
        images = [load for load in self.images.values() if not load.begun]
        windows = [load for load in self._windows.values() if any(want.waiters for want in load.wants.values())]
        return images + windows

    def running(self) -> list[Load]:
        """What reads whole images now."""
        return list(self._reading.values())

    def user_waits(self) -> bool:
        """Whether a user's load is queued or reads."""
        streams = any(stream.running for stream in self._tiers.dram.streams.values())
        return streams or bool(self._windows) or any(load.priority == PRIORITY_USER for load in self.images.values())

    def start(self) -> None:
        """Begin what may begin now."""
        self._queue_pinned()
        while len(self._reading) < len(self.images) or self._windows:
            load = min(self.queued(), key=lambda load: load.rank, default=None)
            if load is None or any(other.priority <= load.priority for other in self._reading.values()):
                return
            if not (self._start_windows(load) if load.streams else self._start_image(load)):
                return

    def _start_image(self, load: Load) -> bool:
        """Begin it, or give it up; False when it waits for room."""
        tiers, stored = self._tiers, load.on.stored
        extents = self._room.in_dram(stored.image_bytes)
        if isinstance(extents, Failure):
            if self._waits_for_room(load, stored.image_bytes):
                return False
            self._give_up(load, extents)
            return True
        copy = load.copy = Copy(stored, extents, tiers.dram.tag(), next(tiers.numbers), work=load)
        tiers.dram.put(copy)
        load.started_at, load.blocked_until = tiers.out.now, None
        self._reading[load.job] = load
        self._prepare(extents)
        tiers.out.add(ReadImage(stored, extents, load.job, load.priority, copy.tag))
        for want in list(load.wants.values()):
            self.arriving(want)
        self._wants.publish(load)
        return True

    def _start_windows(self, load: Load) -> bool:
        """A window for every caller that waits for this image, or none for all of them; False: it waits for room."""
        tiers, stored = self._tiers, load.on.stored
        (want,) = load.wants.values()
        for waiter in list(want.waiters):
            extents = self._window()
            if isinstance(extents, Failure):
                if self._waits_for_room(load, WINDOW_CHUNKS_LEAST * tiers.chunk_bytes):
                    return False
                self._wants.fail(want, extents)
                break
            load.blocked_until = None
            chunks = total_bytes(extents) // tiers.chunk_bytes
            stream = Stream(stored, extents, tiers.dram.tag(), f"stream-{next(tiers.numbers)}", chunks)
            tiers.dram.streams[stream.job] = stream
            load.on.readers += 1
            self._readers[stream.job] = load.on
            self._prepare(extents)
            self._wants.serve_stream(want, waiter, stream)
            tiers.out.add(ReadImage(stored, extents, stream.job, load.priority, stream.tag, chunks))
        self._forget(load)
        return True

    def _prepare(self, extents: tuple[Extent, ...]) -> None:
        """Chunks are about to be written to: what was there is not claimed, and the board says "not yet"."""
        self._tiers.out.save_pool()
        self._tiers.out.add(ClearBoard(extents))
        self._tiers.out.touch()

    def _window(self) -> tuple[Extent, ...] | Failure:
        """Chunks for a window, fewer if there are not more."""
        if len(self._tiers.dram.streams) >= STREAMS_LIMIT:
            return Failure(
                code=Code.NO_CAPACITY,
                message=f"{STREAMS_LIMIT} images stream through the DRAM pool of {self._tiers.server_id} already.",
                retry_after_s=5.0,
            )
        chunks = min(WINDOW_CHUNKS, self._tiers.dram.allocator.chunk_count)
        while True:
            found = self._room.in_dram(chunks * self._tiers.chunk_bytes)
            if not isinstance(found, Failure) or chunks <= WINDOW_CHUNKS_LEAST:
                return found
            chunks = max(WINDOW_CHUNKS_LEAST, chunks // 2)

    def _waits_for_room(self, load: Load, needed_bytes: int) -> bool:
        """Whether it is worth waiting a moment. Loads that matter less make room if that helps."""
        now = self._tiers.out.now
        if load.blocked_until is None:
            load.blocked_until = now + ROOM_GRACE_S
        if now >= load.blocked_until:
            return False
        lesser = [
            other
            for other in self._reading.values()
            if other.priority > load.priority and other.copy is not None and not other.copy.leases
        ]
        allocator = self._tiers.dram.allocator
        room = allocator.free_chunks * allocator.chunk_bytes
        room += sum(one.room_bytes for one in self._room.dram_candidates())
        with_theirs = room + sum(other.copy.allocated_bytes for other in lesser if other.copy is not None)
        if room < needed_bytes <= with_theirs:
            for other in lesser:
                if not other.stopped:
                    other.stopped = True
                    self._tiers.out.add(StopJob(other.job))
        return True

    def _give_up(self, load: Load, failure: Failure) -> None:
        """There is no room for the image. Who can take it as it passes through a window gets one."""
        stored = load.on.stored
        for want in list(load.wants.values()):
            if want.arriving and self._tiers.shows_arrival(stored.chunk_bytes):
                self._want_window(want, load.on)
                self._windows[want.key].blocked_until = self._tiers.out.now
            else:
                self._wants.fail(want, failure)
        self._failed(load, failure)

    def _failed(self, load: Load, failure: Failure) -> None:
        for want in list(load.wants.values()):
            self._wants.fail(want, failure)
        if load.pinned:
            self._unpromoted[load.on.stored.id] = self._tiers.out.now + PIN_RETRY_S
        facts: Facts = {"checkpoint_id": load.on.stored.id, "code": failure.code.value, "message": failure.message}
        self._tiers.out.note("load.failed", facts)
        self._forget(load)

    def _forget(self, load: Load) -> None:
        """It is over, one way or another."""
        if load.streams:
            for key in [key for key, other in self._windows.items() if other is load]:
                del self._windows[key]
        else:
            del self.images[load.on.stored.id]
            self._reading.pop(load.job, None)
        self._room.done_reading(load.on)
        self._tiers.out.touch()

    def _queue_pinned(self) -> None:
        tiers = self._tiers
        for id, at in list(self._unpromoted.items()):
            on = tiers.ssd.whole.get(id)
            if on is None or tiers.pins.get(id) != "dram" or id in tiers.dram.copies or on.condemned:
                del self._unpromoted[id]
            elif at <= tiers.out.now:
                del self._unpromoted[id]
                if on.stored.image_bytes <= tiers.pool_bytes:
                    self._load(on, PRIORITY_PREFETCH).pinned = True

    def drop_unwanted(self) -> None:
        """What has not begun and nobody wants any more is not begun."""
        for load in [*self.images.values(), *self._windows.values()]:
            if not load.begun and not load.wants and not (load.pinned and not self._tiers.draining):
                self._forget(load)
            elif load.begun:
                self.settle(load, load.copy)

    def deadline(self) -> float | None:
        """When something has waited long enough for room."""
        if self._tiers.draining:
            return None
        moments = [load.blocked_until for load in (*self.images.values(), *self._windows.values())]
        moments += self._unpromoted.values()
        return min((at for at in moments if at is not None and at > self._tiers.out.now), default=None)

    # -- results -------------------------------------------------------------------------------------------------

    def progressed(self, event: ReadProgressed) -> None:
        """A read is this far."""
        load = self._reading.get(event.job)
        if load is not None:
            load.done_bytes = max(load.done_bytes, min(event.done_bytes, load.total_bytes))
            self._wants.publish(load)
        elif event.job in self._tiers.dram.streams:
            self._tiers.dram.streams[event.job].done_bytes = event.done_bytes

    def consumed(self, message: Consumed) -> None:
        """A holder has taken chunks of what streams through its window."""
        held = self._tiers.leases.alive.get(message.lease_id)
        if held is None or held.holder != message.holder or not isinstance(held.on, Stream) or not held.on.running:
            return
        chunks = min(message.chunks, -(-held.on.stored.image_bytes // self._tiers.chunk_bytes))
        if chunks > held.on.consumed_chunks:
            held.on.consumed_chunks = chunks
            self._tiers.out.add(AdvanceWindow(held.on.job, chunks))

    def done(self, event: ReadDone) -> None:
        """All of an image is (or has been) there."""
        stream = self._tiers.dram.streams.get(event.job)
        load = self._reading.get(event.job)
        if load is not None and load.copy is not None:
            stored = load.on.stored
            self.complete(load, load.copy, event.seconds)
        elif stream is not None and stream.running:
            stored = stream.stored
            self._stream_ended(stream)
        else:
            return
        self._tiers.speeds.read(stored.image_bytes, event.seconds - event.waited_s)
        facts: Facts = {
            "checkpoint_id": stored.id,
            "image_bytes": stored.image_bytes,
            "read_s": round(event.seconds, 4),
            "repaired_chunks": event.repaired_chunks,
        }
        self._tiers.out.note("checkpoint.loaded", facts)

    def complete(self, load: Load, copy: Copy, read_s: float) -> None:
        """A copy is whole and verified: everybody who waits for it gets a lease."""
        if not copy.ready:
            self._tiers.dram.ready(copy, next(self._tiers.numbers))
        self._tiers.out.save_pool()
        for want in list(load.wants.values()):
            want.read_s = read_s
            self._wants.serve(want, copy)
        if load.on.condemned:  # what was read is sound, but the directory is about to go
            self._room.drop_copy(copy, "corrupt")
        self._forget(load)

    def failed(self, event: ReadFailed) -> None:
        """An image did not come, or not wholly."""
        stream = self._tiers.dram.streams.get(event.job)
        load = self._reading.get(event.job)
        if load is not None and load.copy is not None:
            on, copy = load.on, load.copy
            self._tiers.leases.void(copy)
            self._tiers.dram.drop(copy)
            if load.stopped and event.failure.code is not Code.CHECKPOINT_CORRUPT:
                self._requeue(load)
                return
            self._failed(load, event.failure)
        elif stream is not None and stream.running:
            on = self._readers[event.job]
            # No thread writes to its chunks: they are free as soon as its lease is void.
            self._stream_ended(stream)
            self._tiers.leases.void(stream)
        else:
            return
        if event.failure.code is Code.CHECKPOINT_CORRUPT:
            self.refuse_queued(on, event.failure)
            self._room.condemn(on, event.failure.message)

    def refuse_queued(self, on: OnSsd, failure: Failure) -> None:
        """These bytes are corrupt: who waits to read them need not try."""
        for load in [*self.images.values(), *self._windows.values()]:
            if load.on is on and not load.begun:
                self._failed(load, failure)

    def _requeue(self, load: Load) -> None:
        del self._reading[load.job]
        load.job = f"load-{next(self._tiers.numbers)}"
        load.copy, load.started_at, load.stopped, load.done_bytes = None, None, False, 0
        self._tiers.out.touch()

    def _stream_ended(self, stream: Stream) -> None:
        stream.running = False
        self._tiers.dram.free_stream(stream)
        self._room.done_reading(self._readers.pop(stream.job))
        self._tiers.out.touch()

    def readers(self) -> list[OnSsd]:
        """The directories that are read or going to be, once for each time."""
        return [load.on for load in (*self.images.values(), *self._windows.values())] + list(self._readers.values())

    def check(self) -> None:
        """Assert that what reads has its place and what waits can begin."""
        tiers = self._tiers
        for id, load in self.images.items():
            assert load.on.stored.id == id and tiers.ssd.whole.get(id) is load.on, "a load of what is not on the SSD"
            assert load.begun == (load.copy is not None) == (load.job in self._reading), "a load is half begun"
            assert load.copy is None or tiers.dram.copies.get(id) is load.copy, "a load reads into what is not its own"
            assert load.copy is None or not load.copy.ready, "a copy is claimed while it is read"
        for key, load in self._windows.items():
            assert load.streams and list(load.wants) == [key] and not load.begun, "a window is for one want"
        assert len(self._reading) <= len(self.images), "a read that nobody knows"
        for job, stream in tiers.dram.streams.items():
            assert stream.running == (job in self._readers), "a window is read by nobody"
