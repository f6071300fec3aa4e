"""A core with a registry and queues that answer at once; workers and stores answer when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from services.scheduler.core import Core
from services.scheduler.events import (
    Action,
    Answer,
    CommandLoad,
    CommandStop,
    DeleteAsked,
    DemandHinted,
    DeployAsked,
    DeploymentWritten,
    EnsureQueues,
    Event,
    ImportDone,
    Note,
    PollImport,
    QueuesEnsured,
    QueuesRead,
    ReadQueues,
    ReadRecord,
    ReadRegistry,
    RecordHinted,
    RecordRead,
    RegistryRead,
    RemoveDeployment,
    WriteDeployment,
)
from services.scheduler.rules import Rules
from shared.contracts.placement import LoadReplica
from shared.contracts.records import (
    ClusterView,
    DeploymentRecord,
    DeploymentSpec,
    ReplicaRecord,
    ReplicaState,
    ServerRecord,
    WorkerRecord,
)
from shared.contracts.residency import Checkpoint
from tests.unit.scheduler import picture

T = TypeVar("T")


@dataclass
class Desk:
    """Feeds the core. `now` only moves forward; `out` holds the actions that nobody has looked at yet."""

    rules: Rules = field(default_factory=Rules)
    now: float = 1000.0
    servers: dict[str, ServerRecord] = field(default_factory=dict)
    workers: dict[str, WorkerRecord] = field(default_factory=dict)
    replicas: dict[str, ReplicaRecord] = field(default_factory=dict)
    deployments: dict[str, DeploymentRecord] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    out: list[Action] = field(default_factory=list)
    written: bool = True

    def __post_init__(self) -> None:
        self.core = Core(self.rules, instance="t")

    def start(self) -> Desk:
        """The first look."""
        self.tell(None)
        return self

    def tell(self, event: Event | None) -> None:
        """Hand an event over, and answer what registry and queues are asked because of it."""
        todo: list[Event | None] = [event]
        while todo:
            actions = self.core.handle(todo.pop(0), self.now)
            self.core.check()
            for action in actions:
                answer = self._answer(action)
                if answer is None:
                    self.out.append(action)
                else:
                    todo.append(answer)

    def _answer(self, action: Action) -> Event | None:
        match action:
            case ReadRegistry():
                return RegistryRead(self.view(), action.asked_at)
            case ReadQueues():
                return QueuesRead(dict(self.depths), action.asked_at)
            case ReadRecord():
                kind: dict[str, ServerRecord | WorkerRecord | ReplicaRecord] = dict(getattr(self, f"{action.kind}s"))
                return RecordRead(action.kind, action.id, kind.get(action.id))
            case EnsureQueues():
                return QueuesEnsured()
            case WriteDeployment() if self.written:
                self.deployments[action.record.spec.name] = action.record
                return DeploymentWritten(action.record.spec.name, action.record)
            case RemoveDeployment() if self.written:
                self.deployments.pop(action.record.spec.name, None)
                self.depths.pop(action.record.slug, None)
                return DeploymentWritten(action.record.spec.name, None)
            case _:
                return None

    def view(self) -> ClusterView:
        """What the registry holds."""
        return ClusterView(
            servers=tuple(self.servers.values()),
            workers=tuple(self.workers.values()),
            replicas=tuple(self.replicas.values()),
            deployments=tuple(self.deployments.values()),
        )

    def wait(self, seconds: float) -> None:
        """Let time pass, waking the core whenever it wants."""
        until = self.now + seconds
        for _ in range(10_000):
            deadline = self.core.deadline()
            if deadline is None or deadline > until:
                break
            self.now = max(self.now, deadline)
            self.tell(None)
        else:
            raise AssertionError("the core spins")
        self.now = until

    def wait_for_room(self, step_s: float = 1.0) -> None:
        """Let time pass in such steps until room is being made for somebody; for a minute at most."""
        for _ in range(round(60.0 / step_s)):
            self.wait(step_s)
            if self.core.cluster.rooms:
                return
        raise AssertionError("no room is made for anybody")

    def take(self, kind: type[T], when: Callable[[T], bool] = lambda _: True) -> list[T]:
        """The actions of this kind that nobody has looked at yet."""
        found = [one for one in self.out if isinstance(one, kind) and when(one)]
        self.out = [one for one in self.out if not (isinstance(one, kind) and when(one))]
        return found

    def only(self, kind: type[T]) -> T:
        """The one action of this kind."""
        found = self.take(kind)
        assert len(found) == 1, f"{len(found)} × {kind.__name__} instead of one"
        return found[0]

    def notes(self) -> list[str]:
        """The names of the notes so far."""
        return [one.name for one in self.take(Note)]

    # -- the world ---------------------------------------------------------------------------------------------------

    def add(self, *records: ServerRecord | WorkerRecord | DeploymentRecord) -> Desk:
        """Put records into the registry without a word."""
        for record in records:
            if isinstance(record, ServerRecord):
                self.servers[record.server_id] = record
            elif isinstance(record, WorkerRecord):
                self.workers[record.worker_id] = record
            else:
                self.deployments[record.spec.name] = record
        return self

    def hint(self, name: str) -> None:
        """A gateway says that somebody waits."""
        self.tell(DemandHinted(name, self.now))

    def queue(self, name: str, requests: int) -> None:
        """So many requests are outstanding."""
        self.depths[self.deployments[name].slug] = requests

    def shows(self, message: LoadReplica, worker_id: str, state: ReplicaState, **fields: object) -> ReplicaRecord:
        """The worker's record of a replica; hinted."""
        known = self.deployments.get(message.deployment)
        facts = known.checkpoint if known is not None else None
        values: dict[str, object] = {
            "replica_id": message.replica_id,
            "worker_id": worker_id,
            "server_id": worker_id[0],
            "deployment": message.deployment,
            "revision": message.revision,
            "checkpoint_id": facts.checkpoint_id if facts is not None else message.checkpoint_id,
            "state": state,
            "slots": message.slots,
            "memory_bytes": message.kv_bytes,
            **fields,
        }
        record = ReplicaRecord(**values)  # type: ignore[arg-type]
        self.replicas[record.replica_id] = record
        self.tell(RecordHinted("replica", record.replica_id, False))
        return record

    def gone(self, replica_id: str) -> None:
        """The replica's record is deleted; hinted."""
        self.replicas.pop(replica_id, None)
        self.tell(RecordHinted("replica", replica_id, True))

    def loaded(self, **fields: object) -> CommandLoad:
        """The one load that was commanded succeeds."""
        load = self.only(CommandLoad)
        self.shows(load.message, load.worker_id, ReplicaState.LOADING)
        self.shows(load.message, load.worker_id, ReplicaState.READY, **fields)
        return load

    def stopped(self) -> CommandStop:
        """The one stop that was commanded succeeds."""
        stop = self.only(CommandStop)
        self.gone(stop.message.replica_id)
        return stop

    # -- operators -----------------------------------------------------------------------------------------------------

    def deploy(self, spec: DeploymentSpec, *, wait_s: float = 1.0) -> list[object]:
        """Ask for a deployment; the list gets the answer."""
        answers: list[object] = []
        self.tell(DeployAsked(spec, wait_s, 1.0, answers.append))
        return answers

    def delete(self, name: str) -> list[object]:
        """Ask for its end; the list gets the answer."""
        answers: list[object] = []
        self.tell(DeleteAsked(name, answers.append))
        return answers

    def answers(self) -> None:
        """Deliver what the core has answered."""
        for one in self.take(Answer):
            one.reply(one.message)

    def imported(self, facts: Checkpoint) -> PollImport:
        """The one import under way ends well."""
        poll = self.only(PollImport)
        self.tell(ImportDone(poll.deployment, poll.operation, facts))
        return poll


def small(rules: Rules | None = None, **spec: object) -> Desk:
    """One server, one worker of 500 MiB, deployments m and x of which only one fits (400 MiB of KV cache each)."""
    desk = Desk(rules or Rules())
    desk.add(picture.server("a"), picture.worker("a0"))
    for name in ("m", "x"):
        facts = picture.checkpoint(f"ck-{name}", kv=400)
        desk.add(picture.deployment(picture.spec(name, **spec), facts))
    return desk.start()
