"""Reading bodies and writing answers: what every HTTP handler does in the same way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import ClientConnectionResetError, web

from services.gateway.openai import bad, decode_json
from services.gateway.rendering import error_body, error_headers
from shared.errors import Code, Failure, HearthError

BODY_TIMEOUT_S: Final = 60.0
WRITE_TIMEOUT_S: Final = 60.0
LINES: Final = "application/x-ndjson"

Body = TypeVar("Body")


def refuse(failure: Failure, status: int | None = None) -> web.Response:
    """An error answer in OpenAI's form."""
    return json_answer(error_body(failure), error_headers(failure), status or failure.kind.status)


def json_answer(body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> web.Response:
    """An answer that carries this JSON."""
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def plain(value: Any) -> Any:
    """A contract as JSON's values with every field in it: a program that reads should not need to know the defaults."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        fields = {name: plain(getattr(value, name)) for name in value.__struct_fields__}
        return fields if tag is None else {"type": tag, **fields}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def encode(value: Any) -> bytes:
    """The JSON of `plain`."""
    return msgspec.json.encode(plain(value))


async def read_json_body(request: web.Request) -> bytes:
    """The bytes of a JSON body. Raises `HearthError`, or aiohttp's own error when it is too large."""
    kind = request.content_type
    if kind != "application/json" and not kind.endswith("+json"):
        raise bad(f"Send the body as 'Content-Type: application/json', not {kind[:80]!r}.")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await request.read()
    except TimeoutError as error:
        raise bad(f"The body did not arrive within {BODY_TIMEOUT_S:.0f} seconds.") from error
    except web.RequestPayloadError as error:
        raise bad("The body cannot be read: it is cut off or wrongly encoded.") from error
    if not body:
        raise HearthError(Code.INVALID_REQUEST, "The body is empty; a JSON object is needed.")
    return body


async def read_optional_body(request: web.Request, kind: type[Body], default: Body) -> Body:
    """The JSON body as `kind`, or `default` when there is none. Raises `HearthError`."""
    if not request.can_read_body:
        return default
    return decode_json(await read_json_body(request), kind)


async def answer_steps(request: web.Request, steps: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """Answer a long call whose JSON `steps` say how far it is, the last one being its result.

    A client that accepts `application/x-ndjson` gets every step as a line, and an error that comes after the first as
    the last line; any other client gets the result alone. A client that leaves ends the steps, not the work.
    """
    async with contextlib.aclosing(steps):
        if LINES not in request.headers.get("Accept", ""):
            result = b""
            async for step in steps:
                result = step
            return json_answer(result)
        first = await anext(steps)  # a refusal at once gets its own status
        response = web.StreamResponse(headers={"Content-Type": LINES})
        try:
            await response.prepare(request)
            await _write_line(response, first)
            try:
                async for step in steps:
                    await _write_line(response, step)
            except HearthError as error:
                await _write_line(response, error_body(error.failure))
        except (ClientConnectionResetError, ConnectionError):
            return response  # nobody listens any more; whoever does the work goes on by itself
        return response


async def _write_line(response: web.StreamResponse, line: bytes) -> None:
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(line + b"\n")
    except TimeoutError as error:
        raise ConnectionError("the client does not read") from error
