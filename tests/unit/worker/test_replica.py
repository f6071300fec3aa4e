"""A replica's life: loading → ready → draining → gone."""

from __future__ import annotations

from services.worker import events as e
from shared.contracts.records import ReplicaState
from shared.contracts.residency import Done, Progress, Renewed
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
    assert "10 bytes are needed" in refusal.message
    assert "5 bytes free" in refusal.message


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
