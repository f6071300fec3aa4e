"""A model that only a busy server has in its DRAM: its first token with migration and without, and who notices."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.migrating.gaps import gaps, pause_s
from benchmarks.migrating.streams import Stream, prompt
from benchmarks.models import SHAPES
from benchmarks.placing.stage import NOWHERE, Stage, drop_cached, stage
from benchmarks.report import percentile, range_of

BUSY: Final = ("busy-1", "busy-2")
BUSY_SHAPE: Final = "llama-30m-narrow"
ONLY_A: Final = "it may only run on A"
LONG_RUNS: Final = 2  # of what takes as long as a stream, or as the operator lets anybody wait
STREAM_TOKENS: Final = 4000
CALM_S: Final = 2.5  # the streams' own gaps are those of this time before the newcomer
AFTER_S: Final = 1.0
TRIES: Final = 3
MODES: Final = {"with migration": "true", "without": "false"}
# What B has of the wanted model; whether it may run there at all.
SCENES: Final = {
    "B has it on its SSD": ("wanted", "ssd"),
    "B would fetch it from the source": ("wanted", NOWHERE),
    ONLY_A: ("wanted-on-a", NOWHERE),
}


async def prepare(found: Stage, models: Path, shape: str) -> None:
    """Deploy what runs, and what will be wanted."""
    for name in BUSY:
        await found.deploy(name, models / BUSY_SHAPE, keep_alive_s=0.5, target_concurrency=1)
    spec: dict[str, Any] = {"keep_alive_s": 0.5, "target_concurrency": 1, "max_context_tokens": 256}
    await found.deploy("wanted", models / shape, **spec)
    await found.deploy("wanted-on-a", models / shape, labels={"side": "a"}, **spec)


async def places(found: Stage) -> dict[str, str]:
    """Request → worker of all that runs now."""
    running = (await found.get("/v1/admin/requests"))["data"]
    return {one["request_id"]: one["worker_id"] for one in running}


async def occupy(found: Stage, tokens: int, name: str) -> list[Stream]:
    """A long stream on each of A's workers; B has nothing of their model then, so that they go to A."""
    for number in range(TRIES):
        await found.empty()
        await found.lay(found.keys[BUSY[0]], {"server-1": "dram", "server-2": NOWHERE})
        vocab = SHAPES[BUSY_SHAPE]["vocab_size"]
        streams = [
            Stream(found.cluster.url, model, prompt(64, vocab, f"{name} {number} {model}"), tokens) for model in BUSY
        ]
        for stream in streams:
            stream.begin(found.session, found.tasks)
        for stream in streams:
            await stream.until(16)
        at = await places(found)
        if sorted(at.get(stream.request_id, "") for stream in streams) == ["worker-1-1", "worker-1-2"]:
            return streams
        print(f"the streams run at {at}: again", flush=True)
        await close(streams)
    raise RuntimeError("the streams do not go to server A")


async def close(streams: Sequence[Stream]) -> None:
    """Leave them."""
    for stream in streams:
        await stream.close()


async def once(found: Stage, scene: str, name: str) -> dict[str, Any]:
    """One newcomer."""
    wanted, on_b = SCENES[scene]
    key = found.keys[wanted]
    streams = await occupy(found, STREAM_TOKENS, name)
    try:
        await found.lay(found.keys[BUSY[0]], {"server-2": "dram"})
        await found.lay(key, {"server-1": "dram", "server-2": on_b})
        drop_cached(found.sources[key])
        began_at = await places(found)
        calm_from = time.perf_counter()
        await asyncio.sleep(CALM_S)
        before = (await found.explain(wanted)).get("decision_id", "")
        asked_at = time.perf_counter()
        newcomer = Stream(found.cluster.url, wanted, prompt(16, 16000, name), 2).begin(found.session, found.tasks)
        await newcomer.until(1, timeout_s=240.0)
        ttft_s = newcomer.times[0] - newcomer.began_s
        server_id = next(iter(await found.replicas(wanted)), {}).get("server_id", "")
        now_at = await places(found)
        await asyncio.sleep(AFTER_S)
        decision = await found.explain(wanted)
        moved = [one for one in streams if now_at.get(one.request_id, "") not in ("", began_at[one.request_id])]
        return {
            "scene": scene,
            "ttft_s": ttft_s,
            "server": server_id,
            "left_tokens": [one.max_tokens - one.tokens for one in streams],
            "moved": [heard(one, calm_from, asked_at) for one in moved],
            "ended": sum(one.over for one in streams),
            "errors": [one.error for one in streams if one.error],
            "decision": decision if decision.get("decision_id") != before else {},
        }
    finally:
        await close(streams)


def heard(stream: Stream, calm_from: float, asked_at: float) -> dict[str, float]:
    """The largest gap of a stream since the newcomer has asked, and its own gaps just before that, seconds."""
    own = [gap.length_s for gap in gaps(stream.times) if calm_from <= gap.begin_s and gap.end_s <= asked_at]
    return {
        "gap_s": pause_s(stream.times, asked_at, time.perf_counter()),
        "own_median_s": statistics.median(own),
        "own_p99_s": percentile(own, 99),
        "own_most_s": max(own),
    }


async def measure(
    home: Path, urls: tuple[str, str], models: Path, shape: str, runs: int, dram_bytes: int
) -> dict[str, Any]:
    """`runs` newcomers per scene and mode, the modes in turn, after one of each that does not count."""
    results: list[dict[str, Any]] = []
    async with contextlib.AsyncExitStack() as stack:
        clusters: dict[str, Stage] = {}
        for mode, moves in MODES.items():
            # A worker is a place for one model, as a GPU that a large one fills.
            env = {"HEARTH_WORKER_MAX_REPLICAS": "1", "HEARTH_MIGRATE_FOR_PLACEMENT": moves}
            env |= {"HEARTH_WORKER_MEMORY_BYTES": str(4 << 30)}
            opened = stage(home / mode.replace(" ", "-"), urls, dram_bytes=dram_bytes, env=env)
            clusters[mode] = await stack.enter_async_context(opened)
            await prepare(clusters[mode], models, shape)
        for run in range(runs + 1):
            for scene in SCENES if run <= LONG_RUNS else [one for one in SCENES if one != ONLY_A]:
                for mode, found in clusters.items():
                    one = await once(found, scene, f"{mode} {scene} {run}")
                    results.append(one | {"run": run, "mode": mode})
                    print(
                        f"{run} {scene:34} {mode:15} {one['ttft_s']:7.2f} s on {one['server']}, "
                        f"{len(one['moved'])} moved: {words(one)}",
                        flush=True,
                    )
                    await found.empty()
    return {"shape": shape, "results": results}


def words(one: Mapping[str, Any]) -> str:
    """What was noticed, and what had been decided."""
    noticed = ", ".join(f"{moved['gap_s']:.2f} s (own P99 {moved['own_p99_s']:.2f} s)" for moved in one["moved"])
    return f"{noticed} {one['decision'].get('reason', '')}".strip()


COLUMNS: Final = (
    "newcomer", "first token, with migration", "without", "times", "gap of the moved stream", "its own P99 gap",
    "moved",
)  # fmt: skip


def rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """A row per scene; the first run of each does not count."""
    table = []
    for scene in SCENES:
        mine = [one for one in figures["results"] if one["scene"] == scene and one["run"] > 0]
        took = {mode: [one["ttft_s"] for one in mine if one["mode"] == mode] for mode in MODES}
        with_it = [one for one in mine if one["mode"] == "with migration"]
        moved = [stream for one in with_it for stream in one["moved"]]
        table.append(
            [
                scene,
                *(range_of(took[mode], "s", 2) for mode in MODES),
                f"{statistics.median(took['without']) / statistics.median(took['with migration']):.1f}",
                range_of([one["gap_s"] for one in moved], "s", 2),
                range_of([one["own_p99_s"] for one in moved], "s", 2),
                f"{sum(bool(one['moved']) for one in with_it)} of {len(with_it)}",
            ]
        )
    return table
