"""Conversion: a model in Hugging Face's form becomes a checkpoint in Hearth's, any chunk of it on any thread.

`make_plan` lays the checkpoint out and says, for every byte of it, from where in the source it comes;
`ConversionOrigin` makes a chunk by that plan. So a conversion moves like everything else, chunk by chunk, many at once,
and holds no more memory than a chunk and a scratch buffer per thread, however large a tensor is.

The only module of the store that knows torch, and it imports it only to cast; bytes that stay as they are go from the
source's file straight into the chunk.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Protocol, runtime_checkable

from services.store.manifest import (
    DTYPES,
    FLOATS,
    checkpoint_id,
    digest_of,
    element_bytes,
    head_alias,
    is_word_embedding,
    layout,
)
from services.store.model_config import (
    DEFAULT_CONTEXT_TOKENS,
    ModelConfig,
    check_cast,
    config_with_dtype,
    has_chat_template,
    main_dtype,
    tokenizer_limit_tokens,
)
from services.store.ports import SourceTree
from services.store.source_model import CONFIG, SourceModel
from shared.contracts.manifest import (
    FORMAT_VERSION,
    Checkpoint,
    Manifest,
    TensorEntry,
    WeightFile,
    padded_bytes,
)
from shared.contracts.residency import Source
from shared.errors import Code, HearthError

WEIGHTS: Final = "model.safetensors"
_COMPARE_BYTES: Final = 4 * 2**20  # of each of two tensors that are compared
_CAST_BYTES: Final = 4 * 2**20  # of the source that are cast at once
_RUN_BYTES: Final = 16 * 2**20  # of the source that are read at once into scratch
# Bytes that nobody asked for and that are read all the same because two reads would take longer.
_LOCAL_GAP_BYTES: Final = 64 * 2**10
_REMOTE_GAP_BYTES: Final = 2**20
# What the manifest may take: names and numbers per tensor, a checksum per chunk, and the rest.
_MANIFEST_BYTES_PER_TENSOR: Final = 512
_MANIFEST_BYTES_PER_CHUNK: Final = 32
_MANIFEST_REST_BYTES: Final = 65536


@runtime_checkable
class ScatteringTree(Protocol):
    """A source that can fill many buffers from one range of a file."""

    def read_parts(self, name: str, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill `parts`, one after another, from byte `offset` of a file."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `at` to `at + bytes` of the output file are those of the source file `file` from byte `offset` on.

    If the two dtypes differ, the elements are cast.
    """

    at: int
    bytes: int
    file: str
    offset: int
    dtype: str
    target: str

    @property
    def plain(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.dtype == self.target


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a conversion that is known before the weights are read.

    `peak_bytes` is what the SSD tier needs for it.
    """

    head: bytes
    entries: dict[str, TensorEntry]
    pieces: tuple[Piece, ...]
    tied: dict[str, str]
    cast: str | None
    file_bytes: int
    image_bytes: int
    peak_bytes: int
    weight_bytes: int


def make_plan(
    tree: SourceTree,
    model: SourceModel,
    dtype: str | None,
    *,
    chunk_bytes: int,
    compare: bool = True,
    tied: Mapping[str, str] | None = None,
) -> Plan:
    """Lay out the checkpoint that `model` becomes. Raises `HearthError` if it cannot be served.

    With `compare`, a head that repeats the word embedding byte by byte is left out (its bytes are read once for that);
    without, the plan is an upper bound. `tied`, from the manifest of an earlier conversion of the same source, stands
    instead of the comparison.
    """
    refuse_remote_code(model.config)
    cast = check_cast(model.config, dtype)
    if cast is not None and importlib.util.find_spec("torch") is None:
        raise HearthError(Code.UNSUPPORTED, "Casting to another dtype needs torch, which this store does not have.")
    ties = dict(tied) if tied is not None else _ties(tree, model, compare)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (_, tensor) in model.tensors.items():
        if name not in ties:
            shapes[name] = (cast if cast is not None and tensor.dtype in FLOATS else tensor.dtype, tensor.shape)
    head, entries = layout(shapes)
    weight_bytes = sum(entry.bytes for entry in entries.values())
    file_bytes = len(head) + weight_bytes
    image_bytes = padded_bytes(file_bytes)
    manifest_bytes = (
        _MANIFEST_REST_BYTES
        + sum(_MANIFEST_BYTES_PER_TENSOR + len(name.encode()) for name in entries)
        + _MANIFEST_BYTES_PER_CHUNK * (image_bytes // chunk_bytes + 1)
    )
    return Plan(
        head=head,
        entries=entries,
        pieces=tuple(_pieces(model, entries)),
        tied=ties,
        cast=cast,
        file_bytes=file_bytes,
        image_bytes=image_bytes,
        peak_bytes=image_bytes + sum(model.small_files.values()) + 4096 + manifest_bytes,
        weight_bytes=weight_bytes,
    )


def _ties(tree: SourceTree, model: SourceModel, compare: bool) -> dict[str, str]:
    repeated = head_alias(model.tensors) if model.config.ties_words else None
    if repeated is not None:
        head, words = repeated
        return {head: words} if compare and _same(tree, model, head, words) else {}
    if "lm_head.weight" not in model.tensors and model.config.ties_words is not False:
        candidates = [name for name in model.tensors if is_word_embedding(name)]
        if len(candidates) == 1:
            return {"lm_head.weight": candidates[0]}
    return {}


def _pieces(model: SourceModel, entries: Mapping[str, TensorEntry]) -> Iterator[Piece]:
    """The tensors' places; neighbours in source and output are one piece."""
    last: Piece | None = None
    for name, entry in entries.items():
        if not entry.bytes:
            continue
        file, tensor = model.tensors[name]
        piece = Piece(entry.offset, entry.bytes, file, tensor.offset, tensor.dtype, entry.dtype)
        if last is not None:
            if piece.plain and last.plain and last.file == file and last.offset + last.bytes == tensor.offset:
                last = Piece(last.at, last.bytes + piece.bytes, file, last.offset, last.dtype, last.dtype)
                continue
            yield last
        last = piece
    if last is not None:
        yield last


def refuse_remote_code(config: ModelConfig) -> None:
    """Raise `unsupported` for a model whose code comes with it, unless transformers has its own implementation."""
    if not config.remote_code:
        return
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        known = False
    else:
        known = config.model_type in CONFIG_MAPPING_NAMES
    if not known:
        raise HearthError(
            Code.UNSUPPORTED,
            f"{config.architecture} needs code that comes with the model (`auto_map`), which is never run.",
        )


def _same(tree: SourceTree, model: SourceModel, one: str, other: str) -> bool:
    """Whether two tensors are equal byte by byte."""
    (file, a), (other_file, b) = model.tensors[one], model.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    buffers = bytearray(_COMPARE_BYTES), bytearray(_COMPARE_BYTES)
    for start in range(0, a.bytes, _COMPARE_BYTES):
        length = min(_COMPARE_BYTES, a.bytes - start)
        views = memoryview(buffers[0])[:length], memoryview(buffers[1])[:length]
        tree.read(file, a.offset + start, views[0])
        tree.read(other_file, b.offset + start, views[1])
        if buffers[0][:length] != buffers[1][:length]:
            return False
    return True


# -- chunks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Range:
    """`bytes` of the source from `offset` give `length` bytes of the chunk from `at` on.

    They are those of the cast elements without the first `skip` bytes, if `dtype` and `target` differ.
    """

    file: str
    offset: int
    bytes: int
    at: int
    length: int
    skip: int
    dtype: str
    target: str

    @property
    def plain(self) -> bool:
        return self.dtype == self.target


class ConversionOrigin:
    """The chunks of a conversion (`ChunkOrigin`).

    Each thread that reads holds, besides the chunk, at most 16 MiB of scratch and the result of one cast (8 MiB); and
    those only if something is cast, or reads were joined.
    """

    def __init__(self, tree: SourceTree, plan: Plan, *, chunk_bytes: int) -> None:
        self._tree = tree
        self._plan = plan
        self._chunk_bytes = chunk_bytes
        self._starts = [piece.at for piece in plan.pieces]
        self._gap_bytes = _REMOTE_GAP_BYTES if tree.remote else _LOCAL_GAP_BYTES
        self._threads = threading.local()

    def read(self, index: int, into: memoryview) -> None:
        """See `ChunkOrigin`."""
        begin = index * self._chunk_bytes
        head = self._plan.head[begin : begin + len(into)]
        into[: len(head)] = head
        for run in _runs(self._ranges(begin, begin + len(into)), self._gap_bytes):
            self._read_run(run, into)
        data_bytes = max(0, self._plan.file_bytes - begin)
        if data_bytes < len(into):
            into[data_bytes:] = bytes(len(into) - data_bytes)

    def _ranges(self, begin: int, end: int) -> list[_Range]:
        """What bytes `begin` to `end` of the output need of the source, in the order of the source."""
        found: list[_Range] = []
        first = max(0, bisect_right(self._starts, begin) - 1)
        for piece in islice(self._plan.pieces, first, None):
            if piece.at >= end:
                break
            low, high = max(begin, piece.at), min(end, piece.at + piece.bytes)
            if low < high:
                found.extend(_part(piece, low, high, begin))
        found.sort(key=lambda one: (one.file, one.offset))
        return found

    def _read_run(self, run: Sequence[_Range], into: memoryview) -> None:
        """Read these ranges at once, the plain ones straight to their places if the source can, and cast the others."""
        first, last = run[0], run[-1]
        if first is last and first.plain:
            self._tree.read(first.file, first.offset, into[first.at : first.at + first.length])
            return
        scratch = self._scratch(last.offset + last.bytes - first.offset)
        scatters = isinstance(self._tree, ScatteringTree)
        parts: list[memoryview] = []
        at = 0
        for one in run:
            start = one.offset - first.offset
            if start > at:
                parts.append(scratch[at:start])
            at = start + one.bytes
            parts.append(into[one.at : one.at + one.length] if one.plain else scratch[start:at])
        if isinstance(self._tree, ScatteringTree):
            self._tree.read_parts(first.file, first.offset, parts)
        else:
            self._tree.read(first.file, first.offset, scratch[:at])
        for one in run:
            start = one.offset - first.offset
            data = scratch[start : start + one.bytes]
            if not one.plain:
                cast = _cast(data, one.dtype, one.target)
                into[one.at : one.at + one.length] = cast[one.skip : one.skip + one.length]
            elif not scatters:
                into[one.at : one.at + one.length] = data

    def _scratch(self, size_bytes: int) -> memoryview:
        """This thread's buffer. Memory that is never written to is never given by the system."""
        held: bytearray = getattr(self._threads, "scratch", bytearray())
        if len(held) < size_bytes:
            held = self._threads.scratch = bytearray(size_bytes)
        return memoryview(held)


def _part(piece: Piece, low: int, high: int, begin: int) -> Iterator[_Range]:
    """What bytes `low` to `high` of the output need of this piece; for a cast in whole elements, bit by bit."""
    if piece.plain:
        offset = piece.offset + low - piece.at
        yield _Range(piece.file, offset, high - low, low - begin, high - low, 0, piece.dtype, piece.target)
        return
    source, target = element_bytes(piece.dtype), element_bytes(piece.target)
    step = _CAST_BYTES // source
    element, end = (low - piece.at) // target, -(-(high - piece.at) // target)
    while element < end:
        until = min(element + step, end)
        # An element of the output may lie across the border of two chunks: its bytes on this side.
        at = max(low, piece.at + element * target)
        yield _Range(
            file=piece.file,
            offset=piece.offset + element * source,
            bytes=(until - element) * source,
            at=at - begin,
            length=min(high, piece.at + until * target) - at,
            skip=at - (piece.at + element * target),
            dtype=piece.dtype,
            target=piece.target,
        )
        element = until


def _runs(ranges: Sequence[_Range], gap_bytes: int) -> Iterator[list[_Range]]:
    """Ranges that are read at once: neighbours in one file, small gaps between them included."""
    run: list[_Range] = []
    for one in ranges:
        if run:
            end = run[-1].offset + run[-1].bytes
            joined = (
                one.file == run[0].file
                and 0 <= one.offset - end <= gap_bytes
                and one.offset + one.bytes - run[0].offset <= _RUN_BYTES
            )
            if not joined:
                yield run
                run = []
        run.append(one)
    if run:
        yield run


_torch: Any = None


def _cast(data: memoryview, dtype: str, target: str) -> memoryview:
    """Floating-point elements of safetensors' `dtype` as `target`: rounded to nearest even, as torch does."""
    global _torch
    if _torch is None:
        import torch

        # Chunks are cast on many threads at once; each of them having helpers of its own would only slow them down.
        torch.set_num_threads(1)
        _torch = torch
    source = _torch.frombuffer(data, dtype=getattr(_torch, DTYPES[dtype][1]))
    cast = source.to(getattr(_torch, DTYPES[target][1])).view(_torch.uint8)
    return memoryview(cast.numpy())


# -- the manifest ------------------------------------------------------------------------------------------------------


def converted_small_files(model: SourceModel, plan: Plan, small: Mapping[str, bytes]) -> dict[str, bytes]:
    """The small files of the checkpoint: as they came, but for the dtype in config.json after a cast."""
    files = dict(small)
    if plan.cast is not None:
        files[CONFIG] = config_with_dtype(model.config, DTYPES[plan.cast][1])
    return files


def make_manifest(
    model: SourceModel,
    plan: Plan,
    small: Mapping[str, bytes],
    chunks: Sequence[str],
    *,
    source: Source,
    revision: str,
    chunk_bytes: int,
) -> Manifest:
    """The manifest of a conversion whose chunks have these checksums. `small` are the checkpoint's small files.

    Raises `invalid_checkpoint` for a malformed tokenizer_config.json.
    """
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    bytes_by_dtype: dict[str, int] = {}
    parameters = 0
    for entry in plan.entries.values():
        bytes_by_dtype[entry.dtype] = bytes_by_dtype.get(entry.dtype, 0) + entry.bytes
        parameters += entry.bytes * 8 // DTYPES[entry.dtype][0]
    dtype = main_dtype(bytes_by_dtype)
    element = next(bits for bits, name in DTYPES.values() if name == dtype) // 8
    config = model.config
    limit = config.max_context_tokens or tokenizer_limit_tokens(small.get("tokenizer_config.json"))
    config_digest = digest_of(digests)
    return Manifest(
        format_version=FORMAT_VERSION,
        checkpoint=Checkpoint(
            checkpoint_id=checkpoint_id(
                head=plan.head, tied=plan.tied, chunk_bytes=chunk_bytes, chunks=chunks, config_digest=config_digest
            ),
            architecture=config.architecture,
            weight_bytes=plan.weight_bytes,
            parameters=parameters,
            dtype=dtype,
            max_context_tokens=limit or DEFAULT_CONTEXT_TOKENS,
            # Weights of 8 bits and less still compute, and cache, in 16.
            kv_bytes_per_token=config.kv_elements_per_token * max(element, 2),
            vocab_tokens=config.vocab_tokens,
            has_chat_template=has_chat_template(small),
        ),
        chunk_bytes=chunk_bytes,
        files=(WeightFile(name=WEIGHTS, bytes=plan.file_bytes),),
        tensors=plan.entries,
        chunks=tuple(chunks),
        config_digest=config_digest,
        small_files=digests,
        tied=plan.tied,
        source=source,
        revision=revision,
    )
