"""Which chunk goes next, where, and what its arrival completes: priorities, rates, windows, odd chunk sizes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.chunk_queue import ORDERS_LIMIT, ChunkQueue, Job, Task
from shared.contracts.residency import FAILED_TURN, Extent, arrival_word
from shared.errors import Code, Failure, HearthError

P = 4096  # the pool's chunk
FAILURE = Failure(code=Code.CHECKPOINT_UNAVAILABLE, message="The disk is gone.")


class Nothing:
    def read(self, index: int, into: memoryview) -> None:
        raise AssertionError("the queue reads nothing")


def job(key: str = "a", *, chunks: int = 3, priority: int = 0, chunk_bytes: int = P, **more: object) -> Job:
    return Job(
        key=key,
        priority=priority,
        image_bytes=chunks * chunk_bytes,
        chunk_bytes=chunk_bytes,
        origin=Nothing(),
        **more,  # type: ignore[arg-type]
    )


def queue(pool_chunks: int = 64) -> ChunkQueue:
    return ChunkQueue(pool_bytes=pool_chunks * P, pool_chunk_bytes=P)


def taken(task: Task | None) -> tuple[str, int] | None:
    return (task.job.key, task.index) if task is not None else None


def complete(queue: ChunkQueue, task: Task, now: float = 0.0) -> list[tuple[int, int]]:
    words = queue.arrived(task, f"sum{task.index}", repaired=False)
    queue.stored(task)
    queue.leave(task, now, failure=None)
    return words


def order(queue: ChunkQueue, now: float = 0.0) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    while (task := queue.take(now)) is not None:
        complete(queue, task, now)
        found.append((task.job.key, task.index))
    return found


def test_a_user_who_comes_later_is_served_first_and_equals_in_their_order() -> None:
    q = queue()
    q.add(job("prefetch", priority=2), 0)
    assert taken(q.take(0)) == ("prefetch", 0)
    q.add(job("first", chunks=2), 1)
    q.add(job("second", chunks=1), 2)
    assert order(q) == [("first", 0), ("first", 1), ("second", 0), ("prefetch", 1), ("prefetch", 2)]


def test_a_priority_changes_under_way_and_before_the_beginning() -> None:
    q = queue()
    q.set_priority("late", 0)
    q.add(job("a", priority=2, chunks=2), 0)
    q.add(job("b", priority=2, chunks=2), 0)
    assert taken(q.take(0)) == ("a", 0)
    q.set_priority("b", 1)
    q.add(job("late", priority=3, chunks=1), 0)
    assert order(q) == [("late", 0), ("b", 0), ("b", 1), ("a", 1)]


def test_a_stopped_job_ends_with_the_chunk_under_way_and_one_that_was_stopped_early_never_begins() -> None:
    q = queue()
    q.add(job(), 0)
    task = q.take(0)
    assert task is not None
    q.stop("a")
    assert not q.is_over("a") and q.take(0) is None
    complete(q, task)
    assert q.is_over("a")
    _, failure, _ = q.end("a", 0)
    assert failure is not None and failure.code is Code.CANCELLED
    q.stop("b")
    q.add(job("b"), 0)
    assert q.is_over("b") and q.take(0) is None


def test_orders_for_jobs_that_never_come_are_forgotten() -> None:
    q = queue()
    for number in range(ORDERS_LIMIT + 1):
        q.stop(f"job-{number}")
    q.add(job("job-0"), 0)
    q.add(job("job-1"), 0)
    assert not q.is_over("job-0") and q.is_over("job-1")


def test_a_rate_holds_nobody_else_up() -> None:
    q = queue()
    q.add(job("scrub", chunks=3, bytes_per_s=P), 10.0)  # a chunk per second
    q.add(job("other", priority=3, chunks=2), 10.0)
    assert taken(q.take(10.0)) == ("scrub", 0)
    assert taken(q.take(10.0)) == ("other", 0)
    assert q.wake_at(10.0) == 11.0
    assert taken(q.take(11.0)) == ("scrub", 1)
    assert taken(q.take(11.5)) == ("other", 1)
    assert q.take(11.9) is None and q.wake_at(11.9) == 12.0
    assert taken(q.take(30.0)) == ("scrub", 2), "time that was not used is not saved up"
    assert q.wake_at(30.0) is None


@given(st.lists(st.floats(0, 5, allow_nan=False), min_size=1, max_size=30), st.integers(1, 4 * P))
def test_a_rate_is_never_exceeded(steps: list[float], rate: int) -> None:
    q = queue()
    q.add(job("scrub", chunks=60, bytes_per_s=rate), 0.0)
    now, moved = 0.0, 0
    for step in steps:
        now += step
        while (task := q.take(now)) is not None:
            complete(q, task, now)
            moved += task.length
        assert moved <= rate * now + P, "more than the first chunk ahead of the rate"
        wake_at = q.wake_at(now)
        assert wake_at is None or wake_at > now


def test_waiting_is_measured_while_no_chunk_is_under_way() -> None:
    q = queue()
    q.add(job(), 1.0)
    first = q.take(3.0)
    second = q.take(4.0)
    assert first is not None and second is not None
    complete(q, first, 5.0)
    complete(q, second, 6.0)
    third = q.take(10.0)
    assert third is not None
    complete(q, third, 11.0)
    report, failure, words = q.end("a", 11.0)
    assert (report.seconds, report.waited_s, failure, words) == (10.0, 2.0 + 4.0, None, [])


def test_a_job_that_fails_announces_it_on_all_its_chunks_and_the_first_failure_counts() -> None:
    q = queue()
    q.add(job(extents=(Extent(offset=5 * P, length=3 * P),), tag=7), 0)
    first, second = q.take(0), q.take(0)
    assert first is not None and second is not None
    q.leave(first, 0, failure=FAILURE)
    q.leave(second, 0, failure=Failure(code=Code.INTERNAL, message="later"))
    assert q.is_over("a")
    _, failure, words = q.end("a", 0)
    assert failure == FAILURE
    assert words == [(chunk, arrival_word(7, FAILED_TURN)) for chunk in (5, 6, 7)]


def test_skipped_chunks_count_as_there_and_are_not_announced() -> None:
    q = queue()
    q.add(job(chunks=4, extents=(Extent(offset=0, length=4 * P),), tag=1, skip=frozenset({0, 2})), 0)
    one, three = q.take(0), q.take(0)
    assert one is not None and three is not None and (one.index, three.index) == (1, 3)
    assert q.arrived(one, "x", repaired=False) == [(1, arrival_word(1, 0))]
    assert q.stored(one) == 3 * P
    assert q.arrived(three, "y", repaired=True) == [(3, arrival_word(1, 0))]
    assert q.stored(three) == 4 * P
    for task in (one, three):
        q.spend(task, 0.5)
        q.leave(task, 0, failure=None)
    report, _, _ = q.end("a", 0)
    assert (report.checksums, report.moved_bytes, report.repaired) == (("", "x", "", "y"), 2 * P, (3,))
    assert report.cpu_s == 1.0


def test_a_window_waits_for_its_holder_and_for_its_own_threads() -> None:
    q = queue()
    q.add(job(chunks=5, extents=(Extent(offset=8 * P, length=3 * P),), tag=9, window_chunks=2), 0)
    zero, one = q.take(0), q.take(0)
    assert zero is not None and one is not None
    assert (zero.spans, one.spans) == (((8 * P, P),), ((9 * P, P),))
    assert complete(q, one) == [(9, arrival_word(9, 0))]
    q.advance("a", 2)
    assert q.take(0) is None, "a thread still works on the place of chunk 2"
    assert complete(q, zero) == [(8, arrival_word(9, 0))]
    two, three = q.take(0), q.take(0)
    assert two is not None and three is not None and q.take(0) is None
    assert two.spans == zero.spans
    assert complete(q, two) == [(8, arrival_word(9, 1))]
    assert complete(q, three) == [(9, arrival_word(9, 1))]
    assert q.take(0) is None, "nobody has taken chunk 2"
    q.advance("a", 1)
    assert q.take(0) is None, "what was said before still holds"
    q.advance("a", 3)
    four = q.take(0)
    assert four is not None and complete(q, four) == [(8, arrival_word(9, 2))]
    assert q.is_over("a")


def test_a_job_may_choose_its_own_order_but_not_in_a_window() -> None:
    q = queue()
    q.add(job("a", chunks=4, pick=max), 0)
    assert order(q) == [("a", index) for index in (3, 2, 1, 0)]
    window = (Extent(offset=0, length=2 * P),)
    q.add(job("b", chunks=3, pick=max, extents=window, tag=1, window_chunks=2), 0)
    q.advance("b", 1)
    assert order(q) == [("b", index) for index in (0, 1, 2)]


def test_what_the_holder_said_before_the_job_began_counts() -> None:
    q = queue()
    q.advance("a", 1)
    q.add(job(chunks=3, extents=(Extent(offset=0, length=P),), tag=1, window_chunks=1), 0)
    assert order(q) == [("a", 0), ("a", 1)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"extents": (Extent(offset=0, length=2 * P),)},
        {"extents": (Extent(offset=1, length=3 * P),)},
        {"extents": (Extent(offset=62 * P, length=3 * P),)},
        {"extents": (Extent(offset=0, length=2 * P), Extent(offset=P, length=2 * P))},
        {"extents": (Extent(offset=0, length=2 * P - 1), Extent(offset=8 * P, length=2 * P))},
        {"extents": (Extent(offset=0, length=2 * P),), "window_chunks": 3},
        {"window_chunks": 3},
        {"checksums": ["one", "two"]},
    ],
)
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        queue().add(job(**wrong), 0)  # type: ignore[arg-type]


def test_a_window_that_is_smaller_than_a_chunk_of_the_image_is_refused() -> None:
    window = (Extent(offset=0, length=2 * P),)
    with pytest.raises(HearthError, match="A chunk of 12288 bytes does not fit into 2 chunks") as refused:
        queue().add(job(chunk_bytes=3 * P, extents=window, window_chunks=2), 0)
    assert refused.value.failure.code is Code.NO_CAPACITY
    queue().add(job(chunk_bytes=2 * P, extents=window, window_chunks=2), 0)


def test_a_key_names_one_job() -> None:
    q = queue()
    q.add(job(), 0)
    with pytest.raises(HearthError) as refused:
        q.add(job(), 0)
    assert refused.value.failure.code is Code.CONFLICT


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, int, Sequence[Extent], int]:
    """(image bytes, image chunk bytes, extents, window): chunk sizes that are, and are not, the pool's."""
    unit = P // 4
    chunk_bytes = unit * draw(st.integers(1, 10))
    image_bytes = unit * draw(st.integers(1, 60))
    runs = draw(st.permutations(range(0, 64, 4)))
    window = draw(st.sampled_from([0, 5, 7]))
    extents: list[Extent] = []
    for run in runs:
        if sum(e.length for e in extents) >= (window * P or image_bytes):
            break
        extents.append(Extent(offset=run * P, length=draw(st.integers(1, 4)) * P))
    return image_bytes, chunk_bytes, extents, window


@given(geometries(), st.randoms(use_true_random=False))
def test_every_byte_has_one_place_and_is_announced_when_its_chunk_is_complete(
    geometry: tuple[int, int, Sequence[Extent], int], choose: object
) -> None:
    image_bytes, chunk_bytes, extents, window = geometry
    q = queue()
    q.add(
        Job(
            key="a", priority=0, image_bytes=image_bytes, chunk_bytes=chunk_bytes, origin=Nothing(), extents=extents,
            tag=3, window_chunks=window,
        ),
        0,
    )  # fmt: skip
    places = [e.offset + at for e in extents for at in range(0, e.length, P)]
    memory: dict[int, int] = {}  # pool byte / 1024 → image byte / 1024
    turn_said: dict[int, int] = {}
    under_way: list[Task] = []
    seen = 0  # pool chunks, along the image, that the holder has taken
    moved = 0
    for _ in range(10_000):
        task = q.take(0)
        if task is not None:
            under_way.append(task)
        if under_way and (task is None or choose.random() < 0.5):  # type: ignore[attr-defined]
            task = under_way.pop(choose.randrange(len(under_way)))  # type: ignore[attr-defined]
            at = task.index * chunk_bytes
            for offset, length in task.spans:
                for step in range(0, length, P // 4):
                    memory[offset + step] = at + step
                at += length
            moved += task.length
            for chunk, word in complete(q, task):
                turn_said[chunk] = word
        elif task is None:
            turn = seen
            place = places[turn % window if window else turn] // P
            lap = turn // window if window else 0
            assert turn_said.get(place) == arrival_word(3, lap), "nothing can be moved and nothing has arrived"
            for step in range(0, min(P, image_bytes - turn * P), P // 4):
                assert memory[place * P + step] == turn * P + step
            seen += 1
            q.advance("a", seen)
            if seen * P >= image_bytes:
                break
    assert moved == image_bytes and q.is_over("a")
