"""What a gateway remembers of its requests."""

from __future__ import annotations

import pytest

from services.gateway.explain import looked_up, read_last
from services.gateway.recall import Place, Recall, RequestFacts
from shared.contracts.generation import Ledger
from shared.errors import Code, Failure, HearthError
from tests.unit.gateway.bench import Bench


def facts(bench: Bench, text: str = "a", recall: Recall | None = None) -> RequestFacts:
    recall = recall or Recall()
    for account in bench.accounts:
        recall.keep(account, bench.now)
    return recall.find(text, bench.core.live, bench.now)


def test_a_request_is_known_from_its_admission_on() -> None:
    bench = Bench()
    bench.admit()
    bench.now = 2.0
    assert facts(bench) == RequestFacts(request_id="a", deployment="m", state="queued", age_s=2.0)
    bench.own()
    bench.frame(0, count=2)
    bench.now = 3.0
    running = facts(bench)
    assert (running.state, running.queue_s, running.ttft_s, running.completion_tokens) == ("streaming", 2.0, 2.0, 2)
    assert running.places == (Place("r", "w1"),)
    bench.give_back()
    assert facts(bench).state == "interrupted"


def test_what_has_ended_is_remembered_with_its_ledger() -> None:
    bench = Bench()
    bench.begin(tokens=2)
    bench.now = 4.0
    bench.end(2)
    recall = Recall()
    recall.keep(bench.accounts[0], 4.0)
    bench.now = 10.0
    ended = recall.find("a", {}, 10.0)
    assert (ended.state, ended.reason, ended.error, ended.age_s, ended.ended_ago_s) == ("ended", "stop", "", 10.0, 6.0)
    assert (ended.prompt_tokens, ended.completion_tokens, ended.ledger) == (3, 2, Ledger())


def test_the_time_in_the_queue_is_that_of_all_waits_and_none_of_the_runs_between_them() -> None:
    bench = Bench()
    bench.admit()
    bench.now = 2.0
    bench.own()
    assert bench.core.live["a"].waited_s == 2.0
    bench.frame(0, count=2)
    bench.now = 12.0
    bench.give_back()
    bench.now = 15.0
    epoch = bench.own(worker="w2", delivery=2, sequence=17)
    assert bench.core.live["a"].waited_s == 3.0
    bench.now = 20.0
    bench.end(2, epoch=epoch, worker="w2")
    recall = Recall()
    recall.keep(bench.accounts[0], 20.0)
    ended = recall.find("a", {}, 20.0)
    assert ended.ledger is not None
    assert (ended.ledger.queue_s, ended.queue_s, ended.ledger.recoveries) == (5.0, 2.0, 1)


def test_every_place_is_remembered_in_order_and_of_very_many_the_first_and_the_last() -> None:
    bench = Bench()
    bench.begin()
    for number in range(2, 20):
        bench.give_back(epoch=number - 1, worker="w1" if number == 2 else f"w{number - 1}")
        bench.own(worker=f"w{number}", delivery=number, sequence=17, replica_id=f"r{number}")
    places = facts(bench).places
    assert len(places) == 8
    assert (places[0], places[-1]) == (Place("r", "w1"), Place("r19", "w19"))


def test_a_failure_is_told_but_not_what_is_wrong_with_a_prompt() -> None:
    for code, told in ((Code.OUT_OF_MEMORY, "words"), (Code.INVALID_REQUEST, "")):
        bench = Bench()
        bench.begin()
        bench.end(0, failure=Failure(code=code, message="words"))
        ended = facts(bench)
        assert (ended.reason, ended.error) == (code.value, told)


def test_an_id_may_be_cut_short_as_long_as_it_is_clear() -> None:
    bench = Bench()
    bench.admit("abc", n=2)
    bench.admit("abd")
    assert facts(bench, "abd").request_id == facts(bench, "abd").request_id == "abd"
    assert facts(bench, "abc-1").request_id == "abc-1"
    with pytest.raises(HearthError, match="'ab' could be 3 requests: abc-0, abc-1, abd"):
        facts(bench, "ab")
    for text in ("x", ""):
        with pytest.raises(HearthError, match=r"This gateway knows no request .* the last 1000") as caught:
            facts(bench, text)
        assert caught.value.failure.code is Code.NOT_FOUND


def test_only_so_many_are_remembered_and_the_oldest_is_forgotten_first() -> None:
    recall, bench = Recall(most=3), Bench()
    for number in range(5):
        bench.begin(f"r{number}", 17 + number)
        bench.end(0, f"r{number}")
        recall.keep(bench.accounts[-1], float(number))
    assert recall.find("r2", {}, 9.0).ended_ago_s == 7.0
    with pytest.raises(HearthError, match="knows no request 'r1'"):
        recall.find("r1", {}, 9.0)


def test_of_many_replicas_the_latest_and_the_first_are_looked_up() -> None:
    def at(*ids: str) -> RequestFacts:
        places = tuple(Place(id, "w") for id in ids)
        return RequestFacts(request_id="a", deployment="m", state="ended", age_s=0.0, places=places)

    assert looked_up(at()) == []
    assert looked_up(at("a", "b")) == ["b", "a"]
    assert looked_up(at(*"abcdefgh")) == ["h", "g", "f", "a"]


def test_how_many_decisions_are_asked_for() -> None:
    assert (read_last(None), read_last("1"), read_last("64")) == (8, 1, 64)
    for text in ("", "0", "65", "-1", "1.5", "x", "٣", "1" * 50):
        with pytest.raises(HearthError, match="last must be a number from 1 to 64"):
            read_last(text)
