"""A directory of this server as a source."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Final

from services.store.manifest import corrupt, is_file_name
from services.store.source_model import is_small_file
from shared.contracts.manifest import MANIFEST_NAME, PAGE_BYTES, padded_bytes
from shared.errors import Code, HearthError
from shared.sizes import size

_VECTORS: Final = 1024  # buffers of one preadv: IOV_MAX of Linux
_NO_DIRECT: Final = (errno.EINVAL, errno.EOPNOTSUPP)  # how file systems say that they cannot do O_DIRECT
_DIRECT_BYTES: Final = 2**19  # of a read that bypasses the page cache
_BLOCK_BYTES: Final = 2**22  # of one direct read
_LOCKED_BYTES: Final = 2**16  # of a copy that is faster than letting go of the interpreter's lock


def absolute_directory(url: str) -> Path:
    """The directory that a source's url names. Raises `invalid_checkpoint`, or `checkpoint_unavailable` if the
    operating system has no such paths."""
    path = Path(url)
    if not path.is_absolute() or "\0" in url:
        raise corrupt(f"{url[:200]!r} is neither an absolute directory nor hf:ORG/NAME.")
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise corrupt(f"{url[:200]} does not exist on this server.") from error
    except OSError as error:
        message = f"{url[:200]} cannot be read: {error.strerror or error}."
        raise HearthError(Code.CHECKPOINT_UNAVAILABLE, message) from error
    if not S_ISDIR(status.st_mode):
        raise corrupt(f"{url[:200]} is not a directory.")
    return path


class LocalTree:
    """A directory of this server as a `SourceTree`.

    Every read opens its file anew and looks whether it is still the one that was listed: a file that changes meanwhile
    is noticed, and no number of shards exhausts the descriptors. What the page cache does not hold yet is read past it.
    Raises `HearthError` if the directory cannot be listed, or a file of the model is a link that leaves it.
    """

    remote = False

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._closed = False
        self._threads = threading.local()
        self._found: dict[str, _Found] = {}
        self.url = str(directory)
        try:
            for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
                if is_file_name(entry.name) and entry.is_file():
                    self._found[entry.name] = self._look(entry.name)
        except OSError as error:
            message = f"{directory} cannot be read: {error.strerror or error}."
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, message) from error
        self.files: Mapping[str, int] = {name: found.bytes for name, found in self._found.items()}
        lines: list[str] = []
        for name, found in self._found.items():
            if is_small_file(name) or name.endswith((".safetensors", ".index.json")) or name == MANIFEST_NAME:
                self._refuse_leaving(name)
                lines.append(f"{name} {found.bytes} {found.mtime_ns} {found.inode}\n")
        self.revision = hashlib.sha256("".join(lines).encode()).hexdigest()[:32]

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """See `SourceTree`."""
        self.read_parts(name, offset, [into])

    def read_parts(self, name: str, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill these buffers, one after another, from byte `offset` of a file. Raises like `SourceTree.read`."""
        wanted = sum(map(len, parts))
        with self._opened(name) as file:
            cached = wanted == 0 or (_is_cached(file, offset) and _is_cached(file, offset + wanted - 1))
            if cached or wanted < _DIRECT_BYTES or not self._read_direct(file, offset, parts):
                _read_buffered(file, name, offset, parts)
            if not cached:
                # What nobody else had read is not needed again: leave the page cache to others.
                os.posix_fadvise(file, offset, wanted, os.POSIX_FADV_DONTNEED)

    def _read_direct(self, file: int, offset: int, parts: Sequence[memoryview]) -> bool:
        """The same past the page cache, for little more than half of the processor's time; False if it cannot be."""
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))
            at, block = offset // PAGE_BYTES * PAGE_BYTES, self._block()
            skip = offset - at
            rest = [part for part in reversed(parts) if len(part)]
            while rest:
                got = os.preadv(file, [block[: min(len(block), padded_bytes(skip + sum(map(len, rest))))]], at)
                if got <= skip:
                    return False  # the end of the file, which the other way tells
                at += got
                data = block[skip:got]
                while len(data) and rest:
                    part = rest.pop()
                    count = min(len(part), len(data))
                    _copy(part, data, count)
                    data = data[count:]
                    if count < len(part):
                        rest.append(part[count:])
                skip = at % PAGE_BYTES  # a read that stopped within a page
                at -= skip
        except OSError as error:
            if error.errno in _NO_DIRECT:
                return False
            raise
        finally:
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return True

    def _block(self) -> memoryview:
        """This thread's buffer for direct reads, at a page boundary."""
        held: memoryview | None = getattr(self._threads, "block", None)
        if held is None:
            held = self._threads.block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
        return held

    def read_small(self, name: str, limit_bytes: int) -> bytes:
        """See `SourceTree`."""
        size_bytes = self._listed(name).bytes
        if size_bytes > limit_bytes:
            raise HearthError(Code.TOO_LARGE, f"{name} has {size(size_bytes)}, more than {size(limit_bytes)}.")
        data = bytearray(size_bytes)
        self.read(name, 0, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """See `SourceTree`."""
        self._closed = True

    def _look(self, name: str) -> _Found:
        path = self._directory / name
        status = path.stat()
        return _Found(status.st_size, status.st_mtime_ns, status.st_ino, _leaves(self._directory, path))

    def _listed(self, name: str) -> _Found:
        if self._closed:
            raise HearthError(Code.DRAINING)
        found = self._found.get(name)
        if found is None:
            raise HearthError(Code.NOT_FOUND, f"{self.url} has no file {name!r}.")
        self._refuse_leaving(name)
        return found

    def _refuse_leaving(self, name: str) -> None:
        if self._found[name].leaves:
            raise corrupt(f"{name} is a link that leaves its directory.")

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        found = self._listed(name)
        try:
            # A pipe that took the file's place must not hold us up.
            file = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(file)
                same = (status.st_size, status.st_mtime_ns, status.st_ino)
                if same != (found.bytes, found.mtime_ns, found.inode):
                    message = f"{name} changed while {self.url} was read; try again."
                    raise HearthError(Code.CHECKPOINT_UNAVAILABLE, message)
                yield file
            finally:
                os.close(file)
        except OSError as error:
            message = f"{name} cannot be read: {error.strerror or error}."
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, message) from error


@dataclass(frozen=True, slots=True)
class _Found:
    bytes: int
    mtime_ns: int
    inode: int
    leaves: bool


def _is_cached(file: int, offset: int) -> bool:
    """Whether the page cache has this byte already, as far as the file system tells."""
    try:
        return os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:
        return False


def _read_buffered(file: int, name: str, offset: int, parts: Sequence[memoryview]) -> None:
    got = 0
    for start in range(0, len(parts), _VECTORS):
        views = list(parts[start : start + _VECTORS])
        until = got + sum(map(len, views))
        while got < until:
            count = os.preadv(file, views, offset + got)
            if count == 0:
                raise corrupt(f"{name} is truncated: it ends at byte {offset + got}.")
            got += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]


def _copy(target: memoryview, source: memoryview, size_bytes: int) -> None:
    """Copy without the interpreter's lock, which assigning to a slice would hold."""
    if size_bytes < _LOCKED_BYTES:
        target[:size_bytes] = source[:size_bytes]
        return
    to, of = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (target, source))
    ctypes.memmove(to, of, size_bytes)


def _leaves(directory: Path, path: Path) -> bool:
    """Whether a file is a link out of its directory; into the blobs of a Hugging Face cache is allowed, as snapshots
    have it."""
    if not path.is_symlink():
        return False
    real, home = path.resolve(), directory.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    return real.parent not in (home, cache)
