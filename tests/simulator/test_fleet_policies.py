"""The policies side by side on a fleet that is too small for its models: what each of them does, and does not do."""

from __future__ import annotations

import random

import pytest

from simulator.fleet.fleet import Fleet
from simulator.fleet.model import Arrival, Hardware, ModelProfile, ModelSpec, Options, Policy, ServerShape
from simulator.fleet.report import Report

GB = 10**9
MODEL = ModelProfile(
    name="model", weight_bytes=12 * GB, kv_bytes_per_token=100_000, prefill_token_s=0.0005, step_s=0.02, attach_s=0.2
)
SHAPE = ServerShape(
    devices=2, device_memory_bytes=40 * GB, dram_bytes=64 * GB, ssd_bytes=500 * GB, ssd_bytes_per_s=3 * GB,
    network_bytes_per_s=1 * GB, device_bytes_per_s=12 * GB,
)  # fmt: skip


def run(policy: Policy, requests: int = 120) -> Report:
    dice = random.Random(3)
    specs = [ModelSpec(name=f"m{n}", model=MODEL, target_concurrency=2, keep_alive_s=20.0) for n in range(8)]
    at_s, arrivals = 0.0, []
    for _ in range(requests):
        at_s += dice.expovariate(0.7)
        arrivals.append(Arrival(at_s, f"m{dice.randrange(8)}", dice.randrange(20, 200), dice.randrange(20, 400)))
    machines = Hardware(servers=(SHAPE,) * 2, ssd_copies=1)
    return Fleet(machines, specs, arrivals, policy=policy, seed=1, options=Options(check_every=10)).run()


@pytest.mark.parametrize("policy", list(Policy))
def test_every_request_is_answered_whoever_decides(policy: Policy) -> None:
    report = run(policy, 60)
    assert report.completed.all() or policy is Policy.RAY_SERVE
    assert report.policy == policy.value


def test_ray_serve_downloads_every_model_every_time() -> None:
    assert set(run(Policy.RAY_SERVE, 60).counters.loads) == {"remote"}


def test_with_a_local_cache_it_downloads_once_to_each_server() -> None:
    loads = run(Policy.RAY_SERVE_CACHED).counters.loads
    assert set(loads) == {"remote", "ssd"}
    assert loads["remote"] <= 2 * 8


def test_random_takes_the_bytes_from_wherever_it_happens_to_be() -> None:
    report = run(Policy.RANDOM)
    assert {"dram", "ssd"} <= set(report.counters.loads)
    assert report.counters.moves_committed == report.counters.parks == 0


def test_shepherd_stops_what_runs_where_the_bytes_are() -> None:
    report = run(Policy.SHEPHERD)
    assert report.counters.parks > 0
    assert report.counters.moves_committed == 0
    assert report.ledgers.parks.max() >= 1


def test_hearth_moves_what_runs_and_without_migration_it_does_not() -> None:
    assert run(Policy.HEARTH).counters.moves_committed > 0
    assert run(Policy.NO_MIGRATION).counters.moves_committed == 0


def test_even_random_is_a_function_of_its_seed() -> None:
    assert run(Policy.RANDOM, 40).digest == run(Policy.RANDOM, 40).digest
