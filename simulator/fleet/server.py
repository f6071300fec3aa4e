"""A server: its devices, its store (the production core of residency) and the pipes that its bytes go through. Pure.

What the core wants done takes the time of the hardware: a read goes through the SSD's pipe, an import through the NICs
and, from the source, the object store's pipe. Which copy is kept, which goes, who is read first: that is the core's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from services.store import events as e
from services.store.allocator import Allocator
from services.store.pool_state import PoolState
from services.store.residency import Residency
from shared.contracts.placement import LoadReplica
from shared.contracts.records import Phase, ServerRecord
from shared.contracts.residency import Acquire, Evict, Lease, Prefetch, Progress, Release, Renew
from shared.errors import Code, Failure
from simulator.fleet.model import ServerShape
from simulator.fleet.pipes import Flow, Pipe
from simulator.fleet.worker import Worker
from simulator.kernel import Timer

if TYPE_CHECKING:
    from simulator.fleet.world import World

POLL_S: Final = 30.0
REMOVE_S: Final = 0.01
TOUCH_S: Final = 0.02  # the record of a store that changes all the time is written no more often than this
Arrived = Callable[["Failure | None", str], None]


class Server:
    """A machine. `store` is the process that lives on it now."""

    def __init__(self, world: World, id: str, number: int, shape: ServerShape) -> None:
        self.world: Final = world
        self.id: Final = id
        self.number: Final = number
        self.shape: Final = shape
        self.network: Final = Pipe(shape.network_bytes_per_s)
        self.disk: Final = Pipe(shape.ssd_bytes_per_s)
        self.workers: Final[list[Worker]] = []
        self.alive = True
        self._lives = 0
        self.store = Store(self, (), None, 0)

    def start(self, stored: tuple[e.StoredCheckpoint, ...], pool: PoolState | None = None) -> None:
        """A store begins to live, with what is on the SSD, and perhaps in the pool still."""
        self.alive = True
        self._lives += 1
        self.store = Store(self, stored, pool, self._lives)
        self.store.handle(None)  # its clock starts: leases of an earlier life run from now
        self.store.changed()

    def die(self) -> tuple[e.StoredCheckpoint, ...]:
        """The machine is off: what is on its SSD outlasts that."""
        self.alive = False
        self.world.registry.orphan("server", self.id)
        for worker in self.workers:
            worker.die()
        return self.store.die()


class Store:
    """The shell of one `Residency`: its actions become flows, their ends its events."""

    def __init__(
        self, server: Server, stored: tuple[e.StoredCheckpoint, ...], pool: PoolState | None, life: int
    ) -> None:
        shape = server.shape
        self.server: Final = server
        self.world: Final = server.world
        self.alive = True
        self.stale = True
        self._life = life
        self._stored: Final = {one.id: one for one in stored}
        self._flows: Final[dict[str, tuple[Flow, int, str]]] = {}  # job → flow, tag, tier
        self._imports: Final[dict[str, e.RunImport]] = {}  # by job
        self._watchers: Final[dict[int, list[Arrived]]] = {}
        self._leases: Final[dict[str, str]] = {}  # lease → holder
        self._tiers: Final[dict[str, str]] = {}  # checkpoint → where it came from last
        self._timer: Timer | None = None
        self._timer_at = math.inf
        self._renewing = False
        self._touched = False
        self.pool: PoolState | None = pool
        self.core: Final = Residency(
            server_id=server.id,
            nonce=f"{server.id}-{life}",
            segment="/modelled",
            allocator=Allocator(chunk_bytes=shape.chunk_bytes, chunk_count=shape.dram_bytes // shape.chunk_bytes),
            ssd_capacity_bytes=shape.ssd_bytes,
            board_offset=shape.dram_bytes,
            stored=stored,
            restored=pool,
            peer_url="modelled" if self.world.hardware.peers else "",
        )

    # -- what others ask of it

    def acquire(self, holder: str, message: LoadReplica, told: Callable[[Lease | Failure | None], None]) -> None:
        """A lease; None: it takes longer, ask again. Nobody answers who is dead."""
        asked = Acquire(
            checkpoint_id=message.checkpoint_id,
            source=message.source,
            holder=holder,
            ttl_s=self.world.options.lease_ttl_s,
            deployment=message.slug,
            wait_s=POLL_S,
            arriving=True,
        )
        life = self._life

        def reply(answer: Any) -> None:
            if isinstance(answer, Lease):
                self._leases[answer.lease_id] = holder
                self._renew_soon()
            self.world.bus.sure(lambda: told(None if isinstance(answer, Progress) else answer))

        def arrive() -> None:
            if self.alive and life == self._life:
                self.world.accessed(self.server, message)
                self.handle(e.AcquireAsked(asked, reply))
            else:
                told(Failure(code=Code.UNAVAILABLE, message=f"The store of {self.server.id} does not answer."))

        self.world.bus.sure(arrive)

    def release(self, holder: str, lease_id: str) -> None:
        """A lease is needed no more."""
        if lease_id and self.alive and self._leases.pop(lease_id, None) is not None:
            self.handle(e.ReleaseAsked(Release(holder=holder, lease_id=lease_id)))

    def orphan(self, lease_id: str) -> None:
        """The holder of this lease has died: nobody renews it."""
        self._leases.pop(lease_id, None)

    def watch(self, tag: int, arrived: Arrived) -> None:
        """Hear when the bytes under this tag have arrived, or will not."""
        if any(one[1] == tag for one in self._flows.values()):
            self._watchers.setdefault(tag, []).append(arrived)
        else:  # they have, while the lease was on its way
            arrived(None, "")

    def last_tier(self, lease: Lease) -> str:
        """Where a checkpoint that is whole by now came from."""
        return self._tiers.get(lease.checkpoint.checkpoint_id, lease.tier)

    def prefetch(self, message: Prefetch, told: Callable[[Any], None]) -> None:
        """Bring a checkpoint ahead of demand."""
        self.handle(e.PrefetchAsked(message, told))

    def evict(self, checkpoint_id: str, tier: str) -> None:
        """Have a checkpoint out of a tier, if nobody needs it there."""
        self.handle(e.EvictAsked(Evict(checkpoint_id=checkpoint_id, tier=tier), lambda answer: None))

    def record(self, now: float) -> ServerRecord:
        """See `registry.Writer`."""
        for job, (flow, _, _) in list(self._flows.items()):
            done = int(self.world.plumbing.done_bytes(flow))
            if job in self._imports:
                one = self._imports[job]
                self.handle(e.ImportProgressed(one.source, done, int(flow.size_bytes)))
            else:
                self.handle(e.ReadProgressed(job, done))
        self.stale = bool(self._flows)
        record = self.core.record(Phase.READY, host=self.server.id, pid=self._life)
        return record if not self.server.shape.labels else self.world.labelled(record, self.server.shape.labels)

    def holds(self, checkpoint_id: str) -> bool:
        """Whether it could serve this checkpoint to a peer."""
        return self.alive and checkpoint_id in self._stored

    def in_dram(self, checkpoint_id: str) -> bool:
        """Whether this checkpoint is whole in DRAM."""
        return self.core.in_dram(checkpoint_id)

    @property
    def idle(self) -> bool:
        """No bytes move, nobody has a lease, nobody waits."""
        return not self._flows and self.core.lease_count == 0

    def die(self) -> tuple[e.StoredCheckpoint, ...]:
        """Nothing moves any more; what is whole on the SSD stays."""
        self.alive = False
        for flow, _, _ in self._flows.values():
            self.world.plumbing.stop(flow)
        self._flows.clear()
        if self._timer is not None:
            self._timer.cancel()
        return tuple(self._stored.values())

    # -- the core

    def handle(self, event: e.Event | None) -> None:
        """Have the core take an event, and do what it wants."""
        if not self.alive:
            return
        now = self.world.kernel.now
        for action in self.core.handle(event, now):
            self._do(action)
        self.world.checked(self.core)
        due = self.core.deadline()
        at = math.inf if due is None else max(due, now)
        if at != self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self.world.kernel.at(at, self._wake) if at < math.inf else None

    def _wake(self) -> None:
        self._timer, self._timer_at = None, math.inf
        self.handle(None)

    def _do(self, action: e.Action) -> None:
        match action:
            case e.Answer(reply, message):
                reply(message)
            case e.TouchRecord():
                self.changed()
            case e.SavePool(state):
                self.pool = state
            case e.Note(name, facts):
                self.world.counters.notes[name] = self.world.counters.notes.get(name, 0) + 1
                if name == "checkpoint.evicted" and facts.get("tier") == "ssd":
                    self._stored.pop(str(facts["checkpoint_id"]), None)
            case e.ReadImage():
                self._flow(action.job, action.tag, "ssd", (self.server.disk,), action.stored.image_bytes,
                           action.priority, lambda: self._read(action))  # fmt: skip
            case e.PlanImport():
                self._plan(action)
            case e.RunImport():
                self._import(action)
            case e.SetPriority(job, priority):
                if job in self._flows:
                    self.world.plumbing.urge(self._flows[job][0], priority)
            case e.StopJob(job):
                self._stop(job)
            case e.RemoveCheckpoint(checkpoint_id):
                self._later(REMOVE_S, e.CheckpointRemoved(checkpoint_id))
            case e.QuarantineCheckpoint(checkpoint_id, directory):
                self._later(REMOVE_S, e.CheckpointQuarantined(checkpoint_id, directory))
            case e.VerifyCheckpoint(stored):
                self._later(stored.image_bytes / self.server.shape.ssd_bytes_per_s, e.VerifyDone(stored.id))
            case e.InspectSource(reply=reply):
                self._later(0.0, e.InspectFailed(reply, Failure(code=Code.UNSUPPORTED, message="Not modelled.")))
            case e.RunExport(stored, url):
                self._later(0.0, e.ExportDone(stored.id, url, Failure(code=Code.UNSUPPORTED, message="Not modelled.")))
            case _:
                pass  # the board, pins, windows and progress: nobody here looks at them

    def _later(self, delay_s: float, event: e.Event) -> None:
        self.world.kernel.after(delay_s, lambda: self.handle(event))

    # -- bytes

    def _flow(
        self, job: str, tag: int, tier: str, pipes: tuple[Pipe, ...], size: int, priority: int, done: Callable[[], None]
    ) -> None:
        self._flows[job] = (self.world.plumbing.start(pipes, size, priority, done), tag, tier)

    def _arrived(self, job: str, failure: Failure | None) -> Flow:
        flow, tag, tier = self._flows.pop(job)
        for arrived in self._watchers.pop(tag, ()):
            arrived(failure, tier)
        return flow

    def _read(self, action: e.ReadImage) -> None:
        flow = self._arrived(action.job, None)
        self._tiers[action.stored.id] = "ssd"
        self.handle(e.ReadDone(action.job, self.world.kernel.now - flow.began_at))

    def _plan(self, action: e.PlanImport) -> None:
        stored = self.world.stored_of(action.source, action.checkpoint_id)
        event: e.Event
        if stored is None:
            failure = Failure(code=Code.CHECKPOINT_UNAVAILABLE, message="Nobody has this source.")
            event = e.ImportFailed(action.source, failure)
        else:
            event = e.ImportPlanned(
                action.source,
                stored.revision,
                stored.image_bytes,
                stored.stored_bytes,
                checkpoint_id=stored.id,
                from_peers=self.world.peer_of(self.server, stored.id) is not None,
            )
        self._later(self.world.hardware.remote_latency_s, event)

    def _import(self, action: e.RunImport) -> None:
        stored = self.world.stored_of(action.source, action.checkpoint_id)
        assert stored is not None, "an import of what was never planned"
        peer = self.world.peer_of(self.server, stored.id)
        tier = "remote" if peer is None else "peer"
        pipes = (self.server.network, self.world.remote if peer is None else peer.network)
        self._imports[action.job] = action

        def done() -> None:
            del self._imports[action.job]
            flow = self._arrived(action.job, None)
            size = int(flow.size_bytes)
            self._stored[stored.id] = stored
            self._tiers[stored.id] = tier
            self.handle(
                e.ImportDone(
                    action.source,
                    stored,
                    remote_bytes=0 if peer is not None else size,
                    peer_bytes=size if peer is not None else 0,
                    moved_bytes=size,
                    seconds=self.world.kernel.now - flow.began_at,
                    in_dram=bool(action.extents),
                )
            )

        self._flow(action.job, action.tag, tier, pipes, stored.image_bytes, action.priority, done)
        self._later(0.0, e.ImportOpened(action.source, stored))

    def _stop(self, job: str) -> None:
        if job not in self._flows:
            return
        failure = Failure(code=Code.CANCELLED, message="Nobody needs it any more.")
        self.world.plumbing.stop(self._flows[job][0])
        self._arrived(job, failure)
        action = self._imports.pop(job, None)
        event: e.Event = e.ReadFailed(job, failure) if action is None else e.ImportFailed(action.source, failure)
        self._later(0.0, event)

    # -- leases and the record

    def _renew_soon(self) -> None:
        if not self._renewing:
            self._renewing = True
            self.world.kernel.after(self.world.options.lease_ttl_s / 3, self._renew)

    def _renew(self) -> None:
        self._renewing = False
        if not self.alive or not self._leases:
            return
        holders: dict[str, list[str]] = {}
        for lease_id, holder in self._leases.items():
            holders.setdefault(holder, []).append(lease_id)
        for holder, ids in holders.items():
            renew = Renew(holder=holder, lease_ids=tuple(ids), ttl_s=self.world.options.lease_ttl_s)
            self.handle(e.RenewAsked(renew, lambda answer: None))
        self._renew_soon()

    def changed(self) -> None:
        """Its record says no more what is: it is written in a moment."""
        self.stale = True
        if not self._touched:
            self._touched = True
            self.world.kernel.after(TOUCH_S, self._write)

    def _write(self) -> None:
        self._touched = False
        if self.alive and self.server.store is self:
            self.world.registry.put("server", self.server.id, self)
