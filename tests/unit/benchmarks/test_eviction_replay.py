"""The replay of `benchmarks/eviction.py`: what a policy is credited with is what it did."""

from __future__ import annotations

import math

import pytest

from benchmarks.eviction import GB, POLICIES, Model, Tally, counts, models, replay, starts


def run(name: str, trace: list[tuple[float, int]], sizes_gb: list[int], *, dram_gb: int, ssd_gb: int = 1000) -> Tally:
    fleet = [Model(size * GB, 1.0 * GB) for size in sizes_gb]
    return replay(
        trace, fleet, POLICIES[name], dram_bytes=dram_gb * GB, ssd_bytes=ssd_gb * GB, ssd_bytes_per_s=10.0 * GB
    )


def test_a_start_waits_for_its_source_then_for_the_disk_then_for_nothing() -> None:
    trace = [(0.0, 0), (1000.0, 1), (2000.0, 0), (3000.0, 0)]

    tally = run("LRU", trace, [10, 10], dram_gb=15)

    assert tally.waits_s == [10.0, 10.0, 1.0, 0.0]
    assert (tally.dram_hits, tally.ssd_hits) == (1, 1)
    assert (tally.remote_bytes, tally.ssd_bytes) == (20 * GB, 10 * GB)


def test_loads_of_one_disk_stand_in_a_queue() -> None:
    trace = [(0.0, 0), (1000.0, 1), (2000.0, 2), (3000.0, 0), (3000.0, 1)]

    tally = run("LRU", trace, [10, 10, 10], dram_gb=20)

    assert tally.waits_s[3:] == [1.0, 2.0]


def test_a_copy_that_still_arrives_is_not_evicted_but_waited_for() -> None:
    tally = run("LRU", [(0.0, 0), (1.0, 1)], [10, 10], dram_gb=10)

    assert tally.waits_s == [10.0, 9.0 + 10.0]


def test_what_leaves_the_ssd_tier_leaves_dram_too() -> None:
    trace = [(0.0, 0), (1000.0, 1), (2000.0, 0)]

    tally = run("LRU", trace, [10, 10], dram_gb=100, ssd_gb=15)

    assert tally.dram_hits == 0
    assert tally.remote_bytes == 30 * GB


def test_least_recently_used_and_least_frequently_used_differ() -> None:
    often = [(100.0 * number, 0) for number in range(5)]
    trace = [*often, (1000.0, 1), (2000.0, 2), (3000.0, 0)]

    assert run("LRU", trace, [10, 10, 10], dram_gb=20).waits_s[-1] == 1.0
    assert run("LFU", trace, [10, 10, 10], dram_gb=20).waits_s[-1] == 0.0
    assert run("Hearth", trace, [10, 10, 10], dram_gb=20).waits_s[-1] == 0.0


def test_the_one_who_sees_the_future_keeps_what_comes_next() -> None:
    trace = [(0.0, 0), (100.0, 1), (200.0, 2), (300.0, 0), (400.0, 0), (500.0, 1)]

    assert run("offline (sees the future)", trace, [10, 10, 10], dram_gb=20).dram_hits == 2
    assert run("LRU", trace, [10, 10, 10], dram_gb=20).dram_hits == 1


def test_starts_are_calls_without_a_running_replica() -> None:
    table = [[0, 3, 0, 0, 1], [0] * 5]

    found = starts(table, 1e9, 7)
    each = starts(table, 0.0, 7)

    assert [model for _, model in found] == [0]
    assert len(each) == 4
    assert found[0] == each[0]
    assert all(60.0 <= at < 120.0 for at, _ in each[:3])
    assert 240.0 <= each[3][0] < 300.0


def test_the_trace_is_the_one_that_its_readme_describes() -> None:
    table = counts()

    assert len(table) == 100
    assert {len(row) for row in table} == {1440}
    assert sum(map(sum, table)) == 666_572


@pytest.mark.parametrize(("dram_gb", "ssd_gb"), [(256, 1024), (128, 512)])
def test_hearths_policy_waits_less_than_lru_on_the_real_trace(dram_gb: int, ssd_gb: int) -> None:
    table = [row[:360] for row in counts()]
    trace = starts(table, 60.0, 0)
    fleet = models(len(table), 0, remote=1.25 * GB, hub=0.4 * GB, hub_part=0.2)

    def waited_s(name: str) -> float:
        return math.fsum(
            replay(
                trace, fleet, POLICIES[name], dram_bytes=dram_gb * GB, ssd_bytes=ssd_gb * GB, ssd_bytes_per_s=6.0 * GB
            ).waits_s
        )

    assert waited_s("Hearth") < 0.95 * waited_s("LRU")
