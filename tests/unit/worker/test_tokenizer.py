"""Prompts to tokens, tokens to text, with a small byte-level tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from services.worker.tokenizer import PENDING_TOKENS, ModelTokenizer, Tokenizers, eos_token_ids
from shared.contracts.requests import ChatMessage, ChatPrompt, TextPrompt, TokensPrompt
from shared.errors import Code, HearthError
from tests.builders.models import make_config, make_tokenizer

pytestmark = pytest.mark.torch

VOCAB = 512


@pytest.fixture(scope="module")
def config() -> Any:
    return make_config("llama", vocab=VOCAB)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab=VOCAB)


@pytest.fixture(scope="module")
def tokenizer(directory: Path, config: Any) -> ModelTokenizer:
    return Tokenizers().load(directory, config)


TEXTS = [
    "The hearth keeps the fire.",
    "你好，世界! 🔥🔥 naïve Größe — Привет",
    "  spaces   and\n\nlines\t",
    "a" * 300,
    "e\u0301 combining, \u200d joiners 👩‍👩‍👧",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_and_its_pieces_add_up(tokenizer: ModelTokenizer, text: str) -> None:
    token_ids = tokenizer.encode_prompt(TextPrompt(text=text))
    assert tokenizer.decode(token_ids) == text
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces), "half a character was told"
    assert len([piece for piece in pieces if piece]) > len(text) // 20


def test_a_stream_is_a_function_of_its_tokens(tokenizer: ModelTokenizer) -> None:
    chance = random.Random(4)
    token_ids = [chance.randrange(VOCAB) for _ in range(400)]  # broken UTF-8 nearly everywhere
    first = tokenizer.stream()
    pieces = [first.push(token_id) for token_id in token_ids]
    for cut in (0, 1, 57, 200, 399):
        again = tokenizer.stream()
        assert [again.push(token_id) for token_id in token_ids[:cut]] == pieces[:cut]
        assert [again.push(token_id) for token_id in token_ids[cut:]] == pieces[cut:]
    silence = max(len(run) for run in "".join("x" if piece else "." for piece in pieces).split("x"))
    assert silence < PENDING_TOKENS, "broken bytes are told, not kept for ever"


def test_broken_bytes_are_told_in_the_end(tokenizer: ModelTokenizer) -> None:
    volcano = tokenizer.encode_prompt(TextPrompt(text="🌋"))
    assert len(volcano) > 1
    stream = tokenizer.stream()
    assert stream.push(volcano[0]) == ""
    assert "\ufffd" in stream.finish()
    assert tokenizer.stream().finish() == ""


def test_special_tokens_have_no_text_unless_asked_for(tokenizer: ModelTokenizer) -> None:
    word = tokenizer.encode_prompt(TextPrompt(text="fire"))
    stream = tokenizer.stream()
    assert "".join(stream.push(token_id) for token_id in [0, 0, *word, 0, *word, 0]) == "firefire"
    shown = tokenizer.stream(skip_special=False)
    assert "".join(shown.push(token_id) for token_id in [*word, 0]) == "fire<|end|>"
    assert tokenizer.text_of(0) == "<|end|>"
    assert tokenizer.decode([*word, 0]) == "fire"


def test_a_conversation_goes_through_the_chat_template(tokenizer: ModelTokenizer) -> None:
    prompt = ChatPrompt(
        messages=(ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hi <|end|>"))
    )
    token_ids = tokenizer.encode_prompt(prompt)
    assert tokenizer.decode(token_ids, skip_special=False) == (
        "<|system|>Be brief.<|end|><|user|>Hi <|end|><|end|><|assistant|>"
    )


def test_a_template_may_refuse(directory: Path, config: Any, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, vocab=VOCAB)
    path = tmp_path / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    facts["chat_template"] = "{{ raise_exception('Roles must alternate') }}"
    path.write_text(json.dumps(facts))
    with pytest.raises(HearthError, match="Roles must alternate") as refused:
        Tokenizers().load(tmp_path, config).encode_prompt(ChatPrompt(messages=(ChatMessage(role="user", content="x"),)))
    assert refused.value.failure.code is Code.INVALID_REQUEST


def test_no_template_is_said_clearly(config: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizers().load(make_tokenizer(tmp_path, vocab=VOCAB, chat_template=False), config)
    assert not tokenizer.has_chat_template
    with pytest.raises(HearthError, match="no chat template") as refused:
        tokenizer.encode_prompt(ChatPrompt(messages=(ChatMessage(role="user", content="x"),)))
    assert refused.value.failure.code is Code.UNSUPPORTED


@pytest.mark.parametrize(
    "prompt",
    [TextPrompt(text=""), TokensPrompt(token_ids=()), TokensPrompt(token_ids=(VOCAB,)), TokensPrompt(token_ids=(-1,))],
)
def test_bad_prompts_are_refused(tokenizer: ModelTokenizer, prompt: TextPrompt | TokensPrompt) -> None:
    with pytest.raises(HearthError) as refused:
        tokenizer.encode_prompt(prompt)
    assert refused.value.failure.code is Code.INVALID_REQUEST


def test_tokens_are_taken_as_they_are(tokenizer: ModelTokenizer) -> None:
    assert tokenizer.encode_prompt(TokensPrompt(token_ids=(5, 4, 0, 511))) == [5, 4, 0, 511]


def test_eos_comes_from_every_place_that_names_one(directory: Path, config: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizers().load(directory, config)._tokenizer
    assert eos_token_ids(tmp_path, config, tokenizer) == {0}
    for named, expected in ((7, {7, 0}), ([7, 9], {7, 9, 0}), (None, {0})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert eos_token_ids(tmp_path, config, tokenizer) == expected
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(HearthError) as refused:
        eos_token_ids(tmp_path, config, tokenizer)
    assert refused.value.failure.code is Code.INVALID_CHECKPOINT


def test_a_tokenizer_is_loaded_once_until_its_files_change(config: Any, tmp_path: Path) -> None:
    kept = Tokenizers()
    make_tokenizer(tmp_path, vocab=VOCAB)
    first = kept.load(tmp_path, config)
    assert kept.load(tmp_path, config) is first
    make_tokenizer(tmp_path, vocab=300, chat_template=False)
    assert kept.load(tmp_path, config) is not first
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(HearthError) as refused:
        kept.load(tmp_path, config)
    assert refused.value.failure.code is Code.UNSUPPORTED


def test_a_tokenizer_that_the_library_does_not_know_is_refused(config: Any, tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "tokenizer", vocab=VOCAB)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"type": "OfTomorrow"}}))
    with pytest.raises(HearthError) as refused:
        Tokenizers().load(directory, config)
    assert refused.value.failure.code is Code.UNSUPPORTED


def test_text_that_the_tokenizer_has_no_tokens_for_is_refused(config: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"fire": 0, "hearth": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer = ModelTokenizer(fast, vocab_tokens=2, eos_token_ids=())
    assert tokenizer.encode_prompt(TextPrompt(text="hearth fire")) == [1, 0]
    with pytest.raises(HearthError) as refused:
        tokenizer.encode_prompt(TextPrompt(text="water"))
    assert refused.value.failure.code is Code.INVALID_REQUEST
    assert "water" not in refused.value.failure.message


@pytest.mark.parametrize("text", ["[]", '{"eos_token_id": "end"}', '{"eos_token_id": [1, null]}', "{"])
def test_a_generation_config_that_is_none_is_refused(config: Any, tmp_path: Path, text: str) -> None:
    directory = make_tokenizer(tmp_path / "tokenizer", vocab=VOCAB)
    (directory / "generation_config.json").write_text(text)
    with pytest.raises(HearthError) as refused:
        Tokenizers().load(directory, config)
    assert refused.value.failure.code is Code.INVALID_CHECKPOINT


def test_a_chat_template_that_fails_in_its_own_way_refuses_too(config: Any, tmp_path: Path) -> None:
    for number, template in enumerate(("{{ 1 / 0 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{% for")):
        directory = make_tokenizer(tmp_path / str(number), vocab=VOCAB)
        (directory / "chat_template.jinja").write_text(template)
        tokenizer = Tokenizers().load(directory, config)
        with pytest.raises(HearthError) as refused:
            tokenizer.encode_prompt(ChatPrompt(messages=(ChatMessage(role="user", content="hello"),)))
        assert refused.value.failure.code is Code.INVALID_REQUEST
