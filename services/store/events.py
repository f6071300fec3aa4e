"""What happens to the store's core (events) and what it wants done (actions). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from services.store.pool_state import PoolState
from shared.contracts.residency import (
    Acquire,
    Checkpoint,
    CheckpointList,
    Consumed,
    Done,
    Evict,
    Export,
    Extent,
    Import,
    Imported,
    Inspect,
    Inspected,
    Lease,
    ListCheckpoints,
    Pin,
    Prefetch,
    Progress,
    Release,
    Renew,
    Renewed,
    Source,
    Verified,
    Verify,
)
from shared.errors import Failure

Facts: TypeAlias = Mapping[str, str | int | float | bool | None]
# Who goes first: a waiting user, then an operator, then what is only likely to be needed, then scrubbing.
PRIORITY_USER: Final = 0
PRIORITY_OPERATOR: Final = 1
PRIORITY_PREFETCH: Final = 2
PRIORITY_SCRUB: Final = 3

# The caller's end of a call. The core only hands it back in an `Answer`.
ReplyHandle: TypeAlias = Any


# -- what the core knows about a checkpoint on the SSD ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint in the SSD tier. `stored_bytes` is all that its directory holds, `image_bytes` what a load reads.

    `arrived_bytes` is less than `image_bytes` for one whose fetch was interrupted: it takes its room, is no copy yet,
    and a fetch of the same checkpoint goes on from there. `quarantined` is why a corrupt one is kept but not used.
    `chunk_bytes` is the manifest's chunk (0: unknown, then no lease is given on bytes that are still arriving).
    """

    checkpoint: Checkpoint
    directory: str
    stored_bytes: int
    image_bytes: int
    source: Source | None = None
    revision: str = ""
    arrived_bytes: int | None = None
    quarantined: str = ""
    chunk_bytes: int = 0

    @property
    def id(self) -> str:
        """The checkpoint's id."""
        return self.checkpoint.checkpoint_id


# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InspectAsked:
    """A call of `INSPECT`."""

    message: Inspect
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class ImportAsked:
    """A call of `IMPORT`."""

    message: Import
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class AcquireAsked:
    """A call of `ACQUIRE`."""

    message: Acquire
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class RenewAsked:
    """A call of `RENEW`."""

    message: Renew
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """A message on `RELEASE`."""

    message: Release


@dataclass(frozen=True, slots=True)
class EvictAsked:
    """A call of `EVICT`."""

    message: Evict
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class PrefetchAsked:
    """A call of `PREFETCH`."""

    message: Prefetch
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class PinAsked:
    """A call of `PIN`."""

    message: Pin
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class VerifyAsked:
    """A call of `VERIFY`."""

    message: Verify
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class ExportAsked:
    """A call of `EXPORT`."""

    message: Export
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class ListAsked:
    """A call of `LIST`."""

    message: ListCheckpoints
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class ConsumedHeard:
    """A message on `CONSUMED`."""

    message: Consumed


@dataclass(frozen=True, slots=True)
class SourceInspected:
    """`InspectSource` has ended well. `peak_bytes` is what an import would need of the SSD tier while it runs."""

    reply: ReplyHandle
    architecture: str
    weight_bytes: int
    image_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class InspectFailed:
    """`InspectSource` has ended badly."""

    reply: ReplyHandle
    failure: Failure


@dataclass(frozen=True, slots=True)
class ImportPlanned:
    """`PlanImport` has ended well. `revision` names what the source is right now.

    `image_bytes` is what the image needs at most. `checkpoint_id` is known before the bytes are there only for a
    checkpoint in Hearth's form (a source or a peer that has it); `arrived_bytes` of it are in the SSD tier already.
    `from_peers`: there is a peer that has it.
    """

    source: Source
    revision: str
    image_bytes: int
    peak_bytes: int
    checkpoint_id: str = ""
    arrived_bytes: int = 0
    from_peers: bool = False


@dataclass(frozen=True, slots=True)
class ImportOpened:
    """`RunImport` has everything of the checkpoint but its bytes: from now on a lease can be given while they arrive.

    `stored.directory` holds manifest and small files and is where the checkpoint stays.
    """

    source: Source
    stored: StoredCheckpoint


@dataclass(frozen=True, slots=True)
class ImportProgressed:
    """`RunImport` is this far."""

    source: Source
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ImportDone:
    """`RunImport` has ended well: the checkpoint is durable in the SSD tier.

    `existing`: the same checkpoint was there already and has been kept. `in_dram`: every chunk is verified in the
    extents that the action named, too. `remote_bytes` came from the source and `peer_bytes` from peers, `moved_bytes`
    of the image in all (less than all of it when an earlier run has left some); `waited_s` of `seconds` were spent
    behind others.
    """

    source: Source
    stored: StoredCheckpoint
    remote_bytes: int
    seconds: float
    existing: bool = False
    in_dram: bool = False
    peer_bytes: int = 0
    moved_bytes: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ImportFailed:
    """`PlanImport` or `RunImport` has ended badly; no thread writes to its extents any more.

    It has left nothing behind, or, when a fetch was cut off, `kept`: what has arrived, to go on from.
    """

    source: Source
    failure: Failure
    kept: StoredCheckpoint | None = None


@dataclass(frozen=True, slots=True)
class ReadProgressed:
    """`ReadImage` has this many bytes verified in the pool."""

    job: str
    done_bytes: int


@dataclass(frozen=True, slots=True)
class ReadDone:
    """`ReadImage` has ended well: every chunk is (or was, in a window) in the pool and verified.

    `repaired_chunks` were corrupt on the SSD and have been fetched again, there too. `waited_s` is the part of
    `seconds` that it stood behind others or behind the holder of its window.
    """

    job: str
    seconds: float
    repaired_chunks: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """`ReadImage` has ended badly; no thread writes to its extents any more."""

    job: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class VerifyProgressed:
    """`VerifyCheckpoint` is this far."""

    checkpoint_id: str
    done_bytes: int


@dataclass(frozen=True, slots=True)
class VerifyDone:
    """`VerifyCheckpoint` has ended: every chunk is sound now, or `failure` (checkpoint_corrupt) says which is not."""

    checkpoint_id: str
    chunks: int = 0
    repaired_chunks: int = 0
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class CheckpointQuarantined:
    """`QuarantineCheckpoint` has ended: the directory is `directory` now and marked."""

    checkpoint_id: str
    directory: str


@dataclass(frozen=True, slots=True)
class ExportProgressed:
    """`RunExport` is this far."""

    checkpoint_id: str
    url: str
    done_bytes: int


@dataclass(frozen=True, slots=True)
class ExportDone:
    """`RunExport` has ended, well or with `failure`."""

    checkpoint_id: str
    url: str
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class CheckpointRemoved:
    """`RemoveCheckpoint` has ended: the bytes are free (or `failure` says why some are not)."""

    checkpoint_id: str
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class BusLost:
    """The connection to the bus is lost: no holder can renew its leases now."""


@dataclass(frozen=True, slots=True)
class BusBack:
    """The connection to the bus is back."""


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """The store is going to stop: nothing new is taken, whoever waits is told."""


Event: TypeAlias = (
    InspectAsked
    | ImportAsked
    | AcquireAsked
    | RenewAsked
    | ReleaseAsked
    | EvictAsked
    | PrefetchAsked
    | PinAsked
    | VerifyAsked
    | ExportAsked
    | ListAsked
    | ConsumedHeard
    | SourceInspected
    | InspectFailed
    | ImportPlanned
    | ImportOpened
    | ImportProgressed
    | ImportDone
    | ImportFailed
    | ReadProgressed
    | ReadDone
    | ReadFailed
    | VerifyProgressed
    | VerifyDone
    | CheckpointQuarantined
    | ExportProgressed
    | ExportDone
    | CheckpointRemoved
    | BusLost
    | BusBack
    | DrainAsked
)


# -- actions -----------------------------------------------------------------------------------------------------------

Message: TypeAlias = Inspected | Progress | Imported | Lease | Renewed | Done | Verified | CheckpointList | Failure


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer a call (tell)."""

    reply: ReplyHandle
    message: Message


@dataclass(frozen=True, slots=True)
class PublishProgress:
    """Tell whoever waits for this deployment how far it is (tell)."""

    deployment: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class TouchRecord:
    """The server's record changed (tell)."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth a line in the log and a cluster event (tell)."""

    event: str
    facts: Facts


@dataclass(frozen=True, slots=True)
class InspectSource:
    """Read the headers of a source (do) → `SourceInspected` or `InspectFailed`."""

    source: Source
    reply: ReplyHandle


@dataclass(frozen=True, slots=True)
class ClearBoard:
    """Set the words of these chunks of the pool to "not yet", before anybody is told where to look (tell)."""

    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class SavePool:
    """Write down what the pool holds, for the next life of the store, before anything else happens (tell)."""

    state: PoolState


@dataclass(frozen=True, slots=True)
class SetPriority:
    """A job that runs shall go before (or after) others from now on (tell)."""

    job: str
    priority: int


@dataclass(frozen=True, slots=True)
class AdvanceWindow:
    """The holder has taken this many chunks of a job's image: their places may be overwritten (tell)."""

    job: str
    chunks: int


@dataclass(frozen=True, slots=True)
class StopJob:
    """Nobody needs this job any more: end it at its next chunk, as failed (tell)."""

    job: str


@dataclass(frozen=True, slots=True)
class SavePins:
    """Write down which checkpoints are pinned, id → tier (do; nothing comes back)."""

    pins: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PlanImport:
    """Find out what a source is now and how much room it needs (do) → `ImportPlanned` or `ImportFailed`.

    With a `checkpoint_id`, peers that have it are asked before the source; a `peers_only` source is nowhere else.
    """

    source: Source
    checkpoint_id: str = ""


def peers_only(checkpoint_id: str) -> Source:
    """Stands for a checkpoint whose source nobody has named: peers have it, or nobody."""
    return Source(url=f"peer:{checkpoint_id}")


@dataclass(frozen=True, slots=True)
class RunImport:
    """Import a source into the SSD tier (do) → perhaps `ImportOpened`, then `ImportDone` or `ImportFailed`.

    With `extents` (whole chunks of the pool, enough for the planned image) the bytes are left there too, announced on
    the board under `tag` as they arrive.
    """

    source: Source
    revision: str
    job: str
    priority: int
    checkpoint_id: str = ""
    extents: tuple[Extent, ...] = ()
    tag: int = 0


@dataclass(frozen=True, slots=True)
class ReadImage:
    """Read and verify a checkpoint into the pool (do) → `ReadDone` or `ReadFailed`.

    Chunks are announced on the board under `tag`. With `window_chunks` the image streams through the extents, which
    have that many chunks, as `AdvanceWindow` allows. A corrupt chunk is fetched again from peers or the source.
    """

    stored: StoredCheckpoint
    extents: tuple[Extent, ...]
    job: str
    priority: int
    tag: int
    window_chunks: int = 0


@dataclass(frozen=True, slots=True)
class VerifyCheckpoint:
    """Read a checkpoint, compare checksums, repair (do) → `VerifyDone`. `bytes_per_s` bounds it (0: nothing does)."""

    stored: StoredCheckpoint
    job: str
    priority: int
    bytes_per_s: int = 0


@dataclass(frozen=True, slots=True)
class QuarantineCheckpoint:
    """Set a corrupt checkpoint aside, with the reason (do) → `CheckpointQuarantined`."""

    checkpoint_id: str
    directory: str
    reason: str


@dataclass(frozen=True, slots=True)
class RunExport:
    """Copy a checkpoint somewhere else in Hearth's form (do) → `ExportDone`."""

    stored: StoredCheckpoint
    url: str
    job: str


@dataclass(frozen=True, slots=True)
class RemoveCheckpoint:
    """Delete a checkpoint's directory (do) → `CheckpointRemoved`."""

    checkpoint_id: str
    directory: str


Action: TypeAlias = (
    Answer
    | PublishProgress
    | TouchRecord
    | Note
    | ClearBoard
    | SavePool
    | SetPriority
    | AdvanceWindow
    | StopJob
    | SavePins
    | InspectSource
    | PlanImport
    | RunImport
    | ReadImage
    | VerifyCheckpoint
    | QuarantineCheckpoint
    | RunExport
    | RemoveCheckpoint
)
LONG: Final = (
    SavePins, InspectSource, PlanImport, RunImport, ReadImage, VerifyCheckpoint, QuarantineCheckpoint, RunExport,
    RemoveCheckpoint,
)  # fmt: skip
