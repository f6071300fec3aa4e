"""Whatever dies, hangs or is cut off: the streams of a surviving gateway go on, token for token."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from tests.builders.fleet import NATS, REDIS, Fleet
from tests.builders.remains import until_nothing_remains
from tests.builders.streams import Ask, Stream, Twins

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]

SAMPLED = {"temperature": 1.0, "top_p": 0.95, "frequency_penalty": 0.3, "presence_penalty": 0.2}


def asks(count: int, tokens: int = 600) -> list[Ask]:
    """Greedy and sampled calls in turn."""
    options: list[dict[str, Any]] = [{"temperature": 0}, SAMPLED]
    return [
        Ask.of("long", f"The hearth keeps the fire number {n}", max_tokens=tokens, seed=n, **options[n % 2])
        for n in range(count)
    ]


def begin(fleet: Fleet, calls: list[Ask], gateway: str = "gateway") -> list[Stream]:
    """Streams of these calls, each with its first tokens."""
    streams = [Stream(fleet.urls[gateway], call) for call in calls]
    for stream in streams:
        stream.until_events(10)
    return streams


def check(streams: list[Stream], twins: Twins) -> None:
    """Every stream said what its twin said."""
    differences = {n: stream.wait().differs(twins.of(stream.ask)) for n, stream in enumerate(streams)}
    assert {n: what for n, what in differences.items() if what} == {}


def owned(fleet: Fleet, streams: list[Stream]) -> dict[str, list[Stream]]:
    """Which worker runs which of these streams."""
    running = {one["request_id"]: one["worker_id"] for one in fleet.requests()}
    found: dict[str, list[Stream]] = {}
    for stream in streams:
        worker = running.get(stream.heard.request_id)
        if worker is not None:
            found.setdefault(worker, []).append(stream)
    return found


def busiest(fleet: Fleet, streams: list[Stream]) -> tuple[str, list[Stream]]:
    """The worker that runs most of these streams, with them."""
    by_worker = owned(fleet, streams)
    assert by_worker, "no worker runs any of the streams"
    return max(by_worker.items(), key=lambda pair: len(pair[1]))


def test_a_killed_worker_loses_nothing(fleet: Fleet, twins: Twins) -> None:
    calls = asks(8)
    twins.learn(calls)
    streams = begin(fleet, calls)
    victim, mine = busiest(fleet, streams)
    fleet.kill(victim)
    check(streams, twins)
    assert any(stream.heard.hearth["recoveries"] for stream in mine)
    until_nothing_remains(fleet)


@pytest.mark.parametrize("how", ["stopped", pytest.param("cut off", marks=pytest.mark.by_hand)])
def test_a_worker_that_is_silent_for_long_is_replaced_and_comes_back_in_peace(
    fleet: Fleet, twins: Twins, how: str
) -> None:
    calls = asks(6, 1000)
    twins.learn(calls)
    streams = begin(fleet, calls)
    victim, mine = busiest(fleet, streams)
    if how == "stopped":
        fleet.kill(victim, signal.SIGSTOP)
    else:
        fleet.links[victim].cut()
    time.sleep(0.5)  # what was on its way has arrived
    before = [len(stream.heard.times) for stream in mine]
    # They go on elsewhere while the victim is still silent ...
    for stream, events in zip(mine, before, strict=True):
        stream.until_events(events + 50)
    # ... and what it says when it is back, with its own idea of who owns what, changes nothing.
    if how == "stopped":
        fleet.kill(victim, signal.SIGCONT)
    else:
        fleet.links[victim].heal()
    check(streams, twins)
    assert all(stream.heard.hearth["recoveries"] for stream in mine)
    until_nothing_remains(fleet)


def test_a_killed_gateway_costs_no_compute(fleet: Fleet, twins: Twins) -> None:
    calls = asks(4, 1000)
    twins.learn(calls)
    doomed = begin(fleet, calls, "gateway-2")
    others = begin(fleet, calls)
    victims = {stream.heard.request_id for stream in doomed}
    assert victims & {one["request_id"] for one in fleet.requests()}
    fleet.kill("gateway-2")
    assert all(stream.wait().fault for stream in doomed)
    fleet.until(
        lambda: not victims & {one["request_id"] for one in fleet.requests()}, "nobody works for the dead gateway", 60
    )
    check(others, twins)
    fleet.mend()
    until_nothing_remains(fleet)


@pytest.mark.by_hand
def test_streams_do_not_notice_the_death_of_schedulers_and_stores(fleet: Fleet, twins: Twins) -> None:
    calls = asks(6, 1000)
    twins.learn(calls)
    streams = begin(fleet, calls)
    for name in ("scheduler", "server-1", "server-2"):
        fleet.kill(name)
    for name in ("server-1", "server-2", "scheduler"):
        fleet.restart(name)
    check(streams, twins)
    assert [stream.heard.hearth["recoveries"] for stream in streams] == [0] * len(streams)


@pytest.mark.parametrize("server", [NATS, pytest.param(REDIS, marks=pytest.mark.by_hand)])
def test_streams_resume_when_a_server_is_restarted(fleet: Fleet, twins: Twins, server: str) -> None:
    calls = asks(6, 1000)
    twins.learn(calls)
    streams = begin(fleet, calls)
    fleet.kill(server)
    fleet.processes[server].wait(60)
    time.sleep(1.0)
    fleet.restart(server)
    check(streams, twins)
    fleet.until_ready()
    until_nothing_remains(fleet)


@pytest.mark.by_hand
def test_streams_resume_when_everything_but_the_gateways_died(fleet: Fleet, twins: Twins) -> None:
    calls = asks(4, 1000)
    twins.learn(calls)
    streams = begin(fleet, calls)
    victims = [name for name in fleet.services if name not in fleet.named("gateway")]
    for name in victims:
        fleet.kill(name)
    for name in victims:  # the servers first
        fleet.restart(name)
    check(streams, twins)
    until_nothing_remains(fleet)


@pytest.mark.by_hand
def test_a_request_that_kills_workers_is_stopped_and_its_neighbours_live(fleet: Fleet, twins: Twins) -> None:
    """The killer is here: whichever worker runs that request dies, as a prompt that crashes the engine would do it."""
    calls = asks(6, 800)
    twins.learn(calls)
    neighbours = begin(fleet, calls)
    poison = Stream(fleet.urls["gateway-2"], Ask.of("long", "A bitter draught", max_tokens=1900, temperature=0))
    poison.until_events(1)
    killed = []
    until = time.monotonic() + 120
    while not poison.ended and time.monotonic() < until:
        owner = fleet.owner_of(poison.heard.request_id)
        if owner and fleet.running(owner):
            fleet.kill(owner)
            fleet.processes[owner].wait(60)
            killed.append(owner)
            fleet.start(owner)
        time.sleep(0.05)
    heard = poison.wait()
    assert "worker_lost" in heard.fault
    assert len(killed) == 3, killed
    check(neighbours, twins)
