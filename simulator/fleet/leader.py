"""The scheduler in the fleet: the production core, its looks, its commands on the bus, and what it hears. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import msgspec

from services.scheduler import events as e
from services.scheduler.core import Core
from shared.contracts.migration import MigrationEnded
from shared.contracts.placement import LoadReplica, ReplicaFailed, ReplicaLoaded, StopReplica
from shared.contracts.residency import Done, Prefetch
from shared.errors import Code, Failure
from simulator.fleet.replica import LoadTimes
from simulator.kernel import Timer

if TYPE_CHECKING:
    from simulator.fleet.world import World

NO_ANSWER: Final = Failure(code=Code.UNAVAILABLE, message="The worker did not answer in time.")
AWAY: Final = Failure(code=Code.UNAVAILABLE, message="The registry does not answer.")
LOAD_TRIES: Final = 3  # as the scheduler's service has it
ROOM: Final = frozenset({"placement.evicted", "placement.cleared"})  # from now on room is made
GIVE_UP_S: Final = 1.0  # a look at a registry that is away fails after this


class Leader:
    """One life of a leading scheduler. What is meant for one that has died is lost."""

    def __init__(self, world: World, core: Core, term: int) -> None:
        self.world: Final = world
        self.core: Final = core
        self.term: Final = term
        self.alive = True
        self.oriented = False
        self._timer: Timer | None = None
        self._timer_at = math.inf
        self._queued: list[e.Event] = []
        self._handling = False
        self._room_at: dict[str, float] = {}

    def begin(self) -> None:
        """The first picture is asked for."""
        self.handle(None)

    def die(self) -> None:
        """It says nothing more."""
        self.alive = False
        if self._timer is not None:
            self._timer.cancel()

    # -- what it hears

    def demand(self, deployment: str, waiting: int, oldest_s: float) -> None:
        """A hint of a gateway."""
        self.handle(e.DemandHinted(deployment, self.world.kernel.now, "g0", waiting, oldest_s))

    def replica_loaded(self, message: ReplicaLoaded) -> None:
        """A worker's word."""
        self.handle(e.LoadReported(message))

    def record_changed(self, kind: str, id: str, deleted: bool) -> None:
        """A hint of a record's writer."""
        self.handle(e.RecordHinted(kind, id, deleted))

    def replica_failed(self, message: ReplicaFailed) -> None:
        """A worker's word."""
        self.handle(e.ReplicaBroke(message.replica_id, message.deployment, message.worker_id, message.failure))

    def migration_ended(self, message: MigrationEnded) -> None:
        """A source's word."""
        self.handle(e.MigrationHeard(message))

    # -- the core

    def handle(self, event: e.Event | None) -> None:
        """Have the core take an event, and carry out what it wants."""
        if not self.alive:
            return
        world = self.world
        world.counters.core_calls += 1
        now = world.kernel.now
        for action in self.core.handle(event, now):
            self._do(action)
        world.checked(self.core)
        due = self.core.deadline()
        at = math.inf if due is None else max(due, now + 1e-6)
        if at != self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = world.kernel.at(at, self._wake) if at < math.inf else None

    def _wake(self) -> None:
        self._timer, self._timer_at = None, math.inf
        self.handle(None)

    def _back(self, event: e.Event, after_s: float) -> None:
        self.world.kernel.after(after_s, lambda: self.handle(event))

    def _do(self, action: e.Action) -> None:
        world = self.world
        record_s = world.hardware.record_s
        match action:
            case e.ReadRegistry(asked_at):
                self._look(asked_at)
            case e.ReadQueues(asked_at):
                world.kernel.after(record_s, lambda: self.handle(world.queues_read(asked_at)))
            case e.ReadRecord(kind, id):
                world.kernel.after(record_s, lambda: self._read(kind, id))
            case e.EnsureQueues():
                self._back(e.QueuesEnsured(), record_s)
            case e.WriteDeployment(record):
                world.registry.deployments[record.spec.name] = record
                self._back(e.DeploymentWritten(record.spec.name, record), record_s)
                world.deployment_written(record)
            case e.RemoveDeployment(record):
                world.registry.deployments.pop(record.spec.name, None)
                self._back(e.DeploymentWritten(record.spec.name, None), record_s)
            case e.CommandLoad(worker_id, message, demanded_at):
                self._load(worker_id, message, demanded_at)
            case e.CommandStop(worker_id, message):
                self._stop(worker_id, message)
            case e.CommandMigrate():
                self._migrate(action)
            case e.CommandPrefetch(server_id, message):
                self._prefetch(server_id, message)
            case e.Note(name, facts):
                world.counters.notes[name] = world.counters.notes.get(name, 0) + 1
                if name in ROOM:
                    self._room_at.setdefault(str(facts["deployment"]), world.kernel.now)
            case e.Oriented():
                self.oriented = True
            case e.InspectSource(deployment, operation):
                self._back(e.OperationFailed(deployment, operation, AWAY), record_s)
            case e.PollImport(deployment, operation):
                self._back(e.OperationFailed(deployment, operation, AWAY), record_s)
            case e.Answer(reply, answer):
                reply(answer)
            case e.StartupMeasured(measured):
                world.measured.append((measured.estimate.total_s, measured.actual_s))
            case e.Decided():
                pass

    def _look(self, asked_at: float) -> None:
        world = self.world
        if world.registry.away:
            self._back(e.RegistryUnread(AWAY), GIVE_UP_S)
            return
        view = world.registry.look()
        self._back(e.RegistryRead(view, asked_at), world.hardware.record_s + world.staleness_s())

    def _read(self, kind: str, id: str) -> None:
        registry = self.world.registry
        if registry.away:
            self._back(e.RecordUnread(kind, id), GIVE_UP_S)
        else:
            self.handle(e.RecordRead(kind, id, registry.read(kind, id)))

    # -- commands

    def _load(self, worker_id: str, message: LoadReplica, demanded_at: float) -> None:
        world, now = self.world, self.world.kernel.now
        worker, tries = world.workers[worker_id], LOAD_TRIES
        message = msgspec.structs.replace(message, decision_s=max(0.0, now - demanded_at), term=self.term)
        room_at = self._room_at.pop(message.deployment, now)
        world.counters.swaps += room_at < now
        times = LoadTimes(wanted_at=min(demanded_at, now), room_at=min(room_at, now), commanded_at=now)

        def told(failure: Failure | None) -> None:
            event = e.LoadAccepted(message.replica_id) if failure is None else None
            answer = event or e.LoadRefused(message.replica_id, failure or NO_ANSWER)
            world.bus.ask(lambda: self.handle(answer), lost)

        def lost() -> None:  # it is asked again: a worker that has it already says so
            nonlocal tries
            tries -= 1
            if tries and self.alive:
                world.bus.ask(arrive, lost)
            else:
                self.handle(e.LoadRefused(message.replica_id, NO_ANSWER))

        def arrive() -> None:
            if worker.alive:
                worker.load(message, times, told)
            else:
                self.handle(e.LoadRefused(message.replica_id, NO_ANSWER))

        world.bus.ask(arrive, lost)

    def _stop(self, worker_id: str, message: StopReplica) -> None:
        world = self.world
        worker = world.workers[worker_id]
        message = msgspec.structs.replace(message, term=self.term)
        id = message.replica_id
        world.counters.stops += 1

        def told(failure: Failure | None) -> None:
            answer = e.StopAccepted(id) if failure is None else e.StopRefused(id, failure)
            world.bus.ask(lambda: self.handle(answer), lost)

        def lost() -> None:
            self.handle(e.StopRefused(id, NO_ANSWER))

        def arrive() -> None:
            if worker.alive:
                worker.stop(message, told)
            else:
                told(NO_ANSWER)

        world.bus.ask(arrive, lost)

    def _migrate(self, action: e.CommandMigrate) -> None:
        world = self.world
        worker = world.workers[action.worker_id]
        message = msgspec.structs.replace(action.message, term=self.term)

        def lost() -> None:
            self.handle(e.MigrateRefused(action.move_id, action.leg, NO_ANSWER))

        def arrive() -> None:
            chosen = worker.migrate(message) if worker.alive else NO_ANSWER
            answer: e.Event
            if isinstance(chosen, Failure):
                answer = e.MigrateRefused(action.move_id, action.leg, chosen)
            else:
                answer = e.MigrateAccepted(action.move_id, action.leg, chosen)
            world.bus.ask(lambda: self.handle(answer), lost)

        world.bus.ask(arrive, lost)

    def _prefetch(self, server_id: str, message: Prefetch) -> None:
        """Have a store bring a checkpoint: a long poll, until it is done or refused."""
        world = self.world
        server = world.servers[server_id]
        id, tier = message.checkpoint_id, message.tier

        def refused(failure: Failure) -> None:
            self.handle(e.PrefetchRefused(server_id, id, tier, failure))

        def answered(answer: object) -> None:
            if isinstance(answer, Done):
                world.counters.prefetches += 1
                world.bus.ask(lambda: self.handle(e.PrefetchDone(server_id, id, tier)), lambda: refused(NO_ANSWER))
            elif isinstance(answer, Failure):
                world.bus.ask(lambda: refused(answer), lambda: refused(NO_ANSWER))
            else:  # it takes longer
                world.bus.ask(arrive, lambda: refused(NO_ANSWER))

        def arrive() -> None:
            if self.alive and server.alive:
                server.store.prefetch(msgspec.structs.replace(message, term=self.term), answered)
            else:
                refused(NO_ANSWER)

        world.bus.ask(arrive, lambda: refused(NO_ANSWER))
