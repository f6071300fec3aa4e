"""`hearth simulate|plan|profile`: the simulator is a program of its own, which reads its own options."""

from __future__ import annotations

import argparse
import runpy
import sys


def simulate(options: argparse.Namespace) -> int:
    """Run the verb in this process as `python -m simulator` does; its exit code."""
    sys.argv = ["simulator", options.verb, *options.rest]
    try:
        runpy.run_module("simulator", run_name="__main__", alter_sys=True)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    return 0
