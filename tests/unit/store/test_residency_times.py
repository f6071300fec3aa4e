"""What a load takes, as its lease and the server's record tell: the queue, and the bytes on their way."""

from __future__ import annotations

import pytest

from services.store.events import (
    ImportDone,
    ImportOpened,
    ImportPlanned,
    ImportProgressed,
    PlanImport,
    PrefetchAsked,
    ReadDone,
    ReadImage,
    ReadProgressed,
    RunImport,
)
from shared.contracts.residency import Lease, Prefetch
from tests.unit.store.desk import CHUNK, Desk, source, stored


def times(lease: object) -> tuple[float, float, int]:
    assert isinstance(lease, Lease)
    return round(lease.wait_s, 6), round(lease.moved_s, 6), lease.moved_bytes


def test_a_lease_on_what_is_in_dram_took_nothing() -> None:
    desk = Desk(stored("m", 3))
    desk.acquire("m")
    desk.finish_read()
    assert times(desk.acquire("m", "b", holder="w2")) == (0, 0, 0)


def test_the_queue_and_the_read_are_told_apart() -> None:
    desk = Desk(stored("first", 2), stored("second", 3))
    desk.acquire("first", "a", wait_s=20)
    desk.acquire("second", "b", wait_s=20)
    desk.now += 2.0
    desk.finish_read()
    desk.now += 0.5
    desk.finish_read()
    assert times(desk.last("a")) == (0, 2.0, 2 * CHUNK)
    assert times(desk.last("b")) == (2.0, 0.5, 3 * CHUNK)


def test_a_lease_on_arriving_bytes_tells_how_long_they_have_been_on_their_way() -> None:
    desk = Desk(stored("first", 2), stored("second", 4))
    desk.acquire("first", "a", wait_s=20, arriving=True)
    desk.acquire("second", "b", wait_s=20, arriving=True)
    assert times(desk.last("a")) == (0, 0, 2 * CHUNK)
    desk.now += 2.0
    desk.post(ReadDone(desk.take(ReadImage).job, 2.0))
    assert times(desk.last("b")) == (2.0, 0, 4 * CHUNK)
    # Who comes while they arrive waits for nobody, and for fewer of them.
    desk.now += 1.0
    desk.post(ReadProgressed(desk.reading(), 3 * CHUNK))
    assert times(desk.acquire("second", "c", holder="w2", arriving=True)) == (0, 0, CHUNK)


def test_an_image_that_streams_has_waited_for_its_window() -> None:
    desk = Desk(stored("big", 20), dram_chunks=8)
    assert times(desk.acquire("big", arriving=True)) == (0, 0, 20 * CHUNK)
    assert desk.record().ssd_queue == {"big": 20 * CHUNK}


def test_a_look_at_the_source_is_no_queue() -> None:
    desk = Desk()
    desk.acquire("m", "a", id="", wait_s=20, arriving=True)
    desk.now += 0.5
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", 4 * CHUNK, 4 * CHUNK + 100))
    desk.now += 0.25
    run = desk.take(RunImport)
    desk.post(ImportOpened(run.source, stored("m", 4)))
    assert times(desk.last("a")) == (0, 0.75, 4 * CHUNK)


def test_an_import_that_waits_for_another_has_waited() -> None:
    desk = Desk()
    desk.acquire("one", "a", id="", wait_s=20, arriving=True)
    desk.acquire("two", "b", id="", wait_s=20, arriving=True)
    for _ in range(2):
        desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", 2 * CHUNK, 2 * CHUNK + 100))
    run = desk.take(RunImport)
    desk.post(ImportProgressed(run.source, CHUNK, 2 * CHUNK))
    record = desk.record()
    assert list(record.import_queue.values()) == [CHUNK, 2 * CHUNK]
    assert record.ssd_queue == {}
    desk.now += 3.0
    desk.post(ImportDone(run.source, stored("one", 2), 2 * CHUNK, 3.0, in_dram=True))
    other = desk.take(RunImport)
    desk.post(ImportOpened(other.source, stored("two", 2)))
    assert times(desk.last("a")) == (0, 3.0, 2 * CHUNK)
    assert times(desk.last("b")) == (3.0, 0, 2 * CHUNK)
    assert list(desk.record().import_queue) == ["two"]


def test_what_came_without_room_in_dram_counts_from_its_import_on() -> None:
    desk = Desk(stored("other", 8), dram_chunks=8)
    desk.acquire("other", "o", ttl_s=4.0)
    desk.finish_read()
    desk.acquire("m", "a", id="", wait_s=20)
    desk.post(ImportPlanned(desk.take(PlanImport).source, "r1", 4 * CHUNK, 4 * CHUNK + 100))
    run = desk.take(RunImport)
    desk.after(5.0)  # the other one's lease has expired meanwhile
    desk.post(ImportDone(run.source, stored("m", 4), 4 * CHUNK, 5.0))
    desk.now += 0.5
    desk.finish_read()
    assert times(desk.last("a")) == (0, 5.5, 4 * CHUNK)


@pytest.mark.parametrize(("from_peers", "tier"), [(False, "remote"), (True, "peer")])
def test_a_lease_on_arriving_bytes_says_where_they_come_from(from_peers: bool, tier: str) -> None:
    desk = Desk()
    desk.acquire("m", "a", wait_s=20, arriving=True)
    plan = desk.take(PlanImport)
    desk.post(ImportPlanned(plan.source, "r1", 2 * CHUNK, 2 * CHUNK + 100, "m", CHUNK, from_peers=from_peers))
    run = desk.take(RunImport)
    desk.post(ImportOpened(run.source, stored("m", 2)))
    lease = desk.last("a")
    assert (lease.tier, times(lease)) == (tier, (0, 0, CHUNK)), "a part of it was in the SSD tier already"


def test_the_queue_is_what_a_users_load_would_wait_for() -> None:
    desk = Desk(stored("first", 1), stored("second", 2), stored("ahead", 3), dram_chunks=20)
    desk.post(PrefetchAsked(Prefetch(checkpoint_id="ahead", source=source("ahead")), "p"))
    assert desk.record().ssd_queue == {}, "a user's load goes before it"
    desk.acquire("second", "b", wait_s=20)
    desk.acquire("first", "a", wait_s=20)
    assert list(desk.record().ssd_queue.items()) == [("second", 2 * CHUNK), ("first", CHUNK)]
    desk.acquire("ahead", "c", wait_s=20)
    assert dict(desk.record().ssd_queue) == {"ahead": 3 * CHUNK, "second": 2 * CHUNK, "first": CHUNK}
