"""Records: what the registry (Redis) holds. Each has one writer, an epoch and, but for deployments, a TTL."""

from __future__ import annotations

import enum

import msgspec

from shared.contracts.migration import MigrationInFlight
from shared.contracts.residency import Checkpoint, Progress, Source
from shared.errors import Failure


class Phase(enum.StrEnum):
    """The phases of every service."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class DeploymentState(enum.StrEnum):
    """`importing` requests wait in the queue; `deleting` ones are refused."""

    IMPORTING = "importing"
    READY = "ready"
    DELETING = "deleting"


class ReplicaState(enum.StrEnum):
    """A replica takes requests only while `ready`; `draining` ones finish what they have."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class DeploymentSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an operator asks for. `name` is what clients call the model.

    `target_concurrency` is the number of requests that one replica answers at once; `keep_alive_s` how long an idle
    replica stays, at most that long with `adaptive_keep_alive`, which learns it from the times between requests;
    `max_context_tokens` caps prompt + completion (None: the model's own limit); `queue_limit` bounds the requests
    outstanding (waiting or running); `lazy` leaves the import to the first request.

    Where resources are short, deployments of higher `priority` are served first. A replica takes `devices` devices of
    one server, and only of servers and workers that carry all of `labels`.
    """

    name: str
    source: Source
    min_replicas: int = 0
    max_replicas: int = 1
    target_concurrency: int = 16
    keep_alive_s: float = 60.0
    max_context_tokens: int | None = None
    queue_limit: int = 1024
    lazy: bool = False
    adaptive_keep_alive: bool = False
    priority: int = 0
    devices: int = 1
    labels: dict[str, str] = {}


class DeploymentRecord(msgspec.Struct, frozen=True, kw_only=True, tag="deployment_record", omit_defaults=True):
    """A deployment; persistent, written by the scheduler only.

    `slug` names its queue (`[A-Za-z0-9_-]+`). `revision` is a hash of what the replicas depend on: a replica of another
    revision is never given work. `checkpoint` is None until the first import has ended;
    `weight_bytes` is what inspecting the source found (0: unknown). `failure` is set while the model cannot be loaded:
    gateways end waiting requests with it and answer new ones with it until it is cleared.
    """

    spec: DeploymentSpec
    slug: str
    revision: str
    state: DeploymentState
    created_at_s: float
    checkpoint: Checkpoint | None = None
    weight_bytes: int = 0
    failure: Failure | None = None
    epoch: int = 0


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True, tag="server_record", omit_defaults=True):
    """A server as its store sees it. Residency maps checkpoint id → bytes present and verified in that tier.

    The DRAM pool is given out in whole chunks of `chunk_bytes` (0: unknown); `dram_used_bytes` and `leased_bytes`, the
    bytes that cannot be evicted now, count such chunks. `loads` are the loads queued or running, `load_queue_bytes`
    what they have yet to move and `load_drain_s` the seconds that this will take (None: unknown). The bandwidths, SSD
    → DRAM, remote → here and peer → here, are measured from real transfers, None before the first one.

    `dram_arriving` and `ssd_arriving` map a checkpoint on its way to the bytes of it that have arrived. `pinned` maps
    to the tier, `quarantined` to the reason. `segment` is the pool's path, for workers to map ahead of need; `peer_url`
    where other stores fetch chunks ("": nowhere). `labels` are the operator's, for deployments to choose by.

    `ssd_queue` and `import_queue` are the loads that users wait for: checkpoint id (of an import "import-N" while it is
    unknown) → bytes that have yet to be read from the SSD, or to be brought here. Those of one queue are carried out
    one after another, in this order.
    """

    server_id: str
    phase: Phase
    host: str
    pid: int
    dram_capacity_bytes: int
    dram_used_bytes: int
    leased_bytes: int
    ssd_capacity_bytes: int
    ssd_used_bytes: int
    dram: dict[str, int] = {}
    ssd: dict[str, int] = {}
    loads: int = 0
    ssd_bytes_per_s: float | None = None
    remote_bytes_per_s: float | None = None
    epoch: int = 0
    chunk_bytes: int = 0
    peer_bytes_per_s: float | None = None
    dram_arriving: dict[str, int] = {}
    ssd_arriving: dict[str, int] = {}
    load_queue_bytes: int = 0
    load_drain_s: float | None = None
    pinned: dict[str, str] = {}
    quarantined: dict[str, str] = {}
    segment: str = ""
    peer_url: str = ""
    labels: dict[str, str] = {}
    ssd_queue: dict[str, int] = {}
    import_queue: dict[str, int] = {}


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True, tag="worker_record", omit_defaults=True):
    """A worker and its device.

    Memory is what replicas can use: on CUDA parameters + KV cache, on the CPU the KV cache. `migrations` are those that
    leave this worker now (the first 64); `incoming` counts those that arrive. `labels` are the operator's. With `gangs`
    its engine can run a replica together with other workers of its server.
    """

    worker_id: str
    server_id: str
    phase: Phase
    pid: int
    device: str
    device_name: str
    memory_total_bytes: int
    memory_used_bytes: int
    max_replicas: int
    epoch: int = 0
    migrations: tuple[MigrationInFlight, ...] = ()
    incoming: int = 0
    labels: dict[str, str] = {}
    gangs: bool = False


class ReplicaRecord(msgspec.Struct, frozen=True, kw_only=True, tag="replica_record", omit_defaults=True):
    """A replica, written by its worker. `idle_s` is the time since its last request ended (0 while one runs).

    `slots` is how many requests it runs at once; `load` how far it is while `loading`. Of the `finished_requests`
    `cut_requests` ended before they were through: cancelled by their clients, or failed. It runs on `worker_id` and, if
    it takes several devices, on `peer_worker_ids`.

    What moving or awaiting its requests would cost: `context_tokens` and `output_tokens` are those of all requests
    that run now (prompt and output; output alone), `left_tokens` the most that any of them may still generate by its
    own limit, `step_s` a decode step and `prefill_token_s` the prefill of one token as measured (None: not yet).
    """

    replica_id: str
    worker_id: str
    server_id: str
    deployment: str
    revision: str
    checkpoint_id: str
    state: ReplicaState
    slots: int
    running: int = 0
    idle_s: float = 0.0
    memory_bytes: int = 0
    finished_requests: int = 0
    generated_tokens: int = 0
    engine: str = ""
    load: Progress | None = None
    epoch: int = 0
    peer_worker_ids: tuple[str, ...] = ()
    context_tokens: int = 0
    output_tokens: int = 0
    left_tokens: int = 0
    step_s: float | None = None
    prefill_token_s: float | None = None
    cut_requests: int = 0


class GatewayRecord(msgspec.Struct, frozen=True, kw_only=True, tag="gateway_record", omit_defaults=True):
    """A gateway and where it listens."""

    gateway_id: str
    phase: Phase
    url: str
    pid: int
    open_requests: int = 0
    epoch: int = 0


class SchedulerRecord(msgspec.Struct, frozen=True, kw_only=True, tag="scheduler_record", omit_defaults=True):
    """A scheduler. The one that leads has a `term` > 0, which its commands carry; the others stand by."""

    scheduler_id: str
    phase: Phase
    pid: int
    epoch: int = 0
    term: int = 0


Record = DeploymentRecord | ServerRecord | WorkerRecord | ReplicaRecord | GatewayRecord | SchedulerRecord


class ClusterView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything that the registry says at one moment; what `hearth ps --json` and `GET /v1/admin/cluster` show.

    `queue_depths` maps a deployment's name to its requests outstanding (waiting or running).
    """

    servers: tuple[ServerRecord, ...] = ()
    workers: tuple[WorkerRecord, ...] = ()
    replicas: tuple[ReplicaRecord, ...] = ()
    deployments: tuple[DeploymentRecord, ...] = ()
    gateways: tuple[GatewayRecord, ...] = ()
    schedulers: tuple[SchedulerRecord, ...] = ()
    queue_depths: dict[str, int] = {}
