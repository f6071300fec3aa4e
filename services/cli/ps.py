"""`hearth ps`: servers, workers, replicas, deployments, and what is resident where."""

from __future__ import annotations

import argparse
import asyncio
from typing import Final

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.cli.checkpoints import ID_CHARS
from services.cli.client import Client, run
from services.cli.deploy import parameters
from services.cli.progress import amount, percent
from shared.contracts.records import (
    ClusterView,
    DeploymentRecord,
    DeploymentSpec,
    Phase,
    ReplicaState,
    ServerRecord,
)
from shared.labels import labels_text
from shared.sizes import duration, rate, size

REFRESH_S: Final = 1.0
# So many pins or quarantined checkpoints of a server are named.
NOTED: Final = 8
DEVICE_CHARS: Final = 24


def tables(view: ClusterView) -> RenderableType:
    """The whole view, readable at 100 columns."""
    parts: list[RenderableType] = [_deployments(view), _replicas(view), _workers(view)]
    if any(record.migrations for record in view.workers):
        parts.append(_migrations(view))
    return Group(*parts, _servers(view), _schedulers(view))


def plain_table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines; columns of `right` are aligned there."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), expand=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", header_style="dim", overflow="fold")
    return table


def residency(view: ClusterView, deployment: DeploymentRecord) -> str:
    """Where a deployment's checkpoint is, fastest tier first: `DRAM server-1 · SSD server-1, server-2 43 %`."""
    if deployment.checkpoint is None:
        return "nowhere yet"
    checkpoint_id = deployment.checkpoint.checkpoint_id
    found = []
    for tier in ("dram", "ssd"):
        places = []
        for server in _servers_of(view):
            held: dict[str, int] = getattr(server, tier)
            arriving: dict[str, int] = getattr(server, f"{tier}_arriving")
            if checkpoint_id in arriving:
                part = percent(arriving[checkpoint_id], deployment.checkpoint.weight_bytes)
                places.append(f"{server.server_id} {part}".rstrip())
            elif checkpoint_id in held:
                places.append(server.server_id)
        if places:
            found.append(f"{tier.upper()} {', '.join(places)}")
    return " · ".join(found) or "nowhere"


def _servers_of(view: ClusterView) -> list[ServerRecord]:
    return sorted(view.servers, key=lambda record: record.server_id)


def _deployments(view: ClusterView) -> RenderableType:
    if not view.deployments:
        return Text("no deployments (hearth deploy NAME --source DIR|hf:ORG/NAME|URL)\n", style="dim")
    table = plain_table("deployments", "name", "state", "model", "replicas", "queue", "resident", right=("queue",))
    for record in sorted(view.deployments, key=lambda record: record.spec.name):
        found = record.checkpoint
        model = f"{parameters(found.parameters)} {found.dtype}, {size(found.weight_bytes)}" if found else "not imported"
        ready = sum(
            1
            for replica in view.replicas
            if replica.deployment == record.spec.name and replica.state is ReplicaState.READY
        )
        depth = view.queue_depths.get(record.spec.name, 0)
        table.add_row(
            record.spec.name,
            record.state.value if record.failure is None else "failing",
            model,
            f"{ready} of {record.spec.min_replicas}–{record.spec.max_replicas}",
            str(depth),
            residency(view, record),
        )
    failing = [record for record in view.deployments if record.failure is not None]
    reasons = [
        Text(f"{record.spec.name}: {record.failure.message}", style="red") for record in failing if record.failure
    ]
    return Group(table, *_wishes(view), *reasons, "")


def wishes(spec: DeploymentSpec) -> str:
    """What a deployment asks for beyond the usual: `priority 5 · only gpu=a40 · 2 devices each`; "" for nothing."""
    parts = (
        (spec.priority, f"priority {spec.priority}"),
        (spec.labels, f"only {labels_text(spec.labels)}"),
        (spec.devices != 1, f"{spec.devices} devices each"),
        (spec.adaptive_keep_alive, f"adaptive keep-alive up to {duration(spec.keep_alive_s)}"),
    )
    return " · ".join(words for said, words in parts if said)


def _wishes(view: ClusterView) -> list[Text]:
    said = [(one.spec.name, wishes(one.spec)) for one in sorted(view.deployments, key=lambda one: one.spec.name)]
    return [Text.assemble((f"{name}: ", "dim"), words) for name, words in said if words]


def _replicas(view: ClusterView) -> RenderableType:
    if not view.replicas:
        return Text("no replicas: nothing is loaded\n", style="dim")
    table = plain_table(
        "replicas", "replica", "deployment", "worker", "state", "running", "idle", "requests", "tokens",
        right=("running", "idle", "requests", "tokens"),
    )  # fmt: skip
    for record in sorted(view.replicas, key=lambda record: (record.deployment, record.replica_id)):
        state = record.state.value
        if record.state is ReplicaState.LOADING and record.load is not None:
            state = f"{record.load.phase} {amount(record.load)}".rstrip()
        table.add_row(
            record.replica_id,
            record.deployment,
            record.worker_id,
            state,
            f"{record.running}/{record.slots}",
            f"{record.idle_s:.0f} s" if record.idle_s else "–",
            str(record.finished_requests),
            str(record.generated_tokens),
        )
    return Group(table, "")


def _workers(view: ClusterView) -> RenderableType:
    if not view.workers:
        return Text("no workers\n", style="dim")
    table = plain_table(
        "workers", "worker", "server", "phase", "pid", "device", "memory", "replicas",
        right=("pid", "memory", "replicas"),
    )  # fmt: skip
    for record in sorted(view.workers, key=lambda record: record.worker_id):
        count = sum(1 for replica in view.replicas if replica.worker_id == record.worker_id)
        name = f"{record.device} ({record.device_name})" if record.device_name else record.device
        table.add_row(
            record.worker_id,
            record.server_id,
            Text(record.phase.value, style="" if record.phase is Phase.READY else "yellow"),
            str(record.pid),
            name if len(name) <= DEVICE_CHARS else name[: DEVICE_CHARS - 1] + "…",
            f"{size(record.memory_used_bytes)}/{size(record.memory_total_bytes)}",
            f"{count}/{record.max_replicas}",
        )
    notes = [
        Text.assemble((f"{record.worker_id}: ", "dim"), " · ".join(parts))
        for record in sorted(view.workers, key=lambda record: record.worker_id)
        if (parts := [labels_text(record.labels)] * bool(record.labels) + ["shares replicas"] * record.gangs)
    ]
    return Group(table, *notes, "")


def _schedulers(view: ClusterView) -> RenderableType:
    """Who leads, since which term, and who would follow."""
    table = plain_table("\nschedulers", "scheduler", "phase", "pid", "role", "term", right=("pid", "term"))
    for record in sorted(view.schedulers, key=lambda record: (-record.term, record.scheduler_id)):
        table.add_row(
            record.scheduler_id,
            Text(record.phase.value, style="" if record.phase is Phase.READY else "yellow"),
            str(record.pid),
            "leads" if record.term else "stands by",
            str(record.term) if record.term else "–",
        )
    if any(record.term for record in view.schedulers):
        return table
    nobody = Text("no scheduler leads: what is ready answers, nothing is loaded or moved", style="red")
    return Group(table, nobody) if view.schedulers else Group("", nobody)


def _migrations(view: ClusterView) -> RenderableType:
    table = plain_table(
        "migrations", "request", "from → to", "reason", "state", "rounds", "tokens", "gap", "time",
        right=("rounds", "tokens", "gap", "time"),
    )  # fmt: skip
    for record in sorted(view.workers, key=lambda record: record.worker_id):
        for one in record.migrations:
            table.add_row(
                one.request_id,
                f"{record.worker_id} → {one.destination_worker_id}",
                one.reason.value,
                one.state,
                str(one.rounds),
                str(one.tokens),
                str(one.gap_tokens),
                duration(one.running_s),
            )
    return Group(table, "")


def _servers(view: ClusterView) -> RenderableType:
    if not view.servers:
        return Text("no servers", style="dim")
    table = plain_table(
        "servers", "server", "phase", "DRAM", "leased", "SSD", "from SSD", "peers", "remote",
        right=("DRAM", "leased", "SSD", "from SSD", "peers", "remote"),
    )  # fmt: skip
    notes: list[Text] = []
    for record in _servers_of(view):
        table.add_row(
            record.server_id,
            record.phase.value,
            f"{size(record.dram_used_bytes)}/{size(record.dram_capacity_bytes)}",
            size(record.leased_bytes),
            f"{size(record.ssd_used_bytes)}/{size(record.ssd_capacity_bytes)}",
            *(
                rate(measured) if measured else "–"
                for measured in (record.ssd_bytes_per_s, record.peer_bytes_per_s, record.remote_bytes_per_s)
            ),
        )
        notes += server_notes(record, view)
    return Group(table, *notes)


def server_notes(record: ServerRecord, view: ClusterView) -> list[Text]:
    """What is worth a line of its own about a server: loads, what arrives, what is pinned, what is quarantined."""
    checkpoints = {one.checkpoint.checkpoint_id: one.checkpoint for one in view.deployments if one.checkpoint}
    names: dict[str, str] = {}
    for one in sorted(view.deployments, key=lambda deployment: deployment.spec.name):
        if one.checkpoint:
            names.setdefault(one.checkpoint.checkpoint_id, one.spec.name)

    def called(checkpoint_id: str) -> str:
        short = checkpoint_id[:ID_CHARS]
        return f"{short} ({names[checkpoint_id]})" if checkpoint_id in names else short

    notes: list[Text] = []

    def note(words: str, style: str = "") -> None:
        notes.append(Text.assemble((f"{record.server_id}: ", "dim"), (words, style)))

    if record.labels:
        note(labels_text(record.labels))
    if record.loads or record.load_queue_bytes:
        words = f"{record.loads} load" if record.loads == 1 else f"{record.loads} loads"
        if record.load_queue_bytes:  # what is being planned or converted has no known length
            words += f", {size(record.load_queue_bytes)} left to move"
            words += "" if record.load_drain_s is None else f", done in {duration(record.load_drain_s)}"
        note(words)
    for tier, arriving in (("DRAM", record.dram_arriving), ("SSD", record.ssd_arriving)):
        for checkpoint_id, done_bytes in sorted(arriving.items()):
            found = checkpoints.get(checkpoint_id)
            part = (
                f"{size(done_bytes)} of {size(found.weight_bytes)} ({percent(done_bytes, found.weight_bytes)})"
                if (found)
                else size(done_bytes)
            )
            note(f"{called(checkpoint_id)} is arriving in {tier}: {part}")
    if record.pinned:
        pins = [f"{called(checkpoint_id)} in {tier.upper()}" for checkpoint_id, tier in sorted(record.pinned.items())]
        note(f"pinned: {', '.join(pins[:NOTED])}{_more(len(pins) - NOTED)}", "cyan")
    for checkpoint_id, reason in sorted(record.quarantined.items())[:NOTED]:
        note(f"{called(checkpoint_id)} is quarantined: {reason}", "red")
    if len(record.quarantined) > NOTED:
        note(f"{len(record.quarantined) - NOTED} more are quarantined", "red")
    return notes


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def ps(options: argparse.Namespace) -> int:
    """Run `hearth ps`."""

    async def work() -> int:
        async with Client(options.url) as client:
            if options.watch and not options.json:
                with Live(tables(await client.cluster()), auto_refresh=False, screen=True) as live:
                    while True:
                        await asyncio.sleep(REFRESH_S)
                        live.update(tables(await client.cluster()), refresh=True)
            while True:
                view = await client.cluster()
                if options.json:
                    print(msgspec.json.encode(view).decode(), flush=True)
                else:
                    # Piped, rich would fold everything to 80 columns.
                    console = Console()
                    (console if console.is_terminal else Console(width=160)).print(tables(view))
                if not options.watch:
                    return 0
                await asyncio.sleep(REFRESH_S)

    return run(work())
