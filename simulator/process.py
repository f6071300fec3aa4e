"""A process: a production core, its inbox and its timer, in virtual time. What `shared.driver` is to the real services.

A process may die (nothing of it is left but what it has sent), be stopped (nothing in it goes on, its threads neither),
or hang (its loop stands still while its engine goes on): what arrives meanwhile waits in the inbox.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, Final, Generic, Protocol, TypeVar

from simulator.kernel import Call, Kernel, Timer
from simulator.network import Connection, Network

E = TypeVar("E")
A = TypeVar("A")
E_contra = TypeVar("E_contra", contravariant=True)

# At one and the same second; more is a core that wants to be woken at once, again and again.
MOST_WAKES: Final = 100


class Core(Protocol[E_contra, A]):
    """See `shared.driver.Core`."""

    def handle(self, event: E_contra | None, now: float) -> list[A]:
        """Take an event (None: time has passed)."""
        ...

    def deadline(self) -> float | None:
        """When it wants to be woken."""
        ...

    def check(self) -> None:
        """Assert every invariant."""
        ...


class Process(Generic[E, A]):
    """`carry_out` is the shell: it turns one action into effects. `name` is that of its connection."""

    def __init__(
        self, kernel: Kernel, network: Network, name: str, core: Core[E, A], carry_out: Callable[[A], None]
    ) -> None:
        self.name: Final = name
        self.alive = True
        self.stopped = False
        self.connection: Final[Connection] = network.connect(name, self.receive)
        self._kernel: Final = kernel
        self._core: Final = core
        self._carry_out: Final = carry_out
        self._inbox: collections.deque[E | _Call] = collections.deque()
        self._busy = False
        self._timer: Timer | None = None
        self._timer_at: float | None = None
        self._woken_at = -1.0
        self._wakes = 0

    def post(self, event: E) -> None:
        """Something happened."""
        if self.alive:
            self._inbox.append(event)
            self._drain()

    def receive(self, call: Call) -> None:
        """Something arrived: `call` is made in turn, and may post."""
        if self.alive:
            self._inbox.append(_Call(call))
            self._drain()

    def after(self, delay_s: float, event: E) -> None:
        """An effect takes its time, and comes back as an event."""
        self._kernel.after(delay_s, lambda: self.post(event))

    # -- faults

    def die(self) -> None:
        """kill -9."""
        self._kernel.note(self.name, "dies")
        self.alive = False
        self._inbox.clear()
        if self._timer is not None:
            self._timer.cancel()
        self.connection.close()

    def stop(self) -> None:
        """Nothing is taken out of the inbox, and no timer is looked at, until `resume`."""
        self._kernel.note(self.name, "hangs")
        self.stopped = True

    def resume(self) -> None:
        """It goes on. Idempotent."""
        if self.stopped and self.alive:
            self._kernel.note(self.name, "goes on")
            self.stopped = False
            self._drain()

    # -- inside

    def _drain(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            while self.alive and not self.stopped:
                deadline = self._core.deadline()
                if deadline is not None and deadline <= self._kernel.now:
                    self._wake()
                if not self._inbox:
                    break
                item = self._inbox.popleft()
                if isinstance(item, _Call):
                    item.call()  # posts, if at all, behind what is there already
                else:
                    self._handle(item)
        finally:
            self._busy = False
        self._arm()

    def _wake(self) -> None:
        self._wakes = self._wakes + 1 if self._woken_at == self._kernel.now else 1
        self._woken_at = self._kernel.now
        assert self._wakes <= MOST_WAKES, f"{self.name} wants to be woken at once, again and again"
        self._handle(None)

    def _handle(self, event: E | None) -> None:
        kernel = self._kernel
        if event is not None:
            kernel.note(self.name, told(event))
        actions = self._core.handle(event, kernel.now)
        self._core.check()
        for action in actions:
            if self.alive:
                self._carry_out(action)

    def _arm(self) -> None:
        if not self.alive or self.stopped:
            return
        deadline = self._core.deadline()
        if deadline == self._timer_at and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, deadline
        if deadline is not None:
            self._timer = self._kernel.at(deadline, self._due)

    def _due(self) -> None:
        self._timer = self._timer_at = None
        self._drain()


class _Call:
    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        self.call = call


def told(event: Any) -> str:
    """One event or message in a line: its type, and the ids and numbers in it (tokens only by their number)."""
    words = [type(event).__name__]
    _tell(event, words, 0)
    return " ".join(words)


_LEFT_OUT: Final = frozenset(
    {
        "prompt",
        "sampling",
        "token_id",
        "ledger",
        "reply",
        "loaded",
        "puller",
        "text",
        "usage",
        "checkpoint",
        "source",
        "answer_lease",
        "revision",
        "slug",
    }
)


def _tell(value: Any, words: list[str], depth: int) -> None:
    for name in _names(type(value)):
        field = getattr(value, name)
        if isinstance(field, str | int | float):
            if field != "" and name != "wait_s":
                words.append(f"{name}={field:.4g}" if isinstance(field, float) else f"{name}={field}")
        elif name == "token_ids":
            words.append(f"tokens={len(field)}")
        elif isinstance(field, tuple | list):
            for inner in field[:8]:
                words.append(f"[{inner}]" if isinstance(inner, str) else f"[{told(inner)}]")
        elif field is not None and depth < 2 and _names(type(field)):
            words.append(f"{name}:{type(field).__name__}")
            _tell(field, words, depth + 1)


_NAMES: Final[dict[type, tuple[str, ...]]] = {}


def _names(kind: type) -> tuple[str, ...]:
    names = _NAMES.get(kind)
    if names is None:
        found = getattr(kind, "__struct_fields__", None) or getattr(kind, "__dataclass_fields__", None) or ()
        names = _NAMES[kind] = tuple(name for name in found if name not in _LEFT_OUT)
    return names
