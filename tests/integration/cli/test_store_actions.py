"""The actions of `hearth store` against a small server that speaks as the gateway does, over a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from aiohttp import web

from services.cli.parser import parse
from services.cli.servers import free_port
from shared.contracts.records import ClusterView
from shared.contracts.residency import HeldCheckpoint, Source
from tests.unit.cli.test_ps import CHECKPOINT, deployment, server

ID = "ab" * 16
CHECK = msgspec.structs.replace(CHECKPOINT, checkpoint_id=ID)
HALF = {"progress": {"type": "progress", "phase": "importing", "done_bytes": 50, "total_bytes": 100}}
Lines = list[dict[str, Any]]


class Gateway:
    """What the server answers with (a list of lines is held open at its end when `hang` is set), and what it heard."""

    def __init__(self) -> None:
        self.view = ClusterView(servers=(server(1, ssd={ID: 1}),), deployments=(deployment("demo", CHECK),))
        self.held: dict[str, list[HeldCheckpoint]] = {}
        self.lines: dict[str, Lines] = {}
        self.heard: list[tuple[str, str, Any]] = []
        self.hang = False
        self.url = ""

    async def cluster(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=msgspec.json.encode(self.view), content_type="application/json")

    async def anything(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/v1/admin/servers/")
        body = await request.json() if request.can_read_body else None
        self.heard.append((request.method, path + ("?" + request.query_string if request.query_string else ""), body))
        if request.method == "GET":
            held = self.held[path.split("/")[0]]
            return web.Response(body=msgspec.json.encode({"data": held}), content_type="application/json")
        lines = self.lines[path.split("/")[0]]
        if "error" in lines[0]:
            return web.json_response(lines[0], status=422)
        if request.headers["Accept"] == "application/json":
            return web.json_response(lines[-1])
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        for line in lines:
            await response.write(json.dumps(line).encode() + b"\n")
        if self.hang:
            await asyncio.sleep(60)
        return response


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[Gateway]:
    served = Gateway()
    app = web.Application()
    app.router.add_get("/v1/admin/cluster", served.cluster)
    app.router.add_route("*", "/v1/admin/servers/{rest:.*}", served.anything)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    served.url = f"http://127.0.0.1:{port}"
    yield served
    await runner.cleanup()


async def store(gateway: Gateway, *arguments: str) -> int:
    """Run `hearth store …` on a thread of its own, as it has an event loop of its own; its exit code."""
    return await asyncio.to_thread(parse(["store", *arguments, "--url", gateway.url]).run)


def imported() -> dict[str, Any]:
    return {"checkpoint": msgspec.to_builtins(CHECK)}


async def test_an_import_with_its_progress(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.lines["server-1"] = [HALF, imported()]
    assert await store(gateway, "import", "hf:org/m", "--dtype", "bfloat16") == 0
    source = {"url": "hf:org/m", "dtype": "bfloat16"}
    assert gateway.heard == [("POST", "server-1/checkpoints", {"source": source})]
    shown = capsys.readouterr()
    assert shown.err == "server-1: importing 50 B of 100 B (50 %)\n"
    words = "server-1: abababababab is in the SSD tier: LlamaForCausalLM, 4.2 M parameters, float32, 12 MiB ("
    assert shown.out.startswith(words)


async def test_an_import_everywhere_names_who_failed(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.view = ClusterView(servers=(server(1, ssd={}), server(2, ssd={})))
    assert await store(gateway, "import", "/models/m") == 1
    assert "Name one of server-1, server-2 with --server (or --server all)." in capsys.readouterr().err
    gateway.lines["server-1"] = [HALF, {"error": {"message": "The file is cut off.", "code": "invalid_checkpoint"}}]
    gateway.lines["server-2"] = [HALF, imported()]
    assert await store(gateway, "import", "/models/m", "--server", "all", "--json") == 1
    shown = capsys.readouterr()
    assert "hearth: server-1: The file is cut off." in shown.err
    answer = json.loads(shown.out)
    assert (answer["server_id"], answer["checkpoint"]["checkpoint_id"]) == ("server-2", ID)


async def test_what_is_held(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.view = ClusterView(servers=(server(1, ssd={ID: 1}), server(2, ssd={})))
    held = HeldCheckpoint(checkpoint=CHECK, image_bytes=100, ssd_bytes=43, source=Source(url="/m"))
    gateway.held = {"server-1": [held], "server-2": []}
    assert await store(gateway, "ls") == 0
    text = capsys.readouterr().out
    assert "abababababab" in text and "43 %" in text and "server-2: 0 checkpoints" in text
    assert await store(gateway, "ls", "--server", "server-1", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["servers"]
    assert found["checkpoints"][0]["ssd_bytes"] == 43


@pytest.mark.parametrize(
    ("arguments", "heard", "answer", "says"),
    [
        (
            ["verify", "abab"],
            ("POST", f"server-1/checkpoints/{ID}/verify", {}),
            {"verified": {"checkpoint_id": ID, "chunks": 7, "repaired_chunks": 0}},
            "server-1: abababababab is sound (7 chunks)",
        ),
        (
            ["verify", "demo"],
            ("POST", f"server-1/checkpoints/{ID}/verify", {}),
            {"verified": {"checkpoint_id": ID, "chunks": 7, "repaired_chunks": 2}},
            "server-1: demo is sound (2 of its 7 chunks had to be repaired)",
        ),
        (
            ["prefetch", "demo"],
            ("POST", f"server-1/checkpoints/{ID}/prefetch", {"tier": "dram", "source": {"url": "/m"}}),
            {"prefetched": {"checkpoint_id": ID, "tier": "dram"}},
            "server-1: demo is in DRAM",
        ),
        (
            ["export", "demo", "s3://bucket/m"],
            ("POST", f"server-1/checkpoints/{ID}/export", {"url": "s3://bucket/m"}),
            {"exported": {"checkpoint_id": ID, "url": "s3://bucket/m"}},
            "server-1: demo is copied to s3://bucket/m",
        ),
        (
            ["pin", "demo", "--tier", "ssd"],
            ("POST", f"server-1/checkpoints/{ID}/pin", {"tier": "ssd"}),
            {"pinned": {"checkpoint_id": ID, "tier": "ssd"}},
            "server-1: demo is pinned in the SSD tier",
        ),
        (
            ["unpin", "demo"],
            ("POST", f"server-1/checkpoints/{ID}/pin", {"tier": ""}),
            {"pinned": {"checkpoint_id": ID, "tier": ""}},
            "server-1: demo may be evicted again",
        ),
        (
            ["evict", "demo", "--tier", "ssd"],
            ("DELETE", f"server-1/checkpoints/{ID}?tier=ssd", None),
            {"evicted": {"checkpoint_id": ID, "tier": "ssd"}},
            "server-1: demo is not in the SSD tier any more",
        ),
    ],
)
async def test_work_on_one_checkpoint(
    gateway: Gateway,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    heard: tuple[str, str, Any],
    answer: dict[str, Any],
    says: str,
) -> None:
    gateway.lines["server-1"] = [HALF, answer]
    assert await store(gateway, *arguments) == 0
    assert capsys.readouterr().out == says + "\n"
    assert await store(gateway, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"server_id": "server-1", **answer}
    assert gateway.heard == [heard, heard]


async def test_a_refusal_is_the_gateways_sentence(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.lines["server-1"] = [{"error": {"message": "It is leased.", "code": "busy"}}]
    assert await store(gateway, "evict", "demo") == 1
    assert capsys.readouterr().err == "hearth: It is leased.\n"
    assert await store(gateway, "evict", "nobody") == 1
    assert "No deployment is called 'nobody'" in capsys.readouterr().err
    gateway.lines["server-1"] = [HALF]
    assert await store(gateway, "verify", "demo") == 1
    assert "hearth: The gateway ended its answer before the work was done." in capsys.readouterr().err


async def test_ctrl_c_leaves_the_work_running_and_says_so(gateway: Gateway) -> None:
    gateway.lines["server-1"] = [HALF]
    gateway.hang = True
    command = [sys.executable, "-P", "-m", "services", "store", "import", "/models/m", "--url", gateway.url]
    process = await asyncio.create_subprocess_exec(
        *command,
        env={name: value for name, value in os.environ.items() if not name.startswith("HEARTH_")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Whoever runs the tests in the background may have it ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert b"importing" in await process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode == 130
    assert (out, err) == (b"", b"hearth: server-1 goes on with it; the same command shows how far it is.\n")
