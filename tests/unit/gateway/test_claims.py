"""Who may become the owner of a request, and what its end says about that."""

from __future__ import annotations

from typing import Any

import pytest

from services.gateway import core as c
from services.gateway.ownership import MOST_CLAIM_IDS, Call, Grant, Live, State, judge
from shared.contracts.requests import Claim, Claimed, Gone
from shared.errors import Code, Failure
from tests.unit.gateway.bench import CONFIG, Bench, only, request, superseded, unhinted

W1 = {"state": State.STREAMING, "epoch": 3, "worker_id": "w1", "delivery": 2, "sequence": 17, "claim_ids": {"x": 3}}
LOST = {**W1, "state": State.INTERRUPTED, "returned": True}
AGAIN = {"state": State.QUEUED, "epoch": 4, "worker_id": "w1", "replaced": (17,), "claim_ids": {"x": 3}}
NEW: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("live", "claim", "expected"),
    [
        # by a delivery
        (NEW, {}, Grant.FIRST),
        (NEW, {"delivery": 7, "sequence": 17}, Grant.FIRST),
        ({"sequence": 18}, {"sequence": 17}, "gone"),
        (W1, {"worker_id": "w2", "delivery": 3, "sequence": 17}, Grant.RECOVERY),
        (W1, {"worker_id": "w1", "delivery": 3}, Grant.RECOVERY),
        (W1, {"worker_id": "w2", "delivery": 1}, "stale"),
        (W1, {"worker_id": "w2", "delivery": 2}, "stale"),
        (W1, {"worker_id": "w1", "delivery": 2}, Grant.AGAIN),
        (W1, {"worker_id": "w2", "delivery": 3, "sequence": 16}, "gone"),
        (LOST, {"worker_id": "w2", "delivery": 3, "sequence": 17}, Grant.RECOVERY),
        (LOST, {"worker_id": "w1", "delivery": 2}, "stale"),
        (LOST, {"worker_id": "w2", "delivery": 1}, "stale"),
        (AGAIN, {"sequence": 17, "delivery": 9}, "gone"),
        (AGAIN, {"sequence": 18, "delivery": 1}, Grant.RECOVERY),
        (AGAIN, {"delivery": 1}, Grant.RECOVERY),
        # by a migration
        (W1, {"worker_id": "w2", "after_epoch": 3}, Grant.MIGRATION),
        (W1, {"worker_id": "w2", "after_epoch": 3, "delivery": 1, "sequence": 17}, Grant.MIGRATION),
        (W1, {"worker_id": "w1", "after_epoch": 3}, Grant.RECLAIM),
        (W1, {"worker_id": "w2", "after_epoch": 2}, "stale"),
        (W1, {"worker_id": "w1", "after_epoch": 2}, "stale"),
        (W1, {"worker_id": "w2", "after_epoch": 4}, "stale"),
        (LOST, {"worker_id": "w2", "after_epoch": 3}, "stale"),
        (LOST, {"worker_id": "w1", "after_epoch": 3}, "stale"),
        (AGAIN, {"worker_id": "w2", "after_epoch": 4}, "stale"),
        (NEW, {"after_epoch": 0}, "stale"),
        # the same once more
        (W1, {"worker_id": "w1", "after_epoch": 2, "claim_id": "x"}, Grant.AGAIN),
        (W1, {"worker_id": "w2", "after_epoch": 3, "claim_id": "y"}, Grant.MIGRATION),
        ({**W1, "epoch": 4}, {"worker_id": "w1", "after_epoch": 4, "claim_id": "x"}, "stale"),
        (LOST, {"worker_id": "w1", "after_epoch": 2, "claim_id": "x"}, "stale"),
        (AGAIN, {"worker_id": "w1", "delivery": 1, "claim_id": "x"}, "stale"),
    ],
)
def test_who_may_own(live: dict[str, Any], claim: dict[str, Any], expected: Grant | str) -> None:
    call = Call(call_id="a", deployment="m", slug="m-1", admitted_at=0.0, deadline_at=100.0, stream=True)
    here = Live(call=call, choice=0, request=request("a"), **live)
    asked = Claim(**{"request_id": "a", "worker_id": "w2", "replica_id": "r", **claim})
    verdict = judge(here, asked)
    match verdict:
        case Gone():
            assert expected == "gone"
        case Failure():
            assert (expected, verdict.code) == ("stale", Code.STALE_EPOCH)
        case _:
            assert verdict is expected


def test_a_migration_moves_ownership_and_is_counted() -> None:
    bench = Bench()
    bench.begin(tokens=2)
    bench.now = 3.0
    answer = bench.claim(worker="w2", token="a.1", sequence=17, after_epoch=1, claim_id="m1")
    assert answer == Claimed(epoch=2, budget_s=97.0, waited_s=0.0, token_ids=(0, 1))
    assert bench.frame(2) == [superseded("w1", 1)]
    bench.now = 3.5
    (resumed,) = only(bench.frame(2, epoch=2, worker="w2"), c.Resumed)
    assert (resumed.how, resumed.pause_s, resumed.noticed_s) == ("migration", 3.5, None)
    out = bench.end(3, epoch=2, worker="w2")
    ledger = only(out, c.Conclude)[0].end.ledger
    assert (ledger.migrations, ledger.recoveries, ledger.pause_s) == (1, 0, 3.5)
    assert bench.accounts[0].ledger == ledger


def test_of_destination_and_source_one_wins() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    assert isinstance(bench.claim(worker="w1", after_epoch=1, claim_id="m.back"), Claimed)
    refused = bench.claim(worker="w2", after_epoch=1, claim_id="m")
    assert isinstance(refused, Failure)
    assert refused.code is Code.STALE_EPOCH
    (resumed,) = only(bench.frame(1, epoch=2), c.Resumed)
    assert resumed.how == "reclaim"
    bench.end(2, epoch=2)
    ledger = bench.accounts[0].ledger
    assert (ledger.migrations, ledger.recoveries) == (0, 0)


def test_a_claim_whose_answer_was_lost_is_answered_again() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    first = bench.claim(worker="w2", after_epoch=1, claim_id="m")
    assert bench.claim(worker="w2", after_epoch=1, claim_id="m") == first
    bench.frame(1, epoch=2, worker="w2")
    bench.end(2, epoch=2, worker="w2")
    assert bench.accounts[0].ledger.migrations == 1
    assert bench.claim(worker="w2", after_epoch=1, claim_id="m") == c.GONE


def test_a_delivery_whose_claim_comes_twice_has_one_epoch() -> None:
    bench = Bench()
    bench.begin()
    assert bench.own(sequence=17) == 1
    bench.frame(0)
    bench.end(1)
    assert bench.concluded == [("a", 0)]


def test_a_delivery_that_is_repeated_by_another_token_is_given_back_by_that() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    assert bench.own(token="a.1.again", sequence=17) == 1, "a queue that was killed has forgotten the first time"
    assert only(bench.kill("w1"), c.GiveBack) == [c.GiveBack("a.1.again")]


def test_a_late_copy_of_an_old_claim_takes_nothing_away() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.claim(worker="w2", after_epoch=1, claim_id="there")
    bench.claim(worker="w1", after_epoch=2, claim_id="back")
    late = bench.claim(worker="w2", after_epoch=1, claim_id="there")
    assert isinstance(late, Failure)
    assert bench.own(sequence=17) == 3, "its first claim once more: it is the owner"
    bench.frame(1, epoch=3)
    assert bench.delivered == {("a", 0): [0, 1]}


def test_a_delivery_by_mistake_does_not_take_a_request_from_an_owner_that_lives() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.do(c.Disconnected())
    bench.now = 30.0
    bench.do(c.Reconnected())
    refused = bench.claim(worker="w2", delivery=2, sequence=17, token="a.2")
    assert isinstance(refused, Failure)
    assert refused.code is Code.STALE_EPOCH
    bench.frame(1)
    bench.now = 31.0
    assert isinstance(bench.claim(worker="w2", delivery=3, sequence=17, token="a.3"), Failure)
    bench.now = 33.0
    assert bench.own(worker="w2", delivery=4, sequence=17) == 2, "it has been silent for a while"


def test_an_owner_that_claims_a_later_delivery_has_let_go_of_the_earlier_one() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    assert bench.own(delivery=2, sequence=17) == 2


def test_claim_ids_are_remembered_up_to_a_number() -> None:
    bench = Bench()
    bench.begin()
    for epoch in range(1, 100):
        worker = f"w{epoch % 2}"
        assert isinstance(bench.claim(worker=worker, after_epoch=epoch, claim_id=f"m{epoch}"), Claimed)
    assert len(bench.core._live["a"].claim_ids) == MOST_CLAIM_IDS
    assert isinstance(bench.claim(worker="w1", after_epoch=99, claim_id="m99"), Claimed)


def test_the_message_that_a_claim_names_is_the_one_that_is_taken_out() -> None:
    bench = Bench()
    bench.admit()
    bench.own(sequence=17)  # the queue's confirmation is on its way, or lost
    bench.do(c.PublishFailed("a", 0, Failure(code=Code.UNAVAILABLE, message="x")))
    bench.kill()
    assert only(bench.do(c.ClientLeft("a")), c.Unqueue) == [c.Unqueue(17)]


def test_a_request_that_was_published_twice_is_claimed_by_one_message() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.end(9)  # the frames between were lost
    bench.do(c.PublishFailed("a", 1, Failure(code=Code.UNAVAILABLE, message="not confirmed")))
    out = bench.until(0.5)
    assert only(out, c.Publish) == [c.Publish("m-1", request("a"), 2)], "a stream that has begun does not fail for that"
    assert bench.claim(sequence=17, delivery=5) == c.REPLACED
    bench.own(worker="w2", sequence=18, delivery=1)
    assert bench.do(c.Published("a", 2, 19)) == [c.Unqueue(19)]
    bench.frame(1, epoch=3, worker="w2")
    bench.end(2, epoch=3, worker="w2")
    assert bench.concluded == [("a", 0)]


def test_what_is_given_back_is_resumed_by_the_next_claim() -> None:
    bench = Bench()
    bench.begin(tokens=2)
    assert bench.give_back() == [], "no cancel: it has stopped"
    bench.now = 1.0
    assert bench.own(worker="w2", delivery=2, sequence=17) == 2
    bench.now = 1.5
    (resumed,) = only(bench.frame(2, epoch=2, worker="w2"), c.Resumed)
    assert (resumed.how, resumed.tokens, resumed.pause_s, resumed.noticed_s) == ("recovery", 3, 1.5, 1.5)
    bench.end(3, epoch=2, worker="w2")
    ledger = bench.accounts[0].ledger
    assert (ledger.migrations, ledger.recoveries, ledger.pause_s) == (0, 1, 1.5)


def test_an_old_owner_gives_nothing_back() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.claim(worker="w2", after_epoch=1, token="a.1", sequence=17)
    assert bench.give_back(epoch=1) == []
    bench.frame(1, epoch=2, worker="w2")
    assert bench.give_back("nobody") == []
    assert bench.delivered == {("a", 0): [0, 1]}


def test_what_is_given_back_and_lost_on_its_way_is_published_again() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.give_back()
    out = unhinted(bench.until(CONFIG.reclaim_s))
    assert out == [c.FindMessage("a", 17)]
    assert bench.do(c.MessageFound("a", 17, True)) == []
    assert bench.do(c.MessageFound("a", 17, None)) == []
    out = unhinted(bench.until(60.0))
    assert 5 <= len(out) <= 10, "again, but not too often"
    assert set(out) == {c.FindMessage("a", 17)}
    assert bench.do(c.MessageFound("a", 17, False)) == [c.Unqueue(17), c.Publish("m-1", request("a"), 1)]
    assert bench.do(c.MessageFound("a", 17, False)) == []


def test_who_does_not_hear_that_it_shall_give_back_is_not_waited_for() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.frame(2)
    out = unhinted(bench.until(CONFIG.reclaim_s))
    assert out == [c.GiveBack("a.1"), superseded("w1", 1), c.FindMessage("a", 17)]


def test_the_acknowledgement_of_an_old_owner_does_not_strand_the_request() -> None:
    bench = Bench(c.Config(max_deliveries=5))
    bench.begin(tokens=1)
    bench.kill()
    bench.own(worker="w2", delivery=2, sequence=17)
    bench.end(7)  # w1 was not dead: it has ended the request, and acknowledged the message that w2 has
    bench.frame(1, epoch=2, worker="w2")
    out = bench.kill("w2")
    assert only(out, c.GiveBack) == []
    assert only(out, c.Publish) == [c.Publish("m-1", request("a"), 1)]
    bench.do(c.Published("a", 1, 18))
    bench.own(worker="w3", delivery=1, sequence=18)
    bench.end(7)
    bench.end(7, epoch=2, worker="w2")
    out = bench.kill("w3")
    assert only(out, c.GiveBack) == [c.GiveBack("a.1")], "that was another message"


def test_an_end_that_is_lost_after_progress_is_no_end_that_never_comes() -> None:
    bench = Bench()
    bench.begin()
    epoch = 1
    for index in range(3 * CONFIG.max_republished):
        bench.frame(index, epoch=epoch)
        bench.end(index + 5, epoch=epoch)
        epoch = bench.own(sequence=18 + index)
    assert not bench.failed


def test_what_a_client_waits_for_counts_from_the_first_of_several_losses() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.now = 1.0
    bench.give_back()
    bench.now = 2.0
    bench.own(worker="w2", delivery=2, sequence=17)
    bench.now = 3.0
    bench.give_back(epoch=2, worker="w2")
    bench.now = 4.0
    bench.own(worker="w3", delivery=3, sequence=17)
    (resumed,) = only(bench.frame(1, epoch=3, worker="w3"), c.Resumed)
    assert (resumed.pause_s, resumed.noticed_s) == (4.0, 3.0)
    bench.give_back(epoch=3, worker="w3")
    bench.now = 4.5
    bench.own(worker="w4", delivery=4, sequence=17)
    (resumed,) = only(bench.frame(2, epoch=4, worker="w4"), c.Resumed)
    assert (resumed.pause_s, resumed.noticed_s) == (0.5, 0.5)


def test_after_each_loss_the_message_is_looked_for_soon() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.give_back()
    bench.until(60.0)
    bench.own(worker="w2", delivery=2, sequence=17)
    bench.give_back(epoch=2, worker="w2")
    assert unhinted(bench.until(60.0 + CONFIG.reclaim_s)) == [c.FindMessage("a", 17)]


def test_an_owner_that_cannot_be_asked_loses_to_any_later_delivery() -> None:
    bench = Bench()
    bench.admit()
    bench.do(c.Published("a", 0, 17))
    bench.claim()
    bench.frame(0)
    assert bench.own(worker="w2", delivery=2, sequence=17) == 2


def test_a_request_is_not_resumed_for_ever() -> None:
    bench = Bench()
    bench.begin()
    for delivery in range(1, CONFIG.max_recoveries + 1):
        bench.give_back(epoch=delivery)
        bench.own(delivery=delivery + 1, sequence=17)
    bench.give_back(epoch=CONFIG.max_recoveries + 1)
    assert bench.claim(delivery=CONFIG.max_recoveries + 2, sequence=17) == c.GONE
    assert bench.failed[0][1].code is Code.WORKER_LOST
    assert f"{CONFIG.max_recoveries} times" in bench.failed[0][1].message


def test_a_message_that_the_queue_has_lost_before_anybody_claimed_it_is_published_again() -> None:
    bench = Bench()
    bench.admit("a")
    bench.do(c.Published("a", 0, 17))
    out = unhinted(bench.until(80.0))
    assert set(out) == {c.FindMessage("a", 17)}
    assert 3 <= len(out) <= 6, "again, but ever more rarely: waiting is the normal thing in a queue"
    assert bench.do(c.MessageFound("a", 17, True)) == []
    assert bench.do(c.MessageFound("a", 17, None)) == []
    assert bench.do(c.MessageFound("a", 17, False)) == [c.Unqueue(17), c.Publish("m-1", request("a"), 1)]
    bench.do(c.Published("a", 1, 18))
    assert unhinted(bench.until(80.0 + CONFIG.queued_s)) == [c.FindMessage("a", 18)]
    assert bench.own("a", delivery=1, sequence=18) == 1
