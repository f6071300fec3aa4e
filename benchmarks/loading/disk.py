"""The disk beneath a benchmark: what fio gets from it, and reads that really come from it."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

GB: Final = 10**9
MIB: Final = 2**20
_SWITCH: Final = Path("/proc/sys/vm/drop_caches")
# (block size, I/Os in flight): what is asked of the disk before the better one is taken as its ceiling.
_WAYS: Final = (("256k", 32), ("1M", 8), ("1M", 32), ("4M", 8), ("16M", 4))


class NoFio(RuntimeError):
    """fio is not installed: there is no ceiling to compare with."""


def _fio(arguments: list[str]) -> dict[str, Any]:
    program = shutil.which("fio")
    if program is None:
        raise NoFio("fio is not on the PATH; install it (`apt-get install fio`) or pass --no-fio")
    done = subprocess.run(
        [program, "--name=ceiling", "--direct=1", "--ioengine=libaio", "--output-format=json", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"fio failed: {done.stderr[-500:] or done.stdout[-500:]}")
    jobs: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    # Of several, the one that takes longest.
    return max(jobs, key=lambda job: int(job["job_runtime"]))


@dataclass
class Ceiling:
    """fio's direct sequential bandwidth on the file system of a file, measured again beside every round.

    `read_once` reads `path` itself; `write_once` writes a file of `write_bytes` beside it and removes it.
    """

    path: Path
    enabled: bool = True
    way: tuple[str, int] = ("1M", 8)
    scan: dict[str, float] = field(default_factory=dict)
    reads: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)

    def choose(self) -> None:
        """Find the block size and depth with which fio reads this file fastest."""
        if not self.enabled:
            return
        for way in _WAYS:
            self.scan[f"{way[0]} × {way[1]}"] = self._read(way)
        self.way = max(_WAYS, key=lambda way: self.scan[f"{way[0]} × {way[1]}"])

    def read_once(self) -> float | None:
        """Bytes per second of one sequential direct read of the file."""
        if not self.enabled:
            return None
        self.reads.append(self._read(self.way))
        return self.reads[-1]

    def write_once(self, write_bytes: int) -> float | None:
        """Bytes per second of one sequential direct write, fsync included."""
        if not self.enabled:
            return None
        target = self.path.parent / "fio.write"
        try:
            job = _fio(
                [
                    f"--filename={target}", "--rw=write", f"--bs={self.way[0]}", f"--iodepth={self.way[1]}",
                    f"--size={write_bytes}", "--end_fsync=1", "--fallocate=none",
                ]
            )  # fmt: skip
        finally:
            target.unlink(missing_ok=True)
        self.writes.append(float(job["write"]["bw_bytes"]))
        return self.writes[-1]

    def copy_once(self, source: Path) -> float | None:
        """Bytes per second, in each direction, of reading `source` and writing as much at the same time."""
        if not self.enabled:
            return None
        target = self.path.parent / "fio.write"
        size = source.stat().st_size
        shape = [f"--bs={self.way[0]}", f"--iodepth={self.way[1]}", f"--size={size}"]
        try:
            job = _fio(
                [
                    f"--filename={source}", "--rw=read", *shape,
                    "--name=written", f"--filename={target}", "--rw=write", "--end_fsync=1", "--fallocate=none",
                    "--direct=1", "--ioengine=libaio", *shape,
                ]
            )  # fmt: skip
        finally:
            target.unlink(missing_ok=True)
        self.copies.append(size / (int(job["job_runtime"]) / 1000))
        return self.copies[-1]

    def _read(self, way: tuple[str, int]) -> float:
        size = self.path.stat().st_size
        job = _fio(
            [
                f"--filename={self.path}", "--readonly", "--rw=read", f"--bs={way[0]}", f"--iodepth={way[1]}",
                f"--size={size}",
            ]
        )  # fmt: skip
        return float(job["read"]["bw_bytes"])


Drop = Literal["kernel", "files"]


def how_to_drop(asked: str) -> Drop:
    """`auto`: the kernel's switch for root, else file by file. Raises RuntimeError if it is asked for in vain."""
    usable = os.access(_SWITCH, os.W_OK)
    if asked == "kernel" and not usable:
        raise RuntimeError(f"--drop kernel needs to write to {_SWITCH}, which takes root")
    if asked == "files" or not usable:
        return "files"
    return "kernel"


def drop_page_cache(way: Drop, directories: Iterable[Path]) -> None:
    """Have the next read of the files in these directories come from the disk; with "kernel", of all files."""
    os.sync()
    if way == "kernel":
        _SWITCH.write_text("3\n")
    for directory in directories:
        for path in [directory] if directory.is_file() else directory.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_page_cache(path: Path) -> None:
    """Read a file, so that it lies in the page cache."""
    buffer = bytearray(4 * MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def cached_bytes(path: Path) -> int:
    """How much of a file lies in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    size = path.stat().st_size
    if size == 0:
        return 0
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped,
    ):
        anchor = (ctypes.c_char * size).from_buffer(mapped)
        try:
            pages = -(-size // mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * pages)()
            if libc.mincore(ctypes.addressof(anchor), size, flags) != 0:
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del anchor
        return sum(flag & 1 for flag in bytes(flags)) * mmap.PAGESIZE


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process: shared pages count by the share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def status_bytes(pid: int, name: str) -> int:
    """A size in /proc/PID/status, such as RssAnon or VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_s(pid: int) -> float:
    """Processor seconds (user and system) that a process has used, its ended threads included."""
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text[text.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
