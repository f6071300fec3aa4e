"""Headers, manifests, indices and configurations that somebody forged: always a typed error, never more than asked for.

Three promises, for whatever bytes come: nothing but `HearthError` is raised; no byte outside of a file is read; what is
accepted is accepted by the safetensors library too, and means the same to it.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.store.convert import ConversionOrigin, Plan, make_manifest, make_plan
from services.store.manifest import (
    FOREIGN_JSON_ERRORS,
    chunk_pieces,
    decode_stored,
    header_bytes,
    parse_header,
    refuse_duplicates,
    validate,
    validate_heads,
)
from services.store.model_config import config_with_dtype, has_chat_template, parse_config, weight_map_of
from services.store.source_model import SourceModel, open_model, read_head
from shared.contracts.manifest import Manifest, encode_manifest
from shared.contracts.residency import Source
from shared.errors import Code, HearthError
from tests.unit.store.sources import CONFIG, LLAMA
from tests.unit.store.sources import safetensors as make_file

CHUNK = 8192
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class MemoryTree:
    """Files in memory. To read past the end of one fails the test."""

    url = "memory"
    revision = "1"
    remote = False

    def __init__(self, files: dict[str, bytes], *, remote: bool = False) -> None:
        self.data = files
        self.files: Mapping[str, int] = {name: len(data) for name, data in files.items()}
        self.remote = remote

    def read(self, name: str, offset: int, into: memoryview) -> None:
        assert 0 <= offset <= offset + len(into) <= len(self.data[name]), "an over-read"
        into[:] = self.data[name][offset : offset + len(into)]

    def read_small(self, name: str, limit_bytes: int) -> bytes:
        assert len(self.data[name]) <= limit_bytes
        return self.data[name]

    def close(self) -> None:
        pass


def tree_of(weights: bytes, **files: bytes) -> MemoryTree:
    return MemoryTree({WEIGHTS: weights, "config.json": json.dumps(CONFIG).encode(), **files})


def headed(table: object, data_bytes: int = 8) -> bytes:
    """A safetensors file with this header (JSON, or raw bytes) and so much data."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def parsed(data: bytes) -> dict[str, Any]:
    length = header_bytes(data[:8], len(data), WEIGHTS)
    return parse_header(data[8 : 8 + length], len(data), WEIGHTS)


def library(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the safetensors library finds in a file; None if it refuses it."""
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in found}


def refused(call: Callable[[], object], *codes: Code) -> bool:
    """Whether a call is refused; then with one of these codes, and a sentence that can go over the bus."""
    try:
        call()
    except HearthError as error:
        failure = error.failure
    else:
        return False
    assert failure.code in codes
    assert len(failure.message.encode()) < 20_000
    return True


def agrees(data: bytes) -> bool:
    """Whether we accept a file; then the library must, and see the same."""
    if refused(lambda: parsed(data), Code.INVALID_CHECKPOINT, Code.UNSUPPORTED):
        return False
    ours = parsed(data)
    theirs = library(data)
    assert theirs is not None
    assert {
        name: (tensor.dtype, list(tensor.shape), data[tensor.offset : tensor.offset + tensor.bytes])
        for name, tensor in ours.items()
    } == theirs
    return True


# -- attacks by hand

DEEP = b'{"a":' * 100_000
ENTRY = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
ATTACKS: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "no header": bytes(8),
    "a header of 2**63": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 2**64 - 1": b"\xff" * 8 + b"{}",
    "a header of 100 MB that is not there": (100_000_000).to_bytes(8, "little") + b"{}",
    "a header one byte too long": (3).to_bytes(8, "little") + b"{}",
    "no UTF-8": headed(b'{"\xff": 1}'),
    "UTF-16": headed('{"a": {}}'.encode("utf-16")),
    "a byte order mark": headed(b'\xef\xbb\xbf{}', 0),
    "deep nesting": headed(DEEP),
    "deep lists": headed(b'{"a":{"dtype":"F32","shape":' + b"[" * 100_000),
    "a list": headed(b"[1]"),
    "a number": headed(b"1"),
    "two documents": headed(b"{}{}", 0),
    "a comment": headed(b"{}//x", 0),
    "NaN": headed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "infinity": headed(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}'),
    "a number of a megabyte": headed(b'{"a":{"dtype":"F32","shape":[' + b"1" * 2**20 + b'],"data_offsets":[0,8]}}'),
    "a million dimensions": headed({"a": entry(shape=[2**40] * 10**5)}),
    "overlapping": headed({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
    "the same bytes twice": headed({"a": entry(), "b": entry()}),
    "a hole": headed({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    "a hole at the beginning": headed({"a": entry(offsets=(8, 16))}, 16),
    "bytes behind": headed({"a": entry()}, 16),
    "bytes missing": headed({"a": entry()}, 7),
    "backwards": headed({"a": entry(shape=[0], offsets=(8, 0))}),
    "negative offsets": headed({"a": entry(offsets=(-8, 0))}),
    "a negative shape": headed({"a": entry(shape=[-1, -2])}),
    "an overflowing shape": headed({"a": entry(shape=[2**32, 2**32], offsets=(0, 0))}, 0),
    "an overflowing shape of nothing": headed({"a": entry(shape=[2**63, 2, 0], offsets=(0, 0))}, 0),
    "offsets of 2**63": headed({"a": entry(offsets=(2**63, 2**63 + 8))}),
    "offsets of 2**64": headed({"a": entry(offsets=(2**64, 2**64 + 8))}),
    "a bool as a number": headed({"a": entry(shape=[True, 2])}),
    "a float as a number": headed({"a": entry(shape=[2.0])}),
    "text as a number": headed({"a": entry(shape=["2"])}),
    "three offsets": headed({"a": entry(offsets=(0, 8, 8))}),
    "no offsets": headed({"a": {"dtype": "F32", "shape": [2]}}),
    "an unknown dtype": headed({"a": entry("F31")}),
    "a dtype of a megabyte": headed({"a": entry("F" * 2**20)}),
    "half of a packed byte": headed({"a": entry("F4", [3], (0, 2))}, 2),
    "five of a byte of six bits": headed({"a": entry("F6_E2M3", [5], (0, 4))}, 4),
    "a name twice": headed(b'{"a":%s,"a":%s}' % (ENTRY, ENTRY)),
    "a name twice, spelt differently": headed(b'{"a":%s,"\\u0061":%s}' % (ENTRY, ENTRY)),
    "a key of an entry twice": headed(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
    "half a character": headed(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "a name of a megabyte": headed({"a" * 2**20: entry()}),
    "no name": headed({"": entry()}),
    "metadata of numbers": headed({"__metadata__": {"a": 1}, "a": entry()}),
    "metadata of lists": headed({"__metadata__": {"a": [1]}, "a": entry()}),
    "metadata that is a tensor": headed({"__metadata__": entry()}),
    "a zip file": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x04\x95" + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_forged_headers_are_refused(attack: str) -> None:
    assert not agrees(ATTACKS[attack])
    with pytest.raises(HearthError):
        open_model(tree_of(ATTACKS[attack]))
    with pytest.raises(HearthError):
        open_model(MemoryTree(tree_of(ATTACKS[attack]).data, remote=True))


def test_sound_headers_are_accepted() -> None:
    assert agrees(make_file(LLAMA)[0])
    assert agrees(headed({"a": entry()}))
    assert agrees(headed({"a": entry(shape=[0], offsets=(0, 0)), "b": entry()}))
    assert agrees(headed({"a": entry("F4", [4], (0, 2))}, 2))
    assert agrees(headed(json.dumps({"a": entry()}).encode() + b"   "))


# -- random damage

EVIL = st.sampled_from(
    [None, True, False, -1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, 1e308, "", "a", "../../etc/passwd",
     "/etc/passwd", "a/b", "a\\b", "a\0b", ".arriving", "hearth.json", "\ud800", "F32", [], {}, [[]], {"a": {}},
     "x" * 5000, [2**62] * 70]
).map(copy.deepcopy)  # fmt: skip


def paths(table: Any) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document are."""
    found: list[tuple[Any, ...]] = []
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in items:
        found.append((key,))
        found.extend((key, *rest) for rest in paths(value))
    return found


def damaged(draw: Callable[..., Any], table: Any) -> Any:
    """A copy of a JSON document with one to three values replaced, removed or renamed."""
    table = json.loads(json.dumps(table))
    for _ in range(draw(st.integers(1, 3))):
        places = paths(table)
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        inner = table
        for key in way:
            inner = inner[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"])):
            case "replace":
                inner[last] = draw(EVIL)
            case "remove":
                del inner[last]
            case "rename" if isinstance(inner, dict):
                inner[str(draw(EVIL))] = inner.pop(last)
            case _ if isinstance(inner, list):
                inner.append(draw(EVIL))
            case _:
                inner[str(draw(EVIL))] = draw(EVIL)
    return table


MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SMALL = {"a.weight": ("F32", (3, 2)), "b.weight": ("BF16", (2, 3)), "c": ("I8", (5,)), "empty": ("F32", (0,))}


@MANY
@given(st.data())
def test_damaged_tables(data: Any) -> None:
    whole, _ = make_file(SMALL)
    length = int.from_bytes(whole[:8], "little")
    table = damaged(data.draw, json.loads(whole[8 : 8 + length]))
    agrees(headed(table, len(whole) - 8 - length))


@MANY
@given(st.data())
def test_damaged_bytes(data: Any) -> None:
    whole = bytearray(make_file(SMALL)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "remove", "head"])):
            case "flip":
                whole[at] = data.draw(st.integers(0, 255))
            case "cut":
                del whole[at + 1 :]
            case "insert":
                whole[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del whole[at + 1 : at + 5]
            case "head":
                whole[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    agrees(bytes(whole))


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    agrees(data)
    agrees(headed(data))


# -- whole sources


@MANY
@given(st.data())
def test_damaged_indices_and_configurations(data: Any) -> None:
    files = {f"model-{number}.safetensors": make_file({name: SMALL[name]})[0] for number, name in enumerate(SMALL)}
    weight_map = {name: f"model-{number}.safetensors" for number, name in enumerate(SMALL)}
    index: Any = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    config: Any = {**CONFIG, "text_config": {"num_key_value_heads": 1}, "rope_scaling": {"factor": 2.0}}
    if data.draw(st.booleans()):
        index = damaged(data.draw, index)
    else:
        config = damaged(data.draw, config)
    files |= {INDEX: json.dumps(index).encode(), "config.json": json.dumps(config).encode()}
    tree = MemoryTree(files, remote=data.draw(st.booleans()))
    if refused(lambda: described(tree), Code.INVALID_CHECKPOINT, Code.UNSUPPORTED):
        return
    model, plan, manifest = described(tree)
    assert set(model.tensors) <= set(SMALL)
    # What was accepted can be written down, and read again.
    again = decode_stored(encode_manifest(manifest))
    validate(again, {WEIGHTS: plan.file_bytes, "config.json": 1})


def described(tree: MemoryTree) -> tuple[SourceModel, Plan, Manifest]:
    """Everything that is known of a conversion but its checksums."""
    model = open_model(tree)
    plan = make_plan(tree, model, None, chunk_bytes=CHUNK)
    small = {"config.json": tree.data["config.json"]}
    sums = ["0" * 16] * -(-plan.image_bytes // CHUNK)
    source = Source(url="/m")
    return model, plan, make_manifest(model, plan, small, sums, source=source, revision="1", chunk_bytes=CHUNK)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b"[]", b"null", b"1" * 5000, DEEP, '{"a": 1}'.encode("utf-16"), b'{"architectures": 1}',
     b'{"architectures": [NaN], "vocab_size": NaN}', b'{"architectures": ["XForCausalLM"], "vocab_size": 1e999}',
     b'{"architectures": ["XForCausalLM"], "vocab_size": true}',
     b'{"architectures": ["\\ud800ForCausalLM"], "vocab_size": 1}',
     b'{"architectures": ["XForCausalLM"], "vocab_size": ' + b"9" * 4000 + b"}"],
)  # fmt: skip
def test_forged_configurations_are_refused(data: bytes) -> None:
    with pytest.raises(HearthError) as refused:
        parse_config(data)
    refused.value.failure.message.encode()
    with pytest.raises(HearthError):
        weight_map_of(data)


def test_numbers_of_a_configuration_that_no_model_has() -> None:
    huge = dict.fromkeys(("num_hidden_layers", "num_key_value_heads", "head_dim"), 2**39)
    with pytest.raises(HearthError, match="larger than any"):
        parse_config(json.dumps({**CONFIG, **huge}).encode())
    assert parse_config(json.dumps({**CONFIG, "max_position_embeddings": 10**300}).encode()).max_context_tokens is None


def test_a_configuration_that_is_too_deep_to_be_written_again() -> None:
    for times in (900, 5000, 100_000):
        text = json.dumps({**CONFIG, "x": 0}).replace('"x": 0', '"x": ' + '{"a":' * times + "1" + "}" * times)
        call = partial(lambda data: config_with_dtype(parse_config(data), "bfloat16"), text.encode())
        refused(call, Code.INVALID_CHECKPOINT)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", DEEP, b"[]"])
def test_forged_tokenizer_configurations(data: bytes) -> None:
    with pytest.raises(HearthError):
        has_chat_template({"tokenizer_config.json": data})


# -- manifests


def sound() -> tuple[Manifest, dict[str, bytes]]:
    """A checkpoint's manifest and files."""
    tree = tree_of(make_file(SMALL)[0])
    model = open_model(tree)
    plan = make_plan(tree, model, None, chunk_bytes=4096)
    origin = ConversionOrigin(tree, plan, chunk_bytes=4096)
    image = bytearray(plan.image_bytes)
    for at in range(0, len(image), 4096):
        origin.read(at // 4096, memoryview(image)[at : at + 4096])
    manifest = make_manifest(
        model, plan, {"config.json": tree.data["config.json"]}, ["0" * 16] * (len(image) // 4096),
        source=Source(url="/m"), revision="1", chunk_bytes=4096,
    )  # fmt: skip
    return manifest, {WEIGHTS: bytes(image[: plan.file_bytes]), "config.json": tree.data["config.json"]}


SOUND, FILES = sound()
SIZES = {name: len(data) for name, data in FILES.items()}


def checks(data: bytes, sizes: Mapping[str, int] = SIZES) -> bool:
    """Whether a manifest is accepted; then no number in it leads outside of a file."""
    if refused(lambda: validate(decode_stored(data), sizes), Code.CHECKPOINT_CORRUPT, Code.UNSUPPORTED):
        return False
    manifest = decode_stored(data)
    pieces = [piece for index in range(len(manifest.chunks)) for piece in chunk_pieces(manifest, index)]
    assert sum(piece.length for piece in pieces) == manifest.image_bytes()
    for piece in pieces:
        assert 0 <= piece.offset <= piece.offset + piece.data_bytes <= sizes[manifest.files[piece.file].name]
    for tensor in manifest.tensors.values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.bytes <= sizes[manifest.files[tensor.file].name]
    assert set(sizes) >= {file.name for file in manifest.files} | set(manifest.small_files)
    encode_manifest(manifest)
    return True


def test_the_sound_manifest_is_accepted() -> None:
    assert checks(encode_manifest(SOUND))
    validate_heads(SOUND, [read_head(MemoryTree(FILES), WEIGHTS)])


@MANY
@given(st.data())
def test_damaged_manifests(data: Any) -> None:
    table = damaged(data.draw, json.loads(encode_manifest(SOUND)))
    text = json.dumps(table).encode()
    if checks(text):
        # What only the heads can tell.
        head = read_head(MemoryTree(FILES), WEIGHTS)
        refused(lambda: validate_heads(decode_stored(text), [head]), Code.CHECKPOINT_CORRUPT)


@MANY
@given(st.data())
def test_manifests_with_damaged_bytes(data: Any) -> None:
    text = bytearray(encode_manifest(SOUND))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    checks(bytes(text))


@given(st.binary(max_size=200))
def test_manifests_of_arbitrary_bytes(data: bytes) -> None:
    assert not checks(data)


def changed(**changes: Any) -> bytes:
    """The sound manifest's JSON with the value at each path (`a__b`) replaced."""
    table = json.loads(encode_manifest(SOUND))
    for path, value in changes.items():
        *way, last = path.split("__")
        inner = table
        for key in way:
            inner = inner[int(key) if key.isdigit() else key]
        inner[int(last) if last.isdigit() else last] = value
    return json.dumps(table).encode()


TENSOR: dict[str, Any] = json.loads(encode_manifest(SOUND))["tensors"]
FORGED: dict[str, bytes] = {
    "nothing": b"",
    "deep nesting": DEEP,
    "no UTF-8": b'{"format_version": "\xff"}',
    "a bool as a version": changed(format_version=True),
    "a version of a float": changed(format_version=1.5),
    "no chunks": changed(chunks=[]),
    "a chunk too many": changed(chunks=[*SOUND.chunks, "0" * 16]),
    "a checksum that is none": changed(chunks=["x" * 16, *SOUND.chunks[1:]]),
    "a checksum in capitals": changed(chunks=["A" * 16, *SOUND.chunks[1:]]),
    "chunks of nothing": changed(chunk_bytes=0),
    "negative chunks": changed(chunk_bytes=-4096),
    "chunks of 2**62": changed(chunk_bytes=2**62),
    "chunks of 2**64": changed(chunk_bytes=2**64),
    "chunks of half a page": changed(chunk_bytes=2048),
    "no files": changed(files=[]),
    "a file twice": changed(files=[{"name": WEIGHTS, "bytes": SIZES[WEIGHTS]}] * 2),
    "a file elsewhere": changed(files__0__name="../model.safetensors"),
    "an absolute file": changed(files__0__name="/etc/passwd"),
    "the manifest as a weight file": changed(files__0__name="hearth.json"),
    "a hidden file": changed(files__0__name=".arriving"),
    "a negative file": changed(files__0__bytes=-1),
    "a file of 2**63": changed(files__0__bytes=2**63),
    "a file of 2**64": changed(files__0__bytes=2**64),
    "a small file elsewhere": changed(small_files={"../../config.json": "0" * 64}),
    "a small file with a NUL": changed(small_files={"a\0b": "0" * 64}),
    "a small file that is the journal": changed(small_files={".arriving": "0" * 64}),
    "a small file that is a weight file": changed(small_files={WEIGHTS: "0" * 64}),
    "a digest of other files": changed(config_digest="0" * 64),
    "a SHA-256 that is none": changed(small_files={"config.json": "ff"}),
    "an id that is a path": changed(checkpoint__checkpoint_id="../../x"),
    "an architecture of a megabyte": changed(checkpoint__architecture="x" * 2**20),
    "fewer bytes than there are": changed(checkpoint__weight_bytes=1),
    "negative parameters": changed(checkpoint__parameters=-1),
    "a context of 2**63": changed(checkpoint__max_context_tokens=2**63),
    "a tie to nothing": changed(tied={"x": "y"}),
    "a tie of a tensor": changed(tied={"a.weight": "b.weight"}),
    "no tensors": changed(tensors={}),
    "one tensor less": changed(tensors={name: t for name, t in TENSOR.items() if name != "c"}),
    "a tensor in no file": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "file": 1}}),
    "a tensor in file -1": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "file": -1}}),
    "a negative offset": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "offset": -4}}),
    "an offset of 2**63": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "offset": 2**63}}),
    "negative bytes": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "bytes": -5}}),
    "overlapping tensors": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "offset": TENSOR["c"]["offset"] - 4}}),
    "another order": changed(tensors=dict(reversed(TENSOR.items()))),
    "a negative shape": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "shape": [-5]}}),
    "a shape of a bool": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "shape": [True]}}),
    "a million dimensions": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "shape": [2**40] * 10**5}}),
    "an unknown dtype": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "dtype": "F31"}}),
    "another dtype": changed(tensors={**TENSOR, "c": {**TENSOR["c"], "dtype": "F64"}}),
    "a tensor inside of the header's length": changed(
        tensors={**TENSOR, "a.weight": {**TENSOR["a.weight"], "offset": 0}}
    ),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_forged_manifests_are_refused(forgery: str) -> None:
    assert not checks(FORGED[forgery], {**SIZES, "../model.safetensors": 1, "/etc/passwd": 1, ".arriving": 1})


def test_names_that_occur_twice_are_found_wherever_they_stand() -> None:
    refuse_duplicates(encode_manifest(SOUND))
    for data in (b'{"a":1,"a":1}', b'{"x":[{"a":1,"a":2}]}', b'{"a":1,"\\u0061":2}', b"\xff", DEEP):
        with pytest.raises(FOREIGN_JSON_ERRORS):
            refuse_duplicates(data)


def test_a_table_that_lies_about_its_files_is_found_by_their_heads() -> None:
    head = read_head(MemoryTree(FILES), WEIGHTS)
    for lie in (
        changed(tensors={**TENSOR, "a.weight": {**TENSOR["a.weight"], "shape": [2, 3]}}),
        changed(chunks=["1" * 16, *SOUND.chunks[1:]]),
        changed(tied={"x": "c"}),
        changed(checkpoint__checkpoint_id="0" * 32),
    ):
        assert checks(lie)
        with pytest.raises(HearthError) as refused:
            validate_heads(decode_stored(lie), [head])
        assert refused.value.failure.code is Code.CHECKPOINT_CORRUPT
    for cut in (b"", head[:4], head[:100], head + b" ", random.Random(0).randbytes(len(head))):
        with pytest.raises(HearthError) as refused:
            validate_heads(SOUND, [cut])
        assert refused.value.failure.code is Code.CHECKPOINT_CORRUPT
