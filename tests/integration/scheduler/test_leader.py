"""Several real schedulers, a Redis that stops or forgets, a worker that is played by hand: one leads, and only one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from services.scheduler.main import serve
from shared.bus import Bus, Reply
from shared.contracts.events import RecordChanged
from shared.contracts.placement import Leading, LoadReplica
from shared.contracts.records import Phase, ReplicaRecord, ReplicaState, SchedulerRecord, ServerRecord, WorkerRecord
from shared.contracts.residency import Done
from shared.fence import Fence
from shared.lifecycle import run_service
from shared.registry import Registry
from shared.settings import SchedulerSettings
from shared.subjects import LEADING, LOAD, RECORD_CHANGED
from tests.builders.servers import free_port, start_nats, start_redis
from tests.integration.scheduler.test_scheduler_service import FACTS, MIB, Machine, deployed, request, spec, until

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class FencedMachine(Machine):
    """A server and a worker that refuses old leaders, and shows what it loads at once, as workers do."""

    fence: Fence = field(default_factory=lambda: Fence("w1"))
    terms: list[int] = field(default_factory=list)

    async def start(self) -> None:
        await self.bus.subscribe(LEADING, self.fence.heard)
        await super().start()

    def _load(self, message: LoadReplica, reply: Reply[Done]) -> None:
        refused = self.fence.refusal(message.term)
        if refused is None:
            self.terms.append(message.term)
            super()._load(message, reply)
        else:
            reply(refused)

    async def keeps_records(self) -> None:
        """Write the records of server and worker again and again, as their heartbeats do, until cancelled."""
        while True:
            with contextlib.suppress(Exception):
                await self.write()
            await asyncio.sleep(0.2)

    async def write(self, ttl_s: float | None = 2.0) -> None:
        """Write all records of what is here."""
        await self.registry.put(a_server(), ttl_s=None)
        await self.registry.put(a_worker("w1", "s1"), ttl_s=ttl_s)
        for _, message in self.loads:
            record = ReplicaRecord(
                replica_id=message.replica_id, worker_id="w1", server_id="s1", deployment=message.deployment,
                revision=message.revision, checkpoint_id="ck1", state=ReplicaState.READY, slots=message.slots,
            )  # fmt: skip
            await self.registry.put(record, ttl_s=ttl_s)
            self.bus.publish(RECORD_CHANGED, RecordChanged(kind="replica", id=record.replica_id), kind="replica")


def a_server() -> ServerRecord:
    """A server with the checkpoint on its SSD."""
    return ServerRecord(
        server_id="s1", phase=Phase.READY, host="h", pid=1, dram_capacity_bytes=100 * MIB, dram_used_bytes=0,
        leased_bytes=0, ssd_capacity_bytes=1000 * MIB, ssd_used_bytes=0, ssd={"ck1": FACTS.weight_bytes},
    )  # fmt: skip


def a_worker(id: str, server_id: str) -> WorkerRecord:
    """A worker that holds one replica."""
    return WorkerRecord(
        worker_id=id, server_id=server_id, phase=Phase.READY, pid=1, device="cpu", device_name="cpu",
        memory_total_bytes=100 * MIB, memory_used_bytes=0, max_replicas=1,
    )  # fmt: skip


@dataclass
class OwnRedis:
    """A redis-server for one test; `forgetful`: it keeps nothing on disk."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Its URL."""
        return f"redis://127.0.0.1:{self.port}/0"

    def pause(self) -> None:
        """It hangs."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """It goes on where it was."""
        self.process.send_signal(signal.SIGCONT)

    def come_back_empty(self) -> None:
        """It dies, and its disk with it; another one starts."""
        self.process.kill()
        self.process.wait(10)
        home = self.home / "another"
        home.mkdir()
        self.process, _ = start_redis(home, self.port)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    """A redis-server that may be hurt."""
    port = free_port()
    process, _ = start_redis(tmp_path, port)
    one = OwnRedis(tmp_path, port, process)
    yield one
    one.process.send_signal(signal.SIGCONT)
    one.process.terminate()
    one.process.wait(10)


@pytest_asyncio.fixture
async def own_registry(own_redis: OwnRedis, prefix: str) -> AsyncIterator[Registry]:
    """Connected to that one."""
    async with Registry.connect(own_redis.url, prefix=prefix) as connected:
        yield connected


def settings_of(nats_url: str, redis_url: str, prefix: str, id: str) -> SchedulerSettings:
    """Quick looks, everything else as it is by default."""
    return SchedulerSettings(
        nats_url=nats_url, redis_url=redis_url, prefix=prefix, scheduler_id=id, look_interval_s=0.2, heartbeat_s=0.3
    )


@contextlib.asynccontextmanager
async def schedulers(nats_url: str, redis_url: str, prefix: str, *ids: str) -> AsyncIterator[dict[str, asyncio.Event]]:
    """Schedulers in this process, by id with the event that stops them."""
    stops = {id: asyncio.Event() for id in ids}
    async with asyncio.TaskGroup() as tasks:
        for id, stopping in stops.items():
            tasks.create_task(
                run_service("scheduler", id, settings_of(nats_url, redis_url, prefix, id), serve, stopping)
            )
        try:
            yield stops
        finally:
            for stopping in stops.values():
                stopping.set()


@contextlib.contextmanager
def scheduler_process(nats_url: str, redis_url: str, prefix: str, id: str) -> Iterator[subprocess.Popen[bytes]]:
    """A scheduler that can be killed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HEARTH_")} | {
        "HEARTH_NATS_URL": nats_url, "HEARTH_REDIS_URL": redis_url, "HEARTH_PREFIX": prefix,
        "HEARTH_SCHEDULER_ID": id, "HEARTH_LOOK_INTERVAL_S": "0.2", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "services", "scheduler"], env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


async def leader(registry: Registry, but_for: str = "") -> SchedulerRecord:
    """The record of the scheduler that leads, as soon as one does."""
    for _ in range(6000):
        with contextlib.suppress(Exception):
            for record in await registry.all(SchedulerRecord):
                if record.term and record.phase is Phase.READY and record.scheduler_id != but_for:
                    return record
        await asyncio.sleep(0.01)
    raise AssertionError("nobody leads within 60 s")


@pytest_asyncio.fixture
async def machine(bus: Bus, registry: Registry) -> FencedMachine:
    """A server and a worker on the session's Redis."""
    one = FencedMachine(bus, registry)
    await one.start()
    return one


async def test_a_standby_takes_over_from_a_leader_that_was_killed(
    bus: Bus, registry: Registry, machine: FencedMachine, nats_url: str, redis_url: str, prefix: str
) -> None:
    await registry.put(msgspec.structs.replace(a_worker("w1", "s1"), max_replicas=2), ttl_s=None)
    with scheduler_process(nats_url, redis_url, prefix, "s-1") as doomed:
        first = await leader(registry)
        begun = await deployed(bus, spec())
        other = await deployed(bus, spec(name="other"))
        async with schedulers(nats_url, redis_url, prefix, "s-2"):
            await asyncio.sleep(0.5)
            await bus.enqueue(begun.slug, request(1))
            await until(lambda: len(machine.loads) == 1, "load")
            # It is killed when a load was accepted that it has not seen in the registry yet ...
            doomed.kill()
            killed_at = time.monotonic()
            await machine.shows(machine.loads[0][1], ReplicaState.LOADING)
            await bus.enqueue(other.slug, msgspec.structs.replace(request(2), deployment="other"))
            # ... and what has been waiting since is loaded by the other one, which does not load that again.
            await until(lambda: len(machine.loads) == 2, "load by the second")
            print(f"kill -9 → first command obeyed: {machine.loads[1][0] - killed_at:.2f} s")
            second = await leader(registry, but_for="s-1")
            assert (second.scheduler_id, machine.terms) == ("s-2", [first.term, second.term])
            assert second.term > first.term
            await asyncio.sleep(0.5)
            assert [message.deployment for _, message in machine.loads] == ["demo/m", "other"]
            assert machine.stops == []


async def test_a_leader_that_stops_in_order_is_followed_at_once(
    bus: Bus, registry: Registry, machine: FencedMachine, nats_url: str, redis_url: str, prefix: str
) -> None:
    async with schedulers(nats_url, redis_url, prefix, "s-1", "s-2") as stops:
        first = await leader(registry)
        record = await deployed(bus, spec())
        began = time.monotonic()
        stops[first.scheduler_id].set()
        second = await leader(registry, but_for=first.scheduler_id)
        print(f"orderly stop → the other one leads: {time.monotonic() - began:.2f} s")
        assert second.term == first.term + 1
        await bus.enqueue(record.slug, request(1))
        await until(lambda: machine.terms == [second.term], "load by the second")


async def test_a_leader_that_hears_of_a_later_one_steps_down_and_comes_back_beyond_it(
    bus: Bus, registry: Registry, machine: FencedMachine, nats_url: str, redis_url: str, prefix: str
) -> None:
    async with schedulers(nats_url, redis_url, prefix, "s-1"):
        assert (await leader(registry)).term == 1
        record = await deployed(bus, spec())
        machine.fence.heard(Leading(scheduler_id="s-9", term=50))  # only the worker has heard of it
        await bus.enqueue(record.slug, request(1))
        await until(lambda: machine.terms == [51], "a load that is obeyed")


@pytest.mark.parametrize("how", ["hangs", "comes back empty"])
async def test_redis_goes_and_comes_back(
    bus: Bus, own_redis: OwnRedis, own_registry: Registry, nats_url: str, prefix: str, how: str
) -> None:
    machine = FencedMachine(bus, own_registry)
    await machine.start()
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(machine.keeps_records())
        async with schedulers(nats_url, own_redis.url, prefix, "s-1", "s-2"):
            first = await leader(own_registry)
            await deployed(bus, spec(min_replicas=1))
            await until(lambda: len(machine.loads) == 1, "load")
            await machine.write()
            await asyncio.sleep(0.3)
            if how == "hangs":
                own_redis.pause()
                await asyncio.sleep(4.0)
                own_redis.go_on()
            else:
                own_redis.come_back_empty()
            second = await later(own_registry, first.term)
            await asyncio.sleep(1.0)
            # Nobody took the replica for lost, and what is commanded now is obeyed.
            assert (len(machine.loads), machine.stops) == (1, [])
            other = await deployed(bus, spec(name="other"))
            await bus.enqueue(other.slug, msgspec.structs.replace(request(1), deployment="other"))
            await until(lambda: bool(machine.stops) or len(machine.loads) == 2, "a command")
            assert machine.fence.term >= second.term > first.term
        keeping.cancel()


async def later(registry: Registry, term: int) -> SchedulerRecord:
    """The record of a leader of a later term."""
    for _ in range(3000):
        record = await leader(registry)
        if record.term > term:
            return record
        await asyncio.sleep(0.02)
    raise AssertionError("nobody leads again")


async def test_a_worker_that_registers_while_a_request_waits_gets_it(
    bus: Bus, registry: Registry, nats_url: str, redis_url: str, prefix: str
) -> None:
    machine = FencedMachine(bus, registry)
    await machine.start()
    await registry.delete(WorkerRecord, "w1")
    async with schedulers(nats_url, redis_url, prefix, "s-1"):
        await leader(registry)
        record = await deployed(bus, spec())
        await bus.enqueue(record.slug, request(1))
        await asyncio.sleep(0.5)
        assert machine.loads == []
        joined_at = time.monotonic()
        await registry.put(a_worker("w1", "s1"), ttl_s=None)
        bus.publish(RECORD_CHANGED, RecordChanged(kind="worker", id="w1"), kind="worker")
        await until(lambda: len(machine.loads) == 1, "load")
        print(f"a late joiner's record → its first load: {(machine.loads[0][0] - joined_at) * 1000:.0f} ms")


async def test_the_work_of_a_worker_that_died_goes_elsewhere(
    bus: Bus, registry: Registry, nats_url: str, redis_url: str, prefix: str
) -> None:
    machine = FencedMachine(bus, registry)
    await machine.start()
    await machine.write()
    others: list[tuple[float, LoadReplica]] = []

    def load(message: LoadReplica, reply: Reply[Done]) -> None:
        others.append((time.monotonic(), message))
        reply(Done())

    await bus.serve(LOAD, load, worker_id="w2")
    await bus.flush()
    settings = SchedulerSettings(nats_url=nats_url, redis_url=redis_url, prefix=prefix, scheduler_id="s-1")
    stopping = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run_service("scheduler", "s-1", settings, serve, stopping))
        await leader(registry)
        await deployed(bus, spec(min_replicas=1))
        await until(lambda: len(machine.loads) == 1, "load")
        await registry.put(a_worker("w2", "s1"), ttl_s=None)
        await machine.write(settings.record_ttl_s)  # its last heartbeat
        died_at = time.monotonic()
        await until(lambda: len(others) == 1, "load elsewhere")
        print(f"the last heartbeat of a worker → its work is commanded elsewhere: {others[0][0] - died_at:.2f} s")
        stopping.set()


async def test_a_scheduler_that_starts_before_nats_waits_for_it(
    registry: Registry, redis_url: str, prefix: str, tmp_path: Path
) -> None:
    port = free_port()
    async with schedulers(f"nats://127.0.0.1:{port}", redis_url, prefix, "s-1"):
        await asyncio.sleep(1.3)
        process, _ = start_nats(tmp_path, port)
        assert (await leader(registry)).scheduler_id == "s-1"
    process.terminate()
    process.wait(10)


async def test_a_scheduler_that_starts_before_redis_waits_for_it(
    bus: Bus, nats_url: str, prefix: str, tmp_path: Path
) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    async with schedulers(nats_url, url, prefix, "s-1"):
        await asyncio.sleep(1.3)
        process, _ = start_redis(tmp_path, port)
        try:
            async with Registry.connect(url, prefix=prefix) as registry:
                assert (await leader(registry)).scheduler_id == "s-1"
        finally:
            process.terminate()
            process.wait(10)
