"""Speeds of larger models are the line through those that were measured, unless noise would make it fall."""

from __future__ import annotations

import pytest

from simulator.measure import line, processor


def test_what_does_not_depend_on_the_size_shows_in_the_difference() -> None:
    start, slope = line([10.0, 30.0], [5.0, 11.0])

    assert start + slope * 100 == pytest.approx(2.0 + 0.3 * 100)


@pytest.mark.parametrize("measured", [[5.0, 4.0], [1.0, 11.0]])
def test_noise_never_makes_a_larger_model_faster_or_a_start_negative(measured: list[float]) -> None:
    start, slope = line([10.0, 30.0], measured)

    assert (start, slope) == (0.0, pytest.approx(measured[1] / 30))


def test_the_processor_has_a_name() -> None:
    assert processor()
