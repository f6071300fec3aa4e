"""A run by dice: gateways, workers, requests, migrations in all directions, and everything that may go wrong.

The world is drawn first, then what happens in the first seconds; then the faults cease, time passes, and nothing may be
left over (`cluster.Cluster.check_over`). What must hold at every moment, cores and clients assert themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from shared.contracts.migration import Migrate, MigrationOutcome
from shared.contracts.requests import Request, Sampling, TextPrompt, TokensPrompt
from shared.errors import Code, Failure
from simulator.clients import Outcome
from simulator.cluster import Cluster, Shape
from simulator.engine import Speeds
from simulator.kernel import Dice, Kernel
from simulator.network import Rough

T = TypeVar("T")

WARM_UP_S: Final = 1.0
DEPLOYMENTS: Final = ("demo", "other")
ENGINE_FAILURE: Final = Failure(code=Code.OUT_OF_MEMORY, message="The engine ran out of memory.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run was. `committed` and `aborted` count migrations."""

    digest: str
    happened: int
    virtual_s: float
    streams: int
    complete: int
    failed: int
    committed: int
    aborted: int
    ended: int
    losses: int


class Scenario:
    """One run. `dice` is its only source of randomness."""

    def __init__(self, dice: Dice, *, trace: Callable[[str], None] | None = None) -> None:
        self.dice: Final = dice
        self.kernel: Final = Kernel(trace)
        self.weather: Final = Rough(dice)
        shape = Shape(
            slots=dice.choice((1, 2, 3)),
            kv_tokens=dice.choice((60, 1000)),
            drain_s=dice.choice((1.0, 30.0)),
        )
        self.cluster: Final = Cluster(self.kernel, self.weather, shape)
        self.deployments: Final = DEPLOYMENTS[: dice.choice((1, 1, 2))]
        self.speeds: dict[str, Speeds] = {}
        self._asked = 0
        self._calls: list[tuple[str, str]] = []
        self._done: dict[str, int] = {}
        self._names = 0
        self._over = False

    def run(self) -> Result:
        """Live through all of it. Raises AssertionError where an invariant breaks."""
        dice, kernel, cluster = self.dice, self.kernel, self.cluster
        for number in range(dice.choice((1, 1, 2))):
            cluster.add_gateway(f"g{number}")
        for number in range(dice.choice((2, 2, 3, 4))):
            self._worker(f"w{number}")
        for worker_id in list(cluster.workers):
            for deployment in self.deployments:
                cluster.load(worker_id, deployment)
        kernel.run(WARM_UP_S)
        busy_s = dice.choice((3.0, 8.0, 15.0))
        times = dice.choice((1, 1, 1, 1, 1, 1, 1, 3))  # now and then very much happens
        for _ in range(times * dice.randrange(4, 12)):
            self._soon(busy_s, self._request)
        for _ in range(times * dice.randrange(4, 16)):
            self._soon(busy_s, self._migrate)
        self._trouble(busy_s, times)
        kernel.run(WARM_UP_S + busy_s + 4.0)
        self._cease()
        cluster.settle(self.deployments)
        cluster.check_over()
        self._over = True
        cluster.end()
        return self._result()

    # -- what happens

    def _worker(self, worker_id: str) -> None:
        dice = self.dice
        speeds = self.speeds.get(worker_id) or Speeds(
            step_s=dice.choice((0.02, 0.05, 0.1, 0.2, 0.6)),
            prefill_token_s=dice.choice((0.0005, 0.005, 0.05)),
            slice_tokens=dice.choice((8, 64)),
        )
        self.speeds[worker_id] = speeds
        self.cluster.add_worker(worker_id, speeds)

    def _soon(self, within_s: float, call: Callable[[], None]) -> None:
        self.kernel.after(within_s * self.dice.random(), call)

    def _trouble(self, busy_s: float, times: int) -> None:
        """How much goes wrong: in most runs a little, in some nothing, in some a lot."""
        dice = self.dice
        kinds: Sequence[Callable[[], None]] = (
            self._kill_worker,
            self._kill_worker,
            self._kill_gateway,
            self._stop_worker,
            self._hang_worker,
            self._stop_gateway,
            self._cut,
            self._cut,
            self._kill_engines,
            self._drain,
            self._drain_by_operator,
            self._restart_bus,
        )
        for _ in range(times * dice.choice((0, 1, 1, 2, 3, 5))):
            self._soon(busy_s, dice.choice(kinds))
        for _ in range(times * dice.choice((0, 0, 1, 3))):
            self._soon(busy_s, self._leave)
        if dice.random() < 0.5:
            weather = self.weather
            weather.lost = dice.choice((0.0, 0.002, 0.02, 0.1))
            weather.doubled = dice.choice((0.0, 0.01, 0.1))
            weather.late = dice.choice((0.0, 0.002, 0.02, 0.1))
            weather.late_s = dice.choice((0.05, 1.0, 6.0))

    def _request(self) -> None:
        dice, cluster = self.dice, self.cluster
        gateways = [id for id, gateway in cluster.gateways.items() if gateway.process.alive]
        if not gateways:
            return
        gateway_id, deployment = dice.choice(gateways), dice.choice(self.deployments)
        requests = tuple(self._make(gateway_id, deployment) for _ in range(dice.choice((1, 1, 1, 2))))
        budget_s = 3.0 if dice.random() < 0.1 else None
        self._calls.append((gateway_id, cluster.call(gateway_id, deployment, *requests, budget_s=budget_s)))

    def _make(self, gateway_id: str, deployment: str) -> Request:
        dice = self.dice
        self._asked += 1
        text = "".join(chr(97 + dice.randrange(26)) for _ in range(dice.choice((1, 5, 20))))
        stops = ("".join(chr(97 + dice.randrange(26)) for _ in range(2)), "é" + chr(97 + dice.randrange(26)))
        return Request(
            request_id=f"q{self._asked}",
            gateway_id=gateway_id,
            deployment=deployment,
            prompt=TextPrompt(text=text) if dice.random() < 0.5 else TokensPrompt(token_ids=tuple(map(ord, text))),
            sampling=Sampling(
                max_tokens=dice.choice((1, 8, 40, 40, None, None)),
                seed=1 + dice.randrange(1 << 30),
                stop=stops[: dice.choice((0, 0, 2))],
            ),
            budget_s=120.0,
        )

    def _migrate(self) -> None:
        """From anywhere to anywhere, sensible or not: what must not be is refused."""
        dice, cluster = self.dice, self.cluster
        ready = cluster.ready(dice.choice(self.deployments))
        if len(ready) < 2 and dice.random() < 0.9:
            return
        if not ready:
            return
        (source, replica_id), (target, to_replica_id) = dice.choice(ready), dice.choice(ready)
        runs = [run.request.request_id for run in cluster.workers[source].core.runs.values()]
        if runs and dice.random() < 0.5:
            asked = Migrate(to_worker_id=target, to_replica_id=to_replica_id, request_ids=(dice.choice(runs),))
        else:
            most = dice.choice((0, 1, 2))
            asked = Migrate(to_worker_id=target, to_replica_id=to_replica_id, replica_id=replica_id, most=most)
        cluster.migrate(asked, source)

    def _leave(self) -> None:
        if self._calls:
            gateway_id, call_id = self.dice.choice(self._calls)
            gateway = self.cluster.gateways[gateway_id]
            if gateway.process.alive:
                gateway.leave(call_id)

    # -- trouble

    def _living_worker(self) -> str | None:
        living = [id for id, worker in self.cluster.workers.items() if worker.process.alive]
        return self.dice.choice(living) if living else None

    def _living_gateway(self) -> str | None:
        living = [id for id, gateway in self.cluster.gateways.items() if gateway.process.alive]
        return self.dice.choice(living) if living else None

    def _kill_worker(self) -> None:
        worker_id = self._living_worker()
        if worker_id is None:
            return
        self.cluster.kill_worker(worker_id)
        if self.dice.random() < 0.7:
            self.kernel.after(self.dice.choice((0.1, 1.0, 4.0)), lambda: self._restart(worker_id))

    def _restart(self, worker_id: str) -> None:
        """A dead worker is started again: with its id, or a new one."""
        if self._over or self.cluster.workers[worker_id].process.alive:
            return
        if self.dice.random() < 0.4:
            self._names += 1
            worker_id = f"{worker_id}n{self._names}"
        self._worker(worker_id)
        for deployment in self.deployments:
            self.cluster.load(worker_id, deployment)

    def _kill_gateway(self) -> None:
        gateway_id = self._living_gateway()
        if gateway_id is None:
            return
        self.cluster.kill_gateway(gateway_id)

        def restart() -> None:
            if not self.cluster.gateways[gateway_id].process.alive:
                self._names += 1
                same = self.dice.random() < 0.5
                self.cluster.add_gateway(gateway_id if same else f"{gateway_id}n{self._names}")

        self.kernel.after(self.dice.choice((0.1, 1.0, 8.0)), restart)

    def _stop_worker(self) -> None:
        self._hold_worker(stop=True)

    def _hang_worker(self) -> None:
        self._hold_worker(stop=False)

    def _hold_worker(self, *, stop: bool) -> None:
        worker_id = self._living_worker()
        if worker_id is None:
            return
        self.cluster.losses += 1
        worker = self.cluster.workers[worker_id]
        if stop:
            worker.stop()
        else:
            worker.hang()
        self.kernel.after(self.dice.choice((0.3, 2.0, 7.0)), worker.resume)

    def _stop_gateway(self) -> None:
        gateway_id = self._living_gateway()
        if gateway_id is None:
            return
        self.cluster.losses += 1
        process = self.cluster.gateways[gateway_id].process
        process.stop()
        self.kernel.after(self.dice.choice((0.3, 2.0, 7.0)), process.resume)

    def _cut(self) -> None:
        """A process is cut off: for a moment, in which packets are held back, or for long, and connects anew."""
        dice, cluster = self.dice, self.cluster
        living = [one for one in cluster.everybody if one.process.alive and not cluster.network.is_cut(one.name)]
        if not living:
            return
        cluster.losses += 1
        one, held = dice.choice(living), dice.random() < 0.4
        cluster.network.cut(one.name, held=held)
        if not held and dice.random() < 0.5:
            one.disconnected()

        def mend() -> None:
            if cluster.network.is_cut(one.name):
                cluster.network.mend(one.name)
                if one.process.alive and not held:
                    one.reconnected()

        self.kernel.after(dice.choice((0.2, 2.0, 8.0)), mend)

    def _restart_bus(self) -> None:
        """The bus ends and comes back: what was on its way is lost, all connect anew, the queue keeps its own."""
        cluster = self.cluster
        cluster.losses += 1
        everybody = [one for one in cluster.everybody if one.process.alive and not cluster.network.is_cut(one.name)]
        for one in everybody:
            cluster.network.cut(one.name, held=False)
            one.disconnected()
        cluster.queue.restart()

        def mend() -> None:
            for one in everybody:
                if cluster.network.is_cut(one.name):
                    cluster.network.mend(one.name)
                    if one.process.alive:
                        one.reconnected()

        self.kernel.after(self.dice.choice((0.3, 3.0)), mend)

    def _kill_engines(self) -> None:
        worker_id = self._living_worker()
        if worker_id is not None:
            self.cluster.kill_engines(worker_id, ENGINE_FAILURE)

    def _drain(self) -> None:
        worker_id = self._living_worker()
        if worker_id is None:
            return
        worker = self.cluster.workers[worker_id]
        worker.drain()
        worker_after = self.cluster.shape.drain_s + 3.0

        def restart() -> None:
            if worker.process.alive and worker.drained and not self._over and self.cluster.workers[worker_id] is worker:
                self.cluster.leave_worker(worker_id)
                self._restart(worker_id)

        self.kernel.after(worker_after, restart)

    def _drain_by_operator(self) -> None:
        worker_id = self._living_worker()
        if worker_id is None:
            return
        self.cluster.drain_on(worker_id, True)

        def undo() -> None:
            if self.cluster.workers[worker_id].process.alive:
                self.cluster.drain_on(worker_id, False)
                for deployment in self.deployments:
                    self.cluster.load(worker_id, deployment)

        self.kernel.after(self.dice.choice((0.5, 5.0)), undo)

    def _cease(self) -> None:
        """Everything that is broken and can be mended is."""
        self.weather.calm()
        for one in self.cluster.everybody:
            if self.cluster.network.is_cut(one.name):
                self.cluster.network.mend(one.name)
                if one.process.alive:
                    one.reconnected()
        for worker_id, worker in self.cluster.workers.items():
            worker.resume()
            if worker.process.alive and worker.core.drained_by_operator:
                self.cluster.drain_on(worker_id, False)
        for gateway in self.cluster.gateways.values():
            gateway.process.resume()
        if all(not worker.process.alive or worker.core.draining for worker in self.cluster.workers.values()):
            self._worker("w-last")

    # -- the end

    def _result(self) -> Result:
        streams = self.cluster.clients.streams.values()
        ended = self.cluster.migrations_ended

        def outcomes(outcome: Outcome) -> int:
            return sum(stream.outcome is outcome for stream in streams)

        def migrations(outcome: MigrationOutcome) -> int:
            return sum(message.outcome is outcome for message in ended)

        return Result(
            digest=self.kernel.digest,
            happened=self.kernel.happened,
            virtual_s=self.kernel.now,
            streams=len(streams),
            complete=outcomes(Outcome.COMPLETE),
            failed=outcomes(Outcome.FAILED),
            committed=migrations(MigrationOutcome.COMMITTED),
            aborted=migrations(MigrationOutcome.ABORTED),
            ended=migrations(MigrationOutcome.ENDED),
            losses=self.cluster.losses,
        )
