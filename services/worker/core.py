"""The worker decides: which replicas it holds, and what becomes of them and of all that runs in them. Pure.

The requests are `runs.py`'s, those that leave for other workers `outgoing.py`'s, those that arrive `incoming.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, assert_never

from services.worker import events as e
from services.worker.incoming import Incoming
from services.worker.outgoing import Outgoing
from services.worker.ports import EngineDied, EngineEvent, KvShort
from services.worker.replica import Replica
from services.worker.run import Limits, Run
from services.worker.runs import Runs
from shared.contracts.migration import MigrationInFlight, Relief
from shared.contracts.placement import LoadReplica, ReplicaFailed, StopReplica
from shared.contracts.records import ReplicaRecord, ReplicaState
from shared.contracts.residency import Done
from shared.errors import Code, Failure
from shared.sizes import size

RENEW_AGAIN_S: Final = 1.0  # after a renewal that the store did not answer
RELIEF_S: Final = 2.0  # between two calls for relief of one replica


class WorkerCore:
    """`handle`, `deadline` and `check` are the driver's; the rest answers the shell's questions."""

    def __init__(self, limits: Limits) -> None:
        self.limits: Final = limits
        self.replicas: dict[str, Replica] = {}
        self.draining = False  # the process ends
        self.drained_by_operator = False  # it stays, and may be told to take work again
        self._runs: Final = Runs(limits, self.replicas)
        self.outgoing: Final = Outgoing(limits, self._runs, self.replicas)
        self.incoming: Final = Incoming(limits, self._runs, self.replicas)
        self._runs.departures, self._runs.landings = self.outgoing, self.incoming
        self._relief_at: dict[str, float] = {}
        self._give_back_at: float | None = None
        self._drained = False
        self._renew_at: float | None = None
        self._renewing = False
        self._renewal: tuple[float, tuple[str, ...]] = (0.0, ())  # when it was asked, for which leases
        self._bus_away = False
        self._bus_back_at = -math.inf
        self._segment = ""
        self._looking = False
        self._look_again = False

    # -- what the shell asks

    @property
    def runs(self) -> dict[str, Run]:
        """The requests by the tokens of their deliveries."""
        return self._runs.by_token

    def migrations(self, now: float) -> tuple[MigrationInFlight, ...]:
        """The migrations that leave this worker, for its record."""
        return self.outgoing.in_flight(now)

    @property
    def memory_used_bytes(self) -> int:
        """Device memory that replicas take or may take."""
        return sum(replica.memory_bytes for replica in self.replicas.values())

    def record(self, replica_id: str, now: float) -> ReplicaRecord:
        """The record of a replica that is here."""
        replica = self.replicas[replica_id]
        return replica.record(now, self._runs.running_tokens(replica))

    def count(self, state: ReplicaState) -> int:
        """Replicas in this state."""
        return sum(replica.state is state for replica in self.replicas.values())

    @property
    def slots(self) -> int:
        """Requests that the ready replicas can run at once."""
        return sum(r.slots for r in self.replicas.values() if r.state is ReplicaState.READY)

    # -- the driver's

    def handle(self, event: e.Event | None, now: float) -> list[e.Action]:
        """Take an event (None: time has passed)."""
        actions = self._time(now) if event is None else self._event(event, now)
        self._set_timers(now)
        if self.draining and not self.replicas and not self._drained:
            self._drained = True
            actions.append(e.Drained())
        return actions

    def deadline(self) -> float | None:
        """When time matters next."""
        times = [self._give_back_at, self._renew_at]
        times += [replica.retry_at for replica in self.replicas.values()]
        times += [*self._runs.deadline(), *self.outgoing.deadline(), *self.incoming.deadline()]
        return min((time for time in times if time is not None), default=None)

    def check(self) -> None:
        """Assert every invariant."""
        for replica in self.replicas.values():
            replica.check()
            assert not replica.gone, "a replica that is gone is still here"
        promised = sum(min(r.reserved_bytes, r.memory_bytes) for r in self.replicas.values())
        assert promised <= self.limits.memory_total_bytes, "more memory promised than there is"
        assert len(self.replicas) <= self.limits.max_replicas
        self._runs.check()
        self.outgoing.check()
        self.incoming.check()
        held = sum(len(replica.held) for replica in self.replicas.values())
        assert held == len(self.runs) + self.incoming.slots(), "a slot that nothing holds"
        assert not self._leases() or self._renewing or self._renew_at is not None, "leases that nobody renews"

    def _event(self, event: e.Event, now: float) -> list[e.Action]:
        match event:
            case e.EngineStepped():
                return self._stepped(event.replica_id, event.events, now)
            case e.DeliveryArrived():
                return self._runs.delivered(event, now)
            case e.ClaimAnswered():
                return self._runs.claimed(event, now)
            case e.Tokenised():
                return self._runs.tokenised(event, now)
            case e.TokeniseFailed():
                return self._runs.tokenise_failed(event, now)
            case e.CancelArrived():
                return self._runs.cancel(event.message, now)
            case e.CheckAsked():
                return [e.ReplyTo(event.reply, self._runs.checked(event.message))]
            case e.HoldsAnswered():
                return self._runs.held(event, now, bus_back_at=self._bus_back_at, bus_away=self._bus_away)
            case e.ListAsked():
                return [e.ReplyTo(event.reply, self._runs.listed(now))]
            case e.MigrateAsked():
                return self.outgoing.asked(event.message, event.reply, now)
            case e.RoundAnswered():
                return self.outgoing.round_answered(event, now)
            case e.HandOverAnswered():
                return self.outgoing.handed_over(event, now)
            case e.ReclaimAnswered():
                return self.outgoing.reclaimed(event, now)
            case e.RoundAsked():
                return self.incoming.round_asked(event.message, event.reply, now)
            case e.HandOverAsked():
                return self.incoming.hand_over_asked(event.message, event.reply, now)
            case e.AbandonArrived():
                return self.incoming.abandoned(event.message, now)
            case e.LoadAsked():
                return self._load(event.message, event.reply, now)
            case e.StopAsked():
                return self._stop(event.message, event.reply, now)
            case e.DrainAsked():
                return self._drain(now)
            case e.DrainSet():
                return self._set_drain(event.on, event.reply, now)
            case e.LeaseAnswered():
                replica = self.replicas[event.replica_id]
                free = self.limits.memory_total_bytes - self.memory_used_bytes + replica.memory_bytes
                return replica.lease_answered(event.answer, now, free_bytes=free)
            case e.LeasesRenewed():
                return self._renewed(event, now)
            case e.BusLost():
                self._bus_away = True
                return []
            case e.BusBack():
                return self._bus_back(now)
            case e.ServerChanged():
                return self._server_changed(event.server_id)
            case e.ServerSeen():
                return self._server_seen(event.segment)
            case e.SegmentPrepared():
                return []
            case e.AttachProgressed():
                return self.replicas[event.replica_id].attach_progressed(event.done_bytes, event.total_bytes, now)
            case e.ChunksConsumed():
                return self.replicas[event.replica_id].chunks_consumed(event.chunks)
            case e.Attached():
                return self.replicas[event.replica_id].attached(event.loaded, now)
            case e.AttachFailed():
                return self.replicas[event.replica_id].attach_failed(event.failure, now)
            case e.Detached():
                return self.replicas[event.replica_id].detached(now)
            case e.PullerOpened():
                return self.replicas[event.replica_id].puller_opened(event.puller, now)
            case e.PullerFailed():
                return self.replicas[event.replica_id].puller_failed(event.failure, now)
            case e.PullerClosed():
                return self.replicas[event.replica_id].puller_closed(now)
            case e.RecordRemoved():
                return self._removed(event.replica_id)
        assert_never(event)

    # -- replicas

    def _load(self, message: LoadReplica, reply: e.Reply, now: float) -> list[e.Action]:
        refusal = self._refusal(message)
        if refusal is not None:
            return [e.ReplyTo(reply, refusal)]
        if message.replica_id in self.replicas:
            return [e.ReplyTo(reply, Done())]
        replica = Replica(
            message,
            worker_id=self.limits.worker_id,
            server_id=self.limits.server_id,
            reserved_bytes=self._needed_bytes(message),
            engine=self.limits.engine or message.engine or "auto",
            keeps_lease=not self.limits.weights_on_device,
            kv_bytes_max=self.limits.kv_bytes_max,
            lease_ttl_s=self.limits.lease_ttl_s,
            now=now,
        )
        self.replicas[replica.id] = replica
        return [e.ReplyTo(reply, Done()), *replica.begin()]

    def _needed_bytes(self, message: LoadReplica) -> int:
        weights = message.checkpoint.weight_bytes if message.checkpoint and self.limits.weights_on_device else 0
        return message.kv_bytes + weights

    def _refusal(self, message: LoadReplica) -> Failure | None:
        known = self.replicas.get(message.replica_id)
        if known is not None:
            leaving = known.state is ReplicaState.DRAINING
            return Failure(code=Code.BUSY, message=f"Replica {known.id} is leaving.") if leaving else None
        if self.draining:
            return Failure(code=Code.DRAINING, message=f"Worker {self.limits.worker_id} is shutting down.")
        if self.drained_by_operator:
            return Failure(code=Code.DRAINING, message=f"Worker {self.limits.worker_id} is drained.")
        if len(self.replicas) >= self.limits.max_replicas:
            return Failure(
                code=Code.OUT_OF_MEMORY,
                message=f"Worker {self.limits.worker_id} holds {len(self.replicas)} replicas and takes no more.",
            )
        needed, free = self._needed_bytes(message), self.limits.memory_total_bytes - self.memory_used_bytes
        if needed > free:
            return Failure(
                code=Code.OUT_OF_MEMORY,
                message=f"{size(needed)} are needed and worker {self.limits.worker_id} has {size(max(0, free))} free.",
            )
        return None

    def _stop(self, message: StopReplica, reply: e.Reply, now: float) -> list[e.Action]:
        replica = self.replicas.get(message.replica_id)
        if replica is None:  # it is so already
            return [e.ReplyTo(reply, Done())]
        refusal = replica.refusal_of_stop(message)
        if refusal is not None:
            return [e.ReplyTo(reply, refusal)]
        actions = [e.ReplyTo(reply, Done()), *self._leave(replica, now)]
        if message.abort:
            actions += self._runs.give_back_all(replica, now)
        return actions

    def _leave(self, replica: Replica, now: float) -> list[e.Action]:
        """It takes nothing more, from the queue or from other workers; what runs goes on."""
        return [*replica.leave(now), *self.incoming.leaving(replica, now)]

    def _break(self, replica: Replica, failure: Failure, now: float, *, fault: bool = False) -> list[e.Action]:
        """It cannot go on: what runs in it goes elsewhere. `fault`: one of its requests may be to blame."""
        return [
            *replica.fail(failure, now),
            *self.incoming.leaving(replica, now),
            *self._runs.give_back_all(replica, now, fault=fault),
        ]

    def _removed(self, replica_id: str) -> list[e.Action]:
        replica = self.replicas.pop(replica_id)
        self._relief_at.pop(replica_id, None)
        replica.record_removed()
        actions: list[e.Action] = [e.RecordWorker()]
        if replica.failure is not None:
            told = ReplicaFailed(
                replica_id=replica.id,
                deployment=replica.message.deployment,
                worker_id=self.limits.worker_id,
                failure=replica.failure,
            )
            actions.append(e.PublishFailed(told))
        return actions

    def _drain(self, now: float) -> list[e.Action]:
        if self.draining:
            return []
        self.draining = True
        self._give_back_at = now + self.limits.drain_s
        return [action for replica in self.replicas.values() for action in self._leave(replica, now)]

    def _set_drain(self, on: bool, reply: e.Reply, now: float) -> list[e.Action]:
        if self.draining:
            if on:
                return [e.ReplyTo(reply, Done())]
            refused = Failure(code=Code.DRAINING, message=f"Worker {self.limits.worker_id} is shutting down.")
            return [e.ReplyTo(reply, refused)]
        changed = on != self.drained_by_operator
        self.drained_by_operator = on
        actions: list[e.Action] = [e.ReplyTo(reply, Done())]
        if changed:
            actions.append(e.SetPhase(on))
        if on:
            actions += [action for replica in self.replicas.values() for action in self._leave(replica, now)]
        return actions

    def _renewed(self, event: e.LeasesRenewed, now: float) -> list[e.Action]:
        self._renewing = False
        asked_at, asked = self._renewal
        answer = event.answer
        if isinstance(answer, Failure):
            self._renew_at = now + min(RENEW_AGAIN_S, self.limits.lease_ttl_s / 3)
            return self._unrenewed(event.unserved, asked_at, asked, answer, now)
        actions: list[e.Action] = []
        for replica in self._leasing(asked):
            assert replica.lease is not None
            if replica.lease.lease_id in answer.unknown:
                # Its bytes may become another checkpoint's at any moment: not one more token from them.
                actions += self._lose(replica, "The store has dropped the lease.", now)
            else:
                actions += replica.renewed(asked_at + self.limits.lease_ttl_s)
        return actions

    def _unrenewed(
        self, unserved: bool, asked_at: float, asked: tuple[str, ...], failure: Failure, now: float
    ) -> list[e.Action]:
        """The store did not answer. The bytes stay mapped, and it is asked again and again.

        While no store is on the bus nobody can drop a lease, and one that comes back keeps those that it has promised
        for a whole `ttl_s`: that is as good as a renewal. A store that is there but silent may have dropped it: engines
        stand still from the end of the lease on (`AllowEngine`), and after the same time once more their requests go
        elsewhere. While this worker itself is cut off it waits, as nobody would hear it anyway. Only what waits for
        bytes to arrive has nothing to stand on without a store.
        """
        ttl_s = self.limits.lease_ttl_s
        actions: list[e.Action] = []
        for replica in self._leasing(asked):
            lost_at = max(replica.safe_until, self._bus_back_at) + (0.0 if replica.arriving else ttl_s)
            if unserved and not replica.arriving:
                actions += replica.renewed(max(replica.safe_until, asked_at + ttl_s))
            elif now >= lost_at and not self._bus_away:
                reason = f"The store has not renewed the lease within {ttl_s:g} s: {failure.message}"
                actions += self._lose(replica, reason, now)
        return actions

    def _leasing(self, lease_ids: tuple[str, ...]) -> list[Replica]:
        return [r for r in self.replicas.values() if r.leased and r.lease is not None and r.lease.lease_id in lease_ids]

    def _lose(self, replica: Replica, reason: str, now: float) -> list[e.Action]:
        return self._break(replica, Failure(code=Code.CHECKPOINT_UNAVAILABLE, message=reason), now)

    def _bus_back(self, now: float) -> list[e.Action]:
        self._bus_away, self._bus_back_at = False, now
        if self._renew_at is not None:
            self._renew_at = now
        return self._look()

    # -- the server's memory

    def _server_changed(self, server_id: str) -> list[e.Action]:
        return self._look() if server_id == self.limits.server_id else []

    def _look(self) -> list[e.Action]:
        if self._looking:
            self._look_again = True
            return []
        self._looking = True
        return [e.LookAtServer()]

    def _server_seen(self, segment: str) -> list[e.Action]:
        self._looking = False
        actions: list[e.Action] = []
        if segment and segment != self._segment:
            self._segment = segment
            actions.append(e.PrepareSegment(segment))
        if self._look_again:
            self._look_again = False
            actions += self._look()
        return actions

    def _leases(self) -> tuple[str, ...]:
        return tuple(r.lease.lease_id for r in self.replicas.values() if r.leased and r.lease is not None)

    # -- the engines

    def _stepped(self, replica_id: str, steps: Sequence[EngineEvent], now: float) -> list[e.Action]:
        died = next((event.failure for event in steps if isinstance(event, EngineDied)), None)
        actions = [*self._runs.stepped(steps, now, died=died is not None), *self.incoming.stepped(steps, now)]
        replica = self.replicas.get(replica_id)
        if replica is None:
            return actions
        for event in steps:
            if isinstance(event, KvShort):
                actions += self._short(replica, event.sequences, now)
        if died is not None:
            actions += self._break(replica, died, now, fault=True)
        return actions

    def _short(self, replica: Replica, sequences: int, now: float) -> list[e.Action]:
        if now < self._relief_at.get(replica.id, -math.inf):
            return []
        self._relief_at[replica.id] = now + RELIEF_S
        relief = Relief(
            worker_id=self.limits.worker_id,
            replica_id=replica.id,
            deployment=replica.message.deployment,
            requests=sequences,
        )
        return [e.PublishRelief(relief)]

    # -- time

    def _time(self, now: float) -> list[e.Action]:
        actions: list[e.Action] = []
        for replica in self.replicas.values():
            if replica.retry_at is not None and replica.retry_at <= now:
                actions += replica.advance(now)
        actions += self._runs.time(now)
        actions += self.outgoing.time(now)
        actions += self.incoming.time(now)
        if self._renew_at is not None and self._renew_at <= now:
            self._renew_at, self._renewing = None, True
            self._renewal = (now, self._leases())
            actions.append(e.RenewLeases(self._renewal[1]))
        if self._give_back_at is not None and self._give_back_at <= now:
            self._give_back_at = None
            for replica in list(self.replicas.values()):
                actions += self._runs.give_back_all(replica, now)
        return actions

    def _set_timers(self, now: float) -> None:
        self._runs.set_timers(now)
        if self._renewing:
            return
        if not self._leases():
            self._renew_at = None
        elif self._renew_at is None:
            self._renew_at = now + self.limits.lease_ttl_s / 3
