"""`/v1/admin/requests`, and draining: what runs where, and who moves it. What `hearth requests|migrate|drain` call.

The scheduler moves requests and the workers drain; here both are asked for, and what they say is passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from services.gateway.answers import answer_steps, encode, json_answer, read_optional_body
from services.gateway.openai import bad
from services.gateway.patience import SCHEDULER, Patience, unanswered
from services.gateway.service import Gateway
from shared.codec import CodecError
from shared.contracts.migration import (
    Drain,
    ListRequests,
    MigrationEnded,
    MigrationOutcome,
    MigrationReason,
    Move,
    Moved,
    Moving,
    RunningRequest,
)
from shared.contracts.records import Phase, ReplicaRecord, ServerRecord, WorkerRecord
from shared.errors import Code, Failure, HearthError
from shared.subjects import DRAIN, LIST_REQUESTS, MOVE

POLL_S: Final = 0.5
AT_ONCE: Final = 64  # workers that are asked at the same time
DRAIN_WAIT_S: Final = 300.0
MOST_WAIT_S: Final = 86_400.0
NAMED: Final = 20
_ID_CHARS: Final = 64

R = TypeVar("R", bound=msgspec.Struct)


class MigrateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to: a worker's id, or None to leave it to the scheduler."""

    to: str | None = None


class DrainBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`on` false takes a drain back. `wait_s` bounds the wait until nothing is left; 0: do not wait."""

    on: bool = True
    wait_s: float = DRAIN_WAIT_S


class RequestsLine(msgspec.Struct, frozen=True):
    """The answer of `GET /v1/admin/requests`. `silent` are the workers that did not answer."""

    data: list[RunningRequest]
    silent: list[str]


class MovingLine(msgspec.Struct, frozen=True):
    """A line of the answer to a migrate: how far it is."""

    moving: Moving


class MigratedLine(msgspec.Struct, frozen=True):
    """The result of a migrate."""

    migrated: MigrationEnded


class Left(msgspec.Struct, frozen=True):
    """What a draining worker still has. `phase` "" is a worker that has ended; `incoming` are requests on their way."""

    worker_id: str
    phase: str
    requests: int
    incoming: int
    replicas: int


class DrainingLine(msgspec.Struct, frozen=True):
    """A line of the answer to a drain: what is left."""

    draining: list[Left]


class DrainedLine(msgspec.Struct, frozen=True):
    """The result of a drain: nothing is left on these workers."""

    drained: list[str]


class UndrainedLine(msgspec.Struct, frozen=True):
    """The result of taking a drain back: these workers take work again."""

    undrained: list[str]


# -- what is allowed, and how it is said ------------------------------------------------------------------------------


def listed(names: Iterable[str], most: int = NAMED) -> str:
    """`a, b, c and 4 more`."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def unknown(kind: str, asked: str, names: Iterable[str]) -> HearthError:
    """Nothing of this kind ("worker", "server") has this id; those that there are, named."""
    known = listed(names)
    there = f"there are: {known}" if known else f"no {kind} runs"
    return HearthError(Code.NOT_FOUND, f"No {kind} is called {asked[:_ID_CHARS]!r}; {there}.", param=kind)


def check_destination(to: str, workers: Sequence[WorkerRecord]) -> None:
    """Raises `HearthError` unless requests may move to this worker."""
    for record in workers:
        if record.worker_id == to:
            if record.phase is not Phase.READY:
                raise HearthError(Code.CONFLICT, f"Worker {to} is {record.phase.value}; it takes no work.", param="to")
            return
    error = unknown("worker", to, (record.worker_id for record in workers))
    raise HearthError(Code.NOT_FOUND, error.failure.message, param="to")


def check_wait(body: DrainBody) -> DrainBody:
    """The body itself if it makes sense. Raises `HearthError`."""
    if not (math.isfinite(body.wait_s) and 0 <= body.wait_s <= MOST_WAIT_S):
        raise bad(f"wait_s must be between 0 and {MOST_WAIT_S:.0f} seconds.", "wait_s")
    return body


def owner(request_id: str, running: Sequence[RunningRequest], silent: Sequence[str]) -> RunningRequest:
    """Where a request runs; of two that hold it, the one with the newer epoch. Raises `HearthError` if nobody does."""
    found = [one for one in running if one.request_id == request_id]
    if found:
        return max(found, key=lambda one: one.epoch)
    shown = repr(request_id[:_ID_CHARS])
    if silent:
        message = f"No worker that answers runs a request {shown}, and these do not answer: {listed(silent)}."
        raise HearthError(Code.UNAVAILABLE, message, param="request")
    raise HearthError(Code.NOT_FOUND, f"No worker runs a request {shown}.", param="request")


def outcome(request_id: str, moved: Moved) -> MigrationEnded:
    """How the migration of one request ended. Raises `HearthError` if it did not move and still runs where it was."""
    mine = [ended for ended in moved.ended if ended.request_id == request_id]
    if mine and mine[-1].outcome is not MigrationOutcome.ABORTED:
        return mine[-1]
    failure = (mine[-1].failure if mine else None) or moved.failure
    if failure is None and not mine:
        raise HearthError(Code.NOT_FOUND, f"Request {request_id!r} was over before it could move.", param="request")
    failure = failure or Failure(code=Code.BUSY, message="No reason was given.")
    where = f" and goes on at {mine[-1].source_worker_id}" if mine else ""
    message = f"Request {request_id!r} did not move{where}: {failure.message}"
    raise HearthError.of(msgspec.structs.replace(failure, message=message))


def is_empty(left: Left) -> bool:
    """Whether nothing is left on a worker that was told to drain. One whose record does not say so yet is not empty."""
    told = left.phase not in (Phase.STARTING.value, Phase.READY.value)
    return told and left.requests == left.incoming == left.replicas == 0


def described(lefts: Sequence[Left]) -> str:
    """`worker-1 (3 requests, 1 replica), worker-2 (1 request, 0 replicas)`."""
    rest = [left for left in lefts if not is_empty(left)]
    return listed(
        f"{left.worker_id} ({_count(left.requests + left.incoming, 'request')}, {_count(left.replicas, 'replica')})"
        for left in rest
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# -- the handlers -----------------------------------------------------------------------------------------------------


def add_routes(app: web.Application, gateway: Gateway) -> None:
    """Put the paths of running requests and of draining into the application."""
    moves = Moves(gateway)
    app.router.add_get("/v1/admin/requests", moves.requests)
    app.router.add_post("/v1/admin/requests/{request}/migrate", moves.migrate)
    app.router.add_post("/v1/admin/workers/{worker}/drain", moves.drain_worker)
    app.router.add_post("/v1/admin/servers/{server}/drain", moves.drain_server)


class Moves:
    """The handlers."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def requests(self, _: web.Request) -> web.Response:
        """What runs on every worker, oldest first."""
        running, silent = await self._running(await self._workers())
        running.sort(key=lambda one: (-one.running_s, one.request_id, one.worker_id))
        return json_answer(encode(RequestsLine(running, silent)))

    async def migrate(self, request: web.Request) -> web.StreamResponse:
        """Move one running request to another worker."""
        request_id = request.match_info["request"]
        body: MigrateBody = await read_optional_body(request, MigrateBody, MigrateBody())
        return await answer_steps(request, self._migrate(request_id, body.to))

    async def _migrate(self, request_id: str, to: str | None) -> AsyncGenerator[bytes, None]:
        workers = await self._workers()
        if to is not None:
            check_destination(to, workers)
        found = owner(request_id, *await self._running(workers))
        if found.worker_id == to:
            raise bad(f"Request {request_id!r} runs at {to} already.", "to")
        if found.migrating_to:
            message = f"Request {request_id!r} is on its way to {found.migrating_to} already."
            raise HearthError(Code.CONFLICT, message, param="request")
        move = Move(
            move_id=secrets.token_hex(8),
            from_worker_id=found.worker_id,
            request_ids=(request_id,),
            replica_id=found.replica_id,
            to_worker_id=to or "",
            reason=MigrationReason.OPERATOR,
            wait_s=POLL_S,
        )
        until = time.monotonic() + self._gateway.settings.request_budget_s
        patience = Patience(SCHEDULER)
        while True:
            try:
                step = await self._gateway.bus.call(MOVE, move, extra_s=POLL_S)
            except HearthError as error:
                await patience.bear(error)
                continue
            patience.heard()
            if isinstance(step, Moved):
                yield encode(MigratedLine(outcome(request_id, step)))
                return
            if time.monotonic() > until:
                raise HearthError(Code.DEADLINE_EXCEEDED, f"Request {request_id!r} is still {step.phase}.")
            yield encode(MovingLine(step))

    async def drain_worker(self, request: web.Request) -> web.StreamResponse:
        """Let everything leave a worker, or take that back."""
        body: DrainBody = check_wait(await read_optional_body(request, DrainBody, DrainBody()))
        asked = request.match_info["worker"]
        names = [record.worker_id for record in await self._workers()]
        if asked not in names:
            raise unknown("worker", asked, names)
        return await answer_steps(request, self._drain([asked], body))

    async def drain_server(self, request: web.Request) -> web.StreamResponse:
        """The same for every worker that a server has now."""
        body: DrainBody = check_wait(await read_optional_body(request, DrainBody, DrainBody()))
        asked = request.match_info["server"]
        workers = await self._workers()
        here = [record.worker_id for record in workers if record.server_id == asked]
        if not here:
            servers = {record.server_id for record in await self._records(ServerRecord)}
            if asked not in servers:
                raise unknown("server", asked, sorted(servers | {record.server_id for record in workers}))
        return await answer_steps(request, self._drain(here, body))

    async def _drain(self, worker_ids: list[str], body: DrainBody) -> AsyncGenerator[bytes, None]:
        until = time.monotonic() + body.wait_s
        await self._order(worker_ids, on=body.on)
        if not body.on:
            yield encode(UndrainedLine(worker_ids))
            return
        while True:
            lefts = await self._left(worker_ids)
            if all(is_empty(left) for left in lefts):
                yield encode(DrainedLine(worker_ids))
                return
            if time.monotonic() >= until and body.wait_s > 0:
                message = (
                    f"After {body.wait_s:g} s there is still something on {described(lefts)}; they go on draining."
                )
                raise HearthError(Code.DEADLINE_EXCEEDED, message)
            yield encode(DrainingLine(lefts))
            if not body.wait_s:
                return
            await asyncio.sleep(min(POLL_S, max(0.0, until - time.monotonic())))
            # One that crashed meanwhile and is back has forgotten that it was to drain; to hear it twice does no harm.
            await self._order([left.worker_id for left in lefts if left.phase == Phase.READY.value], on=True)

    # -- workers ------------------------------------------------------------------------------------------------------

    async def _records(self, kind: type[R]) -> list[R]:
        try:
            return await self._gateway.registry.all(kind)
        except CodecError as error:
            raise HearthError(Code.INTERNAL, f"A record cannot be read: {error}") from error

    async def _workers(self) -> list[WorkerRecord]:
        return await self._records(WorkerRecord)

    async def _running(self, workers: Iterable[WorkerRecord]) -> tuple[list[RunningRequest], list[str]]:
        """What runs on these workers, and which of them do not say."""
        asked = [record.worker_id for record in workers if record.phase in (Phase.READY, Phase.DRAINING)]
        found = await self._ask(asked)
        silent = [worker_id for worker_id in asked if worker_id not in found]
        return [one for worker_id in asked for one in found.get(worker_id, ())], silent

    async def _ask(self, worker_ids: Iterable[str]) -> dict[str, tuple[RunningRequest, ...]]:
        """What runs on each worker that answers."""
        found: dict[str, tuple[RunningRequest, ...]] = {}

        async def ask(worker_id: str) -> None:
            with contextlib.suppress(HearthError):  # who does not answer is missing in what is found
                answer = await self._gateway.bus.call(LIST_REQUESTS, ListRequests(), worker_id=worker_id)
                found[worker_id] = answer.requests

        await _each(worker_ids, ask)
        return found

    async def _left(self, worker_ids: list[str]) -> list[Left]:
        """What is left on each of these workers: by its own word, and by its records if it does not answer."""
        records = {record.worker_id: record for record in await self._workers()}
        replicas = await self._records(ReplicaRecord)
        found = await self._ask(worker_id for worker_id in worker_ids if worker_id in records)
        lefts: list[Left] = []
        for worker_id in worker_ids:
            here = [replica for replica in replicas if replica.worker_id == worker_id]
            record = records.get(worker_id)
            told = found.get(worker_id)
            lefts.append(
                Left(
                    worker_id=worker_id,
                    phase="" if record is None else record.phase.value,
                    requests=sum(replica.running for replica in here) if told is None else len(told),
                    incoming=0 if record is None else record.incoming,
                    replicas=len(here),
                )
            )
        return lefts

    async def _order(self, worker_ids: Iterable[str], *, on: bool) -> None:
        """Tell workers to drain, or to take work again. Raises `HearthError` for the first that could not be told."""
        refused: dict[str, HearthError] = {}

        async def order(worker_id: str) -> None:
            try:
                await self._order_one(worker_id, on=on)
            except HearthError as error:
                refused[worker_id] = error

        await _each(worker_ids, order)
        for worker_id in sorted(refused):
            raise refused[worker_id]

    async def _order_one(self, worker_id: str, *, on: bool) -> None:
        patience = Patience(f"Worker {worker_id}", unanswered)
        while True:
            try:
                await self._gateway.bus.call(DRAIN, Drain(on=on), worker_id=worker_id)
                return
            except HearthError as error:
                await patience.bear(error)
            if on and await self._gateway.registry.get(WorkerRecord, worker_id) is None:
                return  # it has ended: nothing can be left there


async def _each(worker_ids: Iterable[str], work: Callable[[str], Awaitable[None]]) -> None:
    """Do it for all of them, a bounded number at the same time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(worker_id: str) -> None:
        async with room:
            await work(worker_id)

    async with asyncio.TaskGroup() as tasks:
        for worker_id in worker_ids:
            tasks.create_task(one(worker_id))
