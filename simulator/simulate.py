"""`hearth simulate`: the production scheduler on modelled machines, in virtual time, and what users would see."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from simulator.options import policies, positive, run_options, setting_of, size_of, workload_options, world_options
from simulator.report import plots
from simulator.report.figures import PARTS, as_json, means
from simulator.report.intervals import Estimate
from simulator.report.tables import show
from simulator.runs import Run, Setting, described, run_all, with_seeds

STARTUP: Final = (
    ("requests", "requests", 0), ("failed", "failed", 1), ("mean s", "startup_mean_s", 2),
    ("P50 s", "startup_p50_s", 2), ("P95 s", "startup_p95_s", 2), ("P99 s", "startup_p99_s", 2),
    ("TTFT P99 s", "ttft_p99_s", 2), ("waited P99 s", "waited_p99_s", 2),
)  # fmt: skip
CLUSTER: Final = (
    ("loads", "loads", 0), ("swaps/request", "swaps_per_request", 3), ("in DRAM", "dram_hit_rate", 2),
    ("of optimum", "dram_of_most", 2), ("moves", "moves", 1), ("parks", "parks", 1), ("running", "running_share", 3),
)  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    """What `hearth simulate` takes."""
    world_options(parser)
    parser.add_argument("--servers", metavar="N", type=positive, help="how many (the profile's)")
    parser.add_argument(
        "--dram", metavar="SIZE", type=size_of, help="DRAM pool per server, such as 256GiB (the profile's)"
    )
    workload_options(parser, "--workload")
    parser.add_argument(
        "--policy", metavar="LIST", default="hearth",
        help="hearth, no_migration, no_prefetch, random, ray_serve, ray_serve_cached, shepherd, or all (%(default)s)",
    )  # fmt: skip
    run_options(parser, seeds=1)
    parser.add_argument("--plot", metavar="DIR", type=Path, help="draw pictures of the first seed into this directory")


def simulate(chosen: argparse.Namespace) -> int:
    """Run it; the exit code. Raises HearthError: INVALID_REQUEST."""
    base = replace(setting_of(chosen), servers=chosen.servers, dram_bytes=chosen.dram)
    settings = [
        one for policy in policies(chosen.policy) for one in with_seeds(replace(base, policy=policy), chosen.seeds)
    ]
    began = time.monotonic()
    runs: list[Run] = []
    for run in run_all(settings, processes=chosen.processes):
        runs.append(run)
        _progress(f"{len(runs)} of {len(settings)} runs")
    _progress("")
    report = {"setting": described(base), "digest": digest(runs), "runs": _entries(runs)}
    if chosen.json == "-":
        print(json.dumps(report))
        return 0
    print_runs(base, runs, time.monotonic() - began)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {chosen.json}")
    if chosen.plot is not None:
        _draw(chosen.plot, runs)
    return 0


def print_runs(base: Setting, runs: Sequence[Run], took_s: float) -> None:
    """The tables, what the workload really was, and the digest."""
    by_policy: dict[str, list[Run]] = {}
    for run in runs:
        by_policy.setdefault(run.figures.policy, []).append(run)
    found = {policy: means([run.figures for run in of]) for policy, of in by_policy.items()}
    seeds = len(next(iter(by_policy.values())))
    over = f"mean of {seeds} seeds ± 95 % confidence" if seeds > 1 else f"seed {base.seed}"
    print(workload_line(runs))
    for title, columns in ((f"Startup ({over})", STARTUP), ("The fleet", CLUSTER)):
        show(title, ["policy", *(name for name, _, _ in columns)], table_rows(found, columns))
    print(f"digest {digest(runs)} · {took_s:.1f} s")


def workload_line(runs: Sequence[Run]) -> str:
    """What was really asked for, over the seeds."""
    first = {run.setting.seed: run.realised for run in reversed(runs)}
    realised = [first[seed] for seed in sorted(first)]
    rates, own, whole = ([getattr(one, name) for one in realised] for name in ("rate", "cv", "cv_all"))
    duration_s = realised[0].duration_s
    used = np.mean([one.deployments_used for one in realised])
    return (
        f"Workload {runs[0].setting.wish.workload}, {duration_s:.0f} s: realised {_range(rates)} requests/s, CV "
        f"{_range(own)} per deployment, {_range(whole)} in all; {used:.0f} deployments asked for; mean prompt "
        f"{np.mean([one.prompt_tokens_mean for one in realised]):.0f}, output "
        f"{np.mean([one.output_tokens_mean for one in realised]):.0f} tokens"
    )


def table_rows(found: dict[str, dict[str, Estimate]], columns: Sequence[tuple[str, str, int]]) -> list[list[str]]:
    """One row per policy."""
    return [[policy, *(figures[key].text(digits) for _, key, digits in columns)] for policy, figures in found.items()]


def digest(runs: Sequence[Run]) -> str:
    """The same for the same runs, to the bit."""
    text = "\n".join(f"{run.trace_digest} {run.figures.policy} {run.figures.seed} {run.figures.digest}" for run in runs)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _range(values: Sequence[float]) -> str:
    known = [value for value in values if value == value]
    if not known:
        return "–"
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return low if low == high else f"{low}–{high}"


def _entries(runs: Sequence[Run]) -> list[dict[str, Any]]:
    workload = [
        {key: None if value != value else value for key, value in described_realised(run).items()} for run in runs
    ]
    return [
        entry | {"workload": one} for entry, one in zip(as_json([run.figures for run in runs]), workload, strict=True)
    ]


def described_realised(run: Run) -> dict[str, Any]:
    """What the workload of a run really was."""
    return {name: getattr(run.realised, name) for name in run.realised.__dataclass_fields__} | {
        "digest": run.trace_digest
    }


def _draw(directory: Path, runs: Sequence[Run]) -> None:
    seed = min(run.setting.seed for run in runs)
    first = {run.figures.policy: run.figures for run in runs if run.setting.seed == seed}
    title = f"{runs[0].setting.wish.workload}, {runs[0].setting.profile}, seed {seed}"
    parts = {
        policy: {part.removesuffix("_s"): figures.numbers[part] for part in PARTS} for policy, figures in first.items()
    }
    drawn = (
        plots.startup_cdf(directory / "startup.png", title, {name: one.startup_s for name, one in first.items()}),
        plots.utilisation(
            directory / "utilisation.png", title, {name: (one.at_s, one.running_share) for name, one in first.items()}
        ),
        plots.time_parts(directory / "time.png", f"Where a startup goes: {title}", parts),
    )
    for path in drawn:
        print(f"drawn: {path}" if path else f"no picture: {plots.MISSING}")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
