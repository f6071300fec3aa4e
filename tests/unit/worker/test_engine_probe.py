"""Which engine serves an architecture: found out with a tiny model."""

from __future__ import annotations

import pytest
import torch

from services.worker.engine import (
    TRANSFORMERS,
    VERIFIED_TYPES,
    choose_engine,
    may_use_flash,
    probe,
    shrink,
    warm_engine,
)
from shared.errors import Code, HearthError
from tests.builders.models import make_config

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("model_type", sorted(VERIFIED_TYPES))
def test_verified_types_pass_the_probe(model_type: str) -> None:
    assert probe(make_config(model_type)) == "batching"


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "gemma", "qwen2_moe"])
def test_others_are_probed_and_served(model_type: str) -> None:
    assert choose_engine(make_config(model_type)) == "batching"


def test_what_cannot_be_batched_is_served_one_at_a_time() -> None:
    assert choose_engine(make_config("falcon")) == "sequential"


def test_a_model_without_attention_is_refused() -> None:
    from transformers import AutoConfig

    with pytest.raises(HearthError) as refused:
        choose_engine(AutoConfig.for_model("mamba"))
    assert refused.value.failure.code is Code.UNSUPPORTED


@pytest.mark.parametrize(
    ("device", "dtype", "fetches", "flash"),
    [
        ("cuda", torch.bfloat16, False, True),
        ("cuda", torch.float16, False, True),
        ("cuda", torch.float32, False, False),  # the kernels know half precision only
        ("cuda", torch.bfloat16, True, False),  # they would come from the hub
        ("cpu", torch.bfloat16, False, False),
    ],
)
def test_flash_attention_is_used_where_it_works_and_is_installed(
    device: str, dtype: torch.dtype, fetches: bool, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_kernels_available", lambda: fetches)
    assert may_use_flash(torch.device(device), dtype) is flash


def test_another_transformers_than_the_engine_is_made_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.generation.continuous_batching.model_runner.infer_max_single_request_tokens")
    monkeypatch.setattr("transformers.__version__", "5.99.1")
    with pytest.raises(HearthError) as refused:
        warm_engine(torch.device("cpu"))
    assert refused.value.failure.code is Code.UNSUPPORTED
    assert "5.99.1" in refused.value.failure.message
    assert TRANSFORMERS in refused.value.failure.message


def test_the_tests_run_with_the_transformers_that_the_engine_is_made_for() -> None:
    import transformers

    assert transformers.__version__.startswith(TRANSFORMERS + ".")


def test_a_shrunk_config_keeps_every_kind_of_layer() -> None:
    config = make_config("gemma2", layers=12)
    tiny = shrink(config)
    assert set(tiny.layer_types) == set(config.layer_types)
    assert tiny.num_hidden_layers == len(tiny.layer_types) < 12
    assert (
        tiny.num_attention_heads // tiny.num_key_value_heads == config.num_attention_heads // config.num_key_value_heads
    )
    assert config.num_hidden_layers == 12, "the model's own config was changed"
