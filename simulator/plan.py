"""`hearth plan`: how many servers and how much DRAM a workload needs to meet an SLO, found by simulation.

Every plan that is tried runs with all seeds. It fits when no request fails and the upper end of the figure's 95 %
interval over the seeds is within the SLO; with one seed, which knows no interval, the figure itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from shared.errors import Code, HearthError
from shared.sizes import size
from simulator.options import policies, positive, run_options, setting_of, size_of, workload_options, world_options
from simulator.planner.search import Row, frontier, smallest, worthwhile
from simulator.planner.slo import Slo, slo
from simulator.report.figures import as_json, means
from simulator.report.tables import show
from simulator.runs import Run, Setting, described, run_all, with_seeds, world
from simulator.simulate import digest, workload_line

STEPS: Final = 4  # sizes of DRAM that are tried, each half of the one before
COLUMNS: Final = ("DRAM per server", "servers", "GPUs", "DRAM in all", "figure", "failed", "DRAM hits", "running")


def options(parser: argparse.ArgumentParser) -> None:
    """What `hearth plan` takes."""
    workload_options(parser, "--trace")
    parser.add_argument(
        "--slo", metavar="WORDS", default="p99 startup 5s",
        help="mean, p50, p95 or p99; startup or ttft; a time (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-servers", metavar="N", type=positive, default=32, help="the most (%(default)s)")
    parser.add_argument(
        "--dram", metavar="SIZES", help="sizes per server to try, such as 128GiB,256GiB (the profile's, /2, /4, /8)"
    )
    world_options(parser)
    parser.add_argument("--policy", default="hearth", help="the scheduler (%(default)s)")
    run_options(parser, seeds=5)


class Trials:
    """Runs plans, each once, and keeps what came of them."""

    def __init__(self, base: Setting, wanted: Slo, seeds: int, processes: int) -> None:
        self._base = base
        self._slo = wanted
        self._seeds = seeds
        self._processes = processes
        self.runs: dict[tuple[int, int], list[Run]] = {}

    def fits(self, servers: int, dram_bytes: int) -> bool:
        """Whether this plan meets the SLO."""
        key = (servers, dram_bytes)
        if key not in self.runs:
            _progress(f"plan {len(self.runs) + 1}: {servers} servers with {size(dram_bytes)} of DRAM")
            setting = replace(self._base, servers=servers, dram_bytes=dram_bytes)
            self.runs[key] = list(run_all(with_seeds(setting, self._seeds), processes=self._processes))
            _progress("")
        return self._slo.met(means([run.figures for run in self.runs[key]]))


def plan(chosen: argparse.Namespace) -> int:
    """Run it; 0 if a plan fits, 3 if none does. Raises HearthError: INVALID_REQUEST."""
    wanted = slo(chosen.slo)
    named = policies(chosen.policy)
    if len(named) != 1:
        raise HearthError(Code.INVALID_REQUEST, "A plan is made for one policy.")
    base = replace(setting_of(chosen), policy=named[0])
    made = world(base)
    largest = max(spec.model.weight_bytes for spec in made.specs)
    sizes = dram_sizes(chosen.dram, made.hardware.servers[0].dram_bytes, largest)
    began = time.monotonic()
    trials = Trials(base, wanted, chosen.seeds, chosen.processes)
    rows = frontier(trials.fits, sizes, chosen.max_servers)
    best = smallest(rows)
    if chosen.json == "-":
        print(json.dumps(_report(base, wanted, rows, best, trials)))
        return 0 if best else 3
    _print(base, wanted, rows, best, trials, chosen.max_servers, made.hardware.servers[0].devices)
    print(f"{len(trials.runs)} plans × {chosen.seeds} seeds simulated in {time.monotonic() - began:.1f} s")
    if chosen.json:
        text = json.dumps(_report(base, wanted, rows, best, trials), indent=1)
        Path(chosen.json).write_text(text + "\n", encoding="utf-8")
        print(f"written: {chosen.json}")
    return 0 if best else 3


def dram_sizes(text: str | None, most_bytes: int, least_bytes: int) -> list[int]:
    """The sizes to try: those that were named, or the profile's and its halves that hold the largest checkpoint.

    Raises HearthError: INVALID_REQUEST.
    """
    if text is None:
        halves = [most_bytes >> step for step in range(STEPS)]
        return [one for one in halves if one >= least_bytes] or [most_bytes]
    try:
        return [size_of(one.strip()) for one in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise HearthError(Code.INVALID_REQUEST, f"--dram: {error}") from error


def _print(
    base: Setting, wanted: Slo, rows: Sequence[Row], best: Row | None, trials: Trials, most: int, devices: int
) -> None:
    any_runs = next(iter(trials.runs.values()))
    print(workload_line(any_runs))
    kept = worthwhile(rows)
    table = []
    for row in rows:
        looked = row.servers or most
        runs = trials.runs.get((looked, row.dram_bytes))
        if runs is None:
            table.append([size(row.dram_bytes), f"> {most}", *["–"] * (len(COLUMNS) - 2)])
            continue
        found = means([run.figures for run in runs])
        mark = "  <" if row is best else "" if row in kept else "  (worse)" if row.servers else ""
        table.append(
            [
                size(row.dram_bytes), f"{row.servers}{mark}" if row.servers else f"> {most}", str(looked * devices),
                size(looked * row.dram_bytes), found[wanted.figure].text(), found["failed"].text(1),
                found["dram_hit_rate"].text(), found["running_share"].text(3),
            ]
        )  # fmt: skip
    show(f"{wanted.words}, policy {base.policy}", COLUMNS, table)
    if best is None:
        print(f"No plan of at most {most} servers meets it; the figures are those of {most} servers.")
        return
    print(
        f"Smallest plan: {best.servers} servers ({(best.servers or 0) * devices} devices) with {size(best.dram_bytes)} "
        "of DRAM each."
    )
    if not best.steady:
        print("One server more does not meet it with these seeds: near the edge chance decides; try more --seeds.")
    print(f"digest {digest([run for runs in trials.runs.values() for run in runs])}")


def _report(base: Setting, wanted: Slo, rows: Sequence[Row], best: Row | None, trials: Trials) -> dict[str, Any]:
    def entry(row: Row) -> dict[str, Any]:
        return {"dram_bytes": row.dram_bytes, "servers": row.servers, "steady": row.steady}

    return {
        "setting": described(base),
        "slo": {"figure": wanted.figure, "limit_s": wanted.limit_s},
        "plan": None if best is None else entry(best),
        "rows": [entry(row) for row in rows],
        "tried": [
            {
                "servers": servers,
                "dram_bytes": dram_bytes,
                "mean": _known(means([run.figures for run in runs])[wanted.figure].mean),
                "half": _known(means([run.figures for run in runs])[wanted.figure].half),
                "runs": as_json([run.figures for run in runs]),
            }
            for (servers, dram_bytes), runs in trials.runs.items()
        ],
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
