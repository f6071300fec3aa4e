"""The registry against a real redis-server."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

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
