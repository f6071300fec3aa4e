"""What the scheduler is told of requests that run nowhere."""

from __future__ import annotations

import msgspec
import pytest

from services.gateway import core as c
from tests.unit.gateway.bench import UNAVAILABLE, Bench, only, request


def hints(out: list[c.Action]) -> list[tuple[int, float]]:
    return [(hint.waiting, round(hint.oldest_s, 6)) for hint in only(out, c.Hint)]


def test_the_first_hint_comes_at_once_and_is_repeated_every_second_with_number_and_age() -> None:
    bench = Bench()
    bench.admit("a")
    assert hints(bench.do(c.Published("a", 0, 1))) == [(1, 0.0)]
    bench.now = 0.5
    bench.admit("b")
    assert hints(bench.do(c.Published("b", 0, 2))) == [(2, 0.5)]
    assert hints(bench.until(3.6)) == [(2, 1.5), (2, 2.5), (2, 3.5)]


def test_when_the_oldest_runs_the_next_one_is_the_oldest_and_when_all_run_that_is_told_once() -> None:
    bench = Bench()
    for second, name in enumerate("ab"):
        bench.now = float(second)
        bench.admit(name)
        bench.do(c.Published(name, 0, second + 1))
    bench.now = 1.5
    bench.own("a", sequence=1)
    assert hints(bench.until(2.5)) == [(1, 1.0)]
    bench.own("b", sequence=2)
    assert hints(bench.until(30.0)) == [(0, 0.0)]


def test_requests_that_are_claimed_before_anybody_was_told_are_not_told_of() -> None:
    bench = Bench()
    for name, sequence in (("a", 1), ("b", 2)):
        bench.admit(name)
        bench.own(name, sequence=sequence)
        assert hints(bench.do(c.Published(name, 0, sequence))) == []
    assert hints(bench.until(0.4)) == []


def test_who_waits_again_before_it_was_told_that_nobody_does_is_told_of_instead() -> None:
    bench = Bench()
    bench.begin("a", 1)
    bench.now = 0.02
    bench.admit("b")
    assert hints(bench.do(c.Published("b", 0, 2))) == [(1, 0.0)]
    assert hints(bench.until(0.9)) == []


def test_a_request_that_loses_its_owner_waits_again_from_then_on() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.until(0.3)
    bench.frame(1)
    bench.now = 5.0
    bench.give_back()
    assert hints(bench.until(7.5)) == [(1, 1.0), (1, 2.0)]
    bench.own(worker="w2", delivery=2, sequence=17)
    assert hints(bench.until(7.9)) == [(0, 0.0)]


def test_a_request_that_migrates_waits_for_nobody() -> None:
    bench = Bench()
    bench.begin(tokens=1)
    bench.until(0.3)
    bench.own(worker="w2", after_epoch=1, claim_id="m1")
    assert hints(bench.until(0.75)) == []


@pytest.mark.parametrize("how", ["left", "unpublished", "gone", "late"])
def test_whoever_waits_no_more_for_whatever_reason_is_not_told_of(how: str) -> None:
    bench = Bench()
    bench.admit("a", n=2, budget_s=10.0)
    bench.do(c.Published("a-0", 0, 1))
    ends: dict[str, c.Event] = {
        "left": c.ClientLeft("a"),
        "unpublished": c.PublishFailed("a-1", 0, UNAVAILABLE),
        "gone": c.DeploymentGone("m"),
    }
    if how in ends:
        bench.now = 0.4
        bench.do(ends[how])
        assert hints(bench.until(20.0)) == [(0, 0.0)]
    else:
        assert hints(bench.until(20.0)) == [(2, float(second)) for second in range(1, 10)] + [(0, 0.0)]
    assert bench.core.deadline() is None


def test_every_deployment_has_hints_of_its_own() -> None:
    bench = Bench()
    for name, sequence in (("m", 1), ("n", 2)):
        one = msgspec.structs.replace(request(name), deployment=name)
        bench.do(
            c.Admitted(
                call_id=name,
                deployment=name,
                slug=f"{name}-1",
                requests=(one,),
                queue_limit=1,
                budget_s=9.0,
                stream=False,
            )
        )
        bench.do(c.Published(name, 0, sequence))
    bench.own("m", sequence=1)
    told = only(bench.until(0.4), c.Hint) + only(bench.until(1.1), c.Hint)
    assert told == [c.Hint("m", 0, 0.0), c.Hint("n", 1, 1.0)]
