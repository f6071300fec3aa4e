"""What is learnt from the times between requests."""

from __future__ import annotations

import math
import random

import pytest

from services.scheduler.arrivals import ArrivalRules, Arrivals


def asked(*gaps_s: float, rules: ArrivalRules | None = None) -> tuple[Arrivals, float]:
    """Arrivals of `m` with these gaps, and the moment of the last."""
    arrivals, now = Arrivals(rules), 1000.0
    arrivals.came("m", now)
    for gap_s in gaps_s:
        now += gap_s
        arrivals.came("m", now)
    return arrivals, now


def test_a_deployment_that_has_told_little_is_held_as_long_as_its_operator_says() -> None:
    arrivals, _ = asked(*[2.0] * 7)
    assert arrivals.keep_alive_s("m", 60.0) == 60.0
    assert arrivals.keep_alive_s("never heard of", 60.0) == 60.0


def test_requests_that_come_in_time_are_held_for_and_those_that_do_not_are_let_go_of() -> None:
    arrivals, _ = asked(*[10.0] * 50)
    assert arrivals.keep_alive_s("m", 600.0) == 600.0
    assert arrivals.keep_alive_s("m", 5.0) == 1.0, "held for five seconds it would never be there in time"


def test_chance_is_held_for_if_a_cold_start_is_worth_more_than_the_mean_gap() -> None:
    dice = random.Random(1)
    arrivals, _ = asked(*[dice.expovariate(0.002) for _ in range(2000)])
    assert arrivals.keep_alive_s("m", 60.0) == 1.0
    assert arrivals.keep_alive_s("m", 3600.0) == 3600.0


def test_bursts_far_apart_are_let_go_of_when_they_are_over() -> None:
    arrivals, _ = asked(*([0.5] * 19 + [3600.0]) * 20)
    assert arrivals.keep_alive_s("m", 60.0) < 5.0
    assert arrivals.keep_alive_s("m", 600.0) < 20.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("worth_s", [20.0, 200.0])
def test_what_is_learnt_costs_hardly_more_than_any_fixed_keep_alive(seed: int, worth_s: float) -> None:
    dice = random.Random(seed)
    modes = [dice.uniform(0.2, 1000.0) for _ in range(3)]
    gaps = [dice.choice(modes) * dice.uniform(0.7, 1.4) for _ in range(3000)]
    arrivals, _ = asked(*gaps)

    def cost_s(keep_s: float) -> float:
        return sum(min(gap, keep_s) + (worth_s if gap > keep_s else 0.0) for gap in gaps)

    fixed = min(cost_s(1.0 + worth_s * part / 50.0) for part in range(50))
    assert cost_s(arrivals.keep_alive_s("m", worth_s)) <= 1.1 * fixed


def test_old_habits_fade() -> None:
    arrivals, _ = asked(*[10.0] * 1000, *[100.0] * 1500)
    assert arrivals.keep_alive_s("m", 60.0) < 5.0


def test_weights_stay_finite() -> None:
    arrivals, now = asked(*[3.0] * 20_000)
    assert arrivals.burstiness("m") == pytest.approx(0.0, abs=1e-3)
    assert math.isfinite(arrivals.next_within("m", 1.0, now))
    assert arrivals.keep_alive_s("m", 600.0) == 600.0


def test_the_rate_follows_the_demand_and_fades_without_it() -> None:
    arrivals, now = asked(*[2.0] * 600)
    assert arrivals.rate("m", now) == pytest.approx(0.5, rel=0.02)
    assert arrivals.rate("m", now + 300.0) == pytest.approx(0.5 / math.e, rel=0.03)
    assert arrivals.rate("other", now) == 0.0


def test_a_young_deployment_has_the_rate_that_it_has_shown_so_far() -> None:
    arrivals, now = asked(*[2.0] * 10)
    assert arrivals.rate("m", now) == pytest.approx(0.55, rel=0.1)


def test_burstiness_is_the_coefficient_of_variation() -> None:
    dice = random.Random(2)
    slow = ArrivalRules(fade=1e-5)
    assert asked(*[dice.expovariate(1.0) for _ in range(5000)], rules=slow)[0].burstiness("m") == pytest.approx(
        1, rel=0.1
    )
    clock, _ = asked(*[1.0] * 100)
    assert clock.burstiness("m") == pytest.approx(0.0, abs=1e-6)
    cv = 4.0
    gamma = [dice.gammavariate(1 / cv**2, cv**2) for _ in range(20_000)]
    assert asked(*gamma, rules=slow)[0].burstiness("m") == pytest.approx(cv, rel=0.15)
    assert Arrivals().burstiness("never heard of") == 1.0


def test_the_next_of_a_clock_is_expected_when_it_is_due() -> None:
    arrivals, now = asked(*[60.0] * 100)
    early = arrivals.next_within("m", 5.0, now + 10.0)
    due = arrivals.next_within("m", 20.0, now + 50.0)
    assert early < 0.02
    assert due > 0.9
    assert arrivals.next_within("never heard of", 60.0, now) == 0.0


def test_when_the_present_silence_is_longer_than_any_before_chance_decides() -> None:
    arrivals, now = asked(*[1.0] * 100)
    later = now + 500.0
    chance = -math.expm1(-arrivals.rate("m", later) * 10.0)
    assert arrivals.next_within("m", 10.0, later) == pytest.approx(chance, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_are_probabilities_and_grow_with_the_horizon(seed: int) -> None:
    dice = random.Random(seed)
    arrivals, now = asked(*[dice.choice([0.0, 0.3, 7.0, 900.0, 1e6]) * dice.random() for _ in range(200)])
    for silence_s in (0.0, 0.05, 3.0, 1e4, 1e7):
        odds = [arrivals.next_within("m", horizon_s, now + silence_s) for horizon_s in (0.0, 0.1, 1.0, 60.0, 1e5)]
        assert odds == sorted(odds)
        assert all(0.0 <= one <= 1.0 for one in odds)


def test_a_repeated_hint_is_no_arrival() -> None:
    arrivals = Arrivals()
    told = [
        arrivals.heard("m", 10.0, gateway_id="g", waiting=1),
        arrivals.heard("m", 11.0, gateway_id="g", waiting=1, oldest_s=1.0),
        arrivals.heard("m", 12.0, gateway_id="g", waiting=4, oldest_s=2.0),
        arrivals.heard("m", 12.5, gateway_id="h", waiting=1, oldest_s=0.0),
        arrivals.heard("m", 13.0, gateway_id="g", waiting=2, oldest_s=0.5),
        arrivals.heard("m", 13.5, gateway_id="g", waiting=0),
        arrivals.heard("m", 14.0, gateway_id="g", waiting=1, oldest_s=0.0),
    ]
    assert told == [1, 0, 3, 1, 2, 0, 1]


def test_what_is_gone_is_forgotten_and_what_is_remembered_is_bounded() -> None:
    arrivals = Arrivals(ArrivalRules(most=3))
    for number, name in enumerate("abcad"):
        arrivals.came(name, float(number))
    assert list(arrivals) == ["c", "a", "d"]
    assert arrivals.recent(2) == ["d", "a"]
    assert arrivals.last_at("a") == 3.0
    arrivals.forget("a")
    arrivals.keep_only(["d", "x"])
    assert (list(arrivals), len(arrivals), arrivals.last_at("a")) == (["d"], 1, None)
