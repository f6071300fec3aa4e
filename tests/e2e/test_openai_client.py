"""The official `openai` client, unmodified."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.builders.cluster import Cluster
from tests.e2e.conftest import Models

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def client(cluster: Cluster, models: Models) -> Iterator[openai.OpenAI]:
    cluster.deploy("speaker", models("llama"))
    cluster.deploy("mute", models("llama", chat_template=False))
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


MESSAGES = [{"role": "user", "content": "one two three"}]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert {"speaker", "mute"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("speaker").id == "speaker"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="speaker", messages=MESSAGES, max_tokens=12, seed=1)  # type: ignore[arg-type]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_stream_carries_the_text_of_the_plain_answer(client: openai.OpenAI) -> None:
    options = {"model": "speaker", "messages": MESSAGES, "max_tokens": 30, "seed": 3}
    plain = client.chat.completions.create(**options)  # type: ignore[call-overload]
    text, reasons, usage = "", [], None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):  # type: ignore[call-overload]
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == plain.choices[0].message.content
    assert reasons == [plain.choices[0].finish_reason]
    assert usage == plain.usage


def test_completions_plain_and_streamed(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="speaker", prompt="The hearth", max_tokens=20, temperature=0)
    pieces = client.completions.create(model="speaker", prompt="The hearth", max_tokens=20, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == plain.choices[0].text
    assert plain.usage is not None
    assert plain.usage.completion_tokens <= 20


def test_several_choices_differ_and_repeat(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(model="speaker", prompt="one", max_tokens=12, n=3, seed=9)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = ask()
    assert len(set(first)) == 3
    assert ask() == first


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    plain = (
        client.completions.create(model="speaker", prompt="The hearth", max_tokens=40, temperature=0).choices[0].text
    )
    assert len(plain) > 8
    stop = plain[5:8]
    cut = client.completions.create(model="speaker", prompt="The hearth", max_tokens=40, temperature=0, stop=stop)
    assert cut.choices[0].text == plain[: plain.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=MESSAGES)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.completions.create(model="speaker", prompt="fire " * 5000, max_tokens=4)
    with pytest.raises(openai.BadRequestError, match="template"):
        client.chat.completions.create(model="mute", messages=MESSAGES)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="speaker",
            messages=MESSAGES,  # type: ignore[arg-type]
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )


def test_token_ids_and_lists_of_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="speaker", prompt=[[5, 6, 7], [8, 9]], max_tokens=4, temperature=0)
    assert len(answer.choices) == 2
