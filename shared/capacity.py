"""How much memory a replica needs: one rule for the scheduler, which plans by it, and the worker, which obeys it.

Pure.
"""

from __future__ import annotations

from typing import Final

BLOCK_TOKENS: Final = 16  # KV caches are allocated in blocks of this many tokens


def kv_cache_bytes(
    *, kv_bytes_per_token: int, slots: int, max_context_tokens: int, most_bytes: int, block_tokens: int = BLOCK_TOKENS
) -> int:
    """Bytes of a replica's KV cache: room for `slots` full contexts, but at most `most_bytes`.

    One full context always fits, even when it alone is more than `most_bytes`: a request that is within the model's
    limit must never be refused for the cache's sake. The result is a whole number of blocks.
    """
    block_bytes = kv_bytes_per_token * block_tokens
    if block_bytes <= 0:
        return 0
    blocks_per_context = -(-max(1, max_context_tokens) // block_tokens)
    wanted = blocks_per_context * max(1, slots)
    return max(blocks_per_context, min(wanted, most_bytes // block_bytes)) * block_bytes


def context_tokens(own_tokens: int, asked_tokens: int | None) -> int:
    """Tokens of the longest prompt + completion: what the deployment asks for, never more than the model can do."""
    return own_tokens if asked_tokens is None else min(own_tokens, asked_tokens)
