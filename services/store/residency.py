"""The core of the store: which checkpoints are in which tier, who holds a lease, and what is moved next.

Pure: events in, actions out. This is the front of its parts, each of which answers one question:

    holdings   what lies where, and the accounts of both tiers       eviction   which copies are worth least
    leases     who has been promised which bytes, until when         room       how room is made, what leaves a tier
    wants      who waits for what, and what they are told            loads      what is read from SSD into DRAM, when
    calls      what each call asks for                               imports    what is brought from elsewhere, when
    bandwidth  how fast bytes come from each tier                    chores     verification, scrubbing, export
    report     what others see                                       outbox     what one event brings about
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import assert_never

from services.store.allocator import Allocator
from services.store.bandwidth import Bandwidths
from services.store.calls import Calls
from services.store.chores import Chores
from services.store.events import (
    AcquireAsked,
    Action,
    BusBack,
    BusLost,
    CheckpointQuarantined,
    CheckpointRemoved,
    ConsumedHeard,
    DrainAsked,
    Event,
    EvictAsked,
    ExportAsked,
    ExportDone,
    ExportProgressed,
    ImportAsked,
    ImportDone,
    ImportFailed,
    ImportOpened,
    ImportPlanned,
    ImportProgressed,
    InspectAsked,
    InspectFailed,
    ListAsked,
    PinAsked,
    PrefetchAsked,
    ReadDone,
    ReadFailed,
    ReadProgressed,
    ReleaseAsked,
    RenewAsked,
    SourceInspected,
    StoredCheckpoint,
    VerifyAsked,
    VerifyDone,
    VerifyProgressed,
)
from services.store.eviction import Uses
from services.store.holdings import Copy, DramHoldings, SsdHoldings, is_whole
from services.store.imports import Imports
from services.store.leases import Leases
from services.store.loads import Loads
from services.store.outbox import Outbox
from services.store.pool_state import STATE_VERSION, PoolState
from services.store.report import Report
from services.store.room import Room
from services.store.tiers import Tiers
from services.store.wants import Wants
from shared.contracts.records import Phase, ServerRecord


def trim(
    stored: Sequence[StoredCheckpoint], capacity_bytes: int, pins: Mapping[str, str] | None = None
) -> tuple[list[StoredCheckpoint], list[StoredCheckpoint]]:
    """What of these (least recently used first) stays in an SSD tier of this capacity, and what has to go.

    Quarantined ones go first, then partial ones, pinned ones last.
    """
    pinned = pins or {}
    used = sum(one.stored_bytes for one in stored)
    order = sorted(stored, key=lambda one: (one.id in pinned, not one.quarantined, is_whole(one)))
    go: list[StoredCheckpoint] = []
    for one in order:
        if used <= capacity_bytes:
            break
        used -= one.stored_bytes
        go.append(one)
    gone = {id(one) for one in go}
    return [one for one in stored if id(one) not in gone], go


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
        self._out = out = Outbox()
        self._restored = restored
        self._begun = False
        ssd, dram = SsdHoldings(ssd_capacity_bytes), DramHoldings(allocator)
        self._tiers = tiers = Tiers(
            server_id=server_id,
            segment=segment,
            segment_bytes=segment_bytes or allocator.capacity_bytes,
            board_offset=board_offset,
            out=out,
            ssd=ssd,
            dram=dram,
            leases=Leases(out, dram, nonce),
            uses=Uses(),
            speeds=Bandwidths(),
            pins={},
            numbers=count(1),
        )
        for one in stored:
            ssd.put(one, next(tiers.numbers))
        held = (ssd.whole, ssd.partial, ssd.quarantined)
        tiers.pins.update({id: tier for id, tier in (pins or {}).items() if any(id in shelf for shelf in held)})
        if restored is not None:
            dram.next_tag = restored.next_tag
            tiers.leases.next_lease = restored.next_lease
            if (restored.chunk_bytes, restored.chunk_count) == (allocator.chunk_bytes, allocator.chunk_count):
                dram.restore(restored, ssd.whole, tiers.numbers)
                self._keep(restored)
            out.save_pool()
        self._room = Room(tiers, dram_high=dram_high, dram_low=dram_low, ssd_high=ssd_high, ssd_low=ssd_low)
        self._wants = Wants(tiers)
        self._loads = Loads(tiers, self._room, self._wants)
        self._imports = Imports(tiers, self._room, self._wants, self._loads)
        self._chores = Chores(
            tiers,
            self._room,
            self._wants,
            self._loads,
            scrub_interval_s=scrub_interval_s,
            scrub_bytes_per_s=scrub_bytes_per_s,
        )
        self._calls = Calls(tiers, self._room, self._wants, self._loads, self._imports, self._chores)
        self._report = Report(tiers, self._room, self._loads, self._imports, peer_url)
        self._early = restored is not None or bool(tiers.pins) or (scrub_interval_s > 0 and bool(ssd.whole))

    # -- the protocol of a core ----------------------------------------------------------------------------------

    def handle(self, event: Event | None, now: float) -> list[Action]:
        """Take an event at monotonic second `now`; what is wanted."""
        self._out.open(now)
        if not self._begun:
            self._begin()
        if event is not None:
            self._take(event)
        self._tiers.leases.expire()
        self._wants.lapse()
        for queue in (self._loads, self._imports, self._chores):
            queue.drop_unwanted()
        if not self._tiers.draining:
            self._imports.start()
            self._loads.start()
            self._chores.start(user_waits=self._loads.user_waits() or self._imports.user_waits())
            self._room.relieve()
        return self._out.close(self._state() if self._out.pool_changed else None)

    def _take(self, event: Event) -> None:
        calls, loads, imports, chores, room = self._calls, self._loads, self._imports, self._chores, self._room
        match event:
            case AcquireAsked(message, reply):
                calls.acquire(message, reply)
            case RenewAsked(message, reply):
                self._out.answer(reply, self._tiers.leases.renew(message))
            case ReleaseAsked(message):
                self._tiers.leases.release(message)
            case ConsumedHeard(message):
                loads.consumed(message)
            case ImportAsked(message, reply):
                calls.bring_in(message, reply)
            case InspectAsked(message, reply):
                calls.inspect(message, reply)
            case EvictAsked(message, reply):
                calls.evict(message, reply)
            case PrefetchAsked(message, reply):
                calls.prefetch(message, reply)
            case PinAsked(message, reply):
                calls.pin(message, reply)
            case VerifyAsked(message, reply):
                calls.verify(message, reply)
            case ExportAsked(message, reply):
                calls.export(message, reply)
            case ListAsked(message, reply):
                self._out.answer(reply, self._report.listing(message))
            case SourceInspected():
                calls.inspected(event)
            case InspectFailed(reply, failure):
                calls.look_ended(reply, failure)
            case ImportPlanned():
                imports.planned(event)
            case ImportOpened():
                imports.opened(event)
            case ImportProgressed():
                imports.progressed(event)
            case ImportDone():
                self._imported(event)
            case ImportFailed():
                imports.failed(event)
            case ReadProgressed():
                loads.progressed(event)
            case ReadDone():
                loads.done(event)
            case ReadFailed():
                loads.failed(event)
            case VerifyProgressed():
                chores.verify_progressed(event)
            case VerifyDone():
                for asked, reply in chores.verified(event):
                    calls.evict(asked, reply)
            case ExportProgressed():
                chores.export_progressed(event)
            case ExportDone():
                chores.exported(event)
            case CheckpointQuarantined():
                room.set_aside(event)
            case CheckpointRemoved():
                room.removed(event)
            case BusLost():
                self._tiers.leases.bus_lost()
            case BusBack():
                self._tiers.leases.bus_back()
            case DrainAsked():
                self._tiers.draining = True
                self._wants.drain()
                chores.drain()
            case _:
                assert_never(event)

    def deadline(self) -> float | None:
        """The monotonic second at which something lapses."""
        if not self._begun:
            return 0.0 if self._early else None
        parts = (self._tiers.leases, self._wants, self._loads, self._chores)
        return min((at for at in (part.deadline() for part in parts) if at is not None), default=None)

    def check(self) -> None:
        """Assert every invariant."""
        tiers = self._tiers
        for part in (tiers.ssd, tiers.dram, tiers.leases, self._wants, self._loads, self._imports, self._chores):
            part.check()
        readers: dict[int, int] = {}
        jobs = [*self._loads.readers(), *self._chores.readers()]
        for on in jobs:
            readers[id(on)] = readers.get(id(on), 0) + 1
        for on in tiers.ssd.whole.values():
            assert on.readers == readers.pop(id(on), 0), "readers of a directory are miscounted"
            assert not on.condemned or on.readers, "what is corrupt is not set aside"
        assert not readers, "a directory that is not claimed is read"
        for checkpoint_id, copy in tiers.dram.copies.items():
            assert copy.ready == (copy.work is None), "a copy is claimed while it is filled, or neither"
            there = tiers.ssd.whole.get(checkpoint_id)
            sound = there is not None and not there.condemned
            assert sound or not copy.ready, "DRAM holds what the SSD tier does not"

    # -- what others may look at ---------------------------------------------------------------------------------

    @property
    def ssd_capacity_bytes(self) -> int:
        """What the SSD tier may hold."""
        return self._tiers.ssd.capacity_bytes

    @property
    def ssd_used_bytes(self) -> int:
        """Bytes of the SSD tier that are taken, being freed, or reserved by an import."""
        return self._tiers.ssd.used_bytes

    @property
    def dram_used_bytes(self) -> int:
        """Bytes of the pool that are allocated."""
        return self._tiers.dram.used_bytes

    def in_dram(self, checkpoint_id: str) -> bool:
        """Whether this checkpoint is whole and verified in DRAM."""
        copy = self._tiers.dram.copies.get(checkpoint_id)
        return copy is not None and copy.ready

    @property
    def leased_bytes(self) -> int:
        """Bytes of the pool that cannot be evicted now."""
        return self._report.leased_bytes

    @property
    def lease_count(self) -> int:
        """Leases that are alive."""
        return len(self._tiers.leases.alive)

    @property
    def ssd_bytes_per_s(self) -> float | None:
        """SSD → DRAM as measured, None before the first load."""
        return self._tiers.speeds.ssd

    def record(self, phase: Phase, *, host: str, pid: int) -> ServerRecord:
        """The server's record."""
        return self._report.record(phase, host=host, pid=pid)

    # -- inside --------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The clock starts: leases of an earlier life run from now, pinned checkpoints are brought back."""
        self._begun = True
        for one in self._restored.leases if self._restored is not None else ():
            self._tiers.leases.restore(one, self._tiers.segment)
        self._restored = None
        for copy in [copy for copy in self._tiers.dram.doomed.values() if not copy.leases]:
            self._tiers.dram.drop(copy)
        for checkpoint_id, tier in self._tiers.pins.items():
            if tier == "dram":
                self._loads.promote(checkpoint_id)
        self._chores.spread()

    def _keep(self, restored: PoolState) -> None:
        """Bytes that an earlier life had leased, and that are in no tier now, stay until their leases are over."""
        leases = {one.lease.checkpoint.checkpoint_id: one.lease for one in restored.leases}
        claimed = self._tiers.dram.copies
        copies = [
            *((one.checkpoint_id, one.extents, 0) for one in restored.copies if one.checkpoint_id not in claimed),
            *((one.checkpoint_id, one.extents, one.image_bytes) for one in restored.kept),
        ]
        for checkpoint_id, extents, image_bytes in copies:
            lease = leases.get(checkpoint_id)
            if lease is None:
                continue
            stored = StoredCheckpoint(
                checkpoint=lease.checkpoint,
                directory=lease.directory,
                stored_bytes=0,
                image_bytes=image_bytes or lease.dram_bytes,
            )
            dram = self._tiers.dram
            with suppress(ValueError):  # a state that contradicts itself
                dram.keep(Copy(stored, extents, dram.tag(), next(self._tiers.numbers)))

    def _imported(self, event: ImportDone) -> None:
        whole = self._tiers.ssd.whole
        before = whole.get(event.stored.id)
        self._imports.done(event)
        now = whole.get(event.stored.id)
        if now is not None and now is not before:
            self._chores.stored(now)

    def _state(self) -> PoolState:
        dram, leases = self._tiers.dram, self._tiers.leases
        return PoolState(
            version=STATE_VERSION,
            chunk_bytes=dram.allocator.chunk_bytes,
            chunk_count=dram.allocator.chunk_count,
            next_tag=dram.next_tag,
            next_lease=leases.next_lease,
            copies=dram.states(),
            kept=dram.kept_states(),
            leases=leases.states(),
        )
