"""What is brought from elsewhere into the SSD tier, in which order, and into DRAM at once where somebody waits. Pure.

An import is planned (what is the source now, what does it need), gets its room, and runs. Several are planned at once,
for a source that does not answer shall delay nobody else. One of a priority runs at a time; one that matters more
begins beside what runs already. While directories are being removed none begins: they could be about the same place,
and it needs the room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.store.bandwidth import rate
from services.store.events import (
    PRIORITY_USER,
    ClearBoard,
    Facts,
    ImportDone,
    ImportFailed,
    ImportOpened,
    ImportPlanned,
    ImportProgressed,
    PlanImport,
    RunImport,
    StoredCheckpoint,
)
from services.store.holdings import Copy, total_bytes
from services.store.loads import Loads
from services.store.room import Room
from services.store.sources import redact
from services.store.tiers import Tiers
from services.store.wants import Wants, is_import
from services.store.work import Want, Work
from shared.contracts.residency import Acquire, Extent, Prefetch, Source
from shared.errors import Code, Failure
from shared.sizes import size

PLANS_LIMIT: Final = 4  # sources that are looked at at once for one priority, or for what matters more
QUEUED: Final = "queued"
PLANNING: Final = "planning"
PLANNED: Final = "planned"
RUNNING: Final = "running"


@dataclass(slots=True, eq=False, kw_only=True)
class ImportJob(Work):
    """state: queued → planning → planned (waits for its turn and its room) → running.

    `extents` and `tag` are its chunks of the pool, if it has any; `copy` is what arrives there, once that is known.
    `partial` is what an earlier run has left, whose bytes are part of `reserved_bytes` while this one runs.
    `from_peers`: another store has it. `looked_at` is when the source was asked what it is.
    """

    source: Source
    state: str = QUEUED
    revision: str = ""
    image_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    checkpoint_id: str = ""
    arrived_bytes: int = 0
    partial: StoredCheckpoint | None = None
    removals: int = 0
    tag: int = 0
    copy: Copy | None = None
    from_peers: bool = False
    looked_at: float = 0.0


class Imports:
    """The queue of imports, one per source."""

    def __init__(self, tiers: Tiers, room: Room, wants: Wants, loads: Loads) -> None:
        self._tiers = tiers
        self._room = room
        self._wants = wants
        self._loads = loads
        self.jobs: dict[Source, ImportJob] = {}

    # -- asking --------------------------------------------------------------------------------------------------

    def want(self, want: Want) -> None:
        """Somebody wants what its source is."""
        job = self.jobs.get(want.source)
        if job is None:
            number = next(self._tiers.numbers)
            job = self.jobs[want.source] = ImportJob(
                job=f"import-{number}", number=number, priority=want.priority, phase="importing", source=want.source
            )
            self._tiers.out.touch()
        if not is_import(want):
            want.found = "peer" if job.from_peers else "remote"
        self._loads.join(want, job)
        if job.copy is not None and want.checkpoint_id in ("", job.copy.id):
            want.checkpoint_id = job.copy.id
            self._loads.arriving(want)

    def too_large(self, peak_bytes: int) -> Failure | None:
        """Why an import that needs this much cannot be held."""
        if peak_bytes <= self._tiers.ssd.capacity_bytes:
            return None
        return Failure(
            code=Code.TOO_LARGE,
            message=f"The import needs {size(peak_bytes)}; the SSD tier of {self._tiers.server_id} is "
            f"{size(self._tiers.ssd.capacity_bytes)}.",
        )

    def user_waits(self) -> bool:
        """Whether a user waits for an import."""
        return any(job.priority == PRIORITY_USER for job in self.jobs.values())

    def drop_unwanted(self) -> None:
        """What is queued or has only been planned, and nobody wants any more, is not begun."""
        for job in list(self.jobs.values()):
            if job.state in (QUEUED, PLANNED) and not job.wants:
                self._forget(job)
            elif job.begun:
                self._loads.settle(job, job.copy)

    # -- order ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin what may begin now."""
        if self._tiers.ssd.going:
            return
        for job in self._in_state(PLANNED):
            if any(other.priority <= job.priority for other in self._in_state(RUNNING)):
                break
            self._run(job)
            if self._tiers.ssd.going:
                return
        for job in self._in_state(QUEUED):
            if sum(other.priority <= job.priority for other in self._in_state(PLANNING)) >= PLANS_LIMIT:
                break
            job.state, job.looked_at = PLANNING, self._tiers.out.now
            wanted = (want.checkpoint_id for want in job.wants.values() if want.checkpoint_id)
            self._tiers.out.add(PlanImport(job.source, next(wanted, "")))

    def _in_state(self, state: str) -> list[ImportJob]:
        return sorted((job for job in self.jobs.values() if job.state == state), key=lambda job: job.rank)

    def planned(self, event: ImportPlanned) -> None:
        """The source is known: perhaps it is here already; else it needs room."""
        job = self.jobs.get(event.source)
        if job is None or job.state != PLANNING:
            return
        if not job.wants:
            self._forget(job)
            return
        ssd = self._tiers.ssd
        job.revision, job.checkpoint_id = event.revision, event.checkpoint_id
        known = ssd.of_source(event.source, event.revision) or event.checkpoint_id
        if known in ssd.whole and not ssd.whole[known].condemned:
            self._finish(job, known, moved=False)
            return
        failure = self.too_large(event.peak_bytes)
        if failure is not None:
            self._fail(job, failure)
            return
        job.state = PLANNED
        job.image_bytes = job.total_bytes = event.image_bytes
        job.peak_bytes, job.arrived_bytes = event.peak_bytes, event.arrived_bytes
        job.prepared_s, job.from_peers = self._tiers.out.now - job.looked_at, event.from_peers
        # Better to hear it now than after the import.
        if event.image_bytes > self._tiers.pool_bytes:
            for want in list(job.wants.values()):
                if want.in_dram and not want.arriving:
                    self._wants.fail(want, self._tiers.too_large_for_pool(event.image_bytes))

    def _make_room(self, checkpoint_id: str, peak_bytes: int) -> Failure | None:
        partial = self._tiers.ssd.partial.get(checkpoint_id)
        there = partial.stored.stored_bytes if partial is not None else 0
        return self._room.on_ssd(max(0, peak_bytes - there), keep=checkpoint_id)

    def _run(self, job: ImportJob) -> None:
        tiers, ssd = self._tiers, self._tiers.ssd
        running = [other for other in self.jobs.values() if other.state == RUNNING]
        if job.checkpoint_id and any(job.checkpoint_id == other.checkpoint_id for other in running):
            return  # the same checkpoint from elsewhere: when that has come, this one is over too
        there = ssd.whole.get(job.checkpoint_id)
        if there is not None:
            if not there.condemned:  # else it is on its way into quarantine
                self._finish(job, job.checkpoint_id, moved=False)
            return
        failure = self._make_room(job.checkpoint_id, job.peak_bytes)
        if failure is not None:
            self._fail(job, failure)
            return
        if ssd.going:
            return
        job.state, job.started_at = RUNNING, tiers.out.now
        job.removals = ssd.removal_count
        job.done_bytes = job.arrived_bytes
        for want in job.wants.values():
            want.there_bytes = job.arrived_bytes
            if job.from_peers and want.found == "remote":
                want.found = "peer"
        if job.checkpoint_id in ssd.partial:
            job.partial = ssd.take(ssd.partial, job.checkpoint_id).stored
        job.reserved_bytes = max(job.peak_bytes, job.partial.stored_bytes if job.partial is not None else 0)
        ssd.reserved_bytes += job.reserved_bytes
        extents = self._chunks(job)
        tiers.out.add(
            RunImport(job.source, job.revision, job.job, job.priority, job.checkpoint_id, extents, tag=job.tag)
        )
        self._wants.publish(job)
        tiers.out.touch()

    def _chunks(self, job: ImportJob) -> tuple[Extent, ...]:
        """Chunks of the pool, when somebody waits for it there and there is room."""
        tiers = self._tiers
        wanted = job.image_bytes > 0 and any(want.in_dram for want in job.wants.values())
        if not wanted or job.checkpoint_id in tiers.dram.copies:
            return ()
        extents = self._room.in_dram(job.image_bytes)
        if isinstance(extents, Failure):
            return ()
        job.tag = tiers.dram.tag()
        tiers.dram.incoming[job.tag] = extents
        tiers.out.save_pool()
        tiers.out.add(ClearBoard(extents))
        return extents

    # -- results -------------------------------------------------------------------------------------------------

    def opened(self, event: ImportOpened) -> None:
        """It is known what the bytes will be: who takes them as they arrive gets a lease now."""
        job = self.jobs.get(event.source)
        if job is None or job.state != RUNNING or job.copy is not None:
            return
        tiers, stored = self._tiers, event.stored
        job.checkpoint_id = job.checkpoint_id or stored.id
        job.total_bytes = stored.image_bytes
        extents = tiers.dram.incoming.get(job.tag, ())
        known = stored.id in tiers.ssd.whole or stored.id in tiers.dram.copies
        if known or not extents or total_bytes(extents) < stored.image_bytes:
            return
        del tiers.dram.incoming[job.tag]
        job.copy = Copy(stored, extents, job.tag, next(tiers.numbers), work=job)
        tiers.dram.put(job.copy)
        tiers.out.touch()
        for want in list(job.wants.values()):
            if want.checkpoint_id in ("", stored.id):
                want.checkpoint_id = stored.id
                self._loads.arriving(want)

    def progressed(self, event: ImportProgressed) -> None:
        """It is this far."""
        job = self.jobs.get(event.source)
        if job is not None and job.state == RUNNING:
            job.done_bytes, job.total_bytes = event.done_bytes, event.total_bytes
            self._wants.publish(job)

    def done(self, event: ImportDone) -> None:
        """It is durable in the SSD tier."""
        job = self.jobs.get(event.source)
        if job is None or job.state != RUNNING:
            return
        tiers, ssd, stored = self._tiers, self._tiers.ssd, event.stored
        id = stored.id
        self._unreserve(job)
        if event.existing and ssd.removals.get(id, 0) > job.removals:
            # What the import met and kept has been removed since: once more.
            self._drop_chunks(job)
            job.state, job.started_at, job.done_bytes = QUEUED, None, 0
            return
        there = ssd.whole.get(id)
        if there is None and ssd.used_bytes + stored.stored_bytes > ssd.capacity_bytes:
            # An import that needed more than it announced: do not keep what the tier has no room for.
            self._room.delete(id, stored.directory, 0)
            message = f"The import took {stored.stored_bytes} bytes, more than was reserved for it."
            self._fail(job, Failure(code=Code.INTERNAL, message=message))
            return
        if id in ssd.partial:  # the same directory, before its id was known
            ssd.take(ssd.partial, id)
        on = there or ssd.put(stored, next(tiers.numbers))
        seconds = event.seconds - event.waited_s
        on.import_bytes_per_s = rate(event.moved_bytes or event.remote_bytes + event.peer_bytes, seconds)
        ssd.name(event.source, job.revision, id)
        tiers.speeds.fetched(event.remote_bytes, event.peer_bytes, event.moved_bytes or stored.image_bytes, seconds)
        if id in ssd.quarantined and id not in ssd.going:
            self._room.remove("quarantined", id, "replaced")
        for want in job.wants.values():
            want.import_s = event.seconds
            want.remote_bytes = event.remote_bytes + event.peer_bytes
            want.found = "peer" if event.peer_bytes > event.remote_bytes else "remote"
        facts: Facts = {
            "checkpoint_id": id,
            "architecture": stored.checkpoint.architecture,
            "source": redact(event.source.url),
            "stored_bytes": stored.stored_bytes,
            "import_s": round(event.seconds, 3),
            "remote_bytes": event.remote_bytes,
            "peer_bytes": event.peer_bytes,
            "existing": event.existing,
        }
        tiers.out.note("checkpoint.imported", facts)
        if event.in_dram:
            self._copy_arrived(job, on.stored)
        self._drop_chunks(job)
        self._finish(job, id, moved=True)

    def _copy_arrived(self, job: ImportJob, stored: StoredCheckpoint) -> None:
        """All of it is verified in the import's chunks, too."""
        tiers = self._tiers
        copy, load = job.copy, self._loads.images.get(stored.id)
        if copy is None:
            extents = tiers.dram.incoming.get(job.tag, ())
            if stored.id in tiers.dram.copies or not extents or total_bytes(extents) < stored.image_bytes:
                return
            del tiers.dram.incoming[job.tag]
            copy = Copy(stored, extents, job.tag, next(tiers.numbers))
            tiers.dram.put(copy)
        elif copy.id != stored.id:
            return
        copy.stored = stored
        tiers.dram.ready(copy, next(tiers.numbers))
        tiers.out.save_pool()
        job.copy, job.tag = None, 0
        if load is not None:
            self._loads.complete(load, copy, 0.0)

    def _finish(self, job: ImportJob, id: str, *, moved: bool) -> None:
        """The source is in the SSD tier as `id`: answer those who wait for that, send on those who want it in DRAM."""
        del self.jobs[job.source]
        tiers = self._tiers
        on = tiers.ssd.whole[id]
        on.used = next(tiers.numbers)
        tiers.ssd.name(job.source, job.revision or on.stored.revision, id)
        for want in list(job.wants.values()):
            asked = _asked(want)
            if asked not in ("", id):
                failure = Failure(
                    code=Code.CHECKPOINT_UNAVAILABLE,
                    message=f"{job.source.url} holds another checkpoint now ({id}) than the one asked for ({asked}); "
                    "deploy it again.",
                )
                self._wants.fail(want, failure)
                continue
            want.checkpoint_id = id
            if not moved:
                want.found = "ssd"
            copy = tiers.dram.copies.get(id)
            if is_import(want):
                self._wants.imported(want)
            elif copy is not None and copy.ready:
                self._wants.serve(want, copy)
            else:
                self._loads.want(want, on)
        if tiers.pins.get(id) == "dram":
            self._loads.promote(id)
        self._over()

    def failed(self, event: ImportFailed) -> None:
        """It could not be planned, or has been cut off; what it kept is there to go on from."""
        job = self.jobs.get(event.source)
        if job is None or job.state not in (PLANNING, RUNNING):
            return
        ssd, kept = self._tiers.ssd, event.kept
        if job.state == RUNNING:
            self._unreserve(job)
            if kept is not None and kept.id not in ssd.partial and kept.id not in ssd.whole:
                if ssd.used_bytes + kept.stored_bytes <= ssd.capacity_bytes:
                    ssd.put(kept, next(self._tiers.numbers))
                else:
                    self._room.delete(kept.id, kept.directory, 0)
        self._fail(job, event.failure)

    def _fail(self, job: ImportJob, failure: Failure) -> None:
        self._drop_chunks(job)
        for want in list(job.wants.values()):
            there = self._tiers.ssd.whole.get(want.checkpoint_id)
            if there is not None and want.in_dram:  # it has come from elsewhere meanwhile
                self._loads.want(want, there)
            else:
                self._wants.fail(want, self._explained(want.checkpoint_id, failure))
        facts: Facts = {"source": redact(job.source.url), "code": failure.code.value, "message": failure.message}
        self._tiers.out.note("checkpoint.refused", facts)
        self._forget(job)

    def _explained(self, id: str, failure: Failure) -> Failure:
        """Whoever asks for what is in quarantine hears why it is there."""
        on = self._tiers.ssd.quarantined.get(id)
        if on is None:
            return failure
        return Failure(
            code=Code.CHECKPOINT_CORRUPT,
            message=f"Checkpoint {id} is in quarantine ({on.stored.quarantined}) and could not be imported again: "
            f"{failure.message}",
            retry_after_s=failure.retry_after_s,
        )

    def _forget(self, job: ImportJob) -> None:
        del self.jobs[job.source]
        self._over()

    def _over(self) -> None:
        if not any(job.state == RUNNING for job in self.jobs.values()):
            self._tiers.ssd.removals.clear()
        self._tiers.out.touch()

    def _unreserve(self, job: ImportJob) -> None:
        self._tiers.ssd.reserved_bytes -= job.reserved_bytes
        job.reserved_bytes, job.partial = 0, None

    def _drop_chunks(self, job: ImportJob) -> None:
        """Its chunks of the pool hold nothing that is claimed; leases on what should have arrived there are void."""
        tiers, copy = self._tiers, job.copy
        extents = tiers.dram.incoming.pop(job.tag, None)
        if extents is not None:
            tiers.free(extents)
        if copy is not None:
            tiers.leases.void(copy)
            tiers.dram.drop(copy)
        job.copy, job.tag = None, 0

    def check(self) -> None:
        """Assert that reservations and chunks belong to imports that run."""
        ssd, dram = self._tiers.ssd, self._tiers.dram
        assert ssd.reserved_bytes == sum(job.reserved_bytes for job in self.jobs.values()), "room reserved for nobody"
        tags = [job.tag for job in self.jobs.values() if job.tag and job.copy is None]
        assert sorted(tags) == sorted(dram.incoming), "chunks are kept for an import that is gone"
        for source, job in self.jobs.items():
            assert job.source == source and (job.state == RUNNING) == job.begun, "an import is half begun"
            assert job.state == RUNNING or not job.reserved_bytes, "an import that does not run has room"
            assert job.copy is None or dram.copies.get(job.copy.id) is job.copy, "an import fills what is not its own"
        ids = [job.checkpoint_id for job in self.jobs.values() if job.state == RUNNING and job.partial is not None]
        assert len(ids) == len(set(ids)), "two imports go on from the same bytes"


def _asked(want: Want) -> str:
    """The checkpoint that a caller named, or "" for whatever the source is."""
    return want.message.checkpoint_id if isinstance(want.message, Acquire | Prefetch) else ""
