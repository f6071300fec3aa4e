"""What a scheduler has done since it began to lead, and how it stands: the figures behind its metrics. Pure."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from services.scheduler.fairness import Bound, FairnessCounts
from shared.contracts.records import ReplicaRecord

MOST_REPLICAS: Final = 65_536


@dataclass(frozen=True, slots=True)
class Figures:
    """Totals since it began to lead, but for `bound`, which is as of now (None: nothing is promised).

    `loads` were commanded, `evictions` are idle replicas that were stopped for others, `parks` those that were parked,
    by why; `moves` of running requests that are over, by reason; `prefetches` ahead of demand, by tier;
    `finished_requests` as the replicas count them.
    """

    loads: int = 0
    evictions: int = 0
    finished_requests: int = 0
    parks: Mapping[str, int] = field(default_factory=dict)
    moves: Mapping[str, int] = field(default_factory=dict)
    prefetches: Mapping[str, int] = field(default_factory=dict)
    bound: Bound | None = None

    @property
    def swaps_per_request(self) -> float:
        """Loads per finished request: what thrashing makes large."""
        return self.loads / self.finished_requests if self.finished_requests else 0.0


class Tally:
    """Counts what nobody else counts."""

    def __init__(self) -> None:
        self.finished_requests = 0
        self.moves: dict[str, int] = {}
        self.prefetches: dict[str, int] = {}
        self._finished: collections.OrderedDict[str, int] = collections.OrderedDict()

    def replica_said(self, record: ReplicaRecord) -> None:
        """A replica's record was read. What it had finished before it was first seen was another leader's time."""
        known = self._finished.pop(record.replica_id, record.finished_requests)
        self.finished_requests += max(0, record.finished_requests - known)
        self._finished[record.replica_id] = max(known, record.finished_requests)
        while len(self._finished) > MOST_REPLICAS:
            self._finished.popitem(last=False)

    def replica_began(self, replica_id: str) -> None:
        """A load was commanded: whatever it finishes counts."""
        self._finished.setdefault(replica_id, 0)

    def moved(self, reason: str) -> None:
        """A move of running requests is over."""
        self.moves[reason] = self.moves.get(reason, 0) + 1

    def prefetched(self, tier: str) -> None:
        """A checkpoint was sent for ahead of demand."""
        self.prefetches[tier] = self.prefetches.get(tier, 0) + 1


def parks(counts: FairnessCounts) -> dict[str, int]:
    """The replicas that were parked, by why."""
    return {"late": counts.late, "outranked": counts.outranked, "shared": counts.shared}
