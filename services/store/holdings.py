"""What lies where: the accounts of the SSD tier and of the DRAM pool. Pure; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from services.store.allocator import Allocator
from services.store.events import StoredCheckpoint
from services.store.manifest import slice_extents, trim_extents
from services.store.pool_state import CopyState, KeptState, PoolState
from services.store.work import Work
from shared.contracts.residency import Extent, Source

# -- SSD ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class OnSsd:
    """A checkpoint's directory. `used` orders by recency; `readers` are jobs that read it or are going to.

    `import_bytes_per_s` is what its import reached, when that was in this life of the store. `condemned` is why it is
    to be quarantined as soon as nobody reads it.
    """

    stored: StoredCheckpoint
    used: int
    readers: int = 0
    import_bytes_per_s: float | None = None
    condemned: str = ""


@dataclass(slots=True)
class _Going:
    """Directories of one checkpoint that are being removed or set aside, and the bytes that this will free."""

    directories: int = 0
    freed_bytes: int = 0


class SsdHoldings:
    """The SSD tier: whole checkpoints, partial ones (an import can go on from there) and quarantined ones.

    An id may be whole and quarantined at once, after a fresh import. Sources are remembered as long as what they
    brought is here.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.whole: dict[str, OnSsd] = {}
        self.partial: dict[str, OnSsd] = {}
        self.quarantined: dict[str, OnSsd] = {}
        self.going: dict[str, _Going] = {}
        self.reserved_bytes = 0
        self.removals: dict[str, int] = {}  # id → number of its last removal, kept while imports run
        self._removal_count = 0
        self._held_bytes = 0
        self._going_bytes = 0
        self._by_source: dict[Source, str] = {}
        self._by_revision: dict[tuple[Source, str], str] = {}
        self._names: dict[str, dict[tuple[Source, str | None], None]] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes that are taken, being freed, or reserved by an import."""
        return self._held_bytes + self._going_bytes + self.reserved_bytes

    @property
    def staying_bytes(self) -> int:
        """Bytes that will still be taken when all that is being removed is gone."""
        return self._held_bytes + self.reserved_bytes

    @property
    def removal_count(self) -> int:
        """Removals so far; see `removals`."""
        return self._removal_count

    def put(self, stored: StoredCheckpoint, used: int) -> OnSsd:
        """This directory is there now: whole, partial or quarantined as it says."""
        on = OnSsd(stored=stored, used=used)
        shelf = self.quarantined if stored.quarantined else self.whole if is_whole(stored) else self.partial
        if stored.id in shelf:
            self._held_bytes -= shelf[stored.id].stored.stored_bytes
        shelf[stored.id] = on
        self._held_bytes += stored.stored_bytes
        if shelf is self.whole and stored.source is not None:
            self.name(stored.source, stored.revision, stored.id)
        return on

    def take(self, shelf: dict[str, OnSsd], checkpoint_id: str) -> OnSsd:
        """It is not claimed any more; the bytes are nobody's until somebody accounts for them."""
        on = shelf.pop(checkpoint_id)
        self._held_bytes -= on.stored.stored_bytes
        if shelf is self.whole:
            self._removal_count += 1
            self.removals[checkpoint_id] = self._removal_count
            for source, revision in self._names.pop(checkpoint_id, ()):
                self._by_source.pop(source, None) if revision is None else self._by_revision.pop((source, revision))
        return on

    def go(self, checkpoint_id: str, freed_bytes: int) -> None:
        """A directory of this checkpoint is being removed or set aside."""
        going = self.going.setdefault(checkpoint_id, _Going())
        going.directories += 1
        going.freed_bytes += freed_bytes
        self._going_bytes += freed_bytes

    def gone(self, checkpoint_id: str) -> bool:
        """It is; whether that was the last one of this checkpoint."""
        going = self.going.get(checkpoint_id)
        if going is None:
            return True
        going.directories -= 1
        if going.directories:
            return False
        del self.going[checkpoint_id]
        self._going_bytes -= going.freed_bytes
        return True

    def name(self, source: Source, revision: str, checkpoint_id: str) -> None:
        """An import of this source at this revision brings this checkpoint."""
        names = self._names.setdefault(checkpoint_id, {})
        old = self._by_source.get(source)
        if old is not None and old != checkpoint_id:
            self._names[old].pop((source, None), None)
        older = self._by_revision.get((source, revision))
        if older is not None and older != checkpoint_id:
            self._names[older].pop((source, revision), None)
        self._by_source[source] = checkpoint_id
        self._by_revision[(source, revision)] = checkpoint_id
        names[(source, None)] = names[(source, revision)] = None

    def of_source(self, source: Source, revision: str | None = None) -> str:
        """What this source brought last, or at this revision; "" when that is not here."""
        if revision is None:
            return self._by_source.get(source, "")
        return self._by_revision.get((source, revision), "")

    def check(self) -> None:
        """Assert the accounts."""
        shelves = (self.whole, self.partial, self.quarantined)
        held = sum(on.stored.stored_bytes for shelf in shelves for on in shelf.values())
        assert held == self._held_bytes, "the SSD tier's accounts do not balance"
        assert self._going_bytes == sum(going.freed_bytes for going in self.going.values()), "bytes being freed"
        assert self.used_bytes <= self.capacity_bytes, "the SSD tier holds more than its capacity"
        assert all(is_whole(on.stored) and not on.stored.quarantined for on in self.whole.values()), "a false claim"
        assert self.whole.keys() >= self._names.keys(), "a source of what is not here is remembered"
        known = {*self._by_source.values(), *self._by_revision.values()}
        assert known <= self._names.keys(), "a source cannot be forgotten"


def is_whole(stored: StoredCheckpoint) -> bool:
    """Whether all of its bytes are there, durable and once verified."""
    return stored.arrived_bytes is None


# -- DRAM --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Copy:
    """A checkpoint in the pool: `ready` when all is verified, else arriving under `tag`.

    A `doomed` one is not claimed any more (the SSD's copy turned out to be corrupt) and goes with its last lease.
    `work` is what fills an arriving one.
    """

    stored: StoredCheckpoint
    extents: tuple[Extent, ...]
    tag: int
    used: int
    ready: bool = False
    work: Work | None = None
    leases: int = 0
    doomed: bool = False
    allocated_bytes: int = 0

    def __post_init__(self) -> None:
        self.allocated_bytes = total_bytes(self.extents)

    @property
    def id(self) -> str:
        """The checkpoint's id."""
        return self.stored.id

    def leased_extents(self) -> tuple[Extent, ...]:
        """What a lease shows of the chunks."""
        return trim_extents(self.extents, self.stored.image_bytes)


@dataclass(slots=True, eq=False)
class Stream:
    """An image that passes through a window of the pool, for one lease.

    `running`: its job has not ended; only when that is over and `leased` is too are its chunks free.
    """

    stored: StoredCheckpoint
    extents: tuple[Extent, ...]
    tag: int
    job: str
    window_chunks: int
    running: bool = True
    leased: bool = True
    consumed_chunks: int = 0
    done_bytes: int = 0


@dataclass(slots=True)
class DramHoldings:
    """The DRAM pool: copies by checkpoint, windows by job, and `incoming`, chunks of imports by tag.

    Chunks of an import are incoming until it is known what they will hold.
    """

    allocator: Allocator
    next_tag: int = 1
    copies: dict[str, Copy] = field(default_factory=dict)
    doomed: dict[int, Copy] = field(default_factory=dict)  # by tag
    streams: dict[str, Stream] = field(default_factory=dict)
    incoming: dict[int, tuple[Extent, ...]] = field(default_factory=dict)
    _claims: dict[str, CopyState] = field(default_factory=dict)
    _saved: tuple[CopyState, ...] | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes of chunks that somebody has."""
        return self.allocator.capacity_bytes - self.allocator.free_chunks * self.allocator.chunk_bytes

    def tag(self) -> int:
        """A tag that no load ever had."""
        self.next_tag += 1
        return self.next_tag - 1

    def put(self, copy: Copy) -> None:
        """A copy is arriving (or was there already, in an earlier life)."""
        self.copies[copy.id] = copy

    def ready(self, copy: Copy, used: int) -> None:
        """All of it is there and verified. Chunks beyond its image are given back."""
        keep = self.allocator.chunks_for(copy.stored.image_bytes) * self.allocator.chunk_bytes
        if copy.allocated_bytes > keep:
            self.allocator.free(slice_extents(copy.extents, keep, copy.allocated_bytes))
            copy.extents = trim_extents(copy.extents, keep)
            copy.allocated_bytes = keep
        copy.ready, copy.used, copy.work = True, used, None
        self._claims[copy.id] = CopyState(checkpoint_id=copy.id, extents=copy.extents)
        self._saved = None

    def drop(self, copy: Copy) -> None:
        """It is not claimed any more; its chunks are free, unless it is leased: then as soon as it is not."""
        if copy.doomed:
            del self.doomed[copy.tag]
        else:
            del self.copies[copy.id]
            if self._claims.pop(copy.id, None) is not None:
                self._saved = None
        if copy.leases:
            copy.doomed = True
            self.doomed[copy.tag] = copy
        else:
            self.allocator.free(copy.extents)

    def free_stream(self, stream: Stream) -> bool:
        """Free the window's chunks if nobody writes or reads there any more; whether that is so."""
        if stream.running or stream.leased:
            return False
        del self.streams[stream.job]
        self.allocator.free(stream.extents)
        return True

    def states(self) -> tuple[CopyState, ...]:
        """What is claimed, for the next life."""
        if self._saved is None:
            self._saved = tuple(self._claims.values())
        return self._saved

    def kept_states(self) -> tuple[KeptState, ...]:
        """What is leased and not claimed, for the next life: it must not be overwritten there either."""
        leased = [copy for copy in self.copies.values() if copy.leases and not copy.ready]
        return tuple(
            KeptState(
                checkpoint_id=copy.id,
                extents=copy.extents,
                tag=copy.tag,
                image_bytes=copy.stored.image_bytes,
                whole=copy.ready,
            )
            for copy in (*self.doomed.values(), *leased)
        )

    def keep(self, copy: Copy) -> None:
        """Bytes of an earlier life that are there for their leases alone. Raises ValueError if others are there."""
        self.allocator.reserve(copy.extents)
        copy.ready = copy.doomed = True
        self.doomed[copy.tag] = copy

    def restore(self, state: PoolState, whole: dict[str, OnSsd], uses: Iterator[int]) -> None:
        """Take over the copies that an earlier life left, as far as the SSD tier still has them."""
        self.next_tag = max(self.next_tag, state.next_tag)
        for one in state.copies:
            on = whole.get(one.checkpoint_id)
            if on is None or total_bytes(one.extents) < on.stored.image_bytes or one.checkpoint_id in self.copies:
                continue
            try:
                self.allocator.reserve(one.extents)
            except ValueError:
                continue
            copy = Copy(stored=on.stored, extents=one.extents, tag=self.tag(), used=next(uses))
            self.put(copy)
            self.ready(copy, copy.used)

    def check(self) -> None:
        """Assert the accounts."""
        self.allocator.check()
        pieces: list[Iterable[Extent]] = [copy.extents for copy in self.copies.values()]
        pieces += [copy.extents for copy in self.doomed.values()]
        pieces += [stream.extents for stream in self.streams.values()]
        pieces += self.incoming.values()
        spans = sorted((one.offset, one.offset + one.length) for extents in pieces for one in extents)
        for (_, end), (begin, _) in pairwise(spans):
            assert end <= begin, "two checkpoints share a chunk of the pool"
        assert sum(end - begin for begin, end in spans) == self.used_bytes, "the pool's accounts do not balance"
        for tag, copy in self.doomed.items():
            assert copy.doomed and copy.leases and copy.tag == tag, "a copy is kept for nobody"
        for id, copy in self.copies.items():
            assert copy.id == id and not copy.doomed, "a copy is under a wrong name"
        claims = {id: copy.extents for id, copy in self.copies.items() if copy.ready}
        assert {id: one.extents for id, one in self._claims.items()} == claims, "the next life would not know"
        for stream in self.streams.values():
            assert stream.running or stream.leased, "a window is kept for nobody"


def total_bytes(extents: Iterable[Extent]) -> int:
    """Bytes of all of them."""
    return sum(extent.length for extent in extents)
