"""OpenAI's wire: every acceptance, every refusal, and the shape of what goes out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.gateway import openai as o
from services.gateway import rendering as r
from services.gateway.limits import Limits
from shared.contracts.generation import End, FinishReason, Frame, Ledger, Logprobs, TokenLogprob, Usage
from shared.contracts.records import DeploymentRecord, DeploymentSpec, DeploymentState
from shared.contracts.requests import ChatMessage, ChatPrompt, Sampling, TextPrompt, TokensPrompt
from shared.contracts.residency import Checkpoint, Source
from shared.errors import Code, Failure, HearthError

LIMITS = Limits(max_choices=8, max_requests=8, max_prompt_chars=1000)
HELLO = [{"role": "user", "content": "hello"}]


def chat(**body: Any) -> o.Call:
    return o.read_chat(json.dumps({"model": "m", "messages": HELLO, **body}).encode(), LIMITS)


def text(**body: Any) -> o.Call:
    return o.read_completion(json.dumps({"model": "m", "prompt": "once", **body}).encode(), LIMITS)


def test_the_defaults_are_openais() -> None:
    call = chat()
    assert call.prompts == (ChatPrompt(messages=(ChatMessage(role="user", content="hello"),)),)
    assert call.sampling == Sampling(max_tokens=None, temperature=1.0)
    assert (call.choices, call.seed, call.stream, call.include_usage, call.ledger) == (1, None, False, False, False)
    assert text().sampling.max_tokens == 16


def test_every_option_is_translated() -> None:
    call = chat(
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.1,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "6": 1.5},
        seed=7,
        stop=["a", "b"],
        stop_token_ids=[3],
        ignore_eos=True,
        max_completion_tokens=9,
        n=3,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        logprobs=True,
        top_logprobs=2,
        hearth={"ledger": True},
    )
    assert call.sampling == Sampling(
        max_tokens=9,
        temperature=0.0,
        top_p=0.5,
        top_k=40,
        min_p=0.1,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias={5: -100.0, 6: 1.5},
        stop=("a", "b"),
        stop_token_ids=(3,),
        ignore_eos=True,
        logprobs=2,
    )
    assert (call.choices, call.seed, call.stream, call.include_usage, call.ledger) == (3, 7, True, True, True)


NULLS = (
    "temperature", "top_p", "n", "stream", "stop", "max_tokens", "max_completion_tokens", "presence_penalty",
    "frequency_penalty", "logit_bias", "user", "seed", "logprobs", "top_logprobs", "stream_options", "tools",
    "tool_choice", "response_format", "functions", "function_call", "modalities", "audio", "metadata", "store",
    "service_tier", "reasoning_effort", "prediction", "web_search_options", "parallel_tool_calls", "verbosity",
)  # fmt: skip


@pytest.mark.parametrize("name", NULLS)
def test_null_means_not_given(name: str) -> None:
    assert chat(**{name: None}) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "x") for name in o.HARMLESS),
        ("tools", []),
        ("tool_choice", "none"),
        ("tool_choice", "auto"),
        ("functions", []),
        ("response_format", {"type": "text"}),
        ("modalities", ["text"]),
        ("verbosity", "medium"),
        ("metadata", {"a": "b"}),
        ("stop", []),
        ("logit_bias", {}),
    ],
)
def test_what_changes_nothing_is_accepted(name: str, value: Any) -> None:
    assert chat(**{name: value}) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("reasoning_effort", "low"),
        ("verbosity", "low"),
        ("suffix", "x"),
        ("best_of", 2),
        ("tempurature", 1),
        ("prompt", "x"),
        ("echo", True),
    ],
)
def test_what_would_change_the_meaning_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(HearthError) as caught:
        chat(**{name: value})
    assert caught.value.failure.code is Code.INVALID_REQUEST
    assert caught.value.failure.param == name
    assert name in caught.value.failure.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"max_tokens": 1 << 40}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": 10**40}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 513]}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"hearth": {"leger": True}}, "hearth.leger"),
        ({"model": ""}, "model"),
        ({"model": 1}, "model"),
        ({"model": "m" * 257}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": HELLO * 4097}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ],
)
def test_wrong_values_are_refused_with_their_path(body: dict[str, Any], param: str) -> None:
    with pytest.raises(HearthError) as caught:
        chat(**body)
    assert caught.value.failure.param == param
    assert caught.value.failure.kind.status == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"x"',
        b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": NaN}',
        b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "m"}',
    ],
)
def test_bodies_that_are_no_call_are_refused_in_one_sentence(body: bytes) -> None:
    with pytest.raises(HearthError) as caught:
        o.read_chat(body, LIMITS)
    failure = caught.value.failure
    assert failure.code is Code.INVALID_REQUEST
    assert "\n" not in failure.message
    assert len(failure.message) < 300


def test_a_missing_field_is_named() -> None:
    with pytest.raises(HearthError) as caught:
        o.read_chat(b'{"model": "m"}', LIMITS)
    assert caught.value.failure.param == "messages"


def test_text_parts_are_joined_and_roles_are_the_templates() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = chat(
        messages=[
            {"role": "developer", "content": "x"},
            {"role": "user", "content": parts, "name": "Ada"},
            {"role": "assistant", "content": "y", "refusal": None, "tool_calls": None},
        ]
    )
    (prompt,) = call.prompts
    assert prompt == ChatPrompt(
        messages=(
            ChatMessage(role="system", content="x"),
            ChatMessage(role="user", content="ab", name="Ada"),
            ChatMessage(role="assistant", content="y"),
        )
    )


def test_a_prompt_that_is_too_long_for_anything_is_refused() -> None:
    with pytest.raises(HearthError) as caught:
        chat(messages=[{"role": "user", "content": "x" * 501}] * 2)
    assert caught.value.failure.code is Code.PROMPT_TOO_LONG


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", (TextPrompt(text="a"),)),
        (["a", "b"], (TextPrompt(text="a"), TextPrompt(text="b"))),
        ([1, 2], (TokensPrompt(token_ids=(1, 2)),)),
        ([[1], [2, 3]], (TokensPrompt(token_ids=(1,)), TokensPrompt(token_ids=(2, 3)))),
    ],
)
def test_the_four_forms_of_a_prompt(given: Any, expected: Any) -> None:
    assert text(prompt=given).prompts == expected


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (None, "prompt"),
        ("", "prompt"),
        ([], "prompt"),
        ([""], "prompt[0]"),
        ([[]], "prompt[0]"),
        (["a", 1], "prompt"),
        ([1, "a"], "prompt"),
        ([1, [2]], "prompt"),
        ([[1], "a"], "prompt"),
        ([-1], "prompt"),
        ([1 << 31], "prompt"),
        ([1.5], "prompt[0]"),
        (["a"] * 9, "prompt"),
        ({"a": 1}, "prompt"),
    ],
)
def test_prompts_that_are_none(given: Any, param: str) -> None:
    with pytest.raises(HearthError) as caught:
        text(prompt=given)
    assert caught.value.failure.param == param


def test_choices_times_prompts_are_bounded() -> None:
    with pytest.raises(HearthError):
        text(prompt=["a"] * 3, n=3)
    assert len(o.expand(text(prompt=["a"] * 2, n=4), 1)) == 8


def test_options_of_completions() -> None:
    assert text(echo=True).echo
    assert text(logprobs=3).sampling.logprobs == 3
    assert text(logprobs=0).sampling.logprobs == 0
    assert text(best_of=1, suffix="").choices == 1
    for body, param in (({"echo": True, "logprobs": 1}, "echo"), ({"logprobs": True}, "logprobs")):
        with pytest.raises(HearthError) as caught:
            text(**body)
        assert caught.value.failure.param == param
    with pytest.raises(HearthError):
        text(messages=HELLO)


def test_top_p_zero_is_the_most_likely_token_and_top_k_minus_one_is_off() -> None:
    assert (text(top_p=0).sampling.top_k, text(top_p=0).sampling.top_p) == (1, 1.0)
    assert text(top_k=-1).sampling.top_k == 0


def test_seeds() -> None:
    def seeds(call: o.Call, drawn: int = 0) -> list[int]:
        return [sampling.seed for _, sampling in o.expand(call, drawn)]

    one = seeds(text(n=3, seed=5))
    assert one[0] == 5
    assert len(set(one)) == 3
    assert one == seeds(text(n=3, seed=5), drawn=99)
    assert seeds(text(prompt=["a", "b"], seed=5)) == [5, 5], "a prompt's answer does not depend on its neighbours"
    drawn = seeds(text(prompt=["a", "a"], n=2), drawn=7)
    assert len(set(drawn)) == 4, "nobody asked for equal noise"
    assert all(0 <= seed < 1 << 63 for seed in seeds(text(n=3, seed=-1)))


def record(**more: Any) -> DeploymentRecord:
    facts: dict[str, Any] = {
        "checkpoint_id": "c",
        "architecture": "x",
        "weight_bytes": 1,
        "parameters": 1,
        "dtype": "float32",
        "max_context_tokens": 8,
        "kv_bytes_per_token": 1,
        "vocab_tokens": 100,
        "has_chat_template": True,
        **more,
    }
    return DeploymentRecord(
        spec=DeploymentSpec(name="m", source=Source(url="/x")),
        slug="m-1",
        revision="r",
        state=DeploymentState.READY,
        created_at_s=5.5,
        checkpoint=Checkpoint(**facts),
    )


@pytest.mark.parametrize(
    ("call", "code", "param"),
    [
        (text(prompt=[100]), Code.INVALID_REQUEST, "prompt"),
        (text(prompt=[1] * 8), Code.PROMPT_TOO_LONG, "prompt"),
        (text(logit_bias={"100": 1}), Code.INVALID_REQUEST, "logit_bias"),
        (text(stop_token_ids=[100]), Code.INVALID_REQUEST, "stop_token_ids"),
    ],
)
def test_what_the_record_tells_is_refused_at_once(call: o.Call, code: Code, param: str) -> None:
    refused = o.admit(call, record())
    assert refused is not None
    assert (refused.code, refused.param) == (code, param)


def test_admission() -> None:
    assert o.admit(text(prompt=[99] * 7), record()) is None
    assert o.admit(chat(), record()) is None
    refused = o.admit(chat(), record(has_chat_template=False))
    assert refused is not None
    assert refused.kind.status == 400
    assert "chat template" in refused.message
    assert o.admit(text(), record(has_chat_template=False)) is None
    unknown = o.admit(chat(), None)
    assert unknown is not None
    assert unknown.code is Code.UNKNOWN_MODEL


def test_errors_have_openais_form() -> None:
    def body(failure: Failure) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(r.error_body(failure))["error"]
        return error

    assert body(Failure(code=Code.UNKNOWN_MODEL, message="No.", param="model")) == {
        "message": "No.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert body(Failure(code=Code.QUEUE_FULL, message="x"))["type"] == "rate_limit_error"
    assert body(Failure(code=Code.INTERNAL, message="x"))["type"] == "server_error"
    assert body(Failure(code=Code.UNAUTHENTICATED, message="x"))["code"] == "invalid_api_key"


def test_error_headers_say_when_to_come_back() -> None:
    headers = r.error_headers(Failure(code=Code.QUEUE_FULL, message="x", retry_after_s=2.1))
    assert headers == {"x-should-retry": "true", "Retry-After": "3"}
    assert r.error_headers(Failure(code=Code.INVALID_REQUEST, message="x")) == {"x-should-retry": "false"}


def frame(index: int, words: str, positions: tuple[Logprobs, ...] = ()) -> Frame:
    return Frame(request_id="a", epoch=1, index=index, token_ids=(index,), text=words, logprobs=positions)


def end(completion_tokens: int, held_back: str = "", reason: FinishReason = FinishReason.STOP) -> End:
    return End(
        request_id="a",
        epoch=1,
        index=completion_tokens,
        reason=reason,
        text=held_back,
        usage=Usage(prompt_tokens=10, completion_tokens=completion_tokens, cached_tokens=4),
        ledger=Ledger(cold=True, tier="dram", queue_s=0.5),
    )


def rendering(call: o.Call) -> r.Rendering:
    return r.Rendering(call, request_id="q", created_s=1)


def loads(data: bytes | None) -> dict[str, Any]:
    assert data is not None
    value: dict[str, Any] = json.loads(data)
    return value


def test_a_chat_stream() -> None:
    out = rendering(chat(stream=True))
    first = loads(out.frame(0, frame(0, "Hel")))
    assert first == {
        "id": "chatcmpl-q",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": "Hel"}, "logprobs": None, "finish_reason": None}
        ],
    }
    assert out.frame(0, frame(1, "")) is None, "half a character"
    assert loads(out.frame(0, frame(2, "lo")))["choices"][0]["delta"] == {"content": "lo"}
    out.end(0, end(3, "!"))
    held_back, last = (loads(event) for event in out.closing(0))
    assert held_back["choices"][0]["delta"] == {"content": "!"}
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert "usage" not in last
    assert "hearth" not in last
    assert out.finished


def test_usage_and_ledger_stand_in_the_very_last_event() -> None:
    out = rendering(chat(stream=True, stream_options={"include_usage": True}, hearth={"ledger": True}, n=2))
    assert loads(out.frame(0, frame(0, "x")))["usage"] is None
    out.end(1, end(0))
    assert [loads(event).get("hearth") for event in out.closing(1)] == [None]
    assert not out.finished
    out.end(0, end(1, reason=FinishReason.LENGTH))
    finish, usage = (loads(event) for event in out.closing(0))
    assert finish["choices"][0]["finish_reason"] == "length"
    assert "hearth" not in finish
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 1,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert usage["hearth"]["request_id"] == "q"
    assert usage["hearth"]["queue_s"] == 0.5
    assert usage["hearth"]["migrations"] == 0, "every field is there"
    assert len(usage["hearth"]["ledgers"]) == 2


def test_the_ledger_without_usage_stands_in_the_finish_event() -> None:
    out = rendering(chat(stream=True, hearth={"ledger": True}))
    out.end(0, end(0))
    (finish,) = (loads(event) for event in out.closing(0))
    assert finish["hearth"]["tier"] == "dram"
    assert finish["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_a_whole_chat_answer() -> None:
    out = rendering(chat(n=2))
    out.collect(1, frame(0, "b"))
    out.collect(0, frame(0, "a"))
    out.end(0, end(1, "!"))
    out.end(1, end(1))
    whole = loads(out.whole())
    assert whole["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["a!", "b"]
    assert whole["choices"][0]["message"]["role"] == "assistant"
    assert whole["usage"]["prompt_tokens"] == 10, "the prompt counts once"
    assert whole["usage"]["completion_tokens"] == 2


def test_completions_count_every_prompt_once() -> None:
    out = rendering(text(prompt=["a", "b"], n=2))
    for choice in range(4):
        out.end(choice, end(1))
    whole = loads(out.whole())
    assert whole["object"] == "text_completion"
    assert whole["usage"]["prompt_tokens"] == 20
    assert whole["usage"]["completion_tokens"] == 4
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]


def test_a_completion_stream() -> None:
    out = rendering(text(stream=True))
    first = loads(out.frame(0, frame(0, "x")))
    assert first["object"] == "text_completion"
    assert first["choices"] == [{"index": 0, "text": "x", "logprobs": None, "finish_reason": None}]
    out.end(0, end(1))
    (last,) = (loads(event) for event in out.closing(0))
    assert last["choices"][0]["finish_reason"] == "stop"


POSITION = Logprobs(
    chosen=TokenLogprob(token_id=1, text="é", logprob=-0.5),
    top=(TokenLogprob(token_id=1, text="é", logprob=-0.5), TokenLogprob(token_id=2, text="x", logprob=-float("inf"))),
)


def test_chat_log_probabilities() -> None:
    out = rendering(chat(stream=True, logprobs=True, top_logprobs=2))
    event = loads(out.frame(0, frame(0, "", (POSITION,))))
    (position,) = event["choices"][0]["logprobs"]["content"]
    assert position["token"] == "é"
    assert position["bytes"] == [195, 169]
    assert position["top_logprobs"][1]["logprob"] == -9999.0, "JSON has no infinity"


def test_a_token_that_is_no_text_by_itself_has_no_bytes() -> None:
    part = TokenLogprob(token_id=7, text="\ufffd", logprob=-0.5)  # half a character: its bytes are not U+FFFD's
    out = rendering(chat(stream=True, logprobs=True, top_logprobs=1))
    event = loads(out.frame(0, frame(0, "", (Logprobs(chosen=part, top=(part,)),))))
    (position,) = event["choices"][0]["logprobs"]["content"]
    assert position["bytes"] is None
    assert position["top_logprobs"][0]["bytes"] is None


def test_completion_log_probabilities_have_running_offsets() -> None:
    out = rendering(text(stream=True, logprobs=2))
    loads(out.frame(0, frame(0, "é", (POSITION,))))
    event = loads(out.frame(0, frame(1, "é", (POSITION,))))
    found = event["choices"][0]["logprobs"]
    assert found["tokens"] == ["é"]
    assert found["text_offset"] == [1]
    assert found["top_logprobs"] == [{"é": -0.5, "x": -9999.0}]


def test_completion_log_probabilities_hold_the_chosen_token_and_of_equal_texts_the_likeliest() -> None:
    half, other = (TokenLogprob(token_id=id, text="\ufffd", logprob=-float(id)) for id in (1, 2))
    chosen = TokenLogprob(token_id=9, text="rare", logprob=-9.0)
    out = rendering(text(stream=True, logprobs=2))
    event = loads(out.frame(0, frame(0, "rare", (Logprobs(chosen=chosen, top=(half, other)),))))
    assert event["choices"][0]["logprobs"]["top_logprobs"] == [{"\ufffd": -1.0, "rare": -9.0}]


def test_ledger_headers() -> None:
    headers = r.ledger_headers("q", Ledger(cold=True, tier="ssd", queue_s=1.25, read_s=0.5))
    assert headers["x-hearth-queue-ms"] == "1250.0"
    assert headers["x-hearth-read-ms"] == "500.0"
    assert headers["x-hearth-cold"] == "true"
    assert headers["x-hearth-tier"] == "ssd"
    assert headers["x-hearth-request-id"] == "q"


def test_a_model_card() -> None:
    card = r.model_card(record())
    assert (card.id, card.object, card.created, card.owned_by) == ("m", "model", 5, "hearth")
