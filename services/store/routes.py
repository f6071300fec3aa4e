"""Which source a chunk is taken from: the origin, a server that has the checkpoint, or one that is fetching it too.

Of the sources that have a chunk, it is taken from the one that is expected to deliver it first: each source's bandwidth
is measured from its transfers and shared by those that are under way.

**The spreading chain.** When n servers fetch one checkpoint together, n copies from the origin would share its
bandwidth. So every chunk has an *owner* among them (the highest hash of server and chunk: all compute the same without
a word, and a server that joins or dies moves only its own part). The owner takes the chunk from a *seed* (the origin,
or a server that had it all from the beginning); the others take it from the owner, or from whoever has it by then.
Against a plain chain, where each server takes everything from the one before it, a chunk travels few hops instead of n,
the connections of all n servers to the origin work at once, every server sends about as much as it receives, and a slow
or dead server delays its own n-th of the chunks instead of everybody behind it. It delays them for a bounded time: next
in line for the chunk is the server with the next hash, which helps itself from the seeds when its patience ends, then
the one after.

Pure: time is an argument, and the caller has a lock around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, TypeAlias

import xxhash

from services.store.ports import Peer
from shared.backoff import delay_s
from shared.errors import Code, Failure

ORIGIN: Final = ""  # the source that is no server
HERE: Final = 1  # of a chunk at a peer: it can be had there
COMING: Final = 2  # … it is being taken from a seed right now
_SEEDS_FIRST_IN_FLIGHT: Final = 3  # transfers from seeds below which another one goes before everything else
_WAITING_IN_FLIGHT: Final = 2  # questions at once for chunks that the peer does not have yet
_WAITED_FOR: Final = 16  # chunks whose owners' time runs while there is nothing else to do
_WINDOW: Final = 128  # chunks, from the first that is missing, among which the next one is chosen
_RANK_CHUNKS: Final = 8  # by so many chunks later is one taken for every server that is nearer to it
_SETTLING_IN_FLIGHT: Final = 2  # transfers at once as long as others that start just now may not be known
_NEW_IN_FLIGHT: Final = 2  # transfers at once from a source of which nothing is known yet
_SMOOTHING: Final = 0.3  # weight of the newest measurement
_UNKNOWN_BYTES_PER_S: Final = 1e9  # what a source is trusted to bring before anything was measured
_SAME_CHUNK_TRIES: Final = 2  # of a chunk that came corrupt from the origin: the second time it is the origin's fault
_CORRUPT_LIMIT: Final = 8  # chunks that the origin has corrupt, and is believed no more


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take, in seconds.

    `settle_s`: from the start, and from hearing of another server that fetches the same, during which others that have
    just started may not be known yet: meanwhile seeds are used sparingly. `least_s`: for an owner to
    bring its chunk, at least; three times what a chunk takes from a seed otherwise. `poll_s`: one question to a peer
    for a chunk that it does not have yet. `budget_s`: without any progress, until the fetch is given up.
    """

    settle_s: float = 0.5
    least_s: float = 2.0
    poll_s: float = 2.0
    budget_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Take:
    """Ask this source for the chunk. With `wait_s` it does not have it yet and is asked to wait for it that long."""

    source: str
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Pause:
    """No source can be asked at the moment; route the chunk again after `wait_s`."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The chunk will not come."""

    failure: Failure


Decision: TypeAlias = Take | Pause | GiveUp


class Trouble(Enum):
    """Why a source did not deliver."""

    NOT_YET = "the peer does not have the chunk yet"
    BUSY = "the source serves as many as it can"
    LOST = "the connection or the source failed; a later try may succeed"
    CORRUPT = "the bytes are not those of the manifest"
    REFUSED = "it will never deliver"


@dataclass(slots=True)
class _Source:
    whole: bool
    seed: bool  # had it all when this fetch first heard of it
    has: bytes | None = None
    bytes_per_s: float | None = None
    in_flight: int = 0
    failures: int = 0
    quiet_until: float = 0.0
    banned: Failure | None = None
    gone: bool = False
    lacks: set[int] = field(default_factory=set)

    def usable(self, now: float) -> bool:
        return self.banned is None and not self.gone and now >= self.quiet_until

    def holds(self, index: int) -> bool:
        if index in self.lacks:
            return False
        return self.whole or self._says(index) == HERE

    def expects(self, index: int) -> bool:
        return not self.whole and self._says(index) == COMING

    def _says(self, index: int) -> int:
        return self.has[index] if self.has is not None and index < len(self.has) else 0


@dataclass(frozen=True, slots=True)
class _Transfer:
    source: str
    began: float
    sharing: int  # transfers from the source then, this one included
    waiting: bool


class Routes:
    """The routes of one fetch: chunks of `lengths` bytes to the server `own_id`, with or without an origin.

    A chunk is `pick`ed (or chosen by the caller), then routed until it has `arrived`: every `Take` is followed by
    `arrived` or `failed`.
    """

    def __init__(
        self,
        own_id: str,
        lengths: Sequence[int],
        *,
        origin: bool,
        now: float,
        patience: Patience = Patience(),
    ) -> None:
        self._own_id = own_id
        self._lengths = lengths
        self._patience = patience
        self._settled_at = now + patience.settle_s
        self._progress_at = now
        self._sources: dict[str, _Source] = {ORIGIN: _Source(whole=True, seed=True)} if origin else {}
        self._free = list(range(len(lengths)))  # neither picked nor there, in order
        self._transfers: dict[int, _Transfer] = {}
        self._first_asked: dict[int, float] = {}
        self._corrupt: dict[int, int] = {}
        self._seed_s: float | None = None  # what a chunk took from a seed lately
        self._swarm: tuple[str, ...] = (own_id,)  # the servers that fetch this checkpoint and work, this one included
        self._lines: dict[int, tuple[str, ...]] = {}
        self._last_failure: Failure | None = None
        self.bytes_by_source: dict[str, int] = {}

    # -- what is known -------------------------------------------------------------------------------------------------

    def peers_are(self, peers: Iterable[Peer], now: float) -> None:
        """The servers that have the checkpoint, wholly or in part, are these now."""
        known = {peer.server_id: peer for peer in peers if peer.server_id not in ("", self._own_id)}
        for id, peer in sorted(known.items()):
            if id not in self._sources and not peer.whole:
                self._settled_at = now + self._patience.settle_s  # where there is one, there may be more
            source = self._sources.setdefault(id, _Source(whole=peer.whole, seed=peer.whole))
            source.whole, source.gone = peer.whole or source.whole, False
        for id, source in self._sources.items():
            if id != ORIGIN and id not in known:
                source.gone = True
        self._count_swarm(now)

    def peer_has(self, peer: str, has: bytes, now: float) -> None:
        """What a peer has: one byte per chunk, `HERE`, `COMING` or 0."""
        source = self._sources.get(peer)
        if source is None:
            return
        if source.has is None or has.count(HERE) > source.has.count(HERE):
            self._progress_at = now
        source.has = has

    def worth_asking(self, peer: str, now: float) -> bool:
        """Whether a peer may be asked what it has: it is not known to have failed just now, or to lie."""
        source = self._sources.get(peer)
        return source is not None and source.usable(now)

    def source_bytes_per_s(self, source: str) -> float | None:
        """The bandwidth of a source as measured, or None."""
        found = self._sources.get(source)
        return None if found is None else found.bytes_per_s

    def coming(self) -> list[int]:
        """The chunks that are being taken from seeds right now, for others to know."""
        return [
            index
            for index, transfer in self._transfers.items()
            if not transfer.waiting and self._sources[transfer.source].seed
        ]

    def banned(self) -> dict[str, Failure]:
        """The sources that are asked no more, and why."""
        return {id: source.banned for id, source in self._sources.items() if source.banned is not None}

    # -- choosing ------------------------------------------------------------------------------------------------------

    def pick(self, now: float) -> int | None:
        """The chunk to move next, which is then the caller's; None when there is none, or none just now.

        In order, those that it is this server's turn to take from a seed; and those that can be had from another
        server, where a chunk to which others are nearer in line counts as a later one: so a chunk is not wanted by all
        of its owner at the same moment, but spreads. If there is neither, the first that is missing is waited for.

        While servers that start just now may not be known yet, seeds are used sparingly, and every server begins at a
        place of its own, so that they do not all take the same chunks before they hear of each other.
        """
        self._count_swarm(now)
        settling = now < self._settled_at
        first = 0
        if settling:
            place = _hash(self._own_id, -1) % len(self._lengths)
            first = next((number for number, index in enumerate(self._free) if index >= place), 0)
        seeds = [source for source in self._sources.values() if source.seed and source.usable(now)]
        own: int | None = None
        near: int | None = None
        nearest = 0
        for number in range(first, min(first + _WINDOW, len(self._free))):
            index = self._free[number]
            if own is None and self._turn_in_s(index, now) <= 0 and any(source.holds(index) for source in seeds):
                own = number
            if self._at_peer(index, now):
                later = number + self._line(index).index(self._own_id) * _RANK_CHUNKS
                if near is None or later < nearest:
                    nearest, near = later, number
        coming = len(self.coming())
        if settling and coming >= _SETTLING_IN_FLIGHT:
            own = None
        # The seeds are what all wait for in the end: they are kept busy first.
        order = (own, near) if coming < _SEEDS_FIRST_IN_FLIGHT else (near, own)
        at = next((number for number in order if number is not None), None)
        if at is None:
            for index in self._free[:_WAITED_FOR]:
                self._first_asked.setdefault(index, now)
            waiting = sum(transfer.waiting for transfer in self._transfers.values())
            if not self._free or waiting >= _WAITING_IN_FLIGHT or (settling and coming):
                return None
            at = first
        return self._free.pop(at)

    @property
    def has_free(self) -> bool:
        """Whether there are chunks that nobody has picked."""
        return bool(self._free)

    def chosen(self, index: int) -> None:
        """The caller works on this chunk without having picked it."""
        if index in self._free:
            self._free.remove(index)

    def kept(self, index: int, now: float) -> None:
        """The chunk is there, from an earlier attempt or from no source of these routes."""
        self.chosen(index)
        self._progress_at = now

    def be_patient(self, patience: Patience, now: float) -> None:
        """Things may take this long from now on."""
        self._patience, self._progress_at = patience, now

    def _at_peer(self, index: int, now: float) -> bool:
        """Whether the chunk can be had from a server that is no seed."""
        return any(
            source.usable(now) and source.holds(index) and not source.seed and self._room(source)
            for source in self._sources.values()
        )

    def route(self, index: int, now: float) -> Decision:
        """What to do about this chunk now."""
        self._count_swarm(now)
        self._first_asked.setdefault(index, now)
        turn_in_s = self._turn_in_s(index, now)
        usable = {id: source for id, source in self._sources.items() if source.usable(now)}
        holders = {id: source for id, source in usable.items() if source.holds(index)}
        # Seeds are for the chunk's owner, and for those whose patience has ended; nobody else helps himself.
        allowed = {id: source for id, source in holders.items() if turn_in_s <= 0 or not source.seed}
        free = [id for id, source in allowed.items() if self._room(source)]
        if free:
            first = min(free, key=lambda id: (self._expected_s(id, index), id == ORIGIN, id))
            return self._take(first, 0.0, now, index)
        if allowed:
            return Pause(0.05)  # all are as busy as they may be: one of them will soon not be
        if turn_in_s > 0:
            owner = self._expected_at(index, now) or self._line(index)[0]
            if owner in usable and owner not in holders:
                return self._take(owner, min(self._patience.poll_s, max(turn_in_s, 0.05)), now, index)
            return Pause(min(turn_in_s, 0.25))
        return self._without_source(index, now)

    def _without_source(self, index: int, now: float) -> Decision:
        """Nobody who is sound and awake has it."""
        late = now - self._progress_at > self._patience.budget_s
        moving = any(not transfer.waiting for transfer in self._transfers.values())
        hopes = [
            source
            for source in self._sources.values()
            if source.banned is None and not source.gone and index not in source.lacks
        ]
        # Peers that have not got it may yet; a source that failed is asked again after a pause.
        if not hopes or (late and not moving):
            return GiveUp(self._last_failure or _failure(Code.CHECKPOINT_UNAVAILABLE, f"Nobody has chunk {index}."))
        for id in self._line(index):
            source = self._sources.get(id)
            if source is not None and source.usable(now) and index not in source.lacks:
                return self._take(id, self._patience.poll_s, now, index)
        return Pause(min(0.5, max(0.02, min(source.quiet_until for source in hopes) - now)))

    def _take(self, id: str, wait_s: float, now: float, index: int) -> Take:
        source = self._sources[id]
        if wait_s == 0.0:
            source.in_flight += 1
        self._transfers[index] = _Transfer(id, now, source.in_flight, wait_s > 0)
        return Take(id, wait_s)

    # -- what came of it -----------------------------------------------------------------------------------------------

    def arrived(self, index: int, now: float) -> str:
        """The chunk is there and verified; the source that it came from."""
        transfer = self._ended(index)
        source = self._sources[transfer.source]
        source.failures = 0
        self._progress_at = now
        self._last_failure = None
        self._first_asked.pop(index, None)
        length = self._lengths[index]
        self.bytes_by_source[transfer.source] = self.bytes_by_source.get(transfer.source, 0) + length
        if not transfer.waiting:
            seconds = max(now - transfer.began, 1e-6)
            # The source's bandwidth was shared by what was under way in the meantime: more or less this many.
            sample = length / seconds * max(1.0, (transfer.sharing + source.in_flight + 1) / 2)
            source.bytes_per_s = _smooth(source.bytes_per_s, sample)
            if source.seed:
                self._seed_s = _smooth(self._seed_s, seconds)
        return transfer.source

    def failed(self, index: int, trouble: Trouble, failure: Failure, now: float) -> None:
        """The source did not deliver the chunk. `failure.retry_after_s` says when one that is busy may be asked again.

        A peer that sends wrong bytes is asked no more; of the origin the chunk may be damaged and others sound.
        """
        transfer = self._ended(index)
        source = self._sources[transfer.source]
        match trouble:
            case Trouble.NOT_YET:
                if source.has is not None and index < len(source.has):
                    source.has = source.has[:index] + b"\0" + source.has[index + 1 :]
                elif source.whole:  # it was, and is not any more
                    source.whole = False
                return
            case Trouble.BUSY:
                source.quiet_until = now + (failure.retry_after_s or 0.2)
                return
            case Trouble.LOST:
                self.peer_lost(transfer.source, now)  # those that were under way at the same time count as one
            case Trouble.CORRUPT if transfer.source == ORIGIN:
                self._corrupt[index] = self._corrupt.get(index, 0) + 1
                if self._corrupt[index] >= _SAME_CHUNK_TRIES:
                    source.lacks.add(index)
                    if len(source.lacks) >= _CORRUPT_LIMIT:
                        source.banned = failure
            case Trouble.CORRUPT | Trouble.REFUSED:
                source.banned = failure
        self._last_failure = failure
        self._count_swarm(now)

    def peer_lost(self, peer: str, now: float) -> None:
        """A peer did not answer a question that was not about a chunk."""
        source = self._sources.get(peer)
        if source is not None and now >= source.quiet_until:
            source.failures += 1
            source.quiet_until = now + delay_s(source.failures, most_s=10.0)

    def _ended(self, index: int) -> _Transfer:
        transfer = self._transfers.pop(index)
        if not transfer.waiting:
            self._sources[transfer.source].in_flight -= 1
        return transfer

    # -- estimates -----------------------------------------------------------------------------------------------------

    def _expected_s(self, id: str, index: int) -> float:
        source = self._sources[id]
        rate = source.bytes_per_s
        if rate is None:
            measured = [other.bytes_per_s for other in self._sources.values() if other.bytes_per_s is not None]
            rate = max(measured, default=_UNKNOWN_BYTES_PER_S)
        return (source.in_flight + 1) * self._lengths[index] / rate

    def _room(self, source: _Source) -> bool:
        return (
            source is self._sources.get(ORIGIN) or source.bytes_per_s is not None or source.in_flight < _NEW_IN_FLIGHT
        )

    def _patience_s(self, now: float) -> float:
        """How long a chunk may take to get to its owner: as long as mine take at the moment, and then some."""
        ages = [
            now - transfer.began
            for transfer in self._transfers.values()
            if not transfer.waiting and self._sources[transfer.source].seed
        ]
        return max(self._patience.least_s, 3 * max([self._seed_s or 0.0, *ages]))

    def _count_swarm(self, now: float) -> None:
        others = [id for id, source in self._sources.items() if not source.seed and source.usable(now)]
        swarm = tuple(sorted([self._own_id, *others]))
        if swarm != self._swarm:
            self._swarm = swarm
            self._lines.clear()

    def _turn_in_s(self, index: int, now: float) -> float:
        """When this server may take the chunk from a seed: at once as its owner, unless another one already does."""
        rank = self._line(index).index(self._own_id)
        if rank == 0 and self._expected_at(index, now) is None:
            return 0.0
        return self._first_asked.get(index, now) + max(1, min(rank, 3)) * self._patience_s(now) - now

    def _expected_at(self, index: int, now: float) -> str | None:
        """Who of the swarm is taking this chunk from a seed already (as its owner before the swarm changed)."""
        for id in self._line(index):
            source = self._sources.get(id)
            if source is not None and source.usable(now) and source.expects(index):
                return id
        return None

    def _line(self, index: int) -> tuple[str, ...]:
        """Who takes this chunk from a seed: its owner, then whoever is next in line."""
        line = self._lines.get(index)
        if line is None:
            line = tuple(sorted(self._swarm, key=lambda id: (-_hash(id, index), id)))
            self._lines[index] = line
        return line


def _hash(server_id: str, index: int) -> int:
    return xxhash.xxh3_64_intdigest(server_id.encode(), seed=index % 2**32)


def _smooth(old: float | None, sample: float) -> float:
    return sample if old is None else old + _SMOOTHING * (sample - old)


def _failure(code: Code, message: str) -> Failure:
    return Failure(code=code, message=message)
