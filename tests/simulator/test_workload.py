"""Workloads are what they say: the rate, the CV, the popularity, the lengths; the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.errors import HearthError
from simulator.fleet.model import ModelProfile, ModelSpec
from simulator.workload import popularity
from simulator.workload.arrivals import MINUTE_S, Times, gamma, in_minutes, poisson
from simulator.workload.files import lengths, minute_counts, own_trace, recorded
from simulator.workload.lengths import tokens, within
from simulator.workload.named import Wish, cut, faster, make
from simulator.workload.trace import variation

NAMES = [f"m{number}" for number in range(12)]
CV = 8.0
RUNS = 1500
# Of a window in which `EXPECTED` requests are due.
EXPECTED = 60.0
WINDOW_S = 600.0


def dice(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def naive(rate: float, cv: float, duration_s: float, generator: np.random.Generator) -> Times:
    """The usual mistake: an ordinary renewal process that is begun anew in every window."""
    shape = 1 / cv**2
    times = np.cumsum(generator.gamma(shape, 1 / (rate * shape), 2_000))
    assert times[-1] > duration_s
    return times[times < duration_s]


def counts_of(process: object) -> np.ndarray:
    assert callable(process)
    return np.array([len(process(EXPECTED / WINDOW_S, CV, WINDOW_S, dice(seed))) for seed in range(RUNS)])


def far_from(counts: np.ndarray, expected: float) -> float:
    """How many standard errors the mean lies above what was expected."""
    return float((counts.mean() - expected) / (counts.std() / np.sqrt(len(counts))))


def test_a_bursty_process_has_the_rate_that_was_asked_for_in_every_window() -> None:
    counts = counts_of(gamma)

    assert abs(far_from(counts, EXPECTED)) < 4


def test_the_windowed_way_has_half_a_cluster_more_in_every_window() -> None:
    counts = counts_of(naive)

    assert far_from(counts, EXPECTED) > 8
    assert counts.mean() - EXPECTED == pytest.approx((CV**2 - 1) / 2, rel=0.35)


def test_a_bursty_process_has_the_cv_that_was_asked_for() -> None:
    times = gamma(10.0, CV, 400_000.0, dice(1))

    assert variation(np.diff(times)) == pytest.approx(CV, rel=0.05)
    assert len(times) / 400_000 == pytest.approx(10.0, rel=0.05)


def test_a_bursty_process_is_one_process_however_long_it_is_looked_at() -> None:
    short, long = gamma(1.0, CV, 3_000.0, dice(3)), gamma(1.0, CV, 9_000.0, dice(3))

    assert np.array_equal(short, long[long < 3_000.0])


def test_poisson_has_its_rate_and_the_cv_of_chance() -> None:
    times = poisson(5.0, 20_000.0, dice(1))

    assert len(times) / 20_000 == pytest.approx(5.0, rel=0.03)
    assert variation(np.diff(times)) == pytest.approx(1.0, rel=0.03)


def test_requests_of_a_minute_come_within_it() -> None:
    counts = [3, 0, 5, 2]

    times = in_minutes(counts, dice(1))

    assert np.bincount((times // MINUTE_S).astype(int), minlength=4).tolist() == counts
    assert np.all(np.diff(times) >= 0)


def test_minutes_can_be_thinned_and_thickened_without_a_bias() -> None:
    counts = [1] * 4000

    assert len(in_minutes(counts, dice(1), factor=0.1)) == pytest.approx(400, rel=0.2)
    assert len(in_minutes(counts, dice(1), factor=2.5)) == pytest.approx(10_000, rel=0.02)


def test_zipf_ranks_fall_with_the_exponent() -> None:
    shares = popularity.zipf(4, 1.0)

    assert shares.tolist() == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    assert popularity.zipf(4, 0.0).tolist() == popularity.uniform(4).tolist()


def test_few_deployments_have_busy_and_rare_functions_among_them() -> None:
    calls = list(range(100))

    assert popularity.functions_of(4, calls).tolist() == [99, 74, 49, 24]
    assert popularity.functions_of(103, calls).tolist()[99:] == [0, 99, 98, 97]


def test_tokens_of_a_text_are_words_numbers_and_signs() -> None:
    assert tokens("Janet sells 16 - 3 eggs.") == 7
    assert tokens("extraordinarily 123456") == 2 + 2
    assert tokens("") == 1


def test_gsm8k_is_what_was_asked_and_answered() -> None:
    found = lengths("gsm8k")

    assert len(found.prompt_tokens) == 1319
    assert 40 < np.median(found.prompt_tokens) < 70
    assert 40 < np.median(found.output_tokens) < 100


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(HearthError, match="there are gsm8k, sharegpt"):
        lengths("sharegtp")
    with pytest.raises(HearthError, match="there are gamma, poisson"):
        make(Wish(workload="gama"), NAMES, 1)
    with pytest.raises(HearthError, match="there are uniform, zipf"):
        make(Wish(popularity="zip:1"), NAMES, 1)


def test_the_traces_are_whole() -> None:
    at_s, prompts, outputs = recorded("azure-code")

    assert minute_counts().shape == (100, 1440)
    assert int(minute_counts().sum()) == 666_572
    assert len(at_s) == len(prompts) == len(outputs) == 8_819
    assert variation(np.diff(at_s)) == pytest.approx(13.15, abs=0.01)
    assert float(np.diff(at_s).max()) == pytest.approx(217, abs=1)


def test_lengths_are_cut_to_the_models_context() -> None:
    prompts, outputs = within(
        np.array([10, 3000, 3000], np.int32), np.array([20, 100, 3000], np.int32), np.array([2048] * 3, np.int32)
    )

    assert list(zip(prompts.tolist(), outputs.tolist(), strict=True)) == [(10, 20), (1948, 100), (1024, 1024)]


@pytest.mark.parametrize("workload", ["gamma", "poisson", "azure-functions", "azure-code", "azure-conv"])
def test_a_workload_is_a_function_of_its_seed(workload: str) -> None:
    wish = Wish(workload=workload, rate=2.0, duration_s=600.0)

    one, again, other = (make(wish, NAMES, seed) for seed in (1, 1, 2))

    assert one.digest == again.digest != other.digest
    assert len(one) > 100
    assert np.all(np.diff(one.at_s) >= 0)
    assert float(one.at_s.max()) < 600.0


def test_what_was_really_drawn_is_published() -> None:
    trace = make(Wish(workload="gamma", rate=20.0, duration_s=20_000.0, popularity="uniform"), NAMES[:2], 1)

    found = trace.realised()

    assert found.requests == len(trace)
    assert found.rate == pytest.approx(len(trace) / 20_000)
    assert found.cv == pytest.approx(CV, rel=0.15)
    assert found.deployments_used == 2


def test_a_faster_trace_keeps_its_cv_and_a_cut_one_its_beginning() -> None:
    trace = make(Wish(workload="azure-code"), NAMES, 1)

    twice = faster(trace, 2 * len(trace) / trace.duration_s)

    assert twice.duration_s == pytest.approx(trace.duration_s / 2)
    assert twice.realised().cv_all == pytest.approx(trace.realised().cv_all)
    assert len(cut(trace, 60.0)) == int((trace.at_s < 60).sum())


def test_arrivals_are_the_columns_one_by_one() -> None:
    model = ModelProfile(
        name="tiny", weight_bytes=1, kv_bytes_per_token=1, prefill_token_s=0.1, step_s=0.1, max_context_tokens=64
    )
    trace = make(Wish(rate=1.0, duration_s=600.0), ["a", "b"], 4)
    trace = trace.for_models([ModelSpec(name=name, model=model) for name in ("x", "y")])

    found = list(trace.arrivals())

    assert [one.at_s for one in found] == trace.at_s.tolist()
    assert {one.deployment for one in found} <= {"x", "y"}
    assert all(one.prompt_tokens + one.output_tokens <= 64 for one in found)


def test_a_users_trace_is_read_in_the_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("at_s,model,prompt_tokens,output_tokens\n2.5,b,10,20\n0.5,a,1,2\n")

    trace = make(Wish(workload=str(path)), (), 1)

    assert list(trace.arrivals()) == [(0.5, "a", 1, 2), (2.5, "b", 10, 20)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("at,model\n", "no column 'at_s'"),
        ("at_s,model,prompt_tokens,output_tokens\n", "has no requests"),
        ("at_s,model,prompt_tokens,output_tokens\nsoon,a,1,2\n", "line 2: at_s is 'soon'"),
        ("at_s,model,prompt_tokens,output_tokens\n-1,a,1,2\n", "line 2: at_s is '-1'"),
        ("at_s,model,prompt_tokens,output_tokens\n1,,1,2\n", "line 2: the model is missing"),
        ("at_s,model,prompt_tokens,output_tokens\n1,a,0,2\n", "line 2: tokens are"),
        ("at_s,model,prompt_tokens,output_tokens\n1,a\n", "line 2: prompt_tokens is None"),
    ],
)
def test_a_bad_trace_is_told_where(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)

    with pytest.raises(HearthError, match=told):
        own_trace(path)
