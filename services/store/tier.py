"""The SSD tier's directory: what is in it, what is coming in, and how either changes without ever being half there.

checkpoints/<checkpoint id>/   whole checkpoints; with a journal (`.arriving`) one whose chunks are still coming
quarantine/<checkpoint id>/    corrupt checkpoints that could not be repaired, with the reason
incoming/<random>/             imports under way, checkpoints being deleted; a crash's leftovers go at the next start
pins.json                      which checkpoints are pinned, and in which tier
.lock                          held while a store is alive

Whatever appears under its final name appears by renaming, after everything in it was flushed to the disk.

What a failing disk does not let us delete or set aside is nobody's checkpoint from then on, and is tried again with
every later change.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from services.store.arriving import JOURNAL, Arriving, chunk_bytes_of, journal_marks
from services.store.events import StoredCheckpoint
from services.store.manifest import decode_stored, validate
from shared.contracts.manifest import MANIFEST_NAME, PAGE_BYTES, Manifest, padded_bytes
from shared.errors import Code, HearthError

PINS: Final = "pins.json"
REASON: Final = ".quarantined"
_PIN_TIERS: Final = ("dram", "ssd")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_KEPT: Final = (Code.UNSUPPORTED, Code.CHECKPOINT_UNAVAILABLE)  # no fault of the checkpoint: it is left alone


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """What the operating system refuses as a `HearthError`: no_capacity for a full disk, else checkpoint_unavailable.

    `what` begins the sentence, for instance "The checkpoint cannot be stored".
    """
    try:
        yield
    except OSError as error:
        code = Code.NO_CAPACITY if error.errno in _FULL else Code.CHECKPOINT_UNAVAILABLE
        raise HearthError(code, f"{what}: {error.strerror or error}.") from error


class SsdTier:
    """Owns a directory. Every method blocks and raises `HearthError`: conflict if another store has the directory,
    no_capacity when the disk is full, checkpoint_unavailable when it cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.checkpoints = self.root / "checkpoints"
        self.quarantined = self.root / "quarantine"
        self._incoming = self.root / "incoming"
        self._arrivals: dict[str, Arriving] = {}
        self._arrivals_lock = threading.Lock()
        self._names_lock = threading.RLock()  # held while directories change their names
        self._graves: set[Path] = set()  # in `incoming`, to be deleted
        self._unwanted: set[Path] = set()  # elsewhere, to be deleted
        self._condemned: set[Path] = set()  # to be set aside
        with disk_errors(f"The SSD tier {self.root} cannot be used"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.quarantined.mkdir(exist_ok=True)
            self._incoming.mkdir(exist_ok=True)
            self._lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise HearthError(Code.CONFLICT, f"Another store uses {self.root}.") from error
        try:
            with disk_errors(f"The SSD tier {self.root} cannot be read"):
                self._graves.update(self._incoming.iterdir())
        except HearthError:
            os.close(self._lock)
            raise
        self._clean_up()

    def close(self) -> None:
        """Let another store have the directory."""
        os.close(self._lock)

    def free_bytes(self) -> int:
        """Bytes that the filesystem has free for us."""
        with disk_errors(f"The SSD tier {self.root} cannot be read"):
            status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    @property
    def unwanted(self) -> frozenset[Path]:
        """What could not be deleted yet. It is in nobody's account."""
        return frozenset(self._graves | self._unwanted)

    def _clean_up(self) -> None:
        """Try again to delete, or to set aside, what a failing disk has kept."""
        with self._names_lock:
            graves, self._graves = sorted(self._graves), set()
            for path in sorted(self._unwanted):
                with contextlib.suppress(HearthError):
                    self._remove(path)
            for path in sorted(self._condemned):
                with contextlib.suppress(HearthError):
                    self._move_to_quarantine(path)
        for path in graves:
            with contextlib.suppress(HearthError):
                self._bury(path)

    def _bury(self, grave: Path) -> None:
        """Delete what is nobody's. Raises `HearthError`, and it is tried again later."""
        try:
            with disk_errors("What is left of a checkpoint cannot be deleted"):
                _delete(grave)
        except HearthError:
            self._graves.add(grave)
            raise

    # -- what is here ------------------------------------------------------------------------------------------------

    def scan(self) -> tuple[list[StoredCheckpoint], list[tuple[str, str]]]:
        """The checkpoints that are here, least recently used first; and (name, reason) of what is not one.

        Among them those that have come only in part (`arrived_bytes` is set, as the journal says, which is yet to be
        verified) and those in quarantine (`quarantined` is set).

        What is no valid checkpoint is removed. One of a newer format, which a newer Hearth can read, and one that
        cannot be read just now are left alone.
        """
        found: list[tuple[float, StoredCheckpoint]] = []
        refused: list[tuple[str, str]] = []
        with disk_errors(f"The SSD tier {self.root} cannot be read"):
            for directory in sorted(self.checkpoints.iterdir()):
                if (directory / REASON).exists():  # a crash came between the mark and the move
                    with contextlib.suppress(HearthError):
                        self._move_to_quarantine(directory)
            directories = [*sorted(self.checkpoints.iterdir()), *sorted(self.quarantined.iterdir())]
        for directory in directories:
            try:
                stored = self._examine(directory)
                modified_s = (directory / MANIFEST_NAME).stat().st_mtime
            except (HearthError, OSError) as error:
                code = error.failure.code if isinstance(error, HearthError) else Code.CHECKPOINT_UNAVAILABLE
                refused.append((directory.name, str(error)))
                if code not in _KEPT:
                    with contextlib.suppress(HearthError):
                        self.remove(directory)
                continue
            found.append((modified_s, stored))
        found.sort(key=lambda item: (item[0], item[1].id))
        return [stored for _, stored in found], refused

    def _examine(self, directory: Path) -> StoredCheckpoint:
        aside = directory.parent == self.quarantined or (directory / REASON).exists()
        manifest = self._decoded(directory) if aside else self.manifest(directory)
        if manifest.checkpoint.checkpoint_id != directory.name:
            raise HearthError(Code.CHECKPOINT_CORRUPT, "The directory's name is not the checkpoint's id.")
        stored = describe(directory, manifest)
        if aside:
            with contextlib.suppress(OSError):
                reason = (directory / REASON).read_text(encoding="utf-8", errors="replace").strip()
                return replace(stored, quarantined=reason or "corrupt")
            return replace(stored, quarantined="corrupt")
        return stored

    def manifest(self, directory: Path) -> Manifest:
        """The manifest of a stored checkpoint (whole or in part), checked against the files. Raises `HearthError`."""
        manifest = self._decoded(directory)
        with disk_errors("The checkpoint cannot be read"):
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(directory) if entry.is_file()}
        if JOURNAL in sizes:
            for file in manifest.files:
                # A direct write of the last page is as long as the page until the file is cut at its commit.
                if file.bytes < sizes.get(file.name, 0) <= padded_bytes(file.bytes):
                    sizes[file.name] = file.bytes
        validate(manifest, sizes)
        return manifest

    def _decoded(self, directory: Path) -> Manifest:
        try:
            data = (directory / MANIFEST_NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest cannot be read: {error.strerror}.") from error
        except OSError as error:  # the disk or our rights, not the checkpoint
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, f"The manifest cannot be read: {error.strerror}.") from error
        return decode_stored(data)

    def whole(self, checkpoint_id: str) -> Path | None:
        """The directory of a checkpoint that is wholly here, or None."""
        place = self.checkpoints / checkpoint_id
        if place in self._unwanted or place in self._condemned:
            return None
        aside = (place / JOURNAL, place / REASON)
        return place if place.is_dir() and not any(path.exists() for path in aside) else None

    def partial(self, checkpoint_id: str) -> StoredCheckpoint | None:
        """What is here of a checkpoint that has come only in part and does not arrive right now."""
        place = self.checkpoints / checkpoint_id
        if not checkpoint_id or place in self._unwanted or self.arriving(checkpoint_id) is not None:
            return None
        try:
            stored = describe(place, self.manifest(place))
        except (HearthError, OSError):
            return None
        return stored if stored.arrived_bytes is not None and not (place / REASON).exists() else None

    # -- imports that are staged -------------------------------------------------------------------------------------

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh directory on the tier's filesystem; whatever is left of it at the end is removed."""
        self._clean_up()
        directory = self._incoming / secrets.token_hex(8)
        with disk_errors("The SSD tier cannot be written"):
            directory.mkdir()
        try:
            yield directory
        finally:
            with contextlib.suppress(HearthError):  # it is tried again
                self._bury(directory)

    def publish(self, directory: Path, checkpoint_id: str) -> tuple[Path, bool]:
        """Make a staged, complete checkpoint part of the tier, durably; its place, and whether it was there already.

        One of which only a part had arrived, or that is corrupt, makes way.
        """
        with disk_errors("The checkpoint cannot be stored"):
            _sync_all(directory)
            place = self.checkpoints / checkpoint_id
            with self._names_lock:
                if place.exists() and self.whole(checkpoint_id) is None:
                    self._remove(place)
                try:
                    directory.rename(place)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    return place, True
            self._keep(place)
        return place, False

    def _keep(self, place: Path) -> None:
        """Make the name of what has just come to `place` durable; if that fails, it has not come. Raises OSError."""
        try:
            _sync(self.checkpoints)
        except OSError:
            with contextlib.suppress(HearthError):
                self.remove(place)
            raise

    # -- checkpoints that arrive chunk by chunk ----------------------------------------------------------------------

    def begin(self, manifest: Manifest, manifest_bytes: bytes, small: Mapping[str, bytes]) -> Arriving:
        """Make room for a checkpoint whose chunks will come, or go on with one of which a part is here already.

        `small` holds the small files, verified. Raises `HearthError`: conflict when the checkpoint is whole here or
        arriving right now.
        """
        checkpoint_id = manifest.checkpoint.checkpoint_id
        place = self.checkpoints / checkpoint_id
        with self._arrivals_lock, disk_errors(f"Checkpoint {checkpoint_id} cannot be stored"):
            if checkpoint_id in self._arrivals:
                raise HearthError(Code.CONFLICT, f"Checkpoint {checkpoint_id} is arriving already.")
            if self.whole(checkpoint_id) is not None:
                raise HearthError(Code.CONFLICT, f"Checkpoint {checkpoint_id} is here already.")
            if place.exists() and not self._goes_on(place, manifest, small):
                self.remove(place)
            fresh = not place.exists()
            if fresh:
                self._prepare(place, manifest, manifest_bytes, small)
            try:
                arriving = Arriving(place, manifest)
            except OSError:
                if fresh:
                    with contextlib.suppress(HearthError):
                        self.remove(place)
                raise
            self._arrivals[checkpoint_id] = arriving
        return arriving

    def arriving(self, checkpoint_id: str) -> Arriving | None:
        """The arrival of a checkpoint that is under way right now."""
        with self._arrivals_lock:
            return self._arrivals.get(checkpoint_id)

    def commit(self, arriving: Arriving) -> Path:
        """All chunks have arrived: make the checkpoint whole, durably; its directory."""
        if arriving.missing:
            raise AssertionError(f"{len(arriving.missing)} chunks of {arriving.checkpoint_id} are missing")
        place = arriving.directory
        with disk_errors(f"Checkpoint {arriving.checkpoint_id} cannot be stored"):
            for file in arriving.manifest.files:
                if (place / file.name).stat().st_size != file.bytes:
                    os.truncate(place / file.name, file.bytes)
            # Data, then what describes it, then the journal's removal, which says that all of it is there.
            _sync_all(place)
            (place / JOURNAL).unlink()
            _sync(place)
        self.end(arriving)
        return place

    def end(self, arriving: Arriving) -> None:
        """The arrival goes on no more; what has come stays, to go on from."""
        with self._arrivals_lock:
            if self._arrivals.get(arriving.checkpoint_id) is arriving:
                del self._arrivals[arriving.checkpoint_id]
        arriving.close()

    def _goes_on(self, place: Path, manifest: Manifest, small: Mapping[str, bytes]) -> bool:
        """Whether what is here of a checkpoint can be gone on from; small differences are put right."""
        if {place} & (self._unwanted | self._condemned) or (place / REASON).exists() or not (place / JOURNAL).is_file():
            return False
        try:
            here = self._decoded(place)
        except HearthError:
            return False
        same = ("checkpoint", "chunk_bytes", "files", "tensors", "chunks", "small_files", "tied")
        if any(getattr(here, field) != getattr(manifest, field) for field in same):
            return False
        for name, data in small.items():
            path = place / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != manifest.small_files[name]:
                _write(path, data)
        for file in manifest.files:
            if not (place / file.name).is_file():
                return False
            os.truncate(place / file.name, file.bytes)
        return True

    def _prepare(self, place: Path, manifest: Manifest, manifest_bytes: bytes, small: Mapping[str, bytes]) -> None:
        with self.staging() as directory:
            _write(directory / JOURNAL, bytes(len(manifest.chunks)))
            for name, data in small.items():
                _write(directory / name, data)
            for file in manifest.files:
                descriptor = os.open(directory / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                try:
                    if file.bytes:  # a disk that is too full says so now and not after minutes
                        os.posix_fallocate(descriptor, 0, file.bytes)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            _write(directory / MANIFEST_NAME, manifest_bytes)
            _sync(directory)
            directory.rename(place)
            self._keep(place)

    # -- changes of what is here -------------------------------------------------------------------------------------

    def touch(self, directory: Path) -> None:
        """Remember across restarts that this checkpoint was used."""
        with disk_errors("The checkpoint's use cannot be written down"):
            os.utime(directory / MANIFEST_NAME)

    def remove(self, directory: Path) -> None:
        """Delete a checkpoint: at once for whoever looks, then its bytes. One that is gone is fine.

        When this fails it is no checkpoint any more, all the same, until the next start looks at what is left of it.
        """
        self._clean_up()
        self._remove(directory)

    def _remove(self, directory: Path) -> None:
        grave = self._incoming / secrets.token_hex(8)
        with disk_errors(f"Checkpoint {directory.name} cannot be removed"):
            with self._names_lock:
                self._unwanted.add(directory)
                try:
                    directory.rename(grave)
                except FileNotFoundError:
                    grave = directory
                self._unwanted.discard(directory)
                self._condemned.discard(directory)
            if grave is directory:
                return
            try:
                _sync(directory.parent)
            except OSError:
                self._graves.add(grave)
                raise
        self._bury(grave)

    def quarantine(self, directory: Path, reason: str) -> Path:
        """Set a corrupt checkpoint aside, with the reason, durably; where it is now. One that is aside stays there.

        When this fails it is no checkpoint any more, all the same, in this life of the store.
        """
        if directory.parent == self.quarantined:
            return directory
        self._clean_up()
        self._condemned.add(directory)
        with contextlib.suppress(OSError):  # a full disk has no room for a reason, but for a move
            _write(directory / REASON, reason.encode())  # from now on it is no checkpoint, whatever comes between
            _sync(directory)
        return self._move_to_quarantine(directory)

    def _move_to_quarantine(self, directory: Path) -> Path:
        place = self.quarantined / directory.name
        with self._names_lock, disk_errors(f"Checkpoint {directory.name} cannot be set aside"):
            if directory.exists():
                self._remove(place)
                directory.rename(place)
            self._condemned.discard(directory)
            _sync(self.quarantined)
            _sync(self.checkpoints)
        return place

    # -- pins ----------------------------------------------------------------------------------------------------------

    def pins(self) -> tuple[dict[str, str], str]:
        """The pins that were saved last, checkpoint id → tier; and why they could not be read ("": they could)."""
        try:
            pins = json.loads((self.root / PINS).read_bytes())
        except FileNotFoundError:
            return {}, ""
        except (OSError, ValueError, RecursionError) as error:
            return {}, f"{PINS} cannot be read: {error}"
        if not isinstance(pins, dict) or any(tier not in _PIN_TIERS for tier in pins.values()):
            return {}, f"{PINS} is malformed"
        return pins, ""

    def save_pins(self, pins: Mapping[str, str]) -> None:
        """Write the pins down, durably: after a crash they are the old ones or the new ones."""
        with disk_errors("The pins cannot be written down"):
            new = self._incoming / secrets.token_hex(8)
            try:
                _write(new, json.dumps(dict(sorted(pins.items())), indent=1).encode() + b"\n")
                new.rename(self.root / PINS)
            finally:
                self._bury(new)
            _sync(self.root)


def describe(directory: Path, manifest: Manifest) -> StoredCheckpoint:
    """What the core knows about a stored checkpoint. Raises OSError.

    For one that has come only in part, `arrived_bytes` is what its journal says; never all of the image, for even when
    every chunk is there the commit is not.
    """
    image_bytes = manifest.image_bytes()
    arrived_bytes: int | None = None
    with contextlib.suppress(FileNotFoundError):
        marks = journal_marks(directory, manifest)
        arrived_bytes = sum(chunk_bytes_of(manifest, index) for index in marks)
        arrived_bytes = max(0, min(arrived_bytes, image_bytes - PAGE_BYTES))
    return StoredCheckpoint(
        checkpoint=manifest.checkpoint,
        directory=str(directory),
        stored_bytes=sum(entry.stat().st_size for entry in os.scandir(directory) if entry.name != REASON),
        image_bytes=image_bytes,
        source=manifest.source,
        revision=manifest.revision,
        arrived_bytes=arrived_bytes,
        chunk_bytes=manifest.chunk_bytes,
    )


def _delete(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Replace a file's content, and flush it to the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def _sync_all(directory: Path) -> None:
    for entry in sorted(directory.iterdir()):
        _sync(entry)
    _sync(directory)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
