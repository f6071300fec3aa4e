"""Placement, one sentence of behaviour per file of `golden/`: a cluster, a question, the decision with its reasons.

`sight` says what the words above `----` mean. Below it: the outcome, then the candidates, the chosen one first, each
with its estimated seconds in parts and how room would be made, or why it cannot be.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from services.scheduler.choice import decide, room_text
from services.scheduler.terms import Candidate, Decision, Outcome
from tests.unit.scheduler.sight import read

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))
NOW = 1000.0
WORDS = {Outcome.PLACE: "place on", Outcome.EVICT: "evict on", Outcome.MAKE_ROOM: "make room on"}


def seconds(value: float) -> str:
    """At most two digits after the point, none that says nothing."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def line(one: Candidate) -> str:
    """A candidate with its reason."""
    place = "+".join(one.worker_ids)
    if one.refused:
        return f"{place}: {one.refused}"
    parts = [("queue", one.startup.wait_s), ("bytes", one.startup.move_s), ("attach", one.startup.attach_s),
             ("room", one.startup.room_s)]  # fmt: skip
    told = " + ".join(f"{name} {seconds(value)}" for name, value in parts if value > 0)
    how = ", streamed" * one.streams + ", quarantined there" * one.quarantined
    room = room_text(one.room)
    return f"{place}: {seconds(one.startup.total_s)} s from {one.tier}{how} = {told}{f' ({room})' if room else ''}"


def as_text(decision: Decision) -> str:
    """The outcome, then every candidate."""
    chosen = decision.chosen
    head = f"{WORDS[decision.outcome]} {'+'.join(chosen.worker_ids)}" if chosen is not None else decision.outcome.value
    return "\n".join([head, *(f"  {line(one)}" for one in decision.candidates)])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    question, _, expected = path.read_text().partition("----\n")
    assert question.startswith("# "), "the first line says what the scenario shows"
    view, ask = read(question)
    assert as_text(decide(ask, view, NOW)) == expected.rstrip("\n")


def test_there_are_scenarios() -> None:
    assert len(GOLDEN) >= 30
