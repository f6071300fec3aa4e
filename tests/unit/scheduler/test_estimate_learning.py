"""Levels and lines: how quickly they follow, and what they do not believe."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.learning import Fit, Level, Straight

FIGURES = st.floats(min_value=1e-3, max_value=1e3)


def taught(*figures: float) -> float:
    level = Level()
    for figure in figures:
        level.learn(figure)
    assert level.value is not None
    return level.value


def test_the_first_figures_count_alike() -> None:
    assert taught(1.0) == 1.0
    assert taught(1.0, 4.0) == pytest.approx(2.0), "the geometric mean"


def test_a_level_is_the_middle_of_what_is_sometimes_slow() -> None:
    assert taught(*[1.0, 1.0, 1.0, 1.9] * 10) == pytest.approx(1.15, abs=0.15)


def test_an_odd_figure_counts_little_and_two_in_a_row_count() -> None:
    steady = (1.0,) * 6
    assert taught(*steady, 100.0) == pytest.approx(1.0, rel=0.2)
    assert taught(*steady, 100.0, 1.0, 100.0, 1.0) < 2.0, "never twice in a row"
    assert taught(*steady, *[5.0] * 4) == pytest.approx(5.0, rel=0.25)
    assert taught(*steady, *[0.2] * 4) == pytest.approx(0.2, rel=0.25)


@settings(deadline=None, max_examples=50)
@given(st.lists(FIGURES, min_size=1, max_size=30))
def test_a_level_is_never_beyond_what_it_was_taught(figures: list[float]) -> None:
    assert min(figures) * (1 - 1e-9) <= taught(*figures) <= max(figures) * (1 + 1e-9)


def test_a_fit_finds_base_and_slope() -> None:
    fit = Fit(Straight(1.0, 0.1), 10.0)
    for _ in range(12):
        for x in (0.0, 5.0, 20.0):
            fit.learn(x, 3.0 + 0.5 * x)
    assert fit.line.slope == pytest.approx(0.5, rel=0.05)
    assert fit.line.base == pytest.approx(3.0, rel=0.05)


def test_points_of_one_size_do_not_tilt_it() -> None:
    fit = Fit(Straight(1.0, 0.1), 10.0)
    for _ in range(500):
        fit.learn(10.0, 20.1)
    assert fit.line.at(10.0) == pytest.approx(20.1, rel=0.02)
    assert 0.0 < fit.line.at(0.0) < fit.line.at(5.0) < fit.line.at(20.0)


def test_small_points_do_not_spoil_the_slope() -> None:
    fit = Fit(Straight(1.0, 0.1), 10.0)
    for _ in range(10):
        fit.learn(10.0, 20.0)
    for _ in range(3):
        fit.learn(0.01, 0.5)
    assert fit.line.at(10.0) == pytest.approx(20.0, rel=0.05)
    assert fit.line.at(0.0) == pytest.approx(0.5, rel=0.25)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(min_value=0, max_value=1e3), FIGURES), max_size=30))
def test_a_line_never_falls_and_is_never_negative(points: list[tuple[float, float]]) -> None:
    fit = Fit(Straight(1.0, 0.1), 10.0)
    for x, y in points:
        fit.learn(x, y)
        assert fit.line.slope >= 0.0
        assert fit.line.base >= 0.0
