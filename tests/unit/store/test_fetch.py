"""Checkpoints in Hearth's form into the SSD tier, from a tree that is cut or corrupt; resumed, never half there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from services.store.events import StoredCheckpoint
from services.store.fetch import Fetched, Fetcher, FetchInterrupted
from services.store.mover import Mover
from services.store.pool import Pool
from services.store.routes import Patience
from services.store.tier import SsdTier
from shared.contracts.manifest import MANIFEST_NAME, Manifest
from shared.contracts.residency import Extent
from shared.errors import Code, HearthError
from tests.builders.checkpoints import WEIGHTS, make_checkpoint

CHUNK = 8192


class Directory:
    """A source tree over a directory. `fault(name, offset, into)` may raise, or spoil what was read."""

    def __init__(self, root: Path, fault: Callable[[str, int, memoryview], None] | None = None) -> None:
        self._root = root
        self._fault = fault
        self.reads: list[int] = []

    @property
    def url(self) -> str:
        return str(self._root)

    @property
    def revision(self) -> str:
        return "1"

    @property
    def files(self) -> Mapping[str, int]:
        return {path.name: path.stat().st_size for path in self._root.iterdir()}

    @property
    def remote(self) -> bool:
        return True

    def read(self, name: str, offset: int, into: memoryview) -> None:
        into[:] = (self._root / name).read_bytes()[offset : offset + len(into)]
        if len(into) == CHUNK or offset:  # a chunk, and not the head alone
            if self._fault is not None:
                self._fault(name, offset, into)
            self.reads.append(offset // CHUNK)

    def read_small(self, name: str, limit_bytes: int) -> bytes:
        data = (self._root / name).read_bytes()
        if len(data) > limit_bytes:
            raise HearthError(Code.TOO_LARGE)
        return data

    def close(self) -> None:
        pass


class Fetches:
    """A tier with a fetcher, and what was announced."""

    def __init__(self, root: Path, pool: Pool | None = None, *, threads: int = 3, budget_s: float = 0.2) -> None:
        self.tier = SsdTier(root)
        self.mover = Mover(pool, threads=threads, name="net")
        self.fetcher = Fetcher(self.tier, self.mover, own_id="here", patience=Patience(budget_s=budget_s))
        self.opened: list[StoredCheckpoint] = []
        self.progress: list[tuple[int, int]] = []

    def run(self, manifest: Manifest, tree: Directory, extents: tuple[Extent, ...] = (), tag: int = 0) -> Fetched:
        return self.fetcher.run(
            manifest,
            (Path(tree.url) / MANIFEST_NAME).read_bytes(),
            tree,
            key="fetch-1",
            priority=0,
            extents=extents,
            tag=tag,
            opened=self.opened.append,
            progressed=lambda done, total: self.progress.append((done, total)),
        )

    def close(self) -> None:
        self.fetcher.close()
        self.mover.close()
        self.tier.close()


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path / "m", make_checkpoint(tmp_path / "m", chunks=12, chunk_bytes=CHUNK)


@pytest.fixture
def fetches(tmp_path: Path) -> Iterator[Fetches]:
    made = Fetches(tmp_path / "store")
    yield made
    made.close()


def same(place: Path, source: Path) -> bool:
    """Whether two directories have the same files, and neither a journal."""
    names = sorted(path.name for path in source.iterdir())
    return sorted(path.name for path in place.iterdir()) == names and all(
        (place / name).read_bytes() == (source / name).read_bytes() for name in names
    )


def test_a_checkpoint_arrives_chunk_by_chunk(fetches: Fetches, source: tuple[Path, Manifest]) -> None:
    root, manifest = source
    tree = Directory(root)
    outcome = fetches.run(manifest, tree)
    assert same(Path(outcome.stored.directory), root)
    assert sorted(tree.reads) == list(range(len(manifest.chunks)))
    image_bytes = manifest.image_bytes()
    assert (outcome.remote_bytes, outcome.peer_bytes, outcome.moved_bytes) == (image_bytes, 0, image_bytes)
    [opened] = fetches.opened
    assert (opened.directory, opened.arrived_bytes) == (outcome.stored.directory, 0)
    assert outcome.stored.arrived_bytes is None
    assert max(fetches.progress) == (image_bytes, image_bytes)
    again = fetches.run(manifest, tree)
    assert (again.existing, again.remote_bytes, len(tree.reads)) == (True, 0, len(manifest.chunks))


def test_it_fills_dram_at_the_same_time(tmp_path: Path, source: tuple[Path, Manifest]) -> None:
    root, manifest = source
    shm = tmp_path / "shm"
    shm.mkdir()
    pool = Pool.open(shm, prefix="t", server_id="s", chunk_bytes=CHUNK, chunk_count=16)
    fetches = Fetches(tmp_path / "store", pool)
    try:
        image_bytes = manifest.image_bytes()
        outcome = fetches.run(manifest, Directory(root), (Extent(offset=CHUNK, length=image_bytes),), tag=7)
        assert outcome.in_dram
        image = (root / WEIGHTS).read_bytes().ljust(image_bytes, b"\0")
        assert bytes(pool.memory[CHUNK : CHUNK + image_bytes]) == image
        assert same(Path(outcome.stored.directory), root)
    finally:
        fetches.close()
        pool.close(keep=False)


def test_a_cut_costs_what_was_in_flight(fetches: Fetches, source: tuple[Path, Manifest]) -> None:
    root, manifest = source
    count = len(manifest.chunks)
    cut = threading.Event()

    def fault(name: str, offset: int, into: memoryview) -> None:
        if cut.is_set() or offset >= count // 2 * CHUNK:
            cut.set()
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, "The connection was lost.")

    with pytest.raises(FetchInterrupted, match="connection was lost") as caught:
        fetches.run(manifest, Directory(root, fault))
    kept = caught.value.kept
    assert kept is not None
    assert kept.arrived_bytes is not None
    assert 0 < kept.arrived_bytes <= count // 2 * CHUNK
    assert fetches.tier.whole(kept.id) is None
    tree = Directory(root)
    outcome = fetches.run(manifest, tree)
    assert same(Path(outcome.stored.directory), root)
    assert outcome.kept_bytes == kept.arrived_bytes
    assert outcome.remote_bytes == manifest.image_bytes() - kept.arrived_bytes
    assert len(tree.reads) == len(set(tree.reads)) == count - kept.arrived_bytes // CHUNK


def test_a_cut_that_heals_is_not_noticed(fetches: Fetches, source: tuple[Path, Manifest]) -> None:
    root, manifest = source
    failures = [3]
    lock = threading.Lock()

    def fault(name: str, offset: int, into: memoryview) -> None:
        with lock:
            if offset >= 5 * CHUNK and failures[0]:
                failures[0] -= 1
                raise HearthError(Code.CHECKPOINT_UNAVAILABLE, "The connection was lost.")

    fetcher = Fetches(fetches.tier.root.parent / "other", budget_s=30.0)
    try:
        outcome = fetcher.run(manifest, Directory(root, fault))
        assert same(Path(outcome.stored.directory), root)
        assert outcome.remote_bytes == manifest.image_bytes()
    finally:
        fetcher.close()


def test_what_an_earlier_attempt_left_is_believed_only_after_a_look(
    fetches: Fetches, source: tuple[Path, Manifest]
) -> None:
    root, manifest = source

    def fault(name: str, offset: int, into: memoryview) -> None:
        if offset >= 6 * CHUNK:
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE)

    with pytest.raises(FetchInterrupted) as caught:
        fetches.run(manifest, Directory(root, fault))
    assert caught.value.kept is not None
    with (Path(caught.value.kept.directory) / WEIGHTS).open("r+b") as file:  # the journal says it is there; it is not
        file.seek(2 * CHUNK)
        file.write(bytes(100))
    tree = Directory(root)
    outcome = fetches.run(manifest, tree)
    assert same(Path(outcome.stored.directory), root)
    assert 2 in tree.reads
    assert 1 not in tree.reads


def test_a_chunk_that_comes_corrupt_is_asked_for_again_and_then_refused(
    fetches: Fetches, source: tuple[Path, Manifest]
) -> None:
    root, manifest = source
    spoiled = [1]

    def fault(name: str, offset: int, into: memoryview) -> None:
        if offset == 3 * CHUNK and spoiled[0]:
            spoiled[0] -= 1
            into[5] ^= 1

    outcome = fetches.run(manifest, Directory(root, fault))
    assert same(Path(outcome.stored.directory), root)
    fetches.tier.remove(Path(outcome.stored.directory))
    spoiled[0] = 1000
    with pytest.raises(FetchInterrupted, match="Chunk 3 from the source does not match its checksum") as caught:
        fetches.run(manifest, Directory(root, fault))
    assert caught.value.failure.code is Code.CHECKPOINT_CORRUPT
    assert fetches.tier.whole(manifest.checkpoint.checkpoint_id) is None


def test_nothing_is_left_of_a_fetch_that_brought_nothing(fetches: Fetches, source: tuple[Path, Manifest]) -> None:
    root, manifest = source

    def fault(name: str, offset: int, into: memoryview) -> None:
        raise HearthError(Code.FORBIDDEN, "No.")

    with pytest.raises(FetchInterrupted, match=r"No\.") as caught:
        fetches.run(manifest, Directory(root, fault))
    assert caught.value.kept is None
    assert fetches.tier.scan() == ([], [])
    assert os.listdir(fetches.tier.checkpoints) == []


def test_a_manifest_that_lies_is_refused_before_anything_is_here(fetches: Fetches, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a", chunks=4, seed=1)
    other = make_checkpoint(tmp_path / "b", chunks=4, seed=2)
    (tmp_path / "a" / MANIFEST_NAME).write_bytes((tmp_path / "b" / MANIFEST_NAME).read_bytes())
    small = (tmp_path / "a" / "config.json").read_bytes()
    with pytest.raises(HearthError, match=r"config.json .* does not match its SHA-256"):
        fetches.run(other, Directory(tmp_path / "a"))
    assert small != (tmp_path / "b" / "config.json").read_bytes()
    text = (tmp_path / "b" / MANIFEST_NAME).read_text()
    stolen = text.replace(other.checkpoint.checkpoint_id, "0" * 32)
    (tmp_path / "b" / MANIFEST_NAME).write_text(stolen)
    with pytest.raises(HearthError, match="calls itself 0000"):
        fetches.run(fetches.tier.manifest(tmp_path / "b"), Directory(tmp_path / "b"))
    assert os.listdir(fetches.tier.checkpoints) == []


def test_a_stop_ends_a_fetch_that_waits(fetches: Fetches, source: tuple[Path, Manifest]) -> None:
    root, manifest = source

    def fault(name: str, offset: int, into: memoryview) -> None:
        if offset >= 4 * CHUNK:
            fetches.fetcher.stop("fetch-1")
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE)

    with pytest.raises(FetchInterrupted) as caught:
        fetches.run(manifest, Directory(root, fault))
    assert caught.value.failure.code is Code.CANCELLED
    assert fetches.tier.arriving(manifest.checkpoint.checkpoint_id) is None


def test_killed_at_half_a_fetch_is_resumed(tmp_path: Path, source: tuple[Path, Manifest]) -> None:
    root, manifest = source
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from tests.unit.store.test_fetch import CHUNK, Directory, Fetches

        def fault(name, offset, into):
            if offset >= 7 * CHUNK:
                os.kill(os.getpid(), signal.SIGKILL)

        fetches = Fetches(Path({str(tmp_path / "store")!r}), threads=1)
        root = Path({str(root)!r})
        fetches.run(fetches.tier.manifest(root), Directory(root, fault))
    """)
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    fetches = Fetches(tmp_path / "store")
    try:
        [stored], refused = fetches.tier.scan()
        assert (stored.arrived_bytes, refused) == (7 * CHUNK, [])
        assert fetches.tier.whole(stored.id) is None
        tree = Directory(root)
        outcome = fetches.run(manifest, tree)
        assert same(Path(outcome.stored.directory), root)
        assert (outcome.kept_bytes, sorted(tree.reads)) == (7 * CHUNK, list(range(7, len(manifest.chunks))))
    finally:
        fetches.close()
