"""The words of a fleet: hardware, deployments, arrivals, faults and what a run may be told besides. Pure; no behaviour.

Bytes, tokens and seconds of virtual time. A bandwidth is bytes per second of one resource; whoever uses it at the same
time shares it evenly.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A model as one kind of device runs it.

    The prefill of n tokens takes `prefill_s + n · prefill_token_s`. A decode step of b requests takes
    `step_s + (b - 1) · step_request_s` and makes one token for each. `attach_s` is what attaching takes besides the
    bytes (skeleton, engine). `weight_bytes` are those of the checkpoint, on one device or spread over several.
    """

    name: str
    weight_bytes: int
    kv_bytes_per_token: int
    prefill_token_s: float
    step_s: float
    prefill_s: float = 0.0
    step_request_s: float = 0.0
    attach_s: float = 0.1
    max_context_tokens: int = 2048
    architecture: str = "OPTForCausalLM"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A deployment: a name, what it runs, and the operator's wishes (see `contracts.records.DeploymentSpec`).

    Deployments with the same `checkpoint_id` share a checkpoint ("": its own).
    """

    name: str
    model: ModelProfile
    checkpoint_id: str = ""
    min_replicas: int = 0
    max_replicas: int = 1
    target_concurrency: int = 16
    keep_alive_s: float = 60.0
    adaptive_keep_alive: bool = False
    queue_limit: int = 1_000_000
    priority: int = 0
    devices: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerShape:
    """One kind of server. Each device is one worker. `network_bytes_per_s` is its NIC, which remote and peer share.

    On a device that is not "cpu" weights are copied from DRAM, at `device_bytes_per_s` for each device, while they
    arrive there: the slowest tier on the way counts. `ssd_read_bytes_per_s` is shared by what is read at once.
    """

    devices: int
    device_memory_bytes: int
    dram_bytes: int
    ssd_bytes: int
    ssd_bytes_per_s: float
    network_bytes_per_s: float
    device_bytes_per_s: float = 20e9
    device: str = "cuda"
    device_name: str = "modelled"
    max_replicas_per_device: int = 1
    chunk_bytes: int = 64 * 2**20
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The machines, and what is between them.

    `remote_bytes_per_s` is what the object store gives to one fetch (and `remote_total_bytes_per_s` to all together, 0:
    no bound). With `peers`, a server that lacks a checkpoint fetches it from one that has it, through both NICs.
    `bus_s` is the way of a message from one process to another, `bus_jitter_s` comes to it at most. `record_s` is what
    writing or reading a record of the registry takes. `cold_ssd`: no checkpoint is on any server's SSD at the start;
    otherwise they are laid out over the servers, `ssd_copies` of each (0: as many as there is room for).
    """

    servers: tuple[ServerShape, ...]
    remote_bytes_per_s: float = 1.25e9
    remote_total_bytes_per_s: float = 0.0
    remote_latency_s: float = 0.05
    peers: bool = True
    bus_s: float = 0.0005
    bus_jitter_s: float = 0.0005
    record_s: float = 0.0005
    heartbeat_s: float = 1.0
    record_ttl_s: float = 3.0
    gateways: int = 1
    cold_ssd: bool = False
    ssd_copies: int = 0

    @property
    def devices(self) -> int:
        """Devices of all servers."""
        return sum(one.devices for one in self.servers)


class Arrival(NamedTuple):
    """A request comes at second `at_s`; arrivals come in the order of their time."""

    at_s: float
    deployment: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong, by the seed of the run. Rates are faults per hour of virtual time over the whole fleet.

    `lost` and `late` are the parts of messages (hints, commands, answers) that are lost, or late by up to `late_s`.
    A process that crashes is back after `back_s`. `redis_away_per_h` and `bus_away_per_h`: for `away_s` seconds.
    `leader_per_h` is how often the leading scheduler dies; the standby takes over after `takeover_s`. `stale_s`: looks
    at the registry show what was true up to so long ago. After `until_s` nothing goes wrong any more (0: to the last
    arrival).
    """

    workers_per_h: float = 0.0
    servers_per_h: float = 0.0
    leader_per_h: float = 0.0
    redis_away_per_h: float = 0.0
    replica_failures: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    late_s: float = 2.0
    stale_s: float = 0.0
    back_s: float = 20.0
    away_s: float = 5.0
    takeover_s: float = 1.5
    until_s: float = 0.0


class Policy(enum.StrEnum):
    """Who decides about placements."""

    HEARTH = "hearth"
    NO_MIGRATION = "no_migration"
    NO_PREFETCH = "no_prefetch"
    RANDOM = "random"
    RAY_SERVE = "ray_serve"
    RAY_SERVE_CACHED = "ray_serve_cached"
    SHEPHERD = "shepherd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a run is made. Nothing here is a policy.

    `time_limit_s`: a request that has not ended by then fails. `sample_s` is between two samples of utilisation (0:
    none). `check_every` calls of a core its invariants are checked (0: only at the end). `settle_s` is the longest that
    the fleet may take to be idle and clean after the last request.
    """

    time_limit_s: float = 300.0
    sample_s: float = 10.0
    check_every: int = 0
    settle_s: float = 7200.0
    lease_ttl_s: float = 15.0
    most_recoveries: int = 5
