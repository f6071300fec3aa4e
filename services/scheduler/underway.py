"""What is being done for a deployment whose room is being made, in words: what `hearth explain` says of now. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from services.scheduler.books import Room
from services.scheduler.cluster import Cluster
from services.scheduler.terms import RoomPlan
from services.scheduler.view import count
from shared.contracts.records import ReplicaRecord
from shared.sizes import duration

# Seconds until what runs in a replica is expected to have ended.
Remaining = Callable[[ReplicaRecord], float]


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
        running = f"{count(replica.running, 'request')} of {replica.deployment}"
        if not replica.running:
            yield f"waits for {replica.deployment} to leave {replica.worker_id}"
        elif id in plan.parks or (stop is not None and stop.abort):
            yield f"parks {running} on {replica.worker_id}"
        elif id in goals:
            yield f"moves {running} from {replica.worker_id} to {' and '.join(goals[id])}"
        else:
            left = duration(remaining_s(replica))
            yield f"waits for the end of {running} on {replica.worker_id}, expected in {left}"
