"""Builders of pictures: valid records by default, sizes in MiB, seconds as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared.contracts.records import (
    DeploymentRecord,
    DeploymentSpec,
    DeploymentState,
    Phase,
    ReplicaRecord,
    ReplicaState,
    ServerRecord,
    WorkerRecord,
)
from shared.contracts.residency import Checkpoint, Source
from shared.slug import slug

MIB = 2**20


def checkpoint(id: str = "ck-m", *, weights: float = 100, kv: float = 10) -> Checkpoint:
    """A checkpoint whose replicas (one slot, 16 tokens of context) need `kv` MiB of KV cache."""
    return Checkpoint(
        checkpoint_id=id,
        architecture="LlamaForCausalLM",
        weight_bytes=int(weights * MIB),
        parameters=int(weights * MIB) // 2,
        dtype="bfloat16",
        max_context_tokens=16,
        kv_bytes_per_token=int(kv * MIB) // 16,
        vocab_tokens=1000,
        has_chat_template=True,
    )


def spec(name: str = "m", *, url: str = "", **fields: object) -> DeploymentSpec:
    """A spec with one request per replica."""
    values: dict[str, object] = {"target_concurrency": 1, **fields}
    return DeploymentSpec(name=name, source=Source(url=url or f"/models/{name}"), **values)  # type: ignore[arg-type]


def deployment(
    of: DeploymentSpec, facts: Checkpoint | None = None, state: DeploymentState = DeploymentState.READY
) -> DeploymentRecord:
    """A registered deployment."""
    from services.scheduler.deployments import revision_of

    return DeploymentRecord(
        spec=of, slug=slug(of.name), revision=revision_of(of), state=state, created_at_s=1.0, checkpoint=facts
    )


def server(
    id: str = "a",
    *,
    pool: float = 1000,
    leased: float = 0,
    dram: Mapping[str, float] | None = None,
    ssd: Mapping[str, float] | None = None,
    ssd_free: float = 10_000,
    loads: int = 0,
    phase: Phase = Phase.READY,
    chunk: float = 0,
    quarantined: Sequence[str] = (),
) -> ServerRecord:
    """A server; `dram` and `ssd` map checkpoint ids to MiB, `quarantined` are ids."""
    return ServerRecord(
        server_id=id,
        phase=phase,
        host="localhost",
        pid=1,
        dram_capacity_bytes=int(pool * MIB),
        dram_used_bytes=0,
        leased_bytes=int(leased * MIB),
        ssd_capacity_bytes=int(ssd_free * MIB),
        ssd_used_bytes=0,
        dram={key: int(value * MIB) for key, value in (dram or {}).items()},
        ssd={key: int(value * MIB) for key, value in (ssd or {}).items()},
        loads=loads,
        chunk_bytes=int(chunk * MIB),
        quarantined=dict.fromkeys(quarantined, "2 chunks differ from their checksums and cannot be fetched again"),
    )


def worker(
    id: str = "a0",
    *,
    on: str = "",
    memory: float = 500,
    max_replicas: int = 8,
    device: str = "cpu",
    phase: Phase = Phase.READY,
) -> WorkerRecord:
    """A worker on the server of its first letter."""
    return WorkerRecord(
        worker_id=id,
        server_id=on or id[0],
        phase=phase,
        pid=1,
        device=device,
        device_name=device,
        memory_total_bytes=int(memory * MIB),
        memory_used_bytes=0,
        max_replicas=max_replicas,
    )


def replica(
    id: str,
    of: DeploymentRecord,
    on: str = "a0",
    *,
    state: ReplicaState = ReplicaState.READY,
    running: int = 0,
    idle_s: float = 0.0,
    memory: float = 0,
    finished: int = 0,
    revision: str = "",
) -> ReplicaRecord:
    """A replica on a worker, of the deployment's present revision."""
    return ReplicaRecord(
        replica_id=id,
        worker_id=on,
        server_id=on[0],
        deployment=of.spec.name,
        revision=revision or of.revision,
        checkpoint_id=of.checkpoint.checkpoint_id if of.checkpoint is not None else "",
        state=state,
        slots=of.spec.target_concurrency,
        running=running,
        idle_s=idle_s,
        memory_bytes=int(memory * MIB),
        finished_requests=finished,
    )
