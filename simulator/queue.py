"""The work queue: a stream of JetStream with work-queue retention and one durable pull consumer per deployment.

What is modelled, and follows nats-server's `consumer.go` (`processAckMsg`, `processNak`, `progressUpdate`,
`checkPending`, `getNextMsg`):

* A message is delivered to one waiting pull request and is *pending* from then on. Redeliveries go before new messages.
* Acknowledgements count by the *stream sequence* in their token. So the acknowledgement of an older delivery, by
  anybody, removes the message even while somebody else works on it; an older delivery's nak hands it out again at
  once though somebody else works on it; and an older delivery's "in progress" restarts the wait, too.
* `ack_wait_s` after its delivery, or the last "in progress", a pending message is put in the line for redelivery. An
  "in progress" that comes later does not take it out of there; an acknowledgement does.
* A nak with a delay makes the wait end after that delay, and takes the message out of the line.
* Naks and "in progress" of messages that are not pending, and anything about messages that are gone, change nothing.
* A pull request asks for several messages, waits for `expires_s` and then says how many never came. Several are served
  in turns. One whose connection is closed is dropped; to one that is merely cut off messages go (and are lost).

Not modelled: limits of the consumer, replicas of the stream, and the milliseconds of its timers.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from shared.contracts.requests import Request
from shared.errors import Code, Failure
from simulator.kernel import Kernel, Timer


@dataclass(frozen=True, slots=True)
class Delivery:
    """A request handed out by the queue. `delivery` counts from 1; `token` acknowledges it."""

    request: Request
    sequence: int
    delivery: int
    token: str


@dataclass(slots=True, eq=False)
class PullRequest:
    """`wanted` messages that somebody waits for. `deliver` takes one, `expired` hears how many never came; `is_open`
    says whether there is still a connection behind it."""

    wanted: int
    deliver: Callable[[Delivery], None]
    expired: Callable[[int], None]
    is_open: Callable[[], bool]
    timer: Timer | None = None


@dataclass(slots=True)
class _Message:
    sequence: int
    slug: str
    request: Request
    deliveries: int = 0
    pending: bool = False
    waits_until: float = 0.0
    timer: Timer | None = None


@dataclass(slots=True)
class _Consumer:
    fresh: collections.deque[int] = field(default_factory=collections.deque)
    again: collections.deque[int] = field(default_factory=collections.deque)
    pulls: collections.deque[PullRequest] = field(default_factory=collections.deque)


class WorkQueue:
    """See the module. `limit` bounds the messages of one deployment."""

    def __init__(self, kernel: Kernel, *, ack_wait_s: float, limit: int = 4096) -> None:
        self.ack_wait_s: Final = ack_wait_s
        self._kernel: Final = kernel
        self._limit: Final = limit
        self._messages: dict[int, _Message] = {}
        self._consumers: dict[str, _Consumer] = {}
        self._last = 0

    # -- the stream

    def publish(self, slug: str, request: Request) -> int | Failure:
        """Store a request: its sequence, or queue_full."""
        if self.depth(slug) >= self._limit:
            return Failure(code=Code.QUEUE_FULL, message=f"The queue of {slug} is full.")
        self._last += 1
        self._messages[self._last] = _Message(self._last, slug, request)
        self._consumer(slug).fresh.append(self._last)
        self._serve(slug)
        return self._last

    def delete(self, sequence: int) -> None:
        """Remove a message whatever its state; fine if it is gone."""
        message = self._messages.pop(sequence, None)
        if message is not None:
            self._forget(message)

    def has(self, sequence: int) -> bool:
        """Whether a message is stored."""
        return sequence in self._messages

    def depth(self, slug: str) -> int:
        """Messages that are stored: waiting, or pending."""
        return sum(message.slug == slug for message in self._messages.values())

    @property
    def left(self) -> tuple[tuple[int, str], ...]:
        """(sequence, request id) of everything that is stored."""
        return tuple((message.sequence, message.request.request_id) for message in self._messages.values())

    # -- the consumers

    def pull(self, slug: str, request: PullRequest, *, expires_s: float) -> None:
        """Messages are wanted."""
        consumer = self._consumer(slug)
        request.timer = self._kernel.after(expires_s, lambda: self._expire(consumer, request))
        consumer.pulls.append(request)
        self._serve(slug)

    def ack(self, token: str) -> None:
        """The message is done."""
        self.delete(_sequence(token))

    def nak(self, token: str, delay_s: float = 0.0) -> None:
        """The message shall be handed out again, after `delay_s`."""
        message = self._messages.get(_sequence(token))
        if message is None or not message.pending:
            return
        again = self._consumer(message.slug).again
        if delay_s > 0:
            if message.sequence in again:
                again.remove(message.sequence)
            self._wait(message, delay_s)
            return
        if message.sequence not in again:
            again.append(message.sequence)
        self._serve(message.slug)

    def in_progress(self, token: str) -> None:
        """Somebody is at it."""
        message = self._messages.get(_sequence(token))
        if message is not None and message.pending:
            self._wait(message, self.ack_wait_s)

    def restart(self) -> None:
        """The server ends and begins anew: messages, deliveries and the lines stay, pull requests go."""
        for consumer in self._consumers.values():
            for request in consumer.pulls:
                if request.timer is not None:
                    request.timer.cancel()
            consumer.pulls.clear()

    # -- inside

    def _consumer(self, slug: str) -> _Consumer:
        return self._consumers.setdefault(slug, _Consumer())

    def _wait(self, message: _Message, seconds: float) -> None:
        message.waits_until = self._kernel.now + seconds
        if message.timer is None:
            message.timer = self._kernel.after(seconds, lambda: self._look(message))
        elif seconds < self.ack_wait_s:
            message.timer.cancel()
            message.timer = self._kernel.after(seconds, lambda: self._look(message))

    def _look(self, message: _Message) -> None:
        message.timer = None
        left_s = message.waits_until - self._kernel.now
        if left_s > 1e-9:
            message.timer = self._kernel.after(left_s, lambda: self._look(message))
            return
        again = self._consumer(message.slug).again
        if message.sequence not in again:
            self._kernel.note("queue", f"ack_wait is over for {message.request.request_id}")
            again.append(message.sequence)
        self._wait(message, self.ack_wait_s)
        self._serve(message.slug)

    def _forget(self, message: _Message) -> None:
        if message.timer is not None:
            message.timer.cancel()
        consumer = self._consumer(message.slug)
        for line in (consumer.fresh, consumer.again):
            if message.sequence in line:
                line.remove(message.sequence)

    def _expire(self, consumer: _Consumer, request: PullRequest) -> None:
        if request in consumer.pulls:
            consumer.pulls.remove(request)
            if request.is_open():
                request.expired(request.wanted)

    def _serve(self, slug: str) -> None:
        consumer = self._consumer(slug)
        while consumer.pulls and (consumer.again or consumer.fresh):
            request = consumer.pulls.popleft()
            if not request.is_open():
                if request.timer is not None:
                    request.timer.cancel()
                continue
            message = self._messages[(consumer.again or consumer.fresh).popleft()]
            message.deliveries += 1
            message.pending = True
            if message.timer is not None:
                message.timer.cancel()
                message.timer = None
            self._wait(message, self.ack_wait_s)
            request.wanted -= 1
            if request.wanted > 0:
                consumer.pulls.append(request)
            elif request.timer is not None:
                request.timer.cancel()
            token = f"{slug}.{message.deliveries}.{message.sequence}"
            request.deliver(Delivery(message.request, message.sequence, message.deliveries, token))


def _sequence(token: str) -> int:
    return int(token.rsplit(".", 1)[1])
