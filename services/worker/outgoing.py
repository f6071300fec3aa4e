"""The source side of live migrations: requests that leave this worker while they run. Pure.

What happens in which state stands in `migration.SOURCE`; here are the effects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, assert_never

import msgspec

from services.worker import events as e
from services.worker.migration import (
    SOURCE,
    SOURCE_BEGIN,
    SOURCE_FINAL,
    SOURCE_FROZEN,
    Convergence,
    SourceEffect,
    SourceInput,
    SourceState,
)
from services.worker.replica import Replica
from services.worker.run import Limits, Run, RunState
from services.worker.runs import CLAIM_RETRIES_S, Runs
from shared import codec
from shared.contracts.migration import (
    AbandonRound,
    HandedOver,
    HandOver,
    Migrate,
    Migrating,
    MigrationEnded,
    MigrationInFlight,
    MigrationOutcome,
    MigrationReason,
    Round,
    RoundDone,
    RoundPending,
)
from shared.contracts.requests import Claimed, Gone, TokensPrompt
from shared.errors import Code, Failure

MOST_DEPARTURES: Final = 256  # at once in one worker; who asks for more asks again
# What one source has a destination prefill at a time, if it is more than one request: the last prefill of a request
# whose client waits would queue behind the first prefills of others.
TOKENS_AT_ONCE: Final = 512
SHOWN: Final = 64  # of them in the worker's record

OUTCOMES: Final[Mapping[SourceState, MigrationOutcome]] = {
    SourceState.COMMITTED: MigrationOutcome.COMMITTED,
    SourceState.ABORTED: MigrationOutcome.ABORTED,
    SourceState.ENDED: MigrationOutcome.ENDED,
}


@dataclass(slots=True)
class Departure:
    """One migration as its source sees it.

    `sent_tokens` output tokens are at the destination or on their way; `number` is the last round's. Seconds are
    monotonic.
    """

    migration_id: str
    run: Run
    to_worker_id: str
    to_replica_id: str
    reason: MigrationReason
    began_at: float
    state: SourceState = SOURCE_BEGIN[0]
    number: int = 0
    sent_tokens: int = 0
    sent_at: float = 0.0
    gap_tokens: int = 0
    last_token_by: float | None = None
    frozen_at: float | None = None
    handed_over_at: float | None = None
    wire_bytes: int = 0
    failure: Failure | None = None
    claimed: Claimed | None = None
    tries: int = 0
    retry_at: float | None = None
    convergence: Convergence = field(default_factory=Convergence)


class Outgoing:
    """See the module."""

    def __init__(self, limits: Limits, runs: Runs, replicas: Mapping[str, Replica]) -> None:
        self._limits: Final = limits
        self._runs: Final = runs
        self._replicas: Final = replicas
        self.tokens_at_once = TOKENS_AT_ONCE
        self._departures: dict[str, Departure] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._departures)

    def deadline(self) -> list[float | None]:
        """When time matters."""
        departures = self._departures.values()
        return [*(one.retry_at for one in departures), *(one.last_token_by for one in departures)]

    def check(self) -> None:
        """Assert the invariants of departures: exactly the frozen ones are in a state in which another may own them."""
        for id, departure in self._departures.items():
            assert departure.migration_id == id
            assert departure.state not in SOURCE_FINAL, "an ended migration is still here"
            run = departure.run
            assert run.departure is departure
            assert self._runs.by_token.get(run.token) is run, "a migration without a request"
            assert run.frozen == (departure.state in SOURCE_FROZEN), "who may emit is not clear"

    def in_flight(self, now: float) -> tuple[MigrationInFlight, ...]:
        """For the worker's record: those that began first."""
        return tuple(
            MigrationInFlight(
                migration_id=one.migration_id,
                request_id=one.run.request_id,
                deployment=one.run.request.deployment,
                destination_worker_id=one.to_worker_id,
                reason=one.reason,
                state=one.state.value,
                rounds=one.number,
                tokens=_tokens(one.run),
                gap_tokens=one.run.emitted_tokens - one.sent_tokens,
                running_s=max(0.0, now - one.began_at),
            )
            for one in list(self._departures.values())[:SHOWN]
        )

    # -- begin

    def asked(self, message: Migrate, reply: e.MigrateReply, now: float) -> list[e.Action]:
        """The scheduler wants requests to leave."""
        chosen = self._chosen(message)
        if isinstance(chosen, Failure):
            return [e.ReplyTo(reply, chosen)]
        for run in chosen:
            self._begin(run, message, now)
        names = tuple(run.request_id for run in chosen)
        begun = self._turns(message.to_replica_id, now)
        return [e.ReplyTo(reply, Migrating(request_ids=names)), *begun, *([e.RecordWorker()] if chosen else [])]

    def _chosen(self, message: Migrate) -> list[Run] | Failure:
        me = self._limits.worker_id
        if message.to_worker_id == me:
            return Failure(code=Code.CONFLICT, message=f"Worker {me} is where the requests are already.")
        by_request = self._runs.by_request
        if message.request_ids:
            missing = [one for one in message.request_ids if one not in by_request]
            if len(missing) == len(message.request_ids):
                return Failure(code=Code.NOT_FOUND, message=f"Request {missing[0]} does not run on worker {me}.")
            runs = [by_request[one] for one in message.request_ids if one in by_request]
        else:
            replica = self._replicas.get(message.replica_id)
            if replica is None:
                return Failure(code=Code.NOT_FOUND, message=f"Worker {me} has no replica {message.replica_id!r}.")
            runs = [self._runs.by_token[token] for token in replica.held if token in self._runs.by_token]
            runs.sort(key=_tokens, reverse=True)  # frees most KV blocks; stable
        able = [run for run in runs if run.state is RunState.RUNNING and run.departure is None]
        if message.request_ids and not able:
            run = runs[0]
            what = "is in a migration already" if run.departure else "has not begun yet"
            return Failure(code=Code.BUSY, message=f"Request {run.request_id} {what}.")
        room = max(0, MOST_DEPARTURES - len(self._departures))
        return able[: min(room, message.most or room)]

    def _begin(self, run: Run, message: Migrate, now: float) -> None:
        self._count += 1
        # The epoch makes it unique over this worker's lives, too: each life begins with claims of its own.
        departure = Departure(
            migration_id=f"{run.sequence_id}.{self._count}",
            run=run,
            to_worker_id=message.to_worker_id,
            to_replica_id=message.to_replica_id,
            reason=message.reason,
            began_at=now,
        )
        self._departures[departure.migration_id] = run.departure = departure

    def _turns(self, replica_id: str, now: float) -> list[e.Action]:
        """Begin what waits for this destination, in order, as far as it has room."""
        there = [one for one in self._departures.values() if one.to_replica_id == replica_id]
        busy_tokens = sum(_tokens(one.run) for one in there if one.state is not SourceState.QUEUED)
        actions: list[e.Action] = []
        for departure in there:
            if departure.state is not SourceState.QUEUED or departure.run.doomed:
                continue
            tokens = _tokens(departure.run)
            if busy_tokens and busy_tokens + tokens > self.tokens_at_once:
                break
            busy_tokens += tokens
            actions += self._input(departure, SourceInput.TURN, now)
        return actions

    # -- what happens

    def round_answered(self, event: e.RoundAnswered, now: float) -> list[e.Action]:
        """The destination spoke, or did not."""
        departure = self._departures.get(event.migration_id)
        if departure is None or departure.number != event.number:
            return []
        match event.answer:
            case RoundPending():
                return self._input(departure, SourceInput.ROUND_PENDING, now)
            case Failure():
                departure.failure = event.answer
                return self._input(departure, SourceInput.ROUND_FAILED, now)
            case RoundDone():
                if departure.state is not SourceState.ROUND:
                    return []
                departure.convergence.observe(event.answer, now - departure.sent_at)
                gap = departure.run.emitted_tokens - departure.sent_tokens
                near = departure.convergence.near(gap, departure.run.token_interval_s)
                if not near:
                    return self._input(departure, SourceInput.ROUND_DONE_FAR, now)
                # A token that does not come when it should (a prefill, an engine that stands still) is not waited for.
                departure.last_token_by = now + 2 * departure.run.token_interval_s
                return self._input(departure, SourceInput.ROUND_DONE_NEAR, now)
        assert_never(event.answer)

    def handed_over(self, event: e.HandOverAnswered, now: float) -> list[e.Action]:
        """The destination owns the request, or will not, or cannot be heard."""
        departure = self._departures.get(event.migration_id)
        if departure is None:
            return []
        if isinstance(event.answer, HandedOver):
            departure.handed_over_at = now
            return self._input(departure, SourceInput.HANDED_OVER, now)
        departure.failure = event.answer
        return self._input(departure, SourceInput.HAND_OVER_FAILED, now)

    def reclaimed(self, event: e.ReclaimAnswered, now: float) -> list[e.Action]:
        """The gateway says whose a frozen request is."""
        departure = self._departures.get(event.migration_id)
        if departure is None or departure.state is not SourceState.RECLAIM:
            return []
        match event.answer:
            case Claimed():
                departure.claimed = event.answer
                return self._input(departure, SourceInput.RECLAIMED, now)
            case Gone():
                return [e.Ack(departure.run.token), *self._runs.over(departure.run, "gone", now)]
            case Failure(code=Code.STALE_EPOCH):
                return self._input(departure, SourceInput.SUPERSEDED, now)
            case Failure():
                # Nobody but the gateway can say it, so it is asked for as long as it may live (see `Runs.held`).
                departure.retry_at = now + CLAIM_RETRIES_S[min(departure.tries, len(CLAIM_RETRIES_S) - 1)]
                departure.tries += 1
                return []
        assert_never(event.answer)

    def token_sent(self, run: Run, now: float) -> list[e.Action]:
        """See `Departures`."""
        assert run.departure is not None
        return self._input(run.departure, SourceInput.TOKEN_SENT, now)

    def over(self, run: Run, now: float) -> list[e.Action]:
        """See `Departures`."""
        assert run.departure is not None
        return self._input(run.departure, SourceInput.OVER, now)

    def superseded(self, run: Run, now: float) -> list[e.Action]:
        """See `Departures`."""
        assert run.departure is not None
        return self._input(run.departure, SourceInput.SUPERSEDED, now)

    def time(self, now: float) -> list[e.Action]:
        """What is due: claims that were not answered, last tokens that do not come."""
        actions: list[e.Action] = []
        for departure in list(self._departures.values()):
            if departure.last_token_by is not None and departure.last_token_by <= now:
                actions += self._input(departure, SourceInput.TOKEN_SENT, now)
            if departure.retry_at is not None and departure.retry_at <= now:
                departure.retry_at = None
                actions.append(self._claim(departure))
        return actions

    # -- the table's effects

    def _input(self, departure: Departure, what: SourceInput, now: float) -> list[e.Action]:
        row = SOURCE.get((departure.state, what))
        if row is None:
            return []
        departure.state, effects = row
        final = departure.state in SOURCE_FINAL
        if final:
            del self._departures[departure.migration_id]
            departure.run.departure = None
        actions = self._carry_out(departure, effects, now)
        return [*actions, *self._turns(departure.to_replica_id, now)] if final else actions

    def _carry_out(self, departure: Departure, effects: tuple[SourceEffect, ...], now: float) -> list[e.Action]:
        return [action for effect in effects for action in self._effect(departure, effect, now)]

    def _effect(self, departure: Departure, effect: SourceEffect, now: float) -> list[e.Action]:
        run = departure.run
        match effect:
            case SourceEffect.SEND_ROUND:
                return [self._round(departure, now)]
            case SourceEffect.ASK_AGAIN:
                return [e.SendRound(departure.to_worker_id, self._question(departure))]
            case SourceEffect.FREEZE:
                run.frozen, departure.frozen_at, departure.last_token_by = True, now, None
                return []
            case SourceEffect.HAND_OVER:
                return [self._hand_over(departure)]
            case SourceEffect.RECLAIM:
                return [self._claim(departure)]
            case SourceEffect.THAW:
                assert departure.claimed is not None
                return self._runs.thaw(run, departure.claimed, now)
            case SourceEffect.ABANDON:
                return [e.Abandon(departure.to_worker_id, AbandonRound(migration_id=departure.migration_id))]
            case SourceEffect.LET_GO:
                run.frozen = False
                return self._runs.over(run, "migrated", now)
            case SourceEffect.TELL:
                return [e.PublishMigrationEnded(self._told(departure, now)), e.RecordWorker()]
        assert_never(effect)

    def _question(self, departure: Departure) -> Round:
        return Round(
            migration_id=departure.migration_id,
            number=departure.number,
            source_worker_id=self._limits.worker_id,
            replica_id=departure.to_replica_id,
            checkpoint_id=departure.run.replica.checkpoint_id,
            index=departure.sent_tokens,
        )

    def _round(self, departure: Departure, now: float) -> e.SendRound:
        run = departure.run
        assert run.generation is not None
        first = departure.number == 0
        departure.number += 1
        begin, end = departure.sent_tokens, run.emitted_tokens
        message = msgspec.structs.replace(
            self._question(departure),
            index=begin,
            token_ids=tuple(run.generation.output[begin:end]),
            # Token ids instead of the text: the destination must not tokenise it again, nor differently.
            request=msgspec.structs.replace(run.request, prompt=TokensPrompt(token_ids=run.prompt_ids))
            if first
            else None,
        )
        departure.sent_tokens, departure.sent_at = end, now
        departure.wire_bytes += len(codec.encode(message))
        return e.SendRound(departure.to_worker_id, message)

    def _hand_over(self, departure: Departure) -> e.SendHandOver:
        run = departure.run
        assert run.generation is not None
        begin, end = departure.sent_tokens, run.emitted_tokens
        ledger = self._runs.ledger(run)
        message = HandOver(
            migration_id=departure.migration_id,
            epoch=run.epoch,
            token=run.token,
            sequence=run.sequence,
            delivery=run.delivery,
            index=begin,
            token_ids=tuple(run.generation.output[begin:end]),
            ledger=msgspec.structs.replace(
                ledger, migrations=ledger.migrations + 1, rounds=ledger.rounds + departure.number
            ),
            echo_text=run.echo_text if end == 0 else "",
        )
        departure.gap_tokens = end - begin
        departure.wire_bytes += len(codec.encode(message))
        return e.SendHandOver(departure.to_worker_id, departure.migration_id, message)

    def _claim(self, departure: Departure) -> e.Reclaim:
        run = departure.run
        message = run.claim(self._limits.worker_id, after_epoch=run.epoch, claim_id=f"{departure.migration_id}.back")
        return e.Reclaim(departure.migration_id, run.request.gateway_id, message)

    def _told(self, departure: Departure, now: float) -> MigrationEnded:
        run = departure.run
        frozen_s = 0.0
        if departure.frozen_at is not None:
            frozen_s = (departure.handed_over_at or now) - departure.frozen_at
        return MigrationEnded(
            migration_id=departure.migration_id,
            request_id=run.request_id,
            deployment=run.request.deployment,
            source_worker_id=self._limits.worker_id,
            destination_worker_id=departure.to_worker_id,
            reason=departure.reason,
            outcome=OUTCOMES[departure.state],
            failure=departure.failure if departure.state is SourceState.ABORTED else None,
            rounds=departure.number,
            tokens=_tokens(run),
            gap_tokens=departure.gap_tokens,
            wire_bytes=departure.wire_bytes,
            total_s=now - departure.began_at,
            frozen_s=frozen_s,
        )


def _tokens(run: Run) -> int:
    """What a destination has to prefill in all."""
    return len(run.prompt_ids) + run.emitted_tokens
