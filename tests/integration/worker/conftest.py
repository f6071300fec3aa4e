"""What the worker's integration tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from shared.bus import Bus
from tests.integration.worker.cluster import Gateway


@pytest_asyncio.fixture
async def gateway(bus: Bus) -> AsyncIterator[Gateway]:
    """A gateway that grants claims and hears frames."""
    made = Gateway(bus)
    await made.open()
    yield made
