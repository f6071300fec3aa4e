"""The plan of `hearth up`: which processes, with which command lines and environments, in which order.

Nothing is started here; what can be found wrong beforehand is found here and said in one sentence.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from services.cli import servers
from shared.settings import SERVICES, SettingsError, load
from shared.sizes import size

MOST_DRAM_BYTES: Final = 2**30
LEAST_DRAM_BYTES: Final = 64 * 2**20
# Beyond the pools themselves, the shared-memory filesystem should keep room for others.
SHM_SLACK: Final = 1.1
# Set per process by the plan, so what stands in the user's environment must not reach all of them at once.
SET_BY_PLAN: Final = frozenset(
    {
        "HEARTH_NATS_URL", "HEARTH_REDIS_URL", "HEARTH_GATEWAY_ID", "HEARTH_SCHEDULER_ID", "HEARTH_WORKER_ID",
        "HEARTH_SERVER_ID", "HEARTH_STORE_DIR", "HEARTH_SHM_DIR", "HEARTH_DRAM_BYTES", "HEARTH_SSD_BYTES",
        "HEARTH_HTTP_HOST", "HEARTH_HTTP_PORT", "HEARTH_LOG_FORMAT", "HEARTH_METRICS_PORT", "HEARTH_KEEP_POOL",
        "HEARTH_PEER_HOST", "HEARTH_PEER_PORT", "HEARTH_PEER_URL", "HEARTH_PEER_TOKEN", "HEARTH_PEER_TOKEN_FILE",
    }
)  # fmt: skip
# Of these, the ones that `up` takes from the environment after all, or that make no difference.
USED_BY_PLAN: Final = frozenset(
    {"HEARTH_NATS_URL", "HEARTH_REDIS_URL", "HEARTH_LOG_FORMAT", "HEARTH_PEER_TOKEN", "HEARTH_PEER_TOKEN_FILE"}
)
PEER_TOKEN_BYTES: Final = 32
CUDA_CONTROL: Final = Path("/dev/nvidiactl")  # there where NVIDIA's driver is


class UpError(Exception):
    """The cluster cannot be started, or not go on; the text is a sentence or two for a person."""


@dataclass(frozen=True)
class Wish:
    """What was asked for on the command line. Ports of None: any free one; sizes of None: a modest default."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8080
    servers: int = 1
    workers_per_server: int = 1
    schedulers: int = 1
    dram_bytes: int | None = None
    ssd_bytes: int | None = None
    nats_port: int | None = None
    redis_port: int | None = None


@dataclass(frozen=True)
class ChildPlan:
    """One process. `kind` is "nats", "redis" or a service; `plain` ones print no log records of ours."""

    name: str
    kind: str
    command: list[str]
    environment: dict[str, str]
    plain: bool = False


@dataclass(frozen=True)
class Plan:
    """The whole cluster. `infrastructure` must answer before `services` are started; `notes` are worth telling."""

    wish: Wish
    url: str
    nats_url: str
    redis_url: str
    infrastructure: list[ChildPlan]
    services: list[ChildPlan]
    shm_dir: Path
    directories: list[Path]
    dram_bytes: int
    notes: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        """Make the directories that the services expect. Raises `UpError`."""
        try:
            for path in self.directories:
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UpError(f"{error.filename} cannot be made ({error.strerror}).") from error

    @property
    def logs(self) -> Path:
        """Where every child's complete output is kept."""
        return self.wish.data_dir / "logs"


class DataDir:
    """The data directory, held by at most one `hearth up` at a time (the kernel frees it when that one dies)."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "logs").mkdir(exist_ok=True)
            self._lock = os.open(self.path / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UpError(
                f"{self.path} cannot be used as data directory ({(error.strerror or str(error)).lower()}); "
                "choose another with --data-dir."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UpError(
                f"{self.path} is in use by another `hearth up`; stop that one, or choose another with --data-dir."
            ) from error

    def close(self) -> None:
        """Let others have it."""
        os.close(self._lock)


def memory_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or less in a container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def dram_default(memory: int, server_count: int) -> int:
    """Bytes of each server's DRAM tier: all servers together take an eighth of memory, each at most 1 GiB."""
    share = memory // 8 // server_count
    return max(LEAST_DRAM_BYTES, min(MOST_DRAM_BYTES, share // 2**20 * 2**20))


def worker_memory_default(memory: int, worker_count: int) -> int:
    """Bytes for replicas of each worker on the CPU: an eighth of memory, all workers together at most a quarter."""
    return memory // 4 // max(2, worker_count)


def _ssd_share(data_dir: Path, server_count: int) -> int:
    """Bytes of each server's SSD tier: all of them together nine tenths of what is free or theirs already."""
    home = data_dir / "servers"
    held = sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) if home.is_dir() else 0
    return (shutil.disk_usage(data_dir).free + held) * 9 // 10 // server_count


def check_port(host: str, port: int, option: str) -> None:
    """Raises `UpError` if nobody could listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UpError(f"{host} is no address of this machine ({error.strerror}).") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError as error:
            raise UpError(f"Port {port} needs rights that you do not have; choose another with {option}.") from error
        except OSError as error:
            raise UpError(
                f"Port {port} on {host} is taken by another program; choose another with {option}."
                if error.errno == 98 or "in use" in str(error)
                else f"Nobody can listen on {host} port {port}: {error.strerror}."
            ) from error


def _shm(data_dir: Path, needed_bytes: int, notes: list[str]) -> Path:
    """A directory of this cluster's own for the DRAM pools: on the shared-memory filesystem if that has the room."""
    mark = hashlib.sha256(str(data_dir).encode()).hexdigest()[:8]
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK):
        shutil.rmtree(memory / f"hearth-{mark}", ignore_errors=True)  # left by an `up` that was killed
        if shutil.disk_usage(memory).free >= needed_bytes * SHM_SLACK:
            return memory / f"hearth-{mark}"
        notes.append(
            f"/dev/shm has no room for {size(needed_bytes)}: the DRAM tier lies in files below {data_dir}, "
            "which is slower (a larger /dev/shm or a smaller --dram changes that)"
        )
    return data_dir / "shm"


def make(wish: Wish, programs: Mapping[str, servers.Program], environ: Mapping[str, str]) -> Plan:
    """The plan. `programs` are the servers to start ("nats-server", "redis-server"); for others `environ` has the URL.

    Raises `UpError` for a taken port or settings that a service would refuse.
    """
    check_port(wish.host, wish.port, "--port")
    notes: list[str] = []
    if ignored := sorted(name for name in SET_BY_PLAN - USED_BY_PLAN if environ.get(name)):
        notes.append(
            f"{', '.join(ignored)} {'does' if len(ignored) == 1 else 'do'} not count here: `hearth up` sets such "
            "things for each service; its own options are --dram, --ssd, --host and --port"
        )
    infrastructure: list[ChildPlan] = []
    # What is nobody else's program's business.
    outside = {name: value for name, value in environ.items() if not name.startswith("HEARTH_")}
    nats_url, redis_url = environ.get("HEARTH_NATS_URL", ""), environ.get("HEARTH_REDIS_URL", "")
    if program := programs.get("nats-server"):
        if wish.nats_port:
            check_port("127.0.0.1", wish.nats_port, "--nats-port")
        port = wish.nats_port or servers.free_port()
        nats_url = f"nats://127.0.0.1:{port}"
        command = servers.nats_command(program, port, wish.data_dir / "nats")
        infrastructure.append(ChildPlan("nats", "nats", command, {**outside, **program.environment()}, plain=True))
    if program := programs.get("redis-server"):
        if wish.redis_port:
            check_port("127.0.0.1", wish.redis_port, "--redis-port")
        port = wish.redis_port or servers.free_port()
        redis_url = f"redis://127.0.0.1:{port}/0"
        command = servers.redis_command(program, port, wish.data_dir / "redis")
        infrastructure.append(ChildPlan("redis", "redis", command, {**outside, **program.environment()}, plain=True))

    dram_bytes = wish.dram_bytes or dram_default(memory_bytes(), wish.servers)
    shm_dir = _shm(wish.data_dir, dram_bytes * wish.servers, notes)
    workers = wish.servers * wish.workers_per_server
    base = {name: value for name, value in environ.items() if name not in SET_BY_PLAN}
    base |= {"HEARTH_NATS_URL": nats_url, "HEARTH_REDIS_URL": redis_url, "HEARTH_LOG_FORMAT": "json"}
    base.setdefault("HEARTH_TORCH_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    if environ.get("HEARTH_DEVICE") == "cpu" or not CUDA_CONTROL.exists():
        base.setdefault("HEARTH_WORKER_MEMORY_BYTES", str(worker_memory_default(memory_bytes(), workers)))
    # Python's own buffering would hold lines back that are no log records, such as a crash of the interpreter.
    base["PYTHONUNBUFFERED"] = "1"

    children: list[ChildPlan] = []
    directories: list[Path] = []
    # One server alone takes what its store takes by default; several must not count the same disk several times.
    ssd_bytes = wish.ssd_bytes or (0 if wish.servers == 1 else _ssd_share(wish.data_dir, wish.servers))

    def add(kind: str, name: str, **settings: str) -> None:
        environment = {**base, **{f"HEARTH_{key.upper()}": value for key, value in settings.items()}}
        try:
            load(SERVICES[kind], {key: value for key, value in environment.items() if key.startswith("HEARTH_")})
        except SettingsError as error:
            raise UpError(f"{error}. (`hearth settings` lists every variable.)") from error
        children.append(ChildPlan(name, kind, [sys.executable, "-P", "-m", "services", kind], environment))

    # Only the stores hear it, and by their environment: the command line of a process is everybody's to read.
    secret = {
        name.removeprefix("HEARTH_").lower(): environ[name]
        for name in ("HEARTH_PEER_TOKEN", "HEARTH_PEER_TOKEN_FILE")
        if environ.get(name)
    } or {"peer_token": secrets.token_hex(PEER_TOKEN_BYTES)}
    worker = 0
    for number in range(1, wish.servers + 1):
        server = f"server-{number}"
        home = wish.data_dir / "servers" / server
        # A pool outlives its store while the cluster runs (a store that is killed finds it again), not the cluster.
        store = {"server_id": server, "store_dir": str(home / "store"), "shm_dir": str(shm_dir / server)}
        store |= {"keep_pool": "0", **secret}
        if ssd_bytes:
            store["ssd_bytes"] = str(ssd_bytes)
        directories += [home / "store", shm_dir / server]
        add("store", server, dram_bytes=str(dram_bytes), **store)
        for _ in range(wish.workers_per_server):
            worker += 1
            add("worker", f"worker-{worker}", worker_id=f"worker-{worker}", server_id=server)
    for number in range(1, wish.schedulers + 1):
        add("scheduler", "scheduler" if number == 1 else f"scheduler-{number}", scheduler_id=f"scheduler-{number}")
    add("gateway", "gateway", gateway_id="gateway-1", http_host=wish.host, http_port=str(wish.port))

    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(wish.host, f"[{wish.host}]" if ":" in wish.host else wish.host)
    return Plan(
        wish=wish,
        url=f"http://{shown}:{wish.port}",
        nats_url=nats_url,
        redis_url=redis_url,
        infrastructure=infrastructure,
        services=children,
        shm_dir=shm_dir,
        directories=directories,
        dram_bytes=dram_bytes,
        notes=notes,
    )
