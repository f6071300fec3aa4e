"""What is known of demand: when requests come, how long they wait, who left for whom. Pure."""

from __future__ import annotations

from typing import Final

from services.scheduler.arrivals import Arrivals
from services.scheduler.cluster import Cluster
from services.scheduler.events import DemandHinted
from services.scheduler.evictions import Evictions
from services.scheduler.pressure import Pressure
from shared.contracts.records import ReplicaRecord

LEAST_S: Final = 5.0  # no prophecy is for less
PAYS: Final = 3.0  # a replica is given up if it will not be missed for so many of its startups
SPARE: Final = 2.0  # slots for each request that is expected: they come in bunches


class DemandKept:
    """The histories of all deployments, each bounded by itself. Moments are monotonic seconds."""

    def __init__(self) -> None:
        self.arrivals = Arrivals()
        self.pressure = Pressure()
        self.evictions = Evictions()
        self._floors: dict[str, int] = {}

    def heard(self, event: DemandHinted, now: float) -> None:
        """A gateway tells of a request, or of those that still wait."""
        name, gateway_id = event.deployment, event.gateway_id
        self.arrivals.heard(name, now, gateway_id=gateway_id, waiting=event.waiting, oldest_s=event.oldest_s)
        if gateway_id:
            self.pressure.heard(name, gateway_id, event.waiting, event.oldest_s, now)

    def forget(self, name: str) -> None:
        """This deployment is gone."""
        self.arrivals.forget(name)
        self.pressure.gone(name)
        self.evictions.gone(name)
        self._floors.pop(name, None)

    def weigh(self, name: str, *, ready: int, coming: int, load_s: float, now: float) -> None:
        """Work out anew how many replicas the age of its queue asks for; see `Pressure.floor`."""
        floor = self.pressure.floor(name, ready=ready, coming=coming, load_s=load_s, now=now)
        if floor:
            self._floors[name] = floor
        else:
            self._floors.pop(name, None)

    def floor(self, name: str) -> int:
        """Replicas that the age of its queue asks for, as last worked out."""
        return self._floors.get(name, 0)

    def does_without(self, cluster: Cluster, replica: ReplicaRecord, startup_s: float, now: float) -> bool:
        """Whether the other replicas of a deployment are likely to be enough for a few of its startups: either so many
        of their slots stay free as twice the requests that are expected, or none is likely to come."""
        name, for_s = replica.deployment, max(PAYS * startup_s, LEAST_S)
        slots = sum(one.slots for one in cluster.serving(name) if one.replica_id != replica.replica_id)
        if slots - cluster.outstanding(name) >= SPARE * self.arrivals.rate(name, now) * for_s:
            return True
        return self.arrivals.next_within(name, for_s, now) < self.evictions.rules.likely

    def spared_until(
        self, cluster: Cluster, replica: ReplicaRecord, *, for_name: str, load_s: float, now: float
    ) -> float | None:
        """Until when an idle replica is not evicted for that one, which takes `load_s`; None: it may be now."""
        name = replica.deployment
        return self.evictions.spared_until(
            name,
            for_name=for_name,
            ready_at=cluster.ready_at.get(replica.replica_id, now),
            idle_s=cluster.idle_s(replica, now),
            outstanding=cluster.outstanding(name),
            soon=self.arrivals.next_within(name, load_s, now),
            now=now,
        )
