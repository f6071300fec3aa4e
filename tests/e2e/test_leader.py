"""Whoever is in the middle of a cold start dies, or what everybody stands on hangs: every request is answered."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.builders.fleet import NATS, REDIS, Fleet
from tests.builders.remains import until_nothing_remains
from tests.builders.streams import Ask, Stream, Twins
from tests.e2e.conftest import Models

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(300)]

HANGS_S = 5.0
COLD = Ask.of("cold", "The hearth is cold", max_tokens=40, temperature=0)


@pytest.fixture
def cold(fleet: Fleet, models: Models, twins: Twins) -> Iterator[Fleet]:
    """A model that nobody has loaded, and of which it is known what it says."""
    fleet.deploy("cold", models("opt", context=512, eos=False), keep_alive_s=0.5)
    twins.learn([COLD])
    until_cold(fleet)
    yield fleet
    fleet.until(lambda: fleet.call("DELETE", "/v1/admin/deployments/cold")[0] in (200, 404), "cold is deleted", 30)


def replicas(fleet: Fleet) -> list[dict[str, Any]]:
    """The replicas of that model."""
    return [one for one in fleet.view().get("replicas", []) if one["deployment"] == "cold"]


def until_cold(fleet: Fleet) -> None:
    """Wait until nobody has it loaded."""
    fleet.until(lambda: not replicas(fleet), "the model is unloaded", 60)


def leader(fleet: Fleet) -> str:
    """The name of the scheduler that leads; "" if none does."""
    return next((one["scheduler_id"] for one in fleet.view().get("schedulers", []) if one.get("term")), "")


def loading_worker(fleet: Fleet) -> str:
    """The worker that loads the model; "" if none does."""
    return next((one["worker_id"] for one in replicas(fleet) if one["state"] == "loading"), "")


def begin(fleet: Fleet) -> Stream:
    """Ask for the cold model, and wait until a worker has begun to load it: its bytes do not come, both stores hang."""
    for store in fleet.named("store"):
        fleet.kill(store, signal.SIGSTOP)
    stream = Stream(fleet.url, COLD)
    fleet.until(lambda: bool(loading_worker(fleet)), "a worker loads the model")
    return stream


def let_load(fleet: Fleet) -> None:
    """The stores go on."""
    for store in fleet.named("store"):
        fleet.kill(store, signal.SIGCONT)


def check(stream: Stream, twins: Twins) -> None:
    """It said what its twin said."""
    assert stream.wait().differs(twins.of(stream.ask)) == ""


def test_a_cold_start_outlives_the_leader_that_began_it(cold: Fleet, twins: Twins) -> None:
    stream = begin(cold)
    doomed = leader(cold)
    cold.kill(doomed)
    cold.until(lambda: leader(cold) not in ("", doomed), "the other scheduler leads")
    let_load(cold)
    check(stream, twins)
    cold.mend()
    until_nothing_remains(cold)


def test_a_cold_start_that_no_scheduler_has_seen_is_the_next_ones(cold: Fleet, twins: Twins) -> None:
    cold.kill(leader(cold))
    stream = Stream(cold.url, COLD)
    check(stream, twins)
    cold.mend()
    until_nothing_remains(cold)


def test_a_load_goes_elsewhere_when_its_worker_dies(cold: Fleet, twins: Twins) -> None:
    stream = begin(cold)
    victim = loading_worker(cold)
    cold.kill(victim)
    let_load(cold)
    check(stream, twins)
    cold.mend()
    until_nothing_remains(cold)


@pytest.mark.parametrize("server", [REDIS, NATS])
def test_a_server_that_hangs_delays_cold_starts_and_ends_nothing(cold: Fleet, twins: Twins, server: str) -> None:
    call = Ask.of("long", "The hearth glows", max_tokens=1500, temperature=0)
    twins.learn([call])
    stream = Stream(cold.url, call)
    stream.until_events(10)
    cold.kill(server, signal.SIGSTOP)
    began = time.monotonic()
    waiting = Stream(cold.url, COLD)
    time.sleep(HANGS_S - (time.monotonic() - began))
    cold.kill(server, signal.SIGCONT)
    check(stream, twins)
    if server == REDIS:  # it stands in no request's way
        assert stream.heard.hearth["recoveries"] == 0
        check(waiting, twins)
    else:
        fault = waiting.wait().fault
        assert not fault or "unavailable" in fault, fault  # said clearly, if it could not be queued in time
        check(Stream(cold.url, COLD), twins)
    cold.mend()
    until_nothing_remains(cold)
