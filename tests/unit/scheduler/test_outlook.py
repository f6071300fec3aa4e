"""What the picture says about who may be asked for next, and where there would be room."""

from __future__ import annotations

from typing import Any

import pytest

from services.scheduler.ahead import Ahead, AheadRules, AheadView
from services.scheduler.arrivals import Arrivals
from services.scheduler.cluster import Cluster
from services.scheduler.estimate import Estimator
from services.scheduler.outlook import Outlook
from shared.contracts.records import DeploymentState, ReplicaState
from tests.unit.scheduler import picture

NOW = 1000.0


def outlook(**fields: Any) -> tuple[Outlook, Cluster]:
    """Two servers with a worker each, `a` with `ck-m` on its SSD; `m` was asked for every 20 s until now."""
    cluster, arrivals = Cluster(kv_bytes_max=2**40), Arrivals()
    for id in ("a", "b"):
        cluster.put(picture.server(id, ssd={"ck-m": 100} if id == "a" else {}), NOW)
        cluster.put(picture.worker(f"{id}0"), NOW)
    cluster.deployments["m"] = picture.deployment(picture.spec("m", **fields), picture.checkpoint("ck-m"))
    for number in range(50, -1, -1):
        arrivals.came("m", NOW - 20.0 * number)
    return Outlook(cluster, arrivals, Estimator(), NOW, waiting=False, horizon_s=60.0), cluster


def probability(look: Outlook) -> float:
    prospect = look.prospect("m")
    assert prospect is not None
    return prospect.probability


def test_a_deployment_without_a_replica_is_as_likely_to_need_one_as_to_be_asked_for() -> None:
    look, _ = outlook()
    assert probability(look) > 0.9
    assert look.prospect("m") == look.owner("ck-m")
    assert look.prospect("unknown") is None
    assert look.owner("ck-other") is None


def test_one_with_a_replica_needs_another_when_its_keep_alive_is_over_or_its_slots_are_taken() -> None:
    look, cluster = outlook(max_replicas=2, keep_alive_s=5.0)
    cluster.put(picture.replica("m0", cluster.deployments["m"]), NOW)
    assert probability(look) > 0.5, "the next request comes after the keep-alive"
    look, cluster = outlook(max_replicas=2, keep_alive_s=60.0)
    cluster.put(picture.replica("m0", cluster.deployments["m"]), NOW)
    assert probability(look) == 0.0
    cluster.depths["m"] = 1
    assert probability(look) > 0.9


def test_a_deployment_that_is_unknown_yet_or_goes_is_nobodys_prospect() -> None:
    look, cluster = outlook()
    cluster.deployments["m"] = picture.deployment(picture.spec("m"))
    assert look.prospect("m") is None
    cluster.deployments["m"] = picture.deployment(
        picture.spec("m"), picture.checkpoint("ck-m"), DeploymentState.DELETING
    )
    assert look.prospect("m") is None


def test_a_server_is_able_if_a_worker_carries_the_labels_and_is_large_enough() -> None:
    look, _ = outlook()
    assert look.able("m", "a")
    assert not look.able("m", "nowhere")
    assert not look.able("unknown", "a")
    look, _ = outlook(labels={"gpu": "a40"})
    assert not look.able("m", "a")


def test_busy_devices_make_a_server_less_likely_to_take_a_newcomer() -> None:
    look, cluster = outlook()
    free = look.busy("a")
    cluster.put(picture.replica("m0", cluster.deployments["m"]), NOW)
    assert look.busy("a") == free, "an idle replica can leave"
    cluster.put(picture.replica("m0", cluster.deployments["m"], running=1), NOW)
    assert 0.0 < free < look.busy("a") < 1.0
    cluster.put(picture.replica("m0", cluster.deployments["m"], state=ReplicaState.LOADING), NOW)
    assert look.busy("a") > free
    cluster.put(picture.worker("a1"), NOW)
    assert look.busy("a") < 0.5
    assert look.busy("nowhere") == 1.0


def test_a_load_takes_longer_from_further_away() -> None:
    look, _ = outlook()
    seconds = [look.load_s("b", tier, "ck-m", 100 * picture.MIB) for tier in ("dram", "ssd", "peer", "remote")]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[1] < seconds[3]


def test_ahead_plans_by_it() -> None:
    look, cluster = outlook()
    cluster.remove_server("b")
    view: AheadView = look
    (plan,) = Ahead(AheadRules(least_s=0.001)).plan(NOW, view)
    assert (plan.server_id, plan.key, plan.tier, plan.source) == (
        "a",
        "ck-m",
        "dram",
        cluster.deployments["m"].spec.source,
    )
    assert look.ssd_holders("ck-m") == ["a"]
    assert look.dram_holders("ck-m") == []
    assert not look.loading("a")
    assert not look.held("a", "ck-m")
    assert plan.saves_s == pytest.approx(
        probability(look)
        * (1.0 - look.busy("a"))
        * (look.load_s("a", "ssd", "ck-m", 100 * picture.MIB) - look.load_s("a", "dram", "ck-m", 100 * picture.MIB)),
        rel=0.01,
    )
