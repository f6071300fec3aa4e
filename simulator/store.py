"""The stores of all servers, as far as workers meet them: leases that are granted, renewed and released."""

from __future__ import annotations

from typing import Final

from shared.contracts.placement import LoadReplica
from shared.contracts.residency import Checkpoint, Lease, Renewed

MAX_CONTEXT_TOKENS: Final = 96


def checkpoint(checkpoint_id: str) -> Checkpoint:
    """The facts about a modelled checkpoint."""
    return Checkpoint(
        checkpoint_id=checkpoint_id,
        architecture="model",
        weight_bytes=1000,
        parameters=500,
        dtype="float32",
        max_context_tokens=MAX_CONTEXT_TOKENS,
        kv_bytes_per_token=1,
        vocab_tokens=256,
        has_chat_template=False,
    )


class ModelStore:
    """Which leases are out. A lease of a process that died ends with it (in truth some seconds later)."""

    def __init__(self) -> None:
        self.leases: dict[str, str] = {}
        self._granted = 0

    def acquire(self, message: LoadReplica, holder: str) -> Lease:
        """A lease of its own for every call."""
        self._granted += 1
        lease_id = f"lease-{self._granted}"
        self.leases[lease_id] = holder
        return Lease(
            lease_id=lease_id,
            checkpoint=checkpoint(message.checkpoint_id),
            segment="model",
            segment_bytes=4096,
            extents=(),
            directory="",
            tier="dram",
        )

    def renew(self, lease_ids: tuple[str, ...]) -> Renewed:
        """Which of these are out still."""
        return Renewed(unknown=tuple(lease_id for lease_id in lease_ids if lease_id not in self.leases))

    def release(self, lease_id: str) -> None:
        """One comes back. Fails the run if it is not out."""
        assert self.leases.pop(lease_id, None) is not None, f"{lease_id} is released and was not held"

    def forget(self, holder: str) -> None:
        """Who held these is dead."""
        self.leases = {lease_id: who for lease_id, who in self.leases.items() if who != holder}
