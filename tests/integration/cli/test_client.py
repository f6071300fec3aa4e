"""The client of the HTTP API against a small server that speaks as the gateway does, over a real socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from aiohttp import web

from services.cli.client import Client, ClientError
from services.cli.servers import free_port
from shared.contracts.records import DeploymentRecord, DeploymentSpec
from shared.contracts.residency import Progress, Source

RECORD = {
    "spec": {"name": "m/1", "source": {"url": "/m"}},
    "slug": "m-1",
    "revision": "r",
    "state": "ready",
    "created_at_s": 1.0,
}
SPEC = DeploymentSpec(name="m/1", source=Source(url="/m"))
Lines = list[dict[str, object]]


class Gateway:
    """What the server answers with, and what it was asked."""

    def __init__(self) -> None:
        self.deploy_lines: Lines = []
        self.chat_text = b""
        self.asked: list[tuple[str, str, str]] = []
        self.url = ""

    async def deploy(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path, request.headers.get("Authorization", "")))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        for line in self.deploy_lines:
            await response.write(json.dumps(line).encode() + b"\n")
        return response

    async def delete(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.match_info["name"], ""))
        error = {"error": {"message": "No deployment has this name.", "code": "unknown_model"}}
        return web.json_response(error, status=404)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(self.chat_text)
        return response

    async def cluster(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>some other server</html>")


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[Gateway]:
    served = Gateway()
    app = web.Application()
    routes: list[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]] = [
        ("POST", "/v1/admin/deployments", served.deploy),
        ("DELETE", "/v1/admin/deployments/{name}", served.delete),
        ("POST", "/v1/chat/completions", served.chat),
        ("GET", "/v1/admin/cluster", served.cluster),
    ]
    for method, path, handler in routes:
        app.router.add_route(method, path, handler)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    served.url = f"http://127.0.0.1:{port}"
    yield served
    await runner.cleanup()


async def test_progress_then_the_record(gateway: Gateway) -> None:
    gateway.deploy_lines = [
        {"progress": {"phase": "queued"}},
        {"progress": {"phase": "importing", "done_bytes": 1, "total_bytes": 2, "eta_s": 0.5}},
        {"deployment": RECORD},
    ]
    async with Client(gateway.url, "secret") as client:
        items = [item async for item in client.deploy(SPEC)]
    assert items[:2] == [
        Progress(phase="queued"),
        Progress(phase="importing", done_bytes=1, total_bytes=2, eta_s=0.5),
    ]
    assert isinstance(items[2], DeploymentRecord)
    assert items[2].spec == SPEC
    assert gateway.asked == [("POST", "/v1/admin/deployments", "Bearer secret")]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            [{"progress": {"phase": "queued"}}, {"error": {"message": "It is no checkpoint.", "code": "x"}}],
            "no checkpoint",
        ),
        ([{"progress": {"phase": "queued"}}], "before the deployment was ready"),
        ([{"deployment": {"spec": 1}}], "cannot be read"),
        ([{"progress": 3}], "cannot be read"),
    ],
)
async def test_a_deployment_that_fails(gateway: Gateway, lines: Lines, says: str) -> None:
    gateway.deploy_lines = lines
    async with Client(gateway.url, "") as client:
        with pytest.raises(ClientError, match=says):
            _ = [item async for item in client.deploy(SPEC)]


async def test_a_refusal_is_the_gateways_sentence(gateway: Gateway) -> None:
    async with Client(gateway.url, "") as client:
        with pytest.raises(ClientError, match="No deployment has this name") as refused:
            await client.delete("m/1")
    assert refused.value.code == "unknown_model"
    assert gateway.asked == [("DELETE", "m/1", "")]


async def test_a_stream_of_comments_and_words(gateway: Gateway) -> None:
    gateway.chat_text = (
        ": loading 41 % eta 3.1 s\n\n"
        'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
        'data: {"choices": [{"delta": {"content": "Ünd"}}]}\n\n'
        'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
        'data: {"choices": [], "usage": {}}\n\n'
        "data: [DONE]\n\n"
    ).encode()
    async with Client(gateway.url, "") as client:
        items = [item async for item in client.chat({"model": "m"})]
    assert items == [("comment", "loading 41 % eta 3.1 s"), ("text", "Ünd"), ("finish", "length")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'data: {"error": {"message": "The worker was lost."}}\n\n', "worker was lost"),
        (b'data: {"choices": []}\n\n', "broke off"),
        (b"data: nonsense\n\n", "cannot be read"),
    ],
)
async def test_a_stream_that_fails(gateway: Gateway, text: bytes, says: str) -> None:
    gateway.chat_text = text
    async with Client(gateway.url, "") as client:
        with pytest.raises(ClientError, match=says):
            _ = [item async for item in client.chat({"model": "m"})]


async def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with Client(url, "") as client:
        with pytest.raises(ClientError, match=f"No Hearth answers at {url}. Start one with: hearth up"):
            await client.cluster()
        assert not await client.ready()


async def test_somebody_else_there(gateway: Gateway) -> None:
    async with Client(gateway.url, "") as client:
        with pytest.raises(ClientError, match="is no Hearth"):
            await client.cluster()


async def test_no_url() -> None:
    async with Client("nonsense", "") as client:
        with pytest.raises(ClientError, match="is no URL"):
            await client.cluster()
