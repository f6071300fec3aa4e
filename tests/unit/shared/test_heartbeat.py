"""A record is written when it changes, but a large one not all the time."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from shared.contracts.records import Phase, ReplicaRecord, ReplicaState, ServerRecord
from shared.lifecycle import REST, Context, Heartbeat


def record(phase: Phase) -> ServerRecord:
    return ServerRecord(
        server_id="s1", phase=phase, host="h", pid=1, dram_capacity_bytes=0, dram_used_bytes=0, leased_bytes=0,
        ssd_capacity_bytes=0, ssd_used_bytes=0,
    )  # fmt: skip


@pytest.mark.parametrize("makes_s", [0.0, 0.01], ids=["small", "large"])
def test_telling_of_changes_takes_a_bounded_part_of_the_time(makes_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[ServerRecord] = []
    worked_s = [0.0]  # by its own clock, on which nothing else passes
    monkeypatch.setattr("shared.lifecycle.time", SimpleNamespace(perf_counter=lambda: worked_s[0]))

    async def put(one: ServerRecord, *, ttl_s: float | None) -> None:
        written.append(one)

    context = SimpleNamespace(
        phase=Phase.READY,
        registry=SimpleNamespace(put=put),
        settings=SimpleNamespace(record_ttl_s=9.0, heartbeat_s=9.0),
        changed=lambda *_, **__: None,
    )

    def make(phase: Phase) -> ServerRecord:
        worked_s[0] += makes_s
        return record(phase)

    async def go() -> float:
        beat = Heartbeat(cast(Context[Any], context), make)
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(beat.run())
            for _ in range(50):
                beat.touch()
                await asyncio.sleep(0.01)
            running.cancel()
        return time.monotonic() - began

    passed_s = asyncio.run(go())
    assert 1 <= len(written) <= 51
    if makes_s:
        assert REST * worked_s[0] <= passed_s + REST * 2 * makes_s, "the first at once, and the last one's rest to come"
    else:
        assert len(written) >= 10


def test_only_what_somebody_must_know_at_once_is_told() -> None:
    put: list[ReplicaRecord] = []
    told: list[bool] = []
    now = ReplicaRecord(
        replica_id="r1", worker_id="w1", server_id="s1", deployment="m", revision="r", checkpoint_id="c",
        state=ReplicaState.READY, slots=4,
    )  # fmt: skip

    async def keep(one: ReplicaRecord, *, ttl_s: float | None) -> None:
        put.append(one)

    context = SimpleNamespace(
        phase=Phase.READY,
        registry=SimpleNamespace(put=keep),
        settings=SimpleNamespace(record_ttl_s=9.0, heartbeat_s=9.0),
        changed=lambda *_, **__: told.append(True),
    )
    beat = Heartbeat(cast(Context[Any], context), lambda _: now)

    def tells(**fields: Any) -> bool:
        """Whether this change is told; it is written in any case."""
        nonlocal now
        now = msgspec.structs.replace(now, **fields)
        told.clear()
        asyncio.run(beat.push())
        assert put[-1] == now
        return bool(told)

    assert tells()
    assert not tells()
    assert not tells(idle_s=3.0)
    assert not tells(output_tokens=7, generated_tokens=70, step_s=0.01)
    assert tells(running=1)
    assert tells(state=ReplicaState.DRAINING)
    assert not tells()
    beat.tell_again()
    assert tells()
