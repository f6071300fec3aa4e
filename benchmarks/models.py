"""Generated models of real shapes with random weights: no download, the same bytes every time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.builders.models import make_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    # TinyLlama-1.1B's shape.
    "llama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    # GPT-2 small's size in Llama's architecture.
    "llama-125m": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "llama-3m": {
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 6, "vocab_size": 1024, "max_position_embeddings": 2048,
    },
    # A decode step that depends little on the context: few layers, wide, with one narrow pair of key and value heads.
    "llama-30m-narrow": {
        "hidden_size": 640, "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 8192,
    },
    # What `benchmarks/placement.py` loads: 53 MB, 205 MB, 0.5 GB and 1.2 GB in bfloat16.
    "llama-26m": {
        "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
        "num_key_value_heads": 6, "vocab_size": 16000, "max_position_embeddings": 2048,
    },
    "llama-100m": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 11, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 16000, "max_position_embeddings": 2048,
    },
    "llama-250m": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "llama-600m": {
        "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 18, "num_attention_heads": 24,
        "num_key_value_heads": 24, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    # Four times llama-1.1b with as many layers, so as many tensors.
    "llama-4.4b": {
        "hidden_size": 4096, "intermediate_size": 11264, "num_hidden_layers": 22, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 64000, "max_position_embeddings": 2048,
    },
    # Nearly all of its bytes in one tensor: a large word embedding, which is the head too.
    "huge-tensor": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 512000, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    # Qwen3-MoE's way of storing experts, three small tensors each: 26 layers × 128 experts, 10,221 tensors.
    "moe-10k": {
        "model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 208,
        "num_hidden_layers": 26, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 2048,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "moe-small": {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
        "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024, "max_position_embeddings": 2048,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip
_BLOCK: Final = 8 * 2**20  # random numbers that the streamed models are made of


def generate(directory: Path, shape: str, dtype: str = "bfloat16") -> Path:
    """A model of this shape in `directory` (made once), without an EOS so that lengths are what was asked for."""
    vocab = SHAPES[shape]["vocab_size"]
    make_tokenizer(directory, vocab=vocab, context=SHAPES[shape]["max_position_embeddings"])
    _give_every_token_a_text(directory / "tokenizer.json", vocab)
    if (directory / "model.safetensors").exists():
        return directory
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **SHAPES[shape], eos_token_id=None, bos_token_id=None, pad_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory, max_shard_size="100GB")
    return directory


def generate_streamed(directory: Path, shape: str) -> Path:
    """A bfloat16 model of this shape in `directory` (made once), written tensor by tensor in little memory.

    Its weights are stretches of one seeded block of normal numbers: random enough to be loaded, not to be used.
    """
    vocab = SHAPES[shape]["vocab_size"]
    make_tokenizer(directory, vocab=min(vocab, 1024), context=SHAPES[shape]["max_position_embeddings"])
    if (directory / "model.safetensors").exists():
        return directory
    import torch
    from transformers import AutoConfig

    facts = dict(SHAPES[shape])
    kind = facts.pop("model_type", "llama")
    config = AutoConfig.for_model(kind, **facts, eos_token_id=None, bos_token_id=None, pad_token_id=1)
    config.architectures = ["Qwen3MoeForCausalLM" if kind == "qwen3_moe" else "LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(_BLOCK, generator=generator) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy()
    names = dict(_tensors(config))
    header, at = {}, 0
    for name, dimensions in names.items():
        size = 2 * math.prod(dimensions)
        header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = directory / "model.safetensors.part"
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, dimensions in enumerate(names.values()):
            left, start = 2 * math.prod(dimensions), (number * 40961 * 2) % block.nbytes
            while left:
                piece = block[start : start + left]
                file.write(piece)
                left, start = left - piece.nbytes, 0
    part.rename(directory / "model.safetensors")
    return directory


def _tensors(config: Any) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes as checkpoints on the hub have them, in the order in which a forward pass meets them."""
    hidden, head = (
        config.hidden_size,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    yield "model.embed_tokens.weight", [config.vocab_size, hidden]
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", [hidden]
        yield f"{layer}.self_attn.q_proj.weight", [config.num_attention_heads * head, hidden]
        yield f"{layer}.self_attn.k_proj.weight", [config.num_key_value_heads * head, hidden]
        yield f"{layer}.self_attn.v_proj.weight", [config.num_key_value_heads * head, hidden]
        yield f"{layer}.self_attn.o_proj.weight", [hidden, config.num_attention_heads * head]
        if config.model_type == "qwen3_moe":
            yield f"{layer}.self_attn.q_norm.weight", [head]
            yield f"{layer}.self_attn.k_norm.weight", [head]
        yield f"{layer}.post_attention_layernorm.weight", [hidden]
        if config.model_type == "qwen3_moe":
            yield f"{layer}.mlp.gate.weight", [config.num_experts, hidden]
            for expert in range(config.num_experts):
                yield from _feed_forward(f"{layer}.mlp.experts.{expert}", hidden, config.moe_intermediate_size)
        else:
            yield from _feed_forward(f"{layer}.mlp", hidden, config.intermediate_size)
    yield "model.norm.weight", [hidden]
    if not config.tie_word_embeddings:
        yield "lm_head.weight", [config.vocab_size, hidden]


def _feed_forward(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, list[int]]]:
    yield f"{prefix}.gate_proj.weight", [intermediate, hidden]
    yield f"{prefix}.up_proj.weight", [intermediate, hidden]
    yield f"{prefix}.down_proj.weight", [hidden, intermediate]


def _give_every_token_a_text(path: Path, vocab: int) -> None:
    """A random model says any token; without a text its first token would be seen only with a later one."""
    tokenizer = json.loads(path.read_text())
    entries = tokenizer["model"]["vocab"]
    for token_id in range(len(entries), vocab):
        entries[f"\u0120w{token_id}"] = token_id  # U+0120 is the byte-level alphabet's space
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
