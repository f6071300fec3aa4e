"""The destination side of live migrations: requests that arrive at this worker while they run elsewhere. Pure.

What happens in which state stands in `migration.DESTINATION`; here are the effects. A landing holds a slot of its
replica from its first round on. Each round is a sequence of the engine that asks for a token, which nobody gets: its KV
blocks stay in the prefix cache, so that the next round, and in the end the request itself, compute only what is new.
The first round asks for two, which shows how long a decode step takes here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, assert_never

from services.worker import events as e
from services.worker.migration import (
    DESTINATION,
    DESTINATION_BEGIN,
    DESTINATION_FINAL,
    DestinationEffect,
    DestinationInput,
    DestinationState,
)
from services.worker.ports import EndReason, EngineEvent, SequenceEnd, StepToken
from services.worker.replica import Replica
from services.worker.run import Limits, Run
from services.worker.runs import Runs
from shared.contracts.migration import AbandonRound, HandedOver, HandOver, Round, RoundDone, RoundPending
from shared.contracts.records import ReplicaState
from shared.contracts.requests import Request, Sampling, TokensPrompt
from shared.errors import Code, Failure

FIRST_ROUND_TOKENS: Final = 2  # see the module
ROUND_SAMPLING: Final = Sampling(temperature=0.0, ignore_eos=True)
EXPIRES_S: Final = 10.0  # after the last word of a source that asks once a second


@dataclass(slots=True)
class Landing:
    """One migration as its destination sees it. `token_ids` are the prompt and the output tokens that it was sent.

    `epoch` is the source's, after which the request is claimed. `sequence_id` is what the engine knows the last round
    by. Seconds are monotonic.
    """

    migration_id: str
    source_worker_id: str
    replica: Replica
    request: Request
    prompt_ids: tuple[int, ...]
    slot: str
    heard_at: float
    output_ids: list[int] = field(default_factory=list)
    state: DestinationState = DestinationState.PREFILL
    number: int = 1
    sequence_id: str = ""
    submitted_at: float = 0.0
    first_token_at: float | None = None
    done: RoundDone | None = None
    failure: Failure | None = None
    reply: e.RoundReply | None = None
    reply_due: float | None = None
    handed_over: HandOver | None = None
    hand_over_reply: e.HandOverReply | None = None
    run: Run | None = None

    @property
    def epoch(self) -> int:
        """The epoch after which the request is claimed."""
        return self.handed_over.epoch if self.handed_over else -1


class Incoming:
    """See the module."""

    def __init__(self, limits: Limits, runs: Runs, replicas: Mapping[str, Replica]) -> None:
        self._limits: Final = limits
        self._runs: Final = runs
        self._replicas: Final = replicas
        self.landings: dict[str, Landing] = {}
        self._sequences: dict[str, Landing] = {}

    def __len__(self) -> int:
        return len(self.landings)

    def deadline(self) -> list[float | None]:
        """When time matters."""
        times: list[float | None] = []
        for landing in self.landings.values():
            times.append(landing.reply_due)
            if landing.state is not DestinationState.CLAIMING:
                times.append(landing.heard_at + EXPIRES_S)
        return times

    def check(self) -> None:
        """Assert the invariants of landings: each holds one slot; only a prefill has a sequence."""
        for id, landing in self.landings.items():
            assert landing.migration_id == id
            assert landing.state not in DESTINATION_FINAL, "an ended migration is still here"
            assert (landing.run is not None) == (landing.state is DestinationState.CLAIMING)
            slot = landing.run.token if landing.run else landing.slot
            assert slot in landing.replica.held, "a migration without a slot"
            assert self._replicas.get(landing.replica.id) is landing.replica, "a migration without a replica"
            prefilling = landing.state is DestinationState.PREFILL
            assert (self._sequences.get(landing.sequence_id) is landing) == prefilling
        assert all(self.landings.get(one.migration_id) is one for one in self._sequences.values())

    def slots(self) -> int:
        """Slots that are held by migrations that are no requests here yet."""
        return sum(landing.run is None for landing in self.landings.values())

    # -- what the source says

    def round_asked(self, message: Round, reply: e.RoundReply, now: float) -> list[e.Action]:
        """Tokens to prefill, or the question how far that is."""
        landing = self.landings.get(message.migration_id)
        if landing is None:
            return self._begin(message, reply, now)
        landing.heard_at = now
        if message.number < landing.number or landing.state is DestinationState.CLAIMING:
            return [e.ReplyTo(reply, Failure(code=Code.CONFLICT, message="A later round has come already."))]
        actions = self._expect(landing, message, reply, now)
        if message.number == landing.number:
            if landing.done is not None:  # asked again: the answer was lost
                return [*actions, *self._answer(landing, landing.done)]
            return actions
        if message.index != len(landing.output_ids):
            landing.failure = Failure(code=Code.CONFLICT, message="Tokens of an earlier round are missing.")
            return [*actions, *self._answer(landing, landing.failure), *self._drop(landing, now)]
        landing.output_ids += message.token_ids
        landing.number, landing.done = message.number, None
        return [*actions, *self._input(landing, DestinationInput.ROUND, now)]

    def hand_over_asked(self, message: HandOver, reply: e.HandOverReply, now: float) -> list[e.Action]:
        """The source has stopped."""
        landing = self.landings.get(message.migration_id)
        refused: str | None = None
        if landing is None:
            refused = "This migration is not known here."
        elif landing.run is not None:
            refused = "It is being claimed already."
        elif message.index != len(landing.output_ids):
            refused = "Tokens of an earlier round are missing."
        elif landing.request.request_id in self._runs.by_request or message.token in self._runs.by_token:
            refused = "The queue has given the request to this worker, too."
        if landing is None or refused is not None:
            return [e.ReplyTo(reply, Failure(code=Code.CONFLICT, message=refused or ""))]
        landing.heard_at, landing.handed_over, landing.hand_over_reply = now, message, reply
        landing.output_ids += message.token_ids
        return self._input(landing, DestinationInput.HAND_OVER, now)

    def abandoned(self, message: AbandonRound, now: float) -> list[e.Action]:
        """The source needs nothing more."""
        landing = self.landings.get(message.migration_id)
        return [] if landing is None else self._input(landing, DestinationInput.ABANDONED, now)

    def _begin(self, message: Round, reply: e.RoundReply, now: float) -> list[e.Action]:
        replica = self._replicas.get(message.replica_id)
        refusal = self._refusal(message, replica)
        if refusal is not None:
            return [e.ReplyTo(reply, refusal)]
        assert replica is not None and message.request is not None
        prompt = message.request.prompt
        assert isinstance(prompt, TokensPrompt)
        slot = f"migration {message.migration_id}"
        actions = replica.reserve(slot)
        if actions is None:
            failure = Failure(code=Code.BUSY, message=f"All {replica.slots} slots of replica {replica.id} are taken.")
            return [e.ReplyTo(reply, failure)]
        landing = Landing(
            migration_id=message.migration_id,
            source_worker_id=message.source_worker_id,
            replica=replica,
            request=message.request,
            prompt_ids=prompt.token_ids,
            slot=slot,
            heard_at=now,
            output_ids=list(message.token_ids),
        )
        self.landings[landing.migration_id] = landing
        actions += self._expect(landing, message, reply, now)
        landing.state, effects = DESTINATION_BEGIN
        return [*actions, *self._carry_out(landing, effects, now), e.RecordWorker()]

    def _refusal(self, message: Round, replica: Replica | None) -> Failure | None:
        me = self._limits.worker_id
        if message.request is None or message.number != 1 or message.index != 0:
            return Failure(code=Code.NOT_FOUND, message=f"Worker {me} knows nothing of this migration (any more).")
        if not isinstance(message.request.prompt, TokensPrompt):
            return Failure(code=Code.INVALID_REQUEST, message="A request migrates with its prompt as token ids.")
        if replica is None:
            return Failure(code=Code.NOT_FOUND, message=f"Worker {me} has no replica {message.replica_id!r}.")
        if replica.state is not ReplicaState.READY or replica.loaded is None:
            return Failure(code=Code.DRAINING, message=f"Replica {replica.id} is {replica.state.value}.")
        if replica.checkpoint_id != message.checkpoint_id:
            return Failure(code=Code.CONFLICT, message=f"Replica {replica.id} runs another checkpoint.")
        if message.request.request_id in self._runs.by_request:
            return Failure(code=Code.CONFLICT, message="The request runs here already.")
        tokens = len(message.request.prompt.token_ids) + len(message.token_ids)
        if tokens >= replica.loaded.max_context_tokens:
            return Failure(code=Code.PROMPT_TOO_LONG, message=f"{tokens} tokens do not fit into replica {replica.id}.")
        return None

    # -- what the engine and the gateway say

    def stepped(self, steps: Sequence[EngineEvent], now: float) -> list[e.Action]:
        """What a step brought for rounds; the sequences of requests are left alone."""
        actions: list[e.Action] = []
        for event in steps:
            if not isinstance(event, StepToken | SequenceEnd):
                continue
            landing = self._sequences.get(event.sequence_id)
            if landing is None:
                continue
            if isinstance(event, StepToken):
                landing.first_token_at = landing.first_token_at or now
                continue
            if event.reason in (EndReason.STOP, EndReason.LENGTH):
                began = landing.submitted_at
                first = landing.first_token_at or now
                tokens = len(landing.prompt_ids) + len(landing.output_ids)
                landing.done = RoundDone(
                    number=landing.number,
                    prefilled_tokens=max(0, tokens - event.cached_tokens),
                    cached_tokens=event.cached_tokens,
                    prefill_s=first - began,
                    step_s=now - first,
                )
                landing.replica.speeds.prefilled(landing.done.prefilled_tokens, landing.done.prefill_s)
                actions += self._input(landing, DestinationInput.PREFILLED, now)
            else:
                landing.failure = event.failure or Failure(code=Code.DRAINING, message="The replica is leaving.")
                actions += self._input(landing, DestinationInput.PREFILL_FAILED, now)
        return actions

    def claimed(self, run: Run, now: float) -> list[e.Action]:
        """See `Landings`."""
        assert run.landing is not None
        return self._input(run.landing, DestinationInput.CLAIMED, now)

    def refused(self, run: Run, failure: Failure, now: float) -> list[e.Action]:
        """See `Landings`."""
        landing, run.landing = run.landing, None
        assert landing is not None
        landing.failure = failure
        return self._input(landing, DestinationInput.REFUSED, now)

    def leaving(self, replica: Replica, now: float) -> list[e.Action]:
        """A replica takes nothing more, or its engine is dead."""
        actions: list[e.Action] = []
        for landing in [one for one in self.landings.values() if one.replica is replica]:
            landing.failure = Failure(code=Code.DRAINING, message=f"Replica {replica.id} is leaving.")
            actions += self._input(landing, DestinationInput.LEAVING, now)
        return actions

    def time(self, now: float) -> list[e.Action]:
        """What is due: answers to who waits, and landings whose source is silent."""
        actions: list[e.Action] = []
        for landing in list(self.landings.values()):
            if landing.reply_due is not None and landing.reply_due <= now:
                actions += self._answer(landing, RoundPending(number=landing.number))
            if landing.heard_at + EXPIRES_S <= now:
                actions += self._input(landing, DestinationInput.EXPIRED, now)
        return actions

    # -- the table's effects

    def _expect(self, landing: Landing, message: Round, reply: e.RoundReply, now: float) -> list[e.Action]:
        """Answer this call when there is something to say; an older one that waits is answered now."""
        older = self._answer(landing, RoundPending(number=landing.number)) if landing.reply else []
        landing.reply, landing.reply_due = reply, now + message.wait_s
        return older

    def _answer(self, landing: Landing, answer: RoundPending | RoundDone | Failure) -> list[e.Action]:
        reply, landing.reply, landing.reply_due = landing.reply, None, None
        return [] if reply is None else [e.ReplyTo(reply, answer)]

    def _stop(self, landing: Landing) -> list[e.Action]:
        if self._sequences.pop(landing.sequence_id, None) is None or landing.replica.loaded is None:
            return []
        return [e.CancelSequence(landing.replica.loaded.engine, landing.sequence_id)]

    def _drop(self, landing: Landing, now: float) -> list[e.Action]:
        return self._input(landing, DestinationInput.ABANDONED, now)

    def _input(self, landing: Landing, what: DestinationInput, now: float) -> list[e.Action]:
        row = DESTINATION.get((landing.state, what))
        if row is None:
            return []
        landing.state, effects = row
        if what in (DestinationInput.PREFILLED, DestinationInput.PREFILL_FAILED):
            del self._sequences[landing.sequence_id]
        if landing.state in DESTINATION_FINAL:
            del self.landings[landing.migration_id]
        return self._carry_out(landing, effects, now)

    def _carry_out(self, landing: Landing, effects: tuple[DestinationEffect, ...], now: float) -> list[e.Action]:
        return [action for effect in effects for action in self._effect(landing, effect, now)]

    def _effect(self, landing: Landing, effect: DestinationEffect, now: float) -> list[e.Action]:
        match effect:
            case DestinationEffect.PREFILL:
                return self._prefill(landing, now)
            case DestinationEffect.STOP_PREFILL:
                return self._stop(landing)
            case DestinationEffect.ANSWER_ROUND:
                assert landing.done is not None
                return self._answer(landing, landing.done)
            case DestinationEffect.REFUSE_ROUND:
                assert landing.failure is not None
                return self._answer(landing, landing.failure)
            case DestinationEffect.CLAIM:
                return self._claim(landing, now)
            case DestinationEffect.BEGIN:
                assert landing.run is not None and landing.handed_over is not None
                landing.run.ledger, landing.run.landing = landing.handed_over.ledger, None
                return []
            case DestinationEffect.ANSWER_HAND_OVER:
                assert landing.run is not None and landing.hand_over_reply is not None
                return [e.ReplyTo(landing.hand_over_reply, HandedOver(epoch=landing.run.epoch)), e.RecordWorker()]
            case DestinationEffect.REFUSE_HAND_OVER:
                assert landing.failure is not None and landing.hand_over_reply is not None
                return [e.ReplyTo(landing.hand_over_reply, landing.failure)]
            case DestinationEffect.FREE:
                if landing.run is not None:  # its slot goes with it: see `Runs.claimed`
                    return [e.RecordWorker()]
                return [*landing.replica.give_up(landing.slot, now), e.RecordWorker()]
        assert_never(effect)

    def _prefill(self, landing: Landing, now: float) -> list[e.Action]:
        loaded = landing.replica.loaded
        assert loaded is not None
        tokens = (*landing.prompt_ids, *landing.output_ids)
        wanted = FIRST_ROUND_TOKENS if landing.number == 1 else 1
        landing.submitted_at, landing.first_token_at = now, None
        landing.sequence_id = f"{landing.migration_id}/{landing.number}"
        self._sequences[landing.sequence_id] = landing
        return [
            e.SubmitSequence(
                engine=loaded.engine,
                sequence_id=landing.sequence_id,
                token_ids=tokens,
                first_index=len(landing.output_ids),
                max_new_tokens=max(1, min(wanted, loaded.max_context_tokens - len(tokens))),
                sampling=ROUND_SAMPLING,
            )
        ]

    def _claim(self, landing: Landing, now: float) -> list[e.Action]:
        message = landing.handed_over
        assert message is not None
        run = landing.run = Run(
            request=landing.request,
            token=message.token,
            delivery=message.delivery,
            sequence=message.sequence,
            replica=landing.replica,
            prompt_ids=landing.prompt_ids,
            echo_text=message.echo_text,
            landing=landing,
        )
        landing.replica.rename(landing.slot, run.token)
        # A round that still waits for its answer has been overtaken.
        waiting = self._answer(landing, RoundPending(number=landing.number))
        return [*waiting, *self._runs.begin(run, now)]
