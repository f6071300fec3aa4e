"""Workers, servers and everything are emptied and restarted under load, and no client hears of it."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

import pytest

from tests.builders.fleet import Fleet
from tests.builders.load import Load, make_calls
from tests.builders.remains import until_nothing_remains
from tests.builders.streams import Ask, Stream, Twins
from tests.e2e.conftest import Models
from tests.e2e.test_recovery import SAMPLED, asks, begin, check, owned

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]


def phase(fleet: Fleet, worker: str) -> str:
    """A worker's phase, "" without a record."""
    return next((str(one["phase"]) for one in fleet.view()["workers"] if one["worker_id"] == worker), "")


def moved_not_lost(streams: list[Stream], least: int) -> None:
    """At least so many of these streams migrated, and none had to be recovered."""
    said = [stream.heard.hearth for stream in streams]
    assert [one["recoveries"] for one in said] == [0] * len(said)
    assert sum(one["migrations"] > 0 for one in said) >= least


def test_a_worker_with_sixteen_streams_is_drained(fleet: Fleet, models: Models) -> None:
    """All are on one replica, the only one there is: it has to be loaded elsewhere first."""
    fleet.deploy("only", models("llama", context=2048, eos=False, seed=9), max_replicas=1, keep_alive_s=600)
    options: list[dict[str, Any]] = [{"temperature": 0}, SAMPLED]
    calls = [Ask.of("only", f"prompt {n}", max_tokens=900, seed=n, **options[n % 2]) for n in range(16)]
    twins = Twins(fleet.url)
    twins.learn(calls)
    streams = begin(fleet, calls)
    (worker, mine), *others = owned(fleet, streams).items()
    assert (len(mine), others) == (16, [])
    done = fleet.hearth("drain", worker)
    assert done.returncode == 0, done.stderr
    assert phase(fleet, worker) == "draining"
    assert not any(one["worker_id"] == worker for one in fleet.requests())
    assert not any(one["worker_id"] == worker for one in fleet.view()["replicas"])
    assert not all(stream.ended for stream in streams)  # it did not just wait for them
    check(streams, twins)
    moved_not_lost(streams, 1)
    assert fleet.hearth("drain", "--undo", worker).returncode == 0
    fleet.until(lambda: phase(fleet, worker) == "ready", "it takes work again")
    fleet.call("DELETE", "/v1/admin/deployments/only")
    fleet.until(lambda: all(one["deployment"] != "only" for one in fleet.view()["replicas"]), "its replicas are gone")


@pytest.mark.by_hand
def test_a_server_is_drained(fleet: Fleet, twins: Twins) -> None:
    calls = asks(12, 1200)
    twins.learn(calls)
    streams = begin(fleet, calls)
    leaving = [stream for worker, mine in owned(fleet, streams).items() if "worker-1-" in worker for stream in mine]
    done = fleet.hearth("drain", "server-1")
    assert done.returncode == 0, done.stderr
    assert not any("worker-1-" in one["worker_id"] for one in fleet.requests())
    check(streams, twins)
    moved_not_lost(leaving, min(1, len(leaving)))
    moved_not_lost(streams, 0)
    assert fleet.hearth("drain", "--undo", "server-1").returncode == 0


def restart_in_order(fleet: Fleet, name: str) -> None:
    """SIGTERM, the end, and a new life."""
    assert fleet.stop(name, 60) == 0, fleet.log(name)[-2000:]
    fleet.start(name)
    fleet.until_ready()
    fleet.until(fleet.spread, f"the replicas are back after {name} was restarted")


@pytest.mark.by_hand
def test_everything_is_restarted_under_load(fleet: Fleet, twins: Twins) -> None:
    calls = make_calls("long", random.Random(4), 16, (300, 900))
    twins.learn(calls)
    leaving: set[str] = set()
    load = Load(fleet.urls, calls, twins, clients=8, seed=4, usable=lambda name: name not in leaving, timeout_s=120)
    try:
        for service in ("worker", "store", "scheduler"):
            for name in fleet.named(service):
                restart_in_order(fleet, name)
        for name in ("gateway-2", "gateway"):
            leaving.add(name)
            time.sleep(0.5)  # nobody is about to call it any more
            fleet.kill(name, signal.SIGTERM)
            assert fleet.processes[name].wait(90) == 0, fleet.log(name)[-2000:]
            fleet.start(name)
            fleet.until_ready()
            leaving.discard(name)
    finally:
        load.stop()
    assert [outcome.difference for outcome in load.outcomes if outcome.difference] == []
    ledgers = [
        ledger for outcome in load.outcomes for ledger in outcome.heard.hearth.get("ledgers", [outcome.heard.hearth])
    ]
    assert sum(ledger["migrations"] for ledger in ledgers) > 0
    until_nothing_remains(fleet)
