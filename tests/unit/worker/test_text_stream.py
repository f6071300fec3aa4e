"""Token by token, the text is the text of all tokens at once: for any tokens, broken UTF-8 included."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.builders.models import make_tokenizer

pytestmark = pytest.mark.torch


def test_streamed_text_equals_the_whole(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from services.worker.tokenizer import ModelTokenizer

    backend = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    tokenizer = ModelTokenizer(backend, vocab_tokens=512, eos_token_ids=[0])
    dice = random.Random(1)
    for run in range(600):
        # Single bytes only (the first 261 ids) make long runs of broken UTF-8; all ids make words between them.
        highest = 261 if run % 2 else backend.vocab_size
        ids = [dice.randrange(5, highest) for _ in range(dice.randrange(1, 80))]
        stream = tokenizer.stream()
        assert "".join(stream.push(id) for id in ids) + stream.finish() == tokenizer.decode(ids)
