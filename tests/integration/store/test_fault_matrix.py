"""The fault matrix of the store: whatever fails wherever, nothing is claimed that is not there, and it recovers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.store.fault_matrix import OPERATIONS

MATRICES_AT_ONCE = 4


def problems(operation: str, home: Path, *more: str) -> tuple[list[str], int]:
    """What went wrong in the matrix of one operation, and how many cases it has. In a process without threads."""
    command = [sys.executable, "-m", "tests.integration.store.fault_matrix", operation, str(home), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *found, last = [json.loads(line) for line in done.stdout.splitlines()]
    return found, last["cases"]


@pytest.fixture(scope="module")
def matrices(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[tuple[list[str], int]]]]:
    """The matrices of the operations that are asked for. They mostly wait for the disk: several at the same time."""
    asked = [
        str(item.callspec.params["operation"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and "matrices" in item.fixturenames
    ]
    with ThreadPoolExecutor(MATRICES_AT_ONCE) as threads:
        yield {
            operation: threads.submit(problems, operation, tmp_path_factory.mktemp(operation)) for operation in asked
        }


@pytest.mark.timeout(300)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fault_at_every_call_leaves_nothing_false_and_nothing_behind(
    operation: str, matrices: dict[str, Future[tuple[list[str], int]]]
) -> None:
    found, cases = matrices[operation].result()
    assert found == []
    assert cases > 10


@pytest.mark.by_hand
@pytest.mark.timeout(900)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_fault_at_every_call(operation: str, tmp_path: Path) -> None:
    found, cases = problems(operation, tmp_path, "--all")
    assert found == []
    assert cases > 30
