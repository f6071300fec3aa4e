"""One replica's life: loading → ready → draining → gone. Pure.

`advance` looks at what is there and says the next thing to do; it is called after every event that concerns the
replica, so no order of events can make it forget something. Nothing is undone before everything in flight has come
back, and the record goes last: as long as it exists, so may memory and lease.
"""

from __future__ import annotations

import math
from typing import Final

from services.worker.arrival import image_bytes, streams
from services.worker.events import (
    AcquireLease,
    Action,
    AllowEngine,
    Attach,
    ClosePuller,
    Detach,
    LoadFinished,
    OpenPuller,
    PublishConsumed,
    PublishProgress,
    Puller,
    RecordReplica,
    RecordWorker,
    ReleaseLease,
    RemoveRecord,
    StopAttach,
    Want,
)
from services.worker.ports import Loaded
from services.worker.speeds import NOTHING_RUNS, RunningTokens, Speeds
from shared.backoff import delay_s
from shared.capacity import context_tokens, kv_cache_bytes
from shared.contracts.generation import Ledger
from shared.contracts.placement import LoadReplica, StopReplica
from shared.contracts.records import ReplicaRecord, ReplicaState
from shared.contracts.residency import Consumed, Lease, LoadProgress, Progress, Release
from shared.errors import Code, Failure
from shared.sizes import size

ACQUIRE_TRIES: Final = 6  # in a row without any answer from the store: about 6 s, then the load has failed
RECORD_INTERVAL_S: Final = 0.2  # at most so often does a replica that falls idle write its record by itself


class Replica:
    """A model on its way into this worker, in it, or on its way out. `reserved_bytes` is what it may take of memory.

    `safe_until` is the monotonic second until which the store keeps its lease whatever happens.
    """

    def __init__(
        self,
        message: LoadReplica,
        *,
        worker_id: str,
        server_id: str,
        reserved_bytes: int,
        engine: str,
        keeps_lease: bool,
        kv_bytes_max: int,
        lease_ttl_s: float,
        now: float,
    ) -> None:
        self.message: Final = message
        self.id: Final = message.replica_id
        self.reserved_bytes = reserved_bytes
        self.kv_bytes = message.kv_bytes
        self.state = ReplicaState.LOADING
        self.failure: Failure | None = None
        self.loaded: Loaded | None = None
        self.lease: Lease | None = None
        self.leased = False
        self.safe_until = math.inf
        self.puller: Puller | None = None
        self.held: dict[str, None] = {}
        self.wanted = 0
        self.finished_requests = 0
        self.cut_requests = 0
        self.generated_tokens = 0
        self.asked_at: Final = now
        self.ready_at = now
        self.idle_since = now
        self.retry_at: float | None = None
        self.in_flight: dict[str, None] = {}
        self.progress = Progress(phase="queued")
        self._engine: Final = engine
        self._keeps_lease = keeps_lease
        self._lease_ttl_s: Final = lease_ttl_s
        self._lease_asked_at = now
        self._waited_s = 0.0
        self._arriving_from: tuple[float, int] | None = None
        self._kv_bytes_max: Final = kv_bytes_max
        self._recorded_at = now
        self._worker_id: Final = worker_id
        self._server_id: Final = server_id
        self._attach_from = now
        self._attach_s = 0.0
        self._arrived_at = now
        self._overlap_s = 0.0
        self.speeds: Final = Speeds()
        self._tries = 0
        self._removed = False

    @property
    def checkpoint_id(self) -> str:
        """What it runs: as its lease says, since a lazy load does not know it before."""
        return self.lease.checkpoint.checkpoint_id if self.lease else self.message.checkpoint_id

    @property
    def slots(self) -> int:
        """How many requests it runs at once."""
        return min(self.message.slots, self.loaded.engine.slots) if self.loaded else self.message.slots

    @property
    def memory_bytes(self) -> int:
        """Device memory that it takes, or may take."""
        return self.loaded.memory_bytes if self.loaded else self.reserved_bytes

    def begin(self) -> list[Action]:
        """The load starts. The queue is opened meanwhile, so that readiness costs no round trip."""
        self._flying("lease")
        self._flying("open")
        self._lease_asked_at = self.asked_at
        return [
            RecordReplica(self.id),
            RecordWorker(),
            AcquireLease(self.message),
            OpenPuller(self.id, self.message.slug),
        ]

    def lease_answered(self, answer: Progress | Lease | Failure, now: float, *, free_bytes: int) -> list[Action]:
        """The store spoke. `free_bytes` is the device memory that this replica may take."""
        self._landed("lease")
        match answer:
            case Lease():
                self.lease, self.leased = answer, True
                self.safe_until = self._lease_asked_at + self._lease_ttl_s
                if self.state is ReplicaState.LOADING:
                    refused = self._settle(answer, free_bytes)
                    if refused is not None:
                        return self.fail(refused, now)
                    self._attach_from = now
                    self._flying("attach")
                    if answer.arrival is None:
                        self.progress = Progress(phase="attaching")  # how far it is, nobody measures
                    else:
                        self.progress = Progress(phase="reading", total_bytes=answer.arrival.image_bytes)
                    return [Attach(self.message, answer, self._engine, self.kv_bytes), *self._tell_progress()]
            case Progress():
                self._tries = 0
                self.progress = answer
                if self.state is ReplicaState.LOADING:
                    self._flying("lease")
                    self._lease_asked_at = now
                    return [AcquireLease(self.message)]
            case Failure():
                if self.state is ReplicaState.LOADING:
                    self._tries += 1
                    if answer.code is not Code.UNAVAILABLE or self._tries >= ACQUIRE_TRIES:
                        return self.fail(answer, now)
                    self.retry_at = now + delay_s(self._tries)
        return self.advance(now)

    def _settle(self, lease: Lease, free_bytes: int) -> Failure | None:
        """Settle what was open before the lease: the KV cache of a lazy load, whose commander did not know the
        checkpoint; and memory for the parameters of a model that only streams through the pool."""
        checkpoint = lease.checkpoint
        needed = self.reserved_bytes
        if not self.kv_bytes:
            self.kv_bytes = kv_cache_bytes(
                kv_bytes_per_token=checkpoint.kv_bytes_per_token,
                slots=self.message.slots,
                max_context_tokens=context_tokens(
                    checkpoint.max_context_tokens, self.message.max_context_tokens or None
                ),
                most_bytes=self._kv_bytes_max,
            )
            needed = self.kv_bytes + (0 if self._keeps_lease else checkpoint.weight_bytes)
        if self._keeps_lease and streams(lease):
            self._keeps_lease = False
            needed += image_bytes(lease)
        if needed > free_bytes:
            message = f"{size(needed)} are needed and worker {self._worker_id} has {size(max(0, free_bytes))} free."
            return Failure(code=Code.OUT_OF_MEMORY, message=message)
        self.reserved_bytes = needed
        return None

    def renewed(self, safe_until: float) -> list[Action]:
        """The store keeps the lease at least until then."""
        self.safe_until = safe_until
        return self._allow()

    def _allow(self) -> list[Action]:
        if self.loaded is None or not self._keeps_lease:
            return []
        return [AllowEngine(self.loaded.engine, self.safe_until)]

    def attach_progressed(self, done_bytes: int, total_bytes: int, now: float) -> list[Action]:
        """So many bytes have arrived."""
        if self.state is not ReplicaState.LOADING or "attach" not in self.in_flight:
            return []
        if self._arriving_from is None:
            self._arriving_from = (now, done_bytes)
        since, before = self._arriving_from
        rate = (done_bytes - before) / (now - since) if now > since else 0.0
        if done_bytes >= total_bytes:
            self.progress = Progress(phase="attaching")
        else:
            self.progress = Progress(
                phase="reading",
                done_bytes=done_bytes,
                total_bytes=total_bytes,
                eta_s=(total_bytes - done_bytes) / rate if rate > 0 else None,
            )
        return self._tell_progress()

    def _tell_progress(self) -> list[Action]:
        told = LoadProgress(deployment=self.message.slug, server_id=self._server_id, progress=self.progress)
        return [PublishProgress(self.message.slug, told), RecordReplica(self.id)]

    def chunks_consumed(self, chunks: int) -> list[Action]:
        """So many chunks of a window have been taken."""
        if self.lease is None or not self.leased:
            return []
        message = Consumed(holder=self._worker_id, lease_id=self.lease.lease_id, chunks=chunks)
        return [PublishConsumed(message)]

    def attached(self, loaded: Loaded, now: float) -> list[Action]:
        """The model answers."""
        self._landed("attach")
        self.loaded = loaded
        self._waited_s = loaded.times.waited_s
        self._attach_s = max(0.0, now - self._attach_from - self._waited_s)
        # When the last byte was there, and how much of the worker's own work was done by then.
        times = loaded.times
        self._arrived_at = max(self._attach_from, now - times.total_s + times.arrived_s)
        self._overlap_s = max(0.0, times.arrived_s - times.waited_s)
        if self._copied_too_late(now):
            message = "The lease ended while the parameters were copied."
            return self.fail(Failure(code=Code.CHECKPOINT_UNAVAILABLE, message=message), now)
        # Who has a copy of its own does not need the store's any more; the store may make room.
        return [*self._allow(), *([] if self._keeps_lease else self._release()), *self.advance(now)]

    def _copied_too_late(self, now: float) -> bool:
        """Whether what was copied may be another checkpoint's: this process stood still for longer than its lease.
        (Chunks of an arriving image are looked at again after each copy.)"""
        watched = self.lease is not None and self.lease.arrival is not None
        return not self._keeps_lease and not watched and now >= self.safe_until

    def attach_failed(self, failure: Failure, now: float) -> list[Action]:
        """The model cannot be attached."""
        self._landed("attach")
        return self.fail(failure, now)

    def detached(self, now: float) -> list[Action]:
        """The model is out of memory."""
        self._landed("detach")
        self.loaded, self.reserved_bytes = None, 0
        return self.advance(now)

    def puller_opened(self, puller: Puller, now: float) -> list[Action]:
        """The queue is open."""
        self._landed("open")
        self.puller = puller
        return self.advance(now)

    def puller_failed(self, failure: Failure, now: float) -> list[Action]:
        """The queue is not there."""
        self._landed("open")
        return self.fail(failure, now)

    def puller_closed(self, now: float) -> list[Action]:
        """No delivery comes any more."""
        self._landed("close")
        self.puller = None
        return self.advance(now)

    def take(self, token: str) -> bool:
        """A request came; False if the replica does not take any (more)."""
        self.wanted = max(0, self.wanted - 1)
        # It may have been on its way already when its slot was reserved for another worker's request.
        if self.state is not ReplicaState.READY or len(self.held) >= self.slots:
            return False
        self.held[token] = None
        return True

    def take_again(self, now: float) -> list[Action]:
        """A request came that is here already: another one is asked for in its place."""
        self.wanted = max(0, self.wanted - 1)
        return self.advance(now)

    def reserve(self, name: str) -> list[Action] | None:
        """Hold a slot for a request that is to come from another worker; None if none is free."""
        if self.state is not ReplicaState.READY or len(self.held) >= self.slots:
            return None
        self.held[name] = None
        if len(self.held) + self.wanted <= self.slots or self.puller is None:
            return []
        self.wanted -= 1
        return [Want(self.puller, -1)]

    def rename(self, name: str, token: str) -> None:
        """The request for which a slot was reserved is known by its token now."""
        del self.held[name]
        self.held[token] = None

    def give_up(self, token: str, now: float) -> list[Action]:
        """A request that was taken is over."""
        del self.held[token]
        actions: list[Action] = []
        if not self.held:
            self.idle_since = now
            if self.state is ReplicaState.READY and now - self._recorded_at >= RECORD_INTERVAL_S:
                # Somebody may be waiting for this replica's place. Under quick requests the heartbeat has to do.
                self._recorded_at = now
                actions.append(RecordReplica(self.id))
        return [*actions, *self.advance(now)]

    def refusal_of_stop(self, message: StopReplica) -> Failure | None:
        """Why this stop must not be: only if it runs something, and neither drain nor abort was asked for."""
        if not self.held or message.drain or message.abort:
            return None
        return Failure(code=Code.BUSY, message=f"Replica {self.id} runs {len(self.held)} requests.")

    def leave(self, now: float) -> list[Action]:
        """Take nothing more; go when the last request is over. Idempotent."""
        if self.state is ReplicaState.DRAINING:
            return self.advance(now)
        self.state = ReplicaState.DRAINING
        self.retry_at = None
        stop: list[Action] = [StopAttach(self.id)] if "attach" in self.in_flight else []
        return [*stop, RecordReplica(self.id), *self.advance(now)]

    def fail(self, failure: Failure, now: float) -> list[Action]:
        """It cannot go on, and the scheduler will hear why. Requests in it are the core's business."""
        if self.state is not ReplicaState.DRAINING:
            self.failure = failure
        return self.leave(now)

    def advance(self, now: float) -> list[Action]:
        """The next thing to do, given all that is there."""
        if self.state is ReplicaState.LOADING:
            if self.loaded is None or self.puller is None:
                return self._retry(now)
            self.state, self.ready_at, self.idle_since = ReplicaState.READY, now, now
            return [*self._top_up(), RecordReplica(self.id), RecordWorker(), self._finished(now)]
        if self.state is ReplicaState.READY:
            return self._top_up()
        return self._go()

    def record(self, now: float, running: RunningTokens = NOTHING_RUNS) -> ReplicaRecord:
        """What the registry shall say about it. `running` is what its requests hold."""
        ready = self.state is not ReplicaState.LOADING
        return ReplicaRecord(
            replica_id=self.id,
            worker_id=self._worker_id,
            server_id=self._server_id,
            deployment=self.message.deployment,
            revision=self.message.revision,
            checkpoint_id=self.message.checkpoint_id,
            state=self.state,
            slots=self.slots,
            running=len(self.held),
            idle_s=max(0.0, now - self.idle_since) if ready and not self.held else 0.0,
            memory_bytes=self.memory_bytes,
            finished_requests=self.finished_requests,
            cut_requests=self.cut_requests,
            generated_tokens=self.generated_tokens,
            engine=self.loaded.engine.name if self.loaded else "",
            load=None if ready else self.progress,
            context_tokens=running.context_tokens,
            output_tokens=running.output_tokens,
            left_tokens=running.left_tokens,
            step_s=self.speeds.step_s,
            prefill_token_s=self.speeds.prefill_token_s,
        )

    def ledger(self, *, waited_s: float, now: float) -> Ledger:
        """The ledger of a request that was claimed at `now` and was in the queue for `waited_s` (its gateway says).

        It is cold if it was there before the replica was.
        """
        if waited_s <= now - self.ready_at or self.lease is None:
            return Ledger(queue_s=waited_s)
        lease = self.lease
        return Ledger(
            cold=True,
            tier=lease.tier,
            queue_s=waited_s,
            decision_s=self.message.decision_s,
            import_s=lease.import_s,
            read_s=lease.read_s + self._waited_s,
            attach_s=self._attach_s,
            remote_bytes=lease.remote_bytes,
            ssd_bytes=lease.ssd_bytes,
            dram_bytes=lease.dram_bytes,
        )

    @property
    def arriving(self) -> bool:
        """Whether it waits for bytes that only the store can bring."""
        return "attach" in self.in_flight and self.lease is not None and self.lease.arrival is not None

    @property
    def gone(self) -> bool:
        """Whether it may be forgotten: nothing in flight, nothing held, the record deleted."""
        return self.state is ReplicaState.DRAINING and self._removed

    def record_removed(self) -> None:
        """The registry knows it no more."""
        self._landed("remove")
        self._removed = True

    def check(self) -> None:
        """Assert the invariants of one replica."""
        assert len(self.held) + self.wanted <= self.slots or self.state is not ReplicaState.READY, "more than the slots"
        if self.state is ReplicaState.READY:
            assert self.loaded is not None, "ready without a model"
            assert self.puller is not None, "ready without a queue"
            assert len(self.held) + self.wanted == self.slots, "a free slot that asks for nothing"
        elif self.state is ReplicaState.LOADING:
            assert not self.held, "a request before the model"
            assert self.in_flight or self.retry_at is not None, "a load that nobody carries on"
        else:
            assert self.held or self.in_flight or self._removed, "a leaving replica that nobody carries on"
        assert self.leased or self.loaded is None or not self._keeps_lease, "a model on bytes without a lease"
        assert self.loaded is None or "attach" not in self.in_flight, "attached twice"

    def _top_up(self) -> list[Action]:
        free = self.slots - len(self.held) - self.wanted
        if free <= 0 or self.puller is None:
            return []
        self.wanted += free
        return [Want(self.puller, free)]

    def _retry(self, now: float) -> list[Action]:
        if self.retry_at is None or now < self.retry_at:
            return []
        self.retry_at = None
        self._flying("lease")
        self._lease_asked_at = now
        return [AcquireLease(self.message)]

    def _go(self) -> list[Action]:
        actions: list[Action] = []
        if self.puller is not None and "close" not in self.in_flight:
            self._flying("close")
            self.wanted = 0
            actions.append(ClosePuller(self.id, self.puller))
        if self.held or self.in_flight:
            return actions
        if self.loaded is not None:
            self._flying("detach")
            return [Detach(self.id, self.loaded)]
        actions += self._release()
        if not self._removed:
            self._flying("remove")
            actions.append(RemoveRecord(self.id))
        return actions

    def _release(self) -> list[Action]:
        if self.lease is None or not self.leased:
            return []
        self.leased = False
        return [ReleaseLease(Release(holder=self._worker_id, lease_id=self.lease.lease_id))]

    def _finished(self, now: float) -> LoadFinished:
        assert self.loaded is not None
        assert self.lease is not None
        lease, total_s = self.lease, now - self.asked_at
        # Of what was in DRAM already nothing was waited for. The store has measured the time before the lease, the
        # board has shown the time after it.
        move_s = lease.moved_s + (self._arrived_at - self._attach_from if lease.arrival else 0.0)
        move_s = min(move_s, total_s) if lease.moved_bytes else 0.0
        wait_s = min(lease.wait_s, total_s - move_s)
        rest_s = total_s - move_s - wait_s
        return LoadFinished(
            deployment=self.message.deployment,
            replica_id=self.id,
            worker_id=self._worker_id,
            server_id=self._server_id,
            wait_s=wait_s,
            move_s=move_s,
            moved_bytes=lease.moved_bytes,
            rest_s=rest_s,
            work_s=rest_s + self._overlap_s,
            checkpoint_id=self.lease.checkpoint.checkpoint_id,
            engine=self.loaded.engine.name,
            tier=self.lease.tier,
            decision_s=self.message.decision_s,
            import_s=self.lease.import_s,
            read_s=self.lease.read_s + self._waited_s,
            attach_s=self._attach_s,
            total_s=total_s,
            weight_bytes=self.lease.checkpoint.weight_bytes,
            memory_bytes=self.loaded.memory_bytes,
        )

    def _flying(self, effect: str) -> None:
        assert effect not in self.in_flight, f"{effect} twice"
        self.in_flight[effect] = None

    def _landed(self, effect: str) -> None:
        del self.in_flight[effect]
