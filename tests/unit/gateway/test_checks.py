"""Owners that say nothing: who is asked, and who is lost."""

from __future__ import annotations

from collections.abc import Callable

from services.gateway import core as c
from shared.errors import Code, Failure
from tests.unit.gateway.bench import CONFIG, UNAVAILABLE, Bench, only, owned, request, requeue, superseded, unhinted


def test_a_silent_owner_is_asked_about_all_that_is_silent() -> None:
    bench = Bench()
    bench.begin("a", 17, tokens=2)
    bench.begin("b", 18)  # still in its prefill
    bench.begin("d", 19, worker="w2")
    bench.begin("e", 20)
    bench.now = 0.4
    bench.frame(0, "d", worker="w2")
    bench.frame(0, "e")
    assert only(bench.until(0.6), c.CheckOwner) == [c.CheckOwner("w1", (owned("a", index=2), owned("b")))]
    assert [check.worker_id for check in only(bench.until(1.0), c.CheckOwner)] == ["w2"]


def test_an_owner_that_speaks_is_not_asked() -> None:
    bench = Bench()
    bench.begin()
    for index in range(100):
        assert only(bench.until(index * 0.4), c.CheckOwner) == []
        bench.frame(index)


def test_an_owner_that_answers_is_asked_again_after_a_while() -> None:
    bench = Bench()
    bench.begin()
    asked = 0
    for _ in range(40):
        bench.now += 0.5
        for check in only(bench.until(bench.now), c.CheckOwner):
            asked += 1
            assert bench.checked(check, owned()) == []
    assert 20 <= asked <= 40
    bench.frame(0)
    bench.end(1)
    assert bench.core.deadline() is None


def test_while_a_question_is_on_its_way_there_is_no_other() -> None:
    bench = Bench()
    bench.begin()
    assert len(only(bench.until(2.0), c.CheckOwner)) == 1


def test_a_dead_worker_loses_all_its_requests_at_once() -> None:
    bench = Bench()
    bench.begin("a", 17, tokens=2)
    bench.begin("b", 18)
    bench.begin("d", 19, worker="w2")
    bench.now = 0.4
    bench.frame(0, "b")
    out = bench.kill("w1")
    assert bench.now == 0.5
    assert only(out, c.OwnerLost) == [c.OwnerLost("w1", "unserved", 2)]
    assert only(out, c.GiveBack) == [c.GiveBack("a.1"), c.GiveBack("b.1")]
    assert only(out, c.FindMessage) == [c.FindMessage("a", 17), c.FindMessage("b", 18)]
    assert only(out, c.CancelWork) == [], "who is dead hears nothing"
    bench.now = 0.6
    bench.own("a", "w2", delivery=2, sequence=17)
    bench.now = 0.8
    (resumed,) = only(bench.frame(2, "a", epoch=2, worker="w2"), c.Resumed)
    assert resumed.pause_s == 0.8
    assert resumed.noticed_s is not None
    assert round(resumed.noticed_s, 6) == 0.3


def test_who_claims_while_it_is_asked_is_not_dead() -> None:
    bench = Bench()
    bench.begin("a", 17)
    (check,) = only(bench.until(0.5), c.CheckOwner)
    bench.now = 0.6
    bench.begin("b", 18)
    out = bench.unserved(check)
    assert only(out, c.GiveBack) == [c.GiveBack("a.1")]
    bench.frame(0, "b")
    assert bench.delivered == {("b", 0): [0]}


def test_a_worker_that_hangs_is_lost_after_a_while() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    lost: list[float] = []
    for tenth in range(100):
        out = bench.until(tenth / 10)
        for check in only(out, c.CheckOwner):
            bench.now += 0.05
            out += bench.unanswered(check)
        lost += [bench.now for _ in only(out, c.OwnerLost)]
    assert len(lost) == 1
    assert 0.5 + CONFIG.lost_after_s <= lost[0] <= 0.5 + CONFIG.lost_after_s + 0.2
    assert only(bench.frame(1), c.CancelWork) == [superseded("w1", 1)]


def test_a_worker_that_hangs_in_the_question_is_lost_too() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    out = bench.until(0.5 + CONFIG.lost_after_s)
    assert only(out, c.OwnerLost) == [c.OwnerLost("w1", "silent", 1)]
    assert only(out, c.GiveBack) == [c.GiveBack("a.1")]
    assert bench.do(c.OwnerChecked("w1", (owned(index=1),), UNAVAILABLE)) == []


def test_every_word_of_a_worker_is_a_sign_of_life() -> None:
    bench = Bench()
    bench.begin("a", 17)
    bench.begin("b", 18)
    words: list[Callable[[], object]] = [
        lambda: bench.frame(0, "b"),
        lambda: bench.holds(owned("a")),
        lambda: bench.give_back("nobody"),
        lambda: bench.claim("nobody"),
    ]
    for second in range(1, 20):
        for check in only(bench.until(float(second)), c.CheckOwner):
            bench.unanswered(check)
        words[second % len(words)]()
    assert only(bench.until(20.0), c.OwnerLost) == []


def test_a_worker_that_refuses_to_answer_does_not_keep_a_silent_request_for_ever() -> None:
    bench = Bench()
    bench.begin("a", 17)
    bench.begin("b", 18)
    lost: list[c.OwnerLost] = []
    for second in range(1, 40):
        out = bench.until(float(second))
        for check in only(out, c.CheckOwner):
            refusal = Failure(code=Code.INTERNAL, message="The call could not be handled.")
            bench.do(c.OwnerChecked("w1", check.requests, refusal))
        bench.frame(second - 1, "b")
        lost += only(out, c.OwnerLost)
    assert lost == [c.OwnerLost("w1", "silent", 1)]


def test_a_request_that_its_worker_does_not_know_is_lost_alone() -> None:
    bench = Bench()
    bench.begin("a", 17, tokens=1)
    bench.begin("b", 18, tokens=1)
    bench.now = 3.0
    (check,) = only(bench.do(None), c.CheckOwner)
    out = bench.checked(check, owned("b", index=1))
    assert out == [c.OwnerLost("w1", "denied", 1), c.GiveBack("a.1"), c.FindMessage("a", 17)]
    bench.do(c.MessageFound("a", 17, False))
    bench.do(c.Published("a", 1, 20))
    assert only(bench.until(3.1), c.Hint)[-1].waiting == 1


def test_the_answer_to_a_claim_may_be_on_its_way_for_a_while() -> None:
    bench = Bench()
    bench.begin()
    (check,) = only(bench.until(0.5), c.CheckOwner)
    assert bench.checked(check) == []
    lost: list[float] = []
    while not lost:
        bench.now += 0.1
        for check in only(bench.until(bench.now), c.CheckOwner):
            lost += [bench.now for _ in only(bench.checked(check), c.OwnerLost)]
    assert lost[0] >= CONFIG.settle_s


def test_a_frame_that_overtook_the_answer_counts_more() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.now = 3.0
    (check,) = only(bench.do(None), c.CheckOwner)
    bench.now = 3.1
    bench.frame(1)
    assert bench.checked(check) == []


def test_an_answer_about_an_old_epoch_says_nothing() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.now = 3.0
    (check,) = only(bench.do(None), c.CheckOwner)
    bench.claim(worker="w1", after_epoch=1, claim_id="back")
    assert bench.checked(check) == []
    bench.frame(1, epoch=2)
    assert bench.delivered == {("a", 0): [0, 1]}


def test_frames_that_are_lost_are_noticed_without_a_further_one() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    (first,) = only(bench.until(0.5), c.CheckOwner)
    assert bench.checked(first, owned(index=3)) == [], "they may be on their way"
    (second,) = only(bench.until(1.0), c.CheckOwner)
    assert bench.checked(second, owned(index=3)) == [requeue("w1", 1)]


def test_frames_that_were_only_late_are_no_loss() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    (first,) = only(bench.until(0.5), c.CheckOwner)
    bench.checked(first, owned(index=3))
    bench.frame(1, count=2)
    (second,) = only(bench.until(1.0), c.CheckOwner)
    assert bench.checked(second, owned(index=4)) == []


def test_while_the_bus_is_away_nobody_is_asked_or_lost() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    (check,) = only(bench.until(0.5), c.CheckOwner)
    bench.do(c.Disconnected())
    assert bench.unserved(check) == []
    assert bench.until(50.0) == []
    bench.do(c.Reconnected())
    assert bench.unanswered(check) == []
    assert only(bench.until(50.0 + CONFIG.settle_s - 0.01), c.CheckOwner) == []
    (check,) = only(bench.until(50.0 + CONFIG.settle_s), c.CheckOwner)
    assert only(bench.unserved(check), c.GiveBack) == [c.GiveBack("a.1")]


def test_a_worker_without_a_token_cannot_be_asked() -> None:
    bench = Bench()
    bench.admit()
    bench.do(c.Published("a", 0, 17))
    bench.claim()
    assert unhinted(bench.until(CONFIG.quiet_s - 0.1)) == []
    out = bench.until(CONFIG.quiet_s)
    assert out == [c.OwnerLost("w1", "silent", 1), c.FindMessage("a", 17)]


def test_the_siblings_of_a_request_that_ends_with_its_worker_end_with_it() -> None:
    bench = Bench(c.Config(max_deliveries=1))
    bench.admit(n=2)
    for number in range(2):
        bench.own(f"a-{number}", sequence=17 + number)
    out = bench.kill()
    assert [failure.code for _, failure in bench.failed] == [Code.WORKER_LOST]
    assert len(bench.accounts) == 2
    assert only(out, c.GiveBack) == []
    assert only(out, c.Settle) == [c.Settle("a-1.1")]


def test_a_republished_request_is_the_same_for_its_client() -> None:
    bench = Bench()
    bench.begin(tokens=2)
    bench.kill()
    assert bench.do(c.MessageFound("a", 17, False)) == [c.Unqueue(17), c.Publish("m-1", request("a"), 1)]
    bench.do(c.Published("a", 1, 18))
    epoch = bench.own(worker="w2", delivery=1, sequence=18)
    assert bench.frame(2, worker="w1") == [superseded("w1", 1)]
    bench.frame(2, epoch=epoch, worker="w2")
    bench.end(3, epoch=epoch, worker="w2")
    assert bench.delivered == {("a", 0): [0, 1, 2]}
    assert bench.accounts[0].ledger.recoveries == 1


def test_a_message_that_went_while_the_gateway_was_away_is_published_again() -> None:
    bench = Bench()
    bench.admit("a")
    bench.do(c.Published("a", 0, 17))
    bench.do(c.Disconnected())
    out = bench.do(c.Reconnected(), at=60.0)
    assert only(out, c.FindMessage) == [c.FindMessage("a", 17)]
    assert bench.do(c.MessageFound("a", 17, True)) == []
    out = bench.do(c.MessageFound("a", 17, False))
    assert [action.attempt for action in only(out, c.Publish)] == [1]
    bench.do(c.Published("a", 1, 18))
    assert bench.own("a", delivery=1, sequence=18) == 1
