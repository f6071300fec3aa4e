"""Room is made where something runs: what runs moves, ends, or is parked, and then its replica goes. Pure.

A decision says how (`RoomPlan`). Until all who are in the way have gone the room is reserved for whom it is made; what
goes wrong on the way gives the reservation back, and for a while nothing is moved for that deployment again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from services.scheduler.cluster import Cluster
from services.scheduler.events import Action, Fact, Note
from services.scheduler.fairness import Fairness
from services.scheduler.placing import Placing
from services.scheduler.rules import Rules
from services.scheduler.terms import Ask, Decision, RoomPlan
from shared.contracts.migration import MigrationReason, Move, Moved
from shared.contracts.records import ReplicaRecord, ReplicaState
from shared.errors import Failure

Begin = Callable[[Move, float, list[Action]], Failure | None]

SOUR_S: Final = 10.0  # after a move that came to nothing
MOST_MOVES: Final = 4  # of one replica: whoever came while the others left goes after them
SLACK: Final = 3.0  # a plan that takes longer than so many times its estimate is given up


@dataclass(slots=True)
class _Clearing:
    """Room that is being made for `owner`. `moves` maps replicas to the move that empties them now."""

    owner: str
    plan: RoomPlan
    moves: dict[str, str] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)


class Clearing:
    """See the module. `begin_move` is `Moves.begin`."""

    def __init__(self, rules: Rules, cluster: Cluster, placing: Placing, fairness: Fairness, begin_move: Begin) -> None:
        self._rules = rules
        self._cluster = cluster
        self._placing = placing
        self._fairness = fairness
        self._begin_move = begin_move
        self._clearings: dict[str, _Clearing] = {}
        self._soured: dict[str, float] = {}
        self._numbers = 0

    def soured(self, name: str, now: float) -> bool:
        """Whether a move for this deployment has come to nothing a moment ago."""
        return self._soured.get(name, -math.inf) > now

    def awaiting(self, name: str) -> bool:
        """Whether somebody's end is awaited for this deployment: then nobody else's need be."""
        return name in self._cluster.ending.values()

    def plan(self, owner: str) -> RoomPlan:
        """How room is being made for this owner, where somebody runs something; an empty plan: it is not."""
        clearing = self._clearings.get(owner)
        return clearing.plan if clearing is not None else RoomPlan()

    def begin(self, ask: Ask, decision: Decision, now: float, out: list[Action]) -> None:
        """Have everybody leave who is in the way."""
        chosen, cluster, placing = decision.chosen, self._cluster, self._placing
        assert chosen is not None
        plan, owner, name = chosen.room, ask.owner, ask.need.deployment
        placing.decisions.decided(decision, "", now)
        most_s = self._rules.move_load_s + self._rules.move_migrate_s
        until = now + min(SLACK * plan.seconds + self._rules.command_s, most_s)
        placing.reserve(owner, ask, chosen, now, until, slow=True)
        clearing = self._clearings[owner] = _Clearing(owner, plan)
        for id in plan.stops:
            placing.counts.evictions += placing.stop(cluster.replicas[id], "evicted", now, out)
        for id in plan.waits:
            placing.counts.waits += placing.stop(cluster.replicas[id], "awaited", now, out, drain=True)
            cluster.ending[id] = name
        for id in plan.parks:
            self._fairness.parked(id, name, now)
            placing.counts.parks += placing.stop(cluster.replicas[id], "parked", now, out, abort=True)
        out.append(Note("placement.cleared", placing.told(ask, decision, victims=", ".join(plan.victims))))
        for id in dict.fromkeys(one.replica_id for one in plan.moves):
            self._move(clearing, cluster.replicas[id], now, out)

    def over(self, move: Move, answer: Moved | Failure, now: float, out: list[Action]) -> None:
        """A move for somebody's room is over: its source goes now, or stays and the room is not made."""
        found = [one for one in self._clearings.values() if one.moves.get(move.replica_id) == move.move_id]
        if not found:
            return
        clearing = found[0]
        del clearing.moves[move.replica_id]
        failure = answer if isinstance(answer, Failure) else answer.failure
        replica = self._cluster.replicas.get(move.replica_id)
        if failure is not None and replica is not None:
            self._give_up(clearing, failure, now, out)
        elif replica is not None and replica.replica_id not in self._cluster.stops:
            self._placing.stop(replica, "moved", now, out, drain=True)

    def step(self, now: float, out: list[Action]) -> None:
        """Forget what is over; whoever still runs in a replica that leaves goes after the others."""
        if self._soured:
            self._soured = {name: until for name, until in self._soured.items() if until > now}
        for id in list(self._cluster.ending):
            self._hurry(id, now, out)
        for owner in list(self._clearings):
            clearing, room = self._clearings[owner], self._cluster.rooms.get(owner)
            if room is None or not room.slow:
                del self._clearings[owner]
                continue
            for id in dict.fromkeys(one.replica_id for one in clearing.plan.moves):
                replica = self._cluster.replicas.get(id)
                if replica is None or id in clearing.moves or replica.state is not ReplicaState.DRAINING:
                    continue
                if replica.running > 0 and clearing.begun.get(id, 0) < MOST_MOVES:
                    self._move(clearing, replica, now, out)

    def _hurry(self, id: str, now: float, out: list[Action]) -> None:
        """Whose end is awaited may run far longer than was expected. The bound on waiting holds all the same: it is
        parked when the newcomer would be late."""
        cluster = self._cluster
        name, replica = cluster.ending[id], cluster.replicas.get(id)
        if replica is None:
            del cluster.ending[id]
            return
        if name and self._fairness.late(id, name, now):
            self._fairness.parked(id, name, now)
            self._placing.counts.parks += 1
            cluster.ending[id] = name = ""
        stop = cluster.stops.get(id)
        if not name and (stop is None or not stop.abort):
            self._placing.stop(replica, "parked", now, out, abort=True)

    def _move(self, clearing: _Clearing, replica: ReplicaRecord, now: float, out: list[Action]) -> None:
        """Empty a replica: to the one place that was planned, or to wherever there are slots."""
        id = replica.replica_id
        goals = [one.to_worker_id for one in clearing.plan.moves if one.replica_id == id]
        self._numbers += 1
        want = Move(
            move_id=f"room-{id}-{self._numbers}",
            from_worker_id=replica.worker_id,
            replica_id=id,
            to_worker_id=goals[0] if len(goals) == 1 else "",
            reason=MigrationReason.PLACEMENT,
        )
        clearing.moves[id] = want.move_id
        clearing.begun[id] = clearing.begun.get(id, 0) + 1
        self._placing.counts.moves += 1
        failure = self._begin_move(want, now, out)
        if failure is not None:
            del clearing.moves[id]
            self._give_up(clearing, failure, now, out)

    def _give_up(self, clearing: _Clearing, failure: Failure, now: float, out: list[Action]) -> None:
        """The room is not made. Who was told to go, goes; who still runs, stays."""
        room = self._cluster.rooms.pop(clearing.owner, None)
        self._clearings.pop(clearing.owner, None)
        if room is None:
            return
        self._soured[room.deployment] = now + SOUR_S
        facts: dict[str, Fact] = {
            "deployment": room.deployment,
            "worker_id": room.worker_ids[0],
            "code": failure.code.value,
            "reason": failure.message,
        }
        out.append(Note("placement.abandoned", facts))

    def check(self) -> None:
        """Whatever is being cleared is reserved, or was a moment ago; a replica leaves for one only."""
        leaving = [id for one in self._clearings.values() for id in one.moves]
        assert len(leaving) == len(frozenset(leaving)), f"a replica is moved for two: {sorted(leaving)}"
