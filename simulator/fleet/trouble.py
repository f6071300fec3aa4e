"""What goes wrong, by dice: processes crash and come back, the registry goes away, the leader dies. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from simulator.fleet.server import Server
from simulator.fleet.worker import Worker

if TYPE_CHECKING:
    from simulator.fleet.world import World


class Trouble:
    """`new_leader` makes one that takes over; `until_s` is when all of it ends."""

    def __init__(self, world: World, new_leader: Callable[[], None], until_s: float) -> None:
        self._world: Final = world
        self._new_leader: Final = new_leader
        self._until_s: Final = until_s
        self._away = 0

    def begin(self) -> None:
        """From now on."""
        world, faults = self._world, self._world.faults
        world.bus.lost, world.bus.late, world.bus.late_s = faults.lost, faults.late, faults.late_s
        world.replica_failures = faults.replica_failures
        for per_h, strike in (
            (faults.workers_per_h, self._worker),
            (faults.servers_per_h, self._server),
            (faults.leader_per_h, self._leader),
            (faults.redis_away_per_h, self._redis),
        ):
            self._next(per_h, strike)
        world.kernel.at(self._until_s, self._calm)

    def _next(self, per_h: float, strike: Callable[[], str]) -> None:
        if per_h <= 0:
            return
        gap_s = -math.log(1.0 - self._world.dice.random()) * 3600.0 / per_h

        def fire() -> None:
            if self._world.kernel.now < self._until_s:
                what = strike()
                counts = self._world.counters.faults
                counts[what] = counts.get(what, 0) + 1
                self._next(per_h, strike)

        self._world.kernel.after(gap_s, fire)

    def _calm(self) -> None:
        self._world.bus.calm()
        self._world.replica_failures = 0.0

    def _worker(self) -> str:
        world = self._world
        living = [one for one in world.workers.values() if one.alive]
        if living:
            worker = world.dice.choice(living)
            worker.die()
            world.kernel.after(world.faults.back_s * (0.5 + world.dice.random()), lambda: self._revive(worker))
        return "worker"

    def _revive(self, worker: Worker) -> None:
        if worker.server.alive and not worker.alive:
            worker.start()

    def _server(self) -> str:
        """Half of the time the machine, half of the time its store's process only, whose pool outlasts it."""
        world = self._world
        living = [one for one in world.servers.values() if one.alive]
        if not living:
            return "server"
        server = world.dice.choice(living)
        if world.dice.random() < 0.5:
            stored = server.die()
            world.kernel.after(world.faults.back_s * (0.5 + world.dice.random()), lambda: self._boot(server, stored))
            return "server"
        old = server.store
        stored = old.die()
        # Its workers die with it: a load that waited for the old store would wait for ever.
        for worker in server.workers:
            worker.die()
            world.kernel.after(1.0 + world.dice.random(), lambda worker=worker: self._revive(worker))  # type: ignore[misc]
        server.start(stored, old.pool)
        return "store"

    def _boot(self, server: Server, stored: tuple[object, ...]) -> None:
        server.start(stored)  # type: ignore[arg-type]
        for worker in server.workers:
            self._revive(worker)

    def _leader(self) -> str:
        world = self._world
        if world.leader is not None:
            world.leader.die()
            world.leader = None
            world.kernel.after(world.faults.takeover_s * (0.5 + world.dice.random()), self._new_leader)
        return "leader"

    def _redis(self) -> str:
        world = self._world
        self._away += 1
        world.registry.away = True

        def back() -> None:
            self._away -= 1
            if not self._away:
                world.registry.back()

        world.kernel.after(world.faults.away_s * (0.5 + world.dice.random()), back)
        return "redis"
