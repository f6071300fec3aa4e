"""The last decisions, as they were seen and as they turned out: what `hearth explain` shows. Pure.

A decision that makes room and the load that later uses that room are one entry. A deployment that is looked at again
and again, and waits each time, is one entry with a count.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from services.scheduler.accuracy import Accuracy, Errors
from services.scheduler.terms import Candidate, Decision, Outcome, RoomPlan, Startup
from shared.contracts.placement import CandidateView, DecisionView, Explain, Parts, ReplicaLoaded
from shared.errors import Failure

MOST_SHOWN: Final = 64
MOST_PER_DEPLOYMENT: Final = 64
MOST_CANDIDATES: Final = 32
MOST_UNTIMED: Final = 256
NAMED: Final = 6
ROOM_KEPT_S: Final = 600.0  # a load that comes later than this has not waited for that room

ROOM: Final = (Outcome.EVICT, Outcome.MAKE_ROOM)
NOTHING: Final = (Outcome.WAIT, Outcome.IMPOSSIBLE)


@dataclass(frozen=True, slots=True)
class Measured:
    """A startup as it was estimated and as it was. `tier` is where the load found the checkpoint; seconds."""

    deployment: str
    replica_id: str
    tier: str
    estimate: Startup
    actual: Startup
    actual_s: float

    @property
    def relative_error(self) -> float:
        """|estimate − actual| / actual; 0 if it took no time at all."""
        return abs(self.estimate.total_s - self.actual_s) / self.actual_s if self.actual_s > 0 else 0.0


@dataclass(slots=True)
class _Entry:
    """A decision and what became of it. Moments are monotonic seconds."""

    id: str
    decision: Decision
    at: float
    last_at: float
    decide_ms: float
    times: int = 1
    replica_id: str = ""
    room_s: float = 0.0
    actual: Startup | None = None
    actual_s: float | None = None
    failure: Failure | None = None


class Decisions:
    """The last `limit` decisions, and of one deployment at most `MOST_PER_DEPLOYMENT`.

    `instance` makes their ids distinct from those of other schedulers.
    """

    def __init__(self, limit: int = 2048, *, instance: str = "") -> None:
        self._limit = limit
        self._instance = instance
        self._numbers = 0
        self._entries: collections.OrderedDict[str, _Entry] = collections.OrderedDict()
        self._of_deployment: dict[str, collections.OrderedDict[str, _Entry]] = {}
        self._of_replica: dict[str, _Entry] = {}
        self._untimed: collections.deque[_Entry] = collections.deque(maxlen=MOST_UNTIMED)
        self._accuracy = Accuracy()

    def __len__(self) -> int:
        return len(self._entries)

    # -- what happens ----------------------------------------------------------------------------------------------

    def decided(self, decision: Decision, replica_id: str, now: float, decide_ms: float = 0.0) -> str:
        """Keep a decision; its id. `replica_id` is the load that it commands ("": it commands none yet)."""
        entry = self._again(decision) if decision.outcome in NOTHING else self._room_for(decision, replica_id, now)
        if entry is None:
            entry = self._add(decision, now, decide_ms)
        elif decision.outcome in NOTHING:
            entry.decision, entry.last_at, entry.decide_ms = _shortened(decision), now, decide_ms
            entry.times += 1
        else:
            entry.room_s = now - entry.at
        if not decide_ms:
            self._untimed.append(entry)
        if replica_id:
            entry.replica_id = replica_id
            self._of_replica[replica_id] = entry
        return entry.id

    def loaded(self, report: ReplicaLoaded, now: float) -> Measured | None:
        """A replica is ready: what it really took. None if its decision is not known (any more), or is settled."""
        entry = self._of_replica.get(report.replica_id)
        if entry is None or entry.actual is not None:
            return None
        entry.last_at = now
        entry.failure = None
        entry.actual = Startup(report.wait_s, report.move_s, report.attach_s, entry.room_s)
        entry.actual_s = report.total_s + entry.room_s
        chosen = entry.decision.chosen
        estimate = chosen.startup if chosen is not None else Startup()
        measured = Measured(
            entry.decision.deployment, report.replica_id, report.tier, estimate, entry.actual, entry.actual_s
        )
        self._accuracy.observed(measured.tier, measured.relative_error)
        return measured

    def errors(self) -> Errors:
        """How far the last estimates were from what the startups took."""
        return self._accuracy.errors()

    def timed(self, took_ms: float) -> int:
        """All that was decided since the last call took so many milliseconds; how many decisions those were."""
        count = len(self._untimed)
        for entry in self._untimed:
            entry.decide_ms = took_ms / count
        self._untimed.clear()
        return count

    def failed(self, replica_id: str, failure: Failure) -> None:
        """The load of a replica has failed. One that was ready before has not failed as a load."""
        entry = self._of_replica.get(replica_id)
        if entry is not None and entry.actual is None:
            entry.failure = failure

    # -- what is asked ---------------------------------------------------------------------------------------------

    def explain(self, message: Explain, now: float) -> tuple[DecisionView, ...]:
        """The last decisions of a deployment, about a replica, or (neither is named) of all; latest first."""
        shown = itertools.islice(self._latest(message), max(0, min(message.limit, MOST_SHOWN)))
        return tuple(_view(entry, now) for entry in shown)

    def waiting(self, deployment: str) -> str:
        """Why nothing is placed for a deployment, if that was the last thing decided about it; else ""."""
        last = self._last(deployment)
        return last.decision.reason if last is not None and last.decision.outcome in NOTHING else ""

    def closed(self, deployment: str) -> frozenset[str]:
        """Workers that could not take a deployment even if they were empty, as far as its last decision says."""
        last = self._last(deployment)
        candidates = last.decision.candidates if last is not None else ()
        return frozenset(id for one in candidates if one.never for id in one.worker_ids)

    def check(self) -> None:
        """Assert every invariant."""
        assert len(self._entries) <= self._limit
        assert sum(len(entries) for entries in self._of_deployment.values()) == len(self._entries)
        for id, entry in self._entries.items():
            assert entry.id == id
            assert self._of_deployment[entry.decision.deployment][id] is entry
            assert not entry.replica_id or self._of_replica[entry.replica_id] is entry
        assert all(entry.id in self._entries for entry in self._of_replica.values())
        assert all(0 < len(entries) <= MOST_PER_DEPLOYMENT for entries in self._of_deployment.values())

    # -- inside ----------------------------------------------------------------------------------------------------

    def _latest(self, message: Explain) -> Iterator[_Entry]:
        if message.replica_id:
            entry = self._of_replica.get(message.replica_id)
            found = entry is not None and message.deployment in ("", entry.decision.deployment)
            return iter([entry] if entry is not None and found else [])
        if message.deployment:
            return reversed(self._of_deployment.get(message.deployment, {}).values())
        return reversed(self._entries.values())

    def _last(self, deployment: str) -> _Entry | None:
        entries = self._of_deployment.get(deployment)
        return next(reversed(entries.values())) if entries else None

    def _again(self, decision: Decision) -> _Entry | None:
        """The entry of which this is a repetition: the same deployment went away empty-handed the last time, too."""
        last = self._last(decision.deployment)
        return last if last is not None and last.decision.outcome is decision.outcome else None

    def _room_for(self, decision: Decision, replica_id: str, now: float) -> _Entry | None:
        """The entry that has made the room which this load takes."""
        if not replica_id or decision.chosen is None or decision.outcome is not Outcome.PLACE:
            return None
        for entry in reversed(self._of_deployment.get(decision.deployment, {}).values()):
            chosen = entry.decision.chosen
            if chosen is not None and chosen.worker_ids == decision.chosen.worker_ids:
                fits = entry.replica_id in ("", replica_id) and now - entry.at <= ROOM_KEPT_S
                return entry if entry.decision.outcome in ROOM and entry.actual is None and fits else None
        return None

    def _add(self, decision: Decision, now: float, decide_ms: float) -> _Entry:
        self._numbers += 1
        decision = _shortened(decision)
        entry = _Entry(f"d{self._instance}{self._numbers}", decision, now, now, decide_ms)
        mine = self._of_deployment.get(decision.deployment)
        if mine is not None and len(mine) >= MOST_PER_DEPLOYMENT:
            self._drop(next(iter(mine.values())))
        while len(self._entries) >= self._limit:
            self._drop(next(iter(self._entries.values())))
        self._entries[entry.id] = entry
        self._of_deployment.setdefault(decision.deployment, collections.OrderedDict())[entry.id] = entry
        return entry

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.id]
        mine = self._of_deployment[entry.decision.deployment]
        del mine[entry.id]
        if not mine:
            del self._of_deployment[entry.decision.deployment]
        if entry.replica_id:
            del self._of_replica[entry.replica_id]


def _shortened(decision: Decision) -> Decision:
    """A decision with so many candidates as are kept."""
    over = len(decision.candidates) - MOST_CANDIDATES
    if over <= 0:
        return decision
    return replace(decision, candidates=decision.candidates[:MOST_CANDIDATES], more=decision.more + over)


def _view(entry: _Entry, now: float) -> DecisionView:
    decision = entry.decision
    return DecisionView(
        decision_id=entry.id,
        ago_s=max(0.0, now - entry.at),
        deployment=decision.deployment,
        outcome="move" if decision.outcome is Outcome.MAKE_ROOM else decision.outcome.value,
        reason=decision.reason,
        candidates=tuple(_candidate(one) for one in _ordered(decision)),
        more=decision.more,
        replica_id=entry.replica_id,
        actual=None if entry.actual is None else _parts(entry.actual),
        actual_s=entry.actual_s,
        decide_ms=entry.decide_ms,
        failure=entry.failure,
        times=entry.times,
    )


def _ordered(decision: Decision) -> Iterable[Candidate]:
    """The chosen one first."""
    if decision.chosen is None:
        return decision.candidates
    rest = (one for one in decision.candidates if one.worker_ids != decision.chosen.worker_ids)
    return (decision.chosen, *rest)


def _candidate(one: Candidate) -> CandidateView:
    return CandidateView(
        worker_ids=one.worker_ids,
        server_id=one.server_id,
        tier=one.tier,
        estimate=None if one.refused else _parts(one.startup),
        refused=one.refused,
        room=room_words(one.room),
    )


def _parts(startup: Startup) -> Parts:
    return Parts(
        wait_s=startup.wait_s, move_s=startup.move_s, attach_s=startup.attach_s, room_s=startup.room_s
    )  # fmt: skip


def room_words(plan: RoomPlan) -> str:
    """How room is made: "stops a; moves b to worker-2 (loaded there first); lets c end; parks d". "" for nothing."""
    moves = (
        f"{one.replica_id} to {one.to_worker_id}" + ("" if one.to_replica_id else " (loaded there first)")
        for one in plan.moves
    )
    kinds = (("stops", plan.stops), ("moves", tuple(moves)), ("lets end", plan.waits), ("parks", plan.parks))
    return "; ".join(f"{verb} {_listed(names)}" for verb, names in kinds if names)


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
