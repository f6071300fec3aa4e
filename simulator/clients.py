"""What clients get, and what must never be: the invariants that no single core can see.

* Each (request, index) reaches its client once, in order, and is the token that it must be; the text as well.
* A gateway lets frames through from the latest epoch that it has granted, and from no other.
* One epoch of a request is spoken for by one process.
* A call ends once.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from shared.contracts.generation import End, Frame, FrameBatch
from shared.contracts.requests import Request
from shared.errors import Failure
from simulator.engine import Expected, expected
from simulator.kernel import Kernel
from simulator.store import MAX_CONTEXT_TOKENS


class Outcome(enum.Enum):
    """How a stream ended, as its client sees it. `GATEWAY_DIED`: the connection broke."""

    OPEN = "open"
    COMPLETE = "complete"
    FAILED = "failed"
    LEFT = "left"
    GATEWAY_DIED = "gateway died"


@dataclass(slots=True)
class Stream:
    """One choice of a call. `longest_gap_s` is the longest wait between two of its frames."""

    request: Request
    call_id: str
    gateway: str
    right: Expected
    budget_s: float
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    epoch: int = 0
    outcome: Outcome = Outcome.OPEN
    failure: Failure | None = None
    end: End | None = None
    frame_at: float | None = None
    longest_gap_s: float = 0.0


class Clients:
    """Every stream of a run. `gateway` is the name of the process that serves it."""

    def __init__(self, kernel: Kernel) -> None:
        self.streams: dict[str, Stream] = {}
        self._kernel: Final = kernel
        self._by_call: dict[str, list[str]] = {}
        self._speakers: dict[tuple[str, int], str] = {}

    # -- what clients do and hear

    def begin(self, call_id: str, gateway: str, requests: tuple[Request, ...], budget_s: float) -> None:
        """A client calls."""
        self._by_call[call_id] = [request.request_id for request in requests]
        for request in requests:
            right = expected(request, max_context_tokens=MAX_CONTEXT_TOKENS)
            self.streams[request.request_id] = Stream(request, call_id, gateway, right, budget_s)

    def frame(self, call_id: str, choice: int, frame: Frame) -> None:
        """Tokens arrive."""
        stream = self._stream(call_id, choice)
        if stream.outcome is Outcome.LEFT:  # its gateway has not noticed yet
            return
        id = frame.request_id
        assert id == stream.request.request_id, "a frame for another choice"
        assert stream.outcome is Outcome.OPEN, f"{id}: a frame after the end"
        assert frame.epoch == stream.epoch, f"{id}: a frame of epoch {frame.epoch} while {stream.epoch} is granted"
        have = len(stream.token_ids)
        assert frame.index == have, f"{id}: a frame at index {frame.index} after {have} tokens"
        right = stream.right.token_ids[have : have + len(frame.token_ids)]
        assert frame.token_ids == right, f"{id}: wrong tokens at index {have}"
        stream.token_ids.extend(frame.token_ids)
        stream.text += frame.text
        now = self._kernel.now
        if stream.frame_at is not None:
            stream.longest_gap_s = max(stream.longest_gap_s, now - stream.frame_at)
        stream.frame_at = now

    def conclude(self, call_id: str, choice: int, end: End) -> None:
        """A choice is complete."""
        stream = self._stream(call_id, choice)
        if stream.outcome is Outcome.LEFT:
            return
        id = stream.request.request_id
        assert stream.outcome is Outcome.OPEN, f"{id}: ends twice"
        assert end.epoch == stream.epoch, f"{id}: an end of epoch {end.epoch} while {stream.epoch} is granted"
        assert tuple(stream.token_ids) == stream.right.token_ids, f"{id}: ends after {len(stream.token_ids)} tokens"
        assert end.index == len(stream.token_ids), f"{id}: its end counts {end.index} tokens"
        assert stream.text + end.text == stream.right.text, f"{id}: the text is not the right one"
        assert end.reason is stream.right.reason, f"{id}: ends with {end.reason}"
        assert end.usage.completion_tokens == end.index, f"{id}: the usage is wrong"
        stream.outcome, stream.end = Outcome.COMPLETE, end
        self._kernel.note(id, "is complete")

    def fail(self, call_id: str, failure: Failure) -> None:
        """A call has failed."""
        streams = [self.streams[id] for id in self._by_call[call_id]]
        open_or_left = (Outcome.OPEN, Outcome.LEFT)
        assert any(stream.outcome in open_or_left for stream in streams), f"{call_id}: fails after its end"
        for stream in streams:
            if stream.outcome is Outcome.OPEN:
                stream.outcome, stream.failure = Outcome.FAILED, failure
        self._kernel.note(call_id, f"fails: {failure.code.value}")

    def leave(self, call_id: str) -> None:
        """The client goes."""
        for id in self._by_call[call_id]:
            if self.streams[id].outcome is Outcome.OPEN:
                self.streams[id].outcome = Outcome.LEFT

    def gateway_died(self, gateway: str) -> None:
        """All connections to it break."""
        for stream in self.streams.values():
            if stream.gateway == gateway and stream.outcome is Outcome.OPEN:
                stream.outcome = Outcome.GATEWAY_DIED

    def is_open(self, call_id: str) -> bool:
        """Whether anything of a call is missing."""
        return any(self.streams[id].outcome is Outcome.OPEN for id in self._by_call[call_id])

    def unserved(self, call_id: str) -> bool:
        """Whether some choice of a call was never given to anybody."""
        return any(self.streams[id].epoch == 0 for id in self._by_call[call_id])

    # -- what is looked at from outside

    def granted(self, request_id: str, gateway: str, epoch: int, have_tokens: int) -> None:
        """A gateway answers a claim."""
        stream = self.streams[request_id]
        assert stream.gateway == gateway, f"{request_id}: granted by a gateway that never had it"
        assert stream.outcome in (Outcome.OPEN, Outcome.LEFT), f"{request_id}: granted after its end"
        assert epoch >= stream.epoch, f"{request_id}: epoch {epoch} granted after {stream.epoch}"
        stream.epoch = epoch
        if stream.outcome is Outcome.OPEN:
            assert have_tokens == len(stream.token_ids), f"{request_id}: granted with {have_tokens} tokens"

    def spoken(self, process: str, batch: FrameBatch) -> None:
        """A worker is about to send a batch."""
        for item in batch.items:
            first = self._speakers.setdefault((item.request_id, item.epoch), process)
            assert first == process, f"{item.request_id}: {first} and {process} both speak at epoch {item.epoch}"

    def _stream(self, call_id: str, choice: int) -> Stream:
        return self.streams[self._by_call[call_id][choice]]
