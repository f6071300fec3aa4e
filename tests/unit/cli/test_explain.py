"""`hearth explain`: how decisions and requests are shown."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from services.cli.client import ExplainedRequest, RequestExplanation, Where
from services.cli.explain import error_words, explanation, percent, request_explanation, seconds
from services.cli.parser import parse
from shared.contracts.generation import Ledger
from shared.contracts.placement import CandidateView, DecisionView, Explanation, Parts
from shared.errors import Code, Failure

CHOSEN = CandidateView(
    worker_ids=("worker-1",), server_id="server-1", tier="dram", estimate=Parts(attach_s=0.043, room_s=0.8),
    room="moves chat-x1 to worker-2 (loaded there first)",
)  # fmt: skip
NEXT = CandidateView(
    worker_ids=("worker-3",), server_id="server-2", tier="ssd", estimate=Parts(wait_s=0.5, move_s=3.41, attach_s=0.04)
)


def refused(number: int, why: str) -> CandidateView:
    return CandidateView(worker_ids=(f"worker-{number}",), server_id="server-3", tier="ssd", refused=why)


def decision(**more: Any) -> DecisionView:
    fields = {
        "decision_id": "d1", "ago_s": 12.3, "deployment": "org/assistant", "outcome": "move",
        "reason": "worker-1 is the fastest.", "candidates": (CHOSEN, NEXT), "replica_id": "assistant-x1",
        "decide_ms": 0.42, **more,
    }  # fmt: skip
    return DecisionView(**fields)


def told(*decisions: DecisionView, **more: Any) -> Explanation:
    return Explanation(scheduler_id="s", term=1, decisions=decisions, **more)


def shown(what: RenderableType, width: int = 80, *, colours: bool = False) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colours).print(what)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_decision_shows_every_candidate_in_parts_the_chosen_one_marked_and_what_it_took() -> None:
    one = decision(
        candidates=(CHOSEN, NEXT, refused(5, "no memory"), refused(6, "no memory"), refused(7, "draining")), more=994,
        actual=Parts(attach_s=0.05, room_s=0.9), actual_s=0.98,
    )  # fmt: skip
    assert shown(explanation(told(one, median_error=0.043, p95_error=0.21, loads=64), "x")) == [
        "org/assistant → worker-1 loaded after making room · 12 s ago",
        "  worker-1 is the fastest.",
        "  replica assistant-x1 · decided in 0.4 ms",
        "    worker   server    from    wait    move  attach    room   total",
        "  ▸ worker-1 server-1  DRAM       –       – 0.043 s 0.800 s 0.843 s",
        "    it took  16 % more            –       – 0.050 s 0.900 s 0.980 s",
        "    worker-3 server-2  SSD  0.500 s 3.410 s 0.040 s       – 3.950 s",
        "  room on worker-1: moves chat-x1 to worker-2 (loaded there first)",
        "  not worker-5, worker-6: no memory",
        "  not worker-7: draining",
        "  994 other workers could not have been better",
        "",
        "the last 64 estimates were off by 4 % at the median, 95 % by at most 21 %",
    ]


def test_few_loads_say_little_of_how_far_estimates_are_off() -> None:
    lines = [shown(explanation(told(median_error=0.5, p95_error=0.9, loads=count), "x"))[-1] for count in (1, 19, 20)]
    assert lines == [
        "the only load so far was estimated with an error of 50 %",
        "the last 19 estimates were off by 50 % at the median",
        "the last 20 estimates were off by 50 % at the median, 95 % by at most 90 %",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_with_long_names_and_many_places(width: int) -> None:
    many = tuple(
        CandidateView(
            worker_ids=(f"accelerated-node-{number}-worker-3", f"accelerated-node-{number}-worker-4"),
            server_id=f"accelerated-node-{number}", tier="remote", room="stops " + ", ".join(["a-long-name-x1"] * 9),
            estimate=Parts(wait_s=1234.5, move_s=999.5, attach_s=12.25, room_s=0.001),
        )
        for number in range(12)
    )  # fmt: skip
    long = decision(candidates=many + tuple(refused(number, "is on fire") for number in range(9)))
    lines = shown(explanation(told(long), "x"), width)
    assert max(map(len, lines)) <= width
    assert "▸" in "\n".join(lines)
    assert "and 4 more: is on fire" in " ".join(lines)


def test_waiting_says_since_when_how_often_and_for_what() -> None:
    waits = decision(
        outcome="wait", replica_id="", reason="all are busy", times=41, decide_ms=0.0, more=1,
        candidates=(refused(5, "has its 1 replica"),),
    )  # fmt: skip
    assert shown(explanation(told(waits, waiting="all are busy"), "x")) == [
        "org/assistant waits for 12 s, looked at 41 times",
        "  all are busy",
        "  not worker-5: has its 1 replica",
        "  1 other worker likewise",
        "",
    ]
    lines = shown(explanation(told(decision(), waiting="all are busy"), "x"))
    assert lines[0] == "nothing is placed now: all are busy"
    doing = "waits for the end of 3 requests of x on w2, expected in 12 s"
    assert shown(explanation(told(decision(), doing=doing), "x"))[0] == f"now: {doing}"


def test_what_is_under_way_has_failed_or_is_not_known_is_said() -> None:
    making = shown(explanation(told(decision(replica_id="")), "x"))
    assert "  room is being made · decided in 0.4 ms" in making
    assert not [line for line in making if "it took" in line]
    failed = decision(failure=Failure(code=Code.OUT_OF_MEMORY, message="no room"))
    assert "  the load failed: no room" in shown(explanation(told(failed), "x"))
    assert shown(explanation(told(), "org/m")) == ["no decision about org/m is remembered"]


def test_colours_are_for_terminals() -> None:
    found = explanation(told(decision()), "x")
    assert "\x1b" not in "".join(shown(found))
    assert "\x1b" in "".join(shown(found, colours=True))


ENDED = ExplainedRequest(
    request_id="0123456789abcdef01234567", deployment="m", state="ended", age_s=22.0, ended_ago_s=10.0, reason="stop",
    queue_s=4.2, ttft_s=4.32, prompt_tokens=312, completion_tokens=128,
    places=(Where(replica_id="m-x1", worker_id="worker-3"), Where(replica_id="m-x2", worker_id="worker-1")),
    ledger=Ledger(
        cold=True, tier="ssd", queue_s=4.2, decision_s=0.002, read_s=3.4, attach_s=0.043, prefill_s=0.12, decode_s=7.7,
        ssd_bytes=5 * 2**30, migrations=1, rounds=3, pause_s=0.021,
    ),
)  # fmt: skip


def test_a_request_shows_where_its_time_went_and_the_decision_behind_it() -> None:
    lines = shown(
        request_explanation(RequestExplanation(gateway_id="g", request=ENDED, explanation=told(decision()))), 100
    )
    assert lines[:16] == [
        "request 0123456789abcdef01234567 of m ended (stop) 10 s ago",
        "  312 tokens of prompt, 128 tokens of answer, the first after 4.3 s, all after 12 s",
        "  at worker-3 (m-x1), then worker-1 (m-x2)",
        "",
        "  where the time went        took",
        "  in the queue            4.200 s  a cold start from SSD",
        "    until it was decided  0.002 s",
        "    → DRAM                3.400 s  5 GiB from SSD",
        "    attached              0.043 s",
        "    other waiting         0.755 s  for room, the load queue, the way to the worker",
        "  prefill                 0.120 s",
        "  decode                  7.700 s",
        "  longest pause           0.021 s  1 migration in 3 rounds",
        "",
        "how its replica came there:",
        "org/assistant → worker-1 loaded after making room · 12 s ago",
    ]


def test_a_request_that_met_a_loaded_model_has_no_parts_in_its_queue() -> None:
    warm = ExplainedRequest(
        request_id="a", deployment="m", state="ended", age_s=2.0, ended_ago_s=1.0, reason="length", completion_tokens=1,
        prompt_tokens=3, ledger=Ledger(queue_s=0.001, attach_s=9.0, prefill_s=0.1, recoveries=2),
    )  # fmt: skip
    text = "\n".join(shown(request_explanation(RequestExplanation(gateway_id="g", request=warm, explanation=told()))))
    assert "in the queue         0.001 s  the model was loaded" in text
    assert "attached" not in text
    assert "longest pause              –  resumed 2 times" in text
    assert "the decision that loaded its replica is not remembered any more" in text


def test_a_request_that_waits_says_why_and_one_that_failed_says_how() -> None:
    queued = ExplainedRequest(request_id="a", deployment="m", state="queued", age_s=22.0)
    found = RequestExplanation(gateway_id="g", request=queued, explanation=told(waiting="no room"))
    assert shown(request_explanation(found)) == [
        "request a of m queued for 22 s",
        "",
        "it runs nowhere; decisions about m:",
        "nothing is placed now: no room",
        "no decision about m is remembered",
    ]
    failed = ExplainedRequest(
        request_id="a", deployment="m", state="ended", age_s=2.0, ended_ago_s=1.0, reason="out_of_memory", error="No."
    )
    lines = shown(request_explanation(RequestExplanation(gateway_id="g", request=failed, error="It does not answer.")))
    assert lines[:2] == ["request a of m ended (out_of_memory) 1.0 s ago", "  No."]
    assert lines[-1] == "the decisions are not known: It does not answer."


def test_numbers_for_people() -> None:
    assert [seconds(value) for value in (0.0, 0.0432, 12.5, 310.4)] == ["–", "0.043 s", "12.500 s", "310 s"]
    assert [percent(part) for part in (0.0, 0.0042, 0.124, None)] == ["0 %", "0.4 %", "12 %", "0 %"]
    pairs = [(1.0, 1.0), (1.0, 1.12), (2.0, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.004)]
    assert [error_words(*pair) for pair in pairs] == ["as said", "12 % more", "50 % less", "more", "as said", "as said"]


def test_what_is_asked_for() -> None:
    options = parse(["explain", "org/m", "--last", "3", "--json"]).options
    assert (options.what, options.last, options.json) == ("org/m", 3, True)
    assert parse(["explain"]).options.what is None
