"""The paths of servers and their checkpoints, with a store written by hand."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import Any

import msgspec
import pytest

from shared.bus import Reply, Subscription
from shared.contracts.records import Phase, ServerRecord
from shared.contracts.residency import (
    CheckpointList,
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
from shared.errors import Code, Failure
from shared.subjects import EVICT, EXPORT, IMPORT, LIST, PIN, PREFETCH, VERIFY, Endpoint
from tests.integration.gateway.harness import CHECKPOINT, Cluster, cluster, until

HALF = Progress(phase="importing", done_bytes=50, total_bytes=100, eta_s=1.5)
HELD = HeldCheckpoint(
    checkpoint=CHECKPOINT, image_bytes=100, dram_bytes=100, ssd_bytes=43, source=Source(url="/models/m"), leases=2
)
LINES = {"Accept": "application/x-ndjson"}
ENDPOINTS: tuple[Endpoint[Any, Any], ...] = (LIST, IMPORT, VERIFY, PREFETCH, EXPORT, PIN, EVICT)
SERVER = "/v1/admin/servers/s1"
ONE = f"{SERVER}/checkpoints/c1"


class Store:
    """Gives the answers that the test wrote down, the last one for ever; keeps what it was asked."""

    def __init__(self, it: Cluster, server_id: str = "s1") -> None:
        self._it = it
        self._server_id = server_id
        self._subscriptions: list[Subscription] = []
        self.answers: dict[Endpoint[Any, Any], list[Any]] = defaultdict(list)
        self.asked: list[Any] = []

    async def start(self) -> Store:
        await self._it.registry.put(
            ServerRecord(
                server_id=self._server_id, phase=Phase.READY, host="h", pid=1, dram_capacity_bytes=200,
                dram_used_bytes=100, leased_bytes=0, ssd_capacity_bytes=1000, ssd_used_bytes=43,
            ),
            ttl_s=None,
        )  # fmt: skip
        for endpoint in ENDPOINTS:
            self._subscriptions.append(
                await self._it.bus.serve(endpoint, self._handler(endpoint), server_id=self._server_id)
            )
        await self._it.bus.flush()
        return self

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.close()
        await self._it.bus.flush()
        self._subscriptions.clear()

    def _handler(self, endpoint: Endpoint[Any, Any]) -> Any:
        def handle(message: Any, reply: Reply[Any]) -> None:
            self.asked.append(message)
            left = self.answers[endpoint]
            reply(left.pop(0) if len(left) > 1 else left[0])

        return handle


async def lines_of(it: Cluster, path: str, body: Any = None) -> list[dict[str, Any]]:
    async with it.post(path, body, headers=LINES) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "application/x-ndjson"
        return [json.loads(line) async for line in response.content]


async def refused(it: Cluster, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    more = {} if body is None else {"json": body}
    async with it.http.request(method, it.url + path, **more) as response:
        return response.status, (await response.json())["error"]


async def test_servers_and_what_they_hold(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        store = await Store(it).start()
        store.answers[LIST] = [CheckpointList(checkpoints=(HELD,))]
        async with it.http.get(it.url + "/v1/admin/servers") as response:
            (record,) = (await response.json())["data"]
        assert (record["server_id"], record["dram_used_bytes"]) == ("s1", 100)
        assert record["pinned"] == {}, "every field is there"
        async with it.http.get(it.url + SERVER) as response:
            assert (await response.json())["server"] == record
        async with it.http.get(it.url + SERVER + "/checkpoints") as response:
            (held,) = (await response.json())["data"]
        assert held["checkpoint"]["checkpoint_id"] == "c1"
        assert (held["ssd_bytes"], held["leases"], held["quarantined"]) == (43, 2, "")
        assert store.asked == [ListCheckpoints()]


async def test_thousands_of_checkpoints_come_in_parts(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        store = await Store(it).start()
        every = [
            msgspec.structs.replace(HELD, checkpoint=msgspec.structs.replace(CHECKPOINT, checkpoint_id=f"{n:032x}"))
            for n in range(2100)
        ]
        # One has moved between two parts, so that it is in both.
        parts = (every[:1000], every[999:1999], every[1999:])
        store.answers[LIST] = [CheckpointList(checkpoints=tuple(part), total=2101) for part in parts]
        async with it.http.get(it.url + SERVER + "/checkpoints") as response:
            found = (await response.json())["data"]
        assert [one["checkpoint"]["checkpoint_id"] for one in found] == [f"{n:032x}" for n in range(2100)]
        assert [message.first for message in store.asked] == [0, 1000, 2000]


async def test_an_import_by_lines_and_at_once(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        store = await Store(it).start()
        store.answers[IMPORT] = [HALF, HALF, Imported(checkpoint=CHECKPOINT)]
        body = {"source": "s3://bucket/m", "dtype": "bfloat16"}
        found = await lines_of(it, SERVER + "/checkpoints", body)
        assert [next(iter(line)) for line in found] == ["progress", "progress", "checkpoint"]
        assert found[0]["progress"]["eta_s"] == 1.5
        assert found[-1]["checkpoint"]["checkpoint_id"] == "c1"
        source = Source(url="s3://bucket/m", dtype="bfloat16")
        assert [message.source for message in store.asked] == [source] * 3
        store.answers[IMPORT] = [HALF, Imported(checkpoint=CHECKPOINT)]
        async with it.post(SERVER + "/checkpoints", {"source": {"url": "hf:org/m", "revision": "main"}}) as response:
            assert response.status == 200
            assert (await response.json())["checkpoint"]["parameters"] == 1
        asked = store.asked[-1]
        assert isinstance(asked, Import)
        assert asked.source == Source(url="hf:org/m", revision="main")


async def test_an_import_that_fails_at_once_or_later(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        store = await Store(it).start()
        store.answers[IMPORT] = [HALF, Failure(code=Code.INVALID_CHECKPOINT, message="The file is cut off.")]
        found = await lines_of(it, SERVER + "/checkpoints", {"source": "/models/m"})
        assert [next(iter(line)) for line in found] == ["progress", "error"]
        assert found[-1]["error"]["message"] == "The file is cut off."
        async with it.post(SERVER + "/checkpoints", {"source": "/models/m"}, headers=LINES) as response:
            assert response.status == 422, "a refusal at once has its own status"
            assert (await response.json())["error"]["code"] == "invalid_checkpoint"


async def test_work_on_one_checkpoint(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        store = await Store(it).start()
        store.answers[VERIFY] = [HALF, Verified(chunks=7, repaired_chunks=1)]
        found = await lines_of(it, f"{ONE}/verify")
        assert found[-1] == {"verified": {"checkpoint_id": "c1", "chunks": 7, "repaired_chunks": 1}}
        assert isinstance(store.asked[-1], Verify)

        store.answers[PREFETCH] = [HALF, Done()]
        found = await lines_of(it, f"{ONE}/prefetch", {"tier": "ssd", "source": {"url": "/models/m"}})
        assert found[-1] == {"prefetched": {"checkpoint_id": "c1", "tier": "ssd"}}
        asked = store.asked[-1]
        assert isinstance(asked, Prefetch)
        assert (asked.checkpoint_id, asked.source, asked.tier) == ("c1", Source(url="/models/m"), "ssd")
        async with it.http.post(f"{it.url}{ONE}/prefetch") as response:
            assert (await response.json())["prefetched"]["tier"] == "dram", "a body is not needed"

        store.answers[EXPORT] = [HALF, Done()]
        found = await lines_of(it, f"{ONE}/export", {"url": "s3://bucket/out"})
        assert found[-1] == {"exported": {"checkpoint_id": "c1", "url": "s3://bucket/out"}}
        asked = store.asked[-1]
        assert isinstance(asked, Export)
        assert asked.url == "s3://bucket/out"

        store.answers[PIN] = [Done()]
        for tier in ("dram", "ssd", ""):
            async with it.post(f"{ONE}/pin", {"tier": tier}) as response:
                assert await response.json() == {"pinned": {"checkpoint_id": "c1", "tier": tier}}
            assert store.asked[-1] == Pin(checkpoint_id="c1", tier=tier)

        store.answers[EVICT] = [Done(), Failure(code=Code.BUSY, message="It is leased.")]
        async with it.http.delete(f"{it.url}{ONE}?tier=ssd") as response:
            assert await response.json() == {"evicted": {"checkpoint_id": "c1", "tier": "ssd"}}
        assert store.asked[-1] == Evict(checkpoint_id="c1", tier="ssd")
        status, error = await refused(it, "DELETE", f"{ONE}?tier=dram")
        assert (status, error["message"]) == (503, "It is leased.")


async def test_no_such_server_names_those_that_are_there(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        status, error = await refused(it, "GET", "/v1/admin/servers/nobody")
        assert (status, error["message"]) == (404, "No server is called 'nobody'; no store runs.")
        for name in ("s1", "s2"):
            await Store(it, name).start()
        for method, path, body in (
            ("GET", "", None),
            ("GET", "/checkpoints", None),
            ("POST", "/checkpoints", {"source": "/m"}),
            ("POST", "/checkpoints/c1/verify", None),
            ("POST", "/checkpoints/c1/pin", {}),
            ("POST", "/checkpoints/c1/prefetch", {}),
            ("POST", "/checkpoints/c1/export", {"url": "/out"}),
            ("DELETE", "/checkpoints/c1?tier=dram", None),
        ):
            status, error = await refused(it, method, "/v1/admin/servers/nobody" + path, body)
            assert status == 404, path
            assert error["message"] == "No server is called 'nobody'; there are: s1, s2."
            assert error["param"] == "server"


async def test_a_store_that_does_not_answer(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.patience.AWAY_S", 0.3)
    monkeypatch.setattr("services.gateway.stores.POLL_S", 0.1)
    async with cluster(nats_url, redis_url, prefix) as it:
        store = await Store(it).start()
        await store.stop()
        for method, path in (("GET", SERVER + "/checkpoints"), ("POST", f"{ONE}/verify")):
            status, error = await refused(it, method, path)
            assert (status, error["code"]) == (503, "unavailable")
            assert error["message"] == "The store of s1 does not answer."
        await store.start()
        store.answers[VERIFY] = [HALF]
        async with it.post(f"{ONE}/verify", None, headers=LINES) as response:
            await response.content.readline()
            await store.stop()
            *_, last = [json.loads(line) async for line in response.content]
        assert last["error"]["message"] == "The store of s1 does not answer."


async def test_what_has_begun_outlives_a_restart_of_the_store(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        store = await Store(it).start()
        store.answers[VERIFY] = [HALF]
        async with it.post(f"{ONE}/verify", None, headers=LINES) as response:
            await response.content.readline()
            store.answers[VERIFY] = [Failure(code=Code.DRAINING, message="The store is shutting down.")]
            await asyncio.sleep(0.6)
            await store.stop()
            await asyncio.sleep(0.6)
            store.answers[VERIFY] = [Verified(chunks=3)]
            await store.start()
            *_, last = [json.loads(line) async for line in response.content]
        assert last["verified"]["chunks"] == 3


@pytest.mark.parametrize("headers", [LINES, {}])
async def test_a_client_that_leaves_ends_the_polling(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    monkeypatch.setattr("services.gateway.stores.POLL_S", 0.05)
    async with cluster(nats_url, redis_url, prefix) as it:
        store = await Store(it).start()

        def slowly(message: Verify, reply: Reply[Any]) -> None:
            store.asked.append(message)
            asyncio.get_running_loop().call_later(message.wait_s, reply, HALF)

        await store.stop()
        await it.bus.serve(VERIFY, slowly, server_id="s1")
        await it.bus.flush()

        async def ask() -> None:
            async with it.post(f"{ONE}/verify", None, headers=headers) as response:
                await response.read()

        client = it.tasks.create_task(ask())
        await until(lambda: len(store.asked) > 3)
        client.cancel()
        await asyncio.wait([client])
        await asyncio.sleep(0.3)
        asked = len(store.asked)
        await asyncio.sleep(0.5)
        assert len(store.asked) == asked


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", SERVER + "/checkpoints", {}, 400, "source"),
        ("POST", SERVER + "/checkpoints", {"source": "relative"}, 400, "source.url"),
        ("POST", SERVER + "/checkpoints", {"source": "ftp://host/m"}, 400, "source.url"),
        ("POST", SERVER + "/checkpoints", {"source": "https://me:hunter2@host/m"}, 400, "source.url"),
        ("POST", SERVER + "/checkpoints", {"source": "https://me:hun/ter2@host/m"}, 400, "source.url"),
        ("POST", SERVER + "/checkpoints", {"source": "https://host/m?signature=hunter2"}, 400, "source.url"),
        ("POST", SERVER + "/checkpoints", {"source": "s3://"}, 400, "source.url"),
        ("POST", SERVER + "/checkpoints", {"source": "http://[::1"}, 400, "source.url"),
        ("POST", SERVER + "/checkpoints", {"source": "/m\n"}, 400, "source.url"),
        ("POST", SERVER + "/checkpoints", {"source": "/m", "dtype": "int4"}, 400, "source.dtype"),
        ("POST", SERVER + "/checkpoints", {"source": "/m", "revision": ""}, 400, "source.revision"),
        ("POST", SERVER + "/checkpoints", {"source": {"url": "/m"}, "dtype": "float16"}, 400, "source"),
        ("POST", SERVER + "/checkpoints", {"source": {"url": "/m", "format": "x"}}, 400, "source.format"),
        ("POST", SERVER + "/checkpoints", {"source": "/m", "force": True}, 400, "force"),
        ("POST", f"{ONE}/pin", {"tier": "tape"}, 400, "tier"),
        ("POST", f"{ONE}/prefetch", {"tier": ""}, 400, "tier"),
        ("POST", f"{ONE}/prefetch", {"teir": "ssd"}, 400, "teir"),
        ("POST", f"{ONE}/prefetch", {"source": {"url": "x"}}, 400, "source.url"),
        ("POST", f"{ONE}/export", {"url": "hf:org/m"}, 400, "url"),
        ("POST", f"{ONE}/export", {}, 400, "url"),
        ("DELETE", ONE, None, 400, "tier"),
        ("DELETE", ONE + "?tier=remote", None, 400, "tier"),
        ("POST", f"{SERVER}/checkpoints/c.1/verify", None, 404, "checkpoint"),
        ("POST", f"{SERVER}/checkpoints/{'c' * 65}/verify", None, 404, "checkpoint"),
    ],
)
async def test_what_makes_no_sense_does_not_reach_the_store(
    nats_url: str, redis_url: str, prefix: str, method: str, path: str, body: Any, status: int, param: str
) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        store = await Store(it).start()
        found, error = await refused(it, method, path, body)
        assert (found, error["param"]) == (status, param)
        assert "hunter2" not in error["message"]
        assert store.asked == []


async def test_the_paths_need_the_key(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix, api_keys="one,two") as it:
        for method, path in (("GET", "/v1/admin/servers"), ("POST", f"{ONE}/verify"), ("DELETE", ONE + "?tier=ssd")):
            assert (await refused(it, method, path))[0] == 401
        async with it.http.get(f"{it.url}/v1/admin/servers", headers={"Authorization": "Bearer two"}) as response:
            assert response.status == 200
