"""Whether a worker can take a replica, and if not, why, and what it is short of. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from services.scheduler.commands import Need
from services.scheduler.terms import Ask
from services.scheduler.view import View, count, labels_of, memory_on, pool_bytes, streams_on
from shared.contracts.records import Phase, ServerRecord, WorkerRecord
from shared.errors import Code, Failure
from shared.sizes import size

_NO_LABELS: Final[Mapping[str, str]] = {}


class Machines(Protocol):
    """What is there, whatever it does."""

    @property
    def servers(self) -> Mapping[str, ServerRecord]:
        """All servers."""

    @property
    def workers(self) -> Mapping[str, WorkerRecord]:
        """All workers."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A worker before anybody leaves: `why` it cannot take the replica ("" if it can), `never` if it never could; with
    `roomy` it can once somebody has left, and has what it is short of."""

    why: str = ""
    never: bool = False
    roomy: bool = False
    short_bytes: int = 0
    short_replicas: int = 0
    short_pool_bytes: int = 0
    free_bytes: int = 0


def never_fits(
    need: Need, server: ServerRecord, worker: WorkerRecord, labels: Mapping[str, str] = _NO_LABELS, devices: int = 1
) -> str:
    """Why this worker could not take a replica even if it were empty; "" if it could."""
    streams = streams_on(server, need.key, need.weight_bytes)
    memory = memory_on(worker, need, streams=streams, devices=devices)
    has = labels_of(server, worker)
    missing = [f"{name}={value}" for name, value in sorted(labels.items()) if has.get(name) != value]
    if missing:
        return f"lacks the {'label' if len(missing) == 1 else 'labels'} {', '.join(missing)}"
    if devices > 1 and not worker.gangs:
        return "cannot run a replica together with other workers"
    if memory > worker.memory_total_bytes:
        why = " as it does not fit the DRAM pool" if streams and worker.device == "cpu" else ""
        return f"needs {size(memory)}{why}, the worker has {size(worker.memory_total_bytes)}"
    if need.weight_bytes > server.ssd_capacity_bytes:
        return f"needs {size(need.weight_bytes)} of SSD, the tier has {size(server.ssd_capacity_bytes)}"
    if streams and server.dram_capacity_bytes < max(1, server.chunk_bytes):
        return f"needs a DRAM pool to stream through, the server's has {size(server.dram_capacity_bytes)}"
    return ""


def fit(ask: Ask, view: View, worker: WorkerRecord, present: frozenset[str], now: float) -> Fit:
    """How this worker is placed for the question."""
    need, id, owner = ask.need, worker.worker_id, ask.owner or ask.need.deployment
    free = worker.memory_total_bytes - view.used_bytes(id, but_for=owner)
    server = view.servers.get(worker.server_id)
    if server is None:
        return Fit(f"server {worker.server_id} is gone", free_bytes=free)
    if worker.phase is not Phase.READY:
        return Fit(f"the worker is {worker.phase.value}", free_bytes=free)
    if server.phase is not Phase.READY:
        return Fit(f"server {worker.server_id} is {server.phase.value}", free_bytes=free)
    never = never_fits(need, server, worker, ask.labels, ask.devices)
    if never:
        return Fit(never, never=True, free_bytes=free)
    if id in present:
        return Fit("has a replica of it already", free_bytes=free)
    if worker.server_id in ask.avoid:
        return Fit(f"it failed there: {ask.avoid[worker.server_id].message}", free_bytes=free)
    if id in ask.unwanted:
        return Fit("is spoken for", free_bytes=free)
    memory = memory_on(
        worker, need, streams=streams_on(server, need.key, need.weight_bytes), devices=ask.devices
    )  # fmt: skip
    replicas = max(0, view.replica_count(id, but_for=owner) + 1 - worker.max_replicas)
    lacks = max(0, memory - free)
    pool = _short_pool_bytes(need, view, server, owner, now)
    if replicas:
        why = f"has its {count(worker.max_replicas, 'replica')}"
    elif lacks:
        why = f"memory is {size(lacks)} short"
    else:
        why = f"the DRAM pool is {size(pool)} short" if pool else ""
    return Fit(why, False, bool(why), lacks, replicas, pool, free)


def _short_pool_bytes(need: Need, view: View, server: ServerRecord, owner: str, now: float) -> int:
    id = server.server_id
    if streams_on(server, need.key, need.weight_bytes) or view.holds(id, need.key, but_for=owner):
        return 0
    free = server.dram_capacity_bytes - view.pool_used_bytes(id, now, but_for=owner)
    return max(0, pool_bytes(server, need.key, need.weight_bytes) - free)


def able_servers(
    need: Need, machines: Machines, labels: Mapping[str, str] = _NO_LABELS, devices: int = 1
) -> list[str]:  # fmt: skip
    """Servers with enough ready workers that could hold a replica of this model if everything else left, by id."""
    able: dict[str, int] = {}
    for worker in _ready_workers(machines):
        if not never_fits(need, machines.servers[worker.server_id], worker, labels, devices):
            able[worker.server_id] = able.get(worker.server_id, 0) + 1
    return sorted(id for id, workers in able.items() if workers >= devices)


def too_large(need: Need, machines: Machines, devices: int = 1) -> Failure | None:
    """Why no server could hold this model even if it were empty; None if one could, or none is there to be asked."""
    servers = [one for _, one in sorted(machines.servers.items()) if one.phase is Phase.READY]
    if servers:
        disk = max(one.ssd_capacity_bytes for one in servers)
        if need.weight_bytes > disk:
            return Failure(
                code=Code.TOO_LARGE,
                message=f"The model needs {size(need.weight_bytes)} of SSD; the largest tier has {size(disk)}.",
            )
    workers = _ready_workers(machines)

    def memory(one: WorkerRecord) -> int:
        streams = streams_on(machines.servers[one.server_id], need.key, need.weight_bytes)
        return memory_on(one, need, streams=streams, devices=devices)

    if workers and all(memory(one) > one.memory_total_bytes for one in workers):
        best = max(workers, key=lambda one: one.memory_total_bytes - memory(one))
        needed = memory(best)
        kv_bytes = -(-need.kv_bytes // devices)
        parts, advice = [f"{size(needed)}{' of each device' * (devices > 1)}"], []
        if kv_bytes:
            parts.append(f"{size(kv_bytes)} of it for the KV cache")
            advice.append("A shorter context needs less.")
        if best.device == "cpu" and needed > kv_bytes:
            parts.append("as its parameters do not fit the DRAM pool")
            advice.append("A larger pool (HEARTH_DRAM_BYTES; hearth up: --dram) would hold them.")
        told = f"A replica needs {', '.join(parts)}; the largest worker has {size(best.memory_total_bytes)}."
        return Failure(code=Code.TOO_LARGE, message=" ".join((told, *advice)))
    return None


def _ready_workers(machines: Machines) -> list[WorkerRecord]:
    """Workers that take work on servers that do, by id."""
    return [
        worker
        for _, worker in sorted(machines.workers.items())
        if worker.phase is Phase.READY
        and (server := machines.servers.get(worker.server_id)) is not None
        and server.phase is Phase.READY
    ]
