"""The planner: what is asked for in words, and the edge of what fits, found with few trials."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import HearthError
from simulator.__main__ import main
from simulator.planner.search import Row, frontier, least, smallest, worthwhile
from simulator.planner.slo import slo
from simulator.report.intervals import Estimate

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "figure", "limit_s"),
    [
        ("p99 startup 5s", "startup_p99_s", 5.0),
        ("P95 TTFT <= 800 ms", "ttft_p95_s", 0.8),
        ("mean startup 1.5s", "startup_mean_s", 1.5),
    ],
)
def test_an_slo_is_said_in_words(text: str, figure: str, limit_s: float) -> None:
    found = slo(text)

    assert (found.figure, found.limit_s) == (figure, pytest.approx(limit_s))


@pytest.mark.parametrize(
    "text", ["", "p99 startup", "p98 startup 5s", "p99 start 5s", "p99 startup 0s", "p99 ttft 1.2.3s"]
)
def test_what_is_no_slo_is_told_how_to_say_it(text: str) -> None:
    with pytest.raises(HearthError, match="p99 startup 5s"):
        slo(text)


def test_an_slo_is_met_by_the_upper_end_of_the_interval_and_only_without_failures() -> None:
    wanted = slo("p99 startup 5s")
    none, some = Estimate(0.0, 0.0, 3), Estimate(0.5, 0.1, 3)

    assert wanted.met({"startup_p99_s": Estimate(4.0, 1.0, 3), "failed": none})
    assert not wanted.met({"startup_p99_s": Estimate(4.0, 1.1, 3), "failed": none})
    assert not wanted.met({"startup_p99_s": Estimate(4.0, 0.5, 3), "failed": some})
    assert wanted.met({"startup_p99_s": Estimate(4.9, math.nan, 1), "failed": Estimate(0.0, math.nan, 1)})


@pytest.mark.parametrize("edge", range(1, 34))
def test_the_least_that_fits_is_found_with_few_trials(edge: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number >= edge

    assert least(fits, 1, 32) == (edge if edge <= 32 else None)
    assert len(asked) <= 6


def test_less_dram_needs_more_servers_until_nothing_does() -> None:
    needs = {100: 2, 50: 2, 25: 5, 12: 99}

    rows = frontier(lambda servers, dram: servers >= needs[dram], list(needs), 8)

    assert rows == [Row(100, 2), Row(50, 2), Row(25, 5), Row(12, None)]
    assert smallest(rows) == Row(50, 2)
    assert worthwhile(rows) == [Row(50, 2), Row(25, 5)]


def test_nothing_fits() -> None:
    rows = frontier(lambda servers, dram: False, [1, 2], 4)

    assert smallest(rows) is None
    assert worthwhile(rows) == []


def test_an_edge_that_is_chance_is_told() -> None:
    rows = frontier(lambda servers, dram: servers in (3, 5), [1], 5)

    assert rows == [Row(1, 3, steady=False)]


def test_a_plan_is_made_from_a_users_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "mine.csv"
    lines = [f"{0.5 * number},opt-6.7b/{number % 6},50,80" for number in range(60)]
    trace.write_text("\n".join(["at_s,model,prompt_tokens,output_tokens", *lines]) + "\n")
    words = ["--slo", "p99 startup 20s", "--max-servers", "3", "--seeds", "1", "--dram", "256GiB,64GiB", "--json", "-"]

    code = main(["plan", "--trace", str(trace), *words])

    found = json.loads(capsys.readouterr().out)
    assert code == 0
    tried = {(one["servers"], one["dram_bytes"]): one["mean"] for one in found["tried"]}
    assert tried[found["plan"]["servers"], found["plan"]["dram_bytes"]] <= 20
    assert all(value > 20 for (servers, _), value in tried.items() if servers < found["plan"]["servers"])
    assert {row["dram_bytes"] for row in found["rows"]} == {256 * GIB, 64 * GIB}


def test_a_simulation_is_a_function_of_its_seed_whatever_pythons_hashes_are(tmp_path: Path) -> None:
    words = ["simulate", "--rate", "0.4", "--duration", "120", "--seed", "3", "--json", "-"]

    def digest(hash_seed: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "simulator", *words],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        )
        found = json.loads(done.stdout)
        assert found["runs"][0]["requests"] > 5
        return str(found["digest"])

    assert digest("1") == digest("2")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["simulate", "--policy", "best"], "no policy 'best'"),
        (["simulate", "--profile", "none"], "no profile 'none'"),
        (["simulate", "--deployments", "many"], "'many' is neither a number"),
        (["simulate", "--deployments", "opt-9b:3"], "no model 'opt-9b'"),
        (["simulate", "--deployments", "opt-30b:3", "--devices", "1"], "needs 2 devices"),
        (["simulate", "--workload", "none.csv"], "cannot be read"),
        (["simulate", "--keep-alive", "long"], "'long' is no number of seconds"),
        (["simulate", "--rate", "-1"], "The rate is requests per second"),
        (["simulate", "--cv", "0", "--duration", "10"], "A CV of 0"),
        (["plan", "--slo", "fast"], "'fast' is no SLO"),
        (["plan", "--policy", "all"], "for one policy"),
        (["plan", "--dram", "much"], "--dram"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("hearth: ")
    assert error.count("\n") == 1
