"""The worker decides: which replicas it holds, which requests they run, what each request's gateway hears. Pure.

A request in here is a `Run`: claiming → tokenising → running, and over. Its key is the token of its delivery, so that
an answer that comes too late finds nothing and is dropped. A gateway's claim is the only way to own a request; the
queue's acknowledgement follows the request's end, never precedes it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, assert_never

import msgspec

from services.worker import events as e
from services.worker.generation import Generation, limit_tokens
from services.worker.ports import EndReason, EngineDied, EngineEvent, KvShort, SequenceEnd, StepToken
from services.worker.replica import Replica
from shared.contracts.generation import End, FinishReason, Frame, FrameBatch, Ledger
from shared.contracts.placement import LoadReplica, ReplicaFailed, StopReplica
from shared.contracts.records import ReplicaRecord, ReplicaState
from shared.contracts.requests import Cancel, Claim, Claimed, Gone, Request
from shared.contracts.residency import Done
from shared.errors import Code, Failure
from shared.sizes import size

CLAIM_RETRIES_S: Final = (0.2, 0.5, 1.0)
GATEWAY_AWAY_S: Final = 3.0  # until a request whose gateway does not answer is handed out again
RENEW_AGAIN_S: Final = 1.0  # after a renewal that the store did not answer
# The gateway ends a request whose budget is spent; the worker does so itself only if no cancel has come by then.
BUDGET_GRACE_S: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this worker may do, from its settings and its device. `engine` is "" unless its operator insists on one."""

    worker_id: str
    server_id: str
    memory_total_bytes: int
    weights_on_device: bool
    max_replicas: int
    lease_ttl_s: float
    ack_wait_s: float
    max_deliveries: int
    drain_s: float
    kv_bytes_max: int
    engine: str = ""


class RunState(enum.Enum):
    """How far a request is in this worker."""

    CLAIMING = "claiming"
    TOKENISING = "tokenising"
    RUNNING = "running"


@dataclass(slots=True)
class Run:
    """One delivery of one request."""

    request: Request
    token: str
    delivery: int
    replica: Replica
    state: RunState = RunState.CLAIMING
    tries: int = 0
    retry_at: float | None = None
    asked_at: float = 0.0
    claimed: Claimed | None = None
    claimed_at: float = 0.0
    cancelled: Cancel | None = None
    ledger: Ledger = field(default_factory=Ledger)
    generation: Generation | None = None
    first_token_at: float | None = None
    last_token_at: float = 0.0

    @property
    def epoch(self) -> int:
        """The epoch of its claim; -1 before."""
        return self.claimed.epoch if self.claimed else -1

    @property
    def owners(self) -> int:
        """How many workers have had it, this one included. A delivery that nobody claimed is no try, nor is a claim
        whose answer was lost: each counts in only one of the two numbers."""
        return min(self.delivery, self.epoch) if self.claimed else self.delivery

    @property
    def sequence_id(self) -> str:
        """What the engine knows it by: another claim is another sequence."""
        return f"{self.request.request_id}.{self.epoch}"


class WorkerCore:
    """`handle`, `deadline` and `check` are the driver's; the rest answers the shell's questions."""

    def __init__(self, limits: Limits) -> None:
        self.limits: Final = limits
        self.replicas: dict[str, Replica] = {}
        self.runs: dict[str, Run] = {}
        self.draining = False
        self._by_request: dict[str, Run] = {}
        self._sequences: dict[str, Run] = {}
        self._retries: dict[str, Run] = {}
        self._give_back_at: float | None = None
        self._drained = False
        self._beat_at: float | None = None
        self._renew_at: float | None = None
        self._renewing = False
        self._renewal: tuple[float, tuple[str, ...]] = (0.0, ())  # when it was asked, for which leases
        self._bus_away = False
        self._bus_back_at = -math.inf
        self._segment = ""
        self._looking = False
        self._look_again = False

    # -- what the shell asks

    @property
    def memory_used_bytes(self) -> int:
        """Device memory that replicas take or may take."""
        return sum(replica.memory_bytes for replica in self.replicas.values())

    def record(self, replica_id: str, now: float) -> ReplicaRecord:
        """The record of a replica that is here."""
        return self.replicas[replica_id].record(now)

    def count(self, state: ReplicaState) -> int:
        """Replicas in this state."""
        return sum(replica.state is state for replica in self.replicas.values())

    @property
    def slots(self) -> int:
        """Requests that the ready replicas can run at once."""
        return sum(r.slots for r in self.replicas.values() if r.state is ReplicaState.READY)

    # -- the driver's

    def handle(self, event: e.Event | None, now: float) -> list[e.Action]:
        """Take an event (None: time has passed)."""
        actions = self._time(now) if event is None else self._event(event, now)
        self._set_timers(now)
        if self.draining and not self.replicas and not self._drained:
            self._drained = True
            actions.append(e.Drained())
        return actions

    def deadline(self) -> float | None:
        """When time matters next."""
        times = [self._give_back_at, self._beat_at, self._renew_at]
        times += [replica.retry_at for replica in self.replicas.values()]
        times += [run.retry_at for run in self._retries.values()]
        return min((time for time in times if time is not None), default=None)

    def check(self) -> None:
        """Assert every invariant."""
        for replica in self.replicas.values():
            replica.check()
            assert not replica.gone, "a replica that is gone is still here"
            for token in replica.held:
                assert self.runs[token].replica is replica, "a slot held by a request of another replica"
        assert sum(len(r.held) for r in self.replicas.values()) == len(self.runs), "a request without a slot"
        promised = sum(min(r.reserved_bytes, r.memory_bytes) for r in self.replicas.values())
        assert promised <= self.limits.memory_total_bytes, "more memory promised than there is"
        assert len(self.replicas) <= self.limits.max_replicas
        assert list(self._by_request.values()) == list(self.runs.values()), "a request twice"
        for token, run in self.runs.items():
            assert token == run.token
            assert self.replicas[run.replica.id] is run.replica
            running = run.state is RunState.RUNNING
            assert (self._sequences.get(run.sequence_id) is run) == running, "a sequence without a request"
            assert (run.claimed is None) == (run.state is RunState.CLAIMING)
            assert not running or run.replica.loaded is not None, "a sequence without an engine"
        assert all(self.runs.get(run.token) is run for run in self._sequences.values())
        assert all(self.runs.get(run.token) is run and run.retry_at is not None for run in self._retries.values())
        assert not self.runs or self._beat_at is not None, "the queue would take the requests back"
        assert not self._leases() or self._renewing or self._renew_at is not None, "leases that nobody renews"

    def _event(self, event: e.Event, now: float) -> list[e.Action]:
        match event:
            case e.EngineStepped():
                return self._stepped(event.replica_id, event.events, now)
            case e.DeliveryArrived():
                return self._delivered(event, now)
            case e.ClaimAnswered():
                return self._claimed(event.token, event.answer, now)
            case e.Tokenised():
                return self._tokenised(event, now)
            case e.TokeniseFailed():
                run = self.runs.get(event.token)
                return [] if run is None else self._fail(run, event.failure, now)
            case e.CancelArrived():
                return self._cancel(event.message, now)
            case e.LoadAsked():
                return self._load(event.message, event.reply, now)
            case e.StopAsked():
                return self._stop(event.message, event.reply, now)
            case e.DrainAsked():
                return self._drain(now)
            case e.LeaseAnswered():
                replica = self.replicas[event.replica_id]
                free = self.limits.memory_total_bytes - self.memory_used_bytes + replica.memory_bytes
                return replica.lease_answered(event.answer, now, free_bytes=free)
            case e.LeasesRenewed():
                return self._renewed(event, now)
            case e.BusLost():
                self._bus_away = True
                return []
            case e.BusBack():
                return self._bus_back(now)
            case e.ServerChanged():
                return self._server_changed(event.server_id)
            case e.ServerSeen():
                return self._server_seen(event.segment)
            case e.SegmentPrepared():
                return []
            case e.AttachProgressed():
                return self.replicas[event.replica_id].attach_progressed(event.done_bytes, event.total_bytes, now)
            case e.ChunksConsumed():
                return self.replicas[event.replica_id].chunks_consumed(event.chunks)
            case e.Attached():
                return self.replicas[event.replica_id].attached(event.loaded, now)
            case e.AttachFailed():
                return self.replicas[event.replica_id].attach_failed(event.failure, now)
            case e.Detached():
                return self.replicas[event.replica_id].detached(now)
            case e.PullerOpened():
                return self.replicas[event.replica_id].puller_opened(event.puller, now)
            case e.PullerFailed():
                return self.replicas[event.replica_id].puller_failed(event.failure, now)
            case e.PullerClosed():
                return self.replicas[event.replica_id].puller_closed(now)
            case e.RecordRemoved():
                return self._removed(event.replica_id)
        assert_never(event)

    # -- replicas

    def _load(self, message: LoadReplica, reply: e.Reply, now: float) -> list[e.Action]:
        refusal = self._refusal(message)
        if refusal is not None:
            return [e.ReplyTo(reply, refusal)]
        if message.replica_id in self.replicas:
            return [e.ReplyTo(reply, Done())]
        replica = Replica(
            message,
            worker_id=self.limits.worker_id,
            server_id=self.limits.server_id,
            reserved_bytes=self._needed_bytes(message),
            engine=self.limits.engine or message.engine or "auto",
            keeps_lease=not self.limits.weights_on_device,
            kv_bytes_max=self.limits.kv_bytes_max,
            lease_ttl_s=self.limits.lease_ttl_s,
            now=now,
        )
        self.replicas[replica.id] = replica
        return [e.ReplyTo(reply, Done()), *replica.begin()]

    def _needed_bytes(self, message: LoadReplica) -> int:
        weights = message.checkpoint.weight_bytes if message.checkpoint and self.limits.weights_on_device else 0
        return message.kv_bytes + weights

    def _refusal(self, message: LoadReplica) -> Failure | None:
        known = self.replicas.get(message.replica_id)
        if known is not None:
            leaving = known.state is ReplicaState.DRAINING
            return Failure(code=Code.BUSY, message=f"Replica {known.id} is leaving.") if leaving else None
        if self.draining:
            return Failure(code=Code.DRAINING, message=f"Worker {self.limits.worker_id} is shutting down.")
        if len(self.replicas) >= self.limits.max_replicas:
            return Failure(
                code=Code.OUT_OF_MEMORY,
                message=f"Worker {self.limits.worker_id} holds {len(self.replicas)} replicas and takes no more.",
            )
        needed, free = self._needed_bytes(message), self.limits.memory_total_bytes - self.memory_used_bytes
        if needed > free:
            return Failure(
                code=Code.OUT_OF_MEMORY,
                message=f"{size(needed)} are needed and worker {self.limits.worker_id} has {size(max(0, free))} free.",
            )
        return None

    def _stop(self, message: StopReplica, reply: e.Reply, now: float) -> list[e.Action]:
        replica = self.replicas.get(message.replica_id)
        if replica is None:  # it is so already
            return [e.ReplyTo(reply, Done())]
        refusal = replica.refusal_of_stop(message)
        if refusal is not None:
            return [e.ReplyTo(reply, refusal)]
        actions = [e.ReplyTo(reply, Done()), *replica.leave(now)]
        if message.abort:
            actions += self._give_back_all(replica, now)
        return actions

    def _removed(self, replica_id: str) -> list[e.Action]:
        replica = self.replicas.pop(replica_id)
        replica.record_removed()
        actions: list[e.Action] = [e.RecordWorker()]
        if replica.failure is not None:
            told = ReplicaFailed(
                replica_id=replica.id,
                deployment=replica.message.deployment,
                worker_id=self.limits.worker_id,
                failure=replica.failure,
            )
            actions.append(e.PublishFailed(told))
        return actions

    def _drain(self, now: float) -> list[e.Action]:
        if self.draining:
            return []
        self.draining = True
        self._give_back_at = now + self.limits.drain_s
        return [action for replica in self.replicas.values() for action in replica.leave(now)]

    def _renewed(self, event: e.LeasesRenewed, now: float) -> list[e.Action]:
        self._renewing = False
        asked_at, asked = self._renewal
        answer = event.answer
        if isinstance(answer, Failure):
            self._renew_at = now + min(RENEW_AGAIN_S, self.limits.lease_ttl_s / 3)
            return self._unrenewed(event.unserved, asked_at, asked, answer, now)
        actions: list[e.Action] = []
        for replica in self._leasing(asked):
            assert replica.lease is not None
            if replica.lease.lease_id in answer.unknown:
                # Its bytes may become another checkpoint's at any moment: not one more token from them.
                actions += self._lose(replica, "The store has dropped the lease.", now)
            else:
                actions += replica.renewed(asked_at + self.limits.lease_ttl_s)
        return actions

    def _unrenewed(
        self, unserved: bool, asked_at: float, asked: tuple[str, ...], failure: Failure, now: float
    ) -> list[e.Action]:
        """The store did not answer. The bytes stay mapped, and it is asked again and again.

        While no store is on the bus nobody can drop a lease, and one that comes back keeps those that it has promised
        for a whole `ttl_s`: that is as good as a renewal. A store that is there but silent may have dropped it: engines
        stand still from the end of the lease on (`AllowEngine`), and after the same time once more their requests go
        elsewhere. While this worker itself is cut off it waits, as nobody would hear it anyway. Only what waits for
        bytes to arrive has nothing to stand on without a store.
        """
        ttl_s = self.limits.lease_ttl_s
        actions: list[e.Action] = []
        for replica in self._leasing(asked):
            lost_at = max(replica.safe_until, self._bus_back_at) + (0.0 if replica.arriving else ttl_s)
            if unserved and not replica.arriving:
                actions += replica.renewed(max(replica.safe_until, asked_at + ttl_s))
            elif now >= lost_at and not self._bus_away:
                reason = f"The store has not renewed the lease within {ttl_s:g} s: {failure.message}"
                actions += self._lose(replica, reason, now)
        return actions

    def _leasing(self, lease_ids: tuple[str, ...]) -> list[Replica]:
        return [r for r in self.replicas.values() if r.leased and r.lease is not None and r.lease.lease_id in lease_ids]

    def _lose(self, replica: Replica, reason: str, now: float) -> list[e.Action]:
        failure = Failure(code=Code.CHECKPOINT_UNAVAILABLE, message=reason)
        return [*replica.fail(failure, now), *self._give_back_all(replica, now)]

    def _bus_back(self, now: float) -> list[e.Action]:
        self._bus_away, self._bus_back_at = False, now
        if self._renew_at is not None:
            self._renew_at = now
        return self._look()

    # -- the server's memory

    def _server_changed(self, server_id: str) -> list[e.Action]:
        return self._look() if server_id == self.limits.server_id else []

    def _look(self) -> list[e.Action]:
        if self._looking:
            self._look_again = True
            return []
        self._looking = True
        return [e.LookAtServer()]

    def _server_seen(self, segment: str) -> list[e.Action]:
        self._looking = False
        actions: list[e.Action] = []
        if segment and segment != self._segment:
            self._segment = segment
            actions.append(e.PrepareSegment(segment))
        if self._look_again:
            self._look_again = False
            actions += self._look()
        return actions

    def _leases(self) -> tuple[str, ...]:
        return tuple(r.lease.lease_id for r in self.replicas.values() if r.leased and r.lease is not None)

    # -- requests

    def _delivered(self, event: e.DeliveryArrived, now: float) -> list[e.Action]:
        actions: list[e.Action] = []
        replica = self.replicas.get(event.replica_id)
        if replica is None or not replica.take(event.token):
            return [e.Nak(event.token)]
        older = self._by_request.get(event.request.request_id)
        run = Run(request=event.request, token=event.token, delivery=event.delivery, replica=replica)
        if older is not None:
            # The queue took the older delivery back. Its token is void: neither acknowledged nor given back.
            actions += self._over(older, "superseded", now)
        self.runs[run.token] = run
        self._by_request[run.request.request_id] = run
        return [*actions, self._claim(run, now)]

    def _claim(self, run: Run, now: float) -> e.ClaimRequest:
        run.asked_at = now
        message = Claim(
            request_id=run.request.request_id,
            worker_id=self.limits.worker_id,
            replica_id=run.replica.id,
            delivery=run.delivery,
        )
        return e.ClaimRequest(run.token, run.request.gateway_id, message)

    def _claimed(self, token: str, answer: Claimed | Gone | Failure, now: float) -> list[e.Action]:
        run = self.runs.get(token)
        if run is None:
            return []
        match answer:
            case Gone():
                return [e.Ack(token), *self._over(run, "gone", now)]
            case Failure(code=Code.STALE_EPOCH):
                # A later delivery was claimed: this token is void, and the message is that owner's safety net.
                return self._over(run, "superseded", now)
            case Failure():
                if run.tries < len(CLAIM_RETRIES_S):
                    run.retry_at = now + CLAIM_RETRIES_S[run.tries]
                    run.tries += 1
                    self._retries[token] = run
                    return []
                if run.delivery < self.limits.max_deliveries:
                    # It may be cut off and come back: the request goes back to the queue for a while.
                    return [e.Nak(token, GATEWAY_AWAY_S), *self._over(run, answer.code.value, now)]
                # The gateway is dead, and its clients' connections with it: nobody waits.
                return [e.Ack(token), *self._over(run, answer.code.value, now)]
            case Claimed():
                run.claimed, run.claimed_at = answer, now
                run.state = RunState.TOKENISING
                ledger = run.replica.ledger(waited_s=answer.waited_s, now=run.asked_at)
                run.ledger = msgspec.structs.replace(ledger, recoveries=max(0, run.owners - 1))
                if run.cancelled is not None and answer.epoch <= run.cancelled.epoch:
                    return self._cancel(run.cancelled, now)
                if run.owners > self.limits.max_deliveries:
                    return self._fail(run, self._lost(run), now)
                loaded = run.replica.loaded
                assert loaded is not None, "a request before the model"
                return [e.Tokenise(token, run.request, loaded.tokenizer)]
        assert_never(answer)

    def _tokenised(self, event: e.Tokenised, now: float) -> list[e.Action]:
        run = self.runs.get(event.token)
        if run is None:
            return []
        loaded, claimed = run.replica.loaded, run.claimed
        assert loaded is not None, "a request before the model"
        assert claimed is not None, "tokens before the claim"
        prompt_tokens = len(event.token_ids)
        limit = limit_tokens(run.request, prompt_tokens=prompt_tokens, max_context_tokens=loaded.max_context_tokens)
        if isinstance(limit, Failure):
            return self._fail(run, limit, now)
        generation = run.generation = Generation(
            request=run.request,
            epoch=claimed.epoch,
            tokenizer=loaded.tokenizer,
            prompt_tokens=prompt_tokens,
            limit_tokens=limit,
            so_far=claimed.token_ids,
            echo_text=event.echo_text,
        )
        if generation.finished is not None:
            # The client has every token already, or wants none: only the end is missing.
            end = self._end_of(run, generation.finished, 0)
            return [self._publish(run, [end]), e.Ack(run.token), *self._over(run, generation.finished.value, now)]
        run.state = RunState.RUNNING
        self._sequences[run.sequence_id] = run
        return [
            e.SubmitSequence(
                engine=loaded.engine,
                sequence_id=run.sequence_id,
                token_ids=event.token_ids + claimed.token_ids,
                first_index=generation.index,
                max_new_tokens=limit - generation.index,
                sampling=run.request.sampling,
            )
        ]

    def _stepped(self, replica_id: str, steps: Sequence[EngineEvent], now: float) -> list[e.Action]:
        died = next((event.failure for event in steps if isinstance(event, EngineDied)), None)
        touched: dict[str, Run] = {}
        ends: dict[str, SequenceEnd] = {}
        for event in steps:
            match event:
                case StepToken():
                    run = self._sequences.get(event.sequence_id)
                    if run is None or run.generation is None:
                        continue  # over already: cancelled, given back, superseded
                    run.generation.push(event.token_id, event.logprobs)
                    touched[event.sequence_id] = run
                    if run.first_token_at is None:
                        run.first_token_at = now
                    run.last_token_at = now
                    run.replica.generated_tokens += 1
                case SequenceEnd():
                    if event.sequence_id in self._sequences:
                        touched[event.sequence_id] = self._sequences[event.sequence_id]
                        ends[event.sequence_id] = event
                case EngineDied() | KvShort():
                    pass
                case _:
                    assert_never(event)
        batches: dict[str, list[Frame | End]] = {}
        after: list[e.Action] = []
        for sequence_id, run in touched.items():
            items = batches.setdefault(run.request.gateway_id, [])
            after += self._settle(run, ends.get(sequence_id), died is not None, items, now)
        actions: list[e.Action] = [
            e.PublishFrames(gateway_id, FrameBatch(worker_id=self.limits.worker_id, items=tuple(items)))
            for gateway_id, items in batches.items()
            if items
        ]
        actions += after
        if died is not None and replica_id in self.replicas:
            replica = self.replicas[replica_id]
            actions += replica.fail(died, now)
            actions += self._give_back_all(replica, now)
        return actions

    def _settle(
        self, run: Run, ended: SequenceEnd | None, died: bool, items: list[Frame | End], now: float
    ) -> list[e.Action]:
        """Frames of one request after one step into `items`, its end too if it ended; what is to be done after that."""
        generation = run.generation
        assert generation is not None
        frame = generation.frame()
        if frame is not None:
            items.append(frame)
        reason = generation.finished
        if reason is None and ended is not None:
            match ended.reason:
                case EndReason.STOP:
                    reason = FinishReason.STOP
                case EndReason.LENGTH:
                    reason = FinishReason.LENGTH
                case EndReason.FAILED | EndReason.CANCELLED:
                    if died:
                        return []  # its requests go back to the queue together
                    if ended.failure is None:
                        return self._give_back(run, now)
                    items.append(generation.failed(ended.failure, ledger=self._ledger(run)))
                    return [e.Ack(run.token), *self._over(run, ended.failure.code.value, now)]
        if reason is None:
            return []
        end = self._end_of(run, reason, ended.cached_tokens if ended else 0)
        items.append(end)
        outcome = end.reason.value if end.reason else reason.value
        return [e.Ack(run.token), *self._over(run, outcome, now, sequence_ended=ended is not None)]

    def _cancel(self, message: Cancel, now: float) -> list[e.Action]:
        run = self._by_request.get(message.request_id)
        if run is None:
            return []
        if run.claimed is None:  # the claim's answer may be on its way: it will tell which epoch this is
            run.cancelled = message
            return []
        if run.epoch > message.epoch:
            return []
        if message.requeue:
            return self._give_back(run, now)
        return [e.Ack(run.token), *self._over(run, "cancelled", now)]

    def _give_back_all(self, replica: Replica, now: float) -> list[e.Action]:
        return [action for token in list(replica.held) for action in self._give_back(self.runs[token], now)]

    def _give_back(self, run: Run, now: float) -> list[e.Action]:
        """Let another worker go on with it; unless too many have tried."""
        if run.claimed is not None and run.owners >= self.limits.max_deliveries:
            return self._fail(run, self._lost(run), now)
        return [e.Nak(run.token), *self._over(run, "given_back", now)]

    def _lost(self, run: Run) -> Failure:
        return Failure(
            code=Code.WORKER_LOST, message=f"{run.owners} workers have tried this request and were interrupted."
        )

    def _fail(self, run: Run, failure: Failure, now: float) -> list[e.Action]:
        """End it by a failure that its client hears."""
        if run.generation is not None:
            end = run.generation.failed(failure, ledger=self._ledger(run))
        else:
            so_far = len(run.claimed.token_ids) if run.claimed else 0
            end = End(
                request_id=run.request.request_id, epoch=run.epoch, index=so_far, failure=failure, ledger=run.ledger
            )
        return [self._publish(run, [end]), e.Ack(run.token), *self._over(run, failure.code.value, now)]

    def _end_of(self, run: Run, reason: FinishReason, cached_tokens: int) -> End:
        assert run.generation is not None
        return run.generation.end(reason, ledger=self._ledger(run), cached_tokens=cached_tokens)

    def _ledger(self, run: Run) -> Ledger:
        if run.first_token_at is None:
            return run.ledger
        return msgspec.structs.replace(
            run.ledger,
            prefill_s=run.first_token_at - run.claimed_at,
            decode_s=run.last_token_at - run.first_token_at,
        )

    def _publish(self, run: Run, items: list[Frame | End]) -> e.PublishFrames:
        batch = FrameBatch(worker_id=self.limits.worker_id, items=tuple(items))
        return e.PublishFrames(run.request.gateway_id, batch)

    def _over(self, run: Run, outcome: str, now: float, *, sequence_ended: bool = False) -> list[e.Action]:
        """Forget a request and free its slot. What the queue and the gateway hear, the caller has said."""
        actions: list[e.Action] = []
        if run.state is RunState.RUNNING:
            del self._sequences[run.sequence_id]
            if not sequence_ended and run.replica.loaded is not None:
                actions.append(e.CancelSequence(run.replica.loaded.engine, run.sequence_id))
        del self.runs[run.token]
        del self._by_request[run.request.request_id]
        self._retries.pop(run.token, None)
        run.replica.finished_requests += outcome not in ("given_back", "superseded")
        ledger, generation = self._ledger(run), run.generation
        actions.append(
            e.RequestFinished(
                request_id=run.request.request_id,
                deployment=run.request.deployment,
                replica_id=run.replica.id,
                outcome=outcome,
                epoch=run.epoch,
                delivery=run.delivery,
                cold=ledger.cold,
                tier=ledger.tier,
                prompt_tokens=generation.prompt_tokens if generation else 0,
                completion_tokens=generation.index if generation else 0,
                resumed_tokens=generation.resumed_tokens if generation else 0,
                queue_s=ledger.queue_s,
                prefill_s=ledger.prefill_s,
                decode_s=ledger.decode_s,
            )
        )
        return [*actions, *run.replica.give_up(run.token, now)]

    # -- time

    def _time(self, now: float) -> list[e.Action]:
        actions: list[e.Action] = []
        for run in [run for run in self._retries.values() if run.retry_at is not None and run.retry_at <= now]:
            del self._retries[run.token]
            run.retry_at = None
            actions.append(self._claim(run, now))
        for replica in self.replicas.values():
            if replica.retry_at is not None and replica.retry_at <= now:
                actions += replica.advance(now)
        if self._beat_at is not None and self._beat_at <= now:
            self._beat_at = None
            actions += self._spent(now)
            if self.runs:
                actions.append(e.InProgress(tuple(self.runs)))
        if self._renew_at is not None and self._renew_at <= now:
            self._renew_at, self._renewing = None, True
            self._renewal = (now, self._leases())
            actions.append(e.RenewLeases(self._renewal[1]))
        if self._give_back_at is not None and self._give_back_at <= now:
            self._give_back_at = None
            for replica in list(self.replicas.values()):
                actions += self._give_back_all(replica, now)
        return actions

    def _spent(self, now: float) -> list[e.Action]:
        failure = Failure(code=Code.DEADLINE_EXCEEDED, message="The request did not finish within its time.")
        spent = [
            run
            for run in self.runs.values()
            if run.claimed is not None and now > run.claimed_at + run.claimed.budget_s + BUDGET_GRACE_S
        ]
        return [action for run in spent for action in self._fail(run, failure, now)]

    def _set_timers(self, now: float) -> None:
        if not self.runs:
            self._beat_at = None
        elif self._beat_at is None:
            self._beat_at = now + self.limits.ack_wait_s / 3
        if self._renewing:
            return
        if not self._leases():
            self._renew_at = None
        elif self._renew_at is None:
            self._renew_at = now + self.limits.lease_ttl_s / 3
