"""Drains and reliefs over time: until nothing runs there, whatever fails on the way."""

from __future__ import annotations

from services.scheduler.events import CommandLoad, CommandMigrate, CommandStop, RecordHinted
from services.scheduler.rules import Rules
from shared.contracts.migration import MigrationOutcome, MigrationReason
from shared.contracts.records import ReplicaState
from shared.errors import Code, Failure
from tests.unit.scheduler import picture
from tests.unit.scheduler.depot import Depot, depot

ABORTED = MigrationOutcome.ABORTED
SILENT = Failure(code=Code.UNAVAILABLE, message="The destination is silent.")


def test_a_drain_goes_on_until_nothing_runs_there() -> None:
    desk = depot(a0=3, b0=0)
    desk.drain("a0")
    command = desk.only(CommandMigrate)
    assert (command.message.most, command.message.reason) == (3, MigrationReason.DRAIN)
    desk.accept(command, ["r1", "r2", "r3"])
    desk.ended("r1")
    desk.ended("r2")
    desk.ended("r3", outcome=ABORTED, failure=SILENT)
    desk.now += 0.1
    desk.changed("pb0", running=2)
    desk.changed("pa0", running=1)
    assert desk.take(CommandMigrate) == []
    desk.wait(1.1)
    again = desk.only(CommandMigrate)
    assert again.message.most == 1
    desk.accept(again, ["r3"])
    desk.ended("r3")
    desk.changed("pa0", running=0)
    desk.wait(10.0)
    assert desk.take(CommandMigrate) == []
    assert desk.core.moves.open()[MigrationReason.DRAIN] == (0, 0)
    assert desk.notes().count("move.ended") == 1


def test_a_drain_that_the_worker_says_first_delays_no_replacement() -> None:
    # The replica's record says that it leaves before the worker's says why.
    desk = depot(most=1, a0=2, b0=-1)
    desk.drain("a0")
    load = desk.loaded()
    assert load.worker_id == "b0"
    assert desk.only(CommandMigrate).message.to_replica_id == load.message.replica_id


def test_a_drain_does_not_depend_on_the_queues() -> None:
    desk = depot(most=1, a0=2, b0=-1)
    desk.depths.clear()  # as after a restart of the bus
    desk.wait(2.0)
    desk.drain("a0")
    assert desk.loaded().worker_id == "b0"
    assert len(desk.take(CommandMigrate)) == 1
    desk.wait(30.0)
    assert desk.take(CommandStop) == []


def test_a_minimum_on_a_draining_worker_is_replaced() -> None:
    desk = Depot()
    desk.add(picture.deployment(picture.spec("m", min_replicas=1, target_concurrency=4), picture.checkpoint()))
    desk.running(a0=0, b0=-1).start()
    assert desk.take(CommandLoad) == []
    desk.drain("a0")
    assert desk.loaded().worker_id == "b0"
    assert desk.take(CommandMigrate) == []


def test_an_old_revision_on_a_draining_worker_finishes_by_itself() -> None:
    desk = depot(a0=2, b0=0)
    desk.changed("pa0", revision="old")
    desk.drain("a0")
    desk.wait(3.0)
    assert desk.take(CommandMigrate) == []
    assert desk.core.moves.open()[MigrationReason.DRAIN] == (0, 0)


def test_a_drain_that_is_undone_moves_nothing_more() -> None:
    desk = depot(a0=3, b0=4)
    desk.drain("a0")
    assert desk.take(CommandMigrate) == []
    desk.drain("a0", undo=True)
    desk.changed("pb0", running=0)
    desk.wait(3.0)
    assert desk.take(CommandMigrate) == []
    assert desk.core.moves.open()[MigrationReason.DRAIN] == (0, 0)


def test_slots_that_become_free_are_used_and_no_others() -> None:
    desk = depot(a0=3, b0=3)
    desk.drain("a0")
    first = desk.only(CommandMigrate)
    assert first.message.most == 1
    desk.accept(first, ["r1"])
    desk.ended("r1")
    desk.changed("pb0", running=4)
    desk.changed("pa0", running=2)
    desk.wait(5.0)
    assert desk.take(CommandMigrate) == []
    desk.changed("pb0", running=2)
    assert desk.only(CommandMigrate).message.most == 2


def test_a_destination_that_has_just_failed_is_the_last_choice() -> None:
    desk = depot(most=3, a0=1, b0=0, c0=1)
    desk.drain("a0")
    first = desk.only(CommandMigrate)
    assert first.message.to_worker_id == "b0"
    desk.accept(first, ["r1"])
    desk.ended("r1", outcome=ABORTED, failure=SILENT)
    desk.wait(1.1)
    assert desk.only(CommandMigrate).message.to_worker_id == "c0"


def test_a_source_that_does_not_answer_is_asked_again() -> None:
    desk = depot(a0=2, b0=0)
    desk.drain("a0")
    for _ in range(20):
        desk.refuse(desk.only(CommandMigrate), Code.UNAVAILABLE)
        assert desk.take(CommandMigrate) == []
        desk.wait(1.1)
    assert len(desk.take(CommandMigrate)) == 1


def test_a_destination_stays_while_it_is_needed() -> None:
    desk = depot(most=2, a0=1, b0=0)
    desk.add(picture.deployment(picture.spec("x"), picture.checkpoint("ck-x", kv=450)))
    again = Depot(deployments=desk.deployments, servers=desk.servers, workers=desk.workers, replicas=desk.replicas)
    again.start()
    again.drain("a0")
    again.accept(again.only(CommandMigrate), ["r1"])
    again.shown("a0", "r1")
    again.changed("pb0", finished_requests=7, idle_s=3600.0)
    again.queue("m", 0)
    again.queue("x", 1)
    again.hint("x")
    again.wait(80.0)
    assert again.take(CommandStop) == []  # idle by its own record, but somebody is on the way
    again.ended("r1")
    again.gone("pa0")
    again.wait(6.0)
    assert again.take(CommandStop)[0].message.replica_id == "pb0"


def test_a_new_scheduler_goes_on_with_a_drain() -> None:
    old = depot(a0=3, b0=0)
    old.drain("a0")
    old.accept(old.only(CommandMigrate), ["r1", "r2"])
    old.shown("a0", "r1", "r2")
    desk = Depot(deployments=old.deployments, servers=old.servers, workers=old.workers, replicas=old.replicas)
    desk.start()
    assert desk.only(CommandMigrate).message.most == 1  # the other two are on their way
    desk.shown("a0")
    desk.changed("pa0", running=2)  # both came to nothing
    desk.wait(2.0)
    assert desk.only(CommandMigrate).message.most == 1  # one is on its way, as far as the scheduler knows


def test_a_drain_ends_with_its_worker() -> None:
    desk = depot(a0=3, b0=0)
    desk.drain("a0")
    desk.accept(desk.only(CommandMigrate), ["r1", "r2", "r3"])
    del desk.workers["a0"]
    desk.tell(RecordHinted("worker", "a0", True))
    desk.gone("pa0")
    desk.wait(6.0)
    assert desk.core.moves.open()[MigrationReason.DRAIN] == (0, 0)
    assert desk.core.cluster.needed == frozenset()


# -- relief


def test_relief_is_given_at_once_and_again_after_a_pause() -> None:
    desk = depot(Rules(relief_pause_s=3.0), a0=4, b0=1)
    desk.relief("a0", 2)
    command = desk.only(CommandMigrate)
    assert (command.message.replica_id, command.message.most) == ("pa0", 2)
    assert command.message.reason is MigrationReason.KV_MEMORY
    desk.accept(command, ["r1", "r2"])
    desk.ended("r1")
    desk.ended("r2")
    desk.changed("pb0", running=1)
    desk.wait(2.0)
    desk.relief("a0", 1)
    assert desk.take(CommandMigrate) == []
    desk.wait(1.5)
    desk.relief("a0", 1)
    assert desk.only(CommandMigrate).message.most == 1


def test_relief_without_a_place_wants_one_more_replica_for_a_while() -> None:
    desk = depot(Rules(relief_extra_s=30.0), most=3, a0=4, b0=4, c0=-1)
    desk.relief("a0", 1)
    load = desk.loaded()
    assert load.worker_id == "c0"
    desk.wait(4.0)
    desk.relief("a0", 1)
    again = desk.only(CommandMigrate)
    assert again.message.to_worker_id == "c0"
    desk.accept(again, ["r1"])
    desk.ended("r1", to="c0", outcome=MigrationOutcome.ENDED)
    desk.wait(20.0)
    assert desk.take(CommandStop) == []
    desk.wait(80.0)  # nobody came to it after all
    assert desk.take(CommandStop)[0].message.replica_id == load.message.replica_id


def test_two_that_are_short_do_not_relieve_each_other() -> None:
    desk = depot(Rules(relief_pause_s=3.0), most=3, a0=3, b0=3, c0=-1)
    desk.relief("b0", 1)
    assert desk.only(CommandMigrate).message.to_worker_id == "a0"
    desk.relief("a0", 1)
    assert desk.take(CommandMigrate) == []
    assert desk.loaded().worker_id == "c0"
    desk.wait(3.1)
    desk.relief("a0", 1)
    assert desk.only(CommandMigrate).message.to_worker_id == "c0"


def test_relief_of_what_is_not_there_does_nothing() -> None:
    desk = depot(a0=4, b0=0)
    desk.relief("c0", 1)
    desk.relief("a0", 0)
    desk.changed("pa0", state=ReplicaState.LOADING)
    desk.changed("pa0", revision="old")
    desk.relief("a0", 1)
    desk.wait(1.0)
    assert desk.take(CommandMigrate) == []
