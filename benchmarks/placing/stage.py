"""Clusters of two servers with two workers each, and which checkpoint lies in which tier of which server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks.migrating import streams
from shared.bus import Bus
from shared.contracts.residency import Done, Evict, Prefetch, Progress, Source
from shared.errors import Code, HearthError
from shared.subjects import EVICT, PREFETCH
from tests.builders.cluster import Cluster
from tests.builders.servers import start_nats, start_redis

SERVERS: Final = ("server-1", "server-2")
SIDES: Final = {"server-1": "a", "server-2": "b"}
LOOK_S: Final = 0.05
RETRY_S: Final = 0.5
RETRIES: Final = 20
NOWHERE: Final = ""
PATIENCE_S: Final = 120.0


@contextlib.contextmanager
def servers(home: Path) -> Iterator[tuple[str, str]]:
    """A NATS and a Redis server for the clusters of one run: their URLs."""
    for name in ("nats", "redis"):
        (home / name).mkdir(parents=True, exist_ok=True)
    nats, nats_url = start_nats(home / "nats")
    redis, redis_url = start_redis(home / "redis")
    try:
        yield nats_url, redis_url
    finally:
        for process in (nats, redis):
            process.terminate()
            process.wait(10)


def drop_cached(directory: Path) -> None:
    """Have the next read of these files come from the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Stage:
    """A running cluster, a connection to its bus and a client. `sources` has the directory of every checkpoint."""

    def __init__(self, running: Cluster, bus: Bus, session: aiohttp.ClientSession, tasks: asyncio.TaskGroup) -> None:
        self.cluster = running
        self.bus = bus
        self.session = session
        self.tasks = tasks
        self.keys: dict[str, str] = {}
        self.sources: dict[str, Path] = {}

    async def deploy(self, name: str, source: Path, **spec: Any) -> str:
        """Deploy a model; the id of its checkpoint."""
        await asyncio.to_thread(self.cluster.deploy, name, source, **spec)
        found = {one["spec"]["name"]: one for one in (await self.view())["deployments"]}
        key = str(found[name]["checkpoint"]["checkpoint_id"])
        self.keys[name], self.sources[key] = key, source
        return key

    async def get(self, path: str) -> Any:
        """GET of JSON. Raises RuntimeError when it is refused; a scheduler that has lost its lease gets time to lead
        again."""
        for _ in range(RETRIES):
            async with self.session.get(self.cluster.url + path) as answer:
                text = await answer.text()
            if answer.status == 200:
                return json.loads(text)
            if answer.status != 503:
                break
            await asyncio.sleep(RETRY_S)
        raise RuntimeError(f"{path}: {answer.status} {text[:300]}")

    async def view(self) -> dict[str, Any]:
        """What the registry says."""
        found: dict[str, Any] = await self.get("/v1/admin/cluster")
        return found

    async def replicas(self, name: str = "") -> list[dict[str, Any]]:
        """The replicas of a deployment, or all."""
        found = (await self.view()).get("replicas", [])
        return [one for one in found if name in ("", one["deployment"])]

    async def empty(self, *names: str) -> None:
        """Wait until these deployments have no replica (none is named: until there is none)."""
        async with asyncio.timeout(PATIENCE_S):
            # Another process's state: there is nothing to wait for but to look again.
            while any(one["deployment"] in names or not names for one in await self.replicas()):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)

    async def explain(self, name: str) -> dict[str, Any]:
        """The last decision about a deployment whose load has ended; {} if there is none."""
        found = await self.get(f"/v1/admin/explain/{name}?last=4")
        loaded = (one for one in found.get("decisions", []) if one.get("actual_s") is not None)
        return next(loaded, {})

    # -- tiers --------------------------------------------------------------------------------------------------------

    async def lay(self, key: str, wanted: Mapping[str, str]) -> None:
        """Have a checkpoint in exactly this tier ("dram", "ssd" or `NOWHERE`) of each of these servers."""
        for server_id, tier in wanted.items():
            present = await self._tier(key, server_id)
            if tier == present:
                continue
            if tier == NOWHERE or (tier == "ssd" and present == "dram"):
                await self._evict(key, server_id, "dram" if tier == "ssd" else "ssd")
            else:
                await self._bring(key, server_id, tier)
        async with asyncio.timeout(PATIENCE_S):
            for server_id, tier in wanted.items():
                while await self._tier(key, server_id) != tier:  # noqa: ASYNC110 -- as above
                    await asyncio.sleep(LOOK_S)

    async def _tier(self, key: str, server_id: str) -> str:
        for one in (await self.view())["servers"]:
            if one["server_id"] == server_id:
                if key in one.get("dram", {}):
                    return "dram"
                return "ssd" if key in one.get("ssd", {}) else NOWHERE
        raise RuntimeError(f"{server_id} is gone")

    async def _evict(self, key: str, server_id: str, tier: str) -> None:
        """The lease of the last replica may still be on its way back."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await self.bus.call(EVICT, Evict(checkpoint_id=key, tier=tier), server_id=server_id)
                    return
                except HearthError as error:
                    if error.failure.code is not Code.BUSY:
                        raise
                await asyncio.sleep(LOOK_S)

    async def _bring(self, key: str, server_id: str, tier: str) -> None:
        order = Prefetch(checkpoint_id=key, source=Source(url=str(self.sources[key])), tier=tier, wait_s=5.0)
        async with asyncio.timeout(PATIENCE_S):
            brought = False
            while not brought:
                answer: Progress | Done = await self.bus.call(PREFETCH, order, extra_s=5.0, server_id=server_id)
                brought = isinstance(answer, Done)


@contextlib.asynccontextmanager
async def stage(home: Path, urls: tuple[str, str], *, dram_bytes: int, env: dict[str, str]) -> AsyncIterator[Stage]:
    """A cluster whose servers carry the labels side=a and side=b. Nothing is brought ahead of demand: what lies where
    is the measurement's business."""
    running = Cluster(
        home,
        nats_url=urls[0],
        redis_url=urls[1],
        servers=len(SERVERS),
        workers=2,
        dram_bytes=dram_bytes,
        env={"HEARTH_PREFETCH_BYTES_PER_S": "0", "HEARTH_SCRUB_INTERVAL_S": "0"} | env,
    )
    for server_id, side in SIDES.items():
        running.services[server_id][1]["HEARTH_LABELS"] = f"side={side}"
    with running:
        async with (
            Bus.connect(running.nats_url, name="benchmark", prefix=running.prefix) as bus,
            streams.client() as session,
            asyncio.TaskGroup() as tasks,
        ):
            yield Stage(running, bus, session, tasks)
