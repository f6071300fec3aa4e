"""Import: a Hugging Face directory becomes a checkpoint in Hearth's format, tensor by tensor, in bounded memory.

The only module of the store that knows torch, and it imports it only to cast; bytes that stay as they are move without.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from services.store.local import LocalSource
from services.store.manifest import (
    DTYPES,
    FLOATS,
    checkpoint_id,
    corrupt,
    digest_of,
    head_alias,
    is_word_embedding,
    layout,
)
from services.store.model_config import (
    DEFAULT_CONTEXT_TOKENS,
    check_cast,
    config_with_dtype,
    has_chat_template,
    main_dtype,
    tokenizer_limit_tokens,
)
from shared.contracts.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Checkpoint,
    Manifest,
    TensorEntry,
    WeightFile,
    encode_manifest,
    padded_bytes,
)
from shared.contracts.residency import Source
from shared.errors import Code, HearthError

PIECE_BYTES: Final = 8 * 2**20  # of a tensor that is read, cast and written at once
WEIGHTS: Final = "model.safetensors"
# What the manifest may take: names and numbers per tensor, a checksum per chunk, and the rest.
_MANIFEST_BYTES_PER_TENSOR: Final = 512
_MANIFEST_BYTES_PER_CHUNK: Final = 32
_MANIFEST_REST_BYTES: Final = 65536


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about an import that is known before the weights are read."""

    head: bytes
    entries: dict[str, TensorEntry]
    tied: dict[str, str]
    cast: str | None
    file_bytes: int
    image_bytes: int
    peak_bytes: int
    weight_bytes: int


def make_plan(source: LocalSource, dtype: str | None, *, chunk_bytes: int, compare: bool = True) -> Plan:
    """Lay out the checkpoint that `source` becomes. Raises `HearthError` if it cannot be served.

    With `compare`, a head that repeats the word embedding byte by byte is left out (its bytes are read once for that);
    without, the plan is an upper bound.
    """
    refuse_remote_code(source)
    cast = check_cast(source.config, dtype)
    if cast is not None and importlib.util.find_spec("torch") is None:
        raise HearthError(Code.UNSUPPORTED, "Casting to another dtype needs torch, which this store does not have.")
    tied: dict[str, str] = {}
    repeated = head_alias(source.tensors) if source.config.ties_words else None
    if repeated is not None:
        head, words = repeated
        if compare and _same(source, head, words):
            tied[head] = words
    elif "lm_head.weight" not in source.tensors and source.config.ties_words is not False:
        candidates = [name for name in source.tensors if is_word_embedding(name)]
        if len(candidates) == 1:
            tied["lm_head.weight"] = candidates[0]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (_, tensor) in source.tensors.items():
        if name not in tied:
            shapes[name] = (cast if cast is not None and tensor.dtype in FLOATS else tensor.dtype, tensor.shape)
    head_of_file, entries = layout(shapes)
    weight_bytes = sum(entry.bytes for entry in entries.values())
    file_bytes = len(head_of_file) + weight_bytes
    image_bytes = padded_bytes(file_bytes)
    small_bytes = sum(map(len, source.small.values())) + 4096
    manifest_bytes = (
        _MANIFEST_REST_BYTES
        + sum(_MANIFEST_BYTES_PER_TENSOR + len(name.encode()) for name in entries)
        + _MANIFEST_BYTES_PER_CHUNK * (image_bytes // chunk_bytes + 1)
    )
    return Plan(
        head=head_of_file,
        entries=entries,
        tied=tied,
        cast=cast,
        file_bytes=file_bytes,
        image_bytes=image_bytes,
        peak_bytes=file_bytes + small_bytes + manifest_bytes,
        weight_bytes=weight_bytes,
    )


def refuse_remote_code(source: LocalSource) -> None:
    """Raise `unsupported` for a model whose code comes with it, unless transformers has its own implementation."""
    if not source.config.remote_code:
        return
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        known = False
    else:
        known = source.config.model_type in CONFIG_MAPPING_NAMES
    if not known:
        raise HearthError(
            Code.UNSUPPORTED,
            f"{source.config.architecture} needs code that comes with the model (`auto_map`), which is never run.",
        )


def run_import(
    source: LocalSource,
    plan: Plan,
    target: Path,
    *,
    asked: Source,
    revision: str,
    chunk_bytes: int,
    progressed: Callable[[int, int], None],
    stop: threading.Event,
) -> Manifest:
    """Write the checkpoint into the empty directory `target`; its manifest. Blocks; the caller makes it durable.

    Raises `HearthError`: no_capacity when the disk is full, checkpoint_unavailable when source or disk fail, draining
    when `stop` is set.
    """
    try:
        return _run(source, plan, target, asked, revision, chunk_bytes, progressed, stop)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"The disk is full: the import needs {plan.peak_bytes} bytes."
            raise HearthError(Code.NO_CAPACITY, message) from error
        raise HearthError(Code.CHECKPOINT_UNAVAILABLE, f"The import failed: {error}.") from error


def _run(
    source: LocalSource,
    plan: Plan,
    target: Path,
    asked: Source,
    revision: str,
    chunk_bytes: int,
    progressed: Callable[[int, int], None],
    stop: threading.Event,
) -> Manifest:
    writer = _ChunkedFile(target / WEIGHTS, plan.file_bytes, chunk_bytes)
    files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in source.files]
    try:
        writer.write(plan.head)
        for name, entry in plan.entries.items():
            number, tensor = source.tensors[name]
            for piece in _pieces(files[number], source.files[number].name, tensor.offset, tensor.bytes):
                if stop.is_set():
                    raise HearthError(Code.DRAINING, "The store is shutting down.")
                writer.write(piece if entry.dtype == tensor.dtype else _cast(piece, tensor.dtype, entry.dtype))
                progressed(writer.written_bytes, plan.file_bytes)
        chunks = writer.finish()
    finally:
        writer.close()
        for file in files:
            # The source is not needed again: leave the page cache to others.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
    small = dict(source.small)
    if plan.cast is not None:
        small["config.json"] = config_with_dtype(source.config, DTYPES[plan.cast][1])
    for name, data in small.items():
        (target / name).write_bytes(data)
    manifest = _manifest(source, plan, small, chunks, asked, revision, chunk_bytes)
    (target / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return manifest


def _manifest(
    source: LocalSource,
    plan: Plan,
    small: dict[str, bytes],
    chunks: list[str],
    asked: Source,
    revision: str,
    chunk_bytes: int,
) -> Manifest:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    bytes_by_dtype: dict[str, int] = {}
    parameters = 0
    for entry in plan.entries.values():
        bytes_by_dtype[entry.dtype] = bytes_by_dtype.get(entry.dtype, 0) + entry.bytes
        parameters += entry.bytes * 8 // DTYPES[entry.dtype][0]
    dtype = main_dtype(bytes_by_dtype)
    element_bytes = next(bits for bits, name in DTYPES.values() if name == dtype) // 8 or 1
    config = source.config
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
            kv_bytes_per_token=config.kv_elements_per_token * max(element_bytes, 2),
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
        source=asked,
        revision=revision,
    )


class _ChunkedFile:
    """A file that is written chunk by chunk, each chunk hashed on the way."""

    def __init__(self, path: Path, file_bytes: int, chunk_bytes: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._file_bytes = file_bytes
        self._buffer = bytearray(min(chunk_bytes, padded_bytes(file_bytes)))
        self._filled = 0
        self._chunks: list[str] = []
        self.written_bytes = 0
        # A disk that is too full says so now and not after minutes.
        os.posix_fallocate(self._file, 0, file_bytes)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            take = min(len(view), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + take] = view[:take]
            self._filled += take
            self.written_bytes += take
            view = view[take:]
            if self._filled == len(self._buffer):
                self._flush(len(self._buffer))

    def _flush(self, length: int) -> None:
        self._chunks.append(xxhash.xxh3_64_hexdigest(memoryview(self._buffer)[:length]))
        rest = memoryview(self._buffer)[: self._filled]
        while len(rest):
            rest = rest[os.write(self._file, rest) :]
        self._filled = 0

    def finish(self) -> list[str]:
        """Write what is left; the checksums. The last chunk is hashed with its padding, as it lies in the image."""
        if self.written_bytes != self._file_bytes:
            raise corrupt(f"The import wrote {self.written_bytes} bytes instead of {self._file_bytes}.")
        if self._filled:
            length = padded_bytes(self._filled)
            self._buffer[self._filled : length] = bytes(length - self._filled)
            self._flush(length)
        os.fsync(self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        return self._chunks

    def close(self) -> None:
        os.close(self._file)


def _pieces(file: int, name: str, offset: int, size_bytes: int) -> Iterator[bytes]:
    """A range of a file, piece by piece. Raises `invalid_checkpoint` if the file became shorter meanwhile."""
    at, end = offset, offset + size_bytes
    while at < end:
        piece = os.pread(file, min(PIECE_BYTES, end - at), at)
        # Casting needs whole elements: 8 bytes is the largest, and only the end of a file reads short.
        if len(piece) < min(PIECE_BYTES, end - at):
            raise corrupt(f"{name} is truncated: it ends at byte {at + len(piece)}.")
        at += len(piece)
        yield piece


def _same(source: LocalSource, one: str, other: str) -> bool:
    """Whether two tensors are equal byte by byte."""
    (_, a), (_, b) = source.tensors[one], source.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    digests: list[str] = []
    for name in (one, other):
        number, tensor = source.tensors[name]
        digest = xxhash.xxh3_128()
        with source.files[number].open("rb") as file:
            for piece in _pieces(file.fileno(), source.files[number].name, tensor.offset, tensor.bytes):
                digest.update(piece)
        digests.append(digest.hexdigest())
    return digests[0] == digests[1]


def _cast(piece: bytes, dtype: str, target: str) -> memoryview:
    """Floating-point elements of safetensors' `dtype` as `target`: rounded to nearest even, as torch does."""
    import torch

    source = torch.frombuffer(bytearray(piece), dtype=getattr(torch, DTYPES[dtype][1]))
    cast = source.to(getattr(torch, DTYPES[target][1])).view(torch.uint8)
    return memoryview(cast.numpy())
