"""Runs the claims, migrations and recoveries of gateways and workers in virtual time, a seed per run.

python -m simulator.protocol --seed 7 --trace     one run, with everything that happens
python -m simulator.protocol --seeds 0 1000       many; prints the command that replays the first that fails
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
from collections.abc import Callable

from simulator.scenario import Result, Scenario


def run(seed: int, trace: Callable[[str], None] | None = None) -> Result:
    """The run of a seed. Raises AssertionError, with the command that replays it, where an invariant breaks."""
    scenario = Scenario(random.Random(seed), trace=trace)
    try:
        return scenario.run()
    except AssertionError as error:
        error.add_note(f"at virtual second {scenario.kernel.now:.6f}; replay: {command(seed)}")
        raise


def command(seed: int) -> str:
    """What shows the run of a seed."""
    return f"python -m simulator.protocol --seed {seed} --trace"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if a run fails."""
    parser = argparse.ArgumentParser(prog="python -m simulator.protocol", description=__doc__)
    parser.add_argument("--seed", type=int, help="one run")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "LAST"), help="runs from FIRST to below LAST")
    parser.add_argument("--trace", action="store_true", help="print everything that happens")
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first seed that fails")
    chosen = parser.parse_args(arguments)
    first, last = chosen.seeds or (chosen.seed or 0, (chosen.seed or 0) + 1)
    failed = 0
    totals = dict.fromkeys(("streams", "complete", "failed", "committed", "aborted", "ended", "happened"), 0)
    for seed in range(first, last):
        try:
            result = run(seed, print if chosen.trace else None)
        except AssertionError:
            failed += 1
            print(f"seed {seed} fails:", file=sys.stderr)
            traceback.print_exc(limit=-3)
            print(f"replay: {command(seed)}", file=sys.stderr)
            if not chosen.keep_going:
                return 1
            continue
        for name in totals:
            totals[name] += getattr(result, name)
        if chosen.seed is not None:
            print(result)
    counted = ", ".join(f"{value} {name}" for name, value in totals.items())
    print(f"{last - first - failed} of {last - first} runs are right: {counted}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
