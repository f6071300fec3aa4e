"""A real scheduler is asked why."""

from __future__ import annotations

from shared.bus import Bus
from shared.contracts.placement import Explain
from shared.registry import Registry
from shared.subjects import EXPLAIN
from tests.integration.scheduler.test_scheduler_service import running, until_ready


async def test_who_leads_answers_with_its_name_and_term(
    nats_url: str, redis_url: str, prefix: str, bus: Bus, registry: Registry
) -> None:
    async with running(nats_url, redis_url, prefix):
        await until_ready(registry)
        answer = await bus.call(EXPLAIN, Explain(deployment="nobody"))
        assert (answer.scheduler_id, answer.decisions, answer.waiting) == ("scheduler-1", (), "")
        assert answer.term >= 1
