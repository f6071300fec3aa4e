"""Where a replica shall go: candidates → filters → scores → decision with reasons. Pure.

Every worker is a candidate and gets a reason, chosen or not: a decision that cannot be explained is a bug that cannot
be found. Scores: the fastest tier in which the server has the checkpoint (last one that has set its copy aside), a DRAM
pool that can hold it rather than one that it streams through, then fewer loads under way on the server, fewer replicas
on the worker, more free memory, ids.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from services.scheduler.autoscale import Victim
from services.scheduler.cluster import Cluster, Need
from shared.contracts.records import Phase, ServerRecord, WorkerRecord
from shared.errors import Code, Failure
from shared.sizes import size

TIERS: Final = ("dram", "ssd", "remote")  # fastest first; "remote" is where the source is


class Outcome(enum.StrEnum):
    """What was decided."""

    PLACE = "place"
    EVICT = "evict"
    WAIT = "wait"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as the decision saw it.

    `refused` is why it cannot take the replica as things stand, "" if it can; `never` says that it could not even if it
    were empty; `victims` are those whose leaving would make room. `streams`: the checkpoint is larger than the server's
    DRAM pool; `quarantined`: the server has set its copy aside as corrupt.
    """

    worker_id: str
    server_id: str
    tier: str
    loads: int
    replicas: int
    free_bytes: int
    refused: str = ""
    never: bool = False
    victims: tuple[Victim, ...] = ()
    streams: bool = False
    quarantined: bool = False

    def source_score(self) -> tuple[bool, int, bool]:
        """Less is better: how fast and how surely the bytes come."""
        return (self.quarantined, TIERS.index(self.tier), self.streams)

    def score(self) -> tuple[tuple[bool, int, bool], int, int, int, str]:
        """Less is better."""
        return (self.source_score(), self.loads, self.replicas, -self.free_bytes, self.worker_id)

    def eviction_score(self) -> tuple[tuple[bool, int, bool], int, float, str]:
        """Less is better: the best source, the fewest victims, the longest idle."""
        return (
            self.source_score(), len(self.victims), -min(one.idle_s for one in self.victims), self.worker_id,
        )  # fmt: skip

    def text(self) -> str:
        """One line for people."""
        if self.victims:
            return f"{self.worker_id}: {self.refused}; {', '.join(one.replica_id for one in self.victims)} could leave"
        if self.refused:
            return f"{self.worker_id}: {self.refused}"
        how = ", streamed" * self.streams + ", its copy there is quarantined" * self.quarantined
        return (
            f"{self.worker_id}: {self.tier}{how}, {count(self.loads, 'load')}, {count(self.replicas, 'replica')}, "
            f"{size(self.free_bytes)} free"
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do for one more replica of `deployment`, and why. `victims` leave first when the outcome is `evict`."""

    deployment: str
    outcome: Outcome
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None = None
    victims: tuple[Victim, ...] = ()

    def reasons(self) -> str:
        """Every candidate with its reason, the chosen one first."""
        rest = [one for one in self.candidates if one is not self.chosen]
        return "; ".join(one.text() for one in ([self.chosen] if self.chosen else []) + rest) or "no worker is ready"


def decide(
    need: Need,
    cluster: Cluster,
    idle: Sequence[Victim],
    now: float,
    *,
    avoid: Mapping[str, Failure],
    owner: str = "",
    at: str = "",
    away_from: str = "",
) -> Decision:
    """Where one more replica goes. `idle` are those that may be evicted, in the order in which they should be.

    `avoid` maps servers that have just failed to load this model to how they did. `owner` is for whom ("": the
    deployment): room that is being made for it counts as free. `at` asks about one worker only, `away_from` about all
    but one.
    """
    owner = owner or need.deployment
    sums = owner
    present = frozenset(one.worker_id for one in cluster.serving(need.deployment)) | frozenset(
        one.worker_id for one in cluster.coming(need.deployment)
    )
    candidates = [
        _candidate(need, cluster, sums, worker, present, now, avoid)
        for id, worker in sorted(cluster.workers.items())
        if at in ("", id) and id != away_from
    ]
    fit = [one for one in candidates if not one.refused]
    if fit:
        chosen = min(fit, key=Candidate.score)
        return Decision(need.deployment, Outcome.PLACE, tuple(candidates), chosen)
    # Nobody goes below the minimum as long as others could leave instead.
    for allowed in (tuple(one for one in idle if not one.below_min), tuple(idle)):
        tried = tuple(
            replace(one, victims=_make_room(need, cluster, one, allowed, present, now, avoid, owner))
            for one in candidates
        )
        possible = [one for one in tried if one.victims]
        if possible:
            best = min(possible, key=Candidate.eviction_score)
            return Decision(need.deployment, Outcome.EVICT, tried, best, best.victims)
    outcome = Outcome.IMPOSSIBLE if candidates and all(one.never for one in candidates) else Outcome.WAIT
    return Decision(need.deployment, outcome, tuple(candidates))


def tier_of(server: ServerRecord, need: Need) -> str:
    """The fastest tier in which this server has the whole checkpoint."""
    if server.dram.get(need.key, 0) >= max(1, need.weight_bytes):
        return "dram"
    if server.ssd.get(need.key, 0) >= max(1, need.weight_bytes):
        return "ssd"
    return "remote"


def too_large(need: Need, cluster: Cluster) -> Failure | None:
    """Why no server could hold this model even if it were empty; None if one could, or none is there to be asked."""
    servers = cluster.ready_servers()
    if servers:
        disk = max(one.ssd_capacity_bytes for one in servers)
        if need.weight_bytes > disk:
            return Failure(
                code=Code.TOO_LARGE,
                message=f"The model needs {size(need.weight_bytes)} of SSD; the largest tier has {size(disk)}.",
            )
    workers = cluster.ready_workers()
    if workers and all(cluster.memory_bytes(need, one) > one.memory_total_bytes for one in workers):
        best = max(workers, key=lambda one: one.memory_total_bytes - cluster.memory_bytes(need, one))
        needed = cluster.memory_bytes(need, best)
        parts, advice = [f"{size(needed)}"], []
        if need.kv_bytes:
            parts.append(f"{size(need.kv_bytes)} of it for the KV cache")
            advice.append("A shorter context needs less.")
        if best.device == "cpu" and needed > need.kv_bytes:
            parts.append("as its parameters do not fit the DRAM pool")
            advice.append("A larger pool (HEARTH_DRAM_BYTES; hearth up: --dram) would hold them.")
        told = f"A replica needs {', '.join(parts)}; the largest worker has {size(best.memory_total_bytes)}."
        return Failure(code=Code.TOO_LARGE, message=" ".join((told, *advice)))
    return None


def able_servers(need: Need, cluster: Cluster) -> list[str]:
    """Servers with a ready worker that could hold a replica of this model if everything else left, by id."""
    empty = None
    able = {
        worker.server_id: None
        for worker in cluster.ready_workers()
        if not _refusal(need, cluster, empty, worker, frozenset(), 0.0, {})[1]
    }
    return sorted(able)


def _candidate(
    need: Need,
    cluster: Cluster,
    sums: str | None,
    worker: WorkerRecord,
    present: frozenset[str],
    now: float,
    avoid: Mapping[str, Failure],
) -> Candidate:
    server = cluster.servers.get(worker.server_id)
    free = worker.memory_total_bytes - cluster.used_bytes(worker.worker_id, but_for=sums or "")
    coming = sum(1 for load in cluster.loads.values() if load.server_id == worker.server_id)
    refused, never = _refusal(need, cluster, sums, worker, present, now, avoid)
    return Candidate(
        worker_id=worker.worker_id,
        server_id=worker.server_id,
        tier=tier_of(server, need) if server is not None else "remote",
        loads=max(coming, server.loads if server is not None else 0),
        replicas=cluster.replica_count(worker.worker_id, but_for=sums or ""),
        free_bytes=free,
        refused=refused,
        never=never,
        streams=cluster.streams(worker.server_id, need.key, need.weight_bytes),
        quarantined=server is not None and need.key in server.quarantined,
    )


def _refusal(
    need: Need,
    cluster: Cluster,
    sums: str | None,
    worker: WorkerRecord,
    present: frozenset[str],
    now: float,
    avoid: Mapping[str, Failure],
    *,
    freed_bytes: int = 0,
) -> tuple[str, bool]:
    """Why this worker cannot take the replica ("" if it can), and whether it never could."""
    id = worker.worker_id
    server = cluster.servers.get(worker.server_id)
    if server is None:
        return f"server {worker.server_id} is gone", False
    if worker.phase is not Phase.READY:
        return f"the worker is {worker.phase.value}", False
    if server.phase is not Phase.READY:
        return f"server {worker.server_id} is {server.phase.value}", False
    memory = cluster.memory_bytes(need, worker)
    streams = cluster.streams(worker.server_id, need.key, need.weight_bytes)
    if memory > worker.memory_total_bytes:
        why = " as it does not fit the DRAM pool" if streams and worker.device == "cpu" else ""
        return f"needs {size(memory)}{why}, the worker has {size(worker.memory_total_bytes)}", True
    if need.weight_bytes > server.ssd_capacity_bytes:
        return f"needs {size(need.weight_bytes)} of SSD, the tier has {size(server.ssd_capacity_bytes)}", True
    if streams and server.dram_capacity_bytes < max(1, server.chunk_bytes):
        return f"needs a DRAM pool to stream through, the server's has {size(server.dram_capacity_bytes)}", True
    if id in present:
        return "has a replica of it already", False
    if worker.server_id in avoid:
        return f"it failed there: {avoid[worker.server_id].message}", False
    if sums is None:
        return "", False
    if cluster.replica_count(id, but_for=sums) >= worker.max_replicas:
        return f"has its {count(worker.max_replicas, 'replica')}", False
    free = worker.memory_total_bytes - cluster.used_bytes(id, but_for=sums)
    if memory > free:
        return f"memory is {size(memory - free)} short", False
    if not cluster.holds(worker.server_id, need.key, but_for=sums):
        leased = max(0, cluster.leased_bytes(server, now) - freed_bytes)
        pool = server.dram_capacity_bytes - max(leased, cluster.books.pool_bytes(worker.server_id, but_for=sums))
        weight = cluster.held_bytes(worker.server_id, need.key, need.weight_bytes)
        if weight > pool:
            return f"the DRAM pool is {size(weight - pool)} short", False
    return "", False


def _make_room(
    need: Need,
    cluster: Cluster,
    candidate: Candidate,
    idle: Sequence[Victim],
    present: frozenset[str],
    now: float,
    avoid: Mapping[str, Failure],
    owner: str,
) -> tuple[Victim, ...]:
    """The fewest of the idle replicas of this worker (then of its server) whose leaving makes room; () if none do."""
    worker = cluster.workers[candidate.worker_id]
    own = [one for one in idle if one.worker_id == worker.worker_id]
    near = [one for one in idle if one.server_id == worker.server_id and one.worker_id != worker.worker_id]

    def without(chosen: Sequence[Victim]) -> str:
        before = cluster.books.pool_bytes(worker.server_id, but_for=owner)
        gone = [cluster.books.drop(one.replica_id) for one in chosen]
        freed = before - cluster.books.pool_bytes(worker.server_id, but_for=owner)
        told = _refusal(need, cluster, owner, worker, present, now, avoid, freed_bytes=freed)[0]
        for occupant in gone:
            if occupant is not None:
                cluster.books.put(occupant)
        return told

    chosen: list[Victim] = []
    for one in own + near:
        chosen.append(one)
        if without(chosen) == "":
            break
    else:
        return ()
    # The first ones may have been too small to matter: who need not leave stays, the least idle before all.
    for one in reversed(list(chosen)):
        fewer = [other for other in chosen if other is not one]
        if fewer and without(fewer) == "":
            chosen = fewer
    return tuple(chosen)


def count(number: int, noun: str) -> str:
    """ "1 replica", "2 replicas"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
