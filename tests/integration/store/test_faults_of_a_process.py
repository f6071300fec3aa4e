"""The store as a process that is killed at any moment, and on a disk that is really full."""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shared.bus import Bus
from shared.contracts.manifest import MANIFEST_NAME, decode_manifest
from shared.contracts.records import ServerRecord
from shared.contracts.residency import (
    Acquire,
    CheckpointList,
    Evict,
    Import,
    Imported,
    Lease,
    ListCheckpoints,
    Pin,
    Prefetch,
    Progress,
    Release,
    Renew,
    Source,
    Verified,
    Verify,
)
from shared.errors import Code, HearthError
from shared.registry import Registry
from shared.subjects import ACQUIRE, EVICT, IMPORT, LIST, PIN, PREFETCH, RELEASE, RENEW, VERIFY, Endpoint
from tests.builders.checkpoints import make_checkpoint
from tests.integration.store.faults import disk_bytes, faults_of
from tests.integration.store.test_store_process import SERVER, a_process, log_of, pid_of_ready_store
from tests.unit.store.sources import make_source

CHUNK = 8192
TTL_S = 20.0


def settings_of(home: Path, nats_url: str, redis_url: str, prefix: str, **more: str) -> dict[str, str]:
    (home / "shm").mkdir(exist_ok=True)
    return {
        "nats_url": nats_url,
        "redis_url": redis_url,
        "prefix": prefix,
        "server_id": SERVER,
        "store_dir": str(home / "store"),
        "shm_dir": str(home / "shm"),
        "dram_bytes": str(20 * CHUNK),
        "chunk_bytes": str(CHUNK),
        "io_threads": "2",
        "io_block_bytes": str(CHUNK),
        "heartbeat_s": "0.2",
        "log_format": "json",
        **more,
    }


async def ask(bus: Bus, endpoint: Endpoint[Any, Any], message: Any, *, polls: int = 1000) -> Any:
    """Ask until there is an answer that is no progress. Raises `HearthError`."""
    for _ in range(polls):
        answer = await bus.call(endpoint, message, server_id=SERVER, extra_s=1)
        if not isinstance(answer, Progress):
            return answer
    return None


async def code_of(bus: Bus, endpoint: Endpoint[Any, Any], message: Any) -> Code | None:
    """The code of a failure, None if it went well."""
    try:
        await ask(bus, endpoint, message)
    except HearthError as error:
        return error.failure.code
    return None


def image_of(lease: Lease) -> str:
    """A digest of the leased bytes, as a worker sees them."""
    file = os.open(lease.segment, os.O_RDONLY)
    try:
        with mmap.mmap(file, lease.segment_bytes, prot=mmap.PROT_READ) as segment:
            pieces = [segment[extent.offset : extent.offset + extent.length] for extent in lease.extents]
            return hashlib.sha256(b"".join(pieces)).hexdigest()
    finally:
        os.close(file)


def stored_faults(root: Path) -> list[str]:
    """What is wrong with the checkpoints that lie there whole."""
    found: list[str] = []
    for place in sorted((root / "checkpoints").iterdir()):
        if not (place / ".arriving").exists():
            found += faults_of(place, decode_manifest((place / MANIFEST_NAME).read_bytes()))
    return found


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("nothing may be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


async def test_a_disk_that_is_really_full(
    tmp_path: Path, small_disk: Path, nats_url: str, redis_url: str, prefix: str, bus: Bus, registry: Registry
) -> None:
    for number, name in enumerate("ab"):
        make_source(tmp_path / name, seed=number)
    make_checkpoint(tmp_path / "h", chunks=5, chunk_bytes=CHUNK, seed=5)
    a, b, h = (Source(url=str(tmp_path / name)) for name in "abh")
    root = small_disk / "store"
    settings = settings_of(
        tmp_path, nats_url, redis_url, prefix, store_dir=str(root), ssd_bytes=str(2**24), keep_pool="0"
    )
    filler = small_disk / "filler"
    with a_process(tmp_path, **settings) as process:
        await pid_of_ready_store(registry, process)
        lease = await ask(bus, ACQUIRE, Acquire(checkpoint_id="", source=a, holder="w", ttl_s=TTL_S))
        before = image_of(lease)
        try:  # to the last byte
            with filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError:
            pass
        assert os.statvfs(small_disk).f_bavail == 0
        for endpoint, message in (
            (IMPORT, Import(source=b)),
            (IMPORT, Import(source=h)),
            (ACQUIRE, Acquire(checkpoint_id="", source=b, holder="w", ttl_s=TTL_S)),
        ):
            with pytest.raises(HearthError) as caught:
                await ask(bus, endpoint, message)
            assert caught.value.failure.code is Code.NO_CAPACITY
            assert caught.value.failure.message.endswith("has 0 B free.")
        assert os.listdir(root / "incoming") == []
        assert os.listdir(root / "checkpoints") == [lease.checkpoint.checkpoint_id], "nothing is left of what failed"
        # It goes on with what it has: leases, verification, pins, and from the disk into DRAM.
        await bus.call(PIN, Pin(checkpoint_id=lease.checkpoint.checkpoint_id, tier="ssd"), server_id=SERVER)
        assert isinstance(await ask(bus, VERIFY, Verify(checkpoint_id=lease.checkpoint.checkpoint_id)), Verified)
        bus.publish(RELEASE, Release(holder="w", lease_id=lease.lease_id), server_id=SERVER)
        evict = Evict(checkpoint_id=lease.checkpoint.checkpoint_id, tier="dram")
        while await code_of(bus, EVICT, evict) is not None:  # until the release has been heard
            await asyncio.sleep(0.01)
        lease = await ask(bus, ACQUIRE, Acquire(checkpoint_id="", source=a, holder="w", ttl_s=TTL_S))
        assert (lease.tier, image_of(lease)) == ("ssd", before)
        filler.unlink()
        assert isinstance(await ask(bus, IMPORT, Import(source=b)), Imported), "there is room, and it works"
        assert isinstance(await ask(bus, IMPORT, Import(source=h)), Imported)
        assert stored_faults(root) == []
        process.send_signal(signal.SIGTERM)
        assert await asyncio.get_running_loop().run_in_executor(None, process.wait, 20) == 0
    assert os.listdir(tmp_path / "shm") == []


# -- killed at any moment ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A lease, and a digest of its bytes when it was given."""

    lease: Lease
    holder: str
    image: str


@dataclass
class Worker:
    """Holds leases over the store's lives, and does whatever else a cluster does meanwhile."""

    bus: Bus
    sources: list[Source]
    choose: random.Random
    ids: dict[str, None] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    done: int = 0

    async def live(self, holder: str, over: asyncio.Event) -> None:
        """One thing after another."""
        while not over.is_set():
            try:
                async with asyncio.timeout(5):
                    await self._do(holder)
                self.done += 1
            except (HearthError, TimeoutError):  # it is dead, or busy, or full: all of that may be
                await asyncio.sleep(0.03)

    async def _do(self, holder: str) -> None:
        choose, source = self.choose, self.choose.choice(self.sources)
        id, tier = choose.choice([*self.ids, ""]), choose.choice(("ssd", "dram"))
        deeds = ("acquire", "acquire", "release", "import", "prefetch", "evict", "evict", "verify", "look")
        match choose.choice(deeds):
            case "acquire":
                message = Acquire(checkpoint_id="", source=source, holder=holder, ttl_s=TTL_S, wait_s=0.3)
                answer = await ask(self.bus, ACQUIRE, message, polls=5)
                if isinstance(answer, Lease):
                    self._took(answer, holder)
            case "release" if self.held:
                held = self.held.pop(choose.choice([*self.held]))
                self._look(held)
                self.bus.publish(RELEASE, Release(holder=held.holder, lease_id=held.lease.lease_id), server_id=SERVER)
            case "import":
                answer = await ask(self.bus, IMPORT, Import(source=source, wait_s=0.3), polls=5)
                if isinstance(answer, Imported):
                    self.ids[answer.checkpoint.checkpoint_id] = None
            case "prefetch":
                await ask(self.bus, PREFETCH, Prefetch(source=source, tier=tier, wait_s=0.3), polls=5)
            case "evict" if id:
                await ask(self.bus, EVICT, Evict(checkpoint_id=id, tier=tier), polls=5)
            case "verify" if id:
                await ask(self.bus, VERIFY, Verify(checkpoint_id=id, wait_s=0.3), polls=5)
            case _:
                self.look()
                await asyncio.sleep(0.01)

    def _took(self, lease: Lease, holder: str) -> None:
        id, image = lease.checkpoint.checkpoint_id, image_of(lease)
        self.ids[id] = None
        if self.images.setdefault(id, image) != image:
            self.problems.append(f"a lease on {id} has other bytes than one before")
        self.held[lease.lease_id] = Held(lease, holder, image)

    def look(self) -> None:
        """Are the bytes of all leases what they were?"""
        for held in self.held.values():
            self._look(held)

    def _look(self, held: Held) -> None:
        if image_of(held.lease) != held.image:
            lease = held.lease
            self.problems.append(
                f"the bytes of lease {lease.lease_id} on {lease.checkpoint.checkpoint_id} have changed"
            )

    def let_go(self) -> None:
        """Release every lease."""
        for held in self.held.values():
            self.bus.publish(RELEASE, Release(holder=held.holder, lease_id=held.lease.lease_id), server_id=SERVER)
        self.held.clear()

    async def renew(self) -> None:
        """A new life of the store must know every lease."""
        for holder in sorted({held.holder for held in self.held.values()}):
            ids = tuple(sorted(name for name, held in self.held.items() if held.holder == holder))
            answer = await self.bus.call(RENEW, Renew(holder=holder, lease_ids=ids, ttl_s=TTL_S), server_id=SERVER)
            lost = [name for name in answer.unknown if name in self.held]  # some may have been released meanwhile
            self.problems += [f"lease {name} is lost" for name in lost]


async def kill_again_and_again(
    home: Path, settings: dict[str, str], bus: Bus, registry: Registry, *, seconds: float, seed: int
) -> None:
    """Lives of a store that end by SIGKILL, under a cluster's load; then one that ends well; a look at everything."""
    for number in range(3):
        make_source(home / f"m{number}", seed=number)
    for number in range(2):
        make_checkpoint(home / f"h{number}", chunks=4, chunk_bytes=CHUNK, seed=number)
    names = ("m0", "m1", "m2", "h0", "h1")
    choose = random.Random(seed)
    worker = Worker(bus, [Source(url=str(home / name)) for name in names], choose)
    root, over, until, lives = home / "store", asyncio.Event(), time.monotonic() + seconds, 0
    async with asyncio.TaskGroup() as tasks:
        actors: list[asyncio.Task[None]] = []
        while time.monotonic() < until:
            with a_process(home, **settings) as process:
                await pid_of_ready_store(registry, process)
                if not actors:
                    actors = [tasks.create_task(worker.live(f"w{number}", over)) for number in range(3)]
                await worker.renew()
                await asyncio.sleep(choose.uniform(0.05, 1.2))
                worker.look()
                process.kill()
            worker.look()
            lives += 1
        over.set()
    assert worker.problems == []
    assert lives > 1
    assert worker.done > 10
    assert stored_faults(root) == []
    # More room, for a lease whose answer was lost in a kill holds its checkpoint until its time is over.
    with a_process(home, **settings | {"ssd_bytes": str(2**20), "keep_pool": "0"}) as process:
        await pid_of_ready_store(registry, process)
        await worker.renew()
        assert worker.problems == []
        worker.look()
        assert os.listdir(root / "incoming") == []
        worker.let_go()
        for source in worker.sources:
            while (code := await code_of(bus, PREFETCH, Prefetch(source=source, tier="ssd"))) is Code.NO_CAPACITY:
                await asyncio.sleep(0.01)  # until it has heard that the leases are over
            assert code is None, "all of it works as if nothing had been"
        listed = await bus.call(LIST, ListCheckpoints(), server_id=SERVER)
        assert isinstance(listed, CheckpointList)
        for one in listed.checkpoints:
            verified = await ask(bus, VERIFY, Verify(checkpoint_id=one.checkpoint.checkpoint_id))
            assert isinstance(verified, Verified)
            assert verified.repaired_chunks == 0
        assert sorted(os.listdir(root / "checkpoints")) == sorted(
            one.checkpoint.checkpoint_id for one in listed.checkpoints
        )
        there = disk_bytes(root / "checkpoints", root / "quarantine", root / "incoming")
        while (record := await registry.get(ServerRecord, SERVER)) is None or record.ssd_used_bytes != there:
            await asyncio.sleep(0.05)  # the next beat says it, or the test's time is over
        process.send_signal(signal.SIGTERM)
        assert await asyncio.get_running_loop().run_in_executor(None, process.wait, 20) == 0
    assert worker.problems == []
    assert stored_faults(root) == []
    assert os.listdir(home / "shm") == []
    assert sorted(os.listdir(root)) == [".lock", "checkpoints", "incoming", "quarantine"]
    assert "crash" not in "".join(str(line["event"]) for line in log_of(home))


async def test_killed_again_and_again_leases_keep_their_bytes(
    tmp_path: Path, nats_url: str, redis_url: str, prefix: str, bus: Bus, registry: Registry
) -> None:
    settings = settings_of(tmp_path, nats_url, redis_url, prefix, ssd_bytes=str(160_000))
    await kill_again_and_again(tmp_path, settings, bus, registry, seconds=10, seed=3)


@pytest.mark.by_hand
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", range(3))
async def test_killed_for_minutes(
    tmp_path: Path, nats_url: str, redis_url: str, prefix: str, bus: Bus, registry: Registry, seed: int
) -> None:
    settings = settings_of(tmp_path, nats_url, redis_url, prefix, ssd_bytes=str(160_000))
    await kill_again_and_again(tmp_path, settings, bus, registry, seconds=60, seed=seed)
