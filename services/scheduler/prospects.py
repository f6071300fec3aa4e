"""What the scheduler expects, as the planner of copies ahead of demand (`ahead`) asks for it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from services.scheduler.ahead import Prospect
from services.scheduler.cluster import Cluster, serves
from services.scheduler.demand import DemandKept
from services.scheduler.estimate import Estimator
from services.scheduler.view import labels_of
from shared.contracts.records import Phase, ServerRecord

HORIZON_S: Final = 300.0  # what is asked for later than this is not worth bytes now
MOST_RECENT: Final = 1024  # deployments that were asked for last


class Prospects:
    """See `AheadView`, at the moment `now`; somebody `waiting` waits for a replica."""

    def __init__(
        self, cluster: Cluster, estimator: Estimator, demand: DemandKept, now: float, *, waiting: bool
    ) -> None:
        self.waiting = waiting
        self._cluster = cluster
        self._estimator = estimator
        self._demand = demand
        self._now = now

    @property
    def servers(self) -> Mapping[str, ServerRecord]:
        """See `AheadView`."""
        return self._cluster.servers

    def deployments(self) -> Sequence[str]:
        """See `AheadView`."""
        return self._demand.arrivals.recent(MOST_RECENT)

    def prospect(self, deployment: str) -> Prospect | None:
        """See `AheadView`. Who has as many replicas as it may have needs no load."""
        record = self._cluster.deployments.get(deployment)
        if record is None or not serves(record) or record.checkpoint is None:
            return None
        have = len(self._cluster.serving(deployment)) + len(self._cluster.coming(deployment))
        if have >= record.spec.max_replicas:
            return None
        arrivals = self._demand.arrivals
        probability = arrivals.next_within(deployment, HORIZON_S, self._now)
        return Prospect(
            deployment=deployment,
            key=record.checkpoint.checkpoint_id,
            weight_bytes=record.checkpoint.weight_bytes,
            # Who is served already needs a load only when more comes at once than that can take.
            probability=probability / (1 + have) ** 2,
            burstiness=arrivals.burstiness(deployment),
            several=record.spec.max_replicas > 1,
            source=record.spec.source,
            server_ids=self._able(record.spec.labels),
        )

    def owner(self, key: str) -> Prospect | None:
        """See `AheadView`."""
        found = (self.prospect(name) for name in self._cluster.deployments_of(key))
        return max((one for one in found if one is not None), key=lambda one: one.probability, default=None)

    def _able(self, labels: Mapping[str, str]) -> frozenset[str] | None:
        """Servers with a worker that carries these labels."""
        if not labels:
            return None
        cluster = self._cluster
        return frozenset(
            worker.server_id
            for worker in cluster.workers.values()
            if worker.server_id in cluster.servers
            and labels.items() <= labels_of(cluster.servers[worker.server_id], worker).items()
        )

    def dram_holders(self, key: str) -> Sequence[str]:
        """See `AheadView`."""
        return self._cluster.dram_holders(key)

    def ssd_holders(self, key: str) -> Sequence[str]:
        """See `AheadView`."""
        return self._cluster.ssd_holders(key)

    def load_s(self, server_id: str, tier: str, key: str, weight_bytes: int) -> float:
        """See `AheadView`."""
        device = next((self._cluster.workers[id].device for id in self._cluster.workers_on(server_id)), "cpu")
        attach_s = self._estimator.attach_s(device, key, weight_bytes)
        return attach_s + (0.0 if tier == "dram" else weight_bytes / self._estimator.bandwidth(server_id, tier))

    def busy(self, server_id: str) -> float:
        """See `AheadView`. If each of n devices is busy with the probability u, all are with uⁿ; u is what is seen now,
        with one device seen half busy to begin with."""
        cluster = self._cluster
        ids = [id for id in cluster.workers_on(server_id) if cluster.workers[id].phase is Phase.READY]
        taken = sum(any(one.running > 0 for one in cluster.replicas_on(id)) for id in ids)
        return float(((taken + 0.5) / (len(ids) + 1)) ** max(1, len(ids)))

    def loading(self, server_id: str) -> bool:
        """See `AheadView`."""
        return bool(self._cluster.loads_on(server_id))

    def held(self, server_id: str, key: str) -> bool:
        """See `AheadView`."""
        return self._cluster.holds(server_id, key)
