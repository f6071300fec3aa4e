"""A gateway in virtual time: its production core, and a shell whose effects are models. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar, assert_never

from services.gateway import events as g
from services.gateway.core import Config, GatewayCore
from shared.contracts.requests import Check, Claim, Claimed, Demand, Gone, Request, Trial
from shared.errors import Code, Failure
from shared.subjects import CANCEL, CHECK, CLAIM, DEMAND, FRAMES, HOLDS, LOAD_PROGRESS, TRIAL
from simulator.clients import Clients
from simulator.kernel import Kernel
from simulator.network import QUEUE, Network, Packet, Reply
from simulator.process import Process, told
from simulator.puller import QueueAccess
from simulator.queue import WorkQueue

QUEUE_TIMEOUT_S: Final = 5.0  # as `shared.bus.Bus` waits for JetStream
T = TypeVar("T")


class ModelGateway:
    """One life of a gateway process. `name` is its connection's."""

    def __init__(
        self,
        kernel: Kernel,
        network: Network,
        queue: WorkQueue,
        clients: Clients,
        *,
        name: str,
        gateway_id: str,
        config: Config,
    ) -> None:
        self.name: Final = name
        self.id: Final = gateway_id
        self.core: Final = GatewayCore(config)
        self.process: Process[g.Event, g.Action] = Process(kernel, network, name, self.core, self._carry_out)
        self._kernel: Final = kernel
        self._network: Final = network
        self._queue: Final = queue
        self._clients: Final = clients
        self._access: Final = QueueAccess(kernel, network, queue, self.process.connection)
        post, here = self.process.post, self.process.connection
        here.serve(CLAIM, self._claim_asked, gateway_id=gateway_id)
        here.serve(HOLDS, lambda holds, reply: post(g.HoldsAsked(holds, reply)), gateway_id=gateway_id)
        here.subscribe(FRAMES, lambda batch: post(g.FramesArrived(batch)), gateway_id=gateway_id)
        here.subscribe(TRIAL, self._trial_heard, gateway_id="*")
        here.subscribe(LOAD_PROGRESS, lambda progress: post(g.ProgressArrived(progress)), slug="*")

    # -- what may happen to it

    def call(
        self, call_id: str, slug: str, requests: tuple[Request, ...], *, budget_s: float, queue_limit: int = 1000
    ) -> None:
        """A client calls."""
        self._clients.begin(call_id, self.name, requests, budget_s)
        self.process.post(
            g.Admitted(
                call_id=call_id,
                deployment=requests[0].deployment,
                slug=slug,
                requests=requests,
                queue_limit=queue_limit,
                budget_s=budget_s,
                stream=True,
            )
        )

    def leave(self, call_id: str) -> None:
        """A client goes."""
        if self._clients.is_open(call_id):
            self._clients.leave(call_id)
            self.process.post(g.ClientLeft(call_id))

    def disconnected(self) -> None:
        """It notices that its bus is away."""
        self.process.post(g.Disconnected())

    def reconnected(self) -> None:
        """Its bus is back."""
        self.process.post(g.Reconnected())

    def die(self) -> None:
        """kill -9."""
        self.process.die()
        self._clients.gateway_died(self.name)

    # -- messages → events

    def _claim_asked(self, claim: Claim, reply: Reply[Claimed | Gone]) -> None:
        def answer(message: Claimed | Gone | Failure) -> None:
            if isinstance(message, Claimed):
                self._clients.granted(claim.request_id, self.name, message.epoch, len(message.token_ids))
            reply(message)

        self.process.post(g.ClaimAsked(claim, answer))

    def _trial_heard(self, trial: Trial) -> None:
        if trial.gateway_id != self.id:
            self.process.post(g.TrialHeard(trial))

    # -- actions → effects

    def _carry_out(self, action: g.Action) -> None:
        here, clients = self.process.connection, self._clients
        match action:
            case g.Publish():
                self._publish(action)
            case g.Unqueue(sequence=sequence):
                self._network.transmit(
                    Packet(self.name, QUEUE, "Unqueue", sequence), lambda: self._queue.delete(sequence)
                )
            case g.FindMessage(request_id=request_id, sequence=sequence):
                self._find(request_id, sequence)
            case g.GiveBack(token=token):
                self._access.nak(token)
            case g.Settle(token=token):
                self._access.ack(token)
            case g.AnswerClaim(reply=reply, answer=answer):
                reply(answer)
            case g.AnswerHolds(reply=holds_reply, answer=unwanted):
                holds_reply(unwanted)
            case g.CheckOwner(worker_id=owner, requests=asked):
                here.call(
                    CHECK,
                    Check(requests=asked),
                    lambda answer, unserved: self.process.post(g.OwnerChecked(owner, asked, answer, unserved)),
                    worker_id=owner,
                )
            case g.Deliver(call_id=call_id, choice=choice, frame=frame):
                clients.frame(call_id, choice, frame)
            case g.Conclude(call_id=call_id, choice=choice, end=end):
                clients.conclude(call_id, choice, end)
            case g.Fail(call_id=call_id, failure=failure):
                clients.fail(call_id, failure)
            case g.CancelWork(worker_id=worker_id, cancel=cancel):
                here.publish(CANCEL, cancel, worker_id=worker_id)
            case g.Hint(deployment=deployment, waiting=waiting, oldest_s=oldest_s):
                hint = Demand(deployment=deployment, gateway_id=self.id, waiting=waiting, oldest_s=oldest_s)
                here.publish(DEMAND, hint)
            case g.TellTrial(slug=slug, request_id=request_id, on=on, guilty=guilty):
                trial = Trial(gateway_id=self.id, slug=slug, request_id=request_id, on=on, guilty=guilty)
                here.publish(TRIAL, trial, gateway_id=self.id)
            case g.OwnerLost() | g.Resumed():
                self._kernel.note(self.name, told(action))
            case g.Inform() | g.Account():
                pass  # what only people look at
            case _:
                assert_never(action)

    def _publish(self, action: g.Publish) -> None:
        request, attempt = action.request, action.attempt
        silent: int | Failure = Failure(code=Code.UNAVAILABLE, message="The request queue does not answer.")

        def answered(answer: int | Failure) -> None:
            if isinstance(answer, Failure):
                self.process.post(g.PublishFailed(request.request_id, attempt, answer))
            else:
                self.process.post(g.Published(request.request_id, attempt, answer))

        def publish() -> int | Failure:
            return self._queue.publish(action.slug, request)

        self._ask("Publish", request, publish, answered, silent)

    def _find(self, request_id: str, sequence: int) -> None:
        def answered(found: bool | None) -> None:
            self.process.post(g.MessageFound(request_id, sequence, found))

        self._ask("Find", sequence, lambda: self._queue.has(sequence), answered, None)

    def _ask(
        self, kind: str, message: object, answer: Callable[[], T], answered: Callable[[T], None], silence: T
    ) -> None:
        """A call of JetStream; question and answer may both get lost, and then `silence` is the answer."""
        waiting = [True]

        def finish(value: T) -> None:
            if waiting[0]:
                waiting[0] = False
                timer.cancel()
                self.process.connection.receive(lambda: answered(value))

        def asked() -> None:
            value = answer()
            self._network.transmit(Packet(QUEUE, self.name, kind + "Answer", value), lambda: finish(value))

        timer = self._kernel.after(QUEUE_TIMEOUT_S, lambda: finish(silence))
        self._network.transmit(Packet(self.name, QUEUE, kind, message), asked)
