"""One run as figures, and the runs of several seeds as means with intervals. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from simulator.fleet.model import Hardware, ModelSpec
from simulator.fleet.report import Accesses, Load, Report
from simulator.report.intervals import Estimate, estimate
from simulator.report.optimum import belady_hits, most_hits

Curve = NDArray[np.float64]
# Where a startup went, in its order; what is not NaN is a part of it.
PARTS: Final = ("queue_s", "decide_s", "room_s", "load_queue_s", "move_s", "attach_s")
RUNNING: Final = 3
LOADING: Final = 1


@dataclass(frozen=True)
class Figures:
    """`numbers` has one entry per figure (NaN where there is none). The curves are for pictures."""

    policy: str
    seed: int
    digest: str
    numbers: Mapping[str, float]
    startup_s: Curve = field(repr=False)
    at_s: Curve = field(repr=False)
    running_share: Curve = field(repr=False)


def of(
    report: Report, hardware: Hardware, specs: Sequence[ModelSpec], *, time_limit_s: float, warm_up_s: float = 0.0
) -> Figures:
    """A run as figures. What never started counts with the time limit in all startup and TTFT figures.

    Requests of the first `warm_up_s` seconds are served but not counted; what the fleet did is counted for the whole
    run. `waited` is the startup and every later pause: being stopped or moved for somebody else is waiting, too.
    """
    ledgers, counters = report.ledgers, report.counters
    counted = ledgers.arrived_s >= warm_up_s
    startup = report.startup(limit_s=time_limit_s)[counted]
    ttft = np.where(np.isnan(ledgers.ttft_s), time_limit_s, ledgers.ttft_s)[counted]
    waited = startup + np.nan_to_num(ledgers.pause_s)[counted]
    count = len(startup)
    loads = sum(counters.loads.values())
    numbers: dict[str, float] = {
        "requests": count,
        "failed": count - int(report.completed[counted].sum()),
        **_spread("startup", startup),
        **_spread("ttft", ttft),
        **_spread("waited", waited),
        **{part: _mean(np.nan_to_num(getattr(ledgers, part)[counted])) for part in PARTS},
        "cold": float((ledgers.tier[counted] > 0).mean()) if count else math.nan,
        "swaps_per_request": counters.swaps_per_request,
        "loads": loads,
        **{f"loads_{tier}": counters.loads.get(tier, 0) for tier in ("dram", "ssd", "peer", "remote")},
        "moves": counters.moves_committed,
        "moves_aborted": counters.moves_aborted,
        "parks": counters.parks,
        "prefetches": counters.prefetches,
        "running_share": _mean(report.utilisation.share(RUNNING)),
        "loading_share": _mean(report.utilisation.share(LOADING)),
        "service_s": _mean(np.nan_to_num(ledgers.prefill_s + ledgers.decode_s)[counted]),
        "virtual_s": report.virtual_s,
        **_dram(report, hardware, specs),
    }
    return Figures(
        policy=report.policy,
        seed=report.seed,
        digest=report.digest,
        numbers=numbers,
        startup_s=startup,
        at_s=np.asarray(report.utilisation.at_s, dtype=np.float64),
        running_share=report.utilisation.share(RUNNING),
    )


def means(runs: Sequence[Figures]) -> dict[str, Estimate]:
    """Every figure over the seeds."""
    return {name: estimate([run.numbers[name] for run in runs]) for name in runs[0].numbers} if runs else {}


def as_json(runs: Sequence[Figures]) -> list[dict[str, Any]]:
    """One entry per run; what is not known is null."""
    return [
        {
            "policy": run.policy,
            "seed": run.seed,
            "digest": run.digest,
            **{name: None if math.isnan(value) else value for name, value in run.numbers.items()},
        }
        for run in runs
    ]


def quantile(values: Curve, percent: float) -> float:
    """The value below which so many percent lie (nearest rank); NaN for none."""
    if not len(values):
        return math.nan
    return float(np.sort(values)[min(len(values) - 1, max(0, math.ceil(len(values) * percent / 100) - 1))])


def _spread(name: str, values: Curve) -> dict[str, float]:
    return {
        f"{name}_mean_s": _mean(values),
        **{f"{name}_p{percent}_s": quantile(values, percent) for percent in (50, 95, 99)},
    }


def _dram(report: Report, hardware: Hardware, specs: Sequence[ModelSpec]) -> dict[str, float]:
    """The hit rate of DRAM, and that of the offline optimum on the same accesses of each server, from both sides.

    Whoever asks for bytes that are on their way for somebody else waits for them as that one does: that is one access,
    not two, and no cache could have made a hit of it without making one of the first.
    """
    accesses = report.accesses
    sizes = {index: spec.model.weight_bytes for index, spec in enumerate(specs)}
    # Deployments of the same checkpoint are one object.
    first: dict[str, int] = {}
    items = [first.setdefault(spec.checkpoint_id or spec.name, index) for index, spec in enumerate(specs)]
    joined = joins(accesses, report.loads, items)
    total, hits = int((~joined).sum()), int(accesses.hit[~joined].sum())
    belady = most = 0
    for server, shape in enumerate(hardware.servers):
        chosen = accesses.deployment[(accesses.server == server) & ~joined].tolist()
        sequence = [items[deployment] for deployment in chosen]
        if sequence:
            belady += belady_hits(sequence, sizes, shape.dram_bytes)
            most += most_hits(sequence, sizes, shape.dram_bytes)
    return {
        "dram_accesses": total,
        "dram_joined": int(joined.sum()),
        "dram_hit_rate": hits / total if total else math.nan,
        "dram_belady_rate": belady / total if total else math.nan,
        "dram_most_rate": most / total if total else math.nan,
        "dram_of_belady": hits / belady if belady else math.nan,
        "dram_of_most": hits / most if most else math.nan,
    }


def joins(accesses: Accesses, done: Sequence[Load], items: Sequence[int]) -> NDArray[np.bool_]:
    """Which accesses met their bytes on the way: misses while an earlier load of that object goes on at that server."""
    loads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for load in done:
        span = (load.at_s, load.at_s + load.total_s)
        loads.setdefault((load.server, items[load.deployment]), []).append(span)
    for spans in loads.values():
        spans.sort()
    until: dict[tuple[int, int], float] = {}
    found = np.zeros(len(accesses.hit), dtype=np.bool_)
    columns = (accesses.at_s.tolist(), accesses.server.tolist(), accesses.deployment.tolist(), accesses.hit.tolist())
    for index, (at_s, server, deployment, hit) in enumerate(zip(*columns, strict=True)):
        key = (server, items[deployment])
        if hit:
            continue
        if at_s < until.get(key, 0.0):
            found[index] = True
            continue
        ends = [end for begin, end in loads.get(key, ()) if begin <= at_s < end]
        until[key] = min(ends, default=0.0)
    return found


def _mean(values: Curve) -> float:
    return float(values.mean()) if len(values) else math.nan
