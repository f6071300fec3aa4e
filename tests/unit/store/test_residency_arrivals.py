"""Leases on bytes that are still on their way: early ones, imports that fill DRAM, images that stream."""

from __future__ import annotations

from services.store.events import (
    AdvanceWindow,
    Answer,
    ClearBoard,
    ConsumedHeard,
    ImportAsked,
    ImportDone,
    ImportFailed,
    ImportOpened,
    ImportPlanned,
    PlanImport,
    ReadDone,
    ReadFailed,
    ReadImage,
    ReleaseAsked,
    RenewAsked,
    RunImport,
    SetPriority,
    StopJob,
)
from services.store.loads import ROOM_GRACE_S, STREAMS_LIMIT, WINDOW_CHUNKS
from services.store.wants import INTEREST_S
from shared.contracts.residency import Arrival, Consumed, Import, Imported, Lease, Progress, Release, Renew, Renewed
from shared.errors import Code, Failure
from tests.unit.store.desk import CHUNK, Desk, source, stored

BROKEN = Failure(code=Code.CHECKPOINT_UNAVAILABLE, message="input/output error")
STOPPED = Failure(code=Code.CANCELLED, message="stopped")


def planned(desk: Desk, chunks: int, *, id: str = "", arrived_bytes: int = 0) -> RunImport:
    """The import that is wanted now is planned; what it is to do."""
    plan = desk.take(PlanImport)
    peak_bytes = chunks * CHUNK + 100
    desk.post(ImportPlanned(plan.source, "r1", chunks * CHUNK, peak_bytes, id, arrived_bytes))
    run = desk.take(RunImport)
    assert isinstance(run, RunImport)
    return run


def test_a_lease_is_given_as_soon_as_the_read_begins() -> None:
    desk = Desk(stored("m", 3))
    lease = desk.acquire("m", arriving=True)
    read = desk.take(ReadImage)
    assert isinstance(lease, Lease)
    assert lease.arrival == Arrival(tag=read.tag, chunk_bytes=CHUNK, board_offset=8 * CHUNK, image_bytes=3 * CHUNK)
    assert (lease.extents, lease.tier, lease.segment_bytes) == (read.extents, "ssd", 9 * CHUNK)
    kinds = [type(action) for action in desk.last_actions]
    assert kinds.index(ClearBoard) < kinds.index(Answer)
    # Others get theirs while it goes on, and whoever does not take such a one waits.
    assert desk.acquire("m", "b", holder="w2", arriving=True).arrival == lease.arrival
    assert desk.acquire("m", "c", holder="w3") is None
    desk.post(ReadDone(read.job, 0.1))
    assert (desk.last("c").arrival, desk.last("c").extents) == (None, lease.extents)
    assert desk.acquire("m", "d", holder="w4", arriving=True).arrival is None


def test_leases_are_void_when_the_bytes_do_not_come() -> None:
    desk = Desk(stored("m", 3))
    lease = desk.acquire("m", arriving=True)
    desk.post(ReadFailed(desk.take(ReadImage).job, BROKEN))
    assert (desk.core.lease_count, desk.core.dram_used_bytes) == (0, 0)
    desk.post(RenewAsked(Renew(holder="w1", lease_ids=(lease.lease_id,), ttl_s=10), "r"))
    assert desk.last("r") == Renewed(unknown=(lease.lease_id,))
    assert [note.event for note in desk.notes][-1] == "load.failed"


def test_no_early_lease_where_the_board_cannot_show_the_chunks() -> None:
    for desk in (Desk(stored("m", chunk_bytes=2 * CHUNK)), Desk(stored("m", chunk_bytes=0)),
                 Desk(stored("m"), board_offset=0)):  # fmt: skip
        assert desk.acquire("m", arriving=True) is None
        desk.finish_read()
        assert desk.last("a").arrival is None


def test_a_caller_between_two_polls_gets_its_early_lease_at_the_next() -> None:
    desk = Desk(stored("a", 2), stored("b", 2))
    desk.acquire("a", "ca")
    desk.acquire("b", "cb", arriving=True, wait_s=0.5)
    desk.after(0.6)
    assert desk.last("cb") == Progress(phase="queued", total_bytes=2 * CHUNK)
    desk.finish_read()
    assert desk.core.lease_count == 1
    assert desk.acquire("b", "cb2", arriving=True).arrival is not None


def test_what_arrives_for_a_released_lease_still_becomes_a_copy() -> None:
    desk = Desk(stored("m"), stored("n"))
    lease = desk.acquire("m", arriving=True)
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=lease.lease_id)))
    read = desk.take(ReadImage)
    assert desk.tells(SetPriority)[-1].job == read.job, "nobody waits for it any more: others go first"
    assert desk.acquire("n", "b") is None
    assert isinstance(desk.take(ReadImage), ReadImage)
    desk.post(ReadDone(read.job, 0.1))
    assert desk.record().dram == {"m": CHUNK}


def test_an_import_fills_dram_and_ssd_at_once() -> None:
    desk = Desk()
    desk.acquire("m", id="", wait_s=9, arriving=True)
    desk.acquire("m", "b", id="", wait_s=9, holder="w2")
    run = planned(desk, 4)  # a conversion: at most four chunks
    assert desk.tells(ClearBoard)[-1].extents == run.extents
    assert desk.last("a") is None
    desk.post(ImportOpened(run.source, stored("m", 3)))
    lease = desk.last("a")
    assert lease.arrival == Arrival(tag=run.tag, chunk_bytes=CHUNK, board_offset=8 * CHUNK, image_bytes=3 * CHUNK)
    assert (lease.tier, lease.directory) == ("remote", "/store/m")
    assert desk.record().dram_arriving == {"m": 0}
    # Known by its id now, too.
    assert desk.acquire("m", "c", holder="w3", arriving=True).arrival == lease.arrival
    desk.post(ImportDone(run.source, stored("m", 3), 100, 1.0, in_dram=True, peer_bytes=3 * CHUNK))
    late = desk.last("b")
    assert (late.tier, late.arrival, late.extents, late.import_s) == ("peer", None, lease.extents, 1.0)
    assert late.remote_bytes == 100 + 3 * CHUNK
    assert desk.core.dram_used_bytes == 3 * CHUNK, "what was planned too large is given back"
    assert not desk.work, "nothing has to be read again"


def test_an_import_that_fails_voids_the_leases_on_what_it_should_have_brought() -> None:
    desk = Desk()
    desk.acquire("m", id="", wait_s=9, arriving=True)
    run = planned(desk, 3)
    desk.post(ImportOpened(run.source, stored("m", 3)))
    kept = stored("m", 3, arrived_bytes=CHUNK, stored_bytes=2 * CHUNK)
    desk.post(ImportFailed(run.source, BROKEN, kept))
    assert (desk.core.lease_count, desk.core.dram_used_bytes) == (0, 0)
    record = desk.record()
    assert (record.ssd, record.ssd_arriving, record.ssd_used_bytes) == ({}, {"m": CHUNK}, 2 * CHUNK)
    # The next one goes on from there, and needs room only for what is missing.
    desk.acquire("m", "b", wait_s=9)
    run = planned(desk, 3, id="m", arrived_bytes=CHUNK)
    assert run.checkpoint_id == "m"
    assert desk.record().ssd_used_bytes == 3 * CHUNK + 100
    desk.post(ImportDone(run.source, stored("m", 3), 100, 1.0, in_dram=True))
    assert isinstance(desk.last("b"), Lease)
    assert desk.record().ssd_used_bytes == stored("m", 3).stored_bytes


def test_without_room_in_dram_an_import_goes_to_the_ssd_and_is_read_later() -> None:
    desk = Desk(stored("a", 8))
    lease = desk.acquire("a", "a")
    desk.finish_read()
    lease = desk.last("a")
    desk.acquire("m", "b", id="", wait_s=9, holder="w2")
    run = planned(desk, 3)
    assert (run.extents, run.tag) == ((), 0)
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=lease.lease_id)))
    desk.post(ImportDone(run.source, stored("m", 3), 100, 1.0))
    desk.finish_read(0.2)
    assert (desk.last("b").tier, desk.last("b").import_s, desk.last("b").read_s) == ("remote", 1.0, 0.2)


def test_an_import_that_nobody_wants_in_dram_takes_nothing_of_it() -> None:
    desk = Desk()
    desk.post(ImportAsked(Import(source=source("m")), "i"))
    assert planned(desk, 3).extents == ()
    assert desk.core.dram_used_bytes == 0


def test_a_checkpoint_known_by_its_id_is_not_imported_twice() -> None:
    desk = Desk(stored("m"))
    desk.post(ImportAsked(Import(source=source("elsewhere")), "i"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r7", CHUNK, CHUNK, "m"))
    assert isinstance(desk.last("i"), Imported)
    assert not desk.work


# -- windows -----------------------------------------------------------------------------------------------------------


def test_an_image_larger_than_the_pool_streams_through_a_window() -> None:
    desk = Desk(stored("big", 20), dram_chunks=10)
    lease = desk.acquire("big", arriving=True)
    read = desk.take(ReadImage)
    assert lease.arrival is not None
    assert (lease.arrival.window_chunks, lease.arrival.image_bytes) == (WINDOW_CHUNKS, 20 * CHUNK)
    assert sum(extent.length for extent in lease.extents) == WINDOW_CHUNKS * CHUNK
    assert (read.window_chunks, read.tag, read.extents) == (WINDOW_CHUNKS, lease.arrival.tag, lease.extents)
    for holder, chunks in (("w1", 3), ("w1", 2), ("somebody", 9), ("w1", 99)):
        desk.post(ConsumedHeard(Consumed(holder=holder, lease_id=lease.lease_id, chunks=chunks)))
    assert desk.tells(AdvanceWindow) == [AdvanceWindow(read.job, 3), AdvanceWindow(read.job, 20)]
    desk.post(ReadDone(read.job, 1.0, waited_s=0.5))
    assert desk.core.dram_used_bytes == WINDOW_CHUNKS * CHUNK, "its holder may still be reading"
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=lease.lease_id)))
    assert desk.core.dram_used_bytes == 0
    assert desk.record().dram == {}


def test_a_window_is_freed_only_when_its_job_has_ended() -> None:
    desk = Desk(stored("big", 20), dram_chunks=10)
    desk.acquire("big", arriving=True, ttl_s=5)
    read = desk.take(ReadImage)
    desk.after(6)
    assert desk.tells(StopJob) == [StopJob(read.job)]
    assert (desk.core.lease_count, desk.core.dram_used_bytes) == (0, WINDOW_CHUNKS * CHUNK)
    desk.post(ReadFailed(read.job, STOPPED))
    assert desk.core.dram_used_bytes == 0


def test_every_caller_has_a_window_of_its_own_as_long_as_there_is_room() -> None:
    desk = Desk(stored("big", 20), dram_chunks=12)
    first = desk.acquire("big", "a", arriving=True, ttl_s=60)
    second = desk.acquire("big", "b", holder="w2", arriving=True, ttl_s=60, wait_s=9)
    assert isinstance(second, Lease)
    assert second.arrival is not None
    assert second.arrival.window_chunks == 4
    assert {one.offset for one in first.extents}.isdisjoint({one.offset for one in second.extents})
    assert desk.acquire("big", "c", holder="w3", arriving=True, wait_s=9) is None
    desk.after(ROOM_GRACE_S)
    assert desk.last("c").code is Code.NO_CAPACITY
    for read in (desk.take(ReadImage), desk.take(ReadImage)):
        desk.post(ReadFailed(read.job, BROKEN))
    assert (desk.core.lease_count, desk.core.dram_used_bytes) == (0, 0)


def test_only_so_many_images_stream_at_once() -> None:
    desk = Desk(stored("big", 200), dram_chunks=100)
    for number in range(STREAMS_LIMIT):
        assert isinstance(desk.acquire("big", f"c{number}", holder=f"w{number}", arriving=True, ttl_s=60), Lease)
    assert desk.acquire("big", "late", holder="late", arriving=True, wait_s=9) is None
    desk.after(ROOM_GRACE_S)
    assert desk.last("late").code is Code.NO_CAPACITY


def test_what_cannot_be_shown_to_arrive_cannot_stream() -> None:
    desk = Desk(stored("big", 20, chunk_bytes=2 * CHUNK))
    assert desk.acquire("big", arriving=True).code is Code.TOO_LARGE
    assert Desk(stored("big", 20)).acquire("big").code is Code.TOO_LARGE


def test_an_image_for_which_there_is_no_room_streams_after_the_grace() -> None:
    desk = Desk(stored("a", 5), stored("b", 6))
    desk.acquire("a", "a", ttl_s=100)
    desk.finish_read()
    assert desk.acquire("b", "b", holder="w2", arriving=True, wait_s=9) is None
    desk.acquire("b", "c", holder="w3", wait_s=9)
    desk.after(ROOM_GRACE_S)
    assert desk.last("c").code is Code.NO_CAPACITY
    assert desk.last("b").arrival.window_chunks == 2
    assert desk.take(ReadImage).window_chunks == 2


def test_a_window_is_not_kept_for_a_caller_that_does_not_come_back() -> None:
    desk = Desk(stored("a", 8), stored("big", 20))
    desk.acquire("a", "a", ttl_s=3, wait_s=9)
    desk.acquire("big", "b", holder="w2", arriving=True, wait_s=0.1)
    desk.after(0.2)
    desk.finish_read()
    desk.after(INTEREST_S + 1)
    assert not desk.work
    assert desk.record().loads == 0


def test_an_import_that_fits_no_pool_is_refused_to_those_who_need_it_whole() -> None:
    desk = Desk()
    desk.acquire("big", "a", id="", wait_s=9)
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", 20 * CHUNK, 20 * CHUNK))
    assert desk.last("a").code is Code.TOO_LARGE
    assert not desk.work
    desk.acquire("big", "b", id="", wait_s=9, arriving=True)
    run = planned(desk, 20)
    desk.post(ImportDone(run.source, stored("big", 20), 1, 1.0))
    assert desk.last("b").arrival.window_chunks == WINDOW_CHUNKS
    assert desk.last("b").tier == "remote"
