"""Fixtures: real servers on loopback, and a prefix per test that isolates it on them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from shared.bus import Bus
from shared.registry import Registry
from tests.builders.servers import start_nats, start_redis


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real nats-server with JetStream, for the whole session."""
    process, url = start_nats(tmp_path_factory.mktemp("nats"))
    yield url
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real redis-server, for the whole session."""
    process, url = start_redis(tmp_path_factory.mktemp("redis"))
    yield url
    process.terminate()
    process.wait(10)


@pytest.fixture
def prefix() -> str:
    """Isolates one test on the shared servers."""
    return f"t{secrets.token_hex(4)}"


@pytest_asyncio.fixture
async def bus(nats_url: str, prefix: str) -> AsyncIterator[Bus]:
    """A connected bus."""
    async with Bus.connect(nats_url, name="test", prefix=prefix) as connected:
        yield connected


@pytest_asyncio.fixture
async def registry(redis_url: str, prefix: str) -> AsyncIterator[Registry]:
    """A connected registry."""
    async with Registry.connect(redis_url, prefix=prefix) as connected:
        yield connected
