"""One run of a fleet: who is there at the start, what arrives, how it ends, and what it was."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from services.scheduler.rules import Rules
from services.store.events import StoredCheckpoint
from shared.contracts.records import DeploymentRecord, DeploymentSpec, DeploymentState, ReplicaState
from shared.contracts.residency import Checkpoint, Source
from shared.errors import Code, HearthError
from shared.slug import slug
from simulator.fleet.leader import Leader
from simulator.fleet.model import Arrival, Faults, Hardware, ModelSpec, Options, Policy
from simulator.fleet.policies import core_of, prepared
from simulator.fleet.report import Accesses, Report, Utilisation
from simulator.fleet.server import Server
from simulator.fleet.trouble import Trouble
from simulator.fleet.worker import Worker
from simulator.fleet.world import World

STEP_S: Final = 1.0  # between two looks at whether a run is over


class Fleet:
    """A run is a function of its arguments. `rules` are the scheduler's (None: its own).

    Raises `HearthError` (invalid_request) for hardware or deployments that contradict themselves.
    """

    def __init__(
        self,
        hardware: Hardware,
        deployments: Sequence[ModelSpec],
        arrivals: Iterable[Arrival],
        *,
        policy: str = Policy.HEARTH,
        seed: int = 0,
        faults: Faults | None = None,
        rules: Rules | None = None,
        options: Options | None = None,
    ) -> None:
        _validate(hardware, deployments, policy)
        self.policy: Final = Policy(policy)
        self.seed: Final = seed
        hardware, cache = prepared(self.policy, hardware)
        self._rules: Final = rules or Rules()
        self._faults: Final = faults
        self._arrivals: Final[Iterator[Arrival]] = iter(arrivals)
        self._more = True
        self._terms = 0
        self._last_at = 0.0
        self._samples: Final[tuple[list[Any], ...]] = ([], [], [], [])
        self.world: Final = World(hardware, deployments, options or Options(), faults or Faults(), random.Random(seed))
        self.world.cache = cache
        self._furnish()

    # -- the start

    def _furnish(self) -> None:
        world = self.world
        for name, spec in world.models.items():
            record = _record(spec)
            world.registry.deployments[name] = record
            world.slugs[name] = record.slug
            stored = _stored(spec, record, world.hardware.servers[0].chunk_bytes)
            world.stored[stored.id] = stored
            world.of_url[record.spec.source.url] = stored.id
        for number, shape in enumerate(world.hardware.servers):
            server = Server(world, f"s{number:04d}", number, shape)
            world.servers[server.id] = server
            for device in range(shape.devices):
                worker = Worker(world, server, f"{server.id}-d{device}", len(world.workers))
                world.workers[worker.id] = worker
                server.workers.append(worker)
        for server, there in zip(world.servers.values(), self._layout(), strict=True):
            server.start(tuple(there))
        for worker in world.workers.values():
            worker.start()

    def _layout(self) -> list[list[StoredCheckpoint]]:
        """Which checkpoints are on whose SSD at the start: a copy of each in turn, as long as there is room."""
        hardware = self.world.hardware
        there: list[list[StoredCheckpoint]] = [[] for _ in hardware.servers]
        if hardware.cold_ssd:
            return there
        free = [shape.ssd_bytes for shape in hardware.servers]
        count = len(free)
        for copy in range(min(count, hardware.ssd_copies or count)):
            for number, stored in enumerate(self.world.stored.values()):
                at = (number + copy) % count
                if stored.stored_bytes <= free[at]:
                    free[at] -= stored.stored_bytes
                    there[at].append(stored)
        return there

    def _lead(self) -> None:
        """A scheduler begins to lead: with nothing but what the registry says."""
        self._terms += 1
        core = core_of(self.policy, self._rules, self._terms, self.world.dice)
        self.world.leader = Leader(self.world, core, self._terms)
        self.world.leader.begin()

    # -- the run

    def run(self) -> Report:
        """Live through all of it. Raises AssertionError where an invariant breaks."""
        world, kernel = self.world, self.world.kernel
        self._lead()
        self._next_arrival()
        if self._faults is not None:
            until_s = self._faults.until_s or max(self._last_at, 600.0)
            Trouble(world, self._lead, until_s).begin()
        if world.options.sample_s:
            self._sample()
        while self._more or world.open_count:
            kernel.run(kernel.now + STEP_S)
        served_at = kernel.now
        self._settle()
        return self._report(served_at)

    def _next_arrival(self) -> None:
        one = next(self._arrivals, None)
        if one is None:
            self._more = False
            return
        if one.deployment not in self.world.models:
            raise HearthError(Code.INVALID_REQUEST, f"A request for {one.deployment!r}, which is not deployed.")
        self._last_at = max(self._last_at, one.at_s)
        self.world.kernel.at(self._last_at, lambda: self._arrived(one))

    def _arrived(self, one: Arrival) -> None:
        self.world.arrive(one.deployment, one.prompt_tokens, one.output_tokens)
        self._next_arrival()

    def _sample(self) -> None:
        world = self.world
        at_s, rows, waiting, running = self._samples
        row = bytearray(len(world.workers))
        busy = 0
        for worker in world.workers.values():
            state = 0
            for replica in (*worker.replicas.values(), *worker.guests.values()):
                now = 3 if replica.held else 1 if replica.state is ReplicaState.LOADING else 2
                state = max(state, now)
            row[worker.number] = state
            busy += sum(len(replica.held) for replica in worker.replicas.values())
        at_s.append(world.kernel.now)
        rows.append(bytes(row))
        running.append(busy)
        waiting.append(world.open_count - busy)
        if self._more or world.open_count:
            world.kernel.after(world.options.sample_s, self._sample)

    # -- the end

    def _settle(self) -> None:
        """Everything that is still there goes, in its time."""
        world, kernel = self.world, self.world.kernel
        until = kernel.now + world.options.settle_s
        while kernel.now < until:
            if not self._unclean():
                self._check()
                return
            kernel.run(kernel.now + STEP_S)
        raise AssertionError(f"The fleet is not clean after {world.options.settle_s:.0f} s: {self._unclean()}")

    def _unclean(self) -> str:
        """What is still there that should not be; "" if nothing is."""
        world, leader = self.world, self.world.leader
        if leader is None or not leader.oriented or world.bus.lost or world.bus.late or world.registry.away:
            return "trouble"
        for worker in world.workers.values():
            if not worker.alive:
                return f"worker {worker.id} is down"
            if worker.departures:
                return f"migrations leave {worker.id}"
            for replica in worker.replicas.values():
                spec = world.models[replica.message.deployment]
                if not spec.min_replicas:
                    return f"replica {replica.id} is {replica.state.value} on {worker.id}"
        for server in world.servers.values():
            if not server.alive or not server.store.idle:
                return f"the store of {server.id} is not idle"
        cluster = leader.core.cluster
        for name, pending in (("loads", cluster.loads), ("stops", cluster.stops), ("rooms", cluster.rooms)):
            if pending:
                return f"the scheduler has {name}: {sorted(pending)}"
        return ""

    def _check(self) -> None:
        world = self.world
        assert not world.columns.open_rows(), f"requests never ended: {world.columns.open_rows()[:10]}"
        for name, queue in world.queues.items():
            assert queue.outstanding == 0, f"{name}: {queue.outstanding} outstanding at the end"
        for server in world.servers.values():
            server.store.core.check()
            assert not server.network.flows and not server.disk.flows, f"bytes move on {server.id} at the end"
        assert world.leader is not None
        world.leader.core.check()

    def _report(self, served_at: float) -> Report:
        world = self.world
        world.counters.events = world.kernel.happened
        world.counters.evictions = world.counters.notes.get("placement.evicted", 0)
        ledgers = world.columns.ledgers()
        at_s, rows, waiting, running = self._samples
        state = np.frombuffer(b"".join(rows), dtype=np.int8).reshape(len(rows), len(world.workers))
        accessed: tuple[array[Any], ...] = world.accesses
        return Report(
            policy=self.policy.value,
            seed=self.seed,
            deployments=tuple(world.models),
            servers=tuple(world.servers),
            ledgers=ledgers,
            counters=world.counters,
            accesses=Accesses(
                np.array(accessed[0]),
                np.array(accessed[1], dtype=np.int32),
                np.array(accessed[2], dtype=np.int32),
                np.array(accessed[3], dtype=np.bool_),
            ),
            utilisation=Utilisation(
                np.array(at_s), state, np.array(waiting, dtype=np.int32), np.array(running, dtype=np.int32)
            ),
            loads=tuple(world.loads),
            estimates=np.array(world.measured, dtype=np.float64).reshape(-1, 2),
            virtual_s=served_at,
            digest=ledgers.digest(),
        )


def _validate(hardware: Hardware, deployments: Sequence[ModelSpec], policy: str) -> None:
    if policy not in tuple(Policy):
        names = ", ".join(Policy)
        raise HearthError(Code.INVALID_REQUEST, f"{policy!r} is no policy; there are {names}.")
    if not hardware.servers or not deployments:
        raise HearthError(Code.INVALID_REQUEST, "A fleet needs at least one server and one deployment.")
    if len({one.chunk_bytes for one in hardware.servers}) > 1:
        raise HearthError(Code.INVALID_REQUEST, "All servers of a fleet have chunks of one size.")
    names_ = [one.name for one in deployments]
    if len(frozenset(names_)) < len(names_):
        raise HearthError(Code.INVALID_REQUEST, "Two deployments have the same name.")
    for shape in hardware.servers:
        if min(shape.ssd_bytes_per_s, shape.network_bytes_per_s, shape.device_bytes_per_s) <= 0:
            raise HearthError(Code.INVALID_REQUEST, "A bandwidth must be positive.")
        if shape.dram_bytes < shape.chunk_bytes:
            raise HearthError(Code.INVALID_REQUEST, "A DRAM pool holds at least one chunk.")
    for one in deployments:
        if one.model.weight_bytes <= 0 or one.model.step_s <= 0 or one.model.prefill_token_s <= 0:
            raise HearthError(Code.INVALID_REQUEST, f"{one.name}: a model has bytes and takes time.")


def _record(spec: ModelSpec) -> DeploymentRecord:
    id = spec.checkpoint_id or f"c-{slug(spec.name)}"
    return DeploymentRecord(
        spec=DeploymentSpec(
            name=spec.name,
            source=Source(url=f"/checkpoints/{id}"),
            min_replicas=spec.min_replicas,
            max_replicas=spec.max_replicas,
            target_concurrency=spec.target_concurrency,
            keep_alive_s=spec.keep_alive_s,
            adaptive_keep_alive=spec.adaptive_keep_alive,
            priority=spec.priority,
            devices=spec.devices,
            labels=dict(spec.labels),
            queue_limit=spec.queue_limit,
        ),
        slug=slug(spec.name),
        revision="r1",
        state=DeploymentState.READY,
        created_at_s=0.0,
        checkpoint=Checkpoint(
            checkpoint_id=id,
            architecture=spec.model.architecture,
            weight_bytes=spec.model.weight_bytes,
            parameters=spec.model.weight_bytes // 2,
            dtype="float16",
            max_context_tokens=spec.model.max_context_tokens,
            kv_bytes_per_token=spec.model.kv_bytes_per_token,
            vocab_tokens=50272,
            has_chat_template=False,
        ),
        weight_bytes=spec.model.weight_bytes,
    )


def _stored(spec: ModelSpec, record: DeploymentRecord, chunk_bytes: int) -> StoredCheckpoint:
    assert record.checkpoint is not None
    id = record.checkpoint.checkpoint_id
    return StoredCheckpoint(
        checkpoint=record.checkpoint,
        directory=f"/ssd/{id}",
        stored_bytes=spec.model.weight_bytes,
        image_bytes=spec.model.weight_bytes,
        source=record.spec.source,
        revision="r1",
        chunk_bytes=chunk_bytes,
    )
