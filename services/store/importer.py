"""Sources and peers → SSD tier: looks at what a source is, and brings it in, as a stored checkpoint. Blocks.

A source in Hugging Face's form is converted: into a staging directory, which becomes a checkpoint by one rename when it
is whole. One in Hearth's form (`hearth.json` lies in it, or a peer has the checkpoint) is fetched chunk by chunk into
its place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import msgspec

from services.store.convert import (
    WEIGHTS,
    ConversionOrigin,
    converted_small_files,
    make_manifest,
    make_plan,
    refuse_remote_code,
)
from services.store.events import PRIORITY_OPERATOR, StoredCheckpoint
from services.store.fetch import Fetcher
from services.store.image_files import ImageWriter
from services.store.manifest import (
    CASTS,
    FLOATS,
    FOREIGN_JSON_ERRORS,
    MANIFEST_LIMIT_BYTES,
    chunk_count,
    chunk_pieces,
    decode_stored,
    refuse_duplicates,
    validate,
    validate_heads,
)
from services.store.model_config import parse_config
from services.store.mover import Job, Mover, checksum
from services.store.ports import ChunkOrigin, Peer, Progressed, SourceTree
from services.store.source_model import CONFIG, CONFIG_LIMIT_BYTES, open_model, read_heads, read_small_files
from services.store.sources import redact
from services.store.tier import SsdTier, describe, disk_errors
from shared.contracts.manifest import MANIFEST_NAME, Manifest, WeightFile, encode_manifest
from shared.contracts.residency import Extent, Source
from shared.errors import Code, HearthError
from shared.sizes import size

_HUB: Final = "hf:"
_PEER: Final = "peer:"  # stands for a checkpoint that peers have, or nobody
# After these the next one who may have the checkpoint is asked.
_ELSEWHERE: Final = (
    Code.CHECKPOINT_UNAVAILABLE, Code.CHECKPOINT_CORRUPT, Code.NOT_FOUND, Code.FORBIDDEN, Code.UNAUTHENTICATED,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Look:
    """What a source is now and what its import would take.

    `checkpoint_id` is known beforehand only of a checkpoint in Hearth's form; `arrived_bytes` of its image are in the
    SSD tier already.
    """

    architecture: str
    revision: str
    weight_bytes: int
    image_bytes: int
    peak_bytes: int
    checkpoint_id: str = ""
    arrived_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an import brought and what it took.

    `moved_bytes` are those of the image that were moved in this import, `remote_bytes` were read from the source,
    `peer_bytes` came from peers. `in_dram`: all of the image is in the extents, too. `existing`: the same checkpoint
    was there already and has been kept. `waited_s` of `seconds` it stood behind others.
    """

    stored: StoredCheckpoint
    existing: bool
    remote_bytes: int
    seconds: float
    peer_bytes: int = 0
    moved_bytes: int = 0
    in_dram: bool = False
    waited_s: float = 0.0


class Importer:
    """Imports into a tier, in chunks of `chunk_bytes`. Every method blocks and raises `HearthError`.

    `disk` moves what lies on this server, `net` what comes over a network. Without a `fetcher` there are no peers, and
    a source in Hearth's form is converted like any other, which it is, too. `max_checkpoint_bytes` is the largest image
    that is taken in (0: any that fits).
    """

    def __init__(
        self,
        tier: SsdTier,
        *,
        open_tree: Callable[[Source], SourceTree],
        disk: Mover,
        net: Mover,
        fetcher: Fetcher | None = None,
        chunk_bytes: int,
        max_checkpoint_bytes: int = 0,
    ) -> None:
        self._tier = tier
        self._open_tree = open_tree
        self._disk = disk
        self._net = net
        self._fetcher = fetcher
        self._chunk_bytes = chunk_bytes
        self._max_bytes = max_checkpoint_bytes
        self._lock = threading.Lock()
        self._closed = False
        self._trees: set[SourceTree] = set()

    def close(self) -> None:
        """End what runs, with nothing left behind but what has arrived of checkpoints in Hearth's form."""
        with self._lock:
            self._closed = True
            trees = list(self._trees)
        if self._fetcher is not None:
            self._fetcher.close()
        for tree in trees:
            tree.close()

    def stop(self, key: str) -> None:
        """End the job of a fetch where it waits for a source or a peer; the movers end it everywhere else."""
        if self._fetcher is not None:
            self._fetcher.stop(key)

    # -- looking -----------------------------------------------------------------------------------------------------

    def look(self, source: Source, checkpoint_id: str = "", peers: Sequence[Peer] = ()) -> Look:
        """What the source is; reads configuration and headers only. Peers that have `checkpoint_id` are asked first."""
        with disk_errors(f"{redact(source.url)} cannot be looked at"):
            if (found := self._of_peers(checkpoint_id, peers)) is not None:
                return self._look_of(*found)
            with self._opened(source) as tree:
                if self._is_fetched(tree):
                    return self._look_of(*self._of_tree(tree, source))
                model = open_model(tree)
                plan = make_plan(tree, model, source.dtype, chunk_bytes=self._chunk_bytes, compare=False)
                self._check_limit(plan.image_bytes)
                return Look(
                    architecture=model.config.architecture,
                    revision=tree.revision,
                    weight_bytes=plan.weight_bytes,
                    image_bytes=plan.image_bytes,
                    peak_bytes=plan.peak_bytes,
                )

    def _look_of(self, manifest: Manifest, manifest_bytes: bytes) -> Look:
        facts = manifest.checkpoint
        image_bytes, arrived_bytes = manifest.image_bytes(), 0
        place = self._tier.checkpoints / facts.checkpoint_id
        if place.exists():
            with suppress(HearthError):  # what is here is of no use, then
                stored = describe(place, self._tier.manifest(place))
                arrived_bytes = image_bytes if stored.arrived_bytes is None else stored.arrived_bytes
        return Look(
            architecture=facts.architecture,
            revision=manifest.revision,
            weight_bytes=facts.weight_bytes,
            image_bytes=image_bytes,
            peak_bytes=_peak_bytes(manifest, manifest_bytes),
            checkpoint_id=facts.checkpoint_id,
            arrived_bytes=arrived_bytes,
        )

    def _of_peers(self, checkpoint_id: str, peers: Sequence[Peer]) -> tuple[Manifest, bytes] | None:
        """The manifest of a checkpoint from those that have it, proved; None if nobody gives a sound one."""
        if self._fetcher is None or not checkpoint_id or not peers:
            return None
        found = self._fetcher.find(checkpoint_id, peers)
        if found is not None:
            self._check_limit(found[0].image_bytes())
        return found

    def _of_tree(self, tree: SourceTree, source: Source) -> tuple[Manifest, bytes]:
        """The manifest of a source in Hearth's form, proved by the heads of its files."""
        manifest = _decode_foreign(tree.read_small(MANIFEST_NAME, MANIFEST_LIMIT_BYTES), tree.files)
        self._check_limit(manifest.image_bytes())
        validate_heads(manifest, read_heads(tree, [file.name for file in manifest.files]))
        if CONFIG not in manifest.small_files:
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest of {tree.url} has no {CONFIG}.")
        config = parse_config(tree.read_small(CONFIG, CONFIG_LIMIT_BYTES))
        refuse_remote_code(config)
        if config.architecture != manifest.checkpoint.architecture:
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest of {tree.url} is not that of its {CONFIG}.")
        _refuse_cast(manifest, source.dtype)
        # So the checkpoint knows where its bytes can be had again.
        manifest = msgspec.structs.replace(manifest, source=source, revision=tree.revision)
        return manifest, encode_manifest(manifest)

    # -- importing ---------------------------------------------------------------------------------------------------

    def run(
        self,
        source: Source,
        *,
        checkpoint_id: str = "",
        peers: Callable[[], Sequence[Peer]] = tuple,
        key: str = "",
        priority: int = PRIORITY_OPERATOR,
        extents: Sequence[Extent] = (),
        tag: int = 0,
        opened: Callable[[StoredCheckpoint], None] = lambda stored: None,
        progressed: Progressed,
    ) -> Outcome:
        """Import. `progressed` hears (bytes done, bytes in all) on the mover's threads.

        `key` and `priority` are those of the mover's job. With `extents` the image comes into these places of the DRAM
        pool at the same time, announced under `tag`. `opened` hears as soon as everything but the bytes is there, if
        the checkpoint's id is known beforehand; once at most.
        """
        key = key or f"import {source.url} {source.revision} {source.dtype}"
        is_open = False

        def opens(stored: StoredCheckpoint) -> None:
            nonlocal is_open
            is_open = True
            opened(stored)

        def elsewhere(error: HearthError) -> bool:
            """Whether to ask somebody else. Once others know what comes into the extents, nothing else may."""
            return error.failure.code in _ELSEWHERE and not is_open

        def fetch(manifest: Manifest, data: bytes, tree: SourceTree | None) -> Outcome:
            assert self._fetcher is not None, "a manifest without a fetcher"
            self._make_sure_of(self._missing_bytes(manifest, data))
            named = manifest if source.url.startswith(_PEER) else msgspec.structs.replace(manifest, source=source)
            with closing(self.repairer(named)) as at_source:
                fetched = self._fetcher.run(
                    manifest, data, tree, peers=peers, key=key, priority=priority, extents=extents, tag=tag,
                    opened=opens, progressed=progressed, rescue=at_source.of_source if tree is None else None,
                )  # fmt: skip
            return Outcome(
                stored=fetched.stored,
                existing=fetched.existing,
                remote_bytes=fetched.remote_bytes,
                seconds=fetched.seconds,
                peer_bytes=fetched.peer_bytes,
                moved_bytes=fetched.moved_bytes,
                in_dram=fetched.in_dram,
                waited_s=fetched.waited_s,
            )

        with disk_errors(f"{redact(source.url)} cannot be imported"):
            asked = peers() if self._fetcher is not None else ()
            known = self._of_peers(checkpoint_id, asked)
            if known is not None and any(peer.whole for peer in asked):
                try:
                    return fetch(*known, None)
                except HearthError as error:
                    if not elsewhere(error):
                        raise
                known = None
            try:
                with self._opened(source) as tree:
                    if self._is_fetched(tree):
                        return fetch(*self._of_tree(tree, source), tree)
                    return self._convert(tree, source, key, priority, extents, tag, progressed)
            except HearthError as error:
                if known is None or not elsewhere(error):
                    raise
                # The source is out of reach: what the peers have together may be enough.
                return fetch(*known, None)

    def _convert(
        self,
        tree: SourceTree,
        source: Source,
        key: str,
        priority: int,
        extents: Sequence[Extent],
        tag: int,
        progressed: Progressed,
    ) -> Outcome:
        began = time.perf_counter()
        model = open_model(tree)
        # Before the head is compared, which reads, and before anything is written.
        bound = make_plan(tree, model, source.dtype, chunk_bytes=self._chunk_bytes, compare=False)
        self._check_limit(bound.image_bytes)
        self._make_sure_of(bound.peak_bytes)
        plan = make_plan(tree, model, source.dtype, chunk_bytes=self._chunk_bytes)
        small = converted_small_files(model, plan, read_small_files(tree, model))
        # What cannot be described is refused now and not after all its bytes.
        count = chunk_count(plan.image_bytes, self._chunk_bytes)
        make = partial(
            make_manifest, model, plan, small, source=source, revision=tree.revision, chunk_bytes=self._chunk_bytes
        )
        make(["0" * 16] * count)
        with self._tier.staging() as directory:
            writer = ImageWriter(
                directory, [WeightFile(name=WEIGHTS, bytes=plan.file_bytes)], chunk_bytes=self._chunk_bytes
            )
            try:
                report = (self._net if tree.remote else self._disk).run(
                    Job(
                        key=key,
                        priority=priority,
                        image_bytes=plan.image_bytes,
                        chunk_bytes=self._chunk_bytes,
                        origin=ConversionOrigin(tree, plan, chunk_bytes=self._chunk_bytes),
                        extents=extents,
                        tag=tag,
                        sink=writer,
                        progressed=lambda done_bytes: progressed(done_bytes, plan.image_bytes),
                    )
                )
                writer.finish()
            finally:
                writer.close()
            self._check_unchanged(tree, source)
            manifest = make(report.checksums)
            for name, data in small.items():
                (directory / name).write_bytes(data)
            (directory / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
            stored = describe(directory, self._tier.manifest(directory))
            place, existing = self._tier.publish(directory, manifest.checkpoint.checkpoint_id)
            # Nothing may fail any more: it is there.
            stored = replace(stored, directory=str(place))
        return Outcome(
            stored=describe(place, self._tier.manifest(place)) if existing else stored,
            existing=existing,
            remote_bytes=model.weight_bytes + sum(model.small_files.values()),
            seconds=time.perf_counter() - began,
            moved_bytes=report.moved_bytes,
            in_dram=bool(extents),
            waited_s=report.waited_s,
        )

    def _check_unchanged(self, tree: SourceTree, source: Source) -> None:
        """A directory or a bucket that changed meanwhile gave a mixture of two models; a commit never changes."""
        if source.url.startswith(_HUB):
            return
        with self._opened(source) as now:
            if now.revision != tree.revision:
                message = f"{tree.url} changed while it was imported; try again."
                raise HearthError(Code.CHECKPOINT_UNAVAILABLE, message)

    # -- repair ------------------------------------------------------------------------------------------------------

    def repairer(self, manifest: Manifest, peers: Callable[[], Sequence[Peer]] = tuple) -> Repairer:
        """What brings a sound chunk of a checkpoint: from peers, from its source in Hearth's form, or by converting it
        again, if the source is what it was. Whoever asks for it closes it.
        """
        return Repairer(self, self._fetcher, manifest, peers)

    def open_origin(self, manifest: Manifest) -> tuple[SourceTree, ChunkOrigin] | None:
        """The source of a checkpoint as an origin of its chunks; None if it is something else by now.

        Its tree is handed to `let_go` by whoever asked.
        """
        source = manifest.source
        if source is None or source.url.startswith(_PEER):
            return None
        if source.url.startswith(_HUB):  # a commit stays, wherever the branch has gone
            source = msgspec.structs.replace(source, revision=manifest.revision)
        with ExitStack() as undo:
            tree = self._hold(source)
            undo.callback(self.let_go, tree)
            origin = self._origin_of(tree, source, manifest)
            if origin is None:
                return None
            undo.pop_all()
            return tree, origin

    def let_go(self, tree: SourceTree) -> None:
        """A tree is not needed any more."""
        with self._lock:
            self._trees.discard(tree)
        tree.close()

    def _origin_of(self, tree: SourceTree, source: Source, manifest: Manifest) -> ChunkOrigin | None:
        if MANIFEST_NAME in tree.files:
            here, _ = self._of_tree(tree, source)
            same = here.checkpoint.checkpoint_id == manifest.checkpoint.checkpoint_id
            return TreeOrigin(tree, manifest) if same else None
        if tree.revision != manifest.revision:
            return None
        plan = make_plan(tree, open_model(tree), source.dtype, chunk_bytes=manifest.chunk_bytes, tied=manifest.tied)
        same = plan.entries == manifest.tensors and plan.image_bytes == manifest.image_bytes()
        return ConversionOrigin(tree, plan, chunk_bytes=manifest.chunk_bytes) if same else None

    def _is_fetched(self, tree: SourceTree) -> bool:
        return self._fetcher is not None and MANIFEST_NAME in tree.files

    # -- sources and room --------------------------------------------------------------------------------------------

    def _hold(self, source: Source) -> SourceTree:
        """A tree of this source, until `let_go`."""
        if source.url.startswith(_PEER):
            raise HearthError(Code.NOT_FOUND, f"No peer has checkpoint {source.url.removeprefix(_PEER)}.")
        tree = self._open_tree(source)
        with self._lock:
            if self._closed:
                tree.close()
                raise HearthError(Code.DRAINING, "The store is shutting down.")
            self._trees.add(tree)
        return tree

    @contextmanager
    def _opened(self, source: Source) -> Iterator[SourceTree]:
        tree = self._hold(source)
        try:
            yield tree
        finally:
            self.let_go(tree)

    def _check_limit(self, image_bytes: int) -> None:
        if self._max_bytes and image_bytes > self._max_bytes:
            raise HearthError(
                Code.TOO_LARGE,
                f"The checkpoint has {size(image_bytes)}, and this store takes at most {size(self._max_bytes)} "
                "(HEARTH_MAX_CHECKPOINT_BYTES, or else the SSD tier's size).",
            )

    def _make_sure_of(self, needed_bytes: int) -> None:
        free_bytes = self._tier.free_bytes()
        if free_bytes < needed_bytes:
            raise HearthError(
                Code.NO_CAPACITY,
                f"The import needs {size(needed_bytes)}; the disk of {self._tier.root} has {size(free_bytes)} free.",
            )

    def _missing_bytes(self, manifest: Manifest, manifest_bytes: bytes) -> int:
        """What a fetch still takes of the disk: files that have begun to arrive own their blocks."""
        if (self._tier.checkpoints / manifest.checkpoint.checkpoint_id).exists():
            return 0
        return _peak_bytes(manifest, manifest_bytes)


class TreeOrigin:
    """The chunks of a checkpoint whose files lie in a source as they are (`ChunkOrigin`)."""

    def __init__(self, tree: SourceTree, manifest: Manifest) -> None:
        self._tree = tree
        self._manifest = manifest

    def read(self, index: int, into: memoryview) -> None:
        """See `ChunkOrigin`."""
        for piece in chunk_pieces(self._manifest, index):
            name = self._manifest.files[piece.file].name
            if piece.data_bytes:
                self._tree.read(name, piece.offset, into[piece.at : piece.at + piece.data_bytes])
            into[piece.at + piece.data_bytes : piece.at + piece.length] = bytes(piece.length - piece.data_bytes)


class Repairer:
    """See `Importer.repairer`. Thread-safe. The source is opened when the first chunk needs it."""

    def __init__(
        self,
        importer: Importer,
        fetcher: Fetcher | None,
        manifest: Manifest,
        peers: Callable[[], Sequence[Peer]],
    ) -> None:
        self._importer = importer
        self._fetcher = fetcher
        self._manifest = manifest
        self._peers = peers
        self._lock = threading.Lock()
        self._asked = False
        self._found: tuple[SourceTree, ChunkOrigin] | None = None

    def __call__(self, index: int, into: memoryview) -> bool:
        """Fill `into` with a chunk that is as the manifest says; False if nobody has it. Raises `HearthError`."""
        peers = self._peers() if self._fetcher is not None else ()
        if self._fetcher is not None and peers and self._fetcher.take(self._manifest, index, into, peers):
            return True
        return self.of_source(index, into)

    def of_source(self, index: int, into: memoryview) -> bool:
        """The same from the source alone."""
        origin = self._source()
        if origin is None:
            return False
        origin.read(index, into)
        return checksum(into) == self._manifest.chunks[index]

    def close(self) -> None:
        """Let go of the source; nothing is repaired any more."""
        with self._lock:
            found, self._found, self._asked = self._found, None, True
        if found is not None:
            self._importer.let_go(found[0])

    def _source(self) -> ChunkOrigin | None:
        with self._lock:
            if not self._asked:
                self._found = self._importer.open_origin(self._manifest)
                self._asked = True
            return None if self._found is None else self._found[1]


def _decode_foreign(data: bytes, sizes: Mapping[str, int]) -> Manifest:
    """The manifest of a source. `sizes` are those of the files beside it."""
    manifest = decode_stored(data)
    try:
        refuse_duplicates(data)
    except FOREIGN_JSON_ERRORS as error:
        raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest is malformed: {error}.") from error
    validate(manifest, sizes)
    return manifest


def _refuse_cast(manifest: Manifest, dtype: str | None) -> None:
    """Raise `unsupported` if the floating-point tensors of this checkpoint are not what was asked for."""
    if dtype is None:
        return
    if dtype not in CASTS:
        message = f"dtype {dtype!r} is none of {', '.join(sorted(CASTS))}."
        raise HearthError(Code.INVALID_REQUEST, message, param="dtype")
    others = {tensor.dtype for tensor in manifest.tensors.values() if tensor.dtype in FLOATS} - {CASTS[dtype]}
    if others:
        raise HearthError(
            Code.UNSUPPORTED,
            f"The source is a checkpoint in Hearth's form of dtype {manifest.checkpoint.dtype}, which is copied as it "
            f"is; import the model in Hugging Face's form to cast it to {dtype}.",
            param="dtype",
        )


def _peak_bytes(manifest: Manifest, manifest_bytes: bytes) -> int:
    small_bytes = len(manifest.small_files) * 4096
    return manifest.image_bytes() + len(manifest_bytes) + len(manifest.chunks) + small_bytes + 65536
