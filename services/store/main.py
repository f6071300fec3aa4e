"""The wiring of the store: settings → SSD tier → DRAM pool → movers → core → subscriptions → record `ready`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

from services.store.allocator import Allocator
from services.store.effects import Means
from services.store.events import StoredCheckpoint
from services.store.export import Exporter
from services.store.fetch import Fetcher
from services.store.importer import Importer
from services.store.mover import Mover
from services.store.peer_server import PeerServer, read_token
from services.store.peers import PeerDirectory
from services.store.pool import Pool
from services.store.remote_config import read_remote_config
from services.store.residency import Residency, trim
from services.store.service import StoreService
from services.store.tier import SsdTier
from services.store.trees import TreeConfig, open_tree
from services.store.tuning import Tuning, tune
from shared.contracts.manifest import PAGE_BYTES
from shared.errors import Code, HearthError
from shared.lifecycle import Context, run
from shared.settings import StoreSettings

T = TypeVar("T")

DRAM_DEFAULT_LIMIT_BYTES = 2**30


def main() -> int:
    """`hearth store`; the exit code."""
    return run("store", StoreSettings, serve)


async def serve(context: Context[StoreSettings]) -> None:
    """One life of the store. Raises `HearthError` if the tiers cannot be set up as the settings say."""
    settings = context.settings
    _check(settings)
    trees = TreeConfig.of(
        settings.sources, read_remote_config(settings.remote_config), connections=settings.fetch_connections
    )
    token = read_token(settings.peer_token, settings.peer_token_file)
    async with AsyncExitStack() as stack:
        tier = SsdTier(Path(settings.store_dir))
        stack.callback(tier.close)
        pins, fault = tier.pins()
        if fault:
            context.log.warning("pins.dropped", reason=fault)
        stored, ssd_bytes = await _scan(context, tier, pins)
        tuning = await _on_thread(partial(_tuning, settings, tier.root))
        pool = await _on_thread(partial(_open_pool, settings))
        stack.callback(pool.close, keep=settings.keep_pool)
        for name in pool.removed:
            context.log.info("pool.removed", name=name)
        disk = Mover(pool, threads=tuning.threads, name="disk")
        net = Mover(pool, threads=settings.fetch_connections, name="net")
        peer_url = ""
        if token:
            server = PeerServer(tier, token=token, host=settings.peer_host, port=settings.peer_port)
            own_url = await _on_thread(server.start)
            stack.push_async_callback(_on_thread, server.close)
            peer_url = settings.peer_url or own_url
        importer = Importer(
            tier,
            open_tree=lambda source: open_tree(source.url, source.revision, trees),
            disk=disk,
            net=net,
            fetcher=Fetcher(tier, net, own_id=settings.server_id, token=token),
            chunk_bytes=settings.chunk_bytes,
            max_checkpoint_bytes=settings.max_checkpoint_bytes or ssd_bytes,
        )
        core = Residency(
            server_id=settings.server_id,
            nonce=pool.nonce,
            segment=str(pool.path),
            segment_bytes=pool.segment_bytes,
            board_offset=pool.board_offset,
            allocator=Allocator(chunk_bytes=pool.chunk_bytes, chunk_count=pool.chunk_count),
            ssd_capacity_bytes=ssd_bytes,
            stored=stored,
            restored=pool.restored,
            pins=pins,
            peer_url=peer_url,
            dram_high=settings.dram_high,
            dram_low=settings.dram_low,
            ssd_high=settings.ssd_high,
            ssd_low=settings.ssd_low,
            scrub_interval_s=settings.scrub_interval_s,
            scrub_bytes_per_s=settings.scrub_bytes_per_s,
        )
        means = Means(
            tier=tier,
            disk=disk,
            net=net,
            importer=importer,
            exporter=Exporter(tier.root, disk, trees),
            peers=PeerDirectory(context.registry, settings.server_id),
            block_bytes=tuning.block_bytes,
            verify_loads=settings.verify_loads,
        )
        service = StoreService(context, core, pool, means)
        stack.push_async_callback(service.close)
        await service.start()
        context.log.info(
            "store.opened",
            dram_bytes=pool.data_bytes,
            huge_bytes=pool.huge_bytes,
            restored_copies=len(pool.restored.copies) if pool.restored else 0,
            ssd_bytes=ssd_bytes,
            checkpoints=len(stored),
            segment=str(pool.path),
            io_threads=tuning.threads,
            io_block_bytes=tuning.block_bytes,
            peer_url=peer_url,
        )
        await context.ready()
        await context.stopping.wait()
        await context.drain()
        await service.drain()


async def _scan(
    context: Context[StoreSettings], tier: SsdTier, pins: dict[str, str]
) -> tuple[list[StoredCheckpoint], int]:
    """What the SSD tier holds, and its capacity in bytes; what has no room in it any more is removed."""
    stored, refused = await _on_thread(tier.scan)
    for name, reason in refused:
        context.log.warning("checkpoint.dropped", name=name, reason=reason)
    used_bytes = sum(one.stored_bytes for one in stored)
    ssd_bytes = context.settings.ssd_bytes or used_bytes + tier.free_bytes() * 9 // 10
    stored, surplus = trim(stored, ssd_bytes, pins)
    for one in surplus:
        context.log.warning("checkpoint.dropped", name=one.id, reason="the SSD tier's capacity is smaller now")
        await _on_thread(partial(tier.remove, Path(one.directory)))
    return stored, ssd_bytes


def _check(settings: StoreSettings) -> None:
    """Raises `invalid_request` for settings that contradict each other."""
    for name, size in (("CHUNK", settings.chunk_bytes), ("IO_BLOCK", settings.io_block_bytes)):
        if size % PAGE_BYTES:
            raise HearthError(Code.INVALID_REQUEST, f"HEARTH_{name}_BYTES={size} is no multiple of {PAGE_BYTES}.")
    for name, low, high in (
        ("DRAM", settings.dram_low, settings.dram_high),
        ("SSD", settings.ssd_low, settings.ssd_high),
    ):
        if low > high:
            raise HearthError(Code.INVALID_REQUEST, f"HEARTH_{name}_LOW={low} is above HEARTH_{name}_HIGH={high}.")


def _tuning(settings: StoreSettings, root: Path) -> Tuning:
    """How the disk is read: as the operator says, and where nothing is said as measured. Blocks."""
    if settings.io_threads and settings.io_block_bytes:
        return Tuning(version=0, threads=settings.io_threads, block_bytes=settings.io_block_bytes)
    measured = tune(root, chunk_bytes=settings.chunk_bytes)
    return Tuning(
        version=0,
        threads=settings.io_threads or measured.threads,
        block_bytes=settings.io_block_bytes or measured.block_bytes,
    )


def _open_pool(settings: StoreSettings) -> Pool:
    chunk_count = (settings.dram_bytes or default_dram_bytes()) // settings.chunk_bytes
    if chunk_count == 0:
        raise HearthError(
            Code.INVALID_REQUEST,
            f"HEARTH_DRAM_BYTES={settings.dram_bytes} is less than one chunk ({settings.chunk_bytes} bytes).",
        )
    return Pool.open(
        Path(settings.shm_dir),
        prefix=settings.prefix,
        server_id=settings.server_id,
        chunk_bytes=settings.chunk_bytes,
        chunk_count=chunk_count,
    )


async def _on_thread(work: Callable[[], T]) -> T:
    """Scans, measurements and large pools take seconds, and the bus must be answered meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


def default_dram_bytes() -> int:
    """The pool's size when nobody set one: an eighth of memory, at most 1 GiB."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(memory_bytes // 8, DRAM_DEFAULT_LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
