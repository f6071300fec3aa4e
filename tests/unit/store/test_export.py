"""Export: what comes out is a whole checkpoint that can be imported again, or nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.store.events import StoredCheckpoint
from services.store.export import Exporter
from services.store.mover import Mover
from services.store.remote_config import decode_remote_config
from services.store.tier import SsdTier
from services.store.trees import TreeConfig, open_tree
from shared.contracts.manifest import Manifest
from shared.contracts.residency import Source
from shared.errors import Code, HearthError
from tests.builders.s3 import S3Server
from tests.unit.store.sources import an_importer, make_source


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[SsdTier]:
    tier = SsdTier(tmp_path / "store")
    yield tier
    tier.close()


@pytest.fixture
def disk() -> Iterator[Mover]:
    mover = Mover(None, threads=2, name="disk")
    yield mover
    mover.close()


@pytest.fixture
def stored(tier: SsdTier, tmp_path: Path) -> StoredCheckpoint:
    make_source(tmp_path / "m")
    with an_importer(tier) as importer:
        return importer.run(Source(url=str(tmp_path / "m")), progressed=lambda done, total: None).stored


@pytest.fixture
def manifest(tier: SsdTier, stored: StoredCheckpoint) -> Manifest:
    return tier.manifest(Path(stored.directory))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def exporter(tier: SsdTier, disk: Mover, tmp_path: Path, s3: S3Server | None = None) -> Exporter:
    remote = decode_remote_config(json.dumps({"s3://": s3.options} if s3 else {}).encode())
    return Exporter(tier.root, disk, TreeConfig.of(f"{tmp_path}/*,s3://models/*", remote, connections=2))


def test_a_directory_holds_what_the_tier_holds_and_is_a_source(
    tier: SsdTier, disk: Mover, stored: StoredCheckpoint, manifest: Manifest, tmp_path: Path
) -> None:
    progress: list[tuple[int, int]] = []
    target = tmp_path / "deep" / "out"
    one = exporter(tier, disk, tmp_path)
    one.run(stored, manifest, str(target), key="a", progressed=lambda *at: progress.append(at))
    assert contents(target) == contents(Path(stored.directory))
    assert os.listdir(target.parent) == ["out"]
    assert max(progress) == (manifest.image_bytes(), manifest.image_bytes())
    one.run(stored, manifest, f"file://{target}", key="b", progressed=lambda *at: pytest.fail("it is there already"))
    tier.remove(Path(stored.directory))
    with an_importer(tier) as importer:
        outcome = importer.run(Source(url=str(target)), progressed=lambda done, total: None)
    assert outcome.stored.id == stored.id


def test_an_object_store_holds_it_too(
    tier: SsdTier, disk: Mover, stored: StoredCheckpoint, manifest: Manifest, tmp_path: Path
) -> None:
    with S3Server(tmp_path / "s3") as s3:
        s3.bucket()
        one = exporter(tier, disk, tmp_path, s3)
        progress: list[tuple[int, int]] = []
        one.run(stored, manifest, "s3://models/out", key="a", progressed=lambda *at: progress.append(at))
        remote = decode_remote_config(json.dumps({"s3://": s3.options}).encode())
        config = TreeConfig.of("s3://models/*", remote, connections=2)
        tree = open_tree("s3://models/out", None, config)
        assert {name: tree.read_small(name, 10**6) for name in tree.files} == contents(Path(stored.directory))
        assert [done for done, _ in progress] == sorted(done for done, _ in progress)
        assert progress[-1][0] == progress[-1][1]
        tier.remove(Path(stored.directory))
        how = {"open_tree": lambda source: open_tree(source.url, source.revision, config)}
        with an_importer(tier, **how) as importer:
            outcome = importer.run(Source(url="s3://models/out"), progressed=lambda done, total: None)
        assert outcome.stored.id == stored.id
        assert outcome.remote_bytes == manifest.image_bytes()
        one.close()
        with pytest.raises(HearthError) as refused:
            one.run(outcome.stored, manifest, "s3://models/more", key="b", progressed=lambda *at: None)
        assert refused.value.failure.code is Code.DRAINING


@pytest.mark.parametrize("url", ["{}/out", "s3://models/out"])
def test_what_is_corrupt_is_not_exported_unless_it_can_be_repaired(
    tier: SsdTier, disk: Mover, stored: StoredCheckpoint, manifest: Manifest, tmp_path: Path, url: str
) -> None:
    weights = Path(stored.directory, "model.safetensors")
    sound = weights.read_bytes()
    weights.write_bytes(sound[:9000] + b"?" + sound[9001:])
    with S3Server(tmp_path / "s3") as s3:
        s3.bucket()
        one = exporter(tier, disk, tmp_path, s3)
        with pytest.raises(HearthError, match="Chunk 1") as refused:
            one.run(stored, manifest, url.format(tmp_path), key="a", progressed=lambda *at: None)
        assert refused.value.failure.code is Code.CHECKPOINT_CORRUPT
        assert not (tmp_path / "out").exists()
        assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []

        def repair(index: int, into: memoryview) -> bool:
            into[:] = sound[index * 8192 : (index + 1) * 8192]
            return True

        if not url.startswith("s3"):
            one.run(stored, manifest, url.format(tmp_path), key="b", repair=repair, progressed=lambda *at: None)
            assert (tmp_path / "out" / "model.safetensors").read_bytes() == sound
        weights.write_bytes(sound)
        Path(stored.directory, "tokenizer.json").write_text("{}")
        with pytest.raises(HearthError, match=r"tokenizer\.json does not match"):
            one.run(stored, manifest, url.format(tmp_path) + "2", key="c", progressed=lambda *at: None)


def test_nothing_is_written_over_or_where_it_must_not_be(
    tier: SsdTier, disk: Mover, stored: StoredCheckpoint, manifest: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "link").symlink_to("/tmp")
    (tmp_path / "inside").symlink_to(tier.root)
    cases = {
        f"{tmp_path}/full": Code.CONFLICT,
        f"{tmp_path}/full/file": Code.CONFLICT,
        f"{tmp_path}/link/x": Code.FORBIDDEN,
        f"{tmp_path}/store/checkpoints/{'0' * 32}": Code.FORBIDDEN,
        f"{tmp_path}/inside/x": Code.FORBIDDEN,
        "/etc/x": Code.FORBIDDEN,
        "s3://other/x": Code.FORBIDDEN,
        "relative": Code.INVALID_REQUEST,
        f"{tmp_path}/../x": Code.INVALID_REQUEST,
        "hf:org/name": Code.FORBIDDEN,
    }
    one = exporter(tier, disk, tmp_path)
    for number, (url, code) in enumerate(cases.items()):
        with pytest.raises(HearthError) as refused:
            one.run(stored, manifest, url, key=str(number), progressed=lambda *at: None)
        assert refused.value.failure.code is code, url
    assert (tmp_path / "full" / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, Code.NO_CAPACITY), (errno.EIO, Code.CHECKPOINT_UNAVAILABLE)]
)
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_disk_that_fails_leaves_nothing(
    tier: SsdTier, disk: Mover, stored: StoredCheckpoint, manifest: Manifest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, call: str, number: int, code: Code,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(HearthError) as refused:
        exporter(tier, disk, tmp_path).run(stored, manifest, f"{tmp_path}/out", key="a", progressed=lambda *at: None)
    monkeypatch.undo()
    assert refused.value.failure.code is code
    assert sorted(os.listdir(tmp_path)) == before
