"""How many threads read the SSD tier best, and how many bytes each asks for at once: measured, kept, explained.

A setting is one of `THREADS` × block sizes. What is measured is what a load does: direct reads into memory, then the
checksum. Of the settings within 3 % of the fastest (more, where the disk itself does not give the same twice: others
use it) the one with the least processor time per byte is taken; where that is alike, too, what does well on most disks.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from services.store.image_files import OpenFile
from services.store.mover import checksum
from shared.contracts.manifest import CHUNK_BYTES, PAGE_BYTES
from shared.errors import HearthError

TUNING_NAME: Final = "tuning.json"
VERSION: Final = 1
THREADS: Final = (4, 2, 8, 1)  # the likeliest first: a slow disk leaves no time for all
BLOCK_BYTES: Final = (CHUNK_BYTES, 4 << 20, 1 << 20)
START_BLOCK_BYTES: Final = BLOCK_BYTES[:2]  # at a start there is time for two turns of these; smaller ones cost more
NEAR: Final = 0.03  # of the fastest: further below, it is slower
NEAR_LIMIT: Final = 0.3  # however much the disk varies
NEAR_UNKNOWN: Final = 0.15  # when there was no time to find out how much it varies
ALIKE: Final = 1.1  # of the least processor time: that near, it is alike
BUDGET_S: Final = 0.9  # of reading; opening, writing a sample and the last turn come on top
SAMPLE_BYTES: Final = 128 << 20  # a temporary file when nothing is stored; and the least that a file must have
SAMPLE_BUDGET_S: Final = 0.3  # of writing it
SPAN_BYTES: Final = 64 << 20  # read by one setting before it is the next one's turn


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table: what a number of threads and a block size achieved.

    `gb_per_s` is 10⁹ bytes per second, `cpu_s_per_gb` processor seconds of the reading threads per 10⁹ bytes.
    """

    threads: int
    block_bytes: int
    gb_per_s: float
    cpu_s_per_gb: float


class Tuning(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was chosen, from which table, and for what it holds.

    `device` and `filesystem` name where it was measured; `temporary` says that it was on a file made for it, because
    nothing was stored yet. `near` is how far below the fastest a setting may be. An empty table means that nothing
    could be measured.
    """

    version: int
    threads: int
    block_bytes: int
    device: int = 0
    filesystem: str = ""
    direct: bool = True
    temporary: bool = False
    near: float = NEAR
    table: tuple[Setting, ...] = ()

    @property
    def reason(self) -> str:
        """Why it was chosen, for a person."""
        if not self.table:
            return "nothing could be measured; this is what does well on most disks"
        best = max(one.gb_per_s for one in self.table)
        mine = next(one for one in self.table if (one.threads, one.block_bytes) == (self.threads, self.block_bytes))
        return (
            f"{mine.gb_per_s:.2f} GB/s, the fastest reaches {best:.2f}; of those within "
            f"{100 * self.near:.0f} % it takes little processor time ({mine.cpu_s_per_gb:.3f} s per GB)"
        )


DEFAULT: Final = Tuning(version=VERSION, threads=4, block_bytes=CHUNK_BYTES)


def choose(table: Sequence[Setting], near: float = NEAR) -> Setting:
    """The cheapest of the settings that are at most the part `near` slower than the fastest.

    Among settings that are about as cheap the order of `THREADS` decides, then the larger block.
    """
    fastest = max(one.gb_per_s for one in table)
    fast = [one for one in table if one.gb_per_s >= (1 - near) * fastest]
    least = min(one.cpu_s_per_gb for one in fast)
    cheap = [one for one in fast if one.cpu_s_per_gb <= ALIKE * least]
    return min(cheap, key=lambda one: (THREADS.index(one.threads), -one.block_bytes))


def noise(rates: Iterable[Sequence[float]]) -> float:
    """How much the disk varies by itself: the median, over settings, of how far their turns lie from their middle.

    `NEAR_UNKNOWN` when no setting had two turns.
    """
    spreads = sorted((max(turns) - min(turns)) / (max(turns) + min(turns)) for turns in rates if len(turns) > 1)
    return spreads[len(spreads) // 2] if spreads else NEAR_UNKNOWN


def tune(store_dir: Path, *, chunk_bytes: int = CHUNK_BYTES, remember: bool = True) -> Tuning:
    """The setting for this store's disk: what is kept in its directory, or measured now (about 1.5 s) and kept.

    Measured again on another device or file system, after an update of Hearth that measures otherwise, and once when
    the first real checkpoint is there. Never fails: where nothing can be measured it is the default.
    """
    try:
        device, filesystem = os.stat(store_dir).st_dev, filesystem_of(store_dir)
        sample = largest_weight_file(store_dir)
        kept = _kept(store_dir / TUNING_NAME)
        if (
            kept is not None
            and (kept.device, kept.filesystem) == (device, filesystem)
            and not (kept.temporary and sample is not None)
        ):
            return kept
        with contextlib.ExitStack() as stack:
            path = sample or stack.enter_context(temporary_sample(store_dir))
            if path is None:
                return DEFAULT
            measured = measure(path, chunk_bytes=chunk_bytes, blocks=START_BLOCK_BYTES)
    except (OSError, HearthError):
        return DEFAULT
    tuning = msgspec.structs.replace(measured, device=device, filesystem=filesystem, temporary=sample is None)
    if remember:
        with contextlib.suppress(OSError):
            _keep(store_dir / TUNING_NAME, tuning)
    return tuning


def _kept(path: Path) -> Tuning | None:
    try:
        tuning = msgspec.json.decode(path.read_bytes(), type=Tuning)
    except (OSError, ValueError):
        return None
    sound = tuning.version == VERSION and 0 < tuning.threads <= 64 and tuning.block_bytes > 0
    return tuning if sound and tuning.block_bytes % PAGE_BYTES == 0 else None


def _keep(path: Path, tuning: Tuning) -> None:
    new = path.with_name(path.name + ".new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode(tuning), indent=1) + b"\n")
    new.rename(path)


# -- what to measure on ------------------------------------------------------------------------------------------------


def largest_weight_file(store_dir: Path) -> Path | None:
    """The largest weight file of the checkpoints in the SSD tier, if one is large enough to measure with."""
    found: list[tuple[int, Path]] = []
    for path in (store_dir / "checkpoints").glob("*/*.safetensors"):
        with contextlib.suppress(OSError):  # it is being evicted
            found.append((path.stat().st_size, path))
    size_bytes, path = max(found, default=(0, Path()))
    return path if size_bytes >= SAMPLE_BYTES else None


@contextlib.contextmanager
def temporary_sample(directory: Path, size_bytes: int = SAMPLE_BYTES) -> Iterator[Path | None]:
    """A file of random bytes on this file system, gone at the end however that comes; None if there is no room for it.

    It is as large as can be written in `SAMPLE_BUDGET_S`, at least a quarter of `size_bytes`.
    """
    status = os.statvfs(directory)
    if status.f_bavail * status.f_frsize < 4 * size_bytes:
        yield None
        return
    file = unnamed_file(directory)
    try:
        path = Path(f"/proc/self/fd/{file}")
        writer = OpenFile(path, os.O_RDWR)
        try:
            block = mmap.mmap(-1, CHUNK_BYTES)
            block.write(os.urandom(CHUNK_BYTES))
            began, done = time.perf_counter(), 0
            while done < size_bytes and (done < size_bytes // 4 or time.perf_counter() - began < SAMPLE_BUDGET_S):
                writer.write(memoryview(block), done)
                done += CHUNK_BYTES
            if not writer.direct:
                writer.sync()  # and out of the page cache
        finally:
            writer.close()
        yield path
    finally:
        os.close(file)


def unnamed_file(directory: Path) -> int:
    """A file on the file system of `directory` that nobody sees and that ends with its descriptor. Raises OSError."""
    try:
        return os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    file, name = tempfile.mkstemp(dir=directory)
    os.unlink(name)
    return file


def filesystem_of(path: Path) -> str:
    """The type of the file system that holds `path`, such as "ext4"; "" if the kernel does not say."""
    place, best, kind = str(path.resolve()), "", ""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")
        if len(mount) >= len(best) and (place + "/").startswith(mount.rstrip("/") + "/"):
            best, kind = mount, after.split()[0]
    return kind


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a setting has done so far. `cpu_s` is processor time of the reading threads."""

    bytes: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    rates: list[float] = field(default_factory=list)  # of the turns, in bytes per second

    def add(self, other: Tally) -> None:
        """Count another turn."""
        self.rates.append(other.bytes / max(other.seconds, 1e-9))
        self.bytes += other.bytes
        self.seconds += other.seconds
        self.cpu_s += other.cpu_s

    def setting(self, threads: int, block_bytes: int) -> Setting:
        """The row of the table."""
        return Setting(
            threads=threads,
            block_bytes=block_bytes,
            gb_per_s=round(self.bytes / max(self.seconds, 1e-9) / 1e9, 3),
            cpu_s_per_gb=round(self.cpu_s / max(self.bytes, 1) * 1e9, 4),
        )


def measure(
    path: Path,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    budget_s: float = BUDGET_S,
    span_bytes: int = SPAN_BYTES,
    laps: int = 1_000,
    blocks: Sequence[int] = BLOCK_BYTES,
    verify: bool = True,
) -> Tuning:
    """Read a file with every setting, in turn, for about `budget_s` or so many laps; what each achieved, which is best.

    The settings take turns of `span_bytes` each, there and back, so that whoever else uses the disk meanwhile disturbs
    all of them alike. On a slow disk not all have a turn. Without `verify` the checksum is left out. Raises OSError,
    and `HearthError` if the file is cut meanwhile.
    """
    blocks = list(dict.fromkeys(min(block, chunk_bytes) for block in blocks))
    tallies = {(threads, block): Tally() for block in blocks for threads in THREADS}
    with contextlib.closing(Reader(path, max(THREADS), chunk_bytes)) as reader:
        over = time.perf_counter() + budget_s
        # What a disk does after a rest is its best: this turn counts only if there is time for no other.
        first = reader.read(THREADS[0], blocks[0], span_bytes, verify=verify)
        for lap in range(laps):
            for setting in tallies if lap % 2 == 0 else reversed(tallies):
                if time.perf_counter() >= over:
                    break  # and out of every further lap
                tallies[setting].add(reader.read(*setting, span_bytes, verify=verify))
        if not any(tally.bytes for tally in tallies.values()):
            tallies[THREADS[0], blocks[0]].add(first)
        table = tuple(tally.setting(*setting) for setting, tally in tallies.items() if tally.bytes)
        near = round(min(NEAR_LIMIT, max(NEAR, noise(tally.rates for tally in tallies.values()))), 3)
        best = choose(table, near)
        return Tuning(
            version=VERSION,
            threads=best.threads,
            block_bytes=best.block_bytes,
            direct=reader.direct,
            near=near,
            table=table,
        )


class Reader:
    """Reads a file round and round by spans of whole chunks, each thread into memory of its own."""

    def __init__(self, path: Path, threads: int, chunk_bytes: int) -> None:
        self._file = OpenFile(path, os.O_RDONLY)
        self._chunk_bytes = chunk_bytes
        self._chunks = os.stat(path).st_size // chunk_bytes
        self._at = 0
        try:
            if self._chunks == 0:
                raise OSError(errno.EINVAL, f"less than a chunk of {chunk_bytes} bytes to read")
            self._buffers = [mmap.mmap(-1, chunk_bytes) for _ in range(threads)]
            for buffer in self._buffers:
                buffer.write(bytes(chunk_bytes))  # touched: reading shall not have to
        except OSError:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        """Whether it is read past the page cache."""
        return self._file.direct

    def read(self, threads: int, block_bytes: int, span_bytes: int, *, verify: bool) -> Tally:
        """Read the next span, at least a chunk per thread. Raises what reading raises."""
        count = max(threads, span_bytes // self._chunk_bytes)
        chunks = iter([(self._at + number) % self._chunks for number in range(count)])
        lock, faults, cpu_s = threading.Lock(), list[OSError | HearthError](), list[float]()

        def work(buffer: mmap.mmap) -> None:
            view, began = memoryview(buffer), time.thread_time()
            try:
                while True:
                    with lock:
                        chunk = next(chunks, None)
                    if chunk is None or faults:
                        return
                    self._file.read(view, chunk * self._chunk_bytes, self._chunk_bytes, block_bytes)
                    if verify:
                        checksum(view)
            except (OSError, HearthError) as error:
                faults.append(error)
            finally:
                cpu_s.append(time.thread_time() - began)

        workers = [threading.Thread(target=work, args=(buffer,)) for buffer in self._buffers[:threads]]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - began
        if faults:
            raise faults[0]
        self._at += count
        return Tally(bytes=count * self._chunk_bytes, seconds=seconds, cpu_s=sum(cpu_s))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


__all__ = [
    "DEFAULT", "Reader", "Setting", "Tally", "Tuning", "choose", "filesystem_of", "largest_weight_file", "measure",
    "temporary_sample", "tune", "unnamed_file",
]  # fmt: skip
