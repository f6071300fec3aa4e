"""Small checkpoints in Hearth's form, written without the store's importer: random tensors, chunks of a page."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import xxhash

from services.store.manifest import checkpoint_id, digest_of, layout
from shared.contracts.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Checkpoint,
    Manifest,
    WeightFile,
    encode_manifest,
    padded_bytes,
)
from shared.contracts.residency import Source
from tests.unit.store.sources import CONFIG

WEIGHTS = "model.safetensors"


def make_checkpoint(
    directory: Path, *, chunks: int = 12, chunk_bytes: int = 8192, seed: int = 0, source: Source | None = None
) -> Manifest:
    """Write a checkpoint of about so many chunks into `directory`; its manifest."""
    choose = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    floats = max(1, (chunks * chunk_bytes - 4096 - chunk_bytes // 2) // 2 // 4)
    head, tensors = layout({"model.embed_tokens.weight": ("F32", (floats,)), "lm_head.weight": ("F32", (floats,))})
    weights = head + choose.randbytes(sum(tensor.bytes for tensor in tensors.values()))
    (directory / WEIGHTS).write_bytes(weights)
    small = {
        "config.json": json.dumps({**CONFIG, "seed": seed}).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
    }
    for name, data in small.items():
        (directory / name).write_bytes(data)
    image = weights.ljust(padded_bytes(len(weights)), b"\0")
    sums = [xxhash.xxh3_64_hexdigest(image[at : at + chunk_bytes]) for at in range(0, len(image), chunk_bytes)]
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        checkpoint=Checkpoint(
            checkpoint_id=checkpoint_id(
                head=head, tied={}, chunk_bytes=chunk_bytes, chunks=sums, config_digest=digest_of(digests)
            ),
            architecture="LlamaForCausalLM",
            weight_bytes=sum(tensor.bytes for tensor in tensors.values()),
            parameters=2 * floats,
            dtype="float32",
            max_context_tokens=128,
            kv_bytes_per_token=128,
            vocab_tokens=64,
            has_chat_template=False,
        ),
        chunk_bytes=chunk_bytes,
        files=(WeightFile(name=WEIGHTS, bytes=len(weights)),),
        tensors=tensors,
        chunks=tuple(sums),
        config_digest=digest_of(digests),
        small_files=digests,
        source=source,
        revision="1",
    )
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return manifest
