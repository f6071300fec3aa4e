"""What a replica needs, and what has been commanded that the registry does not show yet. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica of a deployment needs.

    `key` names its bytes: the checkpoint id, or the deployment while that is unknown.
    """

    deployment: str
    key: str
    weight_bytes: int
    kv_bytes: int

    devices: int = 1

    def memory_bytes(self, device: str, *, streams: bool = False) -> int:
        """Bytes of the device, or of all devices together. On the CPU the parameters are views on the DRAM pool and
        cost nothing more, unless they only stream through it: then they are memory of the worker's own."""
        return self.kv_bytes if device == "cpu" and not streams else self.weight_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """A commanded load whose replica the registry does not show yet; forgotten at monotonic second `expires_at`."""

    replica_id: str
    deployment: str
    revision: str
    worker_id: str
    server_id: str
    key: str
    memory_bytes: int
    weight_bytes: int
    expires_at: float
    peer_worker_ids: tuple[str, ...] = ()

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """Every worker that it takes."""
        return (self.worker_id, *self.peer_worker_ids)


@dataclass(frozen=True, slots=True)
class PendingStop:
    """A commanded stop of a replica that the registry still shows."""

    replica_id: str
    deployment: str
    worker_id: str
    reason: str
    drain: bool
    abort: bool
    expires_at: float
