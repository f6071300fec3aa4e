"""Writes a checkpoint into a directory of an object store (or of this server), so that half of one is no checkpoint."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import obstore
from obstore import exceptions

from services.store.objects import object_errors
from services.store.sources import redact
from shared.contracts.manifest import MANIFEST_NAME
from shared.errors import Code, HearthError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART_BYTES: Final = 16 * 2**20
MOST_PARTS: Final = 9_000  # S3 takes 10,000
PARTS_AT_ONCE: Final = 4  # so much of a file is in memory


class ObjectWriter:
    """Puts files into `store`, named `url` in messages. Thread-safe once made; every method blocks.

    A manifest that an earlier export left there is removed first, and the new one is written last, by `finish`: until
    then no reader takes what is there for a checkpoint. `progressed` hears the bytes of each piece that is handed over.
    Raises `HearthError`: forbidden, unauthenticated, checkpoint_unavailable, no_capacity, draining.
    """

    def __init__(
        self,
        url: str,
        store: ObjectStore,
        *,
        directory: Path | None = None,
        progressed: Callable[[int], None] | None = None,
    ) -> None:
        self._shown = redact(url)
        self._store = store
        self._directory = directory  # where the store is a local one: its files are flushed before the manifest is
        self._progressed = progressed or _ignore
        self._stop = threading.Event()
        self._manifest: bytes | None = None
        with object_errors(self._named(MANIFEST_NAME)), contextlib.suppress(FileNotFoundError):
            # Looked for first: not every server has the bulk request that deleting is made with.
            with contextlib.suppress(exceptions.PermissionDeniedError):  # what may be written need not be readable
                obstore.head(store, MANIFEST_NAME)
            obstore.delete(store, MANIFEST_NAME)

    def put(self, name: str, data: Path | bytes) -> None:
        """Write one file, whole or not at all; large ones in parts. `hearth.json` waits for `finish`."""
        self._check_stop()
        if name == MANIFEST_NAME:
            self._manifest = data if isinstance(data, bytes) else data.read_bytes()
            return
        self._put(name, data)

    def finish(self) -> None:
        """Write `hearth.json`: from now on it is a checkpoint. Raises `internal` if it was never put."""
        self._check_stop()
        if self._manifest is None:
            raise HearthError(Code.INTERNAL, f"{self._shown} got no {MANIFEST_NAME}.")
        self._put(MANIFEST_NAME, self._manifest)

    def close(self) -> None:
        """End what runs at its next piece with `draining`."""
        self._stop.set()

    def _put(self, name: str, data: Path | bytes) -> None:
        with object_errors(self._named(name)):
            size = len(data) if isinstance(data, bytes) else data.stat().st_size
            if size <= PART_BYTES:
                content = data if isinstance(data, bytes) else data.read_bytes()
                obstore.put(self._store, name, content, use_multipart=False)
                self._progressed(size)
            else:
                part = -(-max(PART_BYTES, -(-size // MOST_PARTS)) // 2**20) * 2**20
                pieces = self._pieces(data, part)
                obstore.put(
                    self._store, name, pieces, use_multipart=True, chunk_size=part, max_concurrency=PARTS_AT_ONCE
                )
        if self._directory is not None:
            self._flush(name)

    def _pieces(self, data: Path | bytes, part: int) -> Iterator[bytes]:
        if isinstance(data, bytes):
            for at in range(0, len(data), part):
                yield data[at : at + part]
                self._progressed(min(part, len(data) - at))
                self._check_stop()
            return
        with data.open("rb") as file:
            while piece := file.read(part):
                yield piece
                self._progressed(len(piece))
                self._check_stop()

    def _flush(self, name: str) -> None:
        assert self._directory is not None
        for path in (self._directory / name, self._directory):
            with object_errors(self._named(name)):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def _named(self, name: str) -> str:
        return redact(f"{self._shown}/{name}")

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise HearthError(Code.DRAINING, "The store is shutting down.")


def _ignore(moved_bytes: int) -> None:
    """Nobody listens."""
