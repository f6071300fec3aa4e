"""The DRAM pool: one shared-memory file that the store fills and workers map."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
from pathlib import Path
from typing import Final

from shared.errors import Code, HearthError

_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE of Linux 5.14, not named by this Python


def pool_name(prefix: str, server_id: str, nonce: str) -> str:
    """File name of a pool."""
    return f"hearth-{prefix}-{server_id}-{nonce}"


def remove_stale_pools(directory: Path, *, prefix: str, server_id: str) -> list[str]:
    """Unlink the pools that dead stores of this server left in `directory`; their names. A live store's is locked."""
    pattern = re.compile(re.escape(pool_name(prefix, server_id, "")) + r"[0-9a-f]{8}")
    removed: list[str] = []
    for path in sorted(directory.iterdir()):
        if not pattern.fullmatch(path.name):
            continue
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:
            continue  # somebody else's, or gone
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path.name)
        except BlockingIOError:
            continue
        finally:
            os.close(file)
    return removed


class Pool:
    """`size_bytes` of shared memory, allocated and touched, so that no load meets a page fault or a full tmpfs.

    Raises `HearthError` (out_of_memory) if `directory` has not enough room, OSError if it cannot be written.
    """

    def __init__(self, directory: Path, *, prefix: str, server_id: str, size_bytes: int) -> None:
        nonce = secrets.token_hex(4)
        self.path = directory / pool_name(prefix, server_id, nonce)
        self.size_bytes = size_bytes
        status = os.statvfs(directory)
        free_bytes = status.f_bavail * status.f_frsize
        if free_bytes < size_bytes:
            raise HearthError(
                Code.OUT_OF_MEMORY,
                f"The DRAM pool needs {size_bytes} bytes and {directory} has {free_bytes} free; set HEARTH_DRAM_BYTES.",
            )
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, size_bytes)
            self._map = mmap.mmap(self._file, size_bytes)
            self._touch()
        except OSError as error:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise HearthError(
                    Code.OUT_OF_MEMORY, f"{directory} has no room for a DRAM pool of {size_bytes} bytes."
                ) from error
            raise
        self.memory = memoryview(self._map)

    def _touch(self) -> None:
        with contextlib.suppress(OSError):  # a kernel without huge pages in shared memory: small ones do
            self._map.madvise(mmap.MADV_HUGEPAGE)
        os.posix_fallocate(self._file, 0, self.size_bytes)
        with contextlib.suppress(OSError):  # an older kernel: the pages exist already and are mapped at their first use
            self._map.madvise(_POPULATE_WRITE)

    def close(self) -> None:
        """Unlink the file and unmap it. Whoever has it mapped keeps the bytes until it unmaps them too."""
        self.path.unlink(missing_ok=True)
        # The traceback of a failed read may still hold a view; then the end of the process unmaps.
        with contextlib.suppress(BufferError):
            self.memory.release()
            self._map.close()
        os.close(self._file)
