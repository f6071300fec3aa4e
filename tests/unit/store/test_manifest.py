"""The checkpoint format: headers, layout, ids, validation, read plans."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.manifest import (
    ALIGNMENT_BYTES,
    DTYPES,
    checkpoint_id,
    decode_stored,
    digest_of,
    exact_tensor_bytes,
    execution_order,
    head_alias,
    header_bytes,
    layout,
    parse_header,
    plan_reads,
    slice_extents,
    tensor_bytes,
    trim_extents,
    validate,
)
from shared.contracts.manifest import (
    PAGE_BYTES,
    Checkpoint,
    Manifest,
    TensorEntry,
    WeightFile,
    decode_manifest,
    encode_manifest,
)
from shared.contracts.residency import Extent
from shared.errors import Code, HearthError
from tests.unit.store.sources import LLAMA, safetensors

CHECKPOINT = Checkpoint(
    checkpoint_id="0" * 32,
    architecture="LlamaForCausalLM",
    weight_bytes=8,
    parameters=25,
    dtype="float32",
    max_context_tokens=128,
    kv_bytes_per_token=64,
    vocab_tokens=32,
    has_chat_template=True,
)
SMALL = {"config.json": "f" * 64}


def manifest(*file_bytes: int, chunk_bytes: int = 2 * PAGE_BYTES, **changes: Any) -> Manifest:
    files = tuple(WeightFile(name=f"{number}.safetensors", bytes=size) for number, size in enumerate(file_bytes))
    bare = Manifest(
        format_version=1,
        checkpoint=CHECKPOINT,
        chunk_bytes=chunk_bytes,
        files=files,
        tensors={
            str(number): TensorEntry(file=number, offset=104, bytes=size - 104, dtype="I8", shape=(size - 104,))
            for number, size in enumerate(file_bytes)
        },
        chunks=(),
        config_digest=digest_of({}),
    )
    facts = msgspec.structs.replace(CHECKPOINT, weight_bytes=sum(tensor.bytes for tensor in bare.tensors.values()))
    bare = msgspec.structs.replace(bare, checkpoint=facts)
    chunks = tuple(f"{number:016x}" for number in range(-(-bare.image_bytes() // chunk_bytes)))
    return msgspec.structs.replace(bare, chunks=chunks, **changes)


# -- headers


def parse(data: bytes) -> dict[str, Any]:
    length = header_bytes(data[:8], len(data), "x")
    return parse_header(data[8 : 8 + length], len(data), "x")


def test_header_of_a_sound_file() -> None:
    data, contents = safetensors(LLAMA)
    for name, tensor in parse(data).items():
        assert data[tensor.offset : tensor.offset + tensor.bytes] == contents[name]


def _with_header(table: object, data_bytes: int = 8) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def _entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"abc", Code.INVALID_CHECKPOINT, "truncated"),
        ((2**40).to_bytes(8, "little") + b"{}", Code.INVALID_CHECKPOINT, "claims"),
        ((500).to_bytes(8, "little") + b"{}", Code.INVALID_CHECKPOINT, "truncated"),
        (_with_header(b"{nope"), Code.INVALID_CHECKPOINT, "malformed"),
        (_with_header(b"[" * 100_000), Code.INVALID_CHECKPOINT, "malformed"),
        (_with_header([]), Code.INVALID_CHECKPOINT, "malformed"),
        (_with_header({"a": {"dtype": "F32"}}), Code.INVALID_CHECKPOINT, "entry"),
        (_with_header({"a": _entry("F31")}), Code.UNSUPPORTED, "F31"),
        (_with_header({"a": {**_entry(), "dtype": ["F32"]}}), Code.INVALID_CHECKPOINT, "malformed"),
        (_with_header({"\ud800": _entry()}), Code.INVALID_CHECKPOINT, "malformed"),
        (_with_header({"a": _entry(shape=[-2])}), Code.INVALID_CHECKPOINT, "entry"),
        (_with_header({"a": _entry(shape=[2.0])}), Code.INVALID_CHECKPOINT, "malformed"),
        (_with_header({"a": _entry(shape=[3])}), Code.INVALID_CHECKPOINT, "fit"),
        (_with_header({"a": _entry(offsets=[4, 12])}, 12), Code.INVALID_CHECKPOINT, "begins"),
        (_with_header({"a": _entry(), "b": _entry(offsets=[4, 12])}, 12), Code.INVALID_CHECKPOINT, "begins"),
        (_with_header({"a": _entry()}, 7), Code.INVALID_CHECKPOINT, "truncated"),
        (_with_header({"a": _entry()}, 9), Code.INVALID_CHECKPOINT, "follow"),
    ],
)
def test_unsound_headers_are_refused(data: bytes, code: Code, words: str) -> None:
    with pytest.raises(HearthError, match=words) as refused:
        parse(data)
    assert refused.value.failure.code is code


# -- layout


def test_execution_order() -> None:
    names = [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.10.self_attn.q_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.post_attention_layernorm.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_tokens.weight",
    ]
    assert execution_order(names) == names[::-1]
    gpt2 = ["transformer.ln_f.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.ln_2.weight",
            "transformer.h.0.attn.c_attn.weight", "transformer.h.0.ln_1.bias", "transformer.wte.weight"]  # fmt: skip
    assert execution_order(gpt2) == gpt2[::-1]


_SHAPES = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(["F32", "BF16", "I64", "I8"]), st.lists(st.integers(0, 9), max_size=3).map(tuple)),
    max_size=12,
)


@given(_SHAPES)
def test_layout_is_sound_safetensors_and_aligned(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    head, entries = layout(tensors)
    assert len(head) % PAGE_BYTES == 0
    size = len(head) + sum(entry.bytes for entry in entries.values())
    parsed = parse(head + bytes(size - len(head)))
    assert parsed.keys() == tensors.keys()
    for name, entry in entries.items():
        assert (parsed[name].offset, parsed[name].bytes, parsed[name].dtype) == (entry.offset, entry.bytes, entry.dtype)
        assert entry.offset % (DTYPES[entry.dtype][0] // 8) == 0, "a view of this dtype would not be aligned"
        if entry.bytes % ALIGNMENT_BYTES == 0:
            assert entry.offset % ALIGNMENT_BYTES == 0


def test_head_alias_needs_one_head_and_one_word_embedding() -> None:
    assert head_alias(LLAMA) == ("lm_head.weight", "model.embed_tokens.weight")
    assert head_alias([*LLAMA, "decoder.embed_tokens.weight"]) is None
    assert head_alias(["model.embed_tokens.weight"]) is None


def test_the_id_depends_on_everything_that_makes_a_checkpoint() -> None:
    sound: dict[str, Any] = {
        "head": b"h",
        "tied": {"a": "b"},
        "chunk_bytes": 4096,
        "chunks": ["0", "1"],
        "config_digest": "d",
    }
    changes: list[dict[str, Any]] = [
        {"head": b"x"}, {"tied": {}}, {"chunk_bytes": 8192}, {"chunks": ["0", "2"]}, {"config_digest": "e"},
    ]  # fmt: skip
    ids = {checkpoint_id(**{**sound, **change}) for change in [{}, *changes]}
    assert len(ids) == 6
    assert checkpoint_id(**sound) in ids
    assert digest_of({"a": "1", "b": "2"}) == digest_of({"b": "2", "a": "1"}) != digest_of({"a": "2", "b": "1"})


# -- validation


def test_manifest_survives_its_json() -> None:
    one = manifest(5000, 9000, tied={"x": "a"}, small_files={"config.json": "ff"})
    assert decode_manifest(encode_manifest(one)) == one


@pytest.mark.parametrize(
    ("one", "sizes", "words"),
    [
        (manifest(5000), {}, "None bytes"),
        (manifest(5000), {"0.safetensors": 4999}, "4999 bytes"),
        (manifest(5000, small_files=SMALL, config_digest=digest_of(SMALL)), {"0.safetensors": 5000}, "is missing"),
        (msgspec.structs.replace(manifest(5000), chunks=()), {"0.safetensors": 5000}, "does not cover"),
        (manifest(5000, chunk_bytes=5000), {"0.safetensors": 5000}, "multiple"),
        (
            manifest(5000, tensors={"a": TensorEntry(file=0, offset=4999, bytes=8, dtype="F32", shape=(2,))}),
            {"0.safetensors": 5000},
            "outside",
        ),
        (
            manifest(5000, tensors={"a": TensorEntry(file=1, offset=0, bytes=8, dtype="F32", shape=(2,))}),
            {"0.safetensors": 5000},
            "malformed",
        ),
        (
            manifest(5000, checkpoint=msgspec.structs.replace(CHECKPOINT, checkpoint_id="../x")),
            {"0.safetensors": 5000},
            "id",
        ),
        (manifest(5000, files=(WeightFile(name="../x", bytes=5000),)), {"../x": 5000}, "names the file"),
    ],
)
def test_unsound_manifests_are_refused(one: Manifest, sizes: dict[str, int], words: str) -> None:
    with pytest.raises(HearthError, match=words) as refused:
        validate(one, sizes)
    assert refused.value.failure.code is Code.CHECKPOINT_CORRUPT


def test_sound_manifest_is_accepted_and_a_newer_one_is_not_called_corrupt() -> None:
    validate(manifest(5000), {"0.safetensors": 5000})
    with pytest.raises(HearthError) as refused:
        validate(manifest(5000, format_version=2), {"0.safetensors": 5000})
    assert refused.value.failure.code is Code.UNSUPPORTED
    with pytest.raises(HearthError, match=r"\$.format_version"):
        decode_stored(encode_manifest(manifest(5000)).replace(b'"format_version": 1', b'"format_version": "x"'))


# -- read plans


@given(
    st.lists(st.integers(1, 40_000), min_size=1, max_size=4),
    st.integers(1, 5).map(lambda pages: pages * PAGE_BYTES),
    st.randoms(use_true_random=False),
)
def test_a_plan_reads_every_byte_once_to_its_place(sizes: list[int], chunk_bytes: int, choose: Any) -> None:
    one = manifest(*sizes, chunk_bytes=chunk_bytes, tensors={})
    files = [choose.randbytes(size) for size in sizes]
    image = b"".join(data.ljust(-(-len(data) // PAGE_BYTES) * PAGE_BYTES, b"\0") for data in files)
    # Extents of one page each, scattered over a segment that is too large.
    pages = one.image_bytes() // PAGE_BYTES
    places = choose.sample(range(pages + 3), pages)
    extents = [Extent(offset=place * PAGE_BYTES, length=PAGE_BYTES) for place in places]
    segment = bytearray(b"?" * ((pages + 3) * PAGE_BYTES))
    plan = plan_reads(one, extents)
    assert [chunk.checksum for chunk in plan] == list(one.chunks)
    for chunk in plan:
        for piece in chunk.pieces:
            assert piece.offset % PAGE_BYTES == piece.length % PAGE_BYTES == 0
            data = files[piece.file][piece.offset : piece.offset + piece.data_bytes].ljust(piece.length, b"\0")
            for target in slice_extents(chunk.targets, piece.at, piece.at + piece.length):
                segment[target.offset : target.offset + target.length], data = (
                    data[: target.length],
                    data[target.length :],
                )
            assert not data
    assert b"".join(segment[e.offset : e.offset + e.length] for e in extents) == image


def test_extents_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError):
        plan_reads(manifest(5000), [Extent(offset=0, length=PAGE_BYTES)])
    extents = [Extent(offset=0, length=PAGE_BYTES), Extent(offset=8 * PAGE_BYTES, length=3 * PAGE_BYTES)]
    assert trim_extents(extents, 2 * PAGE_BYTES) == (
        Extent(offset=0, length=PAGE_BYTES),
        Extent(offset=8 * PAGE_BYTES, length=PAGE_BYTES),
    )


def test_elements_of_less_than_a_byte_must_fill_whole_bytes() -> None:
    assert exact_tensor_bytes("F4", (3,)) is None
    assert exact_tensor_bytes("F6_E2M3", (4, 2)) == 6
    assert exact_tensor_bytes("F4", (0,)) == 0
    assert exact_tensor_bytes("F32", (2**53, 2**53)) is None
    assert exact_tensor_bytes("F32", (1,) * 65) is None
    assert tensor_bytes("BF16", (3, 5)) == 30
    assert tensor_bytes("F32", ()) == 4
