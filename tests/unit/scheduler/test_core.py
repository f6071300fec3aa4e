"""The scheduler over time: cold starts, evictions, failures, keep-alive."""

from __future__ import annotations

import msgspec

from services.scheduler.core import Core
from services.scheduler.events import (
    CommandLoad,
    CommandStop,
    Decided,
    EnsureQueues,
    LoadRefused,
    Note,
    Oriented,
    QueuesUnread,
    ReadQueues,
    ReadRegistry,
    Reconnected,
    RecordHinted,
    RegistryUnread,
    ReplicaBroke,
    StopRefused,
)
from services.scheduler.fairness import FairnessRules
from services.scheduler.rules import Rules
from shared.contracts.records import Phase, ReplicaState
from shared.errors import Code, Failure
from tests.unit.scheduler import picture
from tests.unit.scheduler.desk import Desk, small
from tests.unit.scheduler.picture import MIB

CRASHED = Failure(code=Code.INTERNAL, message="The engine failed.")
UNFIT = Failure(code=Code.UNSUPPORTED, message="This architecture cannot be served.")
CORRUPT = Failure(code=Code.CHECKPOINT_CORRUPT, message="The bytes do not match.")
BUSY = Failure(code=Code.BUSY, message="It runs a request.")
AWAY = Failure(code=Code.UNAVAILABLE, message="Nobody answers.")


def test_a_hint_of_demand_is_a_load_in_the_same_moment() -> None:
    desk = small()
    desk.hint("m")
    load = desk.only(CommandLoad)
    assert load.worker_id == "a0"
    assert load.demanded_at == desk.now
    message = load.message
    assert (message.deployment, message.slots, message.max_context_tokens) == ("m", 1, 16)
    assert (message.checkpoint_id, message.kv_bytes) == ("ck-m", 400 * MIB)
    facts = desk.only(Decided).facts
    assert (facts["tier"], facts["candidates"]) == ("remote", 1)


def test_no_second_load_while_the_first_is_coming() -> None:
    desk = small()
    desk.hint("m")
    desk.hint("m")
    desk.queue("m", 1)
    desk.wait(2.0)
    load = desk.only(CommandLoad)
    desk.shows(load.message, "a0", ReplicaState.LOADING)
    desk.hint("m")
    desk.wait(30.0)
    assert desk.take(CommandLoad) == []


def test_a_command_without_any_effect_is_given_again() -> None:
    desk = small(Rules(command_s=5.0))
    desk.queue("m", 1)
    desk.hint("m")
    first = desk.only(CommandLoad).message.replica_id
    desk.wait(4.9)
    assert desk.take(CommandLoad) == []
    desk.wait(1.5)
    assert desk.only(CommandLoad).message.replica_id != first


def test_a_lost_hint_only_costs_a_look() -> None:
    desk = small()
    desk.queue("m", 1)
    desk.wait(1.1)
    assert desk.only(CommandLoad).message.deployment == "m"


def test_demand_that_has_gone_again_does_not_keep_a_place() -> None:
    desk = small(keep_alive_s=5.0)
    desk.hint("m")
    desk.loaded()
    desk.wait(4.0)
    assert desk.take(CommandStop) == []
    desk.wait(1.1)
    assert desk.only(CommandStop).message.reason == "keep_alive"


def test_more_replicas_for_more_demand_on_other_workers() -> None:
    desk = small(max_replicas=3, target_concurrency=4)
    desk.add(picture.worker("a1"), picture.worker("a2"), picture.worker("a3"))
    desk.wait(1.0)
    desk.queue("m", 9)
    desk.hint("m")
    desk.wait(0.5)
    loads = desk.take(CommandLoad)
    assert [one.worker_id for one in loads] == ["a0", "a1", "a2"]


def test_an_idle_replica_is_evicted_for_a_waiting_request_and_the_load_follows_at_once() -> None:
    desk = small()
    desk.hint("x")
    first = desk.loaded()
    desk.wait(3.0)
    desk.hint("m")
    stop = desk.stopped()
    assert (stop.message.replica_id, stop.message.reason, stop.message.drain) == (
        first.message.replica_id, "evicted", False,
    )  # fmt: skip
    load = desk.only(CommandLoad)
    assert load.message.deployment == "m"


def test_room_that_is_being_made_is_not_given_to_somebody_else() -> None:
    desk = small()
    desk.add(picture.deployment(picture.spec("y"), picture.checkpoint("ck-y", kv=400)))
    desk = Desk(deployments=desk.deployments, servers=desk.servers, workers=desk.workers).start()
    desk.hint("x")
    desk.loaded()
    desk.wait(3.0)
    desk.hint("m")
    desk.hint("y")
    desk.stopped()
    assert desk.only(CommandLoad).message.deployment == "m"


def test_a_busy_replica_is_left_alone_and_the_newcomer_waits_until_it_is_idle() -> None:
    desk = small()
    desk.queue("x", 1)
    desk.hint("x")
    load = desk.loaded(running=1)
    desk.queue("m", 1)
    desk.hint("m")
    for _ in range(6):
        desk.hint("x")  # it is being asked for
        desk.wait(0.5)
    assert desk.take(CommandStop) == []
    assert desk.notes().count("placement.deferred") == 1
    desk.queue("x", 0)
    desk.shows(load.message, "a0", ReplicaState.READY)
    desk.wait(2.0)
    desk.stopped()
    assert desk.only(CommandLoad).message.deployment == "m"


def test_a_busy_replica_goes_on_until_its_turn_is_over_and_then_its_end_is_awaited_before_it_is_parked() -> None:
    desk = small()
    desk.queue("x", 1)
    desk.hint("x")
    load = desk.loaded(running=1)
    desk.wait(6.0)
    desk.queue("m", 1)
    desk.hint("m")
    desk.wait(40.0)
    assert desk.take(CommandStop) == []  # m is in time if x goes on
    desk.wait_for_room()
    stop = desk.only(CommandStop).message
    left_s = desk.core.estimator.remaining_s(desk.core.cluster.replicas[load.message.replica_id])
    assert (stop.replica_id, stop.drain, stop.abort) == (load.message.replica_id, True, False)
    assert 0.0 < desk.core.fairness.slack_s("m", desk.now) <= left_s
    assert desk.take(CommandLoad) == []
    desk.gone(load.message.replica_id)
    assert desk.only(CommandLoad).message.deployment == "m"


def test_whose_end_is_awaited_too_long_is_parked_in_time_and_nobody_else_is_asked_meanwhile() -> None:
    desk = small(Rules(fairness=FairnessRules(start_within_s=30.0)))
    desk.add(picture.worker("a1"))
    desk.wait(1.0)
    desk.add(picture.deployment(picture.spec("y"), picture.checkpoint("ck-y", kv=400)))
    desk = Desk(rules=desk.rules, deployments=desk.deployments, servers=desk.servers, workers=desk.workers).start()
    for name in ("x", "y"):
        desk.queue(name, 1)
        desk.hint(name)
        desk.loaded(running=1)
    desk.wait(20.0)
    desk.queue("m", 1)
    desk.hint("m")
    desk.wait_for_room(0.5)
    awaited = desk.only(CommandStop).message
    assert (awaited.drain, awaited.abort) == (True, False)
    draining = desk.replicas[awaited.replica_id]
    desk.replicas[awaited.replica_id] = msgspec.structs.replace(draining, state=ReplicaState.DRAINING)
    desk.tell(RecordHinted("replica", awaited.replica_id, False))
    desk.wait(1.0)
    assert desk.take(CommandStop) == []
    desk.wait(10.0)  # nobody else has to go for it, nor for whoever runs where its end is awaited
    parked = desk.take(CommandStop)
    assert [(one.message.replica_id, one.message.abort) for one in parked] == [(awaited.replica_id, True)]
    assert desk.take(CommandLoad) == []
    desk.gone(awaited.replica_id)
    assert [one.message.deployment for one in desk.take(CommandLoad)] == ["m"]


def test_room_that_is_being_made_is_waited_for_as_long_as_it_is_the_soonest_way() -> None:
    facts = {"m": picture.checkpoint("ck-m", weights=400, kv=400), "x": picture.checkpoint("ck-x", weights=20, kv=400)}
    desk = Desk()
    desk.add(picture.server("a", dram={"ck-m": 400, "ck-x": 20}), picture.worker("a0"))
    desk.add(*(picture.deployment(picture.spec(name), one) for name, one in facts.items()))
    desk.start()
    desk.queue("x", 1)
    desk.hint("x")
    desk.loaded(running=1)
    # Another server comes, on which x could be at once, and m later than on a.
    desk.add(picture.server("b", dram={"ck-x": 20}), picture.worker("b0"))
    desk.wait(2.0)
    desk.queue("m", 1)
    desk.hint("m")
    desk.wait(0.0)
    moved = desk.take(CommandLoad)
    assert [(one.worker_id, one.message.deployment) for one in moved] == [("b0", "x")]
    assert "placement.cleared" in desk.notes()
    desk.add(picture.worker("b1"))
    desk.tell(RecordHinted("worker", "b1", False))  # a third worker comes: m would be there in two seconds, from afar
    desk.wait(0.3)
    assert desk.take(CommandLoad, lambda one: one.message.deployment == "m") == []
    desk.wait(10.0)  # but what never comes is not waited for
    assert [one.worker_id for one in desk.take(CommandLoad, lambda one: one.message.deployment == "m")] == ["b1"]


def test_who_comes_later_does_not_get_the_turn_that_has_just_come() -> None:
    desk = small()
    desk.add(picture.deployment(picture.spec("b"), picture.checkpoint("ck-b", kv=400)))
    desk = Desk(deployments=desk.deployments, servers=desk.servers, workers=desk.workers).start()
    desk.queue("x", 1)
    desk.hint("x")
    desk.loaded(running=1)
    desk.wait(4.6)
    desk.queue("m", 1)
    desk.hint("m")
    assert desk.take(CommandStop) == []  # x has not had its turn yet
    desk.wait_for_room()
    desk.take(CommandStop)
    desk.take(Note)
    desk.queue("b", 1)
    desk.hint("b")
    assert [room.deployment for room in desk.core.cluster.rooms.values()] == ["m"]


def test_a_refused_eviction_is_tried_again_when_the_replica_is_idle() -> None:
    desk = small()
    desk.hint("x")
    load = desk.loaded()
    desk.wait(3.0)
    desk.queue("m", 1)
    desk.hint("m")
    stop = desk.only(CommandStop)
    desk.tell(StopRefused(stop.message.replica_id, BUSY))
    assert desk.take(CommandStop) == []
    desk.shows(load.message, "a0", ReplicaState.READY, running=1)
    desk.queue("x", 1)
    desk.hint("x")
    desk.wait(1.5)
    assert desk.take(CommandStop) == []
    desk.queue("x", 0)
    desk.shows(load.message, "a0", ReplicaState.READY)
    desk.wait(0.5)
    assert desk.only(CommandStop).message.replica_id == load.message.replica_id


def test_whoever_waits_longest_is_served_first() -> None:
    desk = small()
    desk.add(picture.deployment(picture.spec("b"), picture.checkpoint("ck-b", kv=400)))
    desk = Desk(deployments=desk.deployments, servers=desk.servers, workers=desk.workers).start()
    desk.hint("x")
    load = desk.loaded(running=1)
    for name in ("m", "b"):
        desk.queue(name, 1)
        desk.hint(name)
        desk.wait(2.0)
    desk.shows(load.message, "a0", ReplicaState.READY)
    desk.stopped()
    assert desk.only(CommandLoad).message.deployment == "m"


def test_a_replica_that_has_just_become_ready_is_not_evicted_while_somebody_waits_for_it() -> None:
    desk = small()
    desk.queue("x", 1)
    desk.hint("x")
    desk.loaded()
    desk.queue("m", 1)
    desk.hint("m")
    desk.wait(5.0)
    assert desk.take(CommandStop) == []


def test_a_replica_whose_queue_is_empty_is_evicted_before_its_record_says_that_it_has_served() -> None:
    desk = small(Rules(min_ready_s=1.0, quick_look_s=0.1))
    desk.queue("x", 1)
    desk.hint("x")
    desk.loaded()
    desk.wait(0.2)
    desk.queue("x", 0)
    desk.queue("m", 1)
    desk.hint("m")
    desk.wait(0.15)
    assert desk.only(CommandStop).message.reason == "evicted"


def test_idle_replicas_stay_for_the_keep_alive_and_leave_on_time() -> None:
    desk = small(Rules(look_interval_s=3600.0), keep_alive_s=20.0)
    desk.hint("m")
    desk.loaded()
    desk.tell(Reconnected())  # the queues are read: nothing is outstanding
    desk.wait(19.9)
    assert desk.take(CommandStop) == []
    desk.wait(0.2)
    stop = desk.only(CommandStop)
    assert (stop.message.reason, stop.message.drain, stop.message.abort) == ("keep_alive", False, False)
    desk.gone(stop.message.replica_id)
    desk.wait(60.0)
    assert desk.take(CommandLoad) == []


def test_a_request_that_slipped_in_saves_the_replica() -> None:
    desk = small(keep_alive_s=5.0)
    desk.hint("m")
    load = desk.loaded()
    desk.wait(5.1)
    stop = desk.only(CommandStop)
    desk.tell(StopRefused(stop.message.replica_id, BUSY))
    desk.shows(load.message, "a0", ReplicaState.READY, running=1)
    desk.wait(20.0)
    assert desk.take(CommandStop) == []


def test_the_minimum_is_kept_up_but_never_at_the_cost_of_another_minimum() -> None:
    desk = small(min_replicas=1, keep_alive_s=1.0)
    load = desk.take(CommandLoad)[0]
    assert load.message.deployment == "m"
    desk.shows(load.message, "a0", ReplicaState.READY)
    desk.wait(100.0)
    assert desk.take(CommandStop) == []
    desk.gone(load.message.replica_id)
    assert desk.only(CommandLoad).message.deployment == "x"  # which has been waiting for its own


def test_a_failed_load_is_tried_on_another_server_at_once() -> None:
    desk = small()
    desk.add(picture.server("b"), picture.worker("b0", memory=450))
    desk.wait(1.0)
    desk.queue("m", 1)
    desk.hint("m")
    load = desk.only(CommandLoad)
    assert load.worker_id == "a0"
    desk.tell(LoadRefused(load.message.replica_id, CRASHED))
    assert desk.only(CommandLoad).worker_id == "b0"


def test_failures_back_off_and_end_in_an_error_and_later_service() -> None:
    desk = small()
    desk.queue("m", 1)
    desk.hint("m")
    times: list[float] = []
    began = desk.now
    for _ in range(3):
        load = desk.only(CommandLoad)
        times.append(round(desk.now - began, 1))
        desk.shows(load.message, "a0", ReplicaState.LOADING)
        desk.gone(load.message.replica_id)
        desk.tell(ReplicaBroke(load.message.replica_id, "m", "a0", CRASHED))
        for _ in range(100):
            if desk.deployments["m"].failure is not None or any(isinstance(one, CommandLoad) for one in desk.out):
                break
            desk.wait(0.1)
    assert times == [0.0, 1.0, 3.0]
    failure = desk.deployments["m"].failure
    assert failure is not None
    assert (failure.code, failure.message, failure.retry_after_s) == (Code.INTERNAL, CRASHED.message, 4.0)
    assert "deployment.suspended" in desk.notes()
    desk.wait(3.9)
    assert desk.take(CommandLoad) == []
    desk.wait(0.2)
    assert desk.deployments["m"].failure is None
    desk.loaded()
    assert "m" not in desk.core.health.troubles


def test_a_model_that_cannot_be_served_ends_the_waiting_as_soon_as_every_server_has_said_so() -> None:
    desk = small()
    desk.queue("m", 1)
    desk.hint("m")
    load = desk.only(CommandLoad)
    desk.tell(ReplicaBroke(load.message.replica_id, "m", "a0", UNFIT))
    failure = desk.deployments["m"].failure
    assert failure is not None
    assert failure.code is Code.UNSUPPORTED


def test_requests_wait_while_a_corrupt_checkpoint_is_imported_afresh() -> None:
    desk = small()
    desk.queue("m", 1)
    desk.hint("m")
    load = desk.only(CommandLoad)
    desk.tell(ReplicaBroke(load.message.replica_id, "m", "a0", CORRUPT))
    assert desk.deployments["m"].failure is None
    desk.wait(1.1)
    desk.loaded()


def test_a_worker_that_is_full_or_away_never_makes_a_deployment_fail() -> None:
    desk = small()
    desk.queue("m", 1)
    desk.hint("m")
    for failure in (AWAY, Failure(code=Code.OUT_OF_MEMORY, message="Full."), AWAY, AWAY):
        load = desk.only(CommandLoad)
        desk.tell(LoadRefused(load.message.replica_id, failure))
        desk.wait(desk.rules.silence_s + desk.rules.look_interval_s)
    assert desk.deployments["m"].failure is None


def test_a_server_that_did_not_answer_is_tried_again_although_others_could_have_been() -> None:
    desk = small(max_replicas=2)
    desk.add(picture.server("b"), picture.worker("b0", memory=450))
    desk.wait(1.0)
    desk.queue("m", 2)
    desk.hint("m")
    desk.wait(0.2)
    first, second = desk.take(CommandLoad)
    desk.shows(first.message, "a0", ReplicaState.READY, running=1)
    desk.tell(LoadRefused(second.message.replica_id, AWAY))
    assert desk.take(CommandLoad) == []
    desk.wait(desk.rules.silence_s + desk.rules.look_interval_s)
    assert desk.only(CommandLoad).worker_id == "b0"


def test_a_replica_that_vanishes_while_loading_counts_as_failed_even_without_a_word() -> None:
    desk = small()
    desk.queue("m", 1)
    desk.hint("m")
    load = desk.only(CommandLoad)
    desk.shows(load.message, "a0", ReplicaState.LOADING)
    desk.gone(load.message.replica_id)
    desk.wait(0.6)
    assert desk.take(CommandLoad) == []
    assert "replica.failed" in desk.notes()
    desk.wait(1.0)
    assert len(desk.take(CommandLoad)) == 1


def test_a_replica_that_leaves_unasked_is_not_replaced_before_its_worker_has_said_why() -> None:
    desk = small(max_replicas=1)
    desk.add(picture.worker("a1"))
    desk.wait(1.0)
    desk.queue("m", 1)
    desk.hint("m")
    load = desk.only(CommandLoad)
    desk.shows(load.message, load.worker_id, ReplicaState.LOADING)
    desk.shows(load.message, load.worker_id, ReplicaState.DRAINING)
    desk.gone(load.message.replica_id)
    assert desk.take(CommandLoad) == []
    desk.tell(ReplicaBroke(load.message.replica_id, "m", load.worker_id, UNFIT))
    assert desk.take(CommandLoad) == []
    assert desk.deployments["m"].failure is not None


def test_a_ready_replica_that_leaves_unasked_is_replaced_when_nobody_says_why() -> None:
    desk = small()
    desk.add(picture.worker("a1"))
    desk.wait(1.0)
    desk.queue("m", 1)
    desk.hint("m")
    load = desk.loaded(running=1)
    desk.shows(load.message, load.worker_id, ReplicaState.DRAINING, running=1)
    desk.wait(0.3)
    assert desk.take(CommandLoad) == []
    desk.wait(0.3)
    assert desk.only(CommandLoad).worker_id != load.worker_id
    assert "replica.failed" not in desk.notes()


def test_a_dead_worker_takes_its_replicas_along_and_others_take_over() -> None:
    desk = small()
    desk.add(picture.server("b"), picture.worker("b0", memory=450))
    desk.wait(1.0)
    desk.queue("m", 1)
    desk.hint("m")
    load = desk.loaded(running=1)
    del desk.workers[load.worker_id]
    desk.replicas.clear()
    desk.wait(1.1)
    assert desk.only(CommandLoad).worker_id == "b0"


def test_replicas_of_a_draining_worker_are_replaced() -> None:
    desk = small()
    desk.add(picture.server("b"), picture.worker("b0", memory=450))
    desk.wait(1.0)
    desk.queue("m", 1)
    desk.hint("m")
    assert desk.loaded(running=1).worker_id == "a0"
    desk.workers["a0"] = picture.worker("a0", phase=Phase.DRAINING)
    desk.tell(RecordHinted("worker", "a0", False))
    assert desk.only(CommandLoad).worker_id == "b0"


def test_replicas_of_unknown_deployments_are_ended() -> None:
    desk = small()
    stranger = picture.deployment(picture.spec("gone"), picture.checkpoint("ck-gone"))
    desk.replicas["r9"] = picture.replica("r9", stranger, running=1)
    desk.tell(RecordHinted("replica", "r9", False))
    stop = desk.only(CommandStop)
    assert (stop.message.replica_id, stop.message.abort) == ("r9", True)


def test_a_checkpoint_that_is_corrupt_on_one_server_is_served_from_another() -> None:
    desk = Desk()
    for id in ("a", "b"):
        desk.add(picture.server(id, ssd={"ck-m": 100}), picture.worker(f"{id}0"))
    desk.add(picture.deployment(picture.spec("m"), picture.checkpoint(weights=100)))
    desk.start()
    desk.queue("m", 1)
    desk.hint("m")
    first = desk.only(CommandLoad)
    assert first.worker_id == "a0"
    desk.tell(ReplicaBroke(first.message.replica_id, "m", "a0", CORRUPT))
    second = desk.only(CommandLoad)
    assert second.worker_id == "b0"
    assert desk.deployments["m"].failure is None


def test_when_the_checkpoint_is_corrupt_everywhere_the_deployment_fails_with_the_sentence() -> None:
    desk = Desk(Rules(most_failures=2))
    for id in ("a", "b", "c"):
        desk.add(picture.server(id, ssd={"ck-m": 100}), picture.worker(f"{id}0"))
    desk.add(picture.server("d"))  # without a worker nothing can be tried there
    desk.add(picture.server("e"), picture.worker("e0", memory=1))  # nor with one that is too small
    desk.add(picture.deployment(picture.spec("m"), picture.checkpoint(weights=100)))
    desk.start()
    desk.queue("m", 1)
    desk.hint("m")
    tried = []
    for _ in range(3):
        assert desk.deployments["m"].failure is None
        load = desk.only(CommandLoad)
        tried.append(load.worker_id)
        desk.tell(ReplicaBroke(load.message.replica_id, "m", load.worker_id, CORRUPT))
    assert tried == ["a0", "b0", "c0"]
    failure = desk.deployments["m"].failure
    assert failure is not None
    assert (failure.code, failure.message) == (CORRUPT.code, CORRUPT.message)


def test_a_model_for_which_no_server_is_large_enough_fails_after_some_patience() -> None:
    desk = Desk(Rules(patience_s=10.0))
    desk.add(picture.server("a", pool=50), picture.worker("a0", memory=109))
    desk.add(picture.deployment(picture.spec("m"), picture.checkpoint(weights=100)))
    desk.start()
    desk.queue("m", 1)
    desk.wait(9.0)
    assert desk.deployments["m"].failure is None
    desk.wait(3.0)
    failure = desk.deployments["m"].failure
    assert failure is not None
    assert failure.code is Code.TOO_LARGE
    assert "110 MiB" in failure.message


def test_a_restarted_scheduler_knows_the_replicas_that_run() -> None:
    desk = small()
    desk.hint("m")
    desk.loaded(running=1)
    again = Desk(
        deployments=desk.deployments, servers=desk.servers, workers=desk.workers, replicas=desk.replicas, now=2000.0
    )
    again.queue("m", 1)
    again.start()
    again.hint("m")
    again.wait(5.0)
    assert again.take(CommandLoad) == []
    assert again.take(CommandStop) == []
    assert len(again.take(Oriented)) == 1


def test_nothing_is_decided_before_the_first_look() -> None:
    core = Core(Rules(), instance="t")
    actions = core.handle(None, 1.0)
    assert [type(one) for one in actions] == [ReadRegistry]
    assert core.handle(RegistryUnread(AWAY), 1.1) != []
    assert core.deadline() == 2.0


def test_an_outage_is_told_once_and_the_picture_stays() -> None:
    desk = small()
    desk.hint("m")
    load = desk.loaded(running=1)
    core = desk.core
    told = []
    for second in range(5):
        told += [one.name for one in core.handle(RegistryUnread(AWAY), desk.now + second) if isinstance(one, Note)]
        told += [one.name for one in core.handle(QueuesUnread(AWAY), desk.now + second) if isinstance(one, Note)]
    assert told == ["look.failed", "look.failed"]
    assert load.message.replica_id in core.cluster.replicas


def test_after_a_reconnection_everything_is_looked_at_and_queues_are_made_sure_of() -> None:
    desk = small()
    actions = desk.core.handle(Reconnected(), desk.now + 0.01)
    assert {ReadRegistry, ReadQueues, EnsureQueues} <= {type(one) for one in actions}
    ensure = next(one for one in actions if isinstance(one, EnsureQueues))
    assert ensure.slugs == tuple(desk.deployments[name].slug for name in ("m", "x"))
