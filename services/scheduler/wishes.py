"""What the scheduler itself wants moved: what runs where a worker drains or is short of memory, and where to. Pure.

Drains are level-triggered: whatever still runs on a draining worker is wanted away, at every look. A relief is a hint
of one moment. Both may want more replicas of a deployment (`floors`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from services.scheduler.cluster import Cluster, serves
from services.scheduler.destinations import LOADING, Destination, texts
from services.scheduler.events import Action, Fact, Note
from services.scheduler.rules import Rules
from shared.contracts.migration import MigrationReason, Move, Relief
from shared.contracts.records import Phase, ReplicaRecord, ReplicaState


class Wishes:
    """See the module. Seconds are monotonic."""

    def __init__(self, rules: Rules, cluster: Cluster) -> None:
        self._rules = rules
        self._cluster = cluster
        self._numbers = 0
        self._relieved: dict[str, float] = {}
        self._short: dict[str, float] = {}
        self._extra: dict[str, tuple[int, float]] = {}

    def forget(self, now: float) -> float:
        """Forget what is over; when to look again."""
        self._relieved = {id: until for id, until in self._relieved.items() if until > now}
        self._short = {id: until for id, until in self._short.items() if until > now}
        self._extra = {
            name: one for name, one in self._extra.items() if one[1] > now and name in self._cluster.deployments
        }
        return min((until for _, until in self._extra.values()), default=math.inf)

    def draining(self, replica: ReplicaRecord) -> bool:
        """Whether a replica is to be emptied because its worker drains, and others could have its requests."""
        worker = self._cluster.workers.get(replica.worker_id)
        record = self._cluster.deployments.get(replica.deployment)
        return (
            worker is not None
            and worker.phase is Phase.DRAINING
            and replica.state is not ReplicaState.LOADING
            and record is not None
            and serves(record)
            and record.revision == replica.revision
        )

    def drains(self, moving: frozenset[str]) -> list[tuple[Move, ReplicaRecord]]:
        """Moves for replicas that are to be emptied and are not in `moving`."""
        found: list[tuple[Move, ReplicaRecord]] = []
        for worker_id in self._cluster.draining_workers:
            for replica in self._cluster.replicas_on(worker_id):
                if replica.replica_id not in moving and replica.running > 0 and self.draining(replica):
                    found.append((self._move("drain", replica, 0, MigrationReason.DRAIN), replica))
        return found

    def relieved(self, message: Relief, now: float) -> ReplicaRecord | None:
        """The replica that is short of memory, if it is to be relieved now: not too often."""
        replica = self._cluster.replicas.get(message.replica_id)
        if replica is None or message.requests <= 0:
            return None
        self._short[message.replica_id] = now + 2 * self._rules.relief_pause_s
        if now < self._relieved.get(message.replica_id, -math.inf):
            return None
        if replica.worker_id != message.worker_id or replica not in self._cluster.serving(replica.deployment):
            return None
        return replica

    def short(self, now: float) -> frozenset[str]:
        """Replicas that have asked for relief a moment ago."""
        return frozenset(id for id, until in self._short.items() if until > now)

    def relief(
        self, replica: ReplicaRecord, requests: int, found: Sequence[Destination], now: float, out: list[Action]
    ) -> Move | None:
        """The move that relieves a replica; if there is no place for it, one more replica may be wanted for a while."""
        cluster, id, name = self._cluster, replica.replica_id, replica.deployment
        self._relieved[id] = now + self._rules.relief_pause_s
        free = sum(one.free for one in found if not one.refused)
        if free:
            return self._move("relief", replica, min(requests, free), MigrationReason.KV_MEMORY)
        have = len(cluster.serving(name))
        coming = cluster.coming(name) or any(one.refused == LOADING for one in found)
        if not coming and have < cluster.deployments[name].spec.max_replicas:
            self._extra[name] = (have + 1, now + self._rules.relief_extra_s)
            facts: dict[str, Fact] = {
                "deployment": name, "replica_id": id, "replicas": have + 1, "reasons": texts(found),
            }  # fmt: skip
            out.append(Note("replica.wanted", facts))
        return None

    def floors(self, drained: Iterable[str]) -> dict[str, int]:
        """Deployment → replicas that it should have at least; `drained` are those of replicas that are being emptied.

        What runs needs slots somewhere, even where the queues have not been read for a while.
        """
        cluster = self._cluster
        floors = {name: count for name, (count, _) in self._extra.items()}
        for name in drained:
            record = cluster.deployments[name]
            running = sum(one.running for one in cluster.replicas_of(name) if one.revision == record.revision)
            floors[name] = max(floors.get(name, 0), 1, -(-running // record.spec.target_concurrency))
        return {name: min(count, cluster.deployments[name].spec.max_replicas) for name, count in floors.items()}

    def _move(self, what: str, replica: ReplicaRecord, most: int, reason: MigrationReason) -> Move:
        self._numbers += 1
        return Move(
            move_id=f"{what}-{replica.replica_id}-{self._numbers}",
            from_worker_id=replica.worker_id,
            replica_id=replica.replica_id,
            most=most,
            reason=reason,
        )
