"""The store as a process: the next life cleans up after a kill, and faults of the settings are clear."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.bus import Bus
from shared.contracts.records import ServerRecord
from shared.contracts.residency import Acquire, Lease, Source
from shared.errors import HearthError
from shared.registry import Registry
from shared.subjects import ACQUIRE
from tests.unit.store.sources import make_source

SERVER = "s1"


@contextmanager
def a_process(home: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m services.store.main` with these settings; killed at the end if it still runs.

    It does not measure the disk: no test waits for that.
    """
    settings = {"io_threads": "2", "io_block_bytes": str(2**16)} | settings
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HEARTH_")}
    environ |= {f"HEARTH_{key.upper()}": value for key, value in settings.items()}
    with (home / "store.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "services.store.main"], env=environ, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(20)


def log_of(home: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (home / "store.log").read_text().splitlines()]


async def pid_of_ready_store(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    """Wait until this very process has a record that says `ready`."""
    while True:
        assert process.poll() is None, "the store ended"
        record = await registry.get(ServerRecord, SERVER)
        if record is not None and record.phase == "ready" and record.pid == process.pid:
            return
        await asyncio.sleep(0.02)


async def get_lease(bus: Bus, source: Source) -> Lease:
    while True:
        message = Acquire(checkpoint_id="", source=source, holder="w1", ttl_s=30)
        try:
            answer = await bus.call(ACQUIRE, message, server_id=SERVER, extra_s=1)
        except HearthError as error:
            if not error.failure.kind.retryable:
                raise
            continue
        if isinstance(answer, Lease):
            return answer


async def test_killed_and_started_again(
    tmp_path: Path, nats_url: str, redis_url: str, prefix: str, bus: Bus, registry: Registry
) -> None:
    make_source(tmp_path / "m")
    source, shm = Source(url=str(tmp_path / "m")), tmp_path / "shm"
    shm.mkdir()
    settings = {
        "nats_url": nats_url,
        "redis_url": redis_url,
        "prefix": prefix,
        "server_id": SERVER,
        "store_dir": str(tmp_path / "store"),
        "shm_dir": str(shm),
        "dram_bytes": str(2**20),
        "chunk_bytes": str(2**16),
        "log_format": "json",
    }
    with a_process(tmp_path, **settings) as process:
        await pid_of_ready_store(registry, process)
        first = await get_lease(bus, source)
        assert first.tier == "remote"
        process.kill()
    pool = Path(first.segment).name
    assert sorted(os.listdir(shm)) == [pool, f"{pool}.state"], "what a killed store leaves behind"
    with a_process(tmp_path, **settings) as process:
        await pid_of_ready_store(registry, process)
        again = await get_lease(bus, source)
        assert (again.tier, again.checkpoint, again.segment) == ("dram", first.checkpoint, first.segment)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.get_running_loop().run_in_executor(None, process.wait, 20) == 0
    assert sorted(os.listdir(shm)) == [pool, f"{pool}.state"], "kept for the next life"
    with a_process(tmp_path, **(settings | {"dram_bytes": str(2**21), "keep_pool": "0"})) as process:
        await pid_of_ready_store(registry, process)
        other = await get_lease(bus, source)
        assert (other.tier, other.checkpoint) == ("ssd", first.checkpoint), "a pool of another size is a new one"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.get_running_loop().run_in_executor(None, process.wait, 20) == 0
    assert os.listdir(shm) == []
    assert "pool.removed" in [line["event"] for line in log_of(tmp_path)]


async def test_settings_that_cannot_be_are_clear_errors(
    tmp_path: Path, nats_url: str, redis_url: str, prefix: str
) -> None:
    common = {
        "nats_url": nats_url,
        "redis_url": redis_url,
        "prefix": prefix,
        "store_dir": str(tmp_path / "store"),
        "shm_dir": str(tmp_path),
        "log_format": "json",
    }
    cases = {
        "HEARTH_DRAM_BYTES=100 is less than one chunk": {"dram_bytes": "100"},
        "no multiple of 4096": {"chunk_bytes": "5000"},
        "set HEARTH_DRAM_BYTES": {"dram_bytes": str(2**60)},
    }
    for words, settings in cases.items():
        with a_process(tmp_path, **common, **settings) as process:
            assert await asyncio.get_running_loop().run_in_executor(None, process.wait, 30) == 1
        last = log_of(tmp_path)[-1]
        assert words in str(last), last
