"""What the scheduler answers when it is asked why, and what it counts."""

from __future__ import annotations

import math
from typing import Any

from services.scheduler.books import Room
from services.scheduler.cluster import Cluster
from services.scheduler.commands import PendingStop
from services.scheduler.events import (
    Answer,
    CommandLoad,
    CommandStop,
    DemandHinted,
    ExplainAsked,
    LoadRefused,
    LoadReported,
    StartupMeasured,
)
from services.scheduler.fairness import FairnessCounts
from services.scheduler.figures import Figures, Tally, parks
from services.scheduler.terms import Candidate, Decision, Outcome, Relocation, RoomPlan, Startup
from services.scheduler.underway import in_line, underway
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
    nothing = Explanation(scheduler_id="", term=0, median_error=0.25, p95_error=0.25, loads=1)
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
    figures = it.core.figures()
    assert (figures.loads, figures.evictions, figures.finished_requests) == (1, 0, 0)
    assert figures.bound is not None
    assert figures.bound.held
    assert figures.moves is not it.core.tally.moves, "what was shown before is compared with it"
    assert Figures(loads=3, finished_requests=6).swaps_per_request == 0.5
    assert Figures(loads=3).swaps_per_request == 0.0
    assert parks(FairnessCounts(late=1, outranked=2, shared=3)) == {"late": 1, "outranked": 2, "shared": 3}


def test_what_is_being_done_to_make_room_is_told_until_nobody_is_in_the_way() -> None:
    it = small()
    it.queue("x", 1)
    it.hint("x")
    load = it.loaded(running=3)
    assert asked(it, Explain(deployment="m")).doing == ""
    it.wait(60.0)
    it.queue("m", 1)
    it.hint("m")
    told = asked(it, Explain(deployment="m")).doing
    assert told.startswith(
        "takes the first place that comes free, perhaps after 3 requests of x on a0, expected to end in "
    )
    assert told.endswith("; starts within 1 min in any case")
    it.wait_for_room()
    it.only(CommandStop)
    doing = asked(it, Explain(deployment="m")).doing
    assert doing.startswith("waits for the end of 3 requests of x on a0, expected in ")
    assert "; ready in " in doing
    assert asked(it, Explain(deployment="x")).doing == ""
    it.gone(load.message.replica_id)
    assert it.only(CommandLoad).message.deployment == "m"
    assert asked(it, Explain(deployment="m")).doing == ""


def test_who_waits_is_told_of_nobody_whose_place_it_could_not_take() -> None:
    cluster = Cluster(kv_bytes_max=1)
    for number, running in enumerate((2, 1, 0, 3)):
        cluster.replicas[f"r{number}"] = ReplicaRecord(
            replica_id=f"r{number}", worker_id=f"w{number}", server_id="a", deployment=f"d{number}", revision="1",
            checkpoint_id="c", state=ReplicaState.READY, slots=4, running=running,
        )  # fmt: skip

    def told(*closed: str) -> str:
        return in_line(cluster, "d3", frozenset(closed), lambda replica: float(replica.running), math.inf)

    first = "takes the first place that comes free, perhaps after"
    assert told() == f"{first} 1 request of d1 on w1, expected to end in 1.0 s"
    assert told("w1") == f"{first} 2 requests of d0 on w0, expected to end in 2.0 s"
    assert told("w0", "w1") == ""


def test_everybody_who_is_in_the_way_is_told_with_how_they_leave() -> None:
    cluster = Cluster(kv_bytes_max=1)
    for number, running in enumerate((0, 1, 2, 3, 4)):
        cluster.replicas[f"r{number}"] = ReplicaRecord(
            replica_id=f"r{number}", worker_id=f"w{number}", server_id="a", deployment=f"d{number}", revision="1",
            checkpoint_id="c", state=ReplicaState.READY, slots=4, running=running,
        )  # fmt: skip
    plan = RoomPlan(
        stops=("r0",),
        moves=(Relocation("r1", "w7", "x-1"), Relocation("r2", "w8"), Relocation("r2", "w9", "x-2")),
        waits=("r3",),
        parks=("r4", "r9"),
    )
    room = Room("m", ("w0",), "a", "k", 1, 1, plan.victims, 200.0, due_at=115.0)
    steps = (
        "waits for d0 to leave w0",
        "moves 1 request of d1 from w1 to w7",
        "moves 2 requests of d2 from w2 to w8 (loaded there first) and w9",
        "waits for the end of 3 requests of d3 on w3, expected in 12 s",
        "parks 4 requests of d4 on w4",
    )
    told = underway(cluster, room, plan, lambda replica: 12.0, 100.0)
    assert sorted(told.removesuffix("; ready in 15 s").split("; ")) == sorted(steps)
    late = underway(cluster, room, plan, lambda replica: 12.0, 118.0)
    assert late.endswith("; 3.0 s later than estimated")
    cluster.stops["r3"] = PendingStop("r3", "d3", "w3", "parked", False, True, 130.0)
    assert "parks 3 requests of d3 on w3" in underway(cluster, room, plan, lambda replica: 12.0, 100.0)
