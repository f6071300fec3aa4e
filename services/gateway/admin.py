"""`/v1/admin`: deploy, delete, list, and the cluster as JSON. What `hearth deploy|ps|delete` talk to."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
from aiohttp import ClientConnectionResetError, web

from services.gateway.answers import json_answer, read_json_body
from services.gateway.openai import bad, decode_json
from services.gateway.rendering import error_body
from services.gateway.service import Gateway
from shared.contracts.placement import Delete, Deploy, Deployed, Deploying
from shared.contracts.records import DeploymentRecord, DeploymentSpec
from shared.contracts.residency import Progress, Source
from shared.errors import Code, HearthError
from shared.slug import check_name
from shared.subjects import DELETE, DEPLOY

POLL_S: Final = 1.0
AWAY_S: Final = 10.0  # a scheduler that restarts is back within this
WRITE_TIMEOUT_S: Final = 60.0
_SOURCE_CHARS: Final = 4096


class ProgressLine(msgspec.Struct, frozen=True):
    """A line of the answer to a deploy in `application/x-ndjson`: how far it is."""

    progress: Progress


class DeploymentLine(msgspec.Struct, frozen=True):
    """The last line, and the whole answer otherwise: the deployment answers requests."""

    deployment: DeploymentRecord


class DeploymentList(msgspec.Struct, frozen=True):
    """The answer of `GET /v1/admin/deployments`."""

    data: list[DeploymentRecord]


class Deleted(msgspec.Struct, frozen=True):
    """The answer to a delete."""

    deleted: str


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


def _json(value: Any) -> bytes:
    return msgspec.json.encode(plain(value))


def read_spec(body: bytes) -> DeploymentSpec:
    """The spec in a JSON body. Raises `HearthError`; a field that nobody knows is a typo, not a wish."""
    fields: dict[str, msgspec.Raw] = decode_json(body, dict[str, msgspec.Raw])
    for name in fields:
        if name not in DeploymentSpec.__struct_fields__:
            raise bad(f"Unknown field {name[:64]!r}.", name[:64])
    spec: DeploymentSpec = decode_json(body, DeploymentSpec)
    source: dict[str, msgspec.Raw] = decode_json(bytes(fields["source"]), dict[str, msgspec.Raw])
    for name in source:
        if name not in Source.__struct_fields__:
            raise bad(f"Unknown field 'source.{name[:64]}'.", f"source.{name[:64]}")
    return spec


def check_spec(spec: DeploymentSpec) -> DeploymentSpec:
    """The spec itself if it makes sense. Raises `HearthError` with the field in `param`."""
    check_name(spec.name)
    source = spec.source
    if not source.url or len(source.url) > _SOURCE_CHARS:
        raise bad("source.url must name a directory or hf:ORG/NAME.", "source.url")
    if not (source.url.startswith(("/", "hf:"))):
        raise bad("source.url must be an absolute directory or hf:ORG/NAME.", "source.url")
    if source.dtype not in (None, "float32", "bfloat16", "float16"):
        raise bad("source.dtype must be float32, bfloat16 or float16.", "source.dtype")
    bounds = (
        ("min_replicas", spec.min_replicas, 0, 1024),
        ("max_replicas", spec.max_replicas, 1, 1024),
        ("target_concurrency", spec.target_concurrency, 1, 4096),
        ("queue_limit", spec.queue_limit, 1, 1_000_000),
    )
    for name, value, low, high in bounds:
        if not low <= value <= high:
            raise bad(f"{name} must be between {low} and {high}, not {value}.", name)
    if spec.min_replicas > spec.max_replicas:
        raise bad("min_replicas must not be larger than max_replicas.", "min_replicas")
    if not (math.isfinite(spec.keep_alive_s) and 0 <= spec.keep_alive_s <= 30 * 86400):
        raise bad("keep_alive_s must be between 0 and 2592000 seconds.", "keep_alive_s")
    if spec.max_context_tokens is not None and not 16 <= spec.max_context_tokens <= 1 << 24:
        raise bad("max_context_tokens must be between 16 and 16777216.", "max_context_tokens")
    return spec


def add_routes(app: web.Application, gateway: Gateway) -> None:
    """Put the operator's paths into the application."""
    handlers = Admin(gateway)
    app.router.add_post("/v1/admin/deployments", handlers.deploy)
    app.router.add_get("/v1/admin/deployments", handlers.list)
    app.router.add_get("/v1/admin/deployments/{name:.+}", handlers.get)
    app.router.add_delete("/v1/admin/deployments/{name:.+}", handlers.delete)
    app.router.add_get("/v1/admin/cluster", handlers.cluster)


class Admin:
    """The handlers."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def deploy(self, request: web.Request) -> web.StreamResponse:
        """Create or change a deployment; answers when it can be used."""
        spec = check_spec(read_spec(await read_json_body(request)))
        steps = self._deploy(spec)
        if "application/x-ndjson" not in request.headers.get("Accept", ""):
            async for step in steps:
                if isinstance(step, Deployed):
                    return json_answer(_json(DeploymentLine(step.record)))
            raise AssertionError("a deploy ends with Deployed or an error")
        first = await anext(steps)  # a refusal at once gets its own status
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        try:
            await response.prepare(request)
            await _write_line(response, _line(first))
            try:
                async for step in steps:
                    await _write_line(response, _line(step))
            except HearthError as error:
                await _write_line(response, error_body(error.failure))
        except (ClientConnectionResetError, ConnectionError):
            return response  # nobody listens; the scheduler goes on by itself
        return response

    async def _deploy(self, spec: DeploymentSpec) -> AsyncIterator[Deploying | Deployed]:
        away_since: float | None = None
        while True:
            try:
                step = await self._gateway.bus.call(DEPLOY, Deploy(spec=spec, wait_s=POLL_S), extra_s=POLL_S)
            except HearthError as error:
                now = time.monotonic()
                away_since = now if away_since is None else away_since
                if error.failure.code is not Code.UNAVAILABLE or now - away_since > AWAY_S:
                    raise
                await asyncio.sleep(0.5)
                continue
            away_since = None
            if isinstance(step, Deployed):
                await self._gateway.look()
                yield step
                return
            yield step

    async def list(self, _: web.Request) -> web.Response:
        """All deployments."""
        await self._gateway.look()
        return json_answer(_json(DeploymentList(self._gateway.deployments())))

    async def get(self, request: web.Request) -> web.Response:
        """One deployment."""
        await self._gateway.look()
        name = request.match_info["name"]
        record = await self._gateway.deployment(name)
        if record is None:
            raise HearthError(Code.UNKNOWN_MODEL, f"No deployment is called {name!r}.")
        return json_answer(_json(DeploymentLine(record)))

    async def delete(self, request: web.Request) -> web.Response:
        """Remove a deployment."""
        name = check_name(request.match_info["name"])
        await self._gateway.bus.call(DELETE, Delete(deployment=name))
        await self._gateway.look()
        return json_answer(_json(Deleted(name)))

    async def cluster(self, _: web.Request) -> web.Response:
        """Everything that the registry and the queues say."""
        return json_answer(_json(await self._gateway.view()))


def _line(step: Deploying | Deployed) -> bytes:
    return _json(DeploymentLine(step.record) if isinstance(step, Deployed) else ProgressLine(step.progress))


async def _write_line(response: web.StreamResponse, line: bytes) -> None:
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(line + b"\n")
    except TimeoutError as error:
        raise ConnectionError("the client does not read") from error
