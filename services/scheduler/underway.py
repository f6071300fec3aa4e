"""What is being done for a deployment that waits for a place, in words: what `hearth explain` says of now. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from services.scheduler.books import Room
from services.scheduler.clearing import Clearing
from services.scheduler.cluster import Cluster
from services.scheduler.decisions import Decisions
from services.scheduler.fairness import Fairness
from services.scheduler.terms import RoomPlan
from services.scheduler.view import count
from shared.contracts.records import ReplicaRecord
from shared.sizes import duration

# Seconds until what runs in a replica is expected to have ended.
Remaining = Callable[[ReplicaRecord], float]


class Underway:
    """What is being done for any deployment, from the parts of the scheduler that know."""

    def __init__(
        self, cluster: Cluster, clearing: Clearing, fairness: Fairness, decisions: Decisions, remaining_s: Remaining
    ) -> None:
        self._cluster = cluster
        self._clearing = clearing
        self._fairness = fairness
        self._decisions = decisions
        self._remaining_s = remaining_s

    def told(self, name: str, now: float) -> str:
        """What is being done for a deployment now; "": nothing, it does not wait for a place."""
        room = self._cluster.rooms.get(name)
        if room is not None:
            return underway(self._cluster, room, self._clearing.plan(name), self._remaining_s, now)
        if not self._fairness.waiting(name):
            return ""
        closed, within_s = self._decisions.closed(name), self._fairness.within_s(name, now)
        return in_line(self._cluster, name, closed, self._remaining_s, within_s)


def in_line(cluster: Cluster, name: str, closed: frozenset[str], remaining_s: Remaining, within_s: float) -> str:
    """Whose end would free a place soonest for a deployment that stands in line, and within which time it starts in any
    case (infinite: that is not promised). Nothing comes free for it on the workers that are `closed` to it."""
    busy = (
        (remaining_s(one), id)
        for id, one in cluster.replicas.items()
        if one.running > 0 and one.deployment != name and one.worker_id not in closed
    )
    left_s, id = min(busy, default=(math.inf, ""))
    if not id:
        return ""
    one = cluster.replicas[id]
    first = f"{_running(one)} on {one.worker_id}, expected to end in {duration(left_s)}"
    promise = f"; starts within {duration(max(0.0, within_s))} in any case" if within_s < math.inf else ""
    return f"takes the first place that comes free, perhaps after {first}{promise}"


def underway(cluster: Cluster, room: Room, plan: RoomPlan, remaining_s: Remaining, now: float) -> str:
    """Who is still in the way and how they leave, and when the newcomer should be ready; "" if nobody is any more."""
    steps = list(_steps(cluster, room, plan, remaining_s))
    if not steps:
        return ""
    left_s = room.due_at - now
    ready = f"ready in {duration(left_s)}" if left_s > 0 else f"{duration(-left_s)} later than estimated"
    return f"{'; '.join(steps)}; {ready}"


def _steps(cluster: Cluster, room: Room, plan: RoomPlan, remaining_s: Remaining) -> Iterator[str]:
    goals: dict[str, list[str]] = {}
    for move in plan.moves:
        where = move.to_worker_id if move.to_replica_id else f"{move.to_worker_id} (loaded there first)"
        goals.setdefault(move.replica_id, []).append(where)
    for id in room.victims:
        replica = cluster.replicas.get(id)
        if replica is None:
            continue
        stop = cluster.stops.get(id)
        running = _running(replica)
        if not replica.running:
            yield f"waits for {replica.deployment} to leave {replica.worker_id}"
        elif id in plan.parks or (stop is not None and stop.abort):
            yield f"parks {running} on {replica.worker_id}"
        elif id in goals:
            yield f"moves {running} from {replica.worker_id} to {' and '.join(goals[id])}"
        else:
            left = duration(remaining_s(replica))
            yield f"waits for the end of {running} on {replica.worker_id}, expected in {left}"


def _running(replica: ReplicaRecord) -> str:
    return f"{count(replica.running, 'request')} of {replica.deployment}"
