"""What comes in to the scheduler's core (events) and what goes out (actions). Pure.

A reply handle is opaque to the core: it only carries it from the question to the answer. `asked_at` is the monotonic
second of the action that an event answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.scheduler.decisions import Measured
from shared.contracts.migration import Migrate, MigrationEnded, Move, Moved, Moving, Relief
from shared.contracts.placement import (
    Deployed,
    Deploying,
    Explain,
    Explanation,
    LoadReplica,
    ReplicaLoaded,
    StopReplica,
)
from shared.contracts.records import (
    ClusterView,
    DeploymentRecord,
    DeploymentSpec,
    ReplicaRecord,
    ServerRecord,
    WorkerRecord,
)
from shared.contracts.residency import Checkpoint, Done, Inspected, Prefetch, Progress, Source
from shared.errors import Failure

Answerable = Callable[[Any], None]
Fact = str | int | float | bool | None

# -- events: looks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RegistryRead:
    """A whole look at the registry, begun at `asked_at`."""

    view: ClusterView
    asked_at: float


@dataclass(frozen=True, slots=True)
class RegistryUnread:
    """The registry did not answer."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class QueuesRead:
    """Slug → requests outstanding; slugs without any may be missing."""

    depths: dict[str, int]
    asked_at: float


@dataclass(frozen=True, slots=True)
class QueuesUnread:
    """The queues did not answer."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class RecordHinted:
    """A record is said to have changed, or to be gone."""

    kind: str
    id: str
    deleted: bool


@dataclass(frozen=True, slots=True)
class RecordRead:
    """One record, read because of a hint; None: it is gone."""

    kind: str
    id: str
    record: ServerRecord | WorkerRecord | ReplicaRecord | None


@dataclass(frozen=True, slots=True)
class RecordUnread:
    """The registry did not answer; the next look will tell."""

    kind: str
    id: str


@dataclass(frozen=True, slots=True)
class DemandHinted:
    """A request of this deployment was queued, or still waits; `at` is the monotonic second of the hint's arrival.

    `waiting` requests run nowhere at this gateway, the oldest for `oldest_s` seconds; 0: none does any more.
    """

    deployment: str
    at: float
    gateway_id: str = ""
    waiting: int = 1
    oldest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The bus was lost and is back: queues may be gone, answers may have been lost."""


@dataclass(frozen=True, slots=True)
class QueuesEnsured:
    """Every queue asked for exists."""


@dataclass(frozen=True, slots=True)
class QueuesUnensured:
    """Some queue could not be made sure of."""

    failure: Failure


# -- events: deployments -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeployAsked:
    """An operator wants this deployment. `wait_s` bounds the wait for an answer; `at_s` is Unix time in seconds."""

    spec: DeploymentSpec
    wait_s: float
    at_s: float
    reply: Answerable


@dataclass(frozen=True, slots=True)
class DeleteAsked:
    """An operator wants this deployment gone."""

    deployment: str
    reply: Answerable


@dataclass(frozen=True, slots=True)
class SourceInspected:
    """A store can import the source of this operation."""

    deployment: str
    operation: int
    inspected: Inspected


@dataclass(frozen=True, slots=True)
class ImportMoved:
    """The import of this operation is so far."""

    deployment: str
    operation: int
    progress: Progress


@dataclass(frozen=True, slots=True)
class ImportDone:
    """The import of this operation has ended well."""

    deployment: str
    operation: int
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class OperationFailed:
    """A store refused to inspect or import, or did not answer."""

    deployment: str
    operation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class DeploymentWritten:
    """The registry holds this record now (None: no record of this deployment, and no queue)."""

    deployment: str
    record: DeploymentRecord | None


@dataclass(frozen=True, slots=True)
class DeploymentUnwritten:
    """The registry or the queues did not answer; the write is to be tried again."""

    deployment: str
    failure: Failure


# -- events: replicas ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadAccepted:
    """The worker has begun to load."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class LoadRefused:
    """The worker will not load, or did not answer."""

    replica_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class StopAccepted:
    """The replica leaves (or has left)."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class StopRefused:
    """The worker will not stop the replica (`busy`), or did not answer."""

    replica_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class ReplicaBroke:
    """A worker says that a replica could not be loaded, or died."""

    replica_id: str
    deployment: str
    worker_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class PrefetchDone:
    """A store holds a checkpoint in the tier that was asked for."""

    server_id: str
    checkpoint_id: str
    tier: str


@dataclass(frozen=True, slots=True)
class PrefetchRefused:
    """A store will not have it, or did not answer."""

    server_id: str
    checkpoint_id: str
    tier: str
    failure: Failure


# -- events: moves -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MoveAsked:
    """Somebody wants requests to move, or to know how far that is."""

    message: Move
    reply: Answerable


@dataclass(frozen=True, slots=True)
class MigrateAccepted:
    """The source has begun to migrate these requests of a move; `leg` names the command within the move."""

    move_id: str
    leg: int
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MigrateRefused:
    """The source migrates nothing, or did not answer."""

    move_id: str
    leg: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class MigrationHeard:
    """A source says how a migration ended."""

    message: MigrationEnded


@dataclass(frozen=True, slots=True)
class ReliefAsked:
    """A worker's KV cache is too small for what a replica runs."""

    message: Relief


@dataclass(frozen=True, slots=True)
class MoveOver:
    """A move is over, whoever wanted it. Raised by `Moves` itself, within the same `handle`."""

    move: Move
    answer: Moved | Failure


@dataclass(frozen=True, slots=True)
class ExplainAsked:
    """An operator asks why."""

    message: Explain
    reply: Answerable


@dataclass(frozen=True, slots=True)
class LoadReported:
    """A replica is ready, and its worker says what that took."""

    report: ReplicaLoaded


Event = (
    RegistryRead
    | RegistryUnread
    | QueuesRead
    | QueuesUnread
    | RecordHinted
    | RecordRead
    | RecordUnread
    | DemandHinted
    | Reconnected
    | QueuesEnsured
    | QueuesUnensured
    | DeployAsked
    | DeleteAsked
    | SourceInspected
    | ImportMoved
    | ImportDone
    | OperationFailed
    | DeploymentWritten
    | DeploymentUnwritten
    | LoadAccepted
    | LoadRefused
    | StopAccepted
    | StopRefused
    | ReplicaBroke
    | PrefetchDone
    | PrefetchRefused
    | MoveAsked
    | MigrateAccepted
    | MigrateRefused
    | MigrationHeard
    | ReliefAsked
    | MoveOver
    | ExplainAsked
    | LoadReported
)

# -- actions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadRegistry:
    """Look at the whole registry."""

    asked_at: float


@dataclass(frozen=True, slots=True)
class ReadQueues:
    """Look at the depths of all queues."""

    asked_at: float


@dataclass(frozen=True, slots=True)
class ReadRecord:
    """Read one record."""

    kind: str
    id: str


@dataclass(frozen=True, slots=True)
class EnsureQueues:
    """Make sure that the stream and these queues exist."""

    slugs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InspectSource:
    """Ask a store whether it could import this source."""

    deployment: str
    operation: int
    server_id: str
    source: Source


@dataclass(frozen=True, slots=True)
class PollImport:
    """Have a store import this source, or go on waiting for it."""

    deployment: str
    operation: int
    server_id: str
    slug: str
    source: Source


@dataclass(frozen=True, slots=True)
class WriteDeployment:
    """Make sure of the queue, then write the record, then tell."""

    record: DeploymentRecord


@dataclass(frozen=True, slots=True)
class RemoveDeployment:
    """Drop the queue, then the record, then tell."""

    record: DeploymentRecord


@dataclass(frozen=True, slots=True)
class CommandLoad:
    """Have a worker load a replica. `demanded_at` is the monotonic second at which it came to be wanted."""

    worker_id: str
    message: LoadReplica
    demanded_at: float


@dataclass(frozen=True, slots=True)
class CommandStop:
    """Have a worker stop a replica."""

    worker_id: str
    message: StopReplica


@dataclass(frozen=True, slots=True)
class CommandMigrate:
    """Have a worker begin to migrate requests to another one."""

    worker_id: str
    move_id: str
    leg: int
    message: Migrate


@dataclass(frozen=True, slots=True)
class CommandPrefetch:
    """Have a store bring a checkpoint into a tier ahead of demand (a long poll, repeated until it is done)."""

    server_id: str
    message: Prefetch


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer an operator's call."""

    reply: Answerable
    message: Deployed | Deploying | Done | Moving | Moved | Explanation | Failure


@dataclass(frozen=True, slots=True)
class Note:
    """Something happened that people want to read: `name` is the log's `noun.past_participle`."""

    name: str
    facts: dict[str, Fact]


@dataclass(frozen=True, slots=True)
class Decided:
    """A replica was placed: the canonical line of the decision, and how long it took since `demanded_at`."""

    facts: dict[str, Fact]
    demanded_at: float


@dataclass(frozen=True, slots=True)
class Oriented:
    """The first picture is complete: this scheduler can answer."""


@dataclass(frozen=True, slots=True)
class StartupMeasured:
    """A startup has ended that had been estimated: for log and metrics."""

    measured: Measured


Action = (
    ReadRegistry
    | ReadQueues
    | ReadRecord
    | EnsureQueues
    | InspectSource
    | PollImport
    | WriteDeployment
    | RemoveDeployment
    | CommandLoad
    | CommandStop
    | CommandMigrate
    | CommandPrefetch
    | Answer
    | Note
    | Decided
    | Oriented
    | StartupMeasured
)

# Actions that take time and come back as an event; the others are carried out at once and in order.
LONG = (
    ReadRegistry, ReadQueues, ReadRecord, EnsureQueues, InspectSource, PollImport, WriteDeployment, RemoveDeployment,
    CommandLoad, CommandStop, CommandMigrate, CommandPrefetch,
)  # fmt: skip
