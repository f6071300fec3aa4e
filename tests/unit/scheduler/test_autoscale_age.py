"""Replicas for the age of a queue, keep-alives that are learnt, and models that do not evict each other in turns."""

from __future__ import annotations

import itertools
import random

import pytest

from services.scheduler import autoscale
from services.scheduler.arrivals import Arrivals
from services.scheduler.cluster import Cluster
from services.scheduler.evictions import EvictionRules, Evictions
from services.scheduler.pressure import Pressure, PressureRules
from tests.unit.scheduler import picture

# -- age ---------------------------------------------------------------------------------------------------------------


def test_a_queue_that_is_older_than_a_load_takes_wants_one_more() -> None:
    pressure = Pressure()
    pressure.heard("m", "g", 1, 2.0, 10.0)
    assert pressure.floor("m", ready=1, coming=0, load_s=4.0, now=10.0) == 0
    assert pressure.due_at("m") == pytest.approx(14.0), "one has become ready just now, as far as was seen"
    pressure.heard("m", "g", 1, 6.0, 14.0)
    assert pressure.floor("m", ready=1, coming=0, load_s=4.0, now=14.0) == 2


def test_the_first_replica_is_not_asked_for_by_age_nor_is_one_that_comes() -> None:
    pressure = Pressure()
    pressure.heard("m", "g", 5, 100.0, 10.0)
    assert pressure.floor("m", ready=0, coming=0, load_s=4.0, now=10.0) == 0
    pressure.floor("m", ready=1, coming=0, load_s=4.0, now=10.0)
    pressure.heard("m", "g", 5, 110.0, 20.0)
    assert pressure.floor("m", ready=1, coming=1, load_s=4.0, now=20.0) == 0


def test_the_oldest_and_the_number_are_those_of_all_gateways_and_old_words_do_not_count() -> None:
    pressure = Pressure()
    pressure.heard("m", "g", 2, 1.0, 10.0)
    pressure.heard("m", "h", 3, 4.0, 12.0)
    assert (pressure.waiting("m", 12.0), pressure.since("m", 12.0)) == (5, 8.0)
    assert (pressure.waiting("m", 16.0), pressure.since("m", 16.0)) == (3, 8.0)
    pressure.heard("m", "h", 0, 0.0, 16.0)
    assert (pressure.waiting("m", 16.0), pressure.since("m", 16.0)) == (0, None)
    assert (pressure.waiting("other", 16.0), pressure.since("other", 16.0)) == (0, None)


def test_one_more_at_a_time_and_only_when_the_last_has_not_helped() -> None:
    pressure, load_s, ready, ready_at = Pressure(), 5.0, 1, 0.0
    raised = []
    for second in range(60):
        now = float(second)
        if ready_at == now and now > 0:
            ready += 1
        pressure.heard("m", "g", 9, now, now)
        floor = pressure.floor("m", ready=ready, coming=int(ready_at > now), load_s=load_s, now=now)
        if floor > ready and ready_at <= now:
            raised.append(now)
            ready_at = now + load_s
    assert len(raised) >= 3
    assert all(later - earlier >= 2 * load_s for earlier, later in itertools.pairwise(raised))


def test_one_more_stays_wanted_until_it_has_been_calm_for_a_while() -> None:
    pressure = Pressure(PressureRules(hold_s=10.0))
    pressure.floor("m", ready=1, coming=0, load_s=4.0, now=0.0)
    pressure.heard("m", "g", 1, 9.0, 10.0)
    pressure.floor("m", ready=1, coming=0, load_s=4.0, now=10.0)
    pressure.heard("m", "g", 1, 14.0, 15.0)
    assert pressure.floor("m", ready=1, coming=0, load_s=4.0, now=15.0) == 2
    pressure.heard("m", "g", 0, 0.0, 20.0)
    assert pressure.floor("m", ready=2, coming=0, load_s=4.0, now=20.0) == 2
    assert pressure.due_at("m") == pytest.approx(30.0)
    assert pressure.floor("m", ready=2, coming=0, load_s=4.0, now=29.0) == 2
    assert pressure.floor("m", ready=2, coming=0, load_s=4.0, now=30.0) == 0
    assert len(pressure) == 0, "nothing is kept of who waits for nothing"


@pytest.mark.parametrize("seed", range(3))
def test_the_number_of_replicas_does_not_oscillate(seed: int) -> None:
    """Two replicas are enough and one is not: once there are two, there are two."""
    dice, pressure = random.Random(seed), Pressure()
    backlog_s, ready, ready_at, changes = 0.0, 1, None, []
    for step in range(4000):
        now = 0.25 * step
        backlog_s = max(0.0, backlog_s + 0.25 * (dice.uniform(0.6, 2.2) - ready))
        pressure.heard("m", "g", int(backlog_s > 0.0), backlog_s, now)
        floor = pressure.floor("m", ready=ready, coming=int(ready_at is not None), load_s=3.0, now=now)
        if ready_at is not None and ready_at <= now:
            ready, ready_at = ready + 1, None
            changes.append(ready)
        elif floor > ready and ready < 4 and ready_at is None:
            ready_at = now + 3.0
    assert changes == [2]


def test_age_never_asks_for_more_than_the_operator_allows_or_than_there_are_requests() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    spec = picture.spec("m", max_replicas=2, target_concurrency=16)
    cluster.deployments["m"] = picture.deployment(spec, picture.checkpoint())
    cluster.depths["m"] = 5
    assert autoscale.wanted_replicas(cluster, "m", floor=0) == 1
    assert autoscale.wanted_replicas(cluster, "m", floor=2) == 2
    assert autoscale.wanted_replicas(cluster, "m", floor=7) == 2
    cluster.depths["m"] = 1
    assert autoscale.wanted_replicas(cluster, "m", floor=2) == 1


def test_what_is_gone_is_forgotten() -> None:
    pressure = Pressure()
    for name in ("a", "b", "c"):
        pressure.heard(name, "g", 1, 0.0, 1.0)
    pressure.gone("a")
    pressure.keep_only(["c"])
    assert len(pressure) == 1
    assert pressure.due_at("a") is None
    small = Pressure(PressureRules(most_gateways=2))
    for number in range(9):
        small.heard("m", f"g{number}", 1, 0.0, 1.0)
    assert small.waiting("m", 1.0) == 2


# -- keep-alive --------------------------------------------------------------------------------------------------------


def test_the_keep_alive_is_learnt_only_where_that_is_asked_for() -> None:
    arrivals = Arrivals()
    for number in range(30):
        arrivals.came("m", 600.0 * number)
    fixed = picture.spec("m", keep_alive_s=60.0)
    adaptive = picture.spec("m", keep_alive_s=60.0, adaptive_keep_alive=True)
    assert autoscale.keep_alive_s(fixed, arrivals) == 60.0
    assert 1.0 <= autoscale.keep_alive_s(adaptive, arrivals) < 6.0, "it is asked every ten minutes"


def test_a_learnt_keep_alive_lets_go_earlier_and_a_floor_holds_on_while_somebody_waits() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    record = picture.deployment(picture.spec("m", keep_alive_s=60.0, max_replicas=2), picture.checkpoint())
    cluster.deployments["m"] = record
    cluster.put(picture.server(), 100.0)
    cluster.put(picture.worker("a0"), 100.0)
    cluster.put(picture.replica("m0", record, "a0", idle_s=9.0), 100.0)
    assert autoscale.superfluous(cluster, "m", 100.0) == []
    assert [one.replica_id for one in autoscale.superfluous(cluster, "m", 100.0, keep_s=8.0)] == ["m0"]
    assert autoscale.next_superfluous_at(cluster, "m", 100.0, keep_s=12.0) == pytest.approx(103.0)
    # What the age of a queue asks for counts for as long as there is a queue.
    assert [one.replica_id for one in autoscale.superfluous(cluster, "m", 100.0, keep_s=8.0, floor=1)] == ["m0"]
    cluster.hinted_at["m"] = 100.0
    assert autoscale.superfluous(cluster, "m", 100.0, keep_s=8.0, floor=1) == []
    assert autoscale.next_superfluous_at(cluster, "m", 100.0, keep_s=8.0, floor=1) is None


# -- thrashing ---------------------------------------------------------------------------------------------------------


def spared(evictions: Evictions, **fields: float) -> float | None:
    values: dict[str, float] = {"ready_at": 10.0, "idle_s": 0.1, "soon": 0.0, "now": 12.0, **fields}
    outstanding = int(values.pop("outstanding", 0))
    return evictions.spared_until("b", for_name="a", outstanding=outstanding, **values)


def test_an_evictor_is_spared_by_whom_it_evicted_until_its_burst_is_over_or_its_tenure() -> None:
    evictions = Evictions(EvictionRules(tenure_s=5.0, linger_s=0.5))
    assert spared(evictions) is None, "anybody else may evict what is idle"
    evictions.evicted("a", "b", 9.0)
    assert evictions.count == 1
    assert spared(evictions) == pytest.approx(12.4)
    assert spared(evictions, idle_s=0.5) is None
    assert spared(evictions, outstanding=1, idle_s=3.0) == pytest.approx(15.0)
    assert spared(evictions, outstanding=1, now=15.0) is None
    assert spared(evictions, now=700.0, ready_at=699.0) is None, "that was long ago"
    evictions.gone("a")
    assert spared(evictions) is None


def test_a_replica_that_is_likely_to_be_asked_again_at_once_is_spared_for_a_moment() -> None:
    assert spared(Evictions(), soon=0.9) == pytest.approx(12.4)
    assert spared(Evictions(), soon=0.9, idle_s=2.0) is None


def test_what_is_remembered_is_bounded() -> None:
    evictions = Evictions(EvictionRules(most=2))
    for name in ("a", "b", "c"):
        evictions.evicted(name, "x", 1.0)
    assert [evictions.evictor(name, 2.0) for name in ("a", "b", "c")] == ["", "x", "x"]


def swaps(rules: EvictionRules) -> tuple[int, int]:
    """Two models on one place, each asked in bursts: loads and requests within ten minutes."""
    dice, evictions = random.Random(7), Evictions(rules)
    due = {"a": 0.0, "b": 1.0}
    left = {"a": 20, "b": 20}
    queues: dict[str, int] = {"a": 0, "b": 0}
    on, ready_at, busy_until, loads, served, now = "", 0.0, 0.0, 0, 0, 0.0
    while now < 600.0:
        for name in ("a", "b"):
            if due[name] <= now:
                queues[name] += 1
                left[name] -= 1
                due[name] = now + (0.3 if left[name] > 0 else dice.uniform(3.0, 8.0))
                left[name] = left[name] or 20
        if now >= max(ready_at, busy_until):
            other = "b" if on == "a" else "a"
            if on and queues[on] > 0:
                queues[on] -= 1
                busy_until, served = now + 0.1, served + 1
            elif queues[other] > 0:
                until = evictions.spared_until(
                    on, for_name=other, ready_at=ready_at, idle_s=now - busy_until, outstanding=0, soon=0.0, now=now
                )
                if until is None:
                    evictions.evicted(on, other, now)
                    on, ready_at, loads = other, now + 0.2, loads + 1
        now += 0.05
    return loads, served


def test_bursts_are_served_together() -> None:
    eager_loads, eager_served = swaps(EvictionRules(tenure_s=0.0))
    calm_loads, calm_served = swaps(EvictionRules(tenure_s=5.0, linger_s=0.5))
    assert calm_served >= 0.95 * eager_served
    assert calm_loads <= 0.6 * eager_loads, f"{calm_loads} loads against {eager_loads}"
