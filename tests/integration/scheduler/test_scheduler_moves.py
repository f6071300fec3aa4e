"""Moves, drains and reliefs on a real bus and registry; workers that migrate by agreement, in no time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec
import pytest
import pytest_asyncio

from shared.bus import Bus, Reply
from shared.contracts.events import RecordChanged
from shared.contracts.migration import (
    Migrate,
    Migrating,
    MigrationEnded,
    MigrationOutcome,
    MigrationReason,
    Move,
    Moved,
    Moving,
    Relief,
)
from shared.contracts.placement import LoadReplica, StopReplica
from shared.contracts.records import (
    DeploymentRecord,
    DeploymentState,
    Phase,
    ReplicaRecord,
    ReplicaState,
    ServerRecord,
    WorkerRecord,
)
from shared.contracts.residency import Done
from shared.errors import Code, Failure, HearthError
from shared.registry import Registry
from shared.slug import slug
from shared.subjects import LOAD, MIGRATE, MIGRATION_ENDED, MOVE, RECORD_CHANGED, RELIEF, STOP
from tests.integration.scheduler.test_scheduler_service import FACTS, MIB, running, spec, until, until_ready

SPEC = spec(name="m", target_concurrency=4, max_replicas=2, keep_alive_s=60.0)


@dataclass
class Machine:
    """A worker on a server of its own with one replica of m at most, and the requests that run in it."""

    bus: Bus
    registry: Registry
    id: str
    peers: dict[str, Machine]
    requests: list[str] = field(default_factory=list)
    migrates: list[Migrate] = field(default_factory=list)
    loads: list[LoadReplica] = field(default_factory=list)
    phase: Phase = Phase.READY
    replica_id: str = ""
    outcome: MigrationOutcome = MigrationOutcome.COMMITTED
    silent: bool = False  # says nothing of how migrations end

    async def start(self) -> None:
        """Answer calls, write the records."""
        await self.bus.serve(LOAD, self._load, worker_id=self.id)
        await self.bus.serve(STOP, self._stop, worker_id=self.id)
        await self.bus.serve(MIGRATE, self._migrate, worker_id=self.id)
        await self.bus.flush()
        server = ServerRecord(
            server_id=f"s-{self.id}", phase=Phase.READY, host="h", pid=1, dram_capacity_bytes=100 * MIB,
            dram_used_bytes=0, leased_bytes=0, ssd_capacity_bytes=1000 * MIB, ssd_used_bytes=0,
        )  # fmt: skip
        await self.registry.put(server, ttl_s=None)
        await self.show()

    async def has(self, *requests: str) -> None:
        """A ready replica that runs these."""
        self.replica_id, self.requests = f"p-{self.id}", list(requests)
        await self.show()

    async def show(self) -> None:
        """Write the records and tell."""
        worker = WorkerRecord(
            worker_id=self.id, server_id=f"s-{self.id}", phase=self.phase, pid=1, device="cpu", device_name="cpu",
            memory_total_bytes=100 * MIB, memory_used_bytes=0, max_replicas=1,
        )  # fmt: skip
        await self.registry.put(worker, ttl_s=None)
        if self.replica_id:
            state = ReplicaState.DRAINING if self.phase is Phase.DRAINING else ReplicaState.READY
            replica = ReplicaRecord(
                replica_id=self.replica_id, worker_id=self.id, server_id=f"s-{self.id}", deployment="m", revision="v1",
                checkpoint_id="ck1", state=state, slots=4, running=len(self.requests),
            )  # fmt: skip
            await self.registry.put(replica, ttl_s=None)
            self.bus.publish(RECORD_CHANGED, RecordChanged(kind="replica", id=self.replica_id), kind="replica")
        self.bus.publish(RECORD_CHANGED, RecordChanged(kind="worker", id=self.id), kind="worker")

    def _load(self, message: LoadReplica, reply: Reply[Done]) -> None:
        self.loads.append(message)
        reply(Done())

    def _stop(self, message: StopReplica, reply: Reply[Done]) -> None:
        reply(Failure(code=Code.BUSY, message="It runs a request."))

    def _migrate(self, message: Migrate, reply: Reply[Migrating]) -> None:
        self.migrates.append(message)
        chosen = [one for one in self.requests if one in message.request_ids or not message.request_ids]
        if not chosen:
            reply(Failure(code=Code.NOT_FOUND, message=f"Request {message.request_ids[0]} does not run here."))
            return
        chosen = chosen[: message.most or len(chosen)]
        reply(Migrating(request_ids=tuple(chosen)))
        for id in chosen:
            if self.outcome is MigrationOutcome.COMMITTED:
                self.requests.remove(id)
                self.peers[message.to_worker_id].requests.append(id)
            if not self.silent:
                self.bus.publish(MIGRATION_ENDED, self.told(id, message), worker_id=self.id)

    def told(self, id: str, message: Migrate) -> MigrationEnded:
        """How a migration ended."""
        return MigrationEnded(
            migration_id=f"i-{id}", request_id=id, deployment="m", source_worker_id=self.id,
            destination_worker_id=message.to_worker_id, reason=message.reason, outcome=self.outcome,
        )  # fmt: skip


Machines = dict[str, Machine]


@pytest_asyncio.fixture
async def machines(bus: Bus, registry: Registry) -> Machines:
    """Workers w1, w2, w3 and a deployment that is ready."""
    found: Machines = {}
    for id in ("w1", "w2", "w3"):
        found[id] = Machine(bus, registry, id, found)
        await found[id].start()
    record = DeploymentRecord(
        spec=SPEC, slug=slug("m"), revision="v1", state=DeploymentState.READY, created_at_s=0.0, checkpoint=FACTS
    )
    await registry.put(record, ttl_s=None)
    return found


@pytest_asyncio.fixture
async def scheduler(
    nats_url: str, redis_url: str, prefix: str, registry: Registry, machines: Machines
) -> AsyncIterator[None]:
    """A scheduler that knows two replicas: three requests run on w1, one on w2, nothing on w3."""
    await machines["w1"].has("r1", "r2", "r3")
    await machines["w2"].has("r4")
    async with running(nats_url, redis_url, prefix):
        await until_ready(registry)
        yield


async def moved(bus: Bus, want: Move) -> Moved:
    """Ask as a command line would: until it is over."""
    for _ in range(50):
        answer = await bus.call(MOVE, want, extra_s=want.wait_s)
        if isinstance(answer, Moved):
            return answer
        assert isinstance(answer, Moving)
    raise AssertionError("never over")


async def test_an_operator_moves_a_request(bus: Bus, machines: Machines, scheduler: None) -> None:
    want = Move(move_id="v1", from_worker_id="w1", request_ids=("r2",), to_worker_id="w2")
    answer = await moved(bus, want)
    assert [(one.request_id, one.outcome) for one in answer.ended] == [("r2", MigrationOutcome.COMMITTED)]
    assert (answer.failure, machines["w2"].requests) == (None, ["r4", "r2"])
    (message,) = machines["w1"].migrates
    assert (message.to_worker_id, message.to_replica_id, message.request_ids) == ("w2", "p-w2", ("r2",))
    assert await bus.call(MOVE, want) == answer  # asked again, it is told again


async def test_a_long_poll_waits_and_tells_how_far_it_is(bus: Bus, machines: Machines, scheduler: None) -> None:
    machines["w1"].silent = True
    want = Move(move_id="v1", from_worker_id="w1", replica_id="p-w1", most=2, wait_s=0.3)
    answer = await bus.call(MOVE, want, extra_s=0.3)
    assert answer == Moving(phase="migrating", open_requests=2, to_worker_id="w2")
    (message,) = machines["w1"].migrates
    for id in ("r1", "r2"):
        bus.publish(MIGRATION_ENDED, machines["w1"].told(id, message), worker_id="w1")
    assert {one.request_id for one in (await moved(bus, want)).ended} == {"r1", "r2"}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, Code.INVALID_REQUEST),
        ({"replica_id": "p-w2"}, Code.NOT_FOUND),
        ({"request_ids": ("r1",), "to_worker_id": "w1"}, Code.CONFLICT),
        ({"request_ids": ("r1",), "to_worker_id": "w9"}, Code.NOT_FOUND),
        ({"request_ids": ("r9",)}, Code.NOT_FOUND),
    ],
)
async def test_what_cannot_be_is_told(bus: Bus, scheduler: None, fields: dict[str, object], code: Code) -> None:
    want = msgspec.convert({"move_id": "v1", "from_worker_id": "w1", "type": "move", **fields}, Move)
    with pytest.raises(HearthError) as caught:
        await moved(bus, want)
    assert caught.value.failure.code is code


async def test_a_destination_without_a_replica_loads_one_first(bus: Bus, machines: Machines, scheduler: None) -> None:
    want = Move(move_id="v1", from_worker_id="w1", request_ids=("r1",), to_worker_id="w3", wait_s=0.3)
    assert await bus.call(MOVE, want, extra_s=0.3) == Moving(phase="loading", open_requests=1, to_worker_id="w3")
    (load,) = machines["w3"].loads
    machines["w3"].replica_id = load.replica_id
    await machines["w3"].show()
    answer = await moved(bus, want)
    assert [one.destination_worker_id for one in answer.ended] == ["w3"]
    assert machines["w1"].migrates[0].to_replica_id == load.replica_id
    assert len(machines["w3"].loads) == 1


async def test_no_capacity_is_told_with_reasons(
    bus: Bus, registry: Registry, machines: Machines, scheduler: None
) -> None:
    tiny = WorkerRecord(
        worker_id="w4", server_id="s-w3", phase=Phase.READY, pid=1, device="cpu", device_name="cpu",
        memory_total_bytes=1024, memory_used_bytes=0, max_replicas=1,
    )  # fmt: skip
    await registry.put(tiny, ttl_s=None)
    bus.publish(RECORD_CHANGED, RecordChanged(kind="worker", id="w4"), kind="worker")
    async with asyncio.timeout(60):
        for number in itertools.count():
            want = Move(move_id=f"v{number}", from_worker_id="w1", request_ids=("r1",), to_worker_id="w4")
            with pytest.raises(HearthError) as caught:
                await moved(bus, want)
            failure = caught.value.failure
            if failure.code is not Code.NOT_FOUND:  # it has read the worker's record
                break
            await asyncio.sleep(0.05)
    assert (failure.code, "w4 needs" in failure.message) == (Code.NO_CAPACITY, True)


async def test_a_draining_worker_runs_empty(bus: Bus, machines: Machines, scheduler: None) -> None:
    machines["w1"].phase = Phase.DRAINING
    await machines["w1"].show()
    await until(lambda: not machines["w1"].requests, "empty worker")
    assert sorted(machines["w2"].requests) == ["r1", "r2", "r3", "r4"]
    assert {(one.reason, one.most) for one in machines["w1"].migrates} == {(MigrationReason.DRAIN, 3)}


async def test_a_draining_worker_without_another_gets_one(bus: Bus, machines: Machines, scheduler: None) -> None:
    machines["w1"].phase = machines["w2"].phase = Phase.DRAINING
    for one in ("w1", "w2"):
        await machines[one].show()
    await until(lambda: len(machines["w3"].loads) == 1, "load elsewhere")
    machines["w3"].replica_id = machines["w3"].loads[0].replica_id
    await machines["w3"].show()
    await until(lambda: len(machines["w3"].requests) == 4, "requests there")


async def test_a_drain_that_fails_is_tried_again(bus: Bus, machines: Machines, scheduler: None) -> None:
    machines["w1"].outcome = MigrationOutcome.ABORTED
    machines["w1"].phase = Phase.DRAINING
    await machines["w1"].show()
    await until(lambda: len(machines["w1"].migrates) >= 2, "second try")
    machines["w1"].outcome = MigrationOutcome.COMMITTED
    await until(lambda: not machines["w1"].requests, "empty worker")


async def test_a_new_scheduler_goes_on_with_a_drain(
    bus: Bus, registry: Registry, machines: Machines, nats_url: str, redis_url: str, prefix: str
) -> None:
    await machines["w1"].has("r1", "r2")
    await machines["w2"].has()
    machines["w1"].outcome = MigrationOutcome.ABORTED
    machines["w1"].phase = Phase.DRAINING
    await machines["w1"].show()
    async with running(nats_url, redis_url, prefix):
        await until(lambda: len(machines["w1"].migrates) >= 1, "first try")
    machines["w1"].outcome = MigrationOutcome.COMMITTED
    async with running(nats_url, redis_url, prefix, "scheduler-2"):
        await until_ready(registry, "scheduler-2")
        await until(lambda: not machines["w1"].requests, "empty worker")


async def test_relief(bus: Bus, machines: Machines, scheduler: None) -> None:
    for _ in range(3):
        bus.publish(RELIEF, Relief(worker_id="w1", replica_id="p-w1", deployment="m", requests=2))
    await until(lambda: len(machines["w2"].requests) == 3, "relief")
    await asyncio.sleep(0.5)
    (message,) = machines["w1"].migrates
    assert (message.reason, message.most, message.replica_id) == (MigrationReason.KV_MEMORY, 2, "p-w1")
