"""A record is written when it changes, but a large one not all the time."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shared.contracts.records import Phase, ServerRecord
from shared.lifecycle import Context, Heartbeat


def record(phase: Phase) -> ServerRecord:
    return ServerRecord(
        server_id="s1", phase=phase, host="h", pid=1, dram_capacity_bytes=0, dram_used_bytes=0, leased_bytes=0,
        ssd_capacity_bytes=0, ssd_used_bytes=0,
    )  # fmt: skip


@pytest.mark.parametrize(("makes_s", "fewest", "most"), [(0.0, 10, 51), (0.01, 1, 10)], ids=["small", "large"])
def test_telling_of_changes_takes_a_bounded_part_of_the_time(makes_s: float, fewest: int, most: int) -> None:
    written: list[ServerRecord] = []

    async def put(one: ServerRecord, *, ttl_s: float | None) -> None:
        written.append(one)

    context = SimpleNamespace(
        phase=Phase.READY,
        registry=SimpleNamespace(put=put),
        settings=SimpleNamespace(record_ttl_s=9.0, heartbeat_s=9.0),
        changed=lambda *_, **__: None,
    )

    def make(phase: Phase) -> ServerRecord:
        time.sleep(makes_s)
        return record(phase)

    async def go() -> None:
        beat = Heartbeat(cast(Context[Any], context), make)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(beat.run())
            for _ in range(50):
                beat.touch()
                await asyncio.sleep(0.01)
            running.cancel()

    asyncio.run(go())
    assert fewest <= len(written) <= most
