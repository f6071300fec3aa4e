"""Whole stores as processes that find one another in the registry and fetch from one another."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from shared.bus import Bus
from shared.contracts.records import ServerRecord
from shared.contracts.residency import Acquire, Lease, Source
from shared.errors import Code, HearthError
from shared.registry import Registry
from shared.subjects import ACQUIRE
from tests.integration.store.test_store_process import a_process
from tests.unit.store.sources import make_source

MIB = 2**20


@contextmanager
def a_store(home: Path, name: str, urls: dict[str, str], *, token: str = "secret") -> Iterator[subprocess.Popen[bytes]]:
    place = home / name
    place.mkdir(exist_ok=True)
    (place / "shm").mkdir(exist_ok=True)
    settings = {
        "server_id": name,
        "store_dir": str(place / "store"),
        "shm_dir": str(place / "shm"),
        "dram_bytes": str(4 * MIB),
        "chunk_bytes": str(64 * 1024),
        "peer_token": token,
    }
    with a_process(place, **urls, **settings) as process:
        yield process


async def ready(registry: Registry, *names: str) -> dict[str, ServerRecord]:
    """The records of these stores, once all say `ready`."""
    while True:
        records = {record.server_id: record for record in await registry.all(ServerRecord)}
        if all(name in records and records[name].phase == "ready" for name in names):
            return records
        await asyncio.sleep(0.02)


async def lease(bus: Bus, server_id: str, source: Source, checkpoint_id: str) -> Lease:
    while True:
        message = Acquire(checkpoint_id=checkpoint_id, source=source, holder="w", ttl_s=30)
        try:
            answer = await bus.call(ACQUIRE, message, server_id=server_id, extra_s=1)
        except HearthError as error:
            if error.failure.code is Code.UNAVAILABLE:  # of the bus; what the store says ends the test
                continue
            raise
        if isinstance(answer, Lease):
            return answer


async def test_a_store_takes_a_checkpoint_from_another_one_when_the_source_is_gone(
    tmp_path: Path, nats_url: str, redis_url: str, prefix: str, bus: Bus, registry: Registry
) -> None:
    make_source(tmp_path / "m")
    source = Source(url=str(tmp_path / "m"))
    urls = {"nats_url": nats_url, "redis_url": redis_url, "prefix": prefix}
    with ExitStack() as stack:
        for name in ("a", "b"):
            stack.enter_context(a_store(tmp_path, name, urls))
        stack.enter_context(a_store(tmp_path, "c", urls, token="another"))
        records = await ready(registry, "a", "b", "c")
        assert records["a"].peer_url.startswith("http://127.0.0.1:")
        first = await lease(bus, "a", source, "")
        id = first.checkpoint.checkpoint_id
        while id not in (await ready(registry, "a"))["a"].ssd:
            await asyncio.sleep(0.02)
        shutil.rmtree(tmp_path / "m")
        second = await lease(bus, "b", source, id)
        assert second.checkpoint == first.checkpoint
        assert second.tier == "peer"
        here, there = Path(second.directory), Path(first.directory)
        assert sorted(os.listdir(here)) == sorted(os.listdir(there))
        assert all((here / name).read_bytes() == (there / name).read_bytes() for name in os.listdir(there))
        while id not in (await ready(registry, "b"))["b"].ssd:
            await asyncio.sleep(0.02)
        with pytest.raises(HearthError, match="does not exist on this server"):  # another token, so no peers
            await lease(bus, "c", source, id)
