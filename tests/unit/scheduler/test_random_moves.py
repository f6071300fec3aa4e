"""Moves, drains and reliefs among deaths, lost words and full destinations, by seed: nothing is promised twice, every
question is answered, and what drains runs empty although no request ends."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest

from services.scheduler.events import (
    Action,
    CommandLoad,
    CommandMigrate,
    CommandStop,
    Event,
    LoadAccepted,
    LoadRefused,
    MigrateAccepted,
    MigrateRefused,
    MigrationHeard,
    MoveAsked,
    RecordHinted,
    ReliefAsked,
    StopAccepted,
    StopRefused,
)
from services.scheduler.rules import Rules
from shared.contracts.migration import (
    MigrationEnded,
    MigrationInFlight,
    MigrationOutcome,
    MigrationReason,
    Move,
    Moved,
    Moving,
    Relief,
)
from shared.contracts.records import Phase, ReplicaRecord, ReplicaState
from shared.errors import Code, Failure
from tests.unit.scheduler import picture
from tests.unit.scheduler.depot import Depot

NAMES = ("m0", "m1", "m2")
WORKERS = ("a0", "a1", "b0", "b1", "c0", "c1")
SLOTS = 4
AWAY = Failure(code=Code.UNAVAILABLE, message="Nobody answers.")


class Flight(msgspec.Struct):
    """A migration under way, until `due`."""

    due: float
    id: str
    source: str
    destination: str
    reason: MigrationReason


class World:
    """Workers that hold requests by name. With `kind` nobody dies and nothing is lost."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.kind = True
        self.ending = True
        self.numbers = 0
        self.held: dict[str, list[str]] = {}
        self.queued: dict[str, list[str]] = {name: [] for name in NAMES}
        self.flights: list[Flight] = []
        self.begun: list[tuple[float, str]] = []
        self.asked: list[tuple[Move, list[object]]] = []
        self.told: list[object] = []
        self.committed: dict[MigrationReason, int] = dict.fromkeys(MigrationReason, 0)
        self.desk = Depot(Rules(command_s=3.0, move_load_s=20.0, move_migrate_s=20.0, move_patience_s=4.0))
        for on in WORKERS:
            self.desk.add(picture.server(on[0], pool=2000), picture.worker(on, memory=500, max_replicas=3))
        for index, name in enumerate(NAMES):
            spec = picture.spec(name, target_concurrency=SLOTS, max_replicas=2 + index, keep_alive_s=4.0)
            self.desk.add(picture.deployment(spec, picture.checkpoint(f"ck-{name}", kv=40)))
        self.watch()
        self.desk.start()

    def watch(self) -> None:
        """Every command to migrate is held against what the scheduler knows at that moment."""
        core = self.desk.core
        handle: Callable[[Event | None, float], list[Action]] = core.handle

        def checked(event: Event | None, now: float) -> list[Action]:
            actions = handle(event, now)
            for one in actions:
                if isinstance(one, CommandMigrate):
                    message, cluster = one.message, core.cluster
                    to, source = cluster.replicas[message.to_replica_id], cluster.replicas[message.replica_id]
                    count = len(message.request_ids) or message.most
                    assert 0 < count <= to.slots - to.running, "more than the free slots"
                    assert to.state is ReplicaState.READY and cluster.workers[to.worker_id].phase is Phase.READY
                    assert (to.deployment, to.revision) == (source.deployment, source.revision)
                    assert to.worker_id != source.worker_id == one.worker_id
                    assert to.replica_id in cluster.needed
            return actions

        core.handle = checked  # type: ignore[method-assign]

    # -- what is there

    def lost(self, chance: float) -> bool:
        """Whether something goes wrong now."""
        return not self.kind and self.dice.random() < chance

    def show(self, id: str) -> None:
        """A replica's record says what it runs; what migrates to it has its slot already."""
        record = self.desk.replicas[id]
        running = len(self.held[id]) + sum(one.destination == id for one in self.flights)
        self.desk.replicas[id] = msgspec.structs.replace(record, running=running)
        self.hint("replica", id)

    def show_worker(self, on: str, *, told: bool = True) -> None:
        """A worker's record lists what leaves it; without a word it is a heartbeat."""
        replicas = self.desk.replicas
        migrations = tuple(
            MigrationInFlight(
                migration_id=f"i-{one.id}",
                request_id=one.id,
                deployment=replicas[one.source].deployment,
                destination_worker_id=replicas[one.destination].worker_id,
                reason=one.reason,
                state="round",
            )
            for one in self.flights
            if replicas[one.source].worker_id == on
        )
        self.desk.workers[on] = msgspec.structs.replace(self.desk.workers[on], migrations=migrations)
        if told:
            self.hint("worker", on)

    def hint(self, kind: str, id: str, *, deleted: bool = False) -> None:
        """Said, or lost."""
        if not self.lost(0.2):
            self.desk.tell(RecordHinted(kind, id, deleted))

    def drop(self, id: str) -> None:
        """A replica is gone; what it ran goes back to its queue, what migrated to it stays where it is."""
        record = self.desk.replicas[id]
        self.queued[record.deployment] += self.held.pop(id)
        self.flights = [one for one in self.flights if id not in (one.source, one.destination)]
        del self.desk.replicas[id]
        self.hint("replica", id, deleted=True)

    def count(self) -> None:
        """The queues' depths count what waits and what runs."""
        for name in NAMES:
            running = sum(len(ids) for id, ids in self.held.items() if self.desk.replicas[id].deployment == name)
            self.desk.queue(name, len(self.queued[name]) + running)

    # -- what is commanded

    def obey(self) -> None:
        """Workers do as they are told."""
        desk, dice = self.desk, self.dice
        for load in desk.take(CommandLoad):
            worker, id = desk.workers.get(load.worker_id), load.message.replica_id
            there = sum(one.worker_id == load.worker_id for one in desk.replicas.values())
            if worker is None or worker.phase is not Phase.READY or there >= worker.max_replicas or self.lost(0.1):
                desk.tell(LoadRefused(id, AWAY))
                continue
            desk.tell(LoadAccepted(id))
            self.held[id] = []
            desk.shows(load.message, load.worker_id, ReplicaState.LOADING)
            self.begun.append((desk.now + dice.random() * 2, id))
        for stop in desk.take(CommandStop):
            id = stop.message.replica_id
            if self.held.get(id) or any(one.destination == id for one in self.flights):
                desk.tell(StopRefused(id, Failure(code=Code.BUSY, message="It runs a request.")))
                continue
            desk.tell(StopAccepted(id))
            if id in desk.replicas:
                self.drop(id)
        for command in desk.take(CommandMigrate):
            self.migrate(command)

    def migrate(self, command: CommandMigrate) -> None:
        """A source begins, or refuses, or is not heard."""
        message, desk = command.message, self.desk
        flying = frozenset(one.id for one in self.flights)
        able = [id for id in self.held.get(message.replica_id, []) if id not in flying]
        if message.request_ids:
            able = [id for id in able if id in message.request_ids]
        chosen = able[: message.most or len(able)]
        gone = message.replica_id not in self.held or (message.request_ids and not chosen)
        if gone or self.lost(0.1):
            failure = Failure(code=Code.NOT_FOUND, message="It does not run here.") if gone else AWAY
            desk.tell(MigrateRefused(command.move_id, command.leg, failure))
            return
        ready = desk.replicas.get(message.to_replica_id)
        for id in chosen:
            source, destination = message.replica_id, message.to_replica_id
            flight = Flight(desk.now + self.dice.random() * 2, id, source, destination, message.reason)
            if ready is None or ready.running >= ready.slots or self.lost(0.2):
                self.end(flight, command.message.to_worker_id, MigrationOutcome.ABORTED)
            else:
                self.flights.append(flight)
                self.show(destination)
                ready = desk.replicas[destination]
        if command.worker_id in desk.workers:
            self.show_worker(command.worker_id)
        unheard = self.lost(0.1)  # the answer, not the question, was lost
        desk.tell(
            MigrateRefused(command.move_id, command.leg, AWAY)
            if unheard
            else MigrateAccepted(command.move_id, command.leg, tuple(chosen))
        )

    def end(self, one: Flight, to: str, outcome: MigrationOutcome) -> None:
        """A source tells how a migration ended, or is not heard."""
        source = self.desk.replicas[one.source]
        message = MigrationEnded(
            migration_id=f"i-{one.id}",
            request_id=one.id,
            deployment=source.deployment,
            source_worker_id=source.worker_id,
            destination_worker_id=to,
            reason=one.reason,
            outcome=outcome,
            failure=Failure(code=Code.BUSY, message="Full.") if outcome is MigrationOutcome.ABORTED else None,
        )
        self.committed[one.reason] += outcome is MigrationOutcome.COMMITTED
        if not self.lost(0.2):
            self.desk.tell(MigrationHeard(message))

    # -- what goes on by itself

    def move(self) -> None:
        """Loads and migrations end; requests are pulled and end; what leaves empty is gone."""
        desk = self.desk
        for due, id in [one for one in self.begun if one[0] <= desk.now or one[1] not in desk.replicas]:
            self.begun.remove((due, id))
            if id in desk.replicas and desk.replicas[id].state is ReplicaState.LOADING:
                desk.replicas[id] = msgspec.structs.replace(desk.replicas[id], state=ReplicaState.READY)
                self.hint("replica", id)
        for one in [one for one in self.flights if one.due <= desk.now]:
            self.flights.remove(one)
            source, to = desk.replicas[one.source], desk.replicas[one.destination]
            outcome = MigrationOutcome.ENDED
            if one.id in self.held[one.source]:
                outcome = MigrationOutcome.COMMITTED
                self.held[one.source].remove(one.id)
                self.held[one.destination].append(one.id)
            self.show(one.source)
            self.show(one.destination)
            self.show_worker(source.worker_id)
            self.end(one, to.worker_id, outcome)
        for id, record in list(desk.replicas.items()):
            self.work(id, record)
        for on in desk.workers:
            self.show_worker(on, told=False)
        self.count()

    def work(self, id: str, record: ReplicaRecord) -> None:
        """One replica."""
        ids, waiting = self.held[id], self.queued[record.deployment]
        coming = sum(one.destination == id for one in self.flights)
        before = list(ids)
        if record.state is ReplicaState.READY:
            while waiting and len(ids) + coming < record.slots:
                ids.append(waiting.pop(0))
        if self.ending:
            for one in [one for one in ids if self.dice.random() < 0.04]:
                ids.remove(one)
        if ids != before:
            self.show(id)
        elif record.state is ReplicaState.READY and not ids:
            self.desk.replicas[id] = msgspec.structs.replace(record, idle_s=record.idle_s + 0.3)
        if record.state is ReplicaState.DRAINING and not ids and not coming:
            self.drop(id)

    def disturb(self) -> None:
        """Requests arrive, operators ask, workers drain, are short of memory, die and come back."""
        desk, dice = self.desk, self.dice
        if dice.random() < 0.5:
            name = dice.choice(NAMES)
            for _ in range(dice.randrange(1, 4)):
                self.numbers += 1
                self.queued[name].append(f"r{self.numbers}")
            self.count()
            desk.hint(name)
        if dice.random() < 0.15 and self.held:
            self.operate(dice.choice(sorted(self.held)))
        if dice.random() < 0.1 and self.held:
            record = desk.replicas[dice.choice(sorted(self.held))]
            desk.tell(
                ReliefAsked(
                    Relief(
                        worker_id=record.worker_id,
                        replica_id=record.replica_id,
                        deployment=record.deployment,
                        requests=dice.randrange(1, 3),
                    )
                )
            )
        if dice.random() < 0.05 and sum(one.phase is Phase.READY for one in desk.workers.values()) > 3:
            self.drain(dice.choice(sorted(desk.workers)))
        if dice.random() < 0.02 and len(desk.workers) > 4:
            dead = dice.choice(sorted(desk.workers))
            del desk.workers[dead]
            for id in [id for id, one in desk.replicas.items() if one.worker_id == dead]:
                self.drop(id)
            self.hint("worker", dead, deleted=True)
        if dice.random() < 0.06:
            on = dice.choice(WORKERS)
            if on not in desk.workers or not any(one.worker_id == on for one in desk.replicas.values()):
                desk.add(picture.worker(on, memory=500, max_replicas=3))  # restarted, or its drain was undone
                self.hint("worker", on)

    def drain(self, on: str) -> None:
        """A worker drains."""
        desk = self.desk
        desk.workers[on] = msgspec.structs.replace(desk.workers[on], phase=Phase.DRAINING)
        for id, record in list(desk.replicas.items()):
            if record.worker_id == on:
                desk.replicas[id] = msgspec.structs.replace(record, state=ReplicaState.DRAINING)
                self.flights = [one for one in self.flights if one.destination != id]
                self.show(id)
        self.hint("worker", on)

    def operate(self, id: str) -> None:
        """An operator asks for a move of this or that."""
        dice, record = self.dice, self.desk.replicas[id]
        self.numbers += 1
        want = Move(
            move_id=f"v{self.numbers}",
            from_worker_id=record.worker_id,
            replica_id=id,
            request_ids=tuple(self.held[id][: dice.randrange(0, 3)]),
            most=dice.randrange(0, 3),
            to_worker_id=dice.choice(("", "", *WORKERS)),
        )
        self.asked.append((want, []))
        self.desk.tell(MoveAsked(want, self.asked[-1][1].append))

    def poll(self) -> None:
        """Operators wait on until they hear how it ended."""
        self.desk.answers()
        for want, answers in list(self.asked):
            if answers:
                self.asked.remove((want, answers))
                if isinstance(answers[0], Moving):
                    self.asked.append((want, []))
                    self.desk.tell(MoveAsked(want, self.asked[-1][1].append))
                else:
                    self.told.append(answers[0])

    def step(self) -> None:
        """A third of a second."""
        self.obey()
        self.move()
        self.obey()
        self.poll()
        self.desk.wait(0.3)


@pytest.mark.parametrize("seed", range(10))
def test_random_moves(seed: int) -> None:
    world = World(seed)
    desk = world.desk
    world.kind = False
    for _ in range(150):
        world.disturb()
        world.step()
    # Now everybody behaves, and no request ends: a worker that drains runs empty by migrations alone.
    world.kind, world.ending = True, False
    for on in WORKERS:
        desk.workers.setdefault(on, picture.worker(on, memory=500, max_replicas=3))
    ready = sorted(id for id, one in desk.workers.items() if one.phase is Phase.READY)
    for name in NAMES:  # what could find no slot without the worker that will drain is let go
        world.queued[name].clear()
        fit = SLOTS * min(desk.deployments[name].spec.max_replicas, len(ready) - 1)
        for id, ids in world.held.items():
            if desk.replicas[id].deployment == name:
                del ids[fit:]
                fit -= len(ids)
                world.show(id)
    for _ in range(40):
        world.step()
    busy = max(ready, key=lambda on: sum(len(world.held[id]) for id, r in desk.replicas.items() if r.worker_id == on))
    world.drain(busy)
    drained = world.committed[MigrationReason.DRAIN]
    left = sum(len(world.held[id]) for id, one in desk.replicas.items() if one.worker_id == busy)
    for _ in range(150):
        world.step()
    still = {
        one.worker_id: world.held[id]
        for id, one in desk.replicas.items()
        if desk.workers[one.worker_id].phase is Phase.DRAINING
    }
    assert not still, f"seed {seed}: {still} are still there"
    assert world.committed[MigrationReason.DRAIN] >= drained + left
    world.ending = True
    for _ in range(250):
        world.step()
    assert not world.asked, f"seed {seed}: {world.asked} was never answered"
    assert {type(one) for one in world.told} <= {Moved, Failure}
    assert desk.replicas == {}, f"seed {seed}: replicas are left"
    moves, cluster = desk.core.moves, desk.core.cluster
    assert set(moves.open().values()) == {(0, 0)}
    assert (cluster.needed, cluster.floors, cluster.rooms) == (frozenset(), {}, {})


def test_the_seeds_show_every_kind_of_move() -> None:
    sums = dict.fromkeys(MigrationReason, 0)
    for seed in range(3):
        world = World(seed)
        world.kind = False
        for _ in range(100):
            world.disturb()
            world.step()
        for reason, count in world.committed.items():
            sums[reason] += count
    assert min(sums[one] for one in MigrationReason if one is not MigrationReason.PLACEMENT) > 0, sums
