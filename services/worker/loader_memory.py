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
    populate: threading.Thread
    users: int = 0


@dataclass(frozen=True)
class Image:
    """A checkpoint's image in this process: `size_bytes` readable bytes at `address`, until `Mappings.release`.

    `segment_address` and `segment_bytes` are the mapping that it is a part of, or its own when it had to be stitched.
    """

    address: int
    size_bytes: int
    segment_address: int
    segment_bytes: int
    stitched: bool
    segment: _Segment | None = field(repr=False, compare=False, default=None)


class Mappings:
    """The mappings of this worker. Thread-safe.

    `writable` asks for a writable mapping where the file allows it: CUDA pins only such memory without special support.
    `before_unmap` is told the address of the mapping of a whole segment before it goes.
    """

    def __init__(self, *, writable: bool = False, before_unmap: Callable[[int], None] | None = None) -> None:
        self._writable = writable
        self._before_unmap = before_unmap
        self._lock = threading.Lock()
        self._segments: dict[str, _Segment] = {}

    def map(self, lease: Lease) -> Image:
        """The image of a leased checkpoint. Raises HearthError: CHECKPOINT_UNAVAILABLE, CHECKPOINT_CORRUPT."""
        if not lease.extents:
            raise HearthError(Code.CHECKPOINT_CORRUPT, "The lease has no extents.")
        try:
            with _opened(lease.segment, self._writable) as (descriptor, writable):
                status = os.fstat(descriptor)
                for extent in lease.extents:
                    inside = (
                        extent.offset >= 0 and extent.length > 0 and extent.offset + extent.length <= status.st_size
                    )
                    if not inside or extent.offset % PAGE_BYTES or extent.length % PAGE_BYTES:
                        raise HearthError(Code.CHECKPOINT_CORRUPT, "The lease's extents do not lie in its segment.")
                if _contiguous(lease):
                    return self._part(lease, descriptor, status, writable)
                return _stitch(lease, descriptor, writable)
        except OSError as error:
            raise HearthError(
                Code.CHECKPOINT_UNAVAILABLE, f"The store's memory cannot be mapped: {error.strerror}."
            ) from error

    def release(self, image: Image) -> None:
        """The image is not used any more: no view on it may be alive. The mapping of a whole segment stays."""
        if image.segment is None:
            _libc.munmap(image.address, image.size_bytes)
            return
        with self._lock:
            image.segment.users -= 1
            current = image.segment in self._segments.values()
            if image.segment.users == 0 and not current:
                self._unmap(image.segment)

    def close(self) -> None:
        """Unmap everything that is not in use."""
        with self._lock:
            for path, segment in list(self._segments.items()):
                if segment.users == 0:
                    del self._segments[path]
                    self._unmap(segment)

    def _part(self, lease: Lease, descriptor: int, status: os.stat_result, writable: bool) -> Image:
        identity = (status.st_dev, status.st_ino)
        with self._lock:
            segment = self._segments.get(lease.segment)
            if segment is None or segment.identity != identity or segment.size_bytes != status.st_size:
                if (
                    segment is not None and segment.users == 0
                ):  # the store started anew: another file under the old name
                    self._unmap(segment)
                address = _mmap(None, status.st_size, writable, mmap.MAP_SHARED, descriptor, 0)
                # The page table is filled beside the first load, which needs only its own pages.
                populate = threading.Thread(
                    target=_populate, args=(address, status.st_size), name="populate", daemon=True
                )
                populate.start()
                segment = _Segment(address, status.st_size, identity, populate)
                self._segments[lease.segment] = segment
            segment.users += 1
        return Image(
            address=segment.address + lease.extents[0].offset,
            size_bytes=sum(extent.length for extent in lease.extents),
            segment_address=segment.address,
            segment_bytes=segment.size_bytes,
            stitched=False,
            segment=segment,
        )

    def _unmap(self, segment: _Segment) -> None:
        segment.populate.join()
        if self._before_unmap is not None:
            self._before_unmap(segment.address)
        _libc.munmap(segment.address, segment.size_bytes)


def _contiguous(lease: Lease) -> bool:
    pairs = zip(lease.extents, lease.extents[1:], strict=False)
    return all(one.offset + one.length == two.offset for one, two in pairs)


def _stitch(lease: Lease, descriptor: int, writable: bool) -> Image:
    size_bytes = sum(extent.length for extent in lease.extents)
    address = _mmap(None, size_bytes, False, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)  # reserves the range
    at = address
    try:
        for extent in lease.extents:
            _mmap(at, extent.length, writable, mmap.MAP_SHARED | _MAP_FIXED, descriptor, extent.offset)
            at += extent.length
    except OSError:
        _libc.munmap(address, size_bytes)
        raise
    return Image(
        address=address, size_bytes=size_bytes, segment_address=address, segment_bytes=size_bytes, stitched=True
    )


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


def _populate(address: int, size_bytes: int) -> None:
    """Fill the page table; ctypes lets go of the interpreter lock meanwhile."""
    step = 64 << 20
    for start in range(0, size_bytes, step):
        if _libc.madvise(address + start, min(step, size_bytes - start), _MADV_POPULATE_READ) != 0:
            return  # an old kernel, or memory that is not there: nothing but speed is lost
