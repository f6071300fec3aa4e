"""How requests end: their sentences, and the facts that are kept of them. Pure."""

from __future__ import annotations

import msgspec

from services.gateway.events import Account
from services.gateway.ownership import Live
from shared.contracts.generation import End, Ledger, Usage
from shared.contracts.requests import Request
from shared.errors import Code, Failure


def account(live: Live, reason: str, failure: Failure | None, end: End | None, now: float) -> Account:
    """What is told of a request that has ended at second `now`; `end` None: without a word of its owner."""
    call = live.call
    return Account(
        request_id=live.request_id,
        deployment=call.deployment,
        reason=reason,
        failure=failure,
        usage=Usage(completion_tokens=len(live.tokens)) if end is None else end.usage,
        ledger=with_owners(live, Ledger() if end is None else end.ledger),
        claims=live.claims,
        duration_s=now - call.admitted_at,
        queue_s=None if live.claimed_at is None else live.claimed_at - call.admitted_at,
        ttft_s=None if live.first_at is None else live.first_at - call.admitted_at,
        places=tuple(live.places.items()),
    )


def refused(request: Request, failure: Failure) -> Account:
    """The same of one that was never admitted."""
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


def with_owners(live: Live, ledger: Ledger) -> Ledger:
    """A ledger with what the gateway alone knows: how often the owner changed, what its client noticed of it, and how
    long it was in the queue if it came back there."""
    if live.recoveries:
        ledger = msgspec.structs.replace(ledger, queue_s=live.queued_s)
    return msgspec.structs.replace(ledger, migrations=live.migrations, recoveries=live.recoveries, pause_s=live.pause_s)


def overdue(seconds: float) -> Failure:
    """The budget is spent."""
    return Failure(code=Code.DEADLINE_EXCEEDED, message=f"The request did not finish within {seconds:.0f} seconds.")


def deleted(deployment: str) -> Failure:
    """Its model is no more."""
    return Failure(code=Code.UNKNOWN_MODEL, message=f"The model {deployment!r} was deleted.", param="model")


def too_many(deployment: str, limit: int) -> Failure:
    """This gateway has as many open requests of the deployment as it takes."""
    message = f"The queue of {deployment!r} has its limit of {limit} requests."
    return Failure(code=Code.QUEUE_FULL, message=message, retry_after_s=1.0)


def on_trial(losses: int) -> Failure:
    """A claim that has to wait."""
    message = f"The request has lost {losses} workers; it is tried when no other such request of its model runs."
    return Failure(code=Code.BUSY, message=message)


def let_be() -> Failure:
    """A claim by mistake."""
    return Failure(code=Code.STALE_EPOCH, message="The owner of this request is alive; its message is left alone.")


def guilty(losses: int, proof_s: float) -> Failure:
    """It kills its workers."""
    message = f"{losses} workers in a row ended within {proof_s:.0f} s of taking this request; it is not tried again."
    return Failure(code=Code.WORKER_LOST, message=message)


def worn_out(recoveries: int) -> Failure:
    """It was resumed as often as a request may be."""
    message = f"The request was resumed {recoveries} times and is not resumed again."
    return Failure(code=Code.WORKER_LOST, message=message)


def endless(times: int) -> Failure:
    """Its end does not arrive."""
    message = f"The request was published {times} times and its end was lost each time."
    return Failure(code=Code.WORKER_LOST, message=message)
