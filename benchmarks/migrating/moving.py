"""A request that moves, by context length: migration, stop-and-restart, and waiting for its end, in turn.

Every measured stream has a prompt of its own, so that no KV cache holds a part of it, and runs while other streams
decode at its source and at its destination. It goes to whichever worker the queue chose; the other is the destination.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from benchmarks.migrating.gaps import (
    Moved,
    gaps,
    kv_bytes_per_token,
    next_after,
    pause_s,
    prefill_token_s,
    summary,
    targets,
    transfer_s,
    undisturbed,
    within,
)
from benchmarks.migrating.stage import WORKERS, Stage
from benchmarks.migrating.streams import Stream
from benchmarks.migrating.tables import kilobytes, milliseconds
from benchmarks.models import SHAPES
from shared.contracts.migration import MigrationOutcome

CONTEXTS: Final = (100, 250, 500, 1000, 2000, 4000)
BEFORE_TOKENS: Final = 32  # of a measured stream, before anything happens to it
AFTER_TOKENS: Final = 32  # watched afterwards
REMAINING_TOKENS: Final = 128  # that a source which waits for the end still has to generate
ROOM_TOKENS: Final = 1500  # more than are generated while it moves
RATES: Final = {"1 Gb/s": 1e9, "10 Gb/s": 1e10, "100 Gb/s": 1e11}
# Llama-2-7B in half precision: 32 layers of 32 heads of 128, keys and values, 2 bytes.
LLAMA_2_7B_KV_BYTES: Final = 2 * 32 * 32 * 128 * 2


def other(worker_id: str) -> str:
    """The destination."""
    return next(one for one in WORKERS if one != worker_id)


async def migration(stage: Stage, context: int, name: str, *, direct: bool) -> Moved:
    """One stream with `context` tokens is moved by the operator's call, or by the scheduler's (`direct`).

    Raises RuntimeError if the migration does not commit.
    """
    stream = stage.open(f"move {name}", context - BEFORE_TOKENS, BEFORE_TOKENS + ROOM_TOKENS)
    await stream.until(BEFORE_TOKENS)
    source = await stage.where(stream)
    began, ended_at, ended = await stage.migrate(stream, other(source.worker_id), source.worker_id if direct else None)
    if ended.outcome is not MigrationOutcome.COMMITTED:
        raise RuntimeError(f"a migration ended {ended.outcome}: {ended.failure}")
    await stream.until(stream.tokens + AFTER_TOKENS)
    times = list(stream.times)
    await stage.drop(stream)
    resumed = next_after(times, ended_at)
    found = gaps(times)
    handover = [gap.length_s for gap in within(found, ended_at - ended.frozen_s, resumed)]
    return Moved(
        rounds=ended.rounds,
        tokens=ended.tokens,
        gap_tokens=ended.gap_tokens,
        wire_bytes=ended.wire_bytes,
        total_s=ended.total_s,
        frozen_s=ended.frozen_s,
        pause_s=pause_s(times, began, ended_at),
        handover_s=max(handover),
        own_s=tuple(gap.length_s for gap in undisturbed(found, began, resumed)),
        asked_s=ended_at - began,
        ttft_s=times[0] - stream.began_s,
        prompt_tokens=stream.prompt_tokens,
    )


async def restart(stage: Stage, context: int, name: str) -> float | None:
    """Seconds without a token when the source gives the request back and the destination prefills everything.

    None if the queue gave it to the source again, whose KV cache still holds it.
    """
    stream = stage.open(f"restart {name}", context - BEFORE_TOKENS, BEFORE_TOKENS + ROOM_TOKENS)
    await stream.until(BEFORE_TOKENS)
    source = await stage.where(stream)
    stage.restart(source)
    began = time.perf_counter()
    await stream.until(stream.tokens + AFTER_TOKENS)
    found = await stage.where(stream)
    times = list(stream.times)
    await stage.drop(stream)
    if found.epoch == source.epoch:
        raise RuntimeError("the worker did not give the request back")
    return pause_s(times, began, times[-1]) if found.worker_id != source.worker_id else None


async def waiting(stage: Stage, context: int, name: str) -> float:
    """Seconds until the source is free when nobody moves anything and `REMAINING_TOKENS` are still to come."""
    stream = stage.open(f"wait {name}", context - BEFORE_TOKENS, BEFORE_TOKENS + REMAINING_TOKENS)
    await stream.until(BEFORE_TOKENS)
    began = time.perf_counter()
    await stream.ended()
    if not stream.whole:
        raise RuntimeError(f"a stream ended after {stream.tokens} tokens: {stream.error or stream.finish}")
    return stream.times[-1] - began


async def measure(
    stage: Stage, contexts: Sequence[int], runs: int, load: int, *, direct: bool = False, limit_s: float = math.inf
) -> dict[str, Any]:
    """All context lengths in turn, `runs` times: a migration each time, the two others every other time.

    No further run is begun, after the second, that would probably end later than `limit_s` seconds from now.
    """
    moves: dict[int, list[Moved]] = {context: [] for context in contexts}
    restarts: dict[int, list[float]] = {context: [] for context in contexts}
    waits: dict[int, list[float]] = {context: [] for context in contexts}
    returned = 0
    began = time.perf_counter()
    for run in range(runs):
        passed_s = time.perf_counter() - began
        if run > 1 and passed_s * (run + 1) / run > limit_s:
            print(f"stopped after {run} of {runs} runs: another one would not end within {limit_s:.0f} s", flush=True)
            runs = run
            break
        for context in contexts:
            name = f"{context} {run}"
            await stage.settle(load)
            moves[context].append(await migration(stage, context, name, direct=direct))
            await stage.settle(load)
            if run % 2 == 0:
                pause = await restart(stage, context, name)
                restarts[context] += [] if pause is None else [pause]
                returned += pause is None
            else:
                waits[context].append(await waiting(stage, context, name))
        print(f"run {run + 1} of {runs} done after {time.perf_counter() - began:.0f} s", flush=True)
    return {
        "runs": runs,
        "moves": {context: [asdict(move) for move in found] for context, found in moves.items()},
        "restart_s": restarts,
        "restarts_at_the_source": returned,
        "wait_s": waits,
        **compare(moves, restarts, waits),
    }


def compare(
    moves: dict[int, list[Moved]], restarts: dict[int, list[float]], waits: dict[int, list[float]]
) -> dict[str, Any]:
    """What the measurements come to: per context length, and against the targets."""
    token_s = prefill_token_s([move for found in moves.values() for move in found])
    contexts = {
        context: {
            **summary(found, token_s),
            "restart_s": statistics.median(restarts[context]) if restarts[context] else None,
            "wait_s": statistics.median(waits[context]) if waits[context] else None,
        }
        for context, found in moves.items()
    }
    return {"prefill_token_s": token_s, "contexts": contexts, "targets": targets(list(contexts.values()))}


# -- as tables ---------------------------------------------------------------------------------------------------------

COLUMNS: Final = (
    "context", "rounds", "last gap", "kB on the wire", "total ms", "frozen ms", "pause ms", "largest", "hand-over ms",
    "own P50", "own P99", "bound ms", "within",
)  # fmt: skip
_MILLISECONDS: Final = (
    "total_s", "frozen_s", "pause_s", "pause_most_s", "handover_s", "own_p50_s", "own_p99_s", "bound_s",
)  # fmt: skip
NAIVE_COLUMNS: Final = (
    "context", "Hearth: pause ms", "source free after ms", "restart: pause ms", f"wait for {REMAINING_TOKENS} more ms",
)  # fmt: skip
KV_COLUMNS: Final = ("context", "tokens: kB", "KV cache: MB", *(f"at {name}: ms" for name in RATES))


def rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per context length: the migrations."""
    return [
        [
            str(context),
            f"{one['rounds']:g}",
            f"{one['gap_tokens']:g}",
            kilobytes(one["wire_bytes"]),
            *(milliseconds(one[key]) for key in _MILLISECONDS),
            f"{one['within_bound']} of {one['runs']}",
        ]
        for context, one in found["contexts"].items()
    ]


def naive_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per context length: Hearth beside the naive ways."""
    return [
        [
            str(context),
            milliseconds(one["pause_s"]),
            milliseconds(one["asked_s"]),
            milliseconds(one["restart_s"]) if one["restart_s"] is not None else "",
            milliseconds(one["wait_s"]) if one["wait_s"] is not None else "",
        ]
        for context, one in found["contexts"].items()
    ]


def kv_rows(found: dict[str, Any], token_bytes: int) -> list[list[str]]:
    """A row per context length: what the KV cache would weigh, and take to send, computed from `token_bytes`."""
    return [
        [
            str(context),
            kilobytes(one["wire_bytes"]),
            f"{int(context) * token_bytes / 1e6:.0f}",
            *(milliseconds(transfer_s(int(context), token_bytes, rate)) for rate in RATES.values()),
        ]
        for context, one in found["contexts"].items()
    ]


def target_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per target."""
    return [
        [name, f"{measured:.2f}", f"≤ {target:g}", "met" if measured <= target else "missed"]
        for name, measured, target in found["targets"]
    ]


def own_kv_bytes(shape: str) -> int:
    """Of the model that was measured, in float32."""
    return kv_bytes_per_token(SHAPES[shape], 4)


def pauses(streams: Sequence[Stream], begin_s: float, end_s: float) -> list[float]:
    """The largest gap of each stream between these times; streams without one are left out."""
    found = []
    for stream in streams:
        touched = within(gaps(stream.times), begin_s, end_s)
        found += [max(gap.length_s for gap in touched)] if touched else []
    return found
