"""The store's core: what it answers, what it wants done, and that its invariants hold whatever happens."""

from __future__ import annotations

import pytest

from services.store.events import (
    AcquireAsked,
    BusBack,
    BusLost,
    CheckpointQuarantined,
    CheckpointRemoved,
    DrainAsked,
    EvictAsked,
    ImportAsked,
    ImportDone,
    ImportFailed,
    ImportPlanned,
    ImportProgressed,
    InspectAsked,
    InspectFailed,
    InspectSource,
    PlanImport,
    QuarantineCheckpoint,
    ReadFailed,
    ReadImage,
    ReadProgressed,
    ReleaseAsked,
    RemoveCheckpoint,
    RenewAsked,
    RunImport,
    SourceInspected,
)
from services.store.loads import ROOM_GRACE_S
from services.store.residency import trim
from services.store.wants import INTEREST_S
from shared.contracts.records import Phase
from shared.contracts.residency import (
    Acquire,
    Done,
    Evict,
    Import,
    Imported,
    Inspect,
    Inspected,
    Lease,
    Progress,
    Release,
    Renew,
    Renewed,
)
from shared.errors import Code, Failure
from shared.sizes import size
from tests.unit.store.desk import CHUNK, Desk, source, stored


def test_hit_in_dram_is_leased_at_once() -> None:
    desk = Desk(stored("m", 2))
    assert desk.acquire("m") is None
    desk.finish_read(0.25)
    first = desk.last("a")
    assert isinstance(first, Lease)
    assert (first.tier, first.read_s, first.ssd_bytes) == ("ssd", 0.25, 2 * CHUNK)
    second = desk.acquire("m", "b", holder="w2")
    assert isinstance(second, Lease)
    assert (second.tier, second.read_s, second.ssd_bytes, second.dram_bytes) == ("dram", 0.0, 0, 2 * CHUNK)
    assert second.extents == first.extents
    assert second.lease_id != first.lease_id


def test_every_answer_is_a_lease_of_its_own_and_expires_on_its_own() -> None:
    desk = Desk(stored("m"))
    desk.acquire("m", ttl_s=10)
    desk.finish_read()
    first = desk.last("a")
    desk.after(8)
    second = desk.acquire("m", ttl_s=10)
    assert second.lease_id != first.lease_id
    assert desk.core.lease_count == 2
    desk.after(3)
    assert desk.core.lease_count == 1
    assert [note.event for note in desk.notes][-1] == "lease.expired"
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=first.lease_id)))
    assert desk.core.lease_count == 1
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=second.lease_id)))
    assert desk.core.lease_count == 0


def test_equal_acquires_at_once_are_all_answered_in_their_time() -> None:
    desk = Desk(stored("m"))
    desk.acquire("m", "c1", wait_s=0.5)
    desk.acquire("m", "c2", wait_s=2)
    desk.after(0.6)
    assert isinstance(desk.last("c1"), Progress)
    assert desk.last("c2") is None
    desk.acquire("m", "c1", wait_s=2)
    desk.finish_read()
    assert desk.last("c1").lease_id != desk.last("c2").lease_id


def test_renew_and_release() -> None:
    desk = Desk(stored("m"))
    desk.acquire("m")
    desk.finish_read()
    lease_id = desk.last("a").lease_id
    desk.after(9)
    desk.post(RenewAsked(Renew(holder="w1", lease_ids=(lease_id, "n-77"), ttl_s=10), "r"))
    assert desk.last("r") == Renewed(unknown=("n-77",))
    desk.post(RenewAsked(Renew(holder="somebody", lease_ids=(lease_id,), ttl_s=10), "r"))
    assert desk.last("r") == Renewed(unknown=(lease_id,))
    desk.post(ReleaseAsked(Release(holder="somebody", lease_id=lease_id)))
    assert desk.core.lease_count == 1
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=lease_id)))
    assert desk.core.lease_count == 0


def test_equal_loads_are_read_once_and_every_caller_gets_a_lease() -> None:
    desk = Desk(stored("m"))
    for number in range(3):
        desk.acquire("m", f"c{number}", holder=f"w{number}")
    desk.finish_read()
    assert not desk.work
    assert len({desk.last(f"c{number}").lease_id for number in range(3)}) == 3


def test_reads_go_one_after_another_in_the_order_asked() -> None:
    desk = Desk(stored("a"), stored("b"))
    desk.acquire("a", "ca")
    desk.acquire("b", "cb")
    assert len(desk.work) == 1
    desk.finish_read()
    assert isinstance(desk.last("ca"), Lease)
    assert desk.last("cb") is None
    desk.finish_read()
    assert desk.last("cb").checkpoint.checkpoint_id == "b"


def test_a_poll_is_answered_with_progress_and_repeated() -> None:
    desk = Desk(stored("m", 4))
    desk.acquire("m", wait_s=1.0)
    desk.after(0.2)
    desk.post(ReadProgressed(desk.reading(), 2 * CHUNK))
    desk.after(0.8)
    progress = desk.last("a")
    assert progress == Progress(phase="reading", done_bytes=2 * CHUNK, total_bytes=4 * CHUNK, eta_s=pytest.approx(1.0))
    desk.acquire("m", wait_s=1.0)
    desk.finish_read()
    assert isinstance(desk.last("a"), Lease)


def test_no_estimate_before_two_chunks_and_fifty_milliseconds() -> None:
    desk = Desk(stored("m", 4))
    desk.acquire("m", deployment="d")
    for at, done in ((0.01, 3 * CHUNK), (0.5, CHUNK)):
        desk.now += at
        desk.post(ReadProgressed(desk.reading(), done))
    assert [one.progress.eta_s for one in desk.published][:1] == [None]
    fresh = Desk(stored("m", 4))
    fresh.acquire("m", wait_s=0.5)
    fresh.now += 0.4
    fresh.post(ReadProgressed(fresh.reading(), CHUNK))
    fresh.after(0.2)
    assert fresh.last("a").eta_s is None


def test_progress_hints_are_at_least_100_ms_apart() -> None:
    desk = Desk(stored("m", 8))
    desk.acquire("m", deployment="slug-1")
    for number in range(1, 8):
        desk.now += 0.04
        desk.post(ReadProgressed(desk.reading(), number * CHUNK))
    assert [one.deployment for one in desk.published] == ["slug-1"] * 3


def test_a_holder_between_two_polls_keeps_its_lease_and_its_ledger() -> None:
    desk = Desk(stored("m"))
    desk.acquire("m", wait_s=0.5)
    desk.after(0.6)
    assert isinstance(desk.last("a"), Progress)
    desk.finish_read(0.4)
    assert desk.core.lease_count == 1
    assert desk.acquire("m").read_s == 0.4
    assert desk.core.lease_count == 1


def test_a_caller_that_never_comes_back_leaves_nothing() -> None:
    desk = Desk(stored("m"), stored("n"))
    desk.acquire("m", "c1", wait_s=0.5)
    desk.acquire("n", "c2", wait_s=0.5)  # queued behind m
    desk.after(0.5 + INTEREST_S)
    desk.finish_read()
    assert not desk.work, "nobody waits for n any more"
    assert desk.core.lease_count == 0
    assert desk.core.deadline() is None


def test_least_recently_used_goes_first_and_leased_never() -> None:
    desk = Desk(stored("a", 2), stored("b", 2), stored("c", 2), dram_chunks=4)
    desk.acquire("a", ttl_s=1000)
    desk.finish_read()
    kept = desk.last("a")
    desk.acquire("b", "cb", holder="w2")
    desk.finish_read()
    desk.post(ReleaseAsked(Release(holder="w2", lease_id=desk.last("cb").lease_id)))
    desk.acquire("c", "cc", holder="w3", ttl_s=1000)
    desk.finish_read()
    record = desk.core.record(Phase.READY, host="h", pid=1)
    assert sorted(record.dram) == ["a", "c"]
    assert record.leased_bytes == 4 * CHUNK
    assert desk.acquire("b", "cb2", holder="w2", wait_s=5) is None
    desk.after(ROOM_GRACE_S)
    failure = desk.last("cb2")
    assert failure.code is Code.NO_CAPACITY
    assert failure.kind.retryable
    assert isinstance(desk.acquire("a"), Lease)
    assert desk.last("a").extents == kept.extents


def test_room_that_is_released_within_the_grace_is_used() -> None:
    desk = Desk(stored("a", 4), stored("b", 4), dram_chunks=4)
    desk.acquire("a", "ca")
    desk.finish_read()
    desk.acquire("b", "cb", holder="w2", wait_s=5)
    desk.after(ROOM_GRACE_S / 2)
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=desk.last("ca").lease_id)))
    desk.finish_read()
    assert desk.last("cb").checkpoint.checkpoint_id == "b"


def test_model_larger_than_the_pool_names_both_numbers() -> None:
    desk = Desk(stored("m", 9), dram_chunks=8)
    failure = desk.acquire("m")
    assert failure.code is Code.TOO_LARGE
    assert size(9 * CHUNK) in failure.message
    assert size(8 * CHUNK) in failure.message
    # It may stream all the same: importing it makes sense, if the SSD tier holds it.
    desk.post(InspectAsked(Inspect(source=source("n")), "i"))
    desk.post(SourceInspected(desk.take(InspectSource).reply, "LlamaForCausalLM", 1, 9 * CHUNK, 10))
    assert isinstance(desk.last("i"), Inspected)
    desk.post(InspectAsked(Inspect(source=source("n")), "i"))
    desk.post(SourceInspected(desk.take(InspectSource).reply, "LlamaForCausalLM", 1, CHUNK, 1_000_001))
    assert desk.last("i").code is Code.TOO_LARGE


def test_inspect_answers_or_refuses() -> None:
    desk = Desk()
    for caller in ("i1", "i2"):
        desk.post(InspectAsked(Inspect(source=source(caller)), caller))
    desk.post(SourceInspected("i1", "LlamaForCausalLM", 77, CHUNK, CHUNK))
    desk.post(InspectFailed("i2", Failure(code=Code.INVALID_CHECKPOINT, message="no config.json")))
    assert desk.last("i1") == Inspected(architecture="LlamaForCausalLM", weight_bytes=77)
    assert desk.last("i2").code is Code.INVALID_CHECKPOINT


def test_import_then_load_of_what_is_in_no_tier() -> None:
    desk = Desk()
    desk.acquire("m", id="", wait_s=20, deployment="d")
    src = desk.take(PlanImport).source
    desk.post(ImportPlanned(src, "r1", CHUNK, CHUNK + 200))
    assert desk.take(RunImport).revision == "r1"
    desk.now += 0.5
    desk.post(ImportProgressed(src, CHUNK // 2, CHUNK))
    desk.post(ImportDone(src, stored("m"), remote_bytes=CHUNK, seconds=0.7))
    desk.finish_read(0.1)
    lease = desk.last("a")
    assert (lease.tier, lease.import_s, lease.read_s, lease.remote_bytes, lease.ssd_bytes) == (
        "remote",
        0.7,
        0.1,
        CHUNK,
        CHUNK,
    )
    assert "importing" in [one.progress.phase for one in desk.published]
    # From now on the source is known by name.
    assert desk.acquire("m", "b", id="", holder="w2").tier == "dram"


def test_imports_of_one_source_are_done_once() -> None:
    desk = Desk()
    for caller in ("i1", "i2"):
        desk.post(ImportAsked(Import(source=source("m")), caller))
    desk.acquire("m", wait_s=5)
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, CHUNK))
    desk.post(ImportDone(desk.take(RunImport).source, stored("m"), remote_bytes=CHUNK, seconds=1))
    assert desk.last("i1") == desk.last("i2") == Imported(checkpoint=stored("m").checkpoint)
    desk.finish_read()
    assert isinstance(desk.last("a"), Lease)
    # Asking again looks at the source, finds it unchanged, and copies nothing.
    desk.post(ImportAsked(Import(source=source("m")), "i3"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, CHUNK))
    assert desk.last("i3") == desk.last("i1")
    assert not desk.work


def test_a_source_that_holds_something_else_now_is_refused() -> None:
    desk = Desk()
    desk.acquire("m", id="the-old-one", wait_s=5)
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r2", CHUNK, CHUNK))
    desk.post(ImportDone(desk.take(RunImport).source, stored("m"), remote_bytes=CHUNK, seconds=1))
    assert desk.last("a").code is Code.CHECKPOINT_UNAVAILABLE
    assert not desk.work


def test_failed_import_reaches_waiting_callers_and_those_between_two_polls() -> None:
    desk = Desk()
    failure = Failure(code=Code.INVALID_CHECKPOINT, message="truncated")
    desk.post(ImportAsked(Import(source=source("m"), wait_s=0.5), "i1"))
    desk.acquire("m", "a", wait_s=5)
    desk.after(0.6)
    assert desk.last("i1") == Progress(phase="queued")
    desk.post(ImportFailed(desk.take(PlanImport).source, failure))
    assert desk.last("a") == failure
    desk.post(ImportAsked(Import(source=source("m")), "i1"))
    assert desk.last("i1") == failure
    # Told once; the next call tries again.
    desk.post(ImportAsked(Import(source=source("m")), "i1"))
    desk.take(PlanImport)


def test_ssd_room_is_made_before_the_import_runs() -> None:
    old, newer = stored("old"), stored("newer")
    desk = Desk(old, newer, ssd_bytes=old.stored_bytes * 2 + 10)
    desk.post(ImportAsked(Import(source=source("m"), wait_s=9), "i"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, stored("m").stored_bytes))
    removal = desk.take(RemoveCheckpoint)
    assert removal.checkpoint_id == "old"
    assert not desk.work, "the import waits for the room"
    desk.post(CheckpointRemoved("old"))
    desk.post(ImportDone(desk.take(RunImport).source, stored("m"), remote_bytes=1, seconds=1))
    assert isinstance(desk.last("i"), Imported)
    assert sorted(desk.core.record(Phase.READY, host="h", pid=1).ssd) == ["m", "newer"]


def test_import_is_refused_when_the_ssd_tier_is_leased_or_too_small() -> None:
    desk = Desk(stored("a"), ssd_bytes=stored("a").stored_bytes + 10)
    desk.acquire("a")
    desk.finish_read()
    desk.post(ImportAsked(Import(source=source("m")), "i"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, CHUNK))
    assert desk.last("i").code is Code.NO_CAPACITY
    desk.post(ImportAsked(Import(source=source("m")), "i"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, 10 * CHUNK))
    assert desk.last("i").code is Code.TOO_LARGE
    assert isinstance(desk.acquire("a"), Lease)


def test_evict() -> None:
    desk = Desk(stored("m"))
    desk.acquire("m")
    desk.post(EvictAsked(Evict(checkpoint_id="m", tier="dram"), "e"))
    assert desk.last("e").code is Code.BUSY
    desk.finish_read()
    desk.post(EvictAsked(Evict(checkpoint_id="m", tier="dram"), "e"))
    assert desk.last("e").code is Code.BUSY
    desk.post(ReleaseAsked(Release(holder="w1", lease_id=desk.last("a").lease_id)))
    desk.post(EvictAsked(Evict(checkpoint_id="m", tier="floppy"), "e"))
    assert desk.last("e").code is Code.INVALID_REQUEST
    desk.post(EvictAsked(Evict(checkpoint_id="m", tier="dram"), "e"))
    assert desk.last("e") == Done()
    assert desk.core.dram_used_bytes == 0
    desk.post(EvictAsked(Evict(checkpoint_id="m", tier="ssd"), "e2"))
    assert desk.last("e2") is None
    assert desk.core.ssd_used_bytes > 0, "the bytes are not free before the directory is gone"
    desk.post(CheckpointRemoved(desk.take(RemoveCheckpoint).checkpoint_id))
    assert desk.last("e2") == Done()
    assert desk.core.ssd_used_bytes == 0
    desk.post(EvictAsked(Evict(checkpoint_id="m", tier="ssd"), "e3"))
    assert desk.last("e3") == Done()


def test_corrupt_bytes_are_never_claimed_and_the_next_caller_causes_a_fresh_import() -> None:
    desk = Desk(stored("m"))
    desk.acquire("m")
    read = desk.take(ReadImage)
    desk.post(ReadFailed(read.job, Failure(code=Code.CHECKPOINT_CORRUPT, message="chunk 0 differs")))
    assert desk.last("a").code is Code.CHECKPOINT_CORRUPT
    assert desk.core.dram_used_bytes == 0
    aside = desk.take(QuarantineCheckpoint)
    assert (aside.checkpoint_id, aside.reason) == ("m", "chunk 0 differs")
    record = desk.record()
    assert (record.dram, record.ssd, record.quarantined) == ({}, {}, {"m": "chunk 0 differs"})
    assert record.ssd_used_bytes == stored("m").stored_bytes
    desk.acquire("m", wait_s=9)
    assert not desk.work, "no import while the directory is being moved"
    desk.post(CheckpointQuarantined("m", "/store/quarantine/m"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, CHUNK + 100))
    run = desk.take(RunImport)
    desk.post(ImportDone(run.source, stored("m"), remote_bytes=CHUNK, seconds=1.0, in_dram=True))
    assert isinstance(desk.last("a"), Lease)
    removal = desk.take(RemoveCheckpoint)
    assert removal.directory == "/store/quarantine/m"
    assert desk.record().quarantined == {}
    desk.post(CheckpointRemoved("m"))
    assert desk.core.ssd_used_bytes == stored("m").stored_bytes


def test_whoever_asks_for_what_is_in_quarantine_hears_why_if_it_cannot_be_imported_again() -> None:
    desk = Desk(stored("m", quarantined="chunk 3 differs"))
    desk.acquire("m", wait_s=9)
    failure = Failure(code=Code.CHECKPOINT_UNAVAILABLE, message="the source is gone")
    desk.post(ImportFailed(desk.take(PlanImport).source, failure))
    assert desk.last("a").code is Code.CHECKPOINT_CORRUPT
    assert "chunk 3 differs" in desk.last("a").message
    assert "the source is gone" in desk.last("a").message


def test_an_unreadable_disk_fails_the_load_and_keeps_the_checkpoint() -> None:
    desk = Desk(stored("m"))
    desk.acquire("m")
    read = desk.take(ReadImage)
    desk.post(ReadFailed(read.job, Failure(code=Code.CHECKPOINT_UNAVAILABLE, message="input/output error")))
    assert desk.last("a").code is Code.CHECKPOINT_UNAVAILABLE
    desk.acquire("m")
    desk.finish_read()
    assert isinstance(desk.last("a"), Lease)


def test_import_that_met_what_was_then_evicted_runs_again() -> None:
    desk = Desk(stored("m"))
    other = source("copy-of-m")
    desk.post(ImportAsked(Import(source=other, wait_s=9), "i"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r9", CHUNK, CHUNK))
    desk.take(RunImport)
    desk.post(EvictAsked(Evict(checkpoint_id="m", tier="ssd"), "e"))
    desk.post(ImportDone(other, stored("m"), remote_bytes=1, seconds=1, existing=True))
    assert desk.last("i") is None
    desk.post(CheckpointRemoved(desk.take(RemoveCheckpoint).checkpoint_id))
    desk.take(PlanImport)


def test_drain_tells_everybody_and_takes_nothing_new() -> None:
    desk = Desk(stored("m"))
    desk.acquire("m")
    desk.post(ImportAsked(Import(source=source("n")), "i"))
    desk.post(DrainAsked())
    assert desk.last("a").code is Code.DRAINING
    assert desk.last("i").code is Code.DRAINING
    assert desk.acquire("m", "late").code is Code.DRAINING


@pytest.mark.parametrize(
    "message",
    [
        Acquire(checkpoint_id="m", source=source("m"), holder="w", ttl_s=0),
        Acquire(checkpoint_id="m", source=source("m"), holder="w", ttl_s=float("nan")),
        Acquire(checkpoint_id="m", source=source("m"), holder="w", ttl_s=1, deployment="a.b"),
    ],
)
def test_malformed_acquire_is_refused(message: Acquire) -> None:
    desk = Desk(stored("m"))
    desk.post(AcquireAsked(message, "a"))
    assert desk.last("a").code is Code.INVALID_REQUEST


def test_bandwidth_is_measured_from_reads_that_are_large_enough() -> None:
    desk = Desk(stored("small"), stored("big", 512), dram_chunks=600, ssd_bytes=10**8)
    desk.acquire("small")
    desk.finish_read(0.001)
    assert desk.core.ssd_bytes_per_s is None
    desk.acquire("big")
    desk.finish_read(0.5)
    assert desk.core.ssd_bytes_per_s == 512 * CHUNK / 0.5


def test_trim_keeps_the_most_recently_used() -> None:
    known = [stored("oldest"), stored("middle"), stored("newest")]
    keep, go = trim(known, 2 * known[0].stored_bytes)
    assert [one.id for one in keep] == ["middle", "newest"]
    assert [one.id for one in go] == ["oldest"]


def test_what_is_removed_leaves_no_memory_of_its_sources() -> None:
    desk = Desk(*(stored(f"m{number}") for number in range(5)))
    for number in range(5):
        desk.post(EvictAsked(Evict(checkpoint_id=f"m{number}", tier="ssd"), f"e{number}"))
    ssd = desk.core._tiers.ssd
    assert (ssd._by_source, ssd._by_revision, ssd._names) == ({}, {}, {})


def test_no_lease_expires_while_nobody_can_renew_it() -> None:
    desk = Desk(stored("m"), stored("x"), dram_chunks=1)
    desk.acquire("m", ttl_s=10)
    desk.finish_read()
    desk.after(8)
    desk.post(BusLost())
    desk.after(1000)
    assert desk.core.lease_count == 1
    desk.post(BusBack())
    # The first call after the outage finds the bytes still promised: their holder has its time to renew.
    desk.acquire("x", "b", wait_s=5.0)
    desk.after(9)
    assert desk.last("b").code is Code.NO_CAPACITY
    desk.after(2)
    assert desk.core.lease_count == 0
