"""Small images for the tests of what moves chunks: weight files of random bytes with a true manifest."""

from __future__ import annotations

import mmap
import random
from collections.abc import Sequence
from pathlib import Path

import xxhash

from shared.contracts.manifest import PAGE_BYTES, Checkpoint, Manifest, WeightFile, padded_bytes

CHECKPOINT = Checkpoint(
    checkpoint_id="0123456789abcdef" * 2,
    architecture="LlamaForCausalLM",
    weight_bytes=1,
    parameters=1,
    dtype="F32",
    max_context_tokens=128,
    kv_bytes_per_token=1,
    vocab_tokens=64,
    has_chat_template=False,
)


def page_memory(size_bytes: int) -> memoryview:
    """Memory at a page boundary, as direct I/O needs it."""
    return memoryview(mmap.mmap(-1, max(PAGE_BYTES, size_bytes)))[:size_bytes]


def make_image(
    directory: Path, sizes: Sequence[int], *, chunk_bytes: int, seed: int = 0, write: bool = True
) -> tuple[Manifest, bytes]:
    """Weight files of these sizes in `directory` (unless not to be written), their manifest, and the image."""
    choose = random.Random(seed)
    files: list[WeightFile] = []
    image = b""
    for number, size in enumerate(sizes):
        data = choose.randbytes(size)
        if write:
            (directory / f"model-{number}.safetensors").write_bytes(data)
        files.append(WeightFile(name=f"model-{number}.safetensors", bytes=size))
        image += data.ljust(padded_bytes(size), b"\0")
    manifest = Manifest(
        format_version=1,
        checkpoint=CHECKPOINT,
        chunk_bytes=chunk_bytes,
        files=tuple(files),
        tensors={},
        chunks=tuple(
            xxhash.xxh3_64_hexdigest(image[at : at + chunk_bytes]) for at in range(0, len(image), chunk_bytes)
        ),
        config_digest="",
    )
    assert manifest.image_bytes() == len(image)
    return manifest, image
