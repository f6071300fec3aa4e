"""What others see of the store: the server's record and the list of what it holds. Pure; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from services.store.events import PRIORITY_USER, StoredCheckpoint
from services.store.eviction import keep_value
from services.store.holdings import OnSsd
from services.store.imports import RUNNING, Imports
from services.store.loads import Loads
from services.store.room import Room, Shelf
from services.store.tiers import Tiers
from shared.contracts.records import Phase, ServerRecord
from shared.contracts.residency import LIST_LIMIT, CheckpointList, HeldCheckpoint, ListCheckpoints


class Report:
    """Reads the tiers and the queues."""

    def __init__(self, tiers: Tiers, room: Room, loads: Loads, imports: Imports, peer_url: str) -> None:
        self._tiers = tiers
        self._room = room
        self._loads = loads
        self._imports = imports
        self._peer_url = peer_url

    def record(self, phase: Phase, *, host: str, pid: int) -> ServerRecord:
        """The server's record."""
        tiers = self._tiers
        dram, ssd, speeds = tiers.dram, tiers.ssd, tiers.speeds
        queue_bytes, drain_s = self._queue()
        return ServerRecord(
            server_id=tiers.server_id,
            phase=phase,
            host=host,
            pid=pid,
            dram_capacity_bytes=tiers.pool_bytes,
            dram_used_bytes=dram.used_bytes,
            leased_bytes=self.leased_bytes,
            ssd_capacity_bytes=ssd.capacity_bytes,
            ssd_used_bytes=ssd.used_bytes,
            dram={id: copy.stored.image_bytes for id, copy in dram.copies.items() if copy.ready},
            ssd={id: on.stored.image_bytes for id, on in ssd.whole.items() if not on.condemned},
            loads=len(self._imports.jobs) + len(self._loads.queued()) + len(self._loads.running()),
            ssd_bytes_per_s=speeds.ssd,
            remote_bytes_per_s=speeds.remote,
            peer_bytes_per_s=speeds.peer,
            chunk_bytes=tiers.chunk_bytes,
            dram_arriving={id: self._arrived(id) for id, copy in dram.copies.items() if not copy.ready},
            ssd_arriving=self._ssd_arriving(),
            load_queue_bytes=queue_bytes,
            load_drain_s=drain_s,
            pinned=dict(tiers.pins),
            quarantined={id: on.stored.quarantined for id, on in ssd.quarantined.items() if id not in ssd.whole},
            segment=tiers.segment,
            peer_url=self._peer_url,
            ssd_queue=self._ssd_queue(),
            import_queue=self._import_queue(),
        )

    @property
    def leased_bytes(self) -> int:
        """Bytes of the pool that cannot be evicted now: leased, or pinned there."""
        dram, pins = self._tiers.dram, self._tiers.pins
        leased = sum(
            copy.allocated_bytes
            for id, copy in dram.copies.items()
            if copy.leases or (copy.ready and pins.get(id) == "dram")
        )
        windows = sum(stream.window_chunks for stream in dram.streams.values()) * self._tiers.chunk_bytes
        return leased + windows + sum(copy.allocated_bytes for copy in dram.doomed.values())

    def listing(self, asked: ListCheckpoints) -> CheckpointList:
        """The part that was asked for of what is held, the one that would be evicted last first."""
        ssd = self._tiers.ssd
        found: dict[str, tuple[bool, float, int, StoredCheckpoint, int | None]] = {}
        shelves: tuple[tuple[Shelf, dict[str, OnSsd]], ...] = (
            ("whole", ssd.whole),
            ("partial", ssd.partial),
            ("quarantined", ssd.quarantined),
        )
        for shelf, held in shelves:
            for id, on in held.items():
                if id not in found:
                    candidate = self._room.ssd_candidate(id, on, shelf)
                    stays = id in self._tiers.pins or self._tiers.leases.of_checkpoint(id) > 0
                    found[id] = (stays, keep_value(candidate), candidate.recency, on.stored, on.stored.arrived_bytes)
        for job in self._imports.jobs.values():
            arriving = job.partial or (job.copy.stored if job.copy is not None else None)
            if arriving is not None and arriving.id not in ssd.whole:
                found[arriving.id] = (True, 0.0, 0, arriving, job.done_bytes)
        order = sorted(found.values(), key=lambda item: item[:3], reverse=True)
        first = max(0, asked.first)
        part = order[first : first + min(max(1, asked.limit), LIST_LIMIT)]
        held_now = tuple(self._held(stored, arrived_bytes) for *_, stored, arrived_bytes in part)
        return CheckpointList(checkpoints=held_now, total=len(order))

    def _held(self, stored: StoredCheckpoint, arrived: int | None) -> HeldCheckpoint:
        tiers, now, id = self._tiers, self._tiers.out.now, stored.id
        copy = tiers.dram.copies.get(id)
        used_at = tiers.uses.last(id)
        return HeldCheckpoint(
            checkpoint=stored.checkpoint,
            image_bytes=stored.image_bytes,
            dram_bytes=0 if copy is None else stored.image_bytes if copy.ready else self._arrived(id),
            ssd_bytes=0 if stored.quarantined else stored.image_bytes if arrived is None else arrived,
            pinned=tiers.pins.get(id, ""),
            leases=tiers.leases.of_checkpoint(id),
            uses_per_hour=tiers.uses.rate(id, now) * 3600.0,
            idle_s=None if used_at is None else now - used_at,
            bring_back_s=None
            if tiers.speeds.ssd is None or stored.quarantined
            else tiers.speeds.read_s(stored.image_bytes),
            source=stored.source,
            revision=stored.revision,
            quarantined=stored.quarantined,
        )

    def _arrived(self, id: str) -> int:
        work = self._tiers.dram.copies[id].work
        return 0 if work is None else min(work.done_bytes, work.total_bytes)

    def _ssd_arriving(self) -> dict[str, int]:
        arriving = {id: on.stored.arrived_bytes or 0 for id, on in self._tiers.ssd.partial.items()}
        for job in self._imports.jobs.values():
            if job.state == RUNNING and job.checkpoint_id and job.checkpoint_id not in self._tiers.ssd.whole:
                arriving[job.checkpoint_id] = job.done_bytes
        return arriving

    def _ssd_queue(self) -> dict[str, int]:
        """What is read from the SSD for users, in order: whole images and those that stream through windows."""
        loads = self._loads
        works = [load for load in loads.running() if load.priority == PRIORITY_USER]
        waiting = sorted(
            (load for load in loads.queued() if load.priority == PRIORITY_USER), key=lambda load: load.rank
        )
        streams = [stream for stream in self._tiers.dram.streams.values() if stream.running]
        left = [(load.on.stored.id, load.left_bytes) for load in works]
        left += [(stream.stored.id, max(0, stream.stored.image_bytes - stream.done_bytes)) for stream in streams]
        left += [(load.on.stored.id, load.left_bytes) for load in waiting]
        return _sums(left)

    def _import_queue(self) -> dict[str, int]:
        """What is brought here for users, in order."""
        jobs = [job for job in self._imports.jobs.values() if job.priority == PRIORITY_USER]
        jobs.sort(key=lambda job: (job.state != RUNNING, job.rank))
        return _sums([(job.checkpoint_id or job.job, job.left_bytes) for job in jobs])

    def _queue(self) -> tuple[int, float | None]:
        """Bytes that loads and imports have yet to move, and the seconds that this takes (None: unknown)."""
        speeds, ahead, seconds = self._tiers.speeds, 0, 0.0
        known = True
        for load in (*self._loads.queued(), *self._loads.running()):
            left = max(0, load.total_bytes - load.done_bytes)
            ahead += left
            known &= speeds.ssd is not None or not left
            seconds += speeds.read_s(left)
        for job in self._imports.jobs.values():
            left = max(0, job.total_bytes - job.done_bytes)
            ahead += left
            own_s = job.progress(self._tiers.out.now, self._tiers.chunk_bytes).eta_s
            known &= own_s is not None or (speeds.imported is not None and job.total_bytes > 0)
            seconds += speeds.import_s(left) if own_s is None else own_s
        return ahead, seconds if known else None


def _sums(left: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for id, bytes_left in left:
        sums[id] = sums.get(id, 0) + bytes_left
    return sums
