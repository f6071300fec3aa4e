"""The SSD tier's directory: what is in it, what is coming in, and how either changes without ever being half there.

checkpoints/<checkpoint id>/   whole checkpoints
incoming/<random>/             imports under way, checkpoints being deleted; a crash's leftovers go at the next start
.lock                          held while a store is alive
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.store.events import StoredCheckpoint
from services.store.manifest import decode_stored, validate
from shared.contracts.manifest import MANIFEST_NAME, Manifest
from shared.errors import Code, HearthError


class SsdTier:
    """Owns a directory. Raises `HearthError` (conflict) if another store has it, OSError if it cannot be written."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.checkpoints = self.root / "checkpoints"
        self._incoming = self.root / "incoming"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._incoming.mkdir(exist_ok=True)
        self._lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise HearthError(Code.CONFLICT, f"Another store uses {self.root}.") from error
        for leftover in self._incoming.iterdir():
            _delete(leftover)

    def close(self) -> None:
        """Let another store have the directory."""
        os.close(self._lock)

    def free_bytes(self) -> int:
        """Bytes that the filesystem has free for us."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def scan(self) -> tuple[list[StoredCheckpoint], list[tuple[str, str]]]:
        """The checkpoints that are here, least recently used first; and (name, reason) of what is not one.

        What is no valid checkpoint is removed. One of a newer format, which a newer Hearth can read, and one that
        cannot be read just now are left alone.
        """
        found: list[tuple[float, StoredCheckpoint]] = []
        refused: list[tuple[str, str]] = []
        for directory in sorted(self.checkpoints.iterdir()):
            try:
                stored = describe(directory, self.manifest(directory))
                if stored.id != directory.name:
                    raise HearthError(Code.CHECKPOINT_CORRUPT, "The directory's name is not the checkpoint's id.")
            except HearthError as error:
                refused.append((directory.name, error.failure.message))
                if error.failure.code not in (Code.UNSUPPORTED, Code.CHECKPOINT_UNAVAILABLE):
                    self.remove(directory)
                continue
            found.append(((directory / MANIFEST_NAME).stat().st_mtime, stored))
        found.sort(key=lambda item: (item[0], item[1].id))
        return [stored for _, stored in found], refused

    def manifest(self, directory: Path) -> Manifest:
        """The manifest of a stored checkpoint, checked against the files. Raises `HearthError`."""
        try:
            data = (directory / MANIFEST_NAME).read_bytes()
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(directory) if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError) as error:
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest cannot be read: {error.strerror}.") from error
        except OSError as error:  # the disk or our rights, not the checkpoint
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, f"The manifest cannot be read: {error.strerror}.") from error
        manifest = decode_stored(data)
        validate(manifest, sizes)
        return manifest

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh directory on the tier's filesystem; whatever is left of it at the end is removed."""
        directory = self._incoming / secrets.token_hex(8)
        directory.mkdir()
        try:
            yield directory
        finally:
            if directory.exists():
                _delete(directory)

    def publish(self, directory: Path, checkpoint_id: str) -> tuple[Path, bool]:
        """Make a staged, complete checkpoint part of the tier, durably; its place, and whether it was there already."""
        for entry in sorted(directory.iterdir()):
            _sync(entry)
        _sync(directory)
        place = self.checkpoints / checkpoint_id
        try:
            directory.rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return place, True
        _sync(self.checkpoints)
        return place, False

    def touch(self, directory: Path) -> None:
        """Remember across restarts that this checkpoint was used."""
        os.utime(directory / MANIFEST_NAME)

    def remove(self, directory: Path) -> None:
        """Delete a checkpoint: at once for whoever looks, then its bytes. Raises OSError."""
        grave = self._incoming / secrets.token_hex(8)
        try:
            directory.rename(grave)
        except FileNotFoundError:
            return
        _sync(self.checkpoints)
        _delete(grave)


def describe(directory: Path, manifest: Manifest) -> StoredCheckpoint:
    """What the core knows about a stored checkpoint."""
    return StoredCheckpoint(
        checkpoint=manifest.checkpoint,
        directory=str(directory),
        stored_bytes=sum(entry.stat().st_size for entry in os.scandir(directory)),
        image_bytes=manifest.image_bytes(),
        source=manifest.source,
        revision=manifest.revision,
    )


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
