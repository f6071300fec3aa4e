"""A cluster to be hurt: its own nats-server and redis-server, a cable per service, nothing that outlives the test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.builders.cluster import MIB, ROOT, Cluster
from tests.builders.network import open_network
from tests.builders.servers import free_port, start_nats, start_redis
from tests.builders.warden import Warden

NATS, REDIS = "nats-server", "redis-server"


class Fleet(Cluster):
    """A `Cluster` whose servers can be killed, stopped and restarted by name like everything else ("nats-server", …).

    What they hold is on disk and survives. Records live and a silent owner is found out within a few seconds.
    """

    def __init__(
        self,
        home: Path,
        *,
        servers: int = 2,
        workers: int = 2,
        gateways: int = 1,
        schedulers: int = 1,
        dram_bytes: int = 64 * MIB,
        env: dict[str, str] | None = None,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            warden = stack.enter_context(Warden())
            self.network = stack.enter_context(open_network(warden))
            self._ports = {NATS: free_port(), REDIS: free_port()}
            super().__init__(
                home,
                nats_url=f"nats://{self.network.host}:{self._ports[NATS]}",
                redis_url=f"redis://{self.network.host}:{self._ports[REDIS]}/0",
                servers=servers,
                workers=workers,
                gateways=gateways,
                schedulers=schedulers,
                dram_bytes=dram_bytes,
                env={
                    "HEARTH_ACK_WAIT_S": "5",
                    "HEARTH_RECORD_TTL_S": "3",
                    "HEARTH_WORKER_MAX_REPLICAS": "4",
                    "HEARTH_HOLD_S": "1",
                }
                | (env or {}),
                network=self.network,
                warden=warden,
            )
            self._own = stack.pop_all()
        for name, service in ((NATS, "nats"), (REDIS, "redis")):
            self.services = {name: (service, {})} | self.services
            (home / name).mkdir(exist_ok=True)
        for name, (service, own) in list(self.services.items()):
            if service == "worker":
                own |= {"HEARTH_METRICS_PORT": str(free_port()), "HEARTH_METRICS_HOST": self.links[name].host}

    def start(self, name: str) -> None:
        if name not in self._ports:
            super().start(name)
            return
        starter = start_nats if name == NATS else start_redis
        self.processes[name], _ = starter(self.home / name, self._ports[name], self.network.host)
        assert self._warden is not None
        self._warden.guard(self.processes[name])

    def log(self, name: str) -> str:
        if name in self._ports:
            return (self.home / name / f"{name}.log").read_text(errors="replace")
        return super().log(name)

    def named(self, service: str) -> list[str]:
        """The names of all processes of a kind: "worker", "store", "scheduler", "gateway", "nats", "redis"."""
        return [name for name, (kind, _) in self.services.items() if kind == service]

    def running(self, name: str) -> bool:
        """Whether this process has not ended."""
        process = self.processes.get(name)
        return process is not None and process.poll() is None

    def restart(self, name: str) -> None:
        """Start again what has been killed."""
        process = self.processes[name]
        process.wait(120)
        self.start(name)

    def until_ready(self, timeout_s: float = 240.0) -> None:
        """Wait until everything is there again."""
        self.until(self.ready, "everything is ready again", timeout_s)

    def mend(self, timeout_s: float = 240.0) -> None:
        """Heal every link, let go on what was stopped, start again what has ended; wait until ready."""
        for link in self.links.values():
            link.heal()
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
        for name in self.services:
            if not self.running(name):
                self.start(name)
        self.until_ready(timeout_s)
        self.until(self.spread, "every deployment has its replicas", timeout_s)

    def spread(self) -> bool:
        """Whether every deployment has the replicas that it shall always have, ready, and none is on its way out."""
        view = self.view()
        replicas = view.get("replicas", [])
        if any(replica["state"] != "ready" for replica in replicas):
            return False
        return all(
            sum(replica["deployment"] == one["spec"]["name"] for replica in replicas) >= one["spec"]["min_replicas"]
            for one in view.get("deployments", [])
        )

    def owner_of(self, request_id: str, gateway: str = "gateway") -> str:
        """The worker that runs this call's (first) request now; "" if nobody does."""
        found = [one for one in self.requests(gateway) if one["request_id"].startswith(request_id)]
        return str(max(found, key=lambda one: int(one.get("epoch", 0)))["worker_id"]) if found else ""

    def requests(self, gateway: str = "gateway", timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """What runs in all workers, as the operator sees it; [] when nobody can tell just now."""
        status, body = self.call("GET", "/v1/admin/requests", gateway=gateway, timeout_s=timeout_s)
        return list(body["data"]) if status == 200 else []

    def hearth(self, *words: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run `hearth …` against the first gateway."""
        return subprocess.run(
            [sys.executable, "-m", "services", *words],
            env={key: value for key, value in os.environ.items() if not key.startswith("HEARTH_")}
            | {"HEARTH_URL": self.url, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except BaseException:
            self._own.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._own.close()
