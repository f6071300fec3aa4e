"""Sampling against straightforward references, and the noise that it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from services.worker import sampling
from services.worker.sampling import SamplingRow, choose, gumbel_noise, noise_key
from shared.contracts.requests import Sampling

pytestmark = pytest.mark.torch

VOCAB = 1000
KEY_42_7 = (322561280, 369503596)
NOISE_42_7 = [0.622539, 0.60485, -0.697689]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scores_of(rows: int, seed: int = 0, vocab: int = VOCAB, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def pick(scores: torch.Tensor, *rows: SamplingRow) -> list[int]:
    tokens: list[int] = choose(scores, rows)[0].tolist()
    return tokens


def row(index: int = 0, token_ids: Sequence[int] = (1,), **fields: Any) -> SamplingRow:
    return SamplingRow(Sampling(**fields), token_ids, index)


def allowed_by_reference(scores: torch.Tensor, how: Sampling) -> set[int]:
    """The tokens that pass all filters, one filter after another on probabilities, the slow way."""
    scores = scores.double() / how.temperature
    keep = set(range(len(scores)))
    if how.top_k > 0:
        lowest = sorted(scores.tolist(), reverse=True)[min(how.top_k, len(scores)) - 1]
        keep = {token for token in keep if float(scores[token]) >= lowest}
    if how.top_p < 1.0:
        total = sum(math.exp(float(scores[token])) for token in keep)
        kept: set[int] = set()
        mass = 0.0
        for token in sorted(keep, key=lambda token: -float(scores[token])):
            if kept and mass >= how.top_p:
                break
            kept.add(token)
            mass += math.exp(float(scores[token])) / total
        keep = kept
    if how.min_p > 0.0:
        best = max(float(scores[token]) for token in keep)
        keep = {token for token in keep if float(scores[token]) >= best + math.log(how.min_p)}
    return keep


FILTERS = [
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=500),
    Sampling(top_k=5000),
    Sampling(top_p=0.3),
    Sampling(top_p=0.95),
    Sampling(top_p=0.9999),
    Sampling(top_p=0.0),
    Sampling(min_p=0.2),
    Sampling(min_p=0.0001),
    Sampling(top_k=20, top_p=0.8),
    Sampling(top_k=20, top_p=0.8, min_p=0.3, temperature=2.0),
    Sampling(top_p=0.9, temperature=0.3),
]


@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_a_filter_keeps_exactly_what_the_reference_keeps(how: Sampling) -> None:
    scores = scores_of(1, seed=3)
    allowed = allowed_by_reference(scores[0], how)
    indices = range(600)
    chosen = set(pick(scores.expand(600, -1), *(SamplingRow(how, (1,), index) for index in indices)))
    assert chosen <= allowed
    # and everything that is likely enough comes
    probabilities = (
        torch.zeros(VOCAB).index_fill(0, torch.tensor(sorted(allowed)), 1.0) * (scores[0] / how.temperature).exp()
    )
    probabilities /= probabilities.sum()
    assert {token for token in allowed if probabilities[token] > 0.05} <= chosen


def test_flat_scores_need_more_candidates_than_the_first_look() -> None:
    scores = torch.zeros(1, 5000)  # all tie: every filter keeps them all
    chosen = {pick(scores, row(index, top_p=0.5))[0] for index in range(50)}
    assert max(chosen) > sampling.FIRST_CANDIDATES
    assert len(chosen) > 40


def test_scores_that_tie_with_the_last_kept_one_are_kept() -> None:
    scores = torch.tensor([[5.0, 4.0, 4.0, 4.0, 1.0]])
    chosen = {pick(scores, row(index, top_k=2, temperature=5.0))[0] for index in range(200)}
    assert chosen == {0, 1, 2, 3}


def test_temperature_zero_is_the_argmax() -> None:
    scores = scores_of(8)
    rows = [row(temperature=0.0) for _ in range(8)]
    assert pick(scores, *rows) == scores.argmax(dim=-1).tolist()
    rows[3] = row(temperature=1.0)  # the others do not care that one is sampled
    mixed = pick(scores, *rows)
    assert [token for position, token in enumerate(mixed) if position != 3] == [
        token for position, token in enumerate(scores.argmax(dim=-1).tolist()) if position != 3
    ]


def test_frequencies_follow_the_softmax() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    count = 20_000
    tokens = choose(scores.expand(count, -1), [row(index, seed=11) for index in range(count)])[0]
    seen = torch.bincount(tokens, minlength=4) / count
    assert torch.allclose(seen, scores[0].softmax(dim=-1), atol=0.012)


def test_a_token_depends_on_seed_and_index_and_on_nothing_else() -> None:
    scores = scores_of(40)
    how: list[dict[str, Any]] = [
        {},
        {"top_k": 9},
        {"top_p": 0.7},
        {"temperature": 0.6, "min_p": 0.02},
        {"temperature": 0.0},
    ]
    alone = [pick(scores[i : i + 1], row(i, seed=i * 7, **how[i % 5]))[0] for i in range(40)]
    together = pick(scores, *(row(i, seed=i * 7, **how[i % 5]) for i in range(40)))
    backwards = pick(scores.flip(0), *(row(i, seed=i * 7, **how[i % 5]) for i in reversed(range(40))))
    assert alone == together == backwards[::-1]
    assert together != pick(scores, *(row(i, seed=i * 7 + 1, **how[i % 5]) for i in range(40)))
    assert together != pick(scores, *(row(i + 1, seed=i * 7, **how[i % 5]) for i in range(40)))


def test_penalties_and_bias_against_their_definitions() -> None:
    prompt, output = [1, 2, 2, 3], [3, 4, 4, 4]
    scores = scores_of(1, vocab=10)[0]
    how = Sampling(
        temperature=0.0,
        presence_penalty=0.7,
        frequency_penalty=0.3,
        repetition_penalty=1.4,
        logit_bias={5: 2.5, 1: -1.0},
    )
    state = SamplingRow(how, prompt + output[:-1], len(output) - 1)
    state.push(output[-1])
    expected = scores.clone()
    expected[5] += 2.5
    expected[1] -= 1.0
    for token in set(prompt + output):
        expected[token] = expected[token] * 1.4 if expected[token] < 0 else expected[token] / 1.4
    for token in set(output):
        expected[token] -= 0.7 + 0.3 * output.count(token)
    edited = scores.clone()
    state.edit(edited)
    assert torch.allclose(edited, expected)
    before = scores.clone()
    assert pick(scores[None], state) == [int(expected.argmax())]
    assert torch.equal(scores, before), "the model's scores were changed"


def test_a_resumed_row_is_the_row_that_went_on() -> None:
    how = Sampling(presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.2, seed=5)
    going, tokens = SamplingRow(how, [7, 8], 0), [7, 8]
    for step in range(12):
        resumed = SamplingRow(how, tokens, len(tokens) - 2)
        scores = scores_of(1, seed=step)
        token = pick(scores, going)[0]
        assert pick(scores, resumed) == [token]
        going.push(token)
        tokens.append(token)


def test_logprobs_are_those_of_the_model_itself() -> None:
    scores = scores_of(2)
    rows = [row(temperature=0.0, logprobs=3, logit_bias={4: 100.0}), row(temperature=0.5, logprobs=0, top_k=3)]
    tokens, logprobs = choose(scores, rows)
    assert tokens[0] == 4
    plain = scores.log_softmax(dim=-1)
    first, second = logprobs
    assert first is not None
    assert second is not None
    assert first.chosen == pytest.approx(float(plain[0, 4]))
    values, ids = plain[0].topk(3)
    assert [token for token, _ in first.top] == ids.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist())
    assert second.top == ()
    assert second.chosen == pytest.approx(float(plain[1, tokens[1]]))
    assert choose(scores, [row(), row()])[1] == [None, None]


def test_the_noise_is_standard_gumbel_and_independent() -> None:
    ids = torch.arange(50_000, dtype=torch.int32)
    noise = gumbel_noise(ids, [noise_key(1, 0), noise_key(1, 1), noise_key(2, 0)])
    assert noise.shape == (3, 50_000)
    assert bool(noise.isfinite().all())
    for one in noise:
        assert float(one.mean()) == pytest.approx(0.5772, abs=0.02)
        assert float(one.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    # Kolmogorov-Smirnov distance to the distribution function exp(-exp(-x)): below 1.63 / sqrt(n) in 99 of 100 cases
    for one in noise:
        at = one.sort().values
        distance = ((-(-at).exp()).exp() - torch.arange(1, 50_001) / 50_000).abs().max()
        assert float(distance) < 1.63 / math.sqrt(50_000)
    correlations = torch.corrcoef(torch.cat([noise, noise[:1].roll(1, dims=1)]))
    assert float((correlations - torch.eye(4)).abs().max()) < 0.02


def test_the_noise_of_a_token_does_not_depend_on_the_others() -> None:
    keys = [noise_key(seed, index) for seed, index in ((0, 0), (2**64 - 1, 5), (12345, 10**9))]
    whole = gumbel_noise(torch.arange(300, dtype=torch.int32), keys)
    part = gumbel_noise(torch.tensor([[7, 299], [7, 299], [7, 299]], dtype=torch.int32), keys)
    assert torch.equal(part, whole[:, [7, 299]])


def test_the_noise_stays_what_it_is() -> None:
    """A running request may move to a worker of another version: these values are part of the protocol."""
    assert noise_key(42, 7) == KEY_42_7
    assert gumbel_noise(torch.tensor([0, 1, 31999], dtype=torch.int32), [noise_key(42, 7)])[
        0
    ].tolist() == pytest.approx(NOISE_42_7, abs=1e-5)
