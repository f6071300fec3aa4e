"""Two workers' cores, a gateway's word and the messages between them: one migration, step by step."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from services.worker import events as e
from services.worker.migration import Convergence
from services.worker.ports import EndReason, EngineDied, SequenceEnd, StepToken
from shared.contracts.generation import Frame
from shared.contracts.migration import (
    AbandonRound,
    Drain,
    HandedOver,
    Migrate,
    Migrating,
    MigrationOutcome,
    MigrationReason,
    RoundDone,
    RoundPending,
)
from shared.contracts.requests import Cancel, Check, Claimed, Gone, Owned, Sampling, TokensPrompt, Unwanted
from shared.contracts.residency import Done
from shared.errors import Code, Failure
from tests.unit.worker.world import World, end, items, load, only, request, some

UNHEARD = Failure(code=Code.UNAVAILABLE, message="Nobody answered.")
STALE = Failure(code=Code.STALE_EPOCH, message="It is somebody else's.")
NEAR = RoundDone(number=1, prefilled_tokens=20, prefill_s=0.001, step_s=0.02)


class Pair:
    """A source with a running request of five tokens, and a destination with a replica of the same model."""

    def __init__(self) -> None:
        self.source, self.destination = World(worker_id="w1"), World(worker_id="w2")
        self.source.ready("r1")
        self.destination.ready("r2")
        self.sequence_id = self.source.running(request("q1", sampling=Sampling(max_tokens=80)))
        self.tokens(97, 98, 99, 100, 101)

    def tokens(self, *token_ids: int) -> list[e.Action]:
        actions: list[e.Action] = []
        for token_id in token_ids:
            self.source.now += 0.02
            actions += self.source.step(StepToken(self.sequence_id, token_id))
        return actions

    def migrate(self, **changes: Any) -> e.SendRound:
        message = Migrate(to_worker_id="w2", to_replica_id="r2", request_ids=("q1",), reason=MigrationReason.DRAIN)
        replies: list[Any] = []
        asked = e.MigrateAsked(msgspec.structs.replace(message, **changes), replies.append)
        actions = self.source.send(asked)
        assert only(actions, e.ReplyTo).answer == Migrating(request_ids=("q1",))
        return only(actions, e.SendRound)

    def round(self, sent: e.SendRound) -> e.SubmitSequence:
        """The destination gets a round, and prefills."""
        return only(
            self.destination.send(e.RoundAsked(sent.message, self.destination.replies.append)), e.SubmitSequence
        )

    def prefilled(self, submitted: e.SubmitSequence) -> RoundDone:
        """The engine has done a round."""
        first = StepToken(submitted.sequence_id, 1)
        self.destination.now += 0.05
        assert self.destination.step(first, replica_id="r2") == []
        self.destination.now += 0.02
        ended = SequenceEnd(submitted.sequence_id, EndReason.LENGTH, cached_tokens=3)
        actions = self.destination.step(StepToken(submitted.sequence_id, 2), ended, replica_id="r2")
        answer = only(actions, e.ReplyTo).answer
        assert isinstance(answer, RoundDone)
        return answer

    def frozen(self) -> e.SendHandOver:
        """Both after the first round, the source frozen."""
        sent = self.migrate()
        self.prefilled(self.round(sent))
        answered = e.RoundAnswered(sent.message.migration_id, 1, NEAR)
        assert self.source.send(answered) == []
        return only(self.tokens(102), e.SendHandOver)

    def handed_over(self, sent: e.SendHandOver) -> e.ClaimRequest:
        """The destination gets the hand-over, and claims."""
        actions = self.destination.send(e.HandOverAsked(sent.message, self.destination.replies.append))
        return only(actions, e.ClaimRequest)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def ended(actions: list[e.Action]) -> tuple[MigrationOutcome, Failure | None]:
    told = only(actions, e.PublishMigrationEnded).message
    return told.outcome, told.failure


def test_a_migration_from_begin_to_end(pair: Pair) -> None:
    sent = pair.migrate()
    assert sent.worker_id == "w2"
    assert (sent.message.index, sent.message.token_ids) == (0, (97, 98, 99, 100, 101))
    (shown,) = pair.source.core.migrations(pair.source.now)
    assert (shown.request_id, shown.destination_worker_id, shown.state) == ("q1", "w2", "round")
    submitted = pair.round(sent)
    assert submitted.token_ids == (104, 105, 97, 98, 99, 100, 101)
    assert submitted.max_new_tokens == 2
    assert [frame.token_ids for frame in items(pair.tokens(102, 103)) if isinstance(frame, Frame)] == [(102,), (103,)]
    done = pair.prefilled(submitted)
    assert (done.prefilled_tokens, done.cached_tokens) == (4, 3)
    assert done.prefill_s == pytest.approx(0.05)
    assert done.step_s == pytest.approx(0.02)

    assert pair.source.send(e.RoundAnswered(sent.message.migration_id, 1, NEAR)) == []
    last = pair.tokens(104)
    assert [frame.index for frame in items(last)] == [7]
    hand_over = only(last, e.SendHandOver)
    assert (hand_over.message.index, hand_over.message.token_ids) == (5, (102, 103, 104))
    assert hand_over.message.token == "t1"
    assert not items(pair.tokens(105)), "a frozen request emits nothing"
    claim = pair.handed_over(hand_over)
    assert (claim.message.after_epoch, claim.message.worker_id, claim.token) == (1, "w2", "t1")

    claimed = Claimed(epoch=2, budget_s=50.0, waited_s=1.0, token_ids=(97, 98, 99, 100, 101, 102, 103, 104))
    actions = pair.destination.send(e.ClaimAnswered("t1", claimed))
    assert only(actions, e.ReplyTo).answer == HandedOver(epoch=2)
    final = only(actions, e.SubmitSequence)
    assert final.token_ids == (104, 105, *claimed.token_ids)
    assert final.first_index == 8
    assert not some(actions, e.Tokenise)

    let_go = pair.source.send(e.HandOverAnswered(hand_over.migration_id, HandedOver(epoch=2)))
    assert ended(let_go) == (MigrationOutcome.COMMITTED, None)
    assert not some(let_go, e.Ack) and not some(let_go, e.Nak), "the queue's message is the destination's now"
    assert only(let_go, e.CancelSequence).sequence_id == pair.sequence_id
    assert not pair.source.core.runs

    frames = items(pair.destination.step(StepToken(final.sequence_id, 105), replica_id="r2"))
    assert [(frame.epoch, frame.index, frame.text) for frame in frames if isinstance(frame, Frame)] == [(2, 8, "i")]
    closed = pair.destination.step(StepToken(final.sequence_id, 0), replica_id="r2")
    assert only(closed, e.Ack).token == "t1"
    assert (end(closed).ledger.migrations, end(closed).ledger.rounds) == (1, 1)


def test_a_wide_gap_takes_another_round_that_carries_only_what_is_new(pair: Pair) -> None:
    sent = pair.migrate()
    pair.prefilled(pair.round(sent))
    pair.tokens(*range(110, 150))
    far = RoundDone(number=1, prefilled_tokens=200, prefill_s=2.0, step_s=0.02)
    second = only(pair.source.send(e.RoundAnswered(sent.message.migration_id, 1, far)), e.SendRound)
    assert (second.message.number, second.message.index) == (2, 5)
    assert second.message.token_ids == tuple(range(110, 150))
    assert second.message.request is None
    assert pair.round(second).token_ids[-40:] == tuple(range(110, 150))


def test_a_slow_round_is_asked_for_again_and_again(pair: Pair) -> None:
    sent = pair.migrate()
    pair.round(sent)
    waited = pair.destination.wait(1.0)
    assert only(waited, e.ReplyTo).answer == RoundPending(number=1)
    again = only(pair.source.send(e.RoundAnswered(sent.message.migration_id, 1, RoundPending(number=1))), e.SendRound)
    assert (again.message.number, again.message.token_ids, again.message.request) == (1, (), None)
    assert pair.destination.send(e.RoundAsked(again.message, pair.destination.replies.append)) == []


def test_an_answer_that_was_lost_is_given_again(pair: Pair) -> None:
    sent = pair.migrate()
    done = pair.prefilled(pair.round(sent))
    question = msgspec.structs.replace(sent.message, token_ids=(), request=None, index=5)
    actions = pair.destination.send(e.RoundAsked(question, pair.destination.replies.append))
    assert only(actions, e.ReplyTo).answer == done


def test_a_destination_that_refuses_leaves_the_request_as_it_was(pair: Pair) -> None:
    sent = pair.migrate()
    actions = pair.source.send(e.RoundAnswered(sent.message.migration_id, 1, UNHEARD))
    assert ended(actions) == (MigrationOutcome.ABORTED, UNHEARD)
    assert only(actions, e.Abandon).worker_id == "w2"
    assert [frame.index for frame in items(pair.tokens(102))] == [5]


def test_a_hand_over_without_an_answer_is_claimed_back_and_nothing_is_lost(pair: Pair) -> None:
    hand_over = pair.frozen()
    assert not items(pair.tokens(103, 104))
    back = only(pair.source.send(e.HandOverAnswered(hand_over.migration_id, UNHEARD)), e.Reclaim)
    assert (back.message.after_epoch, back.message.worker_id) == (1, "w1")
    claimed = Claimed(epoch=2, budget_s=9.0, waited_s=1.0, token_ids=(97, 98, 99, 100, 101, 102))
    actions = pair.source.send(e.ReclaimAnswered(hand_over.migration_id, claimed))
    assert ended(actions) == (MigrationOutcome.ABORTED, UNHEARD)
    (frame,) = items(actions)
    assert isinstance(frame, Frame)
    assert (frame.epoch, frame.index, frame.token_ids) == (2, 6, (103, 104))
    assert [one.index for one in items(pair.tokens(105))] == [8]


def test_a_source_that_makes_no_token_stops_without_one(pair: Pair) -> None:
    sent = pair.migrate()
    pair.prefilled(pair.round(sent))
    assert pair.source.send(e.RoundAnswered(sent.message.migration_id, 1, NEAR)) == []
    assert only(pair.source.wait(1.0), e.SendHandOver).message.index == 5


def test_a_request_whose_tokens_the_gateway_lost_goes_back_to_the_queue(pair: Pair) -> None:
    hand_over = pair.frozen()
    pair.source.send(e.HandOverAnswered(hand_over.migration_id, UNHEARD))
    claimed = Claimed(epoch=2, budget_s=9.0, waited_s=1.0, token_ids=(97, 98))
    actions = pair.source.send(e.ReclaimAnswered(hand_over.migration_id, claimed))
    assert only(actions, e.Nak).token == "t1"


def test_a_request_that_comes_back_to_its_source_has_the_time_that_its_gateway_says(pair: Pair) -> None:
    pair.source.wait(30.0)
    hand_over = pair.frozen()
    pair.source.send(e.HandOverAnswered(hand_over.migration_id, UNHEARD))
    claimed = Claimed(epoch=2, budget_s=29.0, waited_s=31.0, token_ids=(97, 98, 99, 100, 101, 102))
    pair.source.send(e.ReclaimAnswered(hand_over.migration_id, claimed))
    assert not items(pair.source.wait(28.0))
    spent = end(pair.source.wait(10.0)).failure
    assert spent is not None and spent.code is Code.DEADLINE_EXCEEDED


def test_requests_that_are_given_back_do_not_begin_to_migrate(pair: Pair) -> None:
    pair.source.running(request("q2"), token="t2")
    pair.source.core.outgoing.tokens_at_once = 1
    pair.migrate()
    second = Migrate(to_worker_id="w2", to_replica_id="r2", request_ids=("q2",))
    assert not some(pair.source.send(e.MigrateAsked(second, pair.source.replies.append)), e.SendRound)
    actions = pair.source.step(EngineDied(UNHEARD))
    assert sorted(one.token for one in some(actions, e.Nak)) == ["t1", "t2"]
    assert not some(actions, e.SendRound)


def test_a_destination_that_claimed_and_was_not_heard_keeps_the_request(pair: Pair) -> None:
    hand_over = pair.frozen()
    pair.source.send(e.HandOverAnswered(hand_over.migration_id, UNHEARD))
    actions = pair.source.send(e.ReclaimAnswered(hand_over.migration_id, STALE))
    assert ended(actions) == (MigrationOutcome.COMMITTED, None)
    assert not some(actions, e.Ack) and not some(actions, e.Nak)


def test_a_source_that_is_told_that_it_is_superseded_lets_go(pair: Pair) -> None:
    pair.frozen()
    actions = pair.source.send(e.CancelArrived(Cancel(request_id="q1", epoch=1, superseded=True)))
    assert ended(actions) == (MigrationOutcome.COMMITTED, None)
    assert not some(actions, e.Ack) and not some(actions, e.Nak)


def test_a_gateway_that_does_not_answer_is_asked_again_until_it_does(pair: Pair) -> None:
    hand_over = pair.frozen()
    pair.source.send(e.HandOverAnswered(hand_over.migration_id, UNHEARD))
    for _ in range(5):
        assert pair.source.send(e.ReclaimAnswered(hand_over.migration_id, UNHEARD)) == []
        assert len(some(pair.source.wait(1.0), e.Reclaim)) == 1
    gone = pair.source.send(e.ReclaimAnswered(hand_over.migration_id, Gone(reason="left")))
    assert only(gone, e.Ack).token == "t1"


def test_the_end_of_a_frozen_request_is_emitted_only_if_it_stays(pair: Pair) -> None:
    hand_over = pair.frozen()
    last = pair.source.step(StepToken(pair.sequence_id, 103), SequenceEnd(pair.sequence_id, EndReason.LENGTH))
    assert last == []
    pair.source.send(e.HandOverAnswered(hand_over.migration_id, UNHEARD))
    claimed = Claimed(epoch=2, budget_s=9.0, waited_s=1.0, token_ids=(97, 98, 99, 100, 101, 102))
    actions = pair.source.send(e.ReclaimAnswered(hand_over.migration_id, claimed))
    assert (end(actions).epoch, end(actions).index) == (2, 7)
    assert only(actions, e.Ack).token == "t1"


def test_a_frozen_request_whose_replica_breaks_goes_back_only_if_it_stays(pair: Pair) -> None:
    hand_over = pair.frozen()
    pair.source.ask_stop("r1", abort=True)
    assert not some(pair.source.actions, e.Nak)
    pair.source.send(e.HandOverAnswered(hand_over.migration_id, UNHEARD))
    claimed = Claimed(epoch=2, budget_s=9.0, waited_s=1.0, token_ids=(97, 98, 99, 100, 101, 102))
    actions = pair.source.send(e.ReclaimAnswered(hand_over.migration_id, claimed))
    assert only(actions, e.Nak).token == "t1"


@pytest.mark.parametrize("frozen", [False, True])
def test_a_client_that_leaves_ends_the_migration(pair: Pair, frozen: bool) -> None:
    if frozen:
        pair.frozen()
    else:
        pair.migrate()
    actions = pair.source.cancel("q1")
    assert ended(actions) == (MigrationOutcome.ENDED, None)
    assert only(actions, e.Ack).token == "t1"
    assert some(actions, e.Abandon)


def test_a_request_that_ends_before_the_hand_over_ends_the_migration(pair: Pair) -> None:
    pair.migrate()
    actions = pair.source.step(StepToken(pair.sequence_id, 0), SequenceEnd(pair.sequence_id, EndReason.STOP))
    assert ended(actions) == (MigrationOutcome.ENDED, None)
    assert end(actions).index == 6


def test_the_destination_frees_everything_when_it_is_abandoned(pair: Pair) -> None:
    sent = pair.migrate()
    submitted = pair.round(sent)
    assert len(pair.destination.core.replicas["r2"].held) == 1
    actions = pair.destination.send(e.AbandonArrived(AbandonRound(migration_id=sent.message.migration_id)))
    assert only(actions, e.CancelSequence).sequence_id == submitted.sequence_id
    assert not pair.destination.core.replicas["r2"].held
    assert pair.destination.core.replicas["r2"].wanted == 2


def test_a_destination_forgets_a_source_that_falls_silent(pair: Pair) -> None:
    sent = pair.migrate()
    pair.prefilled(pair.round(sent))
    pair.destination.wait(11.0)
    assert not pair.destination.core.replicas["r2"].held
    assert not pair.destination.core.incoming


def test_a_claim_that_the_gateway_refuses_is_told_to_the_source(pair: Pair) -> None:
    pair.handed_over(pair.frozen())
    actions = pair.destination.send(e.ClaimAnswered("t1", STALE))
    assert only(actions, e.ReplyTo).answer == STALE
    assert not some(actions, e.Ack) and not some(actions, e.Nak)
    assert not pair.destination.core.replicas["r2"].held


def test_a_replica_that_leaves_while_it_claims_gives_the_request_back(pair: Pair) -> None:
    pair.handed_over(pair.frozen())
    pair.destination.ask_stop("r2", abort=True)
    assert not some(pair.destination.actions, e.Nak)
    claimed = Claimed(epoch=2, budget_s=50.0, waited_s=1.0, token_ids=(97, 98, 99, 100, 101, 102))
    actions = pair.destination.send(e.ClaimAnswered("t1", claimed))
    assert only(actions, e.Nak).token == "t1"
    assert not some(actions, e.SubmitSequence)


def test_a_redelivery_to_the_destination_while_it_claims_takes_the_place_of_the_hand_over(pair: Pair) -> None:
    pair.handed_over(pair.frozen())
    actions = pair.destination.send(e.DeliveryArrived("r2", request("q1"), "t2", 2))
    refused = only(actions, e.ReplyTo).answer
    assert isinstance(refused, Failure) and refused.code is Code.CONFLICT
    assert only(actions, e.ClaimRequest).token == "t2"
    assert list(pair.destination.core.runs) == ["t2"]


def test_what_a_destination_refuses(pair: Pair) -> None:
    sent = pair.migrate().message

    def code(**changes: Any) -> Code:
        asked = e.RoundAsked(msgspec.structs.replace(sent, **changes), pair.destination.replies.append)
        answer = only(pair.destination.send(asked), e.ReplyTo).answer
        assert isinstance(answer, Failure)
        return answer.code

    assert code(replica_id="r9") is Code.NOT_FOUND
    assert code(checkpoint_id="other") is Code.CONFLICT
    assert code(request=None, token_ids=()) is Code.NOT_FOUND
    assert code(token_ids=(97,) * 120) is Code.PROMPT_TOO_LONG
    pair.destination.send(e.DeliveryArrived("r2", request("x1"), "x1", 1))
    pair.destination.send(e.DeliveryArrived("r2", request("x2"), "x2", 1))
    assert code() is Code.BUSY
    pair.destination.ask_stop("r2", drain=True)
    assert code() is Code.DRAINING


def test_a_slot_that_the_queue_may_fill_is_taken_from_it(pair: Pair) -> None:
    pair.round(pair.migrate())
    assert some(pair.destination.actions, e.Want)[-1].requests == -1


def test_long_requests_take_turns_at_a_destination_and_short_ones_go_together() -> None:
    source = World(worker_id="w1")
    source.ready("r1", slots=4)
    prompts = {"a": 40, "b": 30, "c": 20}
    source.core.outgoing.tokens_at_once = 60
    for number, (name, tokens) in enumerate(prompts.items()):
        source.running(request(name, prompt=TokensPrompt(token_ids=(104,) * tokens)), token=f"t{number}")
    message = Migrate(to_worker_id="w2", to_replica_id="r2", replica_id="r1")
    actions = source.send(e.MigrateAsked(message, source.replies.append))
    assert only(actions, e.ReplyTo).answer == Migrating(request_ids=("a", "b", "c")), "the longest first"
    first = only(actions, e.SendRound).message.migration_id
    states = [one.state for one in source.core.migrations(source.now)]
    assert states == ["round", "queued", "queued"]
    actions = source.send(e.RoundAnswered(first, 1, UNHEARD))
    assert ended(actions) == (MigrationOutcome.ABORTED, UNHEARD)
    assert len(some(actions, e.SendRound)) == 2, "50 tokens fit together"


def test_a_request_that_ends_before_its_turn_is_told_too() -> None:
    source = World(worker_id="w1")
    source.ready("r1", slots=4)
    source.core.outgoing.tokens_at_once = 10
    source.running(request("a", prompt=TokensPrompt(token_ids=(104,) * 9)), token="t1")
    source.running(request("b", prompt=TokensPrompt(token_ids=(104,) * 8)), token="t2")
    source.send(e.MigrateAsked(Migrate(to_worker_id="w2", to_replica_id="r2", replica_id="r1"), source.replies.append))
    actions = source.cancel("b")
    assert ended(actions) == (MigrationOutcome.ENDED, None)
    assert not some(actions, e.Abandon), "the destination has never heard of it"


def test_a_delivery_that_finds_its_slot_reserved_goes_back(pair: Pair) -> None:
    pair.destination.send(e.DeliveryArrived("r2", request("x1"), "x1", 1))
    pair.round(pair.migrate())
    assert pair.destination.send(e.DeliveryArrived("r2", request("x2"), "x2", 1)) == [e.Nak("x2")]


def test_what_a_source_refuses(pair: Pair) -> None:
    def code(**changes: Any) -> Code:
        message = Migrate(to_worker_id="w2", to_replica_id="r2", request_ids=("q1",))
        asked = e.MigrateAsked(msgspec.structs.replace(message, **changes), pair.source.replies.append)
        answer = only(pair.source.send(asked), e.ReplyTo).answer
        assert isinstance(answer, Failure)
        return answer.code

    assert code(to_worker_id="w1") is Code.CONFLICT
    assert code(request_ids=("q9",)) is Code.NOT_FOUND
    assert code(request_ids=(), replica_id="r9") is Code.NOT_FOUND
    pair.migrate()
    assert code() is Code.BUSY


def test_a_drained_worker_takes_nothing_and_can_be_told_to_take_work_again(pair: Pair) -> None:
    worker = pair.destination
    actions = worker.send(e.DrainSet(Drain(on=True).on, worker.replies.append))
    assert only(actions, e.ReplyTo).answer == Done()
    assert only(actions, e.SetPhase).draining
    worker.leave("r2")
    assert worker.ask_load(load("r3")).code is Code.DRAINING
    assert not some(worker.actions, e.Drained), "the process stays"
    assert not only(worker.send(e.DrainSet(False, worker.replies.append)), e.SetPhase).draining
    assert worker.ask_load(load("r3")) == Done()


def test_a_gateway_hears_which_requests_run_and_how_far_they_are(pair: Pair) -> None:
    asked = Check(requests=(Owned(request_id="q1", epoch=1, index=3), Owned(request_id="q2", epoch=1)))
    actions = pair.source.send(e.CheckAsked(asked, pair.source.replies.append))
    assert only(actions, e.ReplyTo).answer.requests == (Owned(request_id="q1", epoch=1, index=5),)
    older = Check(requests=(Owned(request_id="q1", epoch=0),))
    assert only(pair.source.send(e.CheckAsked(older, pair.source.replies.append)), e.ReplyTo).answer.requests == ()


def test_a_request_that_its_gateway_does_not_want_costs_nothing_more(pair: Pair) -> None:
    told = only(pair.source.wait(2.5), e.TellHolds)
    assert told.message.requests == (Owned(request_id="q1", epoch=1, index=5),)
    actions = pair.source.send(e.HoldsAnswered("g1", Unwanted(ended=("q1",))))
    assert only(actions, e.Ack).token == "t1"
    assert only(actions, e.CancelSequence).sequence_id == pair.sequence_id


def test_requests_of_a_gateway_that_is_gone_for_good_are_dropped(pair: Pair) -> None:
    for _ in range(20):
        for told in some(pair.source.wait(0.5), e.TellHolds):
            actions = pair.source.send(e.HoldsAnswered(told.gateway_id, UNHEARD, unserved=True))
            if some(actions, e.Ack):
                assert pair.source.now >= 100.0 + 5.0
                return
    raise AssertionError("the gateway's requests run for ever")


def test_requests_of_a_gateway_that_is_silent_are_dropped_but_their_messages_are_left_to_others(pair: Pair) -> None:
    """Seen from here a gateway that hangs and a cable that was pulled look the same."""
    for _ in range(20):
        for told in some(pair.source.wait(0.5), e.TellHolds):
            actions = pair.source.send(e.HoldsAnswered(told.gateway_id, UNHEARD, unserved=False))
            if some(actions, e.CancelSequence):
                assert pair.source.now >= 100.0 + 5.0
                assert only(actions, e.CancelSequence).sequence_id == pair.sequence_id
                assert not some(actions, e.Ack)
                assert not some(actions, e.Nak)
                return
    raise AssertionError("the gateway's requests run for ever")


def test_a_gateway_is_not_given_up_while_the_bus_is_away(pair: Pair) -> None:
    pair.source.send(e.BusLost())
    for _ in range(20):
        for told in some(pair.source.wait(0.5), e.TellHolds):
            assert pair.source.send(e.HoldsAnswered(told.gateway_id, UNHEARD)) == []
    pair.source.send(e.BusBack())
    told = only(pair.source.wait(2.1), e.TellHolds)
    assert pair.source.send(e.HoldsAnswered(told.gateway_id, UNHEARD)) == []


# -- the stop rule


def converge(prefill_token_s: float, step_s: float, *, tokens: int, fixed_s: float = 0.001) -> list[int]:
    """The gaps of all rounds of a migration of so many tokens, at these speeds, with a token every `step_s`."""
    rule, gaps, sent = Convergence(), list[int](), tokens
    for number in range(1, 20):
        prefill_s = max(step_s, sent * prefill_token_s)
        elapsed_s = fixed_s + prefill_s + step_s
        rule.observe(RoundDone(number=number, prefilled_tokens=sent, prefill_s=prefill_s, step_s=step_s), elapsed_s)
        sent = int(elapsed_s / step_s)
        gaps.append(sent)
        if rule.near(sent, step_s):
            return gaps
    raise AssertionError("it never stops")


def test_a_fast_prefill_stops_after_one_round() -> None:
    assert len(converge(0.0001, 0.02, tokens=1000)) == 1


def test_a_long_context_takes_rounds_that_shrink() -> None:
    gaps = converge(0.002, 0.02, tokens=4000)
    assert len(gaps) >= 2
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] * 0.002 <= 2 * 0.02


def test_a_prefill_that_is_no_faster_than_decoding_stops_at_once() -> None:
    assert len(converge(0.02, 0.02, tokens=500)) == 1
