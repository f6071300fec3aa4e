"""A store whose checkpoints come from an object store: through cuts, within the operator's list, without secrets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import redis.asyncio

from shared.bus import Bus
from shared.contracts.residency import Done, Export, Source
from shared.errors import Code, HearthError
from shared.registry import Registry
from shared.subjects import EXPORT
from tests.builders.s3 import ACCESS_KEY, SECRET_KEY, Fault, S3Server
from tests.integration.store.test_store_process import SERVER, a_process, get_lease, log_of, pid_of_ready_store
from tests.unit.store.sources import make_source


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.control(authorization=True)
        yield server


@pytest_asyncio.fixture
async def store(
    tmp_path: Path, nats_url: str, redis_url: str, prefix: str, registry: Registry, s3: S3Server
) -> AsyncIterator[Path]:
    """A store process that may use s3://models only; its home."""
    (tmp_path / "shm").mkdir()
    (tmp_path / "remote.json").write_text(json.dumps({"s3://models": s3.options}))
    settings = {
        "nats_url": nats_url, "redis_url": redis_url, "prefix": prefix, "server_id": SERVER,
        "store_dir": str(tmp_path / "store"), "shm_dir": str(tmp_path / "shm"), "dram_bytes": str(2**20),
        "chunk_bytes": str(2**16), "log_format": "json", "log_level": "debug", "sources": "s3://models/*,hf:org/*",
        "remote_config": str(tmp_path / "remote.json"),
    }  # fmt: skip
    with a_process(tmp_path, **settings) as process:
        await pid_of_ready_store(registry, process)
        yield tmp_path


def files_of(directory: Path) -> dict[str, bytes]:
    """What is in a checkpoint besides what says where it came from."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "hearth.json"}


async def test_from_an_object_store_and_back(store: Path, bus: Bus, redis_url: str, prefix: str, s3: S3Server) -> None:
    make_source(s3.bucket() / "hf")
    s3.fail(Fault("cut", times=2, key="safetensors", fraction=0.5), Fault("status", key="safetensors"))
    first = await get_lease(bus, Source(url="s3://models/hf/"))
    assert first.tier == "remote"
    checkpoint = first.checkpoint.checkpoint_id
    while True:
        message = Export(checkpoint_id=checkpoint, url="s3://models/hearth")
        answer = await bus.call(EXPORT, message, server_id=SERVER, extra_s=5)
        if isinstance(answer, Done):
            break
    stored = Path(first.directory)
    assert files_of(s3.bucket() / "hearth") == files_of(stored)
    again = await get_lease(bus, Source(url="s3://models/hearth"))
    assert again.checkpoint == first.checkpoint, "the same content has the same id"
    # What was said to the object store is nowhere else.
    said = (store / "store.log").read_bytes() + (stored / "hearth.json").read_bytes()
    client = redis.asyncio.from_url(redis_url)
    async for key in client.scan_iter(f"{prefix}*"):
        held = await (client.hgetall(key) if await client.type(key) == b"hash" else client.get(key))
        said += key + repr(held).encode()
    await client.aclose()
    assert b"s3://models/hf" in said
    for secret in (SECRET_KEY, ACCESS_KEY, s3.endpoint):
        assert secret.encode() not in said


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("s3://other/hf", Code.FORBIDDEN, "not among the allowed sources (HEARTH_SOURCES)"),
        ("/etc", Code.FORBIDDEN, "not among the allowed sources (HEARTH_SOURCES)"),
        ("https://user:s3cr3t@host/m", Code.INVALID_REQUEST, "user name or password"),
        ("s3://models/nothing", Code.NOT_FOUND, "has no files"),
    ],
)
async def test_refused(store: Path, bus: Bus, url: str, code: Code, words: str) -> None:
    with pytest.raises(HearthError) as refused:
        await get_lease(bus, Source(url=url))
    assert refused.value.failure.code is code
    assert words in refused.value.failure.message
    with pytest.raises(HearthError):
        await bus.call(EXPORT, Export(checkpoint_id="c", url=url), server_id=SERVER, extra_s=5)
    assert "s3cr3t" not in (store / "store.log").read_text()
    assert "s3cr3t" not in refused.value.failure.message


async def test_the_operators_list_and_options_are_looked_at_before_the_start(
    tmp_path: Path, nats_url: str, redis_url: str, prefix: str
) -> None:
    common = {"nats_url": nats_url, "redis_url": redis_url, "prefix": prefix, "log_format": "json"}
    common |= {"store_dir": str(tmp_path / "store"), "shm_dir": str(tmp_path)}
    (tmp_path / "remote.json").write_text('{"s3://models": {"secret_access_key": ["s3cr3t"]}}')
    cases: dict[str, dict[str, str]] = {
        "HEARTH_SOURCES": {"sources": "https://host*"},
        "HEARTH_REMOTE_CONFIG": {"remote_config": str(tmp_path / "remote.json")},
    }
    for words, settings in cases.items():
        with a_process(tmp_path, **common, **settings) as process:
            assert await asyncio.get_running_loop().run_in_executor(None, process.wait, 30) == 1
        assert words in str(log_of(tmp_path)[-1])
    assert "s3cr3t" not in (tmp_path / "store.log").read_text()
