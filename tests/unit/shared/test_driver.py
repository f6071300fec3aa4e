"""The driver: order, timers before the inbox, long actions as tasks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from shared.driver import Driver
from shared.errors import Code, HearthError


@dataclass(frozen=True)
class Say:
    text: str


@dataclass(frozen=True)
class Fetch:
    text: str


class Echo:
    """Says every event; fetches those that begin with "fetch"; speaks once when its timer is due."""

    def __init__(self) -> None:
        self.due: float | None = None
        self.checks = 0

    def handle(self, event: str | None, now: float) -> list[Say | Fetch]:
        if event is None:
            self.due = None
            return [Say("timer")]
        if event == "arm":
            self.due = now
            return []
        if event == "crash":
            raise RuntimeError("a bug")
        if event.startswith("fetch"):
            return [Say(event), Fetch(event)]
        return [Say(event)]

    def deadline(self) -> float | None:
        return self.due

    def check(self) -> None:
        self.checks += 1


@contextlib.asynccontextmanager
async def running(core: Echo, said: list[str]) -> AsyncIterator[Driver[str, Say | Fetch]]:
    async def do(action: Say | Fetch) -> str | None:
        await asyncio.sleep(0)
        return None if action.text == "fetch nothing" else f"got {action.text}"

    driver: Driver[str, Say | Fetch] = Driver(
        core, tell=lambda action: said.append(action.text), do=do, long=(Fetch,), inbox_limit=1000, check=True
    )
    task = asyncio.get_running_loop().create_task(driver.run())
    await asyncio.sleep(0)
    try:
        yield driver
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
            await task


async def settled(said: list[str], count: int) -> None:
    async with asyncio.timeout(60):
        while len(said) < count:
            await asyncio.sleep(0)


async def test_events_are_handled_in_order_and_checked() -> None:
    said: list[str] = []
    core = Echo()
    async with running(core, said) as driver:
        for number in range(600):
            driver.post(str(number))
        await settled(said, 600)
    assert said == [str(number) for number in range(600)]
    assert core.checks == 600


async def test_the_result_of_a_long_action_comes_back_as_an_event() -> None:
    said: list[str] = []
    async with running(Echo(), said) as driver:
        driver.post("fetch nothing")
        driver.post("fetch x")
        await settled(said, 3)
    assert said == ["fetch nothing", "fetch x", "got fetch x"]


async def test_a_due_timer_goes_before_a_full_inbox() -> None:
    said: list[str] = []
    core = Echo()
    async with running(core, said) as driver:
        core.due = 0.0
        for number in range(10):
            driver.post(str(number))
        await settled(said, 11)
    assert said[0] == "timer"


async def test_a_timer_wakes_an_idle_driver() -> None:
    said: list[str] = []
    async with running(Echo(), said) as driver:
        driver.post("arm")
        await settled(said, 1)
    assert said == ["timer"]


async def test_events_from_other_threads_arrive() -> None:
    said: list[str] = []
    async with running(Echo(), said) as driver:
        await asyncio.to_thread(driver.post_threadsafe, "from afar")
        await settled(said, 1)
    assert said == ["from afar"]


async def test_a_full_inbox_refuses() -> None:
    core = Echo()
    async with running(core, []) as driver:
        for number in range(1000):
            driver.post(str(number))
        with pytest.raises(HearthError) as caught:
            driver.post("one too many")
    assert caught.value.failure.code is Code.UNAVAILABLE


async def test_a_bug_in_a_core_ends_the_driver() -> None:
    driver: Driver[str, Say | Fetch] = Driver(Echo(), tell=lambda action: None, do=lambda action: None, long=())  # type: ignore[arg-type,return-value]
    driver.post("crash")
    with pytest.raises(BaseExceptionGroup) as caught:
        await driver.run()
    assert caught.value.subgroup(RuntimeError) is not None
