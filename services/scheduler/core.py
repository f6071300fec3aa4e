"""Decisions over time: demand → placement → load; idleness → stop; failure → another server, patience, an error. Pure.

Everything is level-triggered: whatever happened, `_reconcile` compares the picture with what is wanted and commands
the difference; commands that the registry does not show yet are part of the picture. Only deployments of which
something has changed, or whose time has come, are looked at: what one event costs does not depend on how many there
are. A hint of demand is decided within the same `handle`, from memory; a look at the registry and the queues every
`look_interval_s` corrects whatever a lost hint left wrong.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Final, assert_never

from services.scheduler import autoscale, choice
from services.scheduler.clearing import Clearing
from services.scheduler.cluster import Cluster, serves
from services.scheduler.commands import PendingStop
from services.scheduler.deferral import FIRST, Deferrals
from services.scheduler.demand import DemandKept
from services.scheduler.deployments import Deployments
from services.scheduler.estimate import Estimator, Priors
from services.scheduler.events import (
    Action,
    Answer,
    CommandLoad,
    DeleteAsked,
    DemandHinted,
    DeployAsked,
    DeploymentUnwritten,
    DeploymentWritten,
    Event,
    ExplainAsked,
    Fact,
    ImportDone,
    ImportMoved,
    LoadAccepted,
    LoadRefused,
    LoadReported,
    MigrateAccepted,
    MigrateRefused,
    MigrationHeard,
    MoveAsked,
    MoveOver,
    Note,
    OperationFailed,
    Oriented,
    PrefetchDone,
    PrefetchRefused,
    QueuesEnsured,
    QueuesRead,
    QueuesUnensured,
    QueuesUnread,
    Reconnected,
    RecordHinted,
    RecordRead,
    RecordUnread,
    RegistryRead,
    RegistryUnread,
    ReliefAsked,
    ReplicaBroke,
    SourceInspected,
    StartupMeasured,
    StopAccepted,
    StopRefused,
)
from services.scheduler.fairness import Bound, Fairness
from services.scheduler.figures import Figures, Tally, parks
from services.scheduler.foresight import Foresight
from services.scheduler.health import Health
from services.scheduler.looks import FOLLOWED, Looks
from services.scheduler.moves import Moves
from services.scheduler.placing import Decide, Placing
from services.scheduler.rules import Rules
from services.scheduler.scene import Scene
from services.scheduler.terms import Decision, Means, Outcome
from services.scheduler.underway import Underway
from shared.contracts.migration import MigrationReason
from shared.contracts.placement import Explain, Explanation, ReplicaLoaded
from shared.contracts.records import DeploymentRecord, DeploymentState, ReplicaRecord, ReplicaState, ServerRecord
from shared.errors import Code, Failure

# What fits nowhere costs a close look each time; so many are looked at within one event, the others a moment later.
MOST_TRIES: Final = 4
LATER_S: Final = 0.02
STARTING: Final = Failure(code=Code.UNAVAILABLE, message="The scheduler is starting.", retry_after_s=1.0)
EXPLAINED_S: Final = 5.0  # why somebody waits is worked out in full so often


class Core:
    """The scheduler's state machine. `instance` makes its replica ids distinct from those of earlier schedulers;
    `decide` is the policy, `priors` what is believed before anything was measured."""

    def __init__(
        self, rules: Rules, *, instance: str, decide: Decide = choice.decide, priors: Priors | None = None
    ) -> None:
        self.rules = rules
        self.cluster = cluster = Cluster(kv_bytes_max=rules.kv_bytes_max)
        self.estimator = Estimator(priors or Priors())
        self.fairness = Fairness(rules.fairness)
        self.demand = DemandKept()
        self.tally = Tally()
        self.foresight = Foresight(rules.ahead, cluster, self.estimator, self.demand.arrivals, self.tally)
        self.deployments = Deployments(cluster)
        scene = Scene(rules, cluster, self.estimator, self.fairness, self.demand, self._destinations)
        self.placing = Placing(rules, cluster, scene, self.fairness, self.demand, decide, instance=instance)
        self.health = Health(rules, cluster, self.deployments, self.placing, self._review_at)
        self.looks = Looks(rules, cluster)
        self.moves = Moves(rules, cluster, self.placing, self.health.troubles)
        self.clearing = Clearing(rules, cluster, self.placing, self.fairness, self.moves.begin)
        self.counts = self.placing.counts
        self.decisions = self.placing.decisions
        self._underway = Underway(cluster, self.clearing, self.fairness, self.decisions, self.estimator.remaining_s)
        self._bound: Bound | None = None
        self._startups: dict[str, float] = {}
        self._oriented = False
        self._wanting_since: dict[str, float] = {}
        self._deferrals = Deferrals(rules, cluster, self.fairness, self._frees)
        self._reviews: list[tuple[float, str]] = []
        self._review_due: dict[str, float] = {}
        self._wake = -math.inf

    # -- the machine ---------------------------------------------------------------------------------------------

    def handle(self, event: Event | None, now: float) -> list[Action]:
        """Take an event, or time; say what is wanted."""
        out: list[Action] = []
        if event is not None and not self._take(event, now, out):
            return out
        self.looks.step(now, out, oriented=self._oriented)
        self._wake = math.inf
        if self._oriented:
            self._reconcile(now, out)
        return out

    def deadline(self) -> float | None:
        """When time alone changes something."""
        wake = min(self._wake, self.looks.wake)
        return None if wake == math.inf else wake

    def check(self) -> None:
        """Every invariant: see those of the parts, and one load per deployment and worker."""
        self.cluster.check()
        self.deployments.check()
        self.moves.check()
        self.clearing.check()
        self.fairness.check()
        self.decisions.check()
        pairs = [(load.deployment, load.worker_id) for load in self.cluster.loads.values()]
        assert len(pairs) == len(frozenset(pairs)), f"a worker was told twice: {sorted(pairs)}"
        for name, room in self.cluster.rooms.items():
            assert room.expires_at < math.inf
            assert name == room.owner

    def desired(self) -> dict[str, tuple[int, int, int]]:
        """Deployment → replicas desired, replicas there or coming, requests outstanding (for metrics)."""
        cluster = self.cluster
        return {
            name: (
                autoscale.wanted_replicas(cluster, name, floor=self.demand.floor(name)) if serves(record) else 0,
                len(cluster.serving(name)) + len(cluster.coming(name)),
                cluster.outstanding(name),
            )
            for name, record in sorted(cluster.deployments.items())
        }

    def figures(self) -> Figures:
        """What was done so far (for metrics)."""
        return Figures(
            loads=self.counts.decisions,
            evictions=self.counts.evictions,
            finished_requests=self.tally.finished_requests,
            parks=parks(self.fairness.counts),
            moves=dict(self.tally.moves),
            prefetches=dict(self.tally.prefetches),
            bound=self._bound,
        )

    # -- events --------------------------------------------------------------------------------------------------

    def _take(self, event: Event, now: float, out: list[Action]) -> bool:
        """Put an event into the picture; whether anything may have to be decided because of it."""
        match event:
            case RegistryRead():
                self._registry_read(event, now, out)
            case RegistryUnread():
                self.looks.registry_unread(event.failure, out)
            case QueuesRead():
                self.looks.queues_read(out)
                self.cluster.put_depths(event.depths, event.asked_at)
            case QueuesUnread():
                self.looks.queues_unread(event.failure, now, out)
            case RecordHinted():
                self._record_hinted(event, now, out)
            case RecordRead():
                self._record_read(event, now, out)
            case RecordUnread():
                self.looks.dropped(event.kind, event.id)
            case DemandHinted():
                return self._demand_hinted(event, now)
            case Reconnected():
                self.cluster.absent.all_may_speak()
                self.looks.all_soon(now)
            case QueuesEnsured():
                self.looks.queues_ensured()
            case QueuesUnensured():
                self.looks.queues_unensured(event.failure, now, out)
            case DeployAsked() | DeleteAsked() | MoveAsked() if not self._oriented:
                out.append(Answer(event.reply, STARTING))
            case DeployAsked():
                self.health.forgive(event.spec.name)
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
                self._load_refused(event, now, out)
            case StopAccepted():
                return False  # its record will go
            case StopRefused():
                self._stop_refused(event, now, out)
            case ReplicaBroke():
                self._replica_broke(event, now, out)
            case PrefetchDone() | PrefetchRefused():
                self.foresight.heard(event, now)
                return False
            case MoveAsked():
                self.moves.asked(event, now, out)
            case MigrateAccepted():
                self.moves.accepted(event, now)
            case MigrateRefused():
                self.moves.refused(event, now)
            case MigrationHeard():
                self.estimator.migrated(event.message, now)
                self.moves.heard(event.message, now)
            case ReliefAsked():
                self.moves.relief(event.message, now, out)
            case MoveOver():
                self._move_over(event, now, out)
            case ExplainAsked():
                out.append(Answer(event.reply, self._explanation(event.message, now)))
                return False
            case LoadReported():
                self._load_reported(event.report, now, out)
            case _:
                assert_never(event)
        return True

    def _registry_read(self, event: RegistryRead, now: float, out: list[Action]) -> None:
        self.looks.registry_read(out)
        stops = dict(self.cluster.stops)
        for said in event.view.replicas:
            self.tally.replica_said(said)
        for replica in self.cluster.replace(event.view, event.asked_at, now):
            self._vanished(replica, stops.get(replica.replica_id), now)
        for server in event.view.servers:
            self.estimator.server_said(server, now)
        for one in event.view.replicas:
            self.estimator.replica_said(one, now)
        self._count_places(now, out)
        self.foresight.look(now, out, waiting=bool(self._wanting_since))
        if self._oriented:
            self.deployments.compare(event.view, event.asked_at, now, out)
        else:
            self.deployments.restore(event.view, now, out)
            self._oriented = True
            self.looks.begin(now)
            out.append(Oriented())

    def _record_hinted(self, event: RecordHinted, now: float, out: list[Action]) -> None:
        if event.kind not in FOLLOWED:
            return
        if event.deleted:
            self.looks.dropped(event.kind, event.id)
            if event.kind == "replica":
                self.cluster.bury(event.id, now)
            self._gone(event.kind, event.id, now, out)
        else:
            if event.kind == "worker":
                self.cluster.absent.spoke(event.id)
            self.looks.hinted(event, out)

    def _record_read(self, event: RecordRead, now: float, out: list[Action]) -> None:
        if not self.looks.record_read(event.kind, event.id, out):
            return
        if event.record is None:
            self._gone(event.kind, event.id, now, out)
            return
        self.cluster.touched(event.kind, event.id, now)
        self.cluster.put(event.record, now)
        if isinstance(event.record, ServerRecord):
            self.estimator.server_said(event.record, now)
        elif isinstance(event.record, ReplicaRecord):
            self.estimator.replica_said(event.record, now)
            self.tally.replica_said(event.record)
        if isinstance(event.record, ReplicaRecord) and event.record.running == 0 and self._wanting_since:
            self.looks.queues_soon(now)  # somebody waits, and perhaps nobody needs this one any more

    def _gone(self, kind: str, id: str, now: float, out: list[Action]) -> None:
        self.cluster.touched(kind, id, now)
        if kind == "server":
            self.cluster.remove_server(id)
            self.estimator.forget_server(id)
            self.foresight.server_gone(id)
        elif kind == "worker":
            self.cluster.remove_worker(id)
        else:
            stop = self.cluster.stops.get(id)
            replica = self.cluster.remove_replica(id, now)
            if replica is not None:
                self._vanished(replica, stop, now)

    def _demand_hinted(self, event: DemandHinted, now: float) -> bool:
        """Note the demand; whether it may change anything (most hints are for a replica that is there)."""
        name, cluster = event.deployment, self.cluster
        record = cluster.deployments.get(name)
        if record is None:
            return False
        self.demand.heard(event, now)
        if event.gateway_id:
            cluster.touch(name)
        if not event.waiting:
            return False
        cluster.hinted_at[name] = now
        have = len(cluster.serving(name)) + len(cluster.coming(name))
        if have < record.spec.max_replicas:
            # One replica may not be enough for all that is being asked; the queues know.
            self.looks.queues_soon(now + self.rules.quick_look_s)
        if have >= 1:
            return False
        if serves(record):
            self._wanting_since.setdefault(name, min(event.at, now))
            cluster.touch(name)
        return True

    def _replica_broke(self, event: ReplicaBroke, now: float, out: list[Action]) -> None:
        cluster = self.cluster
        load = cluster.loads.pop(event.replica_id, None)
        cluster.touched("replica", event.replica_id, now)
        cluster.bury(event.replica_id, now)
        replica = cluster.remove_replica(event.replica_id, now)
        self._let_go(event.replica_id, now)
        suspect = self.health.said(event.replica_id)
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
        self.tally.moved(event.move.reason.value)
        if event.move.reason is MigrationReason.PLACEMENT:
            self.clearing.over(event.move, event.answer, now, out)
            self.looks.queues_soon(now)

    def _load_refused(self, event: LoadRefused, now: float, out: list[Action]) -> None:
        load = self.cluster.loads.pop(event.replica_id, None)
        if load is None:
            return
        failure = event.failure
        if failure.code is Code.UNAVAILABLE:  # nobody answers there: neither the model's nor the server's fault
            self.cluster.absent.silent(load.worker_id, now + self.rules.silence_s)
            worker = self.cluster.workers.get(load.worker_id)
            if worker is not None:
                self.cluster.put(worker, now)
            out.append(Note("worker.silent", {"worker_id": load.worker_id, "replica_id": load.replica_id}))
            self._let_go(load.replica_id, now)
            self.moves.load_failed(load.replica_id, failure)
            return
        if failure.code is Code.OUT_OF_MEMORY:  # refused at the door: the picture was old, not the model large
            failure = Failure(code=Code.NO_CAPACITY, message=failure.message)
        self._blame(load.replica_id, load.deployment, load.server_id, failure, now, out)

    def _stop_refused(self, event: StopRefused, now: float, out: list[Action]) -> None:
        id = event.replica_id
        self.cluster.stops.pop(id, None)
        if event.failure.code is Code.NOT_FOUND:
            self._gone("replica", id, now, out)
            return
        self.placing.refused(id, now + self.rules.stop_retry_s)
        if event.failure.code is Code.BUSY:
            self.cluster.busy(id, now)
        for name in sorted(name for name, room in self.cluster.rooms.items() if id in room.victims):
            del self.cluster.rooms[name]

    def _vanished(self, replica: ReplicaRecord, stop: PendingStop | None, now: float) -> None:
        """A replica is gone."""
        id = replica.replica_id
        if stop is not None and replica.running == 0:
            self.estimator.stopped(now - (stop.expires_at - self.rules.command_s))
        self._let_go(id, now)
        self.health.vanished(replica, now, asked=self.placing.gone(id))

    def _let_go(self, replica_id: str, now: float) -> None:
        """It takes nothing any more: no place, no bandwidth."""
        self.fairness.gone(replica_id, now)
        self.estimator.settled(replica_id)

    def _load_reported(self, report: ReplicaLoaded, now: float, out: list[Action]) -> None:
        """What a load really took: the next estimates know."""
        for server_id in self.estimator.loaded(report, now):
            self.cluster.mark_server(server_id)
        measured = self.decisions.loaded(report, now)
        if measured is not None:
            out.append(StartupMeasured(measured))

    def _explanation(self, message: Explain, now: float) -> Explanation:
        """The shell puts in who speaks."""
        name, errors = message.deployment, self.decisions.errors()
        return Explanation(
            scheduler_id="",
            term=0,
            decisions=self.decisions.explain(message, now),
            waiting=self.decisions.waiting(name),
            doing=self._underway.told(name, now),
            median_error=errors.median,
            p95_error=errors.p95,
            loads=errors.loads,
        )

    def _count_places(self, now: float, out: list[Action]) -> None:
        """How many can be served at once; and whether the bound on waiting can be held with that."""
        self.fairness.set_places(len(self.cluster.ready_workers()))
        known, bound = self._bound, self.fairness.bound(now)
        self._bound = bound
        if bound.held != (known is None or known.held):
            facts: dict[str, Fact] = {
                "start_within_s": bound.start_within_s,
                "least_s": round(bound.least_s, 3),
                "contenders": bound.contenders,
                "places": bound.places,
            }
            out.append(Note("bound.held" if bound.held else "bound.lost", facts))

    def _destinations(self, replica: ReplicaRecord, now: float) -> Sequence[tuple[str, str, int]]:
        """Where what runs in a replica could go at once.

        Only if its deployment can do with one replica less, now and for as long as the swap takes to pay: else it would
        want another one as soon as it has gone.
        """
        name, record = replica.deployment, self.cluster.deployments.get(replica.deployment)
        if record is None:
            return []
        wanted = autoscale.wanted_replicas(self.cluster, name, floor=self.demand.floor(name))
        enough = len(self.cluster.serving(name)) > wanted
        if not (enough and self.demand.does_without(self.cluster, replica, self._startup_s(name, record), now)):
            return []
        found = self.moves.destinations(replica, now)
        return [(one.worker_id, one.replica_id, one.free) for one in found if not one.refused and one.free > 0]

    def _blame(
        self, replica_id: str, name: str, server_id: str, failure: Failure, now: float, out: list[Action]
    ) -> None:
        """A load failed."""
        self._let_go(replica_id, now)
        self.decisions.failed(replica_id, failure)
        if self.health.blame(replica_id, name, server_id, failure, now, out):
            self.moves.load_failed(replica_id, failure)

    # -- what is wanted against what is there -------------------------------------------------------------------------

    def _reconcile(self, now: float, out: list[Action]) -> None:
        self.placing.wake = self._deferrals.wake = math.inf
        self._expire(now, out)
        for over in self.moves.step(now, out):
            self._take(over, now, out)
        self.clearing.step(now, out)
        for name in self._due(now):
            self._review(name, now, out)
        self._serve(now, out)
        for action in out:
            if isinstance(action, CommandLoad):
                self.tally.replica_began(action.message.replica_id)
        # Last: what was decided above may have changed records that are to be written.
        settled = self.deployments.settle(now, out)
        review = self._reviews[0][0] if self._reviews else math.inf
        self._wake = min(
            self._wake, settled, review, self.placing.wake, self._deferrals.wake, self.moves.wake, self.health.wake,
            self.cluster.next_expiry(),
        )  # fmt: skip

    def _expire(self, now: float, out: list[Action]) -> None:
        loads, stops, _ = self.cluster.expire(now)
        for stop in stops:
            self.placing.refused(stop.replica_id, now)
        for load in loads:
            failure = Failure(code=Code.WORKER_LOST, message="The worker never showed the replica.")
            self._blame(load.replica_id, load.deployment, load.server_id, failure, now, out)
        for replica_id in self.cluster.absent.take_lost():
            self.estimator.settled(replica_id)
            self.moves.load_failed(replica_id, Failure(code=Code.WORKER_LOST, message="The worker is gone."))
        for id, suspect in self.health.watch(now, out):
            failure = Failure(code=Code.WORKER_LOST, message="The replica went away while it was loading.")
            self._blame(id, suspect.deployment, suspect.server_id, failure, now, out)
        self.placing.expire(now)

    def _review_at(self, name: str, at: float) -> None:
        """Look at this deployment at that moment, if not before."""
        if at < self._review_due.get(name, math.inf):
            self._review_due[name] = at
            heapq.heappush(self._reviews, (at, name))

    def _due(self, now: float) -> list[str]:
        """Deployments of which something has changed, or whose time has come, by name."""
        names = dict.fromkeys(self.cluster.take_touched())
        while self._reviews and (self._reviews[0][0] <= now or self._stale(*self._reviews[0])):
            at, name = heapq.heappop(self._reviews)
            if not self._stale(at, name):
                del self._review_due[name]
                names[name] = None
        return sorted(names)

    def _stale(self, at: float, name: str) -> bool:
        return self._review_due.get(name) != at

    def _review(self, name: str, now: float, out: list[Action]) -> None:
        """What one deployment has against what it should have: who leaves, and whether more are wanted."""
        record = self.cluster.deployments.get(name)
        self.health.review(name, now, out)
        self._stop_strays(name, record, now, out)
        if record is None:
            self._content(name, now)
            self._startups.pop(name, None)
            self.demand.forget(name)
            self.estimator.forget_deployment(name)
            return
        if serves(record):
            self._weigh_age(name, record, now)
            self._stop_superfluous(name, record, now, out)
            self._learn(name, record, now, out)
        if self._missing(name) > 0:
            self._stand_in_line(name, record, now)
        else:
            self._content(name, now)
        self._mind_idle(name, now)

    def _stand_in_line(self, name: str, record: DeploymentRecord, now: float) -> None:
        """It wants replicas. Only who has none has a claim on somebody else's place."""
        cluster = self.cluster
        oldest_at = self.demand.pressure.since(name, now)
        since = self._wanting_since.setdefault(name, now if oldest_at is None else min(now, oldest_at))
        first = cluster.outstanding(name) > 0 and not cluster.serving(name) and not cluster.coming(name)
        if first and not self.health.resting(name, now):
            self.fairness.wanting(name, since, record.spec.priority, self._startup_s(name, record), now)
            urgent_at = self.fairness.urgent_at(name, now)
            if urgent_at is not None:
                self._review_at(name, max(urgent_at, now + LATER_S))
        else:
            self.fairness.satisfied(name, now)

    def _startup_s(self, name: str, record: DeploymentRecord) -> float:
        """What its startup will take, roughly: as last decided, else from its source."""
        known = self._startups.get(name)
        if known is not None:
            return known
        need = self.cluster.need(record)
        holders = self.cluster.ssd_holders(need.key, need.weight_bytes)
        tier = "ssd" if holders else "remote"
        server_id = holders[0] if holders else ""
        return need.weight_bytes / self.estimator.bandwidth(server_id, tier) + self.estimator.attach_s(
            "cpu", need.key, need.weight_bytes
        )

    def _content(self, name: str, now: float) -> None:
        """It wants nothing."""
        self._wanting_since.pop(name, None)
        self._deferrals.drop(name)
        self.cluster.rooms.pop(name, None)
        self.fairness.satisfied(name, now)

    def _stop_strays(self, name: str, record: DeploymentRecord | None, now: float, out: list[Action]) -> None:
        """Replicas of no deployment, or of one that is being deleted, end at once; those of an old revision finish."""
        for replica in self.cluster.replicas_of(name):
            if replica.replica_id in self.cluster.stops:
                continue
            if record is None or record.state is DeploymentState.DELETING:
                self.placing.stop(replica, "deleted", now, out, abort=True)
            elif replica.revision != record.revision:
                self.placing.stop(replica, "revision", now, out, drain=True)

    def _weigh_age(self, name: str, record: DeploymentRecord, now: float) -> None:
        """Whether its requests wait so long that it needs one more replica, however few they are."""
        cluster = self.cluster
        serving = cluster.serving(name)
        ready = sum(one.state is ReplicaState.READY for one in serving)
        self.demand.weigh(
            name,
            ready=ready,
            coming=len(serving) - ready + len(cluster.coming(name)),
            load_s=self._startup_s(name, record),
            now=now,
        )
        due_at = self.demand.pressure.due_at(name)
        if due_at is not None:
            self._review_at(name, max(due_at, now + LATER_S))

    def _stop_superfluous(self, name: str, record: DeploymentRecord, now: float, out: list[Action]) -> None:
        floor, keep_s = self.demand.floor(name), autoscale.keep_alive_s(record.spec, self.demand.arrivals)
        for replica in autoscale.superfluous(self.cluster, name, now, floor=floor, keep_s=keep_s):
            self.placing.stop(replica, "keep_alive", now, out)
        at = autoscale.next_superfluous_at(self.cluster, name, now, floor=floor, keep_s=keep_s)
        if at is not None:
            self._review_at(name, max(at, now + LATER_S))

    def _learn(self, name: str, record: DeploymentRecord, now: float, out: list[Action]) -> None:
        """A ready replica tells the facts of a lazy deployment's checkpoint."""
        if record.checkpoint is None:
            for replica in self.cluster.replicas_of(name):
                if replica.state is ReplicaState.READY and replica.revision == record.revision:
                    self.deployments.learn(name, replica.server_id, now, out)

    def _mind_idle(self, name: str, now: float) -> None:
        """Who may be evicted makes room for others; a replica that is too young for that will not always be."""
        for replica in self.cluster.replicas_of(name):
            self.cluster.mark_workers(replica)
            if replica.state is ReplicaState.READY:
                self.fairness.ready(replica.replica_id, name, now)
            grown_at = self.cluster.ready_at.get(replica.replica_id, -math.inf) + self.rules.min_ready_s
            if grown_at > now:
                self._review_at(name, grown_at)
            if autoscale.evictable(self.cluster, replica, now, min_ready_s=self.rules.min_ready_s):
                self.cluster.release_of(name)

    def _missing(self, name: str) -> int:
        """Replicas that a deployment lacks."""
        record = self.cluster.deployments.get(name)
        if record is None or not serves(record):
            return 0
        wanted = autoscale.wanted_replicas(self.cluster, name, floor=self.demand.floor(name))
        return wanted - len(self.cluster.serving(name)) - len(self.cluster.coming(name))

    def _serve(self, now: float, out: list[Action]) -> None:
        """Place what is missing, whoever has waited longest first."""
        if not self._wanting_since:
            return
        suspended = self.health.suspended(now)
        tries = 0
        order = self._order(now)
        due = [self._deferrals.due(name, rank, now) for rank, name in enumerate(order)]
        # Nobody behind the first in line is given what they could have by now, though nothing but time has changed.
        behind = [order[rank] for rank in range(FIRST, len(order)) if due[rank]]
        pressed = any(not self._may_pass(name, now) for name in behind)
        for rank in range(min(FIRST, len(order)) if behind else 0):
            due[rank] = due[rank] or pressed or self._deferrals.older(order[rank], now)
        for rank, name in enumerate(order):
            if name in suspended or self.health.resting(name, now):
                continue
            if tries >= MOST_TRIES:
                self._wake = min(self._wake, now + LATER_S)
                break
            if not due[rank]:
                continue
            if not self._allowed(name, now):
                continue
            for _ in range(self._missing(name)):
                if not self._place(name, now, out):
                    tries += 1
                    break
        if self._deferrals.helpless:
            self.looks.queues_again()

    def _order(self, now: float) -> list[str]:
        """Who wants replicas: who has none before who wants more, by their turn; then the longest wait."""
        names = sorted(self._wanting_since, key=lambda one: (self._wanting_since[one], one))
        return self.fairness.order(names, now)

    def _frees(self, name: str, worker_ids: Sequence[str], now: float) -> bool:
        """Whether a deployment that waits could be loaded on one of these workers now."""
        record = self.cluster.deployments[name]
        avoid, load_s = self.health.avoided(name), self._startup_s(name, record)
        found = self.placing.frees(record, worker_ids, now, avoid=avoid, load_s=load_s)
        self._spared_until(name, now)
        return found

    def _spared_until(self, name: str, now: float) -> None:
        """Somebody was spared a moment ago who may be asked to leave for this one later."""
        if self.placing.wake_for < math.inf:
            self._review_at(name, max(self.placing.wake_for, now + LATER_S))

    def _allowed(self, name: str, now: float) -> bool:
        """Whether one more replica of a deployment that has some takes no place that was promised to others."""
        if not self.cluster.serving(name) and not self.cluster.coming(name):
            return True
        if self._may_pass(name, now):
            return True
        self._wake = min(self._wake, now + self.rules.look_interval_s)
        return False

    def _may_pass(self, name: str, now: float) -> bool:
        """Whether this one takes a place without breaking what was promised to those before it."""
        return self.fairness.allows(name, self._startup_s(name, self.cluster.deployments[name]), now)

    def _place(self, name: str, now: float, out: list[Action]) -> bool:
        """Decide about one replica; whether it was placed."""
        record = self.cluster.deployments[name]
        means, since = self._means(name, now), self._wanting_since.get(name, now)
        ask, decision = self.placing.place(
            record,
            since,
            now,
            out,
            avoid=self.health.avoided(name),
            load_s=self._startup_s(name, record),
            means=means,
            explain=now >= self._explained_until(name),
        )
        self._spared_until(name, now)
        if decision.chosen is not None:
            one = decision.chosen  # whose end is awaited is parked if it takes too long
            self._startups[name] = one.startup.load_s if one.room.waits else one.startup.total_s
        match decision.outcome:
            case Outcome.PLACE:
                self._deferrals.drop(name)
                return True
            case Outcome.EVICT:
                pass
            case Outcome.MAKE_ROOM:
                self.clearing.begin(ask, decision, now, out)
            case Outcome.IMPOSSIBLE:
                self.fairness.satisfied(name, now)  # nobody's turn is kept for what cannot be
                patient_until = self._despair(name, now, out)
                self._defer(decision, now, out, latest_at=patient_until)
            case Outcome.WAIT:
                if name not in self.cluster.rooms:
                    self._defer(decision, now, out)
            case _:
                assert_never(decision.outcome)
        room = self.cluster.rooms.get(name)
        if room is not None:
            late_at = room.patient_until if room.patient_until > now else math.inf
            self._deferrals.put(name, now, latest_at=late_at, roomed=True)
        return False

    def _explained_until(self, name: str) -> float:
        deferred = self._deferrals.get(name)
        return deferred.explained_until if deferred is not None else -math.inf

    def _means(self, name: str, now: float) -> Means:
        """What may be done to make room for this one: only for a first replica that somebody waits for is anybody
        disturbed who runs something."""
        first = self.cluster.outstanding(name) > 0 and not self.cluster.serving(name) and not self.cluster.coming(name)
        if not first:
            return Means(move=False, wait=False)
        moves = self.rules.migrates and not self.clearing.soured(name, now)
        return Means(move=moves, wait=not self.clearing.awaiting(name), park=True)

    def _defer(self, decision: Decision, now: float, out: list[Action], *, latest_at: float = math.inf) -> None:
        """Nothing can be done now: say so once, and try again when something may have made room."""
        name, reasons = decision.deployment, decision.reason
        # What is short may change with every byte; the log wants to know when the kind of the reason changes.
        kinds = decision.outcome.value + "".join(one.refused.split(" ")[0] for one in decision.candidates)
        known = self._deferrals.get(name)
        was, one = known.kinds if known is not None else None, self._deferrals.put(name, now, latest_at=latest_at)
        changed = False
        if was is None or now >= one.explained_until:
            changed = was != kinds
            one.kinds, one.explained_until = kinds, now + EXPLAINED_S
        # Perhaps somebody is idle by now, which the queues know first.
        if changed:
            self.looks.queues_soon(now)
            self.counts.deferrals += 1
            self.decisions.decided(decision, "", now)
            facts: dict[str, Fact] = {
                "deployment": name,
                "outstanding": self.cluster.outstanding(name),
                "candidates": len(decision.candidates) + decision.more,
                "reasons": reasons,
            }
            out.append(Note("placement.deferred", facts))

    def _despair(self, name: str, now: float, out: list[Action]) -> float:
        """No server is large enough, even empty: after a while its requests fail instead of waiting for one that is.

        Returns how long they wait for one.
        """
        due = self._wanting_since.get(name, now) + self.rules.patience_s
        if due > now:
            return due
        self.health.despair(name, self.cluster.need(self.cluster.deployments[name]), now, out)
        return math.inf
