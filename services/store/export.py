"""SSD tier → a directory or an object store: a verified copy of a checkpoint, in Hearth's form. Blocks.

What comes out is a source for other stores, and a directory that any safetensors reader opens.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from services.store.events import PRIORITY_OPERATOR, StoredCheckpoint
from services.store.image_files import ImageWriter, StoredImage
from services.store.manifest import decode_stored
from services.store.mover import Job, Mover
from services.store.object_writer import ObjectWriter
from services.store.ports import Progressed
from services.store.sources import check_allowed, check_resolved, kind, normalise, redact
from services.store.tier import disk_errors
from services.store.trees import TreeConfig, open_writer
from shared.contracts.manifest import MANIFEST_NAME, Manifest
from shared.errors import Code, HearthError

Repair = Callable[[int, memoryview], bool]
_TAKEN: Final = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class Exporter:
    """Copies checkpoints out of the SSD tier `root`, to where `config` allows. Every method blocks.

    Raises `HearthError`: invalid_request, forbidden, unsupported (the url), conflict (something else is there),
    no_capacity, checkpoint_unavailable, checkpoint_corrupt (and nobody could repair it), cancelled, draining.
    """

    def __init__(self, root: Path, disk: Mover, config: TreeConfig) -> None:
        self._root = root
        self._disk = disk
        self._config = config
        self._lock = threading.Lock()
        self._writers: set[ObjectWriter] = set()
        self._closed = False

    def close(self) -> None:
        """End the uploads; the mover ends its jobs."""
        with self._lock:
            self._closed = True
            writers = list(self._writers)
        for writer in writers:
            writer.close()

    def run(
        self,
        stored: StoredCheckpoint,
        manifest: Manifest,
        url: str,
        *,
        key: str,
        priority: int = PRIORITY_OPERATOR,
        repair: Repair | None = None,
        progressed: Progressed,
    ) -> None:
        """Copy; `progressed` hears (bytes done, bytes in all) on any thread. Done already is fine.

        `key` and `priority` are those of the mover's job. A directory appears under its name when it is whole and
        durable; in an object store the manifest comes last, and without it nothing there is a checkpoint.
        """
        asked = normalise(url)
        directory = Path(stored.directory)
        image = StoredImage(directory, manifest)
        job = Job(
            key=key,
            priority=priority,
            image_bytes=manifest.image_bytes(),
            chunk_bytes=manifest.chunk_bytes,
            origin=image,
            checksums=manifest.chunks,
            repair=repair,
        )
        try:
            if kind(asked) == "directory":
                with disk_errors(f"{redact(asked)} cannot be written"):
                    self._to_directory(job, directory, manifest, Path(asked), progressed)
            else:
                self._to_objects(job, directory, manifest, asked, progressed)
        finally:
            image.close()

    def _to_directory(
        self, job: Job, directory: Path, manifest: Manifest, target: Path, progressed: Progressed
    ) -> None:
        check_allowed(str(target), self._config.patterns)
        real = os.path.realpath(target)
        check_resolved(str(target), real, self._config.patterns)
        if Path(real).is_relative_to(self._root.resolve()):
            raise HearthError(Code.FORBIDDEN, f"{target} lies in the store's own directory.", param="url")
        if _holds(target, manifest):
            return
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise HearthError(Code.CONFLICT, f"{target} exists and is not empty.", param="url")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(target)
        staging = target.parent / f".{target.name}.{secrets.token_hex(8)}"
        staging.mkdir()
        alive = _held(staging)
        try:
            writer = ImageWriter(staging, manifest.files, chunk_bytes=manifest.chunk_bytes)
            try:
                self._disk.run(replace(job, sink=writer, progressed=lambda done: progressed(done, job.image_bytes)))
                writer.finish()
            finally:
                writer.close()
            for name, data in _small_files(directory, manifest).items():
                _write(staging / name, data)
            _sync(staging)
            try:
                staging.rename(target)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                raise HearthError(Code.CONFLICT, f"{target} has come to be meanwhile.", param="url") from error
            _sync(target.parent)
        finally:
            with suppress(OSError):  # renamed, or a disk that does nothing any more
                shutil.rmtree(staging)
            if alive is not None:
                os.close(alive)

    def _to_objects(self, job: Job, directory: Path, manifest: Manifest, url: str, progressed: Progressed) -> None:
        """Read and verify everything, then upload: what is wrong here must not be found out there."""
        check_allowed(url, self._config.patterns)
        small = _small_files(directory, manifest)
        total_bytes = job.image_bytes + sum(file.bytes for file in manifest.files) + sum(map(len, small.values()))
        count = _Count(job.image_bytes, total_bytes, progressed)
        self._disk.run(replace(job, progressed=lambda done: progressed(done, total_bytes)))
        writer = open_writer(url, self._config, progressed=count.add)
        try:
            with self._lock:
                if self._closed:
                    raise HearthError(Code.DRAINING)
                self._writers.add(writer)
            for file in manifest.files:
                writer.put(file.name, directory / file.name)
            for name, data in small.items():
                writer.put(name, data)
            writer.finish()
        finally:
            with self._lock:
                self._writers.discard(writer)
            writer.close()


class _Count:
    """Adds up what an upload has moved, from any thread."""

    def __init__(self, done_bytes: int, total_bytes: int, progressed: Progressed) -> None:
        self._done_bytes = done_bytes
        self._total_bytes = total_bytes
        self._progressed = progressed
        self._lock = threading.Lock()

    def add(self, moved_bytes: int) -> None:
        """So many more."""
        with self._lock:
            self._done_bytes = min(self._done_bytes + moved_bytes, self._total_bytes)
            done_bytes = self._done_bytes
        self._progressed(done_bytes, self._total_bytes)


def _small_files(directory: Path, manifest: Manifest) -> dict[str, bytes]:
    """Everything but the weights: the small files, each with its SHA-256, and last the manifest."""
    found: dict[str, bytes] = {}
    with disk_errors("The checkpoint cannot be read"):
        for name, digest in manifest.small_files.items():
            found[name] = (directory / name).read_bytes()
            if hashlib.sha256(found[name]).hexdigest() != digest:
                raise HearthError(Code.CHECKPOINT_CORRUPT, f"{name} does not match its SHA-256.")
        found[MANIFEST_NAME] = (directory / MANIFEST_NAME).read_bytes()
    return found


def _holds(target: Path, manifest: Manifest) -> bool:
    """Whether this checkpoint was exported there before. A directory appears whole, so its manifest says it."""
    try:
        found = decode_stored((target / MANIFEST_NAME).read_bytes())
    except (HearthError, OSError):
        return False
    return found.checkpoint.checkpoint_id == manifest.checkpoint.checkpoint_id


def _held(staging: Path) -> int | None:
    """A lock on a staging directory, which says that somebody is at work in it; None if it is somebody else's.

    None, too, on file systems where directories cannot be locked.
    """
    try:
        file = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _remove_left(target: Path) -> None:
    """Remove what exports to here left that were killed, or met a disk that did not even let them tidy up."""
    pattern = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{16}")
    with suppress(OSError):
        for path in sorted(target.parent.iterdir()):
            if pattern.fullmatch(path.name) and (dead := _held(path)) is not None:
                try:
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(dead)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
