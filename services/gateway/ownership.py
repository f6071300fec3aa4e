"""Who owns an open request, and who may become its owner. Pure.

Ownership is an *epoch*: every claim that is granted gets the next one, and only frames of the current one are let
through. Three kinds of claim:

* by a **delivery** of the queue: the message was handed out (again), so whoever had it before has lost it (unless the
  core knows better). A later delivery beats an earlier one, a message that was replaced by another one is gone;
* by **after_epoch**, in a migration: a compare-and-set. Of destination and source, who both may ask, one wins;
* the **same claim again** (the same delivery, the same `claim_id`), because its answer was lost: the same answer.

A request whose message the gateway has given back belongs to nobody until the queue hands it out.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from shared.contracts.requests import Claim, Gone, Request
from shared.errors import Code, Failure

MOST_CLAIM_IDS: Final = 16
MOST_SEQUENCES: Final = 8
MOST_PLACES: Final = 8

GONE: Final = Gone(reason="Nobody waits for this request any more.")
REPLACED: Final = Gone(reason="This request was published again; this message is void.")


class State(enum.Enum):
    """Where an open request is. `INTERRUPTED`: its owner is lost or asked to stop; the next claim resumes it."""

    QUEUED = "queued"
    STREAMING = "streaming"
    INTERRUPTED = "interrupted"


class Grant(enum.StrEnum):
    """What a claim that is granted means."""

    FIRST = "first"
    AGAIN = "again"
    RECOVERY = "recovery"
    MIGRATION = "migration"
    RECLAIM = "reclaim"


@dataclass(slots=True, kw_only=True)
class Call:
    """A client call: requests with one answer. Times are monotonic seconds."""

    call_id: str
    deployment: str
    slug: str
    admitted_at: float
    deadline_at: float
    stream: bool
    open: dict[str, Live] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Live:
    """An open request. Times are monotonic seconds.

    The queue's message: `attempt` counts its publications, `sequence` names the message (None: not known yet), `token`
    acknowledges it, `delivery` is that of the last grant (0: nobody had this message), `returned` whether the queue has
    it back, `acknowledged` whether an earlier owner has (probably) acknowledged it.

    `waits_since`: it was taken from its owner then and waits again; `waited_s` is how long it had waited when it was
    handed out last, `queued_s` all its waits together.

    `places` maps the replicas in which it ran, the first one and the last, to their workers, in order.
    """

    call: Call
    choice: int
    request: Request
    state: State = State.QUEUED

    attempt: int = 0
    sequence: int | None = None
    replaced: tuple[int, ...] = ()
    token: str = ""
    delivery: int = 0
    returned: bool = False
    acknowledged: bool = False
    since_epoch: int = 0
    republished: int = 0
    publish_tries: int = 0
    publish_at: float = 0.0

    epoch: int = 0
    worker_id: str = ""
    claim_ids: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    owned_at: float = 0.0
    heard_at: float = 0.0
    ahead: bool = False
    reclaim_at: float = 0.0
    looks: int = 0

    tokens: list[int] = field(default_factory=list)
    claims: int = 0
    migrations: int = 0
    recoveries: int = 0
    claimed_at: float | None = None
    waits_since: float | None = None
    waited_s: float = 0.0
    queued_s: float = 0.0
    first_at: float | None = None
    frame_at: float = 0.0
    pause_s: float = 0.0
    resuming: Grant | None = None
    lost_at: float | None = None

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    def interrupt(self, now: float) -> None:
        """It belongs to nobody from now on."""
        self.state = State.INTERRUPTED
        self.waits_since = now


def judge(live: Live, claim: Claim) -> Grant | Gone | Failure:
    """Whether this claim makes its worker the owner of an open request, and as what. Changes nothing."""
    known = live.claim_ids.get(claim.claim_id)
    if known is not None:
        same = known == live.epoch and live.state is State.STREAMING and live.worker_id == claim.worker_id
        return Grant.AGAIN if same else _stale("This claim was granted, and its epoch is over.")
    if claim.after_epoch >= 0:
        if claim.after_epoch != live.epoch or live.state is not State.STREAMING:
            return _stale(f"The request has left epoch {claim.after_epoch}.")
        return Grant.RECLAIM if claim.worker_id == live.worker_id else Grant.MIGRATION
    if claim.sequence and (claim.sequence in live.replaced or live.sequence not in (None, claim.sequence)):
        return REPLACED
    # `Gone` would acknowledge the queue's message, which is the later owner's safety net.
    if claim.delivery < live.delivery:
        return _stale("A later delivery of this request was claimed already.")
    if claim.delivery == live.delivery:
        # Its answer was lost, or the claim came twice: a delivery is its own claim id.
        if live.state is State.STREAMING and claim.worker_id == live.worker_id:
            return Grant.AGAIN
        return _stale("This delivery of the request was claimed already.")
    return Grant.RECOVERY if live.epoch else Grant.FIRST


def grant(live: Live, claim: Claim, kind: Grant, now: float) -> None:
    """Make the worker of a claim the owner, at the next epoch."""
    if kind is not Grant.RECLAIM:
        live.owned_at = now
    if kind in (Grant.FIRST, Grant.RECOVERY):
        live.waited_s = now - (live.call.admitted_at if live.waits_since is None else live.waits_since)
        live.queued_s += live.waited_s
    live.migrations += kind is Grant.MIGRATION
    live.recoveries += kind is Grant.RECOVERY
    if kind is not Grant.FIRST and live.resuming is not Grant.RECOVERY:
        live.resuming = kind
    live.epoch += 1
    live.claims += 1
    live.state = State.STREAMING
    live.worker_id = claim.worker_id
    live.places.pop(claim.replica_id, None)
    live.places[claim.replica_id] = claim.worker_id
    if len(live.places) > MOST_PLACES:
        del live.places[list(live.places)[1]]  # where it began is worth knowing
    live.delivery = max(live.delivery, claim.delivery)
    live.token = claim.token or (live.token if claim.after_epoch >= 0 else "")
    live.sequence = live.sequence or claim.sequence or None
    live.returned = False
    live.ahead = False
    live.looks = 0
    if claim.claim_id:
        while len(live.claim_ids) >= MOST_CLAIM_IDS:
            del live.claim_ids[next(iter(live.claim_ids))]
        live.claim_ids[claim.claim_id] = live.epoch
    if live.claimed_at is None:
        live.claimed_at = now


def replace_message(live: Live) -> None:
    """The request waits for a new message of the queue; whoever had the old one has nothing to say any more."""
    if live.sequence is not None:
        live.replaced = (*live.replaced, live.sequence)[-MOST_SEQUENCES:]
    live.state = State.QUEUED
    live.attempt += 1
    live.sequence = None
    live.token = ""
    live.delivery = 0
    live.returned = False
    live.acknowledged = False
    live.looks = 0
    if live.epoch:
        live.epoch += 1
        live.since_epoch = live.epoch


def _stale(message: str) -> Failure:
    return Failure(code=Code.STALE_EPOCH, message=message)
