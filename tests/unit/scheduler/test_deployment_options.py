"""What a deployment may ask for: labels, priority, devices."""

from __future__ import annotations

from typing import Any

import pytest

from services.scheduler.deployments import revision_of, too_many_devices, validate
from shared.contracts.records import DeploymentSpec, Phase, WorkerRecord
from shared.contracts.residency import Source
from shared.errors import Code


def spec(**more: Any) -> DeploymentSpec:
    return DeploymentSpec(name="m", source=Source(url="/m"), **more)


def worker(number: int, server: str = "s1", *, gangs: bool = True, phase: Phase = Phase.READY) -> WorkerRecord:
    return WorkerRecord(
        worker_id=f"w{number}", server_id=server, phase=phase, pid=1, device="cuda:0", device_name="", gangs=gangs,
        memory_total_bytes=1, memory_used_bytes=0, max_replicas=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"priority": 101}, "priority"),
        ({"priority": -101}, "priority"),
        ({"devices": 0}, "devices"),
        ({"devices": 65}, "devices"),
        ({"labels": {"a b": "c"}}, "labels"),
        ({"labels": {"a": "b/c"}}, "labels"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    failure = validate(spec(**more))
    assert failure is not None
    assert (failure.code, failure.param) == (Code.INVALID_REQUEST, param)


def test_what_makes_sense_is_fine() -> None:
    assert validate(spec(priority=100, devices=64, labels={"gpu": "a40"}, adaptive_keep_alive=True)) is None


def test_several_devices_need_workers_of_one_server_that_share_replicas() -> None:
    assert too_many_devices(spec(), []) is None
    assert too_many_devices(spec(devices=2), [worker(1), worker(2)]) is None
    refused = {
        "no worker here can share a replica": [worker(1, gangs=False), worker(2, gangs=False)],
        "no worker here": [worker(1, phase=Phase.DRAINING), worker(2, phase=Phase.STARTING)],
        "the most that one has here is 1": [worker(1), worker(2, "s2"), worker(3, gangs=False)],
        "over 2 devices": [],
    }
    for sentence, workers in refused.items():
        failure = too_many_devices(spec(devices=2), workers)
        assert failure is not None
        assert (failure.code, failure.param) == (Code.INVALID_REQUEST, "devices")
        assert sentence in failure.message


def test_replicas_depend_on_where_they_may_run_and_not_on_how_they_are_served() -> None:
    revision = revision_of(spec())
    assert revision == revision_of(spec(priority=5, adaptive_keep_alive=True, keep_alive_s=1.0, max_replicas=9))
    others = [revision_of(one) for one in (spec(devices=2), spec(labels={"a": "1"}), spec(labels={"a": "2"}))]
    assert len({revision, *others}) == 4
    assert revision_of(spec(labels={"a": "1", "b": "2"})) == revision_of(spec(labels={"b": "2", "a": "1"}))
    assert revision == "ac37eab95ffc", "records that are older than these options keep their replicas"
