"""The store over a real bus and registry: every endpoint, its errors, leases on real shared memory, drain."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.store.main import serve
from shared.bus import Bus
from shared.contracts.manifest import decode_manifest
from shared.contracts.records import ServerRecord
from shared.contracts.residency import (
    Acquire,
    Consumed,
    Done,
    Evict,
    Export,
    Import,
    Imported,
    Inspect,
    Lease,
    ListCheckpoints,
    LoadProgress,
    Pin,
    Prefetch,
    Release,
    Renew,
    Source,
    Verified,
    Verify,
    arrival_word,
)
from shared.errors import Code, HearthError
from shared.lifecycle import run_service
from shared.registry import Registry
from shared.settings import StoreSettings
from shared.subjects import (
    ACQUIRE,
    CONSUMED,
    EVICT,
    EXPORT,
    IMPORT,
    INSPECT,
    LIST,
    LOAD_PROGRESS,
    PIN,
    PREFETCH,
    RELEASE,
    RENEW,
    VERIFY,
    Endpoint,
)
from tests.unit.store.sources import LLAMA, make_source

CHUNK = 8192
SERVER = "s1"


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    directory = tmp_path / "shm"
    directory.mkdir()
    return directory


@pytest.fixture
def settings(tmp_path: Path, shm: Path, nats_url: str, redis_url: str, prefix: str) -> StoreSettings:
    return StoreSettings(
        nats_url=nats_url,
        redis_url=redis_url,
        prefix=prefix,
        server_id=SERVER,
        store_dir=str(tmp_path / "store"),
        shm_dir=str(shm),
        dram_bytes=16 * CHUNK,
        ssd_bytes=2**20,
        chunk_bytes=CHUNK,
        io_threads=2,
        io_block_bytes=CHUNK,
        keep_pool=False,
        heartbeat_s=0.2,
    )


@asynccontextmanager
async def a_store(settings: StoreSettings, registry: Registry) -> AsyncIterator[None]:
    """A whole store on this loop, from start to drain."""
    stopping = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run_service("store", SERVER, settings, serve, stopping))
        await until(lambda: is_ready(registry))
        try:
            yield
        finally:
            stopping.set()


async def is_ready(registry: Registry) -> bool:
    record = await registry.get(ServerRecord, SERVER)
    return record is not None and record.phase == "ready"


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something holds; the test's own timeout ends it otherwise."""
    while not await holds():
        await asyncio.sleep(0.01)


async def get_lease(
    bus: Bus, source: Source, *, id: str = "", holder: str = "w1", ttl_s: float = 30.0, arriving: bool = False
) -> Lease:
    while True:
        message = Acquire(
            checkpoint_id=id, source=source, holder=holder, ttl_s=ttl_s, deployment="d1", arriving=arriving
        )
        answer = await bus.call(ACQUIRE, message, server_id=SERVER, extra_s=1)
        if isinstance(answer, Lease):
            return answer


async def do_import(bus: Bus, source: Source) -> Imported:
    while True:
        answer = await bus.call(IMPORT, Import(source=source, deployment="d1"), server_id=SERVER, extra_s=1)
        if isinstance(answer, Imported):
            return answer


async def done(bus: Bus, endpoint: Endpoint[Any, Any], message: msgspec.Struct) -> None:
    """Ask again and again until it is done."""
    while not isinstance(await bus.call(endpoint, message, server_id=SERVER, extra_s=1), Done):
        pass


async def verify(bus: Bus, id: str) -> Verified:
    while True:
        answer = await bus.call(VERIFY, Verify(checkpoint_id=id), server_id=SERVER, extra_s=1)
        if isinstance(answer, Verified):
            return answer


def image_of(lease: Lease) -> bytes:
    """The leased bytes, read as a worker would: through a read-only mapping."""
    file = os.open(lease.segment, os.O_RDONLY)
    try:
        with mmap.mmap(file, lease.segment_bytes, prot=mmap.PROT_READ) as segment:
            return b"".join(segment[extent.offset : extent.offset + extent.length] for extent in lease.extents)
    finally:
        os.close(file)


def segment_of(lease: Lease) -> bytes:
    return Path(lease.segment).read_bytes()


def file_of(lease: Lease, name: str) -> bytes:
    return Path(lease.directory, name).read_bytes()


def names_in(settings: StoreSettings, part: str) -> list[str]:
    return os.listdir(Path(settings.store_dir) / part)


def damage(settings: StoreSettings, id: str) -> None:
    """Change one byte of a stored checkpoint's weights."""
    with (Path(settings.store_dir) / "checkpoints" / id / "model.safetensors").open("r+b") as file:
        file.seek(CHUNK + 5)
        byte = file.read(1)
        file.seek(CHUNK + 5)
        file.write(bytes([byte[0] ^ 1]))


async def outcome(call: Awaitable[object]) -> Code | None:
    """The code of a call's failure, None if it went well."""
    try:
        await call
    except HearthError as error:
        return error.failure.code
    return None


async def test_import_acquire_release_evict(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path, shm: Path
) -> None:
    contents = make_source(tmp_path / "m", {**LLAMA, "odd": ("I8", (13,))})
    source = Source(url=str(tmp_path / "m"))
    hints: list[LoadProgress] = []
    await bus.subscribe(LOAD_PROGRESS, hints.append, slug="d1")
    await bus.flush()
    async with a_store(settings, registry):
        inspected = await bus.call(INSPECT, Inspect(source=source), server_id=SERVER)
        assert inspected.architecture == "LlamaForCausalLM"
        assert inspected.weight_bytes == sum(map(len, contents.values()))

        imported = await do_import(bus, source)
        id = imported.checkpoint.checkpoint_id
        assert imported.checkpoint.weight_bytes == inspected.weight_bytes
        lease = await get_lease(bus, source, id=id)
        assert lease.tier == "ssd"
        assert lease.checkpoint == imported.checkpoint

        image = image_of(lease)
        file = file_of(lease, "model.safetensors")
        assert image[: len(file)] == file
        assert image[len(file) :] == bytes(len(image) - len(file))
        manifest = decode_manifest(file_of(lease, "hearth.json"))
        for name, tensor in manifest.tensors.items():
            at = manifest.starts()[tensor.file] + tensor.offset
            assert image[at : at + tensor.bytes] == contents[name], name

        async def resident() -> bool:
            record = await registry.get(ServerRecord, SERVER)
            assert record is not None
            return id in record.dram and id in record.ssd and record.leased_bytes > 0

        await until(resident)
        again = await get_lease(bus, source, id=id, holder="w2")
        assert (again.tier, again.extents) == ("dram", lease.extents)
        with pytest.raises(HearthError) as busy:
            await bus.call(EVICT, Evict(checkpoint_id=id, tier="ssd"), server_id=SERVER)
        assert busy.value.failure.code is Code.BUSY
        for one, holder in ((lease, "w1"), (again, "w2")):
            bus.publish(RELEASE, Release(holder=holder, lease_id=one.lease_id), server_id=SERVER)

        async def evicted() -> bool:
            # Releases and evictions arrive by different subscriptions, so the first try may come too early.
            return (
                await outcome(bus.call(EVICT, Evict(checkpoint_id=id, tier="ssd"), server_id=SERVER)) is not Code.BUSY
            )

        await until(evicted)
        assert names_in(settings, "checkpoints") == names_in(settings, "incoming") == []

        async def gone() -> bool:
            record = await registry.get(ServerRecord, SERVER)
            assert record is not None
            return not record.dram and not record.ssd and record.ssd_used_bytes == 0 and record.leased_bytes == 0

        await until(gone)
        assert {hint.progress.phase for hint in hints} >= {"importing", "reading"}
    assert not os.listdir(shm), "the pool is unlinked at the end"
    assert await registry.get(ServerRecord, SERVER) is None


async def test_acquire_of_what_is_nowhere_imports_it_and_a_restart_keeps_it(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path
) -> None:
    make_source(tmp_path / "m")
    source = Source(url=str(tmp_path / "m"))
    async with a_store(settings, registry):
        lease = await get_lease(bus, source)
        assert lease.tier == "remote"
        assert lease.import_s > 0
    async with a_store(settings, registry):
        again = await get_lease(bus, source)
        assert (again.tier, again.checkpoint) == ("ssd", lease.checkpoint)
        answer = await bus.call(
            RENEW, Renew(holder="w1", lease_ids=(lease.lease_id, again.lease_id), ttl_s=9), server_id=SERVER
        )
        assert answer.unknown == (lease.lease_id,)


async def test_lease_expires_and_its_room_is_used_again(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path
) -> None:
    big = {"model.embed_tokens.weight": ("F32", (64, 300)), "lm_head.weight": ("F32", (64, 32))}
    for number in range(2):
        make_source(tmp_path / f"m{number}", big, seed=number)
    async with a_store(settings, registry):
        await get_lease(bus, Source(url=str(tmp_path / "m0")), ttl_s=60)
        with pytest.raises(HearthError) as full:
            await get_lease(bus, Source(url=str(tmp_path / "m1")))
        assert full.value.failure.code is Code.NO_CAPACITY
        await get_lease(bus, Source(url=str(tmp_path / "m0")), ttl_s=60)

    async with a_store(settings, registry):
        first = await get_lease(bus, Source(url=str(tmp_path / "m0")), ttl_s=0.2)
        second = await get_lease(bus, Source(url=str(tmp_path / "m1")), ttl_s=60)
        assert second.extents == first.extents


async def test_what_the_pool_holds_and_who_has_leases_outlives_the_store(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path
) -> None:
    make_source(tmp_path / "m")
    source = Source(url=str(tmp_path / "m"))
    kept = msgspec.structs.replace(settings, keep_pool=True)
    async with a_store(kept, registry):
        lease = await get_lease(bus, source)
        bytes_before = image_of(lease)
    async with a_store(kept, registry):
        renew = Renew(holder="w1", lease_ids=(lease.lease_id, "another"), ttl_s=9)
        answer = await bus.call(RENEW, renew, server_id=SERVER)
        assert answer.unknown == ("another",)
        assert image_of(lease) == bytes_before
        again = await get_lease(bus, source)
        assert (again.tier, again.extents, again.segment) == ("dram", lease.extents, lease.segment)
        assert again.lease_id != lease.lease_id


async def test_a_damaged_chunk_is_made_anew_from_the_source(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path
) -> None:
    make_source(tmp_path / "m")
    source = Source(url=str(tmp_path / "m"))
    async with a_store(settings, registry):
        id = (await do_import(bus, source)).checkpoint.checkpoint_id
        weights = Path(settings.store_dir) / "checkpoints" / id / "model.safetensors"
        sound = weights.read_bytes()
        damage(settings, id)
        lease = await get_lease(bus, source, id=id)
        assert lease.tier == "ssd"
        assert image_of(lease)[: len(sound)] == sound
        assert weights.read_bytes() == sound
        damage(settings, id)
        assert await verify(bus, id) == Verified(
            chunks=len(decode_manifest(file_of(lease, "hearth.json")).chunks), repaired_chunks=1
        )
        assert weights.read_bytes() == sound


async def test_what_nobody_can_repair_is_set_aside_and_imported_anew_when_it_can_be(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path
) -> None:
    make_source(tmp_path / "m")
    source = Source(url=str(tmp_path / "m"))
    async with a_store(settings, registry):
        id = (await do_import(bus, source)).checkpoint.checkpoint_id
        damage(settings, id)
        (tmp_path / "m").rename(tmp_path / "away")
        with pytest.raises(HearthError) as damaged:
            await get_lease(bus, source, id=id)
        assert damaged.value.failure.code is Code.CHECKPOINT_CORRUPT

        async def set_aside() -> bool:
            record = await registry.get(ServerRecord, SERVER)
            aside = names_in(settings, "quarantine") == [id]
            return record is not None and id in record.quarantined and not record.ssd and aside

        await until(set_aside)
        (tmp_path / "away").rename(tmp_path / "m")
        assert (await get_lease(bus, source, id=id)).tier == "remote"
        assert names_in(settings, "checkpoints") == [id]

        async def removed() -> bool:
            return names_in(settings, "quarantine") == []

        await until(removed)


async def test_a_lease_on_bytes_that_are_still_arriving(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path
) -> None:
    make_source(tmp_path / "m")
    source = Source(url=str(tmp_path / "m"))
    async with a_store(settings, registry):
        id = (await do_import(bus, source)).checkpoint.checkpoint_id
        lease = await get_lease(bus, source, id=id, arriving=True)
        arrival = lease.arrival
        assert arrival is not None
        chunks = [extent.offset // CHUNK + at for extent in lease.extents for at in range(-(-extent.length // CHUNK))]

        async def all_there() -> bool:
            board = segment_of(lease)[arrival.board_offset :]
            words = [int.from_bytes(board[8 * chunk : 8 * chunk + 8], "little") for chunk in chunks]
            return words == [arrival_word(arrival.tag, 0)] * len(chunks)

        await until(all_there)
        file = file_of(lease, "model.safetensors")
        assert image_of(lease)[: len(file)] == file


async def test_a_checkpoint_larger_than_the_pool_streams_through_a_window(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path
) -> None:
    make_source(tmp_path / "m", {"model.embed_tokens.weight": ("F32", (64, 1500))})
    source = Source(url=str(tmp_path / "m"))
    async with a_store(settings, registry):
        with pytest.raises(HearthError) as refused:
            await get_lease(bus, source)
        assert refused.value.failure.code is Code.TOO_LARGE
        lease = await get_lease(bus, source, arriving=True)
        arrival = lease.arrival
        assert arrival is not None
        window = arrival.window_chunks
        assert arrival.image_bytes > settings.dram_bytes > window * CHUNK > 0
        slots = [extent.offset + at for extent in lease.extents for at in range(0, extent.length, CHUNK)]
        found = bytearray()
        for chunk in range(-(-arrival.image_bytes // CHUNK)):
            slot, word = slots[chunk % window], arrival_word(arrival.tag, chunk // window)
            board_at = arrival.board_offset + 8 * (slot // CHUNK)

            async def arrived(board_at: int = board_at, word: int = word) -> bool:
                segment = segment_of(lease)
                return int.from_bytes(segment[board_at : board_at + 8], "little") == word

            await until(arrived)
            found += segment_of(lease)[slot : slot + CHUNK]
            bus.publish(CONSUMED, Consumed(holder="w1", lease_id=lease.lease_id, chunks=chunk + 1), server_id=SERVER)
        file = file_of(lease, "model.safetensors")
        assert bytes(found[: len(file)]) == file
        bus.publish(RELEASE, Release(holder="w1", lease_id=lease.lease_id), server_id=SERVER)

        async def window_is_free() -> bool:
            record = await registry.get(ServerRecord, SERVER)
            return record is not None and record.dram_used_bytes == 0

        await until(window_is_free)


async def test_pin_prefetch_list_export(settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    source, target = Source(url=str(tmp_path / "m")), tmp_path / "exported"
    async with a_store(settings, registry):
        id = (await do_import(bus, source)).checkpoint.checkpoint_id
        await done(bus, PIN, Pin(checkpoint_id=id, tier="ssd"))
        await done(bus, PREFETCH, Prefetch(checkpoint_id=id))
        (held,) = (await bus.call(LIST, ListCheckpoints(), server_id=SERVER)).checkpoints
        assert (held.checkpoint.checkpoint_id, held.pinned, held.source) == (id, "ssd", source)
        assert held.dram_bytes == held.ssd_bytes == held.image_bytes
        assert await outcome(bus.call(EVICT, Evict(checkpoint_id=id, tier="ssd"), server_id=SERVER)) is Code.BUSY
        await done(bus, EXPORT, Export(checkpoint_id=id, url=str(target)))
    async with a_store(settings, registry):  # pins hold
        assert await outcome(bus.call(EVICT, Evict(checkpoint_id=id, tier="ssd"), server_id=SERVER)) is Code.BUSY
        await done(bus, PIN, Pin(checkpoint_id=id))
        await done(bus, EVICT, Evict(checkpoint_id=id, tier="ssd"))
        # What was exported is copied, not converted, and is the same checkpoint.
        again = await get_lease(bus, Source(url=str(target)), arriving=True)
        assert again.checkpoint.checkpoint_id == id


@pytest.mark.parametrize("call", ["inspect", "import", "acquire"])
async def test_refusals_reach_the_caller_and_leave_nothing(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path, call: str
) -> None:
    make_source(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    make_source(tmp_path / "big", {"model.embed_tokens.weight": ("F32", (64, 6000))})
    cases = {
        str(tmp_path / "none"): Code.INVALID_CHECKPOINT,
        str(tmp_path / "cut"): Code.INVALID_CHECKPOINT,
        str(tmp_path / "big"): Code.TOO_LARGE,
        "relative": Code.INVALID_REQUEST,
        "hf:a/b/c": Code.INVALID_REQUEST,
    }

    async def ask(source: Source) -> object:
        match call:
            case "inspect":
                return await bus.call(INSPECT, Inspect(source=source), server_id=SERVER)
            case "import":
                return await do_import(bus, source)
            case _:
                return await get_lease(bus, source)

    async with a_store(settings, registry):
        for url, code in cases.items():
            source = Source(url=url)
            with pytest.raises(HearthError) as refused:
                await ask(source)
            assert refused.value.failure.code is code, url
            assert refused.value.failure.message
        assert names_in(settings, "checkpoints") == names_in(settings, "incoming") == []


async def test_two_servers_give_the_same_source_the_same_id(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path
) -> None:
    make_source(tmp_path / "m", seed=3)
    make_source(tmp_path / "copy", seed=3)
    ids = []
    for number, name in enumerate(("m", "copy")):
        other = msgspec.structs.replace(settings, store_dir=str(tmp_path / f"store{number}"))
        async with a_store(other, registry):
            ids.append((await do_import(bus, Source(url=str(tmp_path / name)))).checkpoint.checkpoint_id)
    assert ids[0] == ids[1]


async def test_a_second_store_on_the_same_directory_is_refused(settings: StoreSettings, registry: Registry) -> None:
    async with a_store(settings, registry):
        with pytest.RaisesGroup(HearthError, flatten_subgroups=True) as refused:
            await run_service("store", SERVER, settings, serve)
    assert "Another store uses" in str(leaf(refused.value))


def leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def test_prefetches_and_evictions_of_old_leaders_are_refused(
    settings: StoreSettings, bus: Bus, registry: Registry, tmp_path: Path
) -> None:
    make_source(tmp_path / "m")
    model = Source(url=str(tmp_path / "m"))
    async with a_store(settings, registry):
        id = (await do_import(bus, model)).checkpoint.checkpoint_id
        await bus.call(EVICT, Evict(checkpoint_id=id, tier="dram", term=3), server_id=SERVER)
        with pytest.raises(HearthError) as evicting:
            await bus.call(EVICT, Evict(checkpoint_id=id, tier="ssd", term=2), server_id=SERVER)
        with pytest.raises(HearthError) as fetching:
            await bus.call(PREFETCH, Prefetch(checkpoint_id=id, term=2), server_id=SERVER, extra_s=1)
        for refused in (evicting.value.failure, fetching.value.failure):
            assert (refused.code, refused.term) == (Code.STALE_EPOCH, 3)
        await bus.call(EVICT, Evict(checkpoint_id=id, tier="ssd"), server_id=SERVER)
