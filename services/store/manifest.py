"""The checkpoint format, without any input or output: safetensors headers, layout, checksum table, ids, read plans.

The safetensors format: 8 bytes little-endian header length N, N bytes JSON (may end in spaces), then the data; tensors
cover the data without holes, overlaps or trailing bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from shared.contracts.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PAGE_BYTES,
    Manifest,
    TensorEntry,
    WeightFile,
    padded_bytes,
)
from shared.contracts.residency import Extent
from shared.errors import Code, HearthError

# Bits per element and torch's name, by safetensors' dtype name: every dtype that safetensors 0.8 knows. Torch has no F6
# yet.
DTYPES: Final[dict[str, tuple[int, str]]] = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F6_E2M3": (6, "float6_e2m3fn"),
    "F6_E3M2": (6, "float6_e3m2fn"),
    "F4": (4, "float4_e2m1fn_x2"),
    "C64": (64, "complex64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "I8": (8, "int8"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
}
FLOATS: Final = ("F64", "F32", "F16", "BF16")  # what a dtype cast changes
CASTS: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

ALIGNMENT_BYTES: Final = 64  # of every tensor whose size allows it: a cache line, and enough for any vector load
HEADER_LIMIT_BYTES: Final = 100_000_000  # the safetensors library's own limit
MANIFEST_LIMIT_BYTES: Final = 256 * 2**20
CHUNK_LIMIT_BYTES: Final = 2**28  # every thread that moves chunks holds one in memory
NUMBER_LIMIT: Final = 2**53  # of bytes, elements, parameters: what JSON carries exactly, and far more than any disk has
_DIMENSIONS_LIMIT: Final = 64  # torch's

_ID: Final = re.compile(r"[0-9a-f]{32}")
_CHECKSUM: Final = re.compile(r"[0-9a-f]{16}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# A name that stands for a file of the same directory on any filesystem, and is not hidden.
_FILE_NAME: Final = re.compile(r"[^./\\\0-\x1f\x7f\ud800-\udfff][^/\\\0-\x1f\x7f\ud800-\udfff]{0,199}")
_TEXT: Final = re.compile(
    "[^\ud800-\udfff]{1,1024}", re.DOTALL
)  # JSON can spell half characters; UTF-8 cannot hold them


_LONG_TEXT: Final = re.compile("[^\ud800-\udfff]{1,4096}", re.DOTALL)


def corrupt(message: str) -> HearthError:
    """What every malformed source raises."""
    return HearthError(Code.INVALID_CHECKPOINT, message)


# -- safetensors headers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """A tensor as a safetensors header describes it; `offset` is absolute in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def header_bytes(first: bytes, file_bytes: int, name: str) -> int:
    """Length of the JSON header, from a file's first 8 bytes. Raises `invalid_checkpoint` when it cannot be one."""
    if len(first) < 8 or file_bytes < 10:
        raise corrupt(f"{name} is truncated: {file_bytes} bytes are too few for a safetensors file.")
    length = int.from_bytes(first[:8], "little")
    if length > HEADER_LIMIT_BYTES:
        raise corrupt(f"{name} is no safetensors file: its header claims {length} bytes.")
    if 8 + length > file_bytes:
        raise corrupt(f"{name} is truncated: its header needs {8 + length} bytes, the file has {file_bytes}.")
    return length


_HEADER: Final = msgspec.json.Decoder(dict[str, dict[str, str | list[int]]])


def parse_header(header: bytes, file_bytes: int, name: str) -> dict[str, HeaderTensor]:
    """The tensors of a safetensors file in the order of their data. Raises `invalid_checkpoint` with the reason.

    The types are checked while the JSON is decoded, so that a hostile header is refused at its first wrong value.
    """
    try:
        table = _HEADER.decode(header)
        refuse_duplicates(header)
    except FOREIGN_JSON_ERRORS as error:
        raise corrupt(f"{name} has a malformed safetensors header: {error}.") from error
    start = 8 + len(header)
    tensors: dict[str, HeaderTensor] = {}
    for key, entry in table.items():
        if key == "__metadata__":
            if not all(isinstance(value, str) for value in entry.values()):
                raise corrupt(f"{name} has a malformed safetensors header: its metadata is more than text.")
            continue
        if not _TEXT.fullmatch(key):
            raise corrupt(f"{name} has a tensor whose name is no text of at most 1024 characters.")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
            raise corrupt(f"{name} has a malformed entry for tensor {key!r}.")
        if dtype not in DTYPES:
            raise HearthError(Code.UNSUPPORTED, f"{name}: tensor {key!r} has the unknown dtype {dtype[:40]!r}.")
        size = exact_tensor_bytes(dtype, shape)
        if size is None or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= NUMBER_LIMIT:
            raise corrupt(f"{name} has a malformed entry for tensor {key!r}.")
        begin, end = offsets
        if end - begin != size:
            raise corrupt(f"{name}: tensor {key!r} of shape {shape} does not fit into {end - begin} bytes.")
        tensors[key] = HeaderTensor(dtype=dtype, shape=tuple(shape), offset=start + begin, bytes=size)
    in_order = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)))
    at = start
    for key, tensor in in_order.items():
        if tensor.offset != at:
            raise corrupt(f"{name} is malformed: tensor {key!r} begins at byte {tensor.offset} instead of {at}.")
        at += tensor.bytes
    if at > file_bytes:
        raise corrupt(f"{name} is truncated: its tensors need {at} bytes, the file has {file_bytes}.")
    if at < file_bytes:
        raise corrupt(f"{name} is malformed: {file_bytes - at} bytes follow its last tensor.")
    return in_order


# What decoding JSON of others raises, beside the errors that msgspec names.
FOREIGN_JSON_ERRORS: Final = (msgspec.MsgspecError, ValueError, RecursionError)


def refuse_duplicates(data: bytes) -> None:
    """Raise ValueError for JSON with an object that has a key twice: two readers may see different things in it.

    For JSON whose types have been checked: what else may stand in it is held in memory.
    """

    def check(pairs: list[tuple[str, object]]) -> None:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice")

    json.loads(data.decode(), object_pairs_hook=check)


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Size of a tensor in bytes, of a sound dtype and shape."""
    elements = 1
    for extent in shape:
        elements *= extent
    return -(-elements * DTYPES[dtype][0] // 8)


def exact_tensor_bytes(dtype: str, shape: Sequence[int]) -> int | None:
    """Size of a tensor in bytes; None if no tensor can have this shape, or its elements do not fill whole bytes."""
    if len(shape) > _DIMENSIONS_LIMIT:
        return None
    bits = DTYPES[dtype][0]
    for extent in shape:
        bits *= extent
        # Checked on the way: a product of long numbers is work that grows with its square.
        if extent < 0 or extent > NUMBER_LIMIT or bits > 8 * NUMBER_LIMIT:
            return None
    return None if bits % 8 else bits // 8


# -- layout ------------------------------------------------------------------------------------------------------------

_EMBEDDINGS: Final = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|wpe|embed_positions|embeddings?|project_in)(\.|_|$)"
)
_HEADS: Final = re.compile(r"(^|\.)(lm_head|embed_out|output|score|project_out)(\.|$)")
_LAYER: Final = re.compile(r"(?:^|\.)(\d+)\.")
_NUMBER: Final = re.compile(r"(\d+)")
# What runs before what inside a layer, by the first of these that occurs in the name after the layer's number.
_IN_LAYER: Final = (
    ("input_layernorm", "ln_1", "self_attn_layer_norm", "attention_norm", "input_norm"),
    ("attn", "attention", "self_attn", "mixer", "conv"),
    ("post_attention_layernorm", "ln_2", "pre_feedforward", "ffn_norm"),
    ("mlp", "fc", "dense", "block_sparse_moe", "experts", "feed_forward", "ffn"),
)


def _execution_key(name: str) -> tuple[int, int, int, tuple[int | str, ...]]:
    # A feed-forward network that counts its matrices runs 1 and 3 (gate and up) before 2 (down); side by side the two
    # are one matrix to a worker.
    in_time = name.replace(".w2.", ".w4.")
    natural = tuple(int(part) if index % 2 else part for index, part in enumerate(_NUMBER.split(in_time)))
    layer = _LAYER.search(name)
    if layer is not None:
        rest = name[layer.end() :]
        rank = len(_IN_LAYER)
        for index, words in enumerate(_IN_LAYER):
            if any(rest.startswith(word) or f".{word}" in rest for word in words):
                rank = index
                break
        return (1, int(layer.group(1)), rank, natural)
    if _EMBEDDINGS.search(name):
        return (0, 0, 0, natural)
    if _HEADS.search(name):
        return (3, 0, 0, natural)
    return (2, 0, 0, natural)


def execution_order(names: Iterable[str]) -> list[str]:
    """Tensor names in the order in which a forward pass needs them: embedding, layer 0, 1, …, final norm, head."""
    return sorted(names, key=_execution_key)


def head_alias(names: Iterable[str]) -> tuple[str, str] | None:
    """(head, word embedding) if the tensors have exactly one of each under names that can be tied."""
    heads = [name for name in names if _is_head(name)]
    words = [name for name in names if is_word_embedding(name)]
    return (heads[0], words[0]) if len(heads) == 1 and len(words) == 1 else None


def _is_head(name: str) -> bool:
    return name in ("lm_head.weight", "embed_out.weight", "output.weight") or name.endswith(".lm_head.weight")


def is_word_embedding(name: str) -> bool:
    """Whether this tensor holds one row per token of the vocabulary."""
    return re.search(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$", name) is not None


def _lowest_bit(size_bytes: int) -> int:
    return size_bytes & -size_bytes if size_bytes else ALIGNMENT_BYTES


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorEntry]]:
    """Place tensors (name → dtype, shape) in one safetensors file.

    Returns the head of the file (length, JSON, padding: its size is a multiple of `PAGE_BYTES`) and the entries in file
    order. Tensors lie in execution order without holes; those whose size is no multiple of 64 bytes go last, by
    falling power of two of their size, so that every tensor lies at a multiple of its element size.
    """
    order = execution_order(tensors)
    sizes = {name: tensor_bytes(*tensors[name]) for name in order}
    even = [name for name in order if sizes[name] % ALIGNMENT_BYTES == 0]
    odd = sorted((name for name in order if sizes[name] % ALIGNMENT_BYTES), key=lambda name: -_lowest_bit(sizes[name]))
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in (*even, *odd):
        dtype, shape = tensors[name]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + sizes[name]]}
        at += sizes[name]
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    head_bytes = padded_bytes(8 + len(text))
    if head_bytes - 8 > HEADER_LIMIT_BYTES:
        raise HearthError(Code.UNSUPPORTED, f"{len(tensors)} tensors are too many for one safetensors file.")
    head = (head_bytes - 8).to_bytes(8, "little") + text.ljust(head_bytes - 8, b" ")
    entries: dict[str, TensorEntry] = {}
    at = head_bytes
    for name in (*even, *odd):
        dtype, shape = tensors[name]
        entries[name] = TensorEntry(file=0, offset=at, bytes=sizes[name], dtype=dtype, shape=shape)
        at += sizes[name]
    return head, entries


# -- chunks and ids ----------------------------------------------------------------------------------------------------


def chunk_count(image_bytes: int, chunk_bytes: int) -> int:
    """Number of chunks of an image."""
    return -(-image_bytes // chunk_bytes)


def digest_of(small_files: Mapping[str, str]) -> str:
    """One SHA-256 over the names and SHA-256 of the small files."""
    lines = "".join(f"{name}\n{digest}\n" for name, digest in sorted(small_files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def checkpoint_id(
    *, head: bytes, tied: Mapping[str, str], chunk_bytes: int, chunks: Sequence[str], config_digest: str
) -> str:
    """The id: a hash of everything that makes two checkpoints the same, wherever and whenever they were imported."""
    digest = hashlib.sha256()
    for part in (f"hearth {FORMAT_VERSION} {chunk_bytes}", json.dumps(sorted(tied.items())), *chunks, config_digest):
        digest.update(part.encode() + b"\n")
    digest.update(head)
    return digest.hexdigest()[:32]


def is_file_name(name: str) -> bool:
    """Whether this names a file of a directory, neither hidden nor anywhere else."""
    return _FILE_NAME.fullmatch(name) is not None


def validate(manifest: Manifest, sizes: Mapping[str, int]) -> None:
    """Is this manifest sound, and do the files (name → bytes) have the sizes that it says?

    Raises `checkpoint_corrupt` with the first fault; checksums are verified by reading. What passes can be used
    without a further look: names stay in their directory, and no number leads outside of a file.
    """

    def fault(message: str) -> HearthError:
        return HearthError(Code.CHECKPOINT_CORRUPT, message)

    if manifest.format_version != FORMAT_VERSION:
        raise HearthError(Code.UNSUPPORTED, f"The manifest has format version {manifest.format_version}.")
    _validate_facts(manifest)
    if not 0 < manifest.chunk_bytes <= CHUNK_LIMIT_BYTES or manifest.chunk_bytes % PAGE_BYTES:
        raise fault(f"The manifest's chunk size {manifest.chunk_bytes} is no multiple of {PAGE_BYTES} up to 256 MiB.")
    if not manifest.files:
        raise fault("The manifest names no weight files.")
    names: set[str] = {MANIFEST_NAME}
    for file in manifest.files:
        if not is_file_name(file.name) or file.name in names:
            raise fault(f"The manifest names the file {file.name!r}.")
        names.add(file.name)
        if not 0 < file.bytes <= NUMBER_LIMIT or sizes.get(file.name) != file.bytes:
            raise fault(f"{file.name} has {sizes.get(file.name)} bytes instead of {file.bytes}.")
    for name, digest in manifest.small_files.items():
        if not is_file_name(name) or name in names:
            raise fault(f"The manifest names the file {name!r}.")
        if not _SHA256.fullmatch(digest):
            raise fault(f"The manifest's SHA-256 of {name} is malformed.")
        if name not in sizes:
            raise fault(f"{name} is missing.")
    if manifest.config_digest != digest_of(manifest.small_files):
        raise fault("The manifest's digest of the small files is not theirs.")
    if len(manifest.chunks) != chunk_count(manifest.image_bytes(), manifest.chunk_bytes):
        raise fault("The manifest's table of chunks does not cover the checkpoint.")
    if not all(map(_CHECKSUM.fullmatch, manifest.chunks)):
        raise fault("The manifest's table of chunks has a malformed checksum.")
    _validate_tensors(manifest)


def _validate_facts(manifest: Manifest) -> None:
    facts = manifest.checkpoint
    if not _ID.fullmatch(facts.checkpoint_id):
        raise HearthError(Code.CHECKPOINT_CORRUPT, "The manifest's checkpoint id is malformed.")
    numbers = (
        facts.weight_bytes, facts.parameters, facts.max_context_tokens, facts.kv_bytes_per_token, facts.vocab_tokens,
    )  # fmt: skip
    if not all(0 <= number <= NUMBER_LIMIT for number in numbers):
        raise HearthError(Code.CHECKPOINT_CORRUPT, "The manifest's facts about the checkpoint are no possible numbers.")
    texts = [facts.architecture, facts.dtype, manifest.revision or "-"]
    if manifest.source is not None:
        texts += [manifest.source.url, manifest.source.revision or "-", manifest.source.dtype or "-"]
    if not all(_LONG_TEXT.fullmatch(text) for text in texts):
        raise HearthError(Code.CHECKPOINT_CORRUPT, "The manifest's facts about the checkpoint are no text.")


def _validate_tensors(manifest: Manifest) -> None:
    """Tensors lie in their files as the safetensors format wants it: in order, after a header, without overlaps, holes
    or anything behind them; and at multiples of their elements."""

    def fault(message: str) -> HearthError:
        return HearthError(Code.CHECKPOINT_CORRUPT, message)

    file, at, weight_bytes = -1, 0, 0
    for name, tensor in manifest.tensors.items():
        sound = _TEXT.fullmatch(name) and tensor.dtype in DTYPES and 0 <= tensor.file < len(manifest.files)
        if not sound or tensor.bytes != exact_tensor_bytes(tensor.dtype, tensor.shape):
            raise fault(f"The manifest's entry of tensor {name!r} is malformed.")
        if not 0 <= tensor.offset <= manifest.files[tensor.file].bytes - tensor.bytes:
            raise fault(f"Tensor {name!r} lies outside of its file.")
        if tensor.file != file:
            if tensor.file != file + 1 or (file >= 0 and at != manifest.files[file].bytes):
                raise fault(f"The tensors before {name!r} do not fill their files.")
            if not 10 <= tensor.offset <= 8 + HEADER_LIMIT_BYTES:
                raise fault(f"The first tensor {name!r} of a file begins at byte {tensor.offset}.")
            file, at = tensor.file, tensor.offset
        if tensor.offset != at:
            raise fault(f"Tensor {name!r} begins at byte {tensor.offset} instead of {at}.")
        if tensor.offset % element_bytes(tensor.dtype):
            raise fault(f"Tensor {name!r} does not lie at a multiple of its elements.")
        at += tensor.bytes
        weight_bytes += tensor.bytes
    if file != len(manifest.files) - 1 or at != manifest.files[file].bytes:
        raise fault("The tensors do not fill their files.")
    if weight_bytes != manifest.checkpoint.weight_bytes:
        raise fault(f"The tensors have {weight_bytes} bytes and not {manifest.checkpoint.weight_bytes}.")
    for alias, name in manifest.tied.items():
        if not _TEXT.fullmatch(alias) or alias in manifest.tensors or name not in manifest.tensors:
            raise fault(f"The manifest ties {alias!r} to {name!r}, which cannot be.")


def element_bytes(dtype: str) -> int:
    """Bytes at a multiple of which elements of this dtype lie: their size, 1 for those of less than a byte."""
    return max(1, DTYPES[dtype][0] // 8)


def decode_stored(data: bytes) -> Manifest:
    """The manifest in these bytes. Raises `checkpoint_corrupt`; a newer format version is `unsupported`."""
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest has more than {MANIFEST_LIMIT_BYTES} bytes.")
    try:
        return msgspec.json.decode(data, type=Manifest)
    except FOREIGN_JSON_ERRORS as error:
        raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest is malformed: {error}.") from error


def validate_heads(manifest: Manifest, heads: Sequence[bytes]) -> None:
    """Are these (length and JSON header of every weight file) the heads of this manifest, down to its id?

    Raises `checkpoint_corrupt`. A manifest that passes, and whose chunks and small files have their checksums, is the
    one that was written when this checkpoint was made: a table of tensors that lies is noticed here.
    """
    found: dict[str, TensorEntry] = {}
    for number, (file, head) in enumerate(zip(manifest.files, heads, strict=True)):
        try:
            header_bytes(head[:8], file.bytes, file.name)
            table = parse_header(head[8:], file.bytes, file.name)
        except HearthError as error:
            raise HearthError(Code.CHECKPOINT_CORRUPT, error.failure.message) from error
        for name, tensor in table.items():
            found[name] = TensorEntry(
                file=number, offset=tensor.offset, bytes=tensor.bytes, dtype=tensor.dtype, shape=tensor.shape
            )
    if found != manifest.tensors:
        raise HearthError(Code.CHECKPOINT_CORRUPT, "The manifest's table of tensors is not that of the weight files.")
    id = checkpoint_id(
        head=b"".join(heads),
        tied=manifest.tied,
        chunk_bytes=manifest.chunk_bytes,
        chunks=manifest.chunks,
        config_digest=manifest.config_digest,
    )
    if id != manifest.checkpoint.checkpoint_id:
        raise HearthError(
            Code.CHECKPOINT_CORRUPT,
            f"The manifest calls itself {manifest.checkpoint.checkpoint_id}, but its content is {id}.",
        )


# -- read plans --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FilePiece:
    """A read: `length` bytes of file `file` from byte `offset`, to byte `at` of the chunk. Offsets are whole pages.

    `data_bytes` of them exist; what is left up to `length` is the padding of the file's last page.
    """

    file: int
    offset: int
    length: int
    data_bytes: int
    at: int


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """Everything about reading one chunk: where it is on disk, where it goes in the segment, and its checksum."""

    index: int
    length: int
    checksum: str
    pieces: tuple[FilePiece, ...]
    targets: tuple[Extent, ...]


def plan_reads(manifest: Manifest, extents: Sequence[Extent]) -> list[ChunkRead]:
    """The reads that bring a checkpoint's image into these extents of the segment, in the order of the image.

    The extents together may be longer than the image; raises ValueError if they are shorter.
    """
    image_bytes = manifest.image_bytes()
    if sum(extent.length for extent in extents) < image_bytes:
        raise ValueError("the extents are too short for the image")
    plan: list[ChunkRead] = []
    for index, checksum in enumerate(manifest.chunks):
        pieces = tuple(chunk_pieces(manifest, index))
        length = sum(piece.length for piece in pieces)
        begin = index * manifest.chunk_bytes
        targets = tuple(slice_extents(extents, begin, begin + length))
        plan.append(ChunkRead(index=index, length=length, checksum=checksum, pieces=pieces, targets=targets))
    return plan


def chunk_pieces(manifest: Manifest, index: int) -> Iterator[FilePiece]:
    """The reads that make one chunk of the image, in its order; together they are as long as the chunk."""
    return file_pieces(manifest.files, manifest.chunk_bytes, index)


def file_pieces(files: Iterable[WeightFile], chunk_bytes: int, index: int) -> Iterator[FilePiece]:
    """Where chunk `index` of the image that these files make lies in them."""
    begin, end = index * chunk_bytes, (index + 1) * chunk_bytes
    start = 0
    for number, file in enumerate(files):
        low, high = max(begin, start), min(end, start + padded_bytes(file.bytes))
        if low < high:
            offset = low - start
            data_bytes = max(0, min(high - start, file.bytes) - offset)
            yield FilePiece(file=number, offset=offset, length=high - low, data_bytes=data_bytes, at=low - begin)
        start += padded_bytes(file.bytes)


def slice_extents(extents: Sequence[Extent], begin: int, end: int) -> list[Extent]:
    """The part of these extents, taken one after another, that bytes `begin` to `end` occupy."""
    found: list[Extent] = []
    at = 0
    for extent in extents:
        low, high = max(begin, at), min(end, at + extent.length)
        if low < high:
            found.append(Extent(offset=extent.offset + low - at, length=high - low))
        at += extent.length
    return found


def trim_extents(extents: Sequence[Extent], length: int) -> tuple[Extent, ...]:
    """The first `length` bytes of these extents: what a lease shows of the chunks that were allocated."""
    return tuple(slice_extents(extents, 0, length))
