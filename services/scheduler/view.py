"""What a decision about placement sees: the picture, its columns, and what things take. Pure.

Whoever decides is given a `View` and asks nothing else; the scheduler, the simulator and the tests have one each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from services.scheduler.commands import Need
from services.scheduler.terms import Ask, Startup, Tenant
from shared.contracts.records import ServerRecord, WorkerRecord

if TYPE_CHECKING:
    from services.scheduler.columns import Columns

# Where a server takes a checkpoint from, fastest first: its own tiers, another server's SSD, the source.
TIERS: Final = ("dram", "ssd", "peer", "remote")


class Estimates(Protocol):
    """What has been learnt about the speed of things (`estimate.Estimator`). Seconds, and bytes per second (> 0)."""

    def bandwidth(self, server_id: str, tier: str) -> float:
        """Of the slowest tier on the way from `tier` to this server's DRAM."""

    def latency_s(self, server_id: str, tier: str) -> float:
        """What a load from `tier` takes before its bytes flow, the queue aside."""

    def wait_s(self, server_id: str, tier: str, now: float, key: str = "") -> float:
        """Until a new load from `tier` (of checkpoint `key`, if it may stand in the queue already) begins."""

    def beside_s(self, server_id: str, tier: str, now: float) -> float:
        """Seconds for which the other lane of the store will be busy."""

    def share(self, tier: str) -> float:
        """By what part of them a load from this tier is held up."""

    def slowdown(self, server_id: str) -> float:
        """How many times as long a worker's own work takes on this server at present, at least 1."""

    def attach_s(self, device: str, key: str, weight_bytes: int) -> float:
        """To attach a checkpoint that is in DRAM; `weight_bytes` are those of one device."""

    def attach_rest_s(self, device: str, key: str, weight_bytes: int) -> float:
        """What is left of it, at least, when the last byte has arrived."""

    def startup(
        self,
        server_id: str,
        device: str,
        key: str,
        weight_bytes: int,
        missing_bytes: int,
        tier: str,
        now: float,
        room_s: float = 0.0,
    ) -> Startup:
        """A start: `wait + max(move + rest, attach)`, and nothing in front of what is on its way already."""

    def stop_s(self) -> float:
        """From the command to stop a replica that runs nothing until it is gone."""


class View(Protocol):
    """The picture at one moment. `but_for` is an owner whose own room counts as free; ids are those of records."""

    @property
    def servers(self) -> Mapping[str, ServerRecord]:
        """All servers."""

    @property
    def workers(self) -> Mapping[str, WorkerRecord]:
        """All workers."""

    @property
    def columns(self) -> Columns:
        """The same picture in columns; `decide` refreshes them."""

    @property
    def estimator(self) -> Estimates:
        """What things take."""

    def changed_workers(self) -> Iterable[str]:
        """Workers whose record, replicas, commands or rooms have changed since this was last asked."""

    def changed_servers(self) -> Iterable[str]:
        """Servers whose record, pool, load queue or learnt speeds have changed since this was last asked."""

    def workers_on(self, server_id: str) -> Sequence[str]:
        """The workers of a server, by id."""

    def used_bytes(self, worker_id: str, *, but_for: str = "") -> int:
        """Memory of a worker that replicas, commands and rooms take."""

    def replica_count(self, worker_id: str, *, but_for: str = "") -> int:
        """Replicas on a worker, commands and rooms included."""

    def pool_used_bytes(self, server_id: str, now: float, *, but_for: str = "") -> int:
        """DRAM pool of a server that cannot be evicted: promised, or leased as its store says."""

    def pool_freed_bytes(self, server_id: str, replica_ids: Sequence[str]) -> int:
        """How much of it can be evicted once all of these replicas have left."""

    def holds(self, server_id: str, key: str, *, but_for: str = "") -> bool:
        """Whether somebody on this server keeps the checkpoint in DRAM already, and is not leaving to make room."""

    def dram_holders(self, key: str, weight_bytes: int = 1) -> Sequence[str]:
        """Servers that have the whole checkpoint, so large, in DRAM, by id."""

    def ssd_holders(self, key: str, weight_bytes: int = 1) -> Sequence[str]:
        """Servers that have the whole checkpoint, so large, on SSD, by id."""

    def tenants(self, worker_id: str) -> Sequence[Tenant]:
        """The replicas of a worker that could be made to leave, by id: none that is leaving already or that loads.
        `Tenant.memory_bytes` is what it takes of each of its workers."""

    def sketch(self, worker_id: str) -> Sequence[Tenant]:
        """The replicas of a worker that somebody could make leave, whoever that is: what `columns` are made of. Only
        what they use need be set; all of it is at least as good as what `tenants` will say."""

    def present(self, deployment: str) -> frozenset[str]:
        """Workers that have, or are getting, a replica of the deployment's present revision."""

    def rooms_of(self, owner: str) -> Sequence[str]:
        """Workers on which room is being made for this owner."""

    def destinations(self, tenant: Tenant) -> Sequence[tuple[str, str, int]]:
        """Worker, replica and free slots of every other replica that can take over its requests now."""

    def ask_of(self, deployment: str) -> Ask | None:
        """The question where one more replica of a deployment could go; None if it may have no more."""


def tier_of(server: ServerRecord, need: Need) -> str:
    """The fastest tier in which this server has the whole checkpoint."""
    if server.dram.get(need.key, 0) >= max(1, need.weight_bytes):
        return "dram"
    if server.ssd.get(need.key, 0) >= max(1, need.weight_bytes):
        return "ssd"
    return "remote"


def pool_bytes(server: ServerRecord, key: str, weight_bytes: int) -> int:
    """Bytes that a checkpoint takes of the server's DRAM pool: its image, where that is known, in whole chunks."""
    if weight_bytes <= 0:
        return weight_bytes
    image_bytes = max(weight_bytes, server.ssd.get(key, 0), server.dram.get(key, 0))
    chunk_bytes = max(1, server.chunk_bytes)
    return -(-image_bytes // chunk_bytes) * chunk_bytes


def streams_on(server: ServerRecord, key: str, weight_bytes: int) -> bool:
    """Whether a checkpoint is larger than the server's DRAM pool, and so only streams through it."""
    return pool_bytes(server, key, weight_bytes) > server.dram_capacity_bytes


def memory_on(worker: WorkerRecord, need: Need, *, streams: bool, devices: int = 1) -> int:
    """Bytes of this worker's memory that a replica over so many devices takes of each."""
    return -(-need.memory_bytes(worker.device, streams=streams) // devices)


def labels_of(server: ServerRecord, worker: WorkerRecord) -> dict[str, str]:
    """What a deployment may choose by: the kind of `device`, then the labels of the server, then the worker's own."""
    return {"device": worker.device, **server.labels, **worker.labels}


def count(number: int, noun: str) -> str:
    """ "1 replica", "2 replicas"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
