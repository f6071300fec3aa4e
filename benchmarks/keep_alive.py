"""How long idle replicas are held: a day of a real serverless fleet, fixed keep-alives against learnt ones.

    python -m benchmarks.keep_alive [--seeds 3] [--quick]

The trace is Azure Functions 2019 (`simulator/data`): 100 functions, calls per minute, spread at random within it.
Function k is deployment k. A call that finds its replica gone is a cold start. *Held* are the hours during which
replicas stood idle, all together; *both* adds what the cold starts are worth, each as many seconds of an idle replica
as the operator's `keep_alive_s` says. Calls take no time, so that a policy is charged for all that lies between two of
them. Learnt keep-alives are those of `services/scheduler/arrivals.py`, the production code, which hears of every call.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from benchmarks.report import show, write
from services.scheduler.arrivals import Arrivals
from simulator.workload.files import minute_counts

# The calls of a deployment, and what a cold start is worth in seconds → the keep-alive at the end of each call.
Policy: TypeAlias = Callable[[Sequence[float], float], Callable[[float], float]]


def calls(minutes: Sequence[int], seed: str) -> list[float]:
    """Moments of one function's calls, in order."""
    generator = random.Random(seed)
    return [
        at
        for minute, count in enumerate(minutes)
        for at in sorted(generator.uniform(60.0 * minute, 60.0 * (minute + 1)) for _ in range(count))
    ]


def replay(trace: Sequence[float], keep_s: Callable[[float], float]) -> tuple[int, float]:
    """Cold starts, and seconds for which a replica was held idle. `keep_s` is asked when a call ends."""
    cold, held_s = 1, 0.0
    keep = keep_s(trace[0])
    for before, at in itertools.pairwise(trace):
        cold += at - before > keep
        held_s += min(at - before, keep)
        keep = keep_s(at)
    return cold, held_s + keep


def following(trace: Sequence[float]) -> Iterator[float]:
    """Seconds from each call to the next; from the last one, for ever."""
    yield from (later - before for before, later in itertools.pairwise(trace))
    yield math.inf


def foreseen(trace: Sequence[float], worth_s: float) -> Callable[[float], float]:
    """The least that anybody could pay who knew the next call: held until then, or not at all."""
    gaps = following(trace)

    def keep_s(_: float) -> float:
        gap_s = next(gaps)
        return gap_s if gap_s <= worth_s else 0.0

    return keep_s


def learnt(trace: Sequence[float], most_s: float) -> Callable[[float], float]:
    """The keep-alive that a deployment's own arrivals say, each heard when it comes."""
    arrivals, gaps = Arrivals(), following(trace)
    least_s = arrivals.rules.least_s

    def keep_s(now: float) -> float:
        arrivals.came("m", now)
        # It is held for so long in any case, which saves most of the reckoning for those that are always asked.
        return least_s if next(gaps) <= least_s else arrivals.keep_alive_s("m", most_s)

    return keep_s


def main() -> None:
    """Replay every policy; table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the calls within their minutes")
    parser.add_argument("--quick", action="store_true", help="one draw")
    options = parser.parse_args()
    table: list[list[int]] = minute_counts().tolist()
    policies: dict[str, tuple[float, Policy]] = {}
    for worth_s in (60.0, 600.0, 3600.0):
        policies[f"fixed, {worth_s:.0f} s"] = worth_s, lambda _trace, worth_s: lambda _now: worth_s
        policies[f"learnt, at most {worth_s:.0f} s"] = worth_s, learnt
        policies[f"foreseen, for {worth_s:.0f} s"] = worth_s, foreseen
    draws = [
        [calls(minutes, f"{seed}/{number}") for number, minutes in enumerate(table) if sum(minutes)]
        for seed in range(1 if options.quick else options.seeds)
    ]
    total = statistics.fmean(sum(len(trace) for trace in traces) for traces in draws)
    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    for name, (worth_s, make) in policies.items():
        found = [[replay(trace, make(trace, worth_s)) for trace in traces] for traces in draws]
        cold = statistics.fmean(sum(one for one, _ in each) for each in found)
        hours = statistics.fmean(sum(one for _, one in each) for each in found) / 3600.0
        cost_h = hours + cold * worth_s / 3600.0
        figures.append({"policy": name, "cold_starts": cold, "held_h": hours, "cost_h": cost_h})
        rows.append([name, f"{cold:.0f}", f"{100 * cold / total:.2f} %", f"{hours:.1f}", f"{cost_h:.1f}"])
    show(
        f"A day of {len(draws[0])} deployments, {total:.0f} calls, mean of {len(draws)} draws",
        ["keep-alive", "cold starts", "of the calls", "held, hours", "both, hours"],
        rows,
    )
    write("keep_alive", {"options": vars(options), "calls": total, "policies": figures})


if __name__ == "__main__":
    main()
