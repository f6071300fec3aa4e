"""Weight files by chunks: every byte in its place in both directions, with and without O_DIRECT; faults are clear."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from functools import partial
from pathlib import Path

import pytest

from services.store import image_files
from services.store.image_files import ImageWriter, StoredImage, rewrite
from services.store.tuning import filesystem_of
from shared.contracts.manifest import PAGE_BYTES, Manifest
from shared.errors import Code, HearthError
from tests.unit.store.images import make_image, page_memory

CHUNK = 3 * PAGE_BYTES
# One page and a bit, nothing, a multiple of a page, several chunks with a tail, a few bytes.
SIZES = (PAGE_BYTES + 100, 0, 2 * PAGE_BYTES, 7 * PAGE_BYTES + 4095, 13)


def read_all(directory: Path, manifest: Manifest, block_bytes: int = 0) -> tuple[bytes, bool]:
    stored = StoredImage(directory, manifest, block_bytes=block_bytes)
    image = b""
    try:
        for index in range(len(manifest.chunks)):
            buffer = page_memory(min(CHUNK, manifest.image_bytes() - index * CHUNK))
            buffer[:] = b"?" * len(buffer)
            stored.read(index, buffer)
            image += buffer
        return image, stored.direct
    finally:
        stored.close()


def write_all(directory: Path, manifest: Manifest, image: bytes) -> bool:
    writer = ImageWriter(directory, manifest.files, chunk_bytes=CHUNK)
    try:
        for index in reversed(range(len(manifest.chunks))):
            part = image[index * CHUNK : (index + 1) * CHUNK]
            buffer = page_memory(len(part))
            buffer[:] = part
            writer.write(index, buffer)
        writer.finish()
        return writer.direct
    finally:
        writer.close()


def no_direct(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A file system that refuses O_DIRECT when a file is opened, or when it is used."""
    real_open, real_preadv, real_pwrite, direct = os.open, os.preadv, os.pwrite, set[int]()

    def fake_open(path: Path, flags: int, *rest: int) -> int:
        if where == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        file = real_open(path, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(file)
        else:
            direct.discard(file)
        return file

    def fake_preadv(file: int, targets: list[memoryview], offset: int) -> int:
        if file in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(file, targets, offset)

    def fake_pwrite(file: int, data: memoryview, offset: int) -> int:
        if file in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_pwrite(file, data, offset)

    monkeypatch.setattr(image_files.os, "open", fake_open)
    monkeypatch.setattr(image_files.os, "preadv", fake_preadv)
    monkeypatch.setattr(image_files.os, "pwrite", fake_pwrite)


@pytest.mark.parametrize("block_bytes", [0, PAGE_BYTES, 2 * PAGE_BYTES])
def test_an_image_of_several_files_is_read(tmp_path: Path, block_bytes: int) -> None:
    manifest, image = make_image(tmp_path, SIZES, chunk_bytes=CHUNK)
    assert read_all(tmp_path, manifest, block_bytes)[0] == image


def test_an_image_is_written_and_its_files_have_their_own_sizes(tmp_path: Path) -> None:
    manifest, image = make_image(tmp_path, SIZES, chunk_bytes=CHUNK, write=False)
    write_all(tmp_path, manifest, image)
    assert {name: os.path.getsize(tmp_path / name) for name in sorted(os.listdir(tmp_path))} == {
        file.name: file.bytes for file in manifest.files
    }
    assert read_all(tmp_path, manifest)[0] == image


@pytest.mark.parametrize("where", ["open", "use"])
def test_a_file_system_without_direct_io_goes_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    manifest, image = make_image(tmp_path, SIZES, chunk_bytes=CHUNK, write=False)
    no_direct(monkeypatch, where)
    assert not write_all(tmp_path, manifest, image)
    assert read_all(tmp_path, manifest) == (image, False)


@pytest.mark.parametrize("direct", [True, False])
def test_nothing_stays_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    if filesystem_of(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("this file system is the page cache")
    manifest, image = make_image(tmp_path, [64 * CHUNK], chunk_bytes=CHUNK, write=False)
    path = tmp_path / manifest.files[0].name
    if not direct:
        no_direct(monkeypatch, "use")
    write_all(tmp_path, manifest, image)
    assert cached_pages(path) == 0
    assert read_all(tmp_path, manifest)[0] == image
    assert cached_pages(path) == 0
    path.read_bytes()
    assert cached_pages(path) == 64 * CHUNK // PAGE_BYTES, "the probe sees what is cached"


def test_short_reads_and_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, image = make_image(tmp_path, SIZES, chunk_bytes=CHUNK, write=False)
    real_preadv, real_pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(
        image_files.os, "preadv", lambda file, to, offset: real_preadv(file, [to[0][:PAGE_BYTES]], offset)
    )
    monkeypatch.setattr(
        image_files.os, "pwrite", lambda file, data, offset: real_pwrite(file, data[:PAGE_BYTES], offset)
    )
    write_all(tmp_path, manifest, image)
    assert read_all(tmp_path, manifest)[0] == image


def test_writing_goes_on_where_an_earlier_writer_stopped(tmp_path: Path) -> None:
    manifest, image = make_image(tmp_path, SIZES, chunk_bytes=CHUNK, write=False)
    buffer = page_memory(CHUNK)
    first = ImageWriter(tmp_path, manifest.files, chunk_bytes=CHUNK)
    buffer[:] = image[:CHUNK]
    first.write(0, buffer)
    first.close()
    with pytest.raises(HearthError, match="File exists"):
        ImageWriter(tmp_path, manifest.files, chunk_bytes=CHUNK)
    (tmp_path / manifest.files[4].name).unlink()
    second = ImageWriter.open_existing(tmp_path, manifest.files, chunk_bytes=CHUNK)
    for index in range(1, len(manifest.chunks)):
        part = image[index * CHUNK : (index + 1) * CHUNK]
        buffer[: len(part)] = part
        second.write(index, buffer[: len(part)])
    second.finish()
    second.close()
    assert read_all(tmp_path, manifest)[0] == image


def test_one_chunk_is_rewritten_in_place(tmp_path: Path) -> None:
    manifest, image = make_image(tmp_path, SIZES, chunk_bytes=CHUNK)
    for file in manifest.files:
        (tmp_path / file.name).write_bytes(bytes(file.bytes))
    os.truncate(tmp_path / manifest.files[3].name, PAGE_BYTES)  # what is cut off comes back with its chunks
    zeros = bytes(len(image))
    last = len(manifest.chunks) - 1
    for index in (0, last, *range(1, last)):
        buffer = page_memory(len(image[index * CHUNK : (index + 1) * CHUNK]))
        buffer[:] = image[index * CHUNK : (index + 1) * CHUNK]
        rewrite(tmp_path, manifest, index, buffer)
        if index == 0:
            assert (tmp_path / manifest.files[0].name).read_bytes() == image[: manifest.files[0].bytes]
            assert (tmp_path / manifest.files[4].name).read_bytes() == zeros[: manifest.files[4].bytes]
    assert read_all(tmp_path, manifest)[0] == image


def test_a_file_that_became_shorter_is_corrupt(tmp_path: Path) -> None:
    manifest, _ = make_image(tmp_path, SIZES, chunk_bytes=CHUNK)
    os.truncate(tmp_path / manifest.files[3].name, 100)
    with pytest.raises(HearthError, match=r"model-3\.safetensors ends at byte 100") as damaged:
        read_all(tmp_path, manifest)
    assert damaged.value.failure.code is Code.CHECKPOINT_CORRUPT


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EIO, Code.CHECKPOINT_UNAVAILABLE),
        (errno.ENOSPC, Code.NO_CAPACITY),
        (errno.EDQUOT, Code.NO_CAPACITY),
    ],
)
@pytest.mark.parametrize("call", ["preadv", "pwrite", "posix_fallocate", "fsync"])
def test_a_failing_or_full_disk_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, code: Code
) -> None:
    manifest, image = make_image(tmp_path, SIZES, chunk_bytes=CHUNK, write=call == "preadv")

    def broken(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(image_files.os, call, broken)
    work = partial(read_all, tmp_path, manifest) if call == "preadv" else partial(write_all, tmp_path, manifest, image)
    with pytest.raises(HearthError, match=rf"model-\d\.safetensors cannot be .*: {os.strerror(number)}") as failed:
        work()
    assert failed.value.failure.code is code
    assert open_files(tmp_path) == []


def test_files_that_are_not_there_are_a_clear_error(tmp_path: Path) -> None:
    manifest, _ = make_image(tmp_path, SIZES, chunk_bytes=CHUNK)
    (tmp_path / manifest.files[2].name).unlink()
    with pytest.raises(HearthError, match=r"model-2\.safetensors cannot be read: No such file") as failed:
        StoredImage(tmp_path, manifest)
    assert failed.value.failure.code is Code.CHECKPOINT_UNAVAILABLE
    assert open_files(tmp_path) == []


def cached_pages(path: Path) -> int:
    """How many pages of a file are in the page cache."""
    pages = -(-path.stat().st_size // PAGE_BYTES)
    seen = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.addressof(first)
        del first
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), seen) == 0
    return sum(page & 1 for page in seen)


def open_files(directory: Path) -> list[str]:
    """The files in `directory` that this process has open."""
    links: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the listing's own descriptor
            continue
    return [link for link in links if link.startswith(str(directory))]
