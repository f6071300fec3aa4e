"""`hearth requests`, `hearth migrate` and `hearth drain`: what runs where, and moving it away."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import msgspec
from rich.console import Console, RenderableType
from rich.text import Text

from services.cli.client import Client, ClientError, DrainingWorker, RunningRequests, run
from services.cli.ps import plain_table
from shared.contracts.migration import MigrationEnded, MigrationOutcome, Moving, RunningRequest
from shared.contracts.records import ClusterView
from shared.sizes import duration, size

NAMED: Final = 5


# -- what somebody means ----------------------------------------------------------------------------------------------


def meant(text: str, ids: Iterable[str], what: str, where: str) -> str:
    """The id that `text` is, or the only one that begins so. Raises `ClientError` saying where ids can be seen."""
    found = _beginning(text, ids)
    if not found:
        raise ClientError(f"No {what} has an id that begins with {text!r}; {where}")
    if len(found) > 1:
        raise _several(text, found)
    return found[0]


def requests_meant(text: str, ids: Iterable[str]) -> list[str]:
    """The running request that `text` means, or those of one call with several choices (`n`). Raises `ClientError`."""
    found = _beginning(text, ids)
    if not found:
        raise ClientError(f"No running request has an id that begins with {text!r}; hearth requests lists them.")
    calls = {id.partition("-")[0] for id in found}
    if len(found) > 1 and len(calls) > 1:
        raise _several(text, found)
    return found


def _beginning(text: str, ids: Iterable[str]) -> list[str]:
    known = sorted(set(ids), key=lambda id: (len(id), id))
    return [id for id in known if id == text] or [id for id in known if text and id.startswith(text)]


def _several(text: str, found: list[str]) -> ClientError:
    shown = ", ".join(found[:NAMED]) + (" …" if len(found) > NAMED else "")
    return ClientError(f"{text!r} could be {len(found)} of them: {shown}.")


def drain_meant(text: str, view: ClusterView) -> tuple[str, str]:
    """("workers" or "servers", id) of what is to drain; an id itself goes before one that begins so. `ClientError`."""
    workers = {record.worker_id for record in view.workers}
    servers = {record.server_id for record in view.servers} | {record.server_id for record in view.workers}
    for kind, ids in (("workers", workers), ("servers", servers)):
        if text in ids:
            return kind, text
    names = ", ".join([*sorted(workers), *sorted(servers)])
    there = f"there are: {names}." if names else "none runs."
    id = meant(text, workers | servers, "worker or server", there)
    return ("workers" if id in workers else "servers"), id


# -- what is shown ----------------------------------------------------------------------------------------------------


def requests_table(running: Iterable[RunningRequest]) -> RenderableType:
    """Running requests in their order, readable at 100 columns."""
    rows = list(running)
    if not rows:
        return Text("no request runs", style="dim")
    table = plain_table(
        "requests", "request", "deployment", "worker", "state", "prompt", "tokens", "time", "moves to",
        right=("prompt", "tokens", "time"),
    )  # fmt: skip
    for one in rows:
        table.add_row(
            one.request_id,
            one.deployment,
            one.worker_id,
            one.state,
            str(one.prompt_tokens),
            str(one.completion_tokens),
            f"{one.running_s:.0f} s",
            one.migrating_to or "–",
        )
    return table


def moved_words(ended: MigrationEnded) -> str:
    """What happened, in one line."""
    if ended.outcome is MigrationOutcome.ENDED:
        return f"{ended.request_id} was over before it had moved to {ended.destination_worker_id}"
    rounds = f"{ended.rounds} round" if ended.rounds == 1 else f"{ended.rounds} rounds"
    return (
        f"{ended.request_id} moved from {ended.source_worker_id} to {ended.destination_worker_id}: {rounds}, "
        f"{ended.tokens} tokens ({ended.gap_tokens} of them after the last round), {size(ended.wire_bytes)}; "
        f"frozen for {1000 * ended.frozen_s:.1f} ms of {duration(ended.total_s)}"
    )


def moving_words(moving: Moving) -> str:
    """How far it is: `loading at worker-2`."""
    where = f" at {moving.to_worker_id}" if moving.phase == "loading" else f" to {moving.to_worker_id}"
    return moving.phase + (where if moving.to_worker_id else "")


def left_words(left: DrainingWorker) -> str:
    """`2 requests, 1 replica left`."""
    if not left.phase:
        return "has ended"
    running = left.requests + left.incoming
    requests = f"{running} request" if running == 1 else f"{running} requests"
    replicas = f"{left.replicas} replica" if left.replicas == 1 else f"{left.replicas} replicas"
    return f"{requests}, {replicas} left"


class Lines:
    """What happens, on standard error: for each name a line whenever its words change."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def say(self, name: str, words: str) -> None:
        """This is how it is now."""
        if self._said.get(name) != words:
            self._said[name] = words
            print(f"{name}: {words}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _goes_on(words: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except asyncio.CancelledError:  # Ctrl-C
        print(f"hearth: {words()}", file=sys.stderr, flush=True)
        raise


# -- the verbs --------------------------------------------------------------------------------------------------------


def _print_silent(found: RunningRequests) -> int:
    if not found.silent:
        return 0
    verb = "does" if len(found.silent) == 1 else "do"
    print(f"hearth: {', '.join(found.silent)} {verb} not answer.", file=sys.stderr, flush=True)
    return 1


def requests(options: argparse.Namespace) -> int:
    """Run `hearth requests`: 1 if a worker did not answer, so that something may be missing."""

    async def work() -> int:
        async with Client(options.url) as client:
            found = await client.requests()
        if options.json:
            print(msgspec.json.encode(found).decode())
        else:
            # Piped, rich would fold everything to 80 columns.
            console = Console()
            (console if console.is_terminal else Console(width=160)).print(requests_table(found.data))
        return _print_silent(found)

    return run(work())


def migrate(options: argparse.Namespace) -> int:
    """Run `hearth migrate`: 1 if a request that was meant did not move."""

    async def work() -> int:
        lines = Lines()
        failed = False
        async with Client(options.url) as client:
            request_ids = requests_meant(options.request, [one.request_id for one in (await client.requests()).data])
            to = options.to
            if to is not None:
                workers = [record.worker_id for record in (await client.cluster()).workers]
                to = meant(to, workers, "worker", f"there are: {', '.join(sorted(workers))}.")

            async def move(request_id: str) -> None:
                nonlocal failed
                try:
                    ended = await _moved(client, request_id, to, lines)
                    print(msgspec.json.encode(ended).decode() if options.json else moved_words(ended), flush=True)
                except ClientError as error:
                    failed = True
                    whose = "" if len(request_ids) == 1 or request_id in str(error) else f"{request_id}: "
                    print(f"hearth: {whose}{error}", file=sys.stderr, flush=True)

            go = "goes" if len(request_ids) == 1 else "go"
            still = f"{', '.join(request_ids)} {go} on moving; hearth requests shows what runs where."
            with _goes_on(lambda: still):
                async with asyncio.TaskGroup() as tasks:
                    for request_id in request_ids:
                        tasks.create_task(move(request_id))
        return int(failed)

    return run(work())


async def _moved(client: Client, request_id: str, to: str | None, lines: Lines) -> MigrationEnded:
    """Move one request, saying how far it is; how it ended. Raises `ClientError`."""
    async for step in client.migrate(request_id, to):
        if not isinstance(step, Moving):
            return step
        lines.say(request_id, moving_words(step))
    raise ClientError("The gateway ended its answer before the request had moved.")


def drain(options: argparse.Namespace) -> int:
    """Run `hearth drain`: 0 when nothing is left (or it was not to wait), 1 when that took too long."""

    async def work() -> int:
        async with Client(options.url) as client:
            kind, id = drain_meant(options.target, await client.cluster())
            lines = Lines()
            left: list[DrainingWorker] = []
            undo = f"hearth drain {id} --undo takes that back"
            with _goes_on(lambda: f"{id} goes on draining; {undo}."):
                async for step in client.drain(kind, id, on=not options.undo, wait_s=options.timeout):
                    if isinstance(step, dict):
                        words = f"{id} takes work again" if options.undo else f"{id} is drained: nothing runs there"
                        _say(options.json, step, words)
                        return 0
                    left = step
                    for one in left:
                        lines.say(one.worker_id, left_words(one))
        if options.timeout or not left:
            raise ClientError(f"The gateway ended its answer before {id} was drained.")
        _say(options.json, {"draining": msgspec.to_builtins(left)}, f"{id} is draining; {undo}")
        return 0

    return run(work())


def _say(as_json: bool, answer: dict[str, Any], words: str) -> None:
    print(json.dumps(answer) if as_json else words, flush=True)
