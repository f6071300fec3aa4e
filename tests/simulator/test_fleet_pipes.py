"""Bandwidth that is shared: who gets how much, and when what has arrived."""

from __future__ import annotations

import pytest

from simulator.fleet.pipes import Flow, Pipe, Plumbing
from simulator.kernel import Kernel


class Bench:
    """Flows by name, and when they ended."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.plumbing = Plumbing(self.kernel)
        self.ended: dict[str, float] = {}

    def flow(self, name: str, size: float, *pipes: Pipe, priority: int = 0) -> Flow:
        def done() -> None:
            self.ended[name] = self.kernel.now

        return self.plumbing.start(pipes, size, priority, done)


def test_one_flow_has_all_of_a_pipe() -> None:
    bench = Bench()
    bench.flow("a", 100.0, Pipe(10.0))
    bench.kernel.run(60.0)
    assert bench.ended == {"a": pytest.approx(10.0)}


def test_two_flows_share_evenly_and_the_rest_is_faster_when_one_ends() -> None:
    bench, pipe = Bench(), Pipe(10.0)
    bench.flow("a", 50.0, pipe)
    bench.flow("b", 100.0, pipe)
    bench.kernel.run(60.0)
    assert bench.ended == {"a": pytest.approx(10.0), "b": pytest.approx(15.0)}


def test_who_comes_later_slows_who_is_there() -> None:
    bench, pipe = Bench(), Pipe(10.0)
    bench.flow("a", 100.0, pipe)
    bench.kernel.run(5.0)
    bench.flow("b", 25.0, pipe)
    bench.kernel.run(60.0)
    assert bench.ended == {"b": pytest.approx(10.0), "a": pytest.approx(12.5)}


def test_what_is_urgent_goes_alone() -> None:
    bench, pipe = Bench(), Pipe(10.0)
    bench.flow("prefetch", 100.0, pipe, priority=2)
    bench.kernel.run(1.0)
    bench.flow("user", 50.0, pipe, priority=0)
    bench.kernel.run(60.0)
    assert bench.ended == {"user": pytest.approx(6.0), "prefetch": pytest.approx(15.0)}


def test_a_flow_that_becomes_urgent_overtakes() -> None:
    bench, pipe = Bench(), Pipe(10.0)
    slow = bench.flow("a", 50.0, pipe, priority=2)
    bench.flow("b", 100.0, pipe, priority=0)
    bench.kernel.run(2.0)
    bench.plumbing.urge(slow, 0)
    bench.kernel.run(60.0)
    assert bench.ended == {"a": pytest.approx(12.0), "b": pytest.approx(15.0)}


def test_the_narrowest_pipe_counts() -> None:
    bench, wide, narrow = Bench(), Pipe(100.0), Pipe(5.0)
    bench.flow("a", 50.0, wide, narrow)
    bench.kernel.run(60.0)
    assert bench.ended == {"a": pytest.approx(10.0)}


def test_one_flow_gets_no_more_than_its_most() -> None:
    bench = Bench()
    bench.flow("a", 50.0, Pipe(100.0, 10.0))
    bench.kernel.run(60.0)
    assert bench.ended == {"a": pytest.approx(5.0)}


def test_a_flow_that_is_stopped_never_ends_and_leaves_its_share() -> None:
    bench, pipe = Bench(), Pipe(10.0)
    stopped = bench.flow("a", 1000.0, pipe)
    bench.flow("b", 100.0, pipe)
    bench.kernel.run(10.0)
    assert bench.plumbing.done_bytes(stopped) == pytest.approx(50.0)
    bench.plumbing.stop(stopped)
    bench.plumbing.stop(stopped)
    bench.kernel.run(60.0)
    assert bench.ended == {"b": pytest.approx(15.0)}
    assert not pipe.flows
