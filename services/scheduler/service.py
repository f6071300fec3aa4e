"""The shell: messages become events, actions become effects. No decision is taken here.

Whoever leads has one; whether it may command at this moment is the leader's business (`Authority`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final, Protocol, assert_never

import msgspec
from prometheus_client import Counter, Gauge, Histogram

from services.scheduler.core import Core
from services.scheduler.decisions import Decisions, Measured
from services.scheduler.events import (
    LONG,
    Action,
    Answer,
    CommandLoad,
    CommandMigrate,
    CommandPrefetch,
    CommandStop,
    Decided,
    DeleteAsked,
    DemandHinted,
    DeployAsked,
    DeploymentUnwritten,
    DeploymentWritten,
    EnsureQueues,
    Event,
    ExplainAsked,
    ImportDone,
    ImportMoved,
    InspectSource,
    LoadAccepted,
    LoadRefused,
    LoadReported,
    MigrateAccepted,
    MigrateRefused,
    MigrationHeard,
    MoveAsked,
    Note,
    OperationFailed,
    Oriented,
    PollImport,
    PrefetchDone,
    PrefetchRefused,
    QueuesEnsured,
    QueuesRead,
    QueuesUnensured,
    QueuesUnread,
    ReadQueues,
    ReadRecord,
    ReadRegistry,
    Reconnected,
    RecordHinted,
    RecordRead,
    RecordUnread,
    RegistryRead,
    RegistryUnread,
    ReliefAsked,
    RemoveDeployment,
    ReplicaBroke,
    SourceInspected,
    StartupMeasured,
    StopAccepted,
    StopRefused,
    WriteDeployment,
)
from services.scheduler.figures import Figures
from services.scheduler.gate import Gate
from shared.bus import Reply, Subscription, Unserved
from shared.codec import CodecError
from shared.contracts.events import RecordChanged
from shared.contracts.migration import MigrationEnded, Move, Moved, Moving, Relief
from shared.contracts.placement import (
    Delete,
    Deploy,
    Deployed,
    Deploying,
    Explain,
    Explanation,
    ReplicaFailed,
    ReplicaLoaded,
)
from shared.contracts.records import DeploymentRecord, ReplicaRecord, ServerRecord, WorkerRecord
from shared.contracts.requests import Demand
from shared.contracts.residency import Done, Import, Imported, Inspect
from shared.driver import Driver
from shared.errors import Code, Failure, HearthError
from shared.lifecycle import Context
from shared.metrics import LATENCY_BUCKETS_S
from shared.settings import SchedulerSettings
from shared.subjects import (
    DELETE,
    DEMAND,
    DEPLOY,
    EXPLAIN,
    IMPORT,
    INSPECT,
    LOAD,
    MIGRATE,
    MIGRATION_ENDED,
    MOVE,
    PREFETCH,
    RECORD_CHANGED,
    RELIEF,
    REPLICA_FAILED,
    REPLICA_LOADED,
    STOP,
)

RECORDS: dict[str, type[ServerRecord] | type[WorkerRecord] | type[ReplicaRecord]] = {
    "server": ServerRecord,
    "worker": WorkerRecord,
    "replica": ReplicaRecord,
}

# A load is asked for so often, in all, while nobody says no to it (it is idempotent): perhaps NATS hangs for a moment,
# and the same load elsewhere would then be one more. Where nobody serves the subject there is nobody to wait for.
LOAD_TRIES: Final = 3

# What was asked while the lease is lost: it, or who leads next, does it when it is asked again.
HELD: Final = Failure(code=Code.UNAVAILABLE, message="The scheduler has lost the registry (Redis).", retry_after_s=1.0)
# What was read while the lease was lost, or just before: records may have expired, and nobody has written them again.
AWAY = Failure(code=Code.UNAVAILABLE, message="The registry was away while it was read.")

DECISIONS = Counter(
    "hearth_scheduler_decisions_total", "Replicas placed, by the tier of the checkpoint there", ["tier"]
)
NOTES = Counter("hearth_scheduler_events_total", "What happened, by its name in the log", ["event"])
DECISION_S = Histogram("hearth_scheduler_decision_seconds", "Demand seen → load commanded", buckets=LATENCY_BUCKETS_S)
DESIRED = Gauge("hearth_scheduler_replicas_desired", "Replicas that a deployment should have", ["deployment"])
ACTUAL = Gauge("hearth_scheduler_replicas", "Replicas loading, ready or commanded", ["deployment"])
MOVES = Gauge("hearth_scheduler_moves", "Moves of running requests that are not over", ["reason"])
MOVING = Gauge("hearth_scheduler_requests_moving", "Requests of moves that are not over", ["reason"])
OUTSTANDING = Gauge("hearth_scheduler_requests_outstanding", "Requests waiting or running", ["deployment"])
DECIDE_S = Histogram(
    "hearth_scheduler_decide_seconds",
    "What working out one decision took",
    buckets=(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5),
)
STARTUP_S = Histogram(
    "hearth_scheduler_startup_seconds",
    "Decision → replica ready, as estimated and as measured, by the tier in which the load found the checkpoint",
    ["tier", "figure"],
    buckets=LATENCY_BUCKETS_S,
)
ESTIMATE_ERROR = Histogram(
    "hearth_scheduler_estimate_error",
    "|estimate - actual| / actual of startups, by the tier in which the load found the checkpoint",
    ["tier"],
    buckets=(0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0),
)
LOADS = Counter("hearth_scheduler_loads_total", "Loads commanded")
EVICTIONS = Counter("hearth_scheduler_evictions_total", "Idle replicas stopped to make room")
FINISHED = Counter("hearth_scheduler_finished_requests_total", "Requests that replicas have finished")
SWAPS = Gauge("hearth_scheduler_swaps_per_request", "Loads per finished request since this scheduler leads")
PARKS = Counter("hearth_scheduler_parks_total", "Replicas parked, by why: late, outranked or shared", ["why"])
MOVED = Counter("hearth_scheduler_moves_over_total", "Moves of running requests that are over", ["reason"])
PREFETCHES = Counter("hearth_scheduler_prefetches_total", "Checkpoints sent for ahead of demand, by tier", ["tier"])
BOUND_HELD = Gauge(
    "hearth_scheduler_bound_held", "1: the bound on waiting is held for all that want places now; 0: not"
)
BOUND_LEAST_S = Gauge("hearth_scheduler_bound_least_seconds", "The least bound on waiting that could be held now")
LATE = Gauge("hearth_scheduler_deployments_late", "Deployments whose oldest request has waited longer than the bound")


class Authority(Protocol):
    """The right to command. `pauses` counts the times that it was lost, for good or for a while."""

    @property
    def pauses(self) -> int:
        """How often it was lost."""

    @property
    def shown_term(self) -> int:
        """The term under which it leads, for people; 0: it does not."""

    async def granted(self) -> int:
        """Wait until commands are allowed; the term that they carry."""

    async def confirmed(self) -> bool:
        """Whether the registry still says so, and so still knows what it knew."""

    def refused(self, failure: Failure) -> None:
        """A command was answered with this failure."""

    async def write(self, record: DeploymentRecord) -> None:
        """Write a deployment's record, if nobody else leads. Raises `HearthError`."""

    async def erase(self, name: str) -> None:
        """Remove a deployment's record, if nobody else leads. Raises `HearthError`."""


class Timed:
    """A core whose decisions are timed."""

    def __init__(self, gate: Gate, decisions: Decisions) -> None:
        self._gate = gate
        self._decisions = decisions

    def handle(self, event: Event | None, now: float) -> list[Action]:
        """See `Core.handle`."""
        began_s = time.perf_counter()
        out = self._gate.handle(event, now)
        took_s = time.perf_counter() - began_s
        for _ in range(count := self._decisions.timed(took_s * 1000)):
            DECIDE_S.observe(took_s / count)
        return out

    def deadline(self) -> float | None:
        """See `Core.deadline`."""
        return self._gate.deadline()

    def check(self) -> None:
        """See `Core.check`."""
        self._gate.check()


class Service:
    """Carries out what the core wants, while it is allowed to."""

    def __init__(self, context: Context[SchedulerSettings], core: Core, authority: Authority) -> None:
        self._context = context
        self._core = core
        self._authority = authority
        self._gate = Gate(core)
        self._held = False
        self._subscriptions: list[Subscription] = []
        self._clock = time.monotonic
        self._shown: frozenset[str] = frozenset()
        self._counted = Figures()
        self.oriented = asyncio.Event()
        self.driver: Driver[Event, Action] = Driver(
            Timed(self._gate, core.decisions), tell=self._tell, do=self._do, long=LONG, clock=self._clock
        )

    async def run(self) -> None:
        """Listen and work until cancelled."""
        try:
            await self.listen()
            await self.driver.run()
        finally:
            for one in self._subscriptions:
                await one.close()

    def hold(self) -> None:
        """Decide and command nothing until `go_on`."""
        self._held = True
        self._gate.hold()

    def go_on(self) -> None:
        """Go on with the same picture, and look at everything at once."""
        self._held = False
        self._gate.go_on()
        self.reconnected()

    def reconnected(self) -> None:
        """Messages may have been lost."""
        self.driver.post(Reconnected())

    async def listen(self) -> None:
        """Subscribe to everything that concerns a scheduler."""
        bus = self._context.bus
        self._subscriptions += [
            await bus.subscribe(DEMAND, self._demand),
            await bus.subscribe(RECORD_CHANGED, self._record_changed, kind="*"),
            await bus.subscribe(REPLICA_FAILED, self._replica_failed),
            await bus.subscribe(REPLICA_LOADED, self._replica_loaded),
            await bus.serve(DEPLOY, self._deploy, group="scheduler"),
            await bus.serve(DELETE, self._delete, group="scheduler"),
            await bus.serve(MOVE, self._move, group="scheduler"),
            await bus.serve(EXPLAIN, self._explain, group="scheduler"),
            await bus.subscribe(MIGRATION_ENDED, self._migration_ended, worker_id="*"),
            await bus.subscribe(RELIEF, self._relief),
        ]
        with contextlib.suppress(HearthError):  # without NATS: what is missed is seen by looking, as ever
            await bus.flush()

    # -- messages → events ---------------------------------------------------------------------------------------

    def _demand(self, message: Demand) -> None:
        # A gateway that does not say who it is does not say how many wait, either.
        waiting = max(0, message.waiting) if message.gateway_id else 1
        oldest_s = max(0.0, message.oldest_s)
        self._hint(DemandHinted(message.deployment, self._clock(), message.gateway_id, waiting, oldest_s))

    def _record_changed(self, message: RecordChanged) -> None:
        self._hint(RecordHinted(message.kind, message.id, message.deleted))

    def _replica_failed(self, message: ReplicaFailed) -> None:
        self.driver.post(ReplicaBroke(message.replica_id, message.deployment, message.worker_id, message.failure))

    def _replica_loaded(self, message: ReplicaLoaded) -> None:
        self.driver.post(LoadReported(message))

    def _deploy(self, message: Deploy, reply: Reply[Deploying | Deployed]) -> None:
        self._asked(DeployAsked(message.spec, message.wait_s, time.time(), reply))

    def _delete(self, message: Delete, reply: Reply[Done]) -> None:
        self._asked(DeleteAsked(message.deployment, reply))

    def _move(self, message: Move, reply: Reply[Moving | Moved]) -> None:
        self._asked(MoveAsked(message, reply))

    def _explain(self, message: Explain, reply: Reply[Explanation]) -> None:
        def signed(answer: Explanation | Failure) -> None:
            if isinstance(answer, Explanation):
                me = self._context.id
                answer = msgspec.structs.replace(answer, scheduler_id=me, term=self._authority.shown_term)
            reply(answer)

        self._asked(ExplainAsked(message, signed))

    def _migration_ended(self, message: MigrationEnded) -> None:
        self.driver.post(MigrationHeard(message))

    def _relief(self, message: Relief) -> None:
        self.driver.post(ReliefAsked(message))

    def _hint(self, event: DemandHinted | RecordHinted) -> None:
        if not self._held:  # looking, when it goes on, tells more than what was missed
            self.driver.post(event)

    def _asked(self, event: DeployAsked | DeleteAsked | MoveAsked | ExplainAsked) -> None:
        if self._held:
            event.reply(HELD)
        else:
            self.driver.post(event)

    # -- actions → effects ---------------------------------------------------------------------------------------

    def _tell(self, action: Action) -> None:
        match action:
            case Answer():
                action.reply(action.message)
            case Note():
                NOTES.labels(action.name).inc()
                self._context.event(action.name, **action.facts)
            case Decided():
                took_s = max(0.0, self._clock() - action.demanded_at)
                DECISIONS.labels(str(action.facts["tier"])).inc()
                DECISION_S.observe(took_s)
                self._context.event("placement.decided", **action.facts, decision_ms=round(took_s * 1000, 3))
            case Oriented():
                self.oriented.set()
            case StartupMeasured(measured=measured):
                self._measured(measured)
            case _:
                raise TypeError(f"{type(action).__name__} takes time and is not told")

    async def _do(self, action: Action) -> Event | None:
        match action:
            case ReadRegistry():
                return await self._read_registry(action)
            case ReadQueues():
                return await self._read_queues(action)
            case ReadRecord():
                return await self._read_record(action)
            case EnsureQueues():
                return await self._ensure_queues(action)
            case InspectSource():
                return await self._inspect(action)
            case PollImport():
                return await self._import(action)
            case WriteDeployment():
                return await self._write(action)
            case RemoveDeployment():
                return await self._remove(action)
            case CommandLoad():
                return await self._load(action)
            case CommandStop():
                return await self._stop(action)
            case CommandMigrate():
                return await self._migrate(action)
            case CommandPrefetch():
                return await self._prefetch(action)
            case Answer() | Note() | Decided() | Oriented() | StartupMeasured():
                raise TypeError(f"{type(action).__name__} takes no time and is not done")
            case _:
                assert_never(action)

    async def _read_registry(self, action: ReadRegistry) -> Event:
        pauses = self._authority.pauses
        try:
            view = await self._context.registry.view()
        except (HearthError, CodecError) as error:
            return RegistryUnread(_failure(error))
        if self._authority.pauses != pauses or not await self._authority.confirmed():
            return RegistryUnread(AWAY)
        return RegistryRead(view, action.asked_at)

    async def _read_queues(self, action: ReadQueues) -> Event:
        self._show()
        try:
            return QueuesRead(await self._context.bus.queue_depths(), action.asked_at)
        except HearthError as error:
            return QueuesUnread(error.failure)

    async def _read_record(self, action: ReadRecord) -> Event:
        pauses = self._authority.pauses
        try:
            record = await self._context.registry.get(RECORDS[action.kind], action.id)
        except (HearthError, CodecError):
            return RecordUnread(action.kind, action.id)
        if self._authority.pauses != pauses:
            return RecordUnread(action.kind, action.id)
        return RecordRead(action.kind, action.id, record)

    async def _ensure_queues(self, action: EnsureQueues) -> Event:
        settings, bus = self._context.settings, self._context.bus
        try:
            await bus.ensure_stream(limit=settings.queue_limit)
            for slug in action.slugs:
                await bus.ensure_queue(slug, ack_wait_s=settings.ack_wait_s)
        except HearthError as error:
            return QueuesUnensured(error.failure)
        return QueuesEnsured()

    async def _inspect(self, action: InspectSource) -> Event:
        try:
            inspected = await self._context.bus.call(INSPECT, Inspect(source=action.source), server_id=action.server_id)
        except HearthError as error:
            return OperationFailed(action.deployment, action.operation, error.failure)
        return SourceInspected(action.deployment, action.operation, inspected)

    async def _import(self, action: PollImport) -> Event:
        message = Import(source=action.source, deployment=action.slug)
        try:
            answer = await self._context.bus.call(IMPORT, message, extra_s=message.wait_s, server_id=action.server_id)
        except HearthError as error:
            return OperationFailed(action.deployment, action.operation, error.failure)
        if isinstance(answer, Imported):
            return ImportDone(action.deployment, action.operation, answer.checkpoint)
        return ImportMoved(action.deployment, action.operation, answer)

    async def _write(self, action: WriteDeployment) -> Event:
        record, context = action.record, self._context
        try:
            await context.bus.ensure_queue(record.slug, ack_wait_s=context.settings.ack_wait_s)
            await self._authority.write(record)
        except HearthError as error:
            return DeploymentUnwritten(record.spec.name, error.failure)
        context.changed(DeploymentRecord, record.spec.name)
        return DeploymentWritten(record.spec.name, record)

    async def _remove(self, action: RemoveDeployment) -> Event:
        record, context = action.record, self._context
        try:
            await self._authority.granted()
            await context.bus.delete_queue(record.slug)
            await self._authority.erase(record.spec.name)
        except HearthError as error:
            return DeploymentUnwritten(record.spec.name, error.failure)
        context.changed(DeploymentRecord, record.spec.name, deleted=True)
        return DeploymentWritten(record.spec.name, None)

    async def _load(self, action: CommandLoad) -> Event:
        decision_s = max(0.0, self._clock() - action.demanded_at)
        term = await self._authority.granted()
        message = msgspec.structs.replace(action.message, decision_s=decision_s, term=term)
        for left in reversed(range(LOAD_TRIES)):
            try:
                await self._context.bus.call(LOAD, message, worker_id=action.worker_id)
                break
            except HearthError as error:
                unheard = error.failure.code is Code.UNAVAILABLE and not isinstance(error, Unserved)
                if not (unheard and left):
                    self._authority.refused(error.failure)
                    return LoadRefused(message.replica_id, error.failure)
        return LoadAccepted(message.replica_id)

    async def _stop(self, action: CommandStop) -> Event:
        message = msgspec.structs.replace(action.message, term=await self._authority.granted())
        try:
            await self._context.bus.call(STOP, message, worker_id=action.worker_id)
        except HearthError as error:
            self._authority.refused(error.failure)
            return StopRefused(action.message.replica_id, error.failure)
        return StopAccepted(action.message.replica_id)

    async def _migrate(self, action: CommandMigrate) -> Event:
        message = msgspec.structs.replace(action.message, term=await self._authority.granted())
        try:
            answer = await self._context.bus.call(MIGRATE, message, worker_id=action.worker_id)
        except HearthError as error:
            self._authority.refused(error.failure)
            return MigrateRefused(action.move_id, action.leg, error.failure)
        return MigrateAccepted(action.move_id, action.leg, answer.request_ids)

    async def _prefetch(self, action: CommandPrefetch) -> Event:
        server_id, key, tier = action.server_id, action.message.checkpoint_id, action.message.tier
        try:
            while True:
                message = msgspec.structs.replace(action.message, term=await self._authority.granted())
                answer = await self._context.bus.call(PREFETCH, message, extra_s=message.wait_s, server_id=server_id)
                if isinstance(answer, Done):
                    return PrefetchDone(server_id, key, tier)
        except HearthError as error:
            self._authority.refused(error.failure)
            return PrefetchRefused(server_id, key, tier, error.failure)

    def _show(self) -> None:
        """Bring the gauges up to date (on the loop's thread: the core is not for others)."""
        rows = self._core.desired()
        for name, (desired, actual, outstanding) in rows.items():
            DESIRED.labels(name).set(desired)
            ACTUAL.labels(name).set(actual)
            OUTSTANDING.labels(name).set(outstanding)
        for name in self._shown.difference(rows):
            for gauge in (DESIRED, ACTUAL, OUTSTANDING):
                gauge.remove(name)
        self._shown = frozenset(rows)
        for reason, (moves, requests) in self._core.moves.open().items():
            MOVES.labels(reason.value).set(moves)
            MOVING.labels(reason.value).set(requests)
        self._show_figures(self._core.figures())

    def _show_figures(self, now: Figures) -> None:
        """Counters rise by what has come since the last look."""
        before, self._counted = self._counted, now
        LOADS.inc(now.loads - before.loads)
        EVICTIONS.inc(now.evictions - before.evictions)
        FINISHED.inc(now.finished_requests - before.finished_requests)
        SWAPS.set(now.swaps_per_request)
        for counter, new, old in (
            (PARKS, now.parks, before.parks),
            (MOVED, now.moves, before.moves),
            (PREFETCHES, now.prefetches, before.prefetches),
        ):
            for label, total in new.items():
                counter.labels(label).inc(total - old.get(label, 0))
        bound = now.bound
        BOUND_HELD.set(bound is None or bound.held)
        BOUND_LEAST_S.set(bound.least_s if bound is not None else 0)
        LATE.set(bound.late if bound is not None else 0)

    def _measured(self, measured: Measured) -> None:
        tier = measured.tier
        STARTUP_S.labels(tier, "estimate").observe(measured.estimate.total_s)
        STARTUP_S.labels(tier, "actual").observe(measured.actual_s)
        ESTIMATE_ERROR.labels(tier).observe(measured.relative_error)
        self._context.event(
            "startup.measured",
            deployment=measured.deployment,
            replica_id=measured.replica_id,
            tier=tier,
            estimate_s=round(measured.estimate.total_s, 6),
            actual_s=round(measured.actual_s, 6),
            relative_error=round(measured.relative_error, 4),
        )


def _failure(error: HearthError | CodecError) -> Failure:
    if isinstance(error, HearthError):
        return error.failure
    return Failure(code=Code.INTERNAL, message=f"A record cannot be read: {error}")
