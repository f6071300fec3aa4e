"""Which replicas could take over requests of another one, how many, and why not. Pure.

A destination is a ready replica of the same deployment and revision, and so of the same checkpoint, on another worker
that takes work. Its free slots are those that neither its record nor a migration on its way has taken; a migration that
has reserved its slot may be counted twice for a moment, which only makes the choice more careful.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from services.scheduler.cluster import Cluster
from shared.contracts.records import Phase, ReplicaRecord, ReplicaState

LOADING: Final = "is loading"
FULL: Final = "no slot is free"


@dataclass(frozen=True, slots=True)
class Destination:
    """A replica as the choice saw it: `free` slots of `slots`, of which `promised` are on their way to it.

    `refused` is why it cannot take anything now, "" if it can. `soured`: it refused something a moment ago.
    """

    replica_id: str
    worker_id: str
    slots: int
    free: int
    promised: int
    refused: str = ""
    soured: bool = False

    def score(self) -> tuple[bool, int, str]:
        """Less is better: one that has not just refused, then the most free slots."""
        return (self.soured, -self.free, self.replica_id)

    def text(self) -> str:
        """One line for people."""
        promised = f", {self.promised} promised" if self.promised else ""
        what = self.refused or f"{self.free} of {self.slots} slots free{', has just refused' * self.soured}"
        return f"{self.worker_id}: {what}{promised}"


def destinations(
    cluster: Cluster,
    source: ReplicaRecord,
    promised: Mapping[str, int],
    soured: frozenset[str],
    short: frozenset[str],
    *,
    at: str = "",
) -> list[Destination]:
    """Every other replica of the source's deployment, best first; with `at`, those of that worker only.

    `promised` maps replicas to the slots that are promised to moves, `soured` are those that have just refused one;
    those that are `short` of KV memory themselves are none.
    """
    found: list[Destination] = []
    for replica in cluster.replicas_of(source.deployment):
        id = replica.replica_id
        if replica.worker_id == source.worker_id:
            continue
        if at not in ("", replica.worker_id):
            continue
        taken = promised.get(id, 0)
        refused = _refusal(cluster, source, replica) or ("is short of KV memory itself" if id in short else "")
        free = 0 if refused else max(0, replica.slots - replica.running - taken)
        refused = refused or ("" if free > 0 else FULL)
        found.append(Destination(id, replica.worker_id, replica.slots, free, taken, refused, id in soured))
    return sorted(found, key=lambda one: (bool(one.refused), *one.score()))


def texts(found: Sequence[Destination]) -> str:
    """Every destination with its reason, for the line that people read."""
    return "; ".join(one.text() for one in found) or "no other replica"


def same_model(one: ReplicaRecord, other: ReplicaRecord) -> bool:
    """Whether two replicas would say the same: the same revision of a deployment, of one checkpoint."""
    known = one.checkpoint_id in ("", other.checkpoint_id) or other.checkpoint_id == ""
    return one.deployment == other.deployment and one.revision == other.revision and known


def _refusal(cluster: Cluster, source: ReplicaRecord, replica: ReplicaRecord) -> str:
    worker = cluster.workers.get(replica.worker_id)
    if worker is None:
        return "the worker is gone"
    if worker.phase is not Phase.READY:
        return f"the worker is {worker.phase.value}"
    if not same_model(source, replica):
        return "has another revision of it"
    if replica.state is ReplicaState.LOADING:
        return LOADING
    if replica.state is not ReplicaState.READY or replica.replica_id in cluster.stops:
        return "is leaving"
    return ""
