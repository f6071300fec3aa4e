"""The DRAM pool: one shared-memory file that the store fills and workers map, and that may outlive the store.

The file is `chunk_count` chunks, then the *board*: one uint64 per chunk, padded to whole pages. Beside it lies the
state (`<segment>.state`): what the next life of the store may believe about the bytes. Both belong to one user alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from services.store.pool_state import CopyState, KeptState, PoolState, decode_state, encode_state
from shared.contracts.manifest import padded_bytes
from shared.contracts.residency import FAILED_TURN, Extent, arrival_word
from shared.errors import Code, HearthError
from shared.sizes import size as readable

STATE_SUFFIX: Final = ".state"
_NEW_SUFFIX: Final = ".state.new"
_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE of Linux 5.14, not named by this Python
_COLLAPSE: Final = 25  # MADV_COLLAPSE of Linux 6.1
_SLICE_BYTES: Final = 64 << 20  # madvise holds the interpreter's lock: the bus must be answered between two slices


def pool_name(prefix: str, server_id: str, nonce: str) -> str:
    """File name of a pool."""
    return f"hearth-{prefix}-{server_id}-{nonce}"


@dataclass(frozen=True, slots=True)
class _Found:
    """A segment of an earlier life, locked by us."""

    path: Path
    file: int
    state: PoolState | None
    saved_at: float


class Pool:
    """Shared memory, allocated and touched, so that no load meets a page fault or a full tmpfs. Made by `open`.

    `memory` is the chunks' bytes. `restored` is what an earlier life left in them, or None; `removed` names the
    segments of earlier lives that were of no use. `huge_bytes` is how much the kernel maps by huge pages.
    """

    def __init__(
        self,
        path: Path,
        file: int,
        *,
        chunk_bytes: int,
        chunk_count: int,
        restored: PoolState | None = None,
        removed: tuple[str, ...] = (),
    ) -> None:
        """Maps a segment that is locked and has its size; `open` is for others."""
        self.path = path
        self.nonce = path.name.rpartition("-")[2]
        self.chunk_bytes = chunk_bytes
        self.chunk_count = chunk_count
        self.data_bytes = chunk_bytes * chunk_count
        self.board_offset = self.data_bytes
        self.segment_bytes = segment_bytes(chunk_bytes, chunk_count)
        self.restored = restored  # below, what the board says of it
        self.removed = removed
        self._file = file
        self._map = mmap.mmap(file, self.segment_bytes)
        with contextlib.ExitStack() as undo:
            undo.callback(self._map.close)
            self._touch()
            undo.pop_all()
        whole = memoryview(self._map)
        self.memory = whole[: self.data_bytes]
        self._board = whole[self.data_bytes : self.data_bytes + 8 * chunk_count].cast("Q")
        whole.release()
        self.huge_bytes = _huge_bytes(path)
        if restored is not None:
            self.restored = self._settled(restored)

    @classmethod
    def open(cls, directory: Path, *, prefix: str, server_id: str, chunk_bytes: int, chunk_count: int) -> Pool:
        """The pool of this server: what an earlier life left if it is of use, else a new one.

        Of use is a segment of the same geometry with a sound state. All others that dead stores of this server left are
        removed; a living store's is locked and left alone. Raises `HearthError`: out_of_memory if `directory` has not
        enough room, unavailable if it cannot be written.
        """
        try:
            return cls._open(directory, prefix, server_id, chunk_bytes, chunk_count)
        except OSError as error:
            message = f"The DRAM pool cannot be made in {directory}: {error.strerror or error}."
            raise HearthError(Code.UNAVAILABLE, message) from error

    @classmethod
    def _open(cls, directory: Path, prefix: str, server_id: str, chunk_bytes: int, chunk_count: int) -> Pool:
        size = segment_bytes(chunk_bytes, chunk_count)
        found = _find(directory, pool_name(prefix, server_id, ""), chunk_bytes, chunk_count)
        found.sort(key=lambda one: (one.state is not None, one.saved_at))
        adopted = found.pop() if found and found[-1].state is not None else None
        for one in found:
            try:
                _remove(one.path)
            finally:
                os.close(one.file)
        if adopted is not None:
            path, file = adopted.path, adopted.file
        else:
            _require(directory, size)
            path = directory / pool_name(prefix, server_id, secrets.token_hex(4))
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if adopted is None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(file, size)
            return cls(
                path,
                file,
                chunk_bytes=chunk_bytes,
                chunk_count=chunk_count,
                restored=adopted.state if adopted is not None else None,
                removed=tuple(one.path.name for one in found),
            )
        except OSError as error:
            with contextlib.suppress(OSError):  # else the next start does
                _remove(path)
            os.close(file)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise HearthError(
                    Code.OUT_OF_MEMORY, f"{directory} has no room for a DRAM pool of {readable(size)}."
                ) from error
            raise

    def _touch(self) -> None:
        """Give the segment its memory: allocate it, map it here, and ask for huge pages. Raises OSError (ENOSPC)."""
        with contextlib.suppress(OSError):  # a kernel without huge pages in shared memory: small ones do
            self._map.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, self.segment_bytes, _SLICE_BYTES):
            length = min(_SLICE_BYTES, self.segment_bytes - start)
            os.posix_fallocate(self._file, start, length)
            with contextlib.suppress(OSError):  # an older kernel: the pages exist already and are mapped when used
                self._map.madvise(_POPULATE_WRITE, start, length)
        with contextlib.suppress(OSError):  # where the mount gives no huge pages by itself, they may be had on demand
            for start in range(0, self.data_bytes, _SLICE_BYTES):
                self._map.madvise(_COLLAPSE, start, min(_SLICE_BYTES, self.data_bytes - start))

    def _settled(self, state: PoolState) -> PoolState:
        """What is left of a state when the board has been looked at; the board says "not yet" for everything else.

        Of what was arriving there is all or nothing: whoever waits for the rest hears that it will not come.
        """
        kept: list[KeptState] = []
        lost: list[KeptState] = []
        for one in state.kept:
            chunks = list(self._chunks(one.extents))[: -(-one.image_bytes // self.chunk_bytes)]
            there = one.whole or all(self._board[chunk] == arrival_word(one.tag, 0) for chunk in chunks)
            (kept if there else lost).append(one)
        places = [copy.extents for copy in state.copies] + [one.extents for one in kept]
        believed = {chunk for extents in places for chunk in self._chunks(extents)}
        for chunk in range(self.chunk_count):
            if chunk not in believed:
                self._board[chunk] = 0
        for one in lost:
            self.fail(one.extents, one.tag)
        gone = {one.extents[0].offset for one in lost}
        leases = tuple(one for one in state.leases if one.lease.extents[0].offset not in gone)
        return msgspec.structs.replace(state, kept=tuple(kept), leases=leases)

    def _chunks(self, extents: Iterable[Extent]) -> Iterable[int]:
        """The chunks of the pool that these extents touch."""
        for extent in extents:
            yield from range(extent.offset // self.chunk_bytes, -(-(extent.offset + extent.length) // self.chunk_bytes))

    def clear(self, extents: Iterable[Extent]) -> None:
        """Let the board say "not yet" for every chunk of these extents."""
        for chunk in self._chunks(extents):
            self._board[chunk] = 0

    def fail(self, extents: Iterable[Extent], tag: int) -> None:
        """Let the board say that what load `tag` was to bring into these extents will not come."""
        for chunk in self._chunks(extents):
            self._board[chunk] = arrival_word(tag, FAILED_TURN)

    def announce(self, chunk: int, word: int) -> None:
        """Let the board say `word` for a chunk. One aligned store of 8 bytes: a reader sees the old word or the new."""
        self._board[chunk] = word

    def word(self, chunk: int) -> int:
        """What the board says for a chunk."""
        return self._board[chunk]

    def save(self, state: PoolState) -> bool:
        """Write down what the pool holds, in one step: the next life finds this state or the one before.

        When that fails, because somebody else has filled the tmpfs, the next life finds no state: an old one would
        claim what is about to be overwritten. False, then. Raises OSError if even that cannot be had. (Nothing is
        synced: a tmpfs and its files end together.)
        """
        new = self.path.with_name(self.path.name + _NEW_SUFFIX)
        try:
            file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                left = memoryview(encode_state(state))
                while left:
                    left = left[os.write(file, left) :]
            finally:
                os.close(file)
            new.rename(self.path.with_name(self.path.name + STATE_SUFFIX))
        except OSError:
            self.path.with_name(self.path.name + STATE_SUFFIX).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            return False
        return True

    def close(self, *, keep: bool = False) -> None:
        """Unmap and unlock the segment; unless `keep`, unlink it and its state.

        Whoever has it mapped keeps the bytes until it unmaps them too.
        """
        if not keep:
            _remove(self.path)
        # The traceback of a failed read may still hold a view; then the end of the process unmaps.
        with contextlib.suppress(BufferError):
            self.memory.release()
            self._board.release()
            self._map.close()
        os.close(self._file)


def segment_bytes(chunk_bytes: int, chunk_count: int) -> int:
    """Size of a segment: its chunks and the board."""
    return chunk_bytes * chunk_count + padded_bytes(8 * chunk_count)


def _find(directory: Path, name: str, chunk_bytes: int, chunk_count: int) -> list[_Found]:
    """The segments of dead stores whose names begin like this, locked. Those without a sound state have none.

    Files of states without a segment are removed.
    """
    pattern = re.compile(re.escape(name) + r"[0-9a-f]{8}")
    found: list[_Found] = []
    for path in sorted(directory.iterdir()):
        if not pattern.fullmatch(path.name):
            continue
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # somebody else's, or gone
        try:
            status = os.fstat(file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_ours(status) or os.stat(path, follow_symlinks=False).st_ino != status.st_ino:
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):  # a living store's; or not a file that we made; or gone meanwhile
            os.close(file)
            continue
        state, saved_at = _load(path, status.st_size, chunk_bytes, chunk_count)
        found.append(_Found(path=path, file=file, state=state, saved_at=saved_at))
    for path in sorted(directory.iterdir()):
        base, dot, suffix = path.name.partition(".")
        if pattern.fullmatch(base) and dot + suffix in (STATE_SUFFIX, _NEW_SUFFIX) and not (directory / base).exists():
            with contextlib.suppress(OSError):
                path.unlink()
    return found


def _is_ours(status: os.stat_result) -> bool:
    """Whether nobody else can have written to this file: the directory is everybody's."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _load(path: Path, size: int, chunk_bytes: int, chunk_count: int) -> tuple[PoolState | None, float]:
    """The state beside a segment and when it was written; None unless it is sound and fits."""
    try:
        file = os.open(path.with_name(path.name + STATE_SUFFIX), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None, 0.0
    with os.fdopen(file, "rb") as opened:
        status = os.fstat(file)
        if not _is_ours(status):
            return None, 0.0
        try:
            state = decode_state(opened.read())
        except (ValueError, OSError):
            return None, 0.0
    if size != segment_bytes(chunk_bytes, chunk_count) or not _fits(state, path, chunk_bytes, chunk_count):
        return None, 0.0
    return state, status.st_mtime


def _fits(state: PoolState, path: Path, chunk_bytes: int, chunk_count: int) -> bool:
    """Whether a state can be one of this segment: same geometry, copies in chunks of their own, leases on copies."""
    if (state.chunk_bytes, state.chunk_count) != (chunk_bytes, chunk_count):
        return False
    taken: set[int] = set()
    places: dict[str, list[Extent]] = {}
    named: set[str] = set()
    parts: list[CopyState | KeptState] = [*state.copies, *state.kept]
    for copy in parts:
        for extent in copy.extents:
            first, odd = divmod(extent.offset, chunk_bytes)
            count, odd_too = divmod(extent.length, chunk_bytes)
            if odd or odd_too or first < 0 or count < 1 or first + count > chunk_count:
                return False
            chunks = range(first, first + count)
            if not taken.isdisjoint(chunks):
                return False
            taken.update(chunks)
        if not copy.extents or (isinstance(copy, CopyState) and copy.checkpoint_id in named):
            return False
        if isinstance(copy, CopyState):
            named.add(copy.checkpoint_id)
        elif not 0 < copy.image_bytes <= sum(extent.length for extent in copy.extents) or not 0 < copy.tag < 2**31:
            return False
        places.setdefault(copy.checkpoint_id, []).extend(copy.extents)
    for held in state.leases:
        place = places.get(held.lease.checkpoint.checkpoint_id)
        if place is None or not held.lease.extents or held.lease.segment != str(path) or not held.ttl_s > 0:
            return False
        for part in held.lease.extents:
            end = part.offset + part.length
            inside = (whole.offset <= part.offset < end <= whole.offset + whole.length for whole in place)
            if not any(inside):
                return False
    return True


def _require(directory: Path, size: int) -> None:
    """Raises `out_of_memory` if `directory` has fewer bytes free."""
    status = os.statvfs(directory)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < size:
        raise HearthError(
            Code.OUT_OF_MEMORY,
            f"The DRAM pool needs {readable(size)} and {directory} has {readable(free_bytes)} free; "
            "set HEARTH_DRAM_BYTES (hearth up: --dram) to less.",
        )


def _remove(segment: Path) -> None:
    """Unlink a segment, its state first: a segment without one is not believed."""
    for name in (segment.name + STATE_SUFFIX, segment.name + _NEW_SUFFIX, segment.name):
        segment.with_name(name).unlink(missing_ok=True)


def _huge_bytes(path: Path) -> int:
    """How much of our mapping of this file is by huge pages, as the kernel accounts for it; 0 if it does not."""
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        return 0
    found = 0
    inside = False
    for line in text.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(f" {path}")
        elif inside and line.startswith(("ShmemPmdMapped:", "FilePmdMapped:")):
            found += int(line.split()[1]) * 1024
    return found


__all__ = ["STATE_SUFFIX", "Pool", "pool_name", "segment_bytes"]
