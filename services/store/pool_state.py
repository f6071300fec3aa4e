"""What a DRAM pool holds, written beside it so that the copies outlive the store's process. Pure.

The file is rewritten, by renaming, before a claim is given up (a copy is evicted, its chunks are reused) and after one
is made (a copy is verified, a lease granted) but before anybody is told: so what it claims is true at every instant.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shared.contracts.residency import Extent, Lease

STATE_VERSION: Final = 1


class CopyState(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that is wholly there and verified: its chunks, in the order of the image."""

    checkpoint_id: str
    extents: tuple[Extent, ...]


class KeptState(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that nobody is to be given any more, or yet, and that somebody has a lease on.

    They are all there if `whole`, else if the board says so for every chunk under `tag`: whoever has looked there uses
    them already.
    """

    checkpoint_id: str
    extents: tuple[Extent, ...]
    tag: int
    image_bytes: int
    whole: bool


class LeaseState(msgspec.Struct, frozen=True, kw_only=True):
    """A lease on either; a new life of the store gives its holder `ttl_s` to renew it."""

    lease: Lease
    holder: str
    ttl_s: float


class PoolState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything. `next_tag` and `next_lease` have never been given out."""

    version: int
    chunk_bytes: int
    chunk_count: int
    next_tag: int
    next_lease: int
    copies: tuple[CopyState, ...] = ()
    kept: tuple[KeptState, ...] = ()
    leases: tuple[LeaseState, ...] = ()


def encode_state(state: PoolState) -> bytes:
    """The bytes of the file."""
    return msgspec.json.encode(state)


def decode_state(data: bytes) -> PoolState:
    """The state in these bytes. Raises `ValueError` when they are not one of this version."""
    state = msgspec.json.decode(data, type=PoolState)
    if state.version != STATE_VERSION:
        raise ValueError(f"the pool's state has version {state.version}")
    return state
