"""A replica: loading → ready → draining → gone; prefills one after another, and decodes all that it runs at once. Pure.

All that decode make a token per step, so a replica counts its steps, and a request ends when the count has grown by the
tokens that it lacks: one timer for whoever is next, whatever the number of requests.
"""

from __future__ import annotations

import collections
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shared.contracts.placement import LoadReplica
from shared.contracts.records import ReplicaRecord, ReplicaState
from shared.contracts.residency import Progress
from simulator.fleet.request import Request, tier_index
from simulator.kernel import Timer

if TYPE_CHECKING:
    from simulator.fleet.migration import Migration
    from simulator.fleet.worker import Worker

NEARLY: Final = 1e-6  # of a step
LOADING_PROGRESS: Final = Progress(phase="reading")


@dataclass(slots=True)
class LoadTimes:
    """When what happened of a load; `wanted_at`: since when it was wanted, `room_at`: since when room was made.

    The bytes were in DRAM at `landed_at`, and where the ledger says that they had arrived at `arrived_at`: what comes
    from DRAM has the way to the device for its only one.
    """

    wanted_at: float
    room_at: float
    commanded_at: float
    asked_at: float = math.nan
    began_at: float = math.nan
    landed_at: float = math.nan
    arrived_at: float = math.nan
    ready_at: float = math.nan
    tier: str = ""
    moved_bytes: int = 0


@dataclass(slots=True, eq=False)
class Prefill:
    """Tokens to compute: a request's own, or those of a round of a migration that comes here."""

    tokens: int
    request: Request
    slot: int
    done: Callable[[float], None] | None = None

    @property
    def void(self) -> bool:
        """Whether it is a request's own that has left meanwhile."""
        return self.done is None and self.request.slot != self.slot


class Replica:
    """See the module. `held` are the requests that it runs, `reserved` slots kept for migrations that come."""

    def __init__(self, worker: Worker, message: LoadReplica, times: LoadTimes, memory_bytes: int) -> None:
        self.worker: Final = worker
        self.message: Final = message
        self.id: Final = message.replica_id
        self.times: Final = times
        self.memory_bytes: Final = memory_bytes
        self.model: Final = worker.world.models[message.deployment].model
        self.state = ReplicaState.LOADING
        self.stale = True
        self.held: dict[Request, None] = {}
        self.reserved: dict[Migration, None] = {}
        self.lease_id = ""
        self.failed = False
        self.finished = 0
        self.generated = 0
        self.idle_since = worker.world.kernel.now
        self.removed = False
        self._queue: Final = worker.world.queues[message.deployment]
        self._slots_given = 0
        self._prefills: collections.deque[Prefill] = collections.deque()
        self._prefill_ends_at = math.inf
        self._prefill_began_at = 0.0
        self._decoding = 0
        self.step_s = self.model.step_s  # of a decode step with what decodes now
        self._ends: list[tuple[float, int, Request]] = []
        self._steps = 0.0
        self._steps_at = 0.0
        self._timer: Timer | None = None
        self._timer_at = math.inf
        self._recorded_at = -math.inf

    # -- what others see

    @property
    def free_slots(self) -> int:
        """Requests that it could take now."""
        if self.state is not ReplicaState.READY:
            return 0
        return self.message.slots - len(self.held) - len(self.reserved)

    @property
    def busy(self) -> bool:
        """Whether it runs anything, or is about to."""
        return bool(self.held or self.reserved)

    def tokens(self, request: Request, now: float) -> int:
        """Output tokens of a request that runs here."""
        if not request.decoding:
            return request.tokens
        steps = self._steps + (now - self._steps_at) / self.step_s
        made = math.floor(steps - request.from_step + NEARLY)
        return min(request.output_tokens, request.from_tokens + made)

    def record(self, now: float) -> ReplicaRecord:
        """See `registry.Writer`. Tokens change all the time: while it runs anything its record is never up to date."""
        self.stale = bool(self.held)
        context = output = left = 0
        for request in self.held:
            tokens = self.tokens(request, now)
            context += request.prompt_tokens + tokens
            output += tokens
            # What the gateway knows is the limit that the client set; how long the answer will be, nobody does.
            left = max(left, self.message.max_context_tokens - request.prompt_tokens - tokens)
        message, worker = self.message, self.worker
        ready = self.state is not ReplicaState.LOADING
        return ReplicaRecord(
            replica_id=self.id,
            worker_id=worker.id,
            server_id=worker.server.id,
            deployment=message.deployment,
            revision=message.revision,
            checkpoint_id=message.checkpoint_id,
            state=self.state,
            slots=message.slots,
            running=len(self.held) + len(self.reserved),
            idle_s=max(0.0, now - self.idle_since) if ready and not self.busy else 0.0,
            memory_bytes=self.memory_bytes,
            finished_requests=self.finished,
            generated_tokens=self.generated,
            engine="modelled",
            load=None if ready else LOADING_PROGRESS,
            peer_worker_ids=message.peer_worker_ids,
            context_tokens=context,
            output_tokens=output,
            left_tokens=left,
            step_s=self.step_s if ready else None,
            prefill_token_s=self.model.prefill_token_s if ready else None,
        )

    # -- its life

    def ready(self, now: float) -> None:
        """It can answer."""
        self.state = ReplicaState.READY
        self.times.ready_at = self.idle_since = self._steps_at = now
        self._note()
        self._queue.pull(self)

    def leave(self) -> None:
        """Take nothing more."""
        if self.state is not ReplicaState.DRAINING:
            self.state = ReplicaState.DRAINING
            self._queue.leave(self)
            self._note()
            for migration in list(self.reserved):
                migration.refused_there("The destination leaves.")

    def stop_engine(self) -> None:
        """Nothing is computed any more."""
        self._queue.leave(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._prefills.clear()
        self._prefill_ends_at = math.inf
        self._ends.clear()

    def _note(self) -> None:
        self._recorded_at = self.worker.world.kernel.now
        self.worker.world.registry.put("replica", self.id, self)

    # -- requests

    def take(self, request: Request) -> None:
        """Run a request of the queue: what it has so far is prefilled first."""
        world = self.worker.world
        self._seat(request)
        # Pull, hand out, claim: four messages (`docs/simulator.md`).
        now = world.kernel.now
        if not request.begun:
            request.queue_s = now - request.arrived_s
            self._explain(request, now)
        else:
            request.pause_s += now - request.waits_since
        request.waits_since = now
        self.prefill(Prefill(request.prompt_tokens + request.tokens, request, request.slot))

    def adopt(self, request: Request, migration: Migration, gap_tokens: int, done: Callable[[float], None]) -> None:
        """A migrated request is this replica's now: the gap is prefilled, then it decodes."""
        del self.reserved[migration]
        self._seat(request)
        self.prefill(Prefill(gap_tokens, request, request.slot, done))

    def _seat(self, request: Request) -> None:
        self._slots_given += 1
        request.replica = self
        request.slot = self._slots_given
        request.decoding = False
        self.held[request] = None
        self.stale = True

    def reserve(self, migration: Migration) -> bool:
        """Keep a slot for a request that is to come; whether one is free."""
        if self.free_slots <= 0:
            return False
        self.reserved[migration] = None
        self.stale = True
        if self.free_slots <= 0:
            self._queue.leave(self)
        return True

    def unreserve(self, migration: Migration) -> None:
        """It does not come. Idempotent."""
        if self.reserved.pop(migration, self) is None:
            self._freed()

    def freeze(self, request: Request, now: float) -> None:
        """It computes nothing for this request any more, which keeps its slot."""
        self._advance(now)
        request.tokens = self.tokens(request, now)
        self._undecode(request)
        self._arm(now)

    def thaw(self, request: Request, now: float) -> None:
        """It goes on with it: its KV cache is here still."""
        self._advance(now)
        self._decode(request, now)

    def release(self, request: Request, now: float) -> None:
        """It has nothing to do with this request any more: it ended, moved, or goes back to the queue."""
        self._advance(now)
        if request.decoding:
            request.tokens = self.tokens(request, now)
            self._undecode(request)
        request.replica = None
        request.slot = 0
        del self.held[request]
        self._arm(now)
        self._freed()

    def _freed(self) -> None:
        world = self.worker.world
        now = world.kernel.now
        self.stale = True
        if not self.busy:
            self.idle_since = now
            if self.state is ReplicaState.READY and now - self._recorded_at >= world.record_interval_s:
                self._note()
        if self.state is ReplicaState.READY:
            self._queue.pull(self)
        elif self.state is ReplicaState.DRAINING and not self.busy:
            self.worker.drained(self)

    def _explain(self, request: Request, now: float) -> None:
        """Where the wait of a request that begins now went, by the times of the load that it waited for."""
        times = self.times
        begin = request.arrived_s
        if begin >= times.ready_at:
            return
        request.tier = tier_index(times.tier)
        wait_s = now - begin

        def within(first: float, last: float) -> float:
            return max(0.0, last - max(first, begin))

        request.decide_s = within(times.wanted_at, times.room_at)
        request.room_s = within(times.room_at, times.commanded_at)
        request.load_queue_s = within(times.commanded_at, times.began_at)
        request.move_s = within(times.began_at, times.arrived_at)
        request.attach_s = within(times.arrived_at, times.ready_at)
        known = request.decide_s + request.room_s + request.load_queue_s + request.move_s + request.attach_s
        request.queue_s = max(0.0, wait_s - known)

    # -- computing

    def prefill(self, job: Prefill) -> None:
        """Compute these tokens, after those that wait already."""
        now = self.worker.world.kernel.now
        self._prefills.append(job)
        if len(self._prefills) == 1:
            self._begin_prefill(now)
        self._arm(now)

    def _begin_prefill(self, now: float) -> None:
        while self._prefills[0].void:
            self._prefills.popleft()
            if not self._prefills:
                self._prefill_ends_at = math.inf
                return
        job = self._prefills[0]
        request = job.request
        delay_s = 0.0
        if job.done is None and request.slot == job.slot and not request.begun:
            delay_s = self.worker.world.dispatch_s
            request.startup_s = now + delay_s - request.arrived_s
            request.queue_s += now + delay_s - request.waits_since  # behind the prefills of others
        self._prefill_began_at = now + delay_s
        self._prefill_ends_at = now + delay_s + self.model.prefill_s + job.tokens * self.model.prefill_token_s

    def _prefilled(self, now: float) -> None:
        job = self._prefills.popleft()
        took_s = now - self._prefill_began_at
        if self._prefills:
            self._begin_prefill(now)
        else:
            self._prefill_ends_at = math.inf
        if job.done is not None:
            job.done(took_s)
            return
        request = job.request
        if job.void or request.replica is not self:
            return  # it is gone meanwhile
        request.prefill_s += took_s
        if request.ttft_s != request.ttft_s:
            request.ttft_s = now - request.arrived_s
        request.tokens += 1
        self._decode(request, now)

    def _decode(self, request: Request, now: float) -> None:
        left = request.output_tokens - request.tokens
        if left <= 0:
            self.worker.world.ended_well(request)
            return
        self._advance(now)
        self._slots_given += 1  # what the heap says about an earlier time is void
        request.slot = self._slots_given
        request.decoding = True
        request.from_step, request.from_tokens = self._steps, request.tokens
        self._decoded(1)
        heapq.heappush(self._ends, (self._steps + left, request.slot, request))
        self._arm(now)

    def _undecode(self, request: Request) -> None:
        if request.decoding:
            request.decoding = False
            self._decoded(-1)

    def _decoded(self, change: int) -> None:
        self._decoding += change
        self.step_s = self.model.step_s + max(0, self._decoding - 1) * self.model.step_request_s

    def _advance(self, now: float) -> None:
        """Count the steps until now."""
        if self._decoding and now > self._steps_at:
            self._steps += (now - self._steps_at) / self.step_s
        self._steps_at = now

    def _arm(self, now: float) -> None:
        """Have a timer for what ends next."""
        ends = self._ends
        while ends and not (ends[0][2].decoding and ends[0][2].replica is self and ends[0][2].slot == ends[0][1]):
            heapq.heappop(ends)
        at = self._prefill_ends_at
        if ends:
            at = min(at, self._steps_at + max(0.0, ends[0][0] - self._steps) * self.step_s)
        if at == self._timer_at and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self.worker.world.kernel.at(at, self._tick) if at < math.inf else None

    def _tick(self) -> None:
        self._timer = None
        now = self.worker.world.kernel.now
        self._advance(now)
        if self._prefill_ends_at <= now + 1e-12:
            self._prefilled(now)
        ends = self._ends
        while ends and ends[0][0] <= self._steps + NEARLY:
            _, slot, request = heapq.heappop(ends)
            if request.decoding and request.replica is self and request.slot == slot:
                request.tokens = request.output_tokens
                self._undecode(request)
                self.worker.world.ended_well(request)
        self._arm(now)
