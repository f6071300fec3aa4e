"""What a worker tells of its loads, with a real store: from its source, from the SSD, from DRAM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.store.main import serve
from services.worker.service import StoreLeases
from shared.bus import Bus
from shared.contracts.placement import ReplicaLoaded
from shared.contracts.records import Phase, ServerRecord
from shared.contracts.residency import Evict, Source
from shared.errors import HearthError
from shared.lifecycle import run_service
from shared.registry import Registry
from shared.settings import StoreSettings, WorkerSettings
from shared.subjects import EVICT, REPLICA_LOADED
from tests.builders.models import make_model
from tests.integration.worker.cluster import Operator, worker

pytestmark = pytest.mark.torch

MIB = 2**20


@asynccontextmanager
async def a_store(settings: StoreSettings, registry: Registry) -> AsyncIterator[None]:
    """A whole store on this loop, from start to drain."""
    stopping = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run_service("store", settings.server_id, settings, serve, stopping))
        async with asyncio.timeout(30):
            while (record := await registry.get(ServerRecord, settings.server_id)) is None or (
                record.phase is not Phase.READY
            ):
                await asyncio.sleep(0.02)
        try:
            yield
        finally:
            stopping.set()


async def evict(bus: Bus, server_id: str, checkpoint_id: str) -> None:
    """Take it out of DRAM; the lease of the last replica may still be on its way back."""
    async with asyncio.timeout(30):
        while True:
            try:
                await bus.call(EVICT, Evict(checkpoint_id=checkpoint_id, tier="dram"), server_id=server_id)
                return
            except HearthError:
                await asyncio.sleep(0.02)


async def test_a_load_tells_its_parts_and_they_add_up(
    tmp_path: Path, nats_url: str, redis_url: str, prefix: str, bus: Bus, registry: Registry
) -> None:
    from services.worker.loader import TorchLoader

    source = make_model(tmp_path / "model", "llama", eos=False)
    (tmp_path / "shm").mkdir()
    urls: dict[str, Any] = {"nats_url": nats_url, "redis_url": redis_url, "prefix": prefix, "heartbeat_s": 0.2}
    store = StoreSettings(
        server_id="server-1", store_dir=str(tmp_path / "store"), shm_dir=str(tmp_path / "shm"), dram_bytes=8 * MIB,
        ssd_bytes=64 * MIB, chunk_bytes=64 * 1024, io_threads=2, io_block_bytes=64 * 1024, **urls,
    )  # fmt: skip
    settings = WorkerSettings(worker_memory_bytes=64 * MIB, torch_threads=1, drain_s=1.0, **urls)
    leases = StoreLeases(SimpleNamespace(bus=bus, id="w1", settings=settings))  # type: ignore[arg-type]
    told: list[ReplicaLoaded] = []
    operator = Operator(bus, registry)
    await operator.open()
    loader: Any = TorchLoader(device="cpu", torch_threads=1)
    async with a_store(store, registry), worker(settings, loader=loader, leases=leases):
        await bus.subscribe(REPLICA_LOADED, told.append)
        await bus.flush()
        for number, tier in enumerate(("remote", "ssd", "dram")):
            if tier == "ssd":
                await evict(bus, "server-1", told[0].checkpoint_id)
            await operator.load("w1", f"r{number}", checkpoint_id="", source=Source(url=str(source)))
            async with asyncio.timeout(30):
                while len(told) <= number:
                    await asyncio.sleep(0.01)
            await operator.stop("w1", f"r{number}")
            await operator.until_state(f"r{number}", None)
        record = await registry.get(ServerRecord, "server-1")
    assert [one.tier for one in told] == ["remote", "ssd", "dram"]
    remote, ssd, dram = told
    for one in told:
        assert (one.worker_id, one.server_id, one.device) == ("w1", "server-1", "cpu")
        assert one.wait_s + one.move_s + one.attach_s == pytest.approx(one.total_s)
        assert 0 < one.attach_s <= one.work_s
        assert one.wait_s >= 0
    assert min(remote.move_s, ssd.move_s) > 0
    assert remote.moved_bytes == ssd.moved_bytes >= ssd.weight_bytes > 0
    assert (dram.wait_s, dram.move_s, dram.moved_bytes) == (0, 0, 0)
    assert record is not None
    assert (record.ssd_queue, record.import_queue) == ({}, {})
