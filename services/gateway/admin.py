"""`/v1/admin`: deploy, delete, list, and the cluster as JSON. What `hearth deploy|ps|delete` talk to."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from typing import Final
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from services.gateway.answers import answer_steps, encode, json_answer, read_json_body
from services.gateway.openai import bad, decode_json
from services.gateway.patience import SCHEDULER, Patience, unanswered, unavailable
from services.gateway.service import Gateway
from shared.bus import Unserved
from shared.contracts.placement import Delete, Deploy, Deployed
from shared.contracts.records import DeploymentRecord, DeploymentSpec
from shared.contracts.residency import Progress, Source
from shared.errors import Code, HearthError
from shared.labels import check_labels
from shared.slug import check_name
from shared.subjects import DELETE, DEPLOY

POLL_S: Final = 1.0
WRITABLE: Final = ("s3://", "gs://", "az://", "file://")
OBJECT_STORES: Final = (*WRITABLE[:3], "https://", "http://", "file://")
MOST_PRIORITY: Final = 100
MOST_DEVICES: Final = 64
_SOURCE_CHARS: Final = 4096
_REVISION_CHARS: Final = 256


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


def check_source(source: Source) -> Source:
    """The source itself if it could be one. Raises `HearthError` with the field in `param`."""
    check_url(source.url, "source.url", ("/", "hf:", *OBJECT_STORES))
    if source.revision is not None and not 0 < len(source.revision) <= _REVISION_CHARS:
        raise bad(f"source.revision must have 1 to {_REVISION_CHARS} characters.", "source.revision")
    if source.dtype not in (None, "float32", "bfloat16", "float16"):
        raise bad("source.dtype must be float32, bfloat16 or float16.", "source.dtype")
    return source


def check_url(url: str, field: str, kinds: tuple[str, ...]) -> str:
    """The url itself if it begins as one of `kinds` and carries no secret. Raises `HearthError`."""
    if not url.startswith(kinds) or len(url) > _SOURCE_CHARS or not url.isprintable():
        names = [words for kind, words in (("/", "an absolute directory"), ("hf:", "hf:ORG/NAME")) if kind in kinds]
        schemes = [kind for kind in kinds if kind in OBJECT_STORES]
        stores = f"a URL beginning with {', '.join(schemes[:-1])} or {schemes[-1]}"
        raise bad(f"{field} must be {', '.join(names)} or {stores}.", field)
    if url.startswith(OBJECT_STORES):
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise bad(f"{field} is no valid URL.", field) from error
        # It will stand in the registry and in logs. Where a password ends, readers of urls disagree: `user:a/b@host`.
        if ("@" in url and parts.scheme != "file") or "?" in url or "#" in url:
            raise bad(
                f"{field} must not hold credentials or a query; stores read secrets from their own settings.", field
            )
        if not parts.netloc and parts.scheme != "file":
            raise bad(f"{field} names no host or bucket.", field)
    return url


def check_spec(spec: DeploymentSpec) -> DeploymentSpec:
    """The spec itself if it makes sense. Raises `HearthError` with the field in `param`."""
    check_name(spec.name)
    check_source(spec.source)
    bounds = (
        ("min_replicas", spec.min_replicas, 0, 1024),
        ("max_replicas", spec.max_replicas, 1, 1024),
        ("target_concurrency", spec.target_concurrency, 1, 4096),
        ("queue_limit", spec.queue_limit, 1, 1_000_000),
        ("priority", spec.priority, -MOST_PRIORITY, MOST_PRIORITY),
        ("devices", spec.devices, 1, MOST_DEVICES),
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
    check_labels(spec.labels)
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
        return await answer_steps(request, self._deploy(spec))

    async def _deploy(self, spec: DeploymentSpec) -> AsyncGenerator[bytes, None]:
        patience = Patience(SCHEDULER, unavailable)
        while True:
            try:
                step = await self._gateway.bus.call(DEPLOY, Deploy(spec=spec, wait_s=POLL_S), extra_s=POLL_S)
            except HearthError as error:
                await patience.bear(error)
                continue
            patience.heard()
            if isinstance(step, Deployed):
                await self._gateway.look()
                yield encode(DeploymentLine(step.record))
                return
            yield encode(ProgressLine(step.progress))

    async def list(self, _: web.Request) -> web.Response:
        """All deployments."""
        await self._gateway.look()
        return json_answer(encode(DeploymentList(self._gateway.deployments())))

    async def get(self, request: web.Request) -> web.Response:
        """One deployment."""
        await self._gateway.look()
        name = request.match_info["name"]
        record = await self._gateway.deployment(name)
        if record is None:
            raise HearthError(Code.UNKNOWN_MODEL, f"No deployment is called {name!r}.")
        return json_answer(encode(DeploymentLine(record)))

    async def delete(self, request: web.Request) -> web.Response:
        """Remove a deployment."""
        name = check_name(request.match_info["name"])
        await self._delete(name)
        await self._gateway.look()
        return json_answer(encode(Deleted(name)))

    async def _delete(self, name: str) -> None:
        patience, begun = Patience(SCHEDULER, unavailable), False
        while True:
            try:
                await self._gateway.bus.call(DELETE, Delete(deployment=name))
                return
            except HearthError as error:
                if begun and error.failure.code is Code.UNKNOWN_MODEL:
                    return  # whoever did not answer has done it
                # No answer came, though somebody was there: perhaps it is being done.
                begun = begun or (unanswered(error) and not isinstance(error, Unserved))
                await patience.bear(error)

    async def cluster(self, _: web.Request) -> web.Response:
        """Everything that the registry and the queues say."""
        return json_answer(encode(await self._gateway.view()))
