"""The `hearth` object: who gets it, where it stands, and what is in it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from services.gateway import openai as o
from services.gateway.limits import Limits
from services.gateway.rendering import Rendering, ledger_headers
from shared.contracts.generation import End, FinishReason, Ledger
from shared.errors import HearthError

LIMITS = Limits(max_choices=8, max_requests=8)
MOVED = Ledger(migrations=2, rounds=5, recoveries=1, pause_s=0.031, prefill_s=0.2)


def rendering(**body: Any) -> Rendering:
    call = o.read_completion(json.dumps({"model": "m", "prompt": "x", **body}).encode(), LIMITS)
    return Rendering(call, request_id="q", created_s=1)


def end(request_id: str, ledger: Ledger = MOVED) -> End:
    return End(request_id=request_id, epoch=1, index=0, reason=FinishReason.STOP, ledger=ledger)


def test_the_object_of_one_choice_is_its_ledger() -> None:
    out = rendering(hearth={"ledger": True})
    out.end(0, end("q"))
    hearth = json.loads(out.whole())["hearth"]
    assert hearth == {"request_id": "q", **msgspec.structs.asdict(MOVED)}
    assert (hearth["migrations"], hearth["rounds"], hearth["recoveries"], hearth["pause_s"]) == (2, 5, 1, 0.031)


def test_every_choice_is_a_request_that_can_be_named() -> None:
    out = rendering(hearth={"ledger": True}, n=3)
    for index in (2, 0, 1):
        out.end(index, end(f"q-{index}", Ledger(migrations=index)))
    hearth = json.loads(out.whole())["hearth"]
    assert (hearth["request_id"], hearth["migrations"]) == ("q", 0), "the call, with what the first choice tells"
    told = [(one["index"], one["request_id"], one["migrations"]) for one in hearth["ledgers"]]
    assert told == [(0, "q-0", 0), (1, "q-1", 1), (2, "q-2", 2)]


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_tells_it_once_at_its_very_end(usage: bool) -> None:
    out = rendering(hearth={"ledger": True}, n=2, stream=True, stream_options={"include_usage": usage})
    found = []
    for index in (1, 0):
        out.end(index, end(f"q-{index}"))
        found += [json.loads(event) for event in out.closing(index)]
    assert ["hearth" in event for event in found] == [False] * (len(found) - 1) + [True]
    assert (found[-1]["choices"] == []) is usage


def test_who_does_not_ask_gets_nothing() -> None:
    out = rendering()
    out.end(0, end("q"))
    assert "hearth" not in json.loads(out.whole())


@pytest.mark.parametrize(
    ("text", "on"),
    [("true", True), ("1", True), ("Yes", True), (" on ", True), ("", False), ("false", False), ("0", False),
     ("no", False), ("OFF", False)],
)  # fmt: skip
def test_a_header_turns_it_on_or_off(text: str, on: bool) -> None:
    assert o.read_switch("x-hearth-info", text) is on


@pytest.mark.parametrize("text", ["treu", "2", "true, true", "x" * 500])
def test_a_header_that_means_neither_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(HearthError) as refused:
        o.read_switch("x-hearth-info", text)
    failure = refused.value.failure
    assert (failure.kind.status, failure.param) == (400, "x-hearth-info")
    assert failure.message.startswith("The header x-hearth-info must be true or false, not ")
    assert len(failure.message) < 120


def test_headers_of_an_answer_that_is_no_stream() -> None:
    headers = ledger_headers("q", MOVED)
    names = ("migrations", "rounds", "recoveries", "pause-ms")
    assert [headers[f"x-hearth-{name}"] for name in names] == ["2", "5", "1", "31.0"]
