"""The bytes of a lease, piece by piece, and which of them are there yet: waiting for the board, streaming a window.

Pure: how a word of the board is read, what time it is and how one sleeps are arguments, so that orders, windows and
failures are tested without a store, a clock or a device. All of this runs on the thread of a load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from services.worker.ports import LoadWatch
from shared.contracts.residency import FAILED_TURN, Arrival, Lease, arrival_word
from shared.errors import Code, HearthError

POLL_S: Final = 0.0005  # between two looks at the board
# While all of an image is waited for, only the last pieces have to be noticed at once; looking costs processor time.
PATIENT_POLL_S: Final = 0.005
LAST_PIECES: Final = 4
PROGRESS_S: Final = 0.1  # between two words about how far it is
RETELL_S: Final = 0.5  # after which a holder says again what it has consumed: such a message may get lost
PIECE_BYTES: Final = 64 << 20  # of an image that is wholly there: bytes of one copy


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of the image: where it lies in the image and in the segment, and what says that it is there.

    Its bytes are there when the word at byte `word_offset` of the segment equals `word`; 0: they always are.
    """

    image_offset: int
    segment_offset: int
    length: int
    word_offset: int = 0
    word: int = 0


class Copier(Protocol):
    """Copies pieces of a segment somewhere. Copies complete in the order in which they were started."""

    def start(self, piece: Piece) -> None:
        """Begin to copy a piece whose bytes are there. May complete it at once."""

    def finished(self) -> int:
        """How many of the copies that were started are complete."""

    def finish(self) -> None:
        """Wait until all that were started are complete."""


@dataclass(frozen=True, slots=True)
class Time:
    """Monotonic seconds and sleeping, as the thread of a load has them."""

    now: Callable[[], float]
    sleep: Callable[[float], None]


def image_bytes(lease: Lease) -> int:
    """Bytes of the leased image."""
    return lease.arrival.image_bytes if lease.arrival else sum(extent.length for extent in lease.extents)


def streams(lease: Lease) -> bool:
    """Whether the image is larger than its place in the pool, and comes through a window."""
    return lease.arrival is not None and lease.arrival.window_chunks > 0


def pieces_of(lease: Lease, *, piece_bytes: int = PIECE_BYTES) -> tuple[Piece, ...]:
    """The image in order. Pieces of an arriving one are its chunks; else at most `piece_bytes` each.

    Raises HearthError: CHECKPOINT_CORRUPT for a lease whose numbers do not fit each other.
    """
    if lease.arrival is not None:
        return _chunks(lease, lease.arrival)
    pieces: list[Piece] = []
    at = 0
    for extent in lease.extents:
        for start in range(0, extent.length, piece_bytes):
            length = min(piece_bytes, extent.length - start)
            pieces.append(Piece(at, extent.offset + start, length))
            at += length
    return tuple(pieces)


def _chunks(lease: Lease, arrival: Arrival) -> tuple[Piece, ...]:
    size = arrival.chunk_bytes
    if size <= 0 or arrival.image_bytes <= 0 or arrival.board_offset % 8:
        raise _senseless()
    places: list[int] = []
    for number, extent in enumerate(lease.extents):
        whole = extent.length % size == 0 or number == len(lease.extents) - 1
        if extent.offset < 0 or extent.offset % size or extent.length <= 0 or not whole:
            raise _senseless()
        places.extend(range(extent.offset, extent.offset + extent.length, size))
    count = -(-arrival.image_bytes // size)
    window = arrival.window_chunks or count
    room = sum(extent.length for extent in lease.extents)
    if window > len(places) or room < min(arrival.image_bytes, window * size):
        raise _senseless()
    if arrival.board_offset + 8 * (max(places) // size + 1) > lease.segment_bytes:
        raise _senseless()
    return tuple(
        Piece(
            image_offset=number * size,
            segment_offset=places[number % window],
            length=min(size, arrival.image_bytes - number * size),
            word_offset=arrival.board_offset + 8 * (places[number % window] // size),
            word=arrival_word(arrival.tag, number // window),
        )
        for number in range(count)
    )


def _senseless() -> HearthError:
    return HearthError(Code.CHECKPOINT_CORRUPT, "The lease's extents do not lie in its segment.")


def is_there(piece: Piece, word: int) -> bool:
    """Whether the piece's bytes are there, given the word on the board.

    Raises HearthError: CHECKPOINT_UNAVAILABLE when they will never be.
    """
    if piece.word in (0, word):
        return True
    tag, turn = word >> 32, word & 0xFFFFFFFF
    if word == arrival_word(piece.word >> 32, FAILED_TURN):
        raise HearthError(Code.CHECKPOINT_UNAVAILABLE, "The store could not bring the checkpoint's bytes.")
    if word != 0 and (tag != piece.word >> 32 or turn > piece.word & 0xFFFFFFFF):
        raise HearthError(Code.CHECKPOINT_UNAVAILABLE, "The store has given the checkpoint's place away.")
    return False


class Arrivals:
    """Waits for pieces. `read_word` gives the word at a byte of the segment. `waited_s` adds up; `complete_at` is when
    the last piece was found to be there (None: one is missing, or all were always there).

    Raises HearthError: CHECKPOINT_UNAVAILABLE (they will not come), DRAINING (the load was stopped).
    """

    def __init__(self, pieces: Sequence[Piece], read_word: Callable[[int], int], watch: LoadWatch, time: Time) -> None:
        self.pieces: Final = pieces
        self.waited_s = 0.0
        self.complete_at: float | None = None
        self._read_word = read_word
        self._watch = watch
        self._time = time
        self._missing = {number: piece for number, piece in enumerate(pieces) if piece.word}
        self._total_bytes = sum(piece.length for piece in pieces)
        self._told_at: float | None = None
        self.arriving: Final = bool(self._missing)  # whether there ever was anything to wait for

    def wait(self, number: int, meanwhile: Callable[[], None] | None = None, *, patient: bool = False) -> None:
        """Until this piece is there; `meanwhile` is called at every look, which are rarer if the wait is `patient`."""
        started: float | None = None
        while not self._look(number):
            if started is None:
                started = self._time.now()
            if meanwhile is not None:
                meanwhile()
            self.pause(PATIENT_POLL_S if patient else POLL_S)
        if started is not None:
            self.waited_s += self._time.now() - started

    def wait_all(self) -> None:
        """Until every piece is there, in whatever order they come."""
        for number in list(self._missing):
            self.wait(number, patient=len(self._missing) > LAST_PIECES)
        if self._told_at is not None:
            self._watch.arrived(self._total_bytes, self._total_bytes)

    def still(self, number: int) -> None:
        """Assert that what was there a moment ago is there still: what has been copied is what was meant.

        Raises HearthError: CHECKPOINT_UNAVAILABLE.
        """
        piece = self.pieces[number]
        if piece.word and not is_there(piece, self._read_word(piece.word_offset)):
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, "The store has given the checkpoint's place away.")

    def pause(self, seconds: float = POLL_S) -> None:
        """Sleep for a moment; says how far the arrival is, now and then. Raises HearthError: DRAINING."""
        self.tell()
        self._time.sleep(seconds)

    def tell(self) -> None:
        """Say how far the arrival is, now and then. Raises HearthError: DRAINING (nobody wants to know any more)."""
        if self._watch.stopped:
            raise HearthError(Code.DRAINING, "The load was stopped.")
        now = self._time.now()
        if self.arriving and (self._told_at is None or now - self._told_at >= PROGRESS_S):
            self._told_at = now
            self._watch.arrived(self._arrived_bytes(), self._total_bytes)

    def _look(self, number: int) -> bool:
        piece = self._missing.get(number)
        if piece is None:
            return True
        if not is_there(piece, self._read_word(piece.word_offset)):
            return False
        del self._missing[number]
        if not self._missing:
            self.complete_at = self._time.now()
        return True

    def _arrived_bytes(self) -> int:
        """Pieces that are there now. One of a later turn is not yet: its place holds an earlier one."""
        there = sum(self._read_word(piece.word_offset) == piece.word for piece in self._missing.values())
        missing = len(self._missing) - there
        if not missing:
            return self._total_bytes
        return self._total_bytes * (len(self.pieces) - missing) // len(self.pieces)


def stream(arrivals: Arrivals, copier: Copier, watch: LoadWatch, time: Time, *, windowed: bool) -> None:
    """Copy every piece as soon as it is there, in order; in a window, say what has been taken as soon as it has.

    Raises what `Arrivals` and the copier raise; then, too, no copy is under way any more.
    """
    taken, told_at = 0, time.now()

    def settle() -> None:
        nonlocal taken, told_at
        finished = copier.finished()
        for number in range(taken, finished):
            arrivals.still(number)
        now = time.now()
        if windowed and finished and (finished > taken or now - told_at >= RETELL_S):
            watch.consumed(finished)
            told_at = now
        taken = finished

    try:
        for number, piece in enumerate(arrivals.pieces):
            arrivals.wait(number, settle)
            copier.start(piece)
            settle()
            arrivals.tell()  # bytes that come faster than they are copied are never waited for
        while taken < len(arrivals.pieces):
            arrivals.pause()
            settle()
    finally:
        copier.finish()
