"""The experiments of docs/placement.md: what is measured there is what these commands print.

    python -m simulator.experiments paper|azure|deployments|ahead|belady|bursts [--quick] [--seeds 10] [--into DOCUMENT]

* paper: the ServerlessLLM paper's experiment: 32, 16 or 8 deployments of OPT-6.7B, 13B or 30B on its test bed, gamma
  arrivals with CV 8, GSM8K- and ShareGPT-like lengths, several rates, seven policies.
* azure: the same fleet under the Azure Functions trace and the Azure LLM inference traces.
* deployments: 16 to 128 deployments on the same machines.
* ahead: with prefetching and without, from an empty DRAM on and later.
* belady: hits in DRAM against the offline optimum on the same accesses, for several sizes of DRAM.
* bursts: how often somebody must leave for somebody else, by how bursty the arrivals are.

All policies of a seed meet the same requests. Figures are means over the seeds with 95 % confidence intervals
(Student's t); ratios are geometric means over pairs of the same seed. A request that never starts counts with 300 s.
Every experiment prints markdown; `--into` puts it between the marks of a document, `--json` keeps every run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from shared.errors import HearthError
from simulator.fleet.model import Policy
from simulator.report.intervals import Estimate, estimate, ratio
from simulator.report.tables import markdown, put
from simulator.runs import Run, Setting, described, run_all, with_seeds
from simulator.simulate import described_realised, digest
from simulator.workload.named import Wish

POLICIES: Final = tuple(policy.value for policy in Policy)
TITLES: Final = {
    "hearth": "Hearth",
    "no_migration": "Hearth without migration",
    "no_prefetch": "Hearth without prefetching",
    "random": "random",
    "ray_serve": "Ray Serve-like",
    "ray_serve_cached": "Ray Serve-like, local cache",
    "shepherd": "Shepherd*-like",
}
WARM_UP: Final = 0.5  # of the duration is not counted: DRAM is empty at the start; the paper's was not
PAPER: Final = Setting(wish=Wish(popularity="uniform"), target_concurrency=4)
MODELS: Final = ("opt-6.7b:32", "opt-13b:16", "opt-30b:8")
LENGTHS: Final = ("gsm8k", "sharegpt")
NOON_S: Final = 43200.0
RATES: Final = (0.2, 0.5, 0.8, 1.1, 1.4, 2.0)


@dataclass(frozen=True)
class Scale:
    """How much is run: `rates` (requests per second) are those of generated workloads, `duration_s` of all."""

    seeds: int = 10
    rates: Sequence[float] = RATES
    duration_s: float = 3600.0
    quick: bool = False
    processes: int = 1

    @property
    def warm_up_s(self) -> float:
        """What is served at the start of a generated workload but not counted."""
        return 0.0 if self.quick else WARM_UP * self.duration_s


QUICK: Final = Scale(seeds=2, rates=RATES[:1], duration_s=300.0, quick=True)


@dataclass
class Bench:
    """Runs settings over seeds and remembers every run."""

    scale: Scale
    runs: list[Run] = field(default_factory=list)

    def over_seeds(self, base: Setting, policies: Sequence[str]) -> dict[str, list[Run]]:
        """The runs of every policy, seed by seed."""
        settings = [one for policy in policies for one in with_seeds(replace(base, policy=policy), self.scale.seeds)]
        began, found = time.monotonic(), list(run_all(settings, processes=self.scale.processes))
        self.runs += found
        wish = base.wish
        words = (
            f"{base.deployments} {wish.workload} {wish.lengths} rate {wish.rate} cv {wish.cv:g} dram {base.dram_bytes}"
        )
        print(f"{words}: {len(found)} runs in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return {policy: [run for run in found if run.figures.policy == policy] for policy in policies}


def column(runs: Sequence[Run], figure: str) -> list[float]:
    """One figure of every run."""
    return [run.figures.numbers[figure] for run in runs]


def cell(runs: Sequence[Run], figure: str, digits: int = 2) -> str:
    """Its mean and interval."""
    return estimate(column(runs, figure)).text(digits)


def realised_line(runs: Sequence[Run]) -> str:
    """Realised rate and CV over the seeds."""
    rate = estimate([run.realised.rate for run in runs])
    cv = estimate([run.realised.cv for run in runs])
    return f"{rate.text()} | {cv.text(1)}"


# -- the experiments ---------------------------------------------------------------------------------------------------


def paper(bench: Bench) -> str:
    """See the module."""
    p99: list[list[str]] = []
    mean: list[list[str]] = []
    waited: list[list[str]] = []
    failed: list[list[str]] = []
    ratios: list[list[str]] = []
    for deployments in MODELS:
        for lengths in LENGTHS:
            for rate in bench.scale.rates:
                wish = replace(PAPER.wish, rate=rate, lengths=lengths, duration_s=bench.scale.duration_s)
                found = bench.over_seeds(
                    replace(PAPER, deployments=deployments, wish=wish, warm_up_s=bench.scale.warm_up_s), POLICIES
                )
                head = [f"{deployments.replace(':', ' × ')}, {lengths}, {rate:g}/s"]
                p99.append([*head, *(cell(found[policy], "startup_p99_s") for policy in POLICIES)])
                mean.append([*head, *(cell(found[policy], "startup_mean_s") for policy in POLICIES)])
                waited.append([*head, *(cell(found[policy], "waited_p99_s") for policy in POLICIES)])
                failed.append([*head, *(_failed(found[policy]) for policy in POLICIES)])
                ratios.append([*head, *_ratios(found), *realised_line(found["hearth"]).split(" | ")])
    names = [TITLES[policy] for policy in POLICIES]
    return "\n\n".join(
        [
            "P99 startup, seconds:",
            markdown(["", *names], p99),
            "Mean startup, seconds:",
            markdown(["", *names], mean),
            "P99 of the startup and all later pauses (being stopped for somebody else is waiting, too), seconds:",
            markdown(["", *names], waited),
            "Requests that failed (300 s), of 100:",
            markdown(["", *names], failed),
            "How many times Hearth's, pairs of the same seed; and what the workload really was:",
            markdown(
                [
                    "", "P99 random", "P99 Shepherd*-like", "P99 without migration", "mean Ray Serve-like",
                    "mean with local cache", "requests/s", "CV per deployment",
                ],
                ratios,
            ),
        ]
    )  # fmt: skip


def azure(bench: Bench) -> str:
    """See the module."""
    rows: list[list[str]] = []
    quick, duration_s = bench.scale.quick, min(3600.0, bench.scale.duration_s)
    cases = (
        (
            "Azure Functions 2019, from noon on",
            Wish(workload="azure-functions", from_s=NOON_S, duration_s=duration_s),
        ),
        ("Azure LLM code", Wish(workload="azure-code", duration_s=120.0 if quick else duration_s)),
        ("Azure LLM conversation", Wish(workload="azure-conv", duration_s=60.0 if quick else duration_s)),
    )
    for title, wish in cases:
        found = bench.over_seeds(Setting(wish=wish, deployments="opt-6.7b:32", target_concurrency=8), POLICIES)
        rows += [[f"{title}, {TITLES[policy]}", *_standard(found[policy])] for policy in POLICIES]
    return markdown(STANDARD, rows)


def deployments(bench: Bench) -> str:
    """See the module."""
    rows: list[list[str]] = []
    wish = Wish(rate=1.0, popularity="uniform", duration_s=bench.scale.duration_s)
    for count in (16, 128) if bench.scale.quick else (16, 32, 64, 96, 128, 192):
        base = replace(PAPER, wish=wish, deployments=f"opt-6.7b:{count}", warm_up_s=bench.scale.warm_up_s)
        found = bench.over_seeds(base, ("hearth", "no_prefetch", "random"))
        rows += [[f"{count} deployments, {TITLES[policy]}", *_standard(runs)] for policy, runs in found.items()]
    return markdown(STANDARD, rows)


def ahead(bench: Bench) -> str:
    """See the module."""
    rows: list[list[str]] = []
    duration_s = bench.scale.duration_s
    fits = replace(PAPER, wish=Wish(rate=1.4, popularity="uniform", duration_s=duration_s), deployments="opt-6.7b:32")
    more = replace(PAPER, wish=Wish(rate=1.4, popularity="zipf:1", duration_s=duration_s), deployments="opt-13b:64")
    cases = (
        ("32 of 6.7B, from an empty DRAM on", fits),
        ("32 of 6.7B, the second half", replace(fits, warm_up_s=bench.scale.warm_up_s)),
        ("64 of 13B, the second half", replace(more, warm_up_s=bench.scale.warm_up_s)),
    )
    for title, base in cases:
        found = bench.over_seeds(base, ("hearth", "no_prefetch"))
        rows += [
            [
                f"{title}, {TITLES[policy]}",
                *(cell(runs, figure) for figure in ("startup_mean_s", "startup_p50_s", "startup_p99_s")),
                *(cell(runs, figure, 0) for figure in ("prefetches", "loads", "loads_ssd")),
            ]
            for policy, runs in found.items()
        ]
    return markdown(["", "mean s", "P50 s", "P99 s", "prefetches", "loads", "from SSD"], rows)


def belady(bench: Bench) -> str:
    """See the module."""
    rows: list[list[str]] = []
    workloads = (
        ("gamma, CV 8", Wish(rate=1.0, duration_s=bench.scale.duration_s)),
        (
            "Azure Functions",
            Wish(workload="azure-functions", from_s=NOON_S, duration_s=300.0 if bench.scale.quick else 3600.0),
        ),
    )
    mixed = "opt-6.7b:32,opt-13b:16"
    for title, wish in workloads:
        for dram_gb in (448,) if bench.scale.quick else (448, 224, 112, 56):
            base = replace(PAPER, warm_up_s=0.0, wish=wish, deployments=mixed, dram_bytes=dram_gb * 10**9)
            runs = bench.over_seeds(base, ("hearth",))["hearth"]
            rows.append(
                [
                    f"{title}, {dram_gb} GB per server",
                    *(
                        cell(runs, figure)
                        for figure in (
                            "loads", "dram_hit_rate", "dram_belady_rate", "dram_most_rate", "dram_of_belady",
                            "dram_of_most",
                        )
                    ),
                ]
            )  # fmt: skip
    return markdown(
        ["", "loads", "hits", "Belady", "upper bound", "of Belady", "of the upper bound"],
        rows,
    )


def bursts(bench: Bench) -> str:
    """See the module."""
    rows: list[list[str]] = []
    for cv in (8.0,) if bench.scale.quick else (1.0, 4.0, 8.0):
        wish = Wish(rate=1.0, cv=cv, popularity="uniform", duration_s=bench.scale.duration_s)
        base = replace(PAPER, wish=wish, deployments="opt-6.7b:32", servers=1, warm_up_s=bench.scale.warm_up_s)
        found = bench.over_seeds(base, POLICIES)
        rows += [[f"CV {cv:g}, {TITLES[policy]}", *_standard(found[policy])] for policy in POLICIES]
    return markdown(STANDARD, rows)


STANDARD: Final = (
    "", "requests", "failed, of 100", "mean s", "P50 s", "P99 s", "P99 with pauses, s",
    "swaps/request", "hits in DRAM", "of the optimum",
    "moves", "parks",
)  # fmt: skip


def _standard(runs: Sequence[Run]) -> list[str]:
    return [
        cell(runs, "requests", 0), _failed(runs),
        *(cell(runs, figure) for figure in ("startup_mean_s", "startup_p50_s", "startup_p99_s", "waited_p99_s")),
        cell(runs, "swaps_per_request", 3), *(cell(runs, figure) for figure in ("dram_hit_rate", "dram_of_most")),
        *(cell(runs, figure, 1) for figure in ("moves", "parks")),
    ]  # fmt: skip


def _failed(runs: Sequence[Run]) -> str:
    pairs = zip(column(runs, "failed"), column(runs, "requests"), strict=True)
    return estimate([100 * failed / requests for failed, requests in pairs if requests]).text()


def _ratios(found: Mapping[str, Sequence[Run]]) -> list[str]:
    def times(policy: str, figure: str) -> str:
        one: Estimate = ratio(column(found[policy], figure), column(found["hearth"], figure))
        return one.text()

    return [
        times("random", "startup_p99_s"),
        times("shepherd", "startup_p99_s"),
        times("no_migration", "startup_p99_s"),
        times("ray_serve", "startup_mean_s"),
        times("ray_serve_cached", "startup_mean_s"),
    ]


EXPERIMENTS: Final[dict[str, Callable[[Bench], str]]] = {
    "paper": paper,
    "azure": azure,
    "deployments": deployments,
    "ahead": ahead,
    "belady": belady,
    "bursts": bursts,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--quick", action="store_true", help="a smoke run whose figures mean little")
    parser.add_argument("--seeds", type=int, help="how many (10; quick: 2)")
    parser.add_argument("--rates", help="requests per second of the paper's experiment, such as 0.8,1.4")
    parser.add_argument("--duration", type=float, help="seconds of a workload (3600; quick: 300)")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time, at most 2 (%(default)s)")
    parser.add_argument("--into", type=Path, help="a document whose marked part is replaced")
    parser.add_argument("--json", type=Path, help="keeps every run")
    chosen = parser.parse_args(arguments)
    scale = replace(QUICK if chosen.quick else Scale(), processes=chosen.processes)
    try:
        if chosen.seeds:
            scale = replace(scale, seeds=max(1, chosen.seeds))
        if chosen.rates:
            scale = replace(scale, rates=tuple(float(rate) for rate in chosen.rates.split(",")))
        if chosen.duration:
            scale = replace(scale, duration_s=chosen.duration)
    except ValueError:
        parser.error("--rates are numbers between commas")
    bench = Bench(scale)
    began = time.monotonic()
    try:
        text = EXPERIMENTS[chosen.experiment](bench)
    except HearthError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    took_s = time.monotonic() - began
    text += f"\n\n`{_command(chosen)}`: {len(bench.runs)} runs, {scale.seeds} seeds,"
    text += f" digest `{digest(bench.runs)}`, {took_s / 60:.0f} min."
    print(text)
    if chosen.json:
        chosen.json.write_text(json.dumps([_entry(run) for run in bench.runs]) + "\n", encoding="utf-8")
    if chosen.into:
        document = chosen.into.read_text(encoding="utf-8")
        chosen.into.write_text(put(document, f"experiment {chosen.experiment}", text), encoding="utf-8")
        print(f"written: {chosen.into}", file=sys.stderr)
    return 0


def _command(chosen: argparse.Namespace) -> str:
    """What somebody types to see the same."""
    words = ["python -m simulator.experiments", chosen.experiment, *(["--quick"] if chosen.quick else [])]
    words += [f"--{name} {value}" for name in ("seeds", "rates") if (value := getattr(chosen, name))]
    return " ".join([*words, *([f"--duration {chosen.duration:g}"] if chosen.duration else [])])


def _entry(run: Run) -> dict[str, Any]:
    numbers = {key: None if value != value else value for key, value in run.figures.numbers.items()}
    workload = {key: None if value != value else value for key, value in described_realised(run).items()}
    return {
        "setting": described(run.setting), "workload": workload, "digest": run.figures.digest, "figures": numbers,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
