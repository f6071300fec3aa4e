"""Commands to workers: where one more replica goes, who leaves for it, and which stops may be commanded now. Pure.

What is commanded becomes part of the picture at once (`Cluster.loads`, `stops`, `rooms`), so that the next decision
knows of it.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from dataclasses import dataclass

from services.scheduler import autoscale, policy
from services.scheduler.books import Room, owner_of
from services.scheduler.cluster import Cluster, Need, PendingLoad, PendingStop
from services.scheduler.events import Action, CommandLoad, CommandStop, Decided, Note
from services.scheduler.policy import Decision, Outcome
from services.scheduler.rules import Rules
from shared.capacity import context_tokens
from shared.contracts.placement import LoadReplica, StopReplica
from shared.contracts.records import DeploymentRecord, ReplicaRecord
from shared.errors import Failure


@dataclass
class Counts:
    """Totals since the start, for metrics."""

    decisions: int = 0
    deferrals: int = 0
    evictions: int = 0
    failures: int = 0
    stops: int = 0


class Placing:
    """Places replicas and stops them. `instance` makes its replica ids distinct from those of earlier schedulers.

    `wake` is the monotonic second from which on a refused stop may be commanded again; whoever asks resets it.
    """

    def __init__(self, rules: Rules, cluster: Cluster, *, instance: str) -> None:
        self.counts = Counts()
        self.decisions: collections.deque[Decision] = collections.deque(maxlen=rules.decisions_kept)
        self.wake = math.inf
        self._rules = rules
        self._cluster = cluster
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
        self._not_before = {
            id: at for id, at in self._not_before.items() if id in self._cluster.replicas and (at > now)
        }

    # -- placement ---------------------------------------------------------------------------------------------------

    def place(
        self,
        record: DeploymentRecord,
        since: float,
        now: float,
        out: list[Action],
        *,
        avoid: Mapping[str, Failure],
        move_id: str = "",
        at: str = "",
        away_from: str = "",
    ) -> Decision:
        """Decide about one more replica, which has been wanted since `since`, and command what was decided.

        `avoid` maps servers that have just failed to load this model to how they did. A move that needs a destination
        says so (`move_id`), and on which worker, or on which not (`at`, `away_from`). Waiting, and that it is
        impossible, are for the caller to tell.
        """
        cluster, name = self._cluster, record.spec.name
        owner = owner_of(move_id) if move_id else name
        need = cluster.need(record)
        # While room is being made nobody else is asked to leave; but what has become free meanwhile is taken.
        idle = (
            [] if owner in cluster.rooms else autoscale.victims(cluster, name, now, min_ready_s=self._rules.min_ready_s)
        )
        if cluster.outstanding(name) == 0 and not move_id:
            # A reserve never takes the place of another reserve, or the two would do so for ever.
            idle = [one for one in idle if not one.below_min]
        idle = [one for one in idle if self._not_before.get(one.replica_id, -math.inf) <= now]
        decision = policy.decide(need, cluster, idle, now, avoid=avoid, owner=owner, at=at, away_from=away_from)
        if decision.outcome is Outcome.PLACE:
            self._load(record, need, decision, owner, since, now, out)
        elif decision.outcome is Outcome.EVICT:
            self._evict(need, decision, owner, now, out)
        return decision

    def _load(
        self,
        record: DeploymentRecord,
        need: Need,
        decision: Decision,
        owner: str,
        since: float,
        now: float,
        out: list[Action],
    ) -> None:
        chosen = decision.chosen
        assert chosen is not None
        worker = self._cluster.workers[chosen.worker_id]
        name, spec, facts = record.spec.name, record.spec, record.checkpoint
        self._replica_numbers += 1
        replica_id = f"{record.slug}-{self._instance}{self._replica_numbers}"
        self._cluster.loads[replica_id] = PendingLoad(
            replica_id=replica_id,
            deployment=name,
            revision=record.revision,
            worker_id=worker.worker_id,
            server_id=worker.server_id,
            key=need.key,
            memory_bytes=self._cluster.memory_bytes(need, worker),
            weight_bytes=need.weight_bytes,
            expires_at=now + self._rules.command_s,
        )
        self._cluster.rooms.pop(owner, None)
        self.counts.decisions += 1
        self.decisions.append(decision)
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
        )
        out.append(CommandLoad(worker.worker_id, message, since))
        out.append(
            Decided(
                {
                    "deployment": name,
                    "replica_id": replica_id,
                    "worker_id": worker.worker_id,
                    "server_id": worker.server_id,
                    "tier": chosen.tier,
                    "outstanding": self._cluster.outstanding(name),
                    "candidates": len(decision.candidates),
                    "for_move": owner != name,
                    "reasons": decision.reasons(),
                },
                since,
            )
        )

    def _evict(self, need: Need, decision: Decision, owner: str, now: float, out: list[Action]) -> None:
        chosen = decision.chosen
        assert chosen is not None
        cluster = self._cluster
        worker = cluster.workers[chosen.worker_id]
        self.decisions.append(decision)
        asked = [self.stop(cluster.replicas[one.replica_id], "evicted", now, out) for one in decision.victims]
        self.counts.evictions += sum(asked)
        cluster.rooms[owner] = Room(
            deployment=need.deployment,
            worker_ids=(worker.worker_id,),
            server_id=worker.server_id,
            key=need.key,
            memory_bytes=cluster.memory_bytes(need, worker),
            weight_bytes=need.weight_bytes,
            victims=tuple(one.replica_id for one in decision.victims),
            expires_at=now + self._rules.command_s,
            owner=owner,
        )
        out.append(
            Note(
                "placement.evicted",
                {
                    "deployment": need.deployment,
                    "worker_id": worker.worker_id,
                    "server_id": worker.server_id,
                    "victims": ", ".join(f"{one.deployment} ({one.idle_s:.1f} s idle)" for one in decision.victims),
                    "reasons": decision.reasons(),
                },
            )
        )
