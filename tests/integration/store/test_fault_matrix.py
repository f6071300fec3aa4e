"""The fault matrix of the store: whatever fails wherever, nothing is claimed that is not there, and it recovers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.store.fault_matrix import OPERATIONS


def problems(operation: str, home: Path, *more: str) -> tuple[list[str], int]:
    """What went wrong in the matrix of one operation, and how many cases it has. In a process without threads."""
    command = [sys.executable, "-m", "tests.integration.store.fault_matrix", operation, str(home), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *found, last = [json.loads(line) for line in done.stdout.splitlines()]
    return found, last["cases"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fault_at_every_call_leaves_nothing_false_and_nothing_behind(operation: str, tmp_path: Path) -> None:
    found, cases = problems(operation, tmp_path)
    assert found == []
    assert cases > 10


@pytest.mark.by_hand
@pytest.mark.timeout(900)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_fault_at_every_call(operation: str, tmp_path: Path) -> None:
    found, cases = problems(operation, tmp_path, "--all")
    assert found == []
    assert cases > 30
