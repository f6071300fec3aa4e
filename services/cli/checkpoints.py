"""Which server and which checkpoint somebody means, and how what a store holds is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from services.cli.client import ClientError
from services.cli.progress import percent
from shared.contracts.records import ClusterView, DeploymentRecord, ServerRecord
from shared.contracts.residency import HeldCheckpoint, Source
from shared.sizes import duration, size

ID_CHARS: Final = 12
SOURCE_CHARS: Final = 44
EVERYWHERE: Final = "all"
COLUMNS: Final = ("id", "model", "size", "dram", "ssd", "leases", "uses/h", "idle", "back in")
SPARED: Final = ("uses/h", "leases", "idle")  # left out, in this order, where there is no room for all
LEFT: Final = 2  # so many columns are aligned at the left
GAP: Final = "  "


@dataclass(frozen=True)
class Meant:
    """A checkpoint, what to call it, and where it comes from if a deployment says so."""

    checkpoint_id: str
    words: str
    source: Source | None = None


def servers_meant(asked: str | None, view: ClusterView, *, everywhere: bool) -> list[ServerRecord]:
    """The servers that `--server` names: the only one if it was left out. Raises `ClientError` listing them.

    `everywhere` says whether "all" may be asked for.
    """
    records = sorted(view.servers, key=lambda record: record.server_id)
    names = ", ".join(record.server_id for record in records)
    if not records:
        raise ClientError("No store runs.")
    if asked == EVERYWHERE and everywhere:
        return records
    if asked is None and len(records) == 1:
        return records
    if asked is None:
        also = " (or --server all)" if everywhere else ""
        raise ClientError(f"Which server? Name one of {names} with --server{also}.")
    found = [record for record in records if record.server_id == asked]
    if not found:
        raise ClientError(f"No server is called {asked!r}; there are: {names}.")
    return found


def known_ids(servers: Iterable[ServerRecord]) -> list[str]:
    """Every checkpoint that these servers have something of, in order."""
    found: set[str] = set()
    for record in servers:
        found.update(record.dram, record.ssd, record.dram_arriving, record.ssd_arriving)
        found.update(record.pinned, record.quarantined)
    return sorted(found)


def checkpoint_meant(text: str, view: ClusterView, servers: Sequence[ServerRecord]) -> Meant:
    """The checkpoint that `text` names: a deployment, an id, or a unique beginning of one. Raises `ClientError`.

    Ids are looked for among those of `servers` and of the deployments.
    """
    for record in view.deployments:
        if record.spec.name == text:
            if record.checkpoint is None:
                raise ClientError(
                    f"{text} has not been imported yet; hearth store import {record.spec.source.url} does that."
                )
            return Meant(record.checkpoint.checkpoint_id, text, record.spec.source)
    imported = {record.checkpoint.checkpoint_id: record for record in view.deployments if record.checkpoint}
    ids = sorted({*known_ids(servers), *imported})
    found = [id for id in ids if id == text] or [id for id in ids if text and id.startswith(text)]
    if not found:
        where = servers[0].server_id if len(servers) == 1 else "any server"
        raise ClientError(
            f"No deployment is called {text!r}, and no checkpoint of {where} has an id that begins so; "
            "hearth store ls lists them."
        )
    if len(found) > 1:
        shown = ", ".join(id[: max(ID_CHARS, len(text) + 4)] for id in found[:5])
        raise ClientError(f"{text!r} could be {len(found)} checkpoints: {shown}{' …' if len(found) > 5 else ''}.")
    owner = imported.get(found[0])
    return Meant(found[0], found[0][:ID_CHARS], owner.spec.source if owner else None)


def model(held: HeldCheckpoint) -> str:
    """`Llama bfloat16`."""
    return f"{held.checkpoint.architecture.removesuffix('ForCausalLM')} {held.checkpoint.dtype}".strip()


def shortened(url: str, most: int = SOURCE_CHARS) -> str:
    """A source whose end says most: `…/models/llama`."""
    return url if len(url) <= most else "…" + url[-(most - 1) :]


def arrived(done_bytes: int, image_bytes: int) -> str:
    """The part of an image in a tier; a dash for none of it."""
    return percent(done_bytes, image_bytes) if done_bytes else "–"


def held_table(
    record: ServerRecord, held: Sequence[HeldCheckpoint], deployments: Sequence[DeploymentRecord], width: int
) -> Group:
    """What a server holds, for a terminal of so many columns (80 do): a row of facts, below it where it comes from and
    who uses it."""
    title = Text.assemble(
        (record.server_id, "bold"),
        f": {_count(len(held))} · DRAM {_used(record.dram_used_bytes, record.dram_capacity_bytes)}"
        f" · SSD {_used(record.ssd_used_bytes, record.ssd_capacity_bytes)}",
    )
    if not held:
        hint = Text("nothing yet (hearth store import DIR|hf:ORG/NAME|URL)\n", style="dim")
        return Group(title, hint)
    columns = list(zip(COLUMNS, *(_facts(one) for one in held), strict=True))
    for name in SPARED:
        if sum(max(map(len, column)) + len(GAP) for column in columns) - len(GAP) > width:
            columns = [column for column in columns if column[0] != name]
    widths = [max(map(len, column)) for column in columns]
    head, *rows = zip(*columns, strict=True)
    lines: list[RenderableType] = [title, Text(_aligned(head, widths), style="dim")]
    for one, row in zip(held, rows, strict=True):
        names = [
            deployment.spec.name
            for deployment in deployments
            if deployment.checkpoint and deployment.checkpoint.checkpoint_id == one.checkpoint.checkpoint_id
        ]
        lines.append(Text(_aligned(row, widths)))
        if below := _below(one, names):
            lines.append(Text.assemble(" " * (widths[0] + len(GAP)), below))
        if one.quarantined:
            lines.append(Text.assemble(" " * (widths[0] + len(GAP)), (f"quarantined: {one.quarantined}", "red")))
    return Group(*lines, "")


def _facts(one: HeldCheckpoint) -> tuple[str, ...]:
    return (
        one.checkpoint.checkpoint_id[:ID_CHARS],
        model(one),
        size(one.image_bytes or one.checkpoint.weight_bytes),
        arrived(one.dram_bytes, one.image_bytes),
        arrived(one.ssd_bytes, one.image_bytes),
        str(one.leases),
        f"{one.uses_per_hour:.3g}",
        "–" if one.idle_s is None else duration(one.idle_s),
        "–" if one.bring_back_s is None else duration(one.bring_back_s),
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(width) if column < LEFT else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return GAP.join(cells).rstrip()


def _below(one: HeldCheckpoint, names: list[str]) -> Text:
    parts = []
    if one.source:
        parts.append(Text(shortened(one.source.url), style="dim"))
    if names:
        parts.append(Text(", ".join(names), style="dim"))
    if one.pinned:
        parts.append(Text(f"pinned in {one.pinned.upper()}", style="cyan"))
    return Text(" · ", style="dim").join(parts)


def _count(number: int) -> str:
    return f"{number} checkpoint" if number == 1 else f"{number} checkpoints"


def _used(used_bytes: int, capacity_bytes: int) -> str:
    return f"{size(used_bytes)} of {size(capacity_bytes)}"
