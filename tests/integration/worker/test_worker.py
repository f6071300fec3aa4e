"""A worker on a real bus and a real registry: requests, cancels, deaths, drains."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from services.worker.null_engine import NullLoader
from shared.bus import Bus
from shared.contracts.generation import FinishReason
from shared.contracts.placement import ReplicaFailed
from shared.contracts.records import Phase, ReplicaRecord, ReplicaState, WorkerRecord
from shared.contracts.requests import ChatMessage, ChatPrompt, Sampling
from shared.contracts.residency import Lease
from shared.errors import Code, HearthError
from shared.registry import Registry
from shared.settings import WorkerSettings
from shared.subjects import LOAD, REPLICA_FAILED
from tests.integration.worker.cluster import Gateway, Operator, SlowLoader, expected, load_message, worker


@pytest.fixture
def settings(nats_url: str, redis_url: str, prefix: str) -> WorkerSettings:
    return WorkerSettings(
        nats_url=nats_url,
        redis_url=redis_url,
        prefix=prefix,
        engine="null",
        heartbeat_s=0.2,
        ack_wait_s=1.0,
        drain_s=1.0,
        worker_memory_bytes=4 << 20,
    )


@pytest_asyncio.fixture
async def operator(bus: Bus, registry: Registry) -> AsyncIterator[Operator]:
    made = Operator(bus, registry)
    await made.open(ack_wait_s=1.0)
    yield made


async def test_a_queued_request_is_answered_by_the_replica_that_is_loaded_for_it(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    async with worker(settings):
        await operator.ask("q1", max_tokens=20)
        await operator.load("w1")
        end = await gateway.ended("q1")
        assert end.reason is FinishReason.LENGTH
        assert gateway.text["q1"] == expected(20)
        assert (end.index, end.usage.prompt_tokens, end.usage.completion_tokens) == (20, 2, 20)
        await operator.until_outstanding(0)


async def test_more_requests_than_slots_are_all_answered_once(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    async with worker(settings, loader=NullLoader()):
        await operator.load("w1")
        for number in range(50):
            await operator.ask(f"q{number}", max_tokens=5)
        await gateway.until(lambda: len(gateway.ends) == 50)
        await operator.until_outstanding(0)
        assert all(len(ends) == 1 for ends in gateway.ends.values())
        assert set(gateway.text.values()) == {expected(5)}
        record = await operator.until_state("r1", ReplicaState.READY)
        assert record is not None
        async with asyncio.timeout(60):
            while record.finished_requests != 50 or record.running:
                record = await operator.until_state("r1", ReplicaState.READY)
                assert record is not None
        assert record.generated_tokens == 250


async def test_a_stop_string_ends_the_text_before_it(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    async with worker(settings):
        await operator.load("w1")
        await operator.ask("q1", sampling=Sampling(max_tokens=50, stop=("th he",)))
        end = await gateway.ended("q1")
        assert (end.reason, end.stop) == (FinishReason.STOP, "th he")
        assert gateway.text["q1"] == "hear"


async def test_a_prompt_that_does_not_fit_is_refused_with_numbers_and_leaves_the_queue(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    async with worker(settings):
        await operator.load("w1", max_context_tokens=10)
        long = ChatPrompt(messages=(ChatMessage(role="user", content="x" * 6000),))
        await operator.ask("q1", prompt=long)
        failure = (await gateway.ended("q1")).failure
        assert failure is not None
        assert failure.code is Code.PROMPT_TOO_LONG
        assert "at most 10 tokens" in failure.message
        await operator.until_outstanding(0)


async def test_a_cancelled_request_stops_within_a_step_and_leaves_the_queue(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    async with worker(settings):
        await operator.load("w1")
        await operator.ask("q1", max_tokens=10_000)
        await gateway.until(lambda: len(gateway.tokens.get("q1", ())) > 3)
        gateway.cancel("q1")
        await operator.until_outstanding(0)
        heard = len(gateway.tokens["q1"])
        await asyncio.sleep(0.2)
        assert len(gateway.tokens["q1"]) <= heard + 1
        assert not gateway.ends


async def test_a_requeued_request_goes_on_where_its_client_is(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    async with worker(settings):
        await operator.load("w1")
        await operator.ask("q1", max_tokens=60)
        await gateway.until(lambda: len(gateway.tokens.get("q1", ())) > 3)
        gateway.cancel("q1", requeue=True)
        await gateway.ended("q1")
        assert gateway.epochs["q1"] == 2
        assert gateway.text["q1"] == expected(60)


async def test_a_request_whose_client_left_before_the_claim_leaves_the_queue(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    gateway.gone.add("q1")
    async with worker(settings):
        await operator.load("w1")
        await operator.ask("q1")
        await operator.until_outstanding(0)
        assert "q1" not in gateway.tokens


async def test_a_request_of_a_gateway_that_died_leaves_the_queue(settings: WorkerSettings, operator: Operator) -> None:
    async with worker(msgspec.structs.replace(settings, max_deliveries=2)):
        await operator.load("w1")
        await operator.ask("q1", gateway_id="nobody")
        await operator.until_outstanding(0)


async def test_a_long_request_is_not_redelivered_while_it_runs(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    async with worker(settings):
        await operator.load("w1")
        await operator.ask("q1", max_tokens=250)  # 2.5 s, more than twice the queue's patience
        await gateway.ended("q1")
        assert gateway.epochs["q1"] == 1


async def test_when_a_worker_vanishes_another_one_goes_on(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    async with worker(settings, "w1") as first, worker(settings, "w2"):
        await operator.load("w1", "r1")
        await operator.ask("q1", max_tokens=100)
        await gateway.until(lambda: len(gateway.tokens.get("q1", ())) > 3)
        await first.crash()
        await operator.load("w2", "r2")
        await gateway.ended("q1")
        assert gateway.workers["q1"] == ["w1", "w2"]
        assert gateway.text["q1"] == expected(100)
        await operator.until_outstanding(0)
        await operator.until_state("r1", None)  # its record expires


async def test_a_killed_process_loses_no_request(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEARTH_")} | {
        "HEARTH_NATS_URL": settings.nats_url,
        "HEARTH_REDIS_URL": settings.redis_url,
        "HEARTH_PREFIX": settings.prefix,
        "HEARTH_ENGINE": "null",
        "HEARTH_WORKER_ID": "victim",
        "HEARTH_WORKER_MEMORY_BYTES": str(4 << 20),
    }
    command = (sys.executable, "-m", "services.worker.main")
    process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(60):
            while await operator.registry.get(WorkerRecord, "victim") is None:
                await asyncio.sleep(0.05)
        await operator.load("victim", "r1")
        process.send_signal(signal.SIGSTOP)
        await operator.ask("q1", max_tokens=30_000)
        async with asyncio.timeout(60):
            while not gateway.tokens.get("q1"):  # a little at a time, or it is over before anybody looks
                process.send_signal(signal.SIGCONT)
                await asyncio.sleep(0.02)
                process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    assert "q1" not in gateway.ends
    async with worker(settings, "w2", loader=NullLoader()):
        await operator.load("w2", "r2")
        await gateway.ended("q1")
    assert gateway.workers["q1"] == ["victim", "w2"]
    assert gateway.text["q1"] == expected(30_000)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dead_engine_is_told_and_its_requests_are_tried_elsewhere(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, bus: Bus
) -> None:
    told: list[ReplicaFailed] = []
    await bus.subscribe(REPLICA_FAILED, told.append)
    async with worker(settings, "w1"):
        await operator.load("w1", "r1")
        await operator.ask("q1", sampling=Sampling(max_tokens=10, seed=666))
        await operator.until_state("r1", None)
        assert await operator.outstanding() == 1
        assert (told[0].replica_id, told[0].failure.code) == ("r1", Code.INTERNAL)
        assert not gateway.ends


async def test_stopping_an_idle_replica_frees_everything(
    settings: WorkerSettings, operator: Operator, registry: Registry
) -> None:
    loader = SlowLoader()
    async with worker(settings, loader=loader):
        await operator.load("w1")
        assert loader.open == 1
        await operator.stop("w1")
        await operator.until_state("r1", None)
        assert loader.open == 0
        async with asyncio.timeout(60):
            while (record := await registry.get(WorkerRecord, "w1")) is None or record.memory_used_bytes:
                await asyncio.sleep(0.02)
        await operator.load("w1", "r2")


async def test_a_busy_replica_refuses_to_stop_but_drains(
    settings: WorkerSettings, operator: Operator, gateway: Gateway
) -> None:
    async with worker(settings):
        await operator.load("w1")
        await operator.ask("q1", max_tokens=50)
        await gateway.until(lambda: gateway.tokens.get("q1"))
        with pytest.raises(HearthError) as refused:
            await operator.stop("w1")
        assert refused.value.failure.code is Code.BUSY
        await operator.stop("w1", drain=True)
        await operator.until_state("r1", None)
        await gateway.ended("q1")
        assert gateway.text["q1"] == expected(50)


async def test_loads_are_refused_when_the_memory_is_used_up(settings: WorkerSettings, operator: Operator) -> None:
    async with worker(settings):
        with pytest.raises(HearthError) as refused:
            await operator.bus.call(LOAD, load_message(kv_bytes=5 << 20), worker_id="w1")
        assert refused.value.failure.code is Code.OUT_OF_MEMORY


async def test_a_load_without_a_store_fails_and_leaves_nothing(
    settings: WorkerSettings, operator: Operator, bus: Bus, registry: Registry
) -> None:
    class NoStore:
        async def acquire(self, message: object) -> None:
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, "The directory is gone.")

    told = asyncio.Queue[ReplicaFailed]()
    await bus.subscribe(REPLICA_FAILED, told.put_nowait)
    async with worker(settings, leases=NoStore()):  # type: ignore[arg-type]
        await bus.call(LOAD, load_message(), worker_id="w1")
        async with asyncio.timeout(60):
            failed = await told.get()
        assert failed.failure.message == "The directory is gone."
        assert await registry.get(ReplicaRecord, "r1") is None


class OddModels(SlowLoader):
    """A model called "odd" is one that its own code cannot build."""

    def load(self, lease: Lease, **how: Any) -> Any:
        if lease.lease_id == "odd":
            raise RuntimeError("shapes do not match")
        return super().load(lease, **how)


async def test_a_model_that_nobody_has_met_before_fails_alone(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, bus: Bus
) -> None:
    told = asyncio.Queue[ReplicaFailed]()
    await bus.subscribe(REPLICA_FAILED, told.put_nowait)
    async with worker(settings, loader=OddModels()):
        await operator.load("w1", "r1")
        await bus.call(LOAD, load_message("odd"), worker_id="w1")
        async with asyncio.timeout(60):
            failed = await told.get()
        assert (failed.replica_id, failed.failure.code) == ("odd", Code.INTERNAL)
        assert "RuntimeError" in failed.failure.message
        await operator.ask("q1")
        await gateway.ended("q1")


async def test_a_draining_worker_finishes_what_is_short_and_gives_back_what_is_long(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, registry: Registry
) -> None:
    loader = SlowLoader()
    async with worker(settings, "w1", loader=loader) as first, worker(settings, "w2"):
        await operator.load("w1", "r1")
        await operator.ask("short", max_tokens=30)
        await operator.ask("long", max_tokens=200)
        await gateway.until(lambda: gateway.tokens.get("short") and gateway.tokens.get("long"))
        first.begin_stop()
        await operator.load("w2", "r2")
        await first.stop()
        assert loader.open == 0
        assert await registry.get(WorkerRecord, "w1") is None
        assert await registry.get(ReplicaRecord, "r1") is None
        await gateway.ended("long")
        assert gateway.workers == {"short": ["w1"], "long": ["w1", "w2"]}
        assert gateway.text == {"short": expected(30), "long": expected(200)}
        await operator.until_outstanding(0)


async def test_the_records_tell_what_is_here(settings: WorkerSettings, operator: Operator, registry: Registry) -> None:
    async with worker(settings):
        await operator.load("w1")
        record = await registry.get(WorkerRecord, "w1")
        assert record is not None
        assert (record.server_id, record.phase, record.device) == ("server-1", Phase.READY, "cpu")
        replica = await registry.get(ReplicaRecord, "r1")
        assert replica is not None
        assert (replica.worker_id, replica.deployment, replica.slots, replica.engine) == ("w1", "demo", 4, "null")
