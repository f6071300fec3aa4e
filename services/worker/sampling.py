"""How the next token is chosen, for every sequence of a batch by its own `Sampling`, independently of the batch.

A token is `argmax(score / temperature + g)` over the tokens that pass top-k, top-p and min-p, where g is Gumbel noise
(the Gumbel-max trick: Gumbel, *Statistical theory of extreme values*, 1954; see also Maddison, Tarlow, Minka, *A\\*
Sampling*, 2014). The noise is *counter-based* (the idea of Salmon et al., *Parallel random numbers: as easy as 1, 2,
3*, 2011): a pure function of (seed, index of the token, token id), computed with integer operations that are the same
on every device, so the stream does not depend on the batch, the worker or the past of a generator, and a request that
moves goes on exactly as it would have.

The key of (seed, index) is SplitMix64 (Steele, Lea, Flood, *Fast splittable pseudorandom number generators*, 2014), the
hash over token ids is the 32-bit finaliser "lowbias32" (Wellons, *Prospecting for hash functions*, 2018) keyed twice.

The order is that of transformers: bias and penalties, temperature, top-k, top-p, min-p. Each filter keeps a set that is
defined by a threshold (tokens that tie with the last kept one are kept), so the result never depends on how a sort
orders equal scores. Penalties follow OpenAI (presence and frequency: over the output) and transformers (repetition:
over prompt and output).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from services.worker.ports import PositionLogprobs
from shared.contracts.requests import Sampling

GREEDY_TEMPERATURE: Final = 1e-5  # below this the scores would overflow, and the result is the argmax anyway
FIRST_CANDIDATES: Final = 256  # how many of the best tokens a filter looks at first; then 16 times as many, then all
NOISE_ELEMENTS: Final = 1 << 17  # how many noise values are computed at a time: what fits a CPU's cache

_MASK64: Final = (1 << 64) - 1
_GOLDEN64: Final = 0x9E3779B97F4A7C15


class SamplingRow:
    """One sequence's sampling and what it has to remember. `index` is the index of the next output token.

    The last `first_index` of `token_ids` are the output so far.
    """

    def __init__(self, sampling: Sampling, token_ids: Sequence[int], first_index: int) -> None:
        self.sampling = sampling
        self.index = first_index
        self.greedy = sampling.temperature < GREEDY_TEMPERATURE
        self.penalised = bool(
            sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
        )
        self.edited = self.penalised or bool(sampling.logit_bias)
        self.filtered = not self.greedy and (sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0)
        self._seen: set[int] = set()
        self._counts: dict[int, int] = {}
        if self.penalised:
            start = len(token_ids) - first_index
            self._seen.update(token_ids[:start])
            for token_id in token_ids[start:]:
                self._count(token_id)

    @property
    def plain(self) -> bool:
        """Whether the next token is just the argmax."""
        return self.greedy and not self.edited and self.sampling.logprobs is None

    def push(self, token_id: int) -> None:
        """The token that was chosen for `index`."""
        self.index += 1
        if self.penalised:
            self._count(token_id)

    def edit(self, scores: torch.Tensor) -> None:
        """Apply bias and penalties in place. `scores`: (vocabulary,), float32."""
        sampling = self.sampling
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=scores.device)
            scores[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=scores.dtype, device=scores.device)
        if sampling.repetition_penalty != 1.0 and self._seen:
            ids = torch.tensor(sorted(self._seen), device=scores.device)
            values = scores[ids]
            scores[ids] = torch.where(
                values < 0, values * sampling.repetition_penalty, values / sampling.repetition_penalty
            )
        if (sampling.presence_penalty or sampling.frequency_penalty) and self._counts:
            ids = torch.tensor(list(self._counts), device=scores.device)
            counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype, device=scores.device)
            scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts

    def _count(self, token_id: int) -> None:
        self._seen.add(token_id)
        self._counts[token_id] = self._counts.get(token_id, 0) + 1


def choose(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[torch.Tensor, list[PositionLogprobs | None]]:
    """The next token of each row, int64 of shape (rows,), and the logprobs of those that ask for them.

    `scores`: (rows, vocabulary), the model's logits; not changed. The rows are not told their tokens (`push`).
    """
    scores = scores.float()
    if all(row.plain for row in rows):
        return scores.argmax(dim=-1), [None] * len(rows)
    edited = scores
    if any(row.edited for row in rows):
        edited = scores.clone()
        for position, row in enumerate(rows):
            if row.edited:
                row.edit(edited[position])
    tokens = edited.argmax(dim=-1)
    free = [position for position, row in enumerate(rows) if not row.greedy and not row.filtered]
    if free:
        tokens[free] = _choose_from_all(_select(edited, free), [rows[position] for position in free])
    filtered = [position for position, row in enumerate(rows) if row.filtered]
    if filtered:
        tokens[filtered] = _choose_filtered(_select(edited, filtered), [rows[position] for position in filtered])
    logprobs: list[PositionLogprobs | None] = [None] * len(rows)
    for position, row in enumerate(rows):
        if row.sampling.logprobs is not None:
            logprobs[position] = _logprobs(scores[position], int(tokens[position]), row.sampling.logprobs)
    return tokens, logprobs


def gumbel_noise(token_ids: torch.Tensor, keys: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Standard Gumbel noise, float32 of shape (keys, tokens): a pure function of each (key, token id).

    `token_ids`: int32, of shape (tokens,) or (keys, tokens). `keys`: from `noise_key`.
    """
    first = torch.tensor([[key[0]] for key in keys], dtype=torch.int32, device=token_ids.device)
    second = torch.tensor([[key[1]] for key in keys], dtype=torch.int32, device=token_ids.device)
    # int32 multiplication wraps; >> is arithmetic, so each shift is masked to be a logical one.
    bits = (token_ids * _signed32(0x9E3779B1)) ^ first
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _signed32(0x7FEB352D)
    bits += second
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _signed32(0x846CA68B)
    bits ^= (bits >> 16) & 0xFFFF
    # uniform in (0, 1): fine-grained near 0, where the large values of the noise come from
    uniform = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def noise_key(seed: int, index: int) -> tuple[int, int]:
    """Two signed 32-bit numbers from a request's seed and the index of a token, by SplitMix64."""
    state = _mix64((seed & _MASK64) + _GOLDEN64)
    state = _mix64((state ^ (index & _MASK64)) + _GOLDEN64)
    return _signed32(state & 0xFFFFFFFF), _signed32(state >> 32)


def _select(scores: torch.Tensor, positions: list[int]) -> torch.Tensor:
    return scores if len(positions) == scores.shape[0] else scores[positions]


def _temperatures(rows: Sequence[SamplingRow], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[row.sampling.temperature] for row in rows], dtype=like.dtype, device=like.device)


def _keys(rows: Sequence[SamplingRow]) -> list[tuple[int, int]]:
    return [noise_key(row.sampling.seed, row.index) for row in rows]


def _choose_from_all(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    vocab = scores.shape[-1]
    ids = torch.arange(vocab, dtype=torch.int32, device=scores.device)
    temperatures, keys = _temperatures(rows, scores), _keys(rows)
    at_once = len(rows) if scores.is_cuda else max(1, NOISE_ELEMENTS // vocab)
    tokens = []
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        tokens.append(gumbel_noise(ids, keys[part]).add_(scores[part] / temperatures[part]).argmax(dim=-1))
    return torch.cat(tokens)


def _choose_filtered(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    vocab = scores.shape[-1]
    scores = scores / _temperatures(rows, scores)
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=scores.device)
    open_rows = list(range(len(rows)))
    candidates = min(
        vocab, max([FIRST_CANDIDATES, *(2 * row.sampling.top_k for row in rows if row.sampling.top_k < vocab)])
    )
    while open_rows:
        part = _select(scores, open_rows)
        these = [rows[position] for position in open_rows]
        values, ids = part.topk(candidates, dim=-1)
        thresholds = _thresholds(part, values, these)
        # Decided only if a token below the threshold is among the candidates: then they hold everything above it.
        decided = (values[:, -1] < thresholds) if candidates < vocab else torch.ones_like(thresholds, dtype=torch.bool)
        noisy = gumbel_noise(ids.to(torch.int32), _keys(these)).add_(values)
        noisy.masked_fill_(values < thresholds[:, None], -torch.inf)
        chosen = ids.gather(1, noisy.argmax(dim=-1, keepdim=True))[:, 0]
        flags = decided.tolist()
        done = [position for position, flag in enumerate(flags) if flag]
        if done:
            tokens[[open_rows[position] for position in done]] = chosen[done]
        open_rows = [open_rows[position] for position, flag in enumerate(flags) if not flag]
        candidates = min(vocab, 16 * candidates)
    return tokens


def _thresholds(scores: torch.Tensor, values: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The lowest score that passes all filters of each row, as far as the candidates tell; shape (rows,).

    `scores`: (rows, vocabulary) divided by temperature; `values`: (rows, candidates), the best of them, descending. A
    threshold that lies below all candidates comes out as minus infinity (the row is then not decided).
    """
    count = values.shape[-1]
    thresholds = torch.full((len(rows),), -torch.inf, dtype=scores.dtype, device=scores.device)
    top_k = [row.sampling.top_k for row in rows]
    for position, limit in enumerate(top_k):
        if 0 < limit < count:
            thresholds[position] = values[position, limit - 1]
    if any(row.sampling.top_p < 1.0 for row in rows):
        kept = values.masked_fill(values < thresholds[:, None], -torch.inf)
        # Without top-k the probabilities are over the whole vocabulary, with it over what it kept.
        total = torch.where(thresholds > -torch.inf, kept.logsumexp(dim=-1), scores.logsumexp(dim=-1))
        probabilities = (kept - total[:, None]).exp()
        before = probabilities.cumsum(dim=-1) - probabilities
        limits = torch.tensor([[row.sampling.top_p] for row in rows], dtype=scores.dtype, device=scores.device)
        inside = (before < limits) & (kept > -torch.inf)
        inside[:, 0] = True  # at least one token
        last = inside.sum(dim=-1, keepdim=True) - 1
        by_mass = values.gather(1, last)[:, 0]
        covered = (last[:, 0] < count - 1) & (limits[:, 0] < 1.0)
        thresholds = torch.where(covered, torch.maximum(thresholds, by_mass), thresholds)
    for position, row in enumerate(rows):
        if row.sampling.min_p > 0.0:
            floor = values[position, 0] + math.log(min(row.sampling.min_p, 1.0))
            thresholds[position] = torch.maximum(thresholds[position], floor)
    return thresholds


def _logprobs(scores: torch.Tensor, token_id: int, count: int) -> PositionLogprobs:
    logprobs = scores.log_softmax(dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if count > 0:
        values, ids = logprobs.topk(min(count, logprobs.shape[-1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return PositionLogprobs(chosen=float(logprobs[token_id]), top=top)


def _mix64(state: int) -> int:
    state &= _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def _signed32(bits: int) -> int:
    return bits - (1 << 32) if bits & 0x80000000 else bits
