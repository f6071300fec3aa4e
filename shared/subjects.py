"""The whole conversation of the system on one screen: one line per subject, with the types that cross it.

Grammar: `[prefix.]v<major>.<service>[.<id>].<verb>`; ids match `[A-Za-z0-9_-]+`. Nothing else spells a subject.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from shared.contracts.events import ClusterEvent, RecordChanged
from shared.contracts.generation import FrameBatch
from shared.contracts.migration import (
    AbandonRound,
    Drain,
    HandedOver,
    HandOver,
    ListRequests,
    Migrate,
    Migrating,
    MigrationEnded,
    Move,
    Moved,
    Moving,
    Relief,
    RequestList,
    Round,
    RoundDone,
    RoundPending,
)
from shared.contracts.placement import (
    Delete,
    Deploy,
    Deployed,
    Deploying,
    Explain,
    Explanation,
    Leading,
    LoadReplica,
    ReplicaFailed,
    ReplicaLoaded,
    StopReplica,
)
from shared.contracts.requests import (
    Cancel,
    Check,
    Claim,
    Claimed,
    Demand,
    Gone,
    Holds,
    Request,
    Running,
    Trial,
    Unwanted,
)
from shared.contracts.residency import (
    Acquire,
    CheckpointList,
    Consumed,
    Done,
    Evict,
    Export,
    Import,
    Imported,
    Inspect,
    Inspected,
    Lease,
    ListCheckpoints,
    LoadProgress,
    Pin,
    Prefetch,
    Progress,
    Release,
    Renew,
    Renewed,
    Verified,
    Verify,
)

M = TypeVar("M")
Q = TypeVar("Q")
R = TypeVar("R")

ID_PATTERN: Final = re.compile(r"[A-Za-z0-9_-]+")


class SubjectError(ValueError):
    """An id does not fit into a subject."""


def fill(template: str, ids: dict[str, str]) -> str:
    """The subject with its ids put in. Raises `SubjectError` for an id that the grammar forbids ("*" is allowed)."""
    for name, value in ids.items():
        if value != "*" and not ID_PATTERN.fullmatch(value):
            raise SubjectError(f"{name}={value!r} is no subject id")
    return template.format(**ids)


@dataclass(frozen=True)
class Topic(Generic[M]):
    """Fire and forget: at most once, in order per connection."""

    template: str
    message: type[M]

    def subject(self, **ids: str) -> str:
        """The subject for these ids."""
        return fill(self.template, ids)


@dataclass(frozen=True)
class Endpoint(Generic[Q, R]):
    """Request and reply. `timeout_s` bounds the wait for the answer, on top of a long poll's own `wait_s`."""

    template: str
    request: type[Q]
    replies: tuple[type, ...]
    timeout_s: float
    reply: type[R] | None = None

    def subject(self, **ids: str) -> str:
        """The subject for these ids."""
        return fill(self.template, ids)


@dataclass(frozen=True)
class WorkQueue(Generic[M]):
    """A durable work queue in a JetStream stream, one subject per deployment: each message is done by one consumer."""

    stream: str
    template: str
    message: type[M]

    def subject(self, **ids: str) -> str:
        """The subject for these ids."""
        return fill(self.template, ids)


# -- requests
REQUESTS: Final = WorkQueue("requests", "v1.queue.{slug}", Request)
DEMAND: Final = Topic("v1.scheduler.demand", Demand)
CLAIM: Final[Endpoint[Claim, Claimed | Gone]] = Endpoint("v1.gateway.{gateway_id}.claim", Claim, (Claimed, Gone), 1.0)
FRAMES: Final = Topic("v1.gateway.{gateway_id}.frames", FrameBatch)
CANCEL: Final = Topic("v1.worker.{worker_id}.cancel", Cancel)

TRIAL: Final = Topic("v1.trials.{gateway_id}", Trial)
CHECK: Final[Endpoint[Check, Running]] = Endpoint("v1.worker.{worker_id}.check", Check, (Running,), 1.0)
HOLDS: Final[Endpoint[Holds, Unwanted]] = Endpoint("v1.gateway.{gateway_id}.holds", Holds, (Unwanted,), 1.0)

# -- migration
MOVE: Final[Endpoint[Move, Moving | Moved]] = Endpoint("v1.scheduler.move", Move, (Moving, Moved), 5.0)
MIGRATE: Final[Endpoint[Migrate, Migrating]] = Endpoint("v1.worker.{worker_id}.migrate", Migrate, (Migrating,), 2.0)
ROUND: Final[Endpoint[Round, RoundPending | RoundDone]] = Endpoint(
    "v1.worker.{worker_id}.round", Round, (RoundPending, RoundDone), 2.0
)
HAND_OVER: Final[Endpoint[HandOver, HandedOver]] = Endpoint(
    "v1.worker.{worker_id}.hand_over", HandOver, (HandedOver,), 1.5
)
ABANDON: Final = Topic("v1.worker.{worker_id}.abandon", AbandonRound)
MIGRATION_ENDED: Final = Topic("v1.migrations.{worker_id}", MigrationEnded)
RELIEF: Final = Topic("v1.scheduler.relief", Relief)
DRAIN: Final[Endpoint[Drain, Done]] = Endpoint("v1.worker.{worker_id}.drain", Drain, (Done,), 2.0)
LIST_REQUESTS: Final[Endpoint[ListRequests, RequestList]] = Endpoint(
    "v1.worker.{worker_id}.requests", ListRequests, (RequestList,), 2.0
)

# -- placement
DEPLOY: Final[Endpoint[Deploy, Deploying | Deployed]] = Endpoint(
    "v1.scheduler.deploy", Deploy, (Deploying, Deployed), 5.0
)
DELETE: Final[Endpoint[Delete, Done]] = Endpoint("v1.scheduler.delete", Delete, (Done,), 10.0)
LOAD: Final[Endpoint[LoadReplica, Done]] = Endpoint("v1.worker.{worker_id}.load", LoadReplica, (Done,), 2.0)
STOP: Final[Endpoint[StopReplica, Done]] = Endpoint("v1.worker.{worker_id}.stop", StopReplica, (Done,), 2.0)
REPLICA_FAILED: Final = Topic("v1.scheduler.replica_failed", ReplicaFailed)
REPLICA_LOADED: Final = Topic("v1.scheduler.replica_loaded", ReplicaLoaded)
LEADING: Final = Topic("v1.scheduler.leading", Leading)
EXPLAIN: Final[Endpoint[Explain, Explanation]] = Endpoint("v1.scheduler.explain", Explain, (Explanation,), 2.0)

# -- residency
INSPECT: Final[Endpoint[Inspect, Inspected]] = Endpoint("v1.store.{server_id}.inspect", Inspect, (Inspected,), 30.0)
IMPORT: Final[Endpoint[Import, Progress | Imported]] = Endpoint(
    "v1.store.{server_id}.import", Import, (Progress, Imported), 5.0
)
ACQUIRE: Final[Endpoint[Acquire, Progress | Lease]] = Endpoint(
    "v1.store.{server_id}.acquire", Acquire, (Progress, Lease), 5.0
)
RENEW: Final[Endpoint[Renew, Renewed]] = Endpoint("v1.store.{server_id}.renew", Renew, (Renewed,), 2.0)
RELEASE: Final = Topic("v1.store.{server_id}.release", Release)
EVICT: Final[Endpoint[Evict, Done]] = Endpoint("v1.store.{server_id}.evict", Evict, (Done,), 5.0)
CONSUMED: Final = Topic("v1.store.{server_id}.consumed", Consumed)
PREFETCH: Final[Endpoint[Prefetch, Progress | Done]] = Endpoint(
    "v1.store.{server_id}.prefetch", Prefetch, (Progress, Done), 5.0
)
PIN: Final[Endpoint[Pin, Done]] = Endpoint("v1.store.{server_id}.pin", Pin, (Done,), 5.0)
VERIFY: Final[Endpoint[Verify, Progress | Verified]] = Endpoint(
    "v1.store.{server_id}.verify", Verify, (Progress, Verified), 5.0
)
EXPORT: Final[Endpoint[Export, Progress | Done]] = Endpoint(
    "v1.store.{server_id}.export", Export, (Progress, Done), 5.0
)
LIST: Final[Endpoint[ListCheckpoints, CheckpointList]] = Endpoint(
    "v1.store.{server_id}.list", ListCheckpoints, (CheckpointList,), 5.0
)
LOAD_PROGRESS: Final = Topic("v1.progress.{slug}", LoadProgress)

# -- hints and history
RECORD_CHANGED: Final = Topic("v1.records.{kind}", RecordChanged)
EVENTS: Final = Topic("v1.events.{service}", ClusterEvent)

CONVERSATIONS: Final[tuple[Topic[Any] | Endpoint[Any, Any] | WorkQueue[Any], ...]] = (
    REQUESTS, DEMAND, CLAIM, FRAMES, CANCEL, TRIAL, CHECK, HOLDS, MOVE, MIGRATE, ROUND, HAND_OVER, ABANDON,
    MIGRATION_ENDED, RELIEF, DRAIN, LIST_REQUESTS, DEPLOY, DELETE, LOAD, STOP, REPLICA_FAILED, REPLICA_LOADED,
    LEADING, EXPLAIN, INSPECT, IMPORT, ACQUIRE,
    RENEW, RELEASE, EVICT, CONSUMED, PREFETCH, PIN, VERIFY, EXPORT, LIST, LOAD_PROGRESS, RECORD_CHANGED, EVENTS,
)  # fmt: skip
