"""A real gateway on a real socket, and a worker written by hand that does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from services.gateway.main import serve_checked
from shared.bus import Bus, Delivery, Puller
from shared.contracts.events import RecordChanged
from shared.contracts.generation import End, FinishReason, Frame, FrameBatch, Ledger, Usage
from shared.contracts.records import DeploymentRecord, DeploymentSpec, DeploymentState, GatewayRecord, Phase
from shared.contracts.requests import Cancel, Claim, Claimed, Demand, Gone, Request
from shared.contracts.residency import Checkpoint, Source
from shared.errors import Failure
from shared.lifecycle import Context, run_service
from shared.registry import Registry
from shared.settings import GatewaySettings
from shared.slug import slug
from shared.subjects import CANCEL, CLAIM, DEMAND, FRAMES, RECORD_CHANGED

CHECKPOINT = Checkpoint(
    checkpoint_id="c1",
    architecture="LlamaForCausalLM",
    weight_bytes=1,
    parameters=1,
    dtype="float32",
    max_context_tokens=128,
    kv_bytes_per_token=1,
    vocab_tokens=1000,
    has_chat_template=True,
)
WORDS = ("the ", "sun ", "is ", "a ", "star", " and ", "the ", "moon ", "is ", "not")

Job = Callable[["FakeWorker", "Work"], Awaitable[None]]


@dataclass
class Work:
    """A request that the worker was handed, and the answer to its claim."""

    delivery: Delivery
    request: Request
    claimed: Claimed

    @property
    def epoch(self) -> int:
        return self.claimed.epoch


async def answer(worker: FakeWorker, work: Work, *, tokens: int = 5, pause_s: float = 0.0) -> None:
    """The usual job: `tokens` words from where the client is, then the end and the acknowledgement."""
    wanted = min(tokens, work.request.sampling.max_tokens or tokens)
    for index in range(len(work.claimed.token_ids), wanted):
        worker.frame(work, index, WORDS[index % len(WORDS)])
        await asyncio.sleep(pause_s)
    worker.end(work, wanted)


@dataclass
class FakeWorker:
    """Pulls, claims and runs `job`; keeps what it was told."""

    bus: Bus
    name: str
    tasks: asyncio.TaskGroup
    job: Job
    slots: int = 8
    puller: Puller | None = None
    works: list[Work] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    refused: list[Failure] = field(default_factory=list)
    cancels: asyncio.Queue[Cancel] = field(default_factory=asyncio.Queue)

    async def start(self, deployment_slug: str) -> None:
        await self.bus.subscribe(CANCEL, self.cancels.put_nowait, worker_id=self.name)
        self.puller = await self.bus.pull(deployment_slug, self._arrived)
        await self.bus.flush()
        self.puller.want(self.slots)

    def _arrived(self, delivery: Delivery) -> None:
        self.tasks.create_task(self._run(delivery))

    async def _run(self, delivery: Delivery) -> None:
        request = delivery.request
        claim = Claim(request_id=request.request_id, worker_id=self.name, replica_id="r1", delivery=delivery.delivery)
        answer = await self.bus.call(CLAIM, claim, gateway_id=request.gateway_id)
        if isinstance(answer, Gone):
            self.gone.append(request.request_id)
            self.bus.ack(delivery.token)
        else:
            work = Work(delivery, request, answer)
            self.works.append(work)
            await self.job(self, work)
        assert self.puller is not None
        self.puller.want(1)

    def frame(self, work: Work, index: int, text: str, **more: Any) -> None:
        frame = Frame(
            request_id=work.request.request_id, epoch=work.epoch, index=index, token_ids=(index,), text=text, **more
        )
        self.send(work, frame)

    def end(
        self,
        work: Work,
        index: int,
        reason: FinishReason | None = FinishReason.STOP,
        failure: Failure | None = None,
        ack: bool = True,
        **more: Any,
    ) -> None:
        end = End(
            request_id=work.request.request_id,
            epoch=work.epoch,
            index=index,
            reason=None if failure else reason,
            failure=failure,
            usage=Usage(prompt_tokens=7, completion_tokens=index),
            ledger=Ledger(cold=True, tier="ssd", queue_s=0.25, read_s=0.125, prefill_s=0.01),
            **more,
        )
        self.send(work, end)
        if ack:
            self.bus.ack(work.delivery.token)

    def send(self, work: Work, item: Frame | End) -> None:
        self.bus.publish(FRAMES, FrameBatch(worker_id=self.name, items=(item,)), gateway_id=work.request.gateway_id)


@dataclass
class Cluster:
    """The gateway under test and what stands around it."""

    url: str
    bus: Bus
    registry: Registry
    http: aiohttp.ClientSession
    tasks: asyncio.TaskGroup
    stopping: asyncio.Event
    gateway: asyncio.Task[None]
    demands: list[Demand] = field(default_factory=list)

    async def deploy(
        self, name: str = "m", *, checkpoint: Checkpoint | None = CHECKPOINT, ack_wait_s: float = 1.0, **spec: Any
    ) -> str:
        """Register a deployment as the scheduler would; its slug."""
        await self.bus.ensure_queue(slug(name), ack_wait_s=ack_wait_s)
        record = DeploymentRecord(
            spec=DeploymentSpec(name=name, source=Source(url="/nowhere"), **spec),
            slug=slug(name),
            revision="1",
            state=DeploymentState.READY if checkpoint else DeploymentState.IMPORTING,
            created_at_s=1_700_000_000.0,
            checkpoint=checkpoint,
        )
        await self.registry.put(record, ttl_s=None)
        self.bus.publish(RECORD_CHANGED, RecordChanged(kind="deployment", id=name), kind="deployment")
        await until(lambda: self.listed(name))
        return slug(name)

    async def listed(self, name: str) -> bool:
        async with self.http.get(f"{self.url}/v1/models", headers={"Authorization": "Bearer one"}) as response:
            return response.status == 200 and name in [model["id"] for model in (await response.json())["data"]]

    async def worker(self, job: Job = answer, *, name: str = "w1", deployment: str = "m", slots: int = 8) -> FakeWorker:
        worker = FakeWorker(self.bus, name, self.tasks, job, slots)
        await worker.start(slug(deployment))
        return worker

    def post(self, path: str, body: Any, **more: Any) -> Any:
        return self.http.post(self.url + path, json=body, **more)

    async def chat(self, **more: Any) -> tuple[int, dict[str, Any], Any]:
        """A chat call: status, JSON, headers."""
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}
        async with self.post("/v1/chat/completions", body) as response:
            return response.status, await response.json(), response.headers

    async def stream(self, path: str = "/v1/chat/completions", **more: Any) -> list[str]:
        """All lines of a stream that are not empty."""
        async with self.post(path, chat_body(stream=True, **more)) as response:
            assert response.status == 200, await response.text()
            return [line async for line in lines(response)]

    async def outstanding(self) -> int:
        return sum((await self.bus.queue_depths()).values())


def chat_body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}


async def lines(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line:
            yield line


def events(found: list[str]) -> list[dict[str, Any]]:
    """The JSON of the events among a stream's lines."""
    return [json.loads(line[6:]) for line in found if line.startswith("data: {")]


def text_of(found: list[str], choice: int = 0) -> str:
    return "".join(
        c["delta"].get("content", "") for e in events(found) for c in e.get("choices", ()) if c["index"] == choice
    )


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until a condition (plain or a coroutine) holds; fails loudly when it never does."""
    async with asyncio.timeout(seconds):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def cluster(nats_url: str, redis_url: str, prefix: str, **settings: Any) -> AsyncIterator[Cluster]:
    """A gateway with a stream of requests, and nothing else."""
    values = {"heartbeat_s": 0.2, "record_ttl_s": 2.0, "drain_s": 0.5, "ack_wait_s": 1.0, **settings}
    config = GatewaySettings(nats_url=nats_url, redis_url=redis_url, prefix=prefix, http_port=0, **values)
    stopping = asyncio.Event()

    async def serve(context: Context[GatewaySettings]) -> None:
        await serve_checked(context, check=True)

    async with (
        Bus.connect(nats_url, name="test", prefix=prefix) as bus,
        Registry.connect(redis_url, prefix=prefix) as registry,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http,
        asyncio.TaskGroup() as tasks,
    ):
        await bus.ensure_stream(file_storage=False)
        gateway = tasks.create_task(run_service("gateway", "g1", config, serve, stopping))

        async def ready() -> bool:
            record = await registry.get(GatewayRecord, "g1")
            return record is not None and record.phase is Phase.READY

        await until(ready)
        record = await registry.get(GatewayRecord, "g1")
        assert record is not None
        it = Cluster(record.url, bus, registry, http, tasks, stopping, gateway)
        await bus.subscribe(DEMAND, it.demands.append)
        await bus.flush()
        try:
            yield it
        finally:
            stopping.set()
            async with asyncio.timeout(60):
                await asyncio.wait([gateway])
