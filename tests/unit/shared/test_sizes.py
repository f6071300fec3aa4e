"""Sizes, rates and times for people."""

from __future__ import annotations

import pytest

from shared.sizes import duration, rate, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1024, "1 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (int(99.6 * 2**20), "100 MiB"),
        (1001 * 2**20, "1001 MiB"),
        (2**30, "1 GiB"),
        (2.05e9, "1.91 GiB"),
        (2**50, "1024 TiB"),
        (-(2**20), "-1 MiB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_rates() -> None:
    assert rate(2.05e9) == "1.91 GiB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1.0, "0 s"),
        (0.0, "0 s"),
        (0.06, "60 ms"),
        (0.9996, "1.0 s"),
        (3.14, "3.1 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.7, "1 min"),
        (125.0, "2 min 5 s"),
        (3600.0, "1 h"),
        (11400.0, "3 h 10 min"),
        (4 * 86400 + 2 * 3600 + 59, "4 d 2 h"),
    ],
)
def test_times(seconds: float, text: str) -> None:
    assert duration(seconds) == text
