"""What config.json says in Hearth's words, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.store.model_config import (
    check_cast,
    config_with_dtype,
    has_chat_template,
    main_dtype,
    parse_config,
    tokenizer_limit_tokens,
    weight_map_of,
)
from shared.errors import Code, HearthError
from tests.unit.store.sources import CONFIG


def parsed(**changes: Any) -> Any:
    table = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    return parse_config(json.dumps(table).encode())


def test_llama() -> None:
    config = parsed()
    assert config.architecture == "LlamaForCausalLM"
    assert config.max_context_tokens == 128
    assert config.kv_elements_per_token == 2 * 2 * 2 * 8  # keys and values, layers, heads, head size
    assert config.vocab_tokens == 64
    assert config.ties_words is False


@pytest.mark.parametrize(
    ("changes", "kv_elements"),
    [
        ({"head_dim": 16}, 2 * 2 * 2 * 16),
        ({"num_key_value_heads": None}, 2 * 2 * 4 * 8),
        ({"multi_query": True}, 2 * 2 * 1 * 8),
        ({"text_config": {"num_hidden_layers": 5}}, 2 * 5 * 2 * 8),
        ({"num_hidden_layers": None}, 0),
    ],
)
def test_kv_cache(changes: dict[str, Any], kv_elements: int) -> None:
    assert parsed(**changes).kv_elements_per_token == kv_elements


def test_gpt2_uses_other_names() -> None:
    table = {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 8,
        "n_positions": 64,
        "vocab_size": 9,
    }
    config = parse_config(json.dumps(table).encode())
    assert (config.kv_elements_per_token, config.max_context_tokens, config.ties_words) == (2 * 3 * 8, 64, None)


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"{", Code.INVALID_CHECKPOINT, "malformed"),
        (b"\xff\xfe", Code.INVALID_CHECKPOINT, "malformed"),
        (b"[]", Code.INVALID_CHECKPOINT, "no JSON object"),
        (b"{}", Code.INVALID_CHECKPOINT, "architectures"),
        (b'{"architectures": ["\\ud800ForCausalLM"]}', Code.INVALID_CHECKPOINT, "no class"),
        (b'{"architectures": []}', Code.INVALID_CHECKPOINT, "architectures"),
        (b'{"architectures": ["BertModel"]}', Code.UNSUPPORTED, "BertModel is no causal"),
        (b'{"architectures": ["LlamaForCausalLM"]}', Code.INVALID_CHECKPOINT, "vocab_size"),
    ],
)
def test_refusals(data: bytes, code: Code, words: str) -> None:
    with pytest.raises(HearthError, match=words) as refused:
        parse_config(data)
    assert refused.value.failure.code is code


def test_casts() -> None:
    assert check_cast(parsed(), None) is None
    assert check_cast(parsed(), "bfloat16") == "BF16"
    with pytest.raises(HearthError, match="none of bfloat16, float16, float32"):
        check_cast(parsed(), "int4")
    with pytest.raises(HearthError, match="quantized"):
        check_cast(parsed(quantization_config={"bits": 4}), "float16")


def test_config_says_the_dtype_it_was_cast_to() -> None:
    changed = json.loads(config_with_dtype(parsed(torch_dtype="float32", text_config={"dtype": "float32"}), "bfloat16"))
    assert (changed["dtype"], changed["torch_dtype"], changed["text_config"]["dtype"]) == ("bfloat16",) * 3
    assert json.loads(config_with_dtype(parsed(dtype=None), "float16"))["dtype"] == "float16"


def test_main_dtype_is_that_of_most_floating_point_bytes() -> None:
    assert main_dtype({"F32": 10, "BF16": 20, "I64": 1000}) == "bfloat16"
    assert main_dtype({"U8": 10}) == "uint8"


def test_chat_template_and_tokenizer_limit() -> None:
    assert has_chat_template({"chat_template.jinja": b""})
    assert has_chat_template({"tokenizer_config.json": b'{"chat_template": "x"}'})
    assert not has_chat_template({"tokenizer_config.json": b"{}"})
    assert not has_chat_template({})
    assert tokenizer_limit_tokens(b'{"model_max_length": 77}') == 77
    assert tokenizer_limit_tokens(b'{"model_max_length": 1000000000000000019884624838656}') is None
    assert tokenizer_limit_tokens(None) is None


def test_weight_map() -> None:
    assert weight_map_of(b'{"weight_map": {"a": "x"}}') == {"a": "x"}
    for data in (b"{}", b'{"weight_map": {"a": 1}}', b'{"weight_map": {}}', b"nope"):
        with pytest.raises(HearthError):
            weight_map_of(data)
