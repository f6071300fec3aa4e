"""The life of deployments: asked for → inspected → importing → ready → deleting → gone. Pure.

This scheduler is the one writer of their records. A write is level-triggered: the record that is wanted is written
until the registry holds it, one write of a deployment at a time, and an operator is answered when it does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from services.scheduler.choice import too_large
from services.scheduler.cluster import Cluster
from services.scheduler.events import (
    Action,
    Answer,
    Answerable,
    DeleteAsked,
    DeployAsked,
    DeploymentUnwritten,
    DeploymentWritten,
    ImportDone,
    ImportMoved,
    InspectSource,
    Note,
    OperationFailed,
    PollImport,
    RemoveDeployment,
    SourceInspected,
    WriteDeployment,
)
from shared.backoff import delay_s
from shared.contracts.placement import Deployed, Deploying
from shared.contracts.records import (
    ClusterView,
    DeploymentRecord,
    DeploymentSpec,
    DeploymentState,
    Phase,
    WorkerRecord,
)
from shared.contracts.residency import Checkpoint, Done, Progress
from shared.errors import Code, Failure, HearthError
from shared.labels import check_labels
from shared.slug import check_name, slug

# The store could not be asked; another try may reach it, or another store.
UNREACHABLE: Final = frozenset({Code.UNAVAILABLE, Code.DRAINING, Code.DEADLINE_EXCEEDED})
TRIES: Final = 5
OUTCOME_S: Final = 60.0  # an operator who was between two polls hears of the outcome for this long
DTYPES: Final = (None, "float32", "bfloat16", "float16")
# What a store can open; whether it may is the store's to say.
SOURCES: Final = ("/", "hf:", "s3://", "gs://", "az://", "https://", "http://", "file:///")
MOST_REPLICAS: Final = 10_000
MOST_WAIT_S: Final = 60.0
MOST_PRIORITY: Final = 100
MOST_DEVICES: Final = 64


@dataclass
class Operation:
    """An inspection and import under way. `quiet` ones only learn facts and have nobody waiting."""

    number: int
    spec: DeploymentSpec
    created_at_s: float
    server_id: str
    inspected: bool = False
    asked: bool = False
    quiet: bool = False
    weight_bytes: int = 0
    progress: Progress = field(default_factory=lambda: Progress(phase="queued"))
    tries: int = 0
    retry_at: float = math.inf
    waiters: list[tuple[Answerable, float]] = field(default_factory=list)


def validate(spec: DeploymentSpec) -> Failure | None:
    """What is wrong with a spec, naming the field; None if it is fine."""
    try:
        check_name(spec.name)
    except HearthError as error:
        return error.failure
    faults = (
        (spec.source.url.startswith(SOURCES), "source",
         "The source must be an absolute directory, hf:ORG/NAME, or a url of s3://, gs://, az://, https:// or http://."),
        (not _may_hold_secrets(spec.source.url), "source",
         "The source must hold no user name, password, query or fragment; stores have settings for secrets."),
        (spec.source.dtype in DTYPES, "dtype", "The dtype must be float32, bfloat16 or float16."),
        (0 <= spec.min_replicas <= MOST_REPLICAS, "min_replicas", f"min_replicas must be 0 to {MOST_REPLICAS}."),
        (1 <= spec.max_replicas <= MOST_REPLICAS, "max_replicas", f"max_replicas must be 1 to {MOST_REPLICAS}."),
        (spec.min_replicas <= spec.max_replicas, "min_replicas", "min_replicas must not be above max_replicas."),
        (1 <= spec.target_concurrency <= 4096, "target_concurrency", "target_concurrency must be 1 to 4096."),
        (0 <= spec.keep_alive_s < math.inf, "keep_alive_s", "keep_alive_s must be a number of seconds, 0 or more."),
        (spec.max_context_tokens is None or spec.max_context_tokens >= 1, "max_context_tokens",
         "max_context_tokens must be 1 or more."),
        (spec.queue_limit >= 1, "queue_limit", "queue_limit must be 1 or more."),
        (abs(spec.priority) <= MOST_PRIORITY, "priority", f"priority must be -{MOST_PRIORITY} to {MOST_PRIORITY}."),
        (1 <= spec.devices <= MOST_DEVICES, "devices", f"devices must be 1 to {MOST_DEVICES}."),
    )  # fmt: skip
    for fine, param, sentence in faults:
        if not fine:
            return Failure(code=Code.INVALID_REQUEST, message=sentence, param=param)
    try:
        check_labels(spec.labels)
    except HearthError as error:
        return error.failure
    return None


def too_many_devices(spec: DeploymentSpec, workers: Iterable[WorkerRecord]) -> Failure | None:
    """Why no server here can run a replica over so many devices; None if one can, or one device is enough."""
    if spec.devices == 1:
        return None
    able: dict[str, int] = {}
    for worker in workers:
        if worker.gangs and worker.phase is Phase.READY:
            able[worker.server_id] = able.get(worker.server_id, 0) + 1
    most = max(able.values(), default=0)
    if spec.devices <= most:
        return None
    have = f"the most that one has here is {most}" if most else "no worker here can share a replica with others"
    message = f"A replica over {spec.devices} devices needs as many workers of one server; {have}."
    return Failure(code=Code.INVALID_REQUEST, message=message, param="devices")


def _may_hold_secrets(url: str) -> bool:
    """Whether a url has more than host, bucket and path. It would stand in the registry, in logs and in answers."""
    return "://" in url and not url.startswith("file:") and any(mark in url for mark in "@?#")


def revision_of(spec: DeploymentSpec, *more: str) -> str:
    """A short hash of what replicas depend on: changing anything else leaves them as they are."""
    parts = (spec.source.url, spec.source.revision, spec.source.dtype, spec.max_context_tokens, spec.target_concurrency)
    # Where and on what it runs; left out where nothing is said, as in records that are older than the question.
    where = (("devices", spec.devices),) * (spec.devices != 1) + tuple(sorted(spec.labels.items()))
    return hashlib.sha256(repr((*parts, *where, *more)).encode()).hexdigest()[:12]


def next_revision(old: DeploymentRecord | None, spec: DeploymentSpec, facts: Checkpoint | None) -> str:
    """The revision of a deployment that becomes this: a new one when its source holds another checkpoint than before.

    The first checkpoint of a source leaves the revision alone: replicas that loaded it before it was known go on.
    """
    if old is None or old.checkpoint is None or facts is None:
        return revision_of(spec)
    if facts.checkpoint_id != old.checkpoint.checkpoint_id:
        return revision_of(spec, facts.checkpoint_id)
    return old.revision if revision_of(old.spec) == revision_of(spec) else revision_of(spec)


class Deployments:
    """Deployments over time. Works on the picture's `deployments`, which it alone changes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._records = cluster.deployments
        self._operations: dict[str, Operation] = {}
        self._numbers = 0
        self._written: dict[str, DeploymentRecord] = {}
        self._writing: dict[str, DeploymentRecord] = {}
        self._removing: dict[str, DeploymentRecord] = {}
        self._removals: dict[str, DeploymentRecord] = {}  # those of `_removing` that are under way
        self._retry_at: dict[str, float] = {}
        self._unsettled: dict[str, None] = {}  # what may have to be written, or tried again
        self._waiting: dict[str, list[Answerable]] = {}
        self._when_gone: dict[str, list[Answer]] = {}
        self._outcomes: dict[str, tuple[DeploymentSpec, Failure | None, float]] = {}  # None: it went well
        self._gone_at: dict[str, float] = {}

    # -- what operators ask --------------------------------------------------------------------------------------

    def deploy(self, event: DeployAsked, now: float, out: list[Action]) -> None:
        """Create, change, or tell how far it is."""
        spec, name = event.spec, event.spec.name
        fault = validate(spec) or too_many_devices(spec, self._cluster.workers.values())
        if fault is not None:
            out.append(Answer(event.reply, fault))
            return
        until = now + min(max(event.wait_s, 0.0), MOST_WAIT_S)
        operation = self._operations.get(name)
        if operation is not None and operation.quiet:  # nobody waits for it, and nobody shall
            del self._operations[name]
            operation = None
        record = self._records.get(name)
        if operation is not None:
            if operation.spec == spec:
                operation.waiters.append((event.reply, until))
            else:
                out.append(
                    Answer(event.reply, _conflict(f"{name} is being deployed with other settings; wait or delete it."))
                )
            return
        outcome = self._outcomes.pop(name, None)
        heard = outcome is not None and outcome[0] == spec and outcome[2] > now
        if outcome is not None and heard and outcome[1] is not None:
            out.append(Answer(event.reply, outcome[1]))
            return
        if name in self._removing or (record is not None and record.state is DeploymentState.DELETING):
            out.append(Answer(event.reply, _conflict(f"{name} is being deleted.")))
            return
        waiter = (event.reply, until)
        if record is not None and record.spec.source == spec.source and (record.checkpoint is not None or spec.lazy):
            facts, same = record.checkpoint, record.spec == spec
            # Asking again for what failed is a wish to try again.
            self._put(record, spec=spec, revision=next_revision(record, spec, facts), failure=None)
            if facts is None or heard or not same:
                self._answer_when_written(name, event.reply, out)
                return
            # Asking again for the very same is a wish to look at the source again: it may hold other weights by now.
            self._begin(
                spec, record.created_at_s, now, out, waiter=waiter, weight_bytes=record.weight_bytes, inspected=True,
                server_id=self._choose_store(holding=facts.checkpoint_id),
            )  # fmt: skip
            return
        self._begin(spec, event.at_s, now, out, waiter=waiter)

    def delete(self, event: DeleteAsked, now: float, out: list[Action]) -> None:
        """Begin to remove, or wait for the removal under way."""
        name = event.deployment
        record = self._records.get(name)
        operation = self._operations.pop(name, None)
        if operation is not None:
            for reply, _ in operation.waiters:
                out.append(Answer(reply, _conflict(f"{name} was deleted meanwhile.")))
        if record is None:
            if name in self._removing:
                self._when_gone.setdefault(name, []).append(Answer(event.reply, Done()))
            elif operation is not None:
                out.append(Answer(event.reply, Done()))
            else:
                out.append(
                    Answer(event.reply, Failure(code=Code.UNKNOWN_MODEL, message=f"There is no deployment {name!r}."))
                )
            return
        self._when_gone.setdefault(name, []).append(Answer(event.reply, Done()))
        self._outcomes.pop(name, None)
        if record.state is not DeploymentState.DELETING:
            self._put(record, state=DeploymentState.DELETING, failure=None)
            out.append(Note("deployment.deleted", {"deployment": name}))

    # -- what stores answer ---------------------------------------------------------------------------------------

    def inspected(self, event: SourceInspected, now: float, out: list[Action]) -> None:
        """The source is a checkpoint: register the deployment and import it."""
        operation = self._current(event.deployment, event.operation)
        if operation is None:
            return
        spec = operation.spec
        operation.asked, operation.inspected, operation.tries = False, True, 0
        operation.weight_bytes = event.inspected.weight_bytes
        if spec.source.dtype is None:  # a cast changes the size; the import will tell
            probe = _record(spec, operation, DeploymentState.IMPORTING)
            fault = too_large(self._cluster.need(probe), self._cluster)
            if fault is not None:
                self._fail(spec.name, operation, fault, now, out)
                return
        known = self._records.get(spec.name)
        if spec.lazy:
            self._finish(spec.name, operation, None, now, out)
            return
        if known is None:
            self._records[spec.name] = _record(spec, operation, DeploymentState.IMPORTING)
            out.append(Note("deployment.registered", {"deployment": spec.name, "weight_bytes": operation.weight_bytes}))
        self._ask(operation, now, out)

    def moved(self, event: ImportMoved, now: float, out: list[Action]) -> None:
        """The import is not done yet: ask again."""
        operation = self._current(event.deployment, event.operation)
        if operation is not None:
            operation.asked, operation.tries, operation.progress = False, 0, event.progress
            self._ask(operation, now, out)

    def imported(self, event: ImportDone, now: float, out: list[Action]) -> None:
        """The checkpoint is there: the deployment is ready (or changes to it)."""
        operation = self._current(event.deployment, event.operation)
        if operation is None:
            return
        facts = event.checkpoint
        ready = msgspec.structs.replace(
            _record(operation.spec, operation, DeploymentState.READY), checkpoint=facts, weight_bytes=facts.weight_bytes
        )
        fault = too_large(self._cluster.need(ready), self._cluster)
        if fault is not None and not operation.quiet:
            self._fail(event.deployment, operation, fault, now, out)
            return
        self._finish(event.deployment, operation, ready, now, out)

    def failed(self, event: OperationFailed, now: float, out: list[Action]) -> None:
        """A store refused or could not be asked."""
        operation = self._current(event.deployment, event.operation)
        if operation is None:
            return
        operation.asked = False
        operation.tries += 1
        if event.failure.code in UNREACHABLE and operation.tries < TRIES:
            operation.retry_at = now + delay_s(operation.tries, first_s=0.5, most_s=5.0)
            return
        self._fail(event.deployment, operation, event.failure, now, out)

    # -- what the registry answers ---------------------------------------------------------------------------------

    def restore(self, view: ClusterView, now: float, out: list[Action]) -> None:
        """Take over what an earlier scheduler left; go on with what it had begun."""
        for record in view.deployments:
            self._adopt(record, now, out)

    def _adopt(self, record: DeploymentRecord, now: float, out: list[Action]) -> None:
        name = record.spec.name
        self._records[name] = self._written[name] = record
        if record.state is DeploymentState.IMPORTING:
            self._begin(record.spec, record.created_at_s, now, out, weight_bytes=record.weight_bytes, inspected=True)

    def compare(self, view: ClusterView, asked_at: float, now: float, out: list[Action]) -> None:
        """A later look: a record that the registry has lost is written again; one that nobody here knows is adopted."""
        seen = {record.spec.name: record for record in view.deployments}
        for name, record in seen.items():
            known = name in self._records or name in self._removing
            if not known and self._gone_at.get(name, -math.inf) < asked_at:
                self._adopt(record, now, out)
        for name in sorted(self._written):
            if (
                name not in seen
                and name in self._records
                and self._gone_at.get(name, -math.inf) < asked_at
                and name not in self._writing
            ):
                out.append(Note("record.lost", {"deployment": name}))
                del self._written[name]
                self._unsettled[name] = None
        self._gone_at = {name: at for name, at in self._gone_at.items() if at >= asked_at}

    def written(self, event: DeploymentWritten, now: float, out: list[Action]) -> None:
        """The registry holds what was sent; answer those who waited for it."""
        name = event.deployment
        self._unsettled[name] = None
        self._retry_at.pop(name, None)
        self._gone_at[name] = now  # looks that were begun before know less
        if event.record is None:
            self._removing.pop(name, None)
            self._removals.pop(name, None)
            self._written.pop(name, None)
            out.extend(self._when_gone.pop(name, []))
            for reply in self._waiting.pop(name, []):
                out.append(Answer(reply, _conflict(f"{name} was deleted meanwhile.")))
            return
        self._writing.pop(name, None)
        self._written[name] = event.record
        if self._records.get(name) == event.record and event.record.state is DeploymentState.READY:
            for reply in self._waiting.pop(name, []):
                out.append(Answer(reply, Deployed(record=event.record)))

    def unwritten(self, event: DeploymentUnwritten, now: float, out: list[Action]) -> None:
        """The write is to be tried again."""
        if self._retry_at.get(event.deployment) is None:
            out.append(Note("record.delayed", {"deployment": event.deployment, "reason": event.failure.message}))
        self._writing.pop(event.deployment, None)
        self._removals.pop(event.deployment, None)
        self._retry_at[event.deployment] = now + 0.5
        self._unsettled[event.deployment] = None

    # -- for the core -------------------------------------------------------------------------------------------------

    def set_failure(self, name: str, failure: Failure | None) -> None:
        """Say (or no longer say) that the model cannot be loaded."""
        record = self._records.get(name)
        if record is not None and record.failure != failure:
            self._put(record, failure=failure)

    def learn(self, name: str, server_id: str, now: float, out: list[Action]) -> None:
        """A replica of a lazy deployment runs on this server: ask its store for the checkpoint's facts, once."""
        record = self._records.get(name)
        if record is None or record.checkpoint is not None or name in self._operations:
            return
        if record.state is DeploymentState.READY:
            self._begin(record.spec, record.created_at_s, now, out, inspected=True, quiet=True, server_id=server_id)

    def settle(self, now: float, out: list[Action]) -> float:
        """Answer long polls that are due, try again what is due, write what is not written; when to come back."""
        wake = math.inf
        for name in sorted(self._operations):
            operation = self._operations[name]
            still: list[tuple[Answerable, float]] = []
            for reply, until in operation.waiters:
                if until <= now:
                    out.append(Answer(reply, Deploying(progress=operation.progress)))
                else:
                    still.append((reply, until))
                    wake = min(wake, until)
            operation.waiters = still
            if operation.retry_at <= now:
                self._retry(name, operation, now, out)
            wake = min(wake, operation.retry_at)
        for name in sorted(self._outcomes):
            if self._outcomes[name][2] <= now and name not in self._waiting:
                del self._outcomes[name]
        self._unsettled.update(dict.fromkeys(self._cluster.take_written()))
        for name in sorted({*self._unsettled, *self._removing}):
            due = self._write(name, now, out)
            if due == math.inf:
                self._unsettled.pop(name, None)
            wake = min(wake, due)
        return wake

    def check(self) -> None:
        """One writer, one write at a time; nobody waits for nothing."""
        for name in self._writing:
            assert name not in self._removals, f"{name} is written and removed at once"
        for name in self._removing:
            assert name not in self._records, f"{name} is there and removed at once"
        for name, operation in self._operations.items():
            assert operation.spec.name == name
            assert operation.asked or operation.retry_at < math.inf, f"{name}: an operation that nothing drives"
        for name in self._waiting:
            assert name in self._writing or name in self._removing or self._stale(name), f"{name}: waits for no write"
        for name in self._when_gone:
            record = self._records.get(name)
            assert name in self._removing or (record is not None and record.state is DeploymentState.DELETING)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _stale(self, name: str) -> bool:
        return name in self._records and self._written.get(name) != self._records[name]

    def _put(
        self,
        record: DeploymentRecord,
        *,
        spec: DeploymentSpec | None = None,
        revision: str | None = None,
        state: DeploymentState | None = None,
        failure: Failure | None = None,
    ) -> None:
        changed = msgspec.structs.replace(
            record,
            spec=record.spec if spec is None else spec,
            revision=record.revision if revision is None else revision,
            state=record.state if state is None else state,
            failure=failure,
        )
        if changed != record:
            self._records[record.spec.name] = msgspec.structs.replace(changed, epoch=record.epoch + 1)

    def _answer_when_written(self, name: str, reply: Answerable, out: list[Action]) -> None:
        record = self._records[name]
        if self._written.get(name) == record and name not in self._writing:
            out.append(Answer(reply, Deployed(record=record)))
        else:
            self._waiting.setdefault(name, []).append(reply)

    def _begin(
        self,
        spec: DeploymentSpec,
        created_at_s: float,
        now: float,
        out: list[Action],
        *,
        waiter: tuple[Answerable, float] | None = None,
        weight_bytes: int = 0,
        inspected: bool = False,
        quiet: bool = False,
        server_id: str = "",
    ) -> None:
        server_id = server_id or self._choose_store()
        if not server_id and waiter is not None:
            out.append(
                Answer(waiter[0], Failure(code=Code.UNAVAILABLE, message="No server is ready to import the model."))
            )
            return
        self._numbers += 1
        operation = Operation(
            self._numbers, spec, created_at_s, server_id, inspected=inspected, quiet=quiet, weight_bytes=weight_bytes
        )
        if waiter is not None:
            operation.waiters.append(waiter)
        self._operations[spec.name] = operation
        self._ask(operation, now, out)

    def _choose_store(self, avoid: str = "", holding: str = "") -> str:
        """The store with the most free SSD, those that hold this checkpoint first; "" if none is ready."""
        servers = self._cluster.ready_servers()
        others = [one for one in servers if one.server_id != avoid] or servers
        best = max(
            others, key=lambda one: (holding in one.ssd, one.ssd_capacity_bytes - one.ssd_used_bytes), default=None
        )
        return "" if best is None else best.server_id

    def _ask(self, operation: Operation, now: float, out: list[Action]) -> None:
        name = operation.spec.name
        if not operation.server_id:
            operation.retry_at = now + 1.0
            return
        operation.retry_at = math.inf
        operation.asked = True
        if operation.inspected:
            out.append(PollImport(name, operation.number, operation.server_id, slug(name), operation.spec.source))
        else:
            out.append(InspectSource(name, operation.number, operation.server_id, operation.spec.source))

    def _retry(self, name: str, operation: Operation, now: float, out: list[Action]) -> None:
        # A store that did not answer may be busy or dead; after two tries, or when it is gone, another one is asked.
        if operation.server_id not in self._cluster.servers or operation.tries > 2:
            operation.server_id = self._choose_store(avoid=operation.server_id)
        if not operation.server_id:
            operation.tries += 1
            if operation.waiters and operation.tries >= TRIES:
                failure = Failure(code=Code.UNAVAILABLE, message="No server is ready to import the model.")
                self._fail(name, operation, failure, now, out)
                return
        self._ask(operation, now, out)

    def _current(self, name: str, number: int) -> Operation | None:
        operation = self._operations.get(name)
        return operation if operation is not None and operation.number == number else None

    def _finish(
        self, name: str, operation: Operation, ready: DeploymentRecord | None, now: float, out: list[Action]
    ) -> None:
        """The operation ended well. `ready` is the new record, None for a lazy one whose checkpoint is unknown."""
        self._operations.pop(name, None)
        new = ready or _record(operation.spec, operation, DeploymentState.READY)
        old = self._records.get(name)
        if old is not None:
            revision = next_revision(old, new.spec, new.checkpoint)
            new = msgspec.structs.replace(new, revision=revision, created_at_s=old.created_at_s, epoch=old.epoch)
        changed = new != old
        if changed:
            self._records[name] = new if old is None else msgspec.structs.replace(new, epoch=old.epoch + 1)
        if changed and not operation.quiet:
            facts = new.checkpoint
            out.append(
                Note(
                    "deployment.ready",
                    {
                        "deployment": name,
                        "revision": new.revision,
                        "checkpoint_id": facts.checkpoint_id if facts is not None else None,
                        "weight_bytes": new.weight_bytes,
                        "server_id": operation.server_id,
                    },
                )
            )
        for reply, _ in operation.waiters:
            self._answer_when_written(name, reply, out)
        if not operation.waiters and not operation.quiet:
            self._outcomes[name] = (operation.spec, None, now + OUTCOME_S)

    def _fail(self, name: str, operation: Operation, failure: Failure, now: float, out: list[Action]) -> None:
        """The operation failed: a first deployment leaves nothing behind, a changed one stays as it was."""
        self._operations.pop(name, None)
        if operation.quiet:
            return
        out.append(
            Note("deployment.failed", {"deployment": name, "code": failure.code.value, "reason": failure.message})
        )
        record = self._records.get(name)
        half = record is not None and record.state is DeploymentState.IMPORTING
        answers = [Answer(reply, failure) for reply, _ in operation.waiters]
        if not answers:
            self._outcomes[name] = (operation.spec, failure, now + OUTCOME_S)
        if record is not None and half:
            del self._records[name]
            self._removing[name] = record
            self._when_gone.setdefault(name, []).extend(answers)  # said when nothing is left of it
        else:
            out.extend(answers)

    def _write(self, name: str, now: float, out: list[Action]) -> float:
        """Bring the registry closer to what is wanted; when to come back."""
        if name in self._writing:
            return math.inf
        due = self._retry_at.get(name)
        if due is not None and due > now:
            return due
        if name in self._removing:
            if name not in self._removals:
                self._removals[name] = self._removing[name]
                out.append(RemoveDeployment(self._removing[name]))
            return math.inf
        record = self._records.get(name)
        if record is None:
            return math.inf
        if self._written.get(name) != record:
            self._writing[name] = record
            out.append(WriteDeployment(record))
            return math.inf
        if record.state is DeploymentState.DELETING:
            del self._records[name]
            self._removing[name] = self._removals[name] = record
            out.append(RemoveDeployment(record))
        return math.inf


def _record(spec: DeploymentSpec, operation: Operation, state: DeploymentState) -> DeploymentRecord:
    return DeploymentRecord(
        spec=spec,
        slug=slug(spec.name),
        revision=revision_of(spec),
        state=state,
        created_at_s=operation.created_at_s,
        weight_bytes=operation.weight_bytes,
    )


def _conflict(sentence: str) -> Failure:
    return Failure(code=Code.CONFLICT, message=sentence)
