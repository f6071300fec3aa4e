"""Small fleets by dice, with faults: what must hold, holds; and a run is a function of its seed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

import pytest

from simulator.fleet import seeds

DIGEST: Final = "from simulator.fleet.seeds import run; print(run(15).digest, run(7).digest)"


LONG = (12, 17)  # fleets with so many requests that they take as long as all the others


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.by_hand] * (seed in LONG)) for seed in range(25)]
)
def test_a_fleet_in_trouble_ends_every_request_once_and_is_clean_afterwards(seed: int) -> None:
    report = seeds.run(seed)
    assert report.counters.requests == len(report.ledgers.outcome)


@pytest.mark.by_hand
@pytest.mark.timeout(3600)
def test_five_hundred_fleets() -> None:
    for seed in range(500):
        try:
            seeds.run(seed)
        except AssertionError as error:
            raise AssertionError(f"python -m simulator.fleet.seeds --first {seed} --count 1") from error


def test_a_run_is_a_function_of_its_seed_whatever_the_hashes() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": hashes},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hashes in ("1", "2")
    ]
    assert found[0] == found[1]
    assert len(set(found[0].split())) == 2, "two seeds are two runs"
