"""Placement: operator → scheduler (deploy, delete) and scheduler → worker (load, stop, probe)."""

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
    demand to this command, for the ledger.
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


class StopReplica(msgspec.Struct, frozen=True, kw_only=True, tag="stop_replica", omit_defaults=True):
    """Scheduler → worker: this replica leaves.

    Without `drain` the worker refuses as `busy` if it runs a request; with it, the replica takes no new ones,
    finishes what it has and leaves. With `abort` running requests are given back to the queue at once.
    """

    replica_id: str
    reason: str
    drain: bool = False
    abort: bool = False


class ReplicaFailed(msgspec.Struct, frozen=True, kw_only=True, tag="replica_failed", omit_defaults=True):
    """Worker → scheduler, a hint: this replica could not be loaded, or died, and why. Its record is gone already."""

    replica_id: str
    deployment: str
    worker_id: str
    failure: Failure


__all__ = [
    "Checkpoint", "Delete", "Deploy", "Deployed", "Deploying", "Done", "Failure", "LoadReplica", "ReplicaFailed",
    "StopReplica",
]  # fmt: skip
