"""Decisions over time: demand → placement → load; idleness → stop; failure → another server, patience, an error. Pure.

Everything is level-triggered: whatever happened, `_reconcile` compares the picture with what is wanted and commands
the difference; commands that the registry does not show yet are part of the picture. A hint of demand is decided
within the same `handle`, from memory; a look at the registry and the queues every `look_interval_s` corrects whatever a
lost hint left wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, assert_never

import msgspec

from services.scheduler import autoscale, policy
from services.scheduler.autoscale import Trouble
from services.scheduler.cluster import Cluster, Need, serves
from services.scheduler.deployments import Deployments
from services.scheduler.events import (
    Action,
    Answer,
    DeleteAsked,
    DemandHinted,
    DeployAsked,
    DeploymentUnwritten,
    DeploymentWritten,
    EnsureQueues,
    Event,
    Fact,
    ImportDone,
    ImportMoved,
    LoadAccepted,
    LoadRefused,
    MigrateAccepted,
    MigrateRefused,
    MigrationHeard,
    MoveAsked,
    MoveOver,
    Note,
    OperationFailed,
    Oriented,
    QueuesEnsured,
    QueuesRead,
    QueuesUnensured,
    QueuesUnread,
    ReadQueues,
    ReadRecord,
    ReadRegistry,
    Reconnected,
    RecordHinted,
    RecordRead,
    RecordUnread,
    RegistryRead,
    RegistryUnread,
    ReliefAsked,
    ReplicaBroke,
    SourceInspected,
    StopAccepted,
    StopRefused,
)
from services.scheduler.moves import Moves
from services.scheduler.placing import Placing
from services.scheduler.policy import Decision, Outcome
from services.scheduler.rules import Rules
from shared.contracts.migration import MigrationReason
from shared.contracts.records import DeploymentState, Phase, ReplicaRecord, ReplicaState
from shared.errors import Code, Failure

# Records whose changes the picture follows; the others are nobody's business here.
FOLLOWED: Final = frozenset({"server", "worker", "replica"})


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


class Core:
    """The scheduler's state machine. `instance` makes its replica ids distinct from those of earlier schedulers."""

    def __init__(self, rules: Rules, *, instance: str) -> None:
        self.rules = rules
        self.cluster = Cluster(kv_bytes_max=rules.kv_bytes_max)
        self.deployments = Deployments(self.cluster)
        self.placing = Placing(rules, self.cluster, instance=instance)
        self.counts = self.placing.counts
        self.decisions = self.placing.decisions
        self._oriented = False
        self._registry_due = -math.inf
        self._registry_asked = False
        self._queues_due = -math.inf
        self._queues_asked = False
        self._queues_asked_at = -math.inf
        self._ensure_due = -math.inf
        self._ensuring = False
        self._reading: dict[tuple[str, str], bool] = {}
        self._wanting_since: dict[str, float] = {}
        self._troubles: dict[str, Trouble] = {}
        self._suspects: dict[str, Suspect] = {}
        self._blamed: dict[str, float] = {}
        self._deferred: dict[str, str] = {}
        self._unreachable: dict[str, str] = {}
        self._wake = -math.inf
        self.moves = Moves(rules, self.cluster, self.placing, self._troubles)

    # -- the machine ---------------------------------------------------------------------------------------------

    def handle(self, event: Event | None, now: float) -> list[Action]:
        """Take an event, or time; say what is wanted."""
        out: list[Action] = []
        if event is not None and not self._take(event, now, out):
            return out
        self._look(now, out)
        if self._oriented:
            self._reconcile(now, out)
        return out

    def deadline(self) -> float | None:
        """When time alone changes something."""
        return None if self._wake == math.inf else self._wake

    def check(self) -> None:
        """Every invariant: see those of the parts, and one load per deployment and worker."""
        self.cluster.check()
        self.deployments.check()
        self.moves.check()
        pairs = [(load.deployment, load.worker_id) for load in self.cluster.loads.values()]
        assert len(pairs) == len(frozenset(pairs)), f"a worker was told twice: {sorted(pairs)}"
        for name, room in self.cluster.rooms.items():
            assert room.expires_at < math.inf
            assert name == room.owner
        assert len(self.decisions) <= self.rules.decisions_kept

    def desired(self) -> dict[str, tuple[int, int, int]]:
        """Deployment → replicas desired, replicas there or coming, requests outstanding (for metrics)."""
        cluster = self.cluster
        return {
            name: (
                autoscale.wanted_replicas(cluster, name) if serves(record) else 0,
                len(cluster.serving(name)) + len(cluster.coming(name)),
                cluster.outstanding(name),
            )
            for name, record in sorted(cluster.deployments.items())
        }

    # -- events --------------------------------------------------------------------------------------------------

    def _take(self, event: Event, now: float, out: list[Action]) -> bool:
        """Put an event into the picture; whether anything may have to be decided because of it."""
        match event:
            case RegistryRead():
                self._registry_read(event, now, out)
            case RegistryUnread():
                self._registry_asked = False
                self._missed("registry", event.failure, out)
            case QueuesRead():
                self._queues_asked = False
                self._reached("queues", out)
                self.cluster.put_depths(event.depths, event.asked_at)
            case QueuesUnread():
                self._queues_asked = False
                self._missed("queues", event.failure, out)
                self._ensure_due = min(self._ensure_due, now + self.rules.look_interval_s)
            case RecordHinted():
                self._record_hinted(event, now, out)
            case RecordRead():
                self._record_read(event, now, out)
            case RecordUnread():
                self._reading.pop((event.kind, event.id), None)
            case DemandHinted():
                return self._demand_hinted(event, now)
            case Reconnected():
                self._registry_due = self._queues_due = self._ensure_due = now
            case QueuesEnsured():
                self._ensuring = False
            case QueuesUnensured():
                self._ensuring = False
                self._missed("queues", event.failure, out)
                self._ensure_due = now + self.rules.look_interval_s
            case DeployAsked() | DeleteAsked() | MoveAsked() if not self._oriented:
                out.append(Answer(event.reply, Failure(code=Code.UNAVAILABLE, message="The scheduler is starting.")))
            case DeployAsked():
                self._troubles.pop(event.spec.name, None)
                self.deployments.deploy(event, now, out)
            case DeleteAsked():
                self.deployments.delete(event, now, out)
            case SourceInspected():
                self.deployments.inspected(event, now, out)
            case ImportMoved():
                self.deployments.moved(event, now, out)
            case ImportDone():
                self.deployments.imported(event, now, out)
            case OperationFailed():
                self.deployments.failed(event, now, out)
            case DeploymentWritten():
                self.deployments.written(event, now, out)
            case DeploymentUnwritten():
                self.deployments.unwritten(event, now, out)
            case LoadAccepted():
                return False  # its record will show it
            case LoadRefused():
                load = self.cluster.loads.pop(event.replica_id, None)
                if load is not None:
                    failure = event.failure
                    if (
                        failure.code is Code.OUT_OF_MEMORY
                    ):  # refused at the door: the picture was old, not the model large
                        failure = Failure(code=Code.NO_CAPACITY, message=failure.message)
                    self._blame(load.replica_id, load.deployment, load.server_id, failure, now, out)
            case StopAccepted():
                return False  # its record will go
            case StopRefused():
                self._stop_refused(event, now, out)
            case ReplicaBroke():
                self._replica_broke(event, now, out)
            case MoveAsked():
                self.moves.asked(event, now, out)
            case MigrateAccepted():
                self.moves.accepted(event, now)
            case MigrateRefused():
                self.moves.refused(event, now)
            case MigrationHeard():
                self.moves.heard(event.message, now)
            case ReliefAsked():
                self.moves.relief(event.message, now, out)
            case MoveOver():
                self._move_over(event, now, out)
            case _:
                assert_never(event)
        return True

    def _registry_read(self, event: RegistryRead, now: float, out: list[Action]) -> None:
        self._registry_asked = False
        self._reached("registry", out)
        for replica in self.cluster.replace(event.view, event.asked_at, now):
            self._vanished(replica, now, out)
        if self._oriented:
            self.deployments.compare(event.view, event.asked_at, now, out)
        else:
            self.deployments.restore(event.view, now, out)
            self._oriented = True
            self._queues_due = self._ensure_due = now
            out.append(Oriented())
        self._cured(now, out)

    def _record_hinted(self, event: RecordHinted, now: float, out: list[Action]) -> None:
        if event.kind not in FOLLOWED:
            return
        key = (event.kind, event.id)
        if event.deleted:
            self._reading.pop(key, None)
            self._gone(event.kind, event.id, now, out)
        elif key in self._reading:
            self._reading[key] = True  # it changed again while it was being read
        else:
            self._reading[key] = False
            out.append(ReadRecord(event.kind, event.id))

    def _record_read(self, event: RecordRead, now: float, out: list[Action]) -> None:
        key = (event.kind, event.id)
        again = self._reading.pop(key, None)
        if again is None:
            return  # it was deleted while it was being read: what was read is older than that
        if again:
            self._reading[key] = False
            out.append(ReadRecord(event.kind, event.id))
        if event.record is None:
            self._gone(event.kind, event.id, now, out)
            return
        self.cluster.touched(event.kind, event.id, now)
        self.cluster.put(event.record, now)
        self._cured(now, out)
        if isinstance(event.record, ReplicaRecord) and event.record.running == 0 and self._wanting_since:
            self._read_queues_soon(now)  # somebody waits, and perhaps nobody needs this one any more

    def _gone(self, kind: str, id: str, now: float, out: list[Action]) -> None:
        self.cluster.touched(kind, id, now)
        if kind == "server":
            self.cluster.remove_server(id)
        elif kind == "worker":
            self.cluster.remove_worker(id)
        else:
            replica = self.cluster.remove_replica(id, now)
            if replica is not None:
                self._vanished(replica, now, out)

    def _demand_hinted(self, event: DemandHinted, now: float) -> bool:
        """Note the demand; whether it may change anything (most hints are for a replica that is there)."""
        name, cluster = event.deployment, self.cluster
        record = cluster.deployments.get(name)
        if record is None:
            return False
        cluster.hinted_at[name] = now
        have = len(cluster.serving(name)) + len(cluster.coming(name))
        if have < record.spec.max_replicas:
            # One replica may not be enough for all that is being asked; the queues know.
            self._read_queues_soon(now + self.rules.quick_look_s)
            self._wake = min(self._wake, self._queues_due)
        if have >= 1:
            return False
        if serves(record):
            self._wanting_since.setdefault(name, min(event.at, now))
        return True

    def _replica_broke(self, event: ReplicaBroke, now: float, out: list[Action]) -> None:
        cluster = self.cluster
        load = cluster.loads.pop(event.replica_id, None)
        cluster.touched("replica", event.replica_id, now)
        replica = cluster.remove_replica(event.replica_id, now)
        suspect = self._suspects.pop(event.replica_id, None)
        record = cluster.deployments.get(event.deployment)
        revision = load.revision if load else replica.revision if replica else None
        asked = self.placing.gone(event.replica_id)
        if asked or record is None or revision not in (None, record.revision):
            return  # nobody wanted it any more
        worker = cluster.workers.get(event.worker_id)
        server_id = worker.server_id if worker else suspect.server_id if suspect else ""
        self._blame(event.replica_id, event.deployment, server_id, event.failure, now, out)

    def _move_over(self, event: MoveOver, now: float, out: list[Action]) -> None:
        """Requests have left a replica, or have not: somebody may wait for its place."""
        if event.move.reason is MigrationReason.PLACEMENT and self._wanting_since:
            self._read_queues_soon(now)

    def _stop_refused(self, event: StopRefused, now: float, out: list[Action]) -> None:
        id = event.replica_id
        self.cluster.stops.pop(id, None)
        if event.failure.code is Code.NOT_FOUND:
            self._gone("replica", id, now, out)
            return
        self.placing.refused(id, now + self.rules.stop_retry_s)
        if event.failure.code is Code.BUSY:
            self.cluster.busy(id, now)
        for name, room in sorted(self.cluster.rooms.items()):
            if id in room.victims:
                del self.cluster.rooms[name]

    def _vanished(self, replica: ReplicaRecord, now: float, out: list[Action]) -> None:
        """A replica is gone. One that went while it was loading, unasked, has failed, even if nobody said so."""
        id = replica.replica_id
        asked = self.placing.gone(id)
        suspect = self._suspects.get(id)
        if suspect is not None:
            suspect.due = now + self.rules.word_s
        elif replica.state is ReplicaState.LOADING and not asked:
            # If its worker died of it, that counts too, or one bad model would end worker after worker.
            self._suspect(replica, now, loading=True)

    def _suspect(self, replica: ReplicaRecord, now: float, *, loading: bool) -> None:
        deployment = self.cluster.deployments.get(replica.deployment)
        worker = self.cluster.workers.get(replica.worker_id)
        drained = worker is not None and worker.phase is not Phase.READY
        if deployment is not None and deployment.revision == replica.revision and not drained:
            self._suspects[replica.replica_id] = Suspect(
                replica.deployment, replica.server_id, now + self.rules.word_s, loading
            )

    def _cured(self, now: float, out: list[Action]) -> None:
        """A ready replica ends its deployment's trouble, and tells the facts of a lazy one's checkpoint."""
        for _, replica in sorted(self.cluster.replicas.items()):
            record = self.cluster.deployments.get(replica.deployment)
            if record is None or replica.state is not ReplicaState.READY or replica.revision != record.revision:
                continue
            trouble = self._troubles.get(replica.deployment)
            if trouble is not None and self.cluster.ready_at.get(replica.replica_id, now) > trouble.failed_at:
                del self._troubles[replica.deployment]
                self.deployments.set_failure(replica.deployment, None)
            if record.checkpoint is None:
                self.deployments.learn(replica.deployment, replica.server_id, now, out)

    def _blame(
        self, replica_id: str, name: str, server_id: str, failure: Failure, now: float, out: list[Action]
    ) -> None:
        """A load failed: remember where and how. Several signs of one failure count once."""
        record = self.cluster.deployments.get(name)
        if record is None:
            return
        rules = self.rules
        if replica_id in self._blamed:
            return
        self.moves.load_failed(replica_id, failure)
        self._blamed[replica_id] = now + rules.forget_s
        trouble = self._troubles.setdefault(name, Trouble(failure))
        trouble.failed(
            server_id,
            failure,
            now,
            servers=policy.able_servers(self.cluster.need(record), self.cluster),
            most_failures=rules.most_failures,
            first_s=rules.first_backoff_s,
            most_s=rules.most_backoff_s,
        )
        self.counts.failures += 1
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

    def _announce(self, name: str, trouble: Trouble, now: float, out: list[Action]) -> None:
        """Requests of a hopeless deployment get an error instead of waiting, unless some replica answers them."""
        if not trouble.hopeless or any(one.state is ReplicaState.READY for one in self.cluster.serving(name)):
            return
        wait_s = round(max(0.0, trouble.until - now), 3)
        self.deployments.set_failure(name, msgspec.structs.replace(trouble.failure, retry_after_s=wait_s))
        facts: dict[str, Fact] = {"deployment": name, "code": trouble.failure.code.value, "for_s": wait_s}
        out.append(Note("deployment.suspended", facts))

    def _missed(self, what: str, failure: Failure, out: list[Action]) -> None:
        if what not in self._unreachable:
            out.append(Note("look.failed", {"what": what, "reason": failure.message}))
        self._unreachable[what] = failure.message

    def _reached(self, what: str, out: list[Action]) -> None:
        if self._unreachable.pop(what, None) is not None:
            out.append(Note("look.recovered", {"what": what}))

    # -- looks ---------------------------------------------------------------------------------------------------

    def _read_queues_soon(self, at: float) -> None:
        """Have the queues read at `at`, but not more often than every `quick_look_s`."""
        self._queues_due = min(self._queues_due, max(at, self._queues_asked_at + self.rules.quick_look_s))

    def _look(self, now: float, out: list[Action]) -> None:
        rules = self.rules
        if self._registry_due <= now and not self._registry_asked:
            self._registry_asked, self._registry_due = True, now + rules.look_interval_s
            out.append(ReadRegistry(now))
        self._wake = math.inf if self._registry_asked else self._registry_due
        if not self._oriented:
            return
        if self._queues_due <= now and not self._queues_asked:
            self._queues_asked, self._queues_asked_at = True, now
            self._queues_due = now + rules.look_interval_s
            out.append(ReadQueues(now))
        if self._ensure_due <= now and not self._ensuring:
            self._ensuring, self._ensure_due = True, now + rules.queues_interval_s
            out.append(EnsureQueues(tuple(record.slug for _, record in sorted(self.cluster.deployments.items()))))
        if not self._queues_asked:
            self._wake = min(self._wake, self._queues_due)
        if not self._ensuring:
            self._wake = min(self._wake, self._ensure_due)

    # -- what is wanted against what is there -------------------------------------------------------------------------

    def _reconcile(self, now: float, out: list[Action]) -> None:
        self.placing.wake = math.inf
        self._expire(now, out)
        self._stop_strays(now, out)
        for over in self.moves.step(now, out):
            self._take(over, now, out)
        self._stop_superfluous(now, out)
        self._want(now, out)
        self._serve(now, out)
        # Last: what was decided above may have changed records that are to be written.
        self._wake = min(self._wake, self.deployments.settle(now, out))
        self._wake = min(self._wake, self.placing.wake, self.moves.wake)
        for load in self.cluster.loads.values():
            self._wake = min(self._wake, load.expires_at)
        for stop in self.cluster.stops.values():
            self._wake = min(self._wake, stop.expires_at)
        for room in self.cluster.rooms.values():
            self._wake = min(self._wake, room.expires_at)

    def _expire(self, now: float, out: list[Action]) -> None:
        loads, stops, _ = self.cluster.expire(now)
        for stop in stops:
            self.placing.refused(stop.replica_id, now)
        for load in loads:
            failure = Failure(code=Code.WORKER_LOST, message="The worker never showed the replica.")
            self._blame(load.replica_id, load.deployment, load.server_id, failure, now, out)
        self._watch_suspects(now, out)
        self._blamed = {id: until for id, until in self._blamed.items() if until > now}
        self.placing.expire(now)
        for name in [name for name in self._deferred if name not in self.cluster.deployments]:
            del self._deferred[name]

    def _watch_suspects(self, now: float, out: list[Action]) -> None:
        for id, replica in sorted(self.cluster.replicas.items()):
            leaving = replica.state is ReplicaState.DRAINING and id not in self._suspects
            if leaving and not self.placing.asked(id):
                self._suspect(replica, now, loading=id not in self.cluster.ready_at)
        for id, suspect in sorted(self._suspects.items()):
            shown = self.cluster.replicas.get(id)
            worker = self.cluster.workers.get(shown.worker_id) if shown is not None else None
            if worker is not None and worker.phase is not Phase.READY:
                del self._suspects[id]  # its worker drains: that is why it leaves
            elif suspect.due > now:
                self._wake = min(self._wake, suspect.due)
            elif id not in self.cluster.replicas:
                del self._suspects[id]
                if suspect.loading:
                    failure = Failure(code=Code.WORKER_LOST, message="The replica went away while it was loading.")
                    self._blame(id, suspect.deployment, suspect.server_id, failure, now, out)

    def _stop_strays(self, now: float, out: list[Action]) -> None:
        """Replicas of no deployment, or of one that is being deleted, end at once; those of an old revision finish."""
        for id, replica in sorted(self.cluster.replicas.items()):
            if id in self.cluster.stops:
                continue
            record = self.cluster.deployments.get(replica.deployment)
            if record is None or record.state is DeploymentState.DELETING:
                self.placing.stop(replica, "deleted", now, out, abort=True)
            elif replica.revision != record.revision:
                self.placing.stop(replica, "revision", now, out, drain=True)

    def _stop_superfluous(self, now: float, out: list[Action]) -> None:
        for name, record in sorted(self.cluster.deployments.items()):
            if not serves(record):
                continue
            for replica in autoscale.superfluous(self.cluster, name, now):
                self.placing.stop(replica, "keep_alive", now, out)
            at = autoscale.next_superfluous_at(self.cluster, name, now)
            if at is not None and at > now:
                self._wake = min(self._wake, at)

    def _want(self, now: float, out: list[Action]) -> None:
        """Since when each deployment has been wanting replicas; those in trouble wait their time out."""
        for name, record in sorted(self.cluster.deployments.items()):
            trouble = self._troubles.get(name)
            if trouble is not None:
                self._rest(name, trouble, now, out)
            elif record.failure is not None:
                # Left by an earlier scheduler, which took the reasons with it: start afresh.
                self.deployments.set_failure(name, None)
            if self._missing(name) > 0:
                self._wanting_since.setdefault(name, now)
            else:
                self._wanting_since.pop(name, None)
                self._deferred.pop(name, None)
                self.cluster.rooms.pop(name, None)
        for name in [name for name in self._wanting_since if name not in self.cluster.deployments]:
            del self._wanting_since[name]
            self.cluster.rooms.pop(name, None)
        for name in [name for name in self._troubles if name not in self.cluster.deployments]:
            del self._troubles[name]

    def _rest(self, name: str, trouble: Trouble, now: float, out: list[Action]) -> None:
        if trouble.until > now:
            self._wake = min(self._wake, trouble.until)
            return
        if trouble.hopeless:
            self.deployments.set_failure(name, None)
            trouble.rest()
            out.append(Note("deployment.resumed", {"deployment": name}))
        able = policy.able_servers(self.cluster.need(self.cluster.deployments[name]), self.cluster)
        ago_s = now - trouble.failed_at
        if all(one in trouble.avoid for one in able) or ago_s >= self.rules.most_backoff_s:
            trouble.rest()
        elif ago_s >= self.rules.first_backoff_s:
            trouble.forgive()
        else:
            self._wake = min(self._wake, trouble.failed_at + self.rules.first_backoff_s)
        if now - trouble.until >= self.rules.forget_s:
            del self._troubles[name]

    def _missing(self, name: str) -> int:
        """Replicas that a deployment lacks."""
        record = self.cluster.deployments[name]
        if not serves(record):
            return 0
        wanted = autoscale.wanted_replicas(self.cluster, name)
        return wanted - len(self.cluster.serving(name)) - len(self.cluster.coming(name))

    def _serve(self, now: float, out: list[Action]) -> None:
        """Place what is missing, whoever has waited longest first."""
        suspended = frozenset(one.deployment for one in self._suspects.values() if one.due > now)
        for name in sorted(self._wanting_since, key=lambda one: (self._wanting_since[one], one)):
            trouble = self._troubles.get(name)
            if name in suspended or (trouble is not None and trouble.until > now):
                continue
            for _ in range(self._missing(name)):
                if not self._place(name, now, out):
                    break

    def _place(self, name: str, now: float, out: list[Action]) -> bool:
        """Decide about one replica; whether it was placed."""
        record = self.cluster.deployments[name]
        trouble = self._troubles.get(name)
        decision = self.placing.place(
            record, self._wanting_since.get(name, now), now, out, avoid=trouble.avoid if trouble is not None else {}
        )
        match decision.outcome:
            case Outcome.PLACE:
                self._deferred.pop(name, None)
                return True
            case Outcome.EVICT:
                pass
            case Outcome.IMPOSSIBLE:
                self._despair(name, self.cluster.need(record), now, out)
                self._defer(decision, now, out)
            case Outcome.WAIT:
                if name not in self.cluster.rooms:
                    self._defer(decision, now, out)
            case _:
                assert_never(decision.outcome)
        return False

    def _defer(self, decision: Decision, now: float, out: list[Action]) -> None:
        """Nothing can be done now: say so once, and come back when a young replica may be evicted."""
        name, reasons = decision.deployment, decision.reasons()
        # What is short may change with every byte; the log wants to know when the kind of the reason changes.
        kinds = decision.outcome.value + "".join(one.refused.split(" ")[0] for one in decision.candidates)
        changed = self._deferred.get(name) != kinds
        # Perhaps somebody is idle by now, which the queues know first.
        self._read_queues_soon(now if changed else self._queues_asked_at + 0.25 * self.rules.look_interval_s)
        if not self._queues_asked:
            self._wake = min(self._wake, self._queues_due)
        if changed:
            self._deferred[name] = kinds
            self.counts.deferrals += 1
            self.decisions.append(decision)
            facts: dict[str, Fact] = {
                "deployment": name,
                "outstanding": self.cluster.outstanding(name),
                "candidates": len(decision.candidates),
                "reasons": reasons,
            }
            out.append(Note("placement.deferred", facts))
        for at in self.cluster.ready_at.values():
            due = at + self.rules.min_ready_s
            if due > now:
                self._wake = min(self._wake, due)

    def _despair(self, name: str, need: Need, now: float, out: list[Action]) -> None:
        """No server is large enough, even empty: after a while its requests fail instead of waiting for one that is."""
        due = self._wanting_since.get(name, now) + self.rules.patience_s
        if due > now:
            self._wake = min(self._wake, due)
            return
        other = Failure(code=Code.NO_CAPACITY, message="No server is large enough.")
        failure = policy.too_large(need, self.cluster) or other
        trouble = self._troubles.setdefault(name, Trouble(failure))
        trouble.failure, trouble.hopeless = failure, True
        trouble.until = now + self.rules.most_backoff_s
        self._wake = min(self._wake, trouble.until)
        self._announce(name, trouble, now, out)
