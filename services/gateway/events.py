"""The gateway's core: what happens to it (events) and what it wants done (actions). None of this crosses the bus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shared.contracts.generation import End, Frame, FrameBatch, Ledger, Usage
from shared.contracts.requests import Cancel, Claim, Claimed, Gone, Holds, Owned, Request, Running, Trial, Unwanted
from shared.contracts.residency import LoadProgress, Progress
from shared.errors import Failure

AnswerHandle = Callable[[Claimed | Gone | Failure], None]
HoldsHandle = Callable[[Unwanted | Failure], None]

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
    """Tokens, ends, and requests that their owner gives back."""

    batch: FrameBatch


@dataclass(frozen=True, slots=True)
class HoldsAsked:
    """A worker tells what it runs for this gateway."""

    holds: Holds
    reply: HoldsHandle


@dataclass(frozen=True, slots=True)
class OwnerChecked:
    """The answer of `worker_id` to a `CheckOwner` about `asked`. `unserved`: nobody serves the call, so it is dead."""

    worker_id: str
    asked: tuple[Owned, ...]
    answer: Running | Failure
    unserved: bool = False


@dataclass(frozen=True, slots=True)
class MessageFound:
    """Whether the queue still has a message; None: it could not be asked."""

    request_id: str
    sequence: int
    found: bool | None


@dataclass(frozen=True, slots=True)
class TrialHeard:
    """Another gateway tries a suspect, or does so no more."""

    trial: Trial


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
class Disconnected:
    """The bus is away: silence says nothing about anybody."""


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The bus was away and is back: anything may have been lost, and others come back a little later."""


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
    | HoldsAsked
    | OwnerChecked
    | MessageFound
    | TrialHeard
    | ClientLeft
    | ProgressArrived
    | DeploymentGone
    | DeploymentFailed
    | Disconnected
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
class GiveBack:
    """Give a lost owner's message back to the queue, at once, for another worker."""

    token: str


@dataclass(frozen=True, slots=True)
class Settle:
    """Acknowledge the message of a request that nobody wants any more, in its owner's stead."""

    token: str


@dataclass(frozen=True, slots=True)
class FindMessage:
    """Ask the queue whether it still has a message; comes back as `MessageFound`."""

    request_id: str
    sequence: int


@dataclass(frozen=True, slots=True)
class CheckOwner:
    """Ask a worker whether it still runs these requests; comes back as `OwnerChecked`."""

    worker_id: str
    requests: tuple[Owned, ...]


@dataclass(frozen=True, slots=True)
class AnswerClaim:
    """Answer a worker's claim."""

    reply: AnswerHandle
    answer: Claimed | Gone | Failure


@dataclass(frozen=True, slots=True)
class AnswerHolds:
    """Tell a worker which of the requests that it runs are not wanted."""

    reply: HoldsHandle
    answer: Unwanted


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
    """Tell the owner of a request, or who believes to be it, to stop."""

    worker_id: str
    cancel: Cancel


@dataclass(frozen=True, slots=True)
class Hint:
    """Tell the scheduler that `waiting` requests of this deployment run nowhere, the oldest for `oldest_s` seconds."""

    deployment: str
    waiting: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class TellTrial:
    """Tell the other gateways that a suspect is tried, or is not any more. `guilty`: it was found out."""

    slug: str
    request_id: str
    on: bool
    guilty: bool


@dataclass(frozen=True, slots=True)
class OwnerLost:
    """Requests lost their owner, for log and metrics.

    `how` is "unserved" (nobody serves the worker's calls), "silent" (no answer for too long), "denied" (it answers, and
    does not run them) or "fault" (it gave them back because its engine died).
    """

    worker_id: str
    how: str
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The first sign of a request's new owner has come, for log and metrics.

    `how` is "recovery", "migration" or "reclaim" (a migration that failed: the source goes on). `pause_s` counts from
    the last token before, None if there was none; `noticed_s` from when the loss was noticed, None if nothing was lost.
    """

    request_id: str
    deployment: str
    worker_id: str
    epoch: int
    how: str
    tokens: int
    pause_s: float | None
    noticed_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A request has ended: the facts of its canonical log line. `failure` None: it is complete.

    `places` are the replicas in which it ran, with their workers.
    """

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
    places: tuple[tuple[str, str], ...] = ()


Action = (
    Publish
    | Unqueue
    | GiveBack
    | Settle
    | FindMessage
    | CheckOwner
    | AnswerClaim
    | AnswerHolds
    | Deliver
    | Conclude
    | Fail
    | Inform
    | CancelWork
    | Hint
    | TellTrial
    | OwnerLost
    | Resumed
    | Account
)
# Those that take a while; all others are carried out at once and in order.
LONG = (Publish, Unqueue, FindMessage, CheckOwner)
