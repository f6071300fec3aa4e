"""A disk that fails, or a process that dies, at the k-th system call that changes anything; and a store's life on it.

`FaultyDisk` stands between the store and the operating system: it patches the functions of `os` (and what `open` gives)
for the rest of the process's life, so it is for child processes alone. `Life` is a store without a bus: the real core,
driver, effects, movers, tier and pool.
"""

from __future__ import annotations

import asyncio
import builtins
import errno
import hashlib
import io
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import xxhash

from services.store import events as e
from services.store.allocator import Allocator
from services.store.effects import Effects, Means
from services.store.export import Exporter
from services.store.fetch import Fetcher
from services.store.importer import Importer
from services.store.mover import Mover
from services.store.peers import PeerDirectory
from services.store.pool import Pool
from services.store.residency import Residency
from services.store.tier import REASON, SsdTier
from services.store.trees import TreeConfig
from shared.contracts.manifest import MANIFEST_NAME, Manifest, decode_manifest
from shared.contracts.residency import Progress
from shared.driver import Driver
from shared.errors import Failure, HearthError
from shared.registry import Registry
from tests.unit.store.sources import local_tree

CHUNK: Final = 8192
POOL_CHUNKS: Final = 16
SSD_BYTES: Final = 4 * 2**20

# -- the disk ----------------------------------------------------------------------------------------------------------

SPACE: Final = frozenset({"create", "write", "fallocate", "mkdir", "rename", "fsync", "ftruncate"})  # may find it full
_CHANGING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Fault:
    """What happens at call `at` (from 1; 0: nothing ever does).

    `how`: "before", "after" and "torn" kill the process: before the call, after it, or after half of what it writes;
    "once" fails the call with `number`, "forever" every later one on the same device, too (of a full disk only those
    that take room). With `reads` the calls that read are counted, else those that change something.
    """

    at: int = 0
    how: str = ""
    number: int = 0
    reads: bool = False

    def __str__(self) -> str:
        name = errno.errorcode.get(self.number, "")
        return " ".join(filter(None, (self.how, name, "read" if self.reads else "call", str(self.at))))


@dataclass(frozen=True)
class Call:
    """A system call that was made: `path` is relative to the home, `to` a rename's target."""

    name: str
    path: str
    to: str = ""


class FaultyDisk:
    """Counts the calls that concern files under `home`, once it is armed, and makes one of them fail.

    `dirty` are the files whose content has not been flushed since it was written; `dying` hears of them right before
    the process dies, for whoever wants to play a power cut.
    """

    def __init__(self, home: Path, fault: Fault, dying: Callable[[], None] = lambda: None) -> None:
        self.calls: list[Call] = []
        self.reads = 0
        self.dirty: set[str] = set()
        self.armed = False
        self.struck = False
        self._home = str(home)
        self._fault = fault
        self._dying = dying
        self._device = ""
        self._lock = threading.RLock()

    # -- what happens --------------------------------------------------------------------------------------------------

    def _of(self, target: Any, dir_fd: int | None = None) -> str | None:
        """The path below the home, or None if it is none of ours."""
        if isinstance(target, int):
            try:
                path = os.readlink(f"/proc/self/fd/{target}")
            except OSError:
                return None
        else:
            path = os.fsdecode(target)
            if dir_fd is not None and not os.path.isabs(path):
                path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        return os.path.relpath(path, self._home) if path.startswith(self._home + "/") else None

    def _call(
        self,
        name: str,
        path: str | None,
        real: Callable[[], Any],
        *,
        to: str = "",
        half: Callable[[], Any] | None = None,
    ) -> Any:
        if path is None or not self.armed:
            return real()
        with self._lock:
            self.calls.append(Call(name, path, to))
            fault = self._fault
            now = not fault.reads and len(self.calls) == fault.at
            if now and fault.how in ("before", "torn"):
                if fault.how == "torn" and half is not None:
                    half()
                    self._note(name, path, to)
                self._die()
            self._raise(name, path, now)
            result = real()
            self._note(name, path, to)
            if now and fault.how == "after":
                self._die()
            return result

    def _read(self, path: str | None, real: Callable[[], Any]) -> Any:
        if path is None or not self.armed:
            return real()
        with self._lock:
            self.reads += 1
            self._raise("read", path, self._fault.reads and self.reads == self._fault.at)
            return real()

    def _raise(self, name: str, path: str, now: bool) -> None:
        fault = self._fault
        if not fault.number or (fault.reads != (name == "read")):
            return
        full = fault.number in (errno.ENOSPC, errno.EDQUOT)
        device = path.split("/")[0]
        if now:
            self.struck, self._device = True, device
        elif not (self.struck and fault.how == "forever" and device == self._device and (not full or name in SPACE)):
            return
        raise OSError(fault.number, os.strerror(fault.number), path)

    def _die(self) -> None:
        self._dying()
        os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, name: str, path: str, to: str) -> None:
        if name in ("write", "ftruncate", "truncate"):
            self.dirty.add(path)
        elif name == "fsync":
            self.dirty.discard(path)
        elif name == "rename":
            moved = {one for one in self.dirty if one == path or one.startswith(path + "/")}
            self.dirty = (self.dirty - moved) | {to + one[len(path) :] for one in moved}
        elif name == "unlink":
            self.dirty.discard(path)

    # -- where it happens ----------------------------------------------------------------------------------------------

    def install(self) -> None:
        """From now on, until the process ends."""
        real: Any = type("Real", (), {name: staticmethod(getattr(os, name)) for name in dir(os) if name[0] != "_"})
        real_open = io.open
        disk = self

        def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            def do() -> int:
                return cast(int, real.open(path, flags, mode, dir_fd=dir_fd))

            if flags & getattr(os, "O_TMPFILE", 0) == getattr(os, "O_TMPFILE", -1):
                return do()
            if not flags & _CHANGING:
                return cast(int, disk._read(disk._of(path, dir_fd), do))
            return cast(int, disk._call("create" if flags & os.O_CREAT else "open", disk._of(path, dir_fd), do))

        def write(fd: int, data: Any) -> int:
            half = memoryview(data)[: len(data) // 2]
            return cast(
                int, disk._call("write", disk._of(fd), lambda: real.write(fd, data), half=lambda: real.write(fd, half))
            )

        def pwrite(fd: int, data: Any, offset: int) -> int:
            def torn() -> None:
                file = real.open(f"/proc/self/fd/{fd}", os.O_WRONLY)  # not the direct one: half of it is no whole page
                real.pwrite(file, bytes(data[: len(data) // 2]), offset)

            return cast(int, disk._call("write", disk._of(fd), lambda: real.pwrite(fd, data, offset), half=torn))

        def rename(source: Any, target: Any, **rest: Any) -> None:
            to = disk._of(target) or ""
            disk._call("rename", disk._of(source), lambda: real.rename(source, target, **rest), to=to)

        def simple(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(target: Any, *args: Any, dir_fd: int | None = None, **rest: Any) -> Any:
                more = rest if dir_fd is None else {**rest, "dir_fd": dir_fd}
                # A kill takes nothing of what was flushed or not: the disk need not be kept busy.
                do = (lambda: None) if name == "fsync" else (lambda: function(target, *args, **more))
                return disk._call(name, disk._of(target, dir_fd), do)

            return call

        def reading(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(target: Any = ".", *args: Any, **rest: Any) -> Any:
                return disk._read(disk._of(target), lambda: function(target, *args, **rest))

            return call

        class Raw(io.FileIO):
            """A file that was opened by its path."""

            def write(self, data: Any) -> int:
                return cast(
                    int,
                    disk._call(
                        "write",
                        disk._of(self.fileno()),
                        lambda: super(Raw, self).write(data),
                        half=lambda: super(Raw, self).write(memoryview(data)[: len(data) // 2]),
                    ),
                )

        def open_file(file: Any, mode: str = "r", *args: Any, **rest: Any) -> Any:
            path = disk._of(file) if isinstance(file, (str, os.PathLike)) else None
            if path is None or not disk.armed:
                return real_open(file, mode, *args, **rest)
            if not set(mode) & set("wax+"):
                return disk._read(path, lambda: real_open(file, mode, *args, **rest))
            raw = disk._call("create", path, lambda: Raw(os.fspath(file), mode.replace("b", "")))
            binary = io.BufferedWriter(raw)
            return binary if "b" in mode else io.TextIOWrapper(binary, *args[1:], **rest)

        changed = {"open": open_, "write": write, "pwrite": pwrite, "rename": rename, "replace": rename}
        for name, function in changed.items():
            setattr(os, name, function)
        for name in ("unlink", "remove", "rmdir", "mkdir", "utime", "truncate", "ftruncate"):
            setattr(os, name, simple({"remove": "unlink"}.get(name, name), getattr(real, name)))
        for name in ("fsync", "fdatasync"):
            setattr(os, name, simple("fsync", getattr(real, name)))
        setattr(os, "posix_fallocate", simple("fallocate", real.posix_fallocate))  # noqa: B010
        for name in ("preadv", "pread", "scandir", "listdir"):
            setattr(os, name, reading(getattr(real, name)))
        setattr(io, "open", open_file)  # noqa: B010
        setattr(builtins, "open", open_file)  # noqa: B010


# -- a store -----------------------------------------------------------------------------------------------------------


class _NoRegistry:
    async def all(self, kind: type) -> list[Any]:
        return []


class Life:
    """One life of a store. `store/`, `shm/` and `out/` lie in `home`. Made by `a_life`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.warnings: list[tuple[str, str]] = []
        self.refused: list[tuple[str, str]] = []
        self._answers: dict[object, asyncio.Future[Any]] = {}
        self._under_way = 0
        self.tier = SsdTier(home / "store")
        try:
            self.pins, fault = self.tier.pins()
            self.stored, self.refused = self.tier.scan()
            self.pool = Pool.open(home / "shm", prefix="t", server_id="s", chunk_bytes=CHUNK, chunk_count=POOL_CHUNKS)
        except HearthError:
            self.tier.close()
            raise
        if fault:
            self.warnings.append(("pins.dropped", fault))
        disk, net = Mover(self.pool, threads=1, name="disk"), Mover(self.pool, threads=1, name="net")
        trees = TreeConfig(connections=1)
        means = Means(
            tier=self.tier,
            disk=disk,
            net=net,
            importer=Importer(
                self.tier,
                open_tree=local_tree,
                disk=disk,
                net=net,
                fetcher=Fetcher(self.tier, net, own_id="s"),
                chunk_bytes=CHUNK,
            ),
            exporter=Exporter(self.tier.root, disk, trees),
            peers=PeerDirectory(cast(Registry, _NoRegistry()), "s"),
            block_bytes=CHUNK,
            verify_loads=True,
        )
        self.core = Residency(
            server_id="s",
            nonce=self.pool.nonce,
            segment=str(self.pool.path),
            segment_bytes=self.pool.segment_bytes,
            board_offset=self.pool.board_offset,
            allocator=Allocator(chunk_bytes=CHUNK, chunk_count=POOL_CHUNKS),
            ssd_capacity_bytes=SSD_BYTES,
            stored=self.stored,
            restored=self.pool.restored,
            pins=self.pins,
        )
        self.driver: Driver[e.Event, e.Action] = Driver(
            self.core, tell=self._tell, do=self._do, long=e.LONG, check=True
        )
        self.effects = Effects(means, post=self.driver.post_threadsafe, warn=lambda *what: self.warnings.append(what))

    def _tell(self, action: e.Action) -> None:
        match action:
            case e.Answer(reply, message):
                future = self._answers.get(reply)
                if future is not None and not isinstance(message, Progress) and not future.done():
                    future.set_result(message)
            case e.ClearBoard(extents):
                self.pool.clear(extents)
            case e.SavePool(state):
                if not self.pool.save(state):
                    self.warnings.append(("pool.unsaved", ""))
            case e.SetPriority(job, priority):
                self.effects.set_priority(job, priority)
            case e.AdvanceWindow(job, chunks):
                self.effects.advance(job, chunks)
            case e.StopJob(job):
                self.effects.stop(job)
            case _:
                pass

    async def _do(self, action: e.Action) -> e.Event | None:
        self._under_way += 1
        try:
            return await self.effects.do(action)
        finally:
            self._under_way -= 1

    async def call(self, kind: Callable[[Any, Any], e.Event], message: Any) -> Any:
        """Ask; the answer when everything that it brought about has been carried out."""
        reply = object()
        future = self._answers[reply] = asyncio.get_running_loop().create_future()
        self.driver.post(kind(message, reply))
        answer = await future
        await self.quiet()
        return answer

    async def quiet(self) -> None:
        """Until nothing is under way."""
        calm = 0
        while calm < 5:
            await asyncio.sleep(0)
            calm = 0 if self._under_way else calm + 1
            if self._under_way:
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        """As a store ends that keeps its pool."""
        await self.effects.close()
        self.pool.close(keep=True)
        self.tier.close()


@asynccontextmanager
async def a_life(home: Path) -> AsyncIterator[Life]:
    """A life from start to end."""
    life = Life(home)
    try:
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(life.driver.run())
            await life.quiet()
            try:
                yield life
            finally:
                running.cancel()
    finally:
        await life.close()


# -- what must be true -------------------------------------------------------------------------------------------------


def faults_of(directory: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the bytes of a checkpoint, by the test's own eyes."""
    found: list[str] = []
    image = b""
    for file in manifest.files:
        data = (directory / file.name).read_bytes() if (directory / file.name).exists() else b""
        if len(data) != file.bytes:
            found.append(f"{file.name} has {len(data)} bytes instead of {file.bytes}")
        image += data + bytes(-len(data) % 4096)
    for index, wanted in enumerate(manifest.chunks):
        piece = image[index * manifest.chunk_bytes : (index + 1) * manifest.chunk_bytes]
        if xxhash.xxh3_64_hexdigest(piece) != wanted:
            found.append(f"chunk {index} is corrupt")
    for name, digest in manifest.small_files.items():
        path = directory / name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            found.append(f"{name} is corrupt")
    return found


def disk_bytes(*directories: Path) -> int:
    """Bytes of the files below these directories but for the reasons of quarantines, which are in no account."""
    paths = (path for directory in directories for path in (directory, *directory.rglob("*")))
    return sum(path.stat().st_size for path in paths if path.is_file() and path.name != REASON)


def check_claims(life: Life, *, corrupt: frozenset[str] = frozenset()) -> list[str]:
    """What a store claims right after its start, against what lies there. `corrupt` ids may have bad chunks."""
    found: list[str] = []
    root = life.tier.root
    whole = {one.id: one for one in life.stored if one.arrived_bytes is None and not one.quarantined}
    partial = {one.id: one for one in life.stored if one.arrived_bytes is not None and not one.quarantined}
    aside = {one.id: one for one in life.stored if one.quarantined}
    for id, one in whole.items():
        directory = Path(one.directory)
        manifest = decode_manifest((directory / MANIFEST_NAME).read_bytes())
        if id not in corrupt:
            found += [f"claimed whole: {fault}" for fault in faults_of(directory, manifest)]
        names = {MANIFEST_NAME, *manifest.small_files, *(file.name for file in manifest.files)}
        if (extra := set(os.listdir(directory)) ^ names) != set():
            found.append(f"strange or missing in a whole checkpoint: {sorted(extra)}")
    if (names := os.listdir(root / "incoming")) != []:
        found.append(f"left in incoming: {names}")
    if set(os.listdir(root / "checkpoints")) != {*whole, *partial}:
        found.append(f"checkpoints has {os.listdir(root / 'checkpoints')}, claimed are {[*whole, *partial]}")
    if set(os.listdir(root / "quarantine")) != set(aside):
        found.append(f"quarantine has {os.listdir(root / 'quarantine')}, known are {list(aside)}")
    known = {"checkpoints", "quarantine", "incoming", ".lock", "pins.json"}
    if (extra := set(os.listdir(root)) - known) != set():
        found.append(f"stray in the store: {sorted(extra)}")
    segment = life.pool.path.name
    if (extra := set(os.listdir(life.home / "shm")) - {segment, f"{segment}.state"}) != set():
        found.append(f"stray in shared memory: {sorted(extra)}")
    found += check_accounts(life)
    for copy in life.pool.restored.copies if life.pool.restored is not None else ():
        if copy.checkpoint_id in whole:
            directory = Path(whole[copy.checkpoint_id].directory)
            manifest = decode_manifest((directory / MANIFEST_NAME).read_bytes())
            image = b"".join(bytes(life.pool.memory[at.offset : at.offset + at.length]) for at in copy.extents)
            image = image[: manifest.image_bytes()]
            for index, wanted in enumerate(manifest.chunks):
                piece = image[index * manifest.chunk_bytes : (index + 1) * manifest.chunk_bytes]
                if xxhash.xxh3_64_hexdigest(piece) != wanted:
                    found.append(f"claimed in DRAM: chunk {index} of {copy.checkpoint_id} is corrupt")
    return found


def check_accounts(life: Life) -> list[str]:
    """Do the core's accounts say what lies on the disk?"""
    root = life.tier.root
    there = disk_bytes(root / "checkpoints", root / "quarantine", root / "incoming")
    there -= disk_bytes(*life.tier.unwanted)  # what could not be deleted yet
    used = life.core.ssd_used_bytes
    return [] if used == there else [f"{used} bytes are accounted for, {there} lie on the disk"]


def open_files(home: Path) -> list[str]:
    """The files below `home` that this process has open or mapped."""
    found: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if path.startswith(str(home)):
            found.append(os.path.relpath(path, home))
    return sorted(found)


def failure_faults(failure: Failure, allowed: frozenset[str]) -> list[str]:
    """What is wrong with a failure that the store answers with."""
    found: list[str] = []
    if failure.code.value not in allowed:
        found.append(f"the code is {failure.code.value}: {failure.message}")
    message = failure.message
    if not message or "\n" in message or "Traceback" in message or "[Errno" in message or not message.endswith("."):
        found.append(f"not a sentence: {message!r}")
    return found


def dump(value: object) -> bytes:
    """A line for the pipe between a child and its parent."""
    return json.dumps(value).encode() + b"\n"
