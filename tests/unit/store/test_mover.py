"""The mover: bytes arrive verified where they shall be; damage, slowness, stops and bugs end as they should."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import xxhash

from services.store.chunk_queue import Job, Report
from services.store.image_files import ImageWriter, StoredImage, rewrite
from services.store.mover import Mover
from services.store.pool import Pool
from shared.contracts.manifest import PAGE_BYTES
from shared.contracts.residency import FAILED_TURN, Extent, arrival_word
from shared.errors import Code, HearthError
from tests.unit.store.images import make_image

CHUNK = 2 * PAGE_BYTES
CHUNKS = 10
IMAGE = b"".join(bytes([index + 1]) * CHUNK for index in range(CHUNKS - 1)) + b"z" * PAGE_BYTES
SUMS = tuple(xxhash.xxh3_64_hexdigest(IMAGE[at : at + CHUNK]) for at in range(0, len(IMAGE), CHUNK))
# The later part first, to see that places are followed.
EXTENTS = (Extent(offset=10 * CHUNK, length=4 * CHUNK), Extent(offset=CHUNK, length=6 * CHUNK))
WAIT_S = 20.0

Read = Callable[[int, memoryview], None]


class Origin:
    """Reads from an image in memory; `before` may do something else first, or raise."""

    def __init__(self, image: bytes = IMAGE, chunk_bytes: int = CHUNK, before: Read | None = None) -> None:
        self.image, self.chunk_bytes, self.before = image, chunk_bytes, before
        self.reads: list[int] = []

    def read(self, index: int, into: memoryview) -> None:
        self.reads.append(index)
        into[:] = self.image[index * self.chunk_bytes : index * self.chunk_bytes + len(into)]
        if self.before is not None:
            self.before(index, into)


class Sink:
    """Remembers what it was given."""

    def __init__(self) -> None:
        self.chunks: dict[int, bytes] = {}

    def write(self, index: int, view: memoryview) -> None:
        self.chunks[index] = bytes(view)


def damage(*indices: int, times: int = 10**9) -> Read:
    """An origin's chunks of these indices come with one bit wrong, the first `times` times."""
    left = dict.fromkeys(indices, times)

    def read(index: int, into: memoryview) -> None:
        if left.get(index, 0) > 0:
            left[index] -= 1
            into[len(into) // 2] ^= 1

    return read


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool.open(tmp_path, prefix="p", server_id="s", chunk_bytes=CHUNK, chunk_count=16)
    pool.memory[:] = b"?" * pool.data_bytes
    yield pool
    pool.close()


@pytest.fixture
def mover(pool: Pool) -> Iterator[Mover]:
    mover = Mover(pool, threads=2, name="test")
    yield mover
    mover.close()


def job(origin: object, *, key: str = "a", priority: int = 0, **more: object) -> Job:
    given: dict[str, object] = {"checksums": SUMS, "extents": EXTENTS, "tag": 5} | more
    return Job(
        key=key, priority=priority, image_bytes=len(IMAGE), chunk_bytes=CHUNK, origin=origin, **given
    )  # type: ignore[arg-type]  # fmt: skip


def places(extents: Sequence[Extent] = EXTENTS) -> list[int]:
    return [(e.offset + at) // CHUNK for e in extents for at in range(0, e.length, CHUNK)]


def words(pool: Pool) -> list[int]:
    return [pool.word(chunk) for chunk in places()]


def image_in(pool: Pool) -> bytes:
    return b"".join(bytes(pool.memory[e.offset : e.offset + e.length]) for e in EXTENTS)[: len(IMAGE)]


def test_an_image_comes_into_its_places_verified_announced_and_counted(pool: Pool, mover: Mover) -> None:
    progress: list[int] = []
    report = mover.run(job(Origin(), progressed=progress.append))
    assert image_in(pool) == IMAGE
    assert words(pool) == [arrival_word(5, 0)] * CHUNKS
    outside = sorted(set(range(16)) - set(places()))
    assert all(bytes(pool.memory[chunk * CHUNK : (chunk + 1) * CHUNK]) == b"?" * CHUNK for chunk in outside)
    assert [pool.word(chunk) for chunk in outside] == [0] * len(outside)
    assert len(progress) == CHUNKS and max(progress) == len(IMAGE)
    assert (report.checksums, report.moved_bytes, report.repaired) == (SUMS, len(IMAGE), ())


def test_checksums_are_computed_in_the_order_of_the_image_padding_included(mover: Mover) -> None:
    sink = Sink()
    report = mover.run(job(Origin(), checksums=None, extents=(), sink=sink))
    assert report.checksums == SUMS
    assert b"".join(sink.chunks[index] for index in range(CHUNKS)) == IMAGE


def test_pool_and_sink_are_filled_at_once_and_the_waiting_user_comes_first(pool: Pool, mover: Mover) -> None:
    seen: dict[int, int] = {}

    class Late(Sink):
        def write(self, index: int, view: memoryview) -> None:
            super().write(index, view)
            seen[index] = pool.word(places()[index])

    sink = Late()
    mover.run(job(Origin(), sink=sink))
    assert b"".join(sink.chunks[index] for index in range(CHUNKS)) == IMAGE == image_in(pool)
    assert seen == dict.fromkeys(range(CHUNKS), arrival_word(5, 0))


@pytest.mark.parametrize("chunk_bytes", [PAGE_BYTES, 3 * PAGE_BYTES, 5 * PAGE_BYTES])
def test_an_image_of_another_chunk_size_comes_into_the_pool_too(pool: Pool, mover: Mover, chunk_bytes: int) -> None:
    sums = tuple(xxhash.xxh3_64_hexdigest(IMAGE[at : at + chunk_bytes]) for at in range(0, len(IMAGE), chunk_bytes))
    sink = Sink()
    mover.run(
        Job(
            key="a", priority=0, image_bytes=len(IMAGE), chunk_bytes=chunk_bytes, checksums=sums, sink=sink, tag=5,
            origin=Origin(chunk_bytes=chunk_bytes), extents=EXTENTS,
        )
    )  # fmt: skip
    assert image_in(pool) == IMAGE
    assert words(pool) == [arrival_word(5, 0)] * CHUNKS
    assert b"".join(sink.chunks[index] for index in range(len(sums))) == IMAGE


# -- damage


def test_a_chunk_that_is_wrong_once_is_read_again(pool: Pool, mover: Mover) -> None:
    origin = Origin(before=damage(3, times=1))
    report = mover.run(job(origin))
    assert image_in(pool) == IMAGE and report.repaired == ()
    assert sorted(origin.reads) == sorted([*range(CHUNKS), 3])


def test_a_corrupt_chunk_ends_the_job_and_every_word_says_so(pool: Pool, mover: Mover) -> None:
    with pytest.raises(HearthError, match="Chunk 3 of the checkpoint does not match its checksum") as failed:
        mover.run(job(Origin(before=damage(3))))
    assert failed.value.failure.code is Code.CHECKPOINT_CORRUPT
    assert words(pool) == [arrival_word(5, FAILED_TURN)] * CHUNKS
    assert mover.run(job(Origin(), key="b", tag=6)).moved_bytes == len(IMAGE), "the mover goes on"
    assert words(pool) == [arrival_word(6, 0)] * CHUNKS


def test_a_corrupt_chunk_goes_unnoticed_only_where_nobody_asks_for_verification(mover: Mover) -> None:
    assert mover.run(job(Origin(before=damage(3)), verify=False)).checksums == SUMS


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("fault", ["damage", "EIO"])
def test_a_corrupt_or_unreadable_chunk_is_repaired_there_too(
    pool: Pool, mover: Mover, fault: str, verify: bool
) -> None:
    def unreadable(index: int, into: memoryview) -> None:
        if index == 3:
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, "model.safetensors cannot be read: Input/output error.")

    rewritten, repairs = Sink(), Origin()

    def repair(index: int, buffer: memoryview) -> bool:
        repairs.read(index, buffer)
        return True

    origin = Origin(before=damage(3) if fault == "damage" else unreadable)
    report = mover.run(job(origin, repair=repair, rewrite=rewritten.write, verify=verify))
    if fault == "damage" and not verify:
        assert report.repaired == ()
        return
    assert image_in(pool) == IMAGE and report.repaired == (3,) and repairs.reads == [3]
    assert rewritten.chunks == {3: IMAGE[3 * CHUNK : 4 * CHUNK]}
    assert words(pool) == [arrival_word(5, 0)] * CHUNKS


@pytest.mark.parametrize(
    ("repaired", "message"),
    [
        ("no", "Nobody has a sound copy"),
        ("wrong", "nor does its copy"),
        ("raises", "It cannot be repaired: The peer is gone"),
    ],
)
def test_what_cannot_be_repaired_is_corrupt(pool: Pool, mover: Mover, repaired: str, message: str) -> None:
    def repair(index: int, buffer: memoryview) -> bool:
        if repaired == "raises":
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, "The peer is gone.")
        return repaired == "wrong"

    with pytest.raises(HearthError, match=message) as failed:
        mover.run(job(Origin(before=damage(3)), repair=repair))
    assert failed.value.failure.code is Code.CHECKPOINT_CORRUPT
    assert words(pool) == [arrival_word(5, FAILED_TURN)] * CHUNKS


@pytest.mark.parametrize("where", ["origin", "sink", "rewrite"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EIO, "Input/output error"), Code.CHECKPOINT_UNAVAILABLE),
        (HearthError(Code.NO_CAPACITY, "The disk is full."), Code.NO_CAPACITY),
    ],
)
def test_a_failure_anywhere_ends_the_job(pool: Pool, mover: Mover, where: str, error: Exception, code: Code) -> None:
    def fails(index: int, view: memoryview) -> None:
        if index == 4:
            raise error

    class Full(Sink):
        def write(self, index: int, view: memoryview) -> None:
            fails(index, view)

    def repair(index: int, buffer: memoryview) -> bool:
        buffer[:] = IMAGE[index * CHUNK : (index + 1) * CHUNK]
        return True

    more: dict[str, object] = {}
    if where == "sink":
        more = {"sink": Full()}
    elif where == "rewrite":
        more = {"repair": repair, "rewrite": fails}
    origin = Origin(before=fails if where == "origin" else damage(4) if where == "rewrite" else None)
    with pytest.raises(HearthError) as failed:
        mover.run(job(origin, **more))
    assert failed.value.failure.code is code
    assert words(pool) == [arrival_word(5, FAILED_TURN)] * CHUNKS


def test_a_bug_of_ours_is_raised_to_the_top_and_nobody_waits_for_ever(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    mover = Mover(pool, threads=2, name="test")

    def bug(index: int, into: memoryview) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(RuntimeError, match="a thread of the mover has died") as raised:
        mover.run(job(Origin(before=bug)))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    with pytest.raises(RuntimeError):
        mover.run(job(Origin(), key="b"))
    mover.close()
    assert printed, "the thread's end is seen on stderr"


def test_what_lies_in_the_pool_is_announced_however_slow_its_sink_is(pool: Pool, mover: Mover) -> None:
    class Slow(Sink):
        def __init__(self) -> None:
            super().__init__()
            self.go_on = threading.Event()

        def write(self, index: int, view: memoryview) -> None:
            assert self.go_on.wait(WAIT_S)
            super().write(index, view)

    sink, there = Slow(), threading.Event()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(mover.run, job(Origin(), sink=sink))
        while words(pool) != [arrival_word(5, 0)] * CHUNKS:
            assert not there.wait(0.001)
        assert image_in(pool) == IMAGE
        assert not running.done(), "the job is over when its sink has everything"
        sink.go_on.set()
        report = running.result(WAIT_S)
    assert b"".join(sink.chunks[index] for index in range(CHUNKS)) == IMAGE
    assert report.moved_bytes == len(IMAGE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_of_every_sink_leaves_nobody_waiting(pool: Pool) -> None:
    class Buggy:
        def write(self, index: int, view: memoryview) -> None:
            raise ZeroDivisionError("a bug")

    mover = Mover(pool, threads=2, name="test")
    with pytest.raises(RuntimeError, match="a thread of the mover has died"):
        mover.run(job(Origin(), sink=Buggy()))
    assert words(pool) == [arrival_word(5, FAILED_TURN)] * CHUNKS
    mover.close()


def test_who_waits_for_bytes_that_failed_before_their_job_began_is_told(pool: Pool, mover: Mover) -> None:
    mover.run(job(Origin()))
    mover.fail(EXTENTS, 5)
    assert words(pool) == [arrival_word(5, FAILED_TURN)] * CHUNKS
    assert pool.word(0) == 0, "nobody else is"
    alone = Mover(None, threads=1, name="test")
    alone.fail(EXTENTS, 5)
    alone.close()


# -- order


class Gate(Origin):
    """An origin whose reads wait until they are let go, one by one or all."""

    def __init__(self, log: list[tuple[str, int]], name: str) -> None:
        super().__init__()
        self.log, self.name = log, name
        self.begun, self.open = threading.Semaphore(0), threading.Semaphore(0)

    def read(self, index: int, into: memoryview) -> None:
        self.log.append((self.name, index))
        self.begun.release()
        assert self.open.acquire(timeout=WAIT_S)
        super().read(index, into)

    def let(self, count: int = CHUNKS) -> None:
        self.open.release(count)


def test_a_user_who_comes_later_goes_first_and_no_thread_is_taken_away_from_a_chunk(pool: Pool) -> None:
    mover = Mover(pool, threads=1, name="test")
    log: list[tuple[str, int]] = []
    prefetch, user = Gate(log, "prefetch"), Gate(log, "user")
    with ThreadPoolExecutor(2) as callers:
        slow = callers.submit(mover.run, job(prefetch, key="prefetch", priority=2, extents=()))
        assert prefetch.begun.acquire(timeout=WAIT_S)
        user.let()
        fast = callers.submit(mover.run, job(user, key="user", priority=0))
        while "user" not in mover._over:
            threading.Event().wait(0.001)
        prefetch.let(1)
        fast.result(WAIT_S)
        prefetch.let()
        report: Report = slow.result(WAIT_S)
    mover.close()
    assert log[: CHUNKS + 1] == [("prefetch", 0), *(("user", index) for index in range(CHUNKS))]
    assert image_in(pool) == IMAGE and report.moved_bytes == len(IMAGE)
    assert report.waited_s > 0


def test_a_stopped_job_ends_after_its_chunk_and_nothing_is_written_behind_it(pool: Pool, mover: Mover) -> None:
    log: list[tuple[str, int]] = []
    gate = Gate(log, "a")
    with ThreadPoolExecutor(1) as callers:
        running = callers.submit(mover.run, job(gate))
        assert gate.begun.acquire(timeout=WAIT_S)
        mover.stop("a")
        gate.let()
        with pytest.raises(HearthError) as stopped:
            running.result(WAIT_S)
    assert stopped.value.failure.code is Code.CANCELLED
    assert len(log) <= 2
    assert words(pool) == [arrival_word(5, FAILED_TURN)] * CHUNKS
    pool.memory[:] = b"!" * pool.data_bytes  # somebody else has the chunks now
    assert mover.run(job(Origin(), key="b", extents=())).moved_bytes == len(IMAGE)
    assert bytes(pool.memory) == b"!" * pool.data_bytes
    mover.stop("never begun")
    with pytest.raises(HearthError):
        mover.run(job(Origin(), key="never begun"))


def test_a_mover_that_closes_ends_its_jobs(pool: Pool) -> None:
    mover = Mover(pool, threads=1, name="test")
    gate = Gate([], "a")
    with ThreadPoolExecutor(2) as callers:
        running = callers.submit(mover.run, job(gate))
        assert gate.begun.acquire(timeout=WAIT_S)
        closing = callers.submit(mover.close)
        while not mover._closed:
            threading.Event().wait(0.001)
        gate.let()
        with pytest.raises(HearthError) as stopped:
            running.result(WAIT_S)
        closing.result(WAIT_S)
    assert stopped.value.failure.code is Code.DRAINING
    with pytest.raises(HearthError) as refused:
        mover.run(job(Origin(), key="b"))
    assert refused.value.failure.code is Code.DRAINING


@pytest.mark.parametrize("chunk_bytes", [CHUNK, PAGE_BYTES, 3 * PAGE_BYTES])
def test_an_image_larger_than_its_window_streams_through_it(pool: Pool, mover: Mover, chunk_bytes: int) -> None:
    window = (Extent(offset=4 * CHUNK, length=2 * CHUNK), Extent(offset=0, length=CHUNK))
    slots, sink, seen = places(window), Sink(), bytearray()
    origin = Origin(chunk_bytes=chunk_bytes)
    stream = Job(
        key="a", priority=0, image_bytes=len(IMAGE), chunk_bytes=chunk_bytes, origin=origin, extents=window,
        tag=8, window_chunks=3, sink=sink,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as callers:
        running = callers.submit(mover.run, stream)
        for turn in range(CHUNKS):
            word = arrival_word(8, turn // 3)
            while pool.word(slots[turn % 3]) != word:
                assert not running.done() or running.exception() is None
                threading.Event().wait(0.001)
            at = slots[turn % 3] * CHUNK
            seen += pool.memory[at : at + CHUNK]
            mover.advance("a", turn + 1)
        report = running.result(WAIT_S)
    assert bytes(seen[: len(IMAGE)]) == IMAGE
    assert b"".join(sink.chunks[index] for index in sorted(sink.chunks)) == IMAGE
    assert report.moved_bytes == len(IMAGE)


def test_jobs_wait_for_windows_and_rates_without_a_thread(pool: Pool) -> None:
    mover = Mover(pool, threads=1, name="test")
    window = Origin()
    with ThreadPoolExecutor(2) as callers:
        stream = callers.submit(
            mover.run, job(window, key="stream", extents=(Extent(offset=0, length=CHUNK),), window_chunks=1)
        )
        scrub = callers.submit(mover.run, job(Origin(), key="scrub", extents=(), bytes_per_s=1, priority=3))
        assert mover.run(job(Origin(), key="user", tag=6)).moved_bytes == len(IMAGE)
        mover.stop("scrub")
        mover.advance("stream", CHUNKS)
        assert stream.result(WAIT_S).moved_bytes == len(IMAGE)
        with pytest.raises(HearthError):
            scrub.result(WAIT_S)
    mover.close()


@pytest.mark.parametrize("seed", range(12))
def test_many_jobs_at_once_with_faults_stops_and_windows(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    pool = Pool.open(tmp_path, prefix="p", server_id="s", chunk_bytes=CHUNK, chunk_count=64)
    pool.memory[:] = b"?" * pool.data_bytes
    mover = Mover(pool, threads=3, name="test")
    free = list(range(0, 64, 2))  # runs of two chunks
    choose.shuffle(free)
    jobs: list[tuple[Job, bytes, str]] = []
    for number in range(6):
        chunk_bytes = PAGE_BYTES * choose.choice([1, 2, 2, 3, 5])
        image = choose.randbytes(PAGE_BYTES * choose.randint(1, 19))
        fate = choose.choice(["well", "well", "damaged", "mended", "stopped", "through a window"])
        runs = 4 if fate == "through a window" else -(-len(image) // (2 * CHUNK))
        extents = tuple(Extent(offset=free.pop() * CHUNK, length=2 * CHUNK) for _ in range(runs))
        indices = range(-(-len(image) // chunk_bytes))
        sums = [xxhash.xxh3_64_hexdigest(image[i * chunk_bytes : (i + 1) * chunk_bytes]) for i in indices]
        before = damage(choose.choice(indices), times=1 if fate == "mended" else 9)
        origin = Origin(image, chunk_bytes, before if fate in ("damaged", "mended") else None)
        jobs.append(
            (
                Job(
                    key=str(number), priority=choose.randint(0, 3), image_bytes=len(image), chunk_bytes=chunk_bytes,
                    origin=origin, checksums=sums, extents=extents, tag=number + 1,
                    window_chunks=8 if fate == "through a window" else 0,
                ),
                image,
                fate,
            )
        )  # fmt: skip
    with ThreadPoolExecutor(len(jobs)) as callers:
        running = [callers.submit(mover.run, one) for one, _, _ in jobs]
        for one, _, fate in jobs:
            mover.set_priority(one.key, choose.randint(0, 3))
            if fate == "stopped":
                mover.stop(one.key)
            mover.advance(one.key, 10_000)  # a holder that is faster than we are
        failures = [future.exception(WAIT_S) for future in running]
    mover.close()
    for (one, image, fate), failure in zip(jobs, failures, strict=True):
        where = [(e.offset + at) // CHUNK for e in one.extents for at in range(0, e.length, CHUNK)]
        said = [pool.word(chunk) for chunk in where]
        if fate == "damaged" or (fate == "stopped" and failure is not None):
            assert isinstance(failure, HearthError)
            assert said == [arrival_word(one.tag, FAILED_TURN)] * len(where)
        elif fate != "through a window":
            assert failure is None
            there = -(-len(image) // CHUNK)
            assert said == [arrival_word(one.tag, 0)] * there + [0] * (len(where) - there)
            found = b"".join(bytes(pool.memory[e.offset : e.offset + e.length]) for e in one.extents)
            assert found == image + b"?" * (len(found) - len(image))
        else:
            assert failure is None
            turns = -(-len(image) // CHUNK)
            for turn in range(max(0, turns - 8), turns):
                assert pool.word(where[turn % 8]) == arrival_word(one.tag, turn // 8)
                part = image[turn * CHUNK : (turn + 1) * CHUNK]
                at = where[turn % 8] * CHUNK
                assert bytes(pool.memory[at : at + len(part)]) == part
    assert all(pool.memory[chunk * CHUNK : (chunk + 2) * CHUNK] == b"?" * 2 * CHUNK for chunk in free)
    pool.close()


# -- with real files


@pytest.mark.parametrize("threads", [1, 4])
def test_from_file_to_pool_and_file(tmp_path: Path, threads: int) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    manifest, image = make_image(
        tmp_path / "old", (3 * CHUNK + 100, CHUNK, 5 * PAGE_BYTES + 1), chunk_bytes=CHUNK
    )  # fmt: skip
    count = len(manifest.chunks)
    with (tmp_path / "old" / manifest.files[0].name).open("r+b") as file:  # one chunk to be repaired
        file.seek(CHUNK + 7)
        file.write(b"damaged")
    pool = Pool.open(tmp_path, prefix="p", server_id="s", chunk_bytes=CHUNK, chunk_count=count)
    mover = Mover(pool, threads=threads, name="test")
    stored = StoredImage(tmp_path / "old", manifest)
    writer = ImageWriter(tmp_path / "new", manifest.files, chunk_bytes=CHUNK)

    def repair(index: int, buffer: memoryview) -> bool:
        buffer[:] = image[index * CHUNK : index * CHUNK + len(buffer)]
        return True

    copy = Job(
        key="a", priority=0, image_bytes=len(image), chunk_bytes=CHUNK, origin=stored, checksums=manifest.chunks,
        extents=(Extent(offset=0, length=count * CHUNK),), tag=1, sink=writer, repair=repair,
        rewrite=partial(rewrite, tmp_path / "old", manifest),
    )  # fmt: skip
    assert mover.run(copy).repaired == (1,)
    writer.finish()
    again = Job(
        key="b", priority=0, image_bytes=len(image), chunk_bytes=CHUNK, origin=stored, checksums=manifest.chunks
    )
    assert mover.run(again).repaired == (), "it has been repaired on the disk"
    assert bytes(pool.memory[: len(image)]) == image
    for file in manifest.files:
        assert (tmp_path / "new" / file.name).read_bytes() == (tmp_path / "old" / file.name).read_bytes()
    for one in (stored, writer, mover, pool):
        one.close()


@pytest.mark.parametrize("extents", [EXTENTS, ()], ids=["pool", "buffer"])
def test_what_has_arrived_when_another_chunk_fails_is_stored_all_the_same(
    mover: Mover, extents: tuple[Extent, ...]
) -> None:
    """So a fetch that is cut off loses what was in flight and no more."""
    failed, sink = threading.Event(), Sink()

    def before(index: int, into: memoryview) -> None:
        if index == 1:
            failed.set()
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, "cut")
        assert failed.wait(WAIT_S)
        while mover._queue._running["a"].failure is None:
            threading.Event().wait(0.001)

    with pytest.raises(HearthError, match="cut"):
        mover.run(job(Origin(before=before), extents=extents, sink=sink))
    assert sink.chunks == {0: IMAGE[:CHUNK]}
