"""Fixtures: real servers on loopback, and a prefix per test that isolates it on them."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.bus import Bus
from shared.registry import Registry
from tests.builders.servers import start_nats, start_redis

# The models of tests are tiny: several threads per product of matrices cost ten times what they share, above all where
# processes with threads of their own compute at the same time. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whole files that need torch say so by this line; on a machine without torch they cannot even be imported.
_TORCH_FILE = re.compile(r"^pytestmark = .*\bpytest\.mark\.torch\b", re.MULTILINE)
_HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without torch, leave out the files that are marked `torch` as a whole; every other file must do without it."""
    if _HAS_TORCH or collection_path.suffix != ".py":
        return None
    return True if _TORCH_FILE.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage (an engine asks for one at its end) need look at it again."""
    gc.collect()
    gc.freeze()


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
