"""How many replicas, who may leave, and what failures lead to."""

from __future__ import annotations

import pytest

from services.scheduler.autoscale import (
    Trouble,
    Victim,
    desired_replicas,
    next_superfluous_at,
    superfluous,
    victims_of,
)
from services.scheduler.cluster import Cluster
from shared.contracts.records import DeploymentRecord
from shared.errors import Code, Failure
from tests.unit.scheduler import picture

CORRUPT = Failure(code=Code.CHECKPOINT_CORRUPT, message="The bytes do not match.")
UNFIT = Failure(code=Code.UNSUPPORTED, message="This architecture cannot be served.")
CRASHED = Failure(code=Code.WORKER_LOST, message="The worker died.")
FULL = Failure(code=Code.NO_CAPACITY, message="No room.")


def victims(cluster: Cluster, deployment: str, now: float, *, min_ready_s: float) -> list[Victim]:
    """Those of all other deployments, those that leave enough behind first, then idle longest first, then by id."""
    others = [name for name in cluster.deployments if name != deployment]
    found = [one for name in others for one in victims_of(cluster, name, now, min_ready_s=min_ready_s)]
    return sorted(found, key=lambda one: (one.below_min, -one.idle_s, one.replica_id))


@pytest.mark.parametrize(
    ("outstanding", "least", "most", "target", "wanted"),
    [
        (0, 0, 4, 8, 0),
        (1, 0, 4, 8, 1),
        (8, 0, 4, 8, 1),
        (9, 0, 4, 8, 2),
        (1000, 0, 4, 8, 4),
        (0, 2, 4, 8, 2),
        (17, 2, 4, 8, 3),
    ],
)
def test_desired_replicas(outstanding: int, least: int, most: int, target: int, wanted: int) -> None:
    spec = picture.spec(min_replicas=least, max_replicas=most, target_concurrency=target)
    assert desired_replicas(spec, outstanding) == wanted


def cluster_with(*idle_s: float, outstanding: int = 0, **fields: object) -> tuple[Cluster, DeploymentRecord]:
    """A deployment with replicas m0, m1, … that have been idle for so long at second 100."""
    cluster = Cluster(kv_bytes_max=2**40)
    record = picture.deployment(picture.spec("m", **fields), picture.checkpoint())
    cluster.deployments["m"] = record
    cluster.put(picture.server(), 100.0)
    for index, idle in enumerate(idle_s):
        cluster.put(picture.worker(f"a{index}"), 100.0)
        cluster.put(picture.replica(f"m{index}", record, f"a{index}", idle_s=idle), 100.0)
        cluster.ready_at[f"m{index}"] = 0.0
    cluster.depths["m"] = outstanding
    return cluster, record


def test_idle_replicas_leave_after_the_keep_alive_and_not_before() -> None:
    cluster, _ = cluster_with(59.0, keep_alive_s=60.0)
    assert superfluous(cluster, "m", 100.0) == []
    assert next_superfluous_at(cluster, "m", 100.0) == pytest.approx(101.0)
    assert [one.replica_id for one in superfluous(cluster, "m", 101.0)] == ["m0"]


def test_the_record_read_again_unchanged_does_not_look_younger() -> None:
    cluster, record = cluster_with(10.0, keep_alive_s=60.0)
    cluster.put(picture.replica("m0", record, idle_s=10.0), 130.0)
    assert cluster.idle_s(cluster.replicas["m0"], 150.0) == pytest.approx(60.0)


def test_the_minimum_stays_and_the_least_idle_stay() -> None:
    cluster, _ = cluster_with(100.0, 300.0, 200.0, keep_alive_s=60.0, min_replicas=1, max_replicas=3)
    assert [one.replica_id for one in superfluous(cluster, "m", 100.0)] == ["m1", "m2"]


def test_replicas_that_the_demand_needs_stay() -> None:
    cluster, _ = cluster_with(100.0, 300.0, keep_alive_s=60.0, max_replicas=2, outstanding=2)
    assert superfluous(cluster, "m", 100.0) == []
    assert next_superfluous_at(cluster, "m", 100.0) is None


def test_a_running_replica_is_neither_superfluous_nor_a_victim() -> None:
    cluster, record = cluster_with(100.0, keep_alive_s=1.0)
    cluster.put(picture.replica("m0", record, running=1), 100.0)
    assert superfluous(cluster, "m", 100.0) == []
    assert victims(cluster, "other", 100.0, min_ready_s=1.0) == []


def test_victims_leave_enough_for_the_demand_of_their_own_deployment() -> None:
    cluster, _ = cluster_with(10.0, 30.0, 20.0, max_replicas=3, outstanding=2)
    assert [one.replica_id for one in victims(cluster, "other", 100.0, min_ready_s=1.0)] == ["m1"]


def test_victims_below_the_minimum_come_last() -> None:
    cluster, _ = cluster_with(10.0, 30.0, min_replicas=1, max_replicas=2)
    found = victims(cluster, "other", 100.0, min_ready_s=1.0)
    assert [(one.replica_id, one.below_min) for one in found] == [("m1", False), ("m0", True)]


def fail(trouble: Trouble, server: str, failure: Failure, now: float, servers: list[str]) -> None:
    trouble.failed(server, failure, now, servers=servers, most_failures=3, first_s=1.0, most_s=60.0)


def test_another_server_is_tried_at_once_then_all_wait() -> None:
    trouble = Trouble(CRASHED)
    fail(trouble, "a", CRASHED, 10.0, ["a", "b"])
    assert (trouble.until, trouble.hopeless) == (10.0, False)
    fail(trouble, "b", CRASHED, 11.0, ["a", "b"])
    assert (trouble.until, trouble.hopeless) == (12.0, False)


def test_the_wait_doubles_and_three_failures_in_a_row_are_hopeless() -> None:
    trouble = Trouble(CRASHED)
    waits = []
    for now in (10.0, 20.0, 30.0, 40.0):
        fail(trouble, "a", CRASHED, now, ["a"])
        waits.append((trouble.until - now, trouble.hopeless))
        trouble.rest()
    assert waits == [(1.0, False), (2.0, False), (4.0, True), (8.0, True)]


def test_a_final_failure_on_every_server_is_hopeless_at_once() -> None:
    trouble = Trouble(UNFIT)
    fail(trouble, "a", UNFIT, 10.0, ["a", "b"])
    assert not trouble.hopeless
    fail(trouble, "b", UNFIT, 10.0, ["a", "b"])
    assert trouble.hopeless


def test_a_corrupt_checkpoint_is_tried_again_because_its_store_imports_it_afresh() -> None:
    trouble = Trouble(CORRUPT)
    fail(trouble, "a", CORRUPT, 10.0, ["a"])
    assert (trouble.until, trouble.hopeless) == (11.0, False)


def test_what_is_wrong_with_one_servers_copy_is_hopeless_only_when_all_were_tried() -> None:
    servers = ["a", "b", "c", "d"]
    corrupt, crashed = Trouble(CORRUPT), Trouble(CRASHED)
    told = []
    for now, server in enumerate(servers):
        fail(corrupt, server, CORRUPT, float(now), servers)
        fail(crashed, server, CRASHED, float(now), servers)
        told.append((corrupt.hopeless, crashed.hopeless))
    assert told == [(False, False), (False, False), (False, True), (True, True)]


def test_no_room_is_never_hopeless() -> None:
    trouble = Trouble(FULL)
    for now in (10.0, 20.0, 30.0, 40.0, 50.0):
        fail(trouble, "a", FULL, now, ["a"])
        assert (trouble.until - now, trouble.hopeless) == (1.0, False)
