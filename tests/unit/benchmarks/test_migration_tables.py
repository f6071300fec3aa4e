"""`benchmarks/migrating`: figures as tables, and tables in a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.migrating import draining, moving, recovery
from benchmarks.migrating.gaps import Moved
from benchmarks.migrating.streams import FIRST_PLAIN_ID, Stream, prompt
from benchmarks.migrating.tables import begin, end, kilobytes, markdown, milliseconds, put
from benchmarks.migration import TEXTS

DOCUMENT = Path(__file__).parents[3] / "docs" / "migration.md"


def migration(pause_s: float) -> Moved:
    return Moved(
        rounds=3, tokens=40, gap_tokens=2, wire_bytes=2500, total_s=0.4, frozen_s=0.012, pause_s=pause_s,
        handover_s=pause_s, own_s=(0.02, 0.02, 0.03), asked_s=0.45, ttft_s=0.5, prompt_tokens=500,
    )  # fmt: skip


def compared() -> dict[str, Any]:
    return moving.compare(
        {100: [migration(0.05)], 4000: [migration(0.06)]}, {100: [0.2], 4000: [4.0]}, {100: [3.0], 4000: []}
    )


def test_migrations_have_a_row_per_context_length() -> None:
    rows = moving.rows(compared())

    assert rows[0] == ["100", "3", "2", "2.5", "400", "12", "50", "50", "50", "20", "30", "80", "1 of 1"]
    assert len(rows[1]) == len(moving.COLUMNS)


def test_the_naive_ways_stand_beside_and_one_that_was_not_measured_is_empty() -> None:
    assert moving.naive_rows(compared()) == [
        ["100", "50", "450", "200", "3000"],
        ["4000", "60", "450", "4000", ""],
    ]


def test_the_kv_cache_is_computed_for_every_rate() -> None:
    assert moving.kv_rows(compared(), 524_288)[1] == ["4000", "2.5", "2097", "16777", "1678", "168"]


def test_a_target_is_met_or_missed() -> None:
    rows = moving.target_rows(compared())

    assert [row[3] for row in rows] == ["met", "met", "met", "met"]
    assert moving.target_rows({"targets": [("too slow", 1.3, 1.0)]}) == [["too slow", "1.30", "≤ 1", "missed"]]


def test_recovery_puts_all_runs_of_a_way_together() -> None:
    run = {"hit_s": [0.8, 0.9], "spared_s": [0.05], "recoveries": [1, 1], "not_whole": []}
    worse = {"hit_s": [2.0], "spared_s": [], "recoveries": [1], "not_whole": ["it broke off"]}
    found = {"ways": {"kill -9": recovery.summary([run, worse]), "SIGSTOP": recovery.summary([run])}}

    assert recovery.rows(found) == [
        ["kill -9", "3", "900", "2000", "50", "1"],
        ["SIGSTOP", "2", "800", "900", "50", "0"],
    ]
    assert recovery.broken(found) == ["it broke off"]


def test_a_drain_has_a_row_of_its_own() -> None:
    run = {
        "streams": 16, "destination_was_warm": False, "drained_s": 2.0, "pauses_s": [0.1, 0.2], "own_p50_s": 0.05,
        "own_p99_s": 0.08, "migrations": [1] * 16, "recoveries": [0] * 16, "not_whole": [],
    }  # fmt: skip

    assert draining.rows({"drains": [run]}) == [
        ["1", "16", "loaded first", "2000", "100", "200", "50", "80", "16", "0", "0"]
    ]
    assert len(draining.rows({"drains": [run]})[0]) == len(draining.COLUMNS)


def test_the_largest_gap_of_each_stream_counts_if_it_touches_the_window() -> None:
    early, through = Stream("", "m", [1], 3), Stream("", "m", [1], 3)
    early.times, through.times = [0.0, 1.0, 2.0], [0.0, 2.5, 6.0, 7.0]

    assert moving.pauses([early, through], 3.0, 10.0) == [3.5]


def test_prompts_share_no_beginning_and_no_token_lacks_a_text() -> None:
    found = [prompt(64, 4096, f"move 100 {run}") for run in range(50)]

    assert len({tuple(ids[:2]) for ids in found}) == 50
    assert found[0] == prompt(64, 4096, "move 100 0")
    assert min(min(ids) for ids in found) >= FIRST_PLAIN_ID


def test_a_stream_is_whole_with_every_token_and_its_reason() -> None:
    stream = Stream("", "m", [1], 3)
    stream.tokens, stream.finish, stream.over = 3, "length", True
    assert stream.whole

    stream.tokens = 2
    assert not stream.whole


def test_markdown_has_numbers_on_the_right() -> None:
    assert markdown(("what", "ms"), [["a", "1"]]) == "| what | ms |\n| --- | ---: |\n| a | 1 |"


def test_units_are_readable() -> None:
    assert [milliseconds(0.00123), milliseconds(0.0123), kilobytes(1234)] == ["1.2", "12", "1.2"]


def test_a_marked_part_is_replaced_and_can_be_again() -> None:
    document = f"before\n\n{begin('x')}\n{end('x')}\n\nafter\n"

    once = put(document, "x", "one\n")
    twice = put(once, "x", "two")

    assert once == f"before\n\n{begin('x')}\none\n{end('x')}\n\nafter\n"
    assert twice == once.replace("one", "two")
    assert put(twice, "x", "") == document


def test_a_document_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="begin: x"):
        put("nothing\n", "x", "text")


@pytest.mark.parametrize("name", TEXTS)
def test_the_document_has_a_place_for_the_figures(name: str) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")

    assert "figures here" in put(document, f"figures of {name}", "figures here")
    assert "{" not in TEXTS[name].format(load=2, runs=8, streams=16)
