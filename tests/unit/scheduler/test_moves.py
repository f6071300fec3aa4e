"""Moves over time: what an operator asks for, what sources say, what old pictures do."""

from __future__ import annotations

import msgspec
import pytest

from services.scheduler.core import Core
from services.scheduler.events import (
    Answer,
    CommandLoad,
    CommandMigrate,
    CommandStop,
    LoadRefused,
    MoveAsked,
    MoveOver,
    Note,
    RecordHinted,
)
from services.scheduler.rules import Rules
from shared.contracts.migration import MigrationOutcome, MigrationReason, Move, Moved, Moving
from shared.contracts.records import DeploymentState, Phase, ReplicaState
from shared.errors import Code, Failure
from tests.unit.scheduler import picture
from tests.unit.scheduler.depot import Depot, depot

ABORTED, ENDED = MigrationOutcome.ABORTED, MigrationOutcome.ENDED
FULL = Failure(code=Code.BUSY, message="All 4 slots are taken.")


def refused(answers: list[object]) -> tuple[Code, str]:
    """The code and sentence of the one answer, a failure."""
    assert len(answers) == 1
    failure = answers[0]
    assert isinstance(failure, Failure), failure
    return failure.code, failure.message


def test_a_request_moves_to_another_replica_and_the_operator_hears_how_it_went() -> None:
    desk = depot(a0=3, b0=1)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0")
    command = desk.only(CommandMigrate)
    assert command.worker_id == "a0"
    message = command.message
    assert (message.request_ids, message.to_worker_id, message.to_replica_id) == (("r1",), "b0", "pb0")
    assert (message.replica_id, message.most, message.reason) == ("pa0", 0, MigrationReason.OPERATOR)
    desk.accept(command, ["r1"])
    assert answers == []
    told = desk.ended("r1")
    assert answers == [Moved(ended=(told,))]
    assert [name for name in desk.notes() if name.startswith("move.")] == ["move.begun", "move.directed", "move.ended"]


def test_who_waits_longer_hears_how_far_it_is_and_asks_again() -> None:
    desk = depot(a0=3, b0=1)
    first = desk.ask(request_ids=("r1", "r2"), replica_id="pa0")
    desk.accept(desk.only(CommandMigrate), ["r1", "r2"])
    desk.wait(1.1)
    desk.answers()
    assert first == [Moving(phase="migrating", open_requests=2, to_worker_id="b0")]
    second = desk.ask(request_ids=("r1", "r2"), replica_id="pa0", wait_s=9.0)
    assert desk.take(CommandMigrate) == []
    one = desk.ended("r1")
    two = desk.ended("r2", outcome=ENDED)
    assert second == [Moved(ended=(one, two))]
    # Whoever lost the answer gets it again; another move must not have the same id.
    assert desk.ask(request_ids=("r1", "r2"), replica_id="pa0") == second
    assert refused(desk.ask(request_ids=("r3",), replica_id="pa0"))[0] is Code.CONFLICT
    desk.wait(61.0)
    desk.ask(request_ids=("r3",), replica_id="pa0")
    assert len(desk.take(CommandMigrate)) == 1


def test_most_requests_of_a_replica_are_chosen_by_their_worker() -> None:
    desk = depot(a0=4, b0=1)
    answers = desk.ask(replica_id="pa0", most=2)
    command = desk.only(CommandMigrate)
    assert (command.message.request_ids, command.message.most) == ((), 2)
    desk.accept(command, ["r7", "r8"])
    told = [desk.ended("r8"), desk.ended("r7")]
    assert answers == [Moved(ended=tuple(told))]


def test_all_requests_of_a_replica_go_to_several_destinations_if_one_is_too_small() -> None:
    desk = depot(most=3, a0=4, b0=3, c0=1)
    answers = desk.ask(replica_id="pa0")
    commands = desk.take(CommandMigrate)
    assert [(one.message.to_worker_id, one.message.most) for one in commands] == [("c0", 3), ("b0", 1)]
    desk.accept(commands[1], ["r4"])
    desk.accept(commands[0], ["r1", "r2", "r3"])
    desk.ended("r4", to="b0")
    for id in ("r1", "r2"):
        desk.ended(id, to="c0")
    assert answers == []
    desk.ended("r3", to="c0")
    assert isinstance(answers[0], Moved)


def test_an_end_that_is_heard_before_the_source_has_answered_counts() -> None:
    desk = depot(a0=1, b0=0)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0")
    told = desk.ended("r1")
    assert answers == []
    desk.accept(desk.only(CommandMigrate), ["r1"])
    assert answers == [Moved(ended=(told,))]


def test_a_slot_is_promised_once() -> None:
    desk = depot(a0=4, b0=2)
    desk.ask("v1", request_ids=("r1", "r2"), replica_id="pa0", to_worker_id="b0")
    first = desk.only(CommandMigrate)
    answers = desk.ask("v2", request_ids=("r3",), replica_id="pa0", to_worker_id="b0", wait_s=30.0)
    assert desk.take(CommandMigrate) == []
    desk.accept(first, ["r1", "r2"])
    desk.ended("r1")  # the destination's record will show that in a moment
    desk.ended("r2", outcome=ENDED)
    assert desk.only(CommandMigrate).message.request_ids == ("r3",)
    assert answers == []


def test_a_slot_is_taken_by_what_has_landed_before_its_record_says_so() -> None:
    desk = depot(a0=4, b0=3)
    desk.ask("v1", request_ids=("r1",), replica_id="pa0", to_worker_id="b0")
    desk.accept(desk.only(CommandMigrate), ["r1"])
    desk.ask("v2", request_ids=("r2",), replica_id="pa0", to_worker_id="b0")
    desk.ended("r1")
    desk.wait(1.0)
    assert desk.take(CommandMigrate) == []
    desk.changed("pb0", running=3, finished_requests=1)  # it came, and another one ended
    assert len(desk.take(CommandMigrate)) == 1


def test_migrations_that_somebody_else_began_take_slots_too() -> None:
    desk = depot(a0=4, b0=2)
    desk.shown("a0", "r8", "r9", to="b0")
    desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0")
    assert desk.take(CommandMigrate) == []
    desk.shown("a0")
    desk.wait(1.0)
    assert len(desk.take(CommandMigrate)) == 1


def test_a_full_destination_is_waited_for_and_then_told() -> None:
    desk = depot(Rules(move_patience_s=10.0), a0=4, b0=4)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0", wait_s=60.0)
    desk.wait(9.0)
    desk.answers()
    assert answers == []
    desk.wait(1.1)
    desk.answers()
    code, message = refused(answers)
    assert code is Code.BUSY
    assert message == "The destination has no free slot: b0: no slot is free."
    answers = desk.ask("v2", request_ids=("r1",), replica_id="pa0", to_worker_id="b0")
    desk.wait(5.0)
    desk.changed("pb0", running=3)
    assert len(desk.take(CommandMigrate)) == 1


def test_a_destination_that_refuses_for_want_of_a_slot_is_asked_again_for_a_while() -> None:
    desk = depot(a0=1, b0=0)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0", wait_s=60.0)
    for _ in range(2):
        desk.accept(desk.only(CommandMigrate), ["r1"])
        desk.ended("r1", outcome=ABORTED, failure=FULL)
        assert desk.take(CommandMigrate) == []
        desk.wait(1.1)
    desk.accept(desk.only(CommandMigrate), ["r1"])
    desk.wait(9.0)
    told = desk.ended("r1", outcome=ABORTED, failure=FULL)
    assert answers == [Moved(ended=(told,))]


@pytest.mark.parametrize("wait_s", [0.0, -1.0, float("nan")])
def test_who_will_not_wait_hears_at_once(wait_s: float) -> None:
    desk = depot(a0=1, b0=0)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", wait_s=wait_s)
    assert answers == [Moving(phase="migrating", open_requests=1, to_worker_id="b0")]


def test_who_would_wait_for_ever_hears_within_a_minute() -> None:
    desk = depot(a0=1, b0=0)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", wait_s=float("inf"))
    for _ in range(64):
        desk.ask(request_ids=("r1",), replica_id="pa0", wait_s=60.0)
    assert refused(desk.ask(request_ids=("r1",), replica_id="pa0"))[0] is Code.BUSY
    desk.wait(60.1)
    desk.answers()
    assert len(answers) == 1


def test_an_aborted_migration_is_told_and_not_repeated() -> None:
    desk = depot(a0=1, b0=0)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0")
    desk.accept(desk.only(CommandMigrate), ["r1"])
    told = desk.ended("r1", outcome=ABORTED, failure=Failure(code=Code.UNAVAILABLE, message="b0 is silent."))
    assert answers == [Moved(ended=(told,))]
    desk.wait(5.0)
    assert desk.take(CommandMigrate) == []


# -- what cannot be


@pytest.mark.parametrize(
    ("fields", "code", "sentence"),
    [
        ({"id": "", "replica_id": "pa0"}, Code.INVALID_REQUEST, "move_id"),
        ({"id": "v" * 129, "replica_id": "pa0"}, Code.INVALID_REQUEST, "128 characters"),
        ({}, Code.INVALID_REQUEST, "request_ids or a replica_id"),
        ({"replica_id": "pa0", "most": -1}, Code.INVALID_REQUEST, "0 \\(all\\) or more"),
        ({"request_ids": ("r1", "r1"), "replica_id": "pa0"}, Code.INVALID_REQUEST, "twice"),
        ({"from_worker_id": "z9", "replica_id": "pa0"}, Code.NOT_FOUND, "no worker z9"),
        ({"from_worker_id": "b0", "replica_id": "pa0"}, Code.NOT_FOUND, "Worker b0 has no replica pa0"),
        ({"from_worker_id": "c0", "request_ids": ("r1",)}, Code.NOT_FOUND, "has no replica"),
        ({"replica_id": "pa0", "to_worker_id": "z9"}, Code.NOT_FOUND, "no worker z9"),
        ({"replica_id": "pa0", "to_worker_id": "a0"}, Code.CONFLICT, "where the requests are"),
        ({"replica_id": "pa0", "to_worker_id": "d0"}, Code.CONFLICT, "Worker d0 is draining"),
    ],
)
def test_nonsense_is_refused_at_once(fields: dict[str, object], code: Code, sentence: str) -> None:
    desk = depot(a0=2, b0=0, c0=-1)
    desk.add(picture.server("d"), picture.worker("d0", phase=Phase.DRAINING))
    desk.wait(1.0)
    told = refused(desk.ask(**{"id": "v1", **fields}))  # type: ignore[arg-type]
    assert told[0] is code
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(told[1])
    assert desk.take(CommandMigrate) == []


def test_requests_alone_do_where_their_worker_has_one_replica() -> None:
    desk = depot(a0=2, b0=0)
    desk.ask(request_ids=("r1",))
    assert desk.only(CommandMigrate).message.replica_id == "pa0"
    other = picture.deployment(picture.spec("x"), picture.checkpoint("ck-x"))
    desk.add(other)
    desk.replicas["px"] = picture.replica("px", other, "a0", running=1)
    desk.tell(RecordHinted("replica", "px", False))
    code, message = refused(desk.ask("v2", request_ids=("r2",)))
    assert (code, "2 replicas" in message) == (Code.INVALID_REQUEST, True)


def test_a_request_and_a_replica_are_in_one_move_at_a_time() -> None:
    desk = depot(a0=4, b0=0)
    desk.ask("v1", request_ids=("r1",), replica_id="pa0")
    assert refused(desk.ask("v2", request_ids=("r2", "r1"), replica_id="pa0"))[0] is Code.CONFLICT
    desk.ask("v3", replica_id="pa0", most=1)
    code, message = refused(desk.ask("v4", replica_id="pa0", most=1))
    assert (code, message) == (Code.CONFLICT, "Replica pa0 is being moved already.")
    desk.ask("v5", request_ids=("r3",), replica_id="pa0")
    assert len(desk.take(CommandMigrate)) == 3


def test_a_request_that_a_whole_move_took_along_is_no_more_of_the_other_one() -> None:
    desk = depot(a0=4, b0=4)
    answers = desk.ask("v1", request_ids=("r1", "r2"), replica_id="pa0", to_worker_id="b0", wait_s=30.0)
    desk.ask("v2", replica_id="pa0", most=2, to_worker_id="b0")
    desk.changed("pb0", running=0)
    one, two = desk.take(CommandMigrate)
    assert (one.message.request_ids, two.message.most) == (("r1", "r2"), 2)
    desk.accept(two, ["r1", "r9"])
    desk.accept(one, ["r2"])
    told = desk.ended("r2")
    assert isinstance(answers[0], Moved)
    assert answers[0].ended == (told,)
    assert answers[0].failure is not None
    assert answers[0].failure.code is Code.CONFLICT


def test_what_does_not_run_there_is_told() -> None:
    desk = depot(a0=1, b0=0)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0")
    desk.refuse(desk.only(CommandMigrate), Code.NOT_FOUND, "Request r1 does not run on worker a0.")
    assert refused(answers) == (Code.NOT_FOUND, "Request r1 does not run on worker a0.")


def test_what_was_left_out_is_asked_for_again_until_the_source_says_that_it_is_over() -> None:
    desk = depot(a0=2, b0=0)
    answers = desk.ask(request_ids=("r1", "r2"), replica_id="pa0", wait_s=30.0)
    desk.accept(desk.only(CommandMigrate), ["r1"])
    told = desk.ended("r1")
    desk.wait(1.1)
    again = desk.only(CommandMigrate)
    assert again.message.request_ids == ("r2",)
    desk.refuse(again, Code.NOT_FOUND, "Request r2 does not run on worker a0.")
    assert isinstance(answers[0], Moved)
    assert answers[0].ended == (told,)
    assert answers[0].failure is not None
    assert answers[0].failure.code is Code.NOT_FOUND


def test_nothing_left_to_move_is_no_failure() -> None:
    desk = depot(a0=2, b0=0)
    answers = desk.ask(replica_id="pa0", most=2)
    desk.accept(desk.only(CommandMigrate), [])
    assert answers == [Moved()]


def test_a_scheduler_that_has_just_started_says_so() -> None:
    answers: list[object] = []
    core = Core(Rules(), instance="t")
    actions = core.handle(MoveAsked(Move(move_id="v", from_worker_id="a0", replica_id="p"), answers.append), 1.0)
    assert isinstance(actions[0], Answer)
    assert isinstance(actions[0].message, Failure)
    assert actions[0].message.code is Code.UNAVAILABLE


def test_the_number_of_moves_is_bounded() -> None:
    desk = depot(Rules(most_moves=2), a0=4, b0=0)
    desk.ask("v1", request_ids=("r1",))
    desk.ask("v2", request_ids=("r2",))
    assert refused(desk.ask("v3", request_ids=("r3",)))[0] is Code.BUSY


# -- destinations that are loaded


def test_a_destination_is_loaded_where_it_was_asked_for_even_beyond_the_most_replicas() -> None:
    desk = depot(most=1, a0=2, b0=-1, c0=-1)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="c0")
    load = desk.only(CommandLoad)
    assert load.worker_id == "c0"
    desk.wait(1.1)
    desk.answers()
    assert answers == [Moving(phase="loading", open_requests=1, to_worker_id="c0")]
    desk.shows(load.message, "c0", ReplicaState.LOADING)
    desk.wait(100.0)
    assert desk.take(CommandLoad) == []
    assert desk.take(CommandMigrate) == []
    desk.shows(load.message, "c0", ReplicaState.READY)
    command = desk.only(CommandMigrate)
    assert (command.message.to_worker_id, command.message.to_replica_id) == ("c0", load.message.replica_id)
    desk.wait(70.0)  # while the move needs it, it is not superfluous
    assert desk.take(CommandStop) == []


def test_a_destination_that_is_needed_no_more_is_left_to_the_keep_alive() -> None:
    desk = depot(most=1, a0=1, b0=-1)
    desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0")
    load = desk.loaded(running=0)
    desk.refuse(desk.only(CommandMigrate), Code.NOT_FOUND)
    desk.wait(59.0)
    assert desk.take(CommandStop) == []
    desk.wait(2.0)
    stop = desk.only(CommandStop)
    assert (stop.message.replica_id, stop.message.reason) == (load.message.replica_id, "keep_alive")


def test_the_scheduler_chooses_a_worker_where_none_is_named() -> None:
    desk = depot(most=1, a0=2, b0=-1)
    desk.servers["b"] = picture.server("b", ssd={"ck-m": 100})
    desk.add(picture.server("c"), picture.worker("c0"))
    desk.wait(1.0)
    desk.ask(replica_id="pa0", reason=MigrationReason.PLACEMENT)
    assert desk.only(CommandLoad).worker_id == "b0"


def test_a_full_deployment_gets_one_more_replica_for_a_move() -> None:
    desk = depot(most=2, a0=4, b0=4, c0=-1)
    desk.ask(request_ids=("r1",), replica_id="pa0")
    assert desk.loaded().worker_id == "c0"
    assert desk.only(CommandMigrate).message.to_worker_id == "c0"


def test_a_destination_that_is_coming_anyway_is_waited_for() -> None:
    desk = depot(most=2, a0=4, b0=-1, c0=-1)
    desk.queue("m", 6)
    desk.hint("m")
    desk.wait(0.2)
    load = desk.only(CommandLoad)
    desk.ask(request_ids=("r1",), replica_id="pa0")
    assert desk.take(CommandLoad) == []
    desk.shows(load.message, load.worker_id, ReplicaState.READY)
    assert desk.only(CommandMigrate).message.to_worker_id == load.worker_id


def test_an_idle_replica_makes_room_for_a_destination() -> None:
    desk = depot(most=1, a0=1, b0=-1)
    other = picture.deployment(picture.spec("x", keep_alive_s=600.0), picture.checkpoint("ck-x", kv=450))
    desk.add(other)
    desk.replicas["px"] = picture.replica("px", other, "b0", finished=1, memory=450)
    desk.wait(1.0)
    desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0")
    stop = desk.only(CommandStop)
    assert (stop.message.replica_id, stop.message.reason) == ("px", "evicted")
    assert desk.take(CommandLoad) == []
    desk.gone("px")
    assert desk.loaded().worker_id == "b0"
    assert len(desk.take(CommandMigrate)) == 1


def test_room_that_is_made_for_a_move_goes_with_it() -> None:
    desk = depot(most=1, a0=1, b0=-1)
    other = picture.deployment(picture.spec("x", keep_alive_s=600.0), picture.checkpoint("ck-x", kv=450))
    desk.add(other)
    desk.replicas["px"] = picture.replica("px", other, "b0", finished=1, memory=450)
    desk.wait(1.0)
    desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0")
    assert len(desk.core.cluster.rooms) == 1
    desk.gone("pa0")
    desk.queue("m", 0)
    desk.wait(6.0)
    assert desk.core.cluster.rooms == {}


def test_a_reserve_makes_room_for_a_destination_whatever_the_queues_say() -> None:
    desk = depot(most=1, a0=1, b0=-1)
    other = picture.deployment(picture.spec("x", min_replicas=1), picture.checkpoint("ck-x", kv=450))
    desk.add(other)
    desk.replicas["px"] = picture.replica("px", other, "b0", finished=1, memory=450)
    desk.depths.clear()
    desk.wait(2.0)
    desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0")
    assert desk.only(CommandStop).message.replica_id == "px"


def test_an_idle_destination_is_not_evicted_while_somebody_is_on_the_way() -> None:
    desk = depot(most=2, a0=1, b0=0)
    desk.add(picture.deployment(picture.spec("x"), picture.checkpoint("ck-x", kv=450)))
    desk = Depot(deployments=desk.deployments, servers=desk.servers, workers=desk.workers, replicas=desk.replicas)
    desk.changed("pb0", finished_requests=7)
    desk.queue("m", 1)
    desk.start()
    desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0")
    desk.accept(desk.only(CommandMigrate), ["r1"])
    desk.queue("x", 1)
    desk.hint("x")
    desk.wait(3.0)
    # What it comes from is free once it has left.
    assert [stop.message.replica_id for stop in desk.take(CommandStop)] == ["pa0"]


def test_a_destination_that_fills_up_while_it_loads_is_waited_for() -> None:
    desk = depot(Rules(move_patience_s=10.0), most=1, a0=1, b0=-1)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0", wait_s=60.0)
    load = desk.only(CommandLoad)
    desk.shows(load.message, "b0", ReplicaState.LOADING)
    desk.wait(50.0)
    desk.shows(load.message, "b0", ReplicaState.READY, running=4)
    desk.wait(9.0)
    assert answers == []
    desk.changed(load.message.replica_id, running=3)
    assert len(desk.take(CommandMigrate)) == 1


def test_destinations_that_leave_before_they_are_of_use_are_loaded_a_few_times() -> None:
    desk = depot(most=1, a0=1, b0=-1, c0=-1, d0=-1, e0=-1)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", wait_s=60.0)
    tried = []
    for _ in range(3):
        load = desk.only(CommandLoad)
        tried.append(load.worker_id)
        desk.shows(load.message, load.worker_id, ReplicaState.LOADING)
        desk.shows(load.message, load.worker_id, ReplicaState.DRAINING)
        desk.wait(1.0)
    desk.answers()
    assert tried == ["b0", "c0", "d0"]
    assert refused(answers)[0] is Code.NO_CAPACITY


def test_no_capacity_is_told_with_the_reasons() -> None:
    desk = depot(most=1, a0=1)
    desk.add(picture.server("b"), picture.worker("b0", memory=50))
    desk.wait(1.0)
    code, message = refused(desk.ask(request_ids=("r1",), replica_id="pa0"))
    assert code is Code.NO_CAPACITY
    assert "b0 needs 100 MiB, the worker has 50" in message
    # A worker that is only occupied may become free; that is waited for a while.
    other = picture.deployment(picture.spec("x"), picture.checkpoint("ck-x", kv=450))
    desk.add(other, picture.server("c"), picture.worker("c0"))
    desk.replicas["px"] = picture.replica("px", other, "c0", running=1, memory=450)
    desk.wait(1.0)
    answers = desk.ask("v2", request_ids=("r1",), replica_id="pa0", to_worker_id="c0", wait_s=60.0)
    desk.wait(9.0)
    desk.answers()
    assert answers == []
    desk.wait(1.5)
    desk.answers()
    code, message = refused(answers)
    assert (code, "memory is 50 MiB short" in message) == (Code.NO_CAPACITY, True)


def test_a_destination_that_cannot_be_loaded_is_told_or_tried_elsewhere() -> None:
    desk = depot(most=1, a0=1, b0=-1, c0=-1)
    pinned = desk.ask("v1", request_ids=("r1",), replica_id="pa0", to_worker_id="b0", wait_s=9.0)
    broken = Failure(code=Code.INTERNAL, message="The engine failed.")
    desk.tell(LoadRefused(desk.only(CommandLoad).message.replica_id, broken))
    desk.answers()
    assert refused(pinned) == (Code.NO_CAPACITY, "A destination could not be loaded: The engine failed.")
    desk.ask("v2", request_ids=("r1",), replica_id="pa0")
    assert desk.only(CommandLoad).worker_id == "c0"


def test_a_destination_of_another_revision_is_none() -> None:
    desk = depot(most=2, a0=1, b0=0)
    desk.changed("pa0", revision="old", state=ReplicaState.DRAINING)
    desk.take(CommandStop)
    code, message = refused(desk.ask("v1", request_ids=("r1",), replica_id="pa0", to_worker_id="b0"))
    assert (code, "another revision" in message) == (Code.CONFLICT, True)
    code, message = refused(desk.ask("v2", request_ids=("r1",), replica_id="pa0"))
    assert (code, "old revision" in message) == (Code.CONFLICT, True)
    desk.deployments["m"] = msgspec.structs.replace(desk.deployments["m"], state=DeploymentState.DELETING)
    again = Depot(deployments=desk.deployments, servers=desk.servers, workers=desk.workers, replicas=desk.replicas)
    again.start()
    assert "being deleted" in refused(again.ask(request_ids=("r1",), replica_id="pa0"))[1]


# -- what an old picture may do


def test_an_end_that_nobody_heard_is_seen_in_the_records() -> None:
    desk = depot(Rules(move_lost_s=5.0), a0=2, b0=0)
    answers = desk.ask(request_ids=("r1", "r2"), replica_id="pa0", wait_s=60.0)
    desk.accept(desk.only(CommandMigrate), ["r1", "r2"])
    desk.shown("a0", "r1", "r2")
    desk.wait(20.0)
    assert answers == []
    told = desk.ended("r1")
    desk.shown("a0")
    desk.wait(4.0)
    assert answers == []
    desk.wait(2.0)
    desk.answers()
    assert answers == [Moved(ended=(told,))]


def test_a_record_that_cannot_show_all_migrations_ends_none() -> None:
    desk = depot(a0=2, b0=0)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", wait_s=60.0)
    desk.accept(desk.only(CommandMigrate), ["r1"])
    desk.shown("a0", *(f"x{n}" for n in range(64)), to="c0")
    desk.wait(20.0)
    assert answers == []
    desk.shown("a0", *(f"x{n}" for n in range(63)), to="c0")
    desk.wait(6.0)
    desk.answers()
    assert answers == [Moved()]


def test_a_source_that_dies_ends_its_moves() -> None:
    desk = depot(a0=2, b0=0)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", wait_s=60.0)
    desk.accept(desk.only(CommandMigrate), ["r1"])
    del desk.workers["a0"]
    desk.gone("pa0")
    desk.wait(6.0)
    desk.answers()
    assert answers == [Moved()]
    assert desk.core.cluster.needed == frozenset()


def test_a_registry_that_has_forgotten_everything_for_a_moment_ends_no_move() -> None:
    desk = depot(a0=2, b0=4)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0", wait_s=60.0)
    records = dict(desk.replicas), dict(desk.workers)
    desk.replicas.clear()
    desk.workers.clear()
    desk.wait(2.0)
    desk.replicas.update(records[0])
    desk.workers.update(records[1])
    desk.wait(1.1)
    desk.changed("pb0", running=0)
    desk.accept(desk.only(CommandMigrate), ["r1"])
    told = desk.ended("r1")
    assert answers == [Moved(ended=(told,))]


def test_a_source_that_restarts_under_its_name_is_not_asked_for_what_it_no_longer_runs() -> None:
    desk = depot(a0=2, b0=4)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", to_worker_id="b0", wait_s=60.0)
    desk.workers["a0"] = msgspec.structs.replace(desk.workers["a0"], pid=2)
    desk.gone("pa0")
    desk.replicas["pnew"] = picture.replica("pnew", desk.deployments["m"], "a0")
    desk.tell(RecordHinted("replica", "pnew", False))
    desk.changed("pb0", running=0)
    desk.wait(6.0)
    desk.answers()
    assert desk.take(CommandMigrate) == []
    assert refused(answers)[0] is Code.NOT_FOUND


def test_a_silent_source_is_asked_again_and_given_up() -> None:
    desk = depot(a0=1, b0=0)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", wait_s=60.0)
    asked = 0
    for _ in range(20):
        for command in desk.take(CommandMigrate):
            asked += 1
            desk.wait(2.0)
            desk.refuse(command, Code.UNAVAILABLE, "v1.worker.a0.migrate did not answer in time.")
        desk.wait(0.5)
    assert refused(answers)[0] is Code.UNAVAILABLE
    assert 3 <= asked <= 6


def test_a_request_whose_migration_began_without_a_word_is_followed() -> None:
    desk = depot(a0=2, b0=0)
    answers = desk.ask(request_ids=("r1", "r2"), replica_id="pa0", wait_s=60.0)
    desk.shown("a0", "r1")
    desk.refuse(desk.only(CommandMigrate), Code.UNAVAILABLE)
    two = desk.ended("r2")  # it had begun as well, and is over
    one = desk.ended("r1")
    assert answers == [Moved(ended=(two, one))]


def test_a_new_scheduler_that_is_asked_on_finds_the_migrations_under_way() -> None:
    old = depot(a0=2, b0=0)
    old.ask(request_ids=("r1",), replica_id="pa0")
    old.accept(old.only(CommandMigrate), ["r1"])
    old.shown("a0", "r1")
    desk = Depot(deployments=old.deployments, servers=old.servers, workers=old.workers, replicas=old.replicas)
    desk.start()
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", wait_s=60.0)
    desk.refuse(desk.only(CommandMigrate), Code.BUSY, "Request r1 is in a migration already.")
    desk.wait(20.0)
    assert (answers, desk.take(CommandMigrate)) == ([], [])
    told = desk.ended("r1")
    assert answers == [Moved(ended=(told,))]


def test_every_move_has_an_end() -> None:
    desk = depot(Rules(move_migrate_s=120.0), a0=1, b0=0)
    answers = desk.ask(request_ids=("r1",), replica_id="pa0", wait_s=60.0)
    desk.accept(desk.only(CommandMigrate), ["r1"])
    desk.shown("a0", "r1")
    desk.wait(61.0)
    desk.answers()
    assert answers == [Moving(phase="migrating", open_requests=1, to_worker_id="b0")]
    desk.wait(61.0)
    assert refused(desk.ask(request_ids=("r1",), replica_id="pa0")) == (
        Code.UNAVAILABLE, "The move is not over after 120 s.",
    )  # fmt: skip


def test_a_move_of_the_schedulers_own_comes_back_as_an_event() -> None:
    desk = depot(a0=1, b0=0)
    heard: list[MoveOver] = []
    take = desk.core._take

    def listen(event: object, now: float, out: list[object]) -> bool:
        if isinstance(event, MoveOver):
            heard.append(event)
        return take(event, now, out)  # type: ignore[arg-type]

    desk.core._take = listen  # type: ignore[assignment, method-assign]
    want = Move(move_id="place-1", from_worker_id="a0", replica_id="pa0", reason=MigrationReason.PLACEMENT)
    assert desk.core.moves.begin(want, desk.now, []) is None
    desk.tell(None)
    desk.accept(desk.only(CommandMigrate), ["r1"])
    told = desk.ended("r1")
    assert [(one.move, one.answer) for one in heard] == [(want, Moved(ended=(told,)))]


def test_the_line_of_a_decision_has_every_destination_with_its_reason() -> None:
    desk = depot(most=4, a0=1, b0=1, c0=4)
    desk.add(picture.server("d"), picture.worker("d0"))
    desk.replicas["pd0"] = picture.replica("pd0", desk.deployments["m"], "d0", state=ReplicaState.LOADING)
    desk.wait(1.0)
    desk.ask(request_ids=("r1",), replica_id="pa0")
    (note,) = desk.take(Note, lambda one: one.name == "move.directed")
    assert note.facts["reasons"] == "b0: 3 of 4 slots free; c0: no slot is free; d0: is loading"
    assert desk.core.moves.open()[MigrationReason.OPERATOR] == (1, 1)
