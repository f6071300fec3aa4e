"""Tiny random models with a tokenizer, as Hugging Face directories: real architectures, no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# A corpus that gives a byte-level BPE some merges; every byte is in its alphabet, so any text can be encoded.
_CORPUS = [
    "The hearth keeps the fire, and the fire keeps the house warm through the long night.",
    "A model is loaded when somebody asks for it and leaves when nobody does.",
    "Größe, naïve, déjà vu, 你好世界, Привет, 🔥🔥🔥 -- bytes make characters.",
    "one two three four five six seven eight nine ten",
] * 4

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EOS = "<|end|>"
_SPECIAL = [EOS, "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_config(
    architecture: str = "llama",
    *,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 512,
    context: int = 512,
    heads: int = 4,
    tie: bool = False,
    eos_token_id: int | None = 0,
) -> Any:
    """The config of a small model: "llama", "qwen2", "qwen3", "opt", "gpt2", "mistral", "gemma2", "falcon", …"""
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": vocab,
        "eos_token_id": eos_token_id,
        "bos_token_id": eos_token_id,
        "tie_word_embeddings": tie,
    }
    match architecture:
        case "opt":
            return AutoConfig.for_model(
                "opt", hidden_size=hidden, num_hidden_layers=layers, ffn_dim=2 * hidden, num_attention_heads=heads,
                max_position_embeddings=context, word_embed_proj_dim=hidden, pad_token_id=1, **common,
            )  # fmt: skip
        case "gpt2":
            return AutoConfig.for_model(
                "gpt2", n_embd=hidden, n_layer=layers, n_head=heads, n_positions=context, **common
            )
        case "falcon":
            return AutoConfig.for_model(
                "falcon", hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, **common
            )
        case _:
            extra = {"head_dim": hidden // heads} if architecture in {"qwen3", "gemma2", "gemma"} else {}
            return AutoConfig.for_model(
                architecture, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=context,
                pad_token_id=1, **extra, **common,
            )  # fmt: skip


def make_tokenizer(
    directory: Path, *, vocab: int = 512, chat_template: bool = True, context: int = 512, eos: bool = True
) -> Path:
    """A byte-level BPE of at most `vocab` tokens; `<|end|>` (EOS if `eos`) has id 0. Returns the directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if eos:
        config["eos_token"] = EOS
    if chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return directory


def make_model(
    directory: Path,
    architecture: str = "llama",
    *,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 512,
    context: int = 512,
    heads: int = 4,
    tie: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    chat_template: bool = True,
    eos: bool = True,
    spread: float = 4.0,
    shard_bytes: int = 0,
) -> Path:
    """A random model and its tokenizer in `directory` (config.json, model.safetensors, tokenizer files). Returns it.

    `spread` scales the initial weights, so that the next-token distribution is neither flat nor a single spike. With
    `eos=False` no token ends a sequence. With `shard_bytes` the weights come in files of that size at most.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = make_config(
        architecture, hidden=hidden, layers=layers, vocab=vocab, context=context, heads=heads, tie=tie,
        eos_token_id=0 if eos else None,
    )  # fmt: skip
    config.initializer_range = 0.02 * spread
    config.init_std = 0.02 * spread
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = 0 if eos else None
    model.generation_config.pad_token_id = 1
    make_tokenizer(directory, vocab=vocab, chat_template=chat_template, context=context, eos=eos)
    model.save_pretrained(directory, **({"max_shard_size": shard_bytes} if shard_bytes else {}))
    return directory
