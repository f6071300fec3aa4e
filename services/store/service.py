"""The shell of the store: messages become events, actions become effects. Decides nothing."""

from __future__ import annotations

import asyncio
import os
import platform
from typing import assert_never

import msgspec
from prometheus_client import Counter, Gauge

from services.store import events as e
from services.store.effects import Effects, Means
from services.store.pool import Pool
from services.store.residency import Residency
from shared.bus import Subscription
from shared.contracts.records import Phase, ServerRecord
from shared.contracts.residency import LoadProgress
from shared.driver import Driver
from shared.fence import Fence
from shared.labels import parse_labels
from shared.lifecycle import Context, Heartbeat
from shared.settings import StoreSettings
from shared.subjects import (
    ACQUIRE,
    CONSUMED,
    EVICT,
    EXPORT,
    IMPORT,
    INSPECT,
    LEADING,
    LIST,
    LOAD_PROGRESS,
    PIN,
    PREFETCH,
    RELEASE,
    RENEW,
    VERIFY,
)

ANSWERS = Counter("hearth_store_answers", "Calls answered, by the kind of answer", ["answer"])
EVENTS = Counter("hearth_store_events", "checkpoint.imported, checkpoint.loaded, checkpoint.evicted, …", ["event"])
TIER_BYTES = Gauge("hearth_store_tier_used_bytes", "Bytes taken in a tier", ["tier"])
TIER_BYTES_PER_S = Gauge("hearth_store_tier_bytes_per_second", "Measured bandwidth from a tier", ["tier"])
QUEUE_BYTES = Gauge("hearth_store_load_queue_bytes", "Bytes that queued and running loads have yet to move")
LEASES = Gauge("hearth_store_leases", "Leases alive")


class StoreService:
    """Connects the core with the bus, the movers and the importer."""

    def __init__(
        self, context: Context[StoreSettings], core: Residency, pool: Pool, means: Means, *, check: bool = False
    ) -> None:
        self._context = context
        self._core = core
        self._pool = pool
        self._peers = means.peers
        self._driver: Driver[e.Event, e.Action] = Driver(core, tell=self._tell, do=self._do, long=e.LONG, check=check)
        self._effects = Effects(means, post=self._driver.post_threadsafe, warn=self._warn)
        self._heartbeat: Heartbeat | None = None
        self._subscriptions: list[Subscription] = []

    async def start(self) -> None:
        """Run the core and answer calls; when it returns, calls arrive."""
        context, bus, ids = self._context, self._context.bus, {"server_id": self._context.settings.server_id}
        context.tasks.create_task(self._driver.run(), name="driver")
        context.tasks.create_task(self._peers.run(context.stopping), name="peers")
        self._heartbeat = context.heartbeat(self._record)
        post = self._driver.post
        fence = Fence(ids["server_id"])
        bus.on_disconnect(lambda: post(e.BusLost()))
        bus.on_reconnect(lambda: post(e.BusBack()))
        self._subscriptions = [
            await bus.serve(INSPECT, lambda message, reply: post(e.InspectAsked(message, reply)), **ids),
            await bus.serve(IMPORT, lambda message, reply: post(e.ImportAsked(message, reply)), **ids),
            await bus.serve(ACQUIRE, lambda message, reply: post(e.AcquireAsked(message, reply)), **ids),
            await bus.serve(RENEW, lambda message, reply: post(e.RenewAsked(message, reply)), **ids),
            await bus.subscribe(LEADING, fence.heard),
            await bus.serve(EVICT, fence.keeps(lambda message, reply: post(e.EvictAsked(message, reply))), **ids),
            await bus.serve(PREFETCH, fence.keeps(lambda message, reply: post(e.PrefetchAsked(message, reply))), **ids),
            await bus.serve(PIN, lambda message, reply: post(e.PinAsked(message, reply)), **ids),
            await bus.serve(VERIFY, lambda message, reply: post(e.VerifyAsked(message, reply)), **ids),
            await bus.serve(EXPORT, lambda message, reply: post(e.ExportAsked(message, reply)), **ids),
            await bus.serve(LIST, lambda message, reply: post(e.ListAsked(message, reply)), **ids),
            await bus.subscribe(RELEASE, lambda message: post(e.ReleaseAsked(message)), **ids),
            await bus.subscribe(CONSUMED, lambda message: post(e.ConsumedHeard(message)), **ids),
        ]
        await bus.flush(within_s=context.settings.start_wait_s)

    async def drain(self) -> None:
        """Take nothing new and tell those who wait."""
        self._driver.post(e.DrainAsked())
        await asyncio.sleep(0)
        for subscription in self._subscriptions:
            await subscription.close()
        await self._context.bus.flush()

    async def close(self) -> None:
        """End the threads' work; blocks no longer than a chunk takes."""
        await self._effects.close()

    def _record(self, phase: Phase) -> ServerRecord:
        record = msgspec.structs.replace(
            self._core.record(phase, host=platform.node(), pid=os.getpid()),
            labels=parse_labels(self._context.settings.labels),
        )
        TIER_BYTES.labels("dram").set(record.dram_used_bytes)
        TIER_BYTES.labels("ssd").set(record.ssd_used_bytes)
        for tier, bytes_per_s in (
            ("ssd", record.ssd_bytes_per_s), ("peer", record.peer_bytes_per_s), ("remote", record.remote_bytes_per_s),
        ):  # fmt: skip
            TIER_BYTES_PER_S.labels(tier).set(bytes_per_s or 0)
        QUEUE_BYTES.set(record.load_queue_bytes)
        LEASES.set(self._core.lease_count)
        return record

    # -- actions -------------------------------------------------------------------------------------------------

    def _tell(self, action: e.Action) -> None:
        match action:
            case e.Answer(reply, message):
                reply(message)
                ANSWERS.labels(type(message).__name__.lower()).inc()
            case e.PublishProgress(deployment, progress):
                hint = LoadProgress(
                    deployment=deployment, server_id=self._context.settings.server_id, progress=progress
                )
                self._context.bus.publish(LOAD_PROGRESS, hint, slug=deployment)
            case e.TouchRecord():
                if self._heartbeat is not None:
                    self._heartbeat.touch()
            case e.Note(event, facts):
                self._context.event(event, **facts)
                EVENTS.labels(event).inc()
            case e.ClearBoard(extents):
                self._pool.clear(extents)
            case e.SavePool(state):
                if not self._pool.save(state):
                    self._warn("pool.unsaved", "what it holds is not known to the store's next life")
            case e.SetPriority(job, priority):
                self._effects.set_priority(job, priority)
            case e.AdvanceWindow(job, chunks):
                self._effects.advance(job, chunks)
            case e.StopJob(job):
                self._effects.stop(job)
            case (
                e.SavePins() | e.InspectSource() | e.PlanImport() | e.RunImport() | e.ReadImage()
                | e.VerifyCheckpoint() | e.QuarantineCheckpoint() | e.RunExport() | e.RemoveCheckpoint()
            ):  # fmt: skip
                raise AssertionError(f"{action} is no tell")
            case _:
                assert_never(action)

    async def _do(self, action: e.Action) -> e.Event | None:
        return await self._effects.do(action)

    def _warn(self, event: str, reason: str) -> None:
        self._context.log.warning(event, reason=reason)
