"""The scheduler's own `View`: the picture, what has been learnt, and whose turn it is. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from services.scheduler import autoscale
from services.scheduler.autoscale import Victim
from services.scheduler.cluster import Cluster, workers_of
from services.scheduler.columns import Columns
from services.scheduler.demand import DemandKept
from services.scheduler.estimate import Estimator
from services.scheduler.fairness import Fairness
from services.scheduler.fits import Fit, fit
from services.scheduler.rules import Rules
from services.scheduler.terms import Ask, Means, Tenant
from shared.contracts.records import DeploymentRecord, ReplicaRecord, ReplicaState, ServerRecord, WorkerRecord

# Worker, replica and free slots of every replica that can take over what runs in another one, best first.
Destinations = Callable[[ReplicaRecord, float], Sequence[tuple[str, str, int]]]


class Scene:
    """See `View`. `look(…)` says for whom and when; what it works out is kept until the next one."""

    def __init__(
        self,
        rules: Rules,
        cluster: Cluster,
        estimator: Estimator,
        fairness: Fairness,
        demand: DemandKept,
        destinations: Destinations,
    ) -> None:
        self.columns = Columns()
        self._rules = rules
        self._cluster = cluster
        self._estimator = estimator
        self._fairness = fairness
        self._demand = demand
        self._destinations = destinations
        self._load_s = 0.0
        self.wake = math.inf
        self._now = 0.0
        self._name = ""
        self._reserve = False
        self._spared: Callable[[str], bool] = lambda replica_id: False
        self._leavers: dict[str, dict[str, Victim]] = {}
        self._going: frozenset[str] = frozenset()

    def look(
        self, name: str, now: float, *, load_s: float, reserve: bool = False, spared: Callable[[str], bool]
    ) -> None:
        """The next decision is about this deployment, which takes `load_s` to load.

        A `reserve` (nobody waits for it) never takes the place of another reserve, or the two would do so for ever.
        Replicas that are `spared` are not asked to leave now. `wake` is then when one that is spared for a moment may.
        """
        self._name, self._now, self._reserve, self._spared = name, now, reserve, spared
        self._leavers, self._load_s, self.wake = {}, load_s, math.inf
        # Who goes for one goes for that one only.
        self._going = frozenset(id for room in self._cluster.rooms.values() for id in room.victims)

    # -- the picture -----------------------------------------------------------------------------------------------

    @property
    def servers(self) -> Mapping[str, ServerRecord]:
        """See `View`."""
        return self._cluster.servers

    @property
    def workers(self) -> Mapping[str, WorkerRecord]:
        """See `View`."""
        return self._cluster.workers

    @property
    def estimator(self) -> Estimator:
        """See `View`."""
        return self._estimator

    def changed_workers(self) -> Iterable[str]:
        """See `View`."""
        return self._cluster.changed_workers()

    def changed_servers(self) -> Iterable[str]:
        """See `View`."""
        return self._cluster.changed_servers()

    def workers_on(self, server_id: str) -> Sequence[str]:
        """See `View`."""
        return self._cluster.workers_on(server_id)

    def used_bytes(self, worker_id: str, *, but_for: str = "") -> int:
        """See `View`."""
        return self._cluster.used_bytes(worker_id, but_for=but_for)

    def replica_count(self, worker_id: str, *, but_for: str = "") -> int:
        """See `View`."""
        return self._cluster.replica_count(worker_id, but_for=but_for)

    def pool_used_bytes(self, server_id: str, now: float, *, but_for: str = "") -> int:
        """See `View`."""
        return self._cluster.pool_used_bytes(server_id, now, but_for=but_for)

    def pool_freed_bytes(self, server_id: str, replica_ids: Sequence[str]) -> int:
        """See `View`."""
        return self._cluster.books.freed_bytes(server_id, replica_ids)

    def holds(self, server_id: str, key: str, *, but_for: str = "") -> bool:
        """See `View`."""
        return self._cluster.holds(server_id, key, but_for=but_for)

    def dram_holders(self, key: str, weight_bytes: int = 1) -> Sequence[str]:
        """See `View`."""
        return self._cluster.dram_holders(key, weight_bytes)

    def ssd_holders(self, key: str, weight_bytes: int = 1) -> Sequence[str]:
        """See `View`."""
        return self._cluster.ssd_holders(key, weight_bytes)

    def present(self, deployment: str) -> frozenset[str]:
        """See `View`."""
        return self._cluster.present(deployment)

    def rooms_of(self, owner: str) -> Sequence[str]:
        """See `View`."""
        room = self._cluster.rooms.get(owner)
        return room.worker_ids if room is not None else ()

    def frees(self, ask: Ask, worker_ids: Sequence[str]) -> bool:
        """Whether one of these workers can take a replica now if nobody leaves but who is idle, or another one of
        their servers can as there is room in its DRAM pool now. What is asked by means of others is not looked at."""
        present = self.present(ask.need.deployment)
        servers: dict[str, None] = {}
        for id in worker_ids:
            worker = self.workers.get(id)
            if worker is None:
                continue
            servers[worker.server_id] = None
            place = fit(ask, self, worker, present, self._now)
            if not place.why or (place.roomy and ask.means.evict and self._is_idle_enough(ask, id, place)):
                return True
        return any(self._has_free(ask, server_id, present) for server_id in servers)

    def _has_free(self, ask: Ask, server_id: str, present: frozenset[str]) -> bool:
        for id in self.workers_on(server_id):
            worker = self.workers[id]
            empty = self.replica_count(id, but_for=ask.owner) < worker.max_replicas
            if empty and not fit(ask, self, worker, present, self._now).why:
                return True
        return False

    def _is_idle_enough(self, ask: Ask, worker_id: str, place: Fit) -> bool:
        """Whether the idle replicas of a worker give back the memory that is short there."""
        replicas, memory_bytes = 0, 0
        for replica in self._cluster.replicas_on(worker_id):
            if replica.running or not self._can_be_asked(replica):
                continue
            leaver = self._leaver(replica)
            if leaver is None or (leaver.below_min and (self._reserve or not ask.means.below_min)):
                continue
            replicas += 1
            memory_bytes += self._cluster.occupant(replica.replica_id).memory_bytes
        return replicas > 0 and replicas >= place.short_replicas and memory_bytes >= place.short_bytes

    # -- who is in the way -------------------------------------------------------------------------------------------

    def tenants(self, worker_id: str) -> Sequence[Tenant]:
        """See `View`."""
        cluster = self._cluster
        return [self._tenant(replica) for replica in cluster.replicas_on(worker_id) if self._can_be_asked(replica)]

    def _can_be_asked(self, replica: ReplicaRecord) -> bool:
        """Whether this replica could be asked to leave at all."""
        return (
            replica.state is ReplicaState.READY
            and replica.replica_id not in self._cluster.stops
            and replica.deployment != self._name
            and replica.replica_id not in self._going
            and not self._spared(replica.replica_id)
        )

    def sketch(self, worker_id: str) -> Sequence[Tenant]:
        """See `View`."""
        cluster, now, tenure_s = self._cluster, self._now, self._fairness.rules.tenure_min_s
        found: list[Tenant] = []
        for replica in cluster.replicas_on(worker_id):
            id, running = replica.replica_id, replica.running
            if replica.state is not ReplicaState.READY or id in cluster.stops:
                continue
            found.append(
                Tenant(
                    replica_id=id,
                    deployment=replica.deployment,
                    worker_ids=(worker_id,),
                    server_id=replica.server_id,
                    memory_bytes=cluster.occupant(id).memory_bytes,
                    key="",
                    weight_bytes=0,
                    running=running,
                    idle_s=0.0 if running else cluster.idle_s(replica, now),
                    movable=running > 0,
                    parkable=running > 0 and now - cluster.ready_at.get(id, now) >= tenure_s,
                    remaining_s=self._estimator.remaining_s(replica) if running else 0.0,
                    resume_s=self._estimator.resume_s(replica) if running else 0.0,
                )
            )
        return found

    def _tenant(self, replica: ReplicaRecord) -> Tenant:
        cluster, id, now = self._cluster, replica.replica_id, self._now
        record = cluster.deployments.get(replica.deployment)
        held = cluster.occupant(id)
        leaver = self._leaver(replica)
        current = record is not None and record.revision == replica.revision
        # Who has others gives one to whoever has none, but not many for the sake of few.
        shares = cluster.outstanding(self._name) > replica.running
        parkable = self._fairness.parkable(id, self._name, now, shares=shares)
        return Tenant(
            replica_id=id,
            deployment=replica.deployment,
            worker_ids=workers_of(replica),
            server_id=replica.server_id,
            memory_bytes=held.memory_bytes,
            key=held.key,
            weight_bytes=held.weight_bytes,
            running=replica.running,
            tokens=replica.context_tokens,
            idle_s=cluster.idle_s(replica, now),
            evictable=leaver is not None and not (leaver.below_min and self._reserve),
            movable=current and replica.running > 0 and id not in cluster.needed and id not in cluster.moving,
            awaitable=parkable or self._awaitable(replica, now),
            parkable=parkable,
            below_min=leaver.below_min if leaver is not None else False,
            priority=record.spec.priority if record is not None else 0,
            remaining_s=self._estimator.remaining_s(replica),
            resume_s=self._estimator.resume_s(replica),
        )

    def _awaitable(self, replica: ReplicaRecord, now: float) -> bool:
        """Whether what runs in a replica may be awaited.

        Whoever is awaited takes nothing new, so a model that is still asked for has to be loaded again at once, in
        somebody else's place. And a place that comes free by itself is taken anyway. So nobody is awaited but who has
        had an equal turn, and would have to be parked before what runs has ended.
        """
        had_s = now - self._cluster.ready_at.get(replica.replica_id, now)
        if had_s < self._fairness.tenure_s:
            return False
        return self._fairness.slack_s(self._name, now) <= self._estimator.remaining_s(replica)

    def _leaver(self, replica: ReplicaRecord) -> Victim | None:
        """Whether this idle replica may leave: its deployment can do without it."""
        name = replica.deployment
        if name not in self._leavers:
            found = autoscale.victims_of(self._cluster, name, self._now, min_ready_s=self._rules.min_ready_s)
            self._leavers[name] = {one.replica_id: one for one in found}
        leaver = self._leavers[name].get(replica.replica_id)
        if leaver is None:
            return None
        until = self._demand.spared_until(
            self._cluster, replica, for_name=self._name, load_s=self._load_s, now=self._now
        )
        if until is not None:
            self.wake = min(self.wake, until)
            return None
        return leaver

    def destinations(self, tenant: Tenant) -> Sequence[tuple[str, str, int]]:
        """See `View`."""
        replica = self._cluster.replicas.get(tenant.replica_id)
        return self._destinations(replica, self._now) if replica is not None else ()

    def ask_of(self, deployment: str) -> Ask | None:
        """See `View`. What leaves for others may have one replica more than it should for a while."""
        record = self._cluster.deployments.get(deployment)
        if record is None:
            return None
        return ask_for(self._cluster, record, means=Means(below_min=False, move=False, wait=False))


def ask_for(cluster: Cluster, record: DeploymentRecord, *, means: Means) -> Ask:
    """The question where one more replica of a deployment could go."""
    spec = record.spec
    return Ask(
        need=cluster.need(record),
        devices=spec.devices,
        labels=spec.labels,
        priority=spec.priority,
        means=means,
    )
