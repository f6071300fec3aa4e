"""What a replica's record says about its speed and about what runs in it."""

from __future__ import annotations

import pytest

from services.worker.ports import EndReason, SequenceEnd, StepToken
from services.worker.speeds import Speeds
from shared.contracts.requests import Sampling, TokensPrompt
from tests.unit.worker.world import World, request


def test_a_step_is_what_requests_wait_for_their_next_token() -> None:
    speeds = Speeds()
    assert (speeds.step_s, speeds.prefill_token_s) == (None, None)
    speeds.stepped(0.1)
    assert speeds.step_s == 0.1
    for _ in range(100):
        speeds.stepped(0.2)
    assert speeds.step_s == pytest.approx(0.2, rel=0.01)
    speeds.stepped(10.0)
    assert speeds.step_s < 0.75, "one pause is not the rule"


def test_short_prefills_do_not_say_what_a_token_costs() -> None:
    speeds = Speeds()
    speeds.prefilled(1000, 1.0)
    for _ in range(10):
        speeds.prefilled(5, 0.05)  # 10 ms a token: a forward pass
    assert speeds.prefill_token_s == pytest.approx(0.001, rel=0.05)


def test_a_prefill_of_nothing_says_nothing() -> None:
    speeds = Speeds()
    speeds.prefilled(0, 1.0)
    speeds.prefilled(10, 0.0)
    assert speeds.prefill_token_s is None


def test_a_record_says_what_its_requests_hold_and_how_long_they_may_go_on() -> None:
    world = World()
    world.ready()
    idle = world.core.record("r1", world.now)
    assert (idle.context_tokens, idle.output_tokens, idle.left_tokens, idle.step_s) == (0, 0, 0, None)
    sequences = [
        world.running(
            request(f"q{number}", prompt=TokensPrompt(token_ids=(65,) * length), sampling=Sampling(max_tokens=20)),
            token=f"t{number}",
        )
        for number, length in ((1, 3), (2, 7))
    ]
    for _ in range(3):
        world.now += 0.5
        world.step(*(StepToken(sequence_id, 65) for sequence_id in sequences))
    record = world.core.record("r1", world.now)
    assert (record.running, record.context_tokens, record.output_tokens, record.left_tokens) == (2, 16, 6, 17)
    assert record.step_s == pytest.approx(0.5)
    assert record.prefill_token_s is None, "how many of its tokens were shared is told at the end"
    world.step(StepToken(sequences[1], 65), SequenceEnd(sequences[1], EndReason.STOP, cached_tokens=2))
    record = world.core.record("r1", world.now)
    assert (record.running, record.context_tokens, record.output_tokens) == (1, 6, 3)
    assert record.prefill_token_s == pytest.approx(0.5 / 5)
