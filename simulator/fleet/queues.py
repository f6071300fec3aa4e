"""The gateways' queues: first come, first served, pulled by replicas with a free slot (late binding). Pure."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from simulator.kernel import Kernel

if TYPE_CHECKING:
    from simulator.fleet.replica import Replica
    from simulator.fleet.request import Request


HINT_S: Final = 0.01  # between two hints of arrivals, as `services.gateway.core.Config` has it
REPEAT_S: Final = 1.0  # between two hints while somebody waits
CLEAR_S: Final = 0.05  # from the moment at which nobody waits any more until that is said

Tell = Callable[[str, int, float], None]


class Queue:
    """One deployment's. `outstanding` counts what waits or runs, as the stream does; `open` are replicas that pull.

    `tell` is the gateway's hint to the scheduler: deployment, how many run nowhere, and for how long the oldest has.
    The times of hints are those of `services.gateway.demand`.
    """

    def __init__(self, deployment: str, kernel: Kernel, tell: Tell) -> None:
        self.deployment: Final = deployment
        self.waiting: Final[collections.deque[Request]] = collections.deque()
        self.open: Final[dict[Replica, None]] = {}
        self.outstanding = 0
        self._kernel: Final = kernel
        self._tell: Final = tell
        self._nowhere = 0
        self._hinted_at = -HINT_S
        self._owed = self._repeating = self._clearing = False
        self._told = 0

    def push(self, request: Request) -> None:
        """A request waits, behind the others; the scheduler hears of it, whether somebody takes it at once or not."""
        self.waiting.append(request)
        request.waiting = True
        self._nowhere += 1
        now = self._kernel.now
        if now - self._hinted_at >= HINT_S:
            self._hinted_at = now
            self._hint()
        elif not self._owed:
            self._owed = True
            self._kernel.at(self._hinted_at + HINT_S, self._owed_hint)
        self.bind()

    def put_back(self, request: Request) -> None:
        """A request that ran waits again, before the others."""
        self.waiting.appendleft(request)
        request.waiting = True
        self._nowhere += 1
        self._arm_repeat()
        self.bind()

    def gone(self) -> None:
        """A request that waited does so no more: somebody took it, or it is over."""
        self._nowhere -= 1
        if not self._nowhere and self._told and not self._clearing:
            self._clearing = True
            self._kernel.after(CLEAR_S, self._clear)

    def pull(self, replica: Replica) -> None:
        """This replica takes requests as long as it has free slots."""
        if replica.free_slots > 0:
            self.open[replica] = None
            self.bind()

    def leave(self, replica: Replica) -> None:
        """This replica takes nothing more."""
        self.open.pop(replica, None)

    def bind(self) -> None:
        """Give what waits to who pulls; of several, to the one that has been pulling longest."""
        while self.waiting and self.open:
            request = self.waiting.popleft()
            if request.ended:
                continue
            request.waiting = False
            self.gone()
            replica = next(iter(self.open))
            del self.open[replica]
            if replica.free_slots > 1:
                self.open[replica] = None
            replica.take(request)

    def oldest_s(self) -> float:
        """For how long the request at the head has waited; 0 if none does."""
        while self.waiting and self.waiting[0].ended:
            self.waiting.popleft()
        return self._kernel.now - self.waiting[0].waits_since if self.waiting else 0.0

    # -- hints

    def _hint(self) -> None:
        self._told = self._nowhere
        self._tell(self.deployment, self._nowhere, self.oldest_s())
        if self._nowhere:
            self._arm_repeat()

    def _owed_hint(self) -> None:
        self._owed = False
        self._hinted_at = self._kernel.now
        self._hint()

    def _arm_repeat(self) -> None:
        if not self._repeating:
            self._repeating = True
            self._kernel.after(REPEAT_S, self._repeat)

    def _repeat(self) -> None:
        self._repeating = False
        if self._nowhere:
            self._hint()

    def _clear(self) -> None:
        self._clearing = False
        if not self._nowhere and self._told:
            self._hint()
