"""What config.json says about a model, in Hearth's words, and the refusals that follow from it. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.store.manifest import CASTS, DTYPES, corrupt
from shared.errors import Code, HearthError

# Endings of the classes that transformers' AutoModelForCausalLM maps to.
_CAUSAL: Final = ("ForCausalLM", "LMHeadModel")
_CONTEXT: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)
_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN: Final = ("hidden_size", "n_embd", "d_model", "n_embed")
_HEADS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_VOCABULARY: Final = ("vocab_size", "padded_vocab_size")
_CLASS: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_NUMBER_LIMIT: Final = 2**40  # what is larger is no number of layers, heads or tokens
_KV_LIMIT: Final = 2**48
DEFAULT_CONTEXT_TOKENS: Final = 2048  # of the few models whose configuration and tokenizer name no limit


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The facts of a config.json.

    `kv_elements_per_token` are the elements of one token's KV cache over all layers; `max_context_tokens` is None when
    the model itself has no limit. `ties_words` says whether head and word embedding are declared to be one tensor.
    `remote_code` is what `auto_map` names; `model_type` tells whether transformers has an implementation of its own.
    """

    architecture: str
    model_type: str
    max_context_tokens: int | None
    kv_elements_per_token: int
    vocab_tokens: int
    ties_words: bool | None
    remote_code: bool
    quantized: bool
    table: dict[str, Any]


def parse_config(data: bytes) -> ModelConfig:
    """Read a config.json. Raises `invalid_checkpoint` (malformed, no causal language model) or `unsupported`."""
    table = _table(data, "config.json")
    architectures = table.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise corrupt("config.json names no `architectures`, so this is no causal language model that can be served.")
    architecture = architectures[0]
    if not _CLASS.fullmatch(architecture):
        raise corrupt("config.json names something in `architectures` that is no class.")
    if not architecture.endswith(_CAUSAL):
        raise HearthError(Code.UNSUPPORTED, f"{architecture} is no causal language model.")
    inner = table.get("text_config")
    text: Mapping[str, Any] = {**table, **inner} if isinstance(inner, dict) else table
    layers, heads, hidden = (_number(text, names) for names in (_LAYERS, _HEADS, _HIDDEN))
    vocabulary = _number(text, _VOCABULARY)
    if vocabulary is None:
        raise corrupt("config.json names no vocabulary size (`vocab_size`).")
    if text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        kv_heads: int | None = (
            1  # Falcon and StarCoder: one head of keys and values for all, whatever else stands there
        )
    else:
        kv_heads = _number(text, _KV_HEADS) or heads
    head_size = _number(text, ("head_dim",)) or (hidden // heads if hidden and heads else None)
    kv_elements = 2 * layers * kv_heads * head_size if layers and kv_heads and head_size else 0
    if kv_elements > _KV_LIMIT:
        raise corrupt("config.json describes a model larger than any.")
    ties = table.get("tie_word_embeddings")
    return ModelConfig(
        architecture=architecture,
        model_type=str(table.get("model_type", "")),
        max_context_tokens=_number(text, _CONTEXT),
        kv_elements_per_token=kv_elements,
        vocab_tokens=vocabulary,
        ties_words=ties if isinstance(ties, bool) else None,
        remote_code=bool(table.get("auto_map")),
        quantized=bool(table.get("quantization_config")),
        table=table,
    )


def check_cast(config: ModelConfig, dtype: str | None) -> str | None:
    """safetensors' name of the dtype that floating-point tensors become, None to keep them. Refuses what cannot be."""
    if dtype is None:
        return None
    if dtype not in CASTS:
        raise HearthError(
            Code.INVALID_REQUEST, f"dtype {dtype!r} is none of {', '.join(sorted(CASTS))}.", param="dtype"
        )
    if config.quantized:
        raise HearthError(Code.UNSUPPORTED, "A quantized checkpoint cannot be cast to another dtype.", param="dtype")
    return CASTS[dtype]


def config_with_dtype(config: ModelConfig, dtype: str) -> bytes:
    """The config.json that says `dtype` (torch's name) wherever it said another."""
    try:
        return (json.dumps(_with_dtype(config.table, dtype, top=True), indent=2) + "\n").encode()
    except RecursionError as error:
        raise corrupt("config.json is nested too deeply.") from error


def _with_dtype(table: Mapping[str, Any], dtype: str, *, top: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("dtype", "torch_dtype") and (isinstance(value, str) or value is None):
            result[key] = dtype
        elif isinstance(value, dict):
            result[key] = _with_dtype(value, dtype, top=False)
        else:
            result[key] = value
    if top and "dtype" not in result and "torch_dtype" not in result:
        result["dtype"] = dtype
    return result


def main_dtype(bytes_by_dtype: Mapping[str, int]) -> str:
    """torch's name of the dtype that most bytes have, floating point first."""
    floats = {dtype: size for dtype, size in bytes_by_dtype.items() if DTYPES[dtype][1].startswith(("float", "bfloat"))}
    best = max(sorted((floats or bytes_by_dtype).items()), key=lambda item: item[1], default=("F32", 0))
    return DTYPES[best[0]][1]


def has_chat_template(small_files: Mapping[str, bytes]) -> bool:
    """Whether one of the small files (those that can hold one) has a chat template."""
    if any(name in small_files for name in ("chat_template.jinja", "chat_template.json")):
        return True
    data = small_files.get("tokenizer_config.json")
    return data is not None and bool(_table(data, "tokenizer_config.json").get("chat_template"))


def tokenizer_limit_tokens(tokenizer_config: bytes | None) -> int | None:
    """`model_max_length` of a tokenizer_config.json, unless it is the "no limit" that transformers writes (1e30)."""
    if tokenizer_config is None:
        return None
    limit = _table(tokenizer_config, "tokenizer_config.json").get("model_max_length")
    return limit if type(limit) is int and 0 < limit < 10**9 else None


def weight_map_of(data: bytes) -> dict[str, str]:
    """The `weight_map` (tensor → file) of a model.safetensors.index.json. Raises `invalid_checkpoint`."""
    table = _table(data, "model.safetensors.index.json").get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise corrupt("model.safetensors.index.json has no `weight_map`.")
    return table


def _table(data: bytes, name: str) -> dict[str, Any]:
    try:
        # Not `loads(data)`, which would guess UTF-16 where transformers reads UTF-8.
        table = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise corrupt(f"{name} is malformed: {error}") from error
    if not isinstance(table, dict):
        raise corrupt(f"{name} is malformed: it is no JSON object.")
    return table


def _number(table: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = table.get(name)
        if type(value) is int and 0 < value <= _NUMBER_LIMIT:
            return value
    return None
