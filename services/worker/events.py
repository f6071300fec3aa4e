"""The worker's core: what happens to it (events) and what it wants done (actions). None of this crosses the bus.

Actions say *what*; the handles in them (an engine, a tokenizer, a puller) are the shell's own, carried through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from services.worker.ports import Engine, EngineEvent, Loaded, Tokenizer
from shared.contracts.generation import FrameBatch
from shared.contracts.migration import (
    AbandonRound,
    HandedOver,
    HandOver,
    Migrate,
    Migrating,
    MigrationEnded,
    Relief,
    RequestList,
    Round,
    RoundDone,
    RoundPending,
)
from shared.contracts.placement import LoadReplica, ReplicaFailed, ReplicaLoaded, StopReplica
from shared.contracts.requests import (
    Cancel,
    Check,
    Claim,
    Claimed,
    Gone,
    Holds,
    Request,
    Running,
    Sampling,
    Unwanted,
)
from shared.contracts.residency import Consumed, Done, Lease, LoadProgress, Progress, Release, Renewed
from shared.errors import Failure

Reply = Callable[[Done | Failure], None]
MigrateReply = Callable[[Migrating | Failure], None]
RoundReply = Callable[[RoundPending | RoundDone | Failure], None]
HandOverReply = Callable[[HandedOver | Failure], None]
CheckReply = Callable[[Running | Failure], None]
ListReply = Callable[[RequestList | Failure], None]
Answer = Done | Migrating | RoundPending | RoundDone | HandedOver | Running | RequestList | Failure


class Puller(Protocol):
    """Pulls from the queue of one deployment; see `shared.bus.Puller`."""

    def want(self, n: int, /) -> None:
        """`n` more requests may come."""

    async def close(self) -> None:
        """No more come after this."""


# -- events


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """The scheduler wants a replica."""

    message: LoadReplica
    reply: Reply


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The scheduler wants a replica to leave."""

    message: StopReplica
    reply: Reply


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """The process shall end: finish or give back, then `Drained`."""


@dataclass(frozen=True, slots=True)
class DrainSet:
    """The operator wants the worker to be empty (`on`), or to take work again."""

    on: bool
    reply: Reply


@dataclass(frozen=True, slots=True)
class LeaseAnswered:
    """The store's answer to one long poll."""

    replica_id: str
    answer: Progress | Lease | Failure


@dataclass(frozen=True, slots=True)
class LeasesRenewed:
    """The store's answer to a renewal. `unserved`: there is no store on the bus that could have answered."""

    answer: Renewed | Failure
    unserved: bool = False


@dataclass(frozen=True, slots=True)
class BusLost:
    """The bus is away: nothing that is asked is answered."""


@dataclass(frozen=True, slots=True)
class BusBack:
    """The bus is there again."""


@dataclass(frozen=True, slots=True)
class ServerChanged:
    """The record of some server changed, or may have."""

    server_id: str


@dataclass(frozen=True, slots=True)
class ServerSeen:
    """What this worker's server says about its pool: the segment's path, "" if nothing is known."""

    segment: str


@dataclass(frozen=True, slots=True)
class SegmentPrepared:
    """The segment is mapped, or could not be."""


@dataclass(frozen=True, slots=True)
class AttachProgressed:
    """So many of the bytes of a lease that is being attached have arrived."""

    replica_id: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ChunksConsumed:
    """The first `chunks` chunks of an image that streams through a window have been taken."""

    replica_id: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Attached:
    """The checkpoint is usable: engine and tokenizer are ready."""

    replica_id: str
    loaded: Loaded


@dataclass(frozen=True, slots=True)
class AttachFailed:
    """The checkpoint could not be attached."""

    replica_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class Detached:
    """Engine, KV cache and every view on the lease's bytes are gone."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class PullerOpened:
    """The queue can be pulled from."""

    replica_id: str
    puller: Puller


@dataclass(frozen=True, slots=True)
class PullerFailed:
    """The queue cannot be pulled from."""

    replica_id: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class PullerClosed:
    """No delivery comes any more."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class RecordRemoved:
    """The replica's record is gone from the registry."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class DeliveryArrived:
    """The queue gave a request to a replica. `token` acknowledges it; `delivery` counts from 1."""

    replica_id: str
    request: Request
    token: str
    delivery: int
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class ClaimAnswered:
    """The gateway's answer to a claim. `unserved`: nobody serves the call, so the gateway is dead or cut off."""

    token: str
    answer: Claimed | Gone | Failure
    unserved: bool = False


@dataclass(frozen=True, slots=True)
class Tokenised:
    """The prompt's token ids; `echo_text` precedes the completion."""

    token: str
    token_ids: tuple[int, ...]
    echo_text: str = ""


@dataclass(frozen=True, slots=True)
class TokeniseFailed:
    """The prompt cannot be tokenised: the caller's fault."""

    token: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class EngineStepped:
    """What one step of a replica's engine brought."""

    replica_id: str
    events: Sequence[EngineEvent]


@dataclass(frozen=True, slots=True)
class CancelArrived:
    """A gateway wants a request to be left alone."""

    message: Cancel


@dataclass(frozen=True, slots=True)
class CheckAsked:
    """A gateway has not heard of some requests for a while."""

    message: Check
    reply: CheckReply


@dataclass(frozen=True, slots=True)
class HoldsAnswered:
    """A gateway's answer to what runs for it. `unserved`: there is no such gateway on the bus."""

    gateway_id: str
    answer: Unwanted | Failure
    unserved: bool = False


@dataclass(frozen=True, slots=True)
class ListAsked:
    """The operator wants to know what runs here."""

    reply: ListReply


@dataclass(frozen=True, slots=True)
class MigrateAsked:
    """The scheduler wants requests to move to another worker."""

    message: Migrate
    reply: MigrateReply


@dataclass(frozen=True, slots=True)
class RoundAsked:
    """A source sends tokens, or waits on for their prefill."""

    message: Round
    reply: RoundReply


@dataclass(frozen=True, slots=True)
class HandOverAsked:
    """A source has stopped."""

    message: HandOver
    reply: HandOverReply


@dataclass(frozen=True, slots=True)
class AbandonArrived:
    """A source needs its destination no more."""

    message: AbandonRound


@dataclass(frozen=True, slots=True)
class RoundAnswered:
    """The destination's answer to a round."""

    migration_id: str
    number: int
    answer: RoundPending | RoundDone | Failure


@dataclass(frozen=True, slots=True)
class HandOverAnswered:
    """The destination's answer to a hand-over."""

    migration_id: str
    answer: HandedOver | Failure


@dataclass(frozen=True, slots=True)
class ReclaimAnswered:
    """The gateway's answer to a source that wants its request back."""

    migration_id: str
    answer: Claimed | Gone | Failure


Event = (
    LoadAsked
    | StopAsked
    | DrainAsked
    | LeaseAnswered
    | LeasesRenewed
    | BusLost
    | BusBack
    | ServerChanged
    | ServerSeen
    | SegmentPrepared
    | AttachProgressed
    | ChunksConsumed
    | Attached
    | AttachFailed
    | Detached
    | PullerOpened
    | PullerFailed
    | PullerClosed
    | RecordRemoved
    | DeliveryArrived
    | ClaimAnswered
    | Tokenised
    | TokeniseFailed
    | EngineStepped
    | CancelArrived
    | DrainSet
    | CheckAsked
    | HoldsAnswered
    | ListAsked
    | MigrateAsked
    | RoundAsked
    | HandOverAsked
    | AbandonArrived
    | RoundAnswered
    | HandOverAnswered
    | ReclaimAnswered
)


# -- actions: tell


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Answer a call."""

    reply: Callable[[Any], None]
    answer: Answer


@dataclass(frozen=True, slots=True)
class PublishFrames:
    """Tokens and ends for one gateway."""

    gateway_id: str
    batch: FrameBatch


@dataclass(frozen=True, slots=True)
class Ack:
    """The queue may forget this request."""

    token: str


@dataclass(frozen=True, slots=True)
class Nak:
    """The queue shall hand this request out again, after `delay_s` seconds."""

    token: str
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class InProgress:
    """These requests are still being worked on."""

    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SubmitSequence:
    """Generate after these tokens, the last `first_index` of which are output."""

    engine: Engine
    sequence_id: str
    token_ids: tuple[int, ...]
    first_index: int
    max_new_tokens: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class CancelSequence:
    """Stop generating."""

    engine: Engine
    sequence_id: str


@dataclass(frozen=True, slots=True)
class Want:
    """That many more requests may come."""

    puller: Puller
    requests: int


@dataclass(frozen=True, slots=True)
class RecordReplica:
    """The replica's state changed: write its record now."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class RecordWorker:
    """The worker's memory in use changed: write its record now."""


@dataclass(frozen=True, slots=True)
class PublishProgress:
    """Tell those who wait how far a load is."""

    slug: str
    message: LoadProgress


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """Tell the scheduler that a replica failed."""

    message: ReplicaFailed


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """The store may evict these bytes."""

    message: Release


@dataclass(frozen=True, slots=True)
class PublishConsumed:
    """Tell the store that places in a window are free again."""

    message: Consumed


@dataclass(frozen=True, slots=True)
class AllowEngine:
    """The engine may use its lease's bytes until monotonic second `until`, and not a step longer."""

    engine: Engine
    until: float


@dataclass(frozen=True, slots=True)
class StopAttach:
    """Nobody needs this load any more: it shall not wait for bytes."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class LoadFinished:
    """A replica is ready: the parts of its cold start, for log and metrics, and (`told`) for the scheduler."""

    deployment: str
    replica_id: str
    worker_id: str
    server_id: str
    checkpoint_id: str
    engine: str
    tier: str
    decision_s: float
    import_s: float
    read_s: float
    attach_s: float
    total_s: float
    weight_bytes: int
    memory_bytes: int
    wait_s: float = 0.0
    move_s: float = 0.0
    moved_bytes: int = 0
    rest_s: float = 0.0
    work_s: float = 0.0

    def told(self, device: str) -> ReplicaLoaded:
        """What this took, as the scheduler hears it."""
        return ReplicaLoaded(
            replica_id=self.replica_id,
            deployment=self.deployment,
            worker_id=self.worker_id,
            server_id=self.server_id,
            checkpoint_id=self.checkpoint_id,
            tier=self.tier,
            weight_bytes=self.weight_bytes,
            total_s=self.total_s,
            wait_s=self.wait_s,
            move_s=self.move_s,
            moved_bytes=self.moved_bytes,
            attach_s=self.rest_s,
            work_s=self.work_s,
            device=device,
        )


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """This worker has nothing more to do with a request, for log and metrics.

    `outcome` is "stop", "length", a failure's code, "cancelled", "gone", "gateway_lost", "given_back", "deferred",
    "migrated" or "superseded".
    """

    request_id: str
    deployment: str
    replica_id: str
    outcome: str
    epoch: int
    delivery: int
    cold: bool = False
    tier: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    resumed_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Abandon:
    """Tell a destination that a migration is over."""

    worker_id: str
    message: AbandonRound


@dataclass(frozen=True, slots=True)
class PublishMigrationEnded:
    """Tell who listens how a migration ended, as its source saw it."""

    message: MigrationEnded


@dataclass(frozen=True, slots=True)
class PublishRelief:
    """Tell the scheduler that a replica is short of KV memory."""

    message: Relief


@dataclass(frozen=True, slots=True)
class SetPhase:
    """The operator's drain begins or ends: the worker's record says so."""

    draining: bool


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing runs and nothing is held any more."""


# -- actions: do


@dataclass(frozen=True, slots=True)
class AcquireLease:
    """Ask the store once (a long poll)."""

    message: LoadReplica


@dataclass(frozen=True, slots=True)
class RenewLeases:
    """Ask the store to keep these leases."""

    lease_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LookAtServer:
    """Read the record of this worker's server."""


@dataclass(frozen=True, slots=True)
class PrepareSegment:
    """Map the store's memory ahead of need, on a thread."""

    segment: str


@dataclass(frozen=True, slots=True)
class Attach:
    """Make the leased bytes a model that answers, on a thread."""

    message: LoadReplica
    lease: Lease
    engine: str
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Detach:
    """Close a model, on a thread."""

    replica_id: str
    loaded: Loaded


@dataclass(frozen=True, slots=True)
class OpenPuller:
    """Open the way to the queue of a deployment; nothing comes before `Want`."""

    replica_id: str
    slug: str


@dataclass(frozen=True, slots=True)
class ClosePuller:
    """No more deliveries."""

    replica_id: str
    puller: Puller


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """Ask a gateway for the ownership of a request."""

    token: str
    gateway_id: str
    message: Claim


@dataclass(frozen=True, slots=True)
class Tokenise:
    """Prompt → token ids."""

    token: str
    request: Request
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class TellHolds:
    """Tell a gateway what runs for it."""

    gateway_id: str
    message: Holds


@dataclass(frozen=True, slots=True)
class SendRound:
    """Send a round to the destination."""

    worker_id: str
    message: Round


@dataclass(frozen=True, slots=True)
class SendHandOver:
    """Hand a request over to the destination."""

    worker_id: str
    migration_id: str
    message: HandOver


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Take a request back at its gateway."""

    migration_id: str
    gateway_id: str
    message: Claim


@dataclass(frozen=True, slots=True)
class RemoveRecord:
    """Delete a replica's record."""

    replica_id: str


Tell = (
    ReplyTo
    | PublishFrames
    | Ack
    | Nak
    | InProgress
    | SubmitSequence
    | CancelSequence
    | Want
    | RecordReplica
    | RecordWorker
    | PublishProgress
    | PublishFailed
    | ReleaseLease
    | PublishConsumed
    | AllowEngine
    | StopAttach
    | LoadFinished
    | RequestFinished
    | Abandon
    | PublishMigrationEnded
    | PublishRelief
    | SetPhase
    | Drained
)
Do = (
    AcquireLease
    | RenewLeases
    | LookAtServer
    | PrepareSegment
    | Attach
    | Detach
    | OpenPuller
    | ClosePuller
    | ClaimRequest
    | Tokenise
    | TellHolds
    | SendRound
    | SendHandOver
    | Reclaim
    | RemoveRecord
)
LONG = (
    AcquireLease, RenewLeases, LookAtServer, PrepareSegment, Attach, Detach, OpenPuller, ClosePuller, ClaimRequest,
    Tokenise, TellHolds, SendRound, SendHandOver, Reclaim, RemoveRecord,
)  # fmt: skip
Action = Tell | Do
