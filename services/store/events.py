"""What happens to the store's core (events) and what it wants done (actions). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from shared.contracts.residency import (
    Acquire,
    Checkpoint,
    Done,
    Evict,
    Extent,
    Import,
    Imported,
    Inspect,
    Inspected,
    Lease,
    Progress,
    Release,
    Renew,
    Renewed,
    Source,
)
from shared.errors import Failure

Facts: TypeAlias = Mapping[str, str | int | float | bool | None]
# The caller's end of a call. The core only hands it back in an `Answer`.
ReplyHandle: TypeAlias = Any


# -- what the core knows about a checkpoint on the SSD ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint in the SSD tier. `stored_bytes` is all that its directory holds, `image_bytes` what a load reads."""

    checkpoint: Checkpoint
    directory: str
    stored_bytes: int
    image_bytes: int
    source: Source | None = None
    revision: str = ""

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
    """`PlanImport` has ended well. `revision` names what the source is right now."""

    source: Source
    revision: str
    image_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class ImportProgressed:
    """`RunImport` is this far."""

    source: Source
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ImportDone:
    """`RunImport` has ended well. `existing`: the same checkpoint was there already and has been kept."""

    source: Source
    stored: StoredCheckpoint
    remote_bytes: int
    seconds: float
    existing: bool = False


@dataclass(frozen=True, slots=True)
class ImportFailed:
    """`PlanImport` or `RunImport` has ended badly and has left nothing behind."""

    source: Source
    failure: Failure


@dataclass(frozen=True, slots=True)
class ReadProgressed:
    """`ReadImage` has this many bytes verified in the pool."""

    checkpoint_id: str
    done_bytes: int


@dataclass(frozen=True, slots=True)
class ReadDone:
    """`ReadImage` has ended well: every chunk is in the pool and verified."""

    checkpoint_id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """`ReadImage` has ended badly; no thread writes to its extents any more."""

    checkpoint_id: str
    failure: Failure


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
    | SourceInspected
    | InspectFailed
    | ImportPlanned
    | ImportProgressed
    | ImportDone
    | ImportFailed
    | ReadProgressed
    | ReadDone
    | ReadFailed
    | CheckpointRemoved
    | BusLost
    | BusBack
    | DrainAsked
)


# -- actions -----------------------------------------------------------------------------------------------------------

Message: TypeAlias = Inspected | Progress | Imported | Lease | Renewed | Done | Failure


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
class PlanImport:
    """Find out what a source is now and how much room it needs (do) → `ImportPlanned` or `ImportFailed`."""

    source: Source


@dataclass(frozen=True, slots=True)
class RunImport:
    """Import a source into the SSD tier (do) → `ImportDone` or `ImportFailed`."""

    source: Source
    revision: str


@dataclass(frozen=True, slots=True)
class ReadImage:
    """Read and verify a checkpoint into the pool (do) → `ReadDone` or `ReadFailed`."""

    stored: StoredCheckpoint
    extents: tuple[Extent, ...]


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
    | InspectSource
    | PlanImport
    | RunImport
    | ReadImage
    | RemoveCheckpoint
)
LONG: Final = (InspectSource, PlanImport, RunImport, ReadImage, RemoveCheckpoint)
