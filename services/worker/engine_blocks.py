"""Who gets the blocks of the KV cache: what this engine does otherwise than transformers' continuous batching.

Transformers' scheduler admits a sequence when its first slice fits, and when a block is missing it takes away the
blocks of whichever sequence asked last in this step, and forgets every shared prefix at once. `BlockScheduler` keeps
the order of arrival instead, as vLLM does (Kwon et al., *Efficient memory management for large language model serving
with PagedAttention*, SOSP 2023, section 4.5): a sequence begins when there is room for all of its tokens, the newest
one is put off when an older one needs a block, one that was put off goes on before any that has not begun, and shared
prefixes are forgotten block by block, least recently used first, when their blocks are needed.

`share_blocks` changes two things of the paged cache: the blocks that a sequence completes in its very last step are
kept for sharing too, and blocks are found by keyed 128-bit hashes instead of 64-bit ones without a key. A hash covers
the tokens of its block and the hash of the block before it, so that equal hashes mean equal prefixes; only full blocks
have one. As nothing compares the tokens themselves, nobody must be able to make two prefixes that share a hash.

`read_into_buffers` is for the CPU: every layer of every step copies the keys and values of all tokens so far together,
and memory that is asked for anew costs more than the copy (the kernel zeroes its pages). The layers take turns with two
buffers: one decode step after 4,000 tokens of a 125 M model takes less than half as long.

Imports transformers: imported by `engine.py` when the first engine is made.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from array import array
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, Final

import torch
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator, cache_allocator
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

MARGIN: Final = 0.15  # of the cache stays free when a sequence begins beside others, for what they will still need
_DIGEST_BYTES: Final = 16
_KEY: Final = secrets.token_bytes(32)


def block_hash(parent_hash: int | None, tokens: list[int]) -> int:
    """Blake2b with a key of this process over the hash of the block before and the tokens of this one."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, key=_KEY)
    if parent_hash is not None:
        digest.update(parent_hash.to_bytes(_DIGEST_BYTES, "little"))
    digest.update(array("i", tokens).tobytes())
    return int.from_bytes(digest.digest(), "little")


def share_blocks(cache: Any) -> None:
    """Make a `PagedAttentionCache` share what is said at the top of this module."""
    cache_allocator.compute_block_hash = block_hash
    cache.mark_complete_blocks = partial(_mark_complete_blocks, cache)


class _Buffers:
    """Memory for the keys and values that one layer reads; the next layer overwrites it."""

    def __init__(self, allocator: Any) -> None:
        self._allocator = allocator
        self._keys = self._values = torch.empty(0)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        read_index: torch.Tensor,
        write_index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FullAttentionCacheAllocator.update`."""
        keys, values = self._allocator._kv_token_views[layer_idx]
        keys.index_copy_(0, write_index, key_states)
        values.index_copy_(0, write_index, value_states)
        tokens = read_index.numel()
        if tokens == 0:
            return key_states, value_states
        if tokens > len(self._keys):
            shape = (tokens + tokens // 4, *keys.shape[1:])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        torch.index_select(keys, 0, read_index, out=self._keys[:tokens])
        torch.index_select(values, 0, read_index, out=self._values[:tokens])
        return self._keys[:tokens], self._values[:tokens]


def read_into_buffers(cache: Any) -> None:
    """Make the full-attention layers of a `PagedAttentionCache` on the CPU copy what they read into the same memory."""
    for allocator in cache.cache_allocators.values():
        if type(allocator) is FullAttentionCacheAllocator:
            allocator.update = _Buffers(allocator).update


def _mark_complete_blocks(cache: Any, state: Any, complete_blocks: dict[str, int]) -> None:
    """As `PagedAttentionCache.mark_complete_blocks`, which leaves out what a sequence's last step completed.

    It does so for asynchronous batching, where the sequence may have lost its blocks by then.
    """
    if complete_blocks and cache.allow_block_sharing:
        token_ids = state.initial_tokens + state.generated_tokens
        for name, count in complete_blocks.items():
            cache.cache_allocators[name].mark_complete_blocks(state.request_id, token_ids, count)


class BlockScheduler(FIFOScheduler):
    """First come first served, also in who keeps its blocks.

    `short` is how many sequences waited for blocks when the last batch was made: those that had begun, and those that
    have not although there was a slot for them.
    """

    waiting_requests_order: deque[str]

    def __init__(self, cache: Any, slots: int) -> None:
        super().__init__(cache, safety_margin=0.0, max_requests_per_batch=slots)
        self._total_bytes = cache.num_sectors * cache.bytes_per_sector

    def reset(self) -> None:
        """See `Scheduler`."""
        super().reset()
        self.short = 0
        self._arrivals: dict[str, int] = {}  # of every sequence from `add_waiting_request` to `forget`
        self._arrived = 0
        self._admitted: list[Any] = []  # of those that wait, in the batch that is being made

    def free_bytes(self) -> int:
        """What no live sequence holds; blocks that are kept for sharing count as free."""
        cached = sum(
            len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
            for allocator in self.cache.cache_allocators.values()
        )
        return int(self.cache.compute_free_capacity(relative=False) + cached)

    def add_waiting_request(self, state: Any) -> None:
        """See `Scheduler`. One that was put off takes the place in the queue that its arrival gives it."""
        if state.request_id not in self._arrivals:
            self._arrivals[state.request_id] = self._arrived
            self._arrived += 1
        super().add_waiting_request(state)
        if _had_begun(state):
            self.waiting_requests_order = deque(
                sorted(self.waiting_requests_order, key=lambda request_id: self._arrivals[request_id])
            )

    def finish_request(self, request_id: str) -> None:
        """See `Scheduler`."""
        self._free_last_blocks_first(request_id)
        super().finish_request(request_id)

    def forget(self, request_id: str) -> None:
        """A sequence has ended, or leaves now; its blocks are free."""
        self._arrivals.pop(request_id, None)
        self._free_last_blocks_first(request_id)
        self.set_request_cancellation(request_id)
        self.clear_cancelled_requests()

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[Any, bool, int, int]:
        """See `Scheduler`. There is a batch whenever a sequence is live."""
        self.block_new_requests = False
        self._put_off_newest(token_budget)
        batch = self._schedule(token_budget, cache_budget)
        # A cache with two kinds of layers hands its memory out in sectors: blocks may be free and yet of no use.
        while batch[0] is None and self.active_requests:
            self._put_off(self._newest())
            batch = self._schedule(token_budget, cache_budget)
        self._admitted = []
        if batch[0] is not None and batch[2] < token_budget:  # those that shared so much that the reads did not fit
            self.short += len(self.active_requests) - len(batch[0])
        return batch

    def _schedule(self, token_budget: int, cache_budget: int) -> tuple[Any, bool, int, int]:
        self._admit()
        self._evict(self._step_bytes(token_budget) - int(self.cache.compute_free_capacity(relative=False)))
        batch: tuple[Any, bool, int, int] = super().schedule_batch(token_budget, cache_budget)
        return batch

    def _get_waiting_candidates(self) -> list[Any]:
        return self._admitted

    def _put_off_newest(self, token_budget: int) -> None:
        """Take blocks back until everything that has begun can go on in this step, the oldest sequences first."""
        while len(self.active_requests) > 1 and self._step_bytes(token_budget) > self.free_bytes():
            self._put_off(self._newest())

    def _newest(self) -> Any:
        return self.active_requests[max(self.active_requests, key=lambda request_id: self._arrivals[request_id])]

    def _put_off(self, state: Any) -> None:
        """Free the blocks of a sequence that has begun; it will be prefilled again."""
        again = state.create_equivalent_initial_request()
        state._status = RequestStatus.FINISHED
        self.finish_request(state.request_id)
        self.add_waiting_request(again)

    def _admit(self) -> None:
        """Let those begin, in order of arrival, that have a slot and room for all of their tokens."""
        self._admitted = []
        free = self.free_bytes() - sum(
            self._needed_bytes(state, len(state.remaining_prefill_tokens))
            for state in self.active_requests.values()
            if state.status == RequestStatus.PREFILLING
        )
        blocked = False
        for request_id in list(self.waiting_requests_order):
            begun = len(self.active_requests) + len(self._admitted)
            if begun >= self.max_requests_per_batch:
                break
            state = self.waiting_requests[request_id]
            taken = self._taken_bytes(state)
            if begun and free - taken < MARGIN * self._total_bytes:
                blocked = True
                break
            free -= taken
            found: set[str] = set()
            self._infer_request_tokens(state, found)  # takes the blocks of a prefix that is there, before eviction may
            self._cleanup_waiting_queue(found)
            if state.status == RequestStatus.PENDING:
                self._admitted.append(state)
        slots = self.max_requests_per_batch - len(self.active_requests) - len(self._admitted)
        self.short = sum(
            (blocked and place < slots) or _had_begun(self.waiting_requests[request_id])
            for place, request_id in enumerate(islice(self.waiting_requests_order, len(self._admitted), None))
        )

    def _taken_bytes(self, state: Any) -> int:
        """What the tokens of a waiting sequence would take of the memory that counts as free."""
        tokens = state.remaining_prefill_tokens
        taken = self._needed_bytes(state, len(tokens))
        if self.cache.use_prefix_sharing:
            for allocator in self.cache.cache_allocators.values():
                held = sum(
                    block not in allocator.ledger.cached_blocks for block in allocator.match_prefix_blocks(tokens)
                )
                taken -= held * allocator.bytes_per_block
        return taken

    def _step_bytes(self, token_budget: int) -> int:
        """The new blocks that the next step needs for what has begun or is about to."""
        return sum(self._needed_bytes(state, count) for state, count in self._next_tokens(token_budget))

    def _next_tokens(self, token_budget: int) -> Iterator[tuple[Any, int]]:
        """Each sequence of the next step with its number of tokens, in transformers' order."""
        prefilling = []
        for state in self.active_requests.values():
            if state.status == RequestStatus.DECODING:
                token_budget -= 1
                yield state, 1
            else:
                prefilling.append(state)
        for state in (*prefilling, *self._admitted):
            count = min(len(state.remaining_prefill_tokens), token_budget)
            if count <= 0:
                return
            token_budget -= count
            yield state, count

    def _needed_bytes(self, state: Any, count: int) -> int:
        """The new blocks that a sequence needs for its next `count` tokens."""
        return sum(
            int(allocator.needs_new_blocks(state.request_id, state.current_len(), count))
            * int(allocator.bytes_per_block)
            for allocator in self.cache.cache_allocators.values()
        )

    def _evict(self, wanted_bytes: int) -> None:
        """Forget shared blocks that nobody uses, those first that were used longest ago."""
        for allocator in self.cache.cache_allocators.values():
            ledger = allocator.ledger
            count = math.ceil(wanted_bytes / allocator.bytes_per_block)
            blocks = list(islice(ledger.cached_blocks, max(0, count)))
            for block in blocks:
                del ledger.cached_blocks[block]
                del ledger.hash_to_block[ledger.block_to_hash.pop(block)]
            if blocks:
                self.cache.pool.free_blocks(allocator.index, blocks)
                wanted_bytes -= len(blocks) * allocator.bytes_per_block

    def _free_last_blocks_first(self, request_id: str) -> None:
        """So that eviction takes the end of a prefix before its beginning, without which the rest is not found."""
        for allocator in self.cache.cache_allocators.values():
            if request_id in allocator.block_table:
                allocator.block_table[request_id].reverse()


def _had_begun(state: Any) -> bool:
    return bool(state._true_initial_tokens)
