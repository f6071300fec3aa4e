"""A worker with many long streams is drained, as for a rolling update: how long it takes, and what clients notice."""

from __future__ import annotations

import statistics
import time
from typing import Any, Final

from benchmarks.migrating.gaps import gaps, undisturbed
from benchmarks.migrating.moving import other, pauses
from benchmarks.migrating.stage import WORKERS, Stage
from benchmarks.migrating.tables import milliseconds
from benchmarks.report import percentile, spread

PROMPT_TOKENS: Final = 128
BEFORE_TOKENS: Final = 32


async def once(stage: Stage, streams: int, tokens: int, name: str) -> dict[str, Any]:
    """`streams` streams run at one worker, which is drained by the operator's call; then it takes work again."""
    opened = [stage.open(f"drain {name} {number}", PROMPT_TOKENS, tokens) for number in range(streams)]
    for stream in opened:
        await stream.until(BEFORE_TOKENS)
    at = [one.worker_id for one in await stage.running()]
    victim = max(WORKERS, key=at.count)
    there = at.count(victim)
    warm = any(one["worker_id"] == other(victim) for one in stage.cluster.view().get("replicas", []))
    began = time.perf_counter()
    await stage.admin(f"/v1/admin/workers/{victim}/drain", {"wait_s": 300})
    drained = time.perf_counter()
    open_then = sum(not stream.over for stream in opened)
    for stream in opened:
        await stream.ended()
    await stage.admin(f"/v1/admin/workers/{victim}/drain", {"on": False})
    own = [
        gap.length_s for stream in opened for gap in undisturbed(gaps(stream.times), began, drained)
    ]  # before and after
    return {
        "streams": there,
        "destination_was_warm": warm,
        "drained_s": drained - began,
        "still_open": open_then,
        "pauses_s": pauses(opened, began, drained),
        "own_p50_s": statistics.median(own),
        "own_p99_s": percentile(own, 99),
        "migrations": [stream.ledger.get("migrations", 0) for stream in opened],
        "recoveries": [stream.ledger.get("recoveries", 0) for stream in opened],
        "not_whole": [stream.error or f"{stream.tokens} tokens" for stream in opened if not stream.whole],
    }


async def measure(stage: Stage, runs: int, streams: int, tokens: int) -> dict[str, Any]:
    """`runs` drains, each of the worker that runs the streams then."""
    results = []
    for run in range(runs):
        results.append(await once(stage, streams, tokens, str(run)))
        print(f"drain {run + 1} of {runs}: {results[-1]['drained_s']:.1f} s", flush=True)
    every = [pause for one in results for pause in one["pauses_s"]]
    return {
        "runs": runs,
        "streams": streams,
        "drains": results,
        "drained_s": spread([one["drained_s"] for one in results]),
        "pause_s": spread(every),
        "not_whole": [text for one in results for text in one["not_whole"]],
    }


COLUMNS: Final = (
    "drain", "streams", "model at the destination", "drained after ms", "pause P50 ms", "pause P99 ms", "own P50",
    "own P99", "migrations", "recoveries", "client errors",
)  # fmt: skip


def rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per drain."""
    return [
        [
            str(number),
            str(one["streams"]),
            "attached" if one["destination_was_warm"] else "loaded first",
            milliseconds(one["drained_s"]),
            milliseconds(percentile(one["pauses_s"], 50)),
            milliseconds(percentile(one["pauses_s"], 99)),
            milliseconds(one["own_p50_s"]),
            milliseconds(one["own_p99_s"]),
            str(sum(one["migrations"])),
            str(sum(one["recoveries"])),
            str(len(one["not_whole"])),
        ]
        for number, one in enumerate(found["drains"], 1)
    ]
