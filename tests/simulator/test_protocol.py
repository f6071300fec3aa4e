"""Hundreds of runs by seed of gateways, workers and migrations with everything that may go wrong; and that a run is a
function of its seed alone.

A run that fails says how to replay it: `python -m simulator.protocol --seed N --trace`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from simulator import protocol

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2


def start(*arguments: str, hash_seed: str = "0") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "simulator.protocol", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("runs", [240, pytest.param(2000, marks=pytest.mark.by_hand)])
def test_many_runs_keep_every_invariant(runs: int) -> None:
    share = runs // PROCESSES
    running = [start("--seeds", str(share * part), str(share * (part + 1))) for part in range(PROCESSES)]
    for process, (said, complained) in [(process, process.communicate()) for process in running]:
        assert process.returncode == 0, complained
        totals = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", said)}
        # The runs are worth something: streams end well, migrations succeed and fail.
        assert totals["complete"] > 5 * share
        assert totals["committed"] > share / 4
        assert totals["aborted"] > share / 4


@pytest.mark.parametrize("seed", [7, 52])
def test_a_run_is_a_function_of_its_seed(seed: int) -> None:
    one, other = (start("--seed", str(seed), hash_seed=hash_seed) for hash_seed in ("1", "2"))
    said, said_again = one.communicate()[0], other.communicate()[0]
    assert "digest=" in said
    assert said == said_again
    assert protocol.run(seed).digest in said


def test_seeds_differ() -> None:
    assert protocol.run(1).digest != protocol.run(2).digest


def test_a_failure_says_how_to_replay_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr("simulator.cluster.Cluster.check_over", broken)
    assert protocol.main(["--seeds", "5", "7"]) == 1
    assert "python -m simulator.protocol --seed 5 --trace" in capsys.readouterr().err


def test_a_trace_tells_what_happens_but_no_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert protocol.main(["--seed", "3", "--trace"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"g0#1 Admitted call_id=c\d+", said)
    assert re.search(r"w\d#1 DeliveryArrived", said)
    assert "token_ids" not in said
