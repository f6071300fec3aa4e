"""A whole modelled cluster: gateways, workers with replicas, the work queue, clients, and somebody who commands them.

What a run does to it stands in `scenario`. `settle` and `check_over` are the end of every run: the faults cease, time
passes, and nothing may be left over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from services.gateway.core import Config
from services.worker.run import Limits
from shared.contracts.migration import Drain, Migrate, MigrationEnded
from shared.contracts.placement import LoadReplica
from shared.contracts.records import ReplicaState
from shared.contracts.requests import Request
from shared.contracts.residency import Source
from shared.errors import Code, Failure
from shared.subjects import DRAIN, LOAD, MIGRATE, Endpoint
from simulator.clients import Clients, Outcome
from simulator.engine import Speeds
from simulator.gateway import ModelGateway
from simulator.kernel import Kernel
from simulator.network import Connection, Network, Weather
from simulator.queue import WorkQueue
from simulator.store import MAX_CONTEXT_TOKENS, ModelStore, checkpoint
from simulator.worker import ModelWorker

COMMANDER: Final = "commander"
REPLICA_MEMORY_BYTES: Final = 100
# After the end of the last stream: what a dead gateway has left in the queue is tried a few times by the workers.
CLEARED_S: Final = 400.0
QUIET_S: Final = 12.0  # and after that, the slowest timer (a destination whose source is silent) clears away


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Seconds and counts of a modelled cluster; those of the settings' defaults unless a run says otherwise."""

    ack_wait_s: float = 5.0
    max_deliveries: int = 5
    slots: int = 2
    kv_tokens: int = 1000
    lease_ttl_s: float = 15.0
    drain_s: float = 30.0
    hold_s: float = 2.0
    gateway_lost_s: float = 5.0
    check_s: float = 0.5
    lost_after_s: float = 3.0
    budget_s: float = 3000.0  # so long that nothing but a fault would use it up


class Cluster:
    """See the module. Names: "g0", "w0", … are ids; the connection of life n of "w0" is "w0#n"."""

    def __init__(self, kernel: Kernel, weather: Weather, shape: Shape) -> None:
        self.kernel: Final = kernel
        self.shape: Final = shape
        self.network: Final = Network(kernel, weather)
        self.queue: Final = WorkQueue(kernel, ack_wait_s=shape.ack_wait_s)
        self.store: Final = ModelStore()
        self.clients: Final = Clients(kernel)
        self.gateways: dict[str, ModelGateway] = {}
        self.workers: dict[str, ModelWorker] = {}
        self.losses = 0  # faults that may cost a request an owner
        self._lives: dict[str, int] = {}
        self._speeds: dict[str, Speeds] = {}
        self.struck: Callable[[str], None] = lambda worker_id: None  # hears whom a poisonous request has killed
        self._replicas = 0
        self._migrations_ended: list[MigrationEnded] = []
        self._calls = 0
        self._commander: Final[Connection] = self.network.connect(COMMANDER, lambda call: call())

    # -- who is there

    def add_gateway(self, gateway_id: str) -> ModelGateway:
        """A gateway begins to live, for the first time or again."""
        config = Config(max_deliveries=self.shape.max_deliveries)
        gateway = ModelGateway(
            self.kernel,
            self.network,
            self.queue,
            self.clients,
            name=self._life(gateway_id),
            gateway_id=gateway_id,
            config=config,
        )
        self.gateways[gateway_id] = gateway
        return gateway

    def add_worker(self, worker_id: str, speeds: Speeds) -> ModelWorker:
        """A worker begins to live, for the first time or again; empty."""
        shape = self.shape
        limits = Limits(
            worker_id=worker_id,
            server_id="s0",
            memory_total_bytes=3 * REPLICA_MEMORY_BYTES,
            weights_on_device=False,
            max_replicas=3,
            lease_ttl_s=shape.lease_ttl_s,
            ack_wait_s=shape.ack_wait_s,
            max_deliveries=shape.max_deliveries,
            drain_s=shape.drain_s,
            kv_bytes_max=REPLICA_MEMORY_BYTES,
            hold_s=shape.hold_s,
            gateway_lost_s=shape.gateway_lost_s,
        )
        self._speeds[worker_id] = speeds
        worker = ModelWorker(
            self.kernel,
            self.network,
            self.queue,
            self.store,
            name=self._life(worker_id),
            limits=limits,
            speeds=speeds,
            kv_tokens=shape.kv_tokens,
            heard=self.clients.spoken,
            migrated=self._migrations_ended.append,
            struck=lambda: self._strike(worker_id),
        )
        self.workers[worker_id] = worker
        return worker

    def _life(self, id: str) -> str:
        self._lives[id] = self._lives.get(id, 0) + 1
        return f"{id}#{self._lives[id]}"

    # -- commands

    def load(self, worker_id: str, deployment: str) -> str:
        """Command a replica of a deployment; its id."""
        self._replicas += 1
        message = LoadReplica(
            replica_id=f"r{self._replicas}-{worker_id}",
            deployment=deployment,
            slug=deployment,
            revision="v1",
            checkpoint_id=f"checkpoint-{deployment}",
            source=Source(url="/model"),
            slots=self.shape.slots,
            max_context_tokens=MAX_CONTEXT_TOKENS,
            kv_bytes=REPLICA_MEMORY_BYTES,
            checkpoint=checkpoint(f"checkpoint-{deployment}"),
        )
        self.command(LOAD, message, worker_id=worker_id)
        return message.replica_id

    def migrate(self, message: Migrate, worker_id: str) -> None:
        """Command a source to begin migrations."""
        self.command(MIGRATE, message, worker_id=worker_id)

    def command(self, endpoint: Endpoint[Any, Any], message: Any, *, worker_id: str) -> None:
        """Ask a worker for something. Nobody waits for the answer: what it did shows in what it is."""

        def answered(answer: Any, unserved: bool) -> None:
            if isinstance(answer, Failure):
                self.kernel.note(COMMANDER, f"is refused: {answer.code.value}: {answer.message}")

        self._commander.call(endpoint, message, answered, worker_id=worker_id)

    def drain_on(self, worker_id: str, on: bool) -> None:
        """The operator's drain, or its end."""
        self.command(DRAIN, Drain(on=on), worker_id=worker_id)

    def call(self, gateway_id: str, deployment: str, *requests: Request, budget_s: float | None = None) -> str:
        """A client calls; the call's id."""
        self._calls += 1
        call_id = f"c{self._calls}"
        gateway = self.gateways[gateway_id]
        gateway.call(call_id, deployment, requests, budget_s=self.shape.budget_s if budget_s is None else budget_s)
        return call_id

    def ready(self, deployment: str) -> list[tuple[str, str]]:
        """(worker id, replica id) of the replicas of a deployment that answer."""
        return [
            (worker_id, replica.id)
            for worker_id, worker in self.workers.items()
            if worker.process.alive
            for replica in worker.core.replicas.values()
            if replica.message.deployment == deployment and replica.state is ReplicaState.READY
        ]

    # -- faults

    def kill_worker(self, worker_id: str) -> None:
        """kill -9."""
        self.losses += 1
        self.workers[worker_id].die()
        self.network.mend(self.workers[worker_id].name)

    def _strike(self, worker_id: str) -> None:
        self.kill_worker(worker_id)
        self.struck(worker_id)

    def leave_worker(self, worker_id: str) -> None:
        """A drained process ends."""
        self.workers[worker_id].die()

    def kill_gateway(self, gateway_id: str) -> None:
        """kill -9."""
        self.gateways[gateway_id].die()
        self.network.mend(self.gateways[gateway_id].name)

    def kill_engines(self, worker_id: str, failure: Failure) -> None:
        """Every engine thread of a worker fails."""
        self.losses += 1
        for engine in list(self.workers[worker_id].engines.values()):
            engine.die(failure)

    # -- the end

    def settle(self, deployments: tuple[str, ...]) -> None:
        """The faults have ceased. Time passes until nothing is left to do, or should not be; every deployment is given
        a replica that answers."""
        kernel = self.kernel
        until = kernel.now + self.shape.budget_s + 60.0
        while kernel.now < until and self._open():
            self._replace(deployments)
            kernel.run(kernel.now + 1.0)
        until = kernel.now + CLEARED_S
        while kernel.now < until and self._busy():
            self._replace(deployments)
            kernel.run(kernel.now + 1.0)
        kernel.run(kernel.now + QUIET_S)

    def _busy(self) -> bool:
        living = [worker for worker in self.workers.values() if worker.process.alive]
        return bool(self.queue.left) or any(worker.core.runs for worker in living)

    @property
    def migrations_ended(self) -> list[MigrationEnded]:
        """Every migration that has ended, as its source told."""
        return self._migrations_ended

    @property
    def everybody(self) -> list[ModelWorker | ModelGateway]:
        """The latest life of every worker and gateway."""
        return [*self.workers.values(), *self.gateways.values()]

    def _open(self) -> bool:
        return any(stream.outcome is Outcome.OPEN for stream in self.clients.streams.values())

    def _replace(self, deployments: tuple[str, ...]) -> None:
        for deployment in deployments:
            replicas = [
                replica
                for worker in self.workers.values()
                if worker.process.alive
                for replica in worker.core.replicas.values()
                if replica.message.deployment == deployment and replica.state is not ReplicaState.DRAINING
            ]
            if replicas:
                continue
            for worker_id, worker in self.workers.items():
                if worker.process.alive and not worker.core.draining:
                    self.load(worker_id, deployment)
                    break

    def check_over(self) -> None:
        """Assert that every stream ended as it may, and that nothing is left of it anywhere."""
        for id, stream in self.clients.streams.items():
            if stream.outcome is Outcome.FAILED:
                assert stream.failure is not None
                code = stream.failure.code
                # Only who has really lost that many owners may be told so.
                guilty = code is Code.WORKER_LOST and self.losses >= self.shape.max_deliveries
                never = code is Code.UNAVAILABLE and self.clients.unserved(stream.call_id)
                late = code is Code.DEADLINE_EXCEEDED and stream.budget_s < self.shape.budget_s
                assert guilty or never or late, f"{id} fails: {stream.failure}"
            assert stream.outcome is not Outcome.OPEN, f"{id} never ends"
        for gateway in self.gateways.values():
            if gateway.process.alive:
                assert gateway.core.open_requests == 0, f"{gateway.name} has open requests"
        for worker in self.workers.values():
            if worker.process.alive:
                self._check_idle(worker)
        assert self.queue.left == (), f"left in the queue: {self.queue.left}"

    def _check_idle(self, worker: ModelWorker) -> None:
        core = worker.core
        assert not core.runs, f"{worker.name} still has {list(core.runs)}"
        for replica in core.replicas.values():
            assert not replica.held, f"{worker.name} still holds slots: {list(replica.held)}"
        for replica_id, engine in worker.engines.items():
            assert not engine.live, f"{worker.name}: {replica_id} still works on {engine.live}"
        leases = [lease_id for lease_id, holder in self.store.leases.items() if holder == worker.name]
        assert len(leases) == sum(replica.leased for replica in core.replicas.values()), f"{worker.name}: {leases}"

    def end(self) -> None:
        """Drain every worker; assert that each lets everything go."""
        living = [worker for worker in self.workers.values() if worker.process.alive]
        for worker in living:
            worker.drain()
        self.kernel.run(self.kernel.now + 5.0)
        for worker in living:
            assert worker.drained, f"{worker.name} does not get drained"
            assert not worker.core.replicas, f"{worker.name} keeps replicas"
        assert not self.store.leases, f"leases are left: {self.store.leases}"
