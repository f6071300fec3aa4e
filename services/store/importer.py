"""Sources → SSD tier: looks at a directory or a hub repository, and turns it into a stored checkpoint. Blocks."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from services.store.convert import Plan, make_plan, run_import
from services.store.events import StoredCheckpoint
from services.store.local import LocalSource, absolute_directory, open_local
from services.store.remote import SCHEME, Hub
from services.store.tier import SsdTier, describe
from shared.contracts.residency import Source
from shared.errors import Code, HearthError


@dataclass(frozen=True, slots=True)
class Look:
    """What a source is now and what its import would take."""

    architecture: str
    revision: str
    weight_bytes: int
    image_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an import brought and what it took."""

    stored: StoredCheckpoint
    existing: bool
    remote_bytes: int
    seconds: float


class Importer:
    """Imports into a tier, in chunks of `chunk_bytes`. Every method blocks and raises `HearthError`."""

    def __init__(self, tier: SsdTier, hub: Hub, *, chunk_bytes: int) -> None:
        self._tier = tier
        self._hub = hub
        self._chunk_bytes = chunk_bytes
        self._stop = threading.Event()

    def close(self) -> None:
        """End what runs at its next piece, with nothing left behind."""
        self._stop.set()

    def look(self, source: Source) -> Look:
        """Read headers only."""
        with _clear_errors(source):
            return self._look(source)

    def run(self, source: Source, *, progressed: Callable[[int, int], None]) -> Outcome:
        """Import. `progressed` hears (bytes done, bytes in all) on this thread and on others."""
        with _clear_errors(source):
            return self._run(source, progressed)

    def _look(self, source: Source) -> Look:
        if source.url.startswith(SCHEME):
            files = self._hub.look(source)
            local = self._hub.headers(files)
            plan = self._plan(local, source, compare=False)
            return _look(local, plan, extra_bytes=sum(files.files.values()))
        local = open_local(absolute_directory(source.url))
        return _look(local, self._plan(local, source, compare=False), extra_bytes=0)

    def _run(self, source: Source, progressed: Callable[[int, int], None]) -> Outcome:
        began = time.perf_counter()
        with self._tier.staging() as directory:
            if source.url.startswith(SCHEME):
                files = self._hub.look(source)
                target, total = directory / "download", sum(files.files.values())
                self._make_sure_of(total)
                target.mkdir()
                self._hub.download(files, target, progressed=lambda done: progressed(done, 2 * total), stop=self._stop)
                local, revision, done_bytes = open_local(target), files.commit, total
            else:
                local = open_local(absolute_directory(source.url))
                revision, total, done_bytes = local.fingerprint, local.weight_bytes, 0
            plan = self._plan(local, source, compare=True)
            self._make_sure_of(plan.peak_bytes)
            target = directory / "checkpoint"
            target.mkdir()
            manifest = run_import(
                local,
                plan,
                target,
                asked=source,
                revision=revision,
                chunk_bytes=self._chunk_bytes,
                progressed=lambda done, whole: progressed(done_bytes + done, done_bytes + whole),
                stop=self._stop,
            )
            if open_local(local.directory).fingerprint != local.fingerprint:
                raise HearthError(
                    Code.CHECKPOINT_UNAVAILABLE, f"{source.url} changed while it was imported; try again."
                )
            place, existing = self._tier.publish(target, manifest.checkpoint.checkpoint_id)
        stored = describe(place, self._tier.manifest(place))
        return Outcome(stored, existing, total, time.perf_counter() - began)

    def _plan(self, local: LocalSource, source: Source, *, compare: bool) -> Plan:
        return make_plan(local, source.dtype, chunk_bytes=self._chunk_bytes, compare=compare)

    def _make_sure_of(self, needed_bytes: int) -> None:
        free_bytes = self._tier.free_bytes()
        if free_bytes < needed_bytes:
            raise HearthError(
                Code.NO_CAPACITY,
                f"The import needs {needed_bytes} bytes; the disk of {self._tier.root} has {free_bytes} free.",
            )


@contextmanager
def _clear_errors(source: Source) -> Iterator[None]:
    """What the operating system refuses, in one sentence."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = Code.NO_CAPACITY if full else Code.CHECKPOINT_UNAVAILABLE
        raise HearthError(code, f"{source.url[:200]} cannot be imported: {error.strerror or error}.") from error


def _look(local: LocalSource, plan: Plan, *, extra_bytes: int) -> Look:
    return Look(
        architecture=local.config.architecture,
        revision=local.fingerprint,
        weight_bytes=plan.weight_bytes,
        image_bytes=plan.image_bytes,
        peak_bytes=plan.peak_bytes + extra_bytes,
    )
