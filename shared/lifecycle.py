"""The life of a service: settings → log → clients → serve → drain → gone.

Phases are `starting → ready → draining → stopped` and stand in the service's record. SIGTERM or SIGINT begins the
drain; a second one ends the process at once. A crash is an exit code ≠ 0, and whoever supervises restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, Generic, TypeVar

import msgspec

from shared import log, metrics
from shared.bus import Bus
from shared.contracts.events import ClusterEvent, RecordChanged
from shared.contracts.records import GatewayRecord, Phase, Record, ReplicaRecord, ServerRecord
from shared.errors import HearthError
from shared.registry import Registry, record_id, record_kind
from shared.settings import CommonSettings, SettingsError, load
from shared.subjects import EVENTS, RECORD_CHANGED

S = TypeVar("S", bound=CommonSettings)

# A drain that has not ended so long after its own limit never will; whoever supervises starts afresh.
STUCK_AFTER_S: Final = 20.0
# A record is written again after this many times what making it took: a server with thousands of checkpoints must not
# spend its time on telling of each of a thousand acquires. A small record takes microseconds.
REST: Final = 50
# What changes all the time and decides nothing at once: whoever keeps a picture sees it at its next look, and is not
# told to read a record again because of it.
NOISE: Final[dict[type, tuple[str, ...]]] = {
    GatewayRecord: ("open_requests",),
    ReplicaRecord: (
        "context_tokens", "generated_tokens", "idle_s", "left_tokens", "load", "output_tokens", "prefill_token_s",
        "step_s",
    ),
    ServerRecord: (
        "dram_arriving", "load_drain_s", "load_queue_bytes", "peer_bytes_per_s", "remote_bytes_per_s", "ssd_arriving",
        "ssd_bytes_per_s",
    ),
}  # fmt: skip
# A service that starts says that it waits for NATS or Redis after so long, and asks Redis again so often.
SAY_AFTER_S: Final = 1.0
ASK_AGAIN_S: Final = 0.25


class _Finished(Exception):
    """Raised inside the service's TaskGroup to end what still runs in it."""


class Heartbeat:
    """Keeps one record in the registry: at once, every `heartbeat_s`, and whenever it is touched."""

    def __init__(self, context: Context[Any], make_record: Callable[[Phase], Record]) -> None:
        self._context = context
        self._make = make_record
        self._touched = asyncio.Event()
        self._missed = False
        self._ended = False
        self._rest_s = 0.0
        self._told: Record | None = None
        self._over = asyncio.Event()

    def touch(self) -> None:
        """The record changed: write it (at once, if the last time is not just over) and tell who keeps a picture."""
        self._touched.set()

    def tell_again(self) -> None:
        """What was told may not have been heard: write the record and tell, changed or not."""
        self._told = None
        self._touched.set()

    async def push(self) -> None:
        """Write the record; tell if more than `NOISE` changed since that was told."""
        began = time.perf_counter()
        record = self._make(self._context.phase)
        self._rest_s = min(REST * (time.perf_counter() - began), self._context.settings.heartbeat_s / 2)
        await self._context.registry.put(record, ttl_s=self._context.settings.record_ttl_s)
        told = msgspec.structs.replace(record, **dict.fromkeys(NOISE.get(type(record), ())))
        if told != self._told:
            self._told = told
            self._context.changed(type(record), record_id(record))

    async def run(self) -> None:
        """Beat until cancelled or ended."""
        while not self._ended:
            try:
                await self.push()
                self._missed = False
            except HearthError as error:  # Redis is away: the record expires, the service goes on
                if not self._missed:
                    self._context.log.warning("heartbeat.missed", error=error.failure.message)
                self._missed = True
            if not self._ended:
                await asyncio.sleep(self._rest_s)
            try:
                async with asyncio.timeout(self._context.settings.heartbeat_s):
                    await self._touched.wait()
            except TimeoutError:
                continue
            self._touched.clear()
        self._over.set()

    async def end(self) -> None:
        """Stop beating, then delete the record: for what goes before its service does (a replica).

        Without Redis the record expires by itself.
        """
        self._ended = True
        self._touched.set()
        await self._over.wait()  # a write under way must not come after the deletion
        self._context.forget(self)
        with contextlib.suppress(HearthError):
            await self.remove()

    async def remove(self) -> None:
        """Delete the record."""
        record = self._make(Phase.STOPPED)
        await self._context.registry.delete(type(record), record_id(record))
        self._context.changed(type(record), record_id(record), deleted=True)


class Context(Generic[S]):
    """What the wiring of a service works with."""

    def __init__(
        self,
        *,
        service: str,
        id: str,
        settings: S,
        bus: Bus,
        registry: Registry,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.service = service
        self.id = id
        self.settings = settings
        self.bus = bus
        self.registry = registry
        self.tasks = tasks
        self.stopping = asyncio.Event()
        self.phase = Phase.STARTING
        self.log = log.get(service)
        self._beats: list[Heartbeat] = []
        bus.on_reconnect(self._tell_again)

    def _tell_again(self) -> None:
        for beat in self._beats:
            beat.tell_again()

    def heartbeat(self, make_record: Callable[[Phase], Record]) -> Heartbeat:
        """Keep a record from now on; it is removed when the service ends."""
        beat = Heartbeat(self, make_record)
        self._beats.append(beat)
        self.tasks.create_task(beat.run(), name="heartbeat")
        return beat

    def forget(self, beat: Heartbeat) -> None:
        """Called by `Heartbeat.end`."""
        self._beats.remove(beat)

    def changed(self, kind: type, id: str, deleted: bool = False) -> None:
        """Tell those who keep a picture that a record changed."""
        name = record_kind(kind)
        self.bus.publish(RECORD_CHANGED, RecordChanged(kind=name, id=id, deleted=deleted), kind=name)

    def event(self, name: str, **facts: str | int | float | bool | None) -> None:
        """Log something that happened and tell the cluster."""
        self.log.info(name, **facts)
        self.bus.publish(
            EVENTS, ClusterEvent(event=name, service=self.id, at_s=time.time(), facts=facts), service=self.service
        )

    async def ready(self) -> None:
        """The service can answer: say so in its records, at once."""
        self.phase = Phase.READY
        for beat in self._beats:
            try:
                await beat.push()
            except HearthError:
                continue  # Redis is away just now: the next heartbeat says it
        metrics.READY.set(1)
        self.log.info("service.ready")

    def set_draining(self, on: bool) -> None:
        """An operator wants the service to take nothing new, or to take work again; its records will say so."""
        if self.phase in (Phase.READY, Phase.DRAINING) and not self.stopping.is_set():
            self.phase = Phase.DRAINING if on else Phase.READY
            metrics.READY.set(0 if on else 1)
            self.log.info("service.drained" if on else "service.resumed")

    async def drain(self) -> None:
        """The service takes nothing new: say so in its records, at once."""
        self.phase = Phase.DRAINING
        metrics.READY.set(0)
        for beat in self._beats:
            try:
                await beat.push()
            except HearthError:
                continue  # Redis is away: the record expires by itself
        self.log.info("service.draining")

    async def close(self) -> None:
        """Remove the records."""
        self.phase = Phase.STOPPED
        for beat in self._beats:
            try:
                await beat.remove()
            except HearthError:
                continue  # Redis is away: the record expires by itself


Serve = Callable[[Context[S]], Awaitable[None]]


def make_id(kind: str) -> str:
    """A fresh id, such as "gateway-1f3a9c"."""
    return f"{kind}-{secrets.token_hex(3)}"


async def run_service(
    service: str, id: str, settings: S, serve: Serve[S], stopping: asyncio.Event | None = None
) -> None:
    """One whole life of a service on the running loop. `stopping`, when given, begins the drain (tests).

    NATS and Redis are waited for at the start, `start_wait_s` each. Raises `HearthError` (unavailable) after that.
    """
    stopping = stopping or asyncio.Event()
    wait_s = settings.start_wait_s
    async with contextlib.AsyncExitStack() as stack:
        with _said_after(SAY_AFTER_S, service, "NATS"):
            bus = await stack.enter_async_context(
                Bus.connect(settings.nats_url, name=id, prefix=settings.prefix, wait_s=wait_s)
            )
        registry = await stack.enter_async_context(Registry.connect(settings.redis_url, prefix=settings.prefix))
        with _said_after(SAY_AFTER_S, service, "Redis"):
            await _until_answered(registry, wait_s, stopping)
        if stopping.is_set():
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                context = Context(service=service, id=id, settings=settings, bus=bus, registry=registry, tasks=tasks)
                context.stopping = stopping
                await serve(context)
                await context.close()
                raise _Finished
        except* _Finished:
            pass


@contextlib.contextmanager
def _said_after(after_s: float, service: str, what: str) -> Iterator[None]:
    """Say that the service waits for `what` if that takes longer."""
    logger = log.get(service)
    saying = asyncio.get_running_loop().call_later(after_s, lambda: logger.warning("service.waiting", on=what))
    try:
        yield
    finally:
        saying.cancel()


async def _until_answered(registry: Registry, wait_s: float, stopping: asyncio.Event) -> None:
    """Ask until Redis answers or the service is to stop. Raises `HearthError` (unavailable) after `wait_s`."""
    until = time.monotonic() + wait_s
    while not stopping.is_set():
        try:
            await registry.ping()
            return
        except HearthError:
            if time.monotonic() >= until:
                raise
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_AGAIN_S):
                await stopping.wait()


def run(service: str, settings_type: type[S], serve: Serve[S]) -> int:
    """The `main` of a service; its exit code."""
    try:
        settings = load(settings_type)
    except SettingsError as error:
        print(f"hearth {service}: {error}", file=sys.stderr)
        return 2
    id = settings.own_id or make_id(service)
    log.configure(service, id, level=settings.log_level, form=settings.log_format)
    logger = log.get(service)
    stop_metrics: Callable[[], None] | None = None
    try:
        if settings.metrics_port:
            stop_metrics = metrics.serve(settings.metrics_port, settings.metrics_host)
        asyncio.run(_with_signals(service, id, settings, serve))
    except HearthError as error:
        logger.error("service.failed", code=error.failure.code.value, message=error.failure.message)
        return 1
    except OSError as error:
        logger.error("service.failed", code="os", message=str(error))
        return 1
    except BaseExceptionGroup as group:
        for leaf in _leaves(group):
            if isinstance(leaf, HearthError):  # said in one sentence: what cannot be set up as the settings say
                logger.error("service.failed", code=leaf.failure.code.value, message=leaf.failure.message)
                continue
            logger.error("service.crashed", error=f"{type(leaf).__name__}: {leaf}", exc_info=leaf)
        return 1
    finally:
        if stop_metrics is not None:
            stop_metrics()
    logger.info("service.stopped")
    return 0


async def _with_signals(service: str, id: str, settings: S, serve: Serve[S]) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stuck() -> None:
        log.get(service).error("service.stuck", after_s=settings.drain_s + STUCK_AFTER_S)
        os._exit(1)

    def stop() -> None:
        if stopping.is_set():
            os._exit(130)  # asked twice: at once
        stopping.set()
        loop.call_later(settings.drain_s + STUCK_AFTER_S, stuck)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await run_service(service, id, settings, serve, stopping)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
