"""Commands to workers: where one more replica goes, who leaves for it, and which stops may be commanded now. Pure.

What is commanded becomes part of the picture at once (`Cluster.loads`, `stops`, `rooms`), so that the next decision
knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from services.scheduler.books import Room, owner_of
from services.scheduler.cluster import Cluster
from services.scheduler.commands import PendingLoad, PendingStop
from services.scheduler.decisions import Decisions
from services.scheduler.demand import DemandKept
from services.scheduler.events import Action, CommandLoad, CommandStop, Decided, Fact, Note
from services.scheduler.fairness import Fairness
from services.scheduler.rules import Rules
from services.scheduler.scene import Scene, ask_for
from services.scheduler.terms import Ask, Candidate, Decision, Means, Outcome
from services.scheduler.view import View
from shared.capacity import context_tokens
from shared.contracts.placement import LoadReplica, StopReplica
from shared.contracts.records import DeploymentRecord, ReplicaRecord
from shared.errors import Failure

PATIENCE: Final = 3.0  # room that takes so many times its estimate is not waited for if there is another place

# Where one more replica goes: `choice.decide`, or what it is compared with.
Decide = Callable[[Ask, View, float], Decision]


@dataclass
class Counts:
    """Totals since the start, for metrics. `swaps` are loads for which somebody else had to leave."""

    decisions: int = 0
    deferrals: int = 0
    evictions: int = 0
    stops: int = 0
    moves: int = 0
    waits: int = 0
    parks: int = 0
    swaps: int = 0


class Placing:
    """Places replicas and stops them. `instance` makes its replica ids distinct from those of earlier schedulers.

    `wake` is the monotonic second from which on a refused stop may be commanded again; whoever asks resets it.
    """

    def __init__(
        self,
        rules: Rules,
        cluster: Cluster,
        scene: Scene,
        fairness: Fairness,
        demand: DemandKept,
        decide: Decide,
        *,
        instance: str,
    ) -> None:
        self.counts = Counts()
        self.decisions = Decisions(instance=instance)
        self.wake = math.inf
        self._rules = rules
        self._cluster = cluster
        self._scene = scene
        self._fairness = fairness
        self._demand = demand
        self._decide = decide
        self._instance = instance
        self._replica_numbers = 0
        self._not_before: dict[str, float] = {}

    # -- stops -----------------------------------------------------------------------------------------------------

    def stop(
        self,
        replica: ReplicaRecord,
        reason: str,
        now: float,
        out: list[Action],
        *,
        drain: bool = False,
        abort: bool = False,
    ) -> bool:
        """Command a stop unless one was refused a moment ago; whether it was commanded."""
        id = replica.replica_id
        again_at = self._not_before.get(id, -math.inf)
        if now < again_at < math.inf:
            self.wake = min(self.wake, again_at)
            return False
        self._not_before[id] = math.inf  # asked to go: its end is no failure
        self.counts.stops += 1
        self._cluster.stops[id] = PendingStop(
            id, replica.deployment, replica.worker_id, reason, drain, abort, now + self._rules.command_s
        )
        out.append(CommandStop(replica.worker_id, StopReplica(replica_id=id, reason=reason, drain=drain, abort=abort)))
        out.append(Note("replica.stopped", {"replica_id": id, "deployment": replica.deployment, "reason": reason}))
        return True

    def asked(self, replica_id: str) -> bool:
        """Whether this replica was asked to go."""
        return self._not_before.get(replica_id) == math.inf

    def gone(self, replica_id: str) -> bool:
        """This replica is gone; whether it had been asked to."""
        return self._not_before.pop(replica_id, None) == math.inf

    def refused(self, replica_id: str, again_at: float) -> None:
        """Its stop was refused, or came to nothing: it may be commanded again at this monotonic second."""
        self._not_before[replica_id] = again_at

    def expire(self, now: float) -> None:
        """Forget what is over."""
        over = [id for id, at in self._not_before.items() if at <= now or id not in self._cluster.replicas]
        for id in over:
            del self._not_before[id]

    @property
    def wake_for(self) -> float:
        """When somebody who was spared in the last decision may be asked to leave."""
        return self._scene.wake

    # -- placement ---------------------------------------------------------------------------------------------------

    def place(
        self,
        record: DeploymentRecord,
        since: float,
        now: float,
        out: list[Action],
        *,
        avoid: Mapping[str, Failure],
        load_s: float = 0.0,
        means: Means | None = None,
        explain: bool = True,
        move_id: str = "",
        at: str = "",
        away_from: str = "",
    ) -> tuple[Ask, Decision]:
        """Decide about one more replica, which has been wanted since `since`, and command what was decided.

        `avoid` maps servers that have just failed to load this model to how they did, `load_s` is what loading it takes
        about. A move that needs a destination
        says so (`move_id`), and on which worker, or on which not (`at`, `away_from`). Making room by other means than
        stopping idle replicas, waiting, and that it is impossible, are for the caller to see to.
        """
        ask = self._question(record, now, avoid, load_s, means, move_id)
        ask = replace(ask, at=at, away_from=away_from, explain=explain)
        decision = self._decide(ask, self._scene, now)
        if not self._worth_taking(ask.owner, decision, now):
            return ask, replace(decision, outcome=Outcome.WAIT, chosen=None)
        if decision.outcome is Outcome.PLACE:
            self._load(record, ask, decision, since, now, out)
        elif decision.outcome is Outcome.EVICT:
            self._evict(ask, decision, now, out)
        return ask, decision

    def frees(
        self,
        record: DeploymentRecord,
        worker_ids: Sequence[str],
        now: float,
        *,
        avoid: Mapping[str, Failure],
        load_s: float,
    ) -> bool:
        """Whether these workers could take one more replica now, if only idle ones leave: see `Scene.frees`."""
        return self._scene.frees(self._question(record, now, avoid, load_s, None, ""), worker_ids)

    def _question(
        self,
        record: DeploymentRecord,
        now: float,
        avoid: Mapping[str, Failure],
        load_s: float,
        means: Means | None,
        move_id: str,
    ) -> Ask:
        """What is asked about one more replica; the scene is set for it."""
        cluster, name = self._cluster, record.spec.name
        owner = owner_of(move_id) if move_id else name
        means = means if means is not None else Means(move=False, wait=False)
        if owner in cluster.rooms:
            # While room is being made nobody else is asked to leave who runs something; but what has become free
            # meanwhile is taken, or idle, if those who leave take their time.
            means = Means(evict=cluster.rooms[owner].slow, below_min=False, move=False, wait=False)
        reserve = cluster.outstanding(name) == 0 and not move_id
        self._scene.look(
            name, now, load_s=load_s, reserve=reserve, spared=lambda id: self._not_before.get(id, -math.inf) > now
        )
        return replace(ask_for(cluster, record, means=means), owner=owner, avoid=avoid)

    def _worth_taking(self, owner: str, decision: Decision, now: float) -> bool:
        """Whether a place is taken although room is being made elsewhere: it is sooner, or the room is late."""
        room, chosen = self._cluster.rooms.get(owner), decision.chosen
        if room is None or chosen is None or chosen.worker_ids == room.worker_ids or now >= room.patient_until:
            return True
        return now + chosen.startup.total_s < room.due_at

    def _load(
        self, record: DeploymentRecord, ask: Ask, decision: Decision, since: float, now: float, out: list[Action]
    ) -> None:
        chosen = decision.chosen
        assert chosen is not None
        worker = self._cluster.workers[chosen.worker_id]
        name, spec, facts, need = record.spec.name, record.spec, record.checkpoint, ask.need
        self._replica_numbers += 1
        replica_id = f"{record.slug}-{self._instance}{self._replica_numbers}"
        room = self._cluster.rooms.pop(ask.owner, None)
        self.counts.swaps += room is not None
        self._cluster.loads[replica_id] = PendingLoad(
            replica_id=replica_id,
            deployment=name,
            revision=record.revision,
            worker_id=worker.worker_id,
            server_id=worker.server_id,
            key=need.key,
            memory_bytes=self._share_bytes(ask, chosen),
            weight_bytes=need.weight_bytes,
            expires_at=now + self._rules.command_s,
            peer_worker_ids=chosen.worker_ids[1:],
        )
        self.counts.decisions += 1
        self.decisions.decided(decision, replica_id, now)
        missing_bytes = self._missing_bytes(need.key, need.weight_bytes, chosen)
        self._scene.estimator.promised(
            worker.server_id, replica_id, missing_bytes, chosen.tier, now, key=need.key
        )  # fmt: skip
        self._fairness.placed(replica_id, name, spec.priority, chosen.startup.load_s, now)
        message = LoadReplica(
            replica_id=replica_id,
            deployment=name,
            slug=record.slug,
            revision=record.revision,
            checkpoint_id=facts.checkpoint_id if facts is not None else "",
            source=spec.source,
            slots=spec.target_concurrency,
            max_context_tokens=(
                context_tokens(facts.max_context_tokens, spec.max_context_tokens)
                if facts is not None
                else spec.max_context_tokens or 0
            ),
            kv_bytes=need.kv_bytes,
            checkpoint=facts,
            peer_worker_ids=chosen.worker_ids[1:],
        )
        out.append(CommandLoad(worker.worker_id, message, since))
        facts_told: dict[str, Fact] = {
            "deployment": name,
            "replica_id": replica_id,
            "worker_id": worker.worker_id,
            "server_id": worker.server_id,
            "tier": chosen.tier,
            "outstanding": self._cluster.outstanding(name),
            "candidates": len(decision.candidates) + decision.more,
            "estimate_s": round(chosen.startup.total_s, 4),
            "for_move": ask.owner != name,
            "reasons": decision.reason,
        }
        out.append(Decided(facts_told, since))

    def _evict(self, ask: Ask, decision: Decision, now: float, out: list[Action]) -> None:
        chosen = decision.chosen
        assert chosen is not None
        cluster = self._cluster
        self.decisions.decided(decision, "", now)
        leaving = [cluster.replicas[id] for id in chosen.room.stops]
        self.reserve(ask.owner, ask, chosen, now, now + self._rules.command_s)
        self.counts.evictions += sum(self.stop(one, "evicted", now, out) for one in leaving)
        victims = ", ".join(f"{one.deployment} ({cluster.idle_s(one, now):.1f} s idle)" for one in leaving)
        out.append(Note("placement.evicted", self.told(ask, decision, victims=victims)))

    def reserve(self, owner: str, ask: Ask, chosen: Candidate, now: float, until: float, *, slow: bool = False) -> None:
        """Nobody else may take what those who leave for `owner` give back, until then. `slow`: some of them run
        something."""
        for id in chosen.room.victims:
            self._demand.evictions.evicted(self._cluster.replicas[id].deployment, ask.need.deployment, now)
        self._cluster.rooms[owner] = Room(
            deployment=ask.need.deployment,
            worker_ids=chosen.worker_ids,
            server_id=chosen.server_id,
            key=ask.need.key,
            memory_bytes=self._share_bytes(ask, chosen),
            weight_bytes=ask.need.weight_bytes,
            victims=chosen.room.victims,
            expires_at=until,
            owner=owner,
            slow=slow,
            due_at=now + chosen.startup.total_s,
            patient_until=now + PATIENCE * chosen.startup.room_s,
        )

    def told(self, ask: Ask, decision: Decision, *, victims: str) -> dict[str, Fact]:
        """The facts of a line about room that is being made."""
        chosen = decision.chosen
        assert chosen is not None
        return {
            "deployment": ask.need.deployment,
            "worker_id": chosen.worker_id,
            "server_id": chosen.server_id,
            "victims": victims,
            "estimate_s": round(chosen.startup.total_s, 4),
            "reasons": decision.reason,
        }

    def _share_bytes(self, ask: Ask, chosen: Candidate) -> int:
        """Bytes of each of the chosen workers."""
        return -(-self._cluster.memory_bytes(ask.need, self._cluster.workers[chosen.worker_id]) // ask.devices)

    def _missing_bytes(self, key: str, weight_bytes: int, chosen: Candidate) -> int:
        if chosen.tier == "dram":
            return 0
        server = self._cluster.servers[chosen.server_id]
        return max(0, weight_bytes - server.dram.get(key, 0))
