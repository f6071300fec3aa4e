"""A worker: the process that owns a device. It loads replicas, stops them, and lets their requests migrate. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from shared.contracts.migration import Migrate
from shared.contracts.placement import LoadReplica, ReplicaFailed, ReplicaLoaded, StopReplica
from shared.contracts.records import Phase, ReplicaState, WorkerRecord
from shared.contracts.residency import Lease
from shared.errors import Code, Failure
from simulator.fleet.migration import Migration
from simulator.fleet.replica import LoadTimes, Replica

if TYPE_CHECKING:
    from simulator.fleet.request import Request
    from simulator.fleet.server import Server
    from simulator.fleet.world import World

Told = Callable[["Failure | None"], None]
DETACH_S: Final = 0.02  # from the last request of a replica that leaves until its record is gone
SHOWN: Final = 64


class Worker:
    """One per device. `life` counts its processes: what is meant for an earlier one is lost."""

    def __init__(self, world: World, server: Server, id: str, number: int) -> None:
        self.world: Final = world
        self.server: Final = server
        self.id: Final = id
        self.number: Final = number
        self.shape: Final = server.shape
        self.alive = False
        self.stale = True
        self.life = 0
        self.term = 0
        self.replicas: dict[str, Replica] = {}
        self.guests: dict[str, Replica] = {}  # of other workers, that take this device too
        self.departures: dict[Migration, None] = {}

    # -- its life

    def start(self) -> None:
        """A process begins to live."""
        self.alive = True
        self.life += 1
        self.term = 0
        self.world.registry.put("worker", self.id, self)

    def die(self) -> None:
        """kill -9: what it ran is found lost by the gateways, and runs elsewhere."""
        if not self.alive:
            return
        self.alive = False
        world = self.world
        world.registry.orphan("worker", self.id)
        for replica in [*self.replicas.values(), *self.guests.values()]:
            replica.worker.lose(replica)

    def lose(self, replica: Replica) -> None:
        """A replica is gone with its process, and its requests with it."""
        world = self.world
        if replica.removed:
            return
        replica.removed = True
        replica.stop_engine()
        replica.state = ReplicaState.DRAINING
        for migration in list(replica.reserved):
            migration.refused_there("The destination is lost.")
        for request in list(replica.held):
            if request.migration is not None:
                request.migration.source_lost()
            replica.release(request, world.kernel.now)
            world.recover(request)
        self._forget(replica)
        world.registry.orphan("replica", replica.id)
        self.server.store.orphan(replica.lease_id)

    def record(self, now: float) -> WorkerRecord:
        """See `registry.Writer`."""
        self.stale = bool(self.departures)
        shape = self.shape
        return WorkerRecord(
            worker_id=self.id,
            server_id=self.server.id,
            phase=Phase.READY,
            pid=self.life,
            device=shape.device,
            device_name=shape.device_name,
            memory_total_bytes=shape.device_memory_bytes,
            memory_used_bytes=self.memory_used_bytes,
            max_replicas=shape.max_replicas_per_device,
            migrations=tuple(one.shown(now) for one in list(self.departures)[:SHOWN]),
            incoming=sum(len(one.reserved) for one in self.replicas.values()),
            labels=dict(shape.labels),
            gangs=True,
        )

    @property
    def memory_used_bytes(self) -> int:
        """Bytes of its device that are taken."""
        return sum(one.memory_bytes for one in (*self.replicas.values(), *self.guests.values()))

    @property
    def count(self) -> int:
        """Replicas that take this device."""
        return len(self.replicas) + len(self.guests)

    def changed(self) -> None:
        """Its record says no more what is."""
        if self.alive:
            self.world.registry.put("worker", self.id, self)

    # -- commands

    def outdated(self, term: int) -> Failure | None:
        """Why a command of this term is refused, if it is; 0 is an operator's."""
        if 0 < term < self.term:
            return Failure(code=Code.STALE_EPOCH, message=f"Term {self.term} has begun.")
        self.term = max(self.term, term)
        return None

    def load(self, message: LoadReplica, times: LoadTimes, told: Told) -> None:
        """Attach a model."""
        refusal = self.outdated(message.term)
        if refusal is None and message.replica_id in self.replicas:
            told(None)
            return
        peers = [self.world.workers[id] for id in message.peer_worker_ids if id != self.id]
        share = self._share_bytes(message, 1 + len(peers))
        for one in (self, *peers):
            refusal = refusal or one.refusal_of(share)
        if refusal is not None:
            told(refusal)
            return
        times.asked_at = self.world.kernel.now
        replica = Replica(self, message, times, share)
        self.replicas[replica.id] = replica
        for one in peers:
            one.guests[replica.id] = replica
        self._check()
        told(None)
        self.world.registry.put("replica", replica.id, replica)
        self.changed()
        self._acquire(replica)

    def refusal_of(self, share_bytes: int) -> Failure | None:
        """Why it cannot take a replica of this size."""
        if not self.alive:
            return Failure(code=Code.UNAVAILABLE, message=f"Worker {self.id} does not answer.")
        if self.count >= self.shape.max_replicas_per_device:
            return Failure(code=Code.OUT_OF_MEMORY, message=f"Worker {self.id} takes no more replicas.")
        if share_bytes > self.shape.device_memory_bytes - self.memory_used_bytes:
            return Failure(code=Code.OUT_OF_MEMORY, message=f"Worker {self.id} has too little memory free.")
        return None

    def _share_bytes(self, message: LoadReplica, devices: int) -> int:
        on_device = self.shape.device != "cpu"
        weights = message.checkpoint.weight_bytes if message.checkpoint is not None and on_device else 0
        return -(-weights // devices) + -(-message.kv_bytes // devices)

    def _check(self) -> None:
        assert self.memory_used_bytes <= self.shape.device_memory_bytes, f"{self.id} is over-committed"
        assert self.count <= self.shape.max_replicas_per_device, f"{self.id} has too many replicas"

    def stop(self, message: StopReplica, told: Told) -> None:
        """A replica shall leave."""
        refusal = self.outdated(message.term)
        replica = self.replicas.get(message.replica_id)
        if refusal is not None or replica is None:
            told(refusal)
            return
        if replica.busy and not message.drain and not message.abort:
            told(Failure(code=Code.BUSY, message=f"Replica {replica.id} runs {len(replica.held)} requests."))
            return
        told(None)
        self._leave(replica)
        if message.abort:
            self._give_back(replica)

    def _leave(self, replica: Replica) -> None:
        loading = replica.state is ReplicaState.LOADING
        replica.leave()
        if loading or not replica.busy:
            self.drained(replica)

    def _give_back(self, replica: Replica) -> None:
        """Its requests go back to the queue with their tokens: they are parked."""
        for request in list(replica.held):
            if request.migration is not None:
                request.migration.source_lost()
            if request.replica is replica:
                replica.release(request, self.world.kernel.now)
                self.world.park(request)

    def drained(self, replica: Replica) -> None:
        """Nothing runs in a replica that leaves: detach it."""
        life = self.life
        self.world.kernel.after(DETACH_S, lambda: self._detached(replica, life))

    def _detached(self, replica: Replica, life: int) -> None:
        if life != self.life or replica.removed or replica.busy:
            return
        replica.removed = True
        replica.stop_engine()
        self._forget(replica)
        self.server.store.release(self.id, replica.lease_id)
        self.world.registry.remove("replica", replica.id)
        self.changed()

    def _forget(self, replica: Replica) -> None:
        self.replicas.pop(replica.id, None)
        for id in replica.message.peer_worker_ids:
            peer = self.world.workers.get(id)
            if peer is not None and peer.guests.pop(replica.id, None) is not None:
                peer.changed()

    # -- loading

    def _acquire(self, replica: Replica) -> None:
        """Ask the server's store for the bytes, again and again until they are there or will not come."""
        message, life = replica.message, self.life

        def answered(answer: Lease | Failure | None) -> None:
            if life != self.life or replica.removed or replica.state is not ReplicaState.LOADING:
                if isinstance(answer, Lease):
                    self.server.store.release(self.id, answer.lease_id)
            elif isinstance(answer, Failure):
                self._broke(replica, answer)
            elif answer is None:
                self._acquire(replica)
            else:
                self._leased(replica, answer)

        self.server.store.acquire(self.id, message, answered)

    def _leased(self, replica: Replica, lease: Lease) -> None:
        replica.lease_id = lease.lease_id
        now, times, life = self.world.kernel.now, replica.times, self.life
        times.tier = "dram" if lease.tier == "dram" else ""
        times.began_at = max(times.asked_at, now - lease.moved_s)
        times.moved_bytes = lease.moved_bytes
        if lease.arrival is None:
            times.tier = times.tier or self.server.store.last_tier(lease)
            self._copy(replica, now, now)
            return

        def arrived(failure: Failure | None, tier: str) -> None:
            if life != self.life or replica.removed or replica.state is not ReplicaState.LOADING:
                return
            if failure is not None:
                replica.lease_id = ""  # void
                self._broke(replica, failure)
                return
            times.tier = tier or self.server.store.last_tier(lease)
            times.began_at = min(times.began_at, self.world.kernel.now)
            self._copy(replica, now, self.world.kernel.now)

        self.server.store.watch(lease.arrival.tag, arrived)

    def _copy(self, replica: Replica, leased_at: float, arrived_at: float) -> None:
        """The weights' way into the device, as far as it was not on the way already; then attaching."""
        world, shape = self.world, self.shape
        replica.times.landed_at = replica.times.arrived_at = arrived_at
        copied_at = arrived_at
        if shape.device != "cpu":
            weights = replica.message.checkpoint.weight_bytes if replica.message.checkpoint is not None else 0
            part = weights / (1 + sum(id != self.id for id in replica.message.peer_worker_ids))
            last = min(part, shape.chunk_bytes) if arrived_at > leased_at else part
            copied_at = max(arrived_at + last / shape.device_bytes_per_s, leased_at + part / shape.device_bytes_per_s)
            if replica.times.tier == "dram":
                replica.times.arrived_at = copied_at  # the bytes' way was this one
        life = self.life
        fails = world.load_fails()
        world.kernel.at(copied_at + replica.model.attach_s, lambda: self._attached(replica, life, fails))

    def _attached(self, replica: Replica, life: int, fails: bool) -> None:
        if life != self.life or replica.removed or replica.state is not ReplicaState.LOADING:
            return
        if fails:
            self._broke(replica, Failure(code=Code.INTERNAL, message="The engine did not begin."))
            return
        if self.shape.device != "cpu":
            self.server.store.release(self.id, replica.lease_id)
            replica.lease_id = ""
        replica.ready(self.world.kernel.now)
        self.changed()
        self.world.loaded(replica, self._told(replica))

    def _told(self, replica: Replica) -> ReplicaLoaded:
        """What the load took, as a worker tells the scheduler."""
        times, message = replica.times, replica.message
        moved = times.tier != "dram"
        wait_s = times.began_at - times.asked_at if moved else 0.0
        move_s = times.landed_at - times.began_at if moved else 0.0
        total_s = times.ready_at - times.asked_at
        return ReplicaLoaded(
            replica_id=replica.id,
            deployment=message.deployment,
            worker_id=self.id,
            server_id=self.server.id,
            checkpoint_id=message.checkpoint_id,
            tier=times.tier,
            weight_bytes=message.checkpoint.weight_bytes if message.checkpoint is not None else 0,
            total_s=total_s,
            wait_s=wait_s,
            move_s=move_s,
            moved_bytes=times.moved_bytes if moved else 0,
            attach_s=max(0.0, total_s - wait_s - move_s),
            work_s=replica.model.attach_s,
            device=self.shape.device,
        )

    def _broke(self, replica: Replica, failure: Failure) -> None:
        """A load has failed; the scheduler hears why when the record is gone."""
        replica.failed = True
        self._leave(replica)
        told = ReplicaFailed(
            replica_id=replica.id, deployment=replica.message.deployment, worker_id=self.id, failure=failure
        )
        self.world.kernel.after(2 * DETACH_S, lambda: self.world.load_failed(told))

    # -- migrations

    def migrate(self, message: Migrate) -> tuple[str, ...] | Failure:
        """Begin to migrate requests; which ones."""
        refusal = self.outdated(message.term)
        if refusal is not None:
            return refusal
        chosen = self._chosen(message)
        if isinstance(chosen, Failure):
            return chosen
        for request in chosen:
            migration = Migration(self.world, request, self, message)
            self.departures[migration] = None
            migration.begin()
        if chosen:
            self.changed()
        return tuple(request.id for request in chosen)

    def _chosen(self, message: Migrate) -> list[Request] | Failure:
        now = self.world.kernel.now
        if message.to_worker_id == self.id:
            return Failure(code=Code.CONFLICT, message=f"Worker {self.id} is where the requests are already.")
        if message.request_ids:
            named = frozenset(message.request_ids)
            runs = [one for replica in self.replicas.values() for one in replica.held if one.id in named]
            if not runs:
                return Failure(code=Code.NOT_FOUND, message=f"They do not run on worker {self.id}.")
        else:
            source = self.replicas.get(message.replica_id)
            if source is None:
                return Failure(code=Code.NOT_FOUND, message=f"Worker {self.id} has no replica {message.replica_id!r}.")
            runs = sorted(source.held, key=lambda one: -(one.prompt_tokens + source.tokens(one, now)))
        able = [one for one in runs if one.migration is None and one.decoding]
        return able if message.request_ids or not message.most else able[: message.most]

    def departed(self, migration: Migration) -> None:
        """A migration is over."""
        self.departures.pop(migration, None)
        self.changed()
