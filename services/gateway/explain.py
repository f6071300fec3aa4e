"""`/v1/admin/explain`, and of a request: why it is where it is, and what that took. What `hearth explain` calls.

The scheduler keeps its decisions; a gateway knows its own requests, the open ones and the last that have ended.
"""

from __future__ import annotations

import time
from typing import Final

import msgspec
from aiohttp import web

from services.gateway.answers import encode, json_answer
from services.gateway.openai import bad
from services.gateway.patience import SCHEDULER, Patience
from services.gateway.recall import RequestFacts
from services.gateway.service import Gateway
from shared.contracts.placement import Explain, Explanation
from shared.errors import Code, HearthError
from shared.subjects import EXPLAIN

MOST_DECISIONS: Final = 64
TAKEOVER_S: Final = 2.5  # after it another scheduler leads, if there is one
DEFAULT_DECISIONS: Final = 8
# Of a request that was in very many replicas, those that it began in and those that it came to last are looked up.
MOST_PLACES: Final = 4


class RequestLine(msgspec.Struct, frozen=True):
    """The answer about a request: the decisions that loaded its replicas, or (it runs nowhere) why none is loaded.

    `explanation` None: the scheduler does not answer, as `error` says.
    """

    gateway_id: str
    request: RequestFacts
    explanation: Explanation | None
    error: str = ""


def read_last(text: str | None) -> int:
    """The number of decisions that are asked for. Raises `HearthError`."""
    if text is None:
        return DEFAULT_DECISIONS
    if not (text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= MOST_DECISIONS):
        raise bad(f"last must be a number from 1 to {MOST_DECISIONS}.", "last")
    return int(text)


def looked_up(facts: RequestFacts) -> list[str]:
    """The replicas of a request whose decisions are worth showing, the latest first."""
    ids = [place.replica_id for place in facts.places]
    return list(reversed(ids if len(ids) <= MOST_PLACES else [ids[0], *ids[1 - MOST_PLACES :]]))


def add_routes(app: web.Application, gateway: Gateway) -> None:
    """Put the paths of explanations into the application."""
    handlers = Explanations(gateway)
    app.router.add_get("/v1/admin/explain", handlers.everything)
    app.router.add_get("/v1/admin/explain/{name:.+}", handlers.deployment)
    app.router.add_get("/v1/admin/requests/{request}/explain", handlers.request)


class Explanations:
    """The handlers."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def everything(self, request: web.Request) -> web.Response:
        """The last decisions about any deployment."""
        limit = read_last(request.query.get("last"))
        return json_answer(encode(await self._ask(Explain(limit=limit))))

    async def deployment(self, request: web.Request) -> web.Response:
        """The last decisions about a deployment."""
        limit = read_last(request.query.get("last"))
        name = request.match_info["name"]
        if await self._gateway.deployment(name) is None:
            raise HearthError(Code.UNKNOWN_MODEL, f"No deployment is called {name[:128]!r}.")
        return json_answer(encode(await self._ask(Explain(deployment=name, limit=limit))))

    async def request(self, request: web.Request) -> web.Response:
        """A request, and the decisions that loaded the replicas in which it ran."""
        limit = read_last(request.query.get("last"))
        gateway = self._gateway
        facts = gateway.recall.find(request.match_info["request"], gateway.core.live, time.monotonic())
        explanation, error = None, ""
        try:
            explanation = await self._about(facts, limit)
        except HearthError as caught:
            error = caught.failure.message
        return json_answer(encode(RequestLine(gateway.gateway_id, facts, explanation, error)))

    async def _about(self, facts: RequestFacts, limit: int) -> Explanation:
        replica_ids = looked_up(facts)
        if facts.state in ("queued", "interrupted") or not replica_ids:
            return await self._ask(Explain(deployment=facts.deployment, limit=limit))
        answers = [await self._ask(Explain(replica_id=replica_id, limit=1)) for replica_id in replica_ids]
        decisions = tuple(decision for answer in answers for decision in answer.decisions)
        return msgspec.structs.replace(answers[0], decisions=decisions, waiting="", doing="")

    async def _ask(self, message: Explain) -> Explanation:
        patience = Patience(SCHEDULER, within_s=TAKEOVER_S)
        while True:
            try:
                return await self._gateway.bus.call(EXPLAIN, message)
            except HearthError as error:
                await patience.bear(error)
