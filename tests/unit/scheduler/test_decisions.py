"""What is kept of decisions, and how it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.scheduler.decisions import MOST_CANDIDATES, MOST_PER_DEPLOYMENT, Decisions, room_words
from services.scheduler.terms import Candidate, Decision, Outcome, Relocation, RoomPlan, Startup
from shared.contracts.placement import DecisionView, Explain, Parts, ReplicaLoaded
from shared.errors import Code, Failure

NO_ROOM = RoomPlan()


def candidate(worker: str, *, refused: str = "", room: RoomPlan = NO_ROOM, **seconds: float) -> Candidate:
    return Candidate(
        worker_ids=(worker,), server_id="s1", tier="dram", startup=Startup(**seconds), refused=refused, room=room
    )


def decision(
    *candidates: Candidate, name: str = "a", outcome: Outcome = Outcome.PLACE, reason: str = "so", more: int = 0
) -> Decision:
    chosen = candidates[0] if outcome in (Outcome.PLACE, Outcome.EVICT, Outcome.MAKE_ROOM) else None
    return Decision(name, outcome, candidates, chosen, more, reason)


def report(replica_id: str, *, total_s: float = 2.0) -> ReplicaLoaded:
    return ReplicaLoaded(
        replica_id=replica_id, deployment="a", worker_id="w1", server_id="s1", checkpoint_id="c", tier="ssd",
        weight_bytes=1, total_s=total_s, wait_s=0.1, move_s=1.5, moved_bytes=1, attach_s=0.3,
    )  # fmt: skip


def told(kept: Decisions, name: str = "a", now: float = 10.0, limit: int = 8) -> list[DecisionView]:
    kept.check()
    return list(kept.explain(Explain(deployment=name, limit=limit), now))


def test_a_decision_is_shown_with_its_estimate_and_what_it_really_took() -> None:
    kept = Decisions(instance="x")
    id = kept.decided(
        decision(candidate("w2", wait_s=0.5, move_s=1.0, attach_s=0.25), candidate("w1", refused="no memory"), more=3),
        "r1", 2.0, 0.7,
    )  # fmt: skip
    (before,) = told(kept)
    assert (before.decision_id, before.ago_s, before.actual, before.actual_s) == (id, 8.0, None, None)
    assert before.candidates[0].estimate == Parts(wait_s=0.5, move_s=1.0, attach_s=0.25)
    assert (before.candidates[1].estimate, before.candidates[1].refused, before.more) == (None, "no memory", 3)

    measured = kept.loaded(report("r1"), 5.0)
    assert measured is not None
    assert (measured.tier, measured.actual_s) == ("ssd", 2.0)
    assert measured.relative_error == abs(1.75 - 2.0) / 2.0
    (after,) = told(kept)
    assert (after.replica_id, after.actual_s, after.decide_ms) == ("r1", 2.0, 0.7)
    assert after.actual == Parts(wait_s=0.1, move_s=1.5, attach_s=0.3)


def test_a_load_is_measured_once_and_only_if_its_decision_is_known() -> None:
    kept = Decisions()
    kept.decided(decision(candidate("w1")), "r1", 0.0)
    assert kept.loaded(report("r1"), 1.0) is not None
    assert kept.loaded(report("r1"), 2.0) is None
    assert kept.loaded(report("somebody's"), 2.0) is None


def test_the_errors_of_the_last_estimates_are_kept_by_tier() -> None:
    kept = Decisions()
    assert (kept.errors().loads, kept.errors().median) == (0, None)
    for number, estimate_s in enumerate([2.0, 2.2, 2.4] + [3.0] * 300):
        kept.decided(decision(candidate("w1", attach_s=estimate_s), name=f"a{number}"), f"r{number}", 0.0)
        kept.loaded(report(f"r{number}"), 1.0)
        if number == 2:
            assert kept.errors().median == pytest.approx(0.1)
            assert kept.errors().p95 == pytest.approx(0.19)
            assert kept.errors().by_tier["ssd"] == replace(kept.errors(), by_tier={})
    assert (kept.errors().loads, kept.errors().median) == (256, 0.5)


def test_making_room_and_the_load_that_takes_it_are_one_entry_with_the_seconds_of_both() -> None:
    kept = Decisions()
    room = RoomPlan(stops=("b1",), seconds=3.0)
    first = kept.decided(decision(candidate("w1", room=room, room_s=3.0), outcome=Outcome.MAKE_ROOM), "", 0.0)
    kept.decided(decision(outcome=Outcome.WAIT, reason="room is being made"), "", 1.0)
    assert kept.decided(decision(candidate("w1")), "r1", 4.0) == first
    measured = kept.loaded(report("r1", total_s=2.0), 6.0)
    assert measured is not None
    assert (measured.actual.room_s, measured.actual_s, measured.estimate.room_s) == (4.0, 6.0, 3.0)
    made = told(kept)[-1]
    assert (made.outcome, made.replica_id, made.candidates[0].room) == ("move", "r1", "stops b1")
    assert len(told(kept)) == 2


def test_a_load_elsewhere_does_not_take_the_room_that_was_made() -> None:
    kept = Decisions()
    first = kept.decided(decision(candidate("w1"), outcome=Outcome.EVICT), "", 0.0)
    assert kept.decided(decision(candidate("w2")), "r1", 1.0) != first
    assert kept.decided(decision(candidate("w1"), name="b"), "r2", 1.0) != first
    assert kept.decided(decision(candidate("w1")), "r3", 2.0) == first
    assert kept.decided(decision(candidate("w1")), "r4", 3.0) != first, "it is taken"
    assert kept.decided(decision(candidate("w3"), outcome=Outcome.EVICT), "", 3.0) != kept.decided(
        decision(candidate("w3")), "r5", 5000.0
    ), "nobody waits that long for room"


def test_waiting_again_and_again_is_one_entry_with_a_count_and_the_last_reason() -> None:
    kept = Decisions()
    for second in range(40):
        kept.decided(
            decision(candidate("w1", refused=f"{second}"), outcome=Outcome.WAIT, reason=f"{second}"), "", second
        )
    kept.decided(decision(candidate("w9"), name="b"), "r9", 40.0)
    (one,) = told(kept, now=40.0)
    assert (one.times, one.ago_s, one.reason, one.candidates[0].refused) == (40, 40.0, "39", "39")
    assert kept.waiting("a") == "39"
    kept.decided(decision(candidate("w1")), "r1", 41.0)
    assert kept.waiting("a") == kept.waiting("b") == kept.waiting("c") == ""
    kept.decided(decision(outcome=Outcome.WAIT, reason="anew"), "", 42.0)
    assert [view.times for view in told(kept)] == [1, 1, 40]


def test_a_failed_load_says_how_and_a_replica_that_breaks_later_does_not_change_what_its_load_was() -> None:
    kept, failure = Decisions(), Failure(code=Code.OUT_OF_MEMORY, message="no")
    kept.decided(decision(candidate("w1")), "r1", 0.0)
    kept.failed("r1", failure)
    assert told(kept)[0].failure == failure
    kept.decided(decision(candidate("w1")), "r2", 1.0)
    kept.loaded(report("r2"), 2.0)
    kept.failed("r2", failure)
    assert told(kept)[0].failure is None
    kept.failed("nobody", failure)


def test_one_can_ask_about_a_deployment_a_replica_or_everything_and_for_so_many() -> None:
    kept = Decisions()
    for number in range(4):
        kept.decided(decision(candidate("w1"), name="ab"[number % 2]), f"r{number}", float(number))
    assert [view.replica_id for view in told(kept)] == ["r2", "r0"]
    assert [view.replica_id for view in told(kept, limit=1)] == ["r2"]
    assert [view.replica_id for view in told(kept, "")] == ["r3", "r2", "r1", "r0"]
    assert [view.replica_id for view in kept.explain(Explain(replica_id="r1"), 9.0)] == ["r1"]
    assert kept.explain(Explain(replica_id="r1", deployment="a"), 9.0) == ()
    assert kept.explain(Explain(deployment="z"), 9.0) == kept.explain(Explain(limit=-1), 9.0) == ()


def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    kept = Decisions(limit=100)
    for number in range(300):
        kept.decided(decision(candidate("w1"), name=f"{number}"), f"r{number}", float(number))
    kept.check()
    assert len(kept) == 100
    assert told(kept, "199") == []
    assert kept.loaded(report("r199"), 301.0) is None
    assert kept.loaded(report("r200"), 301.0) is not None
    for number in range(90):
        kept.decided(decision(candidate("w1"), name="busy"), f"b{number}", float(number))
    assert len(told(kept, "busy", limit=99)) == MOST_PER_DEPLOYMENT
    many = tuple(candidate(f"w{number}") for number in range(50))
    kept.decided(decision(*many, more=5), "last", 0.0)
    (view,) = told(kept, limit=1)
    assert (len(view.candidates), view.more) == (MOST_CANDIDATES, 5 + 50 - MOST_CANDIDATES)


def test_what_was_decided_in_one_go_shares_the_time_that_it_took() -> None:
    kept = Decisions()
    for number in range(2):
        kept.decided(decision(candidate("w1"), name=f"{number}"), f"r{number}", 0.0)
    kept.decided(decision(candidate("w1"), name="known"), "r2", 0.0, 7.0)
    assert (kept.timed(3.0), kept.timed(9.0)) == (2, 0)
    assert [view.decide_ms for view in told(kept, "")] == [7.0, 1.5, 1.5]
    for number in range(400):
        kept.decided(decision(outcome=Outcome.WAIT), "", float(number))
    assert kept.timed(256.0) == 256, "nobody has to ask"


def test_how_room_is_made_is_told_in_words() -> None:
    plan = RoomPlan(
        stops=("a", "b"), moves=(Relocation("c", "w2"), Relocation("d", "w3", to_replica_id="e")), waits=("f",),
        parks=tuple("0123456789"),
    )  # fmt: skip
    assert room_words(plan) == (
        "stops a, b; moves c to w2 (loaded there first), d to w3; lets end f; parks 0, 1, 2, 3, 4, 5 and 4 more"
    )
    assert room_words(RoomPlan()) == ""


def test_the_chosen_one_stands_first() -> None:
    kept = Decisions()
    one, two = candidate("w1"), candidate("w2")
    kept.decided(Decision("a", Outcome.PLACE, (one, two), two, 0, "w2 is better"), "r1", 0.0)
    assert [view.worker_ids for view in told(kept)[0].candidates] == [("w2",), ("w1",)]
