"""Whoever is commanded refuses what an old leader commands."""

from __future__ import annotations

from shared.contracts.placement import Leading, StopReplica
from shared.errors import Code, Failure
from shared.fence import Fence


def stop(term: int) -> StopReplica:
    return StopReplica(replica_id="r1", reason="keep_alive", term=term)


def test_a_lower_term_than_one_that_was_heard_of_is_refused_and_told_the_highest() -> None:
    fence = Fence("worker-1")
    assert [fence.refusal(term) for term in (1, 3, 3)] == [None, None, None]
    fence.heard(Leading(scheduler_id="s2", term=7))
    fence.heard(Leading(scheduler_id="s1", term=6))
    refused = fence.refusal(6)
    assert refused == Failure(code=Code.STALE_EPOCH, message="Term 6 is over: worker-1 has heard of term 7.", term=7)
    assert fence.refusal(7) is None


def test_operators_are_always_obeyed() -> None:
    fence = Fence("worker-1")
    fence.heard(Leading(scheduler_id="s2", term=7))
    assert fence.refusal(0) is None


def test_a_kept_handler_hears_only_what_is_to_be_obeyed() -> None:
    fence = Fence("worker-1")
    obeyed: list[int] = []
    answers: list[Failure] = []
    handle = fence.keeps(lambda message, reply: obeyed.append(message.term))
    for term in (5, 4, 0, 6):
        handle(stop(term), answers.append)
    assert obeyed == [5, 0, 6]
    assert [one.term for one in answers] == [5]
