"""Placement: operator → scheduler (deploy, delete, explain) and scheduler → worker (load, stop).

Commands carry the `term` of the leader that gives them: whoever has heard of a later one refuses them (`stale_epoch`).
Term 0 is an operator's, or a test's, and is always obeyed.
"""

from __future__ import annotations

import msgspec

from shared.contracts.records import DeploymentRecord, DeploymentSpec
from shared.contracts.residency import Checkpoint, Done, Progress, Source
from shared.errors import Failure


class Deploy(msgspec.Struct, frozen=True, kw_only=True, tag="deploy", omit_defaults=True):
    """Create or change a deployment (long poll, idempotent): answered with `Deploying`, `Deployed` or a failure.

    A failed first deployment leaves nothing behind; a failed change leaves the old one as it was.
    """

    spec: DeploymentSpec
    wait_s: float = 1.0


class Deploying(msgspec.Struct, frozen=True, kw_only=True, tag="deploying"):
    """Not there yet."""

    progress: Progress


class Deployed(msgspec.Struct, frozen=True, kw_only=True, tag="deployed"):
    """The deployment answers requests."""

    record: DeploymentRecord


class Delete(msgspec.Struct, frozen=True, kw_only=True, tag="delete"):
    """Remove a deployment: waiting requests end with `unknown_model`, running ones are ended, replicas leave."""

    deployment: str


class LoadReplica(msgspec.Struct, frozen=True, kw_only=True, tag="load_replica", omit_defaults=True):
    """Scheduler → worker: attach this model and answer its queue. Answered at once; the record tells the rest.

    Idempotent by `replica_id`. `kv_bytes` is the size of its KV cache; `slots` the requests it runs at once;
    `engine` is "" (choose) or what the probe found ("batching", "sequential"). `decision_s` is the time from seeing the
    demand to this command, for the ledger. A replica over several devices is loaded by one worker together with
    `peer_worker_ids`.
    """

    replica_id: str
    deployment: str
    slug: str
    revision: str
    checkpoint_id: str
    source: Source
    slots: int
    max_context_tokens: int
    kv_bytes: int
    decision_s: float = 0.0
    checkpoint: Checkpoint | None = None
    engine: str = ""
    term: int = 0
    peer_worker_ids: tuple[str, ...] = ()


class StopReplica(msgspec.Struct, frozen=True, kw_only=True, tag="stop_replica", omit_defaults=True):
    """Scheduler → worker: this replica leaves.

    Without `drain` the worker refuses as `busy` if it runs a request; with it, the replica takes no new ones,
    finishes what it has and leaves. With `abort` running requests are given back to the queue at once.
    """

    replica_id: str
    reason: str
    drain: bool = False
    abort: bool = False
    term: int = 0


class ReplicaFailed(msgspec.Struct, frozen=True, kw_only=True, tag="replica_failed", omit_defaults=True):
    """Worker → scheduler, a hint: this replica could not be loaded, or died, and why. Its record is gone already."""

    replica_id: str
    deployment: str
    worker_id: str
    failure: Failure


class ReplicaLoaded(msgspec.Struct, frozen=True, kw_only=True, tag="replica_loaded", omit_defaults=True):
    """Worker → scheduler, a hint: this replica is ready, and what that took. Seconds are measured by worker and store.

    `tier` is where the load found the checkpoint ("dram", "ssd", "peer", "remote"). `wait_s` is the time in the store's
    queue before the first of its bytes moved, `move_s` that until the last had arrived (0 from DRAM), of `moved_bytes`;
    `attach_s` what the worker did after that (skeleton, copies to the device, engine), so that the three make up
    `total_s`, from the command to ready. `work_s` is all of the worker's work: also what it did while bytes were on
    their way. `device` is the worker's ("cpu", "cuda:N").
    """

    replica_id: str
    deployment: str
    worker_id: str
    server_id: str
    checkpoint_id: str
    tier: str
    weight_bytes: int
    total_s: float
    wait_s: float = 0.0
    move_s: float = 0.0
    moved_bytes: int = 0
    attach_s: float = 0.0
    work_s: float = 0.0
    device: str = ""


class Leading(msgspec.Struct, frozen=True, kw_only=True, tag="leading"):
    """Scheduler → everybody, a hint: I lead as of this term; commands of earlier terms are void."""

    scheduler_id: str
    term: int


class Explain(msgspec.Struct, frozen=True, kw_only=True, tag="explain", omit_defaults=True):
    """Why was it decided so? The last `limit` (≤ 64) decisions about a deployment, or a replica ("": about any)."""

    deployment: str = ""
    replica_id: str = ""
    limit: int = 8


class Parts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A startup in parts, seconds: the load queue, the bytes on their way, attaching, and making room."""

    wait_s: float = 0.0
    move_s: float = 0.0
    attach_s: float = 0.0
    room_s: float = 0.0


class CandidateView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A place as a decision saw it: its estimate, or why it was refused. `room` says how room would be made."""

    worker_ids: tuple[str, ...]
    server_id: str
    tier: str = ""
    estimate: Parts | None = None
    refused: str = ""
    room: str = ""


class DecisionView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One decision. `ago_s` is its age in seconds; `outcome` is "place", "evict", "move", "wait" or "impossible".

    `candidates` has the chosen one first and then the best; `more` were not looked at or are not shown. `actual` is
    what it really took (None: it is not ready yet, or never was), `failure` how it went wrong. The same decision to
    wait, taken `times` times in a row, is shown once: since when, and as it was seen last.
    """

    decision_id: str
    ago_s: float
    deployment: str
    outcome: str
    reason: str
    candidates: tuple[CandidateView, ...] = ()
    more: int = 0
    replica_id: str = ""
    actual: Parts | None = None
    actual_s: float | None = None
    decide_ms: float = 0.0
    failure: Failure | None = None
    times: int = 1


class Explanation(msgspec.Struct, frozen=True, kw_only=True, tag="explanation", omit_defaults=True):
    """The decisions that were asked for, latest first. `waiting` says why nothing is placed now ("": nothing waits),
    `doing` what is being done now so that the deployment gets a place, or what it waits for ("": nothing).

    `median_error` and `p95_error` are those of the estimator over its last loads, so many as `loads`, relative to what
    they took (None: no load yet).
    """

    scheduler_id: str
    term: int
    decisions: tuple[DecisionView, ...] = ()
    waiting: str = ""
    doing: str = ""
    median_error: float | None = None
    p95_error: float | None = None
    loads: int = 0


__all__ = [
    "CandidateView", "Checkpoint", "DecisionView", "Delete", "Deploy", "Deployed", "Deploying", "Done", "Explain",
    "Explanation", "Failure", "Leading", "LoadReplica", "Parts", "ReplicaFailed", "ReplicaLoaded", "StopReplica",
]  # fmt: skip
