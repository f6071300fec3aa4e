"""Stores that fetch from one another over real sockets: whole peers, peers that are fetching, and bad ones."""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from services.store.events import StoredCheckpoint
from services.store.fetch import Fetched, Fetcher, FetchInterrupted
from services.store.importer import Importer, Outcome
from services.store.local import LocalTree
from services.store.mover import Mover
from services.store.peer_server import PeerServer
from services.store.peer_tree import NotYet, PeerTree
from services.store.pool import Pool
from services.store.ports import Peer, Progressed, SourceTree
from services.store.routes import Patience
from services.store.tier import SsdTier
from shared.contracts.manifest import MANIFEST_NAME, Manifest
from shared.contracts.residency import Extent, Source, arrival_word
from shared.errors import Code, HearthError
from tests.builders.checkpoints import WEIGHTS, make_checkpoint
from tests.unit.store.test_fetch import Directory, same

CHUNK = 65536
TOKEN = "secret"


class Store:
    """The parts of a store that peers see: a tier, a fetcher, a server."""

    def __init__(self, root: Path, name: str, *, token: str = TOKEN, threads: int = 4, transfers: int = 32) -> None:
        self.name = name
        self.tier = SsdTier(root / name)
        self.mover = Mover(None, threads=threads, name=name)
        patience = Patience(settle_s=0.2, least_s=0.5, poll_s=0.5, budget_s=1.0)
        self.fetcher = Fetcher(self.tier, self.mover, own_id=name, token=token, patience=patience)
        self.server = PeerServer(self.tier, token=TOKEN, host="127.0.0.1", port=0, transfers=transfers)
        self.url = self.server.start()

    def peer(self, id: str) -> list[Peer]:
        """What the registry would say about this store and a checkpoint."""
        whole = self.tier.whole(id) is not None
        return [Peer(self.name, self.url, whole)] if whole or self.tier.arriving(id) is not None else []

    def run(
        self,
        manifest: Manifest,
        data: bytes,
        tree: SourceTree | None,
        peers: Callable[[], Sequence[Peer]],
        progressed: Progressed = lambda done, total: None,
    ) -> Fetched:
        return self.fetcher.run(
            manifest,
            data,
            tree,
            peers=peers,
            key=f"fetch-{self.name}-{time.monotonic_ns()}",
            priority=0,
            opened=lambda stored: None,
            progressed=progressed,
        )

    def close(self) -> None:
        self.server.close()
        self.fetcher.close()
        self.mover.close()
        self.tier.close()


@contextmanager
def stores(root: Path, *names: str, threads: int = 4) -> Iterator[list[Store]]:
    with ExitStack() as stack:
        made = []
        for name in names:
            made.append(Store(root, name, threads=threads))
            stack.callback(made[-1].close)
        yield made


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Manifest, bytes]:
    manifest = make_checkpoint(tmp_path / "m", chunks=24, chunk_bytes=CHUNK)
    return tmp_path / "m", manifest, (tmp_path / "m" / MANIFEST_NAME).read_bytes()


def fill(store: Store, root: Path, manifest: Manifest) -> Path:
    """Put a checkpoint wholly into a store's tier."""
    place = store.tier.checkpoints / manifest.checkpoint.checkpoint_id
    make_checkpoint(place, chunks=24, chunk_bytes=CHUNK)
    assert same(place, root)
    return place


def test_a_checkpoint_comes_from_a_peer_when_its_source_is_gone(
    tmp_path: Path, source: tuple[Path, Manifest, bytes]
) -> None:
    root, manifest, _ = source
    with stores(tmp_path, "a", "b") as (a, b):
        fill(a, root, manifest)
        id = manifest.checkpoint.checkpoint_id
        found = b.fetcher.find(id, a.peer(id))
        assert found is not None
        outcome = b.run(*found, None, lambda: a.peer(id))
        assert same(Path(outcome.stored.directory), root)
        assert (outcome.remote_bytes, outcome.peer_bytes) == (0, manifest.image_bytes())


def test_a_peer_is_preferred_to_a_slow_source(tmp_path: Path, source: tuple[Path, Manifest, bytes]) -> None:
    root, manifest, data = source

    def slow(name: str, offset: int, into: memoryview) -> None:
        time.sleep(0.1)

    with stores(tmp_path, "a", "b") as (a, b):
        fill(a, root, manifest)
        id = manifest.checkpoint.checkpoint_id
        outcome = b.run(manifest, data, SlowTree(root, slow), lambda: a.peer(id))
        assert same(Path(outcome.stored.directory), root)
        assert outcome.peer_bytes > 3 * outcome.remote_bytes


class SlowTree(Directory):
    """A source whose every chunk takes a while, also the first."""

    def read(self, name: str, offset: int, into: memoryview) -> None:
        into[:] = (Path(self.url) / name).read_bytes()[offset : offset + len(into)]
        if self._fault is not None and len(into) > 4096:
            self._fault(name, offset, into)
            self.reads.append(offset // CHUNK)


def test_stores_that_start_together_share_what_they_fetch(tmp_path: Path, source: tuple[Path, Manifest, bytes]) -> None:
    root, manifest, data = source
    gate = threading.Semaphore(2)  # the origin serves two at a time, each for a while

    def slow(name: str, offset: int, into: memoryview) -> None:
        with gate:
            time.sleep(0.04)

    id = manifest.checkpoint.checkpoint_id
    with stores(tmp_path, "a", "b", "c", "d", threads=3) as group, ThreadPoolExecutor(4) as threads:
        trees = [SlowTree(root, slow) for _ in group]

        def others(me: Store) -> Callable[[], Sequence[Peer]]:
            return lambda: [peer for one in group if one is not me for peer in one.peer(id)]

        outcomes = list(
            threads.map(lambda one: one[0].run(manifest, data, one[1], others(one[0])), zip(group, trees, strict=True))
        )
        assert all(same(Path(outcome.stored.directory), root) for outcome in outcomes)
        from_origin = sum(outcome.remote_bytes for outcome in outcomes)
        assert from_origin <= 2 * manifest.image_bytes()  # and not four times
        assert all(outcome.peer_bytes > 0 for outcome in outcomes)


def test_a_chunk_that_is_corrupt_at_a_peer_is_taken_from_elsewhere(
    tmp_path: Path, source: tuple[Path, Manifest, bytes]
) -> None:
    root, manifest, data = source
    id = manifest.checkpoint.checkpoint_id
    with stores(tmp_path, "a", "b", "c") as (a, b, c):
        place = fill(a, root, manifest)
        with (place / WEIGHTS).open("r+b") as file:
            for chunk in range(0, 24, 2):
                file.seek(chunk * CHUNK + 5000)
                file.write(b"lies")
        outcome = b.run(manifest, data, Directory(root), lambda: a.peer(id))
        assert same(Path(outcome.stored.directory), root)
        with pytest.raises(FetchInterrupted, match=r"Chunk \d+ from the peer a does not match") as caught:
            c.run(manifest, data, None, lambda: a.peer(id))
        assert caught.value.failure.code is Code.CHECKPOINT_CORRUPT
        assert c.tier.whole(id) is None


def test_a_manifest_that_lies_is_not_found(tmp_path: Path, source: tuple[Path, Manifest, bytes]) -> None:
    root, manifest, data = source
    id = manifest.checkpoint.checkpoint_id
    with stores(tmp_path, "a", "b", "c") as (a, b, c):
        place = fill(a, root, manifest)
        fill(c, root, manifest)
        first, second = manifest.chunks[:2]
        lie = data.replace(first.encode(), b"#").replace(second.encode(), first.encode()).replace(b"#", second.encode())
        (place / MANIFEST_NAME).write_bytes(lie)
        assert b.fetcher.find(id, a.peer(id)) is None
        found = b.fetcher.find(id, [*a.peer(id), *c.peer(id)])
        assert found == (manifest, data)


def test_a_peer_that_dies_is_done_without(tmp_path: Path, source: tuple[Path, Manifest, bytes]) -> None:
    root, manifest, data = source
    id = manifest.checkpoint.checkpoint_id
    with stores(tmp_path, "a", "b") as (a, b):
        fill(a, root, manifest)
        known = a.peer(id)
        closing = threading.Lock()

        def progressed(done_bytes: int, _: int) -> None:
            if a.server.served_bytes and closing.acquire(blocking=False):
                a.server.close()

        outcome = b.run(manifest, data, Directory(root), lambda: known, progressed)
        assert same(Path(outcome.stored.directory), root)
        assert outcome.remote_bytes + outcome.peer_bytes == manifest.image_bytes()
        assert closing.locked()


def test_without_source_and_peers_a_part_is_kept(tmp_path: Path, source: tuple[Path, Manifest, bytes]) -> None:
    root, manifest, data = source
    id = manifest.checkpoint.checkpoint_id
    with stores(tmp_path, "a", "b") as (a, b):
        place = fill(a, root, manifest)
        known = a.peer(id)
        os.truncate(place / WEIGHTS, 12 * CHUNK)  # the rest cannot be sent
        with pytest.raises(FetchInterrupted) as caught:
            b.run(manifest, data, None, lambda: known)
        kept = caught.value.kept
        assert kept is not None
        assert kept.arrived_bytes is not None
        assert 0 < kept.arrived_bytes <= 12 * CHUNK
        outcome = b.run(manifest, data, Directory(root), list)
        assert outcome.kept_bytes == kept.arrived_bytes
        assert same(Path(outcome.stored.directory), root)


def test_when_peers_are_lost_and_the_source_is_out_of_reach_the_part_is_accounted_for(
    tmp_path: Path, source: tuple[Path, Manifest, bytes]
) -> None:
    root, manifest, _ = source
    id = manifest.checkpoint.checkpoint_id
    other = make_checkpoint(tmp_path / "other", chunks=4, chunk_bytes=CHUNK, seed=5)
    found: list[Path] = []

    def open_tree(_: Source) -> SourceTree:
        if not found:
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, "The source is out of reach.")
        return Directory(found[0])

    with stores(tmp_path, "a", "b") as (a, b):
        place = fill(a, root, manifest)
        os.truncate(place / WEIGHTS, 12 * CHUNK)
        known = a.peer(id)
        importer = Importer(
            b.tier, open_tree=open_tree, disk=b.mover, net=b.mover, fetcher=b.fetcher, chunk_bytes=CHUNK
        )

        def run(key: str) -> Outcome:
            return importer.run(
                Source(url="s3://bucket/m"), checkpoint_id=id, peers=lambda: known, key=key,
                progressed=lambda done, total: None,
            )  # fmt: skip

        with pytest.raises(FetchInterrupted, match="Nor from the source: The source is out of reach") as caught:
            run("first")
        assert caught.value.kept is not None
        assert [stored.id for stored in b.tier.scan()[0]] == [id]
        found.append(tmp_path / "other")  # the source is another checkpoint by now
        with pytest.raises(FetchInterrupted, match="Nor from the source: it is another checkpoint by now"):
            run("second")
        known.clear()
        assert run("third").stored.id == other.checkpoint.checkpoint_id, "nobody else was told what would come"


class Traced:
    """The trees that were opened and not closed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.open = 0

    def __call__(self, _: Source) -> SourceTree:
        traced = self

        class Tree(LocalTree):
            def close(self) -> None:
                traced.open -= 1
                super().close()

        self.open += 1
        return Tree(self._root)


@pytest.mark.parametrize("form", ["hearth", "hugging face"])
def test_what_peers_could_not_give_comes_from_the_source_into_the_same_places(
    tmp_path: Path, source: tuple[Path, Manifest, bytes], form: str
) -> None:
    """One job to its end: who looks at the extents under this tag never hears that the bytes will not come."""
    root, manifest, _ = source
    trees = Traced(root)
    pool = Pool.open(tmp_path, prefix="p", server_id="b", chunk_bytes=CHUNK, chunk_count=40)
    with stores(tmp_path, "a") as (a,), closing_all(pool, tmp_path / "b", trees) as importer:
        if form == "hearth":
            place = fill(a, root, manifest)
        else:
            (root / MANIFEST_NAME).unlink()
            seed = Importer(a.tier, open_tree=trees, disk=a.mover, net=a.mover, chunk_bytes=CHUNK)
            stored = seed.run(Source(url="s3://bucket/m"), progressed=lambda done, total: None).stored
            place, manifest = Path(stored.directory), a.tier.manifest(Path(stored.directory))
        weights = (place / WEIGHTS).read_bytes()
        id, half = manifest.checkpoint.checkpoint_id, len(manifest.chunks) // 2
        known = a.peer(id)
        os.truncate(place / WEIGHTS, half * CHUNK)
        opened: list[StoredCheckpoint] = []
        outcome = importer.run(
            Source(url="s3://bucket/m"), checkpoint_id=id, peers=lambda: known, key="one", tag=3,
            extents=[Extent(offset=0, length=len(manifest.chunks) * CHUNK)],
            opened=opened.append, progressed=lambda done, total: None,
        )  # fmt: skip
        assert (Path(outcome.stored.directory) / WEIGHTS).read_bytes() == weights
        assert bytes(pool.memory[: len(weights)]) == weights
        assert [pool.word(chunk) for chunk in range(len(manifest.chunks))] == [arrival_word(3, 0)] * len(
            manifest.chunks
        )
        assert outcome.peer_bytes and outcome.remote_bytes
        assert outcome.peer_bytes + outcome.remote_bytes == manifest.image_bytes()
        assert len(opened) == 1 and outcome.in_dram
        assert trees.open == 0, "every tree is closed again"


@contextmanager
def closing_all(pool: Pool, root: Path, trees: Traced) -> Iterator[Importer]:
    """A store with a pool that imports from these trees."""
    tier, mover = SsdTier(root), Mover(pool, threads=3, name="b")
    patience = Patience(settle_s=0.2, least_s=0.5, poll_s=0.5, budget_s=1.0)
    fetcher = Fetcher(tier, mover, own_id="b", token=TOKEN, patience=patience)
    importer = Importer(tier, open_tree=trees, disk=mover, net=mover, fetcher=fetcher, chunk_bytes=CHUNK)
    yield importer
    importer.close()
    mover.close()
    tier.close()
    pool.close()


def test_a_store_that_is_killed_at_half_goes_on_from_there(
    tmp_path: Path, source: tuple[Path, Manifest, bytes]
) -> None:
    root, manifest, data = source
    id = manifest.checkpoint.checkpoint_id
    with stores(tmp_path, "a") as (a,):
        fill(a, root, manifest)
        script = textwrap.dedent(f"""
            import os, signal
            from pathlib import Path
            from services.store.ports import Peer
            from tests.integration.store.test_peers import Store

            b = Store(Path({str(tmp_path)!r}), "b", threads=2)
            known = [Peer("a", {a.url!r}, True)]
            manifest, data = b.fetcher.find({id!r}, known)
            half = manifest.image_bytes() // 2
            b.fetcher.run(
                manifest, data, None, peers=lambda: known, key="k", priority=0, opened=print,
                progressed=lambda done, total: done >= half and os.kill(os.getpid(), signal.SIGKILL),
            )
        """)
        done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False, stdout=subprocess.DEVNULL)
        assert done.returncode == -signal.SIGKILL
        with stores(tmp_path, "b") as (b,):
            [stored], refused = b.tier.scan()
            assert refused == []
            assert stored.arrived_bytes is not None
            assert stored.arrived_bytes >= manifest.image_bytes() // 2 - CHUNK
            outcome = b.run(manifest, data, None, lambda: a.peer(id))
            assert same(Path(outcome.stored.directory), root)
            assert outcome.kept_bytes >= stored.arrived_bytes
            assert outcome.peer_bytes == manifest.image_bytes() - outcome.kept_bytes


# -- the server --------------------------------------------------------------------------------------------------------


def get(url: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}", **headers})
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


def test_what_is_served_and_what_is_not(tmp_path: Path, source: tuple[Path, Manifest, bytes]) -> None:
    root, manifest, data = source
    id = manifest.checkpoint.checkpoint_id
    with stores(tmp_path, "a") as (a,):
        place = fill(a, root, manifest)
        top = f"/v1/checkpoints/{id}"
        weights = (root / WEIGHTS).read_bytes()
        assert get(a.url, f"{top}/hearth.json")[::2] == (200, data)
        assert get(a.url, f"{top}/files/config.json")[::2] == (200, (root / "config.json").read_bytes())
        assert get(a.url, f"{top}/files/{WEIGHTS}")[::2] == (200, weights)
        assert get(a.url, f"{top}/files/{WEIGHTS}", Range="bytes=100-199")[::2] == (206, weights[100:200])
        assert get(a.url, f"{top}/files/{WEIGHTS}", Range="bytes=-10")[::2] == (206, weights[-10:])
        assert get(a.url, f"{top}/arrived")[::2] == (200, b"\1" * len(manifest.chunks))
        for range in ("bytes=99999999-", "bytes=5-2", "bytes=0-1,5-6", "chunks=1"):
            assert get(a.url, f"{top}/files/{WEIGHTS}", Range=range)[0] == 416
        (place / "private.txt").write_text("no file of the manifest")
        for path in (
            f"{top}/files/private.txt", f"{top}/files/..%2Fconfig.json", f"{top}/files/%2Fetc%2Fpasswd",
            f"{top}/files/", f"{top}/files/hearth.json%00", "/v1/checkpoints/..%2f..%2fetc/hearth.json",
            f"/v1/checkpoints/{'0' * 32}/hearth.json", f"/v1/checkpoints/{id.upper()}x/arrived", "/", "/v1/checkpoints",
        ):  # fmt: skip
            assert get(a.url, path)[0] in (403, 404), path
        for authorization in ("", "Bearer wrong", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}\xff"):
            assert get(a.url, f"{top}/hearth.json", Authorization=authorization)[0] == 401
            assert get(a.url, "/nowhere", Authorization=authorization)[0] == 401
        a.tier.quarantine(place, "bad")
        assert get(a.url, f"{top}/hearth.json")[0] == 404
        assert get(a.url, f"{top}/files/{WEIGHTS}")[0] == 404


def test_a_wrong_token_brings_nothing(tmp_path: Path, source: tuple[Path, Manifest, bytes]) -> None:
    root, manifest, data = source
    id = manifest.checkpoint.checkpoint_id
    with stores(tmp_path, "a") as (a,):
        fill(a, root, manifest)
        b = Store(tmp_path, "b", token="guess")
        try:
            assert b.fetcher.find(id, a.peer(id)) is None
            with pytest.raises(HearthError, match="peer token"):
                b.run(manifest, data, None, lambda: a.peer(id))
            outcome = b.run(manifest, data, Directory(root), lambda: a.peer(id))
            assert outcome.peer_bytes == 0
        finally:
            b.close()


def test_chunks_that_have_not_arrived_are_waited_for(tmp_path: Path, source: tuple[Path, Manifest, bytes]) -> None:
    root, manifest, data = source
    id = manifest.checkpoint.checkpoint_id
    image = (root / WEIGHTS).read_bytes()
    with stores(tmp_path, "a") as (a,), ThreadPoolExecutor(1) as thread:
        small = {name: (root / name).read_bytes() for name in manifest.small_files}
        arriving = a.tier.begin(manifest, data, small)

        def arrive(index: int) -> None:
            with (arriving.directory / WEIGHTS).open("r+b") as file:
                file.seek(index * CHUNK)
                file.write(image[index * CHUNK : (index + 1) * CHUNK])
            arriving.mark(index)

        tree = PeerTree(a.url, TOKEN, id, manifest)
        arrive(1)
        arriving.coming = frozenset({2})
        assert tree.arrived() == bytes([0, 1, 2] + [0] * (len(manifest.chunks) - 3))
        buffer = memoryview(bytearray(CHUNK))
        tree.read(WEIGHTS, CHUNK, buffer)
        assert bytes(buffer) == image[CHUNK : 2 * CHUNK]
        for offset in (0, 2 * CHUNK, CHUNK + 1):
            with pytest.raises(NotYet):
                tree.read(WEIGHTS, offset, buffer)
        with pytest.raises(NotYet):
            tree.read_when_there(WEIGHTS, 2 * CHUNK, buffer, wait_s=0.05)
        waiting = thread.submit(tree.read_when_there, WEIGHTS, 2 * CHUNK, buffer, wait_s=10.0)
        while not a.server._waiting:
            time.sleep(0.005)
        arrive(0)
        arrive(2)
        waiting.result(10)
        assert bytes(buffer) == image[2 * CHUNK : 3 * CHUNK]
        waiting = thread.submit(tree.read_when_there, WEIGHTS, 5 * CHUNK, buffer, wait_s=10.0)
        while not a.server._waiting:
            time.sleep(0.005)
        a.tier.end(arriving)  # it will not come
        with pytest.raises(NotYet):
            waiting.result(5)
        with pytest.raises(HearthError, match="does not have"):
            tree.arrived()
        tree.close()


def test_more_transfers_than_allowed_are_sent_away(tmp_path: Path, source: tuple[Path, Manifest, bytes]) -> None:
    root, manifest, _ = source
    id = manifest.checkpoint.checkpoint_id
    a = Store(tmp_path, "a", transfers=0)
    try:
        fill(a, root, manifest)
        status, headers, body = get(a.url, f"/v1/checkpoints/{id}/files/{WEIGHTS}")
        assert (status, headers["Retry-After"], body) == (429, "1", b"")
        tree = PeerTree(a.url, TOKEN, id, manifest)
        with pytest.raises(HearthError) as caught:
            tree.read(WEIGHTS, 0, memoryview(bytearray(10)))
        assert (caught.value.failure.code, caught.value.failure.retry_after_s) == (Code.BUSY, 1.0)
        assert hashlib.sha256(tree.read_small("config.json", 10**6)).hexdigest() == manifest.small_files["config.json"]
        with pytest.raises(HearthError) as caught:
            tree.read_small("config.json", 5)
        assert caught.value.failure.code is Code.TOO_LARGE
        tree.close()
    finally:
        a.close()


def test_an_address_in_use_is_a_clear_error(tmp_path: Path) -> None:
    with stores(tmp_path, "a") as (a,):
        port = urlsplit(a.url).port or 0
        with pytest.raises(HearthError, match=f"Peers cannot be served at 127.0.0.1:{port}"):
            PeerServer(a.tier, token=TOKEN, host="127.0.0.1", port=port).start()
