"""Fixtures: real servers on loopback, and a prefix per test that isolates it on them."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.bus import Bus
from shared.registry import Registry


def free_port() -> int:
    """A loopback port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(command: list[str], port: int, cwd: Path) -> subprocess.Popen[bytes]:
    with (cwd / f"{Path(command[0]).name}.log").open("wb") as out:
        process = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=subprocess.STDOUT)
    for _ in range(200):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    raise RuntimeError(f"{command[0]} does not start: {(cwd / f'{Path(command[0]).name}.log').read_text()}")


def _binary(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing; `./hearth test` installs it")
    return found


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real nats-server with JetStream, for the whole session."""
    home, port = tmp_path_factory.mktemp("nats"), free_port()
    process = _start([_binary("nats-server"), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(home)], port, home)
    yield f"nats://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real redis-server, for the whole session."""
    home, port = tmp_path_factory.mktemp("redis"), free_port()
    command = [_binary("redis-server"), "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(home)]
    process = _start(command, port, home)
    yield f"redis://127.0.0.1:{port}/0"
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
