"""An engine that costs nothing, and a loader without a store: for measuring everything around the model.

It answers every sequence with a fixed pattern of letters as fast as its thread runs, honours `max_new_tokens` and
cancellation, and never meets an EOS. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from services.worker.engine_thread import Submission, ThreadedEngine
from services.worker.ports import (
    UNWATCHED,
    AttachTimes,
    DeviceFacts,
    EndReason,
    EngineEvent,
    LoadWatch,
    PositionLogprobs,
    SequenceEnd,
    Sink,
    StepToken,
    TextStream,
)
from shared.contracts.requests import ChatPrompt, Prompt, TextPrompt
from shared.contracts.residency import Lease
from shared.errors import Code, HearthError

VOCAB_TOKENS: Final = 256  # a token is a byte
CONTEXT_TOKENS: Final = 1 << 20
_PATTERN: Final = b"hearth "


class NullStepper:
    """Every step gives every live sequence its next letter; `index` modulo the pattern, so that resuming goes on."""

    name = "null"
    vocab_tokens = VOCAB_TOKENS
    eos_token_ids: frozenset[int] = frozenset()
    memory_bytes = 0
    kv_used_bytes = 0

    def __init__(self, *, slots: int, max_sequence_tokens: int) -> None:
        self.slots = slots
        self.max_sequence_tokens = max_sequence_tokens
        self._live: dict[str, list[int]] = {}  # next index and last index of each
        self._submissions: dict[str, Submission] = {}

    def start(self) -> None:
        """See `Stepper`."""

    def add(self, submission: Submission) -> None:
        """See `Stepper`."""
        self._live[submission.sequence_id] = [
            submission.first_index,
            submission.first_index + submission.max_new_tokens - 1,
        ]
        self._submissions[submission.sequence_id] = submission

    def remove(self, sequence_id: str) -> None:
        """See `Stepper`."""
        self._live.pop(sequence_id, None)
        self._submissions.pop(sequence_id, None)

    def step(self) -> list[EngineEvent]:
        """See `Stepper`."""
        events: list[EngineEvent] = []
        for sequence_id in list(self._live)[: self.slots]:
            index, last = self._live[sequence_id]
            submission = self._submissions[sequence_id]
            token_id = _PATTERN[index % len(_PATTERN)]
            wants_logprobs = submission.sampling.logprobs is not None
            events.append(StepToken(sequence_id, token_id, PositionLogprobs(chosen=0.0) if wants_logprobs else None))
            stopped = token_id in submission.stop_token_ids
            if stopped or index == last:
                self.remove(sequence_id)
                events.append(SequenceEnd(sequence_id, EndReason.STOP if stopped else EndReason.LENGTH))
            else:
                self._live[sequence_id][0] = index + 1
        return events

    def close(self) -> None:
        """See `Stepper`."""
        self._live.clear()
        self._submissions.clear()


class NullTokenizer:
    """A token is a byte. See `Tokenizer`."""

    has_chat_template = True
    eos_token_ids: frozenset[int] = frozenset()

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """See `Tokenizer`."""
        if isinstance(prompt, ChatPrompt):
            token_ids = list("".join(f"{message.role}: {message.content}\n" for message in prompt.messages).encode())
        elif isinstance(prompt, TextPrompt):
            token_ids = list(prompt.text.encode())
        else:
            token_ids = list(prompt.token_ids)
        if not token_ids or not all(0 <= token_id < VOCAB_TOKENS for token_id in token_ids):
            raise HearthError(
                Code.INVALID_REQUEST, "The prompt is empty or has a token id that is no byte.", param="prompt"
            )
        return token_ids

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """See `Tokenizer`."""
        return _LetterStream()

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See `Tokenizer`."""
        return bytes(token_ids).decode(errors="replace")

    def text_of(self, token_id: int) -> str:
        """See `Tokenizer`."""
        return bytes([token_id]).decode(errors="replace")


class _LetterStream:
    def push(self, token_id: int) -> str:
        """See `TextStream`: the pattern has no incomplete characters."""
        return bytes([token_id]).decode(errors="replace")

    def finish(self) -> str:
        """See `TextStream`."""
        return ""


@dataclass(frozen=True)
class NullLoaded:
    """See `Loaded`."""

    engine: ThreadedEngine
    tokenizer: NullTokenizer
    max_context_tokens: int
    memory_bytes: int = 0
    times: AttachTimes = field(default_factory=AttachTimes)

    def close(self) -> None:
        """See `Loaded`."""
        self.engine.close()


class NullLoader:
    """See `Loader`. The lease is not looked at."""

    device = DeviceFacts(device="cpu", device_name="null", memory_bytes=1 << 40)

    def warm_up(self) -> None:
        """See `Loader`."""

    def prepare(self, segment: str) -> None:
        """See `Loader`."""

    def load(
        self,
        lease: Lease,
        *,
        kv_bytes: int,
        slots: int,
        max_context_tokens: int | None,
        sink: Sink,
        engine: str = "auto",
        watch: LoadWatch = UNWATCHED,
    ) -> NullLoaded:
        """See `Loader`."""
        limit = min(max_context_tokens or CONTEXT_TOKENS, CONTEXT_TOKENS)
        stepper = NullStepper(slots=slots, max_sequence_tokens=limit)
        return NullLoaded(
            engine=ThreadedEngine(stepper, sink, name="engine-null"),
            tokenizer=NullTokenizer(),
            max_context_tokens=limit,
        )

    def close(self) -> None:
        """See `Loader`."""
