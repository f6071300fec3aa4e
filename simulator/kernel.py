"""Virtual time: a heap of what happens when, and the digest of all that happened. No clock, no tasks, no randomness.

What is due at the same second happens in the order in which it was asked for, so a run is a function of its inputs.
"""

from __future__ import annotations

import collections
import hashlib
import heapq
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

T = TypeVar("T")
Call = Callable[[], None]

LAST_LINES: Final = 400  # of the trace are kept, for who wants to know what led to a failure


class Dice(Protocol):
    """The one source of randomness of a run: a `random.Random` with a seed."""

    def random(self) -> float:
        """0 ≤ x < 1."""

    def uniform(self, a: float, b: float) -> float:
        """Evenly between the two."""

    def randrange(self, start: int, stop: int | None = None, /) -> int:
        """An integer below `start`, or from `start` to below `stop`."""

    def choice(self, seq: Sequence[T], /) -> T:
        """One of them."""


class Timer:
    """Something that will happen, unless it is cancelled."""

    __slots__ = ("_call",)

    def __init__(self, call: Call) -> None:
        self._call: Call | None = call

    def cancel(self) -> None:
        """It shall not happen. Idempotent; fine if it has happened."""
        self._call = None

    def fire(self) -> None:
        """Called by the kernel."""
        call, self._call = self._call, None
        if call is not None:
            call()


class Kernel:
    """Virtual seconds from 0 on. `trace` hears every line of what happens; without it the last ones are kept."""

    def __init__(self, trace: Callable[[str], None] | None = None) -> None:
        self.now = 0.0
        self.happened = 0
        self.last_lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._trace = trace
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._hash = hashlib.blake2b(digest_size=8)

    def at(self, second: float, call: Call) -> Timer:
        """Have `call` called at a virtual second (now, if that has passed)."""
        self._count += 1
        timer = Timer(call)
        heapq.heappush(self._heap, (max(second, self.now), self._count, timer))
        return timer

    def after(self, delay_s: float, call: Call) -> Timer:
        """Have `call` called in `delay_s` seconds."""
        return self.at(self.now + delay_s, call)

    def run(self, until: float) -> None:
        """Let time pass, and happen what is due, until a virtual second."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, timer = heapq.heappop(heap)
            self.happened += 1
            timer.fire()
        self.now = max(self.now, until)

    def note(self, who: str, what: str) -> None:
        """Something worth a line in the trace happened; it enters the digest."""
        line = f"{self.now:.6f} {who} {what}"
        self._hash.update(line.encode())
        if self._trace is None:
            self.last_lines.append(line)
        else:
            self._trace(line)

    @property
    def digest(self) -> str:
        """The same for two runs in which the same things happened at the same times."""
        return self._hash.hexdigest()
