"""The picture: what the registry says, and what this scheduler has commanded that the registry does not show yet.

Records come from the registry whole; commands expire when nothing comes of them. Sums of memory are derived from
replicas and commands, never from a device's own "used" figure, which lags behind every command. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from shared.capacity import context_tokens, kv_cache_bytes
from shared.contracts.records import (
    ClusterView,
    DeploymentRecord,
    DeploymentState,
    Phase,
    ReplicaRecord,
    ReplicaState,
    ServerRecord,
    WorkerRecord,
)

# A store says with its next record what a stopped replica gave back; until then it is taken for given back.
RELEASE_S: Final = 1.5


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica of a deployment needs.

    `key` names its bytes: the checkpoint id, or the deployment while that is unknown.
    """

    deployment: str
    key: str
    weight_bytes: int
    kv_bytes: int

    def memory_bytes(self, device: str, *, streams: bool = False) -> int:
        """Bytes of the device. On the CPU the parameters are views on the DRAM pool and cost nothing more, unless they
        only stream through it: then they are memory of the worker's own."""
        return self.kv_bytes if device == "cpu" and not streams else self.weight_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """A commanded load whose replica the registry does not show yet; forgotten at monotonic second `expires_at`."""

    replica_id: str
    deployment: str
    revision: str
    worker_id: str
    server_id: str
    key: str
    memory_bytes: int
    weight_bytes: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class PendingStop:
    """A commanded stop of a replica that the registry still shows."""

    replica_id: str
    deployment: str
    worker_id: str
    reason: str
    drain: bool
    abort: bool
    expires_at: float


@dataclass(frozen=True, slots=True)
class Room:
    """Room that is being made on a worker for a deployment: nobody else may take it before `expires_at`.

    `owner` is for whom: the deployment, or one of its moves (`owner_of`).
    """

    deployment: str
    worker_id: str
    server_id: str
    key: str
    memory_bytes: int
    weight_bytes: int
    victims: tuple[str, ...]
    expires_at: float
    owner: str = ""


def owner_of(move_id: str) -> str:
    """The owner of room that is being made for a move; no deployment has such a name."""
    return f"={move_id}"


@dataclass(frozen=True, slots=True)
class Occupant:
    """Somebody who holds memory of a worker and, with `weight_bytes` > 0, the checkpoint `key` in its server's pool."""

    id: str
    worker_id: str
    server_id: str
    memory_bytes: int
    key: str
    weight_bytes: int


@dataclass
class Occupancy:
    """Sums over occupants. A checkpoint that several replicas of one server share is counted once."""

    memory_bytes: dict[str, int] = field(default_factory=dict)
    replicas: dict[str, int] = field(default_factory=dict)
    held: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    leaving: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, one: Occupant, sign: int = 1) -> None:
        """Count an occupant (or, with sign -1, stop counting it)."""
        self.memory_bytes[one.worker_id] = self.memory_bytes.get(one.worker_id, 0) + sign * one.memory_bytes
        self.replicas[one.worker_id] = self.replicas.get(one.worker_id, 0) + sign
        if one.weight_bytes > 0:
            keys = self.held.setdefault(one.server_id, {})
            entry = keys.setdefault(one.key, [0, one.weight_bytes])
            entry[0] += sign
            if entry[0] <= 0:
                del keys[one.key]

    def promise(self, room: Room, victims: list[Occupant]) -> None:
        """Hold back what the newcomer needs beyond what its victims, who are counted still, will give back."""
        memory, count, freed = 0, 0, 0
        for one in victims:
            if one.worker_id == room.worker_id:
                memory, count = memory + one.memory_bytes, count + 1
            if one.weight_bytes > 0:
                gone = self.leaving.setdefault(one.server_id, {})
                gone[one.key] = gone.get(one.key, 0) + 1
                if gone[one.key] == self.held[one.server_id][one.key][0]:
                    freed += one.weight_bytes
        id = room.worker_id
        self.memory_bytes[id] = self.memory_bytes.get(id, 0) + max(0, room.memory_bytes - memory)
        self.replicas[id] = self.replicas.get(id, 0) + max(0, 1 - count)
        if not self.holds(room.server_id, room.key) and room.weight_bytes > freed:
            keys = self.held.setdefault(room.server_id, {})
            keys[f"room:{room.owner or room.deployment}"] = [1, room.weight_bytes - freed]

    def holds(self, server_id: str, key: str) -> bool:
        """Whether somebody on this server keeps the checkpoint in DRAM, and is not leaving to make room."""
        entry = self.held.get(server_id, {}).get(key)
        return entry is not None and entry[0] > self.leaving.get(server_id, {}).get(key, 0)

    def pool_bytes(self, server_id: str) -> int:
        """Bytes of the server's DRAM pool that cannot be evicted."""
        return sum(weight for _, weight in self.held.get(server_id, {}).values())


class Cluster:
    """The picture. `now` is always a monotonic second of the scheduler's own clock.

    `needed` are the replicas to which moves are under way; they are not idle, whatever they say. `floors` maps a
    deployment to the replicas that its moves want it to have. Both are written by `moves` only.
    """

    def __init__(self, *, kv_bytes_max: int) -> None:
        self.kv_bytes_max = kv_bytes_max
        self.servers: dict[str, ServerRecord] = {}
        self.workers: dict[str, WorkerRecord] = {}
        self.replicas: dict[str, ReplicaRecord] = {}
        self.deployments: dict[str, DeploymentRecord] = {}
        self.loads: dict[str, PendingLoad] = {}
        self.stops: dict[str, PendingStop] = {}
        self.rooms: dict[str, Room] = {}
        self.needed: frozenset[str] = frozenset()
        self.floors: dict[str, int] = {}
        self.depths: dict[str, int] = {}
        self.depths_asked_at = -math.inf
        self.hinted_at: dict[str, float] = {}
        self.ready_at: dict[str, float] = {}
        self._said_at: dict[str, float] = {}
        self._planned_bytes: dict[str, int] = {}
        self._touched_at: dict[tuple[str, str], float] = {}
        self._released: dict[str, list[tuple[int, float]]] = {}

    # -- records ------------------------------------------------------------------------------------------------

    def put(self, record: ServerRecord | WorkerRecord | ReplicaRecord, now: float) -> None:
        """Take over one record that was read just now."""
        if isinstance(record, ServerRecord):
            old = self.servers.get(record.server_id)
            if old is not None and record.leased_bytes < old.leased_bytes:
                self._released.pop(record.server_id, None)
            self.servers[record.server_id] = record
        elif isinstance(record, WorkerRecord):
            self.workers[record.worker_id] = record
        else:
            self._put_replica(record, now)

    def _put_replica(self, record: ReplicaRecord, now: float) -> None:
        id = record.replica_id
        load = self.loads.pop(id, None)
        if load is not None:
            self._planned_bytes[id] = load.memory_bytes
        if self.replicas.get(id) != record:
            self._said_at[id] = now  # the same record again is as old as it was
        self.replicas[id] = record
        if record.state is ReplicaState.READY:
            self.ready_at.setdefault(id, now)

    def remove_server(self, id: str) -> None:
        """This server is gone."""
        self.servers.pop(id, None)
        self._released.pop(id, None)

    def remove_worker(self, id: str) -> None:
        """This worker is gone."""
        self.workers.pop(id, None)

    def remove_replica(self, id: str, now: float) -> ReplicaRecord | None:
        """This replica is gone; what it was."""
        record = self.replicas.get(id)
        if record is None:
            return None
        one = self._occupant(record)
        del self.replicas[id]
        self.stops.pop(id, None)
        self.ready_at.pop(id, None)
        self._said_at.pop(id, None)
        self._planned_bytes.pop(id, None)
        if one.weight_bytes and one.key not in self.occupancy().held.get(one.server_id, {}):
            self._released.setdefault(one.server_id, []).append((one.weight_bytes, now + RELEASE_S))
        return record

    def touched(self, kind: str, id: str, now: float) -> None:
        """A record was read or removed by itself: a look that was begun earlier knows less about it."""
        self._touched_at[kind, id] = now

    def fresher_than(self, kind: str, id: str, asked_at: float) -> bool:
        """Whether this record was touched after a look was begun."""
        return self._touched_at.get((kind, id), asked_at) > asked_at

    def replace(self, view: ClusterView, asked_at: float, now: float) -> list[ReplicaRecord]:
        """Take over a look at the registry that was begun at `asked_at`; the replicas that are gone since."""
        gone: list[ReplicaRecord] = []
        for server in view.servers:
            if not self.fresher_than("server", server.server_id, asked_at):
                self.put(server, now)
        for worker in view.workers:
            if not self.fresher_than("worker", worker.worker_id, asked_at):
                self.put(worker, now)
        for replica in view.replicas:
            if not self.fresher_than("replica", replica.replica_id, asked_at):
                self.put(replica, now)
        for id in _missing(self.servers, (record.server_id for record in view.servers)):
            if not self.fresher_than("server", id, asked_at):
                self.remove_server(id)
        for id in _missing(self.workers, (record.worker_id for record in view.workers)):
            if not self.fresher_than("worker", id, asked_at):
                self.remove_worker(id)
        for id in _missing(self.replicas, (record.replica_id for record in view.replicas)):
            if not self.fresher_than("replica", id, asked_at):
                record = self.remove_replica(id, now)
                if record is not None:
                    gone.append(record)
        self._touched_at = {key: at for key, at in self._touched_at.items() if at > asked_at}
        return gone

    # -- demand -------------------------------------------------------------------------------------------------

    def put_depths(self, depths: dict[str, int], asked_at: float) -> None:
        """Take over the queues' depths (by slug) as they were read at `asked_at`; later hints stand."""
        self.depths_asked_at = asked_at
        names = {record.slug: name for name, record in self.deployments.items()}
        self.depths = {names[slug]: count for slug, count in depths.items() if slug in names}
        self.hinted_at = {name: at for name, at in self.hinted_at.items() if at > asked_at}

    def outstanding(self, name: str) -> int:
        """Requests waiting or running, as far as known: a hint counts as one until the queues are read again."""
        return max(self.depths.get(name, 0), 1 if name in self.hinted_at else 0)

    # -- what is where ------------------------------------------------------------------------------------------

    def alive(self, replica: ReplicaRecord) -> bool:
        """Whether its worker can take work."""
        worker = self.workers.get(replica.worker_id)
        return worker is not None and worker.phase is Phase.READY

    def serving(self, name: str) -> list[ReplicaRecord]:
        """Replicas of a deployment's present revision that load or answer and are not about to leave, by id."""
        deployment = self.deployments.get(name)
        if deployment is None:
            return []
        return [
            replica
            for id, replica in sorted(self.replicas.items())
            if replica.deployment == name
            and replica.revision == deployment.revision
            and replica.state is not ReplicaState.DRAINING
            and id not in self.stops
            and self.alive(replica)
        ]

    def coming(self, name: str) -> list[PendingLoad]:
        """Commanded loads of a deployment's present revision, by id."""
        deployment = self.deployments.get(name)
        return [
            load
            for _, load in sorted(self.loads.items())
            if load.deployment == name and deployment is not None and load.revision == deployment.revision
        ]

    def idle_s(self, replica: ReplicaRecord, now: float) -> float:
        """Seconds since its last request ended; 0 while one runs or it is not ready."""
        if replica.running > 0 or replica.state is not ReplicaState.READY:
            return 0.0
        return replica.idle_s + (now - self._said_at.get(replica.replica_id, now))

    def changed_after(self, replica_id: str, at: float) -> bool:
        """Whether its record has changed since that monotonic second."""
        return self._said_at.get(replica_id, at) > at

    # -- memory -------------------------------------------------------------------------------------------------

    def need(self, record: DeploymentRecord) -> Need:
        """What one replica needs; while the checkpoint is unknown, the weights that were inspected and no KV cache."""
        facts = record.checkpoint
        if facts is None:
            return Need(record.spec.name, f"of:{record.spec.name}", record.weight_bytes, 0)
        kv_bytes = kv_cache_bytes(
            kv_bytes_per_token=facts.kv_bytes_per_token,
            slots=record.spec.target_concurrency,
            max_context_tokens=context_tokens(facts.max_context_tokens, record.spec.max_context_tokens),
            most_bytes=self.kv_bytes_max,
        )
        return Need(record.spec.name, facts.checkpoint_id, facts.weight_bytes, kv_bytes)

    def occupancy(self, *, but_for: str | None = None) -> Occupancy:
        """Who holds what, commands included; `but_for` leaves out the room that is being made for that owner."""
        sums = Occupancy()
        for id in sorted(self.replicas):
            sums.add(self._occupant(self.replicas[id]))
        for id in sorted(self.loads):
            load = self.loads[id]
            weight = self.held_bytes(load.server_id, load.key, load.weight_bytes)
            sums.add(Occupant(id, load.worker_id, load.server_id, load.memory_bytes, load.key, weight))
        for name in sorted(self.rooms):
            if name != but_for:
                room = self.rooms[name]
                victims = [self._occupant(self.replicas[id]) for id in room.victims if id in self.replicas]
                weight = self.held_bytes(room.server_id, room.key, room.weight_bytes)
                sums.promise(replace(room, weight_bytes=weight), victims)
        return sums

    def occupant(self, replica_id: str) -> Occupant:
        """What this replica holds."""
        return self._occupant(self.replicas[replica_id])

    def _occupant(self, replica: ReplicaRecord) -> Occupant:
        worker = self.workers.get(replica.worker_id)
        device = worker.device if worker is not None else "cpu"
        deployment = self.deployments.get(replica.deployment)
        need = self.need(deployment) if deployment is not None else None
        memory = max(replica.memory_bytes, self._planned_bytes.get(replica.replica_id, 0))
        if memory == 0 and need is not None:
            streams = self.streams(replica.server_id, need.key, need.weight_bytes)
            memory = need.memory_bytes(device, streams=streams)
        weight = self._weight_bytes(replica, need)
        # On the CPU parameters stay views on the pool; elsewhere they are copied and the lease ends with the load.
        if device != "cpu" and replica.state is not ReplicaState.LOADING:
            weight = 0
        key = replica.checkpoint_id or (need.key if need is not None else f"replica:{replica.replica_id}")
        held = self.held_bytes(replica.server_id, key, weight)
        return Occupant(replica.replica_id, replica.worker_id, replica.server_id, memory, key, held)

    def _weight_bytes(self, replica: ReplicaRecord, need: Need | None) -> int:
        if need is not None and replica.checkpoint_id in ("", need.key):
            return need.weight_bytes
        server = self.servers.get(replica.server_id)
        if server is not None and replica.checkpoint_id in server.dram:
            return server.dram[replica.checkpoint_id]
        return need.weight_bytes if need is not None else 0

    def pool_bytes(self, server_id: str, key: str, weight_bytes: int) -> int:
        """Bytes that a checkpoint takes of a server's DRAM pool: its image, where that is known, in whole chunks.

        A sum of bare weights would see room where the store has none, and ask it again and again.
        """
        server = self.servers.get(server_id)
        if server is None or weight_bytes <= 0:
            return weight_bytes
        image_bytes = max(weight_bytes, server.ssd.get(key, 0), server.dram.get(key, 0))
        chunk_bytes = max(1, server.chunk_bytes)
        return -(-image_bytes // chunk_bytes) * chunk_bytes

    def streams(self, server_id: str, key: str, weight_bytes: int) -> bool:
        """Whether a checkpoint is larger than a server's DRAM pool, and so only streams through it."""
        server = self.servers.get(server_id)
        return server is not None and self.pool_bytes(server_id, key, weight_bytes) > server.dram_capacity_bytes

    def held_bytes(self, server_id: str, key: str, weight_bytes: int) -> int:
        """Bytes of a server's DRAM pool that a checkpoint takes for as long as a replica on the CPU has it."""
        held = self.pool_bytes(server_id, key, weight_bytes)
        return 0 if self.streams(server_id, key, weight_bytes) else held

    def memory_bytes(self, need: Need, worker: WorkerRecord) -> int:
        """Bytes of this worker's memory that a replica takes."""
        streams = self.streams(worker.server_id, need.key, need.weight_bytes)
        return need.memory_bytes(worker.device, streams=streams)

    def leased_bytes(self, server: ServerRecord, now: float) -> int:
        """What the store says is leased, less what was given back so recently that it may not have said so yet."""
        given = [one for one in self._released.get(server.server_id, []) if one[1] > now]
        if given:
            self._released[server.server_id] = given
        else:
            self._released.pop(server.server_id, None)
        return max(0, server.leased_bytes - sum(weight for weight, _ in given))

    # -- commands -----------------------------------------------------------------------------------------------

    def expire(self, now: float) -> tuple[list[PendingLoad], list[PendingStop], list[Room]]:
        """Forget commands of which nothing came in time; returns them."""
        loads = [load for _, load in sorted(self.loads.items()) if load.expires_at <= now]
        stops = [stop for _, stop in sorted(self.stops.items()) if stop.expires_at <= now]
        rooms = [room for _, room in sorted(self.rooms.items()) if room.expires_at <= now]
        for load in loads:
            del self.loads[load.replica_id]
        for stop in stops:
            del self.stops[stop.replica_id]
        for room in rooms:
            del self.rooms[room.owner or room.deployment]
        return loads, stops, rooms

    def busy(self, replica_id: str, now: float) -> None:
        """A worker refused to stop this replica because it runs a request: it is not idle."""
        record = self.replicas.get(replica_id)
        if record is not None:
            self._said_at[replica_id] = now + record.idle_s  # idle for 0 s as of now

    def ready_servers(self) -> list[ServerRecord]:
        """Servers that take work, by id."""
        return [server for _, server in sorted(self.servers.items()) if server.phase is Phase.READY]

    def ready_workers(self) -> list[WorkerRecord]:
        """Workers that take work on servers that do, by id."""
        return [
            worker
            for _, worker in sorted(self.workers.items())
            if worker.phase is Phase.READY
            and (server := self.servers.get(worker.server_id)) is not None
            and server.phase is Phase.READY
        ]

    def check(self) -> None:
        """No device is promised more than it has; nothing commanded is both coming and there."""
        sums = self.occupancy()
        for id, worker in self.workers.items():
            used, count = sums.memory_bytes.get(id, 0), sums.replicas.get(id, 0)
            assert used <= worker.memory_total_bytes, f"{id}: {used} of {worker.memory_total_bytes} bytes promised"
            assert count <= worker.max_replicas, f"{id}: {count} of {worker.max_replicas} replicas promised"
        for id, server in self.servers.items():
            pool = sums.pool_bytes(id)
            assert pool <= server.dram_capacity_bytes, f"{id}: {pool} of {server.dram_capacity_bytes} bytes promised"
        for id in self.loads:
            assert id not in self.replicas, f"{id} is both coming and there"
        for id in self.stops:
            assert id in self.replicas, f"{id} is being stopped but not there"


def serves(record: DeploymentRecord) -> bool:
    """Whether replicas of this deployment may be placed."""
    return record.state is DeploymentState.READY


def _missing(known: Iterable[str], seen: Iterable[str]) -> list[str]:
    present = frozenset(seen)
    return [id for id in sorted(known) if id not in present]
