"""The wiring of the scheduler: settings → clients → core → subscriptions and flush → ready."""

from __future__ import annotations

import asyncio
import os
import secrets

from services.scheduler.core import Core
from services.scheduler.rules import Rules
from services.scheduler.service import Service
from shared.contracts.records import Phase, SchedulerRecord
from shared.errors import HearthError
from shared.lifecycle import Context, run
from shared.settings import SchedulerSettings


def rules_of(settings: SchedulerSettings) -> Rules:
    """The core's numbers from the environment's."""
    return Rules(
        look_interval_s=settings.look_interval_s,
        command_s=settings.command_timeout_s,
        kv_bytes_max=settings.kv_bytes_max,
    )


async def serve(context: Context[SchedulerSettings]) -> None:
    """One life of a scheduler. A second one waits until the first is gone: two would command the same workers."""
    pid = os.getpid()
    context.heartbeat(lambda phase: SchedulerRecord(scheduler_id=context.id, phase=phase, pid=pid))
    await context.bus.ensure_stream(limit=context.settings.queue_limit)
    if not await _turn(context):
        return
    service = Service(context, Core(rules_of(context.settings), instance=secrets.token_hex(2)))
    await service.listen()
    await context.bus.flush()
    driver = context.tasks.create_task(service.driver.run(), name="scheduler")
    oriented = context.tasks.create_task(service.oriented.wait(), name="oriented")
    stopping = context.tasks.create_task(context.stopping.wait(), name="stopping")
    await asyncio.wait((oriented, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not context.stopping.is_set():
        await context.ready()
    await stopping
    # Nothing is handed over: whatever is under way is in the registry, and the next scheduler goes on with it.
    await context.drain()
    oriented.cancel()
    driver.cancel()


async def _turn(context: Context[SchedulerSettings]) -> bool:
    """Wait until no other scheduler is at work or came first; False when asked to stop meanwhile."""
    told = False
    while not context.stopping.is_set():
        try:
            records = await context.registry.all(SchedulerRecord)
        except HearthError:
            records = []
            await asyncio.sleep(context.settings.heartbeat_s)
            continue
        others = [
            one
            for one in records
            if one.scheduler_id != context.id
            and (one.phase in (Phase.READY, Phase.DRAINING) or one.scheduler_id < context.id)
        ]
        if not others:
            return True
        if not told:
            context.log.warning("scheduler.waiting", scheduler_id=others[0].scheduler_id)
            told = True
        try:
            async with asyncio.timeout(context.settings.heartbeat_s):
                await context.stopping.wait()
        except TimeoutError:
            continue
    return False


def main() -> int:
    """`hearth scheduler`; the exit code."""
    return run("scheduler", SchedulerSettings, serve)
