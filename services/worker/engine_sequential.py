"""One sequence at a time, with transformers' ordinary KV cache: for architectures that cannot be batched.

The cache of a sequence that is over stays until the next one begins, which goes on from there if its tokens begin with
those in the cache: rounds of growing prefixes compute only the difference. Where the tokens part before the end of the
cache, it is cut there, if it is one that can be cut (recurrent states and sliding windows cannot).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

import torch

from services.worker.engine_thread import Submission
from services.worker.ports import EndReason, EngineEvent, SequenceEnd, StepToken
from services.worker.sampling import SamplingRow, choose
from shared.errors import Code, HearthError
from shared.sizes import size

SLICE_TOKENS: Final = 128  # most tokens of one step: between two slices of a prefill it can be cancelled


class SequentialStepper:
    """The plain decode loop, first come first served. See `Stepper`.

    `kv_bytes` bounds the KV cache of the one running sequence, at `kv_bytes_per_token`. Raises HearthError:
    OUT_OF_MEMORY when that is not even two tokens.
    """

    name = "sequential"
    slots = 1

    def __init__(
        self,
        model: Any,
        *,
        kv_bytes: int,
        kv_bytes_per_token: int,
        max_context_tokens: int,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self.max_sequence_tokens = min(max_context_tokens, kv_bytes // kv_bytes_per_token)
        if self.max_sequence_tokens < 2:
            raise HearthError(Code.OUT_OF_MEMORY, f"A KV cache of {size(kv_bytes)} holds not two tokens of this model.")
        self.memory_bytes = self.max_sequence_tokens * kv_bytes_per_token
        self._kv_bytes_per_token = kv_bytes_per_token
        self.vocab_tokens = int(model.config.get_text_config().vocab_size)
        self.eos_token_ids = frozenset(eos_token_ids)
        self._model = model
        self._waiting: OrderedDict[str, Submission] = OrderedDict()
        self._running: Submission | None = None
        self._row: SamplingRow | None = None
        self._cache: Any = None
        self._held: list[int] = []  # tokens in the cache
        self._unseen: list[int] = []  # tokens of the running sequence that are not in the cache yet
        self._cached_tokens = 0
        self._made_tokens = 0

    @property
    def kv_used_bytes(self) -> int:
        """See `Engine`."""
        return self._kv_bytes_per_token * len(self._held) if self._running is not None else 0

    def start(self) -> None:
        """See `Stepper`."""
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)

    def add(self, submission: Submission) -> None:
        """See `Stepper`."""
        self._waiting[submission.sequence_id] = submission

    def remove(self, sequence_id: str) -> None:
        """See `Stepper`."""
        self._waiting.pop(sequence_id, None)
        if self._running is not None and self._running.sequence_id == sequence_id:
            self._drop()

    @torch.no_grad()
    def step(self) -> list[EngineEvent]:
        """See `Stepper`."""
        if self._running is None:
            self._begin()
        running, row = self._running, self._row
        if running is None or row is None:
            return []
        piece, self._unseen = self._unseen[:SLICE_TOKENS], self._unseen[SLICE_TOKENS:]
        output = self._model(
            input_ids=torch.tensor([piece], device=self._model.device), past_key_values=self._cache, use_cache=True
        )
        self._cache = output.past_key_values
        self._held += piece
        if self._unseen:
            return []
        tokens, logprobs = choose(output.logits[:, -1], [row])
        token_id = int(tokens[0])
        row.push(token_id)
        self._made_tokens += 1
        self._unseen = [token_id]
        events: list[EngineEvent] = [StepToken(running.sequence_id, token_id, logprobs[0])]
        stopped = token_id in running.stop_token_ids
        if stopped or self._made_tokens >= running.max_new_tokens:
            self._drop()
            reason = EndReason.STOP if stopped else EndReason.LENGTH
            events.append(SequenceEnd(running.sequence_id, reason, cached_tokens=self._cached_tokens))
        return events

    def close(self) -> None:
        """See `Stepper`."""
        self._waiting.clear()
        self._drop()
        self._model = self._cache = None
        self._held = []

    def _begin(self) -> None:
        if self._waiting:
            _, self._running = self._waiting.popitem(last=False)
            self._row = SamplingRow(self._running.sampling, self._running.token_ids, self._running.first_index)
            self._cached_tokens = self._share(self._running.token_ids)
            self._unseen = self._running.token_ids[self._cached_tokens :]
            self._made_tokens = 0

    def _share(self, token_ids: list[int]) -> int:
        """Make the cache one of the first so many of these tokens, at most all but the last; returns how many."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        most = min(len(self._held), len(token_ids) - 1)
        common = next((at for at in range(most) if self._held[at] != token_ids[at]), most)
        if common == 0 or (
            common < len(self._held) and not all(type(layer) is DynamicLayer for layer in self._cache.layers)
        ):
            self._cache, self._held = DynamicCache(config=self._model.config), []
            return 0
        if common < len(self._held):
            self._cache.crop(common - len(self._held))
            del self._held[common:]
        return common

    def _drop(self) -> None:
        self._running = self._row = None
        self._unseen = []
