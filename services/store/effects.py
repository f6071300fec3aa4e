"""What the store's core wants done that takes time: each long action on a thread, its result as an event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from prometheus_client import Counter, Histogram

from services.store import events as e
from services.store.export import Exporter
from services.store.fetch import FetchInterrupted
from services.store.image_files import StoredImage, rewrite
from services.store.importer import Importer, Outcome
from services.store.mover import Job, Mover, Report
from services.store.peers import PeerDirectory
from services.store.tier import SsdTier
from shared.contracts.residency import Extent
from shared.errors import Code, HearthError
from shared.metrics import LATENCY_BUCKETS_S

T = TypeVar("T")

PROGRESS_S: Final = 0.05  # between two progress events of one piece of work: the core needs no more
JOB_THREADS: Final = 32  # pieces of long work at once; each waits for a mover's threads, which do the work
LOOK_THREADS: Final = 4

READ_SECONDS = Histogram("hearth_store_read_seconds", "Loads SSD → DRAM in seconds", buckets=LATENCY_BUCKETS_S)
READ_BYTES = Counter("hearth_store_read_bytes", "Bytes loaded SSD → DRAM")
IMPORT_SECONDS = Histogram("hearth_store_import_seconds", "Imports → SSD in seconds", buckets=LATENCY_BUCKETS_S)
IMPORT_BYTES = Counter("hearth_store_import_bytes", "Bytes imported → SSD, by where they came from", ["origin"])
VERIFIED_BYTES = Counter("hearth_store_verified_bytes", "Bytes in the SSD tier compared with their checksums")
REPAIRED_CHUNKS = Counter("hearth_store_repaired_chunks", "Corrupt chunks that were fetched again")


@dataclass(frozen=True, slots=True)
class Means:
    """What bytes are moved with. The wiring makes and closes it."""

    tier: SsdTier
    disk: Mover
    net: Mover
    importer: Importer
    exporter: Exporter
    peers: PeerDirectory
    block_bytes: int
    verify_loads: bool


class Effects:
    """Carries out long actions. `post` takes events from any thread; `warn` writes a line of the log."""

    def __init__(self, means: Means, *, post: Callable[[e.Event], None], warn: Callable[[str, str], None]) -> None:
        self._means = means
        self._post = post
        self._warn = warn
        # A look at a source, or the removal of a directory, is delayed by no job.
        self._jobs = ThreadPoolExecutor(JOB_THREADS, thread_name_prefix="job")
        self._looks = ThreadPoolExecutor(LOOK_THREADS, thread_name_prefix="look")
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="tier")
        self._told_of_buffered_reads = False
        self._closed = False

    async def do(self, action: e.Action) -> e.Event | None:
        """Carry out one long action; the event that it ends in."""
        match action:
            case e.InspectSource():
                return await self._inspect(action)
            case e.PlanImport():
                return await self._plan(action)
            case e.RunImport():
                return await self._import(action)
            case e.ReadImage():
                return await self._read(action)
            case e.VerifyCheckpoint():
                return await self._verify(action)
            case e.RunExport():
                return await self._export(action)
            case e.QuarantineCheckpoint():
                return await self._quarantine(action)
            case e.RemoveCheckpoint():
                return await self._remove(action)
            case e.SavePins(pins):
                await self._save_pins(dict(pins))
                return None
            case _:
                raise AssertionError(f"{action} is no long action")

    def set_priority(self, job: str, priority: int) -> None:
        """A job goes before or after others from now on."""
        for mover in (self._means.disk, self._means.net):
            mover.set_priority(job, priority)

    def advance(self, job: str, chunks: int) -> None:
        """The holder of a job's window has taken this many chunks."""
        self._means.disk.advance(job, chunks)

    def stop(self, job: str) -> None:
        """End a job at its next chunk."""
        self._means.importer.stop(job)
        for mover in (self._means.disk, self._means.net):
            mover.stop(job)

    async def close(self) -> None:
        """End everything; blocks no longer than a chunk takes."""
        self._closed = True
        self._means.importer.close()
        self._means.exporter.close()
        threads = (self._jobs, self._looks, self._changes)
        for pool in threads:
            pool.shutdown(wait=False, cancel_futures=True)
        loop = asyncio.get_running_loop()
        for mover in (self._means.disk, self._means.net):
            await loop.run_in_executor(None, mover.close)
        for pool in threads:
            await loop.run_in_executor(None, pool.shutdown)

    # -- sources -------------------------------------------------------------------------------------------------

    async def _inspect(self, action: e.InspectSource) -> e.Event:
        try:
            look = await self._on(self._looks, partial(self._means.importer.look, action.source))
        except HearthError as error:
            return e.InspectFailed(action.reply, error.failure)
        return e.SourceInspected(action.reply, look.architecture, look.weight_bytes, look.image_bytes, look.peak_bytes)

    async def _plan(self, action: e.PlanImport) -> e.Event:
        await self._means.peers.look()
        peers = self._means.peers.of(action.checkpoint_id)
        try:
            look = await self._on(
                self._jobs, partial(self._means.importer.look, action.source, action.checkpoint_id, peers)
            )
        except HearthError as error:
            return e.ImportFailed(action.source, error.failure)
        return e.ImportPlanned(
            action.source,
            look.revision,
            look.image_bytes,
            look.peak_bytes,
            look.checkpoint_id,
            look.arrived_bytes,
            from_peers=bool(peers) and look.checkpoint_id == action.checkpoint_id,
        )

    async def _import(self, action: e.RunImport) -> e.Event:
        source, post = action.source, self._post
        progressed = _Throttle(lambda done, total: post(e.ImportProgressed(source, done, total)))

        def run() -> Outcome:
            try:
                return self._means.importer.run(
                    source,
                    checkpoint_id=action.checkpoint_id,
                    peers=partial(self._means.peers.of, action.checkpoint_id),
                    key=action.job,
                    priority=action.priority,
                    extents=action.extents,
                    tag=action.tag,
                    opened=lambda stored: post(e.ImportOpened(source, stored)),
                    progressed=progressed,
                )
            except FetchInterrupted:
                raise
            except HearthError as error:  # before a byte came: what earlier attempts left is there as it was
                raise FetchInterrupted(error.failure, self._means.tier.partial(action.checkpoint_id)) from error

        async with self._means.peers.watching():  # what is raised through it comes out as a group: so nothing is
            try:
                outcome = await self._on(self._jobs, run)
            except HearthError as error:
                self._means.disk.fail(action.extents, action.tag)
                kept = error.kept if isinstance(error, FetchInterrupted) else None
                return e.ImportFailed(source, error.failure, kept=kept)
        IMPORT_SECONDS.observe(outcome.seconds)
        IMPORT_BYTES.labels("source").inc(outcome.remote_bytes)
        IMPORT_BYTES.labels("peer").inc(outcome.peer_bytes)
        return e.ImportDone(
            source,
            outcome.stored,
            outcome.remote_bytes,
            outcome.seconds,
            existing=outcome.existing,
            in_dram=outcome.in_dram,
            peer_bytes=outcome.peer_bytes,
            moved_bytes=outcome.moved_bytes,
            waited_s=outcome.waited_s,
        )

    # -- checkpoints in the SSD tier -----------------------------------------------------------------------------

    async def _read(self, action: e.ReadImage) -> e.Event:
        progressed = _Throttle(lambda done, _: self._post(e.ReadProgressed(action.job, done)))

        def read() -> Report:
            return self._move(
                action.stored,
                key=action.job,
                priority=action.priority,
                extents=action.extents,
                tag=action.tag,
                window_chunks=action.window_chunks,
                verify=self._means.verify_loads,
                progressed=progressed,
            )

        try:
            report = await self._on(self._jobs, read)
        except HearthError as error:
            self._means.disk.fail(action.extents, action.tag)  # the job may not even have begun
            return e.ReadFailed(action.job, error.failure)
        READ_SECONDS.observe(report.seconds)
        READ_BYTES.inc(action.stored.image_bytes)
        REPAIRED_CHUNKS.inc(len(report.repaired))
        return e.ReadDone(action.job, report.seconds, len(report.repaired), report.waited_s)

    async def _verify(self, action: e.VerifyCheckpoint) -> e.Event:
        id = action.stored.id
        progressed = _Throttle(lambda done, _: self._post(e.VerifyProgressed(id, done)))

        def verify() -> Report:
            return self._move(
                action.stored,
                key=action.job,
                priority=action.priority,
                bytes_per_s=action.bytes_per_s,
                verify=True,
                progressed=progressed,
            )

        await self._means.peers.look()  # what must be repaired may have come to another store just now
        try:
            report = await self._on(self._jobs, verify)
        except HearthError as error:
            return e.VerifyDone(id, failure=error.failure)
        VERIFIED_BYTES.inc(action.stored.image_bytes)
        REPAIRED_CHUNKS.inc(len(report.repaired))
        return e.VerifyDone(id, chunks=len(report.checksums), repaired_chunks=len(report.repaired))

    def _move(
        self,
        stored: e.StoredCheckpoint,
        *,
        key: str,
        priority: int,
        verify: bool,
        progressed: Callable[[int, int], None],
        extents: tuple[Extent, ...] = (),
        tag: int = 0,
        window_chunks: int = 0,
        bytes_per_s: int = 0,
    ) -> Report:
        """Read a stored checkpoint; blocks. A corrupt chunk is fetched again, into the buffer and onto the SSD."""
        means, directory = self._means, Path(stored.directory)
        manifest = means.tier.manifest(directory)
        with suppress(HearthError):  # a disk that has become read-only can be read
            means.tier.touch(directory)
        try:
            with (
                closing(means.importer.repairer(manifest, partial(means.peers.of, stored.id))) as repair,
                closing(StoredImage(directory, manifest, block_bytes=means.block_bytes)) as image,
            ):
                job = Job(
                    key=key,
                    priority=priority,
                    image_bytes=manifest.image_bytes(),
                    chunk_bytes=manifest.chunk_bytes,
                    origin=image,
                    checksums=manifest.chunks,
                    verify=verify,
                    extents=extents,
                    tag=tag,
                    window_chunks=window_chunks,
                    repair=repair,
                    rewrite=partial(rewrite, directory, manifest),
                    bytes_per_s=bytes_per_s,
                    progressed=lambda done: progressed(done, 0),
                )
                report = means.disk.run(job)
                if not image.direct and not self._told_of_buffered_reads:
                    self._told_of_buffered_reads = True
                    self._warn("reads.buffered", f"{means.tier.root} has no O_DIRECT")
                return report
        except OSError as error:
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, f"The checkpoint cannot be read: {error}.") from error

    async def _export(self, action: e.RunExport) -> e.Event:
        means, stored, url = self._means, action.stored, action.url
        # An upload reads everything before it sends anything: its bytes are scaled to those of the image.
        progressed = _Throttle(
            lambda done, total: self._post(e.ExportProgressed(stored.id, url, done * stored.image_bytes // total))
        )

        def export() -> None:
            manifest = means.tier.manifest(Path(stored.directory))
            with closing(means.importer.repairer(manifest, partial(means.peers.of, stored.id))) as repair:
                means.exporter.run(stored, manifest, url, key=action.job, repair=repair, progressed=progressed)

        await self._means.peers.look()
        try:
            await self._on(self._jobs, export)
        except HearthError as error:
            return e.ExportDone(stored.id, url, error.failure)
        return e.ExportDone(stored.id, url)

    async def _quarantine(self, action: e.QuarantineCheckpoint) -> e.Event:
        quarantine = partial(self._means.tier.quarantine, Path(action.directory), action.reason)
        try:
            directory = await self._on(self._changes, quarantine)
        except HearthError as error:
            self._warn("quarantine.failed", error.failure.message)
            # The tier tries again; what may come to the old place is another, sound copy.
            directory = self._means.tier.quarantined / action.checkpoint_id
        return e.CheckpointQuarantined(action.checkpoint_id, str(directory))

    async def _remove(self, action: e.RemoveCheckpoint) -> e.Event:
        try:
            await self._on(self._changes, partial(self._means.tier.remove, Path(action.directory)))
        except HearthError as error:
            return e.CheckpointRemoved(action.checkpoint_id, error.failure)
        return e.CheckpointRemoved(action.checkpoint_id)

    async def _save_pins(self, pins: dict[str, str]) -> None:
        try:
            await self._on(self._changes, partial(self._means.tier.save_pins, pins))
        except HearthError as error:  # they hold in this life of the store
            self._warn("pins.unsaved", error.failure.message)

    async def _on(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        if self._closed:  # the end of one piece of work may ask for another, such as a quarantine
            raise HearthError(Code.DRAINING, "The store is shutting down.")
        return await asyncio.get_running_loop().run_in_executor(thread, work)


class _Throttle:
    """Lets one call through per `PROGRESS_S`; losing one between two threads does no harm, they are hints."""

    def __init__(self, call: Callable[[int, int], None]) -> None:
        self._call = call
        self._last = 0.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_S:
            self._last = now
            self._call(done_bytes, total_bytes)
