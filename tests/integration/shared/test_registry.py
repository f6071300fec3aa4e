"""The registry against a real redis-server."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest

from shared import codec
from shared.contracts.records import (
    DeploymentRecord,
    DeploymentSpec,
    DeploymentState,
    Phase,
    ServerRecord,
    WorkerRecord,
)
from shared.contracts.residency import Source
from shared.errors import Code, HearthError
from shared.registry import Registry


def a_worker(id: str = "w1") -> WorkerRecord:
    return WorkerRecord(
        worker_id=id,
        server_id="s1",
        phase=Phase.READY,
        pid=1,
        device="cpu",
        device_name="",
        memory_total_bytes=1,
        memory_used_bytes=0,
        max_replicas=1,
    )


def a_deployment(name: str) -> DeploymentRecord:
    spec = DeploymentSpec(name=name, source=Source(url="/m"))
    return DeploymentRecord(spec=spec, slug="m", revision="r", state=DeploymentState.READY, created_at_s=0.0)


async def test_records_come_back_as_they_were(registry: Registry) -> None:
    await registry.put(a_worker("w2"), ttl_s=10)
    await registry.put(a_worker("w1"), ttl_s=10)
    await registry.put(a_deployment("org/model:7b"), ttl_s=None)
    assert await registry.all(WorkerRecord) == [a_worker("w1"), a_worker("w2")]
    assert await registry.get(DeploymentRecord, "org/model:7b") == a_deployment("org/model:7b")
    view = await registry.view()
    assert [w.worker_id for w in view.workers] == ["w1", "w2"]
    await registry.delete(WorkerRecord, "w1")
    await registry.delete(WorkerRecord, "w1")
    assert await registry.get(WorkerRecord, "w1") is None


async def test_a_record_without_heartbeat_goes(registry: Registry) -> None:
    await registry.put(a_worker(), ttl_s=0.1)
    await asyncio.sleep(0.3)
    assert await registry.all(WorkerRecord) == []


async def test_without_redis_the_error_says_so() -> None:
    async with Registry.connect("redis://127.0.0.1:1/0") as registry:
        with pytest.raises(HearthError) as caught:
            await registry.ping()
    assert caught.value.failure.code is Code.UNAVAILABLE


async def test_a_cancellation_that_the_client_loses_ends_the_task_all_the_same(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def swallows(*args: object, **options: object) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    monkeypatch.setattr(registry._redis, "get", swallows)

    async def looks_for_ever() -> None:
        while True:
            await registry.get(ServerRecord, "s1")

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(looks_for_ever())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
    assert task.cancelled()


async def test_the_lease_has_one_holder_and_its_terms_grow(registry: Registry) -> None:
    async with registry.lease("a/1", ttl_s=1.5) as one, registry.lease("b/1", ttl_s=1.5) as other:
        assert await one.acquire(0) == (1, None)
        term, left_s = await other.acquire(0)
        assert term == 1
        assert left_s is not None
        assert 0 < left_s <= 1.5
        assert await one.renew(1)
        assert not await other.renew(1)
        assert not await other.release(1)
        assert await one.release(1)
        assert not await one.release(1)
        assert await other.acquire(0) == (2, None)
        await asyncio.sleep(1.7)
        assert not await other.renew(2)
        assert await one.acquire(41) == (42, None)
        assert await one.acquire(0) == (43, None)  # its first answer may have been lost
        assert not await one.renew(42)
        assert await one.renew(43)


async def test_a_registry_that_has_forgotten_its_terms_goes_on_far_above_what_is_known(registry: Registry) -> None:
    async with registry.lease("a/1", ttl_s=5) as one:
        assert await one.acquire(7, forgotten=1000) == (1008, None)
        assert await one.acquire(7, forgotten=1000) == (1009, None)


async def test_a_holder_whose_name_begins_like_anothers_is_somebody_else(registry: Registry) -> None:
    async with registry.lease("a/1", ttl_s=5) as one, registry.lease("a/12", ttl_s=5) as other:
        assert await other.acquire(0) == (1, None)
        assert (await one.acquire(0))[1] is not None


async def test_only_who_has_the_lease_writes_deployments(registry: Registry) -> None:
    async with registry.lease("a/1", ttl_s=5) as one, registry.lease("b/1", ttl_s=5) as other:
        await one.acquire(0)
        await registry.write(a_deployment("m"), one.value(1))
        await one.release(1)
        await other.acquire(0)
        for late in (registry.write(a_deployment("n"), one.value(1)), registry.erase(DeploymentRecord, "m", "a/1 1")):
            with pytest.raises(HearthError) as caught:
                await late
            assert caught.value.failure.code is Code.STALE_EPOCH
        assert [record.spec.name for record in await registry.all(DeploymentRecord)] == ["m"]
        await registry.erase(DeploymentRecord, "m", other.value(2))
        assert await registry.all(DeploymentRecord) == []
        view = await registry.view()
        assert view.deployments == ()


async def test_looks_decode_what_has_changed_and_forget_what_is_gone(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    decode = codec.decode

    def counted(data: bytes, kind: Any) -> Any:
        decoded.append(data)
        return decode(data, kind)

    monkeypatch.setattr(codec, "decode", counted)
    for number in range(300):
        await registry.put(a_worker(f"w{number:03}"), ttl_s=30)
    first = await registry.view()
    assert (len(first.workers), len(decoded)) == (300, 300)
    assert await registry.view() == first
    assert len(decoded) == 300
    await registry.put(msgspec.structs.replace(a_worker("w007"), pid=2), ttl_s=30)
    await registry.delete(WorkerRecord, "w008")
    second = await registry.view()
    assert len(decoded) == 301
    assert [one.worker_id for one in second.workers] == [f"w{n:03}" for n in range(300) if n != 8]
    assert second.workers[7].pid == 2
    assert await registry.all(WorkerRecord) == list(second.workers)
    assert len(decoded) == 301
