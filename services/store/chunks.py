"""Chunks from the SSD into the pool: direct I/O by several threads, each chunk verified against its checksum."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import xxhash

from services.store.manifest import ChunkRead, FilePiece, plan_reads, slice_extents
from shared.contracts.manifest import Manifest
from shared.contracts.residency import Extent
from shared.errors import Code, HearthError

_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)  # how filesystems say that they cannot do O_DIRECT


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What a load took. `direct` is False if some file had to be read through the page cache."""

    seconds: float
    direct: bool


class _WeightFile:
    """A weight file opened for direct reads, with the page cache as the fallback."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct: int | None = None
        try:
            self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                os.close(self._buffered)
                raise
        self.direct = self._direct is not None and hasattr(os, "O_DIRECT")

    def read(self, targets: Sequence[memoryview], piece: FilePiece) -> None:
        """Fill `targets` (whole pages) with this piece. Raises OSError; `checkpoint_corrupt` if the file is short."""
        got = 0
        if self.direct and self._direct is not None:
            try:
                got = os.preadv(self._direct, targets, piece.offset)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
                self.direct = False
        # Through the page cache: everything on such a filesystem, and what a direct read stopped short of.
        while got < piece.data_bytes:
            more = os.preadv(self._buffered, _rest(targets, got), piece.offset + got)
            if more == 0:
                raise HearthError(Code.CHECKPOINT_CORRUPT, f"{self.name} ends at byte {piece.offset + got}.")
            got += more
        for view in _rest(targets, piece.data_bytes):
            view[:] = bytes(len(view))

    def close(self) -> None:
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)


def _rest(targets: Sequence[memoryview], skip: int) -> list[memoryview]:
    """What of these buffers lies after their first `skip` bytes."""
    rest: list[memoryview] = []
    for view in targets:
        if skip < len(view):
            rest.append(view[skip:])
        skip = max(0, skip - len(view))
    return rest


class ChunkReader:
    """Reads checkpoints into the pool's memory with `threads` threads of its own."""

    def __init__(self, memory: memoryview, *, threads: int) -> None:
        self._memory = memory
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="chunk")
        self._stop = threading.Event()

    def read(
        self,
        directory: Path,
        manifest: Manifest,
        extents: Sequence[Extent],
        *,
        verify: bool,
        progressed: Callable[[int], None],
    ) -> ReadReport:
        """Bring a checkpoint's image into these extents; blocks. `progressed` hears the bytes done, on chunk threads.

        When it returns or raises, no thread writes to the extents any more. Raises `HearthError`: checkpoint_corrupt
        (a checksum differs or a file is short), checkpoint_unavailable (the disk fails), draining (closed meanwhile).
        """
        began = time.perf_counter()
        files: list[_WeightFile] = []
        try:
            for file in manifest.files:
                files.append(_WeightFile(directory / file.name))
            work = iter(plan_reads(manifest, extents))
            job = _Job(self._memory, files, work, verify, progressed, self._stop)
            wait([self._executor.submit(job.run) for _ in range(min(self._threads, len(manifest.chunks)))])
            if job.error is not None:
                raise job.error
        except OSError as error:
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, f"The checkpoint cannot be read: {error}.") from error
        finally:
            for opened in files:
                opened.close()
        return ReadReport(seconds=time.perf_counter() - began, direct=all(opened.direct for opened in files))

    def close(self) -> None:
        """Stop after the chunks that are being read now."""
        self._stop.set()
        self._executor.shutdown(wait=True, cancel_futures=False)


class _Job:
    """One load, shared by the threads that work on it."""

    def __init__(
        self,
        memory: memoryview,
        files: Sequence[_WeightFile],
        work: Iterator[ChunkRead],
        verify: bool,
        progressed: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        self._memory = memory
        self._files = files
        self._work = work
        self._verify = verify
        self._progressed = progressed
        self._stop = stop
        self._lock = threading.Lock()
        self._done_bytes = 0
        self.error: HearthError | OSError | None = None

    def run(self) -> None:
        """Read chunks until there are no more or one failed."""
        while (chunk := self._next()) is not None:
            try:
                self._read(chunk)
            except (HearthError, OSError) as error:
                self.error = self.error or error
                return
            with self._lock:
                self._done_bytes += chunk.length
                done_bytes = self._done_bytes
            self._progressed(done_bytes)

    def _next(self) -> ChunkRead | None:
        with self._lock:
            if self.error is None and self._stop.is_set():
                self.error = HearthError(Code.DRAINING)
            if self.error is not None:
                return None
            return next(self._work, None)

    def _read(self, chunk: ChunkRead) -> None:
        for piece in chunk.pieces:
            spans = slice_extents(chunk.targets, piece.at, piece.at + piece.length)
            self._files[piece.file].read([self._memory[e.offset : e.offset + e.length] for e in spans], piece)
        if self._verify:
            digest = xxhash.xxh3_64()
            for extent in chunk.targets:
                digest.update(self._memory[extent.offset : extent.offset + extent.length])
            if digest.hexdigest() != chunk.checksum:
                raise HearthError(
                    Code.CHECKPOINT_CORRUPT, f"Chunk {chunk.index} of the checkpoint does not match its checksum."
                )
