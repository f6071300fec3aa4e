"""Generated models of real shapes with random weights: no download, the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path

from tests.builders.models import make_tokenizer

SHAPES: dict[str, dict[str, int]] = {
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
}  # fmt: skip


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


def _give_every_token_a_text(path: Path, vocab: int) -> None:
    """A random model says any token; without a text its first token would be seen only with a later one."""
    tokenizer = json.loads(path.read_text())
    entries = tokenizer["model"]["vocab"]
    for token_id in range(len(entries), vocab):
        entries[f"\u0120w{token_id}"] = token_id  # U+0120 is the byte-level alphabet's space
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
