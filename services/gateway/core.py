"""The state machine of open requests: queued → streaming → (interrupted → streaming …) → ended. Pure.

The gateway is the one authority on who owns a request (`ownership`) and on what its client has: only frames of the
current epoch at the next index are let through, so each token reaches the client once and in order, whatever crashed,
moved or was lost.

A client *call* is a set of requests (choices × prompts). It has one answer: the failure of one request takes its
siblings with it.

What gets lost is found out and repeated here:

* an owner that is silent is asked (`watch`); one that is dead, hangs or is cut off loses its requests at once: their
  messages go back to the queue, and the next claim resumes them. So do those that an owner gives back itself;
* a gap in the frames → the owner is told to give the request back (`Cancel(requeue=True)`);
* a request that waits for an owner and whose message is not in the queue any more (a late owner has acknowledged it,
  its end was lost, the queue has forgotten it) is published again;
* who goes on with a request that has ended here, or that somebody else owns now, is told so, every `remind_s`;
* a request that kills its owners is found out (`suspects`) and fails with `worker_lost`.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable
from typing import Final, assert_never

import msgspec

from services.gateway.demand import Demands
from services.gateway.events import (
    Account,
    Action,
    Admitted,
    AnswerClaim,
    AnswerHandle,
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
    HoldsHandle,
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
from services.gateway.outcomes import (
    account,
    deleted,
    endless,
    guilty,
    let_be,
    on_trial,
    overdue,
    refused,
    too_many,
    with_owners,
    worn_out,
)
from services.gateway.ownership import GONE, REPLACED, Call, Grant, Live, State, grant, judge, replace_message
from services.gateway.reminders import Reminders
from services.gateway.rules import Config
from services.gateway.suspects import Suspects
from services.gateway.waiting import Waiting
from services.gateway.watch import Owner, Watch
from shared.backoff import delay_s
from shared.contracts.generation import End, Frame, FrameBatch, GivenBack
from shared.contracts.requests import Cancel, Claim, Claimed, Gone, Holds, Owned, Trial, Unwanted
from shared.errors import Code, Failure

__all__ = [
    "GONE", "REPLACED", "Account", "Action", "Admitted", "AnswerClaim", "AnswerHandle", "AnswerHolds", "CancelWork",
    "CheckOwner", "ClaimAsked", "ClientLeft", "Closing", "Conclude", "Config", "Deliver", "DeploymentFailed",
    "DeploymentGone", "Disconnected", "Event", "Fail", "FindMessage", "FramesArrived", "GatewayCore", "GiveBack",
    "Hint", "HoldsAsked", "HoldsHandle", "Inform", "MessageFound", "OwnerChecked", "OwnerLost", "ProgressArrived",
    "Publish", "PublishFailed", "Published", "Reconnected", "Resumed", "Settle", "State", "TellTrial", "TrialHeard",
    "Unqueue",
]  # fmt: skip


class _Timer(enum.Enum):
    BUDGET = 0
    CHECK = 1
    RECLAIM = 2
    HINT = 3
    PUBLISH = 4
    LOOK = 5
    DEMAND = 6


_Alarm = tuple[float, int, _Timer, str]

# A worker that gave a request up because it was told to, or because it lost it: nothing that a client should hear.
_OWNERS_BUSINESS: Final = (Code.CANCELLED, Code.STALE_EPOCH)


class GatewayCore:
    """See the module. One instance per gateway process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._calls: dict[str, Call] = {}
        self._live: dict[str, Live] = {}
        self._open_by_slug: dict[str, int] = {}
        self._waiting = Waiting(inform_s=config.inform_s, fresh_s=config.progress_fresh_s)
        self._hinted: dict[str, float] = {}
        self._hint_owed: dict[str, str] = {}
        self._demands = Demands(repeat_s=config.demand_s, clear_s=config.demand_over_s)
        self._watch = Watch(check_s=config.check_s, lost_after_s=config.lost_after_s, quiet_s=config.quiet_s)
        self._suspects = Suspects(most=config.max_deliveries, proof_s=config.proof_s)
        self._reminders = Reminders(config.remind_s)
        self._bus_away = False
        self._timers: list[_Alarm] = []
        self._timer_count = 0
        self._admitted = 0
        self._ended = 0

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    @property
    def live(self) -> dict[str, Live]:
        """Those, by id; to look at only."""
        return self._live

    # -- the machine --------------------------------------------------------------------------------------------------

    def handle(self, event: Event | None, now: float) -> list[Action]:
        """Take an event (None: time has passed) at monotonic second `now`; say what is wanted, in order."""
        out: list[Action] = []
        match event:
            case None:
                self._time(now, out)
            case FramesArrived(batch=batch):
                self._frames(batch, now, out)
            case Admitted():
                self._admit(event, now, out)
            case Published(request_id=request_id, attempt=attempt, sequence=sequence):
                self._published(request_id, attempt, sequence, now, out)
            case PublishFailed(request_id=request_id, attempt=attempt, failure=failure):
                self._publish_failed(request_id, attempt, failure, now, out)
            case ClaimAsked(claim=claim, reply=reply):
                out.append(AnswerClaim(reply, self._claim(claim, now, out)))
            case HoldsAsked(holds=holds, reply=reply):
                out.append(AnswerHolds(reply, self._holds(holds, now, out)))
            case OwnerChecked():
                self._checked(event, now, out)
            case MessageFound(request_id=request_id, sequence=sequence, found=found):
                self._message_found(request_id, sequence, found, now, out)
            case TrialHeard(trial=trial):
                self._trial_heard(trial, now, out)
            case ClientLeft(call_id=call_id):
                call = self._calls.get(call_id)
                if call is not None:
                    self._end_call(call, Failure(code=Code.CANCELLED, message="The client left."), now, out)
            case ProgressArrived(progress=progress):
                out.extend(self._waiting.progressed(progress, now))
            case DeploymentGone(deployment=deployment):
                for call in [call for call in self._calls.values() if call.deployment == deployment]:
                    self._fail_call(call, deleted(deployment), now, out)
            case DeploymentFailed(deployment=deployment, failure=failure):
                for call in [call for call in self._calls.values() if call.deployment == deployment]:
                    if any(self._in_vain(live, failure, now) for live in call.open.values()):
                        self._fail_call(call, failure, now, out)
            case Disconnected():
                self._bus_away = True
            case Reconnected():
                self._bus_away = False
                for owner in self._watch.begin_anew(now, now + self._config.settle_s):
                    self._arm(owner.check_at, _Timer.CHECK, owner.worker_id)
                # Workers take a gateway that is away for long for dead, and its messages out of the queue.
                for live in self._live.values():
                    if live.state is State.QUEUED and live.sequence is not None:
                        out.append(FindMessage(live.request_id, live.sequence))
            case Closing(failure=failure):
                for call in list(self._calls.values()):
                    self._fail_call(call, failure, now, out)
            case _:
                assert_never(event)
        for news in self._suspects.take_news():
            out.append(TellTrial(news.slug, news.request_id, news.on, news.guilty))
        return out

    def deadline(self) -> float | None:
        """The monotonic second at which time itself is an event."""
        timers = self._timers
        while timers and not self._wanted(timers[0]):
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def check(self) -> None:
        """Every invariant: a request is open or has ended, once; what is counted twice agrees."""
        assert self._admitted == self._ended + len(self._live), "a request ended twice, or was lost"
        by_slug: dict[str, int] = {}
        for call_id, call in self._calls.items():
            assert call.call_id == call_id
            assert call.open, "a call without open requests is over"
            for request_id, live in call.open.items():
                assert self._live[request_id] is live
                assert live.call is call
            by_slug[call.slug] = by_slug.get(call.slug, 0) + len(call.open)
        assert by_slug == self._open_by_slug
        assert sum(by_slug.values()) == len(self._live)
        streaming = 0
        for request_id, live in self._live.items():
            assert live.request_id == request_id
            assert (live.epoch == 0) == (live.worker_id == ""), "an owner has an epoch and an epoch an owner"
            assert live.epoch >= live.claims, "an epoch was given twice"
            assert not live.tokens or live.first_at is not None
            if live.state is State.STREAMING:
                streaming += 1
                assert live.epoch > 0
                assert not live.returned, "a request has an owner while its message is in the queue"
                assert self._watch.owners[live.worker_id].open[request_id] is live, "an owner that nobody watches"
        assert sum(len(owner.open) for owner in self._watch.owners.values()) == streaming
        self._watch.check()
        nowhere = [id for id, live in self._live.items() if live.state is not State.STREAMING]
        assert sorted(self._demands.waiting()) == sorted(nowhere), "the scheduler is told of others than wait"
        assert all(request_id in self._live for request_id in self._suspects.known()), "a suspect that has ended"
        for call in self._waiting.calls():
            assert self._calls[call.call_id] is call
            assert call.stream
            assert all(live.first_at is None for live in call.open.values())

    # -- in -----------------------------------------------------------------------------------------------------------

    def _admit(self, event: Admitted, now: float, out: list[Action]) -> None:
        count = len(event.requests)
        open_now = self._open_by_slug.get(event.slug, 0)
        if open_now + count > event.queue_limit:
            failure = too_many(event.deployment, event.queue_limit)
            self._admitted += count
            self._ended += count
            out.append(Fail(event.call_id, failure))
            for request in event.requests:
                out.append(refused(request, failure))
            return
        call = Call(
            call_id=event.call_id,
            deployment=event.deployment,
            slug=event.slug,
            admitted_at=now,
            deadline_at=now + event.budget_s,
            stream=event.stream,
        )
        self._calls[call.call_id] = call
        self._arm(call.deadline_at, _Timer.BUDGET, call.call_id)
        for choice, request in enumerate(event.requests):
            live = Live(call=call, choice=choice, request=request)
            call.open[request.request_id] = live
            self._live[request.request_id] = live
            self._arm(self._demands.add(live, now), _Timer.DEMAND, live.call.slug)
            out.append(Publish(call.slug, request, 0))
        self._admitted += count
        self._open_by_slug[call.slug] = open_now + count
        if call.stream:
            out.extend(self._waiting.add(call, now))

    def _in_vain(self, live: Live, failure: Failure, now: float) -> bool:
        """Whether a request would wait in vain. One that has begun is worth some patience: what is wrong may pass."""
        if live.state is State.STREAMING:
            return False
        begun = live.first_at is not None and live.lost_at is not None and failure.kind.retryable
        return not (begun and now - (live.lost_at or 0.0) < self._config.patience_s)

    def _published(self, request_id: str, attempt: int, sequence: int, now: float, out: list[Action]) -> None:
        live = self._live.get(request_id)
        if live is None or live.attempt != attempt or live.sequence not in (None, sequence):
            # It ended, or was published again, or was claimed by another message while this was on its way.
            out.append(Unqueue(sequence))
            return
        live.sequence = sequence
        live.publish_tries = 0
        if live.state is State.QUEUED:
            self._hint(live.call, now, out)
            self._arm_look(live, now)

    def _publish_failed(self, request_id: str, attempt: int, failure: Failure, now: float, out: list[Action]) -> None:
        live = self._live.get(request_id)
        if live is None or live.attempt != attempt or live.state is not State.QUEUED:
            return  # otherwise a worker has it: only the confirmation was lost
        if not live.epoch:
            self._fail_call(live.call, failure, now, out)
            return
        # It has begun, and its client is not to suffer for a queue that is away for a moment.
        live.publish_tries += 1
        live.publish_at = now + delay_s(live.publish_tries, first_s=0.5, most_s=5.0)
        self._arm(live.publish_at, _Timer.PUBLISH, request_id)

    def _hint(self, call: Call, now: float, out: list[Action]) -> None:
        last = self._hinted.get(call.slug)
        if last is None or now - last >= self._config.hint_s:
            if len(self._hinted) > 4096:
                self._hinted.clear()
            self._hinted[call.slug] = now
            self._tell_demand(call.slug, now, out)
        elif call.slug not in self._hint_owed:
            self._hint_owed[call.slug] = call.deployment
            self._arm(last + self._config.hint_s, _Timer.HINT, call.slug)

    def _runs(self, live: Live, now: float) -> None:
        """Or it is over."""
        self._arm(self._demands.remove(live, now), _Timer.DEMAND, live.call.slug)

    def _tell_demand(self, slug: str, now: float, out: list[Action]) -> None:
        hint = self._demands.tell(slug, now)
        if hint is not None:
            out.append(hint)
            self._arm(self._demands.due_at(slug), _Timer.DEMAND, slug)

    # -- owners -------------------------------------------------------------------------------------------------------

    def _claim(self, claim: Claim, now: float, out: list[Action]) -> Claimed | Gone | Failure:
        self._watch.alive(claim.worker_id)
        live = self._live.get(claim.request_id)
        if live is None:
            return GONE
        call = live.call
        if now >= call.deadline_at:
            self._fail_call(call, overdue(now - call.admitted_at), now, out)
            return GONE
        kind = judge(live, claim)
        if not isinstance(kind, Grant):
            return kind
        if kind is Grant.AGAIN:
            live.token = claim.token or live.token  # a queue that forgot a delivery repeats it by another token
        else:
            if kind is Grant.RECOVERY and self._is_alive(live, claim, now):
                return let_be()
            held_s = now - live.owned_at
            if live.state is State.STREAMING and (kind is Grant.RECOVERY or held_s >= self._config.proof_s):
                self._suspects.stopped(call.slug, live.request_id, held_s)
            if kind in (Grant.FIRST, Grant.RECOVERY):
                if live.recoveries >= self._config.max_recoveries:
                    self._leave_owner(live, now)
                    self._fail_call(call, worn_out(live.recoveries), now, out)
                    return GONE
                if not self._suspects.may_try(call.slug, live.request_id, now):
                    return on_trial(self._suspects.losses(live.request_id))
            if kind is Grant.RECOVERY and live.lost_at is None:
                live.lost_at = now
            self._leave_owner(live, now)
            grant(live, claim, kind, now)
            self._runs(live, now)
            owner = self._watch.add(live, now)
            if owner is not None:
                self._arm(owner.check_at, _Timer.CHECK, owner.worker_id)
        return Claimed(
            epoch=live.epoch,
            budget_s=call.deadline_at - now,
            waited_s=live.waited_s,
            token_ids=tuple(live.tokens),
        )

    def _is_alive(self, live: Live, claim: Claim, now: float) -> bool:
        """Whether a message was handed out again though its owner works on it: after the bus was away the queue has
        missed the owner's signs of life. (The owner itself has let go when it claims a later delivery.)"""
        heard = now - live.heard_at < self._config.settle_s
        return live.state is State.STREAMING and live.token != "" and live.worker_id != claim.worker_id and heard

    def _leave_owner(self, live: Live, now: float) -> None:
        """The owner until now has nothing to say any more; that is no loss by itself."""
        if live.state is State.STREAMING:
            self._watch.remove(live)
            live.interrupt(now)
            self._arm(self._demands.add(live, now), _Timer.DEMAND, live.call.slug)

    def _holds(self, holds: Holds, now: float, out: list[Action]) -> Unwanted:
        self._watch.alive(holds.worker_id)
        ended: list[str] = []
        superseded: list[str] = []
        for held in holds.requests:
            live = self._live.get(held.request_id)
            if live is None:
                ended.append(held.request_id)
            elif held.epoch < 1:
                continue  # it is about to claim
            elif (held.epoch, holds.worker_id) != (live.epoch, live.worker_id) or live.returned:
                superseded.append(held.request_id)
            elif live.state is State.STREAMING:
                self._vouched(live, held.index, now, out)
            elif live.state is State.INTERRUPTED:
                self._ask_back(live, now, out)  # it has not heard it
            else:
                superseded.append(held.request_id)
        return Unwanted(ended=tuple(ended), superseded=tuple(superseded))

    def _look_at(self, owner: Owner, now: float, out: list[Action]) -> None:
        look = self._watch.look(owner, now)
        if look.lost:
            self._lose(owner.worker_id, list(owner.open.values()), "silent", now, out)
            return
        self._arm(owner.check_at, _Timer.CHECK, owner.worker_id)
        if look.quiet:
            self._lose(owner.worker_id, look.quiet, "silent", now, out)
        if look.ask:
            asked = tuple(
                Owned(request_id=live.request_id, epoch=live.epoch, index=len(live.tokens)) for live in look.ask
            )
            out.append(CheckOwner(owner.worker_id, asked))

    def _checked(self, event: OwnerChecked, now: float, out: list[Action]) -> None:
        owner = self._watch.owners.get(event.worker_id)
        asked_at = owner.asked_at if owner is not None else None
        if owner is None or asked_at is None or self._bus_away:
            if owner is not None:
                owner.asked_at = None
            return  # it has nothing of ours any more, or the bus was away meanwhile
        owner.asked_at = None
        answer = event.answer
        if isinstance(answer, Failure):
            if event.unserved:
                # What it claimed since it was asked, it claimed alive.
                lost = [live for live in owner.open.values() if live.token and live.owned_at <= asked_at]
                self._lose(event.worker_id, lost, "unserved", now, out)
            return
        self._watch.alive(event.worker_id)
        running = {(held.request_id, held.epoch): held.index for held in answer.requests}
        denied = []
        for one in event.asked:
            live = owner.open.get(one.request_id)
            if live is None or live.epoch != one.epoch:
                continue
            index = running.get((one.request_id, one.epoch))
            if index is not None:
                self._vouched(live, index, now, out)
            elif live.heard_at <= asked_at and now - live.owned_at >= self._config.settle_s:
                # (The answer to a claim may be on its way for a while, and frames may have overtaken this answer.)
                denied.append(live)
        self._lose(event.worker_id, denied, "denied", now, out)

    def _vouched(self, live: Live, index: int, now: float, out: list[Action]) -> None:
        """The owner says that it runs the request and has sent `index` tokens of it."""
        live.heard_at = now
        if index <= len(live.tokens):
            live.ahead = False
        elif live.ahead:  # for the second time, and no frame in between: they are lost
            self._interrupt(live, now, out)
        else:
            live.ahead = True

    def _lose(self, worker_id: str, lives: Iterable[Live], how: str, now: float, out: list[Action]) -> None:
        """These requests have lost their owner: give their messages back to the queue, at once."""
        lost = list(lives)
        if lost:
            out.append(OwnerLost(worker_id, how, len(lost)))
        for live in lost:
            if live.state is not State.STREAMING or self._live.get(live.request_id) is not live:
                continue  # it ended with a sibling that was lost before it
            self._stop(live, now)
            if self._guilty(live, now, out):
                continue
            live.returned = True
            if live.acknowledged:
                self._republish(live, now, out)  # an owner before this one has taken its message away
                continue
            if live.token:
                out.append(GiveBack(live.token))
            self._await_claim(live, now, out)

    def _stop(self, live: Live, now: float) -> None:
        self._leave_owner(live, now)
        live.looks = 0
        if live.lost_at is None:
            live.lost_at = now

    def _guilty(self, live: Live, now: float, out: list[Action]) -> bool:
        """Its owner died; whether it was one too many."""
        if not self._suspects.lost(live.call.slug, live.request_id, now - live.owned_at):
            return False
        self._fail_call(live.call, guilty(self._config.max_deliveries, self._config.proof_s), now, out)
        return True

    def _given_back(self, worker_id: str, back: GivenBack, now: float, out: list[Action]) -> None:
        live = self._live.get(back.request_id)
        if live is None or back.epoch != live.epoch or live.state is State.QUEUED or live.returned:
            return
        was_streaming = live.state is State.STREAMING
        held_s = now - live.owned_at
        self._stop(live, now)
        live.returned = True
        if back.fault and was_streaming:
            out.append(OwnerLost(worker_id, "fault", 1))
            if self._guilty(live, now, out):
                return
        elif was_streaming:
            self._suspects.stopped(live.call.slug, live.request_id, held_s)
        self._arm_reclaim(live, now)

    def _trial_heard(self, trial: Trial, now: float, out: list[Action]) -> None:
        """Two gateways may begin a trial at the same moment: then both hear of it, and the later id's suspect waits."""
        request_id = self._suspects.heard(trial.gateway_id, trial.slug, trial.on, trial.guilty, now)
        live = None if request_id is None else self._live.get(request_id)
        if live is not None and live.state is State.STREAMING and trial.gateway_id < live.request.gateway_id:
            self._interrupt(live, now, out)

    def _interrupt(self, live: Live, now: float, out: list[Action]) -> None:
        """Frames are lost: the owner shall give the request back, and the next claim resumes it."""
        self._suspects.stopped(live.call.slug, live.request_id, now - live.owned_at)
        self._stop(live, now)
        self._ask_back(live, now, out)
        self._arm_reclaim(live, now)

    def _ask_back(self, live: Live, now: float, out: list[Action]) -> None:
        if self._reminders.due(live.request_id, live.epoch, now):
            cancel = Cancel(request_id=live.request_id, epoch=live.epoch, requeue=True)
            out.append(CancelWork(live.worker_id, cancel))

    def _await_claim(self, live: Live, now: float, out: list[Action]) -> None:
        """The message should be in the queue: look whether it is, and again later."""
        if live.sequence is not None:
            out.append(FindMessage(live.request_id, live.sequence))
        self._arm_reclaim(live, now)

    def _arm_reclaim(self, live: Live, now: float) -> None:
        config = self._config
        live.looks += 1
        live.reclaim_at = now + delay_s(live.looks, first_s=config.reclaim_s, most_s=config.reclaim_most_s)
        self._arm(live.reclaim_at, _Timer.RECLAIM, live.request_id)

    def _arm_look(self, live: Live, now: float) -> None:
        config = self._config
        live.looks += 1
        live.reclaim_at = now + delay_s(live.looks, first_s=config.queued_s, most_s=config.queued_most_s)
        self._arm(live.reclaim_at, _Timer.LOOK, live.request_id)

    def _unseen(self, live: Live, now: float, out: list[Action]) -> None:
        """Nobody has claimed a queued request for a while: no replica has room, or the queue has lost its message."""
        if live.sequence is not None:
            out.append(FindMessage(live.request_id, live.sequence))
            self._arm_look(live, now)

    def _unclaimed(self, live: Live, now: float, out: list[Action]) -> None:
        """Nobody has claimed an interrupted request for a while."""
        if not live.returned and live.token:
            # Its owner was asked for it, and has not heard it, or cannot: then without it.
            live.returned = True
            out.append(GiveBack(live.token))
            self._supersede(live.worker_id, live.request_id, live.epoch, now, out)
        if live.sequence is None:
            self._republish(live, now, out)
        else:
            self._await_claim(live, now, out)

    def _message_found(self, request_id: str, sequence: int, found: bool | None, now: float, out: list[Action]) -> None:
        live = self._live.get(request_id)
        if found is not False or live is None or live.sequence != sequence or live.state is State.STREAMING:
            return
        self._republish(live, now, out)

    def _republish(self, live: Live, now: float, out: list[Action]) -> None:
        if live.sequence is not None:
            out.append(Unqueue(live.sequence))
        if live.state is State.STREAMING:
            self._suspects.stopped(live.call.slug, live.request_id, now - live.owned_at)
            self._leave_owner(live, now)
        if live.lost_at is None:
            live.lost_at = now
        replace_message(live)
        out.append(Publish(live.call.slug, live.request, live.attempt))

    # -- frames -------------------------------------------------------------------------------------------------------

    def _frames(self, batch: FrameBatch, now: float, out: list[Action]) -> None:
        self._watch.alive(batch.worker_id)
        for item in batch.items:
            if isinstance(item, Frame):
                self._frame(batch.worker_id, item, now, out)
            else:
                self._end(batch.worker_id, item, now, out)
        for back in batch.given_back:
            self._given_back(batch.worker_id, back, now, out)

    def _frame(self, worker_id: str, frame: Frame, now: float, out: list[Action]) -> None:
        live = self._live.get(frame.request_id)
        if live is None:
            if self._reminders.due(frame.request_id, frame.epoch, now):
                out.append(CancelWork(worker_id, Cancel(request_id=frame.request_id, epoch=frame.epoch)))
            return
        if frame.epoch != live.epoch or live.state is State.QUEUED:
            self._supersede(worker_id, frame.request_id, frame.epoch, now, out)
            return
        live.heard_at = now
        have = len(live.tokens)
        if frame.index == have:
            live.tokens.extend(frame.token_ids)
            live.ahead = False
            live.republished = 0
            gap_s = None if live.first_at is None else now - live.frame_at
            self._resumed(live, now, out)
            if live.first_at is None:
                live.first_at = now
                self._waiting.remove(live.call)
            live.frame_at = now
            out.append(Deliver(live.call.call_id, live.choice, frame, gap_s))
        if live.state is State.INTERRUPTED:
            # It was given up too early, or has a gap. What it says in order is true, but the next owner is on its way.
            if live.returned:
                self._supersede(worker_id, frame.request_id, frame.epoch, now, out)
            else:
                self._ask_back(live, now, out)
        elif frame.index > have or frame.index < have < frame.index + len(frame.token_ids):
            self._interrupt(live, now, out)  # (a frame that lies behind `have` altogether came twice)

    def _supersede(self, worker_id: str, request_id: str, epoch: int, now: float, out: list[Action]) -> None:
        if self._reminders.due(request_id, epoch, now):
            out.append(CancelWork(worker_id, Cancel(request_id=request_id, epoch=epoch, superseded=True)))

    def _resumed(self, live: Live, now: float, out: list[Action]) -> None:
        if live.resuming is None:
            return
        pause_s = None if live.first_at is None else now - live.frame_at
        live.pause_s = max(live.pause_s, pause_s or 0.0)
        out.append(
            Resumed(
                request_id=live.request_id,
                deployment=live.call.deployment,
                worker_id=live.worker_id,
                epoch=live.epoch,
                how=live.resuming.value,
                tokens=len(live.tokens),
                pause_s=pause_s,
                noticed_s=None if live.lost_at is None else now - live.lost_at,
            )
        )
        live.resuming = None
        live.lost_at = None

    def _end(self, worker_id: str, end: End, now: float, out: list[Action]) -> None:
        live = self._live.get(end.request_id)
        if live is None:
            return
        if end.epoch != live.epoch or live.state is State.QUEUED:
            # Who ends a request acknowledges its message, which may be the present owner's safety net.
            live.acknowledged = live.acknowledged or end.epoch >= live.since_epoch
            self._supersede(worker_id, end.request_id, end.epoch, now, out)
            return
        call = live.call
        if end.failure is not None and end.failure.code not in _OWNERS_BUSINESS:
            self._forget(live, now)
            self._unqueue_returned(live, out)
            out.append(account(live, end.failure.code.value, end.failure, end, now))
            self._fail_call(call, end.failure, now, out)
            return
        reason = end.reason
        if end.index != len(live.tokens) or reason is None:
            # Frames are missing, and the worker has acknowledged the queue's message: only a new one can help.
            if live.republished >= self._config.max_republished:
                self._fail_call(call, endless(live.republished + 1), now, out)
                return
            live.republished += 1
            self._republish(live, now, out)
            return
        self._resumed(live, now, out)
        end = msgspec.structs.replace(end, ledger=with_owners(live, end.ledger))
        self._forget(live, now)
        self._unqueue_returned(live, out)
        out.append(Conclude(call.call_id, live.choice, end))
        out.append(account(live, reason.value, None, end, now))

    def _unqueue_returned(self, live: Live, out: list[Action]) -> None:
        """A late end of a request that was given back: nobody needs to be handed it any more."""
        if live.returned and live.sequence is not None:
            out.append(Unqueue(live.sequence))

    # -- time ---------------------------------------------------------------------------------------------------------

    def _arm(self, at: float | None, kind: _Timer, key: str) -> None:
        if at is None:
            return
        self._timer_count += 1
        heapq.heappush(self._timers, (at, self._timer_count, kind, key))
        if len(self._timers) > 64 + 6 * len(self._live):  # most are of ended requests: drop those
            self._timers = [timer for timer in self._timers if self._wanted(timer)]
            heapq.heapify(self._timers)

    def _wanted(self, timer: _Alarm) -> bool:
        at, _, kind, key = timer
        match kind:
            case _Timer.BUDGET:
                return key in self._calls
            case _Timer.HINT:
                return key in self._hint_owed
            case _Timer.DEMAND:
                return self._demands.due_at(key) == at
            case _Timer.CHECK:
                owner = self._watch.owners.get(key)
                return owner is not None and owner.check_at == at and not self._bus_away
            case _Timer.RECLAIM:
                live = self._live.get(key)
                return live is not None and live.state is State.INTERRUPTED and live.reclaim_at == at
            case _Timer.LOOK:
                live = self._live.get(key)
                return live is not None and live.state is State.QUEUED and live.reclaim_at == at
            case _Timer.PUBLISH:
                live = self._live.get(key)
                return live is not None and live.state is State.QUEUED and live.publish_at == at
        assert_never(kind)

    def _time(self, now: float, out: list[Action]) -> None:
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)
            if not self._wanted(timer):
                continue
            _, _, kind, key = timer
            match kind:
                case _Timer.BUDGET:
                    call = self._calls[key]
                    self._fail_call(call, overdue(now - call.admitted_at), now, out)
                case _Timer.HINT:
                    self._hinted[key] = now
                    del self._hint_owed[key]
                    self._tell_demand(key, now, out)
                case _Timer.DEMAND:
                    self._tell_demand(key, now, out)
                case _Timer.CHECK:
                    self._look_at(self._watch.owners[key], now, out)
                case _Timer.RECLAIM:
                    self._unclaimed(self._live[key], now, out)
                case _Timer.LOOK:
                    self._unseen(self._live[key], now, out)
                case _Timer.PUBLISH:
                    live = self._live[key]
                    live.publish_at = 0.0
                    live.attempt += 1
                    out.append(Publish(live.call.slug, live.request, live.attempt))
                case _:
                    assert_never(kind)

    # -- out ----------------------------------------------------------------------------------------------------------

    def _fail_call(self, call: Call, failure: Failure, now: float, out: list[Action]) -> None:
        out.append(Fail(call.call_id, failure))
        self._end_call(call, failure, now, out)

    def _end_call(self, call: Call, failure: Failure, now: float, out: list[Action]) -> None:
        for live in list(call.open.values()):
            self._forget(live, now)
            self._release(live, now, out)
            out.append(account(live, failure.code.value, failure, None, now))
        self._close(call)

    def _release(self, live: Live, now: float, out: list[Action]) -> None:
        """Nobody wants this request any more: out of the queue with it, and its owner shall stop."""
        if live.state is State.STREAMING and live.token:
            out.append(Settle(live.token))  # its owner may be dead already
        elif live.state is not State.STREAMING and live.sequence is not None:
            out.append(Unqueue(live.sequence))
        if live.state is State.QUEUED:
            return
        out.append(CancelWork(live.worker_id, Cancel(request_id=live.request_id, epoch=live.epoch)))
        self._reminders.told(live.request_id, live.epoch, now)

    def _forget(self, live: Live, now: float) -> None:
        call = live.call
        self._runs(live, now)
        del call.open[live.request_id]
        del self._live[live.request_id]
        if live.state is State.STREAMING:
            self._watch.remove(live)
        self._suspects.forget(call.slug, live.request_id)
        self._ended += 1
        left = self._open_by_slug[call.slug] - 1
        if left:
            self._open_by_slug[call.slug] = left
        else:
            del self._open_by_slug[call.slug]
        if not call.open:
            self._close(call)

    def _close(self, call: Call) -> None:
        self._calls.pop(call.call_id, None)
        self._waiting.remove(call)
