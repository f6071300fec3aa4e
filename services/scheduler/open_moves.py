"""What a move is while it is not over: what it still wants, its legs, and the slots that they are promised. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from services.scheduler.cluster import Cluster
from services.scheduler.events import Answerable
from shared.contracts.migration import MigrationEnded, Move
from shared.contracts.records import ReplicaState, WorkerRecord
from shared.errors import Code, Failure


@dataclass(slots=True)
class Leg:
    """One MIGRATE. `slots` are promised at the destination until the source has answered, then those of `open_at`.

    `request_ids` are those that were named, if any; `open_at` maps those that migrate to the monotonic second at which
    that was last known; `early` are ends that were heard before the answer.
    """

    number: int
    replica_id: str
    worker_id: str
    slots: int
    request_ids: tuple[str, ...] = ()
    answered: bool = False
    open_at: dict[str, float] = field(default_factory=dict)
    early: dict[str, MigrationEnded] = field(default_factory=dict)


@dataclass(slots=True)
class OpenMove:
    """A move that is not over.

    `ids`, or a `count` of any, are still to be commanded. `drains`: it is the scheduler's own, and goes on as long as
    something runs on the draining source. Seconds are monotonic: `patient_until` is how long a slot or room is waited
    for, `again_at` the next try after a refusal, `place_at` the next try to place a destination. `refused` is why what
    was left of it was given up.
    """

    want: Move
    replica_id: str
    deployment: str
    begun_at: float
    expires_at: float
    patient_until: float
    ids: list[str] = field(default_factory=list)
    count: int = 0
    drains: bool = False
    phase: str = "placing"
    legs: dict[int, Leg] = field(default_factory=dict)
    legs_begun: int = 0
    again_at: float = -math.inf
    place_at: float = -math.inf
    gone_at: float | None = None
    load_id: str = ""
    loads: int = 0
    load_failure: Failure | None = None
    refused: Failure | None = None
    deferred: str = ""
    ended: dict[str, MigrationEnded] = field(default_factory=dict)
    waiters: list[tuple[Answerable, float]] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The move's id."""
        return self.want.move_id

    @property
    def whole(self) -> bool:
        """Whether it is about any requests of its replica, not about some by name."""
        return not self.want.request_ids

    def open_requests(self) -> int:
        """Requests that are still on their way, or to be sent on it."""
        legs = sum(len(leg.open_at) if leg.answered else leg.slots for leg in self.legs.values())
        return len(self.ids) + self.count + legs

    def named(self) -> Iterator[str]:
        """Requests that are in this move for certain."""
        yield from self.ids
        for leg in self.legs.values():
            yield from leg.open_at if leg.answered else leg.request_ids

    def give_up(self, failure: Failure) -> None:
        """What has not been commanded will not be."""
        self.ids.clear()
        self.count = 0
        self.refused = failure

    def settle(self, leg: Leg) -> None:
        """Forget a leg that is over."""
        if leg.answered and not leg.open_at:
            del self.legs[leg.number]


def same(one: Move, other: Move) -> bool:
    """Whether two questions are about the same move."""
    return msgspec.structs.replace(one, wait_s=0.0) == msgspec.structs.replace(other, wait_s=0.0)


def away(moves: Iterable[OpenMove], worker: WorkerRecord, replica_id: str, deployment: str) -> int:
    """Requests of a replica that migrate, or were told to, as its worker's record and the moves say."""
    gone = {one.request_id for one in worker.migrations if one.deployment == deployment}
    asked = 0
    for move in moves:
        if move.replica_id == replica_id:
            for leg in move.legs.values():
                gone.update(leg.open_at)
                asked += 0 if leg.answered else leg.slots
    return len(gone) + asked


def promised(moves: Iterable[OpenMove], landed: Iterable[str], cluster: Cluster) -> dict[str, int]:
    """Replica → slots that moves have been promised, or that migrations are about to take, whoever wanted them.

    `landed` are the replicas of migrations that ended a moment ago, which their records may not count yet.
    """
    counts: dict[str, int] = {}
    coming: dict[str, set[str]] = {}
    for move in moves:
        for leg in move.legs.values():
            if leg.answered:
                coming.setdefault(leg.replica_id, set()).update(leg.open_at)
            else:
                counts[leg.replica_id] = counts.get(leg.replica_id, 0) + leg.slots
    for id in landed:
        counts[id] = counts.get(id, 0) + 1
    for worker_id in cluster.migrating_workers:
        for one in cluster.workers[worker_id].migrations:
            for replica in cluster.replicas_on(one.destination_worker_id):
                if replica.deployment == one.deployment and replica.state is ReplicaState.READY:
                    coming.setdefault(replica.replica_id, set()).add(one.request_id)
    for id, requests in coming.items():
        counts[id] = counts.get(id, 0) + len(requests)
    return counts


def conflict(message: str) -> Failure:
    """It contradicts something that is."""
    return Failure(code=Code.CONFLICT, message=message)


def invalid(message: str) -> Failure:
    """It makes no sense."""
    return Failure(code=Code.INVALID_REQUEST, message=message)
