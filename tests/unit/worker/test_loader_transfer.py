"""Copying within memory: what is copied, and what happens where the kernel takes long to give large pages."""

from __future__ import annotations

import ctypes
import mmap

from services.worker.arrival import Piece, Time
from services.worker.loader_memory import Mappings
from services.worker.loader_transfer import SLOW_BYTES_PER_S, MemoryCopier

SIZE = 4096


def test_slow_copying_is_told_once_with_the_place_where_it_is() -> None:
    source, target = (ctypes.create_string_buffer(fill * (3 * SIZE), 3 * SIZE) for fill in (b"a", b"b"))
    quick_s, slow_s = SIZE / SLOW_BYTES_PER_S / 2, SIZE / SLOW_BYTES_PER_S * 2
    times = iter([0.0, quick_s, 1.0, 1.0 + slow_s, 2.0, 2.0 + slow_s])
    told: list[int] = []
    copier = MemoryCopier(
        ctypes.addressof(source), ctypes.addressof(target), told.append, Time(lambda: next(times), lambda _: None)
    )
    for number in range(3):
        copier.start(Piece(number * SIZE, (2 - number) * SIZE, SIZE))
        assert told == [[], [2 * SIZE], [2 * SIZE]][number]
    assert target.raw == source.raw
    assert copier.finished() == 3


def test_memory_of_its_own_keeps_its_bytes_whatever_pages_are_asked_for() -> None:
    mappings = Mappings()
    image = mappings.own(3 * mmap.PAGESIZE)
    try:
        ctypes.memset(image.address, 7, image.size_bytes)
        for offset, wanted in ((1, False), (0, True), (image.size_bytes, False)):
            mappings.ask_large_pages(image, offset, wanted=wanted)
        assert ctypes.string_at(image.address, image.size_bytes) == b"\x07" * image.size_bytes
    finally:
        mappings.release(image)
