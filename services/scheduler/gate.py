"""A core that can be held: while its scheduler must not command, time stands still for it. Pure.

What happens meanwhile is kept, in order, and handled when it goes on. Whoever holds it drops hints instead of passing
them on, so that what is kept is bounded by what the core had asked for.
"""

from __future__ import annotations

import collections

from services.scheduler.core import Core
from services.scheduler.events import Action, Event


class Gate:
    """Stands between the driver and the core."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._held = False
        self._kept: collections.deque[Event] = collections.deque()

    def hold(self) -> None:
        """The core does nothing until `go_on`."""
        self._held = True

    def go_on(self) -> None:
        """With the next event, or when it is due, the core takes what was kept and goes on."""
        self._held = False

    def handle(self, event: Event | None, now: float) -> list[Action]:
        """See `Core.handle`."""
        if self._held:
            if event is not None:
                self._kept.append(event)
            return []
        out: list[Action] = []
        while self._kept:
            out += self._core.handle(self._kept.popleft(), now)
        return out + self._core.handle(event, now)

    def deadline(self) -> float | None:
        """See `Core.deadline`."""
        return None if self._held else self._core.deadline()

    def check(self) -> None:
        """See `Core.check`."""
        self._core.check()
