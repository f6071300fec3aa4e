"""The manifest: what `hearth.json` says about a stored checkpoint. Store writes it; store and worker read it.

A checkpoint's *image* is the concatenation of its weight files, each padded with zeros to a multiple of `PAGE_BYTES`.
The image is what lies in the extents of a lease, one after another, and what the chunk table covers. A tensor lies at
`manifest.starts()[tensor.file] + tensor.offset` in the image.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shared.contracts.residency import Checkpoint, Source

MANIFEST_NAME: Final = "hearth.json"
FORMAT_VERSION: Final = 1
PAGE_BYTES: Final = 4096
CHUNK_BYTES: Final = 16 * 1024 * 1024


def padded_bytes(size_bytes: int) -> int:
    """`size_bytes` rounded up to whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


class WeightFile(msgspec.Struct, frozen=True, kw_only=True):
    """A safetensors file of the checkpoint: its name in the directory and its exact size, header included."""

    name: str
    bytes: int


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tensor lies: index of its file, absolute byte offset in that file, size.

    `dtype` is safetensors' name ("BF16", "F32", "F16", "I64", "F8_E4M3", …), `shape` in elements, row-major.
    """

    file: int
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that is known about a stored checkpoint.

    `tensors` are in the order in which they lie in the files. `tied` maps a parameter's name to the tensor that it
    shares (stored once, under one name). `chunks` holds one xxh3_64 (16 hex digits) per `chunk_bytes` of the image; the
    last chunk is as long as what is left. `small_files` maps every other file of the checkpoint (config.json,
    tokenizer, …) to its SHA-256 (hex), `config_digest` is one SHA-256 over all of them. `source` is what was asked for
    when it was imported, `revision` what that was then (a commit of the hub, a fingerprint of a directory).
    """

    format_version: int
    checkpoint: Checkpoint
    chunk_bytes: int
    files: tuple[WeightFile, ...]
    tensors: dict[str, TensorEntry]
    chunks: tuple[str, ...]
    config_digest: str
    small_files: dict[str, str] = {}
    tied: dict[str, str] = {}
    source: Source | None = None
    revision: str = ""

    def starts(self) -> tuple[int, ...]:
        """Byte offset of each weight file in the image."""
        starts: list[int] = []
        at = 0
        for file in self.files:
            starts.append(at)
            at += padded_bytes(file.bytes)
        return tuple(starts)

    def image_bytes(self) -> int:
        """Size of the image: all weight files, each padded to whole pages."""
        return sum(padded_bytes(file.bytes) for file in self.files)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of `hearth.json`: indented JSON, for people too."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """The manifest in these bytes, types checked. Raises `ValueError` (msgspec's errors) with the path of the fault."""
    return msgspec.json.decode(data, type=Manifest)


__all__ = [
    "CHUNK_BYTES", "FORMAT_VERSION", "MANIFEST_NAME", "PAGE_BYTES", "Checkpoint", "Manifest", "Source", "TensorEntry",
    "WeightFile", "decode_manifest", "encode_manifest", "padded_bytes",
]  # fmt: skip
