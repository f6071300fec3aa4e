"""A worker obeys the leader of the highest term that it has heard of, and operators; a load is shown at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from shared.bus import Bus
from shared.contracts.migration import Migrate
from shared.contracts.placement import Leading, StopReplica
from shared.contracts.records import ReplicaRecord, ReplicaState
from shared.contracts.residency import Done
from shared.errors import Code, Failure, HearthError
from shared.registry import Registry
from shared.settings import WorkerSettings
from shared.subjects import LEADING, LOAD, MIGRATE, STOP
from tests.integration.worker.cluster import Operator, load_message, worker


@pytest_asyncio.fixture
async def operator(bus: Bus, registry: Registry, nats_url: str, redis_url: str, prefix: str) -> AsyncIterator[Operator]:
    """Beside a worker that runs."""
    one = Operator(bus, registry)
    await one.open()
    settings = WorkerSettings(
        nats_url=nats_url, redis_url=redis_url, prefix=prefix, heartbeat_s=0.2, drain_s=0.2, engine="null"
    )
    async with worker(settings):
        yield one


async def refusal(bus: Bus, *, migrate: bool = False, term: int) -> Failure:
    """How a command of this term is refused."""
    try:
        if migrate:
            await bus.call(MIGRATE, Migrate(to_worker_id="w2", to_replica_id="r", term=term), worker_id="w1")
        else:
            await bus.call(STOP, StopReplica(replica_id="r1", reason="test", term=term), worker_id="w1")
    except HearthError as error:
        return error.failure
    raise AssertionError("it was obeyed")


async def test_old_leaders_are_refused(bus: Bus, operator: Operator) -> None:
    assert await bus.call(LOAD, load_message("r1", term=5), worker_id="w1") == Done()
    await operator.until_state("r1", ReplicaState.READY)
    with pytest.raises(HearthError, match="w1 has heard of term 5") as caught:
        await bus.call(LOAD, load_message("r2", term=4), worker_id="w1")
    assert (caught.value.failure.code, caught.value.failure.term) == (Code.STALE_EPOCH, 5)
    bus.publish(LEADING, Leading(scheduler_id="s2", term=9))
    await bus.flush()
    async with asyncio.timeout(60):  # refused in any case, as there is nothing to migrate: but why?
        while (await refusal(bus, migrate=True, term=8)).code is not Code.STALE_EPOCH:
            await asyncio.sleep(0.01)
    assert (await refusal(bus, term=5)).term == 9
    assert await operator.until_state("r1", ReplicaState.READY) is not None
    await operator.stop("w1")  # an operator's: term 0
    await operator.until_state("r1", None)


async def test_a_load_that_was_accepted_is_in_the_registry_before_anything_else(
    bus: Bus, registry: Registry, operator: Operator
) -> None:
    for number in range(5):
        await bus.call(LOAD, load_message(f"r{number}", term=1), worker_id="w1")
        async with asyncio.timeout(60):
            while await registry.get(ReplicaRecord, f"r{number}") is None:
                await asyncio.sleep(0)
