"""The world of a fleet: who is there, what is between them, and what everybody may ask of it. Pure.

Nothing is decided here about placements, tiers or migrations: that is the production cores' business.
"""

from __future__ import annotations

import collections
from array import array
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec

from services.scheduler import events as scheduler
from services.store.events import StoredCheckpoint
from shared.contracts.migration import MigrationEnded, MigrationOutcome
from shared.contracts.placement import LoadReplica, ReplicaFailed, ReplicaLoaded
from shared.contracts.records import DeploymentRecord, ServerRecord
from shared.contracts.residency import Source
from simulator.fleet.bus import Bus
from simulator.fleet.leader import Leader
from simulator.fleet.model import Faults, Hardware, ModelSpec, Options
from simulator.fleet.pipes import Pipe, Plumbing
from simulator.fleet.queues import Queue
from simulator.fleet.registry import Registry
from simulator.fleet.replica import Replica
from simulator.fleet.report import Counters, Load, Outcome
from simulator.fleet.request import Columns, Request
from simulator.fleet.server import Server
from simulator.fleet.worker import Worker
from simulator.kernel import Dice, Kernel

FOUND_LOST_S: Final = 3.0  # gateways notice a dead worker within this time


class Checked(Protocol):
    """A core."""

    def check(self) -> None:
        """Assert every invariant."""


class World:
    """See the module. The parts refer to each other through it."""

    def __init__(
        self,
        hardware: Hardware,
        deployments: Sequence[ModelSpec],
        options: Options,
        faults: Faults,
        dice: Dice,
        rules_record_interval_s: float = 0.2,
    ) -> None:
        self.kernel: Final = Kernel()
        self.dice: Final = dice
        self.hardware: Final = hardware
        self.options: Final = options
        self.faults: Final = faults
        self.models: Final[dict[str, ModelSpec]] = {one.name: one for one in deployments}
        self.bus: Final = Bus(self.kernel, dice, delay_s=hardware.bus_s, jitter_s=hardware.bus_jitter_s)
        self.plumbing: Final = Plumbing(self.kernel)
        total = hardware.remote_total_bytes_per_s or hardware.remote_bytes_per_s * max(1, len(hardware.servers))
        self.remote: Final = Pipe(total, hardware.remote_bytes_per_s)
        self.registry: Final = Registry(
            self.kernel, dice, heartbeat_s=hardware.heartbeat_s, ttl_s=hardware.record_ttl_s
        )
        self.registry.hint = self._hinted
        self.counters: Final = Counters()
        self.columns: Final = Columns({one.name: number for number, one in enumerate(deployments)})
        self.numbers: Final = {one.name: number for number, one in enumerate(deployments)}
        self.queues: Final = {one.name: Queue(one.name, self.kernel, self._demand) for one in deployments}
        self.slugs: Final[dict[str, str]] = {}
        self.servers: Final[dict[str, Server]] = {}
        self.workers: Final[dict[str, Worker]] = {}
        self.leader: Leader | None = None
        self.stored: Final[dict[str, StoredCheckpoint]] = {}  # what the object store has, by checkpoint id
        self.of_url: Final[dict[str, str]] = {}
        self.record_interval_s: Final = rules_record_interval_s
        self.dispatch_s: Final = 4 * self.bus.way_s
        self.open: Final[collections.deque[Request]] = collections.deque()  # by arrival
        self.open_count = 0
        self.accesses: Final = (array("d"), array("i"), array("i"), array("b"))
        self.loads: Final[list[Load]] = []
        self.measured: Final[list[tuple[float, float]]] = []  # startups as estimated, and as they were
        self.cache: str = "dram"  # what stays on a server after a load: "dram", "ssd" or "" (baselines)
        self.replica_failures = 0.0
        self._migrations = 0
        self._checks = 0
        self._limit_armed = False

    # -- requests

    def arrive(self, deployment: str, prompt_tokens: int, output_tokens: int) -> None:
        """A request comes to a gateway."""
        now = self.kernel.now
        request = Request(self.columns.open(), deployment, prompt_tokens, max(1, output_tokens), now)
        self.counters.requests += 1
        self.open_count += 1
        queue = self.queues[deployment]
        if queue.outstanding >= self.models[deployment].queue_limit:
            self._close(request, Outcome.REFUSED)
            return
        queue.outstanding += 1
        self.open.append(request)
        if not self._limit_armed:
            self._arm_limit()
        queue.push(request)

    def _demand(self, deployment: str, waiting: int, oldest_s: float) -> None:
        """A gateway tells the scheduler of demand."""
        leader = self.leader
        if leader is not None and not self.bus.tell(lambda: leader.demand(deployment, waiting, oldest_s)):
            self.counters.hints_lost += 1

    def ended_well(self, request: Request) -> None:
        """Its last token has been sent."""
        replica = request.replica
        assert replica is not None
        replica.finished += 1
        replica.generated += request.output_tokens
        self._over(request, Outcome.COMPLETE)

    def _over(self, request: Request, outcome: Outcome) -> None:
        if request.migration is not None:
            request.migration.request_over()
        queue = self.queues[request.deployment]
        queue.outstanding -= 1
        self._close(request, outcome)
        if request.waiting:
            queue.gone()
        if request.replica is not None:
            request.replica.release(request, self.kernel.now)

    def _close(self, request: Request, outcome: Outcome) -> None:
        request.ended = True
        self.open_count -= 1
        self.columns.close(request, outcome, self.kernel.now)

    def park(self, request: Request) -> None:
        """It goes back to its queue with its tokens, before the others."""
        if not request.ended:
            request.parks += 1
            self.counters.parks += 1
            request.waits_since = self.kernel.now
            self.queues[request.deployment].put_back(request)

    def recover(self, request: Request) -> None:
        """Its worker has died: a gateway finds out, and puts it back to its queue."""
        if request.ended:
            return
        request.recoveries += 1
        self.counters.recoveries += 1
        request.waits_since = self.kernel.now
        if request.recoveries > self.options.most_recoveries:
            self._over(request, Outcome.FAILED)
            return
        self.kernel.after(FOUND_LOST_S * self.dice.random(), lambda: self._requeue(request))

    def _requeue(self, request: Request) -> None:
        if not request.ended:
            self.queues[request.deployment].put_back(request)

    def _arm_limit(self) -> None:
        while self.open and self.open[0].ended:
            self.open.popleft()
        self._limit_armed = bool(self.open)
        if self.open:
            self.kernel.at(self.open[0].arrived_s + self.options.time_limit_s, self._expire)

    def _expire(self) -> None:
        due = self.kernel.now - self.options.time_limit_s + 1e-9
        while self.open and (self.open[0].ended or self.open[0].arrived_s <= due):
            request = self.open.popleft()
            if not request.ended:
                self._over(request, Outcome.TIMED_OUT)
        self._arm_limit()

    # -- what the scheduler looks at and hears

    def _hinted(self, kind: str, id: str, deleted: bool) -> None:
        leader = self.leader
        if leader is not None:
            self.bus.tell(lambda: leader.record_changed(kind, id, deleted))

    def queues_read(self, asked_at: float) -> scheduler.Event:
        """The depths of all queues that have any."""
        depths = {self.slugs[name]: queue.outstanding for name, queue in self.queues.items() if queue.outstanding}
        return scheduler.QueuesRead(depths, asked_at)

    def staleness_s(self) -> float:
        """How late a look is answered, beyond what it takes."""
        return self.faults.stale_s * self.dice.random() if self.bus.lost or self.bus.late else 0.0

    def deployment_written(self, record: DeploymentRecord) -> None:
        """Gateways end what waits for a model that cannot be loaded."""
        if record.failure is not None:
            queue = self.queues[record.spec.name]
            while queue.waiting:
                request = queue.waiting.popleft()
                if not request.ended:
                    self._over(request, Outcome.FAILED)

    def load_failed(self, message: ReplicaFailed) -> None:
        """A worker says that a load has failed."""
        self.counters.failed_loads += 1
        leader = self.leader
        if leader is not None:
            self.bus.tell(lambda: leader.replica_failed(message))

    def migrated(self, message: MigrationEnded) -> None:
        """A source says how a migration ended."""
        self.counters.migration_rounds += message.rounds
        if message.outcome is MigrationOutcome.COMMITTED:
            self.counters.moves_committed += 1
        elif message.outcome is MigrationOutcome.ABORTED:
            self.counters.moves_aborted += 1
        leader = self.leader
        if leader is not None:
            self.bus.tell(lambda: leader.migration_ended(message))

    # -- loads

    def accessed(self, server: Server, message: LoadReplica) -> None:
        """A load asks a store for its bytes."""
        at_s, servers, deployments, hits = self.accesses
        at_s.append(self.kernel.now)
        servers.append(server.number)
        deployments.append(self.numbers[message.deployment])
        hits.append(server.store.in_dram(message.checkpoint_id))

    def loaded(self, replica: Replica, told: ReplicaLoaded) -> None:
        """A replica is ready, and its worker says what that took."""
        leader = self.leader
        if leader is not None:
            self.bus.tell(lambda: leader.replica_loaded(told))
        times, counters = replica.times, self.counters
        counters.loads[times.tier] = counters.loads.get(times.tier, 0) + 1
        server = replica.worker.server
        self.loads.append(
            Load(
                at_s=times.commanded_at,
                server=server.number,
                deployment=self.numbers[replica.message.deployment],
                tier=times.tier,
                total_s=times.ready_at - times.commanded_at,
            )
        )
        if self.cache != "dram":
            server.store.evict(replica.message.checkpoint_id, "dram" if self.cache == "ssd" else "ssd")

    def load_fails(self) -> bool:
        """By dice, whether a load that has its bytes fails all the same."""
        return self.replica_failures > 0 and self.dice.random() < self.replica_failures

    def stored_of(self, source: Source, checkpoint_id: str) -> StoredCheckpoint | None:
        """What the object store, or a peer, has of this source."""
        return self.stored.get(checkpoint_id or self.of_url.get(source.url, ""))

    def peer_of(self, server: Server, checkpoint_id: str) -> Server | None:
        """The server that has this checkpoint and serves the fewest, if it is a faster way than the object store."""
        if not self.hardware.peers:
            return None
        best: tuple[int, int] | None = None
        found: Server | None = None
        for other in self.servers.values():
            if other is not server and other.alive and other.store.holds(checkpoint_id):
                rank = (len(other.network.flows), other.number)
                if best is None or rank < best:
                    best, found = rank, other
        return found

    def labelled(self, record: ServerRecord, labels: Mapping[str, str]) -> ServerRecord:
        """The operator's labels are the store's settings, not its core's."""
        return msgspec.structs.replace(record, labels=dict(labels))

    # -- small things

    def migration_id(self) -> str:
        """One that no migration ever had."""
        self._migrations += 1
        return f"m{self._migrations}"

    def checked(self, core: Checked) -> None:
        """Now and then every invariant of a core is asserted."""
        every = self.options.check_every
        if every:
            self._checks += 1
            if self._checks % every == 0:
                core.check()
