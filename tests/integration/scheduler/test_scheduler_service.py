"""The real scheduler on a real bus and registry; one worker and one store played by hand."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from services.scheduler.main import serve
from shared.bus import Bus, Reply
from shared.contracts.events import RecordChanged
from shared.contracts.placement import Delete, Deploy, Deployed, Deploying, LoadReplica, ReplicaFailed, StopReplica
from shared.contracts.records import (
    DeploymentRecord,
    DeploymentSpec,
    DeploymentState,
    Phase,
    ReplicaRecord,
    ReplicaState,
    SchedulerRecord,
    ServerRecord,
    WorkerRecord,
)
from shared.contracts.requests import Demand, Request, Sampling, TextPrompt
from shared.contracts.residency import Checkpoint, Done, Import, Imported, Inspect, Inspected, Progress, Source
from shared.errors import Code, Failure, HearthError
from shared.lifecycle import run_service
from shared.registry import Registry, record_id, record_kind
from shared.settings import SchedulerSettings
from shared.slug import slug
from shared.subjects import (
    DELETE,
    DEMAND,
    DEPLOY,
    IMPORT,
    INSPECT,
    LOAD,
    RECORD_CHANGED,
    REPLICA_FAILED,
    STOP,
)

PATIENCE_S = 60.0  # the machine may be shared
MIB = 2**20
FACTS = Checkpoint(
    checkpoint_id="ck1",
    architecture="LlamaForCausalLM",
    weight_bytes=10 * MIB,
    parameters=5 * MIB,
    dtype="bfloat16",
    max_context_tokens=128,
    kv_bytes_per_token=1024,
    vocab_tokens=1000,
    has_chat_template=True,
)


@dataclass
class Machine:
    """A server with one worker that holds one replica; loads succeed at once unless `failure` is set."""

    bus: Bus
    registry: Registry
    loads: list[tuple[float, LoadReplica]] = field(default_factory=list)
    stops: list[StopReplica] = field(default_factory=list)
    failure: Failure | None = None
    inspection: Failure | None = None
    polls: int = 0

    async def start(self) -> None:
        """Answer calls, write the records."""
        await self.bus.serve(INSPECT, self._inspect, server_id="s1")
        await self.bus.serve(IMPORT, self._import, server_id="s1")
        await self.bus.serve(LOAD, self._load, worker_id="w1")
        await self.bus.serve(STOP, self._stop, worker_id="w1")
        await self.bus.flush()
        server = ServerRecord(
            server_id="s1", phase=Phase.READY, host="h", pid=1, dram_capacity_bytes=100 * MIB, dram_used_bytes=0,
            leased_bytes=0, ssd_capacity_bytes=1000 * MIB, ssd_used_bytes=0, ssd={"ck1": FACTS.weight_bytes},
        )  # fmt: skip
        worker = WorkerRecord(
            worker_id="w1", server_id="s1", phase=Phase.READY, pid=1, device="cpu", device_name="cpu",
            memory_total_bytes=100 * MIB, memory_used_bytes=0, max_replicas=1,
        )  # fmt: skip
        await self.registry.put(server, ttl_s=None)
        await self.registry.put(worker, ttl_s=None)

    def _inspect(self, message: Inspect, reply: Reply[Inspected]) -> None:
        reply(self.inspection or Inspected(architecture=FACTS.architecture, weight_bytes=FACTS.weight_bytes))

    def _import(self, message: Import, reply: Reply[Progress | Imported]) -> None:
        self.polls += 1
        if self.polls == 1:
            reply(Progress(phase="importing", done_bytes=1, total_bytes=FACTS.weight_bytes))
        else:
            reply(Imported(checkpoint=FACTS))

    def _load(self, message: LoadReplica, reply: Reply[Done]) -> None:
        self.loads.append((time.monotonic(), message))
        reply(Done())

    def _stop(self, message: StopReplica, reply: Reply[Done]) -> None:
        self.stops.append(message)
        reply(Done())

    async def shows(self, message: LoadReplica, state: ReplicaState) -> None:
        """Write a replica's record and tell."""
        record = ReplicaRecord(
            replica_id=message.replica_id, worker_id="w1", server_id="s1", deployment=message.deployment,
            revision=message.revision, checkpoint_id="ck1", state=state, slots=message.slots,
        )  # fmt: skip
        await self.registry.put(record, ttl_s=None)
        self.bus.publish(RECORD_CHANGED, RecordChanged(kind="replica", id=record.replica_id), kind="replica")

    async def gone(self, replica_id: str) -> None:
        """Delete a replica's record and tell."""
        await self.registry.delete(ReplicaRecord, replica_id)
        self.bus.publish(RECORD_CHANGED, RecordChanged(kind="replica", id=replica_id, deleted=True), kind="replica")


@dataclass
class Running:
    """A scheduler that runs in this process."""

    stopping: asyncio.Event
    ended: asyncio.Event


@contextlib.asynccontextmanager
async def running(nats_url: str, redis_url: str, prefix: str, id: str = "scheduler-1") -> AsyncIterator[Running]:
    """A scheduler for as long as the block lasts."""
    settings = SchedulerSettings(
        nats_url=nats_url, redis_url=redis_url, prefix=prefix, scheduler_id=id, look_interval_s=0.2, heartbeat_s=0.2,
        command_timeout_s=5.0,
    )  # fmt: skip
    stopping, ended = asyncio.Event(), asyncio.Event()

    async def live() -> None:
        await run_service("scheduler", id, settings, serve, stopping)
        ended.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(live())
        try:
            yield Running(stopping, ended)
        finally:
            stopping.set()


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that must come."""
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, f"no {what} within {PATIENCE_S:.0f} s"
        await asyncio.sleep(0.01)


async def hinted(bus: Bus, deployment: str, condition: Callable[[], bool], what: str) -> None:
    """Wait for what a hint brings, hinting again: the first may be heard before what was shown just before it."""
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, f"no {what} within {PATIENCE_S:.0f} s"
        bus.publish(DEMAND, Demand(deployment=deployment))
        again_s = time.monotonic() + 1.0
        while not condition() and time.monotonic() < again_s:
            await asyncio.sleep(0.01)


async def until_ready(registry: Registry, id: str = "scheduler-1") -> None:
    """Wait for the scheduler's own word that it leads."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            record = await registry.get(SchedulerRecord, id)
            if record is not None and record.phase is Phase.READY and record.term:
                return
            await asyncio.sleep(0.01)


def spec(**fields: object) -> DeploymentSpec:
    """A deployment of a model directory."""
    values: dict[str, object] = {"name": "demo/m", "source": Source(url="/models/m"), **fields}
    return DeploymentSpec(**values)  # type: ignore[arg-type]


async def deployed(bus: Bus, wanted: DeploymentSpec) -> DeploymentRecord:
    """Deploy as a command line would: ask until it is there."""
    for _ in range(20):
        answer = await bus.call(DEPLOY, Deploy(spec=wanted), extra_s=1.0)
        if isinstance(answer, Deployed):
            return answer.record
        assert isinstance(answer, Deploying)
    raise AssertionError("never deployed")


def request(n: int) -> Request:
    """A request of that deployment."""
    return Request(
        request_id=f"r{n}", gateway_id="g1", deployment="demo/m", prompt=TextPrompt(text="x"), sampling=Sampling(),
        budget_s=60.0,
    )  # fmt: skip


@pytest_asyncio.fixture
async def machine(bus: Bus, registry: Registry) -> Machine:
    """A server and a worker."""
    one = Machine(bus, registry)
    await one.start()
    return one


@pytest_asyncio.fixture
async def scheduler(
    nats_url: str, redis_url: str, prefix: str, registry: Registry, machine: Machine
) -> AsyncIterator[Running]:
    """A scheduler that is ready."""
    async with running(nats_url, redis_url, prefix) as one:
        await until_ready(registry)
        yield one


async def test_deploy_hint_load(bus: Bus, registry: Registry, machine: Machine, scheduler: Running) -> None:
    record = await deployed(bus, spec())
    assert (record.state, record.checkpoint, record.slug) == (DeploymentState.READY, FACTS, slug("demo/m"))
    assert await registry.get(DeploymentRecord, "demo/m") == record
    latencies_ms: list[float] = []
    for n in range(5):
        sent_at = time.monotonic()
        await hinted(bus, "demo/m", lambda n=n: len(machine.loads) > n, "load")  # type: ignore[misc]
        at, message = machine.loads[-1]
        latencies_ms.append((at - sent_at) * 1000)
        assert (message.deployment, message.checkpoint, message.slug) == ("demo/m", FACTS, record.slug)
        assert message.kv_bytes == 128 * 1024 * message.slots
        assert 0 <= message.decision_s < 5
        await machine.shows(message, ReplicaState.READY)
        await asyncio.sleep(0.25)
        await machine.gone(message.replica_id)
        await asyncio.sleep(0.45)
    latencies_ms.sort()
    print(f"hint → LOAD at the worker: median {latencies_ms[2]:.2f} ms, most {latencies_ms[-1]:.2f} ms")


async def test_waiting_requests_are_seen_without_a_hint(bus: Bus, machine: Machine, scheduler: Running) -> None:
    record = await deployed(bus, spec())
    await bus.enqueue(record.slug, request(1))
    await until(lambda: len(machine.loads) == 1, "load")
    assert (await bus.queue_depths())[record.slug] == 1


async def test_idle_replicas_are_stopped_after_the_keep_alive(bus: Bus, machine: Machine, scheduler: Running) -> None:
    await deployed(bus, spec(keep_alive_s=0.5))
    bus.publish(DEMAND, Demand(deployment="demo/m"))
    await until(lambda: len(machine.loads) == 1, "load")
    await machine.shows(machine.loads[0][1], ReplicaState.READY)
    await until(lambda: len(machine.stops) == 1, "stop")
    assert machine.stops[0].reason == "keep_alive"


async def test_eviction_is_followed_by_the_load(bus: Bus, machine: Machine, scheduler: Running) -> None:
    await deployed(bus, spec())
    await deployed(bus, spec(name="other"))
    bus.publish(DEMAND, Demand(deployment="other"))
    await until(lambda: len(machine.loads) == 1, "load")
    await machine.shows(machine.loads[0][1], ReplicaState.READY)
    await asyncio.sleep(1.2)
    await hinted(bus, "demo/m", lambda: len(machine.stops) == 1, "eviction")
    assert machine.stops[0].replica_id == machine.loads[0][1].replica_id
    bus.publish(DEMAND, Demand(deployment="demo/m"))
    await machine.gone(machine.stops[0].replica_id)
    await until(lambda: len(machine.loads) == 2, "second load")
    assert machine.loads[1][1].deployment == "demo/m"


async def test_a_model_that_cannot_be_loaded_gets_a_failure(
    bus: Bus, registry: Registry, machine: Machine, scheduler: Running
) -> None:
    await deployed(bus, spec())
    bus.publish(DEMAND, Demand(deployment="demo/m"))
    await until(lambda: len(machine.loads) == 1, "load")
    failure = Failure(code=Code.UNSUPPORTED, message="This architecture cannot be served.")
    failed = ReplicaFailed(
        replica_id=machine.loads[0][1].replica_id, deployment="demo/m", worker_id="w1", failure=failure
    )
    bus.publish(REPLICA_FAILED, failed)
    for _ in range(500):
        record = await registry.get(DeploymentRecord, "demo/m")
        assert record is not None
        if record.failure is not None:
            break
        await asyncio.sleep(0.01)
    assert record.failure is not None
    assert (record.failure.code, record.failure.message) == (failure.code, failure.message)


async def test_a_refused_source_is_told_and_leaves_nothing(
    bus: Bus, registry: Registry, machine: Machine, scheduler: Running
) -> None:
    machine.inspection = Failure(code=Code.INVALID_CHECKPOINT, message="There is no config.json.")
    with pytest.raises(HearthError, match=r"There is no config\.json") as caught:
        await bus.call(DEPLOY, Deploy(spec=spec()), extra_s=1.0)
    assert caught.value.failure.code is Code.INVALID_CHECKPOINT
    assert await registry.all(DeploymentRecord) == []


async def test_a_bad_name_is_refused(bus: Bus, registry: Registry, scheduler: Running) -> None:
    with pytest.raises(HearthError, match="no valid deployment name"):
        await bus.call(DEPLOY, Deploy(spec=spec(name="../x")))
    assert await registry.all(DeploymentRecord) == []


async def test_delete_ends_replicas_queue_and_record(
    bus: Bus, registry: Registry, machine: Machine, scheduler: Running
) -> None:
    record = await deployed(bus, spec())
    await bus.enqueue(record.slug, request(1))
    await until(lambda: len(machine.loads) == 1, "load")
    message = machine.loads[0][1]
    await machine.shows(message, ReplicaState.READY)
    await asyncio.sleep(0.1)
    assert await bus.call(DELETE, Delete(deployment="demo/m")) == Done()
    assert await registry.all(DeploymentRecord) == []
    assert record.slug not in await bus.queue_depths()
    await until(lambda: len(machine.stops) == 1, "stop")
    assert (machine.stops[0].replica_id, machine.stops[0].abort) == (message.replica_id, True)
    with pytest.raises(HearthError) as caught:
        await bus.call(DELETE, Delete(deployment="demo/m"))
    assert caught.value.failure.code is Code.UNKNOWN_MODEL


async def test_a_restart_forgets_nothing(
    bus: Bus, registry: Registry, machine: Machine, nats_url: str, redis_url: str, prefix: str
) -> None:
    async with running(nats_url, redis_url, prefix):
        await until_ready(registry)
        record = await deployed(bus, spec())
        await bus.enqueue(record.slug, request(1))
        await until(lambda: len(machine.loads) == 1, "load")
        await machine.shows(machine.loads[0][1], ReplicaState.READY)
    assert await registry.get(SchedulerRecord, "scheduler-1") is None
    async with running(nats_url, redis_url, prefix, "scheduler-2"):
        await until_ready(registry, "scheduler-2")
        await asyncio.sleep(0.6)
        assert len(machine.loads) == 1
        assert machine.stops == []
        await machine.gone(machine.loads[0][1].replica_id)
        await until(lambda: len(machine.loads) == 2, "load by the new scheduler")


async def test_a_second_scheduler_waits_for_its_turn(
    bus: Bus, registry: Registry, machine: Machine, nats_url: str, redis_url: str, prefix: str
) -> None:
    async with running(nats_url, redis_url, prefix, "scheduler-1") as first:
        await until_ready(registry)
        async with running(nats_url, redis_url, prefix, "scheduler-0"):
            async with asyncio.timeout(PATIENCE_S):
                while (record := await registry.get(SchedulerRecord, "scheduler-0")) is None or (
                    record.phase is not Phase.READY
                ):
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.6)
            record = await registry.get(SchedulerRecord, "scheduler-0")
            assert record is not None
            assert (record.phase, record.term) == (Phase.READY, 0)
            first.stopping.set()
            await first.ended.wait()
            await until_ready(registry, "scheduler-0")
            await deployed(bus, spec())


def test_the_registry_names_deployments_by_their_name() -> None:
    record = DeploymentRecord(
        spec=spec(), slug=slug("demo/m"), revision="r", state=DeploymentState.READY, created_at_s=0.0
    )
    assert (record_kind(DeploymentRecord), record_id(record)) == ("deployment", "demo/m")
