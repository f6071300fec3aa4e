"""`/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import secrets
import time
from typing import Final

import msgspec
from aiohttp import ClientConnectionResetError, web

from services.gateway import sse
from services.gateway.answers import json_answer, read_json_body, refuse
from services.gateway.buffer import CallBuffer, Piece
from services.gateway.core import Conclude, Deliver, Fail, Inform
from services.gateway.limits import Limits, OpenRequests
from services.gateway.openai import INFO_HEADERS, admit, read_chat, read_completion, read_switch
from services.gateway.rendering import REQUEST_ID_HEADER, ModelList, Rendering, error_body, ledger_headers, model_card
from services.gateway.service import Gateway
from shared.errors import Code, Failure, HearthError

KEEP_ALIVE_S: Final = 5.0
WRITE_TIMEOUT_S: Final = 60.0
_TRACEPARENT: Final = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect the tokens
}


def add_routes(app: web.Application, gateway: Gateway) -> None:
    """Put OpenAI's paths into the application."""
    handlers = Completions(gateway)
    app.router.add_post("/v1/chat/completions", handlers.chat)
    app.router.add_post("/v1/completions", handlers.text)
    app.router.add_get("/v1/models", handlers.models)
    app.router.add_get("/v1/models/{name:.+}", handlers.model)


class Completions:
    """The handlers. A handler that is cancelled has lost its client."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        settings = gateway.settings
        self._limits = Limits(max_choices=settings.max_choices, max_requests=settings.max_choices)
        self._open = OpenRequests(max_open=settings.max_open_requests, max_open_per_client=0)

    async def models(self, _: web.Request) -> web.Response:
        """What is deployed."""
        cards = [model_card(record) for record in self._gateway.deployments()]
        return json_answer(msgspec.json.encode(ModelList(data=cards)))

    async def model(self, request: web.Request) -> web.Response:
        """One deployment."""
        name = request.match_info["name"]
        record = await self._gateway.deployment(name)
        if record is None:
            raise HearthError(Code.UNKNOWN_MODEL, f"The model {name!r} does not exist.", param="model")
        return json_answer(msgspec.json.encode(model_card(record)))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """A conversation."""
        return await self._complete(request, chat=True)

    async def text(self, request: web.Request) -> web.StreamResponse:
        """Plain text."""
        return await self._complete(request, chat=False)

    async def _complete(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        gateway = self._gateway
        if gateway.draining:
            raise HearthError(Code.DRAINING, "The gateway is shutting down; try again.")
        body = await read_json_body(request)
        call = read_chat(body, self._limits) if chat else read_completion(body, self._limits)
        asked = [read_switch(name, request.headers.get(name, "")) for name in INFO_HEADERS]
        if any(asked):
            call = dataclasses.replace(call, ledger=True)
        record = await gateway.deployment(call.model)
        refused = admit(call, record)
        if refused is not None or record is None:
            return refuse(refused or Failure(code=Code.UNKNOWN_MODEL, message="The model does not exist."))
        client = request.remote or ""
        count = call.choices * len(call.prompts)
        full = self._open.enter(client, count)
        if full is not None:
            return refuse(full)
        try:
            call_id = secrets.token_hex(12)
            rendering = Rendering(call, request_id=call_id, created_s=int(time.time()))
            trace = request.headers.get("traceparent", "")
            buffer = gateway.open(call, record, call_id, trace if _TRACEPARENT.fullmatch(trace) else None)
            try:
                if call.stream:
                    return await self._stream(request, buffer, rendering)
                return await self._whole(call_id, buffer, rendering)
            except HearthError as error:
                failed = refuse(error.failure)
                failed.headers[REQUEST_ID_HEADER] = call_id
                return failed
            finally:
                gateway.close(buffer)
        finally:
            self._open.leave(client, count)

    async def _whole(self, call_id: str, buffer: CallBuffer, rendering: Rendering) -> web.Response:
        while not rendering.finished:
            for piece in await buffer.take():
                match piece:
                    case Deliver(choice=choice, frame=frame):
                        rendering.collect(choice, frame)
                    case Conclude(choice=choice, end=end):
                        rendering.end(choice, end)
                    case Fail(failure=failure):
                        raise HearthError.of(failure)
                    case Inform():
                        pass
        return json_answer(rendering.whole(), ledger_headers(call_id, rendering.ledger()))

    async def _stream(self, request: web.Request, buffer: CallBuffer, rendering: Rendering) -> web.StreamResponse:
        # An early failure gets its own status: wait a little before the headers say 200.
        pieces = await buffer.take(self._gateway.settings.hold_headers_s)
        for piece in pieces:
            if isinstance(piece, Fail):
                raise HearthError.of(piece.failure)
        response = web.StreamResponse(headers={**_STREAM_HEADERS, REQUEST_ID_HEADER: buffer.call_id})
        writer = _Writer(request, response, buffer)
        try:
            await response.prepare(request)
            if not pieces:
                await writer.write(sse.WAITING)
            idle = sse.WAITING
            while True:
                events, over = _render(pieces, rendering)
                if over:
                    await writer.finish(events)
                    return response
                if events:
                    await writer.write(events)
                if pieces:
                    last = pieces[-1]
                    idle = sse.still(last.progress) if isinstance(last, Inform) else sse.WAITING
                pieces = await buffer.take(KEEP_ALIVE_S)
                if not pieces:
                    await writer.write(idle)
        except (ClientConnectionResetError, ConnectionError):
            return response  # the client left; `close` tells the core


def _render(pieces: list[Piece], rendering: Rendering) -> tuple[bytes, bool]:
    """The bytes for these pieces, and whether the stream ends with them."""
    parts: list[bytes] = []
    for piece in pieces:
        match piece:
            case Deliver(choice=choice, frame=frame):
                event = rendering.frame(choice, frame)
                if event is not None:
                    parts.append(sse.data(event))
            case Conclude(choice=choice, end=end):
                rendering.end(choice, end)
                parts.extend(sse.data(event) for event in rendering.closing(choice))
                if rendering.finished:
                    parts.append(sse.DONE)
                    return b"".join(parts), True
            case Fail(failure=failure):
                parts.append(sse.data(error_body(failure)))
                return b"".join(parts), True
            case Inform(progress=progress):
                parts.append(sse.comment(sse.describe(progress)))
    return b"".join(parts), False


class _Writer:
    """Writes to one client. A client that takes nothing for too long, or too little, loses its connection."""

    def __init__(self, request: web.Request, response: web.StreamResponse, buffer: CallBuffer) -> None:
        self._request = request
        self._response = response
        buffer.overflow = self._abort

    def _abort(self) -> None:
        transport = self._request.transport
        if transport is not None:
            transport.abort()

    async def write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._response.write(data)
        except TimeoutError as error:
            self._abort()
            raise ConnectionError("the client does not read") from error

    async def finish(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._response.write_eof(data)
        except TimeoutError as error:
            self._abort()
            raise ConnectionError("the client does not read") from error
