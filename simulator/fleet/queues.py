"""The gateways' queues: first come, first served, pulled by replicas with a free slot (late binding). Pure."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.fleet.replica import Replica
    from simulator.fleet.request import Request


class Queue:
    """One deployment's. `outstanding` counts what waits or runs, as the stream does; `open` are replicas that pull."""

    __slots__ = ("deployment", "open", "outstanding", "waiting")

    def __init__(self, deployment: str) -> None:
        self.deployment = deployment
        self.waiting: collections.deque[Request] = collections.deque()
        self.open: dict[Replica, None] = {}
        self.outstanding = 0

    def push(self, request: Request) -> None:
        """A request waits, behind the others."""
        self.waiting.append(request)
        self.bind()

    def put_back(self, request: Request) -> None:
        """A request that ran waits again, before the others."""
        self.waiting.appendleft(request)
        self.bind()

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
            replica = next(iter(self.open))
            del self.open[replica]
            if replica.free_slots > 1:
                self.open[replica] = None
            replica.take(request)

    def oldest(self) -> float | None:
        """When the request that has waited longest arrived."""
        while self.waiting and self.waiting[0].ended:
            self.waiting.popleft()
        return self.waiting[0].arrived_s if self.waiting else None
