"""The worker's shell: messages into events, actions into effects. It decides nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar, assert_never

from prometheus_client import Counter, Gauge, Histogram

from services.worker import events as e
from services.worker.core import WorkerCore
from services.worker.generation import encode
from services.worker.ports import DeviceFacts, EngineEvent, Loader
from shared.bus import Delivery, Reply, Unserved
from shared.contracts.events import RecordChanged
from shared.contracts.migration import (
    AbandonRound,
    Drain,
    HandedOver,
    HandOver,
    ListRequests,
    Migrate,
    Migrating,
    MigrationEnded,
    MigrationOutcome,
    RequestList,
    Round,
    RoundDone,
    RoundPending,
)
from shared.contracts.placement import LoadReplica, StopReplica
from shared.contracts.records import Phase, ReplicaRecord, ReplicaState, ServerRecord, WorkerRecord
from shared.contracts.requests import Cancel, ChatPrompt, Check, Request, Running, TextPrompt, TokensPrompt
from shared.contracts.residency import Acquire, Checkpoint, Consumed, Done, Lease, Progress, Release, Renew, Renewed
from shared.driver import Driver
from shared.errors import Code, Failure, HearthError
from shared.fence import Fence
from shared.labels import parse_labels
from shared.lifecycle import Context, Heartbeat
from shared.metrics import LATENCY_BUCKETS_S
from shared.registry import record_kind
from shared.settings import WorkerSettings
from shared.subjects import (
    ABANDON,
    ACQUIRE,
    CANCEL,
    CHECK,
    CLAIM,
    CONSUMED,
    DRAIN,
    FRAMES,
    HAND_OVER,
    HOLDS,
    LEADING,
    LIST_REQUESTS,
    LOAD,
    LOAD_PROGRESS,
    MIGRATE,
    MIGRATION_ENDED,
    RECORD_CHANGED,
    RELEASE,
    RELIEF,
    RENEW,
    REPLICA_FAILED,
    REPLICA_LOADED,
    ROUND,
    STOP,
)

T = TypeVar("T")

POLL_S: Final = 1.0
# What the code that comes with a model, or is chosen by it, may raise beyond HearthError: a model that nobody has met
# before must fail alone, not take the other replicas of this worker with it.
MODEL_ERRORS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Characters (or ids) that are tokenised between two other events of the loop (≈ 1 ms); longer prompts go to a thread.
INLINE_PROMPT_CHARACTERS: Final = 4096

REQUESTS_RUNNING: Final = Gauge("hearth_worker_requests_running", "requests in this worker")
SLOTS: Final = Gauge("hearth_worker_slots", "requests that the ready replicas can run at once")
REPLICAS: Final = Gauge("hearth_worker_replicas", "replicas by state", ["state"])
REQUESTS: Final = Counter("hearth_worker_requests_total", "requests that this worker is done with", ["outcome"])
TOKENS: Final = Counter("hearth_worker_tokens_total", "output tokens, by what has ended", ["deployment"])
PREFILL_S: Final = Histogram("hearth_worker_prefill_seconds", "claim to first token", buckets=LATENCY_BUCKETS_S)
DECODE_S: Final = Histogram("hearth_worker_decode_seconds", "first to last token", buckets=LATENCY_BUCKETS_S)
LOAD_S: Final = Histogram("hearth_worker_load_seconds", "command to ready", ["tier"], buckets=LATENCY_BUCKETS_S)
LOAD_BYTES: Final = Counter("hearth_worker_load_bytes_total", "weights attached", ["tier"])
MIGRATIONS: Final = Counter("hearth_worker_migrations_total", "migrations that left this worker", ["reason", "outcome"])
MIGRATION_S: Final = Histogram("hearth_worker_migration_seconds", "command to end", buckets=LATENCY_BUCKETS_S)
FROZEN_S: Final = Histogram(
    "hearth_worker_migration_frozen_seconds", "last frame to the destination's claim", buckets=LATENCY_BUCKETS_S
)
ROUNDS: Final = Histogram("hearth_worker_migration_rounds", "rounds of a committed migration", buckets=range(1, 10))
MIGRATION_BYTES: Final = Counter("hearth_worker_migration_bytes_total", "bytes that migrations put on the bus")
KV_USED_BYTES: Final = Gauge("hearth_worker_kv_used_bytes", "KV cache that running sequences hold")
IN_FLIGHT: Final = Gauge("hearth_worker_migrations_in_flight", "migrations by the side of this worker", ["side"])
LOADS_FAILED: Final = Counter("hearth_worker_loads_failed_total", "replicas that failed", ["code"])


class Leases(Protocol):
    """Where checkpoints come from. The calls raise HearthError."""

    async def acquire(self, message: LoadReplica) -> Progress | Lease:
        """One long poll for the lease of a replica."""

    async def renew(self, lease_ids: tuple[str, ...]) -> Renewed:
        """Keep these leases."""

    def release(self, message: Release) -> None:
        """Give one back."""

    def consumed(self, message: Consumed) -> None:
        """Free places in a window."""


class StoreLeases:
    """Leases of this server's store."""

    def __init__(self, context: Context[WorkerSettings]) -> None:
        self._context = context
        self._server_id = context.settings.server_id
        self._ttl_s = context.settings.lease_ttl_s

    async def acquire(self, message: LoadReplica) -> Progress | Lease:
        """See `Leases`."""
        asked = Acquire(
            checkpoint_id=message.checkpoint_id,
            source=message.source,
            holder=self._context.id,
            ttl_s=self._ttl_s,
            deployment=message.slug,
            wait_s=POLL_S,
            arriving=True,
        )
        return await self._context.bus.call(ACQUIRE, asked, server_id=self._server_id, extra_s=POLL_S)

    async def renew(self, lease_ids: tuple[str, ...]) -> Renewed:
        """See `Leases`."""
        asked = Renew(holder=self._context.id, lease_ids=lease_ids, ttl_s=self._ttl_s)
        return await self._context.bus.call(RENEW, asked, server_id=self._server_id)

    def release(self, message: Release) -> None:
        """See `Leases`."""
        self._context.bus.publish(RELEASE, message, server_id=self._server_id)

    def consumed(self, message: Consumed) -> None:
        """See `Leases`."""
        self._context.bus.publish(CONSUMED, message, server_id=self._server_id)


class NoLeases:
    """For the engine that costs nothing and has no bytes: every lease is granted at once."""

    async def acquire(self, message: LoadReplica) -> Progress | Lease:
        """See `Leases`."""
        nothing = Checkpoint(
            checkpoint_id=message.checkpoint_id,
            architecture="null",
            weight_bytes=0,
            parameters=0,
            dtype="float32",
            max_context_tokens=message.max_context_tokens,
            kv_bytes_per_token=0,
            vocab_tokens=0,
            has_chat_template=True,
        )
        return Lease(
            lease_id=message.replica_id,
            checkpoint=message.checkpoint or nothing,
            segment="",
            segment_bytes=0,
            extents=(),
            directory="",
            tier="dram",
        )

    async def renew(self, lease_ids: tuple[str, ...]) -> Renewed:
        """See `Leases`."""
        return Renewed()

    def release(self, message: Release) -> None:
        """See `Leases`."""

    def consumed(self, message: Consumed) -> None:
        """See `Leases`."""


class AttachWatch:
    """Carries what a load says on its thread to the driver, and the wish to stop it the other way. See `LoadWatch`."""

    def __init__(self, driver: Driver[e.Event, e.Action], replica_id: str) -> None:
        self.stopped = False
        self._driver = driver
        self._id = replica_id

    def arrived(self, done_bytes: int, total_bytes: int) -> None:
        """See `LoadWatch`."""
        self._driver.post_threadsafe(e.AttachProgressed(self._id, done_bytes, total_bytes))

    def consumed(self, chunks: int) -> None:
        """See `LoadWatch`."""
        self._driver.post_threadsafe(e.ChunksConsumed(self._id, chunks))


class WorkerShell:
    """Carries out what the core wants. `loader` and `leases` are the wiring's choice."""

    def __init__(
        self,
        context: Context[WorkerSettings],
        core: WorkerCore,
        *,
        loader: Loader,
        leases: Leases,
        device: DeviceFacts,
        check: bool = False,
    ) -> None:
        self.core = core
        self.driver: Driver[e.Event, e.Action] = Driver(core, tell=self._tell, do=self._do, long=e.LONG, check=check)
        self.drained = asyncio.Event()
        self._context = context
        self._loader = loader
        self._leases = leases
        self._device = device
        self._beats: dict[str, Heartbeat] = {}
        self._watches: dict[str, AttachWatch] = {}
        # One thread per replica, so that closing one never waits for another's load; and prompts wait for neither.
        self._load_threads = ThreadPoolExecutor(core.limits.max_replicas, thread_name_prefix="load")
        self._prompt_threads = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        self._map_threads = ThreadPoolExecutor(1, thread_name_prefix="map")
        self._own_beat: Heartbeat | None = None

    async def serve(self) -> None:
        """Listen, say that the worker is ready, and work until the context is stopping; then drain."""
        context, bus, id = self._context, self._context.bus, self._context.id
        self._own_beat = context.heartbeat(self._worker_record)
        context.tasks.create_task(self.driver.run(), name="driver")
        context.tasks.create_task(self._watch_engines(), name="engines")
        try:
            fence = Fence(id)
            await bus.subscribe(LEADING, fence.heard)
            await bus.serve(LOAD, fence.keeps(self._load_asked), worker_id=id)
            await bus.serve(STOP, fence.keeps(self._stop_asked), worker_id=id)
            await bus.subscribe(CANCEL, self._cancel_arrived, worker_id=id)
            await bus.serve(CHECK, self._check_asked, worker_id=id)
            await bus.serve(LIST_REQUESTS, self._list_asked, worker_id=id)
            await bus.serve(DRAIN, self._drain_asked, worker_id=id)
            await bus.serve(MIGRATE, fence.keeps(self._migrate_asked), worker_id=id)
            await bus.serve(ROUND, self._round_asked, worker_id=id)
            await bus.serve(HAND_OVER, self._hand_over_asked, worker_id=id)
            await bus.subscribe(ABANDON, self._abandon_arrived, worker_id=id)
            await bus.subscribe(RECORD_CHANGED, self._server_changed, kind=record_kind(ServerRecord))
            bus.on_disconnect(lambda: self.driver.post(e.BusLost()))
            bus.on_reconnect(lambda: self.driver.post(e.BusBack()))
            await bus.flush(within_s=context.settings.start_wait_s)
            self.driver.post(e.ServerChanged(context.settings.server_id))
            await context.ready()
            await context.stopping.wait()
            await context.drain()
            self.driver.post(e.DrainAsked())
            await self.drained.wait()
            await bus.flush()
        finally:
            for watch in self._watches.values():
                watch.stopped = True
            self._load_threads.shutdown(wait=False, cancel_futures=True)
            self._map_threads.shutdown(wait=False, cancel_futures=True)
            self._prompt_threads.shutdown(wait=False, cancel_futures=True)

    # -- messages → events

    def _load_asked(self, message: LoadReplica, reply: Reply[Done]) -> None:
        self.driver.post(e.LoadAsked(message, reply))

    def _stop_asked(self, message: StopReplica, reply: Reply[Done]) -> None:
        self.driver.post(e.StopAsked(message, reply))

    def _cancel_arrived(self, message: Cancel) -> None:
        self.driver.post(e.CancelArrived(message))

    def _server_changed(self, message: RecordChanged) -> None:
        self.driver.post(e.ServerChanged(message.id))

    def _check_asked(self, message: Check, reply: Reply[Running]) -> None:
        self.driver.post(e.CheckAsked(message, reply))

    def _list_asked(self, message: ListRequests, reply: Reply[RequestList]) -> None:
        self.driver.post(e.ListAsked(reply))

    def _drain_asked(self, message: Drain, reply: Reply[Done]) -> None:
        self.driver.post(e.DrainSet(message.on, reply))

    def _migrate_asked(self, message: Migrate, reply: Reply[Migrating]) -> None:
        self.driver.post(e.MigrateAsked(message, reply))

    def _round_asked(self, message: Round, reply: Reply[RoundPending | RoundDone]) -> None:
        self.driver.post(e.RoundAsked(message, reply))

    def _hand_over_asked(self, message: HandOver, reply: Reply[HandedOver]) -> None:
        self.driver.post(e.HandOverAsked(message, reply))

    def _abandon_arrived(self, message: AbandonRound) -> None:
        self.driver.post(e.AbandonArrived(message))

    # -- actions → effects

    def _tell(self, action: e.Action) -> None:
        bus = self._context.bus
        match action:
            case e.PublishFrames():
                bus.publish(FRAMES, action.batch, gateway_id=action.gateway_id)
            case e.SubmitSequence():
                action.engine.submit(
                    action.sequence_id,
                    action.token_ids,
                    first_index=action.first_index,
                    max_new_tokens=action.max_new_tokens,
                    sampling=action.sampling,
                )
            case e.CancelSequence():
                action.engine.cancel(action.sequence_id)
            case e.Ack():
                bus.ack(action.token)
            case e.Nak():
                bus.nak(action.token, action.delay_s)
            case e.InProgress():
                for token in action.tokens:
                    bus.in_progress(token)
            case e.Want():
                action.puller.want(action.requests)
            case e.RequestFinished():
                self._finished(action)
            case e.ReplyTo():
                action.reply(action.answer)
            case e.RecordReplica():
                self._record(action.replica_id)
            case e.RecordWorker():
                if self._own_beat is not None:
                    self._own_beat.touch()
            case e.PublishProgress():
                bus.publish(LOAD_PROGRESS, action.message, slug=action.slug)
            case e.PublishFailed():
                self._failed(action)
            case e.ReleaseLease():
                self._leases.release(action.message)
            case e.PublishConsumed():
                self._leases.consumed(action.message)
            case e.AllowEngine():
                action.engine.allow_until(action.until)
            case e.StopAttach():
                self._watch(action.replica_id).stopped = True
            case e.Abandon():
                bus.publish(ABANDON, action.message, worker_id=action.worker_id)
            case e.PublishMigrationEnded():
                self._migrated(action.message)
            case e.PublishRelief():
                bus.publish(RELIEF, action.message)
                self._context.event(
                    "kv_cache.exhausted", replica_id=action.message.replica_id, sequences=action.message.requests
                )
            case e.SetPhase():
                self._context.set_draining(action.draining)
                if self._own_beat is not None:
                    self._own_beat.touch()
            case e.LoadFinished():
                self._loaded(action)
            case e.Drained():
                self.drained.set()
            case (
                e.AcquireLease()
                | e.RenewLeases()
                | e.LookAtServer()
                | e.PrepareSegment()
                | e.Attach()
                | e.Detach()
                | e.OpenPuller()
                | e.ClosePuller()
                | e.ClaimRequest()
                | e.Tokenise()
                | e.TellHolds()
                | e.SendRound()
                | e.SendHandOver()
                | e.Reclaim()
                | e.RemoveRecord()
            ):
                raise TypeError(f"{type(action).__name__} is no action to tell")
            case _:
                assert_never(action)

    async def _do(self, action: e.Action) -> e.Event | None:
        match action:
            case e.ClaimRequest():
                return await self._claim(action)
            case e.Tokenise():
                return await self._tokenise(action)
            case e.SendRound():
                return await self._send_round(action)
            case e.SendHandOver():
                return await self._send_hand_over(action)
            case e.Reclaim():
                return await self._reclaim(action)
            case e.TellHolds():
                return await self._tell_holds(action)
            case e.AcquireLease():
                return await self._acquire(action)
            case e.RenewLeases():
                return await self._renew(action)
            case e.LookAtServer():
                return await self._look()
            case e.PrepareSegment():
                await self._on(self._map_threads, lambda: self._loader.prepare(action.segment))
                return e.SegmentPrepared()
            case e.Attach():
                return await self._attach(action)
            case e.Detach():
                await self._on(self._load_threads, action.loaded.close)
                return e.Detached(action.replica_id)
            case e.OpenPuller():
                return await self._open(action)
            case e.ClosePuller():
                await action.puller.close()
                return e.PullerClosed(action.replica_id)
            case e.RemoveRecord():
                await self._beats.pop(action.replica_id).end()
                self._watches.pop(action.replica_id, None)
                return e.RecordRemoved(action.replica_id)
            case _:
                raise TypeError(f"{type(action).__name__} is no action to do")

    async def _claim(self, action: e.ClaimRequest) -> e.Event:
        try:
            answer = await self._context.bus.call(CLAIM, action.message, gateway_id=action.gateway_id)
        except HearthError as error:
            return e.ClaimAnswered(action.token, error.failure, unserved=isinstance(error, Unserved))
        return e.ClaimAnswered(action.token, answer)

    async def _send_round(self, action: e.SendRound) -> e.Event:
        message = action.message
        try:
            answer = await self._context.bus.call(ROUND, message, worker_id=action.worker_id, extra_s=message.wait_s)
        except HearthError as error:
            return e.RoundAnswered(message.migration_id, message.number, error.failure)
        return e.RoundAnswered(message.migration_id, message.number, answer)

    async def _send_hand_over(self, action: e.SendHandOver) -> e.Event:
        try:
            answer = await self._context.bus.call(HAND_OVER, action.message, worker_id=action.worker_id)
        except HearthError as error:
            return e.HandOverAnswered(action.migration_id, error.failure)
        return e.HandOverAnswered(action.migration_id, answer)

    async def _reclaim(self, action: e.Reclaim) -> e.Event:
        try:
            answer = await self._context.bus.call(CLAIM, action.message, gateway_id=action.gateway_id)
        except HearthError as error:
            return e.ReclaimAnswered(action.migration_id, error.failure)
        return e.ReclaimAnswered(action.migration_id, answer)

    async def _tell_holds(self, action: e.TellHolds) -> e.Event:
        try:
            answer = await self._context.bus.call(HOLDS, action.message, gateway_id=action.gateway_id)
        except HearthError as error:
            return e.HoldsAnswered(action.gateway_id, error.failure, unserved=isinstance(error, Unserved))
        return e.HoldsAnswered(action.gateway_id, answer)

    async def _tokenise(self, action: e.Tokenise) -> e.Event:
        try:
            if prompt_size(action.request) <= INLINE_PROMPT_CHARACTERS:
                token_ids, echo_text = encode(action.request, action.tokenizer)
            else:
                token_ids, echo_text = await self._on(
                    self._prompt_threads, lambda: encode(action.request, action.tokenizer)
                )
        except HearthError as error:
            return e.TokeniseFailed(action.token, error.failure)
        except MODEL_ERRORS as error:
            return e.TokeniseFailed(action.token, self._unexpected("prompt.failed", "tokenise this prompt", error))
        return e.Tokenised(action.token, token_ids, echo_text)

    async def _acquire(self, action: e.AcquireLease) -> e.Event:
        answer: Progress | Lease | Failure
        try:
            answer = await self._leases.acquire(action.message)
        except HearthError as error:
            answer = error.failure
        return e.LeaseAnswered(action.message.replica_id, answer)

    async def _renew(self, action: e.RenewLeases) -> e.Event:
        try:
            return e.LeasesRenewed(await self._leases.renew(action.lease_ids))
        except HearthError as error:
            self._context.log.warning("leases.unrenewed", error=error.failure.message)
            return e.LeasesRenewed(error.failure, unserved=isinstance(error, Unserved))

    async def _look(self) -> e.Event:
        try:
            record = await self._context.registry.get(ServerRecord, self._context.settings.server_id)
        except HearthError:  # Redis is away: the next hint, or the next lease, tells
            record = None
        return e.ServerSeen(record.segment if record is not None else "")

    async def _attach(self, action: e.Attach) -> e.Event:
        message, driver, id = action.message, self.driver, action.message.replica_id
        watch = self._watch(id)

        def stepped(events: Sequence[EngineEvent]) -> None:
            driver.post_threadsafe(e.EngineStepped(id, events))

        try:
            loaded = await self._on(
                self._load_threads,
                lambda: self._loader.load(
                    action.lease,
                    kv_bytes=action.kv_bytes,
                    slots=message.slots,
                    max_context_tokens=message.max_context_tokens,
                    sink=stepped,
                    engine=action.engine,
                    watch=watch,
                ),
            )
        except HearthError as error:
            return e.AttachFailed(id, error.failure)
        except MODEL_ERRORS as error:
            return e.AttachFailed(id, self._unexpected("attach.failed", "attach this model", error))
        return e.Attached(id, loaded)

    def _watch(self, replica_id: str) -> AttachWatch:
        return self._watches.setdefault(replica_id, AttachWatch(self.driver, replica_id))

    def _unexpected(self, event: str, what: str, error: BaseException) -> Failure:
        self._context.log.error(event, exc_info=error)
        name = type(error).__name__
        return Failure(code=Code.INTERNAL, message=f"The worker failed to {what} ({name}); its log says why.")

    async def _open(self, action: e.OpenPuller) -> e.Event:
        id, driver = action.replica_id, self.driver

        def arrived(delivery: Delivery) -> None:
            driver.post(e.DeliveryArrived(id, delivery.request, delivery.token, delivery.delivery, delivery.sequence))

        try:
            return e.PullerOpened(id, await self._context.bus.pull(action.slug, arrived))
        except HearthError as error:
            return e.PullerFailed(id, error.failure)

    async def _on(self, threads: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, call)

    # -- records, logs, metrics

    def _record(self, replica_id: str) -> None:
        beat = self._beats.get(replica_id)
        if beat is not None:
            beat.touch()
            return

        def make(phase: Phase) -> ReplicaRecord:
            return self.core.record(replica_id, time.monotonic())

        self._beats[replica_id] = self._context.heartbeat(make)

    def _worker_record(self, phase: Phase) -> WorkerRecord:
        core, settings = self.core, self._context.settings
        REQUESTS_RUNNING.set(len(core.runs))
        SLOTS.set(core.slots)
        KV_USED_BYTES.set(sum(one.loaded.engine.kv_used_bytes for one in core.replicas.values() if one.loaded))
        IN_FLIGHT.labels("source").set(len(core.outgoing))
        IN_FLIGHT.labels("destination").set(len(core.incoming))
        for state in ReplicaState:
            REPLICAS.labels(state.value).set(core.count(state))
        return WorkerRecord(
            worker_id=self._context.id,
            server_id=settings.server_id,
            phase=phase,
            pid=os.getpid(),
            device=self._device.device,
            device_name=self._device.device_name,
            memory_total_bytes=core.limits.memory_total_bytes,
            memory_used_bytes=core.memory_used_bytes,
            max_replicas=core.limits.max_replicas,
            migrations=core.migrations(time.monotonic()),
            incoming=len(core.incoming),
            labels=parse_labels(settings.labels),
        )

    async def _watch_engines(self) -> None:
        """End the process when a step of an engine hangs: its thread cannot be ended, and its requests must go on
        elsewhere. Raises HearthError."""
        limit_s = self._context.settings.engine_stall_s
        while True:
            await asyncio.sleep(min(1.0, limit_s / 4))
            for replica in self.core.replicas.values():
                began_at = replica.loaded.engine.step_began_at if replica.loaded else None
                if began_at is not None and time.monotonic() - began_at > limit_s:
                    raise HearthError(Code.INTERNAL, f"A step of replica {replica.id} has not ended for {limit_s:g} s.")

    def _migrated(self, message: MigrationEnded) -> None:
        MIGRATIONS.labels(message.reason.value, message.outcome.value).inc()
        MIGRATION_S.observe(message.total_s)
        MIGRATION_BYTES.inc(message.wire_bytes)
        if message.outcome is MigrationOutcome.COMMITTED:
            FROZEN_S.observe(message.frozen_s)
            ROUNDS.observe(message.rounds)
        self._context.bus.publish(MIGRATION_ENDED, message, worker_id=self._context.id)
        self._context.event(
            f"migration.{message.outcome.value}",
            migration_id=message.migration_id,
            request_id=message.request_id,
            deployment=message.deployment,
            source=message.source_worker_id,
            destination=message.destination_worker_id,
            reason=message.reason.value,
            rounds=message.rounds,
            tokens=message.tokens,
            gap_tokens=message.gap_tokens,
            wire_bytes=message.wire_bytes,
            total_s=round(message.total_s, 6),
            frozen_s=round(message.frozen_s, 6),
            error=message.failure.message if message.failure else None,
        )

    def _finished(self, action: e.RequestFinished) -> None:
        REQUESTS.labels(action.outcome).inc()
        new_tokens = action.completion_tokens - action.resumed_tokens
        if new_tokens > 0:
            TOKENS.labels(action.deployment).inc(new_tokens)
            PREFILL_S.observe(action.prefill_s)
            DECODE_S.observe(action.decode_s)
        self._context.log.info("request.finished", **_facts(action))

    def _loaded(self, action: e.LoadFinished) -> None:
        LOAD_S.labels(action.tier).observe(action.total_s)
        LOAD_BYTES.labels(action.tier).inc(action.weight_bytes)
        self._context.bus.publish(REPLICA_LOADED, action.told(self._device.device))
        self._context.event("replica.loaded", **_facts(action))

    def _failed(self, action: e.PublishFailed) -> None:
        message = action.message
        LOADS_FAILED.labels(message.failure.code.value).inc()
        self._context.bus.publish(REPLICA_FAILED, message)
        self._context.event(
            "replica.failed",
            replica_id=message.replica_id,
            deployment=message.deployment,
            code=message.failure.code.value,
            message=message.failure.message,
        )


def prompt_size(request: Request) -> int:
    """Characters (or token ids) of a prompt: how long tokenising may take."""
    match request.prompt:
        case TextPrompt(text=text):
            return len(text)
        case ChatPrompt(messages=messages):
            return sum(len(message.content) for message in messages)
        case TokensPrompt(token_ids=token_ids):
            return len(token_ids)
    assert_never(request.prompt)


def _facts(action: e.RequestFinished | e.LoadFinished) -> dict[str, Any]:
    values = {name: getattr(action, name) for name in action.__slots__}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
