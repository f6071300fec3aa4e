"""Whatever happens in whatever order: no device is over-committed, every demand is served, and the end is clean."""

from __future__ import annotations

import random

import msgspec
import pytest

from services.scheduler.events import (
    CommandLoad,
    CommandStop,
    LoadAccepted,
    LoadRefused,
    RecordHinted,
    ReplicaBroke,
    StopAccepted,
    StopRefused,
)
from services.scheduler.rules import Rules
from shared.contracts.placement import Explain
from shared.contracts.records import DeploymentState, ReplicaRecord, ReplicaState
from shared.errors import Code, Failure
from tests.unit.scheduler import picture
from tests.unit.scheduler.desk import Desk

NAMES = tuple(f"m{index}" for index in range(8))
AWAY = Failure(code=Code.UNAVAILABLE, message="Nobody answers.")
BROKEN = Failure(code=Code.INTERNAL, message="The engine failed.")


class World:
    """Workers that do as they are told, sometimes late, sometimes not at all; the seed decides."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.desk = Desk(Rules(command_s=3.0, most_backoff_s=4.0, forget_s=30.0))
        self.begun: list[tuple[float, str]] = []
        self.served = dict.fromkeys(NAMES, 0)
        self.kind = True
        for server in ("a", "b", "c"):
            self.desk.add(picture.server(server, pool=700))
            for index in range(2):
                self.desk.add(picture.worker(f"{server}{index}", memory=500, max_replicas=3))
        for index, name in enumerate(NAMES):
            facts = picture.checkpoint(f"ck-{name}", weights=60 * (index + 1), kv=50 * (index % 4 + 1))
            spec = picture.spec(name, max_replicas=index % 3 + 1, min_replicas=index == 1, keep_alive_s=3.0)
            self.desk.add(picture.deployment(spec, facts))
        self.desk.start()

    def tell(self, id: str, *, deleted: bool = False) -> None:
        """A hint about a replica; sometimes lost."""
        if self.random.random() < 0.8:
            self.desk.tell(RecordHinted("replica", id, deleted))

    def drop(self, id: str) -> None:
        """A replica is gone."""
        if self.desk.replicas.pop(id, None) is not None:
            self.tell(id, deleted=True)

    def put(self, record: ReplicaRecord) -> None:
        """A worker writes a record."""
        self.desk.replicas[record.replica_id] = record
        self.tell(record.replica_id)

    def obey(self) -> None:
        """Workers answer what they were told."""
        desk, dice = self.desk, self.random
        for load in desk.take(CommandLoad):
            message = load.message
            held = [one for one in desk.replicas.values() if one.worker_id == load.worker_id]
            worker = desk.workers.get(load.worker_id)
            if worker is None or (self.kind is False and dice.random() < 0.1):
                desk.tell(LoadRefused(message.replica_id, AWAY))
                continue
            used = sum(one.memory_bytes for one in held)
            assert used + message.kv_bytes <= worker.memory_total_bytes, "the scheduler over-commits a worker"
            assert len(held) < worker.max_replicas
            desk.tell(LoadAccepted(message.replica_id))
            if self.kind or dice.random() < 0.9:
                desk.shows(message, load.worker_id, ReplicaState.LOADING)
                self.begun.append((desk.now + dice.random() * 2, message.replica_id))
        for stop in desk.take(CommandStop):
            id = stop.message.replica_id
            record = desk.replicas.get(id)
            if record is None:
                desk.tell(StopAccepted(id))
            elif record.running and not (stop.message.drain or stop.message.abort):
                desk.tell(StopRefused(id, Failure(code=Code.BUSY, message="It runs a request.")))
            elif self.kind or dice.random() < 0.9:
                desk.tell(StopAccepted(id))
                self.drop(id)

    def move(self) -> None:
        """Loads end; replicas run requests and finish them."""
        desk, dice = self.desk, self.random
        for due, id in list(self.begun):
            record = desk.replicas.get(id)
            if record is None:
                self.begun.remove((due, id))
            elif due <= desk.now:
                self.begun.remove((due, id))
                if not self.kind and dice.random() < 0.15:
                    self.drop(id)
                    if dice.random() < 0.7:
                        desk.tell(ReplicaBroke(id, record.deployment, record.worker_id, BROKEN))
                else:
                    self.put(msgspec.structs.replace(record, state=ReplicaState.READY))
        for id, record in list(desk.replicas.items()):
            if record.state is not ReplicaState.READY:
                continue
            slug = desk.deployments[record.deployment].slug if record.deployment in desk.deployments else ""
            if record.running:
                desk.depths[slug] = max(0, desk.depths.get(slug, 0) - 1)
                self.served[record.deployment] += 1
                self.put(msgspec.structs.replace(record, running=0, idle_s=0.0))
            elif desk.depths.get(slug, 0) > 0:
                self.put(msgspec.structs.replace(record, running=1, idle_s=0.0))
            else:
                desk.replicas[id] = msgspec.structs.replace(record, idle_s=record.idle_s + 0.3)

    def disturb(self) -> None:
        """Requests arrive, workers die and come back."""
        desk, dice = self.desk, self.random
        if dice.random() < 0.4:
            name = dice.choice(NAMES)
            if name in desk.deployments:
                desk.queue(name, desk.depths.get(desk.deployments[name].slug, 0) + dice.randrange(1, 4))
                if dice.random() < 0.8:
                    desk.hint(name)
        if dice.random() < 0.02 and len(desk.workers) > 2:
            dead = dice.choice(sorted(desk.workers))
            del desk.workers[dead]
            for id in [id for id, one in desk.replicas.items() if one.worker_id == dead]:
                del desk.replicas[id]
        elif dice.random() < 0.05:
            for server in ("a", "b", "c"):
                for index in range(2):
                    desk.workers.setdefault(
                        f"{server}{index}", picture.worker(f"{server}{index}", memory=500, max_replicas=3)
                    )

    def step(self) -> None:
        """A third of a second."""
        self.obey()
        self.move()
        self.obey()
        self.desk.wait(0.3)


@pytest.mark.parametrize("seed", range(12))
def test_random_sequences(seed: int) -> None:
    world = World(seed)
    desk = world.desk
    world.kind = False
    for _ in range(200):
        world.disturb()
        world.step()
    # Now everybody behaves: whatever still waits is served, and then everything leaves.
    world.kind = True
    for server in ("a", "b", "c"):
        for index in range(2):
            desk.workers.setdefault(f"{server}{index}", picture.worker(f"{server}{index}", memory=500, max_replicas=3))
    for _ in range(400):
        world.step()
        if not any(desk.depths.values()):
            break
    waiting = {slug: count for slug, count in desk.depths.items() if count}
    assert not waiting, f"seed {seed}: nobody answers {waiting}"
    for _ in range(100):
        world.step()
    left = sorted(one.deployment for one in desk.replicas.values())
    assert left == ["m1"], f"seed {seed}: {left} instead of the one minimum"
    cluster = desk.core.cluster
    assert (cluster.loads, cluster.stops, cluster.rooms) == ({}, {}, {})
    assert all(one.failure is None and one.state is DeploymentState.READY for one in desk.deployments.values())
    assert sum(world.served.values()) > 50


def test_the_same_seed_gives_the_same_decisions() -> None:
    told: list[list[str]] = []
    for _ in range(2):
        world = World(7)
        world.kind = False
        for _ in range(100):
            world.disturb()
            world.step()
        told.append([one.reason for one in world.desk.core.decisions.explain(Explain(limit=64), world.desk.now)])
    assert told[0] == told[1]
    assert len(told[0]) > 10
