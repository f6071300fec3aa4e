"""Figures of runs: intervals, the offline optimum of DRAM, marks in documents."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from simulator.fleet.report import Accesses, Load
from simulator.report.figures import joins, quantile
from simulator.report.intervals import estimate, ratio
from simulator.report.optimum import belady_hits, most_hits, next_uses
from simulator.report.tables import markdown, put


def test_an_interval_holds_the_true_mean_in_about_95_of_100_experiments() -> None:
    dice = np.random.default_rng(1)
    found = [estimate(dice.normal(7.0, 2.0, 10).tolist()) for _ in range(1000)]

    assert 930 <= sum(one.low <= 7.0 <= one.high for one in found) <= 970


def test_one_run_says_nothing_about_its_interval_and_none_says_nothing() -> None:
    assert estimate([2.0]).text() == "2.00"
    assert estimate([]).text() == "–"
    assert estimate([1.0, 2.0, math.nan, 3.0]).runs == 3


def test_a_ratio_compares_the_runs_of_the_same_seed() -> None:
    found = ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])

    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(0.0, abs=1e-9)


def optimum(sequence: list[int], sizes: dict[int, int], capacity: int) -> int:
    """By trying every set that could be kept after every access."""
    states = {frozenset[int](): 0}
    for item in sequence:
        reached: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            total = hits + (item in held)
            with_it = held | {item}
            for count in range(len(with_it) + 1):
                for kept in map(frozenset, itertools.combinations(sorted(with_it), count)):
                    if sum(sizes[one] for one in kept) <= capacity:
                        reached[kept] = max(reached.get(kept, 0), total)
        states = reached
    return max(states.values())


def test_for_one_size_the_rule_is_the_optimum() -> None:
    dice = np.random.default_rng(2)
    for _ in range(20):
        sequence = dice.integers(0, 5, 14).tolist()
        assert belady_hits(sequence, dict.fromkeys(range(5), 1), 2) == optimum(sequence, dict.fromkeys(range(5), 1), 2)


def test_for_any_sizes_the_optimum_lies_between_the_bounds() -> None:
    dice = np.random.default_rng(3)
    apart = 0
    for _ in range(20):
        sequence = dice.integers(0, 5, 14).tolist()
        sizes = dict(enumerate(dice.integers(1, 5, 5).tolist()))
        best = optimum(sequence, sizes, 6)
        assert belady_hits(sequence, sizes, 6) <= best <= most_hits(sequence, sizes, 6)
        apart += belady_hits(sequence, sizes, 6) < most_hits(sequence, sizes, 6)
    assert apart > 0


def test_what_does_not_fit_the_cache_is_never_hit() -> None:
    assert belady_hits([0, 0, 1, 1], {0: 10, 1: 1}, 5) == most_hits([0, 0, 1, 1], {0: 10, 1: 1}, 5) == 1


def test_the_next_use_is_that_of_the_same_object() -> None:
    assert next_uses([7, 8, 7]) == [2, math.inf, math.inf]


def test_a_percentile_is_one_of_the_values() -> None:
    values = np.arange(1.0, 101.0)

    assert (quantile(values, 50), quantile(values, 99), quantile(values, 100)) == (50.0, 99.0, 100.0)
    assert math.isnan(quantile(np.zeros(0), 50))


def test_a_table_is_put_between_its_marks() -> None:
    document = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n"

    assert put(document, "x", markdown(["c", "n"], [["r", "1"]])) == (
        "a\n<!-- begin: x -->\n| c | n |\n| --- | ---: |\n| r | 1 |\n<!-- end: x -->\nb\n"
    )
    with pytest.raises(ValueError, match="needs the lines"):
        put(document, "y", "")


def test_who_waits_for_the_bytes_of_another_load_is_no_access_of_its_own() -> None:
    # The first load takes 10 s; the second joins it, that of the other server does not, and later it is there.
    asked = [(1.0, 0, 0, False), (4.0, 0, 0, False), (5.0, 1, 0, False), (12.0, 0, 0, True), (50.0, 0, 0, False)]
    at_s, server, deployment, hit = (np.array(column) for column in zip(*asked, strict=True))
    loads = [(0.9, 0, 10.0), (3.9, 0, 7.0), (4.9, 1, 10.0), (11.9, 0, 1.0), (49.9, 0, 10.0)]
    done = [Load(at, one, 0, "ssd", took) for at, one, took in loads]

    found = joins(Accesses(at_s, server, deployment, hit), done, [0])

    assert found.tolist() == [False, True, False, False, False]
