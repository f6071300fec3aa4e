"""Other ways to decide, for comparison: the signature is that of `services.scheduler.choice.decide`.

They are as good as their idea allows: they know the same picture, never promise a device twice, stop idle replicas
rather than wait, and take the replicas that the production autoscaling asks for. What they lack is what they are
compared for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from services.scheduler.fits import Fit, fit
from services.scheduler.terms import Ask, Candidate, Decision, Outcome, RoomPlan, Startup, Tenant
from services.scheduler.view import View, tier_of
from shared.contracts.records import Phase, WorkerRecord
from simulator.kernel import Dice

Decide = Callable[[Ask, View, float], Decision]
CALM_S: Final = 10.0  # Shepherd* preempts on one device no more often than this, or two models would do so for ever


@dataclass(frozen=True, slots=True)
class Place:
    """Workers of one server that could take it: at once, or once these replicas have left."""

    workers: tuple[WorkerRecord, ...]
    server_id: str
    idle: tuple[Tenant, ...] = ()
    running: tuple[Tenant, ...] = ()


class RandomChoice:
    """Any free device; else any whose replica is idle, which leaves."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice

    def __call__(self, ask: Ask, view: View, now: float) -> Decision:
        """See the module."""
        places = [one for one in _places(ask, view, now, preempt=False) if not one.running]
        free = [one for one in places if not one.idle]
        chosen = self._dice.choice(free or places) if places else None
        return _decision(ask, view, now, chosen)


def least_loaded(ask: Ask, view: View, now: float) -> Decision:
    """As Ray Serve: the server on which the least is loaded and runs; else the place that has been idle longest.

    Where the bytes are is no question: they are downloaded, or come from the disk, wherever it is.
    """
    places = [one for one in _places(ask, view, now, preempt=False) if not one.running]
    counts: dict[str, int] = {}

    def rank(one: Place) -> tuple[float, int, str]:
        server = view.servers[one.server_id]
        if one.server_id not in counts:
            here = [id for id, worker in view.workers.items() if worker.server_id == one.server_id]
            counts[one.server_id] = server.loads + sum(view.replica_count(id) for id in here)
        idle_s = min((tenant.idle_s for tenant in one.idle), default=float("inf"))
        return (-idle_s, counts[one.server_id], one.workers[0].worker_id)

    return _decision(ask, view, now, min(places, key=rank, default=None))


class Shepherd:
    """Locality with preemption, as Shepherd* in the paper: the place with the least estimated load, whoever runs there.

    What runs there is stopped, and begins again elsewhere.
    """

    def __init__(self) -> None:
        self._preempted_at: dict[str, float] = {}

    def __call__(self, ask: Ask, view: View, now: float) -> Decision:
        """See the module."""
        places = [
            one
            for one in _places(ask, view, now, preempt=True)
            if not one.running or all(self._calm(worker.worker_id, now) for worker in one.workers)
        ]

        def rank(one: Place) -> tuple[int, int, int, float, str]:
            worker = one.workers[0]
            seconds = _load(ask, view, one, now).load_s
            idle_s = min((tenant.idle_s for tenant in one.idle), default=0.0)
            tokens = sum(tenant.tokens for tenant in one.running)
            # To the tenth of a second: a free place that is as near is better than stopping somebody.
            return (round(10 * seconds), bool(one.idle) + 2 * bool(one.running), tokens, -idle_s, worker.worker_id)

        chosen = min(places, key=rank, default=None)
        if chosen is not None and chosen.running:
            for worker in chosen.workers:
                self._preempted_at[worker.worker_id] = now
        return _decision(ask, view, now, chosen)

    def _calm(self, worker_id: str, now: float) -> bool:
        return now - self._preempted_at.get(worker_id, -CALM_S) >= CALM_S


def _places(ask: Ask, view: View, now: float, *, preempt: bool) -> list[Place]:
    """Where it could be, by server and worker."""
    present = view.present(ask.need.deployment)
    of_server: dict[str, list[tuple[WorkerRecord, tuple[Tenant, ...], tuple[Tenant, ...]]]] = {}
    for id, worker in sorted(view.workers.items()):
        if ask.at not in ("", id) or id == ask.away_from or worker.phase is not Phase.READY:
            continue
        found = fit(ask, view, worker, present, now)
        if found.why and not (found.roomy and not found.short_pool_bytes and ask.means.evict):
            continue
        leaving = _leaving(view, id, found, ask, preempt=preempt) if found.why else ((), ())
        if leaving is not None:
            of_server.setdefault(worker.server_id, []).append((worker, *leaving))
    places: list[Place] = []
    for server_id, choices in of_server.items():
        places += _grouped(server_id, choices, ask.devices)
    return places


def _grouped(
    server_id: str, choices: list[tuple[WorkerRecord, tuple[Tenant, ...], tuple[Tenant, ...]]], devices: int
) -> Iterator[Place]:
    """Places of so many devices: those that are free before those that somebody has to leave."""
    order = sorted(choices, key=lambda one: (bool(one[1]) + 2 * bool(one[2]), one[0].worker_id))
    for first in range(0, len(order) - devices + 1, devices):
        chosen = order[first : first + devices]
        idle = {tenant.replica_id: tenant for one in chosen for tenant in one[1]}
        running = {tenant.replica_id: tenant for one in chosen for tenant in one[2]}
        yield Place(tuple(one[0] for one in chosen), server_id, tuple(idle.values()), tuple(running.values()))


def _leaving(
    view: View, worker_id: str, found: Fit, ask: Ask, *, preempt: bool
) -> tuple[tuple[Tenant, ...], tuple[Tenant, ...]] | None:
    """Who has to leave a worker, the idle ones and those that run; None if that would not do, or may not be."""
    tenants = [one for one in view.tenants(worker_id) if one.deployment != ask.need.deployment]
    tenants.sort(key=lambda one: (not one.evictable, -one.idle_s, one.replica_id))
    idle: list[Tenant] = []
    running: list[Tenant] = []
    short_bytes, short_replicas = found.short_bytes, found.short_replicas
    for tenant in tenants:
        if short_bytes <= 0 and short_replicas <= 0:
            break
        if tenant.evictable and (ask.means.below_min or not tenant.below_min):
            idle.append(tenant)
        elif preempt and tenant.running > 0:
            running.append(tenant)
        else:
            continue
        short_bytes -= tenant.memory_bytes
        short_replicas -= 1
    return (tuple(idle), tuple(running)) if short_bytes <= 0 and short_replicas <= 0 else None


def _tier(ask: Ask, view: View, place: Place) -> str:
    tier = tier_of(view.servers[place.server_id], ask.need)
    return "peer" if tier == "remote" and any(one for one in view.ssd_holders(ask.need.key)) else tier


def _load(ask: Ask, view: View, place: Place, now: float) -> Startup:
    """The estimated start there, without making room."""
    tier, estimator, id, need = _tier(ask, view, place), view.estimator, place.server_id, ask.need
    return Startup(
        wait_s=estimator.wait_s(id, tier, now),
        move_s=0.0 if tier == "dram" else need.weight_bytes / estimator.bandwidth(id, tier),
        attach_s=estimator.attach_s(place.workers[0].device, need.key, -(-need.weight_bytes // ask.devices)),
    )


def _decision(ask: Ask, view: View, now: float, chosen: Place | None) -> Decision:
    name = ask.need.deployment
    if chosen is None:
        return Decision(name, Outcome.WAIT, reason="No place is free.")
    startup = _load(ask, view, chosen, now)
    stops, parks = (tuple(one.replica_id for one in some) for some in (chosen.idle, chosen.running))
    room = RoomPlan(stops=stops, parks=parks, seconds=view.estimator.stop_s() if stops or parks else 0.0)
    candidate = Candidate(
        worker_ids=tuple(one.worker_id for one in chosen.workers),
        server_id=chosen.server_id,
        tier=_tier(ask, view, chosen),
        startup=replace(startup, room_s=room.seconds),
        room=room,
    )
    outcome = Outcome.MAKE_ROOM if parks else Outcome.EVICT if stops else Outcome.PLACE
    return Decision(name, outcome, (candidate,), candidate, reason=f"{chosen.workers[0].worker_id} was chosen.")
