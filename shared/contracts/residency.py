"""Residency: what stores and their callers say to each other: import, acquire, renew, release, evict.

Bulk bytes never cross the bus: a checkpoint travels as a lease, the name of a shared-memory segment plus extents.
Long work is a *long poll*: the call answers within `wait_s` with the result or with how far it is, and is simply
repeated; all of these calls are idempotent.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shared.errors import Failure


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a checkpoint comes from and what it shall become.

    `url` is an absolute directory, `hf:ORG/NAME`, or a directory of an object store: `s3://`, `gs://`, `az://`,
    `https://`, `http://`, `file://`. It holds a checkpoint in Hugging Face's form, which is converted, or one in
    Hearth's (a `hearth.json` is there), which is copied chunk by chunk. `dtype` casts floating-point tensors
    ("float32", "bfloat16", "float16") or is None to keep what is there.
    """

    url: str
    revision: str | None = None
    dtype: str | None = None


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The facts about an imported checkpoint that others decide with (the manifest itself stays with the bytes).

    `kv_bytes_per_token` is the KV cache of one token over all layers at the checkpoint's dtype; `max_context_tokens`
    is the model's own limit; `weight_bytes` the bytes of its tensors.
    """

    checkpoint_id: str
    architecture: str
    weight_bytes: int
    parameters: int
    dtype: str
    max_context_tokens: int
    kv_bytes_per_token: int
    vocab_tokens: int
    has_chat_template: bool


class Inspect(msgspec.Struct, frozen=True, kw_only=True, tag="inspect"):
    """Is this source a checkpoint that this store could import and hold? Reads headers only."""

    source: Source


class Inspected(msgspec.Struct, frozen=True, kw_only=True, tag="inspected"):
    """Yes; this many bytes will be read, and `architecture` is what config.json names."""

    architecture: str
    weight_bytes: int


class Import(msgspec.Struct, frozen=True, kw_only=True, tag="import", omit_defaults=True):
    """Bring the source into this store's SSD tier (long poll). `deployment` labels the progress events."""

    source: Source
    deployment: str = ""
    wait_s: float = 1.0


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress", omit_defaults=True):
    """How far a piece of long work is. `eta_s` is None while nothing measured supports an estimate.

    `phase` is one of "queued", "importing", "reading", "attaching".
    """

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0
    eta_s: float | None = None


class Imported(msgspec.Struct, frozen=True, kw_only=True, tag="imported"):
    """The checkpoint is whole and verified in the SSD tier."""

    checkpoint: Checkpoint


class Acquire(msgspec.Struct, frozen=True, kw_only=True, tag="acquire", omit_defaults=True):
    """Make a checkpoint resident in DRAM and lease it to `holder` for `ttl_s` (long poll).

    Every `Lease` that is answered is one of its own, to be renewed (`Renew`) and released on its own; one whose answer
    was lost expires. If the checkpoint is in no tier of this server it is imported from `source` first. An empty
    `checkpoint_id` asks for whatever `source` is. With `arriving` the holder takes a lease whose bytes are still on
    their way (`Lease.arrival`), as soon as their places are known.
    """

    checkpoint_id: str
    source: Source
    holder: str
    ttl_s: float
    deployment: str = ""
    wait_s: float = 1.0
    arriving: bool = False


class Extent(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A contiguous piece of the segment: byte offset and length, both multiples of the page size."""

    offset: int
    length: int


class Arrival(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a holder sees the bytes of a lease arrive.

    The segment ends with the *board*: from byte `board_offset`, one little-endian uint64 for every chunk of the pool, a
    chunk being `chunk_bytes` of the segment. The bytes in a chunk are there and verified when its word equals
    `arrival_word(tag, turn)`; they will not come when it equals `arrival_word(tag, FAILED_TURN)`.

    `window_chunks` is 0 for an image that lies in the extents as a whole (turn 0). Otherwise the image is larger than
    the pool and streams through the extents, which have `window_chunks` chunks: chunk k of the image (`chunk_bytes`
    each) comes into chunk k mod `window_chunks` of the extents on turn k div `window_chunks`, and is overwritten
    `window_chunks` chunks later, when the holder has said `Consumed`.
    """

    tag: int
    chunk_bytes: int
    board_offset: int
    image_bytes: int
    window_chunks: int = 0


FAILED_TURN: Final = 0xFFFFFFFE


def arrival_word(tag: int, turn: int) -> int:
    """The word on the board: `tag` (1 … 2³¹ − 1, one per load) and `turn` (from 0) in 64 bits; 0 means "not yet"."""
    return (tag << 32) | (turn + 1)


class Lease(msgspec.Struct, frozen=True, kw_only=True, tag="lease", omit_defaults=True):
    """The promise that a checkpoint's bytes stay where `extents` say until released or `ttl_s` after the last renewal.

    `segment` is the path of the shared-memory file. The extents, one after another, are the concatenation of the
    checkpoint's weight files as they lie on disk (manifest offsets count from there). `directory` holds the small files
    (hearth.json, config, tokenizer). The rest is the ledger of this load: where it was found and what it took;
    `tier` is "dram", "ssd", "peer" or "remote". `arrival` is None when all bytes are there.

    `moved_bytes` were not in DRAM when the lease was asked for: they stood in the store's queue for `wait_s` and had
    been on their way for `moved_s` when the lease was granted, arrived or not.
    """

    lease_id: str
    checkpoint: Checkpoint
    segment: str
    segment_bytes: int
    extents: tuple[Extent, ...]
    directory: str
    tier: str
    import_s: float = 0.0
    read_s: float = 0.0
    remote_bytes: int = 0
    ssd_bytes: int = 0
    dram_bytes: int = 0
    arrival: Arrival | None = None
    wait_s: float = 0.0
    moved_s: float = 0.0
    moved_bytes: int = 0


class Consumed(msgspec.Struct, frozen=True, kw_only=True, tag="consumed"):
    """A holder has taken the first `chunks` chunks of an image that streams through a window; they may go."""

    holder: str
    lease_id: str
    chunks: int


class Renew(msgspec.Struct, frozen=True, kw_only=True, tag="renew"):
    """A holder still needs these leases; answered with those that the store does not know (any more)."""

    holder: str
    lease_ids: tuple[str, ...]
    ttl_s: float


class Renewed(msgspec.Struct, frozen=True, kw_only=True, tag="renewed", omit_defaults=True):
    """`unknown` leases are void: their bytes may go at any time."""

    unknown: tuple[str, ...] = ()


class Release(msgspec.Struct, frozen=True, kw_only=True, tag="release"):
    """A holder does not need this lease any more."""

    holder: str
    lease_id: str


class Evict(msgspec.Struct, frozen=True, kw_only=True, tag="evict", omit_defaults=True):
    """Take a checkpoint out of `tier` ("dram", or "ssd" which implies DRAM). Refused as `busy` while it is leased."""

    checkpoint_id: str
    tier: str
    term: int = 0


class Prefetch(msgspec.Struct, frozen=True, kw_only=True, tag="prefetch", omit_defaults=True):
    """Bring a checkpoint into `tier` ("dram" or "ssd") ahead of demand (long poll); any waiting user goes before it.

    Either `checkpoint_id` is known here or among the peers, or `source` says where it comes from.
    """

    checkpoint_id: str = ""
    source: Source | None = None
    tier: str = "dram"
    wait_s: float = 1.0
    term: int = 0


class Pin(msgspec.Struct, frozen=True, kw_only=True, tag="pin", omit_defaults=True):
    """Never evict a checkpoint from `tier` ("dram", which implies SSD, or "ssd"), across restarts; "" unpins it.

    The checkpoint must be in the SSD tier. One that is pinned in DRAM is brought there, now and after a restart.
    """

    checkpoint_id: str
    tier: str = ""


class Verify(msgspec.Struct, frozen=True, kw_only=True, tag="verify", omit_defaults=True):
    """Read a checkpoint in the SSD tier, compare every chunk with its checksum, repair what differs (long poll)."""

    checkpoint_id: str
    wait_s: float = 1.0


class Verified(msgspec.Struct, frozen=True, kw_only=True, tag="verified", omit_defaults=True):
    """Every chunk is as its checksum says now; `repaired_chunks` of `chunks` had to be fetched again."""

    chunks: int
    repaired_chunks: int = 0


class Export(msgspec.Struct, frozen=True, kw_only=True, tag="export", omit_defaults=True):
    """Copy a checkpoint from the SSD tier to a directory or object store, in Hearth's form (long poll)."""

    checkpoint_id: str
    url: str
    wait_s: float = 1.0


LIST_LIMIT: Final = 1000


class ListCheckpoints(msgspec.Struct, frozen=True, kw_only=True, tag="list_checkpoints", omit_defaults=True):
    """What does this store hold? At most `limit` (≤ `LIST_LIMIT`) after the `first` ones: a message has a limit."""

    first: int = 0
    limit: int = LIST_LIMIT


class HeldCheckpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A checkpoint as its store sees it. Bytes are those that have arrived and are verified, of `image_bytes`.

    `uses_per_hour` is the decayed rate of acquires, `bring_back_s` what it would take to have it in DRAM again if it
    were evicted from there (None: unknown), `idle_s` the time since the last acquire (None: none in this life of the
    store). `quarantined` is the reason why it is not used.
    """

    checkpoint: Checkpoint
    image_bytes: int
    dram_bytes: int = 0
    ssd_bytes: int = 0
    pinned: str = ""
    leases: int = 0
    uses_per_hour: float = 0.0
    idle_s: float | None = None
    bring_back_s: float | None = None
    source: Source | None = None
    revision: str = ""
    quarantined: str = ""


class CheckpointList(msgspec.Struct, frozen=True, kw_only=True, tag="checkpoint_list", omit_defaults=True):
    """What a store holds, the one that would be evicted last first: a part of `total`.

    The order may change between two parts.
    """

    checkpoints: tuple[HeldCheckpoint, ...] = ()
    total: int = 0


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """It is so now (or was already)."""


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag="load_progress", omit_defaults=True):
    """Store or worker → everybody who waits, a hint: how far the cold start of a deployment is."""

    deployment: str
    server_id: str
    progress: Progress


__all__ = [
    "FAILED_TURN", "LIST_LIMIT", "Acquire", "Arrival", "Checkpoint", "CheckpointList", "Consumed", "Done", "Evict",
    "Export", "Extent", "Failure", "HeldCheckpoint", "Import", "Imported", "Inspect", "Inspected", "Lease",
    "ListCheckpoints", "LoadProgress", "Pin", "Prefetch", "Progress", "Release", "Renew", "Renewed", "Source",
    "Verified", "Verify", "arrival_word",
]  # fmt: skip
