"""Token by token, the text is the text of all tokens at once: for any tokens, broken UTF-8 included."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from services.worker import generation
from services.worker.generation import Generation
from shared.contracts.generation import FinishReason, Ledger
from shared.contracts.requests import Request, Sampling, TokensPrompt
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


def test_whoever_takes_over_tells_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from services.worker.tokenizer import ModelTokenizer

    monkeypatch.setattr(generation, "REPLAYED_TOKENS", 4)  # where it begins matters most when little is replayed
    backend = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    tokenizer = ModelTokenizer(backend, vocab_tokens=512, eos_token_ids=[0])
    dice = random.Random(2)
    cuts = replayed = 0

    def begin(so_far: list[int], stop: tuple[str, ...]) -> Generation:
        return Generation(
            request=Request(
                request_id="q", gateway_id="g", deployment="d", budget_s=1.0, prompt=TokensPrompt(token_ids=(5,)),
                sampling=Sampling(stop=stop),
            ),
            epoch=1, tokenizer=tokenizer, prompt_tokens=1, limit_tokens=1000, so_far=so_far,
        )  # fmt: skip

    for turn in range(300):
        highest = (261, backend.vocab_size, 261)[turn % 3]
        ids = [dice.randrange(5, highest) for _ in range(dice.randrange(20, 120))]
        if turn % 3 == 2:  # printable bytes with broken ones between them
            ids = [one if dice.random() < 0.2 else dice.choice(backend.encode("abcdefgh")) for one in ids]
        whole_text = tokenizer.decode(ids)
        at = dice.randrange(len(whole_text))
        stop = (whole_text[at : at + dice.randrange(2, 6)],) if turn % 2 else ()
        whole, pieces = begin([], stop), []
        for id in ids:
            whole.push(id)
            frame = whole.frame()
            if frame is not None:
                pieces.append(frame.text)
        last = whole.end(whole.finished or FinishReason.LENGTH, ledger=Ledger())
        cut = dice.randrange(len(pieces))
        resumed, rest = begin(ids[:cut], stop), []
        cuts += cut
        replayed += cut - generation.replayed_from(tokenizer, ids[:cut], max(map(len, stop), default=0))
        for id in ids[cut:]:
            resumed.push(id)
            frame = resumed.frame()
            if frame is not None:
                rest.append(frame.text)
        assert rest == pieces[cut:], (turn, cut)
        assert resumed.end(whole.finished or FinishReason.LENGTH, ledger=Ledger()) == last
    assert replayed < cuts / 2
