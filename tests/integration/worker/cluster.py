"""What stands around a worker in its integration tests: a gateway and an operator, hand-written, on real servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from services.worker.engine_thread import ThreadedEngine
from services.worker.main import work
from services.worker.null_engine import NullLoader, NullStepper, NullTokenizer
from services.worker.ports import UNWATCHED, AttachTimes, EngineEvent, LoadWatch, Sink
from services.worker.service import Leases, NoLeases
from shared.bus import Bus, Reply, Subscription
from shared.contracts.generation import End, Frame, FrameBatch
from shared.contracts.placement import LoadReplica, StopReplica
from shared.contracts.records import ReplicaRecord, ReplicaState
from shared.contracts.requests import (
    Cancel,
    Claim,
    Claimed,
    Gone,
    Holds,
    Request,
    Sampling,
    TextPrompt,
    Unwanted,
)
from shared.contracts.residency import Lease, Source
from shared.errors import Code, Failure
from shared.lifecycle import Context, run_service
from shared.registry import Registry
from shared.settings import WorkerSettings
from shared.subjects import CANCEL, CLAIM, FRAMES, HOLDS, LOAD, STOP

SLUG = "demo-00000000"
PATTERN = "hearth "


def expected(tokens: int) -> str:
    """What the null engine answers."""
    return (PATTERN * (tokens // len(PATTERN) + 1))[:tokens]


class SlowStepper(NullStepper):
    """The engine that costs nothing, at a human pace; dies when a request asks for it by its seed."""

    step_s = 0.01

    def step(self) -> list[EngineEvent]:
        time.sleep(self.step_s)
        if any(submission.sampling.seed == 666 for submission in self._submissions.values()):
            raise RuntimeError("asked to die")
        return super().step()


class SlowLoader(NullLoader):
    """Attaches `SlowStepper`s; counts what is attached and not closed."""

    def __init__(self) -> None:
        self.open = 0

    def load(
        self,
        lease: Lease,
        *,
        kv_bytes: int,
        slots: int,
        max_context_tokens: int | None,
        sink: Sink,
        engine: str = "auto",
        watch: LoadWatch = UNWATCHED,
    ) -> Any:
        stepper = SlowStepper(slots=slots, max_sequence_tokens=max_context_tokens or 4096)
        self.open += 1
        return Counted(self, ThreadedEngine(stepper, sink, name="engine-slow"), max_context_tokens or 4096)


class Counted:
    """See `SlowLoader`."""

    tokenizer = NullTokenizer()
    memory_bytes = 0
    times = AttachTimes()

    def __init__(self, loader: SlowLoader, engine: ThreadedEngine, max_context_tokens: int) -> None:
        self.engine = engine
        self.max_context_tokens = max_context_tokens
        self._loader = loader

    def close(self) -> None:
        self.engine.close()
        self._loader.open -= 1


class Gateway:
    """Grants claims, and takes frames as a gateway does: the current epoch at the next index, nothing else."""

    def __init__(self, bus: Bus, id: str = "g1") -> None:
        self.bus = bus
        self.id = id
        self.tokens: dict[str, list[int]] = {}
        self.text: dict[str, str] = {}
        self.epochs: dict[str, int] = {}
        self.ends: dict[str, list[End]] = {}
        self.workers: dict[str, list[str]] = {}
        self.gone: set[str] = set()
        self.held: list[Holds] = []
        self._open: list[Subscription] = []
        self.changed = asyncio.Event()

    async def open(self) -> None:
        self._open = [
            await self.bus.serve(CLAIM, self._claim, gateway_id=self.id),
            await self.bus.subscribe(FRAMES, self._frames, gateway_id=self.id),
            await self.bus.serve(HOLDS, self._holds, gateway_id=self.id),
        ]
        await self.bus.flush()

    async def die(self) -> None:
        """Nobody serves its subjects any more."""
        for subscription in self._open:
            await subscription.close()

    def _holds(self, message: Holds, reply: Reply[Unwanted]) -> None:
        self.held.append(message)
        reply(Unwanted())

    def _claim(self, message: Claim, reply: Reply[Any]) -> None:
        id = message.request_id
        if id in self.gone or id in self.ends:
            reply(Gone(reason="the client left"))
            return
        if message.after_epoch not in (-1, self.epochs.get(id, 0)):
            reply(Failure(code=Code.STALE_EPOCH, message="It is somebody else's."))
            return
        self.epochs[id] = self.epochs.get(id, 0) + 1
        self.workers.setdefault(id, []).append(message.worker_id)
        reply(Claimed(epoch=self.epochs[id], budget_s=60.0, waited_s=0.0, token_ids=tuple(self.tokens.get(id, ()))))
        self.changed.set()

    def _frames(self, batch: FrameBatch) -> None:
        for item in batch.items:
            id = item.request_id
            if item.epoch != self.epochs[id]:
                continue
            assert item.index == len(self.tokens.setdefault(id, [])), "a gap"
            if isinstance(item, Frame):
                self.tokens[id] += item.token_ids
            else:
                self.ends.setdefault(id, []).append(item)
            self.text[id] = self.text.get(id, "") + item.text
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something that was heard makes the condition true."""
        async with asyncio.timeout(60):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def ended(self, request_id: str) -> End:
        """The one end of a request."""
        await self.until(lambda: request_id in self.ends)
        (end,) = self.ends[request_id]
        return end

    def cancel(self, request_id: str, *, requeue: bool = False) -> None:
        """Tell the worker that owns the request to leave it alone."""
        message = Cancel(request_id=request_id, epoch=self.epochs[request_id], requeue=requeue)
        self.bus.publish(CANCEL, message, worker_id=self.workers[request_id][-1])


class Operator:
    """Loads, stops, asks and looks."""

    def __init__(self, bus: Bus, registry: Registry) -> None:
        self.bus = bus
        self.registry = registry

    async def open(self, *, ack_wait_s: float = 10.0) -> None:
        await self.bus.ensure_stream(file_storage=False)
        await self.bus.ensure_queue(SLUG, ack_wait_s=ack_wait_s)

    async def load(self, worker_id: str, replica_id: str = "r1", **changes: Any) -> None:
        """Command a load and wait until it is ready."""
        await self.bus.call(LOAD, load_message(replica_id, **changes), worker_id=worker_id)
        await self.until_state(replica_id, ReplicaState.READY)

    async def stop(self, worker_id: str, replica_id: str = "r1", **how: bool) -> None:
        await self.bus.call(STOP, StopReplica(replica_id=replica_id, reason="test", **how), worker_id=worker_id)

    async def ask(self, request_id: str, *, max_tokens: int = 10, **changes: Any) -> Request:
        """Put a request into the queue."""
        first = Request(
            request_id=request_id,
            gateway_id="g1",
            deployment="demo",
            prompt=TextPrompt(text="hi"),
            sampling=Sampling(max_tokens=max_tokens),
            budget_s=60.0,
        )
        request = msgspec.structs.replace(first, **changes)
        await self.bus.enqueue(SLUG, request)
        return request

    async def outstanding(self) -> int:
        return (await self.bus.queue_depths()).get(SLUG, 0)

    async def until_state(self, replica_id: str, state: ReplicaState | None) -> ReplicaRecord | None:
        """Wait for a state of a replica in the registry; None: gone."""
        async with asyncio.timeout(60):
            while True:
                record = await self.registry.get(ReplicaRecord, replica_id)
                if (record.state if record else None) is state:
                    return record
                await asyncio.sleep(0.01)

    async def until_outstanding(self, count: int) -> None:
        """Wait until the queue holds this many requests."""
        async with asyncio.timeout(60):
            while await self.outstanding() != count:
                await asyncio.sleep(0.01)


def load_message(replica_id: str = "r1", **changes: Any) -> LoadReplica:
    """A command to load."""
    first = LoadReplica(
        replica_id=replica_id,
        deployment="demo",
        slug=SLUG,
        revision="v",
        checkpoint_id="c1",
        source=Source(url="/m"),
        slots=4,
        max_context_tokens=100_000,
        kv_bytes=1 << 20,
    )
    return msgspec.structs.replace(first, **changes)


class Life:
    """A running worker: `stop()` drains it, `crash()` ends it without a word."""

    def __init__(self, stopping: asyncio.Event, task: asyncio.Task[None]) -> None:
        self._stopping = stopping
        self._task = task

    def begin_stop(self) -> None:
        self._stopping.set()

    async def stop(self) -> None:
        self._stopping.set()
        async with asyncio.timeout(60):
            await self._task

    async def crash(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


@asynccontextmanager
async def worker(
    settings: WorkerSettings, id: str = "w1", *, loader: NullLoader | None = None, leases: Leases | None = None
) -> AsyncIterator[Life]:
    """A worker in this process, ready; drained at the end unless it was ended before."""
    stopping, ready = asyncio.Event(), asyncio.Event()

    async def serve(context: Context[WorkerSettings]) -> None:
        tell_ready = context.ready

        async def now_ready() -> None:
            await tell_ready()
            ready.set()

        context.ready = now_ready  # type: ignore[method-assign]
        await work(context, loader or SlowLoader(), leases or NoLeases(), check=True)

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(run_service("worker", id, settings, serve, stopping))
        async with asyncio.timeout(60):
            await ready.wait()
        yield Life(stopping, task)
        stopping.set()
