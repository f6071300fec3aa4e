"""A modelled engine: what it generates is a pure function of (request seed, index), how long it takes is arithmetic.

Since the tokens of every stream are known beforehand, a stream that was interrupted, resumed, moved or mixed up with
another one is told from the one that should have been, token by token. The engine itself insists on being given the
right tokens so far.

A step takes `step_s`, and `prefill_token_s` for every token that it prefills; every sequence whose prefill is over gets
one token. The KV cache keeps prefixes in blocks, and shares them: a prefill computes only what no block holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from services.worker.ports import (
    AttachTimes,
    EndReason,
    EngineDied,
    EngineEvent,
    KvShort,
    SequenceEnd,
    Sink,
    StepToken,
)
from shared.contracts.generation import FinishReason
from shared.contracts.requests import Prompt, Request, Sampling, TextPrompt, TokensPrompt
from shared.errors import Code, Failure, HearthError
from simulator.kernel import Kernel

EOS: Final = 0
POISON: Final = 0x2620  # in a prompt: a step with it kills the process
NO_SEED: Final = 0  # of sequences that are prefilled for their KV cache only: nobody gets their tokens
HALF: Final = 1  # half a character: its text comes with the next token
BLOCK_TOKENS: Final = 4
CACHED_BLOCKS: Final = 512

# -- what every stream must be ----------------------------------------------------------------------------------------


@lru_cache(maxsize=65_536)
def token_at(seed: int, index: int) -> int:
    """The output token at `index` of the request with this seed: a letter, now and then half a character or the end.

    The mixing is that of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    mixed ^= mixed >> 31
    if mixed % 97 == 0:
        return EOS
    if mixed % 7 == 0:
        return HALF
    return 97 + (mixed >> 8) % 26


@dataclass(frozen=True, slots=True)
class Expected:
    """What a client must get, if its request does not fail."""

    token_ids: tuple[int, ...]
    text: str
    reason: FinishReason


def expected(request: Request, *, max_context_tokens: int) -> Expected:
    """The undisturbed stream of a request, worked out without any of the code that makes it."""
    sampling = request.sampling
    room = max_context_tokens - len(prompt_ids(request.prompt))
    limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    token_ids: list[int] = []
    text, half = "", False
    while len(token_ids) < limit:
        token_id = token_at(sampling.seed, len(token_ids))
        token_ids.append(token_id)
        if token_id == EOS:
            return Expected(tuple(token_ids), text + ("\ufffd" if half else ""), FinishReason.STOP)
        if token_id == HALF:
            half = True
            continue
        text += ("é" if half else "") + chr(token_id)
        half = False
        stopped = _stopped(text, sampling.stop)
        if stopped is not None:
            return Expected(tuple(token_ids), stopped, FinishReason.STOP)
    return Expected(tuple(token_ids), text + ("\ufffd" if half else ""), FinishReason.LENGTH)


def _stopped(text: str, stops: Sequence[str]) -> str | None:
    """The text before the stop string that ends first, the longest of those; None if there is none."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return None


def prompt_ids(prompt: Prompt) -> tuple[int, ...]:
    """The token ids of a prompt: of a text its code points."""
    if isinstance(prompt, TokensPrompt):
        return prompt.token_ids
    assert isinstance(prompt, TextPrompt), "modelled requests have no conversations"
    return tuple(map(ord, prompt.text))


# -- the tokenizer ----------------------------------------------------------------------------------------------------


class LetterTokenizer:
    """A token is a code point; see `EOS` and `HALF`."""

    has_chat_template = False
    eos_token_ids = frozenset({EOS})

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """See `Tokenizer`."""
        token_ids = list(prompt_ids(prompt))
        if not token_ids:
            raise HearthError(Code.INVALID_REQUEST, "The prompt is empty.", param="prompt")
        return token_ids

    def stream(self, *, skip_special: bool = True) -> LetterStream:
        """See `Tokenizer`."""
        return LetterStream()

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See `Tokenizer`."""
        return "".join(map(chr, token_ids))

    def text_of(self, token_id: int) -> str:
        """See `Tokenizer`."""
        return chr(token_id)


class LetterStream:
    """See `TextStream`."""

    def __init__(self) -> None:
        self._half = False

    def push(self, token_id: int) -> str:
        """See `TextStream`."""
        if token_id == HALF:
            self._half = True
            return ""
        text = ("é" if self._half else "") + chr(token_id)
        self._half = False
        return text

    def finish(self) -> str:
        """See `TextStream`."""
        return "\ufffd" if self._half else ""


# -- the engine -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Seconds: of a step, per prefilled token, of loading the model. `slice_tokens` bounds the prefill of one step."""

    step_s: float = 0.05
    prefill_token_s: float = 0.002
    attach_s: float = 0.2
    slice_tokens: int = 16


@dataclass(slots=True)
class _Sequence:
    id: str
    token_ids: list[int]
    index: int
    left: int
    sampling: Sampling
    begun: bool = False
    computed: int = 0
    cached: int = 0
    poison: bool = False


class ModelEngine:
    """See `Engine`, and the module. `sink` is called at the virtual second at which a step ends; `struck` when one
    with a poisonous prompt does."""

    name = "model"
    step_began_at: float | None = None
    kv_used_bytes: int = 0

    def __init__(
        self,
        kernel: Kernel,
        *,
        speeds: Speeds,
        slots: int,
        max_sequence_tokens: int,
        kv_tokens: int,
        sink: Sink,
        struck: Callable[[], None] = lambda: None,
    ) -> None:
        self.slots: Final = slots
        self.max_sequence_tokens: Final = max_sequence_tokens
        self._kernel: Final = kernel
        self._speeds: Final = speeds
        self._kv_tokens: Final = kv_tokens
        self._sink: Final = sink
        self._struck: Final = struck
        self._live: dict[str, _Sequence] = {}
        self._cancelled: list[str] = []
        self._blocks: dict[tuple[int, ...], None] = {}
        self._working = False
        self._paused = False
        self._due: list[_Sequence] | None = None
        self._failure: Failure | None = None
        self._closed = False
        self._until = math.inf
        self._told_short_at = -math.inf

    @property
    def live(self) -> tuple[str, ...]:
        """The sequences that it works on, or will."""
        return tuple(self._live)

    def submit(
        self, sequence_id: str, token_ids: Sequence[int], *, first_index: int, max_new_tokens: int, sampling: Sampling
    ) -> None:
        """See `Engine`. Fails the run if the output tokens so far are not what they must be."""
        assert not self._closed, "submitted to a closed engine"
        if sequence_id in self._live:
            raise ValueError(f"sequence {sequence_id} is live")
        so_far = tuple(token_ids[len(token_ids) - first_index :]) if first_index else ()
        if sampling.seed != NO_SEED:
            right = tuple(token_at(sampling.seed, index) for index in range(first_index))
            assert so_far == right, f"{sequence_id} is resumed from tokens that are not its own"
        refusal = self._failure
        left = min(max_new_tokens, self.max_sequence_tokens - len(token_ids))
        if refusal is None and left <= 0:
            refusal = Failure(code=Code.PROMPT_TOO_LONG, message="The tokens leave no room for a new one.")
        if refusal is not None:
            self._sink([SequenceEnd(sequence_id, EndReason.FAILED, refusal)])
            return
        self._live[sequence_id] = _Sequence(
            sequence_id, list(token_ids), first_index, left, sampling, poison=POISON in token_ids
        )
        self._begin()

    def cancel(self, sequence_id: str) -> None:
        """See `Engine`."""
        if self._live.pop(sequence_id, None) is not None:
            self._cancelled.append(sequence_id)
            if not self._working:
                self._kernel.after(0.0, self._tell_cancelled)

    def allow_until(self, at: float) -> None:
        """See `Engine`."""
        self._until = at
        self._begin()

    def close(self) -> None:
        """See `Engine`."""
        self._closed = True
        self._live.clear()

    # -- faults

    def die(self, failure: Failure) -> None:
        """Its thread fails."""
        if self._failure is not None or self._closed:
            return
        self._failure = failure
        ends: list[EngineEvent] = [SequenceEnd(id, EndReason.FAILED, failure) for id in self._live]
        self._live.clear()
        self._sink([*ends, EngineDied(failure)])

    def pause(self) -> None:
        """The process is stopped: no step ends."""
        self._paused = True

    def resume(self) -> None:
        """The process goes on; a step that should have ended ends now."""
        self._paused = False
        due, self._due = self._due, None
        if due is not None:
            self._end(due)

    # -- steps

    def _begin(self) -> None:
        if self._working or self._failure is not None or self._closed or not self._live:
            return
        if self._kernel.now >= self._until:
            return
        batch = self._batch()
        speeds = self._speeds
        prefilled = 0
        for sequence in batch:
            missing = len(sequence.token_ids) - sequence.computed
            if missing > 1 or not sequence.begun:
                slice_tokens = min(missing, max(1, speeds.slice_tokens - prefilled))
                prefilled += slice_tokens
                sequence.computed += slice_tokens
                sequence.begun = True
            else:
                sequence.computed += 1
        self._working = True
        self.step_began_at = self._kernel.now
        self._kernel.after(speeds.step_s + prefilled * speeds.prefill_token_s, lambda: self._end(batch))

    def _batch(self) -> list[_Sequence]:
        """Who takes part in the next step: in the order of submission, as the slots and the KV cache allow."""
        batch: list[_Sequence] = []
        room = self._kv_tokens
        for sequence in self._live.values():
            if len(batch) == self.slots:
                break
            needed = len(sequence.token_ids) + sequence.left
            if needed > room and batch:
                continue
            room -= needed
            if not sequence.begun:
                sequence.cached = sequence.computed = self._shared(sequence.token_ids)
            batch.append(sequence)
        waiting = min(self.slots, len(self._live)) - len(batch)
        if waiting > 0 and self._kernel.now >= self._told_short_at + 1.0:
            self._told_short_at = self._kernel.now
            self._kernel.after(0.0, lambda: self._tell_short(waiting))
        return batch

    def _tell_short(self, waiting: int) -> None:
        if not self._closed and self._failure is None:
            self._sink([KvShort(waiting)])

    def _end(self, batch: list[_Sequence]) -> None:
        if self._closed or self._failure is not None:
            return
        if self._paused:
            self._due = batch
            return
        if any(sequence.poison for sequence in batch):
            self._struck()
            return
        self._working = False
        self.step_began_at = None
        events: list[EngineEvent] = [SequenceEnd(id, EndReason.CANCELLED) for id in self._cancelled]
        self._cancelled.clear()
        for sequence in batch:
            if self._live.get(sequence.id) is not sequence or sequence.computed < len(sequence.token_ids):
                continue
            self._keep_blocks(sequence)
            token_id = token_at(sequence.sampling.seed, sequence.index)
            sequence.token_ids.append(token_id)
            sequence.index += 1
            sequence.left -= 1
            events.append(StepToken(sequence.id, token_id))
            stops = token_id == EOS and not sequence.sampling.ignore_eos
            if stops or token_id in sequence.sampling.stop_token_ids or sequence.left == 0:
                reason = EndReason.STOP if stops else EndReason.LENGTH
                events.append(SequenceEnd(sequence.id, reason, cached_tokens=sequence.cached))
                del self._live[sequence.id]
        if events:
            self._sink(events)
        self._begin()

    def _tell_cancelled(self) -> None:
        if self._cancelled and not self._working and not self._closed:
            ends: list[EngineEvent] = [SequenceEnd(id, EndReason.CANCELLED) for id in self._cancelled]
            self._cancelled.clear()
            self._sink(ends)

    # -- the KV cache

    def _shared(self, token_ids: Sequence[int]) -> int:
        """How many leading tokens some block holds; at least one token is always computed."""
        shared = 0
        for end in range(BLOCK_TOKENS, len(token_ids), BLOCK_TOKENS):
            if tuple(token_ids[:end]) not in self._blocks:
                break
            shared = end
        return shared

    def _keep_blocks(self, sequence: _Sequence) -> None:
        token_ids = sequence.token_ids
        whole = len(token_ids) // BLOCK_TOKENS * BLOCK_TOKENS
        for end in range(whole, 0, -BLOCK_TOKENS):
            block = tuple(token_ids[:end])
            if block in self._blocks:
                break
            self._blocks[block] = None
        while len(self._blocks) > CACHED_BLOCKS:
            del self._blocks[next(iter(self._blocks))]


@dataclass(slots=True)
class ModelLoaded:
    """See `Loaded`."""

    engine: ModelEngine
    max_context_tokens: int
    memory_bytes: int
    tokenizer: LetterTokenizer = field(default_factory=LetterTokenizer)
    times: AttachTimes = field(default_factory=AttachTimes)

    def close(self) -> None:
        """See `Loaded`."""
        self.engine.close()
