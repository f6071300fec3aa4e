"""The shell of the store: messages become events, actions become effects. Decides nothing."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from prometheus_client import Counter, Gauge, Histogram

from services.store.chunks import ChunkReader
from services.store.events import (
    LONG,
    AcquireAsked,
    Action,
    Answer,
    BusBack,
    BusLost,
    CheckpointQuarantined,
    CheckpointRemoved,
    ClearBoard,
    DrainAsked,
    Event,
    EvictAsked,
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
    QuarantineCheckpoint,
    ReadDone,
    ReadFailed,
    ReadImage,
    ReadProgressed,
    ReleaseAsked,
    RemoveCheckpoint,
    RenewAsked,
    RunImport,
    SavePool,
    SetPriority,
    SourceInspected,
    TouchRecord,
)
from services.store.importer import Importer
from services.store.residency import Residency
from services.store.tier import SsdTier
from shared.bus import Subscription
from shared.contracts.records import Phase, ServerRecord
from shared.contracts.residency import LoadProgress
from shared.driver import Driver
from shared.errors import Code, Failure, HearthError
from shared.lifecycle import Context, Heartbeat
from shared.metrics import LATENCY_BUCKETS_S
from shared.settings import StoreSettings
from shared.subjects import ACQUIRE, EVICT, IMPORT, INSPECT, LOAD_PROGRESS, RELEASE, RENEW

T = TypeVar("T")

PROGRESS_S: Final = 0.05  # between two progress events of one piece of work: the core needs no more

ANSWERS = Counter("hearth_store_answers", "Calls answered, by the kind of answer", ["answer"])
EVENTS = Counter("hearth_store_events", "checkpoint.imported, checkpoint.loaded, checkpoint.evicted, …", ["event"])
READ_SECONDS = Histogram("hearth_store_read_seconds", "Loads SSD → DRAM in seconds", buckets=LATENCY_BUCKETS_S)
READ_BYTES = Counter("hearth_store_read_bytes", "Bytes loaded SSD → DRAM")
IMPORT_SECONDS = Histogram("hearth_store_import_seconds", "Imports → SSD in seconds", buckets=LATENCY_BUCKETS_S)
IMPORT_BYTES = Counter("hearth_store_import_bytes", "Bytes imported → SSD")
TIER_BYTES = Gauge("hearth_store_tier_used_bytes", "Bytes taken in a tier", ["tier"])
LEASES = Gauge("hearth_store_leases", "Leases alive")


class StoreService:
    """Connects the core with the bus, the pool's readers and the importer."""

    def __init__(
        self,
        context: Context[StoreSettings],
        core: Residency,
        tier: SsdTier,
        reader: ChunkReader,
        importer: Importer,
        *,
        check: bool = False,
    ) -> None:
        self._context = context
        self._core = core
        self._tier = tier
        self._reader = reader
        self._importer = importer
        self._driver: Driver[Event, Action] = Driver(core, tell=self._tell, do=self._do, long=LONG, check=check)
        self._heartbeat: Heartbeat | None = None
        self._subscriptions: list[Subscription] = []
        # Each kind of work has a thread of its own: a long import delays neither a look at a source nor a load.
        self._import_thread = ThreadPoolExecutor(1, thread_name_prefix="import")
        self._look_thread = ThreadPoolExecutor(1, thread_name_prefix="look")
        self._load_thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._remove_thread = ThreadPoolExecutor(1, thread_name_prefix="remove")
        self._told_of_buffered_reads = False

    async def start(self) -> None:
        """Run the core and answer calls; when it returns, calls arrive."""
        context, bus, ids = self._context, self._context.bus, {"server_id": self._context.settings.server_id}
        context.tasks.create_task(self._driver.run(), name="driver")
        self._heartbeat = context.heartbeat(self._record)
        post = self._driver.post
        bus.on_disconnect(lambda: post(BusLost()))
        bus.on_reconnect(lambda: post(BusBack()))
        self._subscriptions = [
            await bus.serve(INSPECT, lambda message, reply: post(InspectAsked(message, reply)), **ids),
            await bus.serve(IMPORT, lambda message, reply: post(ImportAsked(message, reply)), **ids),
            await bus.serve(ACQUIRE, lambda message, reply: post(AcquireAsked(message, reply)), **ids),
            await bus.serve(RENEW, lambda message, reply: post(RenewAsked(message, reply)), **ids),
            await bus.serve(EVICT, lambda message, reply: post(EvictAsked(message, reply)), **ids),
            await bus.subscribe(RELEASE, lambda message: post(ReleaseAsked(message)), **ids),
        ]
        await bus.flush()

    async def drain(self) -> None:
        """Take nothing new and tell those who wait."""
        self._driver.post(DrainAsked())
        await asyncio.sleep(0)
        for subscription in self._subscriptions:
            await subscription.close()
        await self._context.bus.flush()

    async def close(self) -> None:
        """End the threads' work; blocks no longer than a chunk, a piece of an import, or a call of the hub takes."""
        self._importer.close()
        for thread in (self._import_thread, self._look_thread, self._load_thread, self._remove_thread):
            thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.get_running_loop().run_in_executor(None, self._reader.close)
        for thread in (self._import_thread, self._look_thread, self._load_thread, self._remove_thread):
            await asyncio.get_running_loop().run_in_executor(None, thread.shutdown)

    def _record(self, phase: Phase) -> ServerRecord:
        record = self._core.record(phase, host=platform.node(), pid=os.getpid())
        TIER_BYTES.labels("dram").set(record.dram_used_bytes)
        TIER_BYTES.labels("ssd").set(record.ssd_used_bytes)
        LEASES.set(self._core.lease_count)
        return record

    # -- actions -------------------------------------------------------------------------------------------------

    def _tell(self, action: Action) -> None:
        match action:
            case Answer(reply, message):
                reply(message)
                ANSWERS.labels(type(message).__name__.lower()).inc()
            case PublishProgress(deployment, progress):
                hint = LoadProgress(
                    deployment=deployment, server_id=self._context.settings.server_id, progress=progress
                )
                self._context.bus.publish(LOAD_PROGRESS, hint, slug=deployment)
            case TouchRecord():
                if self._heartbeat is not None:
                    self._heartbeat.touch()
            case Note(event, facts):
                self._context.event(event, **facts)
                EVENTS.labels(event).inc()
            case SavePool() | ClearBoard() | SetPriority():
                pass  # this life's pool goes with it, nobody is told to look at its board, and reads are not shared
            case InspectSource() | PlanImport() | RunImport() | ReadImage() | RemoveCheckpoint():
                raise AssertionError(f"{action} is no tell")
            case _:
                raise AssertionError(f"{action} is not carried out")

    async def _do(self, action: Action) -> Event | None:
        match action:
            case InspectSource(source, reply):
                try:
                    look = await self._on(self._look_thread, partial(self._importer.look, source))
                except HearthError as error:
                    return InspectFailed(reply, error.failure)
                return SourceInspected(reply, look.architecture, look.weight_bytes, look.image_bytes, look.peak_bytes)
            case PlanImport(source):
                try:
                    look = await self._on(self._import_thread, partial(self._importer.look, source))
                except HearthError as error:
                    return ImportFailed(source, error.failure)
                return ImportPlanned(source, look.revision, look.image_bytes, look.peak_bytes)
            case RunImport(source):
                return await self._run_import(action)
            case ReadImage():
                return await self._read_image(action)
            case RemoveCheckpoint(checkpoint_id, directory):
                try:
                    await self._on(self._remove_thread, partial(self._tier.remove, Path(directory)))
                except HearthError as error:
                    return CheckpointRemoved(checkpoint_id, error.failure)
                return CheckpointRemoved(checkpoint_id)
            case QuarantineCheckpoint(checkpoint_id, directory, reason):
                place = await self._on(self._remove_thread, partial(self._tier.quarantine, Path(directory), reason))
                return CheckpointQuarantined(checkpoint_id, str(place))
            case _:
                raise AssertionError(f"{action} is no long action")

    async def _run_import(self, action: RunImport) -> Event:
        source = action.source
        post = _Throttle(lambda done, total: self._driver.post_threadsafe(ImportProgressed(source, done, total)))
        try:
            outcome = await self._on(self._import_thread, partial(self._importer.run, source, progressed=post))
        except HearthError as error:
            return ImportFailed(source, error.failure)
        IMPORT_SECONDS.observe(outcome.seconds)
        IMPORT_BYTES.inc(outcome.remote_bytes)
        return ImportDone(source, outcome.stored, outcome.remote_bytes, outcome.seconds, outcome.existing)

    async def _read_image(self, action: ReadImage) -> Event:
        job, directory = action.job, Path(action.stored.directory)
        post = _Throttle(lambda done, _: self._driver.post_threadsafe(ReadProgressed(job, done)))

        def read() -> Any:
            manifest = self._tier.manifest(directory)
            self._tier.touch(directory)
            return self._reader.read(
                directory,
                manifest,
                action.extents,
                verify=self._context.settings.verify_loads,
                progressed=lambda done: post(done, 0),
            )

        try:
            report = await self._on(self._load_thread, read)
        except HearthError as error:
            return ReadFailed(job, error.failure)
        except OSError as error:
            message = f"The checkpoint cannot be read: {error}."
            return ReadFailed(job, Failure(code=Code.CHECKPOINT_UNAVAILABLE, message=message))
        if not report.direct and not self._told_of_buffered_reads:
            self._told_of_buffered_reads = True
            self._context.log.warning("reads.buffered", directory=str(self._tier.root), reason="no O_DIRECT here")
        READ_SECONDS.observe(report.seconds)
        READ_BYTES.inc(action.stored.image_bytes)
        return ReadDone(job, report.seconds)

    async def _on(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
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
