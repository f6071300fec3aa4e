"""The benchmark of whole hints: each is answered with a load, a stop or neither, as the state of the cluster asks."""

from __future__ import annotations

from benchmarks.handling import measure_handling


def test_every_hint_comes_to_something() -> None:
    cold = measure_handling((4, 2, 40), "cold", 6, 1)
    assert cold["hints"] == 6
    assert cold["outcomes"]["loads"] > 0
    saturated = measure_handling((4, 2, 40), "saturated", 6, 1)
    assert saturated["outcomes"] == {"loads": 0, "stops": 0, "neither": 6}
