"""A sink that remembers what an engine says, and lets a test wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from services.worker.ports import EngineDied, EngineEvent, PositionLogprobs, SequenceEnd, StepToken

WAIT_S = 60.0


class Recorder:
    """See `Sink`."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[PositionLogprobs | None]] = {}
        self.ends: dict[str, list[SequenceEnd]] = {}
        self.deaths: list[EngineDied] = []
        self._changed = threading.Condition()

    def __call__(self, events: Sequence[EngineEvent]) -> None:
        with self._changed:
            for event in events:
                match event:
                    case StepToken():
                        assert event.sequence_id not in self.ends, "a token after the end"
                        self.tokens.setdefault(event.sequence_id, []).append(event.token_id)
                        self.logprobs.setdefault(event.sequence_id, []).append(event.logprobs)
                    case SequenceEnd():
                        self.ends.setdefault(event.sequence_id, []).append(event)
                    case EngineDied():
                        self.deaths.append(event)
            self._changed.notify_all()

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until something is so; fail if it never is."""
        with self._changed:
            assert self._changed.wait_for(true, WAIT_S), "the engine did not say it in time"

    def ended(self, *sequence_ids: str) -> None:
        """Wait until all of these sequences have ended; each must have ended once."""
        self.until(lambda: all(sequence_id in self.ends for sequence_id in sequence_ids))
        assert all(len(ends) == 1 for ends in self.ends.values())

    def end(self, sequence_id: str) -> SequenceEnd:
        """The end of a sequence; waits for it."""
        self.ended(sequence_id)
        return self.ends[sequence_id][0]
