"""`python -m tests.chaos --seconds 3600 --seed 7`: prints a table, writes JSON, exits with 1 if anything failed."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import run


def main() -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long things go wrong")
    parser.add_argument("--seed", type=int, default=1, help="what goes wrong when, and what is asked")
    parser.add_argument("--every", type=float, default=3.0, help="mean seconds between two faults")
    parser.add_argument("--clients", type=int, default=12, help="streams at the same time")
    parser.add_argument("--at-once", type=int, default=2, help="most faults at the same time")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--home", type=Path, help="keep data and logs there instead of in a temporary directory")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hearth-chaos-") as temporary:
        report, tails = run(
            asked.home or Path(temporary),
            seed=asked.seed,
            seconds=asked.seconds,
            every_s=asked.every,
            clients=asked.clients,
            at_once=asked.at_once,
        )
    if asked.json:
        asked.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    print(report.as_table())
    if report.failures:
        print(tails)
        print(f"again: python -m tests.chaos --seconds {asked.seconds:.0f} --seed {asked.seed} --every {asked.every}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
