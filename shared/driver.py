"""The only place where deciding (a core) and doing (a shell) meet.

One inbox, one consumer. Two kinds of action: *tell* is carried out inline and in order, so that tokens cannot overtake
each other; *do* runs as a task of the driver's own TaskGroup and its result comes back as an event. A due timer goes
before a full inbox, so a flood of messages cannot starve a timeout.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from shared.errors import Code, HearthError

E = TypeVar("E")
A = TypeVar("A")
E_contra = TypeVar("E_contra", contravariant=True)


class Core(Protocol[E_contra, A]):
    """A state machine that has never heard of asyncio, clocks, NATS, Redis or torch."""

    def handle(self, event: E_contra | None, now: float) -> list[A]:
        """Take an event (None: time has passed) at monotonic second `now`; say what is wanted."""
        ...

    def deadline(self) -> float | None:
        """The monotonic second at which `handle(None, …)` is wanted, if any."""
        ...

    def check(self) -> None:
        """Assert every invariant."""
        ...


class Driver(Generic[E, A]):
    """Feeds a core with events and time, and carries out its actions.

    `tell` is called inline for every action that is no instance of `long`; `do` is started as a task for those that
    are. With `check` the core's invariants are asserted after every event (tests).
    """

    def __init__(
        self,
        core: Core[E, A],
        *,
        tell: Callable[[A], None],
        do: Callable[[A], Coroutine[Any, Any, E | None]],
        long: tuple[type, ...],
        clock: Callable[[], float] = time.monotonic,
        inbox_limit: int = 100_000,
        check: bool = False,
    ) -> None:
        self.core = core
        self._tell = tell
        self._do = do
        self._long = long
        self._clock = clock
        self._inbox: collections.deque[E] = collections.deque()
        self._inbox_limit = inbox_limit
        self._check = check
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    def post(self, event: E) -> None:
        """Put an event into the inbox; on the loop's thread only.

        Raises `HearthError` (unavailable) when it is full.
        """
        if len(self._inbox) >= self._inbox_limit:
            raise HearthError(Code.UNAVAILABLE, "The inbox is full; the service is overloaded.")
        self._inbox.append(event)
        self._wake.set()

    def post_threadsafe(self, event: E) -> None:
        """Put an event into the inbox from another thread; dropped if the loop is closed already."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(self.post, event)
        except RuntimeError:  # the loop was closed between the look and the call: nobody is left to hear it
            return

    async def run(self) -> None:
        """Consume events until cancelled; a failing core or effect ends the driver with its exception."""
        self._loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                now = self._clock()
                deadline = self.core.deadline()
                if deadline is not None and deadline <= now:
                    self._handle(None, now, tasks)
                    # A core whose deadline stays in the past would spin; let others run in between.
                    if not self._inbox:
                        await asyncio.sleep(0)
                if self._inbox:
                    # Bounded bursts: the loop serves sockets between them.
                    for _ in range(min(len(self._inbox), 256)):
                        self._handle(self._inbox.popleft(), self._clock(), tasks)
                    await asyncio.sleep(0)
                    continue
                self._wake.clear()
                deadline = self.core.deadline()
                if deadline is None:
                    await self._wake.wait()
                    continue
                handle = self._loop.call_later(max(0.0, deadline - self._clock()), self._wake.set)
                try:
                    await self._wake.wait()
                finally:
                    handle.cancel()

    def _handle(self, event: E | None, now: float, tasks: asyncio.TaskGroup) -> None:
        actions = self.core.handle(event, now)
        if self._check:
            self.core.check()
        for action in actions:
            if isinstance(action, self._long):
                tasks.create_task(self._carry_out(action), name=type(action).__name__)
            else:
                self._tell(action)

    async def _carry_out(self, action: A) -> None:
        event = await self._do(action)
        if event is not None:
            self.post(event)
