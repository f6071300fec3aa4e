"""One live migration between two replicas: rounds until the production rule says stop, the hand-over, the pause. Pure.

The rule is `services.worker.migration.Convergence`. The states of a production migration that only matter when single
messages are lost are those of `simulator.scenario`, not of a fleet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from services.worker.migration import Convergence
from shared.contracts.migration import Migrate, MigrationEnded, MigrationInFlight, MigrationOutcome, RoundDone
from shared.contracts.records import ReplicaState
from shared.errors import Code, Failure
from simulator.fleet.replica import Prefill, Replica

if TYPE_CHECKING:
    from simulator.fleet.request import Request
    from simulator.fleet.worker import Worker
    from simulator.fleet.world import World


class Migration:
    """See the module. `over` once it has ended; what is on its way then is lost on arrival."""

    def __init__(self, world: World, request: Request, worker: Worker, message: Migrate) -> None:
        assert request.replica is not None
        self.world: Final = world
        self.request: Final = request
        self.message: Final = message
        self.worker: Final = worker
        self.source: Final[Replica] = request.replica
        self.began_at: Final = world.kernel.now
        self.id: Final = world.migration_id()
        self.to: Replica | None = None
        self.over = False
        self.frozen_at: float | None = None
        self.sent_tokens = 0
        self.rounds = 0
        self.frozen_s = 0.0
        self.gap_tokens = 0
        self._rule = Convergence()

    def begin(self) -> None:
        """The first round reserves a slot at the destination."""
        self.request.migration = self
        self._later(self._arrive)

    def shown(self, now: float) -> MigrationInFlight:
        """As the source's record shows it."""
        return MigrationInFlight(
            migration_id=self.id,
            request_id=self.request.id,
            deployment=self.request.deployment,
            destination_worker_id=self.message.to_worker_id,
            reason=self.message.reason,
            state="round" if self.frozen_at is None else "handover",
            rounds=self.rounds,
            tokens=self.request.prompt_tokens + self.request.tokens,
            running_s=now - self.began_at,
        )

    # -- what may happen from outside

    def refused_there(self, why: str) -> None:
        """The destination cannot take it: the source goes on."""
        if self.over:
            return
        if self.frozen_at is not None and self.request.replica is self.source:
            self.request.pause_s += self.world.kernel.now - self.frozen_at
            self.source.thaw(self.request, self.world.kernel.now)
        self._end(MigrationOutcome.ABORTED, Failure(code=Code.UNAVAILABLE, message=why))

    def source_lost(self) -> None:
        """The source is gone, or gives the request back: so much for this migration."""
        if not self.over:
            self._end(MigrationOutcome.ABORTED, Failure(code=Code.WORKER_LOST, message="The source is gone."))

    def request_over(self) -> None:
        """The request has ended where it was."""
        if not self.over:
            self._end(MigrationOutcome.ENDED, None)

    # -- rounds

    def _later(self, call: object) -> None:
        """What follows a message of a migration, which is sent again if it is lost."""
        self.world.bus.sure(lambda: None if self.over else call())  # type: ignore[operator]

    def _arrive(self) -> None:
        worker = self.world.workers.get(self.message.to_worker_id)
        to = worker.replicas.get(self.message.to_replica_id) if worker is not None and worker.alive else None
        if to is None or to.state is not ReplicaState.READY:
            self._end(MigrationOutcome.ABORTED, Failure(code=Code.NOT_FOUND, message="The destination is gone."))
        elif not to.reserve(self):
            self._end(MigrationOutcome.ABORTED, Failure(code=Code.BUSY, message="The destination has no free slot."))
        else:
            self.to = to
            self._round(self.request.prompt_tokens)

    def _round(self, prompt_tokens: int) -> None:
        """Send what the destination does not have, and have it prefilled there."""
        now, to = self.world.kernel.now, self.to
        assert to is not None
        tokens = self.source.tokens(self.request, now)
        fresh = prompt_tokens + tokens - self.sent_tokens
        self.sent_tokens, sent_at = tokens, now
        self.rounds += 1

        def done(prefill_s: float) -> None:
            if not self.over:
                answer = RoundDone(
                    number=self.rounds, prefilled_tokens=fresh, prefill_s=prefill_s, step_s=to.model.step_s
                )
                self._later(lambda: self._round_done(answer, sent_at))

        to.prefill(Prefill(fresh, self.request, -1, done))

    def _round_done(self, answer: RoundDone, sent_at: float) -> None:
        now = self.world.kernel.now
        self._rule.observe(answer, now - sent_at)
        gap = self.source.tokens(self.request, now) - self.sent_tokens
        if self._rule.near(gap, self.source.step_s):
            self._freeze(now)
        else:
            self._round(0)

    # -- the hand-over

    def _freeze(self, now: float) -> None:
        self.source.freeze(self.request, now)
        self.frozen_at = now
        self.gap_tokens = max(0, self.request.tokens - self.sent_tokens)
        self._later(self._claim)

    def _claim(self) -> None:
        """The destination claims it from the gateway (to it and back), prefills the gap, and goes on."""
        self.world.bus.sure(lambda: self.world.bus.sure(self._claimed))

    def _claimed(self) -> None:
        to, request, now = self.to, self.request, self.world.kernel.now
        if self.over or to is None:
            return
        request.replica = self.source
        self.source.release(request, now)
        request.migration = None

        def done(prefill_s: float) -> None:
            if request.replica is to and not request.ended:
                request.pause_s += self.world.kernel.now - (self.frozen_at or 0.0)
                to.thaw(request, self.world.kernel.now)

        to.adopt(request, self, self.gap_tokens, done)
        request.migrations += 1
        self.to = None
        self.frozen_s = now - (self.frozen_at or now)
        self._end(MigrationOutcome.COMMITTED, None)

    def _end(self, outcome: MigrationOutcome, failure: Failure | None) -> None:
        self.over = True
        if self.request.migration is self:
            self.request.migration = None
        if self.to is not None:
            self.to.unreserve(self)
        self.worker.departed(self)
        self.world.migrated(
            MigrationEnded(
                migration_id=self.id,
                request_id=self.request.id,
                deployment=self.request.deployment,
                source_worker_id=self.worker.id,
                destination_worker_id=self.message.to_worker_id,
                reason=self.message.reason,
                outcome=outcome,
                failure=failure,
                rounds=self.rounds,
                tokens=self.request.prompt_tokens + self.request.tokens,
                gap_tokens=self.gap_tokens,
                total_s=self.world.kernel.now - self.began_at,
                frozen_s=self.frozen_s,
            )
        )
