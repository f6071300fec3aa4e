"""What the scheduler answers when it is asked why, and what it counts."""

from __future__ import annotations

from typing import Any

from services.scheduler.events import (
    Answer,
    CommandLoad,
    DemandHinted,
    ExplainAsked,
    LoadRefused,
    LoadReported,
    StartupMeasured,
)
from services.scheduler.fairness import FairnessCounts
from services.scheduler.figures import Figures, Tally, parks
from services.scheduler.terms import Candidate, Decision, Outcome, Startup
from shared.contracts.placement import Explain, Explanation, ReplicaLoaded
from shared.contracts.records import ReplicaRecord, ReplicaState
from shared.errors import Code, Failure
from tests.unit.scheduler.desk import Desk, small

CHOSEN = Candidate(("a1",), "a", "ssd", Startup(move_s=1.5))
REPORT = ReplicaLoaded(
    replica_id="r1", deployment="m", worker_id="a1", server_id="a", checkpoint_id="c", tier="ssd", weight_bytes=1,
    total_s=2.0, move_s=1.9, attach_s=0.1,
)  # fmt: skip


def asked(it: Desk, message: Explain) -> Explanation:
    answers: list[Any] = []
    it.tell(ExplainAsked(message, answers.append))
    answer = it.only(Answer).message
    assert isinstance(answer, Explanation)
    return answer


def test_somebody_who_asks_why_is_told_what_was_decided_and_what_it_took() -> None:
    it = small()
    it.core.decisions.decided(Decision("m", Outcome.PLACE, (CHOSEN,), CHOSEN, 0, "so"), "r1", it.now)
    it.tell(LoadReported(REPORT))
    measured = it.only(StartupMeasured).measured
    assert (measured.tier, measured.estimate.total_s, measured.actual_s, measured.relative_error) == (
        "ssd",
        1.5,
        2.0,
        0.25,
    )
    it.tell(LoadReported(REPORT))
    assert it.take(StartupMeasured) == []
    (view,) = asked(it, Explain(deployment="m")).decisions
    assert (view.replica_id, view.actual_s) == ("r1", 2.0)
    nothing = Explanation(scheduler_id="", term=0, median_error=0.25, p95_error=0.25)
    assert asked(it, Explain(deployment="other")) == nothing, "how far estimates are off is told to everybody"


def test_why_nothing_is_placed_is_told_and_a_load_that_was_refused_is_no_riddle() -> None:
    it = small()
    it.core.decisions.decided(Decision("m", Outcome.WAIT, (), None, 0, "all are busy"), "", it.now)
    assert asked(it, Explain(deployment="m")).waiting == "all are busy"
    it.hint("m")
    load = it.only(CommandLoad)
    failure = Failure(code=Code.CHECKPOINT_CORRUPT, message="bits have fallen out")
    it.tell(LoadRefused(load.message.replica_id, failure))
    answer = asked(it, Explain(replica_id=load.message.replica_id))
    assert (answer.waiting, [view.failure for view in answer.decisions]) == ("", [failure])


def test_a_gateway_that_says_that_nobody_waits_wants_nothing() -> None:
    it = small()
    it.tell(DemandHinted("m", it.now, "g1", 0))
    assert it.take(CommandLoad) == []
    it.tell(DemandHinted("m", it.now, "g1", 2, 0.5))
    assert it.only(CommandLoad).message.deployment == "m"


def test_finished_requests_are_counted_by_what_replicas_add() -> None:
    def said(replica_id: str, finished: int) -> ReplicaRecord:
        return ReplicaRecord(
            replica_id=replica_id, worker_id="a1", server_id="a", deployment="m", revision="1", checkpoint_id="c",
            state=ReplicaState.READY, slots=1, finished_requests=finished,
        )  # fmt: skip

    tally = Tally()
    tally.replica_began("new")
    for replica_id, finished in (("new", 2), ("old", 100), ("old", 103), ("new", 2), ("old", 101), ("old", 104)):
        tally.replica_said(said(replica_id, finished))
    assert tally.finished_requests == 2 + 4
    tally.moved("drain")
    tally.moved("drain")
    tally.prefetched("dram")
    assert (tally.moves, tally.prefetches) == ({"drain": 2}, {"dram": 1})


def test_figures() -> None:
    it = small()
    it.hint("m")
    figures = it.core.figures(it.now)
    assert (figures.loads, figures.evictions, figures.finished_requests) == (1, 0, 0)
    assert figures.bound is not None
    assert figures.bound.held
    assert figures.moves is not it.core.tally.moves, "what was shown before is compared with it"
    assert Figures(loads=3, finished_requests=6).swaps_per_request == 0.5
    assert Figures(loads=3).swaps_per_request == 0.0
    assert parks(FairnessCounts(late=1, outranked=2, shared=3)) == {"late": 1, "outranked": 2, "shared": 3}
