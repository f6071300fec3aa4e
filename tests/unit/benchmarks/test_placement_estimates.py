"""What the benchmark of startup estimates plans, and what its tables say."""

from __future__ import annotations

import pytest

from benchmarks.placing import estimates
from benchmarks.placing.estimates import ALONE, QUEUED, Load


def load(
    actual_s: float, estimate_s: float, *, tier: str = "ssd", wait_s: float = 0.0, kind: str = ALONE, first: bool = True
) -> dict[str, object]:
    """A load that took so long, as figures have it."""
    parts = dict.fromkeys(estimates.PARTS, 0.0)
    one = Load(
        0, kind, "m", 1, tier, tier, "server-1",
        parts | {"move_s": estimate_s}, parts | {"wait_s": wait_s, "move_s": actual_s - wait_s},
        estimate_s, actual_s, actual_s,
    )  # fmt: skip
    return {
        **{name: getattr(one, name) for name in ("kind", "shape", "tier", "estimate", "actual")},
        "estimate_s": estimate_s,
        "actual_s": actual_s,
        "error": one.error,
        "first": first,
    }


def test_the_same_seed_plans_the_same_and_queues_only_different_models() -> None:
    shapes = ("a", "b", "c", "d")
    plan = estimates.orders(shapes, 40, seed=3)
    assert plan == estimates.orders(shapes, 40, seed=3)
    assert plan != estimates.orders(shapes, 40, seed=4)
    queued = [loads for kind, loads in plan if kind == QUEUED]
    assert [len(loads) for loads in queued] == [3] * 10
    assert all(
        len({one.shape for one in loads}) == 3 and len({one.server_id for one in loads}) == 1 for loads in queued
    )
    assert {one.tier for _, loads in plan for one in loads} == {"dram", "ssd", "peer", "remote"}


def test_errors_are_relative_to_what_it_took_and_learning_is_told_apart() -> None:
    loads = [load(1.0, 5.0), load(1.0, 1.1), load(2.0, 1.0, tier="peer"), load(1.0, 0.7)]
    rows = {row[0]: row for row in estimates.rows(loads, learning=1)}
    assert rows["the first 1"][4] == "400"
    assert rows["**all after them**"][1:5] == ["3", "1.00", "1.00–2.00", "30"]
    assert rows["from peer"][4:6] == ["50", "50"]
    assert "from dram" not in rows


def test_those_that_others_follow_are_told_apart_from_those_that_know_of_others() -> None:
    loads = [load(1.0, 1.0), load(1.0, 0.5, kind=QUEUED), load(1.0, 0.9, kind=QUEUED, first=False)]
    rows = {row[0]: row for row in estimates.rows(loads, learning=0)}
    assert (rows["– decided first"][1], rows["– decided first"][4]) == ("1", "50")
    assert (rows["– decided after others"][1], rows["– decided after others"][4]) == ("1", "10")


def test_what_loads_of_one_kind_differ_by_leaves_out_those_that_waited() -> None:
    alike = [load(1.0, 1.0), load(1.0, 1.0), load(1.0, 1.0), load(2.0, 1.0)]
    assert estimates.unlike([*alike, load(9.0, 1.0, wait_s=8.0)]) == [0.0, 0.0, 0.0, 0.5]
    assert estimates.unlike(alike[:3]) == []


@pytest.mark.parametrize(("part", "wanted"), [(0.0, 1.0), (0.5, 2.0), (0.95, 2.9), (1.0, 3.0)])
def test_quantiles_lie_between_their_neighbours(part: float, wanted: float) -> None:
    assert estimates.quantile([3.0, 1.0, 2.0], part) == pytest.approx(wanted)
