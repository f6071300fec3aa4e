"""The installer's judgement: causes of failures, missing modules, what is worth showing."""

from __future__ import annotations

import pytest

from services.cli.install import cause_of, interesting, missing_module


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("... NewConnectionError: [Errno -3] Temporary failure in name resolution", "index cannot be reached"),
        (
            "Retrying after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for torch~=2.13.0",
            "index cannot be reached",
        ),
        ("ERROR: No matching distribution found for torch~=2.13.0", "does not exist for this machine"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "disk is full"),
        ("PermissionError: [Errno 13] Permission denied: '/x'", "could not be written"),
        ("anything else", "its output above"),
    ],
)
def test_causes(output: str, says: str) -> None:
    assert says in cause_of(output)


def test_a_python_without_venv_names_the_package() -> None:
    assert missing_module((3, 12), lambda name: True) is None
    sentence = missing_module((3, 12), lambda name: name != "ensurepip")
    assert sentence is not None and "python3.12-venv" in sentence


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Collecting torch~=2.13.0 (from x)", "collecting torch~=2.13.0"),
        ("  Downloading torch-2.13.0-cp311-none-linux_x86_64.whl (530.7 MB)", "downloading torch-2.13.0 (530.7 MB)"),
        ("Installing collected packages: a, b", "unpacking"),
        ("Requirement already satisfied: a", ""),
    ],
)
def test_what_is_shown_of_pip(line: str, shown: str) -> None:
    assert interesting(line) == shown
