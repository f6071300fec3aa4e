"""The registry: records as they were written, by whom, until their time is over; and looks at all of them. Pure.

A living process writes its record when it changes and with every heartbeat. Heartbeats are no events here: as long as a
process lives its record is there, and what changes all the time (tokens) is written when somebody looks. The record of
one that died goes `record_ttl_s` after its last heartbeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from shared.contracts.records import ClusterView, DeploymentRecord, ReplicaRecord, ServerRecord, WorkerRecord
from simulator.kernel import Dice, Kernel

Followed = ServerRecord | WorkerRecord | ReplicaRecord


class Writer(Protocol):
    """A process, or a part of one, with a record. `stale`: the record says no more what is."""

    stale: bool

    def record(self, now: float) -> Followed:
        """What the registry shall say about it."""


class Registry:
    """`hint` tells whoever follows records that one has changed: (kind, id, deleted)."""

    def __init__(self, kernel: Kernel, dice: Dice, *, heartbeat_s: float, ttl_s: float) -> None:
        self._kernel: Final = kernel
        self._dice: Final = dice
        self._heartbeat_s: Final = heartbeat_s
        self._ttl_s: Final = ttl_s
        self.away = False
        self.hint: Callable[[str, str, bool], None] = lambda kind, id, deleted: None
        self.deployments: dict[str, DeploymentRecord] = {}
        self._records: dict[str, dict[str, Followed]] = {"server": {}, "worker": {}, "replica": {}}
        self._writers: dict[str, dict[str, Writer]] = {"server": {}, "worker": {}, "replica": {}}

    def put(self, kind: str, id: str, writer: Writer) -> None:
        """A living writer's record has changed, and others are told."""
        self._writers[kind][id] = writer
        writer.stale = True
        if not self.away:
            self._write(kind, id, writer)
            self.hint(kind, id, False)

    def remove(self, kind: str, id: str) -> None:
        """A writer is gone and says so."""
        self._writers[kind].pop(id, None)
        if self.away:
            self._kernel.after(self._ttl_s, lambda: self._expire(kind, id))
        elif self._records[kind].pop(id, None) is not None:
            self.hint(kind, id, True)

    def orphan(self, kind: str, id: str) -> None:
        """A writer has died: its record goes when its time is over."""
        if self._writers[kind].pop(id, None) is not None:
            left_s = self._ttl_s - self._heartbeat_s * self._dice.random()
            self._kernel.after(left_s, lambda: self._expire(kind, id))

    def read(self, kind: str, id: str) -> Followed | None:
        """One record as it stands."""
        return self._records[kind].get(id)

    def back(self) -> None:
        """It answers again; everybody's next heartbeat is in it."""
        self.away = False
        for kind, writers in self._writers.items():
            for id, writer in writers.items():
                self._write(kind, id, writer)

    def look(self) -> ClusterView:
        """Everything."""
        for kind, writers in self._writers.items():
            written = self._records[kind]
            for id, writer in writers.items():
                if writer.stale:
                    written[id] = writer.record(self._kernel.now)
        records: dict[str, Any] = {**self._records}  # by kind they are of one type
        return ClusterView(
            servers=tuple(records["server"].values()),
            workers=tuple(records["worker"].values()),
            replicas=tuple(records["replica"].values()),
            deployments=tuple(self.deployments.values()),
        )

    def ids(self, kind: str) -> list[str]:
        """Those with a record."""
        return list(self._records[kind])

    def _write(self, kind: str, id: str, writer: Writer) -> None:
        if writer.stale:
            self._records[kind][id] = writer.record(self._kernel.now)

    def _expire(self, kind: str, id: str) -> None:
        if id not in self._writers[kind]:
            self._records[kind].pop(id, None)
