"""The thread of an engine: takes submissions and cancellations, steps while there is work, else sleeps.

Pure Python: what a step is, a `Stepper` says (continuous batching, one sequence at a time, or nothing at all). This
module owns everything that all of them must get right: no polling, every submission ends exactly once, a crash fails
every sequence and is told once.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from services.worker.ports import EndReason, EngineDied, EngineEvent, SequenceEnd, Sink
from shared.contracts.requests import Sampling
from shared.errors import Code, Failure

WAITING_LIMIT: Final = 4096  # sequences that one engine holds, running or waiting; the worker's core asks for far fewer


@dataclass(frozen=True, slots=True)
class Submission:
    """A sequence as a stepper gets it: checked, and `max_new_tokens` cut to what fits.

    `stop_token_ids` are all tokens that end it (the model's EOS unless ignored, and the request's own).
    """

    sequence_id: str
    token_ids: list[int]
    first_index: int
    max_new_tokens: int
    sampling: Sampling
    stop_token_ids: frozenset[int]


class Stepper(Protocol):
    """What an engine does; called by the engine's thread only, except for the constants."""

    @property
    def name(self) -> str: ...
    @property
    def slots(self) -> int: ...
    @property
    def max_sequence_tokens(self) -> int: ...
    @property
    def vocab_tokens(self) -> int: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    @property
    def kv_used_bytes(self) -> int: ...

    def start(self) -> None:
        """First call on the thread."""

    def add(self, submission: Submission) -> None:
        """Take a sequence; it is worked on from the next step on (or later, when there is no slot)."""

    def remove(self, sequence_id: str) -> None:
        """Forget a live sequence and free what it holds, before the next step."""

    def step(self) -> list[EngineEvent]:
        """One step for everything live: the new tokens and, after its last token, the end of each finished sequence."""

    def close(self) -> None:
        """Free everything. Last call on the thread; also after a `step` that raised."""


class ThreadedEngine:
    """An `Engine` (see `services/worker/ports.py`) made of a stepper and a thread."""

    def __init__(
        self,
        stepper: Stepper,
        sink: Sink,
        *,
        failure_of: Callable[[BaseException], Failure] | None = None,
        name: str = "engine",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stepper: Stepper | None = stepper
        self._name, self._slots, self._max_sequence_tokens = stepper.name, stepper.slots, stepper.max_sequence_tokens
        self._vocab_tokens, self._eos_token_ids = stepper.vocab_tokens, stepper.eos_token_ids
        self._sink = sink
        self._failure_of = failure_of or _internal
        self._clock = clock
        self._changed = threading.Condition()
        # Guarded by `_changed`: commands in order, ids from submission to end, and how it all ends.
        self._commands: list[Submission | str] = []
        self._live: set[str] = set()
        self._closing = False
        self._allowed_until = math.inf
        self._dead: Failure | None = None
        self._step_began_at: float | None = None
        self._kv_used_bytes = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """See `Engine`."""
        return self._name

    @property
    def slots(self) -> int:
        """See `Engine`."""
        return self._slots

    @property
    def max_sequence_tokens(self) -> int:
        """See `Engine`."""
        return self._max_sequence_tokens

    def submit(
        self, sequence_id: str, token_ids: Sequence[int], *, first_index: int, max_new_tokens: int, sampling: Sampling
    ) -> None:
        """See `Engine`."""
        room = self._max_sequence_tokens - len(token_ids)
        failure = self._refusal(token_ids, first_index, max_new_tokens, room, sampling)
        if failure is None:
            submission = Submission(
                sequence_id=sequence_id,
                token_ids=list(token_ids),
                first_index=first_index,
                max_new_tokens=min(max_new_tokens, room),
                sampling=sampling,
                stop_token_ids=frozenset(sampling.stop_token_ids)
                | (frozenset() if sampling.ignore_eos else self._eos_token_ids),
            )
            with self._changed:
                if self._dead is not None:
                    failure = self._dead
                elif sequence_id in self._live:
                    # No end is told: it would be taken for the end of the sequence that has this id.
                    raise ValueError(f"sequence {sequence_id} is live already")
                elif len(self._live) >= WAITING_LIMIT:
                    failure = Failure(code=Code.BUSY, message="The engine holds too many sequences.")
                else:
                    self._live.add(sequence_id)
                    self._commands.append(submission)
                    self._changed.notify()
                    return
        self._sink([SequenceEnd(sequence_id, EndReason.FAILED, failure)])

    def cancel(self, sequence_id: str) -> None:
        """See `Engine`."""
        with self._changed:
            if sequence_id in self._live:
                self._commands.append(sequence_id)
                self._changed.notify()

    @property
    def kv_used_bytes(self) -> int:
        """See `Engine`."""
        return self._kv_used_bytes

    @property
    def step_began_at(self) -> float | None:
        """See `Engine`."""
        return self._step_began_at

    def allow_until(self, at: float) -> None:
        """See `Engine`."""
        with self._changed:
            self._allowed_until = at
            self._changed.notify()

    def close(self) -> None:
        """See `Engine`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _refusal(
        self, token_ids: Sequence[int], first_index: int, max_new_tokens: int, room: int, sampling: Sampling
    ) -> Failure | None:
        if not token_ids or not 0 <= first_index <= len(token_ids) or max_new_tokens < 1:
            return Failure(
                code=Code.INVALID_REQUEST, message="A sequence needs at least one token, and room for one more."
            )
        if room < 1:
            return Failure(
                code=Code.PROMPT_TOO_LONG,
                message=f"{len(token_ids)} tokens leave no room: at most {self._max_sequence_tokens} fit.",
            )
        vocab = self._vocab_tokens
        if min(token_ids) < 0 or max(token_ids) >= vocab:
            return Failure(
                code=Code.INVALID_REQUEST, message=f"A token id is outside the vocabulary of {vocab} tokens."
            )
        if sampling.logit_bias and not all(0 <= token_id < vocab for token_id in sampling.logit_bias):
            return Failure(
                code=Code.INVALID_REQUEST,
                message=f"logit_bias names a token outside the vocabulary of {vocab} tokens.",
                param="logit_bias",
            )
        return None

    def _run(self) -> None:
        stepper = self._stepper
        assert stepper is not None
        self._stepper = None  # this frame holds the only reference, so that the end of the thread frees everything
        clean = False
        try:
            stepper.start()
            self._loop(stepper)
            clean = True
        finally:
            # Not `except`: whatever it was goes on to `threading.excepthook`, with its traceback.
            error = sys.exception()
            self._end(None if clean else self._failure_of(error) if error is not None else _internal(None))
            stepper.close()

    def _loop(self, stepper: Stepper) -> None:
        running: set[str] = set()
        while True:
            with self._changed:
                while not (self._commands or self._closing or running):
                    self._changed.wait()
                if self._closing:
                    return
                commands, self._commands = self._commands, []
            events: list[EngineEvent] = []
            for command in commands:
                if isinstance(command, Submission):
                    stepper.add(command)
                    running.add(command.sequence_id)
                elif command in running:
                    stepper.remove(command)
                    running.discard(command)
                    events.append(SequenceEnd(command, EndReason.CANCELLED))
            if events:
                self._kv_used_bytes = stepper.kv_used_bytes
                self._tell(events)
            if running:
                if self._clock() >= self._allowed_until and not self._allowed():
                    continue  # a command came, or the end
                self._step_began_at = self._clock()
                events = stepper.step()
                self._step_began_at, self._kv_used_bytes = None, stepper.kv_used_bytes
                # A pause in the middle of the step: its tokens count only if the bytes are found to be the same still.
                while self._clock() >= self._allowed_until:
                    if not self._allowed(whatever_comes=True):
                        return
                running.difference_update(event.sequence_id for event in events if isinstance(event, SequenceEnd))
                if events:
                    self._tell(events)

    def _allowed(self, *, whatever_comes: bool = False) -> bool:
        """Stand still until a step may begin; False if the engine is closed before, or (but for `whatever_comes`) told
        something else."""
        with self._changed:
            while self._clock() >= self._allowed_until:
                if self._closing or (self._commands and not whatever_comes):
                    return False
                self._changed.wait()
        return True

    def _tell(self, events: list[EngineEvent]) -> None:
        ended = [event.sequence_id for event in events if isinstance(event, SequenceEnd)]
        if ended:
            with self._changed:  # before it is told, so that whoever hears of the end can use the id again
                self._live.difference_update(ended)
        self._sink(events)

    def _end(self, failure: Failure | None) -> None:
        self._step_began_at, self._kv_used_bytes = None, 0
        with self._changed:
            self._dead = failure or Failure(code=Code.DRAINING, message="The engine is closed.")
            live = sorted(self._live)
            self._live.clear()
            self._commands.clear()
        reason = EndReason.CANCELLED if failure is None else EndReason.FAILED
        events: list[EngineEvent] = [SequenceEnd(sequence_id, reason, failure) for sequence_id in live]
        if failure is not None:
            events.append(EngineDied(failure))
        if events:
            self._sink(events)


def _internal(error: BaseException | None) -> Failure:
    return Failure(code=Code.INTERNAL, message=f"The engine failed ({type(error).__name__}).")
