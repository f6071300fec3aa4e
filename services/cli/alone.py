"""Run one service in this process: `hearth gateway|scheduler|worker|store`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import cast


def alone(options: argparse.Namespace) -> int:
    """Run the service that the verb names; its exit code."""
    try:
        module = importlib.import_module(f"services.{options.verb}.main")
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in {"services", "shared"}:
            raise
        print(
            f"hearth {options.verb}: the Python package {missing!r} is not installed here; ./hearth installs "
            "everything, pip install -e '.[store,worker]' does as well.",
            file=sys.stderr,
        )
        return 1
    return cast(Callable[[], int], module.main)()
