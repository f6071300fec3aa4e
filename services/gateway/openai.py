"""What comes in by OpenAI's wire: a JSON body → a validated `Call`, or a `HearthError` that names the field. Pure.

`services.gateway.rendering` has the other direction.
The reference is https://platform.openai.com/docs/api-reference; what Hearth adds (`top_k`, `min_p`,
`repetition_penalty`, `ignore_eos`, `stop_token_ids`, `hearth`) is what other open servers call by these names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from services.gateway.limits import Limits
from shared.contracts.records import DeploymentRecord, DeploymentState
from shared.contracts.requests import ChatMessage, ChatPrompt, Prompt, Sampling, TextPrompt, TokensPrompt
from shared.errors import Code, Failure, HearthError

Json = Any
B = TypeVar("B")
W = TypeVar("W", bound=msgspec.Struct)

# -- fields that are not translated -----------------------------------------------------------------------------------

HARMLESS: Final[dict[str, str]] = {
    "user": "an identifier of the end user; the answer does not depend on it",
    "safety_identifier": "an identifier of the end user; the answer does not depend on it",
    "metadata": "labels for OpenAI's dashboard; the answer does not depend on them",
    "store": "asks OpenAI to keep the answer; Hearth keeps none",
    "service_tier": "a price class of OpenAI",
    "prompt_cache_key": "a hint for OpenAI's cache; prefixes are shared here without one",
    "prompt_cache_retention": "a hint for OpenAI's cache",
    "parallel_tool_calls": "says how tools are called; a call with tools is refused by that field",
}


def _empty(value: Json) -> bool:
    return value in (None, [], {}, "", False)


REFUSED: Final[dict[str, tuple[Callable[[Json], bool], str]]] = {
    "tools": (_empty, "tools are not supported"),
    "tool_choice": (lambda v: v in (None, "none", "auto"), "tools are not supported"),
    "functions": (_empty, "functions are not supported"),
    "function_call": (lambda v: v in (None, "none", "auto"), "functions are not supported"),
    "response_format": (lambda v: v in (None, {"type": "text"}), "only the response format 'text' is supported"),
    "modalities": (lambda v: v in (None, [], ["text"]), "only the modality 'text' is supported"),
    "audio": (_empty, "audio is not supported"),
    "prediction": (_empty, "predicted outputs are not supported"),
    "web_search_options": (lambda v: v is None, "web search is not supported"),
    "reasoning_effort": (lambda v: v is None, "a reasoning effort cannot be set"),
    "verbosity": (lambda v: v in (None, "medium"), "a verbosity cannot be set"),
    "moderation": (_empty, "moderation is not supported"),
    "suffix": (_empty, "a suffix (infilling) is not supported"),
    "best_of": (lambda v: v in (None, 1), "best_of is not supported"),
}
"""Fields that would change the meaning: the neutral values that pass, and the reason of the refusal."""

_MESSAGE_FIELDS: Final = ("role", "content", "name")
_MESSAGE_NEUTRAL: Final = ("refusal", "annotations", "audio", "tool_calls", "function_call", "tool_call_id")
_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SEED_BITS: Final = (1 << 63) - 1


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides text. `include_obfuscation` is padding of OpenAI's and is ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class HearthOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hearth's own options in a body: `ledger` asks for the cold-start ledger in the answer."""

    ledger: bool = False


class _Body(msgspec.Struct, kw_only=True):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    hearth: HearthOptions | None = None


class ChatBody(_Body, kw_only=True):
    """The body of `POST /v1/chat/completions`, before its values are checked."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(_Body, kw_only=True):
    """The body of `POST /v1/completions`, before its values are checked."""

    prompt: str | list[str | int | list[int]] | None = None
    logprobs: int | None = None
    echo: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A validated client call: `choices` completions of each prompt. `seed` None: the caller draws one at random."""

    chat: bool
    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    choices: int
    seed: int | None
    stream: bool
    include_usage: bool
    ledger: bool
    echo: bool


# -- in ---------------------------------------------------------------------------------------------------------------


def bad(message: str, param: str | None = None) -> HearthError:
    """The caller's fault, in one sentence, with the field's name."""
    return HearthError(Code.INVALID_REQUEST, message, param=param)


_PATH: Final = re.compile(r"^(?P<what>.*?)(?: - at `\$?\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD: Final = re.compile(r"field `([^`]*)`")


def decode_json(body: bytes, kind: type[B] | Any) -> B:
    """The value of type `kind` in a JSON body. Raises `HearthError` with the path of the first fault in `param`."""
    try:
        value: B = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        found = _PATH.match(str(error))
        what = found["what"] if found else str(error)
        path = (found["path"] if found else None) or None
        named = _FIELD.search(what)
        if named:
            path = f"{path}.{named[1]}" if path else named[1]
        sentence = what.replace("`", "").replace("...", "items") + "."
        raise bad(f"{path}: {sentence}" if path else sentence, path) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise bad("The body is nested too deeply.") from error
    return value


def _decode_body(body: bytes, kind: type[W]) -> W:
    fields: dict[str, msgspec.Raw] = decode_json(body, dict[str, msgspec.Raw])
    names = kind.__struct_fields__
    for name, raw in fields.items():
        if name in names or name in HARMLESS:
            continue
        if name not in REFUSED:
            raise bad(f"Unknown field {name[:64]!r}.", name[:64])
        neutral, reason = REFUSED[name]
        if not neutral(decode_json(bytes(raw), Any)):
            raise bad(f"{name}: {reason}.", name)
    return decode_json(body, kind)


def read_chat(body: bytes, limits: Limits) -> Call:
    """The call in the body of `POST /v1/chat/completions`. Raises `HearthError`."""
    chat = _decode_body(body, ChatBody)
    if chat.max_tokens is not None and chat.max_completion_tokens is not None:
        raise bad("Give max_tokens or max_completion_tokens, not both.", "max_tokens")
    name = "max_tokens" if chat.max_tokens is not None else "max_completion_tokens"
    max_tokens = chat.max_tokens if chat.max_tokens is not None else chat.max_completion_tokens
    logprobs = None
    if chat.logprobs:
        logprobs = _within("top_logprobs", chat.top_logprobs or 0, 0, limits.max_logprobs)
    elif chat.top_logprobs:
        raise bad("top_logprobs needs logprobs to be true.", "top_logprobs")
    prompt = ChatPrompt(messages=_read_messages(chat.messages, limits))
    sampling = _read_sampling(chat, limits, max_tokens=max_tokens, max_tokens_name=name, logprobs=logprobs)
    return _call(chat, (prompt,), sampling, limits, chat=True, echo=False)


def read_completion(body: bytes, limits: Limits) -> Call:
    """The call in the body of `POST /v1/completions`. Raises `HearthError`."""
    completion = _decode_body(body, CompletionBody)
    logprobs = completion.logprobs
    if logprobs is not None:
        _within("logprobs", logprobs, 0, limits.max_logprobs)
        if completion.echo:
            raise bad("echo with logprobs is not supported: the prompt's log probabilities are not computed.", "echo")
    max_tokens = 16 if completion.max_tokens is None else completion.max_tokens
    sampling = _read_sampling(
        completion, limits, max_tokens=max_tokens, max_tokens_name="max_tokens", logprobs=logprobs
    )
    prompts = _read_prompts(completion.prompt, limits)
    return _call(completion, prompts, sampling, limits, chat=False, echo=bool(completion.echo))


def _call(
    body: _Body, prompts: tuple[Prompt, ...], sampling: Sampling, limits: Limits, *, chat: bool, echo: bool
) -> Call:
    if not body.model or len(body.model) > limits.max_name_chars:
        raise bad(f"model must have 1 to {limits.max_name_chars} characters.", "model")
    choices = 1 if body.n is None else _within("n", body.n, 1, limits.max_choices)
    if choices * len(prompts) > limits.max_requests:
        raise bad(f"n times the number of prompts must not exceed {limits.max_requests}.", "prompt")
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options needs stream to be true.", "stream_options")
    seed = body.seed
    if seed is not None:
        _within("seed", seed, -(1 << 63), (1 << 63) - 1)
    return Call(
        chat=chat,
        model=body.model,
        prompts=prompts,
        sampling=sampling,
        choices=choices,
        seed=seed,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        ledger=body.hearth is not None and body.hearth.ledger,
        echo=echo,
    )


N = TypeVar("N", int, float)


def _within(name: str, value: N, low: N, high: N) -> N:
    if not (math.isfinite(value) and low <= value <= high):
        raise bad(f"{name} must be between {low} and {high}, not {_short(value)}.", name)
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


def _read_sampling(
    body: _Body, limits: Limits, *, max_tokens: int | None, max_tokens_name: str, logprobs: int | None
) -> Sampling:
    if max_tokens is not None:
        _within(max_tokens_name, max_tokens, 1, limits.max_tokens)
    top_k = 0 if body.top_k is None else _within("top_k", body.top_k, -1, 1 << 30)
    top_p = 1.0 if body.top_p is None else _within("top_p", body.top_p, 0.0, 1.0)
    if top_p == 0.0:  # nothing but the most likely token
        top_k, top_p = 1, 1.0
    repetition = 1.0 if body.repetition_penalty is None else body.repetition_penalty
    if not (math.isfinite(repetition) and 0.0 < repetition <= 100.0):
        raise bad("repetition_penalty must be greater than 0 and at most 100.", "repetition_penalty")
    stop_token_ids = body.stop_token_ids or []
    if len(stop_token_ids) > limits.max_stop_token_ids:
        raise bad(f"stop_token_ids must not have more than {limits.max_stop_token_ids} items.", "stop_token_ids")
    for position, token_id in enumerate(stop_token_ids):
        _token_id(token_id, f"stop_token_ids[{position}]")
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else _within("temperature", body.temperature, 0.0, 2.0),
        top_p=top_p,
        top_k=max(0, top_k),
        min_p=0.0 if body.min_p is None else _within("min_p", body.min_p, 0.0, 1.0),
        presence_penalty=_penalty("presence_penalty", body.presence_penalty),
        frequency_penalty=_penalty("frequency_penalty", body.frequency_penalty),
        repetition_penalty=repetition,
        logit_bias=_read_logit_bias(body.logit_bias, limits),
        stop=_read_stop(body.stop, limits),
        stop_token_ids=tuple(stop_token_ids),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )


def _penalty(name: str, value: float | None) -> float:
    return 0.0 if value is None else _within(name, value, -2.0, 2.0)


def _token_id(value: int, name: str) -> int:
    if not 0 <= value < 1 << 31:
        raise bad(f"{name}: {_short(value)} is no token id.", name)
    return value


def _read_logit_bias(bias: dict[str, float] | None, limits: Limits) -> dict[int, float] | None:
    if not bias:
        return None
    if len(bias) > limits.max_logit_bias:
        raise bad(f"logit_bias must not have more than {limits.max_logit_bias} items.", "logit_bias")
    result: dict[int, float] = {}
    for key, value in bias.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 10:
            raise bad(f"logit_bias: {_short(key)} is no token id.", "logit_bias")
        if not (math.isfinite(value) and -100.0 <= value <= 100.0):
            raise bad(f"logit_bias[{key}] must be between -100 and 100.", "logit_bias")
        result[_token_id(int(key), "logit_bias")] = value
    return result


def _read_stop(stop: str | list[str] | None, limits: Limits) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > limits.max_stop:
        raise bad(f"stop must not have more than {limits.max_stop} strings.", "stop")
    for string in strings:
        if not string:
            raise bad("A stop string must not be empty.", "stop")
        if len(string) > limits.max_stop_chars:
            raise bad(f"A stop string must not be longer than {limits.max_stop_chars} characters.", "stop")
    return strings


def _read_messages(messages: list[dict[str, Any]], limits: Limits) -> tuple[ChatMessage, ...]:
    if not messages:
        raise bad("messages must not be empty.", "messages")
    if len(messages) > limits.max_messages:
        raise bad(f"messages must not have more than {limits.max_messages} items.", "messages")
    result = tuple(_read_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    _bound_chars(sum(len(message.content) for message in result), "messages", limits)
    return result


def _bound_chars(chars: int, param: str, limits: Limits) -> None:
    if chars > limits.max_prompt_chars:
        message = f"{param}: {chars} characters are more than the limit of {limits.max_prompt_chars}."
        raise HearthError(Code.PROMPT_TOO_LONG, message, param=param)


def _read_message(message: dict[str, Any], at: str) -> ChatMessage:
    for key, value in message.items():
        if key in _MESSAGE_FIELDS or (key in _MESSAGE_NEUTRAL and _empty(value)):
            continue
        what = "is not supported" if key in _MESSAGE_NEUTRAL else "is an unknown field"
        raise bad(f"{at}.{key[:64]} {what}.", f"{at}.{key[:64]}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad(f"{at}.role must be one of {', '.join(_ROLES)}, not {_short(role)}.", f"{at}.role")
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        raise bad(f"{at}.name must be a string.", f"{at}.name")
    return ChatMessage(role=_ROLES[role], content=_read_content(message.get("content"), f"{at}.content"), name=name)


def _read_content(content: Json, at: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise bad(f"{at} must be a string or a list of text parts.", at)
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise bad(f"{at}[{i}] must be an object with a type.", f"{at}[{i}]")
        if kind != "text":
            raise bad(f"{at}[{i}]: parts of type {_short(kind)} are not supported, only 'text'.", f"{at}[{i}].type")
        text = part.get("text")
        if not isinstance(text, str):
            raise bad(f"{at}[{i}].text must be a string.", f"{at}[{i}].text")
        texts.append(text)
    return "".join(texts)


def _read_prompts(prompt: str | list[str | int | list[int]] | None, limits: Limits) -> tuple[Prompt, ...]:
    if prompt is None:
        raise bad("prompt is required.", "prompt")
    if isinstance(prompt, str):
        return (_text_prompt(prompt, "prompt", limits),)
    if not prompt:
        raise bad("prompt must not be empty.", "prompt")
    if isinstance(prompt[0], int):
        return (_tokens_prompt(prompt, "prompt", limits),)
    if len(prompt) > limits.max_requests:
        raise bad(f"prompt must not have more than {limits.max_requests} items.", "prompt")
    result: list[Prompt] = []
    for i, item in enumerate(prompt):
        if type(item) is not type(prompt[0]):
            raise bad("prompt must be a string, a list of strings, of token ids or of lists of token ids.", "prompt")
        at = f"prompt[{i}]"
        result.append(_text_prompt(item, at, limits) if isinstance(item, str) else _tokens_prompt(item, at, limits))
    return tuple(result)


def _text_prompt(text: str, at: str, limits: Limits) -> TextPrompt:
    if not text:
        raise bad(f"{at} must not be empty.", at)
    _bound_chars(len(text), at, limits)
    return TextPrompt(text=text)


def _tokens_prompt(tokens: Sequence[str | int | list[int]], at: str, limits: Limits) -> TokensPrompt:
    if not tokens:
        raise bad(f"{at} must not be empty.", at)
    _bound_chars(len(tokens), at, limits)
    ids: list[int] = []
    for token in tokens:
        if not isinstance(token, int):
            raise bad(f"{at} must hold either strings or token ids, not both.", at)
        ids.append(_token_id(token, at))
    return TokensPrompt(token_ids=tuple(ids))


INFO_HEADERS: Final = ("x-hearth-info", "x-hearth-ledger")


def read_switch(name: str, text: str) -> bool:
    """The meaning of a header that turns something on. Raises `HearthError`: a typo must not silently mean "off"."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("", "0", "false", "no", "off"):
        return False
    raise bad(f"The header {name} must be true or false, not {_short(text)}.", name)


# -- from a call to requests ------------------------------------------------------------------------------------------


def derive_seed(seed: int, choice: int) -> int:
    """The seed of a choice, 0 ≤ seed < 2⁶³; choice 0 keeps the given one. SplitMix64 (Steele, Lea, Flood 2014)."""
    if choice == 0:
        return seed & _SEED_BITS
    z = (seed + choice * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & _SEED_BITS


def expand(call: Call, drawn_seed: int) -> list[tuple[Prompt, Sampling]]:
    """The requests of a call in the order of the answer's choices: all of the first prompt, all of the second, …

    A given seed makes a prompt's answers independent of the other prompts of the call; with a drawn one, every
    request gets noise of its own.
    """
    result: list[tuple[Prompt, Sampling]] = []
    for prompt in call.prompts:
        for choice in range(call.choices):
            seed = derive_seed(drawn_seed, len(result)) if call.seed is None else derive_seed(call.seed, choice)
            result.append((prompt, msgspec.structs.replace(call.sampling, seed=seed)))
    return result


def admit(call: Call, record: DeploymentRecord | None) -> Failure | None:
    """Why this deployment cannot answer this call, as far as its record tells; None: it can be queued."""
    if record is None or record.state is DeploymentState.DELETING:
        message = f"The model {_short(call.model)} does not exist."
        return Failure(code=Code.UNKNOWN_MODEL, message=message, param="model")
    if record.failure is not None:
        return record.failure
    checkpoint = record.checkpoint
    if checkpoint is None:
        return None
    if call.chat and not checkpoint.has_chat_template:
        message = (
            f"The model {_short(call.model)} has no chat template, so it cannot hold a conversation; "
            "use /v1/completions."
        )
        return Failure(code=Code.INVALID_REQUEST, message=message, param="model")
    context = min(record.spec.max_context_tokens or checkpoint.max_context_tokens, checkpoint.max_context_tokens)
    vocab = checkpoint.vocab_tokens
    for prompt in call.prompts:
        if not isinstance(prompt, TokensPrompt):
            continue
        if max(prompt.token_ids) >= vocab:
            message = f"prompt: token ids must be smaller than the vocabulary's {vocab}."
            return Failure(code=Code.INVALID_REQUEST, message=message, param="prompt")
        if len(prompt.token_ids) >= context:
            message = f"The prompt has {len(prompt.token_ids)} tokens; the model's context has {context}."
            return Failure(code=Code.PROMPT_TOO_LONG, message=message, param="prompt")
    for name, ids in (("logit_bias", call.sampling.logit_bias or ()), ("stop_token_ids", call.sampling.stop_token_ids)):
        if any(token_id >= vocab for token_id in ids):
            message = f"{name}: token ids must be smaller than the vocabulary's {vocab}."
            return Failure(code=Code.INVALID_REQUEST, message=message, param=name)
    return None
