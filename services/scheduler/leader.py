"""The shell of `leadership`: asks the registry for the lease, and has a `Service` at work while it leads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import assert_never

from prometheus_client import Counter, Gauge

from services.scheduler.leadership import (
    FORGOTTEN,
    LONG,
    Acquire,
    Action,
    Announce,
    Ended,
    Event,
    Heard,
    Hinted,
    Kept,
    Lead,
    Leadership,
    LeaseRules,
    Lost,
    Pause,
    Release,
    Released,
    Renew,
    Resume,
    StandBy,
    StepDown,
    StopAsked,
    Taken,
    Unanswered,
    Won,
)
from services.scheduler.service import Service
from shared.contracts.events import RecordChanged
from shared.contracts.placement import Leading
from shared.contracts.records import DeploymentRecord, Phase, SchedulerRecord
from shared.driver import Driver
from shared.errors import Code, Failure, HearthError
from shared.lifecycle import Context, Heartbeat
from shared.registry import LeaderLease, record_kind
from shared.settings import SchedulerSettings
from shared.subjects import LEADING, RECORD_CHANGED

TERM = Gauge("hearth_scheduler_term", "The term under which this scheduler leads; 0: it stands by")
LEADS = Gauge("hearth_scheduler_leading", "1: this scheduler leads; 0: it stands by, or has lost its lease for now")
CHANGES = Counter("hearth_scheduler_leadership_changes_total", "Led, paused, resumed, stepped_down", ["change"])

MakeService = Callable[["Leader"], Service]


class Leader:
    """Leads or stands by. `make_service` makes what a leader does, with a fresh picture.

    `settled` is set as soon as it is clear which of the two it is, and, if it leads, the picture is complete.
    `pauses` counts the times that the lease was lost or could not be renewed: what was read across one is void.
    """

    def __init__(
        self, context: Context[SchedulerSettings], lease: LeaderLease, rules: LeaseRules, make_service: MakeService
    ) -> None:
        self.machine = Leadership(rules)
        self.settled = asyncio.Event()
        self.ended = asyncio.Event()
        self.pauses = 0
        self.shown_term = 0
        self._context = context
        self._lease = lease
        self._make_service = make_service
        self._clock = time.monotonic
        self._driver: Driver[Event, Action] = Driver(
            self.machine, tell=self._tell, do=self._do, long=LONG, clock=self._clock
        )
        self._allowed = asyncio.Event()
        self._connected = asyncio.Event()
        self._connected.set()
        self._service: Service | None = None
        self._work: asyncio.Task[None] | None = None
        self._beat: Heartbeat | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, context: Context[SchedulerSettings], make_service: MakeService) -> AsyncIterator[Leader]:
        """A leader or standby with a lease of its own. Raises `HearthError` for settings that cannot be."""
        rules = rules_of(context.settings)
        # A scheduler that starts again under its own id is another holder.
        holder = f"{context.id}/{secrets.token_hex(4)}"
        async with context.registry.lease(holder, ttl_s=rules.ttl_s) as lease:
            yield cls(context, lease, rules, make_service)

    async def run(self) -> None:
        """Stand by and lead until the context is stopping, then give the lease back."""
        context = self._context
        self._beat = context.heartbeat(self._record)
        await context.bus.subscribe(LEADING, self._leading)
        await context.bus.subscribe(RECORD_CHANGED, self._scheduler_changed, kind=record_kind(SchedulerRecord))
        context.bus.on_disconnect(self._connected.clear)
        context.bus.on_reconnect(self._reconnected)
        driver = context.tasks.create_task(self._driver.run(), name="leadership")
        await context.stopping.wait()
        self._driver.post(StopAsked())
        await self.ended.wait()
        driver.cancel()

    # -- for the service -----------------------------------------------------------------------------------------

    @property
    def may_command(self) -> bool:
        """Whether nobody else can lead at this moment."""
        return self.machine.may_command(self._clock())

    async def granted(self) -> int:
        """Wait until commands are allowed; the term that they carry."""
        while not (self.may_command and self._connected.is_set()):
            await self._allowed.wait()
            await self._connected.wait()  # or the command would be carried out when nobody wants it any more
            await asyncio.sleep(0)  # the lease may have run out a moment before the machine says so
        return self.machine.term

    async def confirmed(self) -> bool:
        """Whether the registry still has the lease; one that has lost it may have lost what it was just asked for."""
        event = await self._do(Renew(self.machine.term, self._clock()))
        if isinstance(event, Lost):
            self._driver.post(event)
        return isinstance(event, Kept)

    def refused(self, failure: Failure) -> None:
        """Somebody answered a command with this failure: perhaps it has heard of a later leader."""
        if failure.code is Code.STALE_EPOCH and failure.term:
            self._driver.post(Heard(failure.term))

    async def write(self, record: DeploymentRecord) -> None:
        """Write a deployment's record as the leader. Raises `HearthError` (stale_epoch) if it is another one."""
        await self._context.registry.write(record, self._lease.value(await self.granted()))

    async def erase(self, name: str) -> None:
        """Remove a deployment's record as the leader. Raises `HearthError` (stale_epoch) if it is another one."""
        await self._context.registry.erase(DeploymentRecord, name, self._lease.value(await self.granted()))

    # -- messages → events ---------------------------------------------------------------------------------------

    def _leading(self, message: Leading) -> None:
        if message.scheduler_id != self._context.id:
            self._driver.post(Heard(message.term, rival=True))

    def _scheduler_changed(self, message: RecordChanged) -> None:
        if message.id != self._context.id:
            self._driver.post(Hinted())

    def _reconnected(self) -> None:
        self._connected.set()
        if self._service is not None:
            self._service.reconnected()

    # -- actions → effects ---------------------------------------------------------------------------------------

    def _tell(self, action: Action) -> None:
        match action:
            case Lead():
                self._begin(action.term)
            case Pause():
                self._pause()
            case Resume():
                self._resume(action.term)
            case StepDown():
                self._step_down()
            case StandBy():
                self._context.log.info("scheduler.waiting")
                self.settled.set()
            case Announce():
                self._context.bus.publish(LEADING, Leading(scheduler_id=self._context.id, term=action.term))
            case Ended():
                self.ended.set()
            case Acquire() | Renew() | Release():
                raise TypeError(f"{type(action).__name__} takes time and is not told")
            case _:
                assert_never(action)

    async def _do(self, action: Action) -> Event:
        try:
            match action:
                case Acquire():
                    term, left_s = await self._lease.acquire(action.at_least, forgotten=FORGOTTEN)
                    return Won(term, action.asked_at) if left_s is None else Taken(term, left_s)
                case Renew():
                    kept = await self._lease.renew(action.term)
                    return Kept(action.term, action.asked_at) if kept else Lost(action.term)
                case Release():
                    await self._lease.release(action.term)
                    return Released()
                case _:
                    raise TypeError(f"{type(action).__name__} takes no time and is not done")
        except HearthError:
            return Unanswered()

    def _begin(self, term: int) -> None:
        self._changed("led", term)
        service = self._make_service(self)
        self._service = service
        self._work = self._context.tasks.create_task(self._lead(service), name=f"leader-{term}")
        self._allowed.set()

    async def _lead(self, service: Service) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(service.run(), name="scheduler")
            await service.oriented.wait()
            self._show(self.machine.term)
            self.settled.set()

    def _pause(self) -> None:
        self._changed("paused", 0)
        self.pauses += 1
        self._allowed.clear()
        if self._service is not None:
            self._service.hold()

    def _resume(self, term: int) -> None:
        self._changed("resumed", term)
        self._allowed.set()
        if self._service is not None:
            self._service.go_on()
            if self._service.oriented.is_set():
                self._show(term)

    def _step_down(self) -> None:
        self._changed("stepped_down", 0)
        self.pauses += 1
        self._allowed.clear()
        if self._service is not None:
            self._service.hold()
        if self._work is not None:
            self._work.cancel()
        self._service = self._work = None
        self._show(0)

    def _changed(self, change: str, term: int) -> None:
        CHANGES.labels(change).inc()
        TERM.set(term)
        LEADS.set(term > 0)
        self._context.event(f"scheduler.{change}", scheduler_id=self._context.id, term=term or self.machine.known)

    def _show(self, term: int) -> None:
        self.shown_term = term
        if self._beat is not None:
            self._beat.touch()

    def _record(self, phase: Phase) -> SchedulerRecord:
        return SchedulerRecord(scheduler_id=self._context.id, phase=phase, pid=os.getpid(), term=self.shown_term)


def rules_of(settings: SchedulerSettings) -> LeaseRules:
    """The numbers of the lease from the environment's. Raises `HearthError` (invalid_request) if they cannot be."""
    ttl_s, renew_s, margin_s = settings.leader_ttl_s, settings.leader_renew_s, settings.leader_margin_s
    if renew_s + margin_s >= ttl_s:
        raise HearthError(
            Code.INVALID_REQUEST,
            f"HEARTH_LEADER_TTL_S={ttl_s:g} leaves no time to renew: it must be above the sum of "
            f"HEARTH_LEADER_RENEW_S={renew_s:g} and HEARTH_LEADER_MARGIN_S={margin_s:g}.",
        )
    return LeaseRules(
        ttl_s=ttl_s,
        renew_s=renew_s,
        margin_s=margin_s,
        # Half a TTL without Redis, and records that were due to be written again may be gone ...
        away_s=settings.record_ttl_s / 2,
        # ... and back after a heartbeat, and the time that their writers take to find out.
        settle_s=2 * settings.heartbeat_s,
    )
