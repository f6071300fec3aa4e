"""Two and three workers over a real bus, whose requests move while they run; the gateway is hand-written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from shared.bus import Bus
from shared.contracts.migration import Drain, ListRequests, Migrate, MigrationEnded, MigrationOutcome
from shared.contracts.records import Phase, ReplicaState, WorkerRecord
from shared.contracts.requests import Check, Owned
from shared.errors import Code, HearthError
from shared.registry import Registry
from shared.settings import WorkerSettings
from shared.subjects import CHECK, DRAIN, LIST_REQUESTS, MIGRATE, MIGRATION_ENDED
from tests.integration.worker.cluster import Gateway, Operator, expected, worker


@pytest.fixture
def settings(nats_url: str, redis_url: str, prefix: str) -> WorkerSettings:
    return WorkerSettings(
        nats_url=nats_url,
        redis_url=redis_url,
        prefix=prefix,
        heartbeat_s=0.1,
        ack_wait_s=5.0,
        drain_s=5.0,
        hold_s=0.2,
        engine="null",
        worker_memory_bytes=4 << 20,
    )


@pytest_asyncio.fixture
async def operator(bus: Bus, registry: Registry) -> AsyncIterator[Operator]:
    made = Operator(bus, registry)
    await made.open(ack_wait_s=5.0)
    yield made


class Migrations:
    """Commands migrations, and hears how they end."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.ended: list[MigrationEnded] = []
        self._changed = asyncio.Event()

    async def open(self) -> None:
        await self.bus.subscribe(MIGRATION_ENDED, self._heard, worker_id="*")
        await self.bus.flush()

    def _heard(self, message: MigrationEnded) -> None:
        self.ended.append(message)
        self._changed.set()

    async def begin(self, source: str, destination: str, replica_id: str, *request_ids: str, whole: str = "") -> int:
        message = Migrate(to_worker_id=destination, to_replica_id=replica_id, request_ids=request_ids, replica_id=whole)
        return len((await self.bus.call(MIGRATE, message, worker_id=source)).request_ids)

    async def until(self, count: int) -> list[MigrationEnded]:
        async with asyncio.timeout(60):
            while len(self.ended) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.ended


@pytest_asyncio.fixture
async def migrations(bus: Bus) -> AsyncIterator[Migrations]:
    made = Migrations(bus)
    await made.open()
    yield made


async def test_a_stream_moves_and_its_client_gets_every_token_once(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, migrations: Migrations, bus: Bus
) -> None:
    async with worker(settings, "w1"), worker(settings, "w2"):
        await operator.load("w1", "r1")
        await operator.ask("q1", max_tokens=200)
        await gateway.until(lambda: len(gateway.tokens.get("q1", ())) > 20)
        await operator.load("w2", "r2")
        assert await migrations.begin("w1", "w2", "r2", "q1") == 1
        (ended,) = await migrations.until(1)
        assert ended.outcome is MigrationOutcome.COMMITTED
        assert (ended.source_worker_id, ended.destination_worker_id) == ("w1", "w2")
        assert ended.rounds >= 1 and ended.wire_bytes > 0 and ended.tokens > 20
        listed = await bus.call(LIST_REQUESTS, ListRequests(), worker_id="w2")
        assert [(one.request_id, one.epoch) for one in listed.requests] == [("q1", 2)]
        end = await gateway.ended("q1")
        assert gateway.text["q1"] == expected(200)
        assert gateway.workers["q1"] == ["w1", "w2"]
        assert (end.ledger.migrations, end.ledger.rounds) == (1, ended.rounds)
        await operator.until_outstanding(0)


async def test_a_stream_goes_there_and_back_many_times(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, migrations: Migrations
) -> None:
    async with worker(settings, "w1"), worker(settings, "w2"):
        await operator.load("w1", "r1")
        await operator.ask("q1", max_tokens=400)
        await gateway.until(lambda: gateway.tokens.get("q1"))
        await operator.load("w2", "r2")
        way = [("w1", "w2", "r2"), ("w2", "w1", "r1")] * 4
        for number, (source, destination, replica_id) in enumerate(way, 1):
            await migrations.begin(source, destination, replica_id, "q1")
            await migrations.until(number)
        assert {one.outcome for one in migrations.ended} == {MigrationOutcome.COMMITTED}
        end = await gateway.ended("q1")
        assert gateway.text["q1"] == expected(400)
        assert end.ledger.migrations == 8
        await operator.until_outstanding(0)


async def test_requests_cross_in_both_directions_at_once(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, migrations: Migrations
) -> None:
    async with worker(settings, "w1"), worker(settings, "w2"):
        await operator.load("w1", "r1")
        for name in ("a1", "a2"):
            await operator.ask(name, max_tokens=250)
        await gateway.until(lambda: len(gateway.tokens) == 2)
        await operator.load("w2", "r2", slots=6)
        # The queue must not give these to w1: two of its slots are free, so fill them for a moment.
        for name in ("b1", "b2", "b3", "b4"):
            await operator.ask(name, max_tokens=250)
        await gateway.until(lambda: len(gateway.tokens) == 6)
        here = {name: workers[-1] for name, workers in gateway.workers.items()}
        left = [name for name, where in here.items() if where == "w1"][:2]
        right = [name for name, where in here.items() if where == "w2"][:2]
        begun = 0
        for name in left:
            begun += await migrations.begin("w1", "w2", "r2", name)
        for name in right:
            begun += await migrations.begin("w2", "w1", "r1", name)
        await migrations.until(begun)
        for name in here:
            await gateway.ended(name)
            assert gateway.text[name] == expected(250)
        # A full destination refuses; then the request stays where it was. None is lost either way.
        codes = {one.failure.code for one in migrations.ended if one.failure}
        assert codes <= {Code.BUSY}
        await operator.until_outstanding(0)


async def test_all_requests_of_a_replica_move_and_it_is_free_then(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, migrations: Migrations
) -> None:
    async with worker(settings, "w1"), worker(settings, "w2"):
        await operator.load("w1", "r1")
        names = [f"q{number}" for number in range(4)]
        for name in names:
            await operator.ask(name, max_tokens=300)
        await gateway.until(lambda: len(gateway.tokens) == 4)
        await operator.load("w2", "r2")
        await operator.stop("w1", "r1", drain=True)
        assert await migrations.begin("w1", "w2", "r2", whole="r1") == 4
        await migrations.until(4)
        assert {one.outcome for one in migrations.ended} == {MigrationOutcome.COMMITTED}
        await operator.until_state("r1", None)
        for name in names:
            await gateway.ended(name)
            assert gateway.text[name] == expected(300)


async def test_a_destination_that_dies_costs_the_client_nothing(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, migrations: Migrations
) -> None:
    async with worker(settings, "w1"), worker(settings, "w2") as second:
        await operator.load("w1", "r1")
        await operator.ask("q1", max_tokens=200)
        await gateway.until(lambda: gateway.tokens.get("q1"))
        await operator.load("w2", "r2")
        await second.crash()
        await migrations.begin("w1", "w2", "r2", "q1")
        (ended,) = await migrations.until(1)
        assert ended.outcome is MigrationOutcome.ABORTED
        assert ended.failure is not None and ended.failure.code is Code.UNAVAILABLE
        await gateway.ended("q1")
        assert gateway.text["q1"] == expected(200)
        assert gateway.workers["q1"] == ["w1"]


async def test_a_source_that_dies_after_the_hand_over_is_not_missed(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, migrations: Migrations
) -> None:
    async with worker(settings, "w1") as first, worker(settings, "w2"):
        await operator.load("w1", "r1")
        await operator.ask("q1", max_tokens=300)
        await gateway.until(lambda: gateway.tokens.get("q1"))
        await operator.load("w2", "r2")
        await migrations.begin("w1", "w2", "r2", "q1")
        await gateway.until(lambda: gateway.epochs["q1"] == 2)
        await first.crash()
        await gateway.ended("q1")
        assert gateway.text["q1"] == expected(300)
        await operator.until_outstanding(0)


async def test_a_worker_is_drained_and_takes_work_again(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, registry: Registry, bus: Bus
) -> None:
    async with worker(settings, "w1"):
        await operator.load("w1", "r1")
        await operator.ask("q1", max_tokens=30)
        await gateway.until(lambda: gateway.tokens.get("q1"))
        await bus.call(DRAIN, Drain(on=True), worker_id="w1")
        await operator.until_state("r1", None)
        assert gateway.text["q1"] == expected(30), "what runs ends before the replica goes"
        record = await registry.get(WorkerRecord, "w1")
        assert record is not None and record.phase is Phase.DRAINING
        with pytest.raises(HearthError, match="drained"):
            await operator.load("w1", "r2")
        await bus.call(DRAIN, Drain(on=False), worker_id="w1")
        await operator.load("w1", "r3")
        await operator.until_state("r3", ReplicaState.READY)


async def test_a_gateway_hears_what_runs_and_asks_what_does(
    settings: WorkerSettings, operator: Operator, gateway: Gateway, bus: Bus
) -> None:
    async with worker(settings, "w1"):
        await operator.load("w1", "r1")
        await operator.ask("q1", max_tokens=200)
        await gateway.until(lambda: gateway.held)
        assert [one.request_id for one in gateway.held[0].requests] == ["q1"]
        asked = Check(requests=(Owned(request_id="q1", epoch=1), Owned(request_id="q2", epoch=1)))
        running = await bus.call(CHECK, asked, worker_id="w1")
        assert [one.request_id for one in running.requests] == ["q1"]
        gateway.cancel("q1")


async def test_requests_of_a_gateway_that_is_dead_are_dropped(
    settings: WorkerSettings, operator: Operator, bus: Bus
) -> None:
    dying = Gateway(bus, "g2")
    await dying.open()
    async with worker(msgspec.structs.replace(settings, gateway_lost_s=1.0), "w1"):
        await operator.load("w1", "r1")
        await operator.ask("q1", max_tokens=50_000, gateway_id="g2")
        await dying.until(lambda: dying.tokens.get("q1"))
        await dying.die()
        await operator.until_outstanding(0)
