"""Pins, verification, quarantine, exports, marks, the list, the record, and the pool's next life."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from services.store.events import (
    CheckpointQuarantined,
    CheckpointRemoved,
    EvictAsked,
    ExportAsked,
    ExportDone,
    ImportAsked,
    ImportDone,
    ImportOpened,
    ImportPlanned,
    ImportProgressed,
    ListAsked,
    PinAsked,
    PlanImport,
    QuarantineCheckpoint,
    ReadDone,
    ReadFailed,
    ReadImage,
    ReadProgressed,
    ReleaseAsked,
    RemoveCheckpoint,
    RenewAsked,
    RunExport,
    RunImport,
    SavePins,
    StopJob,
    VerifyAsked,
    VerifyCheckpoint,
    VerifyDone,
    VerifyProgressed,
)
from services.store.loads import PIN_RETRY_S
from services.store.pool_state import PoolState, decode_state, encode_state
from services.store.residency import trim
from shared.contracts.residency import (
    CheckpointList,
    Done,
    Evict,
    Export,
    Import,
    Lease,
    ListCheckpoints,
    Pin,
    Progress,
    Release,
    Renew,
    Renewed,
    Verified,
    Verify,
)
from shared.errors import Code, Failure
from tests.unit.store.desk import CHUNK, Desk, source, stored

CORRUPT = Failure(code=Code.CHECKPOINT_CORRUPT, message="chunk 7 differs")
STOPPED = Failure(code=Code.CANCELLED, message="stopped")


def pin(desk: Desk, name: str, tier: str) -> Any:
    desk.post(PinAsked(Pin(checkpoint_id=name, tier=tier), "pin"))
    return desk.last("pin")


def evict(desk: Desk, name: str, tier: str, caller: str = "evict") -> Any:
    desk.post(EvictAsked(Evict(checkpoint_id=name, tier=tier), caller))
    return desk.last(caller)


def hold(desk: Desk, name: str, *, ttl_s: float = 1000.0) -> Lease:
    desk.acquire(name, name, ttl_s=ttl_s, wait_s=9)
    if desk.last(name) is None:
        desk.finish_read()
    lease = desk.last(name)
    assert isinstance(lease, Lease)
    return lease


def use(desk: Desk, name: str) -> None:
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=hold(desk, name).lease_id)))


# -- pins --------------------------------------------------------------------------------------------------------------


def test_what_is_pinned_in_dram_is_brought_there_and_stays() -> None:
    desk = Desk(stored("a", 5), stored("b", 5))
    assert pin(desk, "a", "dram") == Done()
    assert desk.take(SavePins).pins == {"a": "dram"}
    desk.finish_read()
    record = desk.record()
    assert (record.pinned, record.dram, record.leased_bytes) == ({"a": "dram"}, {"a": 5 * CHUNK}, 5 * CHUNK)
    desk.acquire("b", wait_s=9)
    desk.after(2)
    assert desk.last("a").code is Code.NO_CAPACITY
    for tier in ("dram", "ssd"):
        refused = evict(desk, "a", tier)
        assert refused.code is Code.BUSY
        assert "unpin" in refused.message
    assert pin(desk, "a", "") == Done()
    assert desk.take(SavePins).pins == {}
    assert evict(desk, "a", "dram") == Done()


def test_pins_survive_a_restart_and_room_is_awaited() -> None:
    desk = Desk(stored("a", 5), stored("b", 5), pins={"b": "dram", "gone": "ssd"})
    assert desk.core.deadline() == 0.0, "there is work from an earlier life"
    lease = hold(desk, "a")
    assert desk.record().pinned == {"b": "dram"}
    desk.after(PIN_RETRY_S / 2)
    assert not desk.work
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=lease.lease_id)))
    desk.after(PIN_RETRY_S)
    assert desk.finish_read().stored.id == "b"
    assert desk.core.deadline() is None


@pytest.mark.parametrize(("name", "tier", "code"), [("x", "ssd", Code.NOT_FOUND), ("m", "tape", Code.INVALID_REQUEST),
                                                    ("big", "dram", Code.TOO_LARGE),
                                                    ("bad", "ssd", Code.CHECKPOINT_CORRUPT)])  # fmt: skip
def test_what_cannot_be_pinned(name: str, tier: str, code: Code) -> None:
    desk = Desk(stored("m"), stored("big", 20), stored("bad", quarantined="chunk 7 differs"))
    assert pin(desk, name, tier).code is code
    assert not desk.work


def test_a_pin_to_the_ssd_keeps_an_import_from_evicting_it() -> None:
    desk = Desk(stored("old"), stored("new"), ssd_bytes=2 * stored("m").stored_bytes + 10, pins={"old": "ssd"})
    desk.post(ImportAsked(Import(source=source("m"), wait_s=9), "i"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, stored("m").stored_bytes))
    assert desk.take(RemoveCheckpoint).checkpoint_id == "new"


# -- verification, quarantine ------------------------------------------------------------------------------------------


def test_callers_share_a_verification_and_its_result_waits_for_those_between_two_polls() -> None:
    desk = Desk(stored("m", 4))
    desk.post(VerifyAsked(Verify(checkpoint_id="m", wait_s=0.5), "v1"))
    desk.post(VerifyAsked(Verify(checkpoint_id="m", wait_s=0.5), "v2"))
    check = desk.take(VerifyCheckpoint)
    desk.post(VerifyProgressed("m", 3 * CHUNK))
    desk.after(0.6)
    assert desk.last("v1") == desk.last("v2")
    assert isinstance(desk.last("v1"), Progress)
    assert desk.last("v1").done_bytes == 3 * CHUNK
    desk.post(VerifyDone(check.stored.id, 4, 1))
    desk.post(VerifyAsked(Verify(checkpoint_id="m"), "v1"))
    assert desk.last("v1") == Verified(chunks=4, repaired_chunks=1)
    assert not desk.work
    desk.post(VerifyAsked(Verify(checkpoint_id="x"), "v3"))
    assert desk.last("v3").code is Code.NOT_FOUND


def test_what_is_verified_can_be_loaded_but_not_evicted() -> None:
    desk = Desk(stored("m"))
    desk.post(VerifyAsked(Verify(checkpoint_id="m", wait_s=9), "v"))
    desk.take(VerifyCheckpoint)
    assert isinstance(hold(desk, "m", ttl_s=1), Lease)
    desk.after(2)
    assert evict(desk, "m", "ssd").code is Code.BUSY
    desk.post(VerifyDone("m", 1))
    assert desk.last("v") == Verified(chunks=1)
    assert evict(desk, "m", "ssd", "e2") is None


def test_what_turns_out_to_be_corrupt_is_in_no_tier_and_leased_bytes_stay_to_the_end() -> None:
    desk = Desk(stored("m", 3), stored("n", 6))
    lease = hold(desk, "m")
    desk.post(VerifyAsked(Verify(checkpoint_id="m", wait_s=9), "v"))
    desk.take(VerifyCheckpoint)
    desk.post(VerifyDone("m", 3, failure=CORRUPT))
    assert desk.last("v") == CORRUPT
    aside = desk.take(QuarantineCheckpoint)
    assert aside == QuarantineCheckpoint("m", "/store/m", "chunk 7 differs")
    record = desk.record()
    assert (record.ssd, record.dram, record.quarantined) == ({"n": 6 * CHUNK}, {}, {"m": "chunk 7 differs"})
    assert record.leased_bytes == 3 * CHUNK
    desk.acquire("n", "b", wait_s=9)
    desk.after(2)
    assert desk.last("b").code is Code.NO_CAPACITY, "the holder of the lease still uses its bytes"
    desk.post(RenewAsked(Renew(holder="w1", lease_ids=(lease.lease_id,), ttl_s=10), "r"))
    assert desk.last("r") == Renewed()
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=lease.lease_id)))
    assert desk.core.dram_used_bytes == 0
    desk.post(CheckpointQuarantined("m", "/store/quarantine/m"))
    assert evict(desk, "m", "ssd") is None
    assert desk.take(RemoveCheckpoint).directory == "/store/quarantine/m"
    desk.post(CheckpointRemoved("m"))
    assert desk.last("evict") == Done()
    assert desk.record().quarantined == {}


def test_a_load_that_runs_ends_before_what_it_reads_is_set_aside() -> None:
    desk = Desk(stored("m", 3))
    desk.acquire("m", wait_s=9)
    read = desk.take(ReadImage)
    desk.post(VerifyAsked(Verify(checkpoint_id="m", wait_s=9), "v"))
    desk.take(VerifyCheckpoint)
    desk.post(VerifyDone("m", 3, failure=CORRUPT))
    assert not desk.work
    assert desk.acquire("m", "b", holder="w2").code is Code.CHECKPOINT_CORRUPT
    desk.post(ReadFailed(read.job, CORRUPT))
    assert desk.last("a") == CORRUPT
    desk.take(QuarantineCheckpoint)
    assert desk.record().ssd == {}


def test_quarantined_and_partial_ones_go_first() -> None:
    whole, bad = stored("whole", 4), stored("bad", 4, quarantined="chunk 7 differs")
    part = stored("part", 4, arrived_bytes=CHUNK)
    desk = Desk(whole, part, bad, ssd_bytes=whole.stored_bytes + bad.stored_bytes + part.stored_bytes)
    for name, victim in (("i1", "bad"), ("i2", "part"), ("i3", "whole")):
        desk.post(ImportAsked(Import(source=source(name), wait_s=9), name))
        desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, bad.stored_bytes))
        assert desk.take(RemoveCheckpoint).checkpoint_id == victim
        desk.post(CheckpointRemoved(victim))
        if victim != "whole":
            run = desk.take(RunImport)
            desk.post(ImportDone(run.source, stored(name, 4), 1, 1.0))
            pin(desk, name, "ssd")
            desk.take(SavePins)


def test_an_eviction_ends_the_scrub_that_is_in_its_way() -> None:
    desk = Desk(stored("m"), scrub_interval_s=10.0)
    desk.after(11)
    scrub = desk.take(VerifyCheckpoint)
    assert evict(desk, "m", "ssd") is None
    assert desk.tells(StopJob) == [StopJob(scrub.job)]
    desk.post(VerifyDone("m", failure=STOPPED))
    desk.post(CheckpointRemoved(desk.take(RemoveCheckpoint).checkpoint_id))
    assert desk.last("evict") == Done()


def test_exports() -> None:
    desk = Desk(stored("m"))
    for caller in ("e1", "e2"):
        desk.post(ExportAsked(Export(checkpoint_id="m", url="s3://b/m", wait_s=9), caller))
    desk.post(ExportAsked(Export(checkpoint_id="m", url="s3://c/m", wait_s=9), "e3"))
    desk.post(ExportAsked(Export(checkpoint_id="m", url=""), "e4"))
    assert desk.last("e4").code is Code.INVALID_REQUEST
    first = desk.take(RunExport)
    assert not desk.work, "one at a time"
    desk.post(ExportDone("m", first.url))
    assert desk.last("e1") == desk.last("e2") == Done()
    second = desk.take(RunExport)
    refused = Failure(code=Code.FORBIDDEN, message="no")
    desk.post(ExportDone("m", second.url, refused))
    assert desk.last("e3") == refused


def test_no_secret_of_a_url_is_logged() -> None:
    desk = Desk(stored("m"))
    url = "s3://key:secret@b/m"
    desk.post(ExportAsked(Export(checkpoint_id="m", url=url, wait_s=9), "e"))
    desk.post(ExportDone("m", desk.take(RunExport).url, Failure(code=Code.INVALID_REQUEST, message="no")))
    assert [note.event for note in desk.notes] == ["export.failed"]
    assert "secret" not in str(desk.notes)


# -- marks -------------------------------------------------------------------------------------------------------------


def test_above_the_high_mark_the_least_valuable_copies_go_ahead_of_need() -> None:
    desk = Desk(*(stored(f"m{number}") for number in range(8)), dram_chunks=10, dram_high=0.6, dram_low=0.4)
    for number in range(6):
        use(desk, f"m{number}")
        use(desk, "m0")
    assert len(desk.record().dram) == 6
    use(desk, "m6")
    assert sorted(desk.record().dram) == ["m0", "m4", "m5", "m6"]


def test_above_the_high_mark_of_the_ssd_only_what_can_come_back_goes() -> None:
    one = stored("m").stored_bytes
    known = [stored("only", source=None), stored("a"), stored("b"), stored("leased")]
    desk = Desk(*known, ssd_bytes=5 * one, ssd_high=0.7, ssd_low=0.5)
    removed = [action.checkpoint_id for action in desk.work if isinstance(action, RemoveCheckpoint)]
    assert removed == []
    desk.post(None)
    assert [desk.take(RemoveCheckpoint).checkpoint_id for _ in range(2)] == ["a", "b"]


# -- what others see ---------------------------------------------------------------------------------------------------


def test_the_list_begins_with_what_would_go_last() -> None:
    desk = Desk(stored("idle"), stored("part", 4, arrived_bytes=CHUNK), stored("used"), stored("kept"),
                stored("bad", quarantined="chunk 7 differs"), pins={"kept": "ssd"})  # fmt: skip
    use(desk, "used")
    desk.now += 60
    desk.post(ListAsked(ListCheckpoints(), "l"))
    listed = desk.last("l")
    assert isinstance(listed, CheckpointList)
    assert [one.checkpoint.checkpoint_id for one in listed.checkpoints] == ["kept", "used", "idle", "part", "bad"]
    kept, used, idle, part, bad = listed.checkpoints
    assert (kept.pinned, used.leases, used.dram_bytes, used.ssd_bytes) == ("ssd", 0, CHUNK, CHUNK)
    assert used.idle_s == pytest.approx(60)
    assert used.uses_per_hour == pytest.approx(0.69, abs=0.02)
    assert (idle.idle_s, idle.uses_per_hour, idle.source) == (None, 0.0, source("idle"))
    assert (part.ssd_bytes, part.image_bytes) == (CHUNK, 4 * CHUNK)
    assert (bad.quarantined, bad.ssd_bytes) == ("chunk 7 differs", 0)


def test_the_record_tells_of_the_queue_and_how_long_it_takes() -> None:
    desk = Desk(stored("first", 256), stored("second", 512), stored("later"), dram_chunks=1000, ssd_bytes=10**8,
                peer_url="http://s1:7000")  # fmt: skip
    empty = desk.record()
    assert (empty.load_queue_bytes, empty.load_drain_s, empty.segment, empty.peer_url) == (
        0, 0.0, "/dev/shm/x", "http://s1:7000")  # fmt: skip
    desk.acquire("first", wait_s=9)
    assert desk.record().load_drain_s is None, "nothing is measured yet"
    read = desk.take(ReadImage)
    desk.post(ReadDone(read.job, 3.0, waited_s=1.0))
    assert desk.core.ssd_bytes_per_s == 256 * CHUNK / 2.0
    desk.acquire("second", "b", wait_s=9)
    desk.acquire("later", "c", wait_s=9)
    desk.post(ReadProgressed(desk.reading(), 256 * CHUNK))
    record = desk.record()
    assert record.load_queue_bytes == 257 * CHUNK
    assert record.load_drain_s == pytest.approx(2.0 + 2 / 256)
    assert (record.dram_arriving, record.loads) == ({"second": 256 * CHUNK}, 2)


def test_bytes_on_their_way_to_the_ssd_are_seen() -> None:
    desk = Desk()
    desk.acquire("m", id="", wait_s=9)
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", 4 * CHUNK, 4 * CHUNK + 100, "m"))
    run = desk.take(RunImport)
    desk.post(ImportProgressed(run.source, 2 * CHUNK, 4 * CHUNK))
    record = desk.record()
    assert (record.ssd_arriving, record.load_queue_bytes, record.load_drain_s) == ({"m": 2 * CHUNK}, 2 * CHUNK, None)


def test_an_operators_import_is_work_too_and_its_own_pace_tells_how_long_it_takes() -> None:
    desk = Desk()
    desk.post(ImportAsked(Import(source=source("m"), wait_s=9), "i"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", 8 * CHUNK, 8 * CHUNK + 100))
    run = desk.take(RunImport)
    desk.now += 6.0
    desk.post(ImportProgressed(run.source, 2 * CHUNK, 8 * CHUNK))
    record = desk.record()
    assert (record.loads, record.load_queue_bytes, record.load_drain_s) == (1, 6 * CHUNK, pytest.approx(18.0))


# -- the next life -----------------------------------------------------------------------------------------------------


def next_life(desk: Desk, *known: Any, there: bool = True, **more: Any) -> Desk:
    """`there`: whether the board says that what was arriving is all there; if not, the pool has let go of it."""
    assert desk.saved is not None
    state = decode_state(encode_state(desk.saved))
    if not there:
        copies = {copy.checkpoint_id for copy in state.copies}
        leases = tuple(one for one in state.leases if one.lease.checkpoint.checkpoint_id in copies)
        state = msgspec.structs.replace(state, kept=(), leases=leases)
    return Desk(*known, restored=state, **more)


def test_copies_and_leases_survive_the_process() -> None:
    desk = Desk(stored("a", 2), stored("b", 3), stored("c", 2))
    lease = hold(desk, "a", ttl_s=10)
    use(desk, "b")
    desk.acquire("c", arriving=True)
    early, arriving = desk.last("a"), desk.take(ReadImage)
    after = next_life(desk, stored("a", 2), stored("b", 3), stored("c", 2), there=False)
    assert after.core.deadline() == 0.0
    after.now = 5000.0
    after.post(None)
    record = after.record()
    assert record.dram == {"a": 2 * CHUNK, "b": 3 * CHUNK}
    assert record.leased_bytes == 2 * CHUNK
    after.after(9)
    after.post(RenewAsked(Renew(holder="w1", lease_ids=(lease.lease_id, early.lease_id), ttl_s=10), "r"))
    assert after.last("r") == Renewed(unknown=(early.lease_id,))
    fresh = after.acquire("a", "f")
    assert fresh.extents == lease.extents
    assert fresh.lease_id not in (lease.lease_id, early.lease_id)
    after.acquire("c", "g", wait_s=9)
    assert after.take(ReadImage).tag > arriving.tag
    after.post(ReleaseAsked(Release(holder="w1", lease_id=lease.lease_id)))
    after.after(100)
    assert after.core.lease_count == 0


def test_an_expired_lease_of_an_earlier_life_lets_its_copy_go() -> None:
    desk = Desk(stored("a", 8), stored("b", 8))
    hold(desk, "a", ttl_s=10)
    after = next_life(desk, stored("a", 8), stored("b", 8))
    after.post(None)
    after.after(11)
    assert after.core.lease_count == 0
    after.acquire("b", "b", wait_s=9)
    assert after.finish_read().stored.id == "b"
    assert after.saved is not None
    assert [copy.checkpoint_id for copy in after.saved.copies] == ["b"]


def test_what_the_ssd_tier_has_lost_is_not_taken_over() -> None:
    desk = Desk(stored("a", 2), stored("b", 3))
    hold(desk, "a")
    hold(desk, "b")
    after = next_life(desk, stored("b", 3), stored("a", 2, quarantined="chunk 7 differs"))
    after.post(None)
    assert (after.record().dram, after.core.lease_count) == ({"b": 3 * CHUNK}, 2)
    assert after.record().dram_used_bytes == 5 * CHUNK, "somebody works with those bytes"
    after.after(10_000)
    assert (after.core.lease_count, after.record().dram_used_bytes) == (0, 3 * CHUNK)
    smaller = next_life(desk, stored("a", 2), stored("b", 3), dram_chunks=7)
    smaller.post(None)
    assert (smaller.record().dram, smaller.core.lease_count) == ({}, 0)


@pytest.mark.parametrize("held", [True, False], ids=["held", "released"])
def test_bytes_that_had_all_arrived_when_the_store_died_stay_as_long_as_they_are_leased(held: bool) -> None:
    """Whoever saw the last of them on the board uses them, whether or not they ever came onto the SSD."""
    desk = Desk(dram_chunks=4)
    desk.acquire("m", id="", arriving=True, wait_s=9, ttl_s=10)
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", 3 * CHUNK, 3 * CHUNK + 100, "m"))
    run = desk.take(RunImport)
    desk.post(ImportOpened(run.source, stored("m", 3, source=run.source)))
    early = desk.last("a")
    assert isinstance(early, Lease) and early.arrival is not None
    assert desk.saved is not None
    assert [(one.tag, one.image_bytes, one.whole) for one in desk.saved.kept] == [(run.tag, 3 * CHUNK, False)]
    if not held:
        desk.post(ReleaseAsked(Release(holder="w1", lease_id=early.lease_id)))
    after = next_life(desk, stored("b", 4), dram_chunks=4)
    after.post(None)
    assert after.record().dram == {}
    after.acquire("b", "b", wait_s=20)
    if held:
        assert not any(isinstance(action, ReadImage) for action in after.work), "no chunk is free for it"
        after.post(RenewAsked(Renew(holder="w1", lease_ids=(early.lease_id,), ttl_s=10), "r"))
        assert after.last("r") == Renewed()
        after.post(ReleaseAsked(Release(holder="w1", lease_id=early.lease_id)))
    assert after.take(ReadImage).stored.id == "b"


def test_a_state_that_contradicts_itself_is_taken_over_as_far_as_it_goes() -> None:
    desk = Desk(stored("a", 2), stored("b", 3))
    hold(desk, "a")
    state = desk.saved
    assert state is not None
    twice = PoolState(
        version=state.version, chunk_bytes=CHUNK, chunk_count=8, next_tag=9, next_lease=9,
        copies=(state.copies[0], type(state.copies[0])(checkpoint_id="b", extents=state.copies[0].extents)),
    )  # fmt: skip
    after = Desk(stored("a", 2), stored("b", 1), restored=twice)
    after.post(None)
    assert after.record().dram == {"a": 2 * CHUNK}


def test_the_state_is_saved_before_anything_that_relies_on_it() -> None:
    desk = Desk(stored("a", 5), stored("b", 5))
    use(desk, "a")
    assert desk.saved is not None
    assert [copy.checkpoint_id for copy in desk.saved.copies] == ["a"]
    desk.acquire("b", wait_s=9)
    read = desk.take(ReadImage)
    assert desk.saved.copies == (), "its chunks are about to be overwritten"
    assert desk.saved.next_tag > read.tag
    desk.post(ReadDone(read.job, 0.1))
    assert [one.lease.lease_id for one in desk.saved.leases] == [desk.last("a").lease_id]


def test_trim_takes_what_is_worth_least() -> None:
    known = [stored("pinned"), stored("old"), stored("new"), stored("part", arrived_bytes=1),
             stored("bad", quarantined="chunk 7 differs")]  # fmt: skip
    one = known[0].stored_bytes
    for room, gone in ((5, []), (4, ["bad"]), (3, ["bad", "part"]), (1, ["bad", "part", "old", "new"])):
        keep, go = trim(known, room * one, {"pinned": "ssd"})
        assert [stored.id for stored in go] == gone
        assert [stored.id for stored in keep] == [stored.id for stored in known if stored.id not in gone]
