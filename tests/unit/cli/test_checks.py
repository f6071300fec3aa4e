"""What `hearth test` runs."""

from __future__ import annotations

import pytest

from services.cli.checks import LINTERS, SHARED, plan

EXISTING = frozenset({"unit", "contracts", "integration"})


def test_everything_by_default() -> None:
    steps = plan([], EXISTING)
    assert steps[: len(LINTERS)] == list(LINTERS)
    computing, others = (step for _, step in steps[len(LINTERS) :])
    assert computing == ["-m", "pytest", *SHARED, "tests/unit", "tests/contracts"]
    assert others == ["-m", "pytest", "--ignore=tests/unit", "--ignore=tests/contracts"], "what is new is among these"


@pytest.mark.parametrize(
    ("rest", "arguments"),
    [
        (["unit", "-k", "foo"], ["tests/unit", "-k", "foo"]),
        (["integration", "unit"], ["tests/unit", "tests/integration"]),
        (["tests/unit/cli", "-x"], ["tests/unit/cli", "-x"]),
        (["unit", "--", "-m", "not torch"], ["tests/unit", "-m", "not torch"]),
    ],
)
def test_parts_and_pytests_own_arguments(rest: list[str], arguments: list[str]) -> None:
    assert [step for _, step in plan(rest, EXISTING)] == [["-m", "pytest", *arguments]]


def test_linters_alone() -> None:
    assert plan(["lint"], EXISTING) == list(LINTERS)
