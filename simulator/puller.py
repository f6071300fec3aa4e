"""Pulling from the modelled work queue, as `shared.bus.Puller` does: one pull request per want, asked again when it has
expired or may be lost; what comes though nobody has room for it is given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from simulator.kernel import Kernel, Timer
from simulator.network import QUEUE, Connection, Network, Packet
from simulator.queue import Delivery, PullRequest, WorkQueue

PULL_EXPIRES_S: Final = 4.0
PULL_GRACE_S: Final = 1.0


class QueueAccess:
    """A connection's way to the work queue: everything goes through the network, and may get lost there."""

    def __init__(self, kernel: Kernel, network: Network, queue: WorkQueue, connection: Connection) -> None:
        self.kernel: Final = kernel
        self.connection: Final = connection
        self._network: Final = network
        self._queue: Final = queue

    def ack(self, token: str) -> None:
        """See `shared.bus.Bus.ack`."""
        self._send("Ack", token, lambda: self._queue.ack(token))

    def nak(self, token: str, delay_s: float = 0.0) -> None:
        """See `shared.bus.Bus.nak`."""
        self._send("Nak", token, lambda: self._queue.nak(token, delay_s))

    def in_progress(self, token: str) -> None:
        """See `shared.bus.Bus.in_progress`."""
        self._send("InProgress", token, lambda: self._queue.in_progress(token))

    def pull(self, slug: str, request: PullRequest, *, expires_s: float) -> None:
        """One pull request; what it brings comes back over the network."""
        here = self.connection
        deliver, expired = request.deliver, request.expired

        def delivered(delivery: Delivery) -> None:
            self._network.send(QUEUE, here, "Delivery", delivery, lambda: deliver(delivery))

        def ended(left: int) -> None:
            self._network.send(QUEUE, here, "Expired", left, lambda: expired(left))

        there = PullRequest(wanted=request.wanted, deliver=delivered, expired=ended, is_open=lambda: here.open)
        self._send("Pull", slug, lambda: self._queue.pull(slug, there, expires_s=expires_s))

    def _send(self, kind: str, message: str, call: Callable[[], None]) -> None:
        self._network.transmit(Packet(self.connection.name, QUEUE, kind, message), call)


class ModelPuller:
    """See `Puller` in the worker's events. `arrived` gets what comes."""

    def __init__(self, access: QueueAccess, slug: str, arrived: Callable[[Delivery], None]) -> None:
        self.open_wants = 0
        self._access: Final = access
        self._slug: Final = slug
        self._arrived: Final = arrived
        self._closed = False
        self._watch: Timer | None = None

    def want(self, n: int, /) -> None:
        """See `Puller`."""
        self.open_wants = max(0, self.open_wants + n)
        if n > 0 and not self._closed:
            self._ask(n)

    async def close(self) -> None:
        """See `Puller`."""
        self.shut()

    def shut(self) -> None:
        """No more come after this; those on the way are given back."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()

    def ask_again(self) -> None:
        """All pull requests may be lost."""
        if self.open_wants > 0 and not self._closed:
            self._ask(self.open_wants)

    def _ask(self, n: int) -> None:
        connection = self._access.connection
        request = PullRequest(wanted=n, deliver=self._came, expired=self._expired, is_open=lambda: connection.open)
        self._access.pull(self._slug, request, expires_s=PULL_EXPIRES_S)
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._access.kernel.after(
            PULL_EXPIRES_S + PULL_GRACE_S, lambda: connection.receive(self.ask_again)
        )

    def _came(self, delivery: Delivery) -> None:
        if self._closed or self.open_wants <= 0:
            self._access.nak(delivery.token)
            return
        self.open_wants -= 1
        self._arrived(delivery)

    def _expired(self, left: int) -> None:
        if self.open_wants > 0 and not self._closed:
            self._ask(min(self.open_wants, left))
