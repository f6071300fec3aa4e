"""Checkpoints in Hearth's form → SSD tier and DRAM: chunk by chunk, from the origin and from peers, resumed if cut.

A fetch is one job of the net mover; its origin asks `services.store.routes` for every chunk whom to take it from, and
verifies what comes before anybody sees it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from services.store.arriving import Arriving, chunk_bytes_of
from services.store.events import StoredCheckpoint
from services.store.image_files import ImageWriter, StoredImage
from services.store.manifest import (
    MANIFEST_LIMIT_BYTES,
    FilePiece,
    chunk_pieces,
    decode_stored,
    plan_reads,
    validate,
    validate_heads,
)
from services.store.mover import Job, Mover, checksum
from services.store.peer_tree import NotYet, PeerTree
from services.store.ports import Peer, Progressed, SourceTree
from services.store.routes import ORIGIN, GiveUp, Patience, Pause, Routes, Take, Trouble
from services.store.tier import SsdTier, describe, disk_errors
from shared.contracts.manifest import MANIFEST_NAME, Manifest
from shared.contracts.residency import Extent
from shared.errors import Code, Failure, HearthError

SMALL_LIMIT_BYTES: Final = 256 * 2**20
RESCUE_AFTER_S: Final = 5.0  # without progress: then the source is opened that was spared as long as peers gave enough
SCOUT_S: Final = 0.25  # between two looks at the peers and what they have; they are few and the answers are small
_BUSY: Final = (Code.BUSY, Code.RATE_LIMITED, Code.QUEUE_FULL)
_LOST: Final = (Code.CHECKPOINT_UNAVAILABLE, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.INTERNAL)
_ENDING: Final = (Code.DRAINING, Code.CANCELLED)

Peers = Callable[[], Sequence[Peer]]
Rescue = Callable[[int, memoryview], bool]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetch brought and what it took.

    `existing`: the checkpoint was whole here already. `remote_bytes` came from the origin, `peer_bytes` from other
    stores, `kept_bytes` were here from an earlier attempt and still sound. `moved_bytes` is all that went through the
    mover. `in_dram`: every chunk lies in the extents that were given. `waited_s` of `seconds` it stood behind others.
    """

    stored: StoredCheckpoint
    existing: bool
    remote_bytes: int
    peer_bytes: int
    kept_bytes: int
    moved_bytes: int
    seconds: float
    in_dram: bool
    waited_s: float = 0.0


class FetchInterrupted(HearthError):
    """A fetch that failed. `kept` is what has arrived, to go on from; None when that is nothing."""

    def __init__(self, failure: Failure, kept: StoredCheckpoint | None) -> None:
        super().__init__(failure.code, failure.message, param=failure.param)
        self.failure = failure
        self.kept = kept


def nobody() -> Sequence[Peer]:
    """The peers of a store that has none."""
    return ()


class Fetcher:
    """Fetches into a tier. Every method blocks, may be called on any thread, and raises `HearthError`.

    `own_id` is this server's; `token` the secret of the stores ("": no peer is ever asked).
    """

    def __init__(
        self, tier: SsdTier, net: Mover, *, own_id: str, token: str = "", patience: Patience | None = None
    ) -> None:
        self._tier = tier
        self._net = net
        self._own_id = own_id
        self._token = token
        self._patience = patience or Patience()
        self._lock = threading.Lock()
        self._running: dict[str, threading.Event] = {}
        self._closed = False

    def find(self, checkpoint_id: str, peers: Sequence[Peer]) -> tuple[Manifest, bytes] | None:
        """The manifest of a checkpoint that some peer has, proved by the checkpoint's id; None if nobody has it."""
        for tree in self._trees(peers, checkpoint_id, None):
            try:
                data = tree.read_small(MANIFEST_NAME, MANIFEST_LIMIT_BYTES)
                manifest = decode_stored(data)
                check(manifest, checkpoint_id)
                validate_heads(manifest, _heads(manifest, tree.read_soon))
            except HearthError as error:
                if error.failure.code in _ENDING:
                    raise
                continue  # another one may be sound and awake
            return manifest, data
        return None

    def run(
        self,
        manifest: Manifest,
        manifest_bytes: bytes,
        tree: SourceTree | None,
        *,
        peers: Peers = nobody,
        key: str,
        priority: int,
        extents: Sequence[Extent] = (),
        tag: int = 0,
        opened: Callable[[StoredCheckpoint], None],
        progressed: Progressed,
        rescue: Rescue | None = None,
    ) -> Fetched:
        """Fetch the checkpoint of this manifest, from `tree` (its form is Hearth's) and from peers.

        `opened` is called once the checkpoint has its place, with all but its bytes. `rescue` fills a buffer with a
        chunk that is as the manifest says when nobody else gives any, or returns False. Raises `FetchInterrupted`.
        """
        began = time.monotonic()
        checkpoint_id = manifest.checkpoint.checkpoint_id
        check(manifest, checkpoint_id)
        place = self._tier.whole(checkpoint_id)
        if place is not None:
            with disk_errors("The checkpoint cannot be read"):
                stored = describe(place, manifest)
            return Fetched(stored, True, 0, 0, 0, 0, time.monotonic() - began, in_dram=False)
        with self._registered(key) as stop:
            if tree is not None:
                validate_heads(manifest, _heads(manifest, tree.read))
            small = self._small_files(manifest, tree, peers, stop)
            arriving = self._tier.begin(manifest, manifest_bytes, small)
            try:
                return self._run(
                    arriving, tree, peers, key, priority, extents, tag, opened, progressed, rescue, stop, began=began
                )
            except HearthError as error:
                raise FetchInterrupted(error.failure, self._keep(arriving)) from error
            finally:
                self._tier.end(arriving)

    def take(self, manifest: Manifest, index: int, into: memoryview, peers: Sequence[Peer]) -> bool:
        """Fill `into` with one chunk from whichever peer has it sound; whether one had."""
        for tree in self._trees(peers, manifest.checkpoint.checkpoint_id, manifest):
            try:
                for piece in chunk_pieces(manifest, index):
                    if piece.data_bytes:
                        name = manifest.files[piece.file].name
                        tree.read(name, piece.offset, into[piece.at : piece.at + piece.data_bytes])
                    _pad(into, piece)
            except HearthError as error:
                if error.failure.code in _ENDING:
                    raise
                continue  # another one may be awake
            if checksum(into) == manifest.chunks[index]:
                return True
        return False

    def stop(self, key: str) -> None:
        """End a fetch at once where it waits, else when the chunks under way are through."""
        with self._lock:
            if (event := self._running.get(key)) is not None:
                event.set()
        self._net.stop(key)

    def close(self) -> None:
        """End all fetches."""
        with self._lock:
            self._closed = True
            for event in self._running.values():
                event.set()

    # -- one fetch -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _registered(self, key: str) -> Iterator[threading.Event]:
        with self._lock:
            if self._closed:
                raise HearthError(Code.DRAINING)
            stop = self._running[key] = threading.Event()
        try:
            yield stop
        finally:
            with self._lock:
                del self._running[key]

    def _trees(self, peers: Sequence[Peer], checkpoint_id: str, manifest: Manifest | None) -> Iterator[PeerTree]:
        """The peers' copies one after another, those that are whole first; each is closed before the next is opened."""
        for peer in sorted(peers, key=lambda peer: (not peer.whole, peer.server_id)) if self._token else ():
            try:
                tree = PeerTree(peer.url, self._token, checkpoint_id, manifest)
            except HearthError:
                continue  # no url that anybody could open
            try:
                yield tree
            finally:
                tree.close()

    def _small_files(
        self, manifest: Manifest, tree: SourceTree | None, peers: Peers, stop: threading.Event
    ) -> dict[str, bytes]:
        """The small files, each with its SHA-256, from the origin or from whichever peer has them."""
        fault = HearthError(Code.CHECKPOINT_UNAVAILABLE, "No peer has the checkpoint.")
        if tree is not None:
            try:
                return _small_files(manifest, tree)
            except HearthError as error:
                fault = error
        for other in self._trees(peers(), manifest.checkpoint.checkpoint_id, manifest):
            if stop.is_set():
                raise HearthError(Code.CANCELLED)
            try:
                return _small_files(manifest, other)
            except HearthError as error:
                fault = error if tree is None else fault
        raise fault

    def _run(
        self,
        arriving: Arriving,
        tree: SourceTree | None,
        peers: Peers,
        key: str,
        priority: int,
        extents: Sequence[Extent],
        tag: int,
        opened: Callable[[StoredCheckpoint], None],
        progressed: Progressed,
        rescue: Rescue | None,
        stop: threading.Event,
        *,
        began: float,
    ) -> Fetched:
        manifest, directory = arriving.manifest, arriving.directory
        image_bytes = manifest.image_bytes()
        with disk_errors("The checkpoint cannot be stored"):
            opened(describe(directory, manifest))
        writer = ImageWriter.open_existing(directory, manifest.files, chunk_bytes=manifest.chunk_bytes)
        try:
            earlier = StoredImage(directory, manifest)
            try:
                chunks = _Chunks(
                    arriving, writer, earlier, tree, self._routes(manifest, tree, rescue), stop, rescue, self._patience
                )
                with self._scouting(chunks, peers, stop):
                    report = self._net.run(
                        Job(
                            key=key,
                            priority=priority,
                            image_bytes=image_bytes,
                            chunk_bytes=manifest.chunk_bytes,
                            origin=chunks,
                            checksums=manifest.chunks,
                            verify=False,  # `chunks` does, to take a chunk that is wrong from somebody else
                            extents=extents,
                            tag=tag,
                            sink=chunks,
                            pick=chunks.pick,
                            progressed=lambda done_bytes: progressed(done_bytes, image_bytes),
                        )
                    )
            finally:
                earlier.close()
            writer.finish()
        finally:
            writer.close()
        place = self._tier.commit(arriving)
        with disk_errors("The checkpoint cannot be read"):
            stored = describe(place, manifest)
        by_source = chunks.routes.bytes_by_source
        remote_bytes = by_source.get(ORIGIN, 0)
        return Fetched(
            stored=stored,
            existing=False,
            remote_bytes=remote_bytes + chunks.rescued_bytes,
            peer_bytes=sum(by_source.values()) - remote_bytes,
            kept_bytes=chunks.kept_bytes,
            moved_bytes=report.moved_bytes,
            seconds=time.monotonic() - began,
            in_dram=bool(extents),
            waited_s=report.waited_s,
        )

    def _routes(self, manifest: Manifest, tree: SourceTree | None, rescue: Rescue | None) -> Routes:
        lengths = [chunk_bytes_of(manifest, index) for index in range(len(manifest.chunks))]
        patience = self._patience if self._token else replace(self._patience, settle_s=0.0)
        if rescue is not None:
            patience = replace(patience, budget_s=min(patience.budget_s, RESCUE_AFTER_S))
        return Routes(self._own_id, lengths, origin=tree is not None, now=time.monotonic(), patience=patience)

    def _keep(self, arriving: Arriving) -> StoredCheckpoint | None:
        """What is left of a fetch that failed; nothing, when nothing had arrived."""
        try:
            kept = describe(arriving.directory, arriving.manifest)
            if kept.arrived_bytes:
                return kept
            self._tier.remove(arriving.directory)
        except (HearthError, OSError):
            pass  # it is gone, or the disk is: the next start looks again
        return None

    # -- peers ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _scouting(self, chunks: _Chunks, peers: Peers, stop: threading.Event) -> Iterator[None]:
        """Meanwhile a thread keeps up with who has what."""
        if not self._token:
            yield
            return
        over = threading.Event()

        def scout() -> None:
            while not over.is_set() and not stop.is_set():
                chunks.look(over)
                over.wait(SCOUT_S)

        chunks.meet(peers, self._token)
        thread = threading.Thread(target=scout, name="peers", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            chunks.part()


class _Chunks:
    """The chunks of one fetch, as a mover's origin and sink. Thread-safe."""

    def __init__(
        self,
        arriving: Arriving,
        writer: ImageWriter,
        earlier: StoredImage,
        tree: SourceTree | None,
        routes: Routes,
        stop: threading.Event,
        rescue: Rescue | None,
        patience: Patience,
    ) -> None:
        self.routes = routes
        self.kept_bytes = 0
        self.rescued_bytes = 0
        self._rescue = rescue
        self._rescued = False
        self._unrescued = ""  # why not
        self._patience = patience
        self._arriving = arriving
        self._manifest = arriving.manifest
        self._writer = writer
        self._earlier = earlier
        self._tree = tree
        self._stop = stop
        self._lock = threading.Lock()
        whole = Extent(offset=0, length=self._manifest.image_bytes())
        self._pieces = [read.pieces for read in plan_reads(self._manifest, [whole])]
        self._claimed = sorted(arriving.claimed, reverse=True)  # to be looked at again, the last goes first
        self._kept: set[int] = set()
        self._peers: Peers = nobody
        self._token = ""
        self._trees: dict[str, PeerTree] = {}

    # -- for the mover -------------------------------------------------------------------------------------------------

    def pick(self, left: Sequence[int]) -> int | None:
        """The chunk to move next: what is here already, to be verified; then as the routes say.

        `left` is what the routes count as free, or would be: the mover moves no chunk twice.
        """
        with self._lock:
            while self._claimed:
                index = self._claimed.pop()
                self.routes.chosen(index)
                return index
            if not self.routes.has_free:
                return left[-1]
            if self._rescued:
                self.routes.chosen(left[-1])
                return left[-1]
            return self.routes.pick(time.monotonic())

    def read(self, index: int, into: memoryview) -> None:
        """Fill `into` with a chunk that is as the manifest says."""
        if index in self._arriving.claimed and self._keep(index, into):
            return
        while True:
            if self._rescued and self._from_rescue(index, into):
                return
            if self._stop.is_set():
                raise HearthError(Code.CANCELLED, "Nobody needs these bytes any more.")
            with self._lock:
                decision = self.routes.route(index, time.monotonic())
                self._tell_coming()
            match decision:
                case Take(source, wait_s):
                    if self._take(source, index, into, wait_s):
                        return
                case Pause(wait_s):
                    self._stop.wait(wait_s)
                case GiveUp(failure):
                    if self._rescue is None:
                        raise HearthError(failure.code, f"{failure.message}{self._unrescued}")
                    self._rescued = True

    def write(self, index: int, view: memoryview) -> None:
        """Put a chunk that was read into the files, unless it comes from there, and say that it is there."""
        if index not in self._kept:
            self._writer.write(index, view)
        with disk_errors("The checkpoint cannot be stored"):
            self._arriving.mark(index)

    def _from_rescue(self, index: int, into: memoryview) -> bool:
        """Whether a chunk came from where it comes when nobody else gives it. If not, the others get all their time."""
        rescue, reason = self._rescue, "it is another checkpoint by now."
        try:
            found = rescue is not None and rescue(index, into)
        except HearthError as error:
            if error.failure.code in _ENDING:
                raise
            found, reason = False, error.failure.message
        with self._lock:
            if found:
                self.routes.kept(index, time.monotonic())
                self.rescued_bytes += len(into)
            else:
                if rescue is not None:
                    self._unrescued = f" Nor from the source: {reason}"
                self._rescue, self._rescued = None, False
                self.routes.be_patient(self._patience, time.monotonic())
        return found

    def _keep(self, index: int, into: memoryview) -> bool:
        """Whether a chunk of an earlier attempt is still sound; it is in `into` then."""
        try:
            self._earlier.read(index, into)
            sound = checksum(into) == self._manifest.chunks[index]
        except HearthError:  # that part of the disk is bad; writing it anew may help
            sound = False
        with self._lock:
            if sound:
                self.routes.kept(index, time.monotonic())
                self._kept.add(index)
                self.kept_bytes += len(into)
        if not sound:
            with disk_errors("The checkpoint cannot be stored"):
                self._arriving.unmark(index)
        return sound

    def _take(self, source: str, index: int, into: memoryview, wait_s: float) -> bool:
        """Try to take a chunk from a source; the routes hear what came of it."""
        try:
            self._copy(source, index, into, wait_s)
            if checksum(into) != self._manifest.chunks[index]:
                where = f"the peer {source}" if source != ORIGIN else "the source"
                raise _Wrong(Code.CHECKPOINT_CORRUPT, f"Chunk {index} from {where} does not match its checksum.")
        except HearthError as error:
            if error.failure.code in _ENDING:
                with self._lock:
                    self.routes.failed(index, Trouble.BUSY, error.failure, time.monotonic())
                raise
            with self._lock:
                self.routes.failed(index, _trouble(error), error.failure, time.monotonic())
                self._tell_coming()
            return False
        with self._lock:
            self.routes.arrived(index, time.monotonic())
        return True

    def _copy(self, source: str, index: int, into: memoryview, wait_s: float) -> None:
        tree: SourceTree | PeerTree | None = self._tree
        if source != ORIGIN:
            with self._lock:
                tree = self._trees.get(source)
        if tree is None:
            raise HearthError(Code.CHECKPOINT_UNAVAILABLE, f"The peer {source} has left.")
        for piece in self._pieces[index]:
            name = self._manifest.files[piece.file].name
            if piece.data_bytes:
                span = into[piece.at : piece.at + piece.data_bytes]
                if isinstance(tree, PeerTree):
                    tree.read_when_there(name, piece.offset, span, wait_s=wait_s)
                else:
                    tree.read(name, piece.offset, span)
            _pad(into, piece)

    def _tell_coming(self) -> None:
        """Let the peers know which chunks are being taken from a seed; with the lock held."""
        self._arriving.coming = frozenset(self.routes.coming())

    # -- for the scout -------------------------------------------------------------------------------------------------

    def meet(self, peers: Peers, token: str) -> None:
        """From now on chunks may come from peers."""
        self._peers, self._token = peers, token
        self._meet()

    def _meet(self) -> list[tuple[Peer, PeerTree]]:
        found = [peer for peer in self._peers() if peer.url]
        id = self._manifest.checkpoint.checkpoint_id
        with self._lock:
            for peer in found:
                known = self._trees.get(peer.server_id)
                if known is not None and known.url != peer.url:  # it has come back somewhere else
                    known.close()
                if known is None or known.url != peer.url:
                    try:
                        tree = PeerTree(peer.url, self._token, id, self._manifest, stopped=self._stop.is_set)
                    except HearthError:
                        continue  # no url that anybody could open
                    self._trees[peer.server_id] = tree
            met = [peer for peer in found if peer.server_id in self._trees]
            self.routes.peers_are(met, time.monotonic())
            return [(peer, self._trees[peer.server_id]) for peer in met]

    def look(self, over: threading.Event) -> None:
        """Who is there, and what has arrived at those that are fetching themselves?"""
        for peer, tree in self._meet():
            if over.is_set() or self._stop.is_set():
                return
            if peer.whole or not self.routes.worth_asking(peer.server_id, time.monotonic()):
                continue
            try:
                has = tree.arrived()
            except HearthError:
                with self._lock:
                    self.routes.peer_lost(peer.server_id, time.monotonic())
                continue
            with self._lock:
                self.routes.peer_has(peer.server_id, has, time.monotonic())

    def part(self) -> None:
        """No chunk comes from peers any more."""
        with self._lock:
            trees, self._trees = list(self._trees.values()), {}
        for tree in trees:
            tree.close()


class _Wrong(HearthError):
    """The bytes came, and are not those of the manifest."""


def _trouble(error: HearthError) -> Trouble:
    if isinstance(error, NotYet):
        return Trouble.NOT_YET
    if isinstance(error, _Wrong):
        return Trouble.CORRUPT
    if error.failure.code in _BUSY:
        return Trouble.BUSY
    return Trouble.LOST if error.failure.code in _LOST else Trouble.REFUSED


def _pad(into: memoryview, piece: FilePiece) -> None:
    rest = piece.length - piece.data_bytes
    if rest:
        into[piece.at + piece.data_bytes : piece.at + piece.length] = bytes(rest)


# -- what a manifest promises ------------------------------------------------------------------------------------------


def check(manifest: Manifest, checkpoint_id: str) -> None:
    """Is this manifest sound, and that of this checkpoint? Raises `checkpoint_corrupt`."""
    validate(manifest, {file.name: file.bytes for file in manifest.files} | dict.fromkeys(manifest.small_files, 0))
    if manifest.checkpoint.checkpoint_id != checkpoint_id:
        found = manifest.checkpoint.checkpoint_id
        raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest is that of {found} and not of {checkpoint_id}.")


def _heads(manifest: Manifest, read: Callable[[str, int, memoryview], None]) -> list[bytes]:
    """The head of every weight file: what comes before its first tensor."""
    ends = [file.bytes for file in manifest.files]
    for tensor in manifest.tensors.values():
        ends[tensor.file] = min(ends[tensor.file], tensor.offset)
    heads: list[bytes] = []
    for file, end in zip(manifest.files, ends, strict=True):
        head = bytearray(end)
        read(file.name, 0, memoryview(head))
        heads.append(bytes(head))
    return heads


def _small_files(manifest: Manifest, tree: SourceTree) -> dict[str, bytes]:
    left_bytes = SMALL_LIMIT_BYTES
    found: dict[str, bytes] = {}
    for name, digest in manifest.small_files.items():
        data = tree.read_small(name, left_bytes)
        if hashlib.sha256(data).hexdigest() != digest:
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"{name} at {tree.url} does not match its SHA-256.")
        found[name] = data
        left_bytes -= len(data)
    return found


__all__ = ["FetchInterrupted", "Fetched", "Fetcher", "Peers", "check", "nobody"]
