"""`hearth test`: the linters and the tests, as `.ci/run` runs them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from services.cli import servers

ROOT: Final = Path(__file__).resolve().parent.parent.parent
# Cheap ones first. Each part may stand alone: `hearth test unit -k placement`.
PARTS: Final = ("unit", "contracts", "simulator", "integration", "e2e")
# What only computes: every core of the machine gets a share of it, file by file, so that what a file makes for all its
# tests (a model, a server) is made once. The files that take longest come first, and nobody waits for them at the end.
# All the other tests are processes that wait for each other, and are run one after another: their clocks are real.
COMPUTING: Final = ("simulator", "unit", "contracts")
MOST_AT_ONCE: Final = 4  # each imports torch
SHARED: Final = [
    "-n", "logical", "--maxprocesses", str(MOST_AT_ONCE), "--dist", "loadfile", "--no-loadscope-reorder",
]  # fmt: skip
LINT_IMPORTS: Final = "from importlinter.cli import lint_imports_command; lint_imports_command()"
LINTERS: Final[tuple[tuple[str, list[str]], ...]] = (
    ("ruff check", ["-m", "ruff", "check", "."]),
    ("ruff format", ["-m", "ruff", "format", "--check", "."]),
    ("mypy", ["-m", "mypy"]),
    ("import-linter", ["-c", LINT_IMPORTS, "--no-cache"]),
)


def plan(rest: list[str], existing: frozenset[str]) -> list[tuple[str, list[str]]]:
    """(title, arguments for Python) of every step. `existing` are the folders of `tests` that are there.

    Nothing: everything. `lint`: the linters. Names of parts: these parts. Anything else is pytest's.
    """
    if not rest:
        return [*LINTERS, *_all(existing)]
    parts: list[str] = []
    while rest and rest[0] in {*PARTS, "lint"}:
        parts.append(rest[0])
        rest = rest[1:]
    if rest[:1] == ["--"]:
        rest = rest[1:]
    steps: list[tuple[str, list[str]]] = []
    if "lint" in parts:
        steps += LINTERS
    wanted = [part for part in PARTS if part in parts]
    if parts and not wanted:
        return steps
    folders = [f"tests/{part}" for part in wanted if part in existing]
    steps.append((" ".join(["pytest", *folders, *rest]), ["-m", "pytest", *folders, *rest]))
    return steps


def _all(existing: frozenset[str]) -> list[tuple[str, list[str]]]:
    folders = [f"tests/{part}" for part in COMPUTING if part in existing]
    others = [f"--ignore={folder}" for folder in folders]
    steps = [(" ".join(["pytest", *folders]), ["-m", "pytest", *SHARED, *folders])] if folders else []
    return [*steps, (" ".join(["pytest", *others]), ["-m", "pytest", *others])]


def test(options: argparse.Namespace) -> int:
    """Run `hearth test`. The exit code is that of the first step that failed; every linter runs all the same."""
    if options.rest[:1] and options.rest[0] in {"-h", "--help"}:
        return 0
    existing = frozenset(path.name for path in (ROOT / "tests").iterdir() if path.is_dir())
    steps = plan(options.rest, existing)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEARTH_")}
    if any("pytest" in arguments for _, arguments in steps):
        try:
            programs = servers.obtain(("nats-server", "redis-server"), ROOT / ".hearth" / "programs", _say)
        except servers.ServersError as error:
            _say(str(error))
            return 1
        for program in programs.values():
            environment |= program.environment()
        folders = [str(program.path.parent) for program in programs.values()]
        environment["PATH"] = os.pathsep.join([environment.get("PATH", ""), *folders])
    code = 0
    for title, arguments in steps:
        _say(title)
        began_s = time.monotonic()
        ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=False).returncode
        code = code or (128 - ended if ended < 0 else ended)
        _say(f"{title}: {'passed' if ended == 0 else 'FAILED'} in {time.monotonic() - began_s:.1f} s")
    return code


def _say(text: str) -> None:
    print(f"hearth test: {text}", file=sys.stderr, flush=True)
