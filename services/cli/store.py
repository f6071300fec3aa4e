"""The actions of `hearth store`: what is done with the checkpoints in the tiers of a running cluster's servers."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import runpy
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from services.cli.checkpoints import EVERYWHERE, ID_CHARS, Meant, checkpoint_meant, held_table, servers_meant
from services.cli.client import Client, ClientError, run
from services.cli.deploy import described_checkpoint, source_url
from services.cli.progress import Bars
from shared.contracts.records import ClusterView
from shared.contracts.residency import Checkpoint, HeldCheckpoint, Progress, Source
from shared.sizes import duration

Work = Callable[[Client, ClusterView], Awaitable[int]]


def _run(options: argparse.Namespace, work: Work) -> int:
    async def whole() -> int:
        async with Client(options.url) as client:
            return await work(client, await client.cluster())

    return run(whole())


def _say(options: argparse.Namespace, server_id: str, answer: dict[str, Any], words: str) -> None:
    print(json.dumps({"server_id": server_id, **answer}) if options.json else words, flush=True)


# -- import --------------------------------------------------------------------------------------------------------


def bring_in(options: argparse.Namespace) -> int:
    """Run `hearth store import`."""
    url = source_url(options.source, Path.cwd())
    source = Source(url=url, revision=options.revision, dtype=options.dtype)

    async def work(client: Client, view: ClusterView) -> int:
        names = [record.server_id for record in servers_meant(options.server, view, everywhere=True)]
        code = 0

        async def one(server_id: str, bars: Bars) -> None:
            nonlocal code
            began_s = time.monotonic()
            try:
                answer = await _last(client.bring_in(server_id, source), bars, server_id)
                found = msgspec.convert(answer["checkpoint"], Checkpoint)
            except (ClientError, KeyError, msgspec.ValidationError) as error:
                bars.end(server_id)
                print(f"hearth: {server_id}: {error}", file=sys.stderr, flush=True)
                code = 1
                return
            bars.end(server_id)
            words = f"{server_id}: {found.checkpoint_id[:ID_CHARS]} is in the SSD tier: {described_checkpoint(found)}"
            _say(options, server_id, answer, f"{words} ({duration(time.monotonic() - began_s)})")

        with Bars(*names) as bars, _work_goes_on(names):
            async with asyncio.TaskGroup() as tasks:
                for name in names:
                    tasks.create_task(one(name, bars))
        return code

    return _run(options, work)


# -- one checkpoint on one server ----------------------------------------------------------------------------------


def _on_one(
    options: argparse.Namespace, act: Callable[[Client, str, Meant], Coroutine[Any, Any, tuple[dict[str, Any], str]]]
) -> int:
    async def work(client: Client, view: ClusterView) -> int:
        (server,) = servers_meant(options.server, view, everywhere=False)
        # A prefetch may name what only other servers have.
        among = view.servers if options.action == "prefetch" else (server,)
        meant = checkpoint_meant(options.checkpoint, view, among)
        answer, words = await act(client, server.server_id, meant)
        _say(options, server.server_id, answer, words)
        return 0

    return _run(options, work)


async def _follow(client: Client, server_id: str, meant: Meant, verb: str, body: dict[str, Any]) -> dict[str, Any]:
    with Bars(meant.words) as bars, _work_goes_on([server_id]):
        return await _last(client.work(server_id, meant.checkpoint_id, verb, body), bars, meant.words)


async def _last(steps: AsyncIterator[Progress | dict[str, Any]], bars: Bars, name: str) -> dict[str, Any]:
    async for step in steps:
        if isinstance(step, Progress):
            bars.show(name, step)
        else:
            return step
    raise ClientError("The gateway ended its answer before the work was done.")


@contextlib.contextmanager
def _work_goes_on(server_ids: list[str]) -> Iterator[None]:
    try:
        yield
    except asyncio.CancelledError:  # Ctrl-C
        where = ", ".join(server_ids)
        print(f"hearth: {where} goes on with it; the same command shows how far it is.", file=sys.stderr, flush=True)
        raise


def verify(options: argparse.Namespace) -> int:
    """Run `hearth store verify`."""

    async def act(client: Client, server_id: str, meant: Meant) -> tuple[dict[str, Any], str]:
        answer = await _follow(client, server_id, meant, "verify", {})
        chunks, repaired = (int(answer["verified"].get(name, 0)) for name in ("chunks", "repaired_chunks"))
        count = f"{chunks} chunk" if chunks == 1 else f"{chunks} chunks"
        words = f"{repaired} of its {count} had to be repaired" if repaired else count
        return answer, f"{server_id}: {meant.words} is sound ({words})"

    return _on_one(options, act)


def prefetch(options: argparse.Namespace) -> int:
    """Run `hearth store prefetch`."""

    async def act(client: Client, server_id: str, meant: Meant) -> tuple[dict[str, Any], str]:
        body: dict[str, Any] = {"tier": options.tier}
        if meant.source is not None:
            body["source"] = meant.source
        answer = await _follow(client, server_id, meant, "prefetch", body)
        return answer, f"{server_id}: {meant.words} is in {_tier(options.tier)}"

    return _on_one(options, act)


def export(options: argparse.Namespace) -> int:
    """Run `hearth store export`."""
    url = source_url(options.to, Path.cwd())

    async def act(client: Client, server_id: str, meant: Meant) -> tuple[dict[str, Any], str]:
        answer = await _follow(client, server_id, meant, "export", {"url": url})
        return answer, f"{server_id}: {meant.words} is copied to {url}"

    return _on_one(options, act)


def pin(options: argparse.Namespace) -> int:
    """Run `hearth store pin`."""

    async def act(client: Client, server_id: str, meant: Meant) -> tuple[dict[str, Any], str]:
        answer = await client.pin(server_id, meant.checkpoint_id, options.tier)
        return answer, f"{server_id}: {meant.words} is pinned in {_tier(options.tier)}"

    return _on_one(options, act)


def unpin(options: argparse.Namespace) -> int:
    """Run `hearth store unpin`."""

    async def act(client: Client, server_id: str, meant: Meant) -> tuple[dict[str, Any], str]:
        answer = await client.pin(server_id, meant.checkpoint_id, "")
        return answer, f"{server_id}: {meant.words} may be evicted again"

    return _on_one(options, act)


def evict(options: argparse.Namespace) -> int:
    """Run `hearth store evict`."""

    async def act(client: Client, server_id: str, meant: Meant) -> tuple[dict[str, Any], str]:
        answer = await client.evict(server_id, meant.checkpoint_id, options.tier)
        return answer, f"{server_id}: {meant.words} is not in {_tier(options.tier)} any more"

    return _on_one(options, act)


def _tier(tier: str) -> str:
    return {"dram": "DRAM", "ssd": "the SSD tier"}[tier]


# -- ls, bench -----------------------------------------------------------------------------------------------------


def ls(options: argparse.Namespace) -> int:
    """Run `hearth store ls`."""

    async def work(client: Client, view: ClusterView) -> int:
        asked = options.server or EVERYWHERE
        found: list[tuple[Any, list[HeldCheckpoint]]] = []
        code = 0
        for record in servers_meant(asked, view, everywhere=True):
            try:
                found.append((record, await client.checkpoints(record.server_id)))
            except ClientError as error:
                print(f"hearth: {error}", file=sys.stderr, flush=True)
                code = 1
        if options.json:
            servers = [{"server_id": record.server_id, "checkpoints": held} for record, held in found]
            print(msgspec.json.encode({"servers": servers}).decode())
            return code
        console = Console()
        # Piped, rich would fold everything to 80 columns.
        console = console if console.is_terminal else Console(width=160)
        for record, held in found:
            console.print(held_table(record, held, view.deployments, console.width))
        return code

    return _run(options, work)


def bench_words(rest: list[str], environment: Mapping[str, str]) -> list[str]:
    """The arguments of `services.store.bench`: without a directory, that of the first store of `hearth up`, if any."""
    if environment.get("HEARTH_STORE_DIR") or any(word.split("=")[0] in ("--dir", "-h", "--help") for word in rest):
        return rest
    stores = sorted(Path(environment.get("HEARTH_DATA_DIR") or ".hearth").glob("servers/*/store"))
    return ["--dir", str(stores[0]), *rest] if stores else rest


def bench(options: argparse.Namespace) -> int:
    """Run `hearth store bench`: the store's own measurement of this machine's disk, without a cluster."""
    sys.argv = ["hearth store bench", *bench_words(options.rest, os.environ)]
    runpy.run_module("services.store.bench", run_name="__main__")
    return 0
