"""Which engine serves an architecture: found out with a tiny model."""

from __future__ import annotations

import pytest

from services.worker.engine import VERIFIED_TYPES, choose_engine, probe, shrink
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


def test_a_shrunk_config_keeps_every_kind_of_layer() -> None:
    config = make_config("gemma2", layers=12)
    tiny = shrink(config)
    assert set(tiny.layer_types) == set(config.layer_types)
    assert tiny.num_hidden_layers == len(tiny.layer_types) < 12
    assert (
        tiny.num_attention_heads // tiny.num_key_value_heads == config.num_attention_heads // config.num_key_value_heads
    )
    assert config.num_hidden_layers == 12, "the model's own config was changed"
