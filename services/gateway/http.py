"""HTTP, the part that everything shares: routes, authentication, errors in OpenAI's form, health."""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web
from prometheus_client import Counter

from services.gateway import admin, completions, explain, moves, stores
from services.gateway.answers import refuse
from services.gateway.rendering import REQUEST_ID_HEADER, error_body
from services.gateway.service import Gateway
from shared import metrics
from shared.errors import TABLE, Code, Failure, HearthError
from shared.sizes import size

ANSWERS: Final = Counter("hearth_gateway_http_answers", "HTTP answers by status", ["status"])
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OPEN_PATHS: Final = frozenset(("/", "/healthz", "/readyz", "/metrics"))
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

PAGE: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Hearth</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:44rem;margin:3rem auto;padding:0 1rem}
code{white-space:pre}</style>
<h1>Hearth</h1><p>Serverless inference for large language models. This is a gateway; it speaks OpenAI's API.</p><ul>
<li><code>GET  /v1/models</code> – what is deployed</li>
<li><code>POST /v1/chat/completions</code> – a conversation, streaming or not</li>
<li><code>POST /v1/completions</code> – plain text, streaming or not</li>
<li><code>GET  /v1/admin/deployments</code>, <code>POST</code>, <code>DELETE /v1/admin/deployments/NAME</code></li>
<li><code>GET  /v1/admin/servers</code>, <code>/v1/admin/servers/ID/checkpoints</code> – what is in which tier</li>
<li><code>GET  /v1/admin/requests</code>, <code>POST …/ID/migrate</code>, <code>/v1/admin/workers/ID/drain</code> –
what runs where, and moving it away</li>
<li><code>GET  /v1/admin/explain/NAME</code>, <code>/v1/admin/requests/ID/explain</code> – why it is where it is</li>
<li><code>GET  /v1/admin/cluster</code> – servers, workers, replicas, queues</li>
<li><code>GET  /healthz</code>, <code>/readyz</code>, <code>/metrics</code></li></ul></html>
"""


def make_app(gateway: Gateway) -> web.Application:
    """The application of a gateway."""
    shared = Shared(gateway)
    app = web.Application(middlewares=[shared.guard], client_max_size=gateway.settings.max_body_bytes)
    app.on_response_prepare.append(_stamp)
    app.router.add_get("/", shared.page)
    app.router.add_get("/healthz", shared.healthz)
    app.router.add_get("/readyz", shared.readyz)
    app.router.add_get("/metrics", shared.metrics)
    completions.add_routes(app, gateway)
    admin.add_routes(app, gateway)
    stores.add_routes(app, gateway)
    moves.add_routes(app, gateway)
    explain.add_routes(app, gateway)
    return app


class Shared:
    """The middleware, and the paths that need no key."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        keys = (key.strip() for key in gateway.settings.api_keys.split(","))
        self._keys = tuple(key.encode() for key in keys if key)

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key; turn every error into OpenAI's form."""
        try:
            if self._keys and request.path not in OPEN_PATHS:
                self._authenticate(request)
            response = await handler(request)
        except HearthError as error:
            response = refuse(error.failure)
        except web.HTTPRequestEntityTooLarge:
            limit = self._gateway.settings.max_body_bytes
            failure = Failure(code=Code.TOO_LARGE, message=f"The body is larger than the limit of {size(limit)}.")
            response = refuse(failure)
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.method} is not allowed for {request.path}; allowed: {allowed}."
            response = refuse(Failure(code=Code.INVALID_REQUEST, message=message), status=405)
            response.headers["Allow"] = allowed
        except web.HTTPNotFound:
            failure = Failure(code=Code.NOT_FOUND, message=f"There is nothing at {request.method} {request.path}.")
            response = refuse(failure)
        ANSWERS.labels(response.status).inc()
        return response

    def _authenticate(self, request: web.Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # aiohttp keeps bytes that are no UTF-8 as surrogates
        presented = given.strip().encode(errors="surrogateescape") if scheme.lower() == "bearer" else b""
        if sum(hmac.compare_digest(presented, key) for key in self._keys) == 0:  # every key is compared
            raise HearthError(Code.UNAUTHENTICATED, "Present a valid API key as 'Authorization: Bearer KEY'.")

    async def page(self, _: web.Request) -> web.Response:
        """What this is."""
        return web.Response(text=PAGE, content_type="text/html")

    async def healthz(self, _: web.Request) -> web.Response:
        """The process lives."""
        return web.Response(text="ok\n")

    async def readyz(self, _: web.Request) -> web.Response:
        """The process can answer requests."""
        trouble = self._gateway.trouble
        return web.Response(text=f"{trouble or 'ok'}\n", status=503 if trouble else 200)

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(body=metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})


async def _stamp(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "hearth"
    if response.status == 500 and isinstance(response, web.Response) and response.content_type != "application/json":
        # aiohttp's answer to an exception that nobody caught (it has logged it): ours to say, in OpenAI's form.
        body = error_body(Failure(code=Code.INTERNAL, message=TABLE[Code.INTERNAL].sentence))
        response.body = body
        response.headers.update({"Content-Type": "application/json", "Content-Length": str(len(body))})
    given = request.headers.get("x-request-id", "")
    call_id = response.headers.get(REQUEST_ID_HEADER)
    if _REQUEST_ID.fullmatch(given):
        response.headers["x-request-id"] = given
    elif call_id is not None:
        response.headers["x-request-id"] = call_id
