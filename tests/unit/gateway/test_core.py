"""The state machine of open requests: every token once and in order, every request ended once."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.gateway import core as c
from shared.contracts.generation import End, FinishReason, Frame, FrameBatch, Usage
from shared.contracts.requests import Cancel, Claim, Claimed, Gone, Request, Sampling, TextPrompt
from shared.contracts.residency import LoadProgress, Progress
from shared.errors import Code, Failure

CONFIG = c.Config(max_deliveries=3, max_republished=2, quiet_s=30.0)


def request(request_id: str) -> Request:
    return Request(
        request_id=request_id,
        gateway_id="g",
        deployment="m",
        prompt=TextPrompt(text="x"),
        sampling=Sampling(),
        budget_s=100.0,
    )


@dataclass
class Bench:
    """A core with a clock in hand; remembers what came out and checks what must always hold."""

    core: c.GatewayCore = field(default_factory=lambda: c.GatewayCore(CONFIG))
    now: float = 0.0
    delivered: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    concluded: list[tuple[str, int]] = field(default_factory=list)
    failed: list[tuple[str, Failure]] = field(default_factory=list)
    accounts: list[c.Account] = field(default_factory=list)

    def do(self, event: c.Event | None, at: float | None = None) -> list[c.Action]:
        self.now = self.now if at is None else at
        out = self.core.handle(event, self.now)
        self.core.check()
        for action in out:
            match action:
                case c.Deliver(call_id=call_id, choice=choice, frame=frame):
                    tokens = self.delivered.setdefault((call_id, choice), [])
                    assert frame.index == len(tokens), "a gap or a repeat"
                    assert (call_id, choice) not in self.concluded
                    tokens.extend(frame.token_ids)
                case c.Conclude(call_id=call_id, choice=choice):
                    assert (call_id, choice) not in self.concluded
                    assert all(call_id != failed for failed, _ in self.failed)
                    self.concluded.append((call_id, choice))
                case c.Fail(call_id=call_id, failure=failure):
                    assert all(call_id != failed for failed, _ in self.failed)
                    self.failed.append((call_id, failure))
                case c.Account():
                    assert all(account.request_id != action.request_id for account in self.accounts)
                    self.accounts.append(action)
        return out

    def admit(self, call_id: str = "a", n: int = 1, **more: Any) -> list[c.Action]:
        ids = [call_id] if n == 1 else [f"{call_id}-{i}" for i in range(n)]
        values: dict[str, Any] = {"queue_limit": 100, "budget_s": 100.0, "stream": True, **more}
        return self.do(
            c.Admitted(call_id=call_id, deployment="m", slug="m-1", requests=tuple(request(i) for i in ids), **values)
        )

    def claim(self, request_id: str = "a", worker: str = "w1", delivery: int = 1) -> Claimed | Gone | Failure:
        asked = c.ClaimAsked(
            Claim(request_id=request_id, worker_id=worker, replica_id="r", delivery=delivery), lambda _: None
        )
        answers = [action.answer for action in self.do(asked) if isinstance(action, c.AnswerClaim)]
        assert len(answers) == 1
        return answers[0]

    def frame(self, index: int, request_id: str = "a", epoch: int = 1, count: int = 1) -> list[c.Action]:
        tokens = tuple(range(index, index + count))
        item = Frame(request_id=request_id, epoch=epoch, index=index, token_ids=tokens, text="t" * count)
        return self.do(c.FramesArrived(FrameBatch(worker_id="w1", items=(item,))))

    def end(self, index: int, request_id: str = "a", epoch: int = 1, failure: Failure | None = None) -> list[c.Action]:
        item = End(
            request_id=request_id,
            epoch=epoch,
            index=index,
            reason=None if failure else FinishReason.STOP,
            failure=failure,
            usage=Usage(prompt_tokens=3, completion_tokens=index),
        )
        return self.do(c.FramesArrived(FrameBatch(worker_id="w1", items=(item,))))


def only(out: list[c.Action], kind: type) -> list[Any]:
    return [action for action in out if isinstance(action, kind)]


def test_the_usual_life() -> None:
    bench = Bench()
    assert only(bench.admit(), c.Publish) == [c.Publish("m-1", request("a"), 0)]
    assert bench.do(c.Published("a", 0, 17)) == [c.Hint("m")]
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
    assert bench.frame(2) == [c.CancelWork("w1", Cancel(request_id="a", epoch=1, requeue=True))]
    assert bench.frame(3) == [], "told a moment ago"
    bench.now = 1.0
    assert bench.frame(4) == [c.CancelWork("w1", Cancel(request_id="a", epoch=1, requeue=True))]
    answer = bench.claim(worker="w2", delivery=2)
    assert answer == Claimed(epoch=2, budget_s=99.0, waited_s=1.0, token_ids=(0,))
    assert bench.frame(1) == [], "the old owner has nothing to say"
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


def test_a_silent_owner_is_asked_for_the_request_and_then_it_is_published_again() -> None:
    bench = Bench()
    bench.admit()
    bench.do(c.Published("a", 0, 17))
    bench.claim()
    bench.frame(0)
    assert bench.core.deadline() == CONFIG.quiet_s
    assert bench.do(None, CONFIG.quiet_s) == [c.CancelWork("w1", Cancel(request_id="a", epoch=1, requeue=True))]
    assert bench.core.deadline() == CONFIG.quiet_s + CONFIG.reclaim_s
    out = bench.do(None, CONFIG.quiet_s + CONFIG.reclaim_s)
    assert out == [c.Unqueue(17), c.Publish("m-1", request("a"), 1)]


def test_an_end_that_was_only_late_is_an_end() -> None:
    bench = Bench()
    bench.admit()
    bench.claim()
    bench.frame(0)
    bench.do(None, CONFIG.quiet_s)
    bench.end(1)
    assert bench.concluded == [("a", 0)]


def test_an_owner_that_speaks_is_not_silent() -> None:
    bench = Bench()
    bench.admit()
    bench.claim()
    for index in range(5):
        bench.now = 20.0 * index
        bench.frame(index)
        while (deadline := bench.core.deadline()) is not None and deadline <= bench.now:
            assert only(bench.do(None), c.CancelWork) == []


def test_after_a_reconnection_silence_is_suspicious_sooner() -> None:
    bench = Bench()
    bench.admit()
    bench.claim()
    bench.frame(0)
    bench.do(c.Reconnected(), 1.0)
    assert bench.core.deadline() == 1.0 + CONFIG.reconnect_quiet_s
    bench.now = 2.0
    bench.frame(1)
    assert bench.do(None, 1.0 + CONFIG.reconnect_quiet_s) == []


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
    bench.admit()
    bench.claim()
    bench.frame(0)
    cancel = c.CancelWork("w1", Cancel(request_id="a", epoch=1))
    assert only(bench.do(c.ClientLeft("a")), c.CancelWork) == [cancel]
    assert bench.frame(1) == []
    bench.now = 1.0
    assert bench.frame(2) == [cancel]
    bench.end(3)
    bench.now = 2.0
    assert bench.frame(3) == [], "it has ended"


def test_the_budget_ends_a_request_that_waits_and_one_that_runs() -> None:
    bench = Bench()
    bench.admit("a", budget_s=10.0)
    bench.do(c.Published("a", 0, 17))
    bench.admit("b", budget_s=20.0)
    bench.claim("b")
    assert bench.core.deadline() == 10.0
    out = bench.do(None, 10.0)
    assert only(out, c.Unqueue) == [c.Unqueue(17)]
    out = bench.do(None, 20.0)
    assert only(out, c.CancelWork) == [c.CancelWork("w1", Cancel(request_id="b", epoch=1))]
    assert [failure.code for _, failure in bench.failed] == [Code.DEADLINE_EXCEEDED] * 2
    assert bench.core.deadline() is None


def test_a_claim_after_the_budget_finds_the_request_gone() -> None:
    bench = Bench()
    bench.admit(budget_s=10.0)
    bench.now = 10.0
    assert bench.claim() == c.GONE
    assert bench.failed[0][1].code is Code.DEADLINE_EXCEEDED


def test_an_older_delivery_does_not_take_the_request_from_a_later_one() -> None:
    bench = Bench()
    bench.admit()
    bench.claim(worker="w2", delivery=2)
    answer = bench.claim(worker="w1", delivery=1)
    assert isinstance(answer, Failure)
    assert answer.code is Code.STALE_EPOCH
    bench.frame(0, epoch=1)
    assert bench.delivered == {("a", 0): [0]}


def test_a_request_that_kills_its_workers_is_not_tried_for_ever() -> None:
    bench = Bench()
    bench.admit()
    for delivery in range(1, CONFIG.max_deliveries + 1):
        assert isinstance(bench.claim(delivery=delivery), Claimed)
    assert bench.claim(delivery=CONFIG.max_deliveries + 1) == c.GONE
    assert bench.failed[0][1].code is Code.WORKER_LOST


def test_a_delivery_that_nobody_claimed_is_no_try() -> None:
    bench = Bench()
    bench.admit()
    assert isinstance(bench.claim(delivery=CONFIG.max_deliveries + 5), Claimed)
    for delivery in range(2, CONFIG.max_deliveries + 1):
        assert isinstance(bench.claim(delivery=CONFIG.max_deliveries + 4 + delivery), Claimed)
    assert bench.claim(delivery=CONFIG.max_deliveries + 99) == c.GONE
    assert bench.failed[0][1].code is Code.WORKER_LOST
    assert f"{CONFIG.max_deliveries} times" in bench.failed[0][1].message


def test_a_migration_is_a_claim_of_the_same_delivery_and_no_recovery() -> None:
    bench = Bench()
    bench.admit()
    bench.claim(worker="w1")
    bench.frame(0)
    assert bench.claim(worker="w2") == Claimed(epoch=2, budget_s=100.0, waited_s=0.0, token_ids=(0,))
    out = bench.end(1, epoch=2)
    assert only(out, c.Conclude)[0].end.ledger.recoveries == 0


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
    assert bench.do(None, CONFIG.hint_s) == [c.Hint("m")]


class Cluster:
    """Workers, a queue and a network that lose, repeat, reorder and delay, for the random runs."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.bench = Bench()
        self.queue: dict[int, tuple[Request, int]] = {}
        self.events: list[c.Event] = []
        self.sequence = 0
        self.calls = 0

    def step(self) -> None:
        pick = self.random.random()
        if pick < 0.12 and self.calls < 30:
            self.calls += 1
            self.out(
                self.bench.admit(
                    f"c{self.calls}",
                    n=self.random.choice((1, 1, 3)),
                    budget_s=self.random.uniform(5, 60),
                    stream=self.random.random() < 0.5,
                    queue_limit=12,
                )
            )
        elif pick < 0.3 and self.queue:
            sequence = self.random.choice(sorted(self.queue))
            wanted, delivery = self.queue[sequence]
            self.queue[sequence] = (wanted, delivery + 1)
            self.claim(wanted.request_id, sequence, delivery + 1)
        elif pick < 0.34 and self.calls:
            self.post(c.ClientLeft(f"c{self.random.randint(1, self.calls)}"))
        elif pick < 0.36:
            self.post(self.random.choice((c.Reconnected(), c.DeploymentGone("x"), LOST, progress(1))))
        elif pick < 0.5:
            self.bench.now += self.random.expovariate(1)
            self.time()
        elif self.events:
            # Out of order, sometimes twice, sometimes never.
            at = self.random.randrange(len(self.events)) if self.random.random() < 0.2 else 0
            fate = self.random.random()
            event = self.events[at] if fate < 0.05 else self.events.pop(at)
            if fate < 0.95:
                self.out(self.bench.do(event))

    def post(self, event: c.Event) -> None:
        self.events.append(event)

    def time(self) -> None:
        deadline = self.bench.core.deadline()
        if deadline is not None and deadline <= self.bench.now:
            self.out(self.bench.do(None))
            after = self.bench.core.deadline()
            assert after is None or after > self.bench.now, "time was not used up"

    def claim(self, request_id: str, sequence: int, delivery: int) -> None:
        worker = f"w{self.random.randint(1, 3)}"
        asked = Claim(request_id=request_id, worker_id=worker, replica_id="r", delivery=delivery)

        def reply(answer: Claimed | Gone | Failure) -> None:
            if isinstance(answer, Gone):
                self.queue.pop(sequence, None)
            elif isinstance(answer, Claimed):
                self.generate(request_id, worker, answer, sequence)

        self.out(self.bench.do(c.ClaimAsked(asked, reply)))

    def generate(self, request_id: str, worker: str, claimed: Claimed, sequence: int) -> None:
        at, last = len(claimed.token_ids), 6
        stops_at = self.random.choice((last, last, at))  # or crashes
        while at < stops_at:
            count = min(self.random.randint(1, 2), stops_at - at)
            item = Frame(
                request_id=request_id, epoch=claimed.epoch, index=at, token_ids=tuple(range(at, at + count)), text="t"
            )
            self.post(c.FramesArrived(FrameBatch(worker_id=worker, items=(item,))))
            at += count
        if at == last:
            end = End(request_id=request_id, epoch=claimed.epoch, index=at, reason=FinishReason.STOP)
            self.post(c.FramesArrived(FrameBatch(worker_id=worker, items=(end,))))
            self.queue.pop(sequence, None)

    def out(self, actions: list[c.Action]) -> None:
        for action in actions:
            match action:
                case c.Publish(request=wanted, attempt=attempt):
                    self.sequence += 1
                    if self.random.random() < 0.05:
                        failure = Failure(code=Code.UNAVAILABLE, message="x")
                        self.post(c.PublishFailed(wanted.request_id, attempt, failure))
                    else:
                        self.queue[self.sequence] = (wanted, 0)
                        self.post(c.Published(wanted.request_id, attempt, self.sequence))
                case c.Unqueue(sequence=sequence):
                    self.queue.pop(sequence, None)
                case c.AnswerClaim(reply=reply, answer=answer):
                    reply(answer)


@pytest.mark.parametrize("seed", range(60))
def test_random_runs_keep_every_invariant(seed: int) -> None:
    """Replay one with `pytest tests/unit/gateway/test_core.py -k 'random and [SEED]'`."""
    run = Cluster(seed)
    for _ in range(600):
        run.step()
    # Whatever happened, time alone ends everything.
    for _ in range(2000):
        deadline = run.bench.core.deadline()
        if deadline is None:
            break
        run.bench.now = max(run.bench.now, deadline)
        run.out(run.bench.do(None))
        for event in run.events:
            if isinstance(event, c.Published):
                run.out(run.bench.do(event))
        run.events.clear()
    assert run.bench.core.open_requests == 0
    ended = {call_id for call_id, _ in run.bench.concluded} | {call_id for call_id, _ in run.bench.failed}
    left = {account.request_id.split("-")[0] for account in run.bench.accounts if account.reason == "cancelled"}
    assert ended | left == {f"c{i}" for i in range(1, run.calls + 1)}
    for tokens in run.bench.delivered.values():
        assert tokens == list(range(len(tokens)))
    done = sum(account.reason == "stop" for account in run.bench.accounts)
    assert done == len(run.bench.concluded)
