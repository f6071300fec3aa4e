"""Requests in a worker: claim, run, end; cancel, redelivery and death in every state."""

from __future__ import annotations

import msgspec
import pytest

from services.worker import events as e
from services.worker.ports import EndReason, EngineDied, SequenceEnd, StepToken
from shared.contracts.generation import FinishReason, Frame, GivenBack
from shared.contracts.requests import Claimed, Gone, Sampling
from shared.contracts.residency import Done
from shared.errors import Code, Failure
from tests.unit.worker.world import EOS, FakePuller, World, end, items, lease, load, only, request, some

UNAVAILABLE = Failure(code=Code.UNAVAILABLE, message="Nobody serves it.")
BROKEN = Failure(code=Code.INTERNAL, message="The engine failed.")


@pytest.fixture
def world() -> World:
    made = World()
    made.ready()
    return made


def outcome(world: World) -> str:
    return some(world.actions, e.RequestFinished)[-1].outcome


def free_slots(world: World) -> int:
    return world.core.replicas["r1"].wanted


# -- a load whose checkpoint nobody knew


def lazily(world: World, **facts: int) -> list[e.Action]:
    world.ask_load(load(kv_bytes=0, max_context_tokens=0, slots=2))
    world.send(e.PullerOpened("r1", FakePuller()))
    found = lease(lease_id="lease-r1")
    known = msgspec.structs.replace(found.checkpoint, **{"kv_bytes_per_token": 1, "max_context_tokens": 16, **facts})
    return world.send(e.LeaseAnswered("r1", msgspec.structs.replace(found, checkpoint=known)))


def test_a_lazy_load_sizes_its_kv_cache_by_the_lease() -> None:
    world = World()
    assert only(lazily(world), e.Attach).kv_bytes == 32  # two slots of sixteen tokens
    assert world.core.memory_used_bytes == 32


def test_a_lazy_load_that_does_not_fit_fails_and_returns_its_lease() -> None:
    world = World()
    lazily(world, max_context_tokens=160)
    world.send(e.PullerClosed("r1"))
    assert only(world.actions, e.ReleaseLease).message.lease_id == "lease-r1"
    world.send(e.RecordRemoved("r1"))
    assert only(world.actions, e.PublishFailed).message.failure.code is Code.OUT_OF_MEMORY


def test_a_replica_that_falls_idle_says_so_at_once_but_not_for_every_request(world: World) -> None:
    world.wait(1.0)
    sequence = world.running()
    assert some(world.step(SequenceEnd(sequence, EndReason.LENGTH)), e.RecordReplica)
    sequence = world.running(token="t2")
    assert not some(world.step(SequenceEnd(sequence, EndReason.LENGTH)), e.RecordReplica)


# -- the way of a request


def test_a_claim_that_a_later_delivery_has_overtaken_is_dropped_without_acknowledgement(world: World) -> None:
    world.deliver()
    stale = Failure(code=Code.STALE_EPOCH, message="A later delivery was claimed.")
    actions = world.send(e.ClaimAnswered("t1", stale))
    assert not some(actions, e.Ack)
    assert not some(actions, e.Nak)
    assert not world.core.runs


def test_a_delivery_is_claimed_at_its_gateway(world: World) -> None:
    claim = only(world.deliver(delivery=2), e.ClaimRequest)
    assert claim.gateway_id == "g1"
    assert (claim.message.request_id, claim.message.worker_id, claim.message.replica_id) == ("q1", "w1", "r1")
    assert claim.message.delivery == 2


def test_a_claimed_request_is_tokenised_then_submitted(world: World) -> None:
    world.deliver()
    assert only(world.claim(), e.Tokenise).request == request()
    submitted = only(world.send(e.Tokenised("t1", (104, 105))), e.SubmitSequence)
    assert (submitted.token_ids, submitted.first_index, submitted.max_new_tokens) == ((104, 105), 0, 10)


def test_a_request_that_another_worker_began_goes_on_after_the_tokens_that_the_client_has(world: World) -> None:
    world.deliver(delivery=2)
    world.claim(epoch=2, token_ids=(97, 98))
    submitted = only(world.send(e.Tokenised("t1", (104, 105))), e.SubmitSequence)
    assert (submitted.token_ids, submitted.first_index, submitted.max_new_tokens) == ((104, 105, 97, 98), 2, 8)
    (frame,) = items(world.step(StepToken(submitted.sequence_id, 99)))
    assert frame == Frame(request_id="q1", epoch=2, index=2, token_ids=(99,), text="c")


def test_only_the_end_is_sent_when_the_client_has_every_token_already(world: World) -> None:
    world.deliver(delivery=2)
    world.claim(epoch=2, token_ids=(97, EOS))
    actions = world.send(e.Tokenised("t1", (104, 105)))
    assert end(actions).reason is FinishReason.STOP
    assert end(actions).index == 2
    assert some(actions, e.Ack)
    assert not some(actions, e.SubmitSequence)


def test_the_tokens_of_one_step_travel_in_one_batch_per_gateway(world: World) -> None:
    first = world.running(request("q1"), token="t1")
    second = world.running(request("q2", gateway_id="g2"), token="t2")
    actions = world.step(StepToken(first, 97), StepToken(second, 98), StepToken(first, 99))
    batches = {action.gateway_id: action.batch.items for action in some(actions, e.PublishFrames)}
    assert [frame.token_ids for frame in batches["g1"] if isinstance(frame, Frame)] == [(97, 99)]
    assert [frame.token_ids for frame in batches["g2"] if isinstance(frame, Frame)] == [(98,)]


def test_the_end_comes_after_the_last_frame_and_before_the_acknowledgement(world: World) -> None:
    sequence_id = world.running()
    actions = world.step(
        StepToken(sequence_id, 97), StepToken(sequence_id, EOS), SequenceEnd(sequence_id, EndReason.STOP)
    )
    frame, ended = items(actions)
    assert isinstance(frame, Frame)
    assert frame.token_ids == (97, EOS)
    assert ended == end(actions)
    assert end(actions).index == 2
    assert [type(action) for action in actions] == [e.PublishFrames, e.Ack, e.RequestFinished, e.Want]


def test_a_finished_request_frees_its_slot(world: World) -> None:
    sequence_id = world.running()
    assert free_slots(world) == 1
    world.step(StepToken(sequence_id, EOS), SequenceEnd(sequence_id, EndReason.STOP))
    assert free_slots(world) == 2


def test_the_engine_s_own_limit_is_an_end_by_length(world: World) -> None:
    sequence_id = world.running()
    actions = world.step(StepToken(sequence_id, 97), SequenceEnd(sequence_id, EndReason.LENGTH, cached_tokens=2))
    assert end(actions).reason is FinishReason.LENGTH
    assert end(actions).usage.cached_tokens == 2
    assert (end(actions).usage.prompt_tokens, end(actions).usage.completion_tokens) == (2, 1)


def test_a_stop_string_stops_the_engine_too(world: World) -> None:
    sequence_id = world.running(request(sampling=Sampling(stop=("bc",))))
    world.step(StepToken(sequence_id, 97), StepToken(sequence_id, 98))
    actions = world.step(StepToken(sequence_id, 99))
    assert end(actions).reason is FinishReason.STOP
    assert end(actions).stop == "bc"
    assert only(actions, e.CancelSequence).sequence_id == sequence_id
    assert world.step(StepToken(sequence_id, 100), SequenceEnd(sequence_id, EndReason.CANCELLED)) == []


def test_a_failure_of_one_sequence_ends_its_request_alone(world: World) -> None:
    first, second = world.running(request("q1")), world.running(request("q2"), token="t2")
    failure = Failure(code=Code.OUT_OF_MEMORY, message="The KV cache is full.")
    actions = world.step(SequenceEnd(first, EndReason.FAILED, failure), StepToken(second, 97))
    ended = end(actions)
    assert (ended.request_id, ended.failure, ended.reason) == ("q1", failure, None)
    assert only(actions, e.Ack).token == "t1"
    assert list(world.core.runs) == ["t2"]


def test_frames_of_what_is_over_are_not_sent(world: World) -> None:
    sequence_id = world.running()
    world.cancel()
    assert world.step(StepToken(sequence_id, 97)) == []


# -- what cannot be


def test_a_prompt_that_fills_the_context_ends_with_both_numbers(world: World) -> None:
    world.deliver()
    world.claim()
    actions = world.send(e.Tokenised("t1", (1,) * 100))
    failure = end(actions).failure
    assert failure is not None
    assert failure.code is Code.PROMPT_TOO_LONG
    assert "100 tokens" in failure.message
    assert some(actions, e.Ack)
    assert free_slots(world) == 2


def test_a_prompt_that_cannot_be_tokenised_ends_with_the_reason(world: World) -> None:
    world.deliver()
    world.claim()
    failure = Failure(code=Code.UNSUPPORTED, message="The model has no chat template.")
    assert end(world.send(e.TokeniseFailed("t1", failure))).failure == failure


def test_a_request_whose_budget_is_spent_long_ago_ends_even_without_its_gateway(world: World) -> None:
    world.running()
    assert not some(world.wait(60), e.Ack)
    actions = world.wait(10)
    failure = end(actions).failure
    assert failure is not None
    assert failure.code is Code.DEADLINE_EXCEEDED
    assert some(actions, e.CancelSequence)


# -- claims


def test_a_request_that_nobody_wants_is_acknowledged(world: World) -> None:
    world.deliver()
    actions = world.send(e.ClaimAnswered("t1", Gone(reason="client left")))
    assert only(actions, e.Ack).token == "t1"
    assert not items(actions)
    assert free_slots(world) == 2


def without_gateway(world: World, *, delivery: int, unserved: bool) -> list[e.Action]:
    world.deliver(delivery=delivery)
    for wait_s in (0.2, 0.5, 1.0):
        world.send(e.ClaimAnswered("t1", UNAVAILABLE, unserved))
        assert not some(world.wait(wait_s * 0.9), e.ClaimRequest)
        assert some(world.wait(wait_s), e.ClaimRequest)
    return world.send(e.ClaimAnswered("t1", UNAVAILABLE, unserved))


@pytest.mark.parametrize(("delivery", "unserved"), [(1, True), (1, False), (30, False)])
def test_a_gateway_that_does_not_answer_is_asked_three_times_more_then_the_request_goes_back(
    world: World, delivery: int, unserved: bool
) -> None:
    given_back = only(without_gateway(world, delivery=delivery, unserved=unserved), e.Nak)
    assert given_back.token == "t1"
    assert given_back.delay_s > 0
    assert free_slots(world) == 2


def test_a_request_whose_gateway_stays_away_is_dropped_in_the_end(world: World) -> None:
    assert only(without_gateway(world, delivery=3, unserved=True), e.Ack).token == "t1"
    assert free_slots(world) == 2


def test_a_gateway_that_answers_at_last_is_served(world: World) -> None:
    world.deliver()
    world.send(e.ClaimAnswered("t1", UNAVAILABLE))
    world.wait(1)
    assert some(world.claim(), e.Tokenise)


def test_held_requests_keep_the_queue_waiting(world: World) -> None:
    world.running(request("q1"), token="t1")
    world.deliver(request("q2"), token="t2")
    told = some(world.wait(9), e.InProgress)
    assert [action.tokens for action in told] == [("t1", "t2")] * 3


# -- cancelling, in every state


def test_cancel_while_claiming_ends_it_as_soon_as_the_claim_tells_the_epoch(world: World) -> None:
    world.deliver()
    assert world.cancel(epoch=1) == []
    actions = world.claim(epoch=1)
    assert some(actions, e.Ack)
    assert not some(actions, e.Tokenise)


def test_an_old_cancel_does_not_end_a_newer_claim(world: World) -> None:
    world.deliver()
    world.cancel(epoch=1)
    assert some(world.claim(epoch=2), e.Tokenise)
    assert world.cancel(epoch=1) == []


def test_cancel_while_tokenising_ends_it_and_the_tokens_come_too_late(world: World) -> None:
    world.deliver()
    world.claim()
    assert only(world.cancel(), e.Ack).token == "t1"
    assert world.send(e.Tokenised("t1", (104, 105))) == []


def test_cancel_while_running_stops_the_engine_and_says_nothing_more(world: World) -> None:
    sequence_id = world.running()
    actions = world.cancel()
    assert only(actions, e.CancelSequence).sequence_id == sequence_id
    assert only(actions, e.Ack).token == "t1"
    assert not items(actions)
    assert outcome(world) == "cancelled"


def test_cancel_with_requeue_gives_it_back(world: World) -> None:
    world.running()
    actions = world.cancel(requeue=True)
    assert only(actions, e.Nak).token == "t1"
    assert not some(actions, e.Ack)


def test_cancel_of_something_else_is_ignored(world: World) -> None:
    world.running()
    assert world.cancel("q9") == []


# -- redelivery


def test_a_second_delivery_takes_the_place_of_the_first(world: World) -> None:
    sequence_id = world.running(token="t1", epoch=1)
    actions = world.deliver(token="t2", delivery=2)
    assert only(actions, e.CancelSequence).sequence_id == sequence_id
    assert not some(actions, e.Ack)
    assert not some(actions, e.Nak)
    assert list(world.core.runs) == ["t2"]
    assert outcome(world) == "superseded"


def test_a_queue_that_forgot_a_delivery_repeats_it_and_the_engine_hears_of_another_sequence(world: World) -> None:
    before = world.running(token="t1", delivery=1, epoch=1)
    actions = world.deliver(token="t1b", delivery=1)
    assert only(actions, e.CancelSequence).sequence_id == before
    tokenised = world.claim("t1b", epoch=1, token_ids=(65,))
    asked = only(tokenised, e.Tokenise)
    assert asked.token == "t1b"
    submitted = only(world.send(e.Tokenised("t1b", (1, 2))), e.SubmitSequence)
    assert submitted.sequence_id != before, "the engine has not yet ended the first"
    assert world.step(StepToken(before, 66)) == [], "what the first one still brings is nobody's"
    assert items(world.step(StepToken(submitted.sequence_id, 66)))


def test_a_delivery_that_is_repeated_as_it_was_changes_nothing(world: World) -> None:
    world.running(token="t1")
    assert only(world.deliver(token="t1"), e.Want).requests == 1, "the place of what came again is asked for again"
    assert list(world.core.runs) == ["t1"]


def test_a_delivery_that_was_overtaken_by_the_next_one_changes_nothing(world: World) -> None:
    sequence_id = world.running(token="t2", delivery=2, epoch=2)
    assert only(world.deliver(token="t1", delivery=1), e.Want).requests == 1
    assert list(world.core.runs) == ["t2"]
    assert items(world.step(StepToken(sequence_id, 66)))


def test_a_delivery_to_a_replica_that_takes_nothing_is_given_back(world: World) -> None:
    world.ask_stop(drain=True)
    assert world.deliver() == [e.Nak("t1")]
    assert world.send(e.DeliveryArrived("r9", request(), "t9", 1)) == [e.Nak("t9")]


def test_how_often_a_request_was_tried_is_the_gateways_business(world: World) -> None:
    world.deliver(delivery=9)
    assert some(world.claim(epoch=9), e.Tokenise)


def test_a_request_that_its_gateway_will_not_have_run_now_goes_back_for_a_while(world: World) -> None:
    world.deliver()
    actions = world.send(e.ClaimAnswered("t1", Failure(code=Code.BUSY, message="Another one is on probation.")))
    assert only(actions, e.Nak).delay_s > 0
    assert outcome(world) == "deferred"


# -- stopping


def test_stop_with_drain_takes_no_more_and_finishes_what_runs(world: World) -> None:
    sequence_id = world.running()
    assert world.ask_stop(drain=True) == Done()
    assert some(world.actions, e.ClosePuller)
    world.send(e.PullerClosed("r1"))
    assert not some(world.actions, e.Detach)
    actions = world.step(StepToken(sequence_id, EOS), SequenceEnd(sequence_id, EndReason.STOP))
    assert end(actions).reason is FinishReason.STOP
    assert some(actions, e.Detach)
    assert not some(actions, e.Want)


def test_stop_with_abort_gives_everything_back_at_once(world: World) -> None:
    world.running(request("q1"), token="t1")
    world.deliver(request("q2"), token="t2")
    assert world.ask_stop(abort=True) == Done()
    assert [action.token for action in some(world.actions, e.Nak)] == ["t1", "t2"]
    world.leave()
    assert not world.core.runs


def test_abort_after_drain_does_not_wait_any_longer(world: World) -> None:
    world.running()
    world.ask_stop(drain=True)
    assert world.ask_stop(abort=True) == Done()
    assert some(world.actions, e.Nak)


# -- the engine's death


def test_a_dead_engine_gives_its_requests_back_and_its_replica_fails(world: World) -> None:
    first, second = world.running(request("q1"), token="t1"), world.running(request("q2"), token="t2")
    actions = world.step(
        SequenceEnd(first, EndReason.FAILED, BROKEN), SequenceEnd(second, EndReason.FAILED, BROKEN), EngineDied(BROKEN)
    )
    assert [action.token for action in some(actions, e.Nak)] == ["t1", "t2"]
    assert not items(actions)
    world.leave()
    assert only(world.actions, e.PublishFailed).message.failure == BROKEN


def test_the_gateway_hears_who_may_be_to_blame(world: World) -> None:
    sequence_id = world.running(request("q1"))
    actions = world.step(SequenceEnd(sequence_id, EndReason.FAILED, BROKEN), EngineDied(BROKEN))
    told = [one for action in some(actions, e.PublishFrames) for one in action.batch.given_back]
    assert told == [GivenBack(request_id="q1", epoch=1, fault=True)]


def test_the_gateway_hears_of_a_request_that_is_given_back_without_fault(world: World) -> None:
    world.running(request("q1"))
    world.ask_stop(abort=True)
    told = [one for action in some(world.actions, e.PublishFrames) for one in action.batch.given_back]
    assert told == [GivenBack(request_id="q1", epoch=1, fault=False)]
    kinds = [type(action) for action in world.actions]
    assert kinds.index(e.PublishFrames) < kinds.index(e.Nak), "the queue must not be faster than the word"


def test_tokens_of_the_last_step_before_the_death_are_delivered(world: World) -> None:
    sequence_id = world.running()
    actions = world.step(
        StepToken(sequence_id, 97), SequenceEnd(sequence_id, EndReason.FAILED, BROKEN), EngineDied(BROKEN)
    )
    assert [frame.text for frame in items(actions)] == ["a"]
    assert some(actions, e.Nak)


# -- ledger


def test_a_request_that_waited_for_the_load_carries_its_parts() -> None:
    world = World()
    world.ready()
    world.wait(1)
    world.deliver()
    world.claim(waited_s=4.0)
    sequence_id = only(world.send(e.Tokenised("t1", (104, 105))), e.SubmitSequence).sequence_id
    world.wait(0.5)
    world.step(StepToken(sequence_id, 97))
    world.wait(2)
    ledger = end(world.step(StepToken(sequence_id, EOS))).ledger
    assert ledger.cold
    assert (ledger.tier, ledger.queue_s, ledger.decision_s, ledger.read_s) == ("ssd", 4.0, 0.01, 0.5)
    assert (ledger.prefill_s, ledger.decode_s) == (0.5, 2.0)


def test_a_request_that_came_later_is_warm(world: World) -> None:
    world.wait(5)
    sequence_id = world.running()
    ledger = end(world.step(StepToken(sequence_id, EOS))).ledger
    assert not ledger.cold
    assert (ledger.tier, ledger.read_s, ledger.recoveries) == ("accelerator", 0.0, 0)


def test_the_canonical_line_tells_the_tokens_of_this_worker_and_of_those_before(world: World) -> None:
    world.deliver(delivery=2)
    world.send(e.ClaimAnswered("t1", Claimed(epoch=2, budget_s=60, waited_s=0, token_ids=(97,))))
    sequence_id = only(world.send(e.Tokenised("t1", (104, 105))), e.SubmitSequence).sequence_id
    told = only(world.step(StepToken(sequence_id, EOS)), e.RequestFinished)
    assert (told.outcome, told.prompt_tokens, told.completion_tokens, told.resumed_tokens) == ("stop", 2, 2, 1)
