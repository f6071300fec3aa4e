"""A running cluster with two workers, what runs where in it, and the load of other streams on both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks.harness import cluster
from benchmarks.migrating import streams
from benchmarks.migrating.streams import Stream
from benchmarks.models import SHAPES
from shared.bus import Bus
from shared.contracts.migration import ListRequests, Migrate, MigrationEnded, RunningRequest
from shared.contracts.requests import Cancel
from shared.errors import HearthError
from shared.subjects import CANCEL, LIST_REQUESTS, MIGRATE, MIGRATION_ENDED
from tests.builders.cluster import MIB, Cluster

MODEL: Final = "m"
LOOK_S: Final = 0.05
WORKERS: Final = ("worker-1-1", "worker-1-2")
CONTEXT_TOKENS: Final = 6144
LOAD_TOKENS: Final = 1500
LOAD_PROMPT_TOKENS: Final = 64
FRESH_TOKENS: Final = 1100  # a stream of the load that is further than this is replaced between two measurements


class Stage:
    """The cluster with its model on both workers, one client, one connection to the bus."""

    def __init__(
        self, running: Cluster, bus: Bus, session: aiohttp.ClientSession, tasks: asyncio.TaskGroup, shape: str
    ) -> None:
        self.cluster = running
        self.bus = bus
        self.session = session
        self.tasks = tasks
        self._vocab = SHAPES[shape]["vocab_size"]
        self._ends: dict[str, asyncio.Future[tuple[float, MigrationEnded]]] = {}
        self._load: list[Stream] = []
        self._count = 0
        self._replicas: dict[str, str] = {}

    def open(self, name: str, prompt_tokens: int, max_tokens: int) -> Stream:
        """A new stream; `name` makes its prompt."""
        ids = streams.prompt(prompt_tokens, self._vocab, name)
        return Stream(self.cluster.url, MODEL, ids, max_tokens).begin(self.session, self.tasks)

    # -- what runs where ----------------------------------------------------------------------------------------------

    async def running(self) -> list[RunningRequest]:
        """What runs on the workers that answer."""
        found: list[RunningRequest] = []
        for worker_id in WORKERS:
            with contextlib.suppress(HearthError):
                found += (await self.bus.call(LIST_REQUESTS, ListRequests(), worker_id=worker_id)).requests
        return found

    async def where(self, stream: Stream) -> RunningRequest:
        """Where a stream runs, by the newest epoch. Raises RuntimeError if no worker runs it."""
        found = [one for one in await self.running() if one.request_id == stream.request_id]
        if not found:
            raise RuntimeError(f"no worker runs {stream.request_id}: {stream.error or stream.finish}")
        return max(found, key=lambda one: one.epoch)

    async def gone(self, stream: Stream, timeout_s: float = 30.0) -> None:
        """Wait until no worker holds it."""
        async with asyncio.timeout(timeout_s):
            # Another process's state: there is nothing to wait for but to look again.
            while any(one.request_id == stream.request_id for one in await self.running()):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)

    async def drop(self, stream: Stream) -> None:
        """Leave a stream, and wait until no worker holds it."""
        await stream.close()
        await self.gone(stream)

    # -- the load -----------------------------------------------------------------------------------------------------

    async def settle(self, each: int) -> None:
        """See to it that `each` other streams decode on either worker, none of them near its end.

        Where a stream goes is the queue's choice: one that makes a worker carry more than the other is begun anew.
        """
        for stream in [one for one in self._load if one.over or one.tokens > FRESH_TOKENS]:
            self._load.remove(stream)
            await self.drop(stream)
        for _ in range(60):
            at = {one.request_id: one.worker_id for one in await self.running()}
            placed = {
                worker_id: [one for one in self._load if at.get(one.request_id) == worker_id] for worker_id in WORKERS
            }
            fuller = next((found for found in placed.values() if len(found) > each), None)
            if fuller is not None:
                self._load.remove(fuller[-1])
                await self.drop(fuller[-1])
            elif len(self._load) == each * len(WORKERS):
                return
            self._count += 1
            stream = self.open(f"load {self._count}", LOAD_PROMPT_TOKENS, LOAD_TOKENS)
            await stream.until(1)
            self._load.append(stream)
        raise RuntimeError(f"the queue does not spread {each * len(WORKERS)} streams over {len(WORKERS)} workers")

    async def clear(self) -> None:
        """End the load."""
        for stream in self._load:
            await stream.close()
        self._load.clear()

    # -- what is done to a stream -------------------------------------------------------------------------------------

    async def migrate(self, stream: Stream, to: str, direct: str | None = None) -> tuple[float, float, MigrationEnded]:
        """Have it moved, as an operator does: (when it was asked for, when its end was heard of, how it ended).

        `direct` is its source, which is then commanded as the scheduler does it. Raises RuntimeError when it was
        refused.
        """
        self._ends[stream.request_id] = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        if direct is None:
            await self.admin(f"/v1/admin/requests/{stream.request_id}/migrate", {"to": to})
        else:
            replica_id = self._replicas[to]
            message = Migrate(to_worker_id=to, to_replica_id=replica_id, request_ids=(stream.request_id,))
            await self.bus.call(MIGRATE, message, worker_id=direct)
        async with asyncio.timeout(10.0):
            at, ended = await self._ends[stream.request_id]
        del self._ends[stream.request_id]
        return began, at, ended

    def heard(self, message: MigrationEnded) -> None:
        """A source tells that a migration is over."""
        waiting = self._ends.get(message.request_id)
        if waiting is not None and not waiting.done():
            waiting.set_result((time.perf_counter(), message))

    def restart(self, found: RunningRequest) -> None:
        """Have its worker give it back to the queue, as a gateway does that has lost frames of it."""
        cancel = Cancel(request_id=found.request_id, epoch=found.epoch, requeue=True)
        self.bus.publish(CANCEL, cancel, worker_id=found.worker_id)

    async def admin(self, path: str, body: dict[str, Any]) -> Any:
        """A call to the operator's interface. Raises RuntimeError when it is refused."""
        async with self.session.post(self.cluster.url + path, json=body) as answer:
            text = await answer.text()
            if answer.status != 200:
                raise RuntimeError(f"{path}: {answer.status} {text[:300]}")
            return json.loads(text)

    async def replicas(self, count: int, timeout_s: float = 120.0) -> None:
        """Wait until so many replicas take requests."""

        def ready() -> bool:
            states = [str(one["state"]) for one in self.cluster.view().get("replicas", [])]
            return states.count("ready") >= count

        await asyncio.to_thread(self.cluster.until, ready, f"{count} replicas are ready", timeout_s)
        self._replicas = {one["worker_id"]: one["replica_id"] for one in self.cluster.view()["replicas"]}


@contextlib.asynccontextmanager
async def stage(
    home: Path, source: Path, shape: str, *, slots: int, replicas: int = 2, dram_bytes: int = 512 * MIB
) -> AsyncIterator[Stage]:
    """A cluster of one server with two workers, one thread each, and the model ready on `replicas` of them."""
    # Where a replica was lost, its successor must not be placed beside the other one.
    env = {"HEARTH_WORKER_MAX_REPLICAS": "1"}
    with cluster(home, workers=len(WORKERS), dram_bytes=dram_bytes, env=env) as running:
        await asyncio.to_thread(
            running.deploy,
            MODEL,
            source,
            min_replicas=replicas,
            max_replicas=len(WORKERS),
            target_concurrency=slots,
            max_context_tokens=CONTEXT_TOKENS,
            keep_alive_s=3600,
        )
        async with (
            Bus.connect(running.nats_url, name="benchmark", prefix=running.prefix) as bus,
            streams.client() as session,
            asyncio.TaskGroup() as tasks,
        ):
            found = Stage(running, bus, session, tasks, shape)
            subscription = await bus.subscribe(MIGRATION_ENDED, found.heard, worker_id="*")
            await bus.flush()
            await found.replicas(replicas)
            try:
                yield found
            finally:
                await subscription.close()
                await found.clear()
