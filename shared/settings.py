"""Every environment variable that Hearth reads, in one place, with unit and default.

A variable is `HEARTH_` + the field's name in capitals; bytes may be written as 4096, 512MiB or 2GB. A malformed value,
or a `HEARTH_` variable that nobody knows, is a start-up error: a typo must not silently mean the default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from shared.errors import HearthError
from shared.labels import parse_labels

PREFIX: Final = "HEARTH_"
S = TypeVar("S", bound="CommonSettings")

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Fraction = Annotated[float, msgspec.Meta(gt=0, le=1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Id = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{0,64}$")]


def _doc(text: str) -> Any:
    return msgspec.Meta(description=text)


class SettingsError(ValueError):
    """The environment does not describe valid settings; the text names every fault."""


class CommonSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every service reads."""

    nats_url: Annotated[str, _doc("NATS server with JetStream")] = "nats://127.0.0.1:4222"
    redis_url: Annotated[str, _doc("Redis server of the registry")] = "redis://127.0.0.1:6379/0"
    prefix: Annotated[Id, _doc("put before every subject and key; separates clusters that share servers")] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _doc("debug, info, warning or error")] = "info"
    log_format: Annotated[
        Literal["auto", "json", "console"], _doc("auto (console on a terminal, else json), json or console")
    ] = "auto"
    metrics_port: Annotated[Port, _doc("port of /metrics on services without HTTP of their own; 0: none")] = 0
    metrics_host: Annotated[str, _doc("address of /metrics on services without HTTP of their own")] = "127.0.0.1"
    heartbeat_s: Annotated[Seconds, _doc("seconds between refreshes of a record")] = 0.7
    record_ttl_s: Annotated[Seconds, _doc("seconds after which a record without heartbeat is gone")] = 2.2
    start_wait_s: Annotated[Seconds, _doc("seconds that a service waits at its start for NATS, and for Redis")] = 30.0
    drain_s: Annotated[Seconds, _doc("seconds that running requests get at shutdown to move away or to end")] = 30.0
    ack_wait_s: Annotated[Seconds, _doc("seconds after which the queue gives a silent worker's request to another")] = (
        5.0
    )
    max_deliveries: Annotated[
        Count, _doc("workers that one request may lose, shortly after it came to them, before it fails")
    ] = 5

    @property
    def own_id(self) -> str:
        """The id that the operator gave to this service, or ""."""
        return ""


class GatewaySettings(CommonSettings, frozen=True, kw_only=True):
    """`hearth gateway`."""

    gateway_id: Annotated[Id, _doc("id of this gateway; empty: made up at start")] = ""
    http_host: Annotated[str, _doc("address to listen on")] = "127.0.0.1"
    http_port: Annotated[Port, _doc("port to listen on; 0: any free one")] = 8080
    api_keys: Annotated[str, _doc("comma-separated keys of which a client must present one; empty: open")] = ""
    request_budget_s: Annotated[Seconds, _doc("seconds that a request may take, cold start included")] = 600.0
    hold_headers_s: Annotated[Seconds, _doc("seconds that a stream's headers wait for an early failure")] = 0.25
    max_body_bytes: Annotated[Bytes, _doc("largest request body in bytes")] = 4 * 2**20
    max_open_requests: Annotated[Count, _doc("requests open at once in this gateway")] = 10_000
    max_choices: Annotated[Count, _doc("largest n × prompts of one call")] = 16
    check_s: Annotated[
        Seconds, _doc("seconds of silence after which a worker is asked whether it still runs a request")
    ] = 0.5
    lost_after_s: Annotated[Seconds, _doc("seconds after which a worker that does not answer is held for lost")] = 3.0
    stream_buffer_bytes: Annotated[Bytes, _doc("bytes kept for a client that reads slowly, then it is dropped")] = (
        4 * 2**20
    )

    @property
    def own_id(self) -> str:
        """The id that the operator gave to this service, or ""."""
        return self.gateway_id


class SchedulerSettings(CommonSettings, frozen=True, kw_only=True):
    """`hearth scheduler`."""

    scheduler_id: Annotated[Id, _doc("id of this scheduler; empty: made up at start")] = ""
    queue_limit: Annotated[Count, _doc("requests outstanding per deployment over all gateways")] = 4096
    look_interval_s: Annotated[Seconds, _doc("seconds between looks at the registry and the queues")] = 0.75
    leader_ttl_s: Annotated[
        Seconds, _doc("seconds after which the lease of a leader that does not renew it passes to a standby")
    ] = 1.5
    leader_renew_s: Annotated[
        Seconds, _doc("seconds between two renewals of the lease, and between two looks of a standby at it")
    ] = 0.4
    leader_margin_s: Annotated[
        Seconds, _doc("seconds before its lease ends at which a leader that could not renew it stops to command")
    ] = 0.3
    command_timeout_s: Annotated[Seconds, _doc("seconds after which a command without visible effect is forgotten")] = (
        10.0
    )
    kv_bytes_max: Annotated[Bytes, _doc("largest KV cache of one replica in bytes (one full context always fits)")] = (
        256 * 2**20
    )

    start_within_s: Annotated[
        float,
        msgspec.Meta(ge=0),
        _doc("seconds within which the oldest request of a deployment starts, whatever others do; 0: no promise"),
    ] = 60.0
    tenure_s: Annotated[Seconds, _doc("seconds for which a ready replica is not parked for another deployment")] = 5.0
    migrate_for_placement: Annotated[bool, _doc("move running requests to make room for other models")] = True
    prefetch_bytes_per_s: Annotated[
        float,
        msgspec.Meta(ge=0),
        _doc("bytes per second that one server may move ahead of demand, on average; 0: nothing is prefetched"),
    ] = 100e6
    fill_bytes_per_s: Annotated[
        float,
        msgspec.Meta(ge=0),
        _doc("bytes per second that one server may read from its SSD into free DRAM while nobody waits, on average"),
    ] = 1e9

    @property
    def own_id(self) -> str:
        """The id that the operator gave to this service, or ""."""
        return self.scheduler_id


class WorkerSettings(CommonSettings, frozen=True, kw_only=True):
    """`hearth worker`."""

    worker_id: Annotated[Id, _doc("id of this worker; empty: made up at start")] = ""
    server_id: Annotated[Id, _doc("id of the server whose store this worker uses")] = "server-1"
    device: Annotated[str, _doc("auto, cpu, cuda or cuda:N")] = "auto"
    worker_memory_bytes: Annotated[Bytes, _doc("bytes for replicas; 0: 1/8 of DRAM on the CPU, 0.9 of a free GPU")] = 0
    worker_max_replicas: Annotated[Count, _doc("replicas attached at once")] = 8
    torch_threads: Annotated[int, msgspec.Meta(ge=0), _doc("threads of one torch operation; 0: torch's default")] = 0
    lease_ttl_s: Annotated[Seconds, _doc("seconds that a lease outlives its last renewal")] = 15.0
    hold_s: Annotated[Seconds, _doc("seconds between two reports to a gateway on what runs for it")] = 2.0
    gateway_lost_s: Annotated[
        Seconds,
        _doc("seconds after which a gateway that does not answer is held for lost, and its requests are dropped"),
    ] = 5.0
    engine_stall_s: Annotated[Seconds, _doc("seconds after which a step that does not end ends the worker")] = 120.0
    engine: Annotated[str, _doc("auto, batching, sequential, or null (costs nothing, for benchmarks)")] = "auto"
    kv_bytes_max: Annotated[Bytes, _doc("largest KV cache of one replica in bytes (one full context always fits)")] = (
        256 * 2**20
    )
    labels: Annotated[str, _doc("labels that deployments may choose this worker by, such as gpu=a40,zone=b")] = ""

    @property
    def own_id(self) -> str:
        """The id that the operator gave to this service, or ""."""
        return self.worker_id


class StoreSettings(CommonSettings, frozen=True, kw_only=True):
    """`hearth store`."""

    server_id: Annotated[Id, _doc("id of this server")] = "server-1"
    store_dir: Annotated[str, _doc("directory of the SSD tier")] = ".hearth/store"
    shm_dir: Annotated[str, _doc("directory of the DRAM pool's shared-memory file (a tmpfs)")] = "/dev/shm"
    dram_bytes: Annotated[Bytes, _doc("size of the DRAM pool in bytes; 0: 1/8 of memory, at most 1 GiB")] = 0
    ssd_bytes: Annotated[Bytes, _doc("capacity of the SSD tier in bytes; 0: 9/10 of what is free at start")] = 0
    chunk_bytes: Annotated[Count, _doc("bytes of a chunk, the unit of I/O; a multiple of 4096")] = 16 * 2**20
    io_threads: Annotated[
        int, msgspec.Meta(ge=0, le=64), _doc("threads that read chunks; 0: what was fastest when the disk was measured")
    ] = 0
    io_block_bytes: Annotated[
        Bytes, _doc("bytes of one direct read, a multiple of 4096; 0: what was fastest when the disk was measured")
    ] = 0
    verify_loads: Annotated[bool, _doc("verify checksums when loading from SSD (always done on arrival)")] = True
    scrub_interval_s: Annotated[
        float, msgspec.Meta(ge=0), _doc("seconds within which every stored checkpoint is read and verified; 0: never")
    ] = 7 * 86400.0
    scrub_bytes_per_s: Annotated[Count, _doc("most bytes per second that scrubbing reads")] = 50 * 10**6
    keep_pool: Annotated[bool, _doc("leave the DRAM pool behind at the end, for the next life of this store")] = True
    dram_high: Annotated[Fraction, _doc("part of the DRAM pool above which checkpoints are evicted ahead of need")] = (
        1.0
    )
    dram_low: Annotated[Fraction, _doc("part of the DRAM pool down to which they are then evicted")] = 1.0
    ssd_high: Annotated[Fraction, _doc("part of the SSD tier above which checkpoints are evicted ahead of need")] = 0.95
    ssd_low: Annotated[Fraction, _doc("part of the SSD tier down to which they are then evicted")] = 0.9
    sources: Annotated[
        str, _doc("comma-separated patterns of the sources that may be imported, such as /models/*,s3://bucket/*,hf:*")
    ] = "/*,hf:*,s3://*,gs://*,az://*"
    max_checkpoint_bytes: Annotated[
        Bytes, _doc("largest checkpoint that is imported, in bytes; 0: what the tier holds")
    ] = 0
    remote_config: Annotated[
        str, _doc("JSON file that maps the beginning of a url to options of its object store; empty: environment only")
    ] = ""
    fetch_connections: Annotated[Count, _doc("ranges that are fetched at once from remote sources and peers")] = 8
    peer_host: Annotated[str, _doc("address on which this store serves chunks to other stores")] = "127.0.0.1"
    peer_port: Annotated[Port, _doc("port on which this store serves chunks to other stores; 0: any free one")] = 0
    peer_url: Annotated[str, _doc("where other stores reach this one; empty: http:// with the two above")] = ""
    peer_token: Annotated[str, _doc("secret that the stores of a cluster share; empty: chunks are not served")] = ""
    peer_token_file: Annotated[str, _doc("file that holds the secret, instead of the variable")] = ""
    labels: Annotated[str, _doc("labels that deployments may choose this server by, such as gpu=a40,zone=b")] = ""

    @property
    def own_id(self) -> str:
        """The id that the operator gave to this service, or ""."""
        return self.server_id


SERVICES: Final[dict[str, type[CommonSettings]]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "worker": WorkerSettings,
    "store": StoreSettings,
}

# Read by the command line (`services/cli`), so that `hearth up` in the same shell is no start-up error of a service.
CLI_VARIABLES: Final[dict[str, str]] = {
    "HEARTH_URL": "the gateway that the command line talks to; default http://127.0.0.1:8080",
    "HEARTH_API_KEY": "the key that the command line presents to the gateway",
    "HEARTH_DATA_DIR": "where `hearth up` keeps its data; default .hearth",
}

# Read by `compose.yaml` when it is brought up; known here so that they may stand in the same shell.
COMPOSE_VARIABLES: Final[dict[str, str]] = {
    "HEARTH_IMAGE": "name of the image that compose.yaml builds and runs; default hearth:local",
    "HEARTH_WHEELS": "a directory of wheels for the build of the image, such as a CPU build of torch",
    "HEARTH_BIND": "address at which compose.yaml publishes the HTTP API; default 127.0.0.1",
    "HEARTH_PORT": "port at which compose.yaml publishes the HTTP API; default 8080",
}


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


def fields(kind: type[CommonSettings]) -> Iterator[tuple[str, Any, str]]:
    """(variable, default, description) of every setting of a service."""
    hints = get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        yield variable(field.name), field.default, _description(hints[field.name])


def _description(hint: Any) -> str:
    found = ""
    for part in get_args(hint) if get_origin(hint) is Annotated else ():
        if isinstance(part, msgspec.Meta) and part.description:
            found = part.description
    return found


def known_variables() -> set[str]:
    """Every variable that some part of Hearth reads."""
    services = {name for kind in SERVICES.values() for name, _, _ in fields(kind)}
    return services | set(CLI_VARIABLES) | set(COMPOSE_VARIABLES)


def load(kind: type[S], environ: Mapping[str, str] | None = None) -> S:
    """The settings of a service from the environment.

    Raises `SettingsError` naming every unknown or malformed variable.
    """
    environ = os.environ if environ is None else environ
    faults = [
        f"{name} is not a setting of Hearth"
        for name in sorted(environ)
        if name.startswith(PREFIX) and name not in known_variables()
    ]
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        raw = environ.get(variable(field.name))
        if raw is None:
            continue
        try:
            given = parse_size(raw) if field.name.endswith("_bytes") else raw
            values[field.name] = msgspec.convert(given, field.type, strict=False)
            if field.name == "labels":
                parse_labels(raw)
        except (msgspec.ValidationError, SettingsError, HearthError) as error:
            faults.append(f"{variable(field.name)}={raw!r} is malformed: {error}")
    if faults:
        raise SettingsError("; ".join(faults))
    return kind(**values)


_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "2G", "1.5 TB" or "4096": binary with an i or without B, decimal as in "MB".

    Raises `SettingsError`.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is no size; write for instance 512MiB or 2GiB")
    number, letter, binary = match.groups()
    base = 1024 if binary or not text.strip().upper().endswith("B") else 1000
    return int(float(number) * base ** " KMGT".index(letter.upper() or " "))
