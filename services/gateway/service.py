"""The shell: messages → events, actions → effects. Decides nothing about requests."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import Any, Final, assert_never

import msgspec
from prometheus_client import Counter, Gauge, Histogram

from services.gateway.buffer import CallBuffer
from services.gateway.core import Config, GatewayCore
from services.gateway.events import (
    LONG,
    Account,
    Action,
    Admitted,
    AnswerClaim,
    AnswerHolds,
    CancelWork,
    CheckOwner,
    ClaimAsked,
    ClientLeft,
    Closing,
    Conclude,
    Deliver,
    DeploymentFailed,
    DeploymentGone,
    Disconnected,
    Event,
    Fail,
    FindMessage,
    FramesArrived,
    GiveBack,
    Hint,
    HoldsAsked,
    Inform,
    MessageFound,
    OwnerChecked,
    OwnerLost,
    ProgressArrived,
    Publish,
    Published,
    PublishFailed,
    Reconnected,
    Resumed,
    Settle,
    TellTrial,
    TrialHeard,
    Unqueue,
)
from services.gateway.openai import Call, expand
from services.gateway.recall import Recall
from shared.bus import Bus, Reply, Unserved
from shared.codec import CodecError
from shared.contracts.events import RecordChanged
from shared.contracts.generation import FrameBatch
from shared.contracts.records import ClusterView, DeploymentRecord, DeploymentState
from shared.contracts.requests import Check, Claim, Claimed, Demand, Gone, Holds, Request, Trial, Unwanted
from shared.contracts.residency import LoadProgress
from shared.driver import Driver
from shared.errors import Code, Failure, HearthError
from shared.lifecycle import Context
from shared.metrics import LATENCY_BUCKETS_S
from shared.registry import Registry, record_kind
from shared.settings import GatewaySettings
from shared.subjects import CANCEL, CHECK, CLAIM, DEMAND, FRAMES, HOLDS, LOAD_PROGRESS, RECORD_CHANGED, TRIAL

LOOK_INTERVAL_S: Final = 2.0

TTFT: Final = Histogram("hearth_gateway_ttft_seconds", "Admission to first token", ["cold"], buckets=LATENCY_BUCKETS_S)
ITL: Final = Histogram("hearth_gateway_itl_seconds", "Between two frames of a request", buckets=LATENCY_BUCKETS_S)
QUEUED: Final = Histogram("hearth_gateway_queue_seconds", "Admission to first claim", buckets=LATENCY_BUCKETS_S)
DURATION: Final = Histogram("hearth_gateway_request_seconds", "Admission to end", buckets=LATENCY_BUCKETS_S)
ENDED: Final = Counter("hearth_gateway_requests", "Requests by how they ended", ["deployment", "outcome"])
TOKENS: Final = Counter("hearth_gateway_tokens", "Tokens of requests that ended", ["kind"])
COLD: Final = Counter("hearth_gateway_cold_starts", "Requests that met a cold start, by tier", ["tier"])
RECOVERED: Final = Counter("hearth_gateway_recoveries", "Times that a request was resumed by another claim")
MIGRATED: Final = Counter("hearth_gateway_migrations", "Times that a running request moved to another worker")
PAUSE: Final = Histogram(
    "hearth_gateway_pause_seconds",
    "Last token of an owner to first token of the next, by why it changed",
    ["how"],
    buckets=LATENCY_BUCKETS_S,
)
RECOVERY: Final = Histogram(
    "hearth_gateway_recovery_seconds",
    "Loss of an owner noticed to first token of the next",
    buckets=LATENCY_BUCKETS_S,
)
CHECKS: Final = Counter("hearth_gateway_checks", "Times that a silent worker was asked about its requests")
LOST: Final = Counter("hearth_gateway_lost_requests", "Requests that lost their owner, by how it was noticed", ["how"])
LOST_OWNERS: Final = Counter("hearth_gateway_lost_owners", "Owners that were lost, by how it was noticed", ["how"])
SUPERSEDED: Final = Counter("hearth_gateway_superseded", "Times that a former owner was told to stop")
OPEN: Final = Gauge("hearth_gateway_open_requests", "Requests that have not ended")


class Gateway:
    """The open calls of this process and the picture of the deployments. Made by `services.gateway.main`."""

    def __init__(self, context: Context[GatewaySettings], config: Config, *, check: bool = False) -> None:
        self.settings = context.settings
        self.gateway_id = context.id
        self.bus: Bus = context.bus
        self.registry: Registry = context.registry
        self.core = GatewayCore(config)
        self.recall = Recall()
        self.draining = False
        self.subscribed = False
        self._log = context.log
        self._event = context.event
        self._driver: Driver[Event, Action] = Driver(self.core, tell=self._tell, do=self._do, long=LONG, check=check)
        self._buffers: dict[str, CallBuffer] = {}
        self._deployments: dict[str, DeploymentRecord] = {}
        self._registry_answers = False
        self._look = asyncio.Event()
        self._one_look = asyncio.Lock()
        self._all_closed = asyncio.Event()
        OPEN.set_function(lambda: self.core.open_requests)

    # -- life ---------------------------------------------------------------------------------------------------------

    async def subscribe(self) -> None:
        """Open every subscription; when this returns the server knows them."""
        me = self.gateway_id
        await self.bus.serve(CLAIM, self._claim_asked, gateway_id=me)
        await self.bus.serve(HOLDS, self._holds_asked, gateway_id=me)
        await self.bus.subscribe(FRAMES, self._frames_arrived, gateway_id=me)
        await self.bus.subscribe(TRIAL, self._trial_heard, gateway_id="*")
        await self.bus.subscribe(LOAD_PROGRESS, self._progress_arrived, slug="*")
        await self.bus.subscribe(RECORD_CHANGED, self._record_changed, kind=record_kind(DeploymentRecord))
        self.bus.on_disconnect(self._disconnected)
        self.bus.on_reconnect(self._reconnected)
        await self.bus.flush(within_s=self.settings.start_wait_s)
        self.subscribed = True

    async def run(self) -> None:
        """Drive the core until cancelled."""
        await self._driver.run()

    @property
    def trouble(self) -> str | None:
        """Why this gateway cannot answer now; None: it can."""
        if self.draining:
            return "draining"
        if not self.subscribed:
            return "starting"
        if not self.bus.connected:
            return "NATS is not connected"
        if not self._registry_answers:
            return "Redis does not answer"
        return None

    async def drain(self, seconds: float) -> None:
        """Take no new calls; let the open ones finish, and end what is left after `seconds`."""
        self.draining = True
        await self._idle(seconds)
        failure = Failure(code=Code.DRAINING, message="The gateway is shutting down.", retry_after_s=1.0)
        self._driver.post(Closing(failure))
        await self._idle(2.0)  # the handlers say so to their clients
        await asyncio.sleep(0)

    async def _idle(self, seconds: float) -> None:
        if self._buffers:
            self._all_closed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._all_closed.wait()

    # -- deployments --------------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Read every deployment. Raises `HearthError` without Redis."""
        async with self._one_look:  # an older answer must not overtake a newer one
            known = set(self._deployments)  # one that appears while we read is not gone because we missed it
            try:
                records = await self.registry.all(DeploymentRecord)
            except (HearthError, CodecError) as error:
                self._registry_answers = False
                if isinstance(error, HearthError):
                    raise
                raise HearthError(Code.INTERNAL, f"A deployment's record cannot be read: {error}") from error
            self._registry_answers = True
            found = {record.spec.name: record for record in records}
            for name in sorted(known - set(found)):
                self._deployments.pop(name, None)
                self._driver.post(DeploymentGone(name))
            for name, record in found.items():
                self._keep(name, record)

    def _keep(self, name: str, record: DeploymentRecord) -> None:
        self._deployments[name] = record
        if record.state is DeploymentState.DELETING:
            self._driver.post(DeploymentGone(name))
        elif record.failure is not None:
            self._driver.post(DeploymentFailed(name, record.failure))

    async def keep_looking(self) -> None:
        """Keep the picture fresh until cancelled: when told that a record changed, and every few seconds."""
        failing = False
        while True:
            try:
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    await self._look.wait()
            except TimeoutError:
                pass  # nobody told us anything: look all the same
            self._look.clear()
            try:
                await self.look()
                failing = False
            except HearthError as error:
                if not failing:
                    self._log.warning("registry.lost", error=error.failure.message)
                failing = True

    def deployments(self) -> list[DeploymentRecord]:
        """Those that answer or are on their way to, by name."""
        return [
            record for _, record in sorted(self._deployments.items()) if record.state is not DeploymentState.DELETING
        ]

    async def deployment(self, name: str) -> DeploymentRecord | None:
        """A deployment; on a miss the registry is asked. Raises `HearthError` without Redis."""
        known = self._deployments.get(name)
        if known is not None:
            return known
        try:
            record = await self.registry.get(DeploymentRecord, name)
        except CodecError as error:
            raise HearthError(Code.INTERNAL, f"The deployment's record cannot be read: {error}") from error
        if record is not None:
            self._keep(name, record)
        return record

    async def view(self) -> ClusterView:
        """The whole cluster as the registry and the queues say."""
        view = await self.registry.view()
        depths = await self.bus.queue_depths()
        return msgspec.structs.replace(
            view, queue_depths={record.spec.name: depths.get(record.slug, 0) for record in view.deployments}
        )

    # -- calls --------------------------------------------------------------------------------------------------------

    def open(self, call: Call, record: DeploymentRecord, call_id: str, traceparent: str | None) -> CallBuffer:
        """Queue a call's requests; its answer comes through the buffer. Raises `HearthError` when overloaded."""
        work = expand(call, secrets.randbits(63))
        single = len(work) == 1
        requests = tuple(
            Request(
                request_id=call_id if single else f"{call_id}-{choice}",
                gateway_id=self.gateway_id,
                deployment=record.spec.name,
                prompt=prompt,
                sampling=sampling,
                budget_s=self.settings.request_budget_s,
                echo=call.echo,
                traceparent=traceparent,
            )
            for choice, (prompt, sampling) in enumerate(work)
        )
        buffer = CallBuffer(call_id, choices=len(requests), limit_bytes=self.settings.stream_buffer_bytes)
        self._driver.post(
            Admitted(
                call_id=call_id,
                deployment=record.spec.name,
                slug=record.slug,
                requests=requests,
                queue_limit=record.spec.queue_limit,
                budget_s=self.settings.request_budget_s,
                stream=call.stream,
            )
        )
        self._buffers[call_id] = buffer
        return buffer

    def close(self, buffer: CallBuffer) -> None:
        """The handler is done with a call; if the call is not over, its client left."""
        self._buffers.pop(buffer.call_id, None)
        if not self._buffers:
            self._all_closed.set()
        if not buffer.over:
            with contextlib.suppress(HearthError):  # the inbox is full: the budget ends the call
                self._driver.post(ClientLeft(buffer.call_id))

    # -- messages → events --------------------------------------------------------------------------------------------

    def _claim_asked(self, claim: Claim, reply: Reply[Claimed | Gone]) -> None:
        self._driver.post(ClaimAsked(claim, reply))

    def _frames_arrived(self, batch: FrameBatch) -> None:
        self._driver.post(FramesArrived(batch))

    def _holds_asked(self, holds: Holds, reply: Reply[Unwanted]) -> None:
        self._driver.post(HoldsAsked(holds, reply))

    def _trial_heard(self, trial: Trial) -> None:
        if trial.gateway_id != self.gateway_id:  # a topic brings one's own words, too
            self._driver.post(TrialHeard(trial))

    def _progress_arrived(self, progress: LoadProgress) -> None:
        self._driver.post(ProgressArrived(progress))

    def _record_changed(self, _: RecordChanged) -> None:
        self._look.set()

    def _disconnected(self) -> None:
        self._driver.post(Disconnected())

    def _reconnected(self) -> None:
        self._driver.post(Reconnected())
        self._look.set()

    # -- actions → effects --------------------------------------------------------------------------------------------

    def _tell(self, action: Action) -> None:
        try:
            self._carry_out(action)
        except HearthError as error:  # an outbox or inbox is full: what is lost here, a timer of the core repeats
            self._log.warning("action.dropped", action=type(action).__name__, error=error.failure.message)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Deliver():
                if action.gap_s is not None:
                    ITL.observe(action.gap_s)
                self._hand_over(action.call_id, action)
            case Conclude() | Fail() | Inform():
                self._hand_over(action.call_id, action)
            case AnswerClaim(reply=reply, answer=answer):
                reply(answer)
            case AnswerHolds(reply=answer_holds, answer=unwanted):
                answer_holds(unwanted)
            case GiveBack(token=token):
                self.bus.nak(token)
            case Settle(token=token):
                self.bus.ack(token)
            case CancelWork(worker_id=worker_id, cancel=cancel):
                SUPERSEDED.inc(int(cancel.superseded))
                self.bus.publish(CANCEL, cancel, worker_id=worker_id)
            case TellTrial(slug=slug, request_id=request_id, on=on, guilty=guilty):
                me = self.gateway_id
                trial = Trial(gateway_id=me, slug=slug, request_id=request_id, on=on, guilty=guilty)
                self.bus.publish(TRIAL, trial, gateway_id=me)
            case Hint(deployment=deployment, waiting=waiting, oldest_s=oldest_s):
                me = self.gateway_id
                hint = Demand(deployment=deployment, gateway_id=me, waiting=waiting, oldest_s=oldest_s)
                self.bus.publish(DEMAND, hint)
            case OwnerLost():
                self._lost(action)
            case Resumed():
                self._resumed(action)
            case Account():
                self._account(action)
            case Publish() | Unqueue() | FindMessage() | CheckOwner():
                raise AssertionError("carried out by _do")
            case _:
                assert_never(action)

    def _hand_over(self, call_id: str, piece: Deliver | Conclude | Fail | Inform) -> None:
        buffer = self._buffers.get(call_id)
        if buffer is not None and not buffer.put(piece):
            self._driver.post(ClientLeft(call_id))

    async def _do(self, action: Action) -> Event | None:
        match action:
            case Publish(slug=slug, request=request, attempt=attempt):
                try:
                    sequence = await self.bus.enqueue(slug, request)
                except HearthError as error:
                    return PublishFailed(request.request_id, attempt, error.failure)
                return Published(request.request_id, attempt, sequence)
            case Unqueue(sequence=sequence):
                try:
                    await self.bus.unqueue(sequence)
                except HearthError as error:  # a worker that claims it will hear that it is gone
                    self._log.warning("request.stranded", sequence=sequence, error=error.failure.message)
                return None
            case FindMessage(request_id=request_id, sequence=sequence):
                try:
                    return MessageFound(request_id, sequence, await self.bus.queued(sequence))
                except HearthError:
                    return MessageFound(request_id, sequence, None)
            case CheckOwner(worker_id=worker_id, requests=requests):
                CHECKS.inc()
                try:
                    running = await self.bus.call(CHECK, Check(requests=requests), worker_id=worker_id)
                except HearthError as error:
                    return OwnerChecked(worker_id, requests, error.failure, unserved=isinstance(error, Unserved))
                return OwnerChecked(worker_id, requests, running)
            case _:
                raise AssertionError("carried out by _tell")

    def _lost(self, lost: OwnerLost) -> None:
        LOST_OWNERS.labels(lost.how).inc()
        LOST.labels(lost.how).inc(lost.requests)
        name = "worker.lost" if lost.how in ("unserved", "silent") else "request.lost"
        self._event(name, worker_id=lost.worker_id, how=lost.how, requests=lost.requests)

    def _resumed(self, resumed: Resumed) -> None:
        if resumed.pause_s is not None:
            PAUSE.labels(resumed.how).observe(resumed.pause_s)
        if resumed.noticed_s is not None:
            RECOVERY.observe(resumed.noticed_s)
            self._event(
                "request.recovered",
                request_id=resumed.request_id,
                deployment=resumed.deployment,
                worker_id=resumed.worker_id,
                epoch=resumed.epoch,
                tokens=resumed.tokens,
                recovery_s=round(resumed.noticed_s, 6),
                pause_s=None if resumed.pause_s is None else round(resumed.pause_s, 6),
            )

    def _account(self, account: Account) -> None:
        self.recall.keep(account, time.monotonic())
        ledger, usage = account.ledger, account.usage
        status = 200 if account.failure is None else account.failure.kind.status
        ENDED.labels(account.deployment, account.reason).inc()
        DURATION.observe(account.duration_s)
        TOKENS.labels("prompt").inc(usage.prompt_tokens)
        TOKENS.labels("completion").inc(usage.completion_tokens)
        if account.queue_s is not None:
            QUEUED.observe(account.queue_s)
        if account.ttft_s is not None:
            TTFT.labels("true" if ledger.cold else "false").observe(account.ttft_s)
        if ledger.cold:
            COLD.labels(ledger.tier).inc()
        RECOVERED.inc(ledger.recoveries)
        MIGRATED.inc(ledger.migrations)
        facts: dict[str, Any] = {
            "request_id": account.request_id,
            "deployment": account.deployment,
            "status": status,
            "reason": account.reason,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "duration_s": round(account.duration_s, 6),
            "queue_s": None if account.queue_s is None else round(account.queue_s, 6),
            "ttft_s": None if account.ttft_s is None else round(account.ttft_s, 6),
            "cold": ledger.cold,
            "tier": ledger.tier,
            "claims": account.claims,
            "migrations": ledger.migrations,
            "recoveries": ledger.recoveries,
            "pause_s": round(ledger.pause_s, 6),
        }
        # What is wrong with a request may be said in its own words, and those are never logged.
        if account.failure is not None and account.failure.code is not Code.INVALID_REQUEST:
            facts["error"] = account.failure.message
        self._log.info("request.ended", **facts)
