"""The core of the store: which checkpoints are in which tier, who holds a lease, and what is read or imported next.

Pure: events in, actions out. Imports (remote → SSD) run one at a time, reads (SSD → DRAM) run one at a time, because
work on one tier shares that tier's bandwidth; equal work is done once however many wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, TypeAlias

from services.store.allocator import Allocator
from services.store.events import (
    PRIORITY_USER,
    AcquireAsked,
    Action,
    Answer,
    BusBack,
    BusLost,
    CheckpointRemoved,
    DrainAsked,
    Event,
    EvictAsked,
    Facts,
    ImportAsked,
    ImportDone,
    ImportFailed,
    ImportPlanned,
    ImportProgressed,
    InspectAsked,
    InspectFailed,
    InspectSource,
    Note,
    PlanImport,
    PublishProgress,
    ReadDone,
    ReadFailed,
    ReadImage,
    ReadProgressed,
    ReleaseAsked,
    RemoveCheckpoint,
    RenewAsked,
    ReplyHandle,
    RunImport,
    SourceInspected,
    StoredCheckpoint,
    TouchRecord,
)
from services.store.manifest import trim_extents
from services.store.pool_state import PoolState
from shared.contracts.records import Phase, ServerRecord
from shared.contracts.residency import (
    Acquire,
    Done,
    Evict,
    Extent,
    Import,
    Imported,
    Inspect,
    Inspected,
    Lease,
    Progress,
    Release,
    Renew,
    Renewed,
    Source,
)
from shared.errors import Code, Failure

INTEREST_S: Final = 5.0  # a caller that polls is still interested for this long after its last poll was answered
ROOM_GRACE_S: Final = 1.0  # a read whose room is leased waits this long: the release may be on its way
PROGRESS_INTERVAL_S: Final = 0.1  # between two progress hints of one piece of work
ETA_AFTER_S: Final = 0.05  # an estimate stands on at least this much time and two chunks of this work's own bytes
WAIT_LIMIT_S: Final = 30.0
TTL_LIMIT_S: Final = 3600.0
WAITERS_LIMIT: Final = 1024  # open wants, open waits of one import, and inspections
WEIGHT_OF_NEWEST: Final = 0.3  # of the exponentially weighted bandwidth
MEASURED_BYTES: Final = 2**20  # transfers smaller than this measure latency, not bandwidth

_LABEL: Final = re.compile(r"[A-Za-z0-9_-]*")


# -- state -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Waiter:
    reply: ReplyHandle
    deadline: float


@dataclass(slots=True)
class _OnSsd:
    stored: StoredCheckpoint
    use: int


@dataclass(slots=True)
class _InDram:
    extents: tuple[Extent, ...]
    image_bytes: int
    use: int
    ready: bool = False

    @property
    def allocated_bytes(self) -> int:
        return sum(extent.length for extent in self.extents)


@dataclass(slots=True)
class _Held:
    lease: Lease
    holder: str
    expires_at: float
    ttl_s: float


@dataclass(slots=True)
class _Work:
    """What imports and loads have in common: how far they are and whom to tell."""

    labels: dict[str, None] = field(default_factory=dict)
    done_bytes: int = 0
    total_bytes: int = 0
    started_at: float | None = None
    published_at: float = -1e9


@dataclass(slots=True)
class _ImportJob(_Work):
    """state: queued → planning → making_room → running."""

    state: str = "queued"
    revision: str = ""
    peak_bytes: int = 0
    reserved_bytes: int = 0
    waiters: list[_Waiter] = field(default_factory=list)
    interest_until: float = 0.0
    removed_meanwhile: dict[str, None] = field(default_factory=dict)


@dataclass(slots=True)
class _LoadJob(_Work):
    reading: bool = False
    blocked_until: float | None = None


_WantKey: TypeAlias = tuple[str, str, str, Source]  # holder, checkpoint id, deployment, source


@dataclass(slots=True)
class _Want:
    """Acquires that are not answered by a lease yet. They are in exactly one stage: an import, a load, or failed.

    Several callers may wait with equal messages (two replicas of one deployment in one worker); each gets a lease.
    """

    message: Acquire
    tier: str
    lapses_at: float
    waiters: list[_Waiter] = field(default_factory=list)
    importing: Source | None = None
    loading: str | None = None
    failure: Failure | None = None
    import_s: float = 0.0
    remote_bytes: int = 0


def trim(
    stored: Sequence[StoredCheckpoint], capacity_bytes: int
) -> tuple[list[StoredCheckpoint], list[StoredCheckpoint]]:
    """What of these (least recently used first) stays in an SSD tier of this capacity, and what has to go."""
    used = sum(one.stored_bytes for one in stored)
    keep: list[StoredCheckpoint] = []
    go: list[StoredCheckpoint] = []
    for one in stored:
        if used > capacity_bytes:
            used -= one.stored_bytes
            go.append(one)
        else:
            keep.append(one)
    return keep, go


class Residency:
    """The store's core. The constructor's parameters:

    * `nonce` makes lease ids unique (the pool's, when it outlives the store: `restored` goes on counting); `segment`
      is the pool's path, `segment_bytes` its size with the board, `board_offset` where the board begins (0: there is
      none, and nobody is given a lease on bytes that are still arriving).
    * `stored` is what the SSD tier's directory holds, least recently used first: whole checkpoints, partial ones
      (`arrived_bytes` is set) and quarantined ones.
    * `restored` is what an earlier life left in the pool; `pins` maps checkpoint id → tier ("dram" or "ssd").
    * Above `dram_high` (a fraction of the tier) copies are evicted ahead of need down to `dram_low`; so for the SSD.
    * Every stored checkpoint is verified once in `scrub_interval_s` seconds (0: never), at `scrub_bytes_per_s`.

    Its clock starts with the first call of `handle`: `deadline()` asks for that at once when there is work from an
    earlier life (leases to renew, pinned checkpoints to bring back).
    """

    def __init__(
        self,
        *,
        server_id: str,
        nonce: str,
        segment: str,
        allocator: Allocator,
        ssd_capacity_bytes: int,
        segment_bytes: int = 0,
        board_offset: int = 0,
        stored: Iterable[StoredCheckpoint] = (),
        restored: PoolState | None = None,
        pins: Mapping[str, str] | None = None,
        peer_url: str = "",
        dram_high: float = 1.0,
        dram_low: float = 1.0,
        ssd_high: float = 1.0,
        ssd_low: float = 1.0,
        scrub_interval_s: float = 0.0,
        scrub_bytes_per_s: int = 0,
    ) -> None:
        self.server_id = server_id
        self.ssd_capacity_bytes = ssd_capacity_bytes
        self.ssd_bytes_per_s: float | None = None
        self.remote_bytes_per_s: float | None = None
        self._nonce = nonce
        self._segment = segment
        self._allocator = allocator
        self._chunk_bytes = allocator.chunk_bytes
        self._ssd: dict[str, _OnSsd] = {}
        self._removing: dict[str, int] = {}  # id → bytes that are not free yet
        self._evictions: dict[str, list[ReplyHandle]] = {}  # who waits for a removal
        self._dram: dict[str, _InDram] = {}
        self._leases: dict[str, _Held] = {}
        self._kept_for: dict[_WantKey, str] = {}  # leases for callers that were between two polls
        self._imports: dict[Source, _ImportJob] = {}
        self._loads: dict[str, _LoadJob] = {}
        self._wants: dict[_WantKey, _Want] = {}
        self._by_source: dict[Source, str] = {}  # what an import of this source brought last
        self._imported: dict[tuple[Source, str], str] = {}  # (source, revision) → id
        self._failed_imports: dict[Source, tuple[Failure, float]] = {}  # for a caller between two polls
        self._inspections = 0
        self._uses = 0
        self._lease_count = 0
        self._draining = False
        self._bus_lost = False
        for one in stored:
            self._adopt(one)

    # -- the protocol of a core ----------------------------------------------------------------------------------

    def handle(self, event: Event | None, now: float) -> list[Action]:
        """Take an event at monotonic second `now`; what is wanted."""
        actions: list[Action] = []
        match event:
            case None:
                pass
            case AcquireAsked(message, reply):
                self._acquire(message, reply, now, actions)
            case RenewAsked(message, reply):
                self._renew(message, reply, now, actions)
            case ReleaseAsked(message):
                self._release(message, actions)
            case ImportAsked(message, reply):
                self._import(message, reply, now, actions)
            case InspectAsked(message, reply):
                self._inspect(message, reply, actions)
            case EvictAsked(message, reply):
                self._evict(message, reply, actions)
            case SourceInspected():
                self._inspections -= 1
                failure = self._too_large(event.image_bytes, event.peak_bytes)
                answer = failure or Inspected(architecture=event.architecture, weight_bytes=event.weight_bytes)
                actions.append(Answer(event.reply, answer))
            case InspectFailed(reply, failure):
                self._inspections -= 1
                actions.append(Answer(reply, failure))
            case ImportPlanned():
                self._import_planned(event, now, actions)
            case ImportProgressed():
                self._import_progressed(event, now, actions)
            case ImportDone():
                self._import_done(event, now, actions)
            case ImportFailed(source, failure):
                self._import_failed(source, failure, now, actions)
            case ReadProgressed(job, done_bytes):
                load = self._loads.get(job)
                if load is not None and load.reading:
                    load.done_bytes = max(load.done_bytes, done_bytes)
                    self._publish(load, self._load_progress(load, now), now, actions)
            case ReadDone():
                self._read_done(event, now, actions)
            case ReadFailed(job, failure):
                self._read_failed(job, failure, now, actions)
            case CheckpointRemoved(checkpoint_id, removal_failure):
                self._removed(checkpoint_id, removal_failure, actions)
            case BusLost():
                # Holders cannot renew, and may well use the bytes all the same: nothing expires meanwhile.
                self._bus_lost = True
            case BusBack():
                self._bus_lost = False
                for held in self._leases.values():
                    held.expires_at = max(held.expires_at, now + held.ttl_s)
            case DrainAsked():
                self._drain(actions)
            case _:
                raise AssertionError(f"{event} is not handled")
        self._expire(now, actions)
        self._answer_late(now, actions)
        self._start_work(now, actions)
        return actions

    def deadline(self) -> float | None:
        """The monotonic second at which something lapses."""
        moments = [] if self._bus_lost else [held.expires_at for held in self._leases.values()]
        moments += [until for _, until in self._failed_imports.values()]
        for want in self._wants.values():
            moments += [waiter.deadline for waiter in want.waiters] or [want.lapses_at]
        for source, job in self._imports.items():
            moments += [waiter.deadline for waiter in job.waiters]
            if not self._is_wanted(source, job):
                moments.append(job.interest_until)
        moments += [load.blocked_until for load in self._loads.values() if load.blocked_until is not None]
        return min(moments, default=None)

    def check(self) -> None:
        """Assert every invariant."""
        self._allocator.check()
        allocated = sum(copy.allocated_bytes for copy in self._dram.values())
        free = self._allocator.free_chunks * self._allocator.chunk_bytes
        assert allocated + free == self._allocator.capacity_bytes, "the pool's accounts do not balance"
        spans = sorted((e.offset, e.offset + e.length) for copy in self._dram.values() for e in copy.extents)
        for (_, end), (begin, _) in pairwise(spans):
            assert end <= begin, "two checkpoints share a chunk of the pool"
        assert self.ssd_used_bytes <= self.ssd_capacity_bytes, "the SSD tier holds more than its capacity"
        for lease_id, held in self._leases.items():
            copy = self._dram.get(held.lease.checkpoint.checkpoint_id)
            assert copy is not None, f"the bytes of lease {lease_id} are gone"
            assert copy.ready, f"lease {lease_id} is on bytes that are not verified"
            assert trim_extents(copy.extents, copy.image_bytes) == held.lease.extents, f"lease {lease_id} is elsewhere"
        for lease_id in self._kept_for.values():
            assert lease_id in self._leases, "a lease that does not exist is kept for somebody"
        for checkpoint_id, copy in self._dram.items():
            assert checkpoint_id in self._ssd, "DRAM holds what the SSD tier does not"
            reading = checkpoint_id in self._loads and self._loads[checkpoint_id].reading
            assert copy.ready != reading, "a copy is claimed while it is read, or neither claimed nor read"
        for checkpoint_id in self._loads:
            assert checkpoint_id in self._ssd, "a load of what is not on the SSD"
        assert sum(load.reading for load in self._loads.values()) <= 1, "two reads at once"
        assert sum(job.state != "queued" for job in self._imports.values()) <= 1, "two imports at once"
        for want in self._wants.values():
            stages = (want.importing is not None, want.loading is not None, want.failure is not None)
            assert sum(stages) == 1, "a want must be in one stage"
            assert want.importing is None or want.importing in self._imports, "a want waits for an import that is gone"
            assert want.loading is None or want.loading in self._loads, "a want waits for a load that is gone"
            assert want.failure is None or not want.waiters, "a failed want keeps its caller waiting"

    # -- what others may look at ---------------------------------------------------------------------------------

    @property
    def ssd_used_bytes(self) -> int:
        """Bytes of the SSD tier that are taken, being freed, or reserved by an import."""
        return (
            sum(on.stored.stored_bytes for on in self._ssd.values())
            + sum(self._removing.values())
            + sum(job.reserved_bytes for job in self._imports.values())
        )

    @property
    def dram_used_bytes(self) -> int:
        """Bytes of the pool that are allocated."""
        return sum(copy.allocated_bytes for copy in self._dram.values())

    @property
    def leased_bytes(self) -> int:
        """Bytes of the pool that cannot be evicted now."""
        leased = self._leased()
        return sum(copy.allocated_bytes for id, copy in self._dram.items() if id in leased)

    @property
    def lease_count(self) -> int:
        """Leases that are alive."""
        return len(self._leases)

    def record(self, phase: Phase, *, host: str, pid: int) -> ServerRecord:
        """The server's record."""
        return ServerRecord(
            server_id=self.server_id,
            phase=phase,
            host=host,
            pid=pid,
            dram_capacity_bytes=self._allocator.capacity_bytes,
            dram_used_bytes=self.dram_used_bytes,
            leased_bytes=self.leased_bytes,
            ssd_capacity_bytes=self.ssd_capacity_bytes,
            ssd_used_bytes=self.ssd_used_bytes,
            dram={id: copy.image_bytes for id, copy in self._dram.items() if copy.ready},
            ssd={id: on.stored.image_bytes for id, on in self._ssd.items()},
            loads=len(self._imports) + len(self._loads),
            ssd_bytes_per_s=self.ssd_bytes_per_s,
            remote_bytes_per_s=self.remote_bytes_per_s,
            chunk_bytes=self._allocator.chunk_bytes,
        )

    # -- acquire, renew, release ---------------------------------------------------------------------------------

    def _acquire(self, message: Acquire, reply: ReplyHandle, now: float, actions: list[Action]) -> None:
        refusal = self._refusal(message.deployment)
        if refusal is None and not message.ttl_s > 0:
            refusal = Failure(code=Code.INVALID_REQUEST, message="A lease's ttl_s must be positive.", param="ttl_s")
        if refusal is not None:
            actions.append(Answer(reply, refusal))
            return
        key = (message.holder, message.checkpoint_id, message.deployment, message.source)
        want = self._wants.get(key)
        if want is not None and want.failure is not None:
            del self._wants[key]
            actions.append(Answer(reply, want.failure))
            return
        id = message.checkpoint_id or self._by_source.get(message.source, "")
        copy = self._dram.get(id)
        if copy is not None and copy.ready and want is None:
            kept = self._leases.get(self._kept_for.pop(key, ""))
            if kept is not None:
                self._keep(kept, message.ttl_s, now)
            actions.append(
                Answer(reply, kept.lease if kept is not None else self._grant(message, id, now, tier="dram"))
            )
            actions.append(TouchRecord())
            return
        if want is None:
            if len(self._wants) >= WAITERS_LIMIT:
                actions.append(Answer(reply, Failure(code=Code.QUEUE_FULL, message="Too many loads wait here.")))
                return
            want = self._wants[key] = _Want(message=message, tier="remote", lapses_at=0.0)
            if id in self._ssd:
                want.tier = "ssd"
                self._want_load(want, id)
            else:
                self._want_import(want)
            actions.append(TouchRecord())
        if len(want.waiters) >= WAITERS_LIMIT:
            actions.append(Answer(reply, Failure(code=Code.QUEUE_FULL, message="Too many loads wait here.")))
            return
        waiter = _Waiter(reply, now + _clamp(message.wait_s, WAIT_LIMIT_S))
        want.message = message
        want.waiters.append(waiter)
        want.lapses_at = max(want.lapses_at, waiter.deadline + INTEREST_S)

    def _want_load(self, want: _Want, id: str) -> None:
        want.importing, want.loading = None, id
        load = self._loads.get(id)
        if load is None:
            load = self._loads[id] = _LoadJob(total_bytes=self._ssd[id].stored.image_bytes)
        if want.message.deployment:
            load.labels[want.message.deployment] = None

    def _want_import(self, want: _Want) -> None:
        job = self._imports.get(want.message.source)
        if job is None:
            job = self._imports[want.message.source] = _ImportJob()
        want.importing = want.message.source
        if want.message.deployment:
            job.labels[want.message.deployment] = None

    def _grant(
        self,
        message: Acquire,
        id: str,
        now: float,
        *,
        tier: str,
        ttl_s: float | None = None,
        read_s: float = 0.0,
        import_s: float = 0.0,
        remote_bytes: int = 0,
    ) -> Lease:
        """A new lease on a checkpoint that is ready in DRAM.

        Every answer is a lease of its own: a holder's replicas release theirs one by one, and one whose answer was lost
        is never renewed and expires.
        """
        copy, on = self._dram[id], self._ssd[id]
        copy.use = on.use = self._next_use()
        ttl_s = ttl_s if ttl_s is not None else _clamp(message.ttl_s, TTL_LIMIT_S)
        self._lease_count += 1
        lease_id = f"{self._nonce}-{self._lease_count}"
        lease = Lease(
            lease_id=lease_id,
            checkpoint=on.stored.checkpoint,
            segment=self._segment,
            segment_bytes=self._allocator.capacity_bytes,
            extents=trim_extents(copy.extents, copy.image_bytes),
            directory=on.stored.directory,
            tier=tier,
            import_s=import_s,
            read_s=read_s,
            remote_bytes=remote_bytes,
            ssd_bytes=0 if tier == "dram" else copy.image_bytes,
            dram_bytes=copy.image_bytes,
        )
        self._leases[lease_id] = _Held(lease=lease, holder=message.holder, expires_at=now + ttl_s, ttl_s=ttl_s)
        return lease

    def _renew(self, message: Renew, reply: ReplyHandle, now: float, actions: list[Action]) -> None:
        unknown: list[str] = []
        for lease_id in message.lease_ids:
            held = self._leases.get(lease_id)
            if held is None or held.holder != message.holder:
                unknown.append(lease_id)
            else:
                self._keep(held, message.ttl_s, now)
        actions.append(Answer(reply, Renewed(unknown=tuple(unknown))))

    def _keep(self, held: _Held, ttl_s: float, now: float) -> None:
        held.ttl_s = _clamp(ttl_s, TTL_LIMIT_S)
        held.expires_at = now + held.ttl_s

    def _release(self, message: Release, actions: list[Action]) -> None:
        held = self._leases.get(message.lease_id)
        if held is not None and held.holder == message.holder:
            self._end_lease(message.lease_id)
            actions.append(TouchRecord())

    def _end_lease(self, lease_id: str) -> _Held:
        held = self._leases.pop(lease_id)
        for key, kept in list(self._kept_for.items()):
            if kept == lease_id:
                del self._kept_for[key]
        return held

    # -- inspect and import --------------------------------------------------------------------------------------

    def _inspect(self, message: Inspect, reply: ReplyHandle, actions: list[Action]) -> None:
        refusal = self._refusal("")
        if refusal is None and self._inspections >= WAITERS_LIMIT:
            refusal = Failure(code=Code.QUEUE_FULL, message="Too many sources are being inspected.")
        if refusal is not None:
            actions.append(Answer(reply, refusal))
            return
        self._inspections += 1
        actions.append(InspectSource(message.source, reply))

    def _import(self, message: Import, reply: ReplyHandle, now: float, actions: list[Action]) -> None:
        refusal = self._refusal(message.deployment)
        job = self._imports.get(message.source)
        if refusal is None and len(job.waiters if job else self._imports) >= WAITERS_LIMIT:
            refusal = Failure(code=Code.QUEUE_FULL, message="Too many imports wait here.")
        if refusal is None and message.source in self._failed_imports:
            refusal, _ = self._failed_imports.pop(message.source)
        if refusal is not None:
            actions.append(Answer(reply, refusal))
            return
        if job is None:
            job = self._imports[message.source] = _ImportJob()
            actions.append(TouchRecord())
        if message.deployment:
            job.labels[message.deployment] = None
        waiter = _Waiter(reply, now + _clamp(message.wait_s, WAIT_LIMIT_S))
        job.waiters.append(waiter)
        job.interest_until = max(job.interest_until, waiter.deadline + INTEREST_S)

    def _import_planned(self, event: ImportPlanned, now: float, actions: list[Action]) -> None:
        job = self._imports.get(event.source)
        if job is None or job.state != "planning":
            return
        known = self._imported.get((event.source, event.revision), "")
        if known in self._ssd:
            self._finish_import(event.source, known, now, actions)
            return
        failure = self._too_large(event.image_bytes, event.peak_bytes)
        if failure is None:
            failure = self._make_ssd_room(event.peak_bytes, actions)
        if failure is not None:
            self._import_failed(event.source, failure, now, actions)
            return
        job.state = "making_room"
        job.revision = event.revision
        job.peak_bytes = event.peak_bytes
        job.total_bytes = event.image_bytes

    def _import_progressed(self, event: ImportProgressed, now: float, actions: list[Action]) -> None:
        job = self._imports.get(event.source)
        if job is not None and job.state == "running":
            job.done_bytes, job.total_bytes = event.done_bytes, event.total_bytes
            self._publish(job, self._import_progress(job, now), now, actions)

    def _import_done(self, event: ImportDone, now: float, actions: list[Action]) -> None:
        job = self._imports.get(event.source)
        if job is None or job.state != "running":
            return
        id = event.stored.id
        job.reserved_bytes = 0
        if event.existing and id in job.removed_meanwhile:
            # What the import met and kept has been removed since: once more.
            job.state, job.started_at, job.done_bytes = "queued", None, 0
            return
        if self.ssd_used_bytes - self._stored_bytes(id) + event.stored.stored_bytes > self.ssd_capacity_bytes:
            # An import that needed more than it announced: do not keep what the tier has no room for.
            self._removing[id] = 0
            actions.append(RemoveCheckpoint(id, event.stored.directory))
            message = f"The import took {event.stored.stored_bytes} bytes, more than was reserved for it."
            self._import_failed(event.source, Failure(code=Code.INTERNAL, message=message), now, actions)
            return
        if id not in self._ssd:
            self._adopt(event.stored)
        self._by_source[event.source] = id
        self._imported[(event.source, job.revision)] = id
        if event.remote_bytes >= MEASURED_BYTES and event.seconds > 0:
            self.remote_bytes_per_s = _weighted(self.remote_bytes_per_s, event.remote_bytes / event.seconds)
        for want in self._wants.values():
            if want.importing == event.source:
                want.import_s = event.seconds
                want.remote_bytes = event.remote_bytes
        actions.append(
            Note(
                "checkpoint.imported",
                {
                    "checkpoint_id": id,
                    "architecture": event.stored.checkpoint.architecture,
                    "source": event.source.url,
                    "stored_bytes": event.stored.stored_bytes,
                    "import_s": round(event.seconds, 3),
                    "existing": event.existing,
                },
            )
        )
        self._finish_import(event.source, id, now, actions)

    def _finish_import(self, source: Source, id: str, now: float, actions: list[Action]) -> None:
        """The source is in the SSD tier as `id`: answer those who wait for that, send on those who want it in DRAM."""
        job = self._imports.pop(source)
        on = self._ssd[id]
        on.use = self._next_use()
        self._by_source[source] = id
        for waiter in job.waiters:
            actions.append(Answer(waiter.reply, Imported(checkpoint=on.stored.checkpoint)))
        for key, want in list(self._wants.items()):
            if want.importing != source:
                continue
            want.importing = None
            if want.message.checkpoint_id not in ("", id):
                failure = Failure(
                    code=Code.CHECKPOINT_UNAVAILABLE,
                    message=f"{source.url} holds another checkpoint now ({id}) than the one asked for "
                    f"({want.message.checkpoint_id}); deploy it again.",
                )
                self._fail_want(key, want, failure, actions)
                continue
            copy = self._dram.get(id)
            if copy is not None and copy.ready:
                self._serve_want(key, want, id, now, actions, read_s=0.0)
            else:
                self._want_load(want, id)
        actions.append(TouchRecord())

    def _import_failed(self, source: Source, failure: Failure, now: float, actions: list[Action]) -> None:
        job = self._imports.pop(source, None)
        if job is None:
            return
        for waiter in job.waiters:
            actions.append(Answer(waiter.reply, failure))
        if not job.waiters and job.interest_until > now:
            self._failed_imports[source] = (failure, job.interest_until)
        for key, want in list(self._wants.items()):
            if want.importing == source:
                want.importing = None
                self._fail_want(key, want, failure, actions)
        actions.append(
            Note("checkpoint.refused", {"source": source.url, "code": failure.code.value, "message": failure.message})
        )
        actions.append(TouchRecord())

    # -- loads ---------------------------------------------------------------------------------------------------

    def _start_work(self, now: float, actions: list[Action]) -> None:
        if self._draining:
            return
        job_of = next(iter(self._imports.items()), None)
        # An import never overlaps a removal: they could be about the same directory, and it needs the room.
        if job_of is not None and not self._removing:
            source, job = job_of
            if job.state == "queued":
                job.state = "planning"
                actions.append(PlanImport(source))
            elif job.state == "making_room":
                job.state = "running"
                job.reserved_bytes = job.peak_bytes
                job.started_at = now
                job.removed_meanwhile.clear()
                actions.append(RunImport(source, job.revision, job="import", priority=PRIORITY_USER))
                self._publish(job, self._import_progress(job, now), now, actions)
        while self._loads:
            id, load = next(iter(self._loads.items()))
            if load.reading:
                return
            room = self._make_dram_room(id, actions)
            if isinstance(room, Failure):
                if load.blocked_until is None:
                    load.blocked_until = now + ROOM_GRACE_S
                if room.kind.retryable and now < load.blocked_until:
                    return
                self._fail_load(id, room, now, actions)
                continue
            self._dram[id] = _InDram(extents=room, image_bytes=load.total_bytes, use=self._next_use())
            load.reading = True
            load.blocked_until = None
            load.started_at = now
            actions.append(ReadImage(self._ssd[id].stored, room, job=id, priority=PRIORITY_USER, tag=0))
            self._publish(load, self._load_progress(load, now), now, actions)
            actions.append(TouchRecord())
            return

    def _read_done(self, event: ReadDone, now: float, actions: list[Action]) -> None:
        id = event.job
        load = self._loads.get(id)
        if load is None or not load.reading:
            return
        del self._loads[id]
        copy = self._dram[id]
        copy.ready = True
        copy.use = self._next_use()
        if copy.image_bytes >= MEASURED_BYTES and event.seconds > 0:
            self.ssd_bytes_per_s = _weighted(self.ssd_bytes_per_s, copy.image_bytes / event.seconds)
        for key, want in list(self._wants.items()):
            if want.loading == id:
                self._serve_want(key, want, id, now, actions, read_s=event.seconds)
        facts: Facts = {"checkpoint_id": id, "image_bytes": copy.image_bytes, "read_s": round(event.seconds, 4)}
        actions.append(Note("checkpoint.loaded", facts))
        actions.append(TouchRecord())

    def _serve_want(
        self, key: _WantKey, want: _Want, id: str, now: float, actions: list[Action], *, read_s: float
    ) -> None:
        """Lease to a holder that waited; one that is between two polls finds its lease at the next one."""
        del self._wants[key]
        ledger: dict[str, Any] = {"read_s": read_s, "import_s": want.import_s, "remote_bytes": want.remote_bytes}
        for waiter in want.waiters:
            actions.append(Answer(waiter.reply, self._grant(want.message, id, now, tier=want.tier, **ledger)))
        if not want.waiters:
            ttl_s = max(0.0, want.lapses_at - now)
            self._kept_for[key] = self._grant(want.message, id, now, tier=want.tier, ttl_s=ttl_s, **ledger).lease_id

    def _read_failed(self, id: str, failure: Failure, now: float, actions: list[Action]) -> None:
        load = self._loads.get(id)
        if load is None or not load.reading:
            return
        self._allocator.free(self._dram.pop(id).extents)
        self._fail_load(id, failure, now, actions)
        if failure.code is Code.CHECKPOINT_CORRUPT:
            # Not verified any more, so not in the tier any more; whoever asks again causes a fresh import.
            self._remove_from_ssd(id, "corrupt", actions)

    def _fail_load(self, id: str, failure: Failure, now: float, actions: list[Action]) -> None:
        del self._loads[id]
        for key, want in list(self._wants.items()):
            if want.loading == id:
                want.loading = None
                self._fail_want(key, want, failure, actions)
        facts: Facts = {"checkpoint_id": id, "code": failure.code.value, "message": failure.message}
        actions.append(Note("load.failed", facts))
        actions.append(TouchRecord())

    def _fail_want(self, key: _WantKey, want: _Want, failure: Failure, actions: list[Action]) -> None:
        """Tell the caller, now or (if it is between two polls) when it comes back."""
        want.importing = want.loading = None
        for waiter in want.waiters:
            actions.append(Answer(waiter.reply, failure))
        if want.waiters:
            del self._wants[key]
        else:
            want.failure = failure

    # -- room and eviction ---------------------------------------------------------------------------------------

    def _too_large(self, image_bytes: int, peak_bytes: int) -> Failure | None:
        pool_bytes = self._allocator.capacity_bytes
        if image_bytes > pool_bytes:
            return Failure(
                code=Code.TOO_LARGE,
                message=f"The model has {image_bytes} bytes; the DRAM pool of {self.server_id} has {pool_bytes}.",
            )
        if peak_bytes > self.ssd_capacity_bytes:
            return Failure(
                code=Code.TOO_LARGE,
                message=f"The import needs {peak_bytes} bytes; the SSD tier of {self.server_id} has "
                f"{self.ssd_capacity_bytes}.",
            )
        return None

    def _make_dram_room(self, id: str, actions: list[Action]) -> tuple[Extent, ...] | Failure:
        """Extents for this checkpoint, after evicting the least recently used copies that nobody leases."""
        size_bytes = self._ssd[id].stored.image_bytes
        failure = self._too_large(size_bytes, 0)
        if failure is not None:
            return failure
        leased = self._leased()
        idle = sorted(
            (other for other, copy in self._dram.items() if copy.ready and other not in leased),
            key=lambda other: self._dram[other].use,
        )
        evictable = sum(self._allocator.chunks_for(self._dram[other].allocated_bytes) for other in idle)
        wanted, chunk_bytes = self._allocator.chunks_for(size_bytes), self._allocator.chunk_bytes
        if self._allocator.free_chunks + evictable < wanted:
            return Failure(
                code=Code.NO_CAPACITY,
                message=f"The model needs {wanted * chunk_bytes} bytes of DRAM on server {self.server_id}; "
                f"{(self._allocator.free_chunks + evictable) * chunk_bytes} are not in use.",
                retry_after_s=5.0,
            )
        while True:
            extents = self._allocator.allocate(size_bytes)
            if extents is not None:
                return extents
            self._evict_from_dram(idle.pop(0), "capacity", actions)

    def _make_ssd_room(self, size_bytes: int, actions: list[Action]) -> Failure | None:
        """Start removing the least recently used checkpoints until `size_bytes` fit; none if that would not do."""
        needed = self.ssd_used_bytes + size_bytes - self.ssd_capacity_bytes
        leased = self._leased()
        victims: list[str] = []
        for id, on in sorted(self._ssd.items(), key=lambda item: item[1].use):
            if needed <= 0:
                break
            if id not in leased and id not in self._loads:
                victims.append(id)
                needed -= on.stored.stored_bytes
        if needed > 0:
            return Failure(
                code=Code.NO_CAPACITY,
                message=f"The import needs {size_bytes} bytes on {self.server_id}; {needed} bytes are missing in "
                "its SSD tier and everything in it is in use.",
                retry_after_s=5.0,
            )
        for id in victims:
            self._remove_from_ssd(id, "capacity", actions)
        return None

    def _evict(self, message: Evict, reply: ReplyHandle, actions: list[Action]) -> None:
        id = message.checkpoint_id
        if message.tier not in ("dram", "ssd"):
            failure = Failure(code=Code.INVALID_REQUEST, message=f"{message.tier!r} is no tier.", param="tier")
            actions.append(Answer(reply, failure))
            return
        copy = self._dram.get(id)
        reading = copy is not None and not copy.ready
        if id in self._leased() or reading or (message.tier == "ssd" and id in self._loads):
            actions.append(Answer(reply, Failure(code=Code.BUSY, message=f"Checkpoint {id} is in use.")))
            return
        if message.tier == "dram":
            if copy is not None:
                self._evict_from_dram(id, "asked", actions)
            actions.append(Answer(reply, Done()))
            return
        if id in self._ssd:
            self._remove_from_ssd(id, "asked", actions)
        if id in self._removing:
            self._evictions.setdefault(id, []).append(reply)
        else:
            actions.append(Answer(reply, Done()))

    def _evict_from_dram(self, id: str, reason: str, actions: list[Action]) -> None:
        copy = self._dram.pop(id)
        self._allocator.free(copy.extents)
        facts: Facts = {"checkpoint_id": id, "tier": "dram", "image_bytes": copy.image_bytes, "reason": reason}
        actions.append(Note("checkpoint.evicted", facts))
        actions.append(TouchRecord())

    def _remove_from_ssd(self, id: str, reason: str, actions: list[Action]) -> None:
        if id in self._dram:
            self._evict_from_dram(id, reason, actions)
        on = self._ssd.pop(id)
        self._by_source = {source: known for source, known in self._by_source.items() if known != id}
        self._imported = {source: known for source, known in self._imported.items() if known != id}
        self._removing[id] = on.stored.stored_bytes
        for job in self._imports.values():
            job.removed_meanwhile[id] = None
        facts: Facts = {"checkpoint_id": id, "tier": "ssd", "stored_bytes": on.stored.stored_bytes, "reason": reason}
        actions.append(Note("checkpoint.evicted", facts))
        actions.append(RemoveCheckpoint(id, on.stored.directory))
        actions.append(TouchRecord())

    def _removed(self, id: str, failure: Failure | None, actions: list[Action]) -> None:
        self._removing.pop(id, None)
        for reply in self._evictions.pop(id, ()):
            actions.append(Answer(reply, failure if failure is not None else Done()))
        actions.append(TouchRecord())

    # -- time ----------------------------------------------------------------------------------------------------

    def _expire(self, now: float, actions: list[Action]) -> None:
        for lease_id, held in list(self._leases.items()):
            if held.expires_at <= now and not self._bus_lost:
                self._end_lease(lease_id)
                facts = {"lease_id": lease_id, "holder": held.holder}
                actions.append(Note("lease.expired", {**facts, "checkpoint_id": held.lease.checkpoint.checkpoint_id}))
                actions.append(TouchRecord())
        for source, (_, until) in list(self._failed_imports.items()):
            if until <= now:
                del self._failed_imports[source]

    def _answer_late(self, now: float, actions: list[Action]) -> None:
        """Polls whose time is up hear how far it is; work that nobody waits for any more is not begun."""
        for job in self._imports.values():
            late = [waiter for waiter in job.waiters if waiter.deadline <= now]
            if late:
                job.waiters = [waiter for waiter in job.waiters if waiter.deadline > now]
                for waiter in late:
                    actions.append(Answer(waiter.reply, self._import_progress(job, now)))
        for key, want in list(self._wants.items()):
            late = [waiter for waiter in want.waiters if waiter.deadline <= now]
            if late:
                want.waiters = [waiter for waiter in want.waiters if waiter.deadline > now]
                for waiter in late:
                    actions.append(Answer(waiter.reply, self._want_progress(want, now)))
            if not want.waiters and want.lapses_at <= now:
                del self._wants[key]
        for source, job in list(self._imports.items()):
            if not self._is_wanted(source, job) and job.interest_until <= now:
                del self._imports[source]
                actions.append(TouchRecord())
        for id, load in list(self._loads.items()):
            if not load.reading and not any(want.loading == id for want in self._wants.values()):
                del self._loads[id]
                actions.append(TouchRecord())

    def _is_wanted(self, source: Source, job: _ImportJob) -> bool:
        """Whether an import has begun, or somebody waits for it right now."""
        begun = job.state != "queued"
        return begun or bool(job.waiters) or any(want.importing == source for want in self._wants.values())

    def _drain(self, actions: list[Action]) -> None:
        self._draining = True
        failure = Failure(code=Code.DRAINING, message=f"The store of server {self.server_id} is shutting down.")
        for job in self._imports.values():
            for waiter in job.waiters:
                actions.append(Answer(waiter.reply, failure))
            job.waiters = []
        for want in self._wants.values():
            for waiter in want.waiters:
                actions.append(Answer(waiter.reply, failure))
        self._wants.clear()

    # -- progress ------------------------------------------------------------------------------------------------

    def _want_progress(self, want: _Want, now: float) -> Progress:
        if want.importing is not None:
            return self._import_progress(self._imports[want.importing], now)
        if want.loading is not None:
            return self._load_progress(self._loads[want.loading], now)
        return Progress(phase="queued")

    def _import_progress(self, job: _ImportJob, now: float) -> Progress:
        if job.state != "running":
            return Progress(phase="queued", total_bytes=job.total_bytes)
        return Progress(
            phase="importing", done_bytes=job.done_bytes, total_bytes=job.total_bytes, eta_s=self._eta_s(job, now)
        )

    def _load_progress(self, load: _LoadJob, now: float) -> Progress:
        if not load.reading:
            return Progress(phase="queued", total_bytes=load.total_bytes)
        return Progress(
            phase="reading", done_bytes=load.done_bytes, total_bytes=load.total_bytes, eta_s=self._eta_s(load, now)
        )

    def _eta_s(self, work: _Work, now: float) -> float | None:
        """Seconds left at the rate of this work's own bytes; None while they are too few to support an estimate."""
        if work.started_at is None or work.done_bytes < 2 * self._chunk_bytes or now - work.started_at < ETA_AFTER_S:
            return None
        return (work.total_bytes - work.done_bytes) * (now - work.started_at) / work.done_bytes

    def _publish(self, work: _Work, progress: Progress, now: float, actions: list[Action]) -> None:
        if now - work.published_at < PROGRESS_INTERVAL_S:
            return
        work.published_at = now
        for label in work.labels:
            actions.append(PublishProgress(label, progress))

    # -- small things --------------------------------------------------------------------------------------------

    def _refusal(self, label: str) -> Failure | None:
        if self._draining:
            return Failure(code=Code.DRAINING, message=f"The store of server {self.server_id} is shutting down.")
        if not _LABEL.fullmatch(label):
            return Failure(
                code=Code.INVALID_REQUEST, message=f"{label!r} is no slug of a deployment.", param="deployment"
            )
        return None

    def _adopt(self, stored: StoredCheckpoint) -> None:
        self._ssd[stored.id] = _OnSsd(stored=stored, use=self._next_use())
        if stored.source is not None:
            self._by_source[stored.source] = stored.id
            self._imported[(stored.source, stored.revision)] = stored.id

    def _stored_bytes(self, id: str) -> int:
        on = self._ssd.get(id)
        return on.stored.stored_bytes if on is not None else 0

    def _leased(self) -> dict[str, None]:
        return {held.lease.checkpoint.checkpoint_id: None for held in self._leases.values()}

    def _next_use(self) -> int:
        self._uses += 1
        return self._uses


def _clamp(seconds: float, limit_s: float) -> float:
    return min(max(seconds, 0.0), limit_s)


def _weighted(old: float | None, newest: float) -> float:
    return newest if old is None else old + WEIGHT_OF_NEWEST * (newest - old)
