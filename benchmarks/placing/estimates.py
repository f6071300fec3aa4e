"""Loads from every tier in random order, alone and against others: what was estimated and what it took."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.migrating.streams import Stream, prompt
from benchmarks.models import SHAPES
from benchmarks.placing.stage import NOWHERE, SERVERS, SIDES, Stage, drop_cached

PARTS: Final = ("wait_s", "move_s", "attach_s", "room_s")
ALONE, QUEUED, BUSY = "alone", "several at once on a server", "beside running streams"
BUSY_SHAPE: Final = "llama-30m-narrow"
BUSY_STREAMS: Final = 2
AT_ONCE: Final = 3
SPREAD_S: Final = 0.2  # loads at once are asked for within it
EXPLAIN_S: Final = 5.0
LIKES: Final = 4


@dataclass(frozen=True, slots=True)
class Load:
    """One load. `estimate` and `actual` are seconds by part, `request_s` is what its first request took in all.

    `first`: of those at once it was decided before all others, which it could not foresee.
    """

    number: int
    kind: str
    shape: str
    weight_bytes: int
    wanted_tier: str
    tier: str
    server_id: str
    estimate: dict[str, float]
    actual: dict[str, float]
    estimate_s: float
    actual_s: float
    request_s: float
    first: bool = True

    @property
    def error(self) -> float:
        """|estimate − actual| / actual."""
        return abs(self.estimate_s - self.actual_s) / self.actual_s


@dataclass(frozen=True, slots=True)
class Order:
    """A load to come: a model, a server, and the tier that it shall come from."""

    shape: str
    server_id: str
    tier: str

    @property
    def deployment(self) -> str:
        """Which deployment is asked."""
        return f"{self.shape}-{SIDES[self.server_id]}"


def orders(shapes: Sequence[str], rounds: int, seed: int) -> list[tuple[str, list[Order]]]:
    """What is loaded in every round, in random order: (kind, loads). The first rounds are not easier than others."""
    dice = random.Random(seed)
    tiers = ("dram", "ssd", "peer", "remote")
    plan = []
    for number in range(rounds):
        kind = (ALONE, QUEUED, ALONE, BUSY)[number % 4]
        server_id = dice.choice(SERVERS)
        count = min(len(shapes), AT_ONCE) if kind == QUEUED else 1
        weights = (2, 4, 1, 1) if kind == QUEUED else (2, 2, 1, 1)
        chosen = dice.sample(list(shapes), count)
        plan.append((kind, [Order(shape, server_id, dice.choices(tiers, weights)[0]) for shape in chosen]))
    dice.shuffle(plan)
    return plan


async def prepare(stage: Stage, shapes: Sequence[str], models: Path) -> None:
    """Deploy every model on either side, and one whose streams keep a server busy."""
    for server_id, side in SIDES.items():
        labels = {"side": side}
        for shape in shapes:
            name = Order(shape, server_id, "").deployment
            await stage.deploy(
                name, models / shape, labels=labels, keep_alive_s=0.3, target_concurrency=1, max_context_tokens=256
            )
        await stage.deploy(
            f"busy-{side}", models / BUSY_SHAPE, labels=labels, keep_alive_s=0.3, target_concurrency=BUSY_STREAMS
        )


async def lay_out(stage: Stage, order: Order) -> None:
    """Have the model where it shall come from."""
    key = stage.keys[order.deployment]
    other = next(id for id in SERVERS if id != order.server_id)
    if order.tier == "peer":
        await stage.lay(key, {other: "ssd"})
        await stage.lay(key, {order.server_id: NOWHERE})
    elif order.tier == "remote":
        await stage.lay(key, {other: NOWHERE, order.server_id: NOWHERE})
        drop_cached(stage.sources[key])
    else:
        await stage.lay(key, {order.server_id: order.tier})


async def first_request(stage: Stage, order: Order, after_s: float) -> float:
    """Ask for one token; seconds until it was there. Raises RuntimeError when it is refused."""
    await asyncio.sleep(after_s)
    began = time.perf_counter()
    body = {"model": order.deployment, "prompt": "hearth", "max_tokens": 1, "temperature": 0}
    async with stage.session.post(stage.cluster.url + "/v1/completions", json=body) as answer:
        text = await answer.text()
    if answer.status != 200:
        raise RuntimeError(f"{order}: {answer.status} {text[:300]}")
    return time.perf_counter() - began


async def explained(stage: Stage, order: Order, before: str) -> dict[str, Any]:
    """The decision behind a load that has just ended, as soon as it is known what it took. {}: it is not known."""
    until = time.monotonic() + EXPLAIN_S
    while time.monotonic() < until:
        found = await stage.explain(order.deployment)
        if found and found["decision_id"] != before:
            return found | {"at": time.monotonic() - found["ago_s"]}
        await asyncio.sleep(0.05)
    return {}


async def play(stage: Stage, number: int, kind: str, loads: Sequence[Order], dice: random.Random) -> list[Load]:
    """One round."""
    await stage.empty()
    for order in loads:
        await lay_out(stage, order)
    running: list[Stream] = []
    if kind == BUSY:
        name = f"busy-{SIDES[loads[0].server_id]}"
        vocab = SHAPES[BUSY_SHAPE]["vocab_size"]
        for one in range(BUSY_STREAMS):
            ids = prompt(64, vocab, f"{number} {one}")
            running.append(Stream(stage.cluster.url, name, ids, 5000).begin(stage.session, stage.tasks))
        for stream in running:
            await stream.until(8)
    before = [(await stage.explain(order.deployment)).get("decision_id", "") for order in loads]
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(first_request(stage, one, dice.random() * SPREAD_S)) for one in loads]
    found = [await explained(stage, order, id) for order, id in zip(loads, before, strict=True)]
    for stream in running:
        await stream.close()
    first_at = min((decision["at"] for decision in found if decision), default=0.0)
    return [
        _load(number, kind, order, decision, task.result(), first=decision["at"] == first_at)
        for order, decision, task in zip(loads, found, asked, strict=True)
        if decision
    ]


def _load(number: int, kind: str, order: Order, decision: dict[str, Any], request_s: float, *, first: bool) -> Load:
    chosen = decision["candidates"][0]
    estimate = {part: float(chosen["estimate"].get(part, 0.0)) for part in PARTS}
    actual = {part: float(decision["actual"].get(part, 0.0)) for part in PARTS}
    return Load(
        number=number,
        kind=kind,
        shape=order.shape,
        weight_bytes=_bytes_of(order.shape),
        wanted_tier=order.tier,
        tier=chosen.get("tier", ""),
        server_id=chosen["server_id"],
        estimate=estimate,
        actual=actual,
        estimate_s=sum(estimate.values()),
        actual_s=float(decision["actual_s"]),
        request_s=request_s,
        first=first,
    )


def _bytes_of(shape: str) -> int:
    """Of the weights in bfloat16, embedding and head counted apart."""
    facts = SHAPES[shape]
    hidden, layers = facts["hidden_size"], facts["num_hidden_layers"]
    head = hidden // facts["num_attention_heads"]
    keys = 2 * hidden * head * facts["num_key_value_heads"]
    layer = 2 * hidden * hidden + keys + 3 * hidden * facts["intermediate_size"] + 2 * hidden
    return int(2 * (2 * facts["vocab_size"] * hidden + layers * layer + hidden))


async def measure(
    stage: Stage, shapes: Sequence[str], models: Path, rounds: int, seed: int, limit_s: float
) -> dict[str, Any]:
    """`rounds` rounds, as long as `limit_s` have not passed."""
    await prepare(stage, shapes, models)
    dice, loads, missing = random.Random(seed), list[Load](), 0
    until = time.monotonic() + limit_s
    for number, (kind, chosen) in enumerate(orders(shapes, rounds, seed)):
        if time.monotonic() > until:
            break
        found = await play(stage, number, kind, chosen, dice)
        missing += len(chosen) - len(found)
        loads += found
        for one in found:
            print(
                f"{number:3} {one.kind:28} {one.shape:11} {one.tier:6} "
                f"{_parts(one.estimate)} = {one.estimate_s:6.3f} took {_parts(one.actual)} = {one.actual_s:6.3f} "
                f"({100 * one.error:3.0f} %)",
                flush=True,
            )
    return {"loads": [asdict(one) | {"error": one.error} for one in loads], "unknown": missing}


def _parts(parts: dict[str, float]) -> str:
    return " + ".join(f"{parts[part]:.3f}" for part in PARTS)


# -- tables ------------------------------------------------------------------------------------------------------------

COLUMNS: Final = (
    "loads", "count", "startup, median s", "least–most s", "median error %", "P95 error %", "of its likes, median %",
    "P95 %",
)  # fmt: skip
PART_COLUMNS: Final = (
    "estimate − actual, median %", "waiting", "bytes", "attaching", "all", "P95 of the error",
)  # fmt: skip


def quantile(values: Iterable[float], part: float) -> float:
    """With linear interpolation."""
    ordered = sorted(values)
    at = part * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def unlike(loads: Sequence[dict[str, Any]]) -> list[float]:
    """How far loads that did not wait are from the median of all others of the same model from the same tier, relative
    to what they took: what is left if everything is known but what else the machine does. Of 4 likes at least."""
    likes: dict[tuple[str, str], list[float]] = {}
    for one in loads:
        if one["actual"]["wait_s"] == 0:
            likes.setdefault((one["shape"], one["tier"]), []).append(one["actual_s"])
    return [
        abs(statistics.median([*took[:at], *took[at + 1 :]]) - took[at]) / took[at]
        for took in likes.values()
        if len(took) >= LIKES
        for at in range(len(took))
    ]


def _row(label: str, loads: Sequence[dict[str, Any]]) -> list[str]:
    spread = unlike(loads)
    took = [one["actual_s"] for one in loads]
    errors = [one["error"] for one in loads]
    return [
        label,
        str(len(loads)),
        f"{statistics.median(took):.2f}",
        f"{min(took):.2f}–{max(took):.2f}",
        f"{100 * statistics.median(errors):.0f}",
        f"{100 * quantile(errors, 0.95):.0f}",
        f"{100 * statistics.median(spread):.0f}" if spread else "–",
        f"{100 * quantile(spread, 0.95):.0f}" if spread else "–",
    ]


def groups(loads: Sequence[dict[str, Any]], learning: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """The first `learning` loads, and those after them: all, by tier, by what else went on."""
    later = list(loads[learning:])
    found = [(f"the first {learning}", list(loads[:learning])), ("**all after them**", later)]
    found += [(f"from {tier}", [one for one in later if one["tier"] == tier]) for tier in TIERS]
    found += [(kind, [one for one in later if one["kind"] == kind]) for kind in (ALONE, QUEUED, BUSY)]
    several = [one for one in later if one["kind"] == QUEUED]
    found += [("– decided first", [one for one in several if one["first"]])]
    found += [("– decided after others", [one for one in several if not one["first"]])]
    return [(label, chosen) for label, chosen in found if chosen]


TIERS: Final = ("dram", "ssd", "peer", "remote")


def rows(loads: Sequence[dict[str, Any]], learning: int) -> list[list[str]]:
    """A row per group."""
    return [_row(label, chosen) for label, chosen in groups(loads, learning)]


def part_rows(loads: Sequence[dict[str, Any]], learning: int) -> list[list[str]]:
    """Which part of an estimate is off: signed medians by tier."""
    table = []
    for label, chosen in groups(loads, learning):
        cells = [label]
        for part in (*PARTS[:3], ""):
            off = [_off(one, part) for one in chosen]
            cells.append(f"{statistics.median(off):+.0f}")
        cells.append(f"{quantile([abs(_off(one, '')) for one in chosen], 0.95):.0f}")
        table.append(cells)
    return table


def _off(load: dict[str, Any], part: str) -> float:
    off = load["estimate_s"] - load["actual_s"] if not part else load["estimate"][part] - load["actual"][part]
    return 100 * float(off) / float(load["actual_s"])
