"""A checkpoint whose chunks are on their way into the SSD tier: its directory, and the journal of what has arrived.

The directory is where the checkpoint stays: manifest and small files are whole from the beginning, the weight files
have their final size and holes in them. The journal, `.arriving`, has one byte per chunk: 1 once the chunk's bytes were
written. It is no proof, for after a crash of the machine the journal's byte may have reached the disk and the chunk's
not; so a chunk counts only when it has been verified in this life of the store, and the journal says which chunks are
worth reading again. While the journal is there, the directory is no checkpoint: its removal is the commit.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from services.store.manifest import chunk_count
from services.store.routes import COMING, HERE
from shared.contracts.manifest import Manifest

JOURNAL: Final = ".arriving"


def journal_marks(directory: Path, manifest: Manifest) -> frozenset[int]:
    """The chunks that the journal names. Raises OSError; FileNotFoundError when the directory has none."""
    marks = (directory / JOURNAL).read_bytes()
    return frozenset(index for index, mark in enumerate(marks[: len(manifest.chunks)]) if mark)


def chunk_bytes_of(manifest: Manifest, index: int) -> int:
    """The length of a chunk of the image in bytes; the last one is as long as what is left."""
    return min(manifest.chunk_bytes, manifest.image_bytes() - index * manifest.chunk_bytes)


class Arriving:
    """The arrival of one checkpoint. Every method may be called on any thread; those that write raise OSError."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._image_bytes = manifest.image_bytes()
        count = chunk_count(self._image_bytes, manifest.chunk_bytes)
        self.claimed = journal_marks(directory, manifest)
        self._journal = os.open(directory / JOURNAL, os.O_RDWR | os.O_CLOEXEC)
        self._arrived = bytearray(count)
        self._arrived_bytes = 0
        self.coming: frozenset[int] = frozenset()  # chunks that are on their way from where all of them are
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    @property
    def checkpoint_id(self) -> str:
        """The id of the checkpoint."""
        return self.manifest.checkpoint.checkpoint_id

    @property
    def arrived_bytes(self) -> int:
        """Bytes of the image that are in the files and verified."""
        return self._arrived_bytes

    @property
    def over(self) -> bool:
        """Whether nothing more arrives: it is committed, or was interrupted."""
        return self._journal < 0

    @property
    def missing(self) -> list[int]:
        """The chunks that have not arrived, in order."""
        return [index for index, mark in enumerate(bytes(self._arrived)) if not mark]

    def arrived(self) -> bytes:
        """What others are told: one byte per chunk, `HERE`, `COMING` or 0."""
        marks = bytearray(HERE if mark else 0 for mark in bytes(self._arrived))
        for index in self.coming:
            marks[index] = marks[index] or COMING
        return bytes(marks)

    def has(self, first: int, last: int) -> bool:
        """Whether the chunks `first` to `last` (included) have all arrived."""
        return 0 <= first <= last < len(self._arrived) and all(self._arrived[first : last + 1])

    def mark(self, index: int) -> None:
        """The chunk's bytes are in the files, and they are what the manifest says."""
        with self._lock:
            if self._arrived[index]:
                return
            os.pwrite(self._journal, b"\x01", index)
            self._arrived[index] = 1
            self._arrived_bytes += min(self.manifest.chunk_bytes, self._image_bytes - index * self.manifest.chunk_bytes)
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    def unmark(self, index: int) -> None:
        """The journal was wrong about this chunk: it is to be fetched again."""
        os.pwrite(self._journal, b"\x00", index)

    @contextlib.contextmanager
    def heard(self, listener: Callable[[], None]) -> Iterator[None]:
        """Meanwhile `listener` is called, on some thread, after every chunk that arrives and at the end."""
        with self._lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)

    def close(self) -> None:
        """Let go of the journal; whoever listens is told. Nothing is marked afterwards."""
        with self._lock:
            if self._journal >= 0:
                os.close(self._journal)
            self._journal = -1
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()
