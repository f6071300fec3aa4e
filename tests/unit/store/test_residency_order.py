"""Who goes first: users, operators, prefetches, scrubbing; in loads, imports and verifications."""

from __future__ import annotations

from services.store.events import (
    PRIORITY_OPERATOR,
    PRIORITY_PREFETCH,
    PRIORITY_SCRUB,
    PRIORITY_USER,
    DrainAsked,
    ImportAsked,
    ImportDone,
    ImportFailed,
    ImportPlanned,
    PlanImport,
    PrefetchAsked,
    ReadDone,
    ReadFailed,
    ReadImage,
    RunImport,
    SetPriority,
    StopJob,
    VerifyAsked,
    VerifyCheckpoint,
    VerifyDone,
    peers_only,
)
from services.store.imports import PLANS_LIMIT
from services.store.wants import INTEREST_S
from shared.contracts.residency import Done, Import, Lease, Prefetch, Verified, Verify
from shared.errors import Code, Failure
from tests.unit.store.desk import CHUNK, Desk, source, stored

STOPPED = Failure(code=Code.CANCELLED, message="stopped")


def prefetch(desk: Desk, name: str, caller: str = "p", *, tier: str = "dram", wait_s: float = 9.0) -> None:
    desk.post(PrefetchAsked(Prefetch(checkpoint_id=name, tier=tier, wait_s=wait_s), caller))


def test_a_user_goes_beside_a_prefetch_that_reads_and_before_one_that_is_queued() -> None:
    desk = Desk(stored("a"), stored("b"), stored("c"))
    prefetch(desk, "a", "pa")
    prefetch(desk, "b", "pb")
    desk.acquire("c")
    first, user = desk.take(ReadImage), desk.take(ReadImage)
    assert (first.stored.id, first.priority) == ("a", PRIORITY_PREFETCH)
    assert (user.stored.id, user.priority) == ("c", PRIORITY_USER)
    desk.post(ReadDone(first.job, 0.1))
    assert desk.last("pa") == Done()
    assert not desk.work, "b stays behind the user"
    desk.post(ReadDone(user.job, 0.1))
    assert desk.finish_read().stored.id == "b"
    prefetch(desk, "b", "again")
    assert desk.last("again") == Done()


def test_a_prefetch_that_a_user_asks_for_is_raised_and_falls_back_when_nobody_waits() -> None:
    desk = Desk(stored("m", 4))
    prefetch(desk, "m", wait_s=0.1)
    read = desk.take(ReadImage)
    desk.acquire("m", wait_s=0.5)
    assert desk.tells(SetPriority) == [SetPriority(read.job, PRIORITY_USER)]
    desk.after(1 + INTEREST_S)
    assert desk.tells(SetPriority)[1:] == [SetPriority(read.job, PRIORITY_PREFETCH)]
    desk.post(ReadDone(read.job, 0.1))
    assert desk.record().dram == {"m": 4 * CHUNK}, "what has begun goes on though nobody wants it"


def test_a_queued_prefetch_that_nobody_wants_is_not_begun() -> None:
    desk = Desk(stored("a"), stored("b"))
    desk.acquire("a")
    prefetch(desk, "b", wait_s=0.1)
    desk.after(1 + INTEREST_S)
    desk.finish_read()
    assert not desk.work


def test_a_prefetch_makes_room_for_a_user_and_begins_again_afterwards() -> None:
    desk = Desk(stored("a", 5), stored("b", 5))
    prefetch(desk, "a")
    read = desk.take(ReadImage)
    desk.acquire("b", wait_s=9, ttl_s=1)
    assert desk.tells(StopJob) == [StopJob(read.job)]
    # Nobody is given a lease on what is being stopped.
    assert desk.acquire("a", "c", holder="w2", arriving=True, wait_s=20) is None
    desk.post(ReadFailed(read.job, STOPPED))
    assert desk.finish_read().stored.id == "a", "it was raised meanwhile, and came first"
    assert isinstance(desk.last("c"), Lease)


def test_a_stopped_prefetch_that_nobody_raised_waits_behind_the_user() -> None:
    desk = Desk(stored("a", 5), stored("b", 5))
    prefetch(desk, "a", wait_s=20)
    read = desk.take(ReadImage)
    desk.acquire("b", wait_s=9, ttl_s=0.5)
    desk.post(ReadFailed(read.job, STOPPED))
    assert desk.finish_read().stored.id == "b"
    desk.after(1)
    assert desk.finish_read().stored.id == "a"
    assert desk.last("p") == Done()


def test_an_import_for_a_user_goes_before_a_deploy_and_that_before_a_prefetch() -> None:
    desk = Desk()
    desk.post(ImportAsked(Import(source=source("first"), wait_s=9), "i1"))
    for name, caller in (("p1", "p1"), ("p2", "p2")):
        desk.post(PrefetchAsked(Prefetch(source=source(name), tier="ssd", wait_s=9), caller))
    desk.post(ImportAsked(Import(source=source("deploy"), wait_s=9), "i2"))
    desk.acquire("user", id="", wait_s=9)
    for _ in range(5):
        plan = desk.take(PlanImport)
        desk.post(ImportPlanned(plan.source, "r1", CHUNK, CHUNK + 100))
    # The user's does not wait for the one that runs already; the others wait for their turn.
    assert [run.source.url for run in desk.work] == ["/models/first", "/models/user"]
    order = []
    while desk.work:
        run = desk.take(RunImport)
        order.append(run.source.url.rsplit("/", 1)[1])
        desk.post(ImportFailed(run.source, Failure(code=Code.CHECKPOINT_UNAVAILABLE, message="gone")))
    assert order == ["first", "user", "deploy", "p1", "p2"]


def test_a_source_that_does_not_answer_delays_no_other() -> None:
    desk = Desk()
    for number in range(PLANS_LIMIT + 2):
        desk.post(PrefetchAsked(Prefetch(source=source(f"silent{number}"), tier="ssd", wait_s=9), f"p{number}"))
    assert len(desk.work) == PLANS_LIMIT, "not without end"
    desk.acquire("silent", id="", wait_s=9)
    desk.acquire("user", id="", wait_s=9)
    assert [plan.source.url for plan in desk.work[PLANS_LIMIT:]] == ["/models/silent", "/models/user"]
    desk.post(ImportPlanned(desk.work.pop().source, "r1", CHUNK, CHUNK + 100))
    assert desk.work.pop().source == source("user"), "it runs"


def test_an_import_is_raised_by_a_user() -> None:
    desk = Desk()
    desk.post(PrefetchAsked(Prefetch(source=source("m"), tier="ssd", wait_s=9), "p"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, CHUNK + 100))
    run = desk.take(RunImport)
    assert (run.priority, run.extents) == (PRIORITY_PREFETCH, ())
    desk.acquire("m", id="", wait_s=9)
    assert desk.tells(SetPriority) == [SetPriority(run.job, PRIORITY_USER)]
    desk.post(ImportDone(run.source, stored("m"), 1, 1.0))
    assert desk.last("p") == Done()
    assert desk.finish_read().priority == PRIORITY_USER


def test_a_prefetch_without_a_source_asks_the_peers() -> None:
    desk = Desk()
    prefetch(desk, "m", tier="ssd")
    plan = desk.take(PlanImport)
    assert (plan.source, plan.checkpoint_id) == (peers_only("m"), "m")
    desk.post(ImportPlanned(plan.source, "r1", CHUNK, CHUNK + 100, "m"))
    desk.post(ImportDone(desk.take(RunImport).source, stored("m"), 0, 1.0, peer_bytes=CHUNK))
    assert desk.last("p") == Done()
    desk.post(PrefetchAsked(Prefetch(), "q"))
    assert desk.last("q").code is Code.INVALID_REQUEST
    desk.post(PrefetchAsked(Prefetch(checkpoint_id="m", tier="tape"), "q"))
    assert desk.last("q").code is Code.INVALID_REQUEST


def test_two_sources_of_one_checkpoint_do_not_fetch_into_the_same_place() -> None:
    desk = Desk()
    desk.post(PrefetchAsked(Prefetch(source=source("m"), tier="ssd", wait_s=9), "p"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, CHUNK + 100, "m"))
    run = desk.take(RunImport)
    desk.post(ImportAsked(Import(source=source("mirror"), wait_s=9), "i"))
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", CHUNK, CHUNK + 100, "m"))
    assert not desk.work
    desk.post(ImportDone(run.source, stored("m"), 1, 1.0))
    assert desk.last("i").checkpoint.checkpoint_id == "m"
    assert not desk.work


# -- scrubbing ---------------------------------------------------------------------------------------------------------


def test_scrubbing_is_spread_over_its_interval_and_waits_for_users() -> None:
    desk = Desk(stored("a"), stored("b"), scrub_interval_s=100.0, scrub_bytes_per_s=77)
    desk.after(49)
    assert not desk.work
    desk.after(2)
    scrub = desk.take(VerifyCheckpoint)
    assert (scrub.stored.id, scrub.priority, scrub.bytes_per_s) == ("a", PRIORITY_SCRUB, 77)
    desk.after(60)
    assert not desk.work, "one at a time"
    desk.acquire("b", wait_s=9)
    read = desk.take(ReadImage)
    desk.post(VerifyDone("a", 1))
    assert not desk.work, "not while a user waits"
    desk.post(ReadDone(read.job, 0.1))
    assert desk.take(VerifyCheckpoint).stored.id == "b"
    desk.post(VerifyDone("b", 1, 1))
    assert [note.facts["repaired_chunks"] for note in desk.notes if note.event == "checkpoint.verified"] == [0, 1]
    desk.after(95)
    assert not desk.work
    desk.after(6)
    assert desk.take(VerifyCheckpoint).stored.id == "a"


def test_an_operator_takes_the_place_of_a_scrub() -> None:
    desk = Desk(stored("a"), stored("b"), scrub_interval_s=100.0)
    desk.after(51)
    scrub = desk.take(VerifyCheckpoint)
    for name in ("a", "b"):
        desk.post(VerifyAsked(Verify(checkpoint_id=name, wait_s=9), name))
    assert desk.tells(StopJob) == [StopJob(scrub.job)]
    desk.post(VerifyDone("a", failure=STOPPED))
    checks = []
    for _ in range(2):
        check = desk.take(VerifyCheckpoint)
        assert (check.priority, check.bytes_per_s) == (PRIORITY_OPERATOR, 0)
        checks.append(check.stored.id)
        desk.post(VerifyDone(check.stored.id, 1))
    assert sorted(checks) == ["a", "b"]
    assert desk.last("a") == desk.last("b") == Verified(chunks=1)


def test_no_scrub_begins_while_the_store_drains() -> None:
    desk = Desk(stored("a"), scrub_interval_s=100.0)
    desk.post(DrainAsked())
    desk.after(1000)
    assert not desk.work
    assert desk.core.deadline() is None
