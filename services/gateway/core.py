"""The state machine of open requests: queued → streaming → (interrupted → streaming …) → ended. Pure.

The gateway is the one authority on who owns a request and on what its client has. Ownership is an *epoch*: every claim
gets the next one, and only frames of the current epoch at the next index are let through, so each token reaches the
client once and in order, whatever crashed, moved or was lost.

A client *call* is a set of requests (choices × prompts). It has one answer: the failure of one request takes its
siblings with it.

What gets lost is found out and repeated here:

* a gap in the frames → the owner is told to give the request back (`Cancel(requeue=True)`) and the next claim resumes;
* an end after a gap, or silence after a lost end → the queue message is gone already: the request is published again;
* an owner that goes on with a request that has ended here is told again, every `remind_s`;
* a request that was delivered to and claimed by more than `max_deliveries` owners kills them: it fails with
  `worker_lost`.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

import msgspec

from shared.contracts.generation import End, Frame, FrameBatch, Ledger, Usage
from shared.contracts.requests import Cancel, Claim, Claimed, Gone, Request
from shared.contracts.residency import LoadProgress, Progress
from shared.errors import Code, Failure

AnswerHandle = Callable[[Claimed | Gone | Failure], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Seconds and counts. `quiet_s`: silence of an owner after its first frame until it is asked to give the request
    back; `prefill_quiet_s`: the same before the first frame (a long prompt on a slow device must not be interrupted);
    `reconnect_quiet_s`: the same after the bus was away; `reclaim_s`: how long a request that was asked back waits for
    its next claim before it is published again.
    """

    max_deliveries: int = 5
    max_republished: int = 3
    quiet_s: float = 60.0
    prefill_quiet_s: float = 600.0
    reconnect_quiet_s: float = 5.0
    reclaim_s: float = 15.0
    remind_s: float = 0.5
    leaving_s: float = 60.0
    inform_s: float = 0.2
    progress_fresh_s: float = 2.0
    hint_s: float = 0.01


# -- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A valid call came in. `queue_limit` bounds this gateway's open requests of the deployment."""

    call_id: str
    deployment: str
    slug: str
    requests: tuple[Request, ...]
    queue_limit: int
    budget_s: float
    stream: bool


@dataclass(frozen=True, slots=True)
class Published:
    """The queue has a request."""

    request_id: str
    attempt: int
    sequence: int


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """The queue did not take a request (or did not say so)."""

    request_id: str
    attempt: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class ClaimAsked:
    """A worker wants a request."""

    claim: Claim
    reply: AnswerHandle


@dataclass(frozen=True, slots=True)
class FramesArrived:
    """Tokens and ends."""

    batch: FrameBatch


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """The client closed its connection, or reads too slowly to be served."""

    call_id: str


@dataclass(frozen=True, slots=True)
class ProgressArrived:
    """A cold start got further. `LoadProgress.deployment` is the deployment's slug."""

    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class DeploymentGone:
    """A deployment was deleted."""

    deployment: str


@dataclass(frozen=True, slots=True)
class DeploymentFailed:
    """No server can load a deployment, and no replica of it answers: who waits for one waits in vain."""

    deployment: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The bus was away and is back: anything may have been lost."""


@dataclass(frozen=True, slots=True)
class Closing:
    """The gateway ends: every open call does, with this failure."""

    failure: Failure


Event = (
    Admitted
    | Published
    | PublishFailed
    | ClaimAsked
    | FramesArrived
    | ClientLeft
    | ProgressArrived
    | DeploymentGone
    | DeploymentFailed
    | Reconnected
    | Closing
)

# -- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Publish:
    """Put a request into its deployment's queue; comes back as `Published` or `PublishFailed`."""

    slug: str
    request: Request
    attempt: int


@dataclass(frozen=True, slots=True)
class Unqueue:
    """Take a request out of the queue."""

    sequence: int


@dataclass(frozen=True, slots=True)
class AnswerClaim:
    """Answer a worker's claim."""

    reply: AnswerHandle
    answer: Claimed | Gone | Failure


@dataclass(frozen=True, slots=True)
class Deliver:
    """A frame for choice `choice` of a call. `gap_s`: seconds since the frame before, None for the first one."""

    call_id: str
    choice: int
    frame: Frame
    gap_s: float | None


@dataclass(frozen=True, slots=True)
class Conclude:
    """Choice `choice` of a call is complete."""

    call_id: str
    choice: int
    end: End


@dataclass(frozen=True, slots=True)
class Fail:
    """A call has failed; nothing follows."""

    call_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class Inform:
    """A call that streams and waits may tell its client how far the cold start is."""

    call_id: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class CancelWork:
    """Tell the owner of a request to stop."""

    worker_id: str
    cancel: Cancel


@dataclass(frozen=True, slots=True)
class Hint:
    """Tell the scheduler that requests of this deployment wait."""

    deployment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A request has ended: the facts of its canonical log line. `failure` None: it is complete."""

    request_id: str
    deployment: str
    reason: str
    failure: Failure | None
    usage: Usage
    ledger: Ledger
    claims: int
    duration_s: float
    queue_s: float | None
    ttft_s: float | None


Action = (
    Publish | Unqueue | AnswerClaim | Deliver | Conclude | Fail | Inform | CancelWork | Hint | Account
)  # fmt: skip

# -- state ------------------------------------------------------------------------------------------------------------


class State(enum.Enum):
    """Where an open request is. `INTERRUPTED`: its owner was asked to give it back; the next claim resumes it."""

    QUEUED = "queued"
    STREAMING = "streaming"
    INTERRUPTED = "interrupted"


@dataclass(slots=True, kw_only=True)
class _Call:
    call_id: str
    deployment: str
    slug: str
    admitted_at: float
    deadline_at: float
    stream: bool
    open: dict[str, _Live] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class _Live:
    call: _Call
    choice: int
    request: Request
    state: State = State.QUEUED
    attempt: int = 0
    publishing: bool = True
    sequence: int | None = None
    epoch: int = 0
    delivery: int = 0
    worker_id: str = ""
    tokens: list[int] = field(default_factory=list)
    claims: int = 0
    recoveries: int = 0
    republished: int = 0
    quiet_s: float = 0.0
    quiet_at: float = 0.0
    heard_at: float = 0.0
    reminded_at: float = 0.0
    claimed_at: float | None = None
    first_at: float | None = None
    frame_at: float = 0.0


@dataclass(slots=True)
class _Leaving:
    worker_id: str
    epoch: int
    since: float
    reminded_at: float


class _Timer(enum.Enum):
    BUDGET = 0
    QUIET = 1
    RECLAIM = 2
    HINT = 3


# A worker that gave a request up because it was told to, or because it lost it: nothing that a client should hear.
_OWNERS_BUSINESS = (Code.CANCELLED, Code.STALE_EPOCH)
GONE = Gone(reason="Nobody waits for this request any more.")


class GatewayCore:
    """See the module. One instance per gateway process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._calls: dict[str, _Call] = {}
        self._live: dict[str, _Live] = {}
        self._open_by_slug: dict[str, int] = {}
        # Calls that stream and have nothing yet, by slug: those who want to hear about a cold start.
        self._waiting: dict[str, dict[str, _Call]] = {}
        self._progress: dict[str, tuple[Progress, float]] = {}
        self._informed: dict[str, float] = {}
        self._hinted: dict[str, float] = {}
        self._hint_owed: dict[str, str] = {}
        # Requests that ended here while a worker had them, oldest first: who goes on is told again.
        self._leaving: dict[str, _Leaving] = {}
        self._timers: list[tuple[float, int, _Timer, str, int]] = []
        self._timer_count = 0
        self._admitted = 0
        self._ended = 0

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    # -- the machine --------------------------------------------------------------------------------------------------

    def handle(self, event: Event | None, now: float) -> list[Action]:
        """Take an event (None: time has passed) at monotonic second `now`; say what is wanted, in order."""
        out: list[Action] = []
        match event:
            case None:
                self._time(now, out)
            case FramesArrived(batch=batch):
                for item in batch.items:
                    if isinstance(item, Frame):
                        self._frame(item, now, out)
                    else:
                        self._end(item, now, out)
            case Admitted():
                self._admit(event, now, out)
            case Published(request_id=request_id, attempt=attempt, sequence=sequence):
                self._published(request_id, attempt, sequence, now, out)
            case PublishFailed(request_id=request_id, attempt=attempt, failure=failure):
                self._publish_failed(request_id, attempt, failure, now, out)
            case ClaimAsked(claim=claim, reply=reply):
                out.append(AnswerClaim(reply, self._claim(claim, now, out)))
            case ClientLeft(call_id=call_id):
                call = self._calls.get(call_id)
                if call is not None:
                    self._end_call(call, Failure(code=Code.CANCELLED, message="The client left."), now, out)
            case ProgressArrived(progress=progress):
                self._progressed(progress, now, out)
            case DeploymentGone(deployment=deployment):
                gone = Failure(code=Code.UNKNOWN_MODEL, message=f"The model {deployment!r} was deleted.", param="model")
                for call in [call for call in self._calls.values() if call.deployment == deployment]:
                    self._fail_call(call, gone, now, out)
            case DeploymentFailed(deployment=deployment, failure=failure):
                for call in [call for call in self._calls.values() if call.deployment == deployment]:
                    if any(live.state is not State.STREAMING for live in call.open.values()):
                        self._fail_call(call, failure, now, out)
            case Reconnected():
                for live in self._live.values():
                    if live.state is State.STREAMING:
                        live.quiet_s = self._config.reconnect_quiet_s
                        live.heard_at = now
                        self._watch(live, now)
            case Closing(failure=failure):
                for call in list(self._calls.values()):
                    self._fail_call(call, failure, now, out)
            case _:
                assert_never(event)
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
        for request_id, live in self._live.items():
            assert live.request.request_id == request_id
            assert (live.epoch == 0) == (live.worker_id == ""), "an owner has an epoch and an epoch an owner"
            assert live.state is not State.STREAMING or live.epoch > 0
            assert not live.tokens or live.first_at is not None
            assert request_id not in self._leaving, "an open request is not leaving"
        for slug, calls in self._waiting.items():
            assert calls, "nobody is kept at zero"
            for call_id, call in calls.items():
                assert self._calls[call_id] is call
                assert call.stream
                assert call.slug == slug
                assert all(live.first_at is None for live in call.open.values())

    # -- in -----------------------------------------------------------------------------------------------------------

    def _admit(self, event: Admitted, now: float, out: list[Action]) -> None:
        count = len(event.requests)
        open_now = self._open_by_slug.get(event.slug, 0)
        if open_now + count > event.queue_limit:
            message = f"The queue of {event.deployment!r} has its limit of {event.queue_limit} requests."
            failure = Failure(code=Code.QUEUE_FULL, message=message, retry_after_s=1.0)
            self._admitted += count
            self._ended += count
            out.append(Fail(event.call_id, failure))
            for request in event.requests:
                out.append(_refused(request, failure))
            return
        call = _Call(
            call_id=event.call_id,
            deployment=event.deployment,
            slug=event.slug,
            admitted_at=now,
            deadline_at=now + event.budget_s,
            stream=event.stream,
        )
        self._calls[call.call_id] = call
        self._arm(call.deadline_at, _Timer.BUDGET, call.call_id, 0)
        for choice, request in enumerate(event.requests):
            live = _Live(call=call, choice=choice, request=request)
            call.open[request.request_id] = live
            self._live[request.request_id] = live
            out.append(Publish(call.slug, request, 0))
        self._admitted += count
        self._open_by_slug[call.slug] = open_now + count
        if call.stream:
            self._waiting.setdefault(call.slug, {})[call.call_id] = call
            known = self._progress.get(call.slug)
            if known is not None and now - known[1] <= self._config.progress_fresh_s:
                out.append(Inform(call.call_id, known[0]))

    def _published(self, request_id: str, attempt: int, sequence: int, now: float, out: list[Action]) -> None:
        live = self._live.get(request_id)
        if live is None or live.attempt != attempt:
            out.append(Unqueue(sequence))  # it ended, or was published again, while this was on its way
            return
        live.publishing = False
        live.sequence = sequence
        if live.state is State.QUEUED:
            self._hint(live.call, now, out)

    def _publish_failed(self, request_id: str, attempt: int, failure: Failure, now: float, out: list[Action]) -> None:
        live = self._live.get(request_id)
        if live is None or live.attempt != attempt:
            return
        live.publishing = False
        if live.state is State.QUEUED:  # otherwise a worker has it: only the confirmation was lost
            self._fail_call(live.call, failure, now, out)

    def _hint(self, call: _Call, now: float, out: list[Action]) -> None:
        last = self._hinted.get(call.slug)
        if last is None or now - last >= self._config.hint_s:
            if len(self._hinted) > 4096:
                self._hinted.clear()
            self._hinted[call.slug] = now
            out.append(Hint(call.deployment))
        elif call.slug not in self._hint_owed:
            self._hint_owed[call.slug] = call.deployment
            self._arm(last + self._config.hint_s, _Timer.HINT, call.slug, 0)

    def _claim(self, claim: Claim, now: float, out: list[Action]) -> Claimed | Gone | Failure:
        live = self._live.get(claim.request_id)
        if live is None:
            return GONE
        call = live.call
        if now >= call.deadline_at:
            self._fail_call(call, _overdue(now - call.admitted_at), now, out)
            return GONE
        if claim.delivery < live.delivery and live.state is State.STREAMING:
            # `Gone` would acknowledge the queue's message, which is the later owner's safety net.
            return Failure(code=Code.STALE_EPOCH, message="A later delivery of this request was claimed already.")
        # A delivery that nobody claimed is no try, nor is a claim whose answer was lost: each counts in one of the two.
        tries = min(claim.delivery, live.claims + 1)
        if tries > self._config.max_deliveries:
            message = f"The request was lost {tries - 1} times with its worker and is not tried again."
            live.state = State.QUEUED  # nobody has it, so nobody needs to be told
            self._fail_call(call, Failure(code=Code.WORKER_LOST, message=message), now, out)
            return GONE
        if live.epoch and (claim.delivery > live.delivery or live.state is not State.STREAMING):
            live.recoveries += 1
        live.epoch += 1
        live.claims += 1
        live.worker_id = claim.worker_id
        live.delivery = claim.delivery
        live.state = State.STREAMING
        live.heard_at = now
        live.quiet_s = self._config.prefill_quiet_s
        if live.claimed_at is None:
            live.claimed_at = now
        self._watch(live, now)
        return Claimed(
            epoch=live.epoch,
            budget_s=call.deadline_at - now,
            waited_s=now - call.admitted_at,
            token_ids=tuple(live.tokens),
        )

    def _frame(self, frame: Frame, now: float, out: list[Action]) -> None:
        live = self._live.get(frame.request_id)
        if live is None:
            self._remind_leaving(frame.request_id, frame.epoch, now, out)
            return
        if frame.epoch != live.epoch or live.state is State.QUEUED:
            return
        if live.state is State.INTERRUPTED:
            if now - live.reminded_at >= self._config.remind_s:
                self._ask_back(live, now, out)
            return
        live.heard_at = now
        have = len(live.tokens)
        if frame.index != have:
            if frame.index + len(frame.token_ids) <= have:
                return  # the same frame twice
            self._interrupt(live, now, out)
            return
        live.tokens.extend(frame.token_ids)
        live.quiet_s = self._config.quiet_s
        gap_s = None if live.first_at is None else now - live.frame_at
        if live.first_at is None:
            live.first_at = now
            # The prefill's timer is far away: watch the decoding from now on.
            self._watch(live, now)
            if live.call.stream:
                self._stop_waiting(live.call)
        live.frame_at = now
        out.append(Deliver(live.call.call_id, live.choice, frame, gap_s))

    def _end(self, end: End, now: float, out: list[Action]) -> None:
        self._leaving.pop(end.request_id, None)
        live = self._live.get(end.request_id)
        if live is None or end.epoch != live.epoch or live.state is State.QUEUED:
            return
        call = live.call
        if end.failure is not None and end.failure.code not in _OWNERS_BUSINESS:
            self._forget(live)
            out.append(self._account(live, end.failure.code.value, end.failure, end, now))
            self._fail_call(call, end.failure, now, out)
            return
        reason = end.reason
        if end.index != len(live.tokens) or reason is None:
            # Frames are missing, and the worker has acknowledged the queue's message: only a new one can help.
            self._republish(live, now, out)
            return
        if live.recoveries > end.ledger.recoveries:
            ledger = msgspec.structs.replace(end.ledger, recoveries=live.recoveries)
            end = msgspec.structs.replace(end, ledger=ledger)
        self._forget(live)
        out.append(Conclude(call.call_id, live.choice, end))
        out.append(self._account(live, reason.value, None, end, now))

    def _progressed(self, message: LoadProgress, now: float, out: list[Action]) -> None:
        slug, progress = message.deployment, message.progress
        if slug not in self._progress and len(self._progress) >= 4096:
            self._progress.clear()
            self._informed.clear()
        before = self._progress.get(slug)
        self._progress[slug] = (progress, now)
        waiting = self._waiting.get(slug)
        if not waiting:
            return
        # At most five comments a second and stream, and fewer when very many wait.
        interval = max(self._config.inform_s, len(waiting) / 1000)
        same_phase = before is not None and before[0].phase == progress.phase
        if same_phase and now - self._informed.get(slug, -interval) < interval:
            return
        self._informed[slug] = now
        out.extend(Inform(call_id, progress) for call_id in waiting)

    # -- time ---------------------------------------------------------------------------------------------------------

    def _arm(self, at: float, kind: _Timer, key: str, epoch: int) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (at, self._timer_count, kind, key, epoch))
        if len(self._timers) > 64 + 6 * len(self._live):  # most are of ended requests: drop those
            self._timers = [timer for timer in self._timers if self._wanted(timer)]
            heapq.heapify(self._timers)

    def _watch(self, live: _Live, now: float) -> None:
        """Look at this owner again when it has been silent for too long; one timer counts, the latest."""
        live.quiet_at = max(now, live.heard_at + live.quiet_s)
        self._arm(live.quiet_at, _Timer.QUIET, live.request.request_id, live.epoch)

    def _wanted(self, timer: tuple[float, int, _Timer, str, int]) -> bool:
        at, _, kind, key, epoch = timer
        if kind is _Timer.BUDGET:
            return key in self._calls
        if kind is _Timer.HINT:
            return key in self._hint_owed
        live = self._live.get(key)
        if live is None or live.epoch != epoch:
            return False
        if kind is _Timer.QUIET:
            return live.state is State.STREAMING and live.quiet_at == at
        return live.state is State.INTERRUPTED

    def _time(self, now: float, out: list[Action]) -> None:
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)
            if not self._wanted(timer):
                continue
            _, _, kind, key, _ = timer
            match kind:
                case _Timer.BUDGET:
                    call = self._calls[key]
                    self._fail_call(call, _overdue(now - call.admitted_at), now, out)
                case _Timer.HINT:
                    self._hinted[key] = now
                    out.append(Hint(self._hint_owed.pop(key)))
                case _Timer.QUIET:
                    live = self._live[key]
                    if live.heard_at + live.quiet_s <= now:
                        self._interrupt(live, now, out)
                    else:
                        self._watch(live, now)
                case _Timer.RECLAIM:
                    self._republish(self._live[key], now, out)
                case _:
                    assert_never(kind)

    # -- recovery -----------------------------------------------------------------------------------------------------

    def _interrupt(self, live: _Live, now: float, out: list[Action]) -> None:
        live.state = State.INTERRUPTED
        self._ask_back(live, now, out)
        self._arm(now + self._config.reclaim_s, _Timer.RECLAIM, live.request.request_id, live.epoch)

    def _ask_back(self, live: _Live, now: float, out: list[Action]) -> None:
        live.reminded_at = now
        cancel = Cancel(request_id=live.request.request_id, epoch=live.epoch, requeue=True)
        out.append(CancelWork(live.worker_id, cancel))

    def _republish(self, live: _Live, now: float, out: list[Action]) -> None:
        if live.republished >= self._config.max_republished:
            message = f"The request was published {live.republished + 1} times and its end was lost each time."
            self._fail_call(live.call, Failure(code=Code.WORKER_LOST, message=message), now, out)
            return
        if live.sequence is not None:
            out.append(Unqueue(live.sequence))
        live.republished += 1
        live.attempt += 1
        live.sequence = None
        live.publishing = True
        live.state = State.QUEUED
        live.delivery = 0
        live.epoch += 1  # the owner until now has nothing to say any more
        out.append(Publish(live.call.slug, live.request, live.attempt))

    def _remind_leaving(self, request_id: str, epoch: int, now: float, out: list[Action]) -> None:
        leaving = self._leaving.get(request_id)
        if leaving is None or epoch != leaving.epoch or now - leaving.reminded_at < self._config.remind_s:
            return
        leaving.reminded_at = now
        out.append(CancelWork(leaving.worker_id, Cancel(request_id=request_id, epoch=leaving.epoch)))

    # -- out ----------------------------------------------------------------------------------------------------------

    def _fail_call(self, call: _Call, failure: Failure, now: float, out: list[Action]) -> None:
        out.append(Fail(call.call_id, failure))
        self._end_call(call, failure, now, out)

    def _end_call(self, call: _Call, failure: Failure, now: float, out: list[Action]) -> None:
        for live in list(call.open.values()):
            self._forget(live)
            self._release(live, now, out)
            out.append(self._account(live, failure.code.value, failure, None, now))
        self._close(call)

    def _release(self, live: _Live, now: float, out: list[Action]) -> None:
        """Nobody wants this request any more: out of the queue with it, and its owner shall stop."""
        if live.state is not State.STREAMING and live.sequence is not None:
            out.append(Unqueue(live.sequence))
        if live.state is State.QUEUED:
            return
        request_id = live.request.request_id
        out.append(CancelWork(live.worker_id, Cancel(request_id=request_id, epoch=live.epoch)))
        while self._leaving:
            oldest, leaving = next(iter(self._leaving.items()))
            if now - leaving.since < self._config.leaving_s and len(self._leaving) < 65_536:
                break
            del self._leaving[oldest]
        self._leaving[request_id] = _Leaving(live.worker_id, live.epoch, now, now)

    def _forget(self, live: _Live) -> None:
        call = live.call
        request_id = live.request.request_id
        del call.open[request_id]
        del self._live[request_id]
        self._ended += 1
        left = self._open_by_slug[call.slug] - 1
        if left:
            self._open_by_slug[call.slug] = left
        else:
            del self._open_by_slug[call.slug]
        if not call.open:
            self._close(call)

    def _close(self, call: _Call) -> None:
        self._calls.pop(call.call_id, None)
        self._stop_waiting(call)

    def _stop_waiting(self, call: _Call) -> None:
        waiting = self._waiting.get(call.slug)
        if waiting is not None and waiting.pop(call.call_id, None) is not None and not waiting:
            del self._waiting[call.slug]

    def _account(self, live: _Live, reason: str, failure: Failure | None, end: End | None, now: float) -> Account:
        call = live.call
        return Account(
            request_id=live.request.request_id,
            deployment=call.deployment,
            reason=reason,
            failure=failure,
            usage=Usage(completion_tokens=len(live.tokens)) if end is None else end.usage,
            ledger=Ledger() if end is None else end.ledger,
            claims=live.claims,
            duration_s=now - call.admitted_at,
            queue_s=None if live.claimed_at is None else live.claimed_at - call.admitted_at,
            ttft_s=None if live.first_at is None else live.first_at - call.admitted_at,
        )


def _overdue(seconds: float) -> Failure:
    return Failure(code=Code.DEADLINE_EXCEEDED, message=f"The request did not finish within {seconds:.0f} seconds.")


def _refused(request: Request, failure: Failure) -> Account:
    return Account(
        request_id=request.request_id,
        deployment=request.deployment,
        reason=failure.code.value,
        failure=failure,
        usage=Usage(),
        ledger=Ledger(),
        claims=0,
        duration_s=0.0,
        queue_s=None,
        ttft_s=None,
    )
