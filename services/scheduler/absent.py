"""Workers that do not answer, and what had been commanded of workers that are gone. Pure.

A worker whose record is still there but at which nobody answers a command has died a moment ago, or is cut off: it is
left alone until it speaks again (its record changes), or for a while, should what it said have been lost.
"""

from __future__ import annotations

import math

import msgspec

from shared.contracts.records import Phase, WorkerRecord


class Absent:
    """Worker id → the monotonic second until which it is left alone; and the replicas that nobody will load."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._lost: list[str] = []

    def silent(self, worker_id: str, until: float) -> None:
        """Nobody answers at this worker."""
        self._until[worker_id] = until

    def spoke(self, worker_id: str) -> None:
        """It says something."""
        self._until.pop(worker_id, None)

    def all_may_speak(self) -> None:
        """It may have been our own connection: nobody is left alone any longer."""
        self._until.clear()

    def seen(self, record: WorkerRecord, now: float) -> WorkerRecord:
        """The record as it counts: a worker that is left alone is not ready."""
        if now < self._until.get(record.worker_id, -math.inf):
            return msgspec.structs.replace(record, phase=Phase.STARTING)
        self._until.pop(record.worker_id, None)
        return record

    def left(self, worker_id: str, replica_ids: list[str]) -> None:
        """It is gone, and with it the replicas that it had been told to load."""
        self._until.pop(worker_id, None)
        self._lost += replica_ids

    def take_lost(self) -> list[str]:
        """The replicas whose loads were lost since the last time."""
        lost, self._lost = self._lost, []
        return lost
