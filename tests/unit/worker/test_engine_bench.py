"""What `hearth profile` measures of the engine: on a tiny model, that every figure is there and means what it says."""

from __future__ import annotations

import pytest

from services.worker.engine_bench import BATCHES, PREFILL_TOKENS, measure

pytestmark = pytest.mark.torch

TINY = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256,
    }
}  # fmt: skip


def test_a_device_and_a_model_on_it_are_measured() -> None:
    told: list[str] = []

    device, models = measure("cpu", told.append, TINY)

    (model,) = models
    assert (device.device, device.copy_bytes_per_s) == ("cpu", 0.0)
    assert device.memory_bytes > 2**28
    assert model.weight_bytes == 2 * model.parameters
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert tuple(model.prefill) == PREFILL_TOKENS
    assert tuple(model.decode) == BATCHES
    assert min(*model.prefill.values(), *model.decode.values(), model.attach_s) > 0
    assert any("tiny" in text for text in told)
