"""A hint of demand, from the event to its actions: the whole of the scheduler's `Core.handle`, not the decision alone.

The cluster is that of `benchmarks.decision`, made of records: a registry with servers, workers, deployments and
replicas, which the core reads as it does when it begins to lead. Then deployments that have no replica are asked for,
one after the other. What is commanded is carried out at once, and some replicas' records change between two hints;
neither is timed.
"""

from __future__ import annotations

import random
import time
from typing import Any, Final

import msgspec

from benchmarks.decision import CHANGED_WORKERS, GB, STATES, picture
from benchmarks.report import percentile
from services.scheduler.core import Core
from services.scheduler.deployments import revision_of
from services.scheduler.events import (
    Action,
    CommandLoad,
    CommandStop,
    DemandHinted,
    QueuesEnsured,
    QueuesRead,
    RecordHinted,
    RecordRead,
    RegistryRead,
)
from services.scheduler.rules import Rules
from shared.contracts.placement import LoadReplica
from shared.contracts.records import (
    ClusterView,
    DeploymentRecord,
    DeploymentSpec,
    DeploymentState,
    ReplicaRecord,
    ReplicaState,
)
from shared.contracts.residency import Checkpoint, Source
from shared.slug import slug

BETWEEN_S: Final = 0.01


def measure_handling(shape: tuple[int, int, int], state: str, hints: int, seed: int) -> dict[str, Any]:
    """Milliseconds per hint, and what came of them; `neither`: something moves, or it waits."""
    core, view = Core(Rules(), instance="b"), _view(shape, state, seed)
    dice, now = random.Random(seed), 1000.0
    core.handle(None, now)
    began = time.perf_counter()
    core.handle(RegistryRead(view, now), now)
    first_ms = (time.perf_counter() - began) * 1000
    core.handle(QueuesRead({}, now), now)
    core.handle(QueuesEnsured(), now)
    busy = dict.fromkeys(one.deployment for one in view.replicas)
    asked = [one.spec.name for one in view.deployments if one.spec.name not in busy]
    dice.shuffle(asked)
    took, wall, outcomes = list[float](), list[float](), {"loads": 0, "stops": 0, "neither": 0}
    for name in asked[:hints]:
        now += BETWEEN_S
        began, began_wall = time.thread_time(), time.perf_counter()
        out = core.handle(DemandHinted(name, now, "g", 1, 0.0), now)
        took.append((time.thread_time() - began) * 1000)
        wall.append((time.perf_counter() - began_wall) * 1000)
        loads = sum(isinstance(one, CommandLoad) for one in out)
        stops = sum(isinstance(one, CommandStop) for one in out)
        outcomes["loads"] += loads
        outcomes["stops"] += stops
        outcomes["neither"] += not loads and not stops
        _carry_out(core, out, now)
        for id in dice.sample(list(core.cluster.replicas), min(CHANGED_WORKERS, len(core.cluster.replicas))):
            known = core.cluster.replicas[id]
            if known.running:
                core.cluster.put(msgspec.structs.replace(known, running=dice.randint(1, 6)), now)
        core.handle(None, now)  # each of them would have been an event of its own
    return {
        "servers": shape[0], "devices": shape[0] * shape[1], "deployments": shape[2], "state": state,
        "hints": len(took), "median_ms": percentile(took, 50), "p99_ms": percentile(took, 99), "most_ms": max(took),
        "wall_median_ms": percentile(wall, 50), "wall_p99_ms": percentile(wall, 99),
        "first_look_ms": first_ms, "outcomes": outcomes,
    }  # fmt: skip


def _view(shape: tuple[int, int, int], state: str, seed: int) -> ClusterView:
    assert state in STATES
    found = picture(shape, state, seed)
    records: dict[str, DeploymentRecord] = {}
    for name, ask in found.asks.items():
        spec = DeploymentSpec(name=name, source=Source(url=f"s3://models/{name}"))
        records[name] = DeploymentRecord(
            spec=spec, slug=slug(name), revision=revision_of(spec), state=DeploymentState.READY, created_at_s=1.0,
            checkpoint=_checkpoint(ask.need.key, ask.need.weight_bytes), weight_bytes=ask.need.weight_bytes,
        )  # fmt: skip
    replicas = tuple(
        ReplicaRecord(
            replica_id=one.replica_id, worker_id=one.worker_ids[0], server_id=one.server_id, deployment=one.deployment,
            revision=records[one.deployment].revision, checkpoint_id=one.key, state=ReplicaState.READY, slots=16,
            running=one.running, memory_bytes=one.memory_bytes, context_tokens=one.tokens, idle_s=one.idle_s,
            finished_requests=1, left_tokens=200 * one.running, step_s=0.02,
        )
        for _, one in sorted(found.on.items())
    )  # fmt: skip
    return ClusterView(
        servers=tuple(found.servers.values()),
        workers=tuple(found.workers.values()),
        deployments=tuple(records.values()),
        replicas=replicas,
    )


def _checkpoint(key: str, weight_bytes: int) -> Checkpoint:
    return Checkpoint(
        checkpoint_id=key, architecture="LlamaForCausalLM", weight_bytes=weight_bytes, parameters=weight_bytes // 2,
        dtype="bfloat16", max_context_tokens=2048, kv_bytes_per_token=8 * GB // (16 * 2048), vocab_tokens=32_000,
        has_chat_template=True,
    )  # fmt: skip


def _carry_out(core: Core, actions: list[Action], now: float) -> None:
    """Loads are ready and run a request at once; who is to stop is gone, and whoever waited for that is loaded."""
    todo = list(actions)
    while todo:
        action = todo.pop(0)
        if isinstance(action, CommandStop):
            todo += core.handle(RecordHinted("replica", action.message.replica_id, True), now)
        elif isinstance(action, CommandLoad):
            record = _ready(action.message, action.worker_id, core.cluster.workers[action.worker_id].server_id)
            todo += core.handle(RecordHinted("replica", record.replica_id, False), now)
            todo += core.handle(RecordRead("replica", record.replica_id, record), now)


def _ready(message: LoadReplica, worker_id: str, server_id: str) -> ReplicaRecord:
    return ReplicaRecord(
        replica_id=message.replica_id, worker_id=worker_id, server_id=server_id, deployment=message.deployment,
        revision=message.revision, checkpoint_id=message.checkpoint_id, state=ReplicaState.READY, slots=16, running=1,
        memory_bytes=60 * GB, left_tokens=200, step_s=0.02,
    )  # fmt: skip
