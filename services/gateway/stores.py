"""`/v1/admin/servers`: the tiers of each server and the checkpoints in them. What `hearth store …` talks to.

Long work (importing, verifying, …) is the store's: it goes on when the client that asked for it leaves.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from services.gateway.admin import WRITABLE, ProgressLine, check_source, check_url
from services.gateway.answers import answer_steps, encode, json_answer, read_json_body, read_optional_body
from services.gateway.openai import bad, decode_json
from services.gateway.patience import Patience, named
from services.gateway.service import Gateway
from shared.codec import CodecError
from shared.contracts.records import ServerRecord
from shared.contracts.residency import (
    LIST_LIMIT,
    Checkpoint,
    Done,
    Evict,
    Export,
    HeldCheckpoint,
    Import,
    Imported,
    ListCheckpoints,
    Pin,
    Prefetch,
    Progress,
    Source,
    Verified,
    Verify,
)
from shared.errors import Code, HearthError
from shared.subjects import EVICT, EXPORT, ID_PATTERN, IMPORT, LIST, PIN, PREFETCH, VERIFY, Endpoint

POLL_S: Final = 0.5
TIERS: Final = ("dram", "ssd")
_ID_CHARS: Final = 64

Q = TypeVar("Q")
Happened = dict[str, dict[str, str | int]]  # what happened → to what


class ServerList(msgspec.Struct, frozen=True):
    """The answer of `GET /v1/admin/servers`."""

    data: list[ServerRecord]


class ServerLine(msgspec.Struct, frozen=True):
    """The answer of `GET /v1/admin/servers/ID`."""

    server: ServerRecord


class HeldList(msgspec.Struct, frozen=True):
    """The answer of `GET /v1/admin/servers/ID/checkpoints`."""

    data: tuple[HeldCheckpoint, ...]


class CheckpointLine(msgspec.Struct, frozen=True):
    """The result of an import: the checkpoint is whole and verified in the SSD tier."""

    checkpoint: Checkpoint


class SourceBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`Source`, read strictly: a field that nobody knows is a typo, not a wish."""

    url: str
    revision: str | None = None
    dtype: str | None = None


class ImportBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to import: the source as in a deployment, or only its url with revision and dtype beside it."""

    source: str | SourceBody
    revision: str | None = None
    dtype: str | None = None


class PrefetchBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to; `source` says where the checkpoint comes from if neither this server nor a peer has it."""

    tier: str = "dram"
    source: SourceBody | None = None


class PinBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to keep it; "" unpins it."""

    tier: str = "dram"


class ExportBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to copy it."""

    url: str


def read_import(body: bytes) -> Source:
    """The source in the body of an import. Raises `HearthError`."""
    asked: ImportBody = decode_json(body, ImportBody)
    if isinstance(asked.source, str):
        return check_source(Source(url=asked.source, revision=asked.revision, dtype=asked.dtype))
    if asked.revision is not None or asked.dtype is not None:
        raise bad("revision and dtype belong into source when that is an object.", "source")
    return _source(asked.source)


def _source(given: SourceBody) -> Source:
    return check_source(Source(url=given.url, revision=given.revision, dtype=given.dtype))


def check_tier(tier: str, *allowed: str) -> str:
    """The tier itself if it is one of these. Raises `HearthError`."""
    if tier not in allowed:
        raise bad(f"tier must be {' or '.join(one or repr(one) for one in allowed)}.", "tier")
    return tier


def add_routes(app: web.Application, gateway: Gateway) -> None:
    """Put the paths of servers and their checkpoints into the application."""
    stores = Stores(gateway)
    server = "/v1/admin/servers/{server}"
    app.router.add_get("/v1/admin/servers", stores.servers)
    app.router.add_get(server, stores.server)
    app.router.add_get(f"{server}/checkpoints", stores.held)
    app.router.add_post(f"{server}/checkpoints", stores.bring_in)
    one = server + "/checkpoints/{checkpoint}"
    app.router.add_post(f"{one}/verify", stores.verify)
    app.router.add_post(f"{one}/prefetch", stores.prefetch)
    app.router.add_post(f"{one}/pin", stores.pin)
    app.router.add_post(f"{one}/export", stores.export)
    app.router.add_delete(one, stores.evict)


class Stores:
    """The handlers. Each asks one store over the bus, long work by repeated long polls."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def servers(self, _: web.Request) -> web.Response:
        """Every server as its store describes it."""
        return json_answer(encode(ServerList(await self._records())))

    async def server(self, request: web.Request) -> web.Response:
        """One server."""
        return json_answer(encode(ServerLine(await self._record(request))))

    async def held(self, request: web.Request) -> web.Response:
        """What a store holds, the one that would be evicted last first."""
        server_id = (await self._record(request)).server_id
        found: dict[str, HeldCheckpoint] = {}
        first, total = 0, 1
        while first < total:  # what changes its place between two parts comes twice
            part = await self._call(LIST, ListCheckpoints(first=first), server_id)
            found |= {one.checkpoint.checkpoint_id: one for one in part.checkpoints}
            first, total = first + LIST_LIMIT, part.total
        return json_answer(encode(HeldList(tuple(found.values()))))

    async def bring_in(self, request: web.Request) -> web.StreamResponse:
        """Import a source into the SSD tier."""
        source = read_import(await read_json_body(request))
        server_id = (await self._record(request)).server_id
        message = Import(source=source, wait_s=POLL_S)

        def result(imported: Imported) -> CheckpointLine:
            return CheckpointLine(imported.checkpoint)

        return await answer_steps(request, self._steps(IMPORT, message, server_id, result))

    async def verify(self, request: web.Request) -> web.StreamResponse:
        """Compare every chunk with its checksum, repair what differs."""
        server_id, checkpoint_id = await self._named(request)
        message = Verify(checkpoint_id=checkpoint_id, wait_s=POLL_S)

        def result(verified: Verified) -> Happened:
            chunks = {"chunks": verified.chunks, "repaired_chunks": verified.repaired_chunks}
            return {"verified": {"checkpoint_id": checkpoint_id, **chunks}}

        return await answer_steps(request, self._steps(VERIFY, message, server_id, result))

    async def prefetch(self, request: web.Request) -> web.StreamResponse:
        """Bring a checkpoint into a tier ahead of demand."""
        body: PrefetchBody = await read_optional_body(request, PrefetchBody, PrefetchBody())
        tier = check_tier(body.tier, *TIERS)
        source = None if body.source is None else _source(body.source)
        server_id, checkpoint_id = await self._named(request)
        message = Prefetch(checkpoint_id=checkpoint_id, source=source, tier=tier, wait_s=POLL_S)

        def result(_: Done) -> Happened:
            return {"prefetched": {"checkpoint_id": checkpoint_id, "tier": tier}}

        return await answer_steps(request, self._steps(PREFETCH, message, server_id, result))

    async def export(self, request: web.Request) -> web.StreamResponse:
        """Copy a checkpoint somewhere else, in Hearth's form."""
        body: ExportBody = decode_json(await read_json_body(request), ExportBody)
        check_url(body.url, "url", ("/", *WRITABLE))
        server_id, checkpoint_id = await self._named(request)
        message = Export(checkpoint_id=checkpoint_id, url=body.url, wait_s=POLL_S)

        def result(_: Done) -> Happened:
            return {"exported": {"checkpoint_id": checkpoint_id, "url": body.url}}

        return await answer_steps(request, self._steps(EXPORT, message, server_id, result))

    async def pin(self, request: web.Request) -> web.Response:
        """Never evict a checkpoint from a tier, or allow it again."""
        body: PinBody = await read_optional_body(request, PinBody, PinBody())
        tier = check_tier(body.tier, *TIERS, "")
        server_id, checkpoint_id = await self._named(request)
        await self._call(PIN, Pin(checkpoint_id=checkpoint_id, tier=tier), server_id)
        return json_answer(encode({"pinned": {"checkpoint_id": checkpoint_id, "tier": tier}}))

    async def evict(self, request: web.Request) -> web.Response:
        """Take a checkpoint out of a tier."""
        tier = check_tier(request.query.get("tier", ""), *TIERS)
        server_id, checkpoint_id = await self._named(request)
        await self._call(EVICT, Evict(checkpoint_id=checkpoint_id, tier=tier), server_id)
        return json_answer(encode({"evicted": {"checkpoint_id": checkpoint_id, "tier": tier}}))

    # -- servers ------------------------------------------------------------------------------------------------------

    async def _records(self) -> list[ServerRecord]:
        try:
            return await self._gateway.registry.all(ServerRecord)
        except CodecError as error:
            raise HearthError(Code.INTERNAL, f"A server's record cannot be read: {error}") from error

    async def _record(self, request: web.Request) -> ServerRecord:
        asked = request.match_info["server"]
        records = await self._records()
        for record in records:
            if record.server_id == asked:
                return record
        names = ", ".join(record.server_id for record in records)
        there = f"there are: {names}" if names else "no store runs"
        raise HearthError(Code.NOT_FOUND, f"No server is called {asked[:_ID_CHARS]!r}; {there}.", param="server")

    async def _named(self, request: web.Request) -> tuple[str, str]:
        checkpoint_id = request.match_info["checkpoint"]
        if len(checkpoint_id) > _ID_CHARS or not ID_PATTERN.fullmatch(checkpoint_id):
            raise HearthError(Code.NOT_FOUND, f"{checkpoint_id[:_ID_CHARS]!r} is no checkpoint id.", param="checkpoint")
        return (await self._record(request)).server_id, checkpoint_id

    # -- calls --------------------------------------------------------------------------------------------------------

    async def _steps(
        self, endpoint: Endpoint[Q, Any], message: Q, server_id: str, result: Callable[[Any], Any]
    ) -> AsyncGenerator[bytes, None]:
        """The JSON of every answer to repeated long polls; the last one, no `Progress`, as `result` puts it."""
        patience, begun = Patience(_store_of(server_id), _away), False
        while True:
            try:
                step = await self._call(endpoint, message, server_id, extra_s=POLL_S)
            except HearthError as error:
                if not begun:
                    raise
                await patience.bear(error)  # what has begun is not given up because the store is being restarted
                continue
            patience.heard()
            begun = True
            if not isinstance(step, Progress):
                yield encode(result(step))
                return
            yield encode(ProgressLine(step))

    async def _call(self, endpoint: Endpoint[Q, Any], message: Q, server_id: str, *, extra_s: float = 0.0) -> Any:
        try:
            return await self._gateway.bus.call(endpoint, message, extra_s=extra_s, server_id=server_id)
        except HearthError as error:
            raise named(error, _store_of(server_id)) from error.__cause__


def _store_of(server_id: str) -> str:
    return f"The store of {server_id}"


def _away(error: HearthError) -> bool:
    """Whether that is what a store that restarts answers, or the bus in its place."""
    return error.failure.code in (Code.UNAVAILABLE, Code.DRAINING)
