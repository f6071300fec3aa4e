"""When gateways are told what runs for them, and since when one is silent."""

from __future__ import annotations

from services.worker.holds import Holdings
from shared.contracts.requests import Owned

ONE = (Owned(request_id="q1", epoch=1),)
ANOTHER = (Owned(request_id="q2", epoch=1),)


def test_a_gateway_is_silent_since_the_first_question_that_it_has_not_answered() -> None:
    holdings = Holdings(hold_s=2.0, lost_s=5.0)
    holdings.began("g1", 0.0)
    for now in (2.0, 4.0, 6.0):
        assert [gateway_id for gateway_id, _ in holdings.ask("w1", {"g1": ONE}, now)] == ["g1"]
        assert holdings.answered("g1", now + 0.9) == {"q1": 1}
    assert not holdings.lost("g1", 6.9, bus_back_at=0.0)
    assert holdings.lost("g1", 7.0, bus_back_at=0.0)
    assert not holdings.lost("g1", 7.0, bus_back_at=2.5)
    holdings.heard("g1")
    assert not holdings.lost("g1", 100.0, bus_back_at=0.0)


def test_the_silence_of_a_gateway_for_which_nothing_runs_any_more_is_forgotten() -> None:
    holdings = Holdings(hold_s=2.0, lost_s=5.0)
    holdings.began("g1", 0.0)
    holdings.ask("w1", {"g1": ONE}, 2.0)
    assert holdings.ask("w1", {}, 4.0) == []  # while the question is on its way
    assert holdings.due_at is None
    holdings.answered("g1", 4.5)
    holdings.began("g1", 1000.0)
    holdings.ask("w1", {"g1": ANOTHER}, 1002.0)
    holdings.answered("g1", 1003.0)
    assert not holdings.lost("g1", 1003.0, bus_back_at=0.0)
