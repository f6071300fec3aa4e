"""The requests of a worker, from the queue's delivery to their end: claims, frames, giving back. Pure.

A request in here is a `Run`: claiming → tokenising → running, and over. Its key is the token of its delivery, so that
an answer that comes too late finds nothing and is dropped. A gateway's claim is the only way to own a request; the
queue's acknowledgement follows the request's end, never precedes it. How many owners a request may lose is the
gateway's business: here it is only given back, and the gateway told whether that was the request's fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol, assert_never

import msgspec

from services.worker import events as e
from services.worker.generation import Generation, limit_tokens
from services.worker.holds import Holdings
from services.worker.ports import EndReason, EngineEvent, SequenceEnd, StepToken
from services.worker.replica import Replica
from services.worker.run import Limits, Run, RunState
from services.worker.speeds import RunningTokens
from shared.contracts.generation import End, FinishReason, Frame, FrameBatch, GivenBack, Ledger
from shared.contracts.migration import RequestList, RunningRequest
from shared.contracts.requests import Cancel, Check, Claimed, Gone, Owned, Running, Unwanted
from shared.errors import Code, Failure

CLAIM_RETRIES_S: Final = (0.2, 0.5, 1.0)
GATEWAY_AWAY_S: Final = 3.0  # until a request whose gateway does not answer is handed out again
BUSY_S: Final = 1.0  # until a request that its gateway will not have run now is handed out again
# The gateway ends a request whose budget is spent; the worker does so itself only if no cancel has come by then.
BUDGET_GRACE_S: Final = 2.0


class Departures(Protocol):
    """The source side of migrations, as far as runs must tell it: see `outgoing.py`."""

    def token_sent(self, run: Run, now: float) -> list[e.Action]:
        """A frame of a request in a migration is on its way."""

    def over(self, run: Run, now: float) -> list[e.Action]:
        """A request in a migration is over here."""

    def superseded(self, run: Run, now: float) -> list[e.Action]:
        """A frozen request is somebody else's."""


class Landings(Protocol):
    """The destination side of migrations, as far as runs must tell it: see `incoming.py`."""

    def claimed(self, run: Run, now: float) -> list[e.Action]:
        """A request that was handed over is this worker's."""

    def refused(self, run: Run, failure: Failure, now: float) -> list[e.Action]:
        """It is not, and will not be."""


class Runs:
    """See the module. `departures` and `landings` are set once, by the core."""

    departures: Departures
    landings: Landings

    def __init__(self, limits: Limits, replicas: Mapping[str, Replica]) -> None:
        self.limits: Final = limits
        self.by_token: dict[str, Run] = {}
        self.by_request: dict[str, Run] = {}
        self._replicas: Final = replicas
        self._sequences: dict[str, Run] = {}
        self._retries: dict[str, Run] = {}
        self._holdings: Final = Holdings(hold_s=limits.hold_s, lost_s=limits.gateway_lost_s)
        self._beat_at: float | None = None
        self._begun = 0

    def deadline(self) -> list[float | None]:
        """When time matters."""
        return [self._beat_at, self._holdings.due_at, *(run.retry_at for run in self._retries.values())]

    def check(self) -> None:
        """Assert the invariants of requests."""
        assert list(self.by_request.values()) == list(self.by_token.values()), "a request twice"
        for token, run in self.by_token.items():
            assert token == run.token
            assert token in run.replica.held, "a request without a slot"
            assert self._replicas[run.replica.id] is run.replica
            running = run.state is RunState.RUNNING
            assert (self._sequences.get(run.sequence_id) is run) == running, "a sequence without a request"
            assert (run.claimed is None) == (run.state is RunState.CLAIMING)
            assert not running or run.replica.loaded is not None, "a sequence without an engine"
            assert not run.frozen or (running and run.departure is not None), "frozen without a migration"
        assert all(self.by_token.get(run.token) is run for run in self._sequences.values())
        assert all(self.by_token.get(run.token) is run and run.retry_at is not None for run in self._retries.values())
        assert not self.by_token or self._beat_at is not None, "the queue would take the requests back"

    # -- the way in

    def delivered(self, event: e.DeliveryArrived, now: float) -> list[e.Action]:
        """The queue gave a request to a replica."""
        actions: list[e.Action] = []
        replica = self._replicas.get(event.replica_id)
        older = self.by_request.get(event.request.request_id)
        late = older is not None and older.sequence == event.sequence and event.delivery < older.delivery
        if late or event.token in self.by_token:
            # A queue that was killed may have forgotten its last deliveries, and repeats them; one that was on its way
            # then may come after the next one. Neither gives nor takes anything.
            return [] if replica is None else replica.take_again(now)
        if replica is None or not replica.take(event.token):
            return [e.Nak(event.token)]
        run = Run(
            request=event.request,
            token=event.token,
            delivery=event.delivery,
            replica=replica,
            sequence=event.sequence,
        )
        if older is not None:
            # The queue took the older delivery back. Its token is void: neither acknowledged nor given back.
            actions += self.over(older, "superseded", now)
        return [*actions, *self.begin(run, now)]

    def begin(self, run: Run, now: float) -> list[e.Action]:
        """Claim a request that has a slot."""
        self.by_token[run.token] = run
        self.by_request[run.request_id] = run
        return [self._claim(run, now)]

    def _claim(self, run: Run, now: float) -> e.ClaimRequest:
        run.asked_at = now
        message = run.claim(
            self.limits.worker_id,
            after_epoch=run.landing.epoch if run.landing else -1,
            claim_id=run.landing.migration_id if run.landing else "",
        )
        return e.ClaimRequest(run.token, run.request.gateway_id, message)

    def claimed(self, event: e.ClaimAnswered, now: float) -> list[e.Action]:
        """The gateway's answer to a claim."""
        token, answer = event.token, event.answer
        run = self.by_token.get(token)
        if run is None or run.state is not RunState.CLAIMING:
            return []
        unheard = isinstance(answer, Failure) and answer.code not in (Code.STALE_EPOCH, Code.BUSY)
        if unheard and run.tries < len(CLAIM_RETRIES_S):
            run.retry_at = now + CLAIM_RETRIES_S[run.tries]
            run.tries += 1
            self._retries[token] = run
            return []
        if run.landing is not None:
            return self._landed(run, answer, now)
        match answer:
            case Gone():
                return [e.Ack(token), *self.over(run, "gone", now)]
            case Failure(code=Code.STALE_EPOCH):
                # A later delivery was claimed: this token is void, and the message is that owner's safety net.
                return self.over(run, "superseded", now)
            case Failure(code=Code.BUSY):
                return [e.Nak(token, BUSY_S), *self.over(run, "deferred", now)]
            case Failure():
                if event.unserved and run.delivery >= self.limits.max_deliveries:
                    # The gateway is dead, and its clients' connections with it: nobody waits.
                    return [e.Ack(token), *self.over(run, answer.code.value, now)]
                # One that is on the bus and silent may live; one that is not may be cut off and come back.
                return [e.Nak(token, GATEWAY_AWAY_S), *self.over(run, answer.code.value, now)]
            case Claimed():
                self._own(run, answer, now)
                run.ledger = run.replica.ledger(waited_s=answer.waited_s, now=run.asked_at)
                run.state = RunState.TOKENISING
                if run.cancelled is not None and answer.epoch <= run.cancelled.epoch:
                    return self.cancel(run.cancelled, now)
                loaded = run.replica.loaded
                assert loaded is not None, "a request before the model"
                return [e.Tokenise(token, run.request, loaded.tokenizer)]
        assert_never(answer)

    def _landed(self, run: Run, answer: Claimed | Gone | Failure, now: float) -> list[e.Action]:
        """The answer to the claim of a request that was handed over. Its source settles with the queue if it is not
        ours."""
        match answer:
            case Gone():
                failure = Failure(code=Code.CANCELLED, message="Nobody waits for the request any more.")
                return [*self.landings.refused(run, failure, now), *self.over(run, "gone", now)]
            case Failure():
                return [*self.landings.refused(run, answer, now), *self.over(run, answer.code.value, now)]
            case Claimed():
                self._own(run, answer, now)
                run.state = RunState.TOKENISING  # done already, by the source
                actions = self.landings.claimed(run, now)
                if run.cancelled is not None and answer.epoch <= run.cancelled.epoch:
                    return [*actions, *self.cancel(run.cancelled, now)]
                if run.doomed:
                    return [*actions, *self.give_back(run, now, fault=run.fault)]
                return [*actions, *self.generate(run, now)]
        assert_never(answer)

    def _own(self, run: Run, answer: Claimed, now: float) -> None:
        run.own(answer, now)
        self._holdings.began(run.request.gateway_id, now)

    def tokenised(self, event: e.Tokenised, now: float) -> list[e.Action]:
        """The prompt's token ids are known."""
        run = self.by_token.get(event.token)
        if run is None:
            return []
        run.prompt_ids, run.echo_text = event.token_ids, event.echo_text
        return self.generate(run, now)

    def tokenise_failed(self, event: e.TokeniseFailed, now: float) -> list[e.Action]:
        """The prompt cannot be tokenised."""
        run = self.by_token.get(event.token)
        return [] if run is None else self._fail(run, event.failure, now)

    def generate(self, run: Run, now: float) -> list[e.Action]:
        """Go on after the prompt and the tokens that the client has."""
        loaded, claimed = run.replica.loaded, run.claimed
        assert loaded is not None, "a request before the model"
        assert claimed is not None, "tokens before the claim"
        prompt_tokens = len(run.prompt_ids)
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
            echo_text=run.echo_text,
        )
        if generation.finished is not None:
            # The client has every token already, or wants none: only the end is missing.
            end = self._end_of(run, generation.finished, 0)
            return [self._publish(run, [end]), e.Ack(run.token), *self.over(run, generation.finished.value, now)]
        run.state = RunState.RUNNING
        # Not by the epoch alone: whoever claims a delivery twice gets the same one, and the engine may have yet to end
        # the sequence of the first claim.
        self._begun += 1
        run.sequence_id = f"{run.request_id}.{claimed.epoch}.{self._begun}"
        run.submitted_at = now
        self._sequences[run.sequence_id] = run
        return [
            e.SubmitSequence(
                engine=loaded.engine,
                sequence_id=run.sequence_id,
                token_ids=run.prompt_ids + claimed.token_ids,
                first_index=generation.index,
                max_new_tokens=limit - generation.index,
                sampling=run.request.sampling,
            )
        ]

    # -- tokens

    def stepped(self, steps: Sequence[EngineEvent], now: float, *, died: bool) -> list[e.Action]:
        """What one step of an engine brought; sequences that are no requests are left alone."""
        touched: dict[str, Run] = {}
        ends: dict[str, SequenceEnd] = {}
        for event in steps:
            if not isinstance(event, StepToken | SequenceEnd):
                continue
            run = self._sequences.get(event.sequence_id)
            if run is None:
                continue  # over already: cancelled, given back, superseded
            touched[event.sequence_id] = run
            if isinstance(event, SequenceEnd):
                ends[event.sequence_id] = event
                continue
            assert run.generation is not None
            run.generation.push(event.token_id, event.logprobs)
            run.token_came(now)
            run.replica.generated_tokens += 1
        batches: dict[str, list[Frame | End]] = {}
        after: list[e.Action] = []
        for sequence_id, run in touched.items():
            items = batches.setdefault(run.request.gateway_id, [])
            after += self._settle(run, ends.get(sequence_id), died, items, now)
        actions: list[e.Action] = [
            e.PublishFrames(gateway_id, FrameBatch(worker_id=self.limits.worker_id, items=tuple(items)))
            for gateway_id, items in batches.items()
            if items
        ]
        return actions + after

    def _settle(
        self, run: Run, ended: SequenceEnd | None, died: bool, items: list[Frame | End], now: float
    ) -> list[e.Action]:
        """Frames of one request after one step into `items`, its end too if it ended; what is to be done after that."""
        generation = run.generation
        assert generation is not None
        if ended is not None:
            run.sequence_ended(ended.cached_tokens)
        if run.frozen:
            run.ended = ended or run.ended
            return []
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
                        return self.give_back(run, now)
                    items.append(generation.failed(ended.failure, ledger=self.ledger(run)))
                    return [e.Ack(run.token), *self.over(run, ended.failure.code.value, now)]
        if reason is None:
            return self.departures.token_sent(run, now) if frame is not None and run.departure is not None else []
        end = self._end_of(run, reason, ended.cached_tokens if ended else 0)
        items.append(end)
        outcome = end.reason.value if end.reason else reason.value
        return [e.Ack(run.token), *self.over(run, outcome, now, sequence_ended=ended is not None)]

    def thaw(self, run: Run, claimed: Claimed, now: float) -> list[e.Action]:
        """A frozen request stays here, at a new epoch: emit what piled up, and go on."""
        generation = run.generation
        assert run.frozen and generation is not None
        run.frozen = False
        run.own(claimed, now)
        generation.epoch = claimed.epoch
        if run.doomed or len(claimed.token_ids) != generation.emitted:  # or frames were lost before
            return self.give_back(run, now, fault=run.fault)
        items: list[Frame | End] = []
        after = self._settle(run, run.ended, False, items, now)
        return [self._publish(run, items), *after] if items else after

    # -- giving back and ending

    def cancel(self, message: Cancel, now: float) -> list[e.Action]:
        """A gateway wants a request to be left alone."""
        run = self.by_request.get(message.request_id)
        if run is None:
            return []
        if run.claimed is None:  # the claim's answer may be on its way: it will tell which epoch this is
            run.cancelled = message
            return []
        if run.epoch > message.epoch:
            return []
        if message.superseded:
            return self._superseded(run, now)
        if message.requeue:
            return self.give_back(run, now)
        return [e.Ack(run.token), *self.over(run, "cancelled", now)]

    def _superseded(self, run: Run, now: float) -> list[e.Action]:
        if run.frozen:  # by the destination: the migration is done
            return self.departures.superseded(run, now)
        return self.over(run, "superseded", now)

    def give_back_all(self, replica: Replica, now: float, *, fault: bool = False) -> list[e.Action]:
        """Let other workers go on with all that runs in a replica."""
        runs = [self.by_token[token] for token in list(replica.held) if token in self.by_token]
        for run in runs:
            run.doomed = True  # so that the end of one migration is not the turn of the next that ends, too
        return [action for run in runs for action in self.give_back(run, now, fault=fault)]

    def give_back(self, run: Run, now: float, *, fault: bool = False) -> list[e.Action]:
        """Let another worker go on with it. `fault`: it may be to blame for what happened here."""
        if run.frozen or (run.landing is not None and run.claimed is None):
            # Whether it is ours is being found out just now; if it is, it is given back then.
            run.doomed, run.fault = True, run.fault or fault
            return []
        actions: list[e.Action] = []
        if run.claimed is not None:
            told = GivenBack(request_id=run.request_id, epoch=run.epoch, fault=fault)
            batch = FrameBatch(worker_id=self.limits.worker_id, items=(), given_back=(told,))
            actions.append(e.PublishFrames(run.request.gateway_id, batch))
        return [*actions, e.Nak(run.token), *self.over(run, "given_back", now)]

    def _fail(self, run: Run, failure: Failure, now: float) -> list[e.Action]:
        """End it by a failure that its client hears."""
        if run.generation is not None:
            end = run.generation.failed(failure, ledger=self.ledger(run))
        else:
            so_far = len(run.claimed.token_ids) if run.claimed else 0
            end = End(request_id=run.request_id, epoch=run.epoch, index=so_far, failure=failure, ledger=run.ledger)
        return [self._publish(run, [end]), e.Ack(run.token), *self.over(run, failure.code.value, now)]

    def _end_of(self, run: Run, reason: FinishReason, cached_tokens: int) -> End:
        assert run.generation is not None
        return run.generation.end(reason, ledger=self.ledger(run), cached_tokens=cached_tokens)

    def ledger(self, run: Run) -> Ledger:
        """What the end of a request would carry if it came now: this worker's seconds, and those of the ones before."""
        if run.first_token_at is None:
            return run.ledger
        before = run.ledger
        return msgspec.structs.replace(
            before,
            prefill_s=before.prefill_s + run.first_token_at - run.claimed_at,
            decode_s=before.decode_s + run.last_token_at - run.first_token_at,
        )

    def _publish(self, run: Run, items: list[Frame | End]) -> e.PublishFrames:
        batch = FrameBatch(worker_id=self.limits.worker_id, items=tuple(items))
        return e.PublishFrames(run.request.gateway_id, batch)

    def over(self, run: Run, outcome: str, now: float, *, sequence_ended: bool = False) -> list[e.Action]:
        """Forget a request and free its slot. What the queue and the gateway hear, the caller has said."""
        actions: list[e.Action] = []
        if run.departure is not None:
            actions += self.departures.over(run, now)
        if run.landing is not None:  # the queue gave it to this worker meanwhile
            failure = Failure(code=Code.CONFLICT, message="The queue has given the request to this worker, too.")
            actions += self.landings.refused(run, failure, now)
        if run.state is RunState.RUNNING:
            del self._sequences[run.sequence_id]
            if not (sequence_ended or run.ended) and run.replica.loaded is not None:
                actions.append(e.CancelSequence(run.replica.loaded.engine, run.sequence_id))
        del self.by_token[run.token]
        del self.by_request[run.request_id]
        self._retries.pop(run.token, None)
        finished = outcome not in ("given_back", "superseded", "deferred", "migrated")
        run.replica.finished_requests += finished
        run.replica.cut_requests += finished and outcome not in ("stop", "length")
        ledger, generation = self.ledger(run), run.generation
        actions.append(
            e.RequestFinished(
                request_id=run.request_id,
                deployment=run.request.deployment,
                replica_id=run.replica.id,
                outcome=outcome,
                epoch=run.epoch,
                delivery=run.delivery,
                cold=ledger.cold,
                tier=ledger.tier,
                prompt_tokens=generation.prompt_tokens if generation else 0,
                completion_tokens=generation.emitted if generation else 0,
                resumed_tokens=generation.resumed_tokens if generation else 0,
                queue_s=ledger.queue_s,
                prefill_s=ledger.prefill_s - run.ledger.prefill_s,
                decode_s=ledger.decode_s - run.ledger.decode_s,
            )
        )
        return [*actions, *run.replica.give_up(run.token, now)]

    # -- who still wants what

    def checked(self, message: Check) -> Running:
        """Which of these requests run here. One whose claim is under way counts: its answer may have been lost."""
        found: list[Owned] = []
        for asked in message.requests:
            run = self.by_request.get(asked.request_id)
            if run is None:
                continue
            if run.claimed is None:
                found.append(asked)
            elif run.epoch == asked.epoch:
                found.append(Owned(request_id=asked.request_id, epoch=run.epoch, index=run.emitted_tokens))
        return Running(requests=tuple(found))

    def held(self, event: e.HoldsAnswered, now: float, *, bus_back_at: float, bus_away: bool) -> list[e.Action]:
        """A gateway's answer to what runs for it, or its silence."""
        asked = self._holdings.answered(event.gateway_id, now)
        actions: list[e.Action] = []
        if isinstance(event.answer, Unwanted):
            self._holdings.heard(event.gateway_id)
            for request_id in (*event.answer.ended, *event.answer.superseded):
                run = self.by_request.get(request_id)
                if run is None or run.epoch != asked.get(request_id):
                    continue  # claimed anew since
                if request_id in event.answer.superseded:
                    actions += self._superseded(run, now)
                else:
                    actions += [e.Ack(run.token), *self.over(run, "gone", now)]
            return actions
        if bus_away or not self._holdings.lost(event.gateway_id, now, bus_back_at):
            return []
        for request_id in asked:
            run = self.by_request.get(request_id)
            if run is None or run.epoch != asked[request_id]:
                continue
            if event.unserved:  # the gateway is dead, and its clients' connections with it: nobody waits
                actions.append(e.Ack(run.token))
            # One that is on the bus and silent may live: then it is this worker that is cut off, and long replaced.
            # The message is the next owner's, or comes to somebody who hears the gateway; it must not be taken away.
            actions += self.over(run, "gateway_lost", now)
        return actions

    def running_tokens(self, replica: Replica) -> RunningTokens:
        """What the requests that run in a replica hold."""
        runs = [self.by_token[token] for token in replica.held if token in self.by_token]
        made = [run.generation for run in runs if run.generation is not None]
        return RunningTokens(
            context_tokens=sum(len(run.prompt_ids) + run.emitted_tokens for run in runs),
            output_tokens=sum(run.emitted_tokens for run in runs),
            left_tokens=max((generation.left_tokens for generation in made), default=0),
        )

    def listed(self, now: float) -> RequestList:
        """What runs here, for people."""
        return RequestList(requests=tuple(self._shown(run, now) for run in self.by_token.values()))

    def _shown(self, run: Run, now: float) -> RunningRequest:
        if run.frozen:
            state = "frozen"
        elif run.state is RunState.CLAIMING:
            state = "claiming"
        else:
            state = "prefill" if run.first_token_at is None else "decode"
        return RunningRequest(
            request_id=run.request_id,
            gateway_id=run.request.gateway_id,
            deployment=run.request.deployment,
            worker_id=self.limits.worker_id,
            replica_id=run.replica.id,
            state=state,
            epoch=max(0, run.epoch),
            prompt_tokens=len(run.prompt_ids),
            completion_tokens=run.emitted_tokens,
            running_s=max(0.0, now - run.claimed_at) if run.claimed else 0.0,
            migrating_to=run.departure.to_worker_id if run.departure else "",
        )

    # -- time

    def time(self, now: float) -> list[e.Action]:
        """What is due."""
        actions: list[e.Action] = []
        for run in [run for run in self._retries.values() if run.retry_at is not None and run.retry_at <= now]:
            del self._retries[run.token]
            run.retry_at = None
            actions.append(self._claim(run, now))
        if self._beat_at is not None and self._beat_at <= now:
            self._beat_at = None
            actions += self._spent(now)
            if self.by_token:
                actions.append(e.InProgress(tuple(self.by_token)))
        if self._holdings.due_at is not None and self._holdings.due_at <= now:
            owned: dict[str, list[Owned]] = {}
            for run in self.by_token.values():
                if run.claimed is not None:
                    told = Owned(request_id=run.request_id, epoch=run.epoch, index=run.emitted_tokens)
                    owned.setdefault(run.request.gateway_id, []).append(told)
            actions += [
                e.TellHolds(gateway_id, message)
                for gateway_id, message in self._holdings.ask(self.limits.worker_id, owned, now)
            ]
        return actions

    def set_timers(self, now: float) -> None:
        """Called after every event."""
        if not self.by_token:
            self._beat_at = None
        elif self._beat_at is None:
            self._beat_at = now + self.limits.ack_wait_s / 3

    def _spent(self, now: float) -> list[e.Action]:
        failure = Failure(code=Code.DEADLINE_EXCEEDED, message="The request did not finish within its time.")
        spent = [
            run
            for run in self.by_token.values()
            if run.claimed is not None and now > run.budget_ends_at + BUDGET_GRACE_S
        ]
        return [action for run in spent for action in self._fail(run, failure, now)]
