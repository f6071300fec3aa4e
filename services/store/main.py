"""The wiring of the store: settings → SSD tier → DRAM pool → core → subscriptions → record `ready`."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from functools import partial
from pathlib import Path

from services.store.allocator import Allocator
from services.store.chunks import ChunkReader
from services.store.importer import Importer
from services.store.mover import Mover
from services.store.pool import Pool
from services.store.remote_config import read_remote_config
from services.store.residency import Residency, trim
from services.store.service import StoreService
from services.store.tier import SsdTier
from services.store.trees import TreeConfig, open_tree
from shared.contracts.manifest import PAGE_BYTES
from shared.errors import Code, HearthError
from shared.lifecycle import Context, run
from shared.settings import StoreSettings

DRAM_DEFAULT_LIMIT_BYTES = 2**30


def main() -> int:
    """`hearth store`; the exit code."""
    return run("store", StoreSettings, serve)


async def serve(context: Context[StoreSettings]) -> None:
    """One life of the store. Raises `HearthError` if the tiers cannot be set up as the settings say."""
    settings = context.settings
    if settings.chunk_bytes % PAGE_BYTES:
        raise HearthError(
            Code.INVALID_REQUEST, f"HEARTH_CHUNK_BYTES={settings.chunk_bytes} is no multiple of {PAGE_BYTES}."
        )
    remote = read_remote_config(settings.remote_config)
    trees = TreeConfig.of(settings.sources, remote, connections=settings.fetch_connections)
    tier = SsdTier(Path(settings.store_dir))
    try:
        # On a thread: a large pool takes seconds to touch, and the bus must be answered meanwhile.
        loop = asyncio.get_running_loop()
        stored, refused = await loop.run_in_executor(None, tier.scan)
        for name, reason in refused:
            context.log.warning("checkpoint.dropped", name=name, reason=reason)
        used_bytes = sum(one.stored_bytes for one in stored)
        ssd_bytes = settings.ssd_bytes or used_bytes + tier.free_bytes() * 9 // 10
        stored, surplus = trim(stored, ssd_bytes)
        for one in surplus:
            context.log.warning("checkpoint.dropped", name=one.id, reason="the SSD tier's capacity is smaller now")
            await loop.run_in_executor(None, tier.remove, Path(one.directory))
        shm = Path(settings.shm_dir)
        chunk_count = (settings.dram_bytes or default_dram_bytes()) // settings.chunk_bytes
        if chunk_count == 0:
            raise HearthError(
                Code.INVALID_REQUEST,
                f"HEARTH_DRAM_BYTES={settings.dram_bytes} is less than one chunk ({settings.chunk_bytes} bytes).",
            )
        make_pool = partial(
            Pool.open,
            shm,
            prefix=settings.prefix,
            server_id=settings.server_id,
            chunk_bytes=settings.chunk_bytes,
            chunk_count=chunk_count,
        )
        pool = await loop.run_in_executor(None, make_pool)
        for name in pool.removed:
            context.log.info("pool.removed", name=name)
        try:
            core = Residency(
                server_id=settings.server_id,
                nonce=secrets.token_hex(4),
                segment=str(pool.path),
                allocator=Allocator(chunk_bytes=settings.chunk_bytes, chunk_count=chunk_count),
                ssd_capacity_bytes=ssd_bytes,
                stored=stored,
            )
            disk = Mover(pool, threads=settings.io_threads or 4, name="disk")
            net = Mover(pool, threads=settings.fetch_connections, name="net")
            service = StoreService(
                context,
                core,
                tier,
                ChunkReader(pool.memory, threads=settings.io_threads or 4),
                Importer(
                    tier,
                    open_tree=lambda source: open_tree(source.url, source.revision, trees),
                    disk=disk,
                    net=net,
                    chunk_bytes=settings.chunk_bytes,
                    max_checkpoint_bytes=settings.max_checkpoint_bytes or ssd_bytes,
                ),
            )
            try:
                await service.start()
                context.log.info(
                    "store.opened",
                    dram_bytes=pool.data_bytes,
                    ssd_bytes=ssd_bytes,
                    checkpoints=len(stored),
                    segment=str(pool.path),
                )
                await context.ready()
                await context.stopping.wait()
                await context.drain()
                await service.drain()
            finally:
                for mover in (disk, net):
                    await loop.run_in_executor(None, mover.close)
                await service.close()
        finally:
            pool.close()
    finally:
        tier.close()


def default_dram_bytes() -> int:
    """The pool's size when nobody set one: an eighth of memory, at most 1 GiB."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(memory_bytes // 8, DRAM_DEFAULT_LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
