"""A replica's life: loading → ready → draining → gone."""

from __future__ import annotations

import msgspec
import pytest

from services.worker import events as e
from services.worker.ports import AttachTimes
from shared.contracts.placement import ReplicaLoaded
from shared.contracts.records import ReplicaState
from shared.contracts.residency import Arrival, Done, Lease, Progress, Renewed
from shared.errors import Code, Failure
from tests.unit.worker.world import FakeLoaded, FakePuller, World, end, lease, load, only, request, some

UNAVAILABLE = Failure(code=Code.UNAVAILABLE, message="Nobody serves the store.")
CORRUPT = Failure(code=Code.CHECKPOINT_CORRUPT, message="Chunk 3 does not match its checksum.")


def state(world: World, replica_id: str = "r1") -> ReplicaState:
    return world.core.record(replica_id, world.now).state


def test_a_load_asks_the_store_and_opens_the_queue_at_the_same_time() -> None:
    world = World()
    assert world.ask_load() == Done()
    assert only(world.actions, e.AcquireLease).message == load()
    assert only(world.actions, e.OpenPuller).slug == "demo-0"
    assert not some(world.actions, e.Want)
    assert state(world) is ReplicaState.LOADING


def test_progress_of_the_store_is_asked_for_again_and_recorded() -> None:
    world = World()
    world.ask_load()
    progress = Progress(phase="reading", done_bytes=5, total_bytes=10)
    assert some(world.send(e.LeaseAnswered("r1", progress)), e.AcquireLease)
    assert world.core.record("r1", world.now).load == progress


def test_with_the_lease_the_bytes_are_attached_and_those_who_wait_are_told() -> None:
    world = World()
    world.ask_load()
    actions = world.send(e.LeaseAnswered("r1", lease()))
    assert only(actions, e.Attach).lease == lease()
    assert only(actions, e.PublishProgress).message.progress.phase == "attaching"


def test_a_ready_replica_asks_for_a_request_per_slot_before_its_record_says_ready() -> None:
    world = World()
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.send(e.LeaseAnswered("r1", lease()))
    actions = world.send(e.Attached("r1", FakeLoaded()))
    kinds = [type(action) for action in actions]
    assert only(actions, e.Want).requests == 2
    assert kinds.index(e.Want) < kinds.index(e.RecordReplica)
    assert state(world) is ReplicaState.READY


def test_a_model_without_an_open_queue_is_not_ready_yet() -> None:
    world = World()
    world.ask_load()
    world.send(e.LeaseAnswered("r1", lease()))
    world.send(e.Attached("r1", FakeLoaded()))
    assert state(world) is ReplicaState.LOADING
    assert some(world.send(e.PullerOpened("r1", FakePuller())), e.Want)
    assert state(world) is ReplicaState.READY


def test_an_engine_of_one_slot_asks_for_one_request() -> None:
    world = World()
    loaded = FakeLoaded()
    loaded.engine.slots = 1
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.send(e.LeaseAnswered("r1", lease()))
    assert only(world.send(e.Attached("r1", loaded)), e.Want).requests == 1
    assert world.core.record("r1", world.now).slots == 1


def test_the_parts_of_a_load_are_told_once_it_is_ready() -> None:
    world = World()
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.wait(2)
    world.send(e.LeaseAnswered("r1", lease()))
    world.wait(1)
    told = only(world.send(e.Attached("r1", FakeLoaded())), e.LoadFinished)
    assert (told.tier, told.decision_s, told.read_s, told.attach_s, told.total_s) == ("ssd", 0.01, 0.5, 1.0, 3.0)


# -- the same command again, and commands that cannot be


def test_the_same_load_again_is_answered_and_changes_nothing() -> None:
    world = World()
    world.ask_load()
    before = len(world.actions)
    assert world.ask_load() == Done()
    assert len(world.actions) == before + 1
    world2 = World()
    world2.ready()
    before = len(world2.actions)
    assert world2.ask_load() == Done()
    assert len(world2.actions) == before + 1


def test_a_load_of_a_replica_that_is_leaving_is_refused_until_it_is_gone() -> None:
    world = World()
    world.ready()
    world.ask_stop()
    assert world.ask_load().code is Code.BUSY
    world.leave()
    assert world.ask_load() == Done()


def test_a_load_that_does_not_fit_is_refused_with_the_numbers() -> None:
    world = World(memory_total_bytes=25)
    world.ready("r1")
    world.ask_load(load("r2"))
    refusal = world.ask_load(load("r3"))
    assert refusal.code is Code.OUT_OF_MEMORY
    assert "10 B are needed" in refusal.message
    assert "5 B free" in refusal.message


def test_the_memory_of_a_replica_that_left_can_be_used_again() -> None:
    world = World(memory_total_bytes=10)
    world.ready("r1")
    world.ask_stop("r1")
    assert world.ask_load(load("r2")).code is Code.OUT_OF_MEMORY
    world.leave("r1")
    assert world.ask_load(load("r2")) == Done()


def test_weights_count_only_where_they_lie_on_the_device() -> None:
    assert World(memory_total_bytes=100, weights_on_device=False).ask_load() == Done()
    assert World(memory_total_bytes=100, weights_on_device=True).ask_load().code is Code.OUT_OF_MEMORY
    assert World(memory_total_bytes=1010, weights_on_device=True).ask_load() == Done()


def test_one_replica_too_many_is_refused() -> None:
    world = World(max_replicas=1)
    world.ask_load(load("r1"))
    assert world.ask_load(load("r2")).code is Code.OUT_OF_MEMORY


def test_the_worker_s_own_engine_setting_goes_before_the_command_s() -> None:
    for ours, asked, chosen in (
        ("", "", "auto"),
        ("", "sequential", "sequential"),
        ("batching", "sequential", "batching"),
    ):
        world = World(engine=ours)
        world.ask_load(load(engine=asked))
        assert only(world.send(e.LeaseAnswered("r1", lease())), e.Attach).engine == chosen


# -- failures


def test_a_store_that_does_not_answer_is_asked_again_for_a_while() -> None:
    world = World()
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    tries = 0
    while not some(world.send(e.LeaseAnswered("r1", UNAVAILABLE)), e.RecordReplica):
        tries += 1
        assert some(world.wait(10), e.AcquireLease)
    assert tries == 5
    assert state(world) is ReplicaState.DRAINING


def test_a_refusal_of_the_store_fails_the_load_and_the_scheduler_hears_why() -> None:
    world = World()
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    actions = world.send(e.LeaseAnswered("r1", CORRUPT))
    assert some(actions, e.ClosePuller)
    assert not some(actions, e.AcquireLease)
    assert some(world.send(e.PullerClosed("r1")), e.RemoveRecord)
    told = only(world.send(e.RecordRemoved("r1")), e.PublishFailed).message
    assert (told.replica_id, told.deployment, told.failure) == ("r1", "demo", CORRUPT)
    assert not world.core.replicas


def test_a_checkpoint_that_cannot_be_attached_gives_its_lease_back() -> None:
    world = World()
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.send(e.LeaseAnswered("r1", lease()))
    world.send(e.AttachFailed("r1", CORRUPT))
    actions = world.send(e.PullerClosed("r1"))
    assert only(actions, e.ReleaseLease).message.lease_id == "l1"
    assert only(world.send(e.RecordRemoved("r1")), e.PublishFailed).message.failure == CORRUPT


def test_a_queue_that_cannot_be_opened_fails_the_load() -> None:
    world = World()
    world.ask_load()
    world.send(e.PullerFailed("r1", UNAVAILABLE))
    assert state(world) is ReplicaState.DRAINING
    assert some(world.send(e.LeaseAnswered("r1", lease())), e.ReleaseLease)


def test_a_failure_is_told_only_once_and_not_for_a_replica_that_was_stopped() -> None:
    world = World()
    world.ask_load()
    world.ask_stop()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.send(e.LeaseAnswered("r1", CORRUPT))
    world.send(e.PullerClosed("r1"))
    assert not some(world.send(e.RecordRemoved("r1")), e.PublishFailed)


# -- leaving


def test_leaving_closes_the_queue_then_the_model_then_the_lease_then_the_record() -> None:
    world = World()
    loaded = world.ready()
    assert world.ask_stop() == Done()
    assert [type(action) for action in world.actions[-2:]] == [e.RecordReplica, e.ClosePuller]
    (detach,) = world.send(e.PullerClosed("r1"))
    assert detach == e.Detach("r1", loaded)
    assert [type(action) for action in world.send(e.Detached("r1"))] == [e.ReleaseLease, e.RemoveRecord]
    world.send(e.RecordRemoved("r1"))
    assert not world.core.replicas
    assert world.core.memory_used_bytes == 0


def test_a_stop_while_the_store_reads_gives_back_the_lease_that_comes_too_late() -> None:
    world = World()
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.ask_stop()
    world.send(e.PullerClosed("r1"))
    actions = world.send(e.LeaseAnswered("r1", lease()))
    assert not some(actions, e.Attach)
    assert some(actions, e.ReleaseLease)


def test_a_stop_while_attaching_detaches_what_comes_too_late() -> None:
    world = World()
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.send(e.LeaseAnswered("r1", lease()))
    world.ask_stop()
    world.send(e.PullerClosed("r1"))
    actions = world.send(e.Attached("r1", FakeLoaded()))
    assert some(actions, e.Detach)
    assert not some(actions, e.ReleaseLease)


def test_a_stop_of_a_replica_that_is_not_there_is_done_already() -> None:
    assert World().ask_stop("r9") == Done()


def test_a_busy_replica_refuses_to_stop() -> None:
    world = World()
    world.ready()
    world.deliver()
    assert world.ask_stop().code is Code.BUSY
    assert state(world) is ReplicaState.READY


def test_an_idle_replica_tells_for_how_long() -> None:
    world = World()
    world.ready()
    world.wait(5)
    assert world.core.record("r1", world.now).idle_s == 5
    world.running(request())
    world.wait(5)
    record = world.core.record("r1", world.now)
    assert (record.idle_s, record.running) == (0, 1)
    world.cancel()
    world.wait(2)
    assert world.core.record("r1", world.now).idle_s == 2


# -- leases


def test_leases_are_renewed_three_times_per_ttl_in_one_call() -> None:
    world = World(lease_ttl_s=15)
    world.ready("r1")
    world.ready("r2")
    renewals = some(world.wait(5), e.RenewLeases)
    assert [renewal.lease_ids for renewal in renewals] == [("lease-r1", "lease-r2")]
    world.send(e.LeasesRenewed(Renewed()))
    assert len(some(world.wait(5), e.RenewLeases)) == 1


def test_a_store_that_is_away_does_not_end_the_replica() -> None:
    world = World()
    world.ready()
    world.wait(5)
    assert not world.send(e.LeasesRenewed(UNAVAILABLE))
    assert state(world) is ReplicaState.READY
    assert some(world.wait(5), e.RenewLeases)


def test_a_lost_lease_gives_running_requests_back_and_ends_the_replica() -> None:
    world = World()
    world.ready()
    sequence_id = world.running()
    world.wait(5)
    actions = world.send(e.LeasesRenewed(Renewed(unknown=("lease-r1",))))
    assert only(actions, e.Nak).token == "t1"
    assert only(actions, e.CancelSequence).sequence_id == sequence_id
    world.leave()
    assert some(world.actions, e.PublishFailed)


def test_a_device_with_its_own_copy_gives_the_lease_back_at_once_and_keeps_the_ledger() -> None:
    world = World(memory_total_bytes=2000, weights_on_device=True)
    world.ready()
    assert only(world.actions, e.ReleaseLease).message.lease_id == "lease-r1"
    assert not some(world.wait(60), e.RenewLeases)
    world.deliver()
    world.claim(waited_s=100)
    assert end(world.send(e.Tokenised("t1", (1,) * 100))).ledger.tier == "ssd"
    world.cancel()
    world.ask_stop()
    world.leave()
    assert len(some(world.actions, e.ReleaseLease)) == 1


def test_what_was_copied_to_a_device_after_the_end_of_the_lease_is_not_used() -> None:
    world = World(memory_total_bytes=2000, weights_on_device=True)
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.send(e.LeaseAnswered("r1", lease(lease_id="lease-r1")))
    loaded = FakeLoaded()
    world.now += 16  # this process stood still: nothing was renewed, and the store may have given the place away
    actions = world.send(e.Attached("r1", loaded))
    assert state(world) is ReplicaState.DRAINING
    assert not some(actions, e.LoadFinished)
    world.send(e.PullerClosed("r1"))
    assert only(world.actions, e.Detach).loaded is loaded
    world.send(e.Detached("r1"))
    assert only(world.actions, e.ReleaseLease).message.lease_id == "lease-r1"
    world.send(e.RecordRemoved("r1"))
    assert only(world.actions, e.PublishFailed).message.failure.code is Code.CHECKPOINT_UNAVAILABLE


def test_a_lost_lease_of_one_replica_leaves_the_others_alone() -> None:
    world = World()
    world.ready("r1")
    world.ready("r2")
    world.wait(5)
    world.send(e.LeasesRenewed(Renewed(unknown=("lease-r1",))))
    assert state(world, "r1") is ReplicaState.DRAINING
    assert state(world, "r2") is ReplicaState.READY


# -- the end of the worker


def test_an_idle_worker_is_drained_when_its_replicas_have_left() -> None:
    world = World()
    world.ready()
    assert not some(world.send(e.DrainAsked()), e.Drained)
    world.leave()
    assert len(some(world.actions, e.Drained)) == 1


def test_a_worker_without_replicas_is_drained_at_once() -> None:
    assert some(World().send(e.DrainAsked()), e.Drained)


def test_a_draining_worker_takes_no_replica() -> None:
    world = World()
    world.send(e.DrainAsked())
    assert world.ask_load().code is Code.DRAINING


def test_a_draining_worker_gives_back_what_does_not_finish_in_time() -> None:
    world = World(drain_s=10)
    world.ready()
    world.running()
    world.send(e.DrainAsked())
    assert not some(world.wait(9), e.Nak)
    assert only(world.wait(2), e.Nak).token == "t1"
    world.leave()
    assert some(world.actions, e.Drained)


# -- a lease whose bytes still arrive


def arriving(window_chunks: int = 0, image_bytes: int = 50) -> Lease:
    arrival = Arrival(tag=3, chunk_bytes=16, board_offset=64, image_bytes=image_bytes, window_chunks=window_chunks)
    return msgspec.structs.replace(lease(lease_id="lease-r1"), arrival=arrival, read_s=0.5)


def test_progress_of_arriving_bytes_is_told_with_an_estimate_and_the_ledger_has_what_was_waited() -> None:
    world = World()
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    actions = world.send(e.LeaseAnswered("r1", arriving()))
    assert only(actions, e.PublishProgress).message.progress == Progress(phase="reading", total_bytes=50)
    told = []
    for done in (10, 20, 50):
        world.now += 2
        told.append(only(world.send(e.AttachProgressed("r1", done, 50)), e.PublishProgress).message.progress)
        assert world.core.record("r1", world.now).load == told[-1]
    assert told == [
        Progress(phase="reading", done_bytes=10, total_bytes=50),
        Progress(phase="reading", done_bytes=20, total_bytes=50, eta_s=6.0),
        Progress(phase="attaching"),
    ]
    world.now += 1
    finished = only(world.send(e.Attached("r1", FakeLoaded(times=AttachTimes(waited_s=5.0)))), e.LoadFinished)
    assert (finished.read_s, finished.attach_s) == (5.5, 2.0)


def finished_load(
    granted: Lease, times: AttachTimes, *, granted_after_s: float, attached_after_s: float
) -> ReplicaLoaded:
    """What the scheduler hears of a load whose lease and model came so long after what preceded them."""
    world = World()
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.now += granted_after_s
    world.send(e.LeaseAnswered("r1", granted))
    world.now += attached_after_s
    told = only(world.send(e.Attached("r1", FakeLoaded(times=times))), e.LoadFinished).told("cpu")
    assert told.total_s == pytest.approx(granted_after_s + attached_after_s)
    assert told.wait_s + told.move_s + told.attach_s == pytest.approx(told.total_s)
    assert min(told.wait_s, told.move_s, told.attach_s) >= 0
    return told


def test_the_parts_of_a_load_from_dram_are_the_workers_alone() -> None:
    granted = msgspec.structs.replace(lease(lease_id="lease-r1"), tier="dram")
    told = finished_load(granted, AttachTimes(total_s=1.0), granted_after_s=0.25, attached_after_s=1.0)
    assert (told.tier, told.device, told.wait_s, told.move_s, told.moved_bytes) == ("dram", "cpu", 0, 0, 0)
    assert (told.attach_s, told.work_s) == (1.25, 1.25)


def test_the_parts_of_a_load_whose_bytes_were_waited_for() -> None:
    granted = msgspec.structs.replace(lease(lease_id="lease-r1"), wait_s=2.0, moved_s=3.0, moved_bytes=50)
    told = finished_load(granted, AttachTimes(total_s=1.0), granted_after_s=5.25, attached_after_s=1.0)
    assert (told.wait_s, told.move_s, told.moved_bytes, told.attach_s, told.work_s) == (2.0, 3.0, 50, 1.25, 1.25)


@pytest.mark.parametrize(
    ("arrived_s", "waited_s", "move_s", "work_s"),
    [(4.0, 3.0, 4.5, 2.0), (0.5, 0.0, 1.0, 5.0), (0.0, 0.0, 0.5, 5.0)],
    ids=["the worker waits for the bytes", "the bytes are there first", "all were there when it began"],
)
def test_work_that_was_done_while_bytes_arrived_is_in_no_part_twice(
    arrived_s: float, waited_s: float, move_s: float, work_s: float
) -> None:
    granted = msgspec.structs.replace(arriving(), wait_s=2.0, moved_s=0.5, moved_bytes=50)
    times = AttachTimes(total_s=5.0, waited_s=waited_s, arrived_s=arrived_s)
    told = finished_load(granted, times, granted_after_s=2.5, attached_after_s=5.0)
    assert (told.wait_s, told.move_s, told.work_s) == (2.0, move_s, work_s)


def test_what_the_store_says_cannot_be_more_than_it_took() -> None:
    granted = msgspec.structs.replace(lease(lease_id="lease-r1"), wait_s=20.0, moved_s=30.0, moved_bytes=50)
    finished_load(granted, AttachTimes(total_s=1.0), granted_after_s=5.0, attached_after_s=1.0)


def test_an_image_larger_than_the_pool_takes_memory_of_the_workers_own_and_the_lease_goes_back() -> None:
    world = World()
    world.ask_load(load(kv_bytes=10))
    world.send(e.PullerOpened("r1", FakePuller()))
    world.send(e.LeaseAnswered("r1", arriving(window_chunks=2)))
    assert world.core.memory_used_bytes == 60
    consumed = only(world.send(e.ChunksConsumed("r1", 2)), e.PublishConsumed).message
    assert (consumed.holder, consumed.lease_id, consumed.chunks) == ("w1", "lease-r1", 2)
    actions = world.send(e.Attached("r1", FakeLoaded(memory_bytes=60)))
    assert only(actions, e.ReleaseLease).message.lease_id == "lease-r1"
    assert not some(actions, e.AllowEngine), "its parameters are its own"
    assert state(world) is ReplicaState.READY
    assert not world.send(e.ChunksConsumed("r1", 4)), "the window is somebody else's"
    assert not some(world.wait(60), e.RenewLeases)


def test_an_image_that_fits_neither_the_pool_nor_the_worker_is_refused() -> None:
    world = World()
    world.ask_load(load(kv_bytes=10))
    world.send(e.PullerOpened("r1", FakePuller()))
    actions = world.send(e.LeaseAnswered("r1", arriving(window_chunks=2, image_bytes=91)))
    assert not some(actions, e.Attach)
    assert state(world) is ReplicaState.DRAINING
    world.send(e.PullerClosed("r1"))
    world.send(e.RecordRemoved("r1"))
    assert only(world.actions, e.PublishFailed).message.failure.code is Code.OUT_OF_MEMORY


@pytest.mark.parametrize("why", ["stop", "drain", "lost"])
def test_a_load_that_nobody_needs_any_more_is_stopped_and_its_lease_goes_back_afterwards(why: str) -> None:
    world = World()
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.send(e.LeaseAnswered("r1", arriving()))
    if why == "stop":
        world.ask_stop()
    elif why == "drain":
        world.send(e.DrainAsked())
    else:
        world.wait(5)
        world.send(e.LeasesRenewed(Renewed(unknown=("lease-r1",))))
    assert only(world.actions, e.StopAttach).replica_id == "r1"
    assert not some(world.actions, e.ReleaseLease), "its bytes are being looked at"
    assert not world.send(e.AttachProgressed("r1", 10, 50))
    world.send(e.PullerClosed("r1"))
    actions = world.send(e.AttachFailed("r1", Failure(code=Code.DRAINING, message="The load was stopped.")))
    assert only(actions, e.ReleaseLease)
    world.send(e.RecordRemoved("r1"))
    told = [action.message.failure.code for action in some(world.actions, e.PublishFailed)]
    assert told == ([Code.CHECKPOINT_UNAVAILABLE] if why == "lost" else [])


# -- how long a lease is sure


def test_an_engine_is_allowed_a_ttl_from_when_the_lease_and_each_renewal_were_asked_for() -> None:
    world = World(lease_ttl_s=15)
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    asked = world.now
    world.now += 3  # the answer took its time: a long poll
    world.send(e.LeaseAnswered("r1", lease(lease_id="lease-r1")))
    world.now += 1
    assert only(world.send(e.Attached("r1", FakeLoaded())), e.AllowEngine).until == asked + 15
    (renewal,) = some(world.wait(5), e.RenewLeases)
    assert renewal.lease_ids == ("lease-r1",)
    asked = world.core._renewal[0]
    world.now += 1
    assert only(world.send(e.LeasesRenewed(Renewed())), e.AllowEngine).until == asked + 15


def renewals_fail(world: World, seconds: float, *, unserved: bool = False) -> list[e.Action]:
    """Every renewal within this time gets no answer."""
    until, wanted = world.now + seconds, list[e.Action]()
    while world.now < until:
        actions = world.wait(0.5)
        for _ in some(actions, e.RenewLeases):
            actions += world.send(e.LeasesRenewed(UNAVAILABLE, unserved=unserved))
        wanted += actions
    return wanted


def test_a_store_that_is_silent_is_asked_every_second_and_may_come_back_within_twice_the_ttl() -> None:
    world = World(lease_ttl_s=15)
    world.ready()
    world.running()
    actions = renewals_fail(world, 29)
    assert len(some(actions, e.RenewLeases)) >= 20
    assert not some(actions, e.AllowEngine), "the engine stands still by itself"
    assert state(world) is ReplicaState.READY
    actions = world.send(e.LeasesRenewed(Renewed())) if world.core._renewing else []
    while not some(actions, e.AllowEngine):
        assert some(world.wait(1), e.RenewLeases)
        actions = world.send(e.LeasesRenewed(Renewed()))
    assert only(actions, e.AllowEngine).until > world.now + 10
    assert state(world) is ReplicaState.READY


def test_requests_leave_a_store_that_stays_silent() -> None:
    world = World(lease_ttl_s=15)
    world.ready()
    world.running()
    actions = renewals_fail(world, 33)
    assert only(actions, e.Nak).token == "t1"
    world.leave()
    assert only(world.actions, e.PublishFailed).message.failure.code is Code.CHECKPOINT_UNAVAILABLE


def test_a_store_that_is_not_there_cannot_drop_a_lease() -> None:
    world = World(lease_ttl_s=15)
    world.ready()
    world.running()
    actions = renewals_fail(world, 300, unserved=True)
    assert not some(actions, e.Nak)
    assert some(actions, e.AllowEngine)[-1].until > world.now + 10


def test_bytes_that_still_arrive_need_a_store_within_the_ttl() -> None:
    world = World(lease_ttl_s=15)
    world.ask_load()
    world.send(e.PullerOpened("r1", FakePuller()))
    world.send(e.LeaseAnswered("r1", arriving()))
    assert not some(renewals_fail(world, 14, unserved=True), e.StopAttach)
    assert only(renewals_fail(world, 3, unserved=True), e.StopAttach)


def test_a_worker_that_is_cut_off_waits_and_renews_as_soon_as_it_is_back() -> None:
    world = World(lease_ttl_s=15)
    world.ready()
    world.running()
    world.send(e.BusLost())
    assert not some(renewals_fail(world, 120), e.Nak)
    actions = world.send(e.BusBack())
    assert some(actions, e.LookAtServer)
    if not world.core._renewing:
        assert some(world.wait(0), e.RenewLeases)
    assert only(world.send(e.LeasesRenewed(Renewed())), e.AllowEngine).until > world.now + 10


def test_a_worker_that_was_paused_asks_before_it_gives_anything_up() -> None:
    world = World(lease_ttl_s=15)
    world.ready()
    world.running()
    world.now += 100
    actions = world.send(None)
    assert some(actions, e.RenewLeases)
    assert not some(actions, e.Nak)
    assert only(world.send(e.LeasesRenewed(Renewed())), e.AllowEngine).until == world.now + 15
    assert state(world) is ReplicaState.READY


# -- the server's memory


def test_the_segment_is_prepared_when_it_is_first_seen_and_when_it_changes() -> None:
    world = World()
    assert not world.send(e.ServerChanged("another"))
    assert some(world.send(e.ServerChanged("s1")), e.LookAtServer)
    assert not world.send(e.ServerChanged("s1")), "one look at a time"
    actions = world.send(e.ServerSeen(""))
    assert [type(action) for action in actions] == [e.LookAtServer], "what came meanwhile is looked at too"
    assert only(world.send(e.ServerSeen("/dev/shm/one")), e.PrepareSegment).segment == "/dev/shm/one"
    world.send(e.SegmentPrepared())
    for segment, prepared in (("/dev/shm/one", False), ("", False), ("/dev/shm/two", True)):
        assert some(world.send(e.ServerChanged("s1")), e.LookAtServer)
        assert bool(some(world.send(e.ServerSeen(segment)), e.PrepareSegment)) is prepared
