"""Reading bodies and writing answers: what every HTTP handler does in the same way."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from services.gateway.openai import bad
from services.gateway.rendering import error_body, error_headers
from shared.errors import Code, Failure, HearthError

BODY_TIMEOUT_S: Final = 60.0


def refuse(failure: Failure, status: int | None = None) -> web.Response:
    """An error answer in OpenAI's form."""
    return json_answer(error_body(failure), error_headers(failure), status or failure.kind.status)


def json_answer(body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> web.Response:
    """An answer that carries this JSON."""
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


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
