"""A whole Hearth on loopback: real processes of all four services over real servers, for e2e tests and benchmarks."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.builders.network import Link, Network
from tests.builders.servers import free_port
from tests.builders.warden import Warden

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20


class Cluster:
    """Scheduler, `gateways`, `servers` stores and `workers` workers each, as child processes. Use as a context manager.

    `env` adds settings for all services; `home` gets the stores' directories and one log file per service. With a
    `network` every service has a link of its own in `links`. A `warden` ends them should the test itself be killed.
    `urls` are the gateways'; calls go to the first one, `url`, unless they say otherwise.
    """

    def __init__(
        self,
        home: Path,
        *,
        nats_url: str,
        redis_url: str,
        servers: int = 1,
        workers: int = 1,
        gateways: int = 1,
        schedulers: int = 1,
        dram_bytes: int = 256 * MIB,
        env: dict[str, str] | None = None,
        network: Network | None = None,
        warden: Warden | None = None,
    ) -> None:
        self.home = home
        self.nats_url = nats_url
        self.redis_url = redis_url
        self.links: dict[str, Link] = {}
        self.urls: dict[str, str] = {}
        self._network = network
        self._warden = warden
        self.port = free_port()
        self.prefix = f"e{secrets.token_hex(4)}"
        self._env = (
            {key: value for key, value in os.environ.items() if not key.startswith("HEARTH_")}
            | {
                "HEARTH_NATS_URL": nats_url,
                "HEARTH_REDIS_URL": redis_url,
                "HEARTH_PREFIX": self.prefix,
                "HEARTH_LOG_FORMAT": "json",
                "HEARTH_DRAM_BYTES": str(dram_bytes),
                "HEARTH_TORCH_THREADS": "1",
                "HEARTH_IO_THREADS": "4",  # no test waits for the disk to be measured
                "HEARTH_IO_BLOCK_BYTES": str(16 * MIB),
                "PYTHONPATH": str(ROOT),
            }
            | (env or {})
        )
        self.services: dict[str, tuple[str, dict[str, str]]] = {
            id: ("scheduler", {"HEARTH_SCHEDULER_ID": id})
            for id in ("scheduler", *(f"scheduler-{number}" for number in range(2, schedulers + 1)))
        }
        for server in range(1, servers + 1):
            store = home / f"server-{server}"
            self.services[f"server-{server}"] = (
                "store",
                {"HEARTH_SERVER_ID": f"server-{server}", "HEARTH_STORE_DIR": str(store)},
            )
            for worker in range(1, workers + 1):
                id = f"worker-{server}-{worker}"
                self.services[id] = ("worker", {"HEARTH_SERVER_ID": f"server-{server}", "HEARTH_WORKER_ID": id})
        for number in range(1, gateways + 1):
            id = "gateway" if number == 1 else f"gateway-{number}"
            port = self.port if number == 1 else free_port()
            host = "127.0.0.1"
            if network is not None:
                self.links[id] = network.link(front=True)
                host = self.links[id].host
            env_of = {"HEARTH_GATEWAY_ID": id, "HEARTH_HTTP_PORT": str(port), "HEARTH_HTTP_HOST": host}
            self.services[id] = ("gateway", env_of)
            self.urls[id] = f"http://{host}:{port}"
        self.url = self.urls["gateway"]
        if network is not None:
            for name in self.services.keys() - self.links.keys():
                self.links[name] = network.link()
        if warden is not None:
            warden.remove("find", "/dev/shm", "-maxdepth", "1", "-name", f"hearth-{self.prefix}-*", "-delete")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start (again) one service."""
        service, env = self.services[name]
        command = [sys.executable, "-m", "services", service]
        link = self.links.get(name)
        if link is not None:
            env = link.env(self.nats_url, self.redis_url) | env
            command = [*link.command, *command]
        with (self.home / f"{name}.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(command, env=self._env | env, stdout=out, stderr=subprocess.STDOUT)
        if self._warden is not None:
            self._warden.guard(self.processes[name])

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to one service."""
        self.processes[name].send_signal(number)

    def stop(self, name: str, timeout_s: float = 120.0) -> int:
        """End one service in order; its exit code."""
        self.kill(name, signal.SIGTERM)
        return self.processes[name].wait(timeout_s)

    def log(self, name: str) -> str:
        """What a service has logged."""
        path = self.home / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def __enter__(self) -> Self:
        self.home.mkdir(parents=True, exist_ok=True)
        try:
            for name in self.services:
                self.start(name)
            self.until(self.ready, "the cluster is ready", 240)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kinds = ["gateway", "worker", "store", "scheduler", "redis", "nats"]
        for link in self.links.values():
            link.heal()
        for name in sorted(self.processes, key=lambda name: kinds.index(self.services[name][0])):
            process = self.processes[name]
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        for left in Path("/dev/shm").glob(f"hearth-{self.prefix}-*"):  # pools outlive their stores, for the next ones
            left.unlink(missing_ok=True)

    def ready(self) -> bool:
        """Every service runs and is ready. Raises RuntimeError with the log of one that has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{self.log(name)[-3000:]}")
        status, view = self.get("/v1/admin/cluster")
        if status != 200:
            return False
        wanted = [service for service, _ in self.services.values()]
        ready = [worker for worker in view.get("workers", []) if worker["phase"] == "ready"]
        stores = [server for server in view.get("servers", []) if server["phase"] == "ready"]
        schedulers = [one for one in view.get("schedulers", []) if one["phase"] == "ready"]
        gateways = [one for one in view.get("gateways", []) if one["phase"] == "ready"]
        return (
            len(ready) == wanted.count("worker")
            and len(stores) == wanted.count("store")
            and len(schedulers) == wanted.count("scheduler")
            and sum(bool(one.get("term")) for one in schedulers) == 1
            and len(gateways) == wanted.count("gateway")
        )

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
        """Wait until `condition()`; raises AssertionError saying `what` did not happen."""
        until = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > until:
                raise AssertionError(f"after {timeout_s:.0f} s it is still not so that {what}")
            time.sleep(0.05)

    def call(
        self, method: str, path: str, body: Any = None, timeout_s: float = 60.0, gateway: str = "gateway"
    ) -> tuple[int, Any]:
        """One HTTP call with JSON in and out: status and body. Status 0: nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        url = self.urls[gateway] + path
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")
        except OSError:
            return 0, {}

    def get(self, path: str) -> tuple[int, Any]:
        """GET."""
        return self.call("GET", path)

    def view(self) -> Any:
        """What the registry says."""
        return self.get("/v1/admin/cluster")[1]

    def deploy(self, name: str, source: Path | str, **spec: Any) -> Any:
        """Deploy and wait until it is imported; the record. Raises AssertionError with the failure."""
        dtype = spec.pop("dtype", None)
        body = {"name": name, "source": {"url": str(source), **({"dtype": dtype} if dtype else {})}, **spec}
        status, answer = self.call("POST", "/v1/admin/deployments", body, timeout_s=300)
        assert status in (200, 201), (status, answer)
        return answer

    def idle(self) -> bool:
        """No request is outstanding and no replica runs one."""
        view = self.view()
        depths = view.get("queue_depths") or {}
        return not any(depths.values()) and not any(replica.get("running") for replica in view.get("replicas", []))
