"""What may be asked for next, and where there would be room: the view that `ahead` plans by, from the picture. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from services.scheduler.ahead import DRAM, Prospect
from services.scheduler.arrivals import Arrivals
from services.scheduler.autoscale import keep_alive_s
from services.scheduler.cluster import Cluster, serves
from services.scheduler.fits import never_fits
from services.scheduler.view import Estimates
from shared.contracts.records import DeploymentRecord, ReplicaState, ServerRecord

RECENT: Final = 512  # deployments that were asked for and are considered: the last ones


@dataclass(frozen=True, slots=True)
class Outlook:
    """The picture as `ahead.AheadView` wants it, at moment `now`. `waiting`: some request waits for a replica."""

    cluster: Cluster
    arrivals: Arrivals
    estimates: Estimates
    now: float
    waiting: bool
    horizon_s: float = 300.0

    @property
    def servers(self) -> Mapping[str, ServerRecord]:
        """All servers."""
        return self.cluster.servers

    def deployments(self) -> Sequence[str]:
        """Those asked for last, latest first, and then those that nobody has asked for yet."""
        asked = self.arrivals.recent(RECENT)
        return [*asked, *(name for name in self.cluster.deployments if self.arrivals.last_at(name) is None)]

    def prospect(self, deployment: str) -> Prospect | None:
        """How likely it is to be asked for, and to need a load then."""
        record = self.cluster.deployments.get(deployment)
        if record is None or record.checkpoint is None or not serves(record):
            return None
        spec = record.spec
        return Prospect(
            deployment=deployment,
            key=record.checkpoint.checkpoint_id,
            weight_bytes=record.checkpoint.weight_bytes,
            probability=self._cold(record),
            burstiness=self.arrivals.burstiness(deployment),
            several=spec.max_replicas > 1,
            source=spec.source,
        )

    def owner(self, key: str) -> Prospect | None:
        """The deployment that has this checkpoint and will most probably need it."""
        found = [one for name in self.cluster.deployments_of(key) if (one := self.prospect(name)) is not None]
        return max(found, key=lambda one: (one.probability, one.deployment), default=None)

    def dram_holders(self, key: str) -> Sequence[str]:
        """Servers that have the whole checkpoint in DRAM."""
        return self.cluster.dram_holders(key)

    def ssd_holders(self, key: str) -> Sequence[str]:
        """Servers that have the whole checkpoint on SSD."""
        return self.cluster.ssd_holders(key)

    def able(self, deployment: str, server_id: str) -> bool:
        """Whether some worker there could run it if it were empty."""
        record, server = self.cluster.deployments.get(deployment), self.cluster.servers.get(server_id)
        if record is None or server is None:
            return False
        need, spec = self.cluster.need(record), record.spec
        workers = (self.cluster.workers[id] for id in self.cluster.workers_on(server_id))
        return any(not never_fits(need, server, one, spec.labels, spec.devices) for one in workers)

    def load_s(self, server_id: str, tier: str, key: str, weight_bytes: int) -> float:
        """A load from that tier with nobody before it."""
        workers = self.cluster.workers_on(server_id)
        device = self.cluster.workers[workers[0]].device if workers else "cpu"
        missing = 0 if tier == DRAM else weight_bytes
        startup = self.estimates.startup(server_id, device, key, weight_bytes, missing, tier, self.now)
        return startup.load_s - startup.wait_s

    def busy(self, server_id: str) -> float:
        """The probability that none of its devices can take a newcomer at once.

        Each device is busy, independently, with the share of them that are so now; half a device busy and half a device
        free are added, as one look at few devices says little (the Jeffreys prior of a proportion).
        """
        ids = self.cluster.workers_on(server_id)
        busy = sum(1 for id in ids if self._runs(id))
        return float(((busy + 0.5) / (len(ids) + 1.0)) ** len(ids)) if ids else 1.0

    def loading(self, server_id: str) -> bool:
        """Whether a load was commanded there that its record may not show yet."""
        return bool(self.cluster.loads_on(server_id))

    def held(self, server_id: str, key: str) -> bool:
        """Whether a replica keeps this checkpoint in the server's DRAM."""
        return self.cluster.holds(server_id, key)

    def _runs(self, worker_id: str) -> bool:
        return bool(self.cluster.loads_at(worker_id)) or any(
            one.running > 0 or one.state is not ReplicaState.READY for one in self.cluster.replicas_on(worker_id)
        )

    def _cold(self, record: DeploymentRecord) -> float:
        """The probability that it is asked for within the horizon and has to be loaded then: for one that has a
        replica, that the request comes when its keep-alive is over, or that all its slots are taken."""
        name, spec = record.spec.name, record.spec
        within = self.arrivals.next_within(name, self.horizon_s, self.now)
        have = len(self.cluster.serving(name)) + len(self.cluster.coming(name))
        if have == 0:
            return within
        if have < spec.max_replicas and self.cluster.outstanding(name) >= have * spec.target_concurrency:
            return within
        held_s = min(self.horizon_s, keep_alive_s(spec, self.arrivals))
        return max(0.0, within - self.arrivals.next_within(name, held_s, self.now))
