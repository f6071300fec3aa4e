"""What goes out in OpenAI's form: frames and ends → completions, whole or event by event; errors. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from services.gateway.openai import Call
from shared.contracts.generation import End, Frame, Ledger, Logprobs, TokenLogprob
from shared.contracts.generation import Usage as RequestUsage
from shared.contracts.records import DeploymentRecord
from shared.errors import Code, Failure

REQUEST_ID_HEADER: Final = "x-hearth-request-id"

# -- errors -----------------------------------------------------------------------------------------------------------

_OPENAI_CODES: Final = {
    Code.UNKNOWN_MODEL: "model_not_found",
    Code.UNAUTHENTICATED: "invalid_api_key",
    Code.PROMPT_TOO_LONG: "context_length_exceeded",
    Code.RATE_LIMITED: "rate_limit_exceeded",
}
_OPENAI_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorObject(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's error. `code` is OpenAI's name where it has one for this error, Hearth's otherwise."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in an answer with an error status, and in band in a stream that fails after it was opened."""

    error: ErrorObject


def error_body(failure: Failure) -> bytes:
    """The JSON of a failure in OpenAI's form."""
    status = failure.kind.status
    kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = _OPENAI_CODES.get(failure.code, failure.code.value)
    error = ErrorObject(message=failure.message, type=kind, param=failure.param, code=code)
    return msgspec.json.encode(ErrorBody(error=error))


def error_headers(failure: Failure) -> dict[str, str]:
    """Headers of an error answer: when to come back, and whether OpenAI's clients shall try again by themselves."""
    headers = {"x-should-retry": "true" if failure.kind.retryable else "false"}
    if failure.kind.status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(failure.retry_after_s or 1.0)))
    return headers


# -- answers ----------------------------------------------------------------------------------------------------------


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What a frame adds to a chat message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token, its log probability (natural logarithm) and its UTF-8 bytes; None for a token that is a part of a
    character, whose text is U+FFFD."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob, frozen=True, kw_only=True):
    """The token that was chosen, with the most likely ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities of a chat message's tokens."""

    content: list[ContentLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities in the older form of `/v1/completions`; `text_offset` in characters of the completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatMessageOut(msgspec.Struct, frozen=True, kw_only=True):
    """The answer's message."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a whole chat answer."""

    index: int
    message: ChatMessageOut
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice in a chat stream."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a completion, whole or in a stream."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the prompts whose KV cache was reused."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a call: every prompt once, all completions."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer or one event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[ChatChoice | ChatChunkChoice | TextChoice]
    usage: Usage | UnsetType | None = UNSET
    hearth: dict[str, Any] | UnsetType = UNSET


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `GET /v1/models`."""

    id: str
    created: int
    object: str = "model"
    owned_by: str = "hearth"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `GET /v1/models`."""

    data: list[ModelCard]
    object: str = "list"


def model_card(record: DeploymentRecord) -> ModelCard:
    """A deployment as OpenAI's clients see it."""
    return ModelCard(id=record.spec.name, created=int(record.created_at_s))


_LOWEST_LOGPROB: Final = -9999.0  # what OpenAI says for "not at all": JSON has no infinity


def _logprob(value: float) -> float:
    return value if value > _LOWEST_LOGPROB else _LOWEST_LOGPROB


def _bytes(text: str) -> list[int] | None:
    return None if "\ufffd" in text else list(text.encode())


def _top(token: TokenLogprob) -> TopLogprob:
    return TopLogprob(token=token.text, logprob=_logprob(token.logprob), bytes=_bytes(token.text))


def chat_logprobs(positions: Sequence[Logprobs]) -> ChatLogprobs:
    """Log probabilities in the form of `/v1/chat/completions`."""
    content = [
        ContentLogprob(
            token=position.chosen.text,
            logprob=_logprob(position.chosen.logprob),
            bytes=_bytes(position.chosen.text),
            top_logprobs=[_top(token) for token in position.top],
        )
        for position in positions
    ]
    return ChatLogprobs(content=content)


def _by_text(position: Logprobs) -> dict[str, float]:
    """The most likely tokens and, as OpenAI has it, the chosen one; of tokens with the same text the likeliest."""
    return {token.text: _logprob(token.logprob) for token in reversed((*position.top, position.chosen))}


def text_logprobs(positions: Sequence[Logprobs], offset: int) -> TextLogprobs:
    """Log probabilities in the form of `/v1/completions`; `offset` is where the first token's text begins."""
    offsets: list[int] = []
    for position in positions:
        offsets.append(offset)
        offset += len(position.chosen.text)
    return TextLogprobs(
        tokens=[position.chosen.text for position in positions],
        token_logprobs=[_logprob(position.chosen.logprob) for position in positions],
        top_logprobs=[_by_text(position) for position in positions],
        text_offset=offsets,
    )


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    offset: int = 0
    begun: bool = False
    end: End | None = None


class Rendering:
    """The answer of one call, event by event (`frame`, `end`, `closing`) or whole (`collect`, `end`, `whole`).

    `answer_id` is the answer's id with OpenAI's prefix, `request_id` Hearth's, `created_s` Unix time.
    """

    def __init__(self, call: Call, *, request_id: str, created_s: int) -> None:
        self._call = call
        self._request_id = request_id
        self._id = ("chatcmpl-" if call.chat else "cmpl-") + request_id
        self._created = created_s
        self._object = "chat.completion.chunk" if call.chat else "text_completion"
        self._usage: UnsetType | None = None if call.include_usage else UNSET
        self._logprobs = call.sampling.logprobs is not None
        self._choices = [_Choice() for _ in range(call.choices * len(call.prompts))]

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.end is not None for choice in self._choices)

    def _event(
        self,
        choices: Sequence[ChatChunkChoice | TextChoice],
        hearth: dict[str, Any] | UnsetType = UNSET,
        *,
        usage: bool = False,
    ) -> bytes:
        return msgspec.json.encode(
            Answer(
                id=self._id,
                object=self._object,
                created=self._created,
                model=self._call.model,
                choices=choices,
                usage=self.usage() if usage else self._usage,
                hearth=hearth,
            )
        )

    def frame(self, index: int, frame: Frame) -> bytes | None:
        """The stream's event for a frame of choice `index`; None while it adds nothing that a client can see."""
        return self._piece(index, frame.text, frame.logprobs if self._logprobs else ())

    def _piece(self, index: int, text: str, positions: Sequence[Logprobs]) -> bytes | None:
        if not text and not positions:
            return None
        choice = self._choices[index]
        if self._call.chat:
            delta = Delta(content=text) if choice.begun else Delta(role="assistant", content=text)
            choice.begun = True
            logprobs = chat_logprobs(positions) if positions else None
            return self._event((ChatChunkChoice(index=index, delta=delta, logprobs=logprobs),))
        old = text_logprobs(positions, choice.offset) if positions else None
        choice.offset += sum(len(position.chosen.text) for position in positions)
        return self._event((TextChoice(index=index, text=text, logprobs=old),))

    def end(self, index: int, end: End) -> None:
        """Choice `index` has ended (with a reason, not a failure)."""
        self._choices[index].end = end

    def closing(self, index: int) -> list[bytes]:
        """The events that close choice `index` of a stream, after `end`; the last choice's also close the answer."""
        end = self._choices[index].end
        assert end is not None
        assert end.reason is not None
        events: list[bytes] = []
        held_back = self._piece(index, end.text, ())
        if held_back is not None:
            events.append(held_back)
        last = self.finished
        hearth = self._hearth() if last and self._call.ledger else UNSET
        in_usage = self._call.include_usage
        reason = end.reason.value
        if self._call.chat:
            delta = Delta() if self._choices[index].begun else Delta(role="assistant", content="")
            chat = ChatChunkChoice(index=index, delta=delta, finish_reason=reason)
            events.append(self._event((chat,), UNSET if in_usage else hearth))
        else:
            text = TextChoice(index=index, text="", finish_reason=reason)
            events.append(self._event((text,), UNSET if in_usage else hearth))
        if last and in_usage:
            events.append(self._event((), hearth, usage=True))
        return events

    def collect(self, index: int, frame: Frame) -> None:
        """Keep a frame of choice `index` for the whole answer."""
        choice = self._choices[index]
        choice.texts.append(frame.text)
        if self._logprobs:
            choice.logprobs.extend(frame.logprobs)

    def whole(self) -> bytes:
        """The whole answer, after every choice has ended."""
        choices: list[ChatChoice | TextChoice] = []
        for index, choice in enumerate(self._choices):
            assert choice.end is not None
            assert choice.end.reason is not None
            text = "".join(choice.texts) + choice.end.text
            reason = choice.end.reason.value
            if self._call.chat:
                chat = chat_logprobs(choice.logprobs) if self._logprobs else None
                message = ChatMessageOut(content=text)
                choices.append(ChatChoice(index=index, message=message, logprobs=chat, finish_reason=reason))
            else:
                old = text_logprobs(choice.logprobs, 0) if self._logprobs else None
                choices.append(TextChoice(index=index, text=text, logprobs=old, finish_reason=reason))
        return msgspec.json.encode(
            Answer(
                id=self._id,
                object="chat.completion" if self._call.chat else "text_completion",
                created=self._created,
                model=self._call.model,
                choices=choices,
                usage=self.usage(),
                hearth=self._hearth() if self._call.ledger else UNSET,
            )
        )

    def usage(self) -> Usage:
        """Token counts: the prompt of each group of choices once, every completion."""
        prompt = cached = completion = 0
        for index, choice in enumerate(self._choices):
            counts = choice.end.usage if choice.end is not None else RequestUsage()
            completion += counts.completion_tokens
            if index % self._call.choices == 0:
                prompt += counts.prompt_tokens
                cached += counts.cached_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
        )

    def ledger(self) -> Ledger:
        """The ledger of the first choice."""
        end = self._choices[0].end
        return Ledger() if end is None else end.ledger

    def _hearth(self) -> dict[str, Any]:
        """Hearth's own part: the ledger of the first choice, every field of it, and of all when there are several.

        A choice's request is what runs somewhere and can be migrated; it is named after the call unless it is alone.
        """
        ledgers: list[dict[str, Any]] = []
        for choice in self._choices:
            ledger = Ledger() if choice.end is None else choice.end.ledger
            request_id = self._request_id if choice.end is None else choice.end.request_id
            ledgers.append({"request_id": request_id, **msgspec.structs.asdict(ledger)})
        if len(ledgers) == 1:
            return ledgers[0]
        several = [{"index": index, **ledger} for index, ledger in enumerate(ledgers)]
        return {**ledgers[0], "request_id": self._request_id, "ledgers": several}


def ledger_headers(request_id: str, ledger: Ledger) -> dict[str, str]:
    """The ledger as headers of an answer that is not a stream; times in milliseconds."""
    times = {
        "queue": ledger.queue_s,
        "decision": ledger.decision_s,
        "import": ledger.import_s,
        "read": ledger.read_s,
        "attach": ledger.attach_s,
        "prefill": ledger.prefill_s,
        "decode": ledger.decode_s,
        "pause": ledger.pause_s,
    }
    headers = {f"x-hearth-{name}-ms": f"{1000 * seconds:.1f}" for name, seconds in times.items()}
    headers[REQUEST_ID_HEADER] = request_id
    headers["x-hearth-cold"] = "true" if ledger.cold else "false"
    headers["x-hearth-tier"] = ledger.tier
    for name, count in (
        ("migrations", ledger.migrations),
        ("rounds", ledger.rounds),
        ("recoveries", ledger.recoveries),
    ):
        headers[f"x-hearth-{name}"] = str(count)
    return headers
