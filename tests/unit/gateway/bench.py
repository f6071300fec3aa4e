"""A core with a clock in hand, for the tests of this directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from services.gateway import core as c
from shared.contracts.generation import End, FinishReason, Frame, FrameBatch, GivenBack, Usage
from shared.contracts.requests import (
    Cancel,
    Claim,
    Claimed,
    Gone,
    Holds,
    Owned,
    Request,
    Running,
    Sampling,
    TextPrompt,
    Unwanted,
)
from shared.errors import Code, Failure

CONFIG = c.Config(max_deliveries=3, max_republished=2, quiet_s=30.0)
UNAVAILABLE = Failure(code=Code.UNAVAILABLE, message="No answer in time.")
A = TypeVar("A")


def request(request_id: str) -> Request:
    return Request(
        request_id=request_id,
        gateway_id="g",
        deployment="m",
        prompt=TextPrompt(text="x"),
        sampling=Sampling(),
        budget_s=100.0,
    )


@dataclass
class Bench:
    """Remembers what came out and checks what must always hold."""

    config: c.Config = CONFIG
    now: float = 0.0
    delivered: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    concluded: list[tuple[str, int]] = field(default_factory=list)
    failed: list[tuple[str, Failure]] = field(default_factory=list)
    accounts: list[c.Account] = field(default_factory=list)
    granted: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.core = c.GatewayCore(self.config)

    def do(self, event: c.Event | None, at: float | None = None) -> list[c.Action]:
        self.now = self.now if at is None else at
        out = self.core.handle(event, self.now)
        self.core.check()
        for action in out:
            match action:
                case c.Deliver(call_id=call_id, choice=choice, frame=frame):
                    tokens = self.delivered.setdefault((call_id, choice), [])
                    assert frame.index == len(tokens), "a gap or a repeat"
                    assert frame.epoch == self.granted[frame.request_id], "somebody else owns it"
                    assert (call_id, choice) not in self.concluded
                    tokens.extend(frame.token_ids)
                case c.Conclude(call_id=call_id, choice=choice):
                    assert (call_id, choice) not in self.concluded
                    assert all(call_id != failed for failed, _ in self.failed)
                    self.concluded.append((call_id, choice))
                case c.Fail(call_id=call_id, failure=failure):
                    assert all(call_id != failed for failed, _ in self.failed)
                    self.failed.append((call_id, failure))
                case c.Account():
                    assert all(account.request_id != action.request_id for account in self.accounts)
                    self.accounts.append(action)
        if isinstance(event, c.ClaimAsked):
            (answer,) = only(out, c.AnswerClaim)
            if isinstance(answer.answer, Claimed):
                request_id = event.claim.request_id
                assert answer.answer.epoch >= self.granted.get(request_id, 1)
                self.granted[request_id] = answer.answer.epoch
        return out

    def until(self, at: float) -> list[c.Action]:
        """Let time pass, with every timer on its way."""
        out: list[c.Action] = []
        while (deadline := self.core.deadline()) is not None and deadline <= at:
            out += self.do(None, max(deadline, self.now))
            after = self.core.deadline()
            assert after is None or after > self.now, "time was not used up"
        self.now = at
        return out

    def admit(self, call_id: str = "a", n: int = 1, **more: Any) -> list[c.Action]:
        ids = [call_id] if n == 1 else [f"{call_id}-{i}" for i in range(n)]
        values: dict[str, Any] = {"queue_limit": 100, "budget_s": 100.0, "stream": True, **more}
        return self.do(
            c.Admitted(call_id=call_id, deployment="m", slug="m-1", requests=tuple(request(i) for i in ids), **values)
        )

    def claim(
        self, request_id: str = "a", worker: str = "w1", delivery: int = 1, **more: Any
    ) -> Claimed | Gone | Failure:
        more = {"replica_id": "r", **more}
        claim = Claim(request_id=request_id, worker_id=worker, delivery=delivery, **more)
        (answered,) = only(self.do(c.ClaimAsked(claim, lambda _: None)), c.AnswerClaim)
        return answered.answer

    def own(self, request_id: str = "a", worker: str = "w1", delivery: int = 1, **more: Any) -> int:
        """A claim with a token that must be granted; its epoch."""
        more = {"token": f"{request_id}.{delivery}", **more}
        answer = self.claim(request_id, worker, delivery, **more)
        assert isinstance(answer, Claimed), answer
        return answer.epoch

    def begin(self, request_id: str = "a", sequence: int = 17, tokens: int = 0, worker: str = "w1") -> None:
        """Admitted, queued, owned by `worker` at epoch 1, and `tokens` further."""
        self.admit(request_id)
        self.do(c.Published(request_id, 0, sequence))
        self.own(request_id, worker, sequence=sequence)
        for index in range(tokens):
            self.frame(index, request_id, worker=worker)

    def frame(
        self, index: int, request_id: str = "a", epoch: int = 1, count: int = 1, worker: str = "w1"
    ) -> list[c.Action]:
        tokens = tuple(range(index, index + count))
        item = Frame(request_id=request_id, epoch=epoch, index=index, token_ids=tokens, text="t" * count)
        return self.do(c.FramesArrived(FrameBatch(worker_id=worker, items=(item,))))

    def end(
        self, index: int, request_id: str = "a", epoch: int = 1, failure: Failure | None = None, worker: str = "w1"
    ) -> list[c.Action]:
        item = End(
            request_id=request_id,
            epoch=epoch,
            index=index,
            reason=None if failure else FinishReason.STOP,
            failure=failure,
            usage=Usage(prompt_tokens=3, completion_tokens=index),
        )
        return self.do(c.FramesArrived(FrameBatch(worker_id=worker, items=(item,))))

    def give_back(
        self, request_id: str = "a", epoch: int = 1, fault: bool = False, worker: str = "w1"
    ) -> list[c.Action]:
        back = GivenBack(request_id=request_id, epoch=epoch, fault=fault)
        return self.do(c.FramesArrived(FrameBatch(worker_id=worker, items=(), given_back=(back,))))

    def checked(self, asked: c.CheckOwner, *running: Owned) -> list[c.Action]:
        """A worker answers a check with what it runs."""
        return self.do(c.OwnerChecked(asked.worker_id, asked.requests, Running(requests=running)))

    def unserved(self, asked: c.CheckOwner) -> list[c.Action]:
        """Nobody serves a worker's calls."""
        return self.do(c.OwnerChecked(asked.worker_id, asked.requests, UNAVAILABLE, unserved=True))

    def unanswered(self, asked: c.CheckOwner) -> list[c.Action]:
        """A worker does not answer in time."""
        return self.do(c.OwnerChecked(asked.worker_id, asked.requests, UNAVAILABLE))

    def holds(self, *held: Owned, worker: str = "w1") -> tuple[Unwanted, list[c.Action]]:
        """A worker tells what it runs."""
        out = self.do(c.HoldsAsked(Holds(worker_id=worker, requests=held), lambda _: None))
        (answered,) = only(out, c.AnswerHolds)
        return answered.answer, [action for action in out if action is not answered]

    def kill(self, worker: str = "w1") -> list[c.Action]:
        """A worker dies now; what follows when its gateway notices."""
        asked: list[c.CheckOwner] = []
        out: list[c.Action] = []
        while not asked:
            deadline = self.core.deadline()
            assert deadline is not None, "nobody is asked"
            out += self.until(deadline)
            asked = [check for check in only(out, c.CheckOwner) if check.worker_id == worker]
        return [action for action in out if not isinstance(action, c.CheckOwner)] + self.unserved(asked[-1])


def only(out: list[c.Action], kind: type[A]) -> list[A]:
    return [action for action in out if isinstance(action, kind)]


def unhinted(out: list[c.Action]) -> list[c.Action]:
    """Without what the scheduler is told."""
    return [action for action in out if not isinstance(action, c.Hint)]


def owned(request_id: str = "a", epoch: int = 1, index: int = 0) -> Owned:
    return Owned(request_id=request_id, epoch=epoch, index=index)


def superseded(worker: str, epoch: int, request_id: str = "a") -> c.CancelWork:
    return c.CancelWork(worker, Cancel(request_id=request_id, epoch=epoch, superseded=True))


def requeue(worker: str, epoch: int, request_id: str = "a") -> c.CancelWork:
    return c.CancelWork(worker, Cancel(request_id=request_id, epoch=epoch, requeue=True))
