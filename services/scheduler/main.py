"""The wiring of the scheduler: settings → clients → leadership → subscriptions and flush → ready."""

from __future__ import annotations

import asyncio
import math
import secrets

from services.scheduler.ahead import AheadRules
from services.scheduler.core import Core
from services.scheduler.fairness import FairnessRules
from services.scheduler.leader import Leader
from services.scheduler.rules import Rules
from services.scheduler.service import Service
from shared.errors import HearthError
from shared.lifecycle import Context, run
from shared.settings import SchedulerSettings

ASK_AGAIN_S = 0.5


def rules_of(settings: SchedulerSettings) -> Rules:
    """The core's numbers from the environment's."""
    return Rules(
        look_interval_s=settings.look_interval_s,
        command_s=settings.command_timeout_s,
        kv_bytes_max=settings.kv_bytes_max,
        migrates=settings.migrate_for_placement,
        fairness=FairnessRules(
            start_within_s=settings.start_within_s or math.inf,
            tenure_min_s=settings.tenure_s,
        ),
        ahead=AheadRules(bytes_per_s=settings.prefetch_bytes_per_s, fill_bytes_per_s=settings.fill_bytes_per_s),
    )


async def serve(context: Context[SchedulerSettings]) -> None:
    """One life of a scheduler: it leads or stands by."""
    rules = rules_of(context.settings)
    await _until_stream(context)

    def make(leader: Leader) -> Service:
        # The term alone would do, had no registry ever lost its own.
        core = Core(rules, instance=f"{leader.machine.term}{secrets.token_hex(2)}-")
        return Service(context, core, leader)

    async with Leader.of(context, make) as leader:
        context.tasks.create_task(_say_ready(context, leader), name="ready")
        await leader.run()
        # Nothing is handed over: whatever is under way is in the registry, and the next leader goes on with it.
        await context.drain()


async def _until_stream(context: Context[SchedulerSettings]) -> None:
    """Make sure of the stream of requests; a server that has just started may not be able to yet."""
    until = asyncio.get_running_loop().time() + context.settings.start_wait_s
    while not context.stopping.is_set():
        try:
            await context.bus.ensure_stream(limit=context.settings.queue_limit)
            return
        except HearthError as error:
            if asyncio.get_running_loop().time() >= until:
                raise
            context.log.warning("service.waiting", on="JetStream", error=error.failure.message)
        await asyncio.sleep(ASK_AGAIN_S)


async def _say_ready(context: Context[SchedulerSettings], leader: Leader) -> None:
    await leader.settled.wait()
    if not context.stopping.is_set():
        await context.ready()


def main() -> int:
    """`hearth scheduler`; the exit code."""
    return run("scheduler", SchedulerSettings, serve)
