"""A desk with running requests to move: replicas of deployment m on a0, b0, c0, …; sources answer when told to."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from services.scheduler.events import (
    CommandMigrate,
    MigrateAccepted,
    MigrateRefused,
    MigrationHeard,
    MoveAsked,
    RecordHinted,
    ReliefAsked,
)
from services.scheduler.rules import Rules
from shared.contracts.migration import (
    MigrationEnded,
    MigrationInFlight,
    MigrationOutcome,
    MigrationReason,
    Move,
    Relief,
)
from shared.contracts.records import Phase, ReplicaRecord, ReplicaState
from shared.errors import Code, Failure
from tests.unit.scheduler import picture
from tests.unit.scheduler.desk import Desk


class Depot(Desk):
    """See the module. Every worker is on the server of its first letter and has room for one replica of m."""

    def wait(self, seconds: float) -> None:
        """Let time pass; who was answered meanwhile has heard it."""
        super().wait(seconds)
        self.answers()

    def running(self, **counts: int) -> Depot:
        """Ready replicas (`p` + worker) with so many requests each; the worker is there even with -1 for no replica."""
        for on, count in counts.items():
            self.add(picture.server(on[0]), picture.worker(on))
            if count >= 0:
                self.replicas[f"p{on}"] = picture.replica(f"p{on}", self.deployments["m"], on, running=count)
        return self

    def changed(self, id: str, **fields: object) -> ReplicaRecord:
        """A replica's record changes; hinted."""
        record = self.replicas[id] = msgspec.structs.replace(self.replicas[id], **fields)
        self.tell(RecordHinted("replica", id, False))
        return record

    def drain(self, on: str, *, undo: bool = False) -> None:
        """A worker drains (or takes work again), and says so in its records, its replicas' first."""
        for id, record in list(self.replicas.items()):
            if record.worker_id == on:
                self.changed(id, state=ReplicaState.READY if undo else ReplicaState.DRAINING)
        phase = Phase.READY if undo else Phase.DRAINING
        self.workers[on] = msgspec.structs.replace(self.workers[on], phase=phase)
        self.tell(RecordHinted("worker", on, False))

    def shown(self, on: str, *request_ids: str, to: str = "b0") -> None:
        """A worker's record shows these requests of m as migrating."""
        migrations = tuple(
            MigrationInFlight(
                migration_id=f"i-{id}",
                request_id=id,
                deployment="m",
                destination_worker_id=to,
                reason=MigrationReason.OPERATOR,
                state="round",
            )
            for id in request_ids
        )
        self.workers[on] = msgspec.structs.replace(self.workers[on], migrations=migrations)
        self.tell(RecordHinted("worker", on, False))

    def ask(self, id: str = "v1", *, wait_s: float = 1.0, **fields: object) -> list[object]:
        """An operator asks for a move from a0; the list gets the answer."""
        answers: list[object] = []
        values: dict[str, object] = {"from_worker_id": "a0", **fields}
        self.tell(MoveAsked(Move(move_id=id, wait_s=wait_s, **values), answers.append))  # type: ignore[arg-type]
        self.answers()
        return answers

    def accept(self, command: CommandMigrate, request_ids: Sequence[str]) -> None:
        """The source begins to migrate these."""
        self.tell(MigrateAccepted(command.move_id, command.leg, tuple(request_ids)))
        self.answers()

    def refuse(self, command: CommandMigrate, code: Code, message: str = "No.") -> None:
        """The source does not begin."""
        self.tell(MigrateRefused(command.move_id, command.leg, Failure(code=code, message=message)))
        self.answers()

    def ended(
        self,
        id: str,
        *,
        of: str = "a0",
        to: str = "b0",
        outcome: MigrationOutcome = MigrationOutcome.COMMITTED,
        failure: Failure | None = None,
    ) -> MigrationEnded:
        """The source says how a migration ended."""
        message = MigrationEnded(
            migration_id=f"i-{id}",
            request_id=id,
            deployment="m",
            source_worker_id=of,
            destination_worker_id=to,
            reason=MigrationReason.OPERATOR,
            outcome=outcome,
            failure=failure,
        )
        self.tell(MigrationHeard(message))
        self.answers()
        return message

    def relief(self, on: str, requests: int) -> None:
        """A worker is short of memory."""
        self.tell(ReliefAsked(Relief(worker_id=on, replica_id=f"p{on}", deployment="m", requests=requests)))


def depot(rules: Rules | None = None, *, slots: int = 4, most: int = 2, **counts: int) -> Depot:
    """Replicas of m with `slots` slots and the requests of `counts` (worker → requests), two servers by default."""
    one = Depot(rules or Rules())
    facts = picture.checkpoint(kv=100 / slots)
    one.add(picture.deployment(picture.spec("m", target_concurrency=slots, max_replicas=most), facts))
    one.running(**(counts or {"a0": 3, "b0": 0}))
    one.depths[one.deployments["m"].slug] = sum(max(0, count) for count in counts.values())
    one.start()
    return one
