"""Reads into the pool: every byte in its place, verified; damage, truncation and shutdown are clear errors."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.store import chunks
from services.store.chunks import ChunkReader
from services.store.tier import SsdTier
from shared.contracts.manifest import PAGE_BYTES, Manifest
from shared.contracts.residency import Extent, Source
from shared.errors import Code, HearthError
from tests.unit.store.sources import LLAMA, an_importer, make_source

CHUNK = 2 * PAGE_BYTES
SIZE = 64 * PAGE_BYTES


@pytest.fixture
def memory() -> Iterator[memoryview]:
    segment = mmap.mmap(-1, SIZE)
    segment.write(b"?" * SIZE)
    return memoryview(segment)  # not closed: the traceback of an expected error may hold a part of it


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Manifest]:
    make_source(tmp_path / "m", {**LLAMA, "odd": ("I8", (13,))})
    tier = SsdTier(tmp_path / "store")
    with an_importer(tier, chunk_bytes=CHUNK) as importer:
        outcome = importer.run(Source(url=str(tmp_path / "m")), progressed=lambda done, total: None)
    directory = Path(outcome.stored.directory)
    return directory, tier.manifest(directory)


def extents_for(manifest: Manifest) -> list[Extent]:
    """Two extents, the later one first in memory."""
    half = CHUNK * 2
    rest = manifest.image_bytes() - half
    return [Extent(offset=SIZE - half, length=half), Extent(offset=PAGE_BYTES, length=rest)]


def bytes_at(memory: memoryview, extents: list[Extent]) -> bytes:
    return b"".join(bytes(memory[e.offset : e.offset + e.length]) for e in extents)


def check(memory: memoryview, extents: list[Extent], directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    image = bytes_at(memory, extents)
    assert image == data.ljust(len(image), b"\0")
    assert bytes(memory[:PAGE_BYTES]) == b"?" * PAGE_BYTES, "bytes outside of the extents changed"


@pytest.mark.parametrize("threads", [1, 4])
def test_the_image_arrives(memory: memoryview, stored: tuple[Path, Manifest], threads: int) -> None:
    directory, manifest = stored
    reader = ChunkReader(memory, threads=threads)
    extents, progress, lock = extents_for(manifest), list[int](), threading.Lock()

    def progressed(done: int) -> None:
        with lock:
            progress.append(done)

    reader.read(directory, manifest, extents, verify=True, progressed=progressed)
    check(memory, extents, directory)
    assert max(progress) == manifest.image_bytes()
    assert len(progress) == len(manifest.chunks)
    reader.close()


@pytest.mark.parametrize("where", ["open", "read", "nowhere"])
def test_a_filesystem_without_direct_io_is_read_through_the_page_cache(
    memory: memoryview, stored: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    directory, manifest = stored
    real_open, real_preadv, direct = os.open, os.preadv, set[int]()

    def fake_open(path: Path, flags: int, *rest: int) -> int:
        if where == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        file = real_open(path, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(file)
        return file

    def fake_preadv(file: int, targets: list[memoryview], offset: int) -> int:
        if where == "read" and file in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(file, targets, offset)

    monkeypatch.setattr(chunks.os, "open", fake_open)
    monkeypatch.setattr(chunks.os, "preadv", fake_preadv)
    reader = ChunkReader(memory, threads=2)
    extents = extents_for(manifest)
    report = reader.read(directory, manifest, extents, verify=True, progressed=lambda done: None)
    reader.close()
    check(memory, extents, directory)
    assert report.direct == (where == "nowhere")


def test_short_reads_are_completed(
    memory: memoryview, stored: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, manifest = stored
    real_preadv = os.preadv
    monkeypatch.setattr(
        chunks.os, "preadv", lambda file, targets, offset: real_preadv(file, [targets[0][:PAGE_BYTES]], offset)
    )
    reader = ChunkReader(memory, threads=2)
    extents = extents_for(manifest)
    reader.read(directory, manifest, extents, verify=True, progressed=lambda done: None)
    reader.close()
    check(memory, extents, directory)


def test_a_changed_byte_is_found_unless_verification_is_off(memory: memoryview, stored: tuple[Path, Manifest]) -> None:
    directory, manifest = stored
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    reader = ChunkReader(memory, threads=2)
    with pytest.raises(HearthError, match="does not match its checksum") as damaged:
        reader.read(directory, manifest, extents_for(manifest), verify=True, progressed=lambda done: None)
    assert damaged.value.failure.code is Code.CHECKPOINT_CORRUPT
    reader.read(directory, manifest, extents_for(manifest), verify=False, progressed=lambda done: None)
    reader.close()


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_became_shorter_is_corrupt(memory: memoryview, stored: tuple[Path, Manifest], verify: bool) -> None:
    directory, manifest = stored
    os.truncate(directory / "model.safetensors", CHUNK + 100)
    reader = ChunkReader(memory, threads=2)
    with pytest.raises(HearthError) as damaged:
        reader.read(directory, manifest, extents_for(manifest), verify=verify, progressed=lambda done: None)
    assert damaged.value.failure.code is Code.CHECKPOINT_CORRUPT
    reader.close()


def test_a_failing_disk_is_a_clear_error(
    memory: memoryview, stored: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, manifest = stored

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(chunks.os, "preadv", broken)
    reader = ChunkReader(memory, threads=2)
    with pytest.raises(HearthError, match="Input/output error") as failed:
        reader.read(directory, manifest, extents_for(manifest), verify=True, progressed=lambda done: None)
    assert failed.value.failure.code is Code.CHECKPOINT_UNAVAILABLE
    with pytest.raises(HearthError):
        reader.read(directory / "gone", manifest, extents_for(manifest), verify=True, progressed=lambda done: None)
    reader.close()


def test_a_reader_that_is_closing_stops(memory: memoryview, stored: tuple[Path, Manifest]) -> None:
    directory, manifest = stored
    reader = ChunkReader(memory, threads=1)
    reader._stop.set()
    with pytest.raises(HearthError) as stopped:
        reader.read(directory, manifest, extents_for(manifest), verify=True, progressed=lambda done: None)
    assert stopped.value.failure.code is Code.DRAINING
    reader.close()
