"""The bus: topics and calls between connections, with the delays and faults of a real one.

What is modelled of NATS: at most once; the order between two connections is kept, while nothing is promised about what
different senders send (one that is late is overtaken by the others); a call that nobody serves is told so at once; a
connection that is cut off still serves, as far as the others can see, until it is closed. What comes during a cut is
held back (the socket's buffers, a short cut) or lost (a new connection afterwards).

Whether a packet is late, lost or doubled is the `Weather`'s decision: by dice, or by the plan of a test.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from shared.errors import Code, Failure
from shared.subjects import Endpoint, Topic
from simulator.kernel import Call, Dice, Kernel

M = TypeVar("M")
Q = TypeVar("Q")
R = TypeVar("R")

QUEUE: Final = "queue"  # the connection name of the work queue's server


@dataclass(frozen=True, slots=True)
class Packet:
    """Something on its way. `kind` names what it is: a message's type, or what the queue is asked to do."""

    source: str
    target: str
    kind: str
    message: Any


class Weather(Protocol):
    """Decides what becomes of a packet."""

    def delays_s(self, packet: Packet) -> Sequence[float]:
        """One delay per copy that arrives; none: it is lost."""


@dataclass(slots=True)
class Fair:
    """Every packet arrives once, `delay_s` later."""

    delay_s: float = 0.001

    def delays_s(self, packet: Packet) -> Sequence[float]:
        """See `Weather`."""
        return (self.delay_s,)


@dataclass(slots=True)
class Rough:
    """By dice: `delay_s` to which up to `jitter_s` come, and the parts of packets that are lost, doubled or late."""

    dice: Dice
    delay_s: float = 0.001
    jitter_s: float = 0.002
    lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.0
    late_s: float = 2.0

    def calm(self) -> None:
        """No faults from now on."""
        self.lost = self.doubled = self.late = 0.0

    def delays_s(self, packet: Packet) -> Sequence[float]:
        """See `Weather`."""
        dice = self.dice
        first = self.delay_s + self.jitter_s * dice.random()
        if self.lost or self.doubled or self.late:
            luck = dice.random()
            if luck < self.lost:
                return ()
            luck -= self.lost
            if luck < self.doubled and packet.source != QUEUE:  # what the queue hands out has a number, and comes once
                return (first, first + self.late_s * dice.random() ** 3)
            luck -= self.doubled
            if luck < self.late:
                return (first + self.late_s * dice.random(),)
        return (first,)


class Reply(Generic[R]):
    """The handle by which one call is answered, once; later answers are ignored."""

    __slots__ = ("_send",)

    def __init__(self, send: Callable[[R | Failure], None]) -> None:
        self._send: Callable[[R | Failure], None] | None = send

    def __call__(self, message: R | Failure) -> None:
        """Send the answer."""
        send, self._send = self._send, None
        if send is not None:
            send(message)


class Connection:
    """One process's connection. Handlers are called through `receive`, which is the process's inbox."""

    def __init__(self, network: Network, name: str, receive: Callable[[Call], None]) -> None:
        self.name: Final = name
        self.open = True
        self._network = network
        self._receive = receive

    def subscribe(self, topic: Topic[M], handler: Callable[[M], None], **ids: str) -> None:
        """Have `handler` called for every message of this subject."""
        self._network.add(topic.subject(**ids), self, lambda message, reply: handler(message))

    def serve(self, endpoint: Endpoint[Q, R], handler: Callable[[Q, Reply[R]], None], **ids: str) -> None:
        """Have `handler` called for every call of this subject."""
        self._network.add(endpoint.subject(**ids), self, handler)

    def publish(self, topic: Topic[M], message: M, **ids: str) -> None:
        """Send a message to everybody who subscribed."""
        self._network.publish(self, topic.subject(**ids), message)

    def call(
        self,
        endpoint: Endpoint[Q, R],
        message: Q,
        answered: Callable[[R | Failure, bool], None],
        *,
        extra_s: float = 0.0,
        **ids: str,
    ) -> None:
        """Ask. `answered` is called once: with the answer or a failure, and whether nobody serves the subject."""
        self._network.call(self, endpoint.subject(**ids), message, answered, endpoint.timeout_s + extra_s)

    def receive(self, call: Call) -> None:
        """Something arrives: into the process's inbox with it, if it lives."""
        if self.open:
            self._receive(call)

    def close(self) -> None:
        """The process is gone, and everything that was open with it."""
        self.open = False
        self._network.forget(self)


class Network:
    """Connections, who listens where, and what is on its way."""

    def __init__(self, kernel: Kernel, weather: Weather) -> None:
        self.weather = weather
        self.sent: collections.Counter[str] = collections.Counter()
        self._kernel: Final = kernel
        self._listeners: dict[str, list[tuple[Connection, Callable[[Any, Any], None]]]] = {}
        self._patterns: list[str] = []
        self._arrives_at: dict[tuple[str, str], float] = {}
        self._cut: dict[str, list[tuple[str, str, Call]] | None] = {}

    def connect(self, name: str, receive: Callable[[Call], None]) -> Connection:
        """A new connection of this name; what is sent to a name that is open no more is lost."""
        return Connection(self, name, receive)

    # -- what connections ask for

    def add(self, subject: str, connection: Connection, handler: Callable[[Any, Any], None]) -> None:
        """Called by `Connection`."""
        if "*" in subject and subject not in self._patterns:
            self._patterns.append(subject)
        self._listeners.setdefault(subject, []).append((connection, handler))

    def forget(self, connection: Connection) -> None:
        """Called by `Connection`."""
        for subject, listeners in list(self._listeners.items()):
            left = [entry for entry in listeners if entry[0] is not connection]
            if left:
                self._listeners[subject] = left
            else:
                del self._listeners[subject]

    def publish(self, source: Connection, subject: str, message: Any) -> None:
        """Called by `Connection`."""
        kind = type(message).__name__
        found = [*self._listeners.get(subject, ())]
        for pattern in self._patterns:
            if _matches(pattern, subject):
                found += self._listeners.get(pattern, ())
        for connection, handler in found:
            self.send(source.name, connection, kind, message, _handling(handler, message, None))

    def call(
        self,
        source: Connection,
        subject: str,
        message: Any,
        answered: Callable[[Any, bool], None],
        timeout_s: float,
    ) -> None:
        """Called by `Connection`."""
        waiting = [True]

        def finish(answer: Any, unserved: bool) -> None:
            if waiting[0]:
                waiting[0] = False
                timer.cancel()
                source.receive(lambda: answered(answer, unserved))

        def back(name: str) -> Reply[Any]:
            def send(answer: Any) -> None:
                self.send(name, source, type(answer).__name__, answer, lambda: finish(answer, False), inbox=False)

            return Reply(send)

        late = Failure(code=Code.UNAVAILABLE, message=f"{subject} did not answer in time.")
        timer = self._kernel.after(timeout_s, lambda: finish(late, False))
        listeners = self._listeners.get(subject, ())
        if not listeners:
            nobody = Failure(code=Code.UNAVAILABLE, message=f"Nobody serves {subject}.")
            self.transmit(Packet(source.name, QUEUE, "Unserved", nobody), lambda: finish(nobody, True))
            return
        connection, handler = listeners[0]
        kind = type(message).__name__

        def arrive() -> None:  # a copy of the call has a handle of its own; the first answer counts
            connection.receive(lambda: handler(message, back(connection.name)))

        self.transmit(Packet(source.name, connection.name, kind, message), arrive)

    # -- packets

    def send(self, source: str, target: Connection, kind: str, message: Any, call: Call, *, inbox: bool = True) -> None:
        """Have `call` called in `target`'s inbox (or at once on arrival) when this packet arrives."""
        arrive: Call = (lambda: target.receive(call)) if inbox else call
        self.transmit(Packet(source, target.name, kind, message), arrive)

    def transmit(self, packet: Packet, arrive: Call) -> None:
        """Put a packet on its way; `arrive` is called once per copy."""
        self.sent[packet.kind] += 1
        kernel, pair = self._kernel, (packet.source, packet.target)
        delays = self.weather.delays_s(packet)
        if len(delays) != 1:
            kernel.note(packet.source, f"{'lost' if not delays else 'doubled'} {packet.kind} to {packet.target}")
        for copy, delay_s in enumerate(delays):
            # The order between two connections is kept, so what is late makes everything behind it late; only a second
            # copy (sent again after a reconnection) may come behind what was sent after the first.
            at = max(kernel.now + delay_s, self._arrives_at.get(pair, 0.0))
            if copy == 0:
                self._arrives_at[pair] = at
            kernel.at(at, lambda: self._arrive(packet, arrive))

    def _arrive(self, packet: Packet, arrive: Call) -> None:
        for name in (packet.source, packet.target):
            if name in self._cut:
                held = self._cut[name]
                if held is not None:
                    held.append((packet.source, packet.target, arrive))
                return
        arrive()

    # -- cuts

    def cut(self, name: str, *, held: bool) -> None:
        """Nothing comes from or to this connection: it is `held` back until the cut is mended, or lost."""
        self._kernel.note(name, "cut off" if held else "cut off, packets lost")
        self._cut[name] = [] if held else None

    def mend(self, name: str) -> None:
        """Packets flow again; those that were held back arrive now. Idempotent."""
        if name not in self._cut:
            return
        self._kernel.note(name, "reconnected")
        held = self._cut.pop(name)
        for source, target, arrive in held or ():
            if source in self._cut or target in self._cut:
                continue  # the other end is cut off meanwhile
            self._kernel.at(self._kernel.now, arrive)

    def is_cut(self, name: str) -> bool:
        """Whether it is cut off now."""
        return name in self._cut


def _matches(pattern: str, subject: str) -> bool:
    """Whether a subject fits a pattern in which "*" stands for any one part."""
    parts, found = pattern.split("."), subject.split(".")
    return len(parts) == len(found) and all(part in ("*", one) for part, one in zip(parts, found, strict=True))


def _handling(handler: Callable[[Any, Any], None], message: Any, reply: Any) -> Call:
    return lambda: handler(message, reply)
