"""`benchmarks/migrating/gaps.py`: what the times of a stream are said to mean."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.migrating.gaps import (
    Event,
    Gap,
    Moved,
    bound_s,
    gaps,
    kv_bytes_per_token,
    next_after,
    pause_s,
    prefill_token_s,
    read_event,
    summary,
    targets,
    transfer_s,
    undisturbed,
    within,
)
from benchmarks.migrating.moving import LLAMA_2_7B_KV_BYTES
from benchmarks.models import SHAPES


def line(**body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n"


def moved(**changed: Any) -> Moved:
    facts: dict[str, Any] = {
        "rounds": 2, "tokens": 20, "gap_tokens": 2, "wire_bytes": 1000, "total_s": 0.5, "frozen_s": 0.02,
        "pause_s": 0.05, "handover_s": 0.05, "own_s": (0.01, 0.02, 0.03), "asked_s": 0.6, "ttft_s": 1.0,
        "prompt_tokens": 1000,
    }  # fmt: skip
    return Moved(**(facts | changed))


# -- events ------------------------------------------------------------------------------------------------------------


def test_an_event_has_as_many_tokens_as_log_probabilities() -> None:
    event = read_event(line(choices=[{"text": " a", "logprobs": {"tokens": [" a", ""]}, "finish_reason": None}]))

    assert event == Event(tokens=2)


def test_a_token_without_a_text_is_an_event_all_the_same() -> None:
    assert read_event(line(choices=[{"text": "", "logprobs": {"tokens": [""]}}])) == Event(tokens=1)


def test_the_last_event_tells_why_and_carries_the_ledger() -> None:
    found = read_event(line(choices=[{"text": "", "finish_reason": "length"}], hearth={"migrations": 1}))

    assert found == Event(finish="length", ledger={"migrations": 1})


def test_comments_and_empty_lines_are_no_events() -> None:
    assert read_event(b": loading 41 %\n") is None
    assert read_event(b"\n") is None


def test_the_end_of_a_stream_and_an_error_in_it_are_seen() -> None:
    assert read_event(b"data: [DONE]\n") == Event(done=True)
    assert read_event(line(error={"message": "It is gone."})) == Event(error="It is gone.")


# -- gaps --------------------------------------------------------------------------------------------------------------

TIMES = [0.0, 1.0, 2.0, 6.0, 7.0, 8.0]


def test_gaps_are_between_neighbours() -> None:
    assert [gap.length_s for gap in gaps(TIMES)] == [1.0, 1.0, 4.0, 1.0, 1.0]
    assert gaps([3.0]) == []


def test_a_gap_counts_for_every_window_that_it_touches() -> None:
    assert within(gaps(TIMES), 1.5, 2.5) == [Gap(1.0, 2.0), Gap(2.0, 6.0)]
    assert within(gaps(TIMES), 3.0, 4.0) == [Gap(2.0, 6.0)]


def test_what_touches_the_window_is_not_undisturbed() -> None:
    assert undisturbed(gaps(TIMES), 1.5, 6.0) == [Gap(0.0, 1.0), Gap(6.0, 7.0), Gap(7.0, 8.0)]


def test_the_pause_is_the_largest_gap_around_the_window() -> None:
    assert pause_s(TIMES, 3.0, 4.0) == 4.0
    assert pause_s(TIMES, 6.5, 7.5) == 1.0


def test_the_gap_that_begins_when_the_window_ends_belongs_to_it() -> None:
    assert pause_s(TIMES, 1.5, 2.0) == 4.0


def test_there_is_no_pause_before_or_after_a_stream() -> None:
    with pytest.raises(ValueError):
        pause_s(TIMES, 9.0, 10.0)


def test_the_first_event_after_a_time() -> None:
    assert next_after(TIMES, 2.0) == 6.0
    assert next_after(TIMES, 8.0) == 8.0


# -- what is compared --------------------------------------------------------------------------------------------------


def test_the_bound_has_a_forward_pass_at_least_and_three_steps() -> None:
    assert bound_s(2, 0.001, 0.02) == pytest.approx(0.08)
    assert bound_s(100, 0.001, 0.02) == pytest.approx(0.16)


def test_a_token_s_prefill_is_taken_from_long_prompts() -> None:
    long, short = moved(ttft_s=1.0, prompt_tokens=1000), moved(ttft_s=0.2, prompt_tokens=100)

    assert prefill_token_s([short, long, short]) == pytest.approx(0.001)
    assert prefill_token_s([short]) == pytest.approx(0.002)


def test_a_kv_cache_s_transfer_follows_from_its_size() -> None:
    assert LLAMA_2_7B_KV_BYTES == 524_288
    assert transfer_s(4000, LLAMA_2_7B_KV_BYTES, 1e10) == pytest.approx(1.678, abs=0.001)


def test_kv_bytes_are_those_that_the_engine_counts() -> None:
    assert kv_bytes_per_token(SHAPES["llama-30m-narrow"], 4) == 2 * 3 * 1 * 64 * 4
    assert kv_bytes_per_token(SHAPES["llama-125m"], 4) == 2 * 12 * 12 * 64 * 4


def test_a_summary_takes_medians_and_each_pause_against_its_own_bound() -> None:
    found = summary([moved(pause_s=0.05), moved(pause_s=0.09), moved(pause_s=0.15, gap_tokens=200)], 0.001)

    assert found["pause_s"] == 0.09
    assert found["pause_most_s"] == 0.15
    assert (found["own_p50_s"], found["own_p99_s"]) == (0.02, 0.03)
    assert found["within_bound"] == 2  # bounds of 0.08, 0.08 and 0.26
    assert found["over_own_s"] == pytest.approx(0.07)


def test_targets_are_those_of_the_worst_context_length() -> None:
    calm = summary([moved(pause_s=0.04)], 0.001)
    worst = summary([moved(pause_s=0.10, handover_s=0.06)], 0.001)

    bound, noticed, spread, handover = targets([calm, worst])

    assert bound[1] == pytest.approx(0.10 / 0.08) and bound[2] == 1.0
    assert noticed[1] == pytest.approx(0.10 / 0.07) and noticed[2] == 1.0
    assert spread[1] == pytest.approx(2.5) and spread[2] == 1.25
    assert handover[1] == pytest.approx(1.2) and handover[2] == 1.25
