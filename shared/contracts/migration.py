"""Live migration: whoever asks → scheduler → source worker → destination worker. Token ids travel, never a KV cache.

    Move            operator, draining worker's scheduler, … → scheduler: what shall go where (long poll)
    Migrate         scheduler → source: start
    Round           source → destination: tokens that you do not have yet (long poll until they are prefilled)
    HandOver        source → destination: I have stopped; claim it
    AbandonRound    source → destination: forget it
    MigrationEnded  source → everybody who listens: how it ended

Ownership moves only by the destination's `Claim` with `after_epoch` (see `contracts.requests`): a compare-and-set at
the gateway, which the source uses as well to take its request back when it does not hear from the destination.
"""

from __future__ import annotations

import enum

import msgspec

from shared.contracts.generation import Ledger
from shared.contracts.requests import Request
from shared.errors import Failure


class MigrationReason(enum.StrEnum):
    """Who wanted a migration, and why."""

    OPERATOR = "operator"
    DRAIN = "drain"
    KV_MEMORY = "kv_memory"
    PLACEMENT = "placement"


class Move(msgspec.Struct, frozen=True, kw_only=True, tag="move", omit_defaults=True):
    """Anybody → scheduler: move running requests (long poll, idempotent by `move_id`): `Moving`, `Moved` or a failure.

    `request_ids` of worker `from_worker_id`, or, where there are none, `most` requests of its replica `replica_id` (0:
    all). With `request_ids`, `replica_id` says in which replica of that worker they run, and thereby which model a
    destination must have: all of them run in the one; "" will do where the worker has but one replica. Neither of the
    two is `invalid_request`. `to_worker_id` "" leaves the destination to the scheduler. The destination loads the model
    first if it must. The same `move_id` with other contents is a `conflict`.

    Failures: `not_found` (no such worker or replica; it does not run these requests), `conflict` (the destination is
    the source, leaves, or has another revision of the model; a request or the replica is being moved already),
    `no_capacity` (no worker can hold the model, and why), `busy` (no free slot at the destination, for a while),
    `unavailable` (the source does not answer, the scheduler starts, time is up).
    """

    move_id: str
    from_worker_id: str
    request_ids: tuple[str, ...] = ()
    replica_id: str = ""
    most: int = 0
    to_worker_id: str = ""
    reason: MigrationReason = MigrationReason.OPERATOR
    wait_s: float = 1.0


class Moving(msgspec.Struct, frozen=True, kw_only=True, tag="moving", omit_defaults=True):
    """Not there yet. `phase` is "placing", "loading" or "migrating"; `open_requests` are still on their way."""

    phase: str
    open_requests: int = 0
    to_worker_id: str = ""


class Moved(msgspec.Struct, frozen=True, kw_only=True, tag="moved", omit_defaults=True):
    """A move is over: `ended` are the migrations whose end was heard of, well or not.

    `failure`: why not all of what was asked for has begun to move, if so.
    """

    ended: tuple[MigrationEnded, ...] = ()
    failure: Failure | None = None


class Migrate(msgspec.Struct, frozen=True, kw_only=True, tag="migrate", omit_defaults=True):
    """Scheduler → source worker: begin to migrate; answered at once with `Migrating` or a failure.

    `request_ids` empty: `most` requests of `replica_id` (0: all), those whose move frees most first. A request that is
    in a migration already, or over, is left out. The destination is a ready replica `to_replica_id` of `to_worker_id`
    with the same checkpoint.
    """

    to_worker_id: str
    to_replica_id: str
    request_ids: tuple[str, ...] = ()
    replica_id: str = ""
    most: int = 0
    reason: MigrationReason = MigrationReason.OPERATOR
    term: int = 0


class Migrating(msgspec.Struct, frozen=True, kw_only=True, tag="migrating", omit_defaults=True):
    """The migrations of these requests have begun; a `MigrationEnded` will tell of each."""

    request_ids: tuple[str, ...] = ()


class Round(msgspec.Struct, frozen=True, kw_only=True, tag="round", omit_defaults=True):
    """Source → destination: output tokens from `index` on. Long poll: `RoundPending`, `RoundDone` or a failure.

    Idempotent by (`migration_id`, `number`): asked again it waits on; `number` counts from 1. The first round carries
    the request itself, its prompt as token ids, and reserves a slot at the destination.
    """

    migration_id: str
    number: int
    source_worker_id: str
    replica_id: str
    checkpoint_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    request: Request | None = None
    wait_s: float = 1.0


class RoundPending(msgspec.Struct, frozen=True, kw_only=True, tag="round_pending"):
    """The tokens are there, their prefill goes on."""

    number: int


class RoundDone(msgspec.Struct, frozen=True, kw_only=True, tag="round_done", omit_defaults=True):
    """The destination's KV cache holds the tokens up to this round's end.

    `prefilled_tokens` were computed in `prefill_s`, the other `cached_tokens` were there. `step_s` is a decode step.
    """

    number: int
    prefilled_tokens: int
    cached_tokens: int = 0
    prefill_s: float = 0.0
    step_s: float = 0.0


class HandOver(msgspec.Struct, frozen=True, kw_only=True, tag="hand_over", omit_defaults=True):
    """Source → destination: I emit nothing more from `index` + tokens on; claim the request after `epoch`.

    `token_ids` are the output tokens from `index` on that the rounds did not bring. `token`, `sequence` and `delivery`
    are the queue's (see `Claim`): from its claim on the destination acknowledges. `ledger` is what the request's end
    will carry on.
    """

    migration_id: str
    epoch: int
    token: str
    sequence: int
    delivery: int
    index: int
    token_ids: tuple[int, ...] = ()
    ledger: Ledger = Ledger()
    echo_text: str = ""


class HandedOver(msgspec.Struct, frozen=True, kw_only=True, tag="handed_over"):
    """The destination owns the request at this epoch."""

    epoch: int


class AbandonRound(msgspec.Struct, frozen=True, kw_only=True, tag="abandon_round"):
    """Source → destination: this migration is over; free what it holds."""

    migration_id: str


class MigrationOutcome(enum.StrEnum):
    """`COMMITTED`: the destination owns the request. `ABORTED`: the source goes on. `ENDED`: the request ended."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    ENDED = "ended"


class MigrationEnded(msgspec.Struct, frozen=True, kw_only=True, tag="migration_ended", omit_defaults=True):
    """Source → who listens: how a migration ended. Seconds and tokens are measured by the source.

    `frozen_s` is the time from the source's last frame to the destination's claim (what a client waits for, without
    the last prefill); `gap_tokens` came with the hand-over; `wire_bytes` is the size of all messages.
    """

    migration_id: str
    request_id: str
    deployment: str
    source_worker_id: str
    destination_worker_id: str
    reason: MigrationReason
    outcome: MigrationOutcome
    failure: Failure | None = None
    rounds: int = 0
    tokens: int = 0
    gap_tokens: int = 0
    wire_bytes: int = 0
    total_s: float = 0.0
    frozen_s: float = 0.0


class Relief(msgspec.Struct, frozen=True, kw_only=True, tag="relief"):
    """Worker → scheduler, a hint: the KV cache of a replica is too small for what it runs; `requests` should leave."""

    worker_id: str
    replica_id: str
    deployment: str
    requests: int


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag="drain"):
    """Operator → worker: take nothing more and let everything move away (`on`), or take work again. Idempotent.

    A worker that has been drained goes on running until it is stopped.
    """

    on: bool


class ListRequests(msgspec.Struct, frozen=True, kw_only=True, tag="list_requests"):
    """Operator → worker: what runs here?"""


class RunningRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request in a worker. `state` is "claiming", "prefill", "decode" or "frozen"; `running_s` counts from its claim.

    `migrating_to` is a worker's id while it is in a migration.
    """

    request_id: str
    gateway_id: str
    deployment: str
    worker_id: str
    replica_id: str
    state: str
    epoch: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    running_s: float = 0.0
    migrating_to: str = ""


class RequestList(msgspec.Struct, frozen=True, kw_only=True, tag="request_list", omit_defaults=True):
    """What runs in a worker, oldest first."""

    requests: tuple[RunningRequest, ...] = ()


class MigrationInFlight(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A migration as its source shows it in its record. `state` is "queued", "round", "last token", "handover" or
    "reclaim"."""

    migration_id: str
    request_id: str
    deployment: str
    destination_worker_id: str
    reason: MigrationReason
    state: str
    rounds: int = 0
    tokens: int = 0
    gap_tokens: int = 0
    running_s: float = 0.0
