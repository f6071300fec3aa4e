"""A short chaos run; the long one is `python -m tests.chaos --seconds 3600 --seed N`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.plan import FAULTS, faults
from tests.chaos.report import percentile
from tests.chaos.run import run

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(900)]

NAMES = {
    "worker": ["w1", "w2"],
    "store": ["s1"],
    "scheduler": ["c"],
    "gateway": ["g1", "g2"],
    "nats": ["n"],
    "redis": ["r"],
}


def test_a_plan_follows_from_its_seed() -> None:
    def first(seed: int) -> list[object]:
        plan = faults(seed, NAMES, 2.0)
        return [next(plan) for _ in range(200)]

    assert first(3) == first(3)
    assert first(3) != first(4)
    assert {(fault.kind, fault.service) for fault in first(3)} == set(FAULTS)  # type: ignore[attr-defined]


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([], 0.5) == 0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0


def test_streams_survive_everything(tmp_path: Path) -> None:
    seed = 164  # twelve kinds of faults in a short time; the long runs by hand are for other seeds
    report, tails = run(tmp_path, seed=seed, seconds=25, every_s=2.0, clients=8, tokens=(100, 500))
    print(report.as_table())
    again = f"python -m tests.chaos --seconds 25 --every 2 --clients 8 --seed {seed}"
    assert not report.failures, f"{report.as_table()}\n{tails}\nagain: {again}"
    assert report.counts["exact"] > 10
