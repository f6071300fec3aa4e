"""Where a replica shall go: the place from which it is estimated to answer soonest, and why. Pure.

    startup = wait in the server's load queue + bytes not yet there / bandwidth + attach + making room

Candidates → filters (`fits`) → estimate → the least. A server that has set its copy aside as corrupt is asked only if
nobody else can. Places are looked at closely in the order of their bounds (`bounds`) until no other one could be
better, `MOST_LOOKS` at most; `making_room` says how those in the way would leave. Whoever runs something is disturbed
only for what is sooner by a clear margin (`DISTURBED`): estimates are wrong by about as much, and it costs others
time, too. Equal estimates: the least disturbance, the nearest bytes, the emptiest worker, ids. Every candidate that is
shown has a reason, chosen or not: a decision that cannot be explained is a bug that cannot be found.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from services.scheduler.bounds import BUSY, Bounds, Key, ordering
from services.scheduler.estimate import whereabouts
from services.scheduler.fits import Fit, able_servers, fit, too_large
from services.scheduler.making_room import NOTHING, PARK, STOP, WAIT, Place, Plan, Planner, milliseconds
from services.scheduler.terms import Ask, Candidate, Decision, Means, Outcome, RoomPlan, Startup
from services.scheduler.view import TIERS, View, streams_on, tier_of
from shared.contracts.records import Phase, ServerRecord, WorkerRecord
from shared.sizes import duration

__all__ = ["TIERS", "View", "able_servers", "decide", "room_text", "tier_of", "too_large"]

DISTURBED: Final = 1.25  # a start for which somebody who runs has to leave counts so many times
MOST_SHOWN: Final = 16  # candidates that a decision keeps
MOST_ELSEWHERE: Final = 12  # deployments for whose replicas other places are looked for, in one decision
MOST_EXTRA: Final = 8  # places that are looked at, though they cannot be better, to be shown
SMALL: Final = 64  # workers of a cluster in which that includes those where somebody who runs would have to leave,
MOST_INNER_EXTRA: Final = 2  # … as long as no more than so many searches for other places were made
_EVICT_ONLY: Final = Means(evict=True, below_min=False, move=False, wait=False, park=False)
_NOTHING_AT_ALL: Final = Means(evict=False, below_min=False, move=False, wait=False, park=False)


def decide(ask: Ask, view: View, now: float, *, explain: bool = True) -> Decision:
    """Where one more replica goes, and who leaves for it; `now` in monotonic seconds.

    With `explain` some more places are looked at, which could not be better, and are among the candidates: half of the
    time. Without it the decision is the same.
    """
    view.columns.refresh(view, now)
    search = _Search(ask, view, now)
    found = search.best(1, below_min=False)
    reserves = ask.means.evict and ask.means.below_min and search.bounds.idle
    if reserves and (not found or found[0].worst in (WAIT, PARK)):
        # Nobody goes below its minimum as long as others could leave; but sooner than somebody is awaited or parked.
        found = sorted([*search.best(1, below_min=True), *found], key=lambda one: one.key)
    chosen = found[0] if found else None
    if explain and ask.explain:
        search.look_around()
    candidates = search.shown(chosen)
    if chosen is not None:
        outcome = {NOTHING: Outcome.PLACE, STOP: Outcome.EVICT}.get(chosen.worst, Outcome.MAKE_ROOM)
    else:
        outcome = Outcome.IMPOSSIBLE if search.bounds.hopeless else Outcome.WAIT
    named = {id: None for one in candidates for id in one.worker_ids}
    return Decision(
        deployment=ask.need.deployment,
        outcome=outcome,
        candidates=candidates,
        chosen=chosen.candidate if chosen is not None else None,
        more=max(0, search.bounds.many - len(named)),
        reason=_reason(outcome, candidates),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """A place that can be, its key (less is better), and the worst that making room there does to anybody."""

    key: Key
    candidate: Candidate
    worst: int


class _Search:
    """One question and the close looks at it. A search for a place `elsewhere` is part of another one's plan: there
    idle replicas may leave, but nobody else, and none of the deployments `spared`."""

    def __init__(self, ask: Ask, view: View, now: float, *, spared: tuple[str, ...] = (), inner: bool = False) -> None:
        self._ask, self._view, self._now = ask, view, now
        self._present = view.present(ask.need.deployment)
        self._spared = (*spared, ask.need.deployment)
        self._lent: bool | None = None
        self._loads: dict[tuple[str, str], Startup] = {}
        self._found: dict[tuple[str, ...], _Found] = {}
        self._refused: dict[tuple[str, ...], Candidate] = {}
        self._looked: dict[str, None] = {}
        self._inner: dict[str, _Search | None] = {}
        self.bounds = Bounds(ask, view, now, self._load)
        self._units = self.bounds.places()
        self._planner = Planner(ask, view, None if inner else self._elsewhere, self._spared)

    def best(self, many: int, *, below_min: bool) -> list[_Found]:
        """So many of the best places (fewer if there are not as many), best first."""
        found: list[_Found] = []
        for unit in self._units:
            last = found[many - 1].key if len(found) >= many else None
            if last is not None and last <= unit.bound:
                break
            limit_s = math.inf if last is None else last[1] / 1000
            one = self._look(unit.id, below_min, limit_s)
            if one is not None:
                bisect.insort(found, one, key=lambda found: found.key)
        return found[:many]

    def look_around(self) -> None:
        """Look at a few more places, for whoever wants to know why it was not one of them."""
        for unit in self._units[:MOST_EXTRA]:
            costly = unit.state == BUSY and (self.bounds.many > SMALL or len(self._inner) >= MOST_INNER_EXTRA)
            if unit.id not in self._looked and not costly:
                self._look(unit.id, below_min=False, limit_s=math.inf)

    def shown(self, chosen: _Found | None) -> tuple[Candidate, ...]:
        """The candidates that a decision keeps: the chosen one, the best, and those of the rest that tell most."""
        ranked = [chosen] if chosen is not None else []
        ranked += sorted(self._found.values(), key=lambda one: one.key)
        kept: dict[tuple[str, ...], Candidate] = {}
        for one in ranked:
            kept.setdefault(one.candidate.worker_ids, one.candidate)
        places = list(kept.values())[:MOST_SHOWN]
        named = {id: None for one in places for id in one.worker_ids}
        for ids, refused in self._refused.items():
            if len(places) < MOST_SHOWN and not any(id in named for id in ids):
                places.append(refused)
                named.update(dict.fromkeys(ids))
        for id in self.bounds.closed(MOST_SHOWN):
            if len(places) < MOST_SHOWN and id not in named:
                places.append(self._closed(self._view.workers[id]))
        return tuple(places)

    def _note(self, one: _Found) -> None:
        ids = one.candidate.worker_ids
        before = self._found.get(ids)
        if before is None or one.key < before.key:
            self._found[ids] = one
        self._refused.pop(ids, None)

    # -- close looks --------------------------------------------------------------------------------------------------

    def _look(self, id: str, below_min: bool, limit_s: float) -> _Found | None:
        """The place as it is, if it can be within about `limit_s`."""
        look = self._look_at_server if self._ask.devices > 1 else self._look_at_worker
        one = look(id, below_min, limit_s)
        if one is not None:
            self._note(one)
        if one is not None or limit_s == math.inf:
            self._looked[id] = None
        return one

    def _look_at_worker(self, id: str, below_min: bool, limit_s: float) -> _Found | None:
        worker = self._view.workers[id]
        server = self._view.servers[worker.server_id]
        place = fit(self._ask, self._view, worker, self._present, self._now)
        if place.why and not place.roomy:
            self._refuse((worker,), place)
            return None
        plan = self._plan((worker,), (place,), below_min, limit_s - self._load(server.server_id, worker.device).load_s)
        if place.why and plan is None:
            if limit_s == math.inf:
                self._refuse((worker,), place)
            return None
        return self._as_found((worker,), server, plan, place.free_bytes)

    def _look_at_server(self, id: str, below_min: bool, limit_s: float) -> _Found | None:
        """The workers of a server that are free soonest, as many as are needed; one plan for all of them."""
        ask, view = self._ask, self._view
        workers = [view.workers[one] for one in view.workers_on(id) if one != ask.away_from]
        choices: list[tuple[tuple[object, ...], WorkerRecord, Fit]] = []
        for worker in workers:
            place = fit(ask, view, worker, self._present, self._now)
            if place.why and not place.roomy:
                self._refuse((worker,), place)
                continue
            plan = self._plan((worker,), (place,), below_min, math.inf)
            if place.why and plan is None:
                self._refuse((worker,), place)
                continue
            alone = plan.key if plan is not None else (0, 0, 0, 0, 0)
            choices.append(((worker.worker_id != ask.at, alone, worker.worker_id), worker, place))
        choices.sort(key=lambda one: one[0])
        if len(choices) < ask.devices or (ask.at and choices[0][1].worker_id != ask.at):
            return None
        chosen = sorted(choices[: ask.devices], key=lambda one: (one[1].worker_id != ask.at, one[1].worker_id))
        members, places = tuple(one[1] for one in chosen), tuple(one[2] for one in chosen)
        load_s = max(self._load(id, one.device).load_s for one in members)
        plan = self._plan(members, places, below_min, limit_s - load_s)
        if plan is None and any(place.why for place in places):
            return None
        return self._as_found(members, view.servers[id], plan, min(place.free_bytes for place in places))

    def _plan(
        self, workers: Sequence[WorkerRecord], places: Sequence[Fit], below_min: bool, limit_s: float
    ) -> Plan | None:
        """How room is made on these workers; None if it cannot be, or need not."""
        if not any(place.why for place in places):
            return None
        short_pool_bytes = max(place.short_pool_bytes for place in places)
        server_id, near = workers[0].server_id, list[str]()
        if short_pool_bytes > 0:
            own = [worker.worker_id for worker in workers]
            near = [id for id in self._view.workers_on(server_id) if id not in own]
        place = Place(
            tuple(worker.worker_id for worker in workers),
            server_id,
            tuple(place.short_bytes for place in places),
            tuple(place.short_replicas for place in places),
            short_pool_bytes,
        )
        return self._planner.plan(place, near, below_min=below_min, limit_s=limit_s)

    def _as_found(
        self, workers: Sequence[WorkerRecord], server: ServerRecord, plan: Plan | None, free_bytes: int
    ) -> _Found:
        view, need = self._view, self._ask.need
        startup = max((self._load(server.server_id, one.device) for one in workers), key=lambda one: one.load_s)
        ids = tuple(worker.worker_id for worker in workers)
        candidate = self._candidate(ids, server, free_bytes)
        room = plan.room if plan is not None else RoomPlan()
        candidate = replace(candidate, startup=replace(startup, room_s=room.seconds), room=room)
        worst = plan.worst if plan is not None else NOTHING
        replicas = view.replica_count(ids[0], but_for=self._ask.owner or need.deployment)
        order = ordering(TIERS.index(candidate.tier), candidate.streams, replicas)
        if worst == STOP:
            order = plan.key[-1] if plan is not None else 0
        row = view.columns.workers.get(ids[0])
        rank = int(view.columns.workers.ranks()[row]) if row is not None else 0
        counted_s = candidate.startup.total_s * (DISTURBED if worst > STOP else 1.0)
        key = (
            int(candidate.quarantined), milliseconds(counted_s), worst, len(room.victims),
            plan.tokens if plan is not None else 0, order, rank,
        )  # fmt: skip
        return _Found(key, candidate, worst)

    # -- reasons -------------------------------------------------------------------------------------------------------

    def _candidate(self, ids: tuple[str, ...], server: ServerRecord, free_bytes: int) -> Candidate:
        need = self._ask.need
        return Candidate(
            worker_ids=ids,
            server_id=server.server_id,
            tier=whereabouts(server, need.key, need.weight_bytes, peers=self._is_lent())[0],
            free_bytes=free_bytes,
            streams=streams_on(server, need.key, need.weight_bytes),
            quarantined=need.key in server.quarantined,
        )

    def _refuse(self, workers: Sequence[WorkerRecord], place: Fit) -> None:
        ids = tuple(worker.worker_id for worker in workers)
        if ids in self._found:
            return
        server = self._view.servers[workers[0].server_id]
        candidate = self._candidate(ids, server, place.free_bytes)
        self._refused[ids] = replace(candidate, refused=place.why, never=place.never)

    def _closed(self, worker: WorkerRecord) -> Candidate:
        place = fit(self._ask, self._view, worker, self._present, self._now)
        server = self._view.servers.get(worker.server_id)
        if server is None:
            return Candidate((worker.worker_id,), worker.server_id, "remote", refused=place.why)
        why = place.why or f"the server has fewer than {self._ask.devices} workers for it"
        candidate = self._candidate((worker.worker_id,), server, place.free_bytes)
        return replace(candidate, refused=why, never=place.never)

    # -- seconds -------------------------------------------------------------------------------------------------------

    def _is_lent(self) -> bool:
        """Whether a server that has it on SSD gives it to others."""
        if self._lent is None:
            servers = self._view.servers
            holders = (
                servers.get(id) for id in self._view.ssd_holders(self._ask.need.key, self._ask.need.weight_bytes)
            )
            self._lent = any(one is not None and one.phase is Phase.READY and one.peer_url != "" for one in holders)
        return self._lent

    def _load(self, server_id: str, device: str) -> Startup:
        """The start on this server without making room. Bytes count as missing until they are in its DRAM."""
        found = self._loads.get((server_id, device))
        if found is None:
            need, server = self._ask.need, self._view.servers[server_id]
            tier, missing_bytes = whereabouts(server, need.key, need.weight_bytes, peers=self._is_lent())
            each_bytes = -(-need.weight_bytes // self._ask.devices)
            found = self._view.estimator.startup(
                server_id, device, need.key, each_bytes, missing_bytes, tier, self._now
            )  # fmt: skip
            self._loads[server_id, device] = found
        return found

    def _elsewhere(self, deployment: str, many: int) -> list[Candidate]:
        """Places for one more replica of a deployment that has to go: where it can be without moving anybody else."""
        if deployment not in self._inner:
            ask = self._view.ask_of(deployment) if len(self._inner) < MOST_ELSEWHERE else None
            self._inner[deployment] = None
            if ask is not None:
                means = _EVICT_ONLY if self._ask.means.evict else _NOTHING_AT_ALL
                ask = replace(ask, means=means, unwanted=ask.unwanted | self._ask.unwanted)
                self._inner[deployment] = _Search(ask, self._view, self._now, spared=self._spared, inner=True)
        search = self._inner[deployment]
        return [one.candidate for one in search.best(many, below_min=False)] if search is not None else []


# -- words -------------------------------------------------------------------------------------------------------------


def room_text(room: RoomPlan) -> str:
    """How room is made, for people: "x1 leaves; y1 moves to b0"; "" where nobody has to go."""
    to: dict[str, list[str]] = {}
    for move in room.moves:
        where = move.to_worker_id if move.to_replica_id else f"{move.to_worker_id}, where it is loaded first"
        to.setdefault(move.replica_id, []).append(where)
    parts = [f"{id} leaves" for id in room.stops]
    parts += [f"{id} moves to {' and '.join(places)}" for id, places in to.items()]
    parts += [f"{id} ends" for id in room.waits]
    parts += [f"{id} is parked" for id in room.parks]
    return "; ".join(parts)


def _reason(outcome: Outcome, candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "There is no worker that could be asked."
    first = candidates[0]
    on = " + ".join(first.worker_ids)
    if outcome is Outcome.IMPOSSIBLE:
        return f"It fits nowhere, even if everything else left; {on} {first.refused}."
    if outcome is Outcome.WAIT:
        return f"There is no place for it now; {on}: {first.refused}."
    once = f", once {room_text(first.room)}" if first.room.victims else ""
    start_s = first.startup.total_s
    if any(not one.refused and one.startup.total_s < start_s and not one.quarantined for one in candidates[1:]):
        return f"{on} can have it in {duration(start_s)} from {first.tier}{once}; disturbing others gains too little."
    return f"{on} can have it soonest, in {duration(start_s)} from {first.tier}{once}."
