"""`python -m benchmarks.migration` runs. Its figures are for people; that no client sees an error is for tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.migration import SHAPE
from benchmarks.models import generate

pytestmark = [pytest.mark.torch, pytest.mark.by_hand, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    generate(directory / SHAPE, SHAPE, "float32")
    return directory


@pytest.mark.parametrize(
    ("mode", "table"),
    [
        ((), "| context | rounds | last gap |"),
        (("--recovery",), "| kill -9 |"),
        (("--drain",), "| 1 | 16 | loaded first |"),
    ],
    ids=["migration", "recovery", "drain"],
)
def test_a_smoke_run_ends_without_an_error_for_any_client(generated: Path, mode: tuple[str, ...], table: str) -> None:
    command = [sys.executable, "-m", "benchmarks.migration", "--quick", "--no-plot", "--scratch", str(generated), *mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert table in done.stdout
