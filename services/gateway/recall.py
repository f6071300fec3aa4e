"""What a gateway remembers of its requests: those that are open, and the last ones that have ended. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

import msgspec

from services.gateway.events import Account
from services.gateway.ownership import Live
from shared.contracts.generation import Ledger
from shared.errors import Code, HearthError

MOST_ENDED: Final = 1000
NAMED: Final = 5
_ID_CHARS: Final = 64


class Place(msgspec.Struct, frozen=True):
    """A replica in which a request ran."""

    replica_id: str
    worker_id: str


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A request as its gateway knows it.

    `state` is "queued", "streaming", "interrupted" or "ended"; `reason` how it ended, with the code of its failure.
    `age_s` counts from its admission, `ended_ago_s` from its end. `queue_s` is the time to its first claim, `ttft_s`
    that to its first token; None: not yet. `places` are where it ran, in order. The `ledger` comes with its end.
    """

    request_id: str
    deployment: str
    state: str
    age_s: float
    ended_ago_s: float | None = None
    reason: str = ""
    error: str = ""
    queue_s: float | None = None
    ttft_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    places: tuple[Place, ...] = ()
    ledger: Ledger | None = None


class Recall:
    """The last `most` requests that have ended, by id. Moments are monotonic seconds."""

    def __init__(self, most: int = MOST_ENDED) -> None:
        self._most = most
        self._ended: OrderedDict[str, tuple[Account, float]] = OrderedDict()

    def keep(self, account: Account, now: float) -> None:
        """A request has ended."""
        self._ended.pop(account.request_id, None)
        self._ended[account.request_id] = (account, now)
        while len(self._ended) > self._most:
            self._ended.popitem(last=False)

    def find(self, text: str, open_requests: dict[str, Live], now: float) -> RequestFacts:
        """The request that has this id, or the only one whose id begins so. Raises `HearthError`."""
        ids = _beginning(text, open_requests) or _beginning(text, self._ended)
        if not ids:
            message = (
                f"This gateway knows no request {text[:_ID_CHARS]!r}; it remembers its open requests and the last "
                f"{self._most} that have ended. Ask the gateway that answered it."
            )
            raise HearthError(Code.NOT_FOUND, message, param="request")
        if len(ids) > 1:
            shown = ", ".join(ids[:NAMED]) + (" …" if len(ids) > NAMED else "")
            message = f"{text[:_ID_CHARS]!r} could be {len(ids)} requests: {shown}."
            raise HearthError(Code.INVALID_REQUEST, message, param="request")
        live = open_requests.get(ids[0])
        return _open(live, now) if live is not None else _over(*self._ended[ids[0]], now)


def _beginning(text: str, ids: Iterable[str]) -> list[str]:
    found = sorted(id for id in ids if text and id.startswith(text))
    return [text] if text in found else found


def _open(live: Live, now: float) -> RequestFacts:
    call = live.call
    return RequestFacts(
        request_id=live.request_id,
        deployment=call.deployment,
        state=live.state.value,
        age_s=now - call.admitted_at,
        queue_s=None if live.claimed_at is None else live.claimed_at - call.admitted_at,
        ttft_s=None if live.first_at is None else live.first_at - call.admitted_at,
        completion_tokens=len(live.tokens),
        places=_places(live.places.items()),
    )


def _over(account: Account, ended_at: float, now: float) -> RequestFacts:
    failure = account.failure
    # What is wrong with a request may be said in its own words, and those are for its client alone.
    told = failure is not None and failure.code is not Code.INVALID_REQUEST
    return RequestFacts(
        request_id=account.request_id,
        deployment=account.deployment,
        state="ended",
        age_s=now - ended_at + account.duration_s,
        ended_ago_s=now - ended_at,
        reason=account.reason,
        error=failure.message if failure is not None and told else "",
        queue_s=account.queue_s,
        ttft_s=account.ttft_s,
        prompt_tokens=account.usage.prompt_tokens,
        completion_tokens=account.usage.completion_tokens,
        places=_places(account.places),
        ledger=account.ledger,
    )


def _places(pairs: Iterable[tuple[str, str]]) -> tuple[Place, ...]:
    return tuple(Place(replica_id, worker_id) for replica_id, worker_id in pairs)
