"""Which other stores hold a checkpoint, as the registry says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from services.store.ports import Peer
from shared.contracts.records import Phase, ServerRecord
from shared.errors import HearthError
from shared.registry import Registry

# Between two looks while something is being fetched: servers that start together must soon know of one another.
LOOK_S: Final = 0.25
SELDOM_S: Final = 15.0  # and otherwise


class PeerDirectory:
    """A picture of the other stores' records, looked at while somebody needs it. `of` may be called on any thread."""

    def __init__(self, registry: Registry, server_id: str) -> None:
        self._registry = registry
        self._server_id = server_id
        self._records: tuple[ServerRecord, ...] = ()

    def of(self, checkpoint_id: str) -> tuple[Peer, ...]:
        """The stores that serve this checkpoint, or the part of it that they have so far."""
        if not checkpoint_id:
            return ()
        found: list[Peer] = []
        for record in self._records:
            if checkpoint_id in record.ssd or checkpoint_id in record.ssd_arriving:
                found.append(Peer(record.server_id, record.peer_url, whole=checkpoint_id in record.ssd))
        return tuple(found)

    async def look(self) -> None:
        """Look now. Without the registry the last picture stays."""
        try:
            records = await self._registry.all(ServerRecord)
        except HearthError:
            return
        self._records = tuple(
            record
            for record in sorted(records, key=lambda record: record.server_id)
            if record.server_id != self._server_id and record.peer_url and record.phase is Phase.READY
        )

    async def run(self, stopping: asyncio.Event) -> None:
        """Look now and then, so that a chunk that must be repaired finds somebody to ask."""
        await self._watch(stopping, SELDOM_S)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Look now and again and again until the block ends."""
        await self.look()
        over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(over, LOOK_S), name="peers")
            try:
                yield
            finally:
                over.set()

    async def _watch(self, over: asyncio.Event, pause_s: float) -> None:
        # Told to end rather than cancelled: a client of Redis may lose a cancellation that comes while it waits.
        while not over.is_set():
            await self.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await over.wait()
