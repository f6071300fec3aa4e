"""Mapping the store's shared memory: a checkpoint's image as one contiguous range of addresses, without a copy.

A lease names a shared-memory file and extents in it. One extent is a part of the mapping of the whole file, which is
made once per worker process; several extents are put side by side in a reserved range with MAP_FIXED, which costs a
system call per extent and again no copy. Plain `mmap` by ctypes: Python's own mmap objects cannot be placed, and keep
no address.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from shared.contracts.manifest import PAGE_BYTES
from shared.contracts.residency import Lease
from shared.errors import Code, HearthError

_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MADV_POPULATE_READ: Final = (
    22  # Linux 5.14; older kernels refuse it, and the pages are mapped one by one as they are used
)

_MADV_HUGEPAGE: Final = 14  # Linux; elsewhere both are refused
_MADV_NOHUGEPAGE: Final = 15

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass
class _Segment:
    """The mapping of a whole shared-memory file."""

    address: int
    size_bytes: int
    identity: tuple[int, int]
    unwanted: threading.Event
    populate: threading.Thread
    users: int = 0


@dataclass(frozen=True)
class Image:
    """A checkpoint's image in this process: `size_bytes` readable bytes at `address`, until `Mappings.release`.

    `segment_address` and `segment_bytes` are the mapping of the whole segment that it came from (0: it is memory of
    this process alone). `owned` says that the range at `address` is this image's own and goes with it.
    """

    address: int
    size_bytes: int
    segment_address: int
    segment_bytes: int
    owned: bool
    segment: _Segment | None = field(repr=False, compare=False, default=None)

    def word(self, offset: int) -> int:
        """The 64-bit word at byte `offset` of the segment; one load of the processor, never half of two words."""
        return ctypes.c_uint64.from_address(self.segment_address + offset).value


class Mappings:
    """The mappings of this worker. Thread-safe.

    A segment is mapped as a whole, once, and stays mapped: the newest for good, an older one (the store has made
    another since) until its last image is released. `writable` asks for a writable mapping where the file allows it:
    CUDA pins only such memory without special support. `before_unmap` is told the address of the mapping of a whole
    segment before it goes.
    """

    def __init__(self, *, writable: bool = False, before_unmap: Callable[[int], None] | None = None) -> None:
        self._writable = writable
        self._before_unmap = before_unmap
        self._lock = threading.Lock()
        self._segments: list[tuple[str, _Segment]] = []  # the newest last

    def prepare(self, path: str) -> Image:
        """Map a whole segment ahead of need. Raises HearthError: CHECKPOINT_UNAVAILABLE."""
        with _mapping_errors(), _opened(path, self._writable) as (descriptor, writable), self._lock:
            segment = self._segment(path, descriptor, writable)
            segment.users += 1
        return _whole(segment)

    def map(self, lease: Lease) -> Image:
        """The image of a leased checkpoint. Raises HearthError: CHECKPOINT_UNAVAILABLE, CHECKPOINT_CORRUPT."""
        return self._map(lease, whole=False)

    def hold(self, lease: Lease) -> Image:
        """The whole segment of a lease, whose extents are not put side by side. Raises as `map` does."""
        return self._map(lease, whole=True)

    def own(self, size_bytes: int) -> Image:
        """Memory of this process alone, zero, in large pages where the kernel gives them. Raises `MemoryError`."""
        try:
            address = _mmap(None, size_bytes, True, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        except OSError as error:
            raise MemoryError(f"{size_bytes} bytes cannot be had") from error
        _libc.madvise(address, size_bytes, _MADV_HUGEPAGE)  # a refusal costs only speed
        return Image(address=address, size_bytes=size_bytes, segment_address=0, segment_bytes=0, owned=True)

    def ask_large_pages(self, image: Image, offset: int, *, wanted: bool) -> None:
        """Whether pages of `own` memory from `offset` on that are touched later are to be large ones.

        Where memory is fragmented the kernel moves other pages to make one: 0.3 GB/s instead of 1.6 GB/s was seen.
        """
        start = -(-offset // PAGE_BYTES) * PAGE_BYTES
        if start < image.size_bytes:
            advice = _MADV_HUGEPAGE if wanted else _MADV_NOHUGEPAGE
            _libc.madvise(image.address + start, image.size_bytes - start, advice)

    def release(self, image: Image) -> None:
        """The image is not used any more: no view on it may be alive."""
        if image.owned:
            _libc.munmap(image.address, image.size_bytes)
        if image.segment is not None:
            with self._lock:
                image.segment.users -= 1
                self._drop_old()

    def close(self) -> None:
        """Unmap everything that is not in use."""
        with self._lock:
            for entry in [entry for entry in self._segments if entry[1].users == 0]:
                self._segments.remove(entry)
                self._unmap(entry[1])

    def _map(self, lease: Lease, *, whole: bool) -> Image:
        if not lease.extents:
            raise HearthError(Code.CHECKPOINT_CORRUPT, "The lease has no extents.")
        with _mapping_errors(), _opened(lease.segment, self._writable) as (descriptor, writable):
            file_bytes = os.fstat(descriptor).st_size
            board_end = lease.arrival.board_offset if lease.arrival else 0
            for extent in lease.extents:
                inside = extent.offset >= 0 and extent.length > 0 and extent.offset + extent.length <= file_bytes
                if not inside or extent.offset % PAGE_BYTES or extent.length % PAGE_BYTES:
                    raise HearthError(Code.CHECKPOINT_CORRUPT, "The lease's extents do not lie in its segment.")
            if lease.segment_bytes > file_bytes or board_end > file_bytes:
                raise HearthError(Code.CHECKPOINT_CORRUPT, "The lease's segment is shorter than it says.")
            with self._lock:
                segment = self._segment(lease.segment, descriptor, writable)
                segment.users += 1
            if whole:
                return _whole(segment)
            size_bytes = sum(extent.length for extent in lease.extents)
            address, owned = segment.address + lease.extents[0].offset, not _contiguous(lease)
            if owned:
                try:
                    address = _stitch(lease, descriptor, writable, size_bytes)
                except OSError:
                    with self._lock:
                        segment.users -= 1
                    raise
        return Image(
            address=address,
            size_bytes=size_bytes,
            segment_address=segment.address,
            segment_bytes=segment.size_bytes,
            owned=owned,
            segment=segment,
        )

    def _segment(self, path: str, descriptor: int, writable: bool) -> _Segment:
        """The mapping of this file, made if need be; it is the newest then."""
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        for entry in self._segments:
            known = entry[1]
            if (entry[0], known.identity, known.size_bytes) == (path, identity, status.st_size):
                self._segments.remove(entry)
                self._segments.append(entry)
                return known
        address = _mmap(None, status.st_size, writable, mmap.MAP_SHARED, descriptor, 0)
        unwanted = threading.Event()
        # The page table is filled beside the first load, which needs only its own pages.
        populate = threading.Thread(
            target=_populate, args=(address, status.st_size, unwanted), name="populate", daemon=True
        )
        segment = _Segment(address, status.st_size, identity, unwanted, populate)
        populate.start()
        self._segments.append((path, segment))
        self._drop_old()
        return segment

    def _drop_old(self) -> None:
        for entry in [entry for entry in self._segments[:-1] if entry[1].users == 0]:
            self._segments.remove(entry)
            self._unmap(entry[1])

    def _unmap(self, segment: _Segment) -> None:
        segment.unwanted.set()
        segment.populate.join()
        if self._before_unmap is not None:
            self._before_unmap(segment.address)
        _libc.munmap(segment.address, segment.size_bytes)


def _whole(segment: _Segment) -> Image:
    return Image(
        address=segment.address,
        size_bytes=segment.size_bytes,
        segment_address=segment.address,
        segment_bytes=segment.size_bytes,
        owned=False,
        segment=segment,
    )


def _contiguous(lease: Lease) -> bool:
    pairs = zip(lease.extents, lease.extents[1:], strict=False)
    return all(one.offset + one.length == two.offset for one, two in pairs)


def _stitch(lease: Lease, descriptor: int, writable: bool, size_bytes: int) -> int:
    """The extents of a lease side by side; where."""
    address = _mmap(None, size_bytes, False, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)  # reserves the range
    at = address
    try:
        for extent in lease.extents:
            _mmap(at, extent.length, writable, mmap.MAP_SHARED | _MAP_FIXED, descriptor, extent.offset)
            at += extent.length
    except OSError:
        _libc.munmap(address, size_bytes)
        raise
    return address


@contextmanager
def _mapping_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HearthError(
            Code.CHECKPOINT_UNAVAILABLE, f"The store's memory cannot be mapped: {error.strerror}."
        ) from error


@contextmanager
def _opened(path: str, writable: bool) -> Iterator[tuple[int, bool]]:
    try:
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        if not writable or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        writable = False
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor, writable
    finally:
        os.close(descriptor)


def _mmap(address: int | None, size_bytes: int, writable: bool, flags: int, descriptor: int, offset: int) -> int:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    mapped = _libc.mmap(address, size_bytes, protection, flags, descriptor, offset)
    if mapped is None or mapped == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(mapped)


def _populate(address: int, size_bytes: int, unwanted: threading.Event) -> None:
    """Fill the page table; ctypes lets go of the interpreter lock meanwhile."""
    step = 64 << 20
    for start in range(0, size_bytes, step):
        if unwanted.is_set():
            return
        if _libc.madvise(address + start, min(step, size_bytes - start), _MADV_POPULATE_READ) != 0:
            return  # an old kernel, or memory that is not there: nothing but speed is lost
