"""What goes wrong with loads: which servers fail for which deployment, who is left alone for how long. Pure.

A load that fails is tried elsewhere at once; when all servers have failed, the deployment is left alone (`Trouble`),
and its requests get the failure if there is no hope. A replica that leaves, or has left, without having been asked is a
*suspect*: its worker says why in a moment, and until then nothing is placed for its deployment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from services.scheduler.autoscale import Trouble
from services.scheduler.choice import able_servers, too_large
from services.scheduler.cluster import Cluster
from services.scheduler.commands import Need
from services.scheduler.deployments import Deployments
from services.scheduler.events import Action, Fact, Note
from services.scheduler.placing import Placing
from services.scheduler.rules import Rules
from shared.contracts.records import Phase, ReplicaRecord, ReplicaState
from shared.errors import Code, Failure


@dataclass(slots=True)
class Suspect:
    """A replica that leaves, or has left, without having been asked; its worker says why in a moment.

    Until `due` (monotonic second) nothing is placed for its deployment: the next one might do the same. `loading`: it
    had never been ready, so that silence means that its load failed.
    """

    deployment: str
    server_id: str
    due: float
    loading: bool


class Health:
    """See the module. `wake` is when a suspicion is over; `review_at` asks for a deployment to be looked at then."""

    def __init__(
        self,
        rules: Rules,
        cluster: Cluster,
        deployments: Deployments,
        placing: Placing,
        review_at: Callable[[str, float], None],
    ) -> None:
        self.wake = math.inf
        self.failures = 0
        self._rules = rules
        self._cluster = cluster
        self._deployments = deployments
        self._placing = placing
        self._review_at = review_at
        self._troubles: dict[str, Trouble] = {}
        self._suspects: dict[str, Suspect] = {}
        self._blamed: dict[str, float] = {}

    @property
    def troubles(self) -> Mapping[str, Trouble]:
        """Deployment → its trouble."""
        return self._troubles

    def avoided(self, name: str) -> Mapping[str, Failure]:
        """Servers that have just failed to load this model, and how."""
        trouble = self._troubles.get(name)
        return trouble.avoid if trouble is not None else {}

    def resting(self, name: str, now: float) -> bool:
        """Whether nothing is to be placed for this deployment now."""
        trouble = self._troubles.get(name)
        return trouble is not None and trouble.until > now

    def suspended(self, now: float) -> frozenset[str]:
        """Deployments one of whose replicas has just left without having been asked."""
        return frozenset(one.deployment for one in self._suspects.values() if one.due > now)

    # -- what happens ----------------------------------------------------------------------------------------------

    def forgive(self, name: str) -> None:
        """It is deployed anew: what failed may go well now."""
        self._troubles.pop(name, None)

    def said(self, replica_id: str) -> Suspect | None:
        """Its worker has said what became of it; what was suspected."""
        return self._suspects.pop(replica_id, None)

    def vanished(self, replica: ReplicaRecord, now: float, *, asked: bool) -> None:
        """A replica is gone. One that went while it was loading, unasked, has failed, even if nobody said so."""
        suspect = self._suspects.get(replica.replica_id)
        if suspect is not None:
            suspect.due = now + self._rules.word_s
        elif replica.state is ReplicaState.LOADING and not asked:
            # If its worker died of it, that counts too, or one bad model would end worker after worker.
            self._suspect(replica, now, loading=True)

    def _suspect(self, replica: ReplicaRecord, now: float, *, loading: bool) -> None:
        deployment = self._cluster.deployments.get(replica.deployment)
        worker = self._cluster.workers.get(replica.worker_id)
        drained = worker is not None and worker.phase is not Phase.READY
        if deployment is not None and deployment.revision == replica.revision and not drained:
            self._suspects[replica.replica_id] = Suspect(
                replica.deployment, replica.server_id, now + self._rules.word_s, loading
            )

    def blame(
        self, replica_id: str, name: str, server_id: str, failure: Failure, now: float, out: list[Action]
    ) -> bool:
        """A load failed: remember where and how; whether that is new. Several signs of one failure count once."""
        record = self._cluster.deployments.get(name)
        if record is None or replica_id in self._blamed:
            return False
        rules = self._rules
        self._blamed[replica_id] = now + rules.forget_s
        trouble = self._troubles.setdefault(name, Trouble(failure))
        trouble.failed(
            server_id,
            failure,
            now,
            servers=able_servers(self._cluster.need(record), self._cluster),
            most_failures=rules.most_failures,
            first_s=rules.first_backoff_s,
            most_s=rules.most_backoff_s,
        )
        self.failures += 1
        self._cluster.touch(name)
        facts: dict[str, Fact] = {
            "deployment": name,
            "replica_id": replica_id,
            "server_id": server_id,
            "code": failure.code.value,
            "reason": failure.message,
            "failures": trouble.failures,
            "retry_in_s": round(max(0.0, trouble.until - now), 3),
        }
        out.append(Note("replica.failed", facts))
        self._announce(name, trouble, now, out)
        return True

    def despair(self, name: str, need: Need, now: float, out: list[Action]) -> None:
        """No server is large enough, even empty: its requests fail instead of waiting for one that is."""
        other = Failure(code=Code.NO_CAPACITY, message="No server is large enough.")
        failure = too_large(need, self._cluster) or other
        trouble = self._troubles.setdefault(name, Trouble(failure))
        trouble.failure, trouble.hopeless = failure, True
        trouble.until = now + self._rules.most_backoff_s
        self._review_at(name, trouble.until)
        self._announce(name, trouble, now, out)

    def _announce(self, name: str, trouble: Trouble, now: float, out: list[Action]) -> None:
        """Requests of a hopeless deployment get an error instead of waiting, unless some replica answers them."""
        if not trouble.hopeless or any(one.state is ReplicaState.READY for one in self._cluster.serving(name)):
            return
        wait_s = round(max(0.0, trouble.until - now), 3)
        self._deployments.set_failure(name, msgspec.structs.replace(trouble.failure, retry_after_s=wait_s))
        facts: dict[str, Fact] = {"deployment": name, "code": trouble.failure.code.value, "for_s": wait_s}
        out.append(Note("deployment.suspended", facts))

    # -- with time -------------------------------------------------------------------------------------------------

    def review(self, name: str, now: float, out: list[Action]) -> None:
        """A ready replica ends its deployment's trouble, and time does; a failure that nobody knows is cleared."""
        cluster = self._cluster
        trouble, record = self._troubles.get(name), cluster.deployments.get(name)
        if record is None:
            self._troubles.pop(name, None)
            return
        if trouble is None:
            if record.failure is not None:
                # Left by an earlier scheduler, which took the reasons with it: start afresh.
                self._deployments.set_failure(name, None)
            return
        ready = (one for one in cluster.replicas_of(name) if one.state is ReplicaState.READY)
        if any(
            one.revision == record.revision and cluster.ready_at.get(one.replica_id, now) > trouble.failed_at
            for one in ready
        ):
            del self._troubles[name]
            self._deployments.set_failure(name, None)
        else:
            self._rest(name, trouble, now, out)

    def _rest(self, name: str, trouble: Trouble, now: float, out: list[Action]) -> None:
        if trouble.until > now:
            self._review_at(name, trouble.until)
            return
        if trouble.hopeless:
            self._deployments.set_failure(name, None)
            trouble.rest()
            out.append(Note("deployment.resumed", {"deployment": name}))
        able = able_servers(self._cluster.need(self._cluster.deployments[name]), self._cluster)
        # Moments are compared, not spans: a span may come out a rounding short at the very moment it is due.
        forgiven_at = trouble.failed_at + self._rules.first_backoff_s
        if all(one in trouble.avoid for one in able) or now >= trouble.failed_at + self._rules.most_backoff_s:
            trouble.rest()
        elif now >= forgiven_at:
            trouble.forgive()
        else:
            self._review_at(name, forgiven_at)
        if now - trouble.until >= self._rules.forget_s:
            del self._troubles[name]
        else:
            self._review_at(name, now + self._rules.most_backoff_s)

    def watch(self, now: float, out: list[Action]) -> list[tuple[str, Suspect]]:
        """Whoever leaves unasked is suspected; returns those that went without a word while they were loading."""
        cluster = self._cluster
        self.wake = math.inf
        if self._blamed and next(iter(self._blamed.values())) <= now:
            self._blamed = {id: until for id, until in self._blamed.items() if until > now}
        for id in cluster.leaving_replicas:
            if id not in self._suspects and not self._placing.asked(id):
                self._suspect(cluster.replicas[id], now, loading=id not in cluster.ready_at)
        silent: list[tuple[str, Suspect]] = []
        for id, suspect in sorted(self._suspects.items()):
            shown = cluster.replicas.get(id)
            worker = cluster.workers.get(shown.worker_id) if shown is not None else None
            if worker is not None and worker.phase is not Phase.READY:
                del self._suspects[id]  # its worker drains: that is why it leaves
            elif suspect.due > now:
                self.wake = min(self.wake, suspect.due)
            elif id not in cluster.replicas:
                del self._suspects[id]
                cluster.touch(suspect.deployment)
                if suspect.loading:
                    silent.append((id, suspect))
        return silent
