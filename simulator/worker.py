"""A worker in virtual time: its production core, and a shell whose effects are models. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, assert_never

from services.worker import events as e
from services.worker.core import WorkerCore
from services.worker.generation import encode
from services.worker.ports import EngineEvent
from services.worker.run import Limits
from shared.contracts.generation import FrameBatch
from shared.contracts.migration import MigrationEnded
from shared.errors import HearthError
from shared.subjects import (
    ABANDON,
    CANCEL,
    CHECK,
    CLAIM,
    DRAIN,
    FRAMES,
    HAND_OVER,
    HOLDS,
    LIST_REQUESTS,
    LOAD,
    MIGRATE,
    MIGRATION_ENDED,
    RELIEF,
    REPLICA_FAILED,
    ROUND,
    STOP,
)
from simulator.engine import ModelEngine, ModelLoaded, Speeds
from simulator.kernel import Kernel
from simulator.network import Network
from simulator.process import Process
from simulator.puller import ModelPuller, QueueAccess
from simulator.queue import Delivery, WorkQueue
from simulator.store import MAX_CONTEXT_TOKENS, ModelStore

LOCAL_S: Final = 0.001  # what the process does by itself: tokenise, open and close things, write records


class ModelWorker:
    """One life of a worker process. `name` is its connection's; `heard` sees every batch before it is sent,
    `migrated` how its migrations end, `struck` that a request has killed it."""

    def __init__(
        self,
        kernel: Kernel,
        network: Network,
        queue: WorkQueue,
        store: ModelStore,
        *,
        name: str,
        limits: Limits,
        speeds: Speeds,
        kv_tokens: int,
        heard: Callable[[str, FrameBatch], None],
        migrated: Callable[[MigrationEnded], None],
        struck: Callable[[], None],
    ) -> None:
        self.name: Final = name
        self.id: Final = limits.worker_id
        self.core: Final = WorkerCore(limits)
        self.process: Process[e.Event, e.Action] = Process(kernel, network, name, self.core, self._carry_out)
        self.engines: dict[str, ModelEngine] = {}
        self.drained = False
        self._kernel: Final = kernel
        self._store: Final = store
        self._speeds: Final = speeds
        self._kv_tokens: Final = kv_tokens
        self._heard: Final = heard
        self._migrated: Final = migrated
        self._struck: Final = struck
        self._pullers: dict[str, ModelPuller] = {}
        self._access: Final = QueueAccess(kernel, network, queue, self.process.connection)
        post, here, id = self.process.post, self.process.connection, self.id
        here.serve(LOAD, lambda message, reply: post(e.LoadAsked(message, reply)), worker_id=id)
        here.serve(STOP, lambda message, reply: post(e.StopAsked(message, reply)), worker_id=id)
        here.serve(DRAIN, lambda message, reply: post(e.DrainSet(message.on, reply)), worker_id=id)
        here.serve(CHECK, lambda message, reply: post(e.CheckAsked(message, reply)), worker_id=id)
        here.serve(MIGRATE, lambda message, reply: post(e.MigrateAsked(message, reply)), worker_id=id)
        here.serve(ROUND, lambda message, reply: post(e.RoundAsked(message, reply)), worker_id=id)
        here.serve(HAND_OVER, lambda message, reply: post(e.HandOverAsked(message, reply)), worker_id=id)
        here.serve(LIST_REQUESTS, lambda message, reply: post(e.ListAsked(reply)), worker_id=id)
        here.subscribe(CANCEL, lambda message: post(e.CancelArrived(message)), worker_id=id)
        here.subscribe(ABANDON, lambda message: post(e.AbandonArrived(message)), worker_id=id)
        post(e.ServerChanged(limits.server_id))

    # -- what may happen to it

    def drain(self) -> None:
        """SIGTERM."""
        self.process.post(e.DrainAsked())

    def disconnected(self) -> None:
        """It notices that its bus is away."""
        self.process.post(e.BusLost())

    def reconnected(self) -> None:
        """Its bus is back."""
        for puller in self._pullers.values():
            puller.ask_again()
        self.process.post(e.BusBack())

    def die(self) -> None:
        """kill -9."""
        self.process.die()
        for engine in self.engines.values():
            engine.close()
        for puller in self._pullers.values():
            puller.shut()
        self._store.forget(self.name)

    def stop(self) -> None:
        """SIGSTOP."""
        self.process.stop()
        for engine in self.engines.values():
            engine.pause()

    def resume(self) -> None:
        """SIGCONT; also ends a `hang`."""
        if self.process.stopped:
            self.process.resume()
            for engine in list(self.engines.values()):
                engine.resume()

    def hang(self) -> None:
        """Its loop stands still, its engines' threads go on."""
        self.process.stop()

    # -- actions → effects

    def _carry_out(self, action: e.Action) -> None:
        here, process = self.process.connection, self.process
        match action:
            case e.PublishFrames():
                self._heard(self.name, action.batch)
                here.publish(FRAMES, action.batch, gateway_id=action.gateway_id)
            case e.SubmitSequence():
                action.engine.submit(
                    action.sequence_id,
                    action.token_ids,
                    first_index=action.first_index,
                    max_new_tokens=action.max_new_tokens,
                    sampling=action.sampling,
                )
            case e.CancelSequence():
                action.engine.cancel(action.sequence_id)
            case e.Ack():
                self._access.ack(action.token)
            case e.Nak():
                self._access.nak(action.token, action.delay_s)
            case e.InProgress():
                for token in action.tokens:
                    self._access.in_progress(token)
            case e.Want():
                action.puller.want(action.requests)
            case e.ReplyTo():
                action.reply(action.answer)
            case e.PublishFailed():
                here.publish(REPLICA_FAILED, action.message)
            case e.PublishRelief():
                here.publish(RELIEF, action.message)
            case e.Abandon():
                here.publish(ABANDON, action.message, worker_id=action.worker_id)
            case e.PublishMigrationEnded():
                self._migrated(action.message)
                here.publish(MIGRATION_ENDED, action.message, worker_id=self.id)
            case e.ReleaseLease():
                self._store.release(action.message.lease_id)
            case e.AllowEngine():
                action.engine.allow_until(action.until)
            case e.RequestFinished():
                self._kernel.note(self.name, f"is done with {action.request_id}: {action.outcome}")
            case e.Drained():
                self._kernel.note(self.name, "is drained")
                self.drained = True
            case (
                e.RecordReplica()
                | e.RecordWorker()
                | e.SetPhase()
                | e.PublishProgress()
                | e.PublishConsumed()
                | e.LoadFinished()
                | e.StopAttach()
            ):
                pass  # records, and what only people and stores look at
            case e.ClaimRequest():
                token = action.token
                self._call(
                    CLAIM,
                    action.message,
                    lambda answer, unserved: e.ClaimAnswered(token, answer, unserved),
                    gateway_id=action.gateway_id,
                )
            case e.Reclaim():
                migration_id = action.migration_id
                self._call(
                    CLAIM,
                    action.message,
                    lambda answer, _: e.ReclaimAnswered(migration_id, answer),
                    gateway_id=action.gateway_id,
                )
            case e.SendRound():
                sent = action.message
                self._call(
                    ROUND,
                    sent,
                    lambda answer, _: e.RoundAnswered(sent.migration_id, sent.number, answer),
                    extra_s=sent.wait_s,
                    worker_id=action.worker_id,
                )
            case e.SendHandOver():
                handed = action.migration_id
                self._call(
                    HAND_OVER,
                    action.message,
                    lambda answer, _: e.HandOverAnswered(handed, answer),
                    worker_id=action.worker_id,
                )
            case e.TellHolds():
                gateway_id = action.gateway_id
                self._call(
                    HOLDS,
                    action.message,
                    lambda answer, unserved: e.HoldsAnswered(gateway_id, answer, unserved),
                    gateway_id=gateway_id,
                )
            case e.AcquireLease():
                lease = self._store.acquire(action.message, self.name)
                process.after(LOCAL_S, e.LeaseAnswered(action.message.replica_id, lease))
            case e.RenewLeases():
                process.after(LOCAL_S, e.LeasesRenewed(self._store.renew(action.lease_ids)))
            case e.LookAtServer():
                process.after(LOCAL_S, e.ServerSeen("model"))
            case e.PrepareSegment():
                process.after(LOCAL_S, e.SegmentPrepared())
            case e.Attach():
                self._kernel.after(self._speeds.attach_s, lambda: self._attach(action))
            case e.Detach():
                action.loaded.close()
                self.engines.pop(action.replica_id, None)
                process.after(LOCAL_S, e.Detached(action.replica_id))
            case e.OpenPuller():
                process.after(LOCAL_S, e.PullerOpened(action.replica_id, self._open(action)))
            case e.ClosePuller():
                self._pullers.pop(action.replica_id).shut()
                process.after(LOCAL_S, e.PullerClosed(action.replica_id))
            case e.Tokenise():
                process.after(LOCAL_S, _tokenised(action))
            case e.RemoveRecord():
                process.after(LOCAL_S, e.RecordRemoved(action.replica_id))
            case _:
                assert_never(action)

    def _call(
        self, endpoint: Any, message: Any, event: Callable[[Any, bool], e.Event], *, extra_s: float = 0.0, **ids: str
    ) -> None:
        post = self.process.post
        self.process.connection.call(
            endpoint, message, lambda answer, unserved: post(event(answer, unserved)), extra_s=extra_s, **ids
        )

    def _attach(self, action: e.Attach) -> None:
        if not self.process.alive:
            return
        replica_id, post = action.message.replica_id, self.process.post

        def stepped(events: list[EngineEvent]) -> None:
            post(e.EngineStepped(replica_id, events))

        engine = ModelEngine(
            self._kernel,
            speeds=self._speeds,
            slots=action.message.slots,
            max_sequence_tokens=MAX_CONTEXT_TOKENS,
            kv_tokens=self._kv_tokens,
            sink=lambda events: stepped(list(events)),
            struck=self._struck,
        )
        self.engines[replica_id] = engine
        if self.process.stopped:
            engine.pause()
        loaded = ModelLoaded(engine, MAX_CONTEXT_TOKENS, action.kv_bytes)
        post(e.Attached(replica_id, loaded))

    def _open(self, action: e.OpenPuller) -> ModelPuller:
        replica_id, post = action.replica_id, self.process.post

        def arrived(delivery: Delivery) -> None:
            post(
                e.DeliveryArrived(
                    replica_id, delivery.request, delivery.token, delivery.delivery, sequence=delivery.sequence
                )
            )

        puller = self._pullers[replica_id] = ModelPuller(self._access, action.slug, arrived)
        return puller


def _tokenised(action: e.Tokenise) -> e.Event:
    try:
        token_ids, echo_text = encode(action.request, action.tokenizer)
    except HearthError as error:
        return e.TokeniseFailed(action.token, error.failure)
    return e.Tokenised(action.token, token_ids, echo_text)
