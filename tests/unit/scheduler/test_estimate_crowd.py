"""Estimates beside others: loads under way, replicas that run, the other lane of a store, a busy server."""

from __future__ import annotations

import pytest

from services.scheduler.crowd import Crowd, Slowdown
from services.scheduler.estimate import Estimator
from services.scheduler.events import CommandLoad, RecordHinted
from shared.contracts.records import ReplicaState
from shared.contracts.residency import Progress
from tests.unit.scheduler.desk import small
from tests.unit.scheduler.test_estimate import GIB, MIB, load, replica, server


def attach_s(estimator: Estimator, server_id: str = "s1") -> float:
    return estimator.startup(server_id, "cpu", "c1", GIB, 0, "dram", 0.0).total_s


def test_who_is_at_work_is_counted_once_and_a_load_knows_how_many_there_were_at_most() -> None:
    crowd = Crowd()
    crowd.joins("s1", "r1", loads=True)
    crowd.joins("s1", "r2", loads=True)
    crowd.joins("s1", "r3", loads=False)
    crowd.joins("s1", "r3", loads=False)
    crowd.joins("s2", "r4", loads=True)
    assert (crowd.others("s1"), crowd.others("s2"), crowd.others("s3")) == (3, 1, 0)
    assert crowd.leaves("r2") == 2
    assert (crowd.leaves("r3"), crowd.leaves("r2")) == (0, 0), "only loads are asked for it"
    assert crowd.leaves("r1") == 2
    crowd.forget_server("s2")
    assert (crowd.others("s1"), crowd.others("s2")) == (0, 0)


def test_a_slowdown_is_never_below_one_and_follows_what_is_measured() -> None:
    slow = Slowdown()
    for _ in range(20):
        slow.learn("s1", 0, "whole", 0.5, 1.0)
        slow.learn("s1", 2, "whole", 3.0, 1.0)
        slow.learn("s2", 2, "whole", 30.0, None)
    assert slow.of_server("s1") == pytest.approx(1.0, abs=0.2)
    assert slow.of_server("s1") * slow.of_others(2, "whole") == pytest.approx(3.0, rel=0.2)
    assert slow.of_others(0, "whole") == slow.of_others(2, "rest") == slow.of_server("s2") == 1.0


def test_what_runs_beside_it_makes_a_load_slower_and_leaves_the_others_as_they_are() -> None:
    estimator = Estimator()
    running = replica("busy", running=1)
    for number in range(24):
        estimator.replica_said(running if number % 2 else replica("busy", idle_s=9.0), 0.0)
        estimator.promised("s1", f"r{number}", 0, "dram", 0.0, "c1")
        estimator.loaded(load("dram", attach_s=0.3 if number % 2 else 0.1, replica_id=f"r{number}"), 0.1)
    assert attach_s(estimator) == pytest.approx(0.3, rel=0.1), "the stream still runs"
    estimator.settled("busy")
    assert attach_s(estimator) == pytest.approx(0.1, rel=0.2)


def test_a_load_under_way_counts_until_it_is_over() -> None:
    estimator = Estimator()
    for number in range(24):
        estimator.promised("s1", f"r{number}", 0, "dram", 0.0, "c1")
        if number % 2:
            estimator.replica_said(replica("other", state=ReplicaState.LOADING), 0.0)
        estimator.loaded(load("dram", attach_s=0.2 if number % 2 else 0.1, replica_id=f"r{number}"), 0.1)
        estimator.settled("other")
    assert attach_s(estimator) == pytest.approx(0.1, rel=0.1)
    estimator.promised("s1", "now", 0, "dram", 0.0, "c1")
    assert attach_s(estimator) == pytest.approx(0.2, rel=0.1)
    assert attach_s(estimator, "s2") == pytest.approx(0.1, rel=0.1)


def test_a_server_whose_processors_are_busy_is_known_by_its_last_loads() -> None:
    estimator = Estimator()
    for id in ("s1", "s2", "s1", "s2"):
        estimator.loaded(load("dram", attach_s=0.1, server_id=id), 0.0)
    for id in ("s1", "s2") * 6:
        estimator.loaded(load("dram", attach_s=0.2 if id == "s1" else 0.1, server_id=id), 0.0)
    assert attach_s(estimator) > 1.3 * attach_s(estimator, "s2")
    assert estimator.slowdown("s1") > 1.3
    estimator.forget_server("s1")
    assert estimator.slowdown("s1") == 1.0


def test_the_other_lane_holds_a_load_up_by_what_was_measured() -> None:
    estimator = Estimator()
    start_s = estimator.startup("s1", "cpu", "c1", GIB, GIB, "remote", 0.0).move_s
    estimator.server_said(server(ssd_bytes_per_s=1e9, ssd_queue={"other": 4 * 10**9}), 0.0)
    assert start_s < estimator.startup("s1", "cpu", "c1", GIB, GIB, "remote", 0.0).move_s < start_s + 4.0
    for number in range(40):  # the lane is done first, whatever it has to do
        busy = number % 2 == 0
        estimator.server_said(server(ssd_bytes_per_s=1e9, ssd_queue={"other": 4 * 10**9} if busy else {}), 0.0)
        estimator.promised("s1", f"r{number}", GIB, "remote", 0.0, "c1")
        took_s = start_s + 4.0 if busy else start_s
        estimator.loaded(load("remote", move_s=took_s, moved_bytes=GIB, replica_id=f"r{number}"), 9.0)
    assert estimator.startup("s1", "cpu", "c1", GIB, GIB, "remote", 10.0).move_s == pytest.approx(start_s, rel=0.1)
    estimator.server_said(server(ssd_bytes_per_s=1e9, ssd_queue={"other": 4 * 10**9}), 10.0)
    held_up = estimator.startup("s1", "cpu", "c1", GIB, GIB, "remote", 10.0)
    assert held_up.move_s == pytest.approx(start_s + 4.0, rel=0.1)


def test_of_two_that_come_from_elsewhere_the_one_whose_source_is_known_first_goes_first() -> None:
    estimator = Estimator()
    for _ in range(20):
        estimator.loaded(load("remote", move_s=0.5 + GIB / 1e9, moved_bytes=GIB), 0.0)
        estimator.loaded(load("remote", move_s=0.5 + 50 * MIB / 1e9, moved_bytes=50 * MIB), 0.0)
        estimator.loaded(load("peer", move_s=0.1 + GIB / 1e9, moved_bytes=GIB), 0.0)
        estimator.loaded(load("peer", move_s=0.1 + 50 * MIB / 1e9, moved_bytes=50 * MIB), 0.0)
    estimator.promised("s1", "r1", GIB, "remote", 10.0, "other")
    assert estimator.wait_s("s1", "peer", 10.1) == 0.0
    assert estimator.wait_s("s1", "peer", 10.5) > 0.5
    assert estimator.wait_s("s1", "remote", 10.1) > 0.5


def test_a_load_that_is_lost_with_its_worker_is_at_work_no_longer() -> None:
    it = small()
    it.hint("m")
    load = it.only(CommandLoad)
    assert it.core.estimator.crowd.others("a") == 1
    it.tell(RecordHinted("worker", load.worker_id, deleted=True))
    assert it.core.estimator.crowd.others("a") == 0


def test_what_was_only_seen_beside_others_is_a_guess_until_it_is_seen_by_itself() -> None:
    estimator = Estimator()
    estimator.replica_said(replica("busy", running=1), 0.0)
    for number in range(4):
        estimator.promised("s1", f"r{number}", 0, "dram", 0.0, "c1")
        estimator.loaded(load("dram", attach_s=0.4, replica_id=f"r{number}"), 0.1)
    assert attach_s(estimator) == pytest.approx(0.4, rel=0.1)
    estimator.settled("busy")
    estimator.loaded(load("dram", attach_s=0.1), 0.2)
    assert attach_s(estimator) == pytest.approx(0.1, rel=0.1)


def test_what_arrives_from_a_peer_is_not_taken_to_come_from_the_source() -> None:
    estimator = Estimator()
    estimator.promised("s1", "r1", 10**9, "peer", 0.0, "c1")
    estimator.server_said(server(import_queue={"c1": 10**9}), 0.1)
    attaching = replica("r1", state=ReplicaState.LOADING, load=Progress(phase="attaching"))
    estimator.replica_said(attaching, 0.1)
    estimator.server_said(server(import_queue={"c1": 10**9}), 0.2)
    assert estimator.beside_s("s1", "ssd", 0.2) == pytest.approx(10**9 / estimator.bandwidth("s1", "peer"), rel=0.1)
