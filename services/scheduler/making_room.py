"""How room is made in a place: who leaves, by which means, and how long it takes. Pure.

Every victim leaves by its cheapest means, all of them at once: an idle replica is stopped; what runs is moved to free
slots of other replicas of its deployment, or to a new replica that is loaded elsewhere first; or it is awaited; or it
is parked. The plan takes as long as the slowest of them, and a stop at the end. Of all sets of victims that free enough
the one that is gone soonest is taken; of those that are gone at the same moment, the one that disturbs least.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.scheduler.terms import Ask, Candidate, Relocation, RoomPlan, Tenant
from services.scheduler.view import View

MOST_IDLE: Final = 16  # idle replicas among which those to be stopped are chosen
MOST_RUNNING: Final = 5  # running ones of which every combination is tried
MOST_ORDERED: Final = 3  # victims for which every order of giving out destinations is tried

# How much a victim is disturbed: the outcome of a plan is that of its worst.
NOTHING, STOP, WAIT, MOVE, PARK = range(5)


def milliseconds(seconds: float) -> int:
    """Estimates are compared to the millisecond: below it they are equal, and something else decides."""
    return round(min(seconds, 1e6) * 1000)


@dataclass(frozen=True, slots=True)
class Place:
    """Workers of one server that shall take a replica, and what each of them, and its DRAM pool, is short of."""

    worker_ids: tuple[str, ...]
    server_id: str
    short_bytes: tuple[int, ...]
    short_replicas: tuple[int, ...]
    short_pool_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Room, and how much making it disturbs: the worst means, victims, tokens that are computed anew, and for how long
    the least idle one of those that are stopped has been idle."""

    room: RoomPlan
    worst: int
    tokens: int = 0
    idle_s: float = 0.0

    @property
    def key(self) -> tuple[int, int, int, int, int]:
        """Less is better."""
        return (
            milliseconds(self.room.seconds),
            self.worst,
            len(self.room.victims),
            self.tokens,
            -milliseconds(self.idle_s) if self.worst == STOP else 0,
        )


@dataclass
class _Claims:
    """What earlier victims of the same plan have been promised."""

    slots: dict[str, int] = field(default_factory=dict)
    workers: dict[str, None] = field(default_factory=dict)
    lanes: dict[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Leaving:
    """How one running victim leaves."""

    seconds: float
    means: int
    moves: tuple[Relocation, ...] = ()


Elsewhere = Callable[[str, int], Sequence[Candidate]]


class Planner:
    """Makes plans for one question.

    `elsewhere(deployment, many)` gives so many of the best places for one more replica of a deployment, best first.
    Nobody of the deployments `spared` leaves.
    """

    def __init__(self, ask: Ask, view: View, elsewhere: Elsewhere | None, spared: tuple[str, ...]) -> None:
        self._ask = ask
        self._view = view
        self._elsewhere = elsewhere
        self._spared = spared
        self._stop_s = view.estimator.stop_s()
        self._known: dict[str, tuple[Tenant, ...]] = {}

    def tenants(self, worker_id: str) -> tuple[Tenant, ...]:
        """Those of a worker that could leave for this question."""
        found = self._known.get(worker_id)
        if found is None:
            found = tuple(one for one in self._view.tenants(worker_id) if one.deployment not in self._spared)
            self._known[worker_id] = found
        return found

    def plan(self, place: Place, near: Sequence[str], *, below_min: bool, limit_s: float) -> Plan | None:
        """The best plan for this place; None if there is none, or none that takes at most about `limit_s`.

        `near` are the other workers of the server: who leaves there frees its DRAM pool.
        """
        everybody = self._everybody(place, near)
        idle = [one for one in everybody if self._may_stop(one, below_min)][:MOST_IDLE]
        if self._enough(place, idle):
            stops = self._fewest(place, (), idle)
            return Plan(self._room(stops, ()), STOP, idle_s=min(one.idle_s for one in stops))
        best: Plan | None = None
        for victims in self._sets(place, idle, [one for one in everybody if self._may_leave(one)]):
            stops = self._fewest(place, victims, idle)
            gone = tuple(one.replica_id for one in (*victims, *stops))
            found = self._leavings(victims, gone, place, limit_s - self._stop_s)
            if found is None:
                continue
            tokens = sum(one.tokens for one, how in zip(victims, found, strict=True) if how.means != WAIT)
            plan = Plan(
                self._room(stops, tuple(zip(victims, found, strict=True))),
                max(how.means for how in found),
                tokens,
            )
            if best is None or plan.key < best.key:
                best = plan
        return best

    # -- who -------------------------------------------------------------------------------------------------------

    def _everybody(self, place: Place, near: Sequence[str]) -> list[Tenant]:
        """Tenants of the place, those that keep no minimum up first, then idle longest first; then those near it."""
        found: dict[str, Tenant] = {}
        for workers in (place.worker_ids, near if place.short_pool_bytes > 0 else ()):
            here = [one for id in workers for one in self.tenants(id)]
            for one in sorted(here, key=lambda one: (one.below_min, -one.idle_s, one.replica_id)):
                found.setdefault(one.replica_id, one)
        return list(found.values())

    def _may_stop(self, one: Tenant, below_min: bool) -> bool:
        return self._ask.means.evict and one.running == 0 and one.evictable and (below_min or not one.below_min)

    def _may_leave(self, one: Tenant) -> bool:
        means = self._ask.means
        lower = one.priority <= self._ask.priority
        return one.running > 0 and (
            (means.park and one.parkable)
            or (lower and ((means.wait and one.awaitable) or (means.move and one.movable)))
        )

    def _enough(self, place: Place, leaving: Sequence[Tenant]) -> bool:
        """Whether the place is large enough once all of these have left."""
        for id, short_bytes, short_replicas in zip(
            place.worker_ids, place.short_bytes, place.short_replicas, strict=True
        ):
            freed = [one.memory_bytes for one in leaving if id in one.worker_ids]
            if sum(freed) < short_bytes or len(freed) < short_replicas:
                return False
        if place.short_pool_bytes <= 0:
            return True
        ids = [one.replica_id for one in leaving]
        return self._view.pool_freed_bytes(place.server_id, ids) >= place.short_pool_bytes

    def _fewest(self, place: Place, others: Sequence[Tenant], idle: Sequence[Tenant]) -> tuple[Tenant, ...]:
        """The fewest of the idle ones, idle longest, that are enough together with these others; all of them are."""
        if self._enough(place, others):
            return ()
        for many in (1, 2):
            chosen = [
                places
                for places in itertools.combinations(range(len(idle)), many)
                if self._enough(place, (*others, *(idle[at] for at in places)))
            ]
            if chosen:
                return tuple(idle[at] for at in min(chosen, key=lambda places: (places[-1], places)))
        leaving = list(idle)
        for one in reversed(idle):  # who need not leave stays, the least idle before all
            fewer = [other for other in leaving if other is not one]
            if self._enough(place, (*others, *fewer)):
                leaving = fewer
        return tuple(leaving)

    def _sets(self, place: Place, idle: Sequence[Tenant], running: list[Tenant]) -> Iterator[tuple[Tenant, ...]]:
        """Sets of running victims that are enough together with the idle ones, none larger than it need be."""
        running.sort(key=lambda one: (self._soonest_s(one), one.replica_id))
        few = running[:MOST_RUNNING]
        if not self._enough(place, (*idle, *few)):
            if len(running) > len(few) and self._enough(place, (*idle, *running)):
                yield tuple(running)
            return
        taken: list[frozenset[str]] = []
        for many in range(1, len(few) + 1):
            for victims in itertools.combinations(few, many):
                ids = frozenset(one.replica_id for one in victims)
                if any(smaller <= ids for smaller in taken) or not self._enough(place, (*idle, *victims)):
                    continue
                taken.append(ids)
                yield victims

    # -- how -------------------------------------------------------------------------------------------------------

    def _soonest_s(self, one: Tenant) -> float:
        """No means is faster."""
        if self._ask.means.park and one.parkable:
            return 0.0
        return min(one.remaining_s if one.awaitable else math.inf, one.resume_s)

    def _leavings(
        self, victims: tuple[Tenant, ...], gone: tuple[str, ...], place: Place, limit_s: float
    ) -> tuple[_Leaving, ...] | None:
        """How each of these leaves, in their order; None if one cannot, or not within about `limit_s`. Nobody goes to
        those who will be `gone`."""
        if any(self._soonest_s(one) > limit_s + 0.001 for one in victims):
            return None
        best: tuple[tuple[int, int], tuple[_Leaving, ...]] | None = None
        many = len(victims)
        orders: Iterator[tuple[int, ...]] = (
            itertools.permutations(range(many))
            if many <= MOST_ORDERED
            else iter([tuple(sorted(range(many), key=lambda at: (-victims[at].running, at)))])
        )
        for order in orders:
            claims = _Claims()
            found: dict[int, _Leaving] = {}
            for at in order:
                how = self._leaving(victims[at], gone, place, claims, limit_s)
                if how is None:
                    break
                found[at] = how
            else:
                key = (milliseconds(max(how.seconds for how in found.values())), sum(h.means for h in found.values()))
                if best is None or key < best[0]:
                    best = (key, tuple(found[at] for at in range(many)))
        return best[1] if best is not None else None

    def _leaving(
        self, one: Tenant, gone: tuple[str, ...], place: Place, claims: _Claims, limit_s: float
    ) -> _Leaving | None:
        """How this one leaves soonest, given what the claims promise already; moving has to pay."""
        means = self._ask.means
        if means.park and one.parkable:
            return _Leaving(0.0, PARK)
        if one.priority > self._ask.priority:
            return None
        waiting = _Leaving(one.remaining_s, WAIT) if means.wait and one.awaitable else None
        if not (means.move and one.movable):
            return waiting
        most_s = limit_s + 0.001 if waiting is None else min(limit_s + 0.001, waiting.seconds)
        if one.resume_s >= most_s:
            return waiting
        return self._moving(one, gone, place, claims, most_s) or waiting

    def _moving(
        self, one: Tenant, gone: tuple[str, ...], place: Place, claims: _Claims, most_s: float
    ) -> _Leaving | None:
        """To replicas that are there, if their slots are enough, else to a new one; in less than `most_s`, or None."""
        there = self._to_slots(one, gone, place, claims)
        if there:
            return _Leaving(one.resume_s, MOVE, there)
        return self._to_new(one, place, claims, most_s)

    def _to_slots(self, one: Tenant, gone: tuple[str, ...], place: Place, claims: _Claims) -> tuple[Relocation, ...]:
        free = sorted(
            (claims.slots.get(replica_id, 0) - slots, worker_id, replica_id)
            for worker_id, replica_id, slots in self._view.destinations(one)
            if worker_id not in place.worker_ids and replica_id not in gone
        )
        left, moves = one.running, []
        for taken, worker_id, replica_id in free:
            if left > 0 > taken:
                left += taken
                moves.append((worker_id, replica_id, -taken + min(0, left)))
        if left > 0:
            return ()
        for _, replica_id, slots in moves:
            claims.slots[replica_id] = claims.slots.get(replica_id, 0) + slots
        return tuple(Relocation(one.replica_id, worker, to, 0.0, one.resume_s) for worker, to, _ in moves)

    def _to_new(self, one: Tenant, place: Place, claims: _Claims, most_s: float) -> _Leaving | None:
        if self._elsewhere is None:
            return None
        best: tuple[float, Candidate] | None = None
        for place_of in self._elsewhere(one.deployment, len(place.worker_ids) + 3):
            taken = any(id in place.worker_ids or id in claims.workers for id in place_of.worker_ids)
            taken |= place.short_pool_bytes > 0 and place_of.server_id == place.server_id  # would fill the pool again
            queued_s = claims.lanes.get((place_of.server_id, place_of.tier), 0.0)
            load_s = place_of.startup.total_s + queued_s
            if not taken and (best is None or load_s < best[0]):
                best = (load_s, place_of)
        if best is None or best[0] + one.resume_s >= most_s:
            return None
        load_s, chosen = best
        lane = (chosen.server_id, chosen.tier)
        claims.lanes[lane] = claims.lanes.get(lane, 0.0) + chosen.startup.move_s
        claims.workers.update(dict.fromkeys(chosen.worker_ids))
        move = Relocation(one.replica_id, chosen.worker_id, "", load_s, one.resume_s)
        return _Leaving(load_s + one.resume_s, MOVE, (move,))

    def _room(self, stops: Sequence[Tenant], leaving: Sequence[tuple[Tenant, _Leaving]]) -> RoomPlan:
        return RoomPlan(
            stops=tuple(one.replica_id for one in stops),
            moves=tuple(move for _, how in leaving for move in how.moves),
            waits=tuple(one.replica_id for one, how in leaving if how.means == WAIT),
            parks=tuple(one.replica_id for one, how in leaving if how.means == PARK),
            seconds=max((how.seconds for _, how in leaving), default=0.0) + self._stop_s,
        )
