"""A checkpoint's weight files on the SSD, chunk by chunk and past the page cache: reads, writes, repair in place."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from services.store.manifest import file_pieces
from shared.contracts.manifest import PAGE_BYTES, Manifest, WeightFile
from shared.errors import Code, HearthError

_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_NO_DIRECT: Final = (errno.EINVAL, errno.EOPNOTSUPP)  # how file systems say that they cannot do O_DIRECT
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def _cannot(verb: str, name: str, error: OSError) -> HearthError:
    """The HearthError of a failing disk."""
    if error.errno in _FULL:
        return HearthError(Code.NO_CAPACITY, f"{name} cannot be {verb}: {error.strerror}.")
    return HearthError(Code.CHECKPOINT_UNAVAILABLE, f"{name} cannot be {verb}: {error.strerror}.")


class OpenFile:
    """One open file with two descriptors: one that bypasses the page cache, and one for what cannot.

    `direct` turns False, for good, when the file system refuses O_DIRECT. Then nothing stays in the page cache
    either: what was read or written is dropped from it, so that one load does not push out what others need.
    """

    def __init__(self, path: Path, flags: int) -> None:
        self.name = path.name
        self._buffered = os.open(path, flags | os.O_CLOEXEC, 0o644)
        self._direct = -1
        if _DIRECT:
            try:
                self._direct = os.open(path, (flags & ~(os.O_CREAT | os.O_EXCL)) | _DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    os.close(self._buffered)
                    raise
        self.direct = self._direct >= 0
        # Nothing is read ahead: another thread may not want it yet, and nobody would drop it.
        os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, into: memoryview, offset: int, data_bytes: int, block_bytes: int) -> None:
        """Fill `into` (whole pages) with `data_bytes` from byte `offset` and zeros behind them. Raises OSError.

        Raises `checkpoint_corrupt` if the file is shorter.
        """
        got = 0
        while self.direct and got < data_bytes:
            try:
                more = os.preadv(self._direct, [into[got : got + block_bytes]], offset + got)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
                self.direct = False
                break
            got += more
            if more == 0 or got % PAGE_BYTES:  # the end of the file; or, before it, somewhere O_DIRECT cannot go on
                break
        if got < data_bytes:
            began = got
            while got < data_bytes:
                more = os.preadv(self._buffered, [into[got:data_bytes]], offset + got)
                if more == 0:
                    raise HearthError(Code.CHECKPOINT_CORRUPT, f"{self.name} ends at byte {offset + got}.")
                got += more
            os.posix_fadvise(self._buffered, offset + began, data_bytes - began, os.POSIX_FADV_DONTNEED)
        if data_bytes < len(into):
            into[data_bytes:] = bytes(len(into) - data_bytes)

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at byte `offset`, a whole number of pages. Raises OSError."""
        done, whole = 0, len(data) // PAGE_BYTES * PAGE_BYTES
        while self.direct and done < whole:
            try:
                done += os.pwrite(self._direct, data[done:whole], offset + done)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
                self.direct = False
                break
            if done % PAGE_BYTES:
                break
        # The last part of a page of a file; everything, where there is no O_DIRECT.
        if done < len(data):
            while done < len(data):
                done += os.pwrite(self._buffered, data[done:], offset + done)
            # Begins to write what is dirty and drops what has been written; so the cache holds a few chunks at most.
            os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_DONTNEED)

    def allocate(self, size_bytes: int) -> None:
        """Make the file this long, its blocks taken, so that a full disk shows now. Raises OSError."""
        if size_bytes:
            os.posix_fallocate(self._buffered, 0, size_bytes)
        os.ftruncate(self._buffered, size_bytes)

    def sync(self) -> None:
        """Make everything durable. Raises OSError."""
        os.fsync(self._buffered)
        os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._buffered)
        if self._direct >= 0:
            os.close(self._direct)


def _open_all(directory: Path, files: Sequence[WeightFile], flags: int, verb: str) -> list[OpenFile]:
    opened: list[OpenFile] = []
    for file in files:
        try:
            opened.append(OpenFile(directory / file.name, flags))
        except OSError as error:
            for other in opened:
                other.close()
            raise _cannot(verb, file.name, error) from error
    return opened


class StoredImage:
    """The chunks of a checkpoint in the SSD tier: a `ChunkOrigin`. Thread-safe; close it when nobody reads any more.

    Buffers must lie at page boundaries. Raises `HearthError`: checkpoint_unavailable (the disk fails),
    checkpoint_corrupt (a file is shorter than the manifest says).
    """

    def __init__(self, directory: Path, manifest: Manifest, *, block_bytes: int = 0) -> None:
        """`block_bytes` is the most that one system call reads; 0: a whole chunk."""
        self._specs = manifest.files
        self._chunk_bytes = manifest.chunk_bytes
        self._block_bytes = block_bytes or manifest.chunk_bytes
        self._files = _open_all(directory, manifest.files, os.O_RDONLY, "read")

    @property
    def direct(self) -> bool:
        """Whether all files are read past the page cache, so far."""
        return all(file.direct for file in self._files)

    def read(self, index: int, into: memoryview) -> None:
        """Fill `into` with chunk `index`, the padding of files included."""
        for piece in file_pieces(self._specs, self._chunk_bytes, index):
            file = self._files[piece.file]
            try:
                file.read(into[piece.at : piece.at + piece.length], piece.offset, piece.data_bytes, self._block_bytes)
            except OSError as error:
                raise _cannot("read", file.name, error) from error

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


class ImageWriter:
    """Writes the chunks of an image into its weight files, in any order and from any thread: a `ChunkSink`.

    From the beginning the files have their final sizes and own their blocks. Raises `HearthError`: no_capacity (the
    disk or a quota is full), checkpoint_unavailable (the disk fails).
    """

    def __init__(self, directory: Path, files: Sequence[WeightFile], *, chunk_bytes: int) -> None:
        """Creates the files, which must not be there."""
        self._prepare(directory, files, chunk_bytes, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    @classmethod
    def open_existing(cls, directory: Path, files: Sequence[WeightFile], *, chunk_bytes: int) -> ImageWriter:
        """A writer that goes on with files of an earlier one; those that are missing are created."""
        writer = cls.__new__(cls)
        writer._prepare(directory, files, chunk_bytes, os.O_RDWR | os.O_CREAT)
        return writer

    def _prepare(self, directory: Path, files: Sequence[WeightFile], chunk_bytes: int, flags: int) -> None:
        self._specs = tuple(files)
        self._chunk_bytes = chunk_bytes
        self._files = _open_all(directory, files, flags, "written")
        for file, spec in zip(self._files, files, strict=True):
            try:
                file.allocate(spec.bytes)
            except OSError as error:
                self.close()
                raise _cannot("written", file.name, error) from error

    @property
    def direct(self) -> bool:
        """Whether all files are written past the page cache, so far."""
        return all(file.direct for file in self._files)

    def write(self, index: int, view: memoryview) -> None:
        """Write chunk `index` from `view`, which lies at a page boundary; padding is left out."""
        for piece in file_pieces(self._specs, self._chunk_bytes, index):
            file = self._files[piece.file]
            try:
                file.write(view[piece.at : piece.at + piece.data_bytes], piece.offset)
            except OSError as error:
                raise _cannot("written", file.name, error) from error

    def finish(self) -> None:
        """Make everything that was written durable (the directory's entries are the caller's)."""
        for file in self._files:
            try:
                file.sync()
            except OSError as error:
                raise _cannot("written", file.name, error) from error

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def rewrite(directory: Path, manifest: Manifest, index: int, view: memoryview) -> None:
    """Put a sound chunk in the place of a corrupt one, durably, while others may read the checkpoint.

    Raises `HearthError` like `ImageWriter`.
    """
    for piece in file_pieces(manifest.files, manifest.chunk_bytes, index):
        (file,) = _open_all(directory, [manifest.files[piece.file]], os.O_RDWR, "written")
        try:
            file.write(view[piece.at : piece.at + piece.data_bytes], piece.offset)
            file.sync()
        except OSError as error:
            raise _cannot("written", file.name, error) from error
        finally:
            file.close()


__all__ = ["ImageWriter", "StoredImage", "rewrite"]
