"""Residency: what stores and their callers say to each other: import, acquire, renew, release, evict.

Bulk bytes never cross the bus: a checkpoint travels as a lease, the name of a shared-memory segment plus extents.
Long work is a *long poll*: the call answers within `wait_s` with the result or with how far it is, and is simply
repeated; all of these calls are idempotent.
"""

from __future__ import annotations

import msgspec

from shared.errors import Failure


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a checkpoint comes from and what it shall become.

    `url` is an absolute directory or `hf:ORG/NAME`; `dtype` casts floating-point tensors ("float32", "bfloat16",
    "float16") or is None to keep what is there.
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
    `checkpoint_id` asks for whatever `source` is.
    """

    checkpoint_id: str
    source: Source
    holder: str
    ttl_s: float
    deployment: str = ""
    wait_s: float = 1.0


class Extent(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A contiguous piece of the segment: byte offset and length, both multiples of the page size."""

    offset: int
    length: int


class Lease(msgspec.Struct, frozen=True, kw_only=True, tag="lease", omit_defaults=True):
    """The promise that a checkpoint's bytes stay where `extents` say until released or `ttl_s` after the last renewal.

    `segment` is the path of the shared-memory file. The extents, one after another, are the concatenation of the
    checkpoint's weight files as they lie on disk (manifest offsets count from there). `directory` holds the small files
    (hearth.json, config, tokenizer). The rest is the ledger of this load: where it was found and what it took;
    `tier` is "dram", "ssd" or "remote".
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


class Evict(msgspec.Struct, frozen=True, kw_only=True, tag="evict"):
    """Take a checkpoint out of `tier` ("dram", or "ssd" which implies DRAM). Refused as `busy` while it is leased."""

    checkpoint_id: str
    tier: str


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """It is so now (or was already)."""


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag="load_progress", omit_defaults=True):
    """Store or worker → everybody who waits, a hint: how far the cold start of a deployment is."""

    deployment: str
    server_id: str
    progress: Progress


__all__ = [
    "Acquire", "Checkpoint", "Done", "Evict", "Extent", "Failure", "Import", "Imported", "Inspect", "Inspected",
    "Lease", "LoadProgress", "Progress", "Release", "Renew", "Renewed", "Source",
]  # fmt: skip
