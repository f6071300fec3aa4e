"""`python -m simulator simulate|plan|profile`: what `hearth` starts for these verbs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Final

from shared.errors import HearthError

VERBS: Final = {
    "simulate": "run a modelled fleet in virtual time and show what its users would see",
    "plan": "find how many servers and how much DRAM a workload needs",
    "profile": "measure this machine, and write what was found as a profile",
}
MODULES: Final = {"simulate": "simulator.simulate", "plan": "simulator.plan", "profile": "simulator.measure"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; its exit code (1: it could not be, 2: wrong usage)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in VERBS:
        listing = "\n".join(f"  {name:10}{text}" for name, text in VERBS.items())
        print(f"usage: python -m simulator VERB …\n\n{listing}", file=sys.stderr)
        return 2
    verb = words[0]
    module = importlib.import_module(MODULES[verb])
    parser = argparse.ArgumentParser(prog=f"hearth {verb}", description=module.__doc__, allow_abbrev=False)
    module.options(parser)
    chosen = parser.parse_args(words[1:])
    try:
        return int(getattr(module, verb)(chosen))
    except HearthError as error:
        print(f"hearth: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"hearth: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
