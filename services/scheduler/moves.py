"""Moves: running requests shall go from one replica to another. Placing → loading → migrating → over. Pure.

A move is what somebody wants (`contracts.migration.Move`): an operator, a draining worker, a replica short of memory,
or the placement that needs a busy device. It is carried out in *legs*, each one MIGRATE of so many requests to one
destination, for which that many free slots are promised until the migrations have ended. A leg's end is heard from its
source; where that is lost, the source's record, which shows its migrations, is the truth.

    from the placement:  failure = moves.begin(Move(move_id=…, from_worker_id=…, replica_id=…, most=…,
                                                    reason=MigrationReason.PLACEMENT), now, out)

begins a move as an operator's question does (a destination is loaded if there is none); how it ended comes back as the
event `MoveOver(move, answer)`, in the `handle` in which it ended. Nothing of a move is kept in the registry: a
scheduler that restarts forgets it, the migrations go on, what drains is seen again, and an operator's next question
with the same `move_id` begins anew and finds the migrations that are under way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, assert_never

from services.scheduler.autoscale import Trouble
from services.scheduler.books import owner_of
from services.scheduler.cluster import Cluster, serves
from services.scheduler.destinations import FULL, LOADING, Destination, destinations, texts
from services.scheduler.events import (
    Action,
    Answer,
    CommandMigrate,
    Fact,
    MigrateAccepted,
    MigrateRefused,
    MoveAsked,
    MoveOver,
    Note,
)
from services.scheduler.open_moves import Leg, OpenMove, away, conflict, invalid, promised, same
from services.scheduler.placing import Placing
from services.scheduler.rules import Rules
from services.scheduler.terms import Outcome
from services.scheduler.wishes import Wishes
from shared.contracts.migration import (
    Migrate,
    MigrationEnded,
    MigrationOutcome,
    MigrationReason,
    Move,
    Moved,
    Moving,
    Relief,
)
from shared.contracts.records import Phase, ReplicaRecord, WorkerRecord
from shared.errors import Code, Failure

MOST_WAIT_S: Final = 60.0
MOST_REQUESTS: Final = 4096  # named in one move
MOST_ID: Final = 128  # characters
MOST_WAITERS: Final = 64  # of one move
MOST_LOADS: Final = 3  # destinations that one move tries to load
OUTCOME_S: Final = 60.0  # who was between two polls hears of the outcome for this long
MOST_OUTCOMES: Final = 1024
LANDED_S: Final = 1.5  # a destination's record shows with its next heartbeat what has come
SOUR_S: Final = 5.0  # a destination that let a migration fail is the last choice for this long
LOOK_S: Final = 0.5  # between two tries to place a destination
SHOWN: Final = 64  # a worker's record shows its first migrations only


class Moves:
    """The moves under way. Writes `Cluster.needed` and `Cluster.floors`; `troubles` are the deployments' that fail."""

    def __init__(self, rules: Rules, cluster: Cluster, placing: Placing, troubles: Mapping[str, Trouble]) -> None:
        self.wake = math.inf
        self._rules = rules
        self._cluster = cluster
        self._placing = placing
        self._troubles = troubles
        self._moves: dict[str, OpenMove] = {}
        self._wishes = Wishes(rules, cluster)
        self._over: list[MoveOver] = []
        self._outcomes: dict[str, tuple[Move, Moved | Failure, float]] = {}
        self._landed: list[tuple[str, float]] = []  # (replica, when), until the replica's record can show it
        self._soured: dict[str, float] = {}

    def check(self) -> None:
        """A request, and a replica as a whole, is in one move at most; no promise beyond the slots; an end to all."""
        named = [id for move in self._moves.values() for id in move.named()]
        assert len(named) == len(frozenset(named)), f"a request is in two moves: {sorted(named)}"
        whole = [move.replica_id for move in self._moves.values() if move.whole]
        assert len(whole) == len(frozenset(whole)), f"a replica is in two moves: {sorted(whole)}"
        promised: dict[str, int] = {}
        for id, move in self._moves.items():
            assert id == move.id
            assert move.expires_at < math.inf, "a move without an end"
            for leg in move.legs.values():
                assert leg.worker_id != move.want.from_worker_id, "a move to where it comes from"
                assert leg.open_at or not leg.answered, "a leg that is over is still here"
                count = len(leg.open_at) if leg.answered else leg.slots
                promised[leg.replica_id] = promised.get(leg.replica_id, 0) + count
        for id, count in promised.items():
            replica = self._cluster.replicas.get(id)
            assert replica is None or count <= replica.slots, f"{id}: {count} of {replica.slots} slots are promised"

    def open(self) -> dict[MigrationReason, tuple[int, int]]:
        """Reason → moves that are not over, and their requests (for metrics)."""
        rows = dict.fromkeys(MigrationReason, (0, 0))
        for move in self._moves.values():
            moves, requests = rows[move.want.reason]
            rows[move.want.reason] = (moves + 1, requests + move.open_requests())
        return rows

    # -- what is asked -----------------------------------------------------------------------------------------------

    def asked(self, event: MoveAsked, now: float, out: list[Action]) -> None:
        """Begin a move, wait on for it, or tell how it ended."""
        want, reply = event.message, event.reply
        move, known = self._moves.get(want.move_id), self._outcomes.get(want.move_id)
        failure: Failure | None = None
        if move is not None and not same(move.want, want):
            failure = _other(want)
        elif move is None and known is not None:
            out.append(Answer(reply, known[1] if same(known[0], want) else _other(want)))
            return
        elif move is None:
            failure = self.begin(want, now, out)
        elif len(move.waiters) >= MOST_WAITERS:
            failure = Failure(code=Code.BUSY, message="Too many wait for this move already.")
        if failure is not None:
            out.append(Answer(reply, failure))
            return
        until = now + (min(want.wait_s, MOST_WAIT_S) if want.wait_s > 0 else 0.0)
        self._moves[want.move_id].waiters.append((reply, until))

    def begin(self, want: Move, now: float, out: list[Action]) -> Failure | None:
        """Begin a move, or say why it cannot be: see the module for how it ends, and `Move` for the failures."""
        if sum(not move.drains for move in self._all()) >= self._rules.most_moves:
            return Failure(code=Code.BUSY, message=f"{len(self._moves)} moves are under way; no more are begun.")
        source = self._source(want)
        if isinstance(source, Failure):
            return source
        failure = self._unfit(want, source)
        if failure is None:
            self._open(want, source, now, out)
            self.wake = now  # its destination is looked for in the next step, which is not to wait for an event
        return failure

    def _source(self, want: Move) -> ReplicaRecord | Failure:
        """The replica in which the requests of a move run."""
        if not 0 < len(want.move_id) <= MOST_ID or not want.from_worker_id:
            return invalid(f"A move needs a move_id of up to {MOST_ID} characters and a from_worker_id.")
        if not want.request_ids and not want.replica_id:
            return invalid("A move needs request_ids or a replica_id.")
        if want.most < 0 or len(want.request_ids) > MOST_REQUESTS:
            return invalid(f"A move is of 0 (all) or more requests, and names {MOST_REQUESTS} at most.")
        if len(frozenset(want.request_ids)) < len(want.request_ids):
            return invalid("A move names a request twice.")
        cluster, id = self._cluster, want.from_worker_id
        if id not in cluster.workers:
            return Failure(code=Code.NOT_FOUND, message=f"There is no worker {id}.")
        if want.replica_id:
            replica = cluster.replicas.get(want.replica_id)
            if replica is None or replica.worker_id != id:
                return Failure(code=Code.NOT_FOUND, message=f"Worker {id} has no replica {want.replica_id}.")
            return replica
        there = [replica for _, replica in sorted(cluster.replicas.items()) if replica.worker_id == id]
        if not there:
            return Failure(code=Code.NOT_FOUND, message=f"Worker {id} runs no requests: it has no replica.")
        if len(there) > 1:
            return invalid(f"Worker {id} has {len(there)} replicas; replica_id says in which the requests run.")
        return there[0]

    def _unfit(self, want: Move, source: ReplicaRecord) -> Failure | None:
        """Why this move cannot be, or could never end well."""
        for move in self._moves.values():
            if not want.request_ids and move.whole and move.replica_id == source.replica_id:
                return conflict(f"Replica {source.replica_id} is being moved already.")
            twice = frozenset(want.request_ids).intersection(move.named())
            if twice:
                return conflict(f"Request {min(twice)} is being moved already.")
        to = want.to_worker_id
        if to == want.from_worker_id:
            return conflict(f"Worker {to} is where the requests are already.")
        worker = self._cluster.workers.get(to)
        if to and worker is None:
            return Failure(code=Code.NOT_FOUND, message=f"There is no worker {to}.")
        if worker is not None and worker.phase is not Phase.READY:
            return conflict(f"Worker {to} is {worker.phase.value}.")
        record = self._cluster.deployments.get(source.deployment)
        if record is None or not serves(record):
            return conflict(f"{source.deployment} is being deleted.")
        return None

    def _open(self, want: Move, source: ReplicaRecord, now: float, out: list[Action], *, drains: bool = False) -> None:
        self._moves[want.move_id] = OpenMove(
            want=want,
            replica_id=source.replica_id,
            deployment=source.deployment,
            begun_at=now,
            expires_at=now + self._rules.move_load_s,
            patient_until=now + self._rules.move_patience_s,
            ids=list(want.request_ids),
            count=0 if want.request_ids or drains else want.most or source.running,
            drains=drains,
        )
        facts: dict[str, Fact] = {
            "move_id": want.move_id,
            "reason": want.reason.value,
            "deployment": source.deployment,
            "replica_id": source.replica_id,
            "source": want.from_worker_id,
            "destination": want.to_worker_id,
            "requests": len(want.request_ids) or want.most or source.running,
        }
        out.append(Note("move.begun", facts))

    def relief(self, message: Relief, now: float, out: list[Action]) -> None:
        """A replica is short of KV memory: what fits elsewhere goes there; else one more replica is wanted a while."""
        replica = self._wishes.relieved(message, now)
        if replica is None or message.replica_id in self._moving():
            return
        found = self._found(MigrationReason.KV_MEMORY, replica, now)
        want = self._wishes.relief(replica, message.requests, found, now, out)
        if want is not None:
            self._open(want, replica, now, out)

    # -- what is answered and heard ------------------------------------------------------------------------------------

    def accepted(self, event: MigrateAccepted, now: float) -> None:
        """A source has begun. What it left out is over, has not begun to run, or migrates already."""
        move = self._moves.get(event.move_id)
        leg = move.legs.get(event.leg) if move is not None else None
        if move is None or leg is None:
            return  # the move is over; the migrations go on
        leg.answered = True
        ids = event.request_ids[: leg.slots]
        if not move.whole:
            ids = tuple(id for id in ids if id in leg.request_ids)
        self._claim(move, leg, frozenset(ids))
        leg.open_at = dict.fromkeys(ids, now)
        if not move.whole:
            self._put_back(move, leg, [id for id in leg.request_ids if id not in leg.open_at], now)
        elif not ids:
            move.count = 0
            move.again_at = now + self._rules.move_retry_s
        elif not move.drains and len(ids) < leg.slots:
            move.count += leg.slots - len(ids)
            move.again_at = now + self._rules.move_retry_s
        for id, message in leg.early.items():
            if id in leg.open_at:
                self._close(move, leg, id, message, now)
        leg.early.clear()
        move.settle(leg)

    def refused(self, event: MigrateRefused, now: float) -> None:
        """A source has not begun, or its answer was lost."""
        move = self._moves.get(event.move_id)
        leg = move.legs.get(event.leg) if move is not None else None
        if move is None or leg is None:
            return
        leg.answered = True
        move.again_at = now + self._rules.move_retry_s
        if not move.whole:
            self._put_back(move, leg, list(leg.request_ids), now)
        elif not move.drains:
            move.count += leg.slots
        move.settle(leg)
        if not move.drains and (not event.failure.kind.retryable or now >= move.patient_until):
            move.give_up(event.failure)

    def heard(self, message: MigrationEnded, now: float) -> None:
        """A migration has ended, perhaps one of a move."""
        id = message.request_id
        for move in self._all():
            if move.want.from_worker_id != message.source_worker_id:
                continue
            for leg in list(move.legs.values()):
                if leg.worker_id != message.destination_worker_id:
                    continue
                if id in leg.open_at:
                    self._close(move, leg, id, message, now)
                    move.settle(leg)
                    return
                if not leg.answered and len(leg.early) < MOST_REQUESTS:
                    leg.early[id] = message
            if id in move.ids and message.outcome is not MigrationOutcome.ABORTED:
                move.ids.remove(id)  # it had begun although nobody said so
                move.ended[id] = message

    def load_failed(self, replica_id: str, failure: Failure) -> None:
        """A replica could not be loaded, perhaps one that a move waits for."""
        for move in self._all():
            if move.load_id == replica_id:
                move.load_failure = failure

    def _claim(self, move: OpenMove, leg: Leg, ids: frozenset[str]) -> None:
        """These requests are in this leg now, whatever another move, or an earlier leg whose end was lost, says."""
        for other in self._all():
            lost = ids.intersection(other.named())
            if other is not move and lost:
                other.refused = conflict(f"Request {min(lost)} is being moved already.")
                other.ids = [id for id in other.ids if id not in ids]
            for one in [one for one in other.legs.values() if one is not leg]:
                one.request_ids = tuple(id for id in one.request_ids if id not in ids)
                for id in ids.intersection(one.open_at):
                    del one.open_at[id]
                other.settle(one)

    def _put_back(self, move: OpenMove, leg: Leg, ids: list[str], now: float) -> None:
        """The source left these out: those that migrate already are followed, the others are asked for again."""
        worker = self._cluster.workers.get(move.want.from_worker_id)
        listed = {one.request_id: one for one in worker.migrations} if worker is not None else {}
        taken = frozenset(id for other in self._all() if other is not move for id in other.named())
        for id in ids:
            if id in taken:
                move.refused = conflict(f"Request {id} is being moved already.")
            elif id in listed and listed[id].destination_worker_id == leg.worker_id:
                leg.open_at[id] = now
            else:
                move.ids.append(id)
                move.again_at = now + self._rules.move_retry_s

    def _close(self, move: OpenMove, leg: Leg, id: str, message: MigrationEnded, now: float) -> None:
        """The end of one migration."""
        del leg.open_at[id]
        move.ended[id] = message
        match message.outcome:
            case MigrationOutcome.COMMITTED:
                self._landed.append((leg.replica_id, now))
                if move.drains and not leg.open_at:
                    move.again_at = now + self._rules.move_retry_s  # the record may still count those that have left
            case MigrationOutcome.ABORTED:
                self._soured[leg.replica_id] = now + SOUR_S
                move.again_at = now + self._rules.move_retry_s
                busy = message.failure is not None and message.failure.code is Code.BUSY
                if busy and not move.drains and now < move.patient_until:
                    if move.whole:
                        move.count += 1
                    else:
                        move.ids.append(id)
            case MigrationOutcome.ENDED:
                pass
            case _:
                assert_never(message.outcome)

    # -- what is wanted against what is there --------------------------------------------------------------------------

    def step(self, now: float, out: list[Action]) -> list[MoveOver]:
        """Carry every move on; those that are over now."""
        self._forget(now)
        for want, replica in self._wishes.drains(self._moving()):
            self._open(want, replica, now, out, drains=True)
        for move in self._all():
            self._advance(move, now, out)
        for move in self._all():
            self._answer(move, now, out)
        self._cluster.needed = frozenset(
            id
            for move in self._all()
            for id in (move.load_id, *(leg.replica_id for leg in move.legs.values()))
            if id in self._cluster.replicas
        )
        self._cluster.floors = self._wishes.floors(
            move.deployment for move in self._all() if move.drains and move.deployment in self._cluster.deployments
        )
        self._cluster.moving = self._moving()
        over, self._over = self._over, []
        return over

    def _moving(self) -> frozenset[str]:
        """Replicas of which any requests are being moved, not some by name."""
        return frozenset(move.replica_id for move in self._all() if move.whole)

    def _forget(self, now: float) -> None:
        self._landed = [
            (id, at) for id, at in self._landed if at + LANDED_S > now and not self._cluster.changed_after(id, at)
        ]
        self._soured = {id: until for id, until in self._soured.items() if until > now}
        self._outcomes = {id: known for id, known in self._outcomes.items() if known[2] > now}
        self.wake = min(self._wishes.forget(now), min((at + LANDED_S for _, at in self._landed), default=math.inf))

    def _advance(self, move: OpenMove, now: float, out: list[Action]) -> None:
        source = self._cluster.replicas.get(move.replica_id)
        worker = self._cluster.workers.get(move.want.from_worker_id)
        if source is None or worker is None:
            self._sourceless(move, now, out)
            return
        move.gone_at = None
        self._watch(move, worker, now)
        if move.expires_at <= now:
            took_s = now - move.begun_at
            self._finish(
                move, Failure(code=Code.UNAVAILABLE, message=f"The move is not over after {took_s:.0f} s."), now, out
            )
            return
        self.wake = min(self.wake, move.expires_at)
        todo = self._todo(move, source, worker)
        if todo and now >= move.again_at:
            self._assign(move, source, todo, now, out)
            todo = self._todo(move, source, worker)
        if todo:
            if now < move.again_at:
                self.wake = min(self.wake, move.again_at)
        elif not move.legs and not (move.drains and source.running > 0 and self._wishes.draining(source)):
            self._finish(move, move.refused, now, out)

    def _sourceless(self, move: OpenMove, now: float, out: list[Action]) -> None:
        """The source is gone, or the registry has lost it for a moment; its last words may be on their way still."""
        move.gone_at = now if move.gone_at is None else move.gone_at
        due = move.gone_at + self._rules.move_lost_s
        left = bool(move.ids or move.count or not move.legs_begun)
        if due > now and (left or move.legs):
            self.wake = min(self.wake, due)
            return
        gone = Failure(code=Code.NOT_FOUND, message=f"Replica {move.replica_id} is gone, or its worker is.")
        self._finish(move, gone if left else None, now, out)

    def _watch(self, move: OpenMove, worker: WorkerRecord, now: float) -> None:
        """Migrations that the source's record does not show for a while are over, although nobody said so."""
        listed = frozenset(one.request_id for one in worker.migrations)
        for leg in list(move.legs.values()):
            for id, seen_at in list(leg.open_at.items()):
                due = seen_at + self._rules.move_lost_s
                if id in listed or len(worker.migrations) >= SHOWN:
                    leg.open_at[id] = now
                elif due <= now:
                    del leg.open_at[id]
                else:
                    self.wake = min(self.wake, due)
            move.settle(leg)

    def _todo(self, move: OpenMove, source: ReplicaRecord, worker: WorkerRecord) -> int:
        """How many requests are still to be commanded to migrate."""
        if not move.whole:
            return len(move.ids)
        left = max(0, source.running - away(self._all(), worker, move.replica_id, move.deployment))
        if move.drains:
            return left if self._wishes.draining(source) else 0
        return min(move.count, left)

    def _assign(self, move: OpenMove, source: ReplicaRecord, todo: int, now: float, out: list[Action]) -> None:
        """Command what free slots allow; what is left waits for a slot or a destination, or is given up."""
        found = self._found(move.want.reason, source, now, at=move.want.to_worker_id)
        for one in found:
            if todo and not one.refused:
                requests = min(one.free, todo)
                self._direct(move, one, requests, texts(found), now, out)
                todo -= requests
        if not todo:
            return
        found = self._found(move.want.reason, source, now, at=move.want.to_worker_id)  # what was free is promised now
        if move.drains:
            self._defer(move, texts(found), todo, out)
        elif move.want.reason is MigrationReason.KV_MEMORY:
            move.give_up(Failure(code=Code.BUSY, message=f"No other replica has a free slot: {texts(found)}."))
        else:
            self._await(move, source, found, now, out)

    def _direct(
        self, move: OpenMove, to: Destination, requests: int, reasons: str, now: float, out: list[Action]
    ) -> None:
        """Command one leg."""
        move.legs_begun += 1
        move.phase = "migrating"
        move.deferred = ""
        if move.legs_begun == 1:
            move.expires_at = now + self._rules.move_migrate_s
            move.patient_until = max(move.patient_until, now + self._rules.move_patience_s)
        ids = tuple(move.ids[:requests])
        del move.ids[:requests]
        if move.drains:
            move.again_at = now + self._rules.move_retry_s
        elif move.whole:
            move.count -= requests
        leg = move.legs[move.legs_begun] = Leg(move.legs_begun, to.replica_id, to.worker_id, requests, ids)
        message = Migrate(
            to_worker_id=to.worker_id,
            to_replica_id=to.replica_id,
            request_ids=ids,
            replica_id=move.replica_id,
            most=0 if ids else requests,
            reason=move.want.reason,
        )
        out.append(CommandMigrate(move.want.from_worker_id, move.id, leg.number, message))
        facts: dict[str, Fact] = {
            "move_id": move.id,
            "reason": move.want.reason.value,
            "deployment": move.deployment,
            "source": move.want.from_worker_id,
            "destination": to.worker_id,
            "replica_id": to.replica_id,
            "requests": requests,
            "reasons": reasons,
        }
        out.append(Note("move.directed", facts))

    def _await(
        self, move: OpenMove, source: ReplicaRecord, found: list[Destination], now: float, out: list[Action]
    ) -> None:
        """No slot is free: wait for the destination that is coming, or have one loaded, or be patient, or give up."""
        at, name = move.want.to_worker_id, move.deployment
        record = self._cluster.deployments.get(name)
        worker = self._cluster.workers.get(at)
        full = any(one.refused == FULL for one in found)
        loading = any(one.refused == LOADING for one in found) or any(
            at in ("", load.worker_id) and load.worker_id != source.worker_id and load.revision == source.revision
            for load in self._cluster.coming(name)
        )
        if move.load_id and not self._loaded(move, now):
            if not move.ids and not move.count:
                return
        elif loading:
            move.phase = "loading"
            self._defer(move, "a destination is loading", move.open_requests(), out)
            return
        if move.phase == "loading":
            move.phase, move.patient_until = "placing", now + self._rules.move_patience_s
        if record is None or not serves(record):
            move.give_up(conflict(f"{name} is being deleted."))
        elif at and (worker is None or worker.phase is not Phase.READY):
            move.give_up(conflict(f"Worker {at} is {'gone' if worker is None else worker.phase.value}."))
        elif full and (at or move.load_id):
            busy = Failure(code=Code.BUSY, message=f"The destination has no free slot: {texts(found)}.")
            self._patience(move, busy, now, out)
        elif at and found:
            move.give_up(conflict(f"Worker {at} cannot take them: {texts(found)}."))
        elif source.revision != record.revision:
            move.give_up(conflict(f"Replica {source.replica_id} runs an old revision of {name}, as no other does."))
        else:
            self._place(move, source, full, texts(found), now, out)

    def _loaded(self, move: OpenMove, now: float) -> bool:
        """Whether the destination that was loaded for a move is coming or there; if not, what follows from it."""
        cluster = self._cluster
        if move.load_id in cluster.loads or move.load_id in cluster.replicas:
            return True
        why = move.load_failure.message if move.load_failure is not None else "it went away."
        move.load_id, move.load_failure, move.phase = "", None, "placing"
        move.patient_until = now + self._rules.move_patience_s
        if move.want.to_worker_id or move.loads >= MOST_LOADS:
            move.give_up(
                Failure(code=Code.NO_CAPACITY, message=f"A destination could not be loaded: {why}"),
            )
        return False

    def _place(
        self, move: OpenMove, source: ReplicaRecord, full: bool, reasons: str, now: float, out: list[Action]
    ) -> None:
        """Have a destination loaded, beyond `max_replicas` if need be."""
        owner = owner_of(move.id)
        if now < move.place_at and owner not in self._cluster.rooms:
            self.wake = min(self.wake, move.place_at)
            return
        if move.loads >= MOST_LOADS:
            move.give_up(Failure(code=Code.NO_CAPACITY, message=f"{MOST_LOADS} destinations were loaded for nothing."))
            return
        move.place_at = now + LOOK_S
        trouble = self._troubles.get(move.deployment)
        _, decision = self._placing.place(
            self._cluster.deployments[move.deployment],
            move.begun_at,
            now,
            out,
            avoid=trouble.avoid if trouble is not None else {},
            move_id=move.id,
            at=move.want.to_worker_id,
            away_from=source.worker_id,
        )
        if decision.outcome is Outcome.PLACE and decision.chosen is not None:
            on = decision.chosen.worker_id
            move.load_id = next(
                id
                for id, load in self._cluster.loads.items()
                if (load.deployment, load.worker_id) == (move.deployment, on)
            )
            move.loads += 1
            move.phase = "loading"
        elif owner in self._cluster.rooms:
            return  # until it has been made, or has expired
        elif full:
            busy = Failure(code=Code.BUSY, message=f"No other replica has a free slot ({reasons}).")
            self._patience(move, busy, now, out)
        else:
            failure = Failure(code=Code.NO_CAPACITY, message=decision.reason)
            if decision.outcome is Outcome.IMPOSSIBLE or not decision.candidates:
                move.give_up(failure)
            else:
                self._patience(move, failure, now, out)

    def _patience(self, move: OpenMove, failure: Failure, now: float, out: list[Action]) -> None:
        """Wait a while; then it is told."""
        if now >= move.patient_until:
            move.give_up(failure)
            return
        self.wake = min(self.wake, move.patient_until, max(move.place_at, now + LOOK_S))
        self._defer(move, failure.message, move.open_requests(), out)

    def _defer(self, move: OpenMove, reasons: str, requests: int, out: list[Action]) -> None:
        """Say why a move waits, once for each phase."""
        if move.deferred != move.phase:
            move.deferred = move.phase
            facts: dict[str, Fact] = {
                "move_id": move.id,
                "reason": move.want.reason.value,
                "deployment": move.deployment,
                "phase": move.phase,
                "requests": requests,
                "reasons": reasons,
            }
            out.append(Note("move.deferred", facts))

    def _finish(self, move: OpenMove, failure: Failure | None, now: float, out: list[Action]) -> None:
        """A move is over: who waits is told, and so is the core."""
        del self._moves[move.id]
        self._cluster.rooms.pop(owner_of(move.id), None)
        ended = tuple(move.ended.values())
        answer = failure if failure is not None and not ended else Moved(ended=ended, failure=failure)
        if move.waiters or not move.drains:
            self._outcomes[move.id] = (move.want, answer, now + OUTCOME_S)
            if len(self._outcomes) > MOST_OUTCOMES:
                del self._outcomes[next(iter(self._outcomes))]
        for reply, _ in move.waiters:
            out.append(Answer(reply, answer))
        outcomes = [message.outcome for message in ended]
        facts: dict[str, Fact] = {
            "move_id": move.id,
            "reason": move.want.reason.value,
            "deployment": move.deployment,
            "source": move.want.from_worker_id,
            **{one.value: outcomes.count(one) for one in MigrationOutcome},
            "code": failure.code.value if failure is not None else "",
            "message": failure.message if failure is not None else "",
            "total_s": round(now - move.begun_at, 3),
        }
        out.append(Note("move.ended", facts))
        self._over.append(MoveOver(move.want, answer))

    def _answer(self, move: OpenMove, now: float, out: list[Action]) -> None:
        """Who has waited long enough hears how far it is."""
        waiting = [one for one in move.waiters if one[1] > now]
        for reply, until in move.waiters:
            if until <= now:
                out.append(
                    Answer(
                        reply, Moving(phase=move.phase, open_requests=move.open_requests(), to_worker_id=self._to(move))
                    )
                )
        move.waiters = waiting
        for _, until in waiting:
            self.wake = min(self.wake, until)

    def _to(self, move: OpenMove) -> str:
        """Where a move goes, as far as that is known."""
        for leg in move.legs.values():
            return leg.worker_id
        load = self._cluster.loads.get(move.load_id)
        replica = self._cluster.replicas.get(move.load_id)
        return move.want.to_worker_id or (load.worker_id if load else replica.worker_id if replica else "")

    def destinations(self, source: ReplicaRecord, now: float) -> list[Destination]:
        """Where requests of this replica could go for a placement, best first, refused ones with their reasons."""
        return self._found(MigrationReason.PLACEMENT, source, now)

    def _found(self, reason: MigrationReason, source: ReplicaRecord, now: float, *, at: str = "") -> list[Destination]:
        """Where requests of this replica could go, best first."""
        taken = promised(self._all(), [id for id, _ in self._landed], self._cluster)
        soured = frozenset(id for id, until in self._soured.items() if until > now)
        short = self._wishes.short(now)
        if reason is not MigrationReason.KV_MEMORY:  # better than staying; but one shortage must not become another's
            soured, short = soured | short, frozenset()
        return destinations(self._cluster, source, taken, soured, short, at=at)

    def _all(self) -> list[OpenMove]:
        return list(self._moves.values())


def _other(want: Move) -> Failure:
    return conflict(f"Move {want.move_id} is about something else.")
