"""`hearth store bench`: what this server's disk and memory give, which setting the store takes, and why.

Reads what the store has stored (or a file of its own that nobody sees and that is gone at the end), takes no lock and
changes nothing, so the store may run meanwhile; then both are slower.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from services.store.image_files import OpenFile
from services.store.mover import checksum
from services.store.pool import Pool
from services.store.tuning import (
    Reader,
    Setting,
    Tally,
    Tuning,
    filesystem_of,
    largest_weight_file,
    measure,
    temporary_sample,
    tune,
    unnamed_file,
)
from shared.contracts.manifest import CHUNK_BYTES, padded_bytes
from shared.errors import HearthError
from shared.settings import SettingsError, StoreSettings, load, parse_size

LAPS: Final = 4
POOL_BYTES: Final = 256 << 20
WRITE_BYTES: Final = 256 << 20
HASH_BYTES: Final = 256 << 20
MIB: Final = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit code (1: nothing could be measured, 2: wrong usage)."""
    parser = argparse.ArgumentParser(prog="hearth store bench", description=__doc__)
    parser.add_argument(
        "--dir", help="directory of the SSD tier (default: HEARTH_STORE_DIR, else the first of hearth up)"
    )
    parser.add_argument("--bytes", default="1GiB", help="how much each setting reads (default: 1GiB)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    chosen = parser.parse_args(arguments)
    try:
        settings = load(StoreSettings)
        size = parse_size(chosen.bytes)
        report = bench(
            Path(chosen.dir or settings.store_dir), shm=Path(settings.shm_dir), settings=settings, size_bytes=size
        )
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, HearthError) as error:
        print(f"Nothing could be measured: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1) if chosen.json else text(report))
    return 0


def bench(directory: Path, *, shm: Path, settings: StoreSettings, size_bytes: int) -> dict[str, Any]:
    """Everything that is printed. Rates are 10⁹ bytes per second. Raises OSError, `HearthError`."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no directory; name that of a store with --dir")
    chunk_bytes = settings.chunk_bytes
    with contextlib.ExitStack() as stack:
        stored = largest_weight_file(directory)
        path = stored or stack.enter_context(temporary_sample(directory))
        if path is None:
            raise OSError(f"{directory} has no room for a file to measure with")
        span_bytes = max(chunk_bytes, size_bytes // LAPS)
        table = measure(path, chunk_bytes=chunk_bytes, budget_s=600.0, laps=LAPS, span_bytes=span_bytes)
        ceiling, load_setting = compare(path, table, chunk_bytes, size_bytes)
        sample = {"file": path.name if stored else "temporary", "bytes": os.stat(path).st_size}
    return {
        "directory": str(directory),
        "filesystem": filesystem_of(directory),
        "direct": table.direct,
        "sample": sample,
        "table": [
            {
                "threads": one.threads,
                "block_bytes": one.block_bytes,
                "gb_per_s": one.gb_per_s,
                "cpu_s_per_gb": one.cpu_s_per_gb,
            }
            for one in table.table
        ],
        "ceiling_gb_per_s": ceiling.gb_per_s,
        "ceiling_cpu_s_per_gb": ceiling.cpu_s_per_gb,
        "measured": {"threads": table.threads, "block_bytes": table.block_bytes, "reason": table.reason},
        "measured_gb_per_s": load_setting.gb_per_s,
        "measured_cpu_s_per_gb": load_setting.cpu_s_per_gb,
        "in_use": in_use(directory, settings),
        "write": write(directory),
        "checksum_gb_per_s": checksum_rate(),
        "pool": pool(shm, chunk_bytes),
    }


def compare(path: Path, tuning: Tuning, chunk_bytes: int, size_bytes: int) -> tuple[Setting, Setting]:
    """The ceiling, plain sequential reads without checksums (4 threads, whole chunks), and the setting, in turn."""
    ceiling, chosen = Tally(), Tally()
    with contextlib.closing(Reader(path, max(4, tuning.threads), chunk_bytes)) as reader:
        for _ in range(LAPS):
            span_bytes = max(chunk_bytes, size_bytes // LAPS)
            ceiling.add(reader.read(4, chunk_bytes, span_bytes, verify=False))
            chosen.add(reader.read(tuning.threads, tuning.block_bytes, span_bytes, verify=True))
    return ceiling.setting(4, chunk_bytes), chosen.setting(tuning.threads, tuning.block_bytes)


def in_use(directory: Path, settings: StoreSettings) -> dict[str, Any]:
    """What a store of these settings takes, and where it has that from."""
    tuning = tune(directory, chunk_bytes=settings.chunk_bytes, remember=False)
    return {
        "threads": settings.io_threads or tuning.threads,
        "block_bytes": settings.io_block_bytes or tuning.block_bytes,
        "threads_from": "HEARTH_IO_THREADS" if settings.io_threads else "measured",
        "block_from": "HEARTH_IO_BLOCK_BYTES" if settings.io_block_bytes else "measured",
        "reason": tuning.reason,
    }


def write(directory: Path) -> dict[str, Any]:
    """What writing a small file and syncing it gives, whole chunks at a time; empty if there is no room."""
    size_bytes, status = WRITE_BYTES, os.statvfs(directory)
    if status.f_bavail * status.f_frsize < 4 * size_bytes:
        return {}
    file = unnamed_file(directory)
    try:
        writer = OpenFile(Path(f"/proc/self/fd/{file}"), os.O_RDWR)
        try:
            block = mmap.mmap(-1, CHUNK_BYTES)
            block.write(os.urandom(CHUNK_BYTES))
            began, cpu = time.perf_counter(), time.thread_time()
            writer.allocate(size_bytes)
            for at in range(0, size_bytes, CHUNK_BYTES):
                writer.write(memoryview(block), at)
            writer.sync()
            seconds, cpu_s = time.perf_counter() - began, time.thread_time() - cpu
        finally:
            writer.close()
    finally:
        os.close(file)
    return {
        "gb_per_s": round(size_bytes / seconds / 1e9, 3),
        "cpu_s_per_gb": round(cpu_s / size_bytes * 1e9, 4),
        "direct": writer.direct,
    }


def checksum_rate() -> float:
    """What one thread hashes, from memory."""
    size_bytes = HASH_BYTES
    memory = mmap.mmap(-1, size_bytes)
    for page in range(0, size_bytes, 4096):
        memory[page] = 1
    view, began = memoryview(memory), time.thread_time()
    for at in range(0, size_bytes, CHUNK_BYTES):
        checksum(view[at : at + CHUNK_BYTES])
    return round(size_bytes / (time.thread_time() - began) / 1e9, 2)


def pool(shm: Path, chunk_bytes: int) -> dict[str, Any]:
    """What a small pool takes to be made, and how much of it is huge pages; empty if there is no room."""
    count = max(1, POOL_BYTES // chunk_bytes)
    began = time.perf_counter()
    try:
        made = Pool.open(shm, prefix="bench", server_id=str(os.getpid()), chunk_bytes=chunk_bytes, chunk_count=count)
    except (HearthError, OSError):
        return {}
    seconds = time.perf_counter() - began
    huge_bytes, data_bytes = made.huge_bytes, made.data_bytes
    made.close()
    return {
        "directory": str(shm),
        "bytes": data_bytes,
        "huge_bytes": huge_bytes,
        "seconds_per_gib": round(seconds / padded_bytes(data_bytes) * 2**30, 3),
    }


def text(report: dict[str, Any]) -> str:
    """The same for people."""
    direct = "O_DIRECT works" if report["direct"] else "no O_DIRECT: reads go through the page cache"
    sample = report["sample"]
    lines = [
        f"{report['directory']} ({report['filesystem']}): {direct}; read: {sample['file']}, {sample['bytes']} bytes",
        "",
        "threads  block MiB   GB/s  CPU s/GB",
    ]
    measured = report["measured"]
    for one in sorted(report["table"], key=lambda row: (row["threads"], row["block_bytes"])):
        here = (one["threads"], one["block_bytes"]) == (measured["threads"], measured["block_bytes"])
        lines.append(
            f"{one['threads']:7}  {one['block_bytes'] / MIB:9g}  {one['gb_per_s']:5.2f}  {one['cpu_s_per_gb']:8.3f}"
            f"{'  <' if here else ''}"
        )
    used = report["in_use"]
    lines += [
        "",
        f"best now: {measured['threads']} threads × {measured['block_bytes'] / MIB:g} MiB: {measured['reason']}",
        f"a store here takes: {used['threads']} threads ({used['threads_from']}) × {used['block_bytes'] / MIB:g} MiB "
        f"({used['block_from']})",
        f"plain sequential direct reads, 4 threads, no checksum: {report['ceiling_gb_per_s']:.2f} GB/s, "
        f"{report['ceiling_cpu_s_per_gb']:.3f} CPU s/GB; in turn with them, verified: "
        f"{report['measured_gb_per_s']:.2f} GB/s, {report['measured_cpu_s_per_gb']:.3f} CPU s/GB",
        f"checksums: {report['checksum_gb_per_s']:.1f} GB/s on one core",
    ]
    if report["write"]:
        lines.append(f"writes: {report['write']['gb_per_s']:.2f} GB/s, {report['write']['cpu_s_per_gb']:.3f} CPU s/GB")
    if report["pool"]:
        made = report["pool"]
        lines.append(
            f"pool in {made['directory']}: {made['seconds_per_gib']:.2f} s per GiB to make, "
            f"{100 * made['huge_bytes'] // made['bytes']} % huge pages"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
