"""The bus: NATS, typed. The only importer of `nats`.

Core NATS is at most once: every call has a timeout, and what must happen is retried by a core. Publishing is
synchronous and ordered: an outbox with one writer. Handlers are synchronous too: they turn a message into an event for
a core and return; the reply to a call is a handle that may be used later.

The work queue of requests is one JetStream stream with one subject and one durable pull consumer per deployment.
Pulling keeps exactly as many pull requests open as a replica has free slots (`Puller`), so a queued request travels to
a free slot without anybody polling.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar, Union, cast

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.js import api

from shared import codec, log
from shared.contracts.requests import Request
from shared.errors import Code, Failure, HearthError
from shared.subjects import REQUESTS, Endpoint, Topic

M = TypeVar("M")
Q = TypeVar("Q")
R = TypeVar("R")

OUTBOX_LIMIT: Final = 100_000
CONFIRM_S: Final = 1.0  # after which a flush asks again: question or answer may be lost with a connection
# A server drops pull requests silently when the consumer does not exist (yet): ask anew rather often.
PULL_EXPIRES_S: Final = 4.0
PULL_GRACE_S: Final = 1.0
SUBJECT_FULL: Final = 10077  # JetStream: maximum messages (per subject) exceeded
QUEUE_MAX_AGE_S: Final = 24 * 3600.0
# How long after a connection was made, and how often, queues are swept: see `Bus.queue_depths`.
SWEEP_FOR_S: Final = 1200.0
SWEEP_S: Final = 5.0
SWEEP_MESSAGES: Final = 1000
# One dead consumer must not hold a large share of a queue back; NATS's default (1000) would cap running requests.
MAX_ACK_PENDING: Final = 65_536


class Unserved(HearthError):
    """Unavailable, as nobody at all serves the subject: whoever did is gone, or not there yet."""


class Reply(Generic[R]):
    """The handle by which one call is answered, once; later answers are ignored."""

    __slots__ = ("_bus", "_subject")

    def __init__(self, bus: Bus, subject: str) -> None:
        self._bus = bus
        self._subject: str | None = subject

    def __call__(self, message: R | Failure) -> None:
        """Send the answer; one that is larger than the server's largest message is answered with that failure."""
        if self._subject:
            payload = codec.encode(cast(msgspec.Struct, message))
            if len(payload) > self._bus.client.max_payload:
                payload = codec.encode(self._bus.too_large("answer"))
            self._bus.send(self._subject, payload)
            self._subject = None


class Subscription:
    """An open subscription."""

    def __init__(self, inner: NatsSubscription) -> None:
        self._inner = inner

    async def close(self) -> None:
        """No handler is called after this returns."""
        with contextlib.suppress(nats.errors.Error):
            await self._inner.unsubscribe()


@dataclass(frozen=True)
class Delivery:
    """A request handed out by the queue. `delivery` counts from 1; `token` acknowledges it; `age_s` is its age."""

    request: Request
    sequence: int
    delivery: int
    token: str
    age_s: float


class Puller:
    """Pulls from the queue of one deployment: at most as many requests as were wanted."""

    def __init__(self, bus: Bus, slug: str, handler: Callable[[Delivery], None]) -> None:
        self._bus = bus
        self._slug = slug
        self._handler = handler
        self._inbox = bus.inbox()
        self._open = 0
        self._closed = False
        self._subscription: NatsSubscription | None = None
        self._watch: asyncio.TimerHandle | None = None

    @property
    def open_wants(self) -> int:
        """Requests wanted that have not come yet."""
        return self._open

    async def start(self) -> None:
        """Open the inbox. Called by `Bus.pull`."""
        self._subscription = await self._bus.client.subscribe(self._inbox, cb=self._arrived)

    def want(self, n: int) -> None:
        """`n` more requests may come. Negative: that many fewer (those that come all the same are given back)."""
        self._open = max(0, self._open + n)
        if n > 0 and not self._closed:
            self._ask(n)

    def ask_again(self) -> None:
        """All open pull requests are lost (reconnected, expired unheard): ask anew."""
        if self._open > 0 and not self._closed:
            self._ask(self._open)

    def _ask(self, n: int) -> None:
        body = json.dumps({"batch": n, "expires": int(PULL_EXPIRES_S * 1e9)}).encode()
        self._bus.send(f"$JS.API.CONSUMER.MSG.NEXT.{self._bus.stream}.{self._slug}", body, reply=self._inbox)
        self._rearm(PULL_EXPIRES_S + PULL_GRACE_S)

    def _rearm(self, after_s: float) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watch = asyncio.get_running_loop().call_later(after_s, self.ask_again)

    async def _arrived(self, msg: Msg) -> None:
        status = (msg.headers or {}).get("Status")
        if status is not None:
            self._stated(status, msg.headers or {})
            return
        delivery = self._bus.delivery_of(msg)
        if delivery is None:
            return
        if self._closed or self._open <= 0:
            self._bus.nak(delivery.token)  # nobody has room for it any more
            return
        self._open -= 1
        self._bus.guard(self._handler, delivery)

    def _stated(self, status: str, headers: dict[str, str]) -> None:
        if self._closed or self._open <= 0:
            return
        if status == "408":  # expired; tells how many of its batch never came
            self._ask(min(self._open, int(headers.get("Nats-Pending-Messages", self._open))))
        elif status != "100":  # no such consumer (yet), server busy: try again soon, not at once
            self._rearm(1.0)

    async def close(self) -> None:
        """No request is handed out after this; those on the way are given back to the queue."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        self._bus.forget_puller(self)
        if self._subscription is not None:
            with contextlib.suppress(nats.errors.Error):
                await cast(Any, self._subscription).drain()


class Bus:
    """A connection to NATS. Use `Bus.connect`."""

    def __init__(self, client: Client, prefix: str) -> None:
        self.client = client
        self.prefix = prefix
        self.stream = f"{prefix}-{REQUESTS.stream}" if prefix else REQUESTS.stream
        self._js = client.jetstream(timeout=5.0)
        self._outbox: collections.deque[tuple[str, bytes, str]] = collections.deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._pullers: list[Puller] = []
        self._on_disconnect: list[Callable[[], None]] = []
        self._on_reconnect: list[Callable[[], None]] = []
        self._log = log.get("bus")
        self._connected_at = time.monotonic()
        self._sweep_at = self._connected_at
        self.closing = False  # a disconnection is wanted now

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, url: str, *, name: str, prefix: str = "", wait_s: float = 30.0) -> AsyncIterator[Bus]:
        """A connected bus; reconnects for ever once it was connected.

        Raises `HearthError` (unavailable) if there is no server within `wait_s`, and, in an `ExceptionGroup`, if the
        connection is closed for good (the server refused something): a service that nobody can reach must not linger.
        """
        client = Client()
        holder: list[Bus] = []
        logger = log.get("bus")

        async def on_error(error: Exception) -> None:
            logger.warning("bus.failed", error=str(error) or type(error).__name__)

        async def on_disconnect() -> None:
            if not (holder and holder[0].closing):
                logger.warning("bus.disconnected")
                for bus in holder:
                    bus._disconnected()

        async def on_closed() -> None:
            for bus in holder:
                bus._wake.set()  # the writer sees it

        async def on_reconnect() -> None:
            logger.info("bus.reconnected")
            for bus in holder:
                bus._reconnected()

        try:
            async with asyncio.timeout(wait_s):
                await client.connect(
                    url,
                    name=name,
                    error_cb=on_error,
                    disconnected_cb=on_disconnect,
                    reconnected_cb=on_reconnect,
                    closed_cb=on_closed,
                    reconnect_time_wait=0.2,  # type: ignore[arg-type] # seconds; fractions work
                    max_reconnect_attempts=-1,
                    connect_timeout=2,
                    ping_interval=5,
                    max_outstanding_pings=2,
                )
        except (TimeoutError, OSError, nats.errors.Error) as error:
            with contextlib.suppress(Exception):
                await client.close()
            raise HearthError(Code.UNAVAILABLE, f"No NATS server answers at {url}.") from error
        bus = cls(client, prefix)
        holder.append(bus)
        async with asyncio.TaskGroup() as tasks:
            writer = tasks.create_task(bus._write(), name="bus-outbox")
            try:
                yield bus
            finally:
                with contextlib.suppress(HearthError):
                    await bus.flush()
                bus.closing = True
                writer.cancel()  # nats-py may swallow it while it waits for its flusher: the flag ends the writer then
                with contextlib.suppress(OSError):  # the server goes at the same moment
                    await client.close()

    @property
    def connected(self) -> bool:
        """Whether a server is connected right now."""
        return bool(self.client.is_connected)

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call this whenever the connection is lost (and tried to be made again)."""
        self._on_disconnect.append(callback)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call this whenever the connection was lost and is back (calls in flight may have been lost)."""
        self._on_reconnect.append(callback)

    def inbox(self) -> str:
        """A fresh reply subject."""
        return str(self.client.new_inbox())

    # -- topics and endpoints ------------------------------------------------------------------------------------

    def publish(self, topic: Topic[M], message: M, **ids: str) -> None:
        """Send a message: in order, at most once, without waiting."""
        self.send(self._subject(topic.subject(**ids)), codec.encode(cast(msgspec.Struct, message)))

    async def call(self, endpoint: Endpoint[Q, R], message: Q, *, extra_s: float = 0.0, **ids: str) -> R:
        """Ask and wait for the answer.

        Raises `HearthError`: the peer's own failure; unavailable when nobody serves the subject (`Unserved`) or nobody
        answers within the endpoint's timeout plus `extra_s` seconds; too_large beyond the server's largest message.
        """
        subject = endpoint.subject(**ids)
        payload = codec.encode(cast(msgspec.Struct, message))
        try:
            msg = await self._request(self._subject(subject), payload, endpoint.timeout_s + extra_s)
        except nats.errors.NoRespondersError as error:
            raise Unserved(Code.UNAVAILABLE, f"Nobody serves {subject}.") from error
        except nats.errors.MaxPayloadError as error:
            raise HearthError.of(self.too_large("call")) from error
        except (nats.errors.Error, TimeoutError) as error:
            raise HearthError(Code.UNAVAILABLE, f"{subject} did not answer in time.") from error
        try:
            answer: Any = codec.decode(msg.data, Union[(*endpoint.replies, Failure)])
        except codec.CodecError as error:
            raise HearthError(Code.INTERNAL, f"{subject} gave an answer that cannot be read: {error}") from error
        if isinstance(answer, Failure):
            raise HearthError.of(answer)
        return cast(R, answer)

    async def _request(self, subject: str, payload: bytes, timeout_s: float) -> Msg:
        try:
            return await self.client.request(subject, payload, timeout=timeout_s)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not self.client.is_closed or (task is not None and task.cancelling() > 0):
                raise  # we are cancelled, not the client's own waiting by its end
            raise nats.errors.ConnectionClosedError from error

    async def subscribe(self, topic: Topic[M], handler: Callable[[M], None], **ids: str) -> Subscription:
        """Have `handler` called for every message, in order. Ids may be "*"."""

        async def arrived(msg: Msg) -> None:
            try:
                message: M = codec.decode(msg.data, topic.message)
            except codec.CodecError as error:
                self._log.warning("message.refused", subject=msg.subject, error=str(error))
                return
            self.guard(handler, message)

        return Subscription(await self.client.subscribe(self._subject(topic.subject(**ids)), cb=arrived))

    async def serve(
        self, endpoint: Endpoint[Q, R], handler: Callable[[Q, Reply[R]], None], *, group: str = "", **ids: str
    ) -> Subscription:
        """Have `handler` called for every call; it answers by the handle, now or later."""

        async def arrived(msg: Msg) -> None:
            reply: Reply[R] = Reply(self, msg.reply)
            try:
                message: Q = codec.decode(msg.data, endpoint.request)
            except codec.CodecError as error:
                self._log.warning("message.refused", subject=msg.subject, error=str(error))
                reply(Failure(code=Code.INVALID_REQUEST, message=f"The message is malformed: {error}"))
                return
            if not self.guard(handler, message, reply):
                reply(Failure(code=Code.INTERNAL, message="The call could not be handled; the log says why."))

        return Subscription(
            await self.client.subscribe(self._subject(endpoint.subject(**ids)), queue=group, cb=arrived)
        )

    async def listen(self, subject: str, handler: Callable[[str, bytes, str], None]) -> Subscription:
        """Have `handler` called with (subject, bytes, reply subject) of all that passes, as it is: for `hearth tap`."""

        async def arrived(msg: Msg) -> None:
            self.guard(handler, msg.subject, msg.data, msg.reply)

        return Subscription(await self.client.subscribe(subject, cb=arrived))

    def guard(self, handler: Callable[..., None], *arguments: Any) -> bool:
        """Call a handler; the one place where any exception is caught: one bad message must not end the service."""
        try:
            handler(*arguments)
        except HearthError as error:
            self._log.error("handler.refused", code=error.failure.code.value, message=error.failure.message)
            return False
        except Exception:
            self._log.exception("handler.failed")
            return False
        return True

    # -- the work queue of requests ------------------------------------------------------------------------------

    async def ensure_stream(self, *, limit: int = 4096, file_storage: bool = True) -> None:
        """Create the stream of requests, or adapt it. `limit` bounds the requests outstanding per deployment."""
        config = api.StreamConfig(
            name=self.stream,
            subjects=[self._subject(REQUESTS.subject(slug="*"))],
            retention=api.RetentionPolicy.WORK_QUEUE,
            discard=api.DiscardPolicy.NEW,
            discard_new_per_subject=True,
            max_msgs_per_subject=limit,
            max_age=QUEUE_MAX_AGE_S,
            storage=api.StorageType.FILE if file_storage else api.StorageType.MEMORY,
        )
        with self._queue_errors():
            try:
                await self._js.add_stream(config)
            except nats.js.errors.BadRequestError:  # exists with another configuration
                await self._js.update_stream(config)

    async def ensure_queue(self, slug: str, *, ack_wait_s: float) -> None:
        """Create the consumer of one deployment, or adapt it. Idempotent; needs the stream."""
        config = api.ConsumerConfig(
            durable_name=slug,
            filter_subject=self._subject(REQUESTS.subject(slug=slug)),
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ack_wait_s,
            max_ack_pending=MAX_ACK_PENDING,
            max_waiting=4096,
        )
        with self._queue_errors():
            await self._js.add_consumer(self.stream, config)

    async def delete_queue(self, slug: str) -> None:
        """Drop the consumer of a deployment and every request that lies in its queue. Idempotent."""
        with self._queue_errors():
            await self._js.purge_stream(self.stream, subject=self._subject(REQUESTS.subject(slug=slug)))
            with contextlib.suppress(nats.js.errors.NotFoundError):
                await self._js.delete_consumer(self.stream, slug)

    async def enqueue(self, slug: str, request: Request) -> int:
        """Put a request into the queue of a deployment; its stream sequence.

        Raises `HearthError`: queue_full at the stream's limit per deployment, too_large beyond the server's largest
        message, unavailable without JetStream.
        """
        with self._queue_errors():
            ack = await self._js.publish(self._subject(REQUESTS.subject(slug=slug)), codec.encode(request))
        return int(ack.seq)

    async def unqueue(self, sequence: int) -> None:
        """Delete a queued request that nobody wants any more; fine if it is gone already."""
        with self._queue_errors(), contextlib.suppress(nats.js.errors.APIError):
            await self._js.delete_msg(self.stream, sequence)

    async def queued(self, sequence: int) -> bool:
        """Whether the queue has this message still, waiting or handed out; it is gone once it was acknowledged.

        One that is stored but that its consumer has left behind it is gone as well: see `queue_depths`.
        """
        with self._queue_errors():
            try:
                subject = (await self._js.get_msg(self.stream, sequence)).subject or ""
            except nats.js.errors.NotFoundError:
                return False
            return sequence > await self._floor(subject.rsplit(".", 1)[-1])

    async def queue_depths(self) -> dict[str, int]:
        """Slug → requests outstanding: waiting or running, that is not acknowledged yet.

        For a while after each connection this also sweeps the queues. A nats-server that was killed remembers what was
        acknowledged, but may have forgotten that it deleted it: such messages would lie there for ever, given to nobody
        and counted as outstanding. Whatever a queue's consumer has left behind it is deleted.
        """
        with self._queue_errors():
            info = await self._js.stream_info(self.stream, subjects_filter=self._subject(REQUESTS.subject(slug="*")))
            depths = {subject.rsplit(".", 1)[1]: count for subject, count in (info.state.subjects or {}).items()}
            now = time.monotonic()
            if self._sweep_at <= now < self._connected_at + SWEEP_FOR_S:
                self._sweep_at = now + SWEEP_S
                for slug in depths:
                    await self._sweep(slug)
        return depths

    async def _sweep(self, slug: str) -> None:
        """Delete, one by one, what a queue's consumer has left behind it.

        Not by a purge: nats-server 2.9 then forgets of every message of that queue, purged or not, that it waits for
        an acknowledgement or had it given back, and hands none of them out again.
        """
        floor = await self._floor(slug)
        if not floor:
            return
        subject = self._subject(REQUESTS.subject(slug=slug))
        sequence = 1
        for _ in range(SWEEP_MESSAGES):
            try:
                found = (await self._js.get_msg(self.stream, sequence, subject, next=True)).seq or 0
            except nats.js.errors.NotFoundError:
                return
            if found > floor:
                return
            await self.unqueue(found)
            sequence = found + 1

    async def _floor(self, slug: str) -> int:
        """The sequence up to which nothing in the queue of a deployment will be handed out any more.

        A server that was killed may also have forgotten that it waits for an acknowledgement: what was handed out when
        it waits for none is done, or lost. (What was given back, or not acknowledged in time, counts as waited for.)
        """
        try:
            info = await self._js.consumer_info(self.stream, slug)
        except nats.js.errors.NotFoundError:  # no consumer: nothing was
            return 0
        if info.num_ack_pending == 0 and info.delivered is not None:
            return int(info.delivered.stream_seq)
        return int(info.ack_floor.stream_seq) if info.ack_floor is not None else 0

    async def pull(self, slug: str, handler: Callable[[Delivery], None]) -> Puller:
        """Pull from the queue of a deployment; nothing comes before `want`."""
        puller = Puller(self, slug, handler)
        await puller.start()
        self._pullers.append(puller)
        return puller

    def forget_puller(self, puller: Puller) -> None:
        """Called by `Puller.close`."""
        with contextlib.suppress(ValueError):
            self._pullers.remove(puller)

    def delivery_of(self, msg: Msg) -> Delivery | None:
        """The delivery in a JetStream message; a request that cannot be read is dropped from the queue."""
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<timestamp ns>.<pending>
        parts = msg.reply.split(".")
        delivered, sequence, stamp_ns = int(parts[-5]), int(parts[-4]), int(parts[-2])
        try:
            request: Request = codec.decode(msg.data, Request)
        except codec.CodecError as error:
            self._log.error("request.refused", error=str(error))
            self.ack(msg.reply)
            return None
        age_s = max(0.0, time.time() - stamp_ns / 1e9)
        return Delivery(request=request, sequence=sequence, delivery=delivered, token=msg.reply, age_s=age_s)

    def ack(self, token: str) -> None:
        """This request is done: the queue forgets it."""
        self.send(token, b"+ACK")

    def nak(self, token: str, delay_s: float = 0.0) -> None:
        """Give this request back to the queue, to be handed out again after `delay_s`."""
        self.send(token, b"-NAK" if delay_s <= 0 else b'-NAK {"delay": %d}' % int(delay_s * 1e9))

    def in_progress(self, token: str) -> None:
        """Still at it: restart the queue's wait for the acknowledgement."""
        self.send(token, b"+WPI")

    # -- plumbing --------------------------------------------------------------------------------------------------

    def send(self, subject: str, payload: bytes, *, reply: str = "") -> None:
        """Put raw bytes into the outbox. Raises `HearthError` (unavailable) when it is full."""
        if len(self._outbox) >= OUTBOX_LIMIT:
            raise HearthError(Code.UNAVAILABLE, "The outbox to NATS is full.")
        self._outbox.append((subject, payload, reply))
        self._idle.clear()
        self._wake.set()

    async def flush(self, within_s: float = 5.0) -> None:
        """Everything published has reached the server (or was lost with a connection), and every subscription is there.

        Raises `HearthError` (unavailable) if the server has not confirmed that within `within_s` seconds.
        """
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
                while not await self._confirmed():
                    pass  # what is lost with a connection is not confirmed by the next one
        except (TimeoutError, nats.errors.Error) as error:
            raise HearthError(Code.UNAVAILABLE, "NATS does not answer.") from error

    async def _confirmed(self) -> bool:
        # Not the client's own `flush`: its PING goes straight to the socket, past subscriptions that still wait for the
        # client's flusher. A request goes behind them, and the server at once says that nobody serves it; it takes the
        # commands of a connection in order.
        try:
            await self._request(self.inbox(), b"", CONFIRM_S)
        except nats.errors.NoRespondersError:
            return True
        except (TimeoutError, nats.errors.TimeoutError):
            pass
        return False

    async def _write(self) -> None:
        while not self.closing:
            if self.client.is_closed:
                self._idle.set()  # nothing will be sent any more: who flushes must not wait for it
                raise HearthError(Code.UNAVAILABLE, "The connection to NATS was closed for good.")
            await self._wake.wait()
            self._wake.clear()
            while self._outbox and not self.closing:
                subject, payload, reply = self._outbox[0]
                try:
                    await self.client.publish(subject, payload, reply)
                except nats.errors.OutboundBufferLimitError:
                    await asyncio.sleep(0.05)  # disconnected and the client's buffer is full: keep ours
                    continue
                except nats.errors.MaxPayloadError:
                    self._log.error("message.dropped", subject=subject, payload_bytes=len(payload))
                except nats.errors.ConnectionClosedError:
                    self._wake.set()  # for good: see above
                    break
                self._outbox.popleft()
            self._idle.set()

    def _disconnected(self) -> None:
        for callback in self._on_disconnect:
            self.guard(callback)

    def _reconnected(self) -> None:
        self._connected_at = self._sweep_at = time.monotonic()
        for puller in list(self._pullers):
            puller.ask_again()
        for callback in self._on_reconnect:
            self.guard(callback)

    def _subject(self, subject: str) -> str:
        return f"{self.prefix}.{subject}" if self.prefix else subject

    def too_large(self, what: str) -> Failure:
        """Why a message cannot be sent."""
        limit_bytes = self.client.max_payload
        message = f"The {what} is larger than the {limit_bytes} bytes that NATS takes in one message."
        return Failure(code=Code.TOO_LARGE, message=message)

    @contextlib.contextmanager
    def _queue_errors(self) -> Any:
        """JetStream's exceptions as the table's errors."""
        try:
            yield
        except nats.js.errors.APIError as error:
            if error.err_code == SUBJECT_FULL:
                raise HearthError(Code.QUEUE_FULL) from error
            raise HearthError(Code.UNAVAILABLE, f"The request queue refused: {error.description}.") from error
        except nats.errors.MaxPayloadError as error:
            raise HearthError.of(self.too_large("request")) from error
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            raise HearthError(Code.UNAVAILABLE, "The request queue does not answer.") from error
