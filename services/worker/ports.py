"""What the worker's cores and shell know about engines, tokenizers and loaders: protocols and the engine's events.

Pure: no torch here. `services/worker/engine.py`, `loader.py` and `tokenizer.py` implement these for real models,
`services/worker/null_engine.py` for measuring the control plane.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from shared.contracts.requests import Prompt, Sampling
from shared.contracts.residency import Lease
from shared.errors import Failure


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Natural logarithms of the model's own distribution (before penalties, bias and temperature) at one position.

    `top` holds (token id, logprob) pairs, most likely first; as many as `Sampling.logprobs` asks for.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepToken:
    """One new token of one sequence. Tokens of a sequence come in order, from index `first_index` on.

    `logprobs` is there if and only if the sequence's `Sampling.logprobs` is not None. The EOS or stop token that ends
    a sequence is reported like any other; the `SequenceEnd` that follows it in the same list says STOP.
    """

    sequence_id: str
    token_id: int
    logprobs: PositionLogprobs | None = None


class EndReason(enum.Enum):
    """Why an engine stopped working on a sequence."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """The last event of a sequence; exactly one follows every `submit`, after which its KV blocks are free again.

    `failure` is there if and only if `reason` is FAILED. `cached_tokens` is the number of leading tokens whose KV cache
    was shared instead of computed.
    """

    sequence_id: str
    reason: EndReason
    failure: Failure | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine's thread failed. Every live sequence has had its `SequenceEnd` (FAILED) before; nothing comes after.

    Anything submitted from now on ends at once with the same failure. `close` still has to be called.
    """

    failure: Failure


@dataclass(frozen=True, slots=True)
class KvShort:
    """The KV cache is too small for what the engine was given: `sequences` wait for blocks, though they have begun or
    there would be a slot for them. Told when it begins and at most once a second while it lasts."""

    sequences: int


EngineEvent = StepToken | SequenceEnd | EngineDied | KvShort

# Called on the engine's own thread (or on the caller's, for a submission that is refused at once), with everything that
# one step brought, in order. It must be quick, thread-safe and must not raise: typically `Driver.post_threadsafe`.
Sink = Callable[[Sequence[EngineEvent]], None]


class Engine(Protocol):
    """Generates tokens for many sequences. All methods are thread-safe and return at once, `close` excepted."""

    @property
    def name(self) -> str:
        """`batching`, `sequential` or `null`."""

    @property
    def slots(self) -> int:
        """How many sequences it works on at the same time; more may be submitted and wait their turn."""

    @property
    def max_sequence_tokens(self) -> int:
        """The most tokens (prompt and output) that one sequence may have: the model's context or the KV cache."""

    def submit(
        self,
        sequence_id: str,
        token_ids: Sequence[int],
        *,
        first_index: int,
        max_new_tokens: int,
        sampling: Sampling,
    ) -> None:
        """Generate up to `max_new_tokens` after `token_ids`, which are the prompt and the output tokens so far.

        `first_index` is the number of output tokens so far, that is the index of the first new token: noise depends on
        (seed, index) only, and penalties count the last `first_index` of `token_ids` as output. The sequence ends with
        the first EOS token (unless `sampling.ignore_eos`) or one of `sampling.stop_token_ids`. `sampling.max_tokens`
        and `sampling.stop` are the caller's business. What a sequence computed stays, until its memory is needed, for
        those that begin with the same tokens: also for what went into its last step, so that one new token is enough to
        make a prefix known (`SequenceEnd.cached_tokens`). `max_new_tokens` is cut to what `max_sequence_tokens` leaves
        room for. What is wrong with a submission becomes its `SequenceEnd`: PROMPT_TOO_LONG when the tokens leave no
        room for a new one, INVALID_REQUEST for token ids out of the vocabulary, BUSY when the engine holds too many.
        Raises ValueError only for a sequence id that is live; it may be used again after its end.
        """

    def cancel(self, sequence_id: str) -> None:
        """Stop a sequence within one step: `SequenceEnd` (CANCELLED). Unknown and ended ids are ignored."""

    @property
    def kv_used_bytes(self) -> int:
        """Bytes of the KV cache that sequences hold; what is only kept for prefix sharing does not count."""

    @property
    def step_began_at(self) -> float | None:
        """The monotonic second at which the step under way began; None between steps. For who looks after a hang."""

    def allow_until(self, at: float) -> None:
        """The parameters are what they should be until monotonic second `at` (`time.monotonic`; infinity: for good).

        No step begins after it, and what a step that was under way then brought is not told, before a later second is
        allowed: the bytes may have become another checkpoint's.
        """

    def close(self) -> None:
        """Stop the thread, free KV cache and parameters. Live sequences end CANCELLED. Blocks for at most one step."""


class TextStream(Protocol):
    """Turns the tokens of one sequence into text, piece by piece. A function of the pushed tokens only (replayable)."""

    def push(self, token_id: int) -> str:
        """The text that this token releases; empty while a character is incomplete. Special tokens have no text."""

    def finish(self) -> str:
        """What is still held back (an incomplete character, as U+FFFD). Call once, at the end."""


class Tokenizer(Protocol):
    """Text to token ids and back, for one checkpoint. Thread-safe."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `ChatPrompt`s can be encoded."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a sequence, from generation_config.json, config.json and the tokenizer."""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; never empty.

        Raises HearthError: UNSUPPORTED for a conversation when the model has no chat template, INVALID_REQUEST when the
        template refuses the conversation, the prompt is empty or a token id is out of the vocabulary.
        """

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A fresh stream, as at index 0. To go on after a resume, push the last tokens so far and drop their text."""

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of these tokens at once (for `echo`)."""

    def text_of(self, token_id: int) -> str:
        """The text of one token by itself, special tokens included (for logprobs). May contain U+FFFD."""


@dataclass(frozen=True, slots=True)
class AttachTimes:
    """Where the seconds of an attach went. `parameters_s`: views (CPU) or copies (CUDA); `waited_s`: nothing was left
    to do but to wait for bytes of an arriving lease; `total_s` is the sum. `arrived_s` is when the last of those bytes
    was there, counted from the beginning (0: all were there before)."""

    manifest_s: float = 0.0
    skeleton_s: float = 0.0
    parameters_s: float = 0.0
    waited_s: float = 0.0
    tokenizer_s: float = 0.0
    engine_s: float = 0.0
    total_s: float = 0.0
    arrived_s: float = 0.0


class Loaded(Protocol):
    """A model attached to this worker: what `Loader.load` returns."""

    @property
    def engine(self) -> Engine: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_context_tokens(self) -> int:
        """The limit in force: the smallest of the deployment's, the model's and the engine's."""

    @property
    def memory_bytes(self) -> int:
        """Device memory of this replica: KV cache, buffers, and on CUDA the parameters."""

    @property
    def times(self) -> AttachTimes: ...

    def close(self) -> None:
        """Close the engine and drop every view on the lease's bytes, in this order. Blocks; idempotent.

        The lease may be released to the store only after this has returned: before, the parameters *are* the store's
        memory, and the store may hand it to another checkpoint as soon as it is released.
        """


class LoadWatch(Protocol):
    """Who follows a load, and may end it. Called on the load's thread; must be quick and must not raise."""

    @property
    def stopped(self) -> bool:
        """Whether the load shall end, as failed, instead of waiting any longer."""

    def arrived(self, done_bytes: int, total_bytes: int) -> None:
        """So many of the image's bytes are there; told at most ten times a second, while the load waits."""

    def consumed(self, chunks: int) -> None:
        """The first `chunks` chunks of an image that streams through a window have been taken."""


class Unwatched:
    """Nobody follows. See `LoadWatch`."""

    stopped = False

    def arrived(self, done_bytes: int, total_bytes: int) -> None:
        """See `LoadWatch`."""

    def consumed(self, chunks: int) -> None:
        """See `LoadWatch`."""


UNWATCHED: Final = Unwatched()


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A worker's device. `device` is "cpu" or "cuda:N"; `memory_bytes` what is free on it at start (CPU: all DRAM)."""

    device: str
    device_name: str
    memory_bytes: int


class Loader(Protocol):
    """Attaches leased checkpoints to this worker's device. Blocking: call it on a thread of your own."""

    @property
    def device(self) -> DeviceFacts:
        """The device that it attaches to; known after `warm_up`."""

    def warm_up(self) -> None:
        """Pay once, before any model is asked for, what the first load would otherwise pay (imports, first kernels)."""

    def prepare(self, segment: str) -> None:
        """Map the store's shared-memory file ahead of need (and register it with the device), thread-safe.

        A failure costs nothing but the time that the first load then takes more.
        """

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
    ) -> Loaded:
        """Attach a checkpoint and start its engine; thread-safe.

        The bytes of a lease may still be arriving (`Lease.arrival`): everything that needs none of them is done
        meanwhile, and `watch` hears how far they are. An image that comes through a window is copied into memory of
        this worker's own, and counts in `Loaded.memory_bytes`.

        `kv_bytes` bounds the KV cache, `slots` the sequences in one step, `max_context_tokens` the tokens of one
        sequence (None: the model's own limit). `engine` is `auto`, `batching` or `sequential`; `auto` finds out
        whether the architecture can be batched. Raises HearthError: UNSUPPORTED (architecture), CHECKPOINT_CORRUPT
        (the manifest and the model do not agree), CHECKPOINT_UNAVAILABLE (segment or directory cannot be read, or bytes
        will not arrive), OUT_OF_MEMORY (`kv_bytes` is too small for a single block, or the device is full), DRAINING
        (`watch` stopped it).
        """

    def close(self) -> None:
        """Unmap what is mapped. Every `Loaded` must have been closed before."""
