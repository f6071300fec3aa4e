"""How many replicas a deployment shall have, which of them may leave, and how long a failing one is left alone.

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from services.scheduler.arrivals import Arrivals
from services.scheduler.cluster import Cluster
from shared.backoff import delay_s
from shared.contracts.records import DeploymentSpec, ReplicaRecord, ReplicaState
from shared.errors import Code, Failure

# "Not now, not here", and nothing about the model: these never make a deployment fail.
PASSING: Final = frozenset({Code.NO_CAPACITY, Code.BUSY, Code.DRAINING, Code.UNAVAILABLE})

# What is wrong with the bytes that one server has, or can get.
LOCAL: Final = frozenset({Code.CHECKPOINT_CORRUPT, Code.CHECKPOINT_UNAVAILABLE})


def desired_replicas(spec: DeploymentSpec, outstanding: int) -> int:
    """Replicas that answer `outstanding` requests at the target concurrency, between the spec's bounds."""
    wanted = -(-outstanding // spec.target_concurrency)
    return max(spec.min_replicas, min(spec.max_replicas, wanted))


def wanted_replicas(cluster: Cluster, name: str, *, floor: int = 0) -> int:
    """Replicas that a deployment shall have now: for its requests, for the moves that look for a place, and for the age
    of its queue (`floor`: see `pressure`), which never asks for more than the operator allows, nor for more replicas
    than there are requests: those would answer nobody, and keep a place from others who wait as well."""
    spec, outstanding = cluster.deployments[name].spec, cluster.outstanding(name)
    wanted = max(desired_replicas(spec, outstanding), min(floor, spec.max_replicas, outstanding))
    return max(wanted, cluster.floors.get(name, 0))


def keep_alive_s(spec: DeploymentSpec, arrivals: Arrivals) -> float:
    """How long an idle replica of this deployment stays: what its spec says, or less if it learns that."""
    return arrivals.keep_alive_s(spec.name, spec.keep_alive_s) if spec.adaptive_keep_alive else spec.keep_alive_s


@dataclass(frozen=True, slots=True)
class Victim:
    """An idle replica that may be asked to leave. `below_min`: its deployment would have fewer than `min_replicas`."""

    replica_id: str
    deployment: str
    worker_id: str
    server_id: str
    idle_s: float
    below_min: bool


def victims_of(cluster: Cluster, name: str, now: float, *, min_ready_s: float) -> list[Victim]:
    """The idle replicas of one deployment that may leave for others, idle longest first.

    A replica that runs a request stays. So does one that became ready less than `min_ready_s` seconds ago and has
    answered nobody yet: else it would be loaded only to be evicted. So does one whose deployment has
    requests outstanding that the others could not take.
    """
    record = cluster.deployments.get(name)
    if record is None:
        return []
    replicas = cluster.serving(name)
    busy = max(desired_replicas_for(record.spec, cluster.outstanding(name)), cluster.floors.get(name, 0))
    spare = len(replicas) + len(cluster.coming(name)) - busy
    idle = sorted(
        (one for one in replicas if evictable(cluster, one, now, min_ready_s=min_ready_s)),
        key=lambda one: (-cluster.idle_s(one, now), one.replica_id),
    )
    return [
        Victim(
            one.replica_id,
            name,
            one.worker_id,
            one.server_id,
            cluster.idle_s(one, now),
            len(replicas) - gone < record.spec.min_replicas,
        )
        for gone, one in enumerate(idle[: max(0, spare)], start=1)
    ]


def desired_replicas_for(spec: DeploymentSpec, outstanding: int) -> int:
    """Replicas that the outstanding requests alone need, whatever the minimum says."""
    return min(spec.max_replicas, -(-outstanding // spec.target_concurrency))


def evictable(cluster: Cluster, replica: ReplicaRecord, now: float, *, min_ready_s: float) -> bool:
    """Whether a replica is idle, and has been of use or ready for long enough to be evicted.

    It has been of use when it has answered somebody, or when its queue was found empty after it had become ready.
    """
    if replica.state is not ReplicaState.READY or replica.running > 0 or replica.replica_id in cluster.needed:
        return False
    ready_at = cluster.ready_at.get(replica.replica_id, now)
    served = cluster.depths_asked_at > ready_at and cluster.outstanding(replica.deployment) == 0
    return replica.finished_requests > 0 or served or now - ready_at >= min_ready_s


def superfluous(
    cluster: Cluster, name: str, now: float, *, floor: int = 0, keep_s: float | None = None
) -> list[ReplicaRecord]:
    """Replicas of a deployment that nobody needs and that have been idle for its keep-alive, idle longest first.

    `floor` as for `wanted_replicas`; `keep_s` is the keep-alive as learnt (None: what the spec says).
    """
    spec = cluster.deployments[name].spec
    keep_s = spec.keep_alive_s if keep_s is None else keep_s
    replicas = cluster.serving(name)
    extra = len(replicas) - wanted_replicas(cluster, name, floor=floor)
    idle = [one for one in replicas if _may_leave(cluster, one)]
    idle.sort(key=lambda one: (-cluster.idle_s(one, now), one.replica_id))
    return [one for one in idle[: max(0, extra)] if cluster.idle_s(one, now) >= keep_s]


def next_superfluous_at(
    cluster: Cluster, name: str, now: float, *, floor: int = 0, keep_s: float | None = None
) -> float | None:
    """The monotonic second at which the next replica will have been idle for the keep-alive, if it may leave then."""
    spec = cluster.deployments[name].spec
    keep_s = spec.keep_alive_s if keep_s is None else keep_s
    replicas = cluster.serving(name)
    if len(replicas) <= wanted_replicas(cluster, name, floor=floor):
        return None
    idle = [cluster.idle_s(one, now) for one in replicas if _may_leave(cluster, one)]
    return now + max(0.0, keep_s - max(idle)) if idle else None


def _may_leave(cluster: Cluster, replica: ReplicaRecord) -> bool:
    return replica.state is ReplicaState.READY and replica.running == 0 and replica.replica_id not in cluster.needed


@dataclass
class Trouble:
    """A deployment whose loads fail.

    Another server is tried at once; when all have failed, the deployment is left alone until `until` (monotonic
    second), each time for twice as long. `failures` counts in a row, `rounds` the waits. With `hopeless` its requests
    get `failure` instead of waiting.
    """

    failure: Failure
    until: float = 0.0
    failed_at: float = 0.0
    failures: int = 0
    rounds: int = 0
    avoid: dict[str, Failure] = field(default_factory=dict)
    hopeless: bool = False

    def failed(
        self,
        server_id: str,
        failure: Failure,
        now: float,
        *,
        servers: list[str],
        most_failures: int,
        first_s: float,
        most_s: float,
    ) -> None:
        """A load on `server_id` failed; `servers` are those that could be tried."""
        self.failure, self.failed_at = failure, now
        self.avoid[server_id] = failure
        passing = failure.code in PASSING
        self.failures += not passing
        untried = [one for one in servers if one not in self.avoid]
        never = all(final(one) for one in self.avoid.values())
        # What is wrong with one server's copy says nothing about the others': all are tried before anybody is told.
        enough = self.failures >= most_failures and not (untried and failure.code in LOCAL)
        self.hopeless = not passing and (enough or (not untried and never))
        if untried and not self.hopeless:
            self.until = now
            return
        self.rounds += not passing
        self.until = now + delay_s(max(1, self.rounds), first_s=first_s, most_s=most_s)

    def forgive(self) -> None:
        """Servers that had no room, or did not answer, may be tried again: the others may be full meanwhile."""
        self.avoid = {server_id: failure for server_id, failure in self.avoid.items() if failure.code not in PASSING}

    def rest(self) -> None:
        """The wait is over: every server may be tried again."""
        self.avoid.clear()
        self.hopeless = False


def final(failure: Failure) -> bool:
    """Whether the same load on the same server would fail again.

    A corrupt checkpoint is not final: its store has removed it and imports it afresh for the next load.
    """
    return not failure.kind.retryable
