"""The eviction policy: how often, how dear, how large; ties by recency."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.bandwidth import MEASURED_BYTES, PRIOR_REMOTE, PRIOR_SSD, Bandwidths
from services.store.eviction import HALF_LIFE_S, Candidate, Uses, choose_victims, keep_value, ranked


def copy(key: str, room: int = 100, uses: float = 1.0, back: float | None = 10.0, recency: int = 0) -> Candidate[str]:
    return Candidate(key=key, room_bytes=room, uses_per_s=uses, bring_back_s=back, recency=recency)


def keys(victims: list[Candidate[str]] | None) -> list[str] | None:
    return None if victims is None else [one.key for one in victims]


def test_a_use_counts_half_after_a_half_life() -> None:
    uses: Uses[str] = Uses(half_life_s=100.0)
    uses.record("m", 0.0)
    assert uses.rate("m", 0.0) == pytest.approx(math.log(2) / 100)
    assert uses.rate("m", 100.0) == pytest.approx(math.log(2) / 200)
    uses.record("m", 100.0)
    assert uses.rate("m", 100.0) == pytest.approx(1.5 * math.log(2) / 100)
    assert (uses.rate("other", 0.0), uses.last("other"), uses.last("m")) == (0.0, None, 100.0)


def test_the_least_used_are_forgotten_when_there_are_too_many() -> None:
    uses: Uses[str] = Uses(remembered=4)
    for key in ("a", "a", "a", "b", "c", "c", "d"):
        uses.record(key, 0.0)
    assert uses.last("b") == 0.0

    uses.record("e", 1.0)

    known = {key for key in "abcde" if uses.last(key) is not None}
    assert known == {"a", "c", "e"}


def test_a_steady_rate_is_found_again() -> None:
    uses: Uses[str] = Uses()
    now = 0.0
    for _ in range(2000):
        now += 30.0
        uses.record("m", now)
    assert uses.rate("m", now) == pytest.approx(1 / 30, rel=0.01)
    assert uses.rate("m", now + 10 * HALF_LIFE_S) < 1 / 30_000


def test_the_value_is_seconds_saved_per_byte_and_second() -> None:
    assert keep_value(copy("m", room=50, uses=0.5, back=4.0)) == pytest.approx(0.04)
    assert keep_value(copy("gone", back=None, uses=0.0)) == math.inf


def test_what_is_dear_to_bring_back_stays_though_it_is_used_less() -> None:
    converted, read = copy("converted", uses=0.2, back=300.0), copy("read", uses=1.0, back=5.0)
    assert keys(choose_victims([converted, read], 100)) == ["read"]


def test_what_cannot_come_back_goes_last() -> None:
    assert keys(choose_victims([copy("only", back=None, uses=0.0), copy("busy", uses=100.0)], 100)) == ["busy"]


def test_ties_go_by_recency() -> None:
    unused = [copy(f"m{number}", uses=0.0, recency=number) for number in (3, 1, 2)]
    assert keys(ranked(unused)) == ["m1", "m2", "m3"]


def test_no_more_goes_than_has_to() -> None:
    small, large = copy("small", room=10, uses=0.0, recency=1), copy("large", room=100, uses=0.0, recency=2)
    assert keys(choose_victims([small, large], 100)) == ["large"]
    assert keys(choose_victims([small, large], 105)) == ["small", "large"]
    assert keys(choose_victims([small, large], 111)) is None
    assert keys(choose_victims([small, large], 0)) == []


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10), st.one_of(st.none(), st.floats(0, 100))), max_size=12),
    st.integers(0, 300),
)
def test_victims_make_room_and_none_of_them_is_needless(
    drawn: list[tuple[int, float, float | None]], need: int
) -> None:
    candidates = [copy(str(at), room, uses, back, at) for at, (room, uses, back) in enumerate(drawn)]
    victims = choose_victims(candidates, need)
    if victims is None:
        assert sum(one.room_bytes for one in candidates) < need
        return
    freed = sum(one.room_bytes for one in victims)
    assert freed >= need
    assert all(freed - one.room_bytes < need for one in victims)


def test_bandwidths_are_learnt_from_transfers_that_are_large_enough() -> None:
    speeds = Bandwidths()
    assert speeds.read_s(10**9) == 10**9 / PRIOR_SSD
    assert speeds.import_s(10**9) == 10**9 / PRIOR_REMOTE
    speeds.read(MEASURED_BYTES - 1, 0.001)
    speeds.read(MEASURED_BYTES, 0.0)
    assert speeds.ssd is None
    speeds.read(10**9, 0.5)
    speeds.read(10**9, 1.0)
    assert speeds.ssd == pytest.approx(2e9 - 0.3 * 1e9)
    speeds.fetched(10**9, 0, 10**9, 10.0)
    assert (speeds.remote, speeds.peer, speeds.imported) == (1e8, None, 1e8)
    speeds.fetched(10**8, 9 * 10**8, 10**9, 1.0)
    assert (speeds.remote, speeds.peer) == (1e8, 9e8)
    assert speeds.import_s(10**9, own=2e9) == 0.5
