"""A worker and its store's leases: early ones, windows, a store that is silent or away, memory mapped ahead of need."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from services.worker.service import StoreLeases
from shared.bus import Bus, Reply, Subscription
from shared.contracts.events import ClusterEvent, RecordChanged
from shared.contracts.placement import ReplicaFailed
from shared.contracts.records import Phase, ReplicaState, ServerRecord
from shared.contracts.residency import Acquire, Consumed, Lease, LoadProgress, Progress, Release, Renew, Renewed
from shared.errors import Code
from shared.registry import Registry
from shared.settings import WorkerSettings
from shared.subjects import (
    ACQUIRE,
    CONSUMED,
    EVENTS,
    LOAD,
    LOAD_PROGRESS,
    RECORD_CHANGED,
    RELEASE,
    RENEW,
    REPLICA_FAILED,
)
from tests.builders.images import HandMadePool, make_lease, write_manifest
from tests.builders.models import make_model
from tests.integration.worker.cluster import SLUG, Gateway, Operator, SlowLoader, expected, load_message, worker

pytestmark = pytest.mark.torch

CHUNK = 64 * 1024


@pytest.fixture
def settings(nats_url: str, redis_url: str, prefix: str) -> WorkerSettings:
    return WorkerSettings(
        nats_url=nats_url,
        redis_url=redis_url,
        prefix=prefix,
        heartbeat_s=0.2,
        ack_wait_s=1.0,
        drain_s=1.0,
        worker_memory_bytes=64 << 20,
        lease_ttl_s=1.0,
        torch_threads=1,
    )


@pytest_asyncio.fixture
async def operator(bus: Bus, registry: Registry) -> AsyncIterator[Operator]:
    made = Operator(bus, registry)
    await made.open(ack_wait_s=1.0)
    yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model(tmp_path_factory.mktemp("model"), "llama", eos=False)
    write_manifest(directory)
    return directory


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[HandMadePool]:
    made = HandMadePool(tmp_path / "pool", chunk_bytes=CHUNK, chunk_count=32)
    yield made
    made.close()


class Store:
    """A store of one lease. `silent`: it hears renewals and says nothing."""

    def __init__(self, bus: Bus, lease: Lease) -> None:
        self.bus = bus
        self.lease = lease
        self.asked: list[Acquire] = []
        self.renewals = 0
        self.silent = False
        self.unknown: tuple[str, ...] = ()
        self.released: list[str] = []
        self.consumed: list[int] = []
        self.changed = asyncio.Event()
        self._open: list[Subscription] = []

    async def open(self) -> None:
        self._open = [
            await self.bus.serve(ACQUIRE, self._acquire, server_id="server-1"),
            await self.bus.serve(RENEW, self._renew, server_id="server-1"),
            await self.bus.subscribe(RELEASE, self._release, server_id="server-1"),
            await self.bus.subscribe(CONSUMED, self._consume, server_id="server-1"),
        ]
        await self.bus.flush()

    async def close(self) -> None:
        for one in self._open:
            await one.close()
        await self.bus.flush()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def _acquire(self, message: Acquire, reply: Reply[Progress | Lease]) -> None:
        self.asked.append(message)
        reply(self.lease)
        self.changed.set()

    def _renew(self, message: Renew, reply: Reply[Renewed]) -> None:
        self.renewals += 1
        if not self.silent:
            reply(Renewed(unknown=self.unknown))
        self.changed.set()

    def _release(self, message: Release) -> None:
        self.released.append(message.lease_id)
        self.changed.set()

    def _consume(self, message: Consumed) -> None:
        self.consumed.append(message.chunks)
        self.changed.set()


class FromStore:
    """Leases of the store on the bus, for a worker whose context is known only later. See `Leases`."""

    def __init__(self, bus: Bus, settings: WorkerSettings) -> None:
        class Half:
            id = "w1"

        half: Any = Half()
        half.bus, half.settings = bus, settings
        self._inner = StoreLeases(half)
        self.acquire = self._inner.acquire
        self.renew = self._inner.renew
        self.release = self._inner.release
        self.consumed = self._inner.consumed


def torch_loader() -> Any:
    from services.worker.loader import TorchLoader

    return TorchLoader(device="cpu", torch_threads=1)


async def test_a_replica_is_made_while_its_bytes_arrive_and_the_request_says_what_was_waited_for(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, bus: Bus, model: Path, pool: HandMadePool
) -> None:
    chunks = -(-(model / "model.safetensors").stat().st_size // CHUNK)
    store = Store(bus, pool.lease(model, range(chunks)))
    await store.open()
    told = asyncio.Queue[LoadProgress]()
    await bus.subscribe(LOAD_PROGRESS, told.put_nowait, slug=SLUG)
    events = asyncio.Queue[ClusterEvent]()
    await bus.subscribe(EVENTS, events.put_nowait, service="worker")
    await bus.flush()
    async with worker(settings, loader=torch_loader(), leases=FromStore(bus, settings)):
        await operator.ask("q1", max_tokens=3)
        await bus.call(LOAD, load_message(checkpoint_id="c1", max_context_tokens=64), worker_id="w1")
        async with asyncio.timeout(60):
            while (progress := (await told.get()).progress).phase != "reading" or progress.total_bytes == 0:
                pass
        assert store.asked[0].arriving
        record = await operator.until_state("r1", ReplicaState.LOADING)
        assert record is not None and record.load is not None and record.load.phase == "reading"
        for number in range(chunks):
            pool.bring(number)
            await asyncio.sleep(0.02)
        end = await gateway.ended("q1")
        assert end.reason is not None
        async with asyncio.timeout(60):
            while (loaded := await events.get()).event != "replica.loaded":
                pass
        assert loaded.facts["tier"] == "ssd"
        waited_s = loaded.facts["read_s"]
        assert isinstance(waited_s, float)
        assert waited_s > 0
        assert store.released == []
        await operator.stop("w1")
        await operator.until_state("r1", None)
    await store.until(lambda: store.released)
    assert store.released == [store.lease.lease_id]
    phases = []
    while not told.empty():
        phases.append(told.get_nowait().progress.phase)
    assert phases[-1] == "attaching"


async def test_a_model_larger_than_the_pool_streams_through_it_and_gives_the_lease_back(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, bus: Bus, model: Path, pool: HandMadePool
) -> None:
    store = Store(bus, pool.lease(model, [4, 9], window=True))
    await store.open()
    async with worker(settings, loader=torch_loader(), leases=FromStore(bus, settings)):
        await operator.ask("q1", max_tokens=3)
        await bus.call(LOAD, load_message(max_context_tokens=64), worker_id="w1")
        for number in range(pool.chunks()):
            await store.until(lambda before=number - 1: before <= max(store.consumed, default=0))
            pool.bring(number)
        assert (await gateway.ended("q1")).reason is not None
        await store.until(lambda: store.released)
        record = await operator.until_state("r1", ReplicaState.READY)
        assert record is not None
        assert record.memory_bytes > (model / "model.safetensors").stat().st_size
        assert store.consumed[-1] == pool.chunks()


async def test_a_load_that_waits_for_bytes_can_be_stopped(
    settings: WorkerSettings, operator: Operator, bus: Bus, model: Path, pool: HandMadePool
) -> None:
    chunks = -(-(model / "model.safetensors").stat().st_size // CHUNK)
    store = Store(bus, pool.lease(model, range(chunks)))
    await store.open()
    async with worker(settings, loader=torch_loader(), leases=FromStore(bus, settings)):
        await bus.call(LOAD, load_message(max_context_tokens=64), worker_id="w1")
        await operator.until_state("r1", ReplicaState.LOADING)
        await store.until(lambda: store.renewals)
        await operator.stop("w1")
        await operator.until_state("r1", None)
        await store.until(lambda: store.released)
    assert store.released == [store.lease.lease_id]


async def test_bytes_that_will_not_come_fail_the_replica(
    settings: WorkerSettings, operator: Operator, bus: Bus, model: Path, pool: HandMadePool
) -> None:
    chunks = -(-(model / "model.safetensors").stat().st_size // CHUNK)
    store = Store(bus, pool.lease(model, range(chunks)))
    await store.open()
    told = asyncio.Queue[ReplicaFailed]()
    await bus.subscribe(REPLICA_FAILED, told.put_nowait)
    async with worker(settings, loader=torch_loader(), leases=FromStore(bus, settings)):
        await bus.call(LOAD, load_message(max_context_tokens=64), worker_id="w1")
        await store.until(lambda: store.asked)
        pool.bring(0)
        pool.fail()
        async with asyncio.timeout(60):
            failed = await told.get()
        assert failed.failure.code is Code.CHECKPOINT_UNAVAILABLE
        await store.until(lambda: store.released)
        assert store.released == [store.lease.lease_id]


# -- a store that is not what it was


@pytest_asyncio.fixture
async def leased(bus: Bus, model: Path, tmp_path: Path) -> Store:
    """A store with a lease that costs nothing: for the engine without bytes."""
    store = Store(bus, make_lease(model, tmp_path / "segment"))
    await store.open()
    return store


async def test_an_engine_stands_still_while_the_store_is_silent_for_longer_than_the_ttl_and_goes_on_after(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, bus: Bus, leased: Store
) -> None:
    settings = msgspec.structs.replace(settings, lease_ttl_s=5.0)  # it stands still for as long, and then gives up
    async with worker(settings, leases=FromStore(bus, settings)):
        await operator.load("w1")
        await operator.ask("q1", max_tokens=1000)
        await gateway.until(lambda: len(gateway.tokens.get("q1", ())) > 3)
        leased.silent = True
        async with asyncio.timeout(60):
            heard = -1
            while heard != len(gateway.tokens["q1"]):  # as long as fifty steps without a token
                heard = len(gateway.tokens["q1"])
                await asyncio.sleep(0.5)
        assert heard < 1000
        leased.silent = False
        end = await gateway.ended("q1")
        assert end.reason is not None
        assert gateway.text["q1"] == expected(1000)
        assert gateway.workers["q1"] == ["w1"]


async def test_a_store_that_is_not_there_stops_nobody(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, bus: Bus, leased: Store
) -> None:
    async with worker(settings, leases=FromStore(bus, settings)):
        await operator.load("w1")
        await leased.close()
        await operator.ask("q1", max_tokens=300)  # three times as long as the TTL
        assert (await gateway.ended("q1")).reason is not None
        await leased.open()
        before = leased.renewals
        await leased.until(lambda: leased.renewals > before + 1)
        await operator.ask("q2", max_tokens=3)
        assert (await gateway.ended("q2")).reason is not None


async def test_a_store_that_comes_back_without_the_lease_costs_a_pause(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, bus: Bus, leased: Store
) -> None:
    async with worker(settings, leases=FromStore(bus, settings)):
        await operator.load("w1")
        await operator.ask("q1", max_tokens=300)
        await gateway.until(lambda: len(gateway.tokens.get("q1", ())) > 3)
        leased.unknown = (leased.lease.lease_id,)
        await operator.until_state("r1", None)
        leased.unknown = ()
        await operator.load("w1", "r2")
        assert (await gateway.ended("q1")).reason is not None
        assert gateway.text["q1"] == expected(300)


# -- mapped ahead of need


class Preparing(SlowLoader):
    """Remembers what it was asked to prepare."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[str] = []
        self.changed = threading.Event()

    def prepare(self, segment: str) -> None:
        self.prepared.append(segment)
        self.changed.set()


async def test_the_servers_memory_is_prepared_at_the_start_and_when_it_becomes_another(
    settings: WorkerSettings, bus: Bus, registry: Registry, operator: Operator
) -> None:
    async def say(segment: str) -> None:
        record = ServerRecord(
            server_id="server-1",
            phase=Phase.READY,
            host="h",
            pid=1,
            dram_capacity_bytes=1,
            dram_used_bytes=0,
            leased_bytes=0,
            ssd_capacity_bytes=1,
            ssd_used_bytes=0,
            segment=segment,
        )
        await registry.put(record, ttl_s=60)
        bus.publish(RECORD_CHANGED, RecordChanged(kind="server", id="server-1"), kind="server")

    async def until(*segments: str) -> None:
        async with asyncio.timeout(60):
            while loader.prepared != list(segments):
                await asyncio.sleep(0.01)

    loader = Preparing()
    await say("/dev/shm/one")
    async with worker(settings, loader=loader):
        await until("/dev/shm/one")
        await say("/dev/shm/one")
        await say("/dev/shm/two")
        await until("/dev/shm/one", "/dev/shm/two")
        await operator.load("w1")
