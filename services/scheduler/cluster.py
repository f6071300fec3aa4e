"""The picture: what the registry says, and what this scheduler has commanded that the registry does not show yet.

Records come from the registry whole; commands expire when nothing comes of them. Sums of memory are derived from
replicas and commands, never from a device's own "used" figure, which lags behind every command. Everything that is
asked often is kept in indices and sums, brought up to date with every change: nothing here looks at everything. Pure.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from services.scheduler.absent import Absent
from services.scheduler.books import Books, Occupant, Room
from services.scheduler.commands import Need, PendingLoad, PendingStop
from services.scheduler.releases import Releases
from services.scheduler.table import Groups, Table
from services.scheduler.view import pool_bytes, streams_on
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
# No replica id is used twice; so long an old record may be read of one that is gone.
BURIED_S: Final = 60.0
MOST_BURIED: Final = 4096


def workers_of(replica: ReplicaRecord) -> tuple[str, ...]:
    """Every worker that a replica takes."""
    return (replica.worker_id, *replica.peer_worker_ids)


class Cluster:
    """The picture. `now` is always a monotonic second of the scheduler's own clock.

    `needed` are the replicas to which moves are under way; they are not idle, whatever they say. `floors` maps a
    deployment to the replicas that its moves want it to have. `moving` are the replicas of which any requests are
    being moved. All three are written by `moves` only. `touched_names` are the deployments of which something has
    changed since `take_touched`, and `releases` are the workers on which something may have come free for somebody who
    waits.
    """

    def __init__(self, *, kv_bytes_max: int) -> None:
        self.kv_bytes_max = kv_bytes_max
        self.books = Books()
        self.servers: dict[str, ServerRecord] = Table(self._server_changed)
        self.workers: dict[str, WorkerRecord] = Table(self._worker_changed)
        self.replicas: dict[str, ReplicaRecord] = Table(self._replica_changed)
        self.deployments: dict[str, DeploymentRecord] = Table(self._deployment_changed)
        self.loads: dict[str, PendingLoad] = Table(self._load_changed)
        self.stops: dict[str, PendingStop] = Table(self._stop_changed)
        self.rooms: dict[str, Room] = Table(self._room_changed)
        # Replicas that go when what runs in them has ended → the deployment that waits for it; "": they were parked.
        self.ending: dict[str, str] = {}
        self.depths: dict[str, int] = Table(self._depth_changed)
        self.hinted_at: dict[str, float] = {}
        self.depths_asked_at = -math.inf
        self.ready_at: dict[str, float] = {}
        self.releases = Releases()
        self._needed: frozenset[str] = frozenset()
        self.moving: frozenset[str] = frozenset()
        self._floors: dict[str, int] = {}
        self._said_at: dict[str, float] = {}
        self._planned_bytes: dict[str, int] = {}
        self._touched_at: dict[tuple[str, str], float] = {}
        self._released: dict[str, list[tuple[int, float]]] = {}
        self._slugs: dict[str, str] = {}
        self._touched_names: dict[str, None] = {}
        self._serving: dict[str, list[ReplicaRecord]] = {}  # kept until something about the deployment changes
        self._coming: dict[str, list[PendingLoad]] = {}
        self._written_names: dict[str, None] = {}
        self._changed_servers: dict[str, None] = {}
        self._changed_workers: dict[str, None] = {}
        self._workers_of = Groups()
        self._replicas_of = Groups()
        self._replicas_at = Groups()
        self._replicas_in = Groups()
        self._loads_of = Groups()
        self._loads_at = Groups()
        self._loads_in = Groups()
        self._in_dram = Groups()
        self._on_ssd = Groups()
        self._keys = Groups()  # deployments by the key of their bytes
        self._draining_workers: dict[str, None] = {}
        self._migrating_workers: dict[str, None] = {}
        self._leaving_replicas: dict[str, None] = {}
        self._expiries: list[tuple[float, str, str]] = []
        self._overdue: dict[str, float] = {}  # loads that a look begun after that moment will not show
        self._looked_at = -math.inf
        self._buried: dict[str, float] = {}
        self._devices: dict[str, str] = {}  # of workers, also of those whose records are gone before their replicas'
        self.absent = Absent()

    # -- what follows from a change ------------------------------------------------------------------------------

    def _server_changed(self, id: str, old: ServerRecord | None, new: ServerRecord | None) -> None:
        self._changed_servers[id] = None
        for was, becomes, groups in (
            (old.dram if old else {}, new.dram if new else {}, self._in_dram),
            (old.ssd if old else {}, new.ssd if new else {}, self._on_ssd),
        ):
            if was is becomes or was == becomes:
                continue
            for key in was:
                if key not in becomes:
                    groups.drop(key, id)
            for key in becomes:
                if key not in was:
                    groups.add(key, id)
        if old is not None and new is not None:
            if old.phase is not new.phase or new.leased_bytes < old.leased_bytes:
                self._release(self._workers_of.of(id))
            same = (old.dram, old.ssd, old.chunk_bytes, old.dram_capacity_bytes) == (
                new.dram, new.ssd, new.chunk_bytes, new.dram_capacity_bytes,
            )  # fmt: skip
            if same and old.phase is new.phase:
                return
        else:
            self._release(self._workers_of.of(id))
        self._recount_server(id)
        for worker_id in self._workers_of.of(id):
            self._touch_worker(worker_id)

    def _worker_changed(self, id: str, old: WorkerRecord | None, new: WorkerRecord | None) -> None:
        self._changed_workers[id] = None
        _mark(self._draining_workers, id, new is not None and new.phase is Phase.DRAINING)
        _mark(self._migrating_workers, id, new is not None and bool(new.migrations))
        if old is not None and (new is None or new.server_id != old.server_id):
            self._workers_of.drop(old.server_id, id)
        if new is not None and (old is None or new.server_id != old.server_id):
            self._workers_of.add(new.server_id, id)
        if new is not None:
            self._devices[id] = new.device
        elif not self._replicas_at.of(id):
            self._devices.pop(id, None)
        if old is not None and new is not None and _same_worker(old, new):
            return
        self._release((id,))
        if new is None:
            self.releases.forget(id)
        self._touch_worker(id)
        for replica_id in self._replicas_at.of(id):
            self._recount(self.replicas[replica_id])

    def _replica_changed(self, id: str, old: ReplicaRecord | None, new: ReplicaRecord | None) -> None:
        if old is not None and new is not None and (
            old.deployment, old.server_id, workers_of(old),
        ) != (new.deployment, new.server_id, workers_of(new)):  # fmt: skip
            self._regroup(id, old, None)
            self._regroup(id, None, new)
        elif old is None or new is None:
            self._regroup(id, old, new)
        for one in (old, new):
            if one is not None:
                self.touch(one.deployment)
                for worker_id in workers_of(one):
                    self._changed_workers[worker_id] = None
        _mark(self._leaving_replicas, id, new is not None and new.state is ReplicaState.DRAINING)
        if new is None:
            self._drop_occupant(id)
            if old is not None:
                self.release_of(old.deployment, workers_of(old))
            if old is not None and old.worker_id not in self.workers:
                self._devices.pop(old.worker_id, None)
        else:
            if old is None or (old.running > 0 and new.running == 0) or old.state is not new.state:
                self.release_of(new.deployment)
            self._recount(new)

    def _regroup(self, id: str, old: ReplicaRecord | None, new: ReplicaRecord | None) -> None:
        if old is not None:
            self._replicas_of.drop(old.deployment, id)
            self._replicas_in.drop(old.server_id, id)
            for worker_id in workers_of(old):
                self._replicas_at.drop(worker_id, id)
        if new is not None:
            self._replicas_of.add(new.deployment, id)
            self._replicas_in.add(new.server_id, id)
            for worker_id in workers_of(new):
                self._replicas_at.add(worker_id, id)

    def _deployment_changed(self, name: str, old: DeploymentRecord | None, new: DeploymentRecord | None) -> None:
        self.touch(name)
        self._written_names[name] = None
        if old is not None:
            self._slugs.pop(old.slug, None)
            self._keys.drop(self.need(old).key, name)
        if new is not None:
            self._slugs[new.slug] = name
            self._keys.add(self.need(new).key, name)
        for id in self._replicas_of.of(name):
            self._recount(self.replicas[id])

    def _load_changed(self, id: str, old: PendingLoad | None, new: PendingLoad | None) -> None:
        for one, act in ((old, Groups.drop), (new, Groups.add)):
            if one is not None:
                self.touch(one.deployment)
                act(self._loads_of, one.deployment, id)
                act(self._loads_in, one.server_id, id)
                for worker_id in one.worker_ids:
                    act(self._loads_at, worker_id, id)
                    self._changed_workers[worker_id] = None
                self._changed_servers[one.server_id] = None
        if new is not None:
            self._expires(new.expires_at, "load", id)
            self._count_load(new)
        else:
            if id not in self.replicas:
                self._drop_occupant(id)
            if old is not None:
                self.release_of(old.deployment, old.worker_ids)

    def _stop_changed(self, id: str, old: PendingStop | None, new: PendingStop | None) -> None:
        one = new or old
        if one is not None:
            self.touch(one.deployment)
            self._changed_workers[one.worker_id] = None
        if new is not None:
            self._expires(new.expires_at, "stop", id)

    def _room_changed(self, owner: str, old: Room | None, new: Room | None) -> None:
        one = new or old
        if one is not None:
            self.touch(one.deployment)
            self._changed_servers[one.server_id] = None
            for id in one.worker_ids:
                self._changed_workers[id] = None
        if new is not None:
            self._expires(new.expires_at, "room", owner)
            weight = self.held_bytes(new.server_id, new.key, new.weight_bytes)
            self.books.put_room(owner, replace(new, weight_bytes=weight))
        else:
            self.books.drop_room(owner)
            self._release(old.worker_ids if old is not None else ())

    def _depth_changed(self, name: str, old: int | None, new: int | None) -> None:
        if (old or 0) != (new or 0):
            self.touch(name)
            if not new:
                self.release_of(name)  # its replicas may have become idle

    def release_of(self, name: str, worker_ids: tuple[str, ...] = ()) -> None:
        """These workers may have given something back, and so may those of all replicas of the deployment: it may be
        able to do without one of them, or have slots for what runs in another."""
        others = (id for one in self._replicas_of.of(name) for id in workers_of(self.replicas[one]))
        self._release((*worker_ids, *others))

    def _release(self, worker_ids: Iterable[str]) -> None:
        self.releases.put(id for id in worker_ids if id in self.workers)

    def _touch_worker(self, id: str) -> None:
        """Who has replicas, or loads, there may have more or fewer that can work."""
        self._changed_workers[id] = None
        for replica_id in self._replicas_at.of(id):
            self.touch(self.replicas[replica_id].deployment)

    def _recount_server(self, id: str) -> None:
        for replica_id in self._replicas_in.of(id):
            self._recount(self.replicas[replica_id])
        for load_id in self._loads_in.of(id):
            self._count_load(self.loads[load_id])

    def _recount(self, replica: ReplicaRecord) -> None:
        if self.books.put(self._occupant(replica)):
            self._note_occupants(replica.server_id, workers_of(replica))

    def _count_load(self, load: PendingLoad) -> None:
        weight = self.held_bytes(load.server_id, load.key, load.weight_bytes)
        one = Occupant(load.replica_id, load.worker_ids, load.server_id, load.memory_bytes, load.key, weight)
        if self.books.put(one):
            self._note_occupants(load.server_id, load.worker_ids)

    def _drop_occupant(self, id: str) -> None:
        one = self.books.drop(id)
        if one is not None:
            self._note_occupants(one.server_id, one.worker_ids)

    def _note_occupants(self, server_id: str, worker_ids: tuple[str, ...]) -> None:
        self._changed_servers[server_id] = None
        for id in worker_ids:
            self._changed_workers[id] = None

    def _expires(self, at: float, kind: str, id: str) -> None:
        heapq.heappush(self._expiries, (at, kind, id))

    @property
    def needed(self) -> frozenset[str]:
        """See the class."""
        return self._needed

    @needed.setter
    def needed(self, ids: frozenset[str]) -> None:
        for id in sorted(ids.symmetric_difference(self._needed)):
            replica = self.replicas.get(id)
            if replica is not None:
                self.touch(replica.deployment)
        self._needed = ids

    @property
    def floors(self) -> dict[str, int]:
        """See the class."""
        return self._floors

    @floors.setter
    def floors(self, floors: dict[str, int]) -> None:
        for name in (*floors, *self._floors):
            if floors.get(name) != self._floors.get(name):
                self.touch(name)
        self._floors = floors

    def take_touched(self) -> list[str]:
        """Deployments (and names of replicas' deployments) of which something has changed since the last call."""
        names = sorted(self._touched_names)
        self._touched_names = {}
        return names

    def touch(self, name: str) -> None:
        """Something about this deployment has changed."""
        self._touched_names[name] = None
        self._serving.pop(name, None)
        self._coming.pop(name, None)

    def mark_workers(self, replica: ReplicaRecord) -> None:
        """What its workers could give to others may have changed with time."""
        for id in workers_of(replica):
            self._changed_workers[id] = None

    def mark_server(self, id: str) -> None:
        """What is known of its speed has changed."""
        self._changed_servers[id] = None

    def take_written(self) -> list[str]:
        """Deployments whose records have changed since the last call."""
        names = sorted(self._written_names)
        self._written_names = {}
        return names

    def changed_workers(self) -> list[str]:
        """Workers of which something has changed since the last call: records, replicas, promises."""
        ids = sorted(self._changed_workers)
        self._changed_workers = {}
        return ids

    def changed_servers(self) -> list[str]:
        """Servers of which something has changed since the last call: records, loads, promises."""
        ids = sorted(self._changed_servers)
        self._changed_servers = {}
        return ids

    # -- records ------------------------------------------------------------------------------------------------

    def put(self, record: ServerRecord | WorkerRecord | ReplicaRecord, now: float) -> None:
        """Take over one record that was read just now."""
        if isinstance(record, ServerRecord):
            old = self.servers.get(record.server_id)
            if old is not None and record.leased_bytes < old.leased_bytes:
                self._released.pop(record.server_id, None)
            if old != record:
                self.servers[record.server_id] = record
        elif isinstance(record, WorkerRecord):
            record = self.absent.seen(record, now)
            if self.workers.get(record.worker_id) != record:
                self.workers[record.worker_id] = record
        else:
            self._put_replica(record, now)

    def bury(self, replica_id: str, now: float) -> None:
        """Its worker has said that this replica is gone: what is read of it afterwards is old."""
        self._buried.pop(replica_id, None)
        self._buried[replica_id] = now + BURIED_S
        while len(self._buried) > MOST_BURIED:
            del self._buried[next(iter(self._buried))]

    def _put_replica(self, record: ReplicaRecord, now: float) -> None:
        id = record.replica_id
        if now < self._buried.get(id, -math.inf):
            return
        load = self.loads.pop(id, None)
        if load is not None:
            self._planned_bytes[id] = load.memory_bytes
        if record.state is ReplicaState.READY:
            self.ready_at.setdefault(id, now)
        if self.replicas.get(id) != record:
            self._said_at[id] = now  # the same record again is as old as it was
            self.replicas[id] = record

    def remove_server(self, id: str) -> None:
        """This server is gone."""
        self.servers.pop(id, None)
        self._released.pop(id, None)

    def remove_worker(self, id: str) -> None:
        """This worker is gone, and nobody carries out what it was told to load."""
        self.workers.pop(id, None)
        self.absent.left(id, [self.loads.pop(load.replica_id).replica_id for load in self.loads_at(id)])

    def remove_replica(self, id: str, now: float) -> ReplicaRecord | None:
        """This replica is gone; what it was."""
        record = self.replicas.get(id)
        if record is None:
            return None
        one = self._occupant(record)
        del self.replicas[id]  # and with it from the books
        self.stops.pop(id, None)
        self.ready_at.pop(id, None)
        self._said_at.pop(id, None)
        self._planned_bytes.pop(id, None)
        if one.weight_bytes and not self.books.holders(one.server_id, one.key):
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
        self._looked_at = max(self._looked_at, asked_at)
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
        seen = {self._slugs[slug]: count for slug, count in depths.items() if slug in self._slugs}
        for name in [name for name in self.depths if name not in seen]:
            del self.depths[name]
        for name, count in seen.items():
            if self.depths.get(name) != count:
                self.depths[name] = count
        for name in [name for name, at in self.hinted_at.items() if at <= asked_at]:
            del self.hinted_at[name]
            self.touch(name)

    def outstanding(self, name: str) -> int:
        """Requests waiting or running, as far as known: a hint counts as one until the queues are read again.

        What runs where its end is awaited asks for no other replica.
        """
        depth = self.depths.get(name, 0)
        if depth > 0 and self.ending:
            depth -= sum(one.running for one in self.replicas_of(name) if self.ending.get(one.replica_id))
        return max(depth, 1 if name in self.hinted_at else 0)

    # -- what is where ------------------------------------------------------------------------------------------

    def alive(self, replica: ReplicaRecord) -> bool:
        """Whether its worker can take work."""
        worker = self.workers.get(replica.worker_id)
        return worker is not None and worker.phase is Phase.READY

    def serving(self, name: str) -> list[ReplicaRecord]:
        """Replicas of a deployment's present revision that load or answer and are not about to leave, by id."""
        found = self._serving.get(name)
        if found is None:
            deployment = self.deployments.get(name)
            found = self._serving[name] = [
                replica
                for replica in (self.replicas_of(name) if deployment is not None else ())
                if deployment is not None
                and replica.revision == deployment.revision
                and replica.state is not ReplicaState.DRAINING
                and replica.replica_id not in self.stops
                and self.alive(replica)
            ]
        return found

    def coming(self, name: str) -> list[PendingLoad]:
        """Commanded loads of a deployment's present revision, by id."""
        found = self._coming.get(name)
        if found is None:
            deployment = self.deployments.get(name)
            loads = (self.loads[id] for id in self._loads_of.of(name))
            found = self._coming[name] = [
                load for load in loads if deployment is not None and load.revision == deployment.revision
            ]
        return found

    def replicas_of(self, name: str) -> list[ReplicaRecord]:
        """Every replica of a deployment, of whatever revision and state, by id."""
        return [self.replicas[id] for id in self._replicas_of.of(name)]

    def replicas_on(self, worker_id: str) -> list[ReplicaRecord]:
        """Every replica that takes this worker, by id."""
        return [self.replicas[id] for id in self._replicas_at.of(worker_id)]

    def loads_on(self, server_id: str) -> list[PendingLoad]:
        """Commanded loads of a server that the registry does not show yet, by id."""
        return [self.loads[id] for id in self._loads_in.of(server_id)]

    def loads_at(self, worker_id: str) -> list[PendingLoad]:
        """Commanded loads of a worker that the registry does not show yet, by id."""
        return [self.loads[id] for id in self._loads_at.of(worker_id)]

    def workers_on(self, server_id: str) -> Sequence[str]:
        """The workers of a server, by id."""
        return self._workers_of.of(server_id)

    def present(self, name: str) -> frozenset[str]:
        """Workers that have a replica of this deployment, or get one."""
        serving = [id for one in self.serving(name) for id in workers_of(one)]
        return frozenset(serving + [id for one in self.coming(name) for id in one.worker_ids])

    def deployments_of(self, key: str) -> Sequence[str]:
        """The deployments whose replicas need this checkpoint, by name."""
        return self._keys.of(key)

    def dram_holders(self, key: str, weight_bytes: int = 1) -> list[str]:
        """Servers that have all of this checkpoint in DRAM, by id."""
        return [id for id in self._in_dram.of(key) if self.servers[id].dram.get(key, 0) >= max(1, weight_bytes)]

    def ssd_holders(self, key: str, weight_bytes: int = 1) -> list[str]:
        """Servers that have all of this checkpoint on SSD, by id."""
        return [id for id in self._on_ssd.of(key) if self.servers[id].ssd.get(key, 0) >= max(1, weight_bytes)]

    @property
    def draining_workers(self) -> list[str]:
        """Workers that drain, by id."""
        return sorted(self._draining_workers)

    @property
    def migrating_workers(self) -> list[str]:
        """Workers from which requests migrate now, by id."""
        return sorted(self._migrating_workers)

    @property
    def leaving_replicas(self) -> list[str]:
        """Replicas that take nothing more and leave, by id."""
        return sorted(self._leaving_replicas)

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

    def used_bytes(self, worker_id: str, *, but_for: str = "") -> int:
        """Bytes of a worker that are taken or promised; `but_for` leaves out the room that is made for that owner."""
        return self.books.used_bytes(worker_id, self._server_of(worker_id), but_for=but_for)

    def replica_count(self, worker_id: str, *, but_for: str = "") -> int:
        """Replicas that a worker has or is promised."""
        return self.books.places(worker_id, self._server_of(worker_id), but_for=but_for)

    def pool_used_bytes(self, server_id: str, now: float, *, but_for: str = "") -> int:
        """Bytes of a server's DRAM pool that cannot be evicted: promised, or leased as its store says."""
        server = self.servers.get(server_id)
        leased = self.leased_bytes(server, now) if server is not None else 0
        return max(leased, self.books.pool_bytes(server_id, but_for=but_for))

    def holds(self, server_id: str, key: str, *, but_for: str = "") -> bool:
        """Whether some replica on this server keeps the checkpoint in DRAM, and is not leaving to make room."""
        return self.books.holds(server_id, key, but_for=but_for)

    def _server_of(self, worker_id: str) -> str:
        worker = self.workers.get(worker_id)
        return worker.server_id if worker is not None else ""

    def occupant(self, replica_id: str) -> Occupant:
        """What this replica holds."""
        return self.books.occupants[replica_id]

    def _occupant(self, replica: ReplicaRecord) -> Occupant:
        device = self._devices.get(replica.worker_id, "cpu")
        deployment = self.deployments.get(replica.deployment)
        need = self.need(deployment) if deployment is not None else None
        memory = max(replica.memory_bytes, self._planned_bytes.get(replica.replica_id, 0))
        if memory == 0 and need is not None:
            streams = self.streams(replica.server_id, need.key, need.weight_bytes)
            memory = -(-need.memory_bytes(device, streams=streams) // len(workers_of(replica)))
        weight = self._weight_bytes(replica, need)
        # On the CPU parameters stay views on the pool; elsewhere they are copied and the lease ends with the load.
        if device != "cpu" and replica.state is not ReplicaState.LOADING:
            weight = 0
        key = replica.checkpoint_id or (need.key if need is not None else f"replica:{replica.replica_id}")
        held = self.held_bytes(replica.server_id, key, weight)
        return Occupant(replica.replica_id, workers_of(replica), replica.server_id, memory, key, held)

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
        return weight_bytes if server is None else pool_bytes(server, key, weight_bytes)

    def streams(self, server_id: str, key: str, weight_bytes: int) -> bool:
        """Whether a checkpoint is larger than a server's DRAM pool, and so only streams through it."""
        server = self.servers.get(server_id)
        return server is not None and streams_on(server, key, weight_bytes)

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
        loads: list[PendingLoad] = []
        stops: list[PendingStop] = []
        rooms: list[Room] = []
        while self._expiries and self._expiries[0][0] <= now:
            at, kind, id = heapq.heappop(self._expiries)
            if kind == "load" and id in self.loads and self.loads[id].expires_at == at:
                self._overdue[id] = at
            elif kind == "stop" and id in self.stops and self.stops[id].expires_at == at:
                stops.append(self.stops.pop(id))
            elif kind == "room" and id in self.rooms and self.rooms[id].expires_at == at:
                rooms.append(self.rooms.pop(id))
        # A registry that cannot be read shows no replica, which is no sign that none was loaded.
        for id, at in sorted(self._overdue.items()):
            if id not in self.loads:
                del self._overdue[id]
            elif self._looked_at >= at:
                del self._overdue[id]
                loads.append(self.loads.pop(id))
        return loads, stops, rooms

    def next_expiry(self) -> float:
        """The moment at which the next command may have to be forgotten."""
        kinds: dict[str, dict[str, PendingLoad] | dict[str, PendingStop] | dict[str, Room]] = {
            "load": self.loads, "stop": self.stops, "room": self.rooms,
        }  # fmt: skip
        while self._expiries:
            at, kind, id = self._expiries[0]
            entry = kinds[kind].get(id)
            if entry is not None and entry.expires_at == at and id not in self._overdue:
                return at
            heapq.heappop(self._expiries)
        return math.inf

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
        """No device is promised more than it has; nothing commanded is both coming and there; the books are right."""
        self.books.check()
        for id, worker in self.workers.items():
            used, count = self.used_bytes(id), self.replica_count(id)
            assert used <= worker.memory_total_bytes, f"{id}: {used} of {worker.memory_total_bytes} bytes promised"
            assert count <= worker.max_replicas, f"{id}: {count} of {worker.max_replicas} replicas promised"
        for id, server in self.servers.items():
            pool = self.books.pool_bytes(id)
            assert pool <= server.dram_capacity_bytes, f"{id}: {pool} of {server.dram_capacity_bytes} bytes promised"
        for id in self.loads:
            assert id not in self.replicas, f"{id} is both coming and there"
        for id in self.stops:
            assert id in self.replicas, f"{id} is being stopped but not there"


def serves(record: DeploymentRecord) -> bool:
    """Whether replicas of this deployment may be placed."""
    return record.state is DeploymentState.READY


def _same_worker(old: WorkerRecord, new: WorkerRecord) -> bool:
    """Whether nothing has changed that placements depend on."""
    return (old.phase, old.device, old.server_id, old.memory_total_bytes, old.max_replicas, old.labels) == (
        new.phase, new.device, new.server_id, new.memory_total_bytes, new.max_replicas, new.labels,
    )  # fmt: skip


def _mark(ids: dict[str, None], id: str, on: bool) -> None:
    if on:
        ids[id] = None
    else:
        ids.pop(id, None)


def _missing(known: Iterable[str], seen: Iterable[str]) -> list[str]:
    present = frozenset(seen)
    return [id for id in sorted(known) if id not in present]
