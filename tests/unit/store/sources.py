"""Small sources for the store's tests, and importers of them: safetensors directories written without torch."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.store.fetch import Fetcher
from services.store.importer import Importer
from services.store.local import LocalTree, absolute_directory
from services.store.manifest import tensor_bytes
from services.store.mover import Mover
from services.store.pool import Pool
from services.store.ports import SourceTree
from services.store.tier import SsdTier
from shared.contracts.residency import Source

Tensors = dict[str, tuple[str, tuple[int, ...]]]

LLAMA: Tensors = {
    "lm_head.weight": ("F32", (64, 32)),
    "model.embed_tokens.weight": ("F32", (64, 32)),
    "model.layers.0.input_layernorm.weight": ("F32", (32,)),
    "model.layers.0.mlp.down_proj.weight": ("F32", (32, 48)),
    "model.layers.0.self_attn.q_proj.weight": ("F32", (32, 32)),
    "model.layers.1.input_layernorm.weight": ("F32", (32,)),
    "model.layers.1.self_attn.q_proj.weight": ("F32", (32, 32)),
    "model.layers.10.self_attn.q_proj.weight": ("F32", (32, 32)),
    "model.norm.weight": ("F32", (32,)),
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 64,
    "dtype": "float32",
    "tie_word_embeddings": False,
}


def safetensors(
    tensors: Tensors, *, seed: int = 0, same: dict[str, str] | None = None, finite: bool = False
) -> tuple[bytes, dict[str, bytes]]:
    """The bytes of a safetensors file with random content, and each tensor's bytes. `same`: copies of other tensors.

    With `finite` no bytes make a NaN or an infinity in any floating-point dtype.
    """
    choose = random.Random(seed)
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    contents: dict[str, bytes] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = tensor_bytes(dtype, shape)
        contents[name] = choose.randbytes(size)
        if finite:
            contents[name] = bytes(byte & 0x3F for byte in contents[name])
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    for name, other in (same or {}).items():
        contents[name] = contents[other]
    header = json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(contents[name] for name in tensors), contents


def make_source(
    directory: Path,
    tensors: Tensors = LLAMA,
    *,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    same: dict[str, str] | None = None,
    shards: int = 1,
    finite: bool = False,
) -> dict[str, bytes]:
    """Write a source; the bytes of its tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        data, contents = safetensors(tensors, seed=seed, same=same, finite=finite)
        (directory / "model.safetensors").write_bytes(data)
        return contents
    contents, weight_map, names = {}, {}, list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        data, some = safetensors(part, seed=seed + shard, finite=finite)
        (directory / file).write_bytes(data)
        contents |= some
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return contents


def local_tree(source: Source) -> SourceTree:
    """Directories only."""
    return LocalTree(absolute_directory(source.url))


@contextmanager
def an_importer(
    tier: SsdTier,
    *,
    chunk_bytes: int = 8192,
    threads: int = 2,
    fetching: bool = True,
    pool: Pool | None = None,
    **how: Any,
) -> Iterator[Importer]:
    """An importer of directories, with movers of its own."""
    disk = Mover(pool, threads=threads, name="disk")
    net = Mover(pool, threads=threads, name="net")
    fetcher = Fetcher(tier, net, own_id="here")
    arguments: dict[str, Any] = {"open_tree": local_tree, "fetcher": fetcher if fetching else None, **how}
    importer = Importer(tier, disk=disk, net=net, chunk_bytes=chunk_bytes, **arguments)
    try:
        yield importer
    finally:
        importer.close()
        fetcher.close()
        disk.close()
        net.close()
