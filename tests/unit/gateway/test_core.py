"""The state machine of open requests: every token once and in order, every request ended once."""

from __future__ import annotations

from services.gateway import core as c
from shared.contracts.requests import Cancel, Claimed
from shared.contracts.residency import LoadProgress, Progress
from shared.errors import Code, Failure
from tests.unit.gateway.bench import CONFIG, Bench, only, owned, request, requeue, superseded


def test_the_usual_life() -> None:
    bench = Bench()
    assert only(bench.admit(), c.Publish) == [c.Publish("m-1", request("a"), 0)]
    assert bench.do(c.Published("a", 0, 17)) == [c.Hint("m", 1, 0.0)]
    bench.now = 2.0
    assert bench.claim() == Claimed(epoch=1, budget_s=98.0, waited_s=2.0)
    bench.frame(0)
    bench.frame(1, count=2)
    out = bench.end(3)
    assert [type(action) for action in out] == [c.Conclude, c.Account]
    assert bench.delivered == {("a", 0): [0, 1, 2]}
    (account,) = bench.accounts
    assert (account.reason, account.failure, account.queue_s, account.ttft_s) == ("stop", None, 2.0, 2.0)
    assert bench.core.open_requests == 0
    assert bench.until(3.0) == [c.Hint("m", 0, 0.0)]
    assert bench.core.deadline() is None


def test_a_claim_may_come_before_the_queue_confirms() -> None:
    bench = Bench()
    bench.admit()
    assert isinstance(bench.claim(), Claimed)
    assert bench.do(c.Published("a", 0, 17)) == []
    bench.frame(0)
    bench.end(1)
    assert bench.concluded == [("a", 0)]


def test_a_lost_confirmation_is_no_failure_once_a_worker_has_the_request() -> None:
    bench = Bench()
    bench.admit()
    bench.claim()
    bench.do(c.PublishFailed("a", 0, Failure(code=Code.UNAVAILABLE, message="x")))
    bench.end(0)
    assert bench.concluded == [("a", 0)]


def test_a_full_queue_fails_the_call_and_takes_its_other_requests_back() -> None:
    bench = Bench()
    bench.admit(n=3)
    bench.do(c.Published("a-0", 0, 17))
    full = Failure(code=Code.QUEUE_FULL, message="full")
    out = bench.do(c.PublishFailed("a-1", 0, full))
    assert only(out, c.Fail) == [c.Fail("a", full)]
    assert only(out, c.Unqueue) == [c.Unqueue(17)]
    assert bench.do(c.Published("a-2", 0, 19)) == [c.Unqueue(19)]
    assert len(bench.accounts) == 3


def test_the_deployments_own_limit_counts_every_request() -> None:
    bench = Bench()
    bench.admit("a", n=2, queue_limit=3)
    out = bench.admit("b", n=2, queue_limit=3)
    assert only(out, c.Publish) == []
    assert bench.failed[0][1].code is Code.QUEUE_FULL
    assert only(bench.admit("c", queue_limit=3), c.Publish)


def test_a_frame_that_comes_twice_is_dropped_and_a_gap_asks_the_request_back() -> None:
    bench = Bench()
    bench.admit()
    bench.do(c.Published("a", 0, 17))
    bench.claim()
    bench.frame(0)
    assert bench.frame(0) == []
    assert bench.frame(2) == [requeue("w1", 1)]
    assert bench.frame(3) == [], "told a moment ago"
    bench.now = 1.0
    assert bench.frame(4) == [requeue("w1", 1)]
    answer = bench.claim(worker="w2", delivery=2)
    assert answer == Claimed(epoch=2, budget_s=99.0, waited_s=1.0, token_ids=(0,))
    assert bench.frame(1) == [], "the old owner has nothing to say, and was told to stop a moment ago"
    bench.now = 2.0
    assert bench.frame(2) == [superseded("w1", 1)]
    bench.frame(1, epoch=2)
    out = bench.end(2, epoch=2)
    assert only(out, c.Conclude)[0].end.ledger.recoveries == 1


def test_an_end_after_a_gap_publishes_the_request_again() -> None:
    bench = Bench()
    bench.admit()
    bench.do(c.Published("a", 0, 17))
    bench.claim()
    bench.frame(0)
    assert bench.end(3) == [c.Unqueue(17), c.Publish("m-1", request("a"), 1)]
    bench.do(c.Published("a", 1, 18))
    assert bench.claim(worker="w2") == Claimed(epoch=3, budget_s=100.0, waited_s=0.0, token_ids=(0,))
    bench.frame(1, epoch=3)
    bench.end(2, epoch=3)
    assert bench.delivered == {("a", 0): [0, 1]}
    assert bench.concluded == [("a", 0)]


def test_ends_that_are_lost_for_ever_fail_in_the_end() -> None:
    bench = Bench()
    bench.admit()
    for epoch in (1, 3, 5):
        assert isinstance(bench.claim(), Claimed)
        bench.end(9, epoch=epoch)
    assert bench.failed[0][1].code is Code.WORKER_LOST


def test_a_client_that_leaves_before_the_claim_leaves_nothing_in_the_queue() -> None:
    bench = Bench()
    bench.admit()
    bench.do(c.Published("a", 0, 17))
    assert only(bench.do(c.ClientLeft("a")), c.Unqueue) == [c.Unqueue(17)]
    assert bench.claim() == c.GONE
    assert bench.do(c.ClientLeft("a")) == []
    assert bench.accounts[0].reason == "cancelled"


def test_a_client_that_leaves_before_the_queue_confirms_leaves_nothing_either() -> None:
    bench = Bench()
    bench.admit()
    assert only(bench.do(c.ClientLeft("a")), c.Unqueue) == []
    assert bench.do(c.Published("a", 0, 17)) == [c.Unqueue(17)]


def test_a_client_that_leaves_stops_the_worker_and_a_deaf_worker_is_told_again() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    cancel = c.CancelWork("w1", Cancel(request_id="a", epoch=1))
    out = bench.do(c.ClientLeft("a"))
    assert only(out, c.CancelWork) == [cancel]
    assert only(out, c.Settle) == [c.Settle("a.1")], "whether or not its owner lives, nobody is handed the message"
    assert bench.frame(1) == []
    bench.now = 1.0
    assert bench.frame(2) == [cancel]
    assert bench.frame(3) == []


def test_the_budget_ends_a_request_that_waits_and_one_that_runs() -> None:
    bench = Bench()
    bench.admit("a", budget_s=10.0)
    bench.do(c.Published("a", 0, 17))
    bench.admit("b", budget_s=20.0)
    bench.claim("b")
    out = bench.until(10.0)
    assert only(out, c.Unqueue) == [c.Unqueue(17)]
    out = bench.until(20.0)
    assert only(out, c.CancelWork) == [c.CancelWork("w1", Cancel(request_id="b", epoch=1))]
    assert [failure.code for _, failure in bench.failed] == [Code.DEADLINE_EXCEEDED] * 2
    assert bench.core.deadline() is None


def test_a_claim_after_the_budget_finds_the_request_gone() -> None:
    bench = Bench()
    bench.admit(budget_s=10.0)
    bench.now = 10.0
    assert bench.claim() == c.GONE
    assert bench.failed[0][1].code is Code.DEADLINE_EXCEEDED


def test_a_workers_failure_ends_the_call_and_its_siblings() -> None:
    bench = Bench()
    bench.admit(n=2)
    bench.claim("a-0")
    bench.claim("a-1", worker="w2")
    failure = Failure(code=Code.PROMPT_TOO_LONG, message="too long")
    out = bench.end(0, "a-0", failure=failure)
    assert only(out, c.Fail) == [c.Fail("a", failure)]
    assert only(out, c.CancelWork) == [c.CancelWork("w2", Cancel(request_id="a-1", epoch=1))]
    assert [account.reason for account in bench.accounts] == ["prompt_too_long"] * 2


def test_a_worker_that_gave_up_because_it_was_told_to_is_no_failure() -> None:
    bench = Bench()
    bench.admit()
    bench.claim()
    bench.frame(0)
    bench.frame(2)
    out = bench.end(3, failure=Failure(code=Code.CANCELLED, message="told to"))
    assert only(out, c.Publish)
    assert not bench.failed


def test_what_a_late_owner_says_in_order_is_true_until_somebody_else_claims() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.kill()
    assert only(bench.frame(1), c.Deliver)
    assert only(bench.frame(5), c.Deliver) == []
    out = bench.end(2)
    assert bench.concluded == [("a", 0)]
    assert only(out, c.Unqueue) == [c.Unqueue(17)], "it lies in the queue again, and nobody needs it"


def test_an_old_owner_is_told_to_stop_but_not_with_every_frame() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.kill()
    bench.own(worker="w2", delivery=2)
    assert bench.frame(1) == [superseded("w1", 1)]
    assert bench.frame(2) == []
    bench.now += 1.0
    assert bench.frame(3) == [superseded("w1", 1)]
    assert bench.delivered == {("a", 0): [0]}


def test_what_is_remembered_of_those_who_go_on_is_bounded() -> None:
    bench = Bench()
    for number in range(100):
        bench.now = number * 0.1
        assert bench.frame(0, f"x{number}") == [c.CancelWork("w1", Cancel(request_id=f"x{number}", epoch=1))]
    assert len(bench.core._reminders) <= CONFIG.remind_s / 0.1 + 1


def test_what_nobody_wants_is_said_to_who_holds_it() -> None:
    bench = Bench()
    bench.begin("a", tokens=1)
    bench.begin("b", 18, tokens=1)
    bench.begin("d", 19, tokens=1)
    bench.begin("e", 20, tokens=1)
    bench.kill()
    bench.own("a", "w2", delivery=2, sequence=17)
    bench.own("d", "w1", delivery=2, sequence=19)
    bench.do(c.ClientLeft("e"))
    held = [owned("a"), owned("b"), owned("c"), owned("d", 2), owned("e"), owned("d", -1)]
    answer, out = bench.holds(*held)
    assert (answer.ended, answer.superseded) == (("c", "e"), ("a", "b"))
    assert out == []


def test_an_owner_that_has_not_heard_that_it_shall_give_back_is_told_when_it_says_what_it_holds() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    assert bench.frame(3) == [requeue("w1", 1)]
    bench.now = 1.0
    assert bench.holds(owned(index=4)) == (bench.holds()[0], [requeue("w1", 1)])


def test_one_choice_may_end_before_the_other() -> None:
    bench = Bench()
    bench.admit(n=2)
    bench.claim("a-0")
    bench.claim("a-1")
    bench.end(0, "a-0")
    bench.frame(0, "a-1")
    bench.end(1, "a-1")
    assert bench.concluded == [("a", 0), ("a", 1)]


def test_a_deleted_deployment_ends_its_calls() -> None:
    bench = Bench()
    bench.admit("a")
    bench.do(c.Published("a", 0, 17))
    bench.admit("b")
    bench.claim("b")
    assert bench.do(c.DeploymentGone("other")) == []
    out = bench.do(c.DeploymentGone("m"))
    assert {call_id for call_id, _ in bench.failed} == {"a", "b"}
    assert {failure.code for _, failure in bench.failed} == {Code.UNKNOWN_MODEL}
    assert only(out, c.Unqueue) == [c.Unqueue(17)]
    assert len(only(out, c.CancelWork)) == 1


def test_a_deployment_that_cannot_be_loaded_ends_the_calls_that_wait_but_not_those_that_stream() -> None:
    bench = Bench()
    bench.admit("a")
    bench.do(c.Published("a", 0, 17))
    bench.admit("b")
    bench.claim("b")
    corrupt = Failure(code=Code.CHECKPOINT_CORRUPT, message="Chunk 3 is damaged.")
    assert bench.do(c.DeploymentFailed("other", corrupt)) == []
    out = bench.do(c.DeploymentFailed("m", corrupt))
    assert bench.failed == [("a", corrupt)]
    assert only(out, c.Unqueue) == [c.Unqueue(17)]
    assert bench.core.open_requests == 1


def test_a_stream_that_has_begun_outlives_a_passing_failure_of_its_deployment() -> None:
    bench = Bench()
    bench.begin("a", tokens=1)
    bench.begin("b", 18)
    bench.kill()
    passing = c.DeploymentFailed("m", Failure(code=Code.CHECKPOINT_UNAVAILABLE, message="The store is away."))
    bench.do(passing)
    assert [call_id for call_id, _ in bench.failed] == ["b"]
    bench.until(CONFIG.patience_s)
    bench.do(passing)
    assert len(bench.failed) == 1
    bench.until(CONFIG.patience_s + 1.0)
    bench.do(passing)
    assert [call_id for call_id, _ in bench.failed] == ["b", "a"]


def test_a_stream_that_has_begun_does_not_wait_for_what_cannot_pass() -> None:
    bench = Bench()
    bench.begin("a", tokens=1)
    bench.kill()
    bench.do(c.DeploymentFailed("m", Failure(code=Code.UNSUPPORTED, message="It cannot be served.")))
    assert [call_id for call_id, _ in bench.failed] == ["a"]


def test_closing_ends_everything() -> None:
    bench = Bench()
    bench.admit("a")
    bench.admit("b", n=2)
    bench.do(c.Closing(Failure(code=Code.DRAINING, message="bye")))
    assert [failure.code for _, failure in bench.failed] == [Code.DRAINING] * 2
    assert bench.core.open_requests == 0


LOST = c.DeploymentFailed("m", Failure(code=Code.NO_CAPACITY, message="No room."))


def progress(done: int, phase: str = "reading") -> c.ProgressArrived:
    return c.ProgressArrived(
        LoadProgress(deployment="m-1", server_id="s", progress=Progress(phase=phase, done_bytes=done, total_bytes=100))
    )


def test_progress_reaches_the_streams_that_wait_and_not_too_often() -> None:
    bench = Bench()
    bench.admit("a")
    bench.admit("b", stream=False)
    assert [action.call_id for action in only(bench.do(progress(1), 0.0), c.Inform)] == ["a"]
    assert bench.do(progress(2), 0.1) == []
    assert len(bench.do(progress(3), 0.2)) == 1
    assert len(bench.do(progress(100, "attaching"), 0.21)) == 1, "a new phase is news"
    bench.claim()
    bench.frame(0)
    assert bench.do(progress(4), 1.0) == []


def test_who_comes_during_a_cold_start_hears_at_once_how_far_it_is() -> None:
    bench = Bench()
    bench.do(progress(40), 0.0)
    assert len(only(bench.admit("a"), c.Inform)) == 1
    bench.now = 60.0
    assert only(bench.admit("b"), c.Inform) == []


def test_hints_are_few_but_none_is_lost() -> None:
    bench = Bench()
    for name in "abc":
        bench.admit(name)
    hints = [only(bench.do(c.Published(name, 0, 1)), c.Hint) for name in "abc"]
    assert [len(found) for found in hints] == [1, 0, 0]
    assert bench.core.deadline() == CONFIG.hint_s
    assert bench.do(None, CONFIG.hint_s) == [c.Hint("m", 3, CONFIG.hint_s)]
