"""Hearth as it is measured: a real store process on a real bus, and worker processes that lease and attach."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from benchmarks.loading.disk import cpu_s, pss_bytes, status_bytes
from shared.bus import Bus
from shared.contracts.residency import Checkpoint, Evict, Import, Imported, ListCheckpoints, Source
from shared.errors import Code, HearthError
from shared.subjects import EVICT, IMPORT, LIST, Endpoint
from tests.builders.servers import start_nats, start_redis

ROOT = Path(__file__).parent.parent.parent
SERVER = "server-1"
Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)


class Child:
    """A process that answers lines of JSON with lines of JSON."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env, text=True
            )
        self._log = log
        self.pid = self._process.pid
        self.first = self._answer()

    def ask(self, order: Any) -> dict[str, Any]:
        """Send a line, wait for its answer. Raises RuntimeError with the end of the log if the process died."""
        self.tell(order)
        return self._answer()

    def tell(self, order: Any) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"the process ended with {code}: {self._log.read_text(errors='replace')[-1500:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self, number: int = 0) -> None:
        """End it: by the end of its input, or by a signal."""
        if number:
            self._process.send_signal(number)
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StoreUnderTest:
    """A store with a directory (removed at the end) and servers of its own. `env` adds settings."""

    def __init__(self, home: Path, *, dram_bytes: int, env: dict[str, str] | None = None) -> None:
        self.home = home
        self.store_dir = home / "store"
        self.log = home / "store.log"
        self.prefix = f"b{secrets.token_hex(4)}"
        home.mkdir(parents=True, exist_ok=True)
        self._servers: list[subprocess.Popen[bytes]] = []
        self._store: subprocess.Popen[bytes] | None = None
        self.nats_url = ""
        self._env = {key: value for key, value in os.environ.items() if not key.startswith("HEARTH_")} | {
            "HEARTH_PREFIX": self.prefix,
            "HEARTH_LOG_FORMAT": "json",
            "HEARTH_SERVER_ID": SERVER,
            "HEARTH_STORE_DIR": str(self.store_dir),
            "HEARTH_DRAM_BYTES": str(dram_bytes),
            "HEARTH_SCRUB_INTERVAL_S": "0",
            "PYTHONPATH": str(ROOT),
            **(env or {}),
        }

    def __enter__(self) -> Self:
        try:
            for name in ("nats", "redis"):
                (self.home / name).mkdir(exist_ok=True)
            nats, self.nats_url = start_nats(self.home / "nats")
            self._servers.append(nats)
            redis, redis_url = start_redis(self.home / "redis")
            self._servers.append(redis)
            self._env |= {"HEARTH_NATS_URL": self.nats_url, "HEARTH_REDIS_URL": redis_url}
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is not None and self._store.poll() is None:
            self.stop()
        for server in self._servers:
            server.terminate()
            server.wait(10)
        shutil.rmtree(self.store_dir, ignore_errors=True)
        # A pool that was kept for the next life of a store that will not come.
        for left in Path("/dev/shm").glob(f"hearth-{self.prefix}-*"):
            left.unlink(missing_ok=True)

    @property
    def pid(self) -> int:
        """Of the store's process."""
        assert self._store is not None
        return self._store.pid

    def start(self) -> float:
        """Start the store (again); seconds until it answers."""
        start = time.perf_counter()
        with self.log.open("ab") as out:
            self._store = subprocess.Popen(
                [sys.executable, "-m", "services", "store"], env=self._env, stdout=out, stderr=subprocess.STDOUT
            )
        while True:
            if self._store.poll() is not None:
                raise RuntimeError(f"the store ended: {self.log.read_text()[-2000:]}")
            try:
                self.call(EVICT, Evict(checkpoint_id="none", tier="dram"))
                break
            except HearthError as error:
                if error.failure.code is not Code.UNAVAILABLE and error.failure.code is not Code.DEADLINE_EXCEEDED:
                    break
            time.sleep(0.05)
        return time.perf_counter() - start

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the store."""
        assert self._store is not None
        self._store.send_signal(number)
        try:
            self._store.wait(30)
        except subprocess.TimeoutExpired:
            self._store.kill()
            self._store.wait()

    def call(self, endpoint: Endpoint[Q, R], message: Q, extra_s: float = 0.0) -> R:
        """One call of the store."""

        async def once() -> R | HearthError:
            async with Bus.connect(self.nats_url, name="benchmark", prefix=self.prefix) as bus:
                try:
                    return await bus.call(endpoint, message, extra_s=extra_s, server_id=SERVER)
                except HearthError as error:  # would leave the bus's task group as one of a group
                    return error

        found = asyncio.run(once())
        if isinstance(found, HearthError):
            raise found
        return found

    def bring_in(self, source: str, dtype: str | None = None) -> Checkpoint:
        """Import a source; the checkpoint."""
        while True:
            answer = self.call(IMPORT, Import(source=Source(url=source, dtype=dtype), wait_s=5.0), extra_s=5.0)
            if isinstance(answer, Imported):
                return answer.checkpoint

    def evict(self, checkpoint_id: str, tier: str) -> None:
        """Take a checkpoint out of a tier; a lease that is on its way back is waited for."""
        for _ in range(200):
            try:
                self.call(EVICT, Evict(checkpoint_id=checkpoint_id, tier=tier))
                return
            except HearthError as error:
                if error.failure.code is Code.NOT_FOUND:
                    return
                if error.failure.code is not Code.BUSY:
                    raise
            time.sleep(0.05)
        raise RuntimeError("the checkpoint stays leased")

    def held(self) -> list[dict[str, Any]]:
        """What the store says that it holds."""
        found = self.call(LIST, ListCheckpoints())
        return [msgspec.to_builtins(one) for one in found.checkpoints]

    def directory_of(self, checkpoint_id: str) -> Path:
        """Where a checkpoint's files lie."""
        return next(path for path in self.store_dir.rglob(checkpoint_id) if (path / "hearth.json").exists())

    def worker(self, device: str = "cpu") -> Child:
        """A fresh warm worker process, which has mapped the pool as a worker does when it sees the store's record."""
        command = [sys.executable, "-m", "benchmarks.loading.attach", "--nats", self.nats_url, "--prefix", self.prefix]
        worker = Child([*command, "--device", device], self.home / "worker.log", self._env)
        worker.ask({"do": "prepare", "segment": str(self.segment())})
        mapped, until = -1, time.monotonic() + 20
        while (now := status_bytes(worker.pid, "RssShmem")) != mapped and time.monotonic() < until:
            mapped = now  # its page table is filled on a thread beside
            time.sleep(0.05)
        return worker

    def segment(self) -> Path:
        """The DRAM pool's file."""
        pattern = re.compile(rf"hearth-{self.prefix}-{SERVER}-[0-9a-f]+")
        return next(path for path in sorted(Path("/dev/shm").iterdir()) if pattern.fullmatch(path.name))

    def cpu_s(self) -> float:
        """Processor seconds that the store has used."""
        return cpu_s(self.pid)

    def pss_bytes(self) -> int:
        """The store's proportional set size, its part of the pool included."""
        return pss_bytes(self.pid)


@contextlib.contextmanager
def highest(pids: list[int], name: str = "RssAnon", every_s: float = 0.01) -> Iterator[Callable[[], int]]:
    """Watch a size of some processes; the function gives the highest sum so far in bytes, above that at the start."""
    done = threading.Event()
    first = sum(status_bytes(pid, name) for pid in pids)
    most = first

    def watch() -> None:
        nonlocal most
        while not done.wait(every_s):
            with contextlib.suppress(OSError):
                most = max(most, sum(status_bytes(pid, name) for pid in pids))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most - first
    finally:
        done.set()
        thread.join()
