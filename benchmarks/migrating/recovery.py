"""A worker dies, or hangs, in mid-stream: how long its clients see nothing, and whether they see everything."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any, Final

from benchmarks.migrating.moving import pauses
from benchmarks.migrating.stage import WORKERS, Stage
from benchmarks.migrating.tables import milliseconds
from benchmarks.report import percentile, spread

PROMPT_TOKENS: Final = 64
BEFORE_TOKENS: Final = 20
WAYS: Final = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


async def once(stage: Stage, way: str, streams: int, tokens: int, name: str) -> dict[str, Any]:
    """`streams` streams of `tokens` tokens on both workers; the worker that runs most of them is hit.

    The pause of each of its streams, the largest gap of each other stream, and how many streams were not whole.
    """
    opened = [stage.open(f"{way} {name} {number}", PROMPT_TOKENS, tokens) for number in range(streams)]
    for stream in opened:
        await stream.until(BEFORE_TOKENS)
    at = {one.request_id: one.worker_id for one in await stage.running()}
    victim = max(WORKERS, key=lambda worker_id: sum(one == worker_id for one in at.values()))
    hit = [stream for stream in opened if at.get(stream.request_id) == victim]
    spared = [stream for stream in opened if at.get(stream.request_id) != victim]
    began = time.perf_counter()
    stage.cluster.kill(victim, WAYS[way])
    if way == "kill -9":
        await asyncio.to_thread(stage.cluster.processes[victim].wait)
    for stream in opened:
        await stream.ended()
    ended = time.perf_counter()
    if way == "kill -9":
        stage.cluster.start(victim)
    else:
        stage.cluster.kill(victim, signal.SIGCONT)
    await _whole_again(stage, victim)
    return {
        "hit_s": pauses(hit, began, ended),
        "spared_s": pauses(spared, began, ended),
        "recoveries": [stream.ledger.get("recoveries", 0) for stream in hit],
        "not_whole": [stream.error or f"{stream.tokens} tokens" for stream in opened if not stream.whole],
    }


async def _whole_again(stage: Stage, victim: str) -> None:
    """Wait until the worker that was hit takes requests again and nothing runs anywhere."""

    def ready() -> bool:
        view = stage.cluster.view()
        replicas = {one["worker_id"] for one in view.get("replicas", []) if one["state"] == "ready"}
        workers = {one["worker_id"] for one in view.get("workers", []) if one["phase"] == "ready"}
        return victim in workers and victim in replicas and stage.cluster.idle()

    await asyncio.to_thread(stage.cluster.until, ready, f"{victim} is back", 120)


async def measure(stage: Stage, runs: int, streams: int, tokens: int) -> dict[str, Any]:
    """Both ways in turn, `runs` times."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for run in range(runs):
        for way, results in found.items():
            results.append(await once(stage, way, streams, tokens, str(run)))
            print(f"{way} {run + 1} of {runs}: {len(results[-1]['hit_s'])} streams recovered", flush=True)
    return {
        "runs": runs,
        "streams": streams,
        "tokens": tokens,
        "ways": {way: summary(results) for way, results in found.items()},
    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs of one way together."""
    hit = [pause for one in results for pause in one["hit_s"]]
    spared = [pause for one in results for pause in one["spared_s"]]
    return {
        "runs": len(results),
        "recovered": len(hit),
        "pause_s": spread(hit),
        "pause_p50_s": percentile(hit, 50),
        "pause_p99_s": percentile(hit, 99),
        "spared_most_s": max(spared) if spared else None,
        "not_whole": [text for one in results for text in one["not_whole"]],
        "all": results,
    }


COLUMNS: Final = (
    "the worker gets", "streams hit", "pause P50 ms", "pause P99 ms", "others' largest gap ms", "streams not whole",
)  # fmt: skip


def rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per way."""
    return [
        [
            way,
            str(one["recovered"]),
            milliseconds(one["pause_p50_s"]),
            milliseconds(one["pause_p99_s"]),
            milliseconds(one["spared_most_s"]) if one["spared_most_s"] is not None else "",
            str(len(one["not_whole"])),
        ]
        for way, one in found["ways"].items()
    ]


def broken(found: dict[str, Any]) -> list[str]:
    """What clients saw that they should not have seen."""
    return [text for one in found["ways"].values() for text in one["not_whole"]]
