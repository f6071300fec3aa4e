"""Waiting for the pieces of a lease and streaming them, with a hand-made board, clock and copier."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from services.worker.arrival import (
    POLL_S,
    PROGRESS_S,
    RETELL_S,
    Arrivals,
    Piece,
    Time,
    image_bytes,
    is_there,
    pieces_of,
    stream,
    streams,
)
from shared.contracts.residency import FAILED_TURN, Arrival, Extent, Lease, arrival_word
from shared.errors import Code, HearthError
from tests.unit.worker.world import lease as plain_lease

CHUNK = 4096
BOARD = 16 * CHUNK
TAG = 7


def arriving(places: list[int], *, image: int, window: int = 0, **changes: Any) -> Lease:
    """A lease of `image` bytes that come into these chunks of a pool of 16."""
    left = len(places) * CHUNK if window else image
    extents = []
    for place in places:
        extents.append(Extent(offset=place * CHUNK, length=min(CHUNK, left)))
        left -= CHUNK
    values: dict[str, Any] = {
        "segment_bytes": BOARD + 4096,
        "extents": tuple(extents),
        "arrival": Arrival(tag=TAG, chunk_bytes=CHUNK, board_offset=BOARD, image_bytes=image, window_chunks=window),
    }
    return msgspec.structs.replace(plain_lease(), **(values | changes))


class Board:
    """Words, and a clock that `wake` is called by at every sleep: it is there that a store does its work."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.now = 0.0
        self.sleeps = 0
        self.stopped = False
        self.told: list[tuple[float, int, int]] = []
        self.taken: list[int] = []
        self.wake: Callable[[], None] = lambda: None

    def read(self, offset: int) -> int:
        return self.words.get(offset, 0)

    def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        self.now += seconds
        assert self.sleeps < 100_000, "waits for ever"
        self.wake()

    def arrived(self, done_bytes: int, total_bytes: int) -> None:
        self.told.append((self.now, done_bytes, total_bytes))

    def consumed(self, chunks: int) -> None:
        self.taken.append(chunks)

    @property
    def time(self) -> Time:
        return Time(now=lambda: self.now, sleep=self.sleep)

    def arrivals(self, pieces: tuple[Piece, ...]) -> Arrivals:
        return Arrivals(pieces, self.read, self, self.time)


class Copier:
    """Finishes a copy a few looks after it was started, in order, and reads the pool when it does."""

    def __init__(self, read: Callable[[Piece], bytes], looks: int = 1) -> None:
        self.copied: dict[int, bytes] = {}
        self.started: list[Piece] = []
        self.waited = False
        self._read = read
        self._looks = looks
        self._since = 0

    def start(self, piece: Piece) -> None:
        self.started.append(piece)

    def finished(self) -> int:
        if len(self.copied) < len(self.started):
            self._since += 1
            if self._since >= self._looks:
                self._since = 0
                piece = self.started[len(self.copied)]
                self.copied[piece.image_offset] = self._read(piece)
        return len(self.copied)

    def finish(self) -> None:
        self.waited = True


# -- pieces


def test_an_image_that_is_there_is_cut_into_pieces_within_its_extents() -> None:
    extents = (Extent(offset=8192, length=12288), Extent(offset=40960, length=4096))
    lease = msgspec.structs.replace(plain_lease(), extents=extents)
    assert not streams(lease)
    assert image_bytes(lease) == 16384
    assert pieces_of(lease, piece_bytes=8192) == (
        Piece(0, 8192, 8192), Piece(8192, 16384, 4096), Piece(12288, 40960, 4096),
    )  # fmt: skip


def test_the_chunks_of_an_arriving_image_lie_where_the_extents_say_and_the_last_is_short() -> None:
    lease = arriving([5, 2, 3], image=2 * CHUNK + 512 * 8)
    assert not streams(lease)
    assert image_bytes(lease) == 3 * CHUNK
    word = arrival_word(TAG, 0)
    assert pieces_of(arriving([5, 2, 3], image=2 * CHUNK + 100)) == (
        Piece(0, 5 * CHUNK, CHUNK, BOARD + 40, word),
        Piece(CHUNK, 2 * CHUNK, CHUNK, BOARD + 16, word),
        Piece(2 * CHUNK, 3 * CHUNK, 100, BOARD + 24, word),
    )


def test_chunks_of_one_extent_are_counted_too() -> None:
    lease = arriving([1, 2, 3], image=3 * CHUNK, extents=(Extent(offset=CHUNK, length=3 * CHUNK),))
    assert [piece.segment_offset // CHUNK for piece in pieces_of(lease)] == [1, 2, 3]


def test_an_image_larger_than_its_window_goes_round() -> None:
    lease = arriving([4, 9], image=5 * CHUNK, window=2)
    assert streams(lease)
    assert image_bytes(lease) == 5 * CHUNK
    found = [(piece.segment_offset // CHUNK, piece.word) for piece in pieces_of(lease)]
    turns = [arrival_word(TAG, turn) for turn in range(3)]
    assert found == [(4, turns[0]), (9, turns[0]), (4, turns[1]), (9, turns[1]), (4, turns[2])]


@pytest.mark.parametrize(
    "changes",
    [
        {"extents": (Extent(offset=0, length=CHUNK),)},  # shorter than the image
        {"extents": (Extent(offset=100, length=3 * CHUNK),)},
        {"extents": (Extent(offset=-CHUNK, length=3 * CHUNK),)},
        {"extents": (Extent(offset=0, length=100), Extent(offset=CHUNK, length=3 * CHUNK))},
        {"extents": (Extent(offset=0, length=0), Extent(offset=CHUNK, length=3 * CHUNK))},
        {"segment_bytes": BOARD + 8},
        {"arrival": Arrival(tag=1, chunk_bytes=0, board_offset=BOARD, image_bytes=10)},
        {"arrival": Arrival(tag=1, chunk_bytes=CHUNK, board_offset=BOARD + 1, image_bytes=10)},
        {"arrival": Arrival(tag=1, chunk_bytes=CHUNK, board_offset=BOARD, image_bytes=0)},
        {"arrival": Arrival(tag=1, chunk_bytes=CHUNK, board_offset=BOARD, image_bytes=CHUNK * 9, window_chunks=4)},
    ],
)
def test_a_lease_whose_numbers_do_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(HearthError) as refused:
        pieces_of(arriving([1, 2, 3], image=3 * CHUNK, **changes))
    assert refused.value.failure.code is Code.CHECKPOINT_CORRUPT


def test_what_a_word_says() -> None:
    piece = Piece(0, 0, CHUNK, 8, arrival_word(TAG, 3))
    assert is_there(piece, arrival_word(TAG, 3))
    assert not is_there(piece, 0)
    assert not is_there(piece, arrival_word(TAG, 2))
    assert is_there(Piece(0, 0, CHUNK), 12345)
    for word in (arrival_word(TAG, FAILED_TURN), arrival_word(TAG, 4), arrival_word(TAG + 1, 3), arrival_word(1, 0)):
        with pytest.raises(HearthError) as refused:
            is_there(piece, word)
        assert refused.value.failure.code is Code.CHECKPOINT_UNAVAILABLE


# -- waiting


def test_pieces_may_come_in_any_order_and_waiting_is_counted() -> None:
    board = Board()
    pieces = pieces_of(arriving([1, 2, 3], image=3 * CHUNK))
    order = [pieces[2], pieces[0], pieces[1]]

    def wake() -> None:
        if board.sleeps % 100 == 0 and order:
            piece = order.pop(0)
            board.words[piece.word_offset] = piece.word

    board.wake = wake
    arrivals = board.arrivals(pieces)
    assert arrivals.arriving
    arrivals.wait_all()
    assert not order
    assert arrivals.waited_s == pytest.approx(300 * POLL_S)
    assert board.told[0][1:] == (0, 3 * CHUNK)
    assert board.told[-1][1:] == (3 * CHUNK, 3 * CHUNK)
    gaps = [two[0] - one[0] for one, two in zip(board.told, board.told[1:-1], strict=False)]
    assert all(gap >= PROGRESS_S for gap in gaps)
    assert [done for _, done, _ in board.told] == sorted(done for _, done, _ in board.told)


def test_nothing_is_waited_for_or_told_when_everything_is_there() -> None:
    board = Board()
    pieces = pieces_of(arriving([1, 2], image=2 * CHUNK))
    board.words = {piece.word_offset: piece.word for piece in pieces}
    arrivals = board.arrivals(pieces)
    arrivals.wait_all()
    assert (arrivals.waited_s, board.sleeps, board.told) == (0, 0, [])
    assert not board.arrivals(pieces_of(plain_lease())).arriving


@pytest.mark.parametrize(
    ("word", "code"),
    [
        (arrival_word(TAG, FAILED_TURN), Code.CHECKPOINT_UNAVAILABLE),
        (arrival_word(TAG + 1, 0), Code.CHECKPOINT_UNAVAILABLE),
        (0, Code.DRAINING),
    ],
)
def test_waiting_ends_when_the_bytes_will_not_come_or_nobody_wants_them(word: int, code: Code) -> None:
    board = Board()
    pieces = pieces_of(arriving([1, 2], image=2 * CHUNK))

    def wake() -> None:
        if board.sleeps == 50:
            board.words[pieces[1].word_offset] = word
            board.stopped = word == 0

    board.wake = wake
    board.words[pieces[0].word_offset] = pieces[0].word
    with pytest.raises(HearthError) as ended:
        board.arrivals(pieces).wait_all()
    assert ended.value.failure.code is code


# -- streaming


class Store:
    """Fills a pool's chunks with the image's, a window behind what was consumed, now and then at a wake-up."""

    def __init__(self, board: Board, lease: Lease, seed: int) -> None:
        self.dice = random.Random(seed)
        self.board = board
        self.pieces = pieces_of(lease)
        self.image = {piece.image_offset: self.dice.randbytes(piece.length) for piece in self.pieces}
        self.pool: dict[int, bytes] = {}
        self.next = 0
        self.window = lease.arrival.window_chunks if lease.arrival else 0
        board.wake = self.work

    def work(self) -> None:
        free = (self.board.taken[-1] if self.board.taken else 0) + self.window if self.window else len(self.pieces)
        if self.next < min(free, len(self.pieces)) and self.dice.random() < 0.3:
            piece = self.pieces[self.next]
            self.board.words[piece.word_offset] = 0
            self.pool[piece.segment_offset] = self.image[piece.image_offset]
            self.board.words[piece.word_offset] = piece.word
            self.next += 1

    def read(self, piece: Piece) -> bytes:
        return self.pool[piece.segment_offset]


@pytest.mark.parametrize("seed", range(30))
def test_a_window_carries_the_whole_image_and_nothing_is_overwritten_before_it_was_taken(seed: int) -> None:
    board = Board()
    dice = random.Random(seed)
    window = dice.randrange(1, 5)
    lease = arriving(dice.sample(range(16), window), image=CHUNK * dice.randrange(window, 30) + 1, window=window)
    store = Store(board, lease, seed)
    copier = Copier(store.read, looks=dice.randrange(1, 6))
    stream(board.arrivals(store.pieces), copier, board, board.time, windowed=True)
    assert copier.copied == store.image
    assert copier.waited
    assert board.taken == sorted(board.taken)
    assert board.taken[-1] == len(store.pieces)
    assert [piece.image_offset for piece in copier.started] == [piece.image_offset for piece in store.pieces]


def test_a_piece_is_copied_as_soon_as_it_is_there_while_later_ones_are_not() -> None:
    board = Board()
    pieces = pieces_of(arriving([1, 2, 3], image=3 * CHUNK))
    copier = Copier(lambda piece: b"")
    started: list[int] = []

    def wake() -> None:
        started.append(len(copier.started))
        if board.sleeps % 10 == 0 and board.sleeps <= 30:
            piece = pieces[board.sleeps // 10 - 1]
            board.words[piece.word_offset] = piece.word

    board.wake = wake
    stream(board.arrivals(pieces), copier, board, board.time, windowed=False)
    assert started[:30] == [0] * 10 + [1] * 10 + [2] * 10
    assert board.taken == [], "only a window has places to free"


def test_what_was_consumed_is_told_again_while_nothing_comes() -> None:
    board = Board()
    pieces = pieces_of(arriving([1], image=2 * CHUNK, window=1))
    board.words[pieces[0].word_offset] = pieces[0].word

    def wake() -> None:
        if board.taken == [1, 1, 1]:  # the first two were lost on the way
            board.words[pieces[1].word_offset] = pieces[1].word

    board.wake = wake
    stream(board.arrivals(pieces), Copier(lambda piece: b""), board, board.time, windowed=True)
    assert board.taken == [1, 1, 1, 2]
    assert board.now >= 2 * RETELL_S


def test_bytes_that_changed_while_they_were_copied_fail_the_load_and_the_copies_are_waited_for() -> None:
    board = Board()
    pieces = pieces_of(arriving([1, 2], image=2 * CHUNK))
    board.words = {piece.word_offset: piece.word for piece in pieces}
    copier = Copier(lambda piece: b"", looks=5)
    board.wake = lambda: board.words.update({pieces[0].word_offset: 0})
    with pytest.raises(HearthError) as failed:
        stream(board.arrivals(pieces), copier, board, board.time, windowed=False)
    assert failed.value.failure.code is Code.CHECKPOINT_UNAVAILABLE
    assert copier.waited
    assert board.taken == []


def slow_stream(board: Board, *, stop_after: int = 1000) -> None:
    """Stream bytes that come faster than they are copied, which takes 30 ms for each of 40 pieces."""
    pieces = pieces_of(arriving([1, 2], image=40 * CHUNK, window=2))

    class Slow(Copier):
        def start(self, piece: Piece) -> None:
            super().start(piece)
            board.now += 0.03
            board.words[pieces[len(self.started) % 40].word_offset] = pieces[len(self.started) % 40].word
            board.stopped = len(self.started) >= stop_after

    board.words[pieces[0].word_offset] = pieces[0].word
    copier = Slow(lambda piece: b"", looks=1)
    stream(board.arrivals(pieces), copier, board, board.time, windowed=True)


def test_how_far_it_is_is_told_also_while_nothing_has_to_be_waited_for() -> None:
    board = Board()
    slow_stream(board)
    assert board.sleeps == 0
    assert len(board.told) >= 1.2 / PROGRESS_S / 2
    assert [done for _, done, _ in board.told] == sorted(done for _, done, _ in board.told)


def test_a_copy_that_never_waits_is_stopped_too() -> None:
    board = Board()
    with pytest.raises(HearthError) as failed:
        slow_stream(board, stop_after=3)
    assert failed.value.failure.code is Code.DRAINING
    assert board.taken[-1] == 3
