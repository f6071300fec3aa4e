"""Random lives of many requests: workers, a queue and a network that lose, repeat, reorder, delay and die."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from services.gateway import core as c
from shared.contracts.generation import End, FinishReason, Frame, FrameBatch, GivenBack
from shared.contracts.requests import Claim, Claimed, Gone, Holds, Owned, Request, Running, Unwanted
from shared.contracts.residency import LoadProgress, Progress
from shared.errors import Code, Failure
from tests.unit.gateway.bench import UNAVAILABLE, Bench

WORKERS = ("w1", "w2", "w3")
LAST = 6
LOST = c.DeploymentFailed("m", Failure(code=Code.NO_CAPACITY, message="No room."))
PROGRESS = c.ProgressArrived(
    LoadProgress(deployment="m-1", server_id="s", progress=Progress(phase="reading", done_bytes=1, total_bytes=100))
)


@dataclass
class Message:
    """A message of the queue: whether somebody has it, and how often it was handed out."""

    request: Request
    delivery: int = 0
    waiting: bool = True


@dataclass
class Job:
    """A request in a worker, that is or believes to be its owner; `at` is its next token."""

    request_id: str
    worker: str
    claimed: Claimed
    sequence: int
    delivery: int
    at: int = 0

    @property
    def token(self) -> str:
        return f"{self.sequence}.{self.delivery}"


@dataclass
class Cluster:
    """Everything around a core."""

    seed: int
    bench: Bench = field(default_factory=lambda: Bench(c.Config(max_deliveries=4, max_republished=2, quiet_s=30.0)))
    queue: dict[int, Message] = field(default_factory=dict)
    events: list[c.Event] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    sequence: int = 0
    calls: int = 0
    claims: int = 0
    refusals: float = 0.05

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    # -- what may happen

    def step(self) -> None:
        happens = self.random.choices(
            (
                self.call, self.deliver, self.work, self.hear, self.migrate, self.die, self.give_back, self.leave,
                self.other, self.tell, self.wait, self.redeliver, self.claim_again,
            ),
            weights=(10, 15, 20, 35, 4, 1, 2, 2, 2, 3, 15, 1, 1),
        )[0]  # fmt: skip
        happens()

    def call(self) -> None:
        if self.calls < 30:
            self.calls += 1
            self.out(
                self.bench.admit(
                    f"c{self.calls}",
                    n=self.random.choice((1, 1, 3)),
                    budget_s=self.random.uniform(20, 200),
                    stream=self.random.random() < 0.5,
                    queue_limit=12,
                )
            )

    def deliver(self) -> None:
        waiting = [sequence for sequence, message in sorted(self.queue.items()) if message.waiting]
        if waiting:
            sequence = self.random.choice(waiting)
            message = self.queue[sequence]
            message.waiting = False
            message.delivery += 1
            worker = self.random.choice(WORKERS)
            self.claim(message.request.request_id, worker, sequence, message.delivery)

    def redeliver(self) -> None:
        """The queue's wait for an acknowledgement is over, or seems to be."""
        if self.queue:
            self.queue[self.random.choice(sorted(self.queue))].waiting = True

    def claim(self, request_id: str, worker: str, sequence: int, delivery: int, after_epoch: int = -1) -> None:
        self.claims += 1
        claim = Claim(
            request_id=request_id,
            worker_id=worker,
            replica_id="r",
            delivery=delivery,
            token=f"{sequence}.{delivery}",
            sequence=self.random.choice((sequence, 0)),
            after_epoch=after_epoch,
            claim_id=f"k{self.claims}" if after_epoch >= 0 or self.random.random() < 0.5 else "",
        )

        def reply(answer: Claimed | Gone | Failure) -> None:
            if self.random.random() < 0.05:
                return  # the answer is lost
            if isinstance(answer, Gone):
                self.queue.pop(sequence, None)
            elif isinstance(answer, Claimed):
                self.jobs = [job for job in self.jobs if (job.request_id, job.worker) != (request_id, worker)]
                job = Job(request_id, worker, answer, sequence, delivery, at=len(answer.token_ids))
                self.jobs.append(job)
            elif answer.code is Code.BUSY and sequence in self.queue:
                self.queue[sequence].waiting = True

        asked = c.ClaimAsked(claim, reply)
        self.out(self.bench.do(asked))
        if self.random.random() < 0.1:
            self.post(asked)  # once more, some time

    def claim_again(self) -> None:
        """A source takes its request back."""
        if self.jobs:
            job = self.random.choice(self.jobs)
            self.claim(job.request_id, job.worker, job.sequence, job.delivery, job.claimed.epoch)

    def migrate(self) -> None:
        if self.jobs:
            job = self.random.choice(self.jobs)
            worker = self.random.choice(WORKERS)
            self.claim(job.request_id, worker, job.sequence, job.delivery, job.claimed.epoch)

    def work(self) -> None:
        if not self.jobs:
            return
        job = self.random.choice(self.jobs)
        if job.at < LAST:
            count = min(self.random.randint(1, 2), LAST - job.at)
            tokens = tuple(range(job.at, job.at + count))
            epoch = job.claimed.epoch
            item = Frame(request_id=job.request_id, epoch=epoch, index=job.at, token_ids=tokens, text="t")
            self.post(c.FramesArrived(FrameBatch(worker_id=job.worker, items=(item,))))
            job.at += count
            return
        end = End(request_id=job.request_id, epoch=job.claimed.epoch, index=LAST, reason=FinishReason.STOP)
        self.post(c.FramesArrived(FrameBatch(worker_id=job.worker, items=(end,))))
        self.stop(job, settle=True)

    def stop(self, job: Job, *, settle: bool = False, nak: bool = False) -> None:
        self.jobs.remove(job)
        if settle:
            self.queue.pop(job.sequence, None)
        elif nak and job.sequence in self.queue:
            self.queue[job.sequence].waiting = True

    def die(self) -> None:
        worker = self.random.choice(WORKERS)
        self.jobs = [job for job in self.jobs if job.worker != worker]

    def give_back(self) -> None:
        if self.jobs:
            job = self.random.choice(self.jobs)
            fault = self.random.random() < 0.3
            back = GivenBack(request_id=job.request_id, epoch=job.claimed.epoch, fault=fault)
            self.post(c.FramesArrived(FrameBatch(worker_id=job.worker, items=(), given_back=(back,))))
            self.stop(job, nak=True)

    def leave(self) -> None:
        if self.calls:
            self.post(c.ClientLeft(f"c{self.random.randint(1, self.calls)}"))

    def other(self) -> None:
        self.post(self.random.choice((c.Disconnected(), c.Reconnected(), c.Reconnected(), LOST, PROGRESS)))

    def tell(self) -> None:
        worker = self.random.choice(WORKERS)

        def reply(answer: Unwanted | Failure) -> None:
            assert isinstance(answer, Unwanted)
            for job in [job for job in self.jobs if job.worker == worker]:
                if job.request_id in answer.ended:
                    self.stop(job, settle=True)
                elif job.request_id in answer.superseded:
                    self.stop(job)

        self.out(self.bench.do(c.HoldsAsked(Holds(worker_id=worker, requests=self.running(worker)), reply)))

    def running(self, worker: str) -> tuple[Owned, ...]:
        return tuple(
            Owned(request_id=job.request_id, epoch=job.claimed.epoch, index=job.at)
            for job in self.jobs
            if job.worker == worker
        )

    def wait(self) -> None:
        self.bench.now += self.random.expovariate(2)
        held = {job.sequence for job in self.jobs}
        for sequence, message in self.queue.items():
            message.waiting = message.waiting or (sequence not in held and self.random.random() < 0.1)
        self.time()

    def time(self) -> None:
        deadline = self.bench.core.deadline()
        if deadline is not None and deadline <= self.bench.now:
            self.out(self.bench.do(None))
            after = self.bench.core.deadline()
            assert after is None or after > self.bench.now, "time was not used up"

    def hear(self) -> None:
        """An event reaches the core: out of order, sometimes twice, sometimes never."""
        if self.events:
            at = self.random.randrange(len(self.events)) if self.random.random() < 0.2 else 0
            fate = self.random.random()
            event = self.events[at] if fate < 0.05 else self.events.pop(at)
            if fate < 0.95:
                self.out(self.bench.do(event))

    def post(self, event: c.Event) -> None:
        self.events.append(event)

    # -- what the core wants

    def out(self, actions: list[c.Action]) -> None:
        for action in actions:
            match action:
                case c.Publish(request=wanted, attempt=attempt):
                    self.sequence += 1
                    if self.random.random() < self.refusals:
                        failure = Failure(code=Code.UNAVAILABLE, message="x")
                        self.post(c.PublishFailed(wanted.request_id, attempt, failure))
                        if self.random.random() < 0.5:
                            continue
                    else:
                        self.post(c.Published(wanted.request_id, attempt, self.sequence))
                    self.queue[self.sequence] = Message(wanted)
                case c.Unqueue(sequence=sequence):
                    self.queue.pop(sequence, None)
                case c.GiveBack(token=token):
                    message = self.queue.get(int(token.split(".")[0]))
                    if message is not None:
                        message.waiting = True
                case c.Settle(token=token):
                    self.queue.pop(int(token.split(".")[0]), None)
                case c.FindMessage(request_id=request_id, sequence=sequence):
                    found = None if self.random.random() < 0.1 else sequence in self.queue
                    self.post(c.MessageFound(request_id, sequence, found))
                case c.CheckOwner(worker_id=worker, requests=asked):
                    self.check(worker, asked)
                case c.AnswerClaim(reply=reply, answer=answer):
                    reply(answer)
                case c.AnswerHolds(reply=holds_reply, answer=unwanted):
                    holds_reply(unwanted)
                case c.CancelWork(worker_id=worker, cancel=cancel):
                    for job in [
                        job for job in self.jobs if (job.worker, job.request_id) == (worker, cancel.request_id)
                    ]:
                        if job.claimed.epoch <= cancel.epoch and self.random.random() < 0.9:
                            self.stop(job, nak=cancel.requeue, settle=not (cancel.requeue or cancel.superseded))

    def check(self, worker: str, asked: tuple[Owned, ...]) -> None:
        fate = self.random.random()
        if fate < 0.1:
            self.post(c.OwnerChecked(worker, asked, UNAVAILABLE))
        elif fate < 0.15:
            self.post(c.OwnerChecked(worker, asked, UNAVAILABLE, unserved=True))
        elif fate < 0.98:
            wanted = {one.request_id for one in asked}
            running = tuple(one for one in self.running(worker) if one.request_id in wanted)
            self.post(c.OwnerChecked(worker, asked, Running(requests=running)))


@pytest.mark.parametrize("seed", range(100))
def test_random_runs_keep_every_invariant(seed: int) -> None:
    """Replay one with `pytest tests/unit/gateway/test_core_random.py -k '[SEED]'`."""
    run = Cluster(seed)
    for _ in range(1200):
        run.step()
    # Whatever happened, time alone ends everything.
    run.out(run.bench.do(c.Reconnected()))
    for _ in range(5000):
        deadline = run.bench.core.deadline()
        if deadline is None:
            break
        run.bench.now = max(run.bench.now, deadline)
        run.time()
        for event in run.events:
            if isinstance(event, c.Published):
                run.out(run.bench.do(event))
        run.events.clear()
    assert run.bench.core.open_requests == 0
    ended = {call_id for call_id, _ in run.bench.concluded} | {call_id for call_id, _ in run.bench.failed}
    left = {account.request_id.split("-")[0] for account in run.bench.accounts if account.reason == "cancelled"}
    assert ended | left == {f"c{i}" for i in range(1, run.calls + 1)}
    for tokens in run.bench.delivered.values():
        assert tokens == list(range(len(tokens)))
    done = [account for account in run.bench.accounts if account.reason == "stop"]
    assert len(done) == len(run.bench.concluded)


@pytest.mark.parametrize("seed", range(20))
def test_with_living_workers_and_a_kind_network_every_request_completes(seed: int) -> None:
    """A storm first; then nothing is lost any more, and nothing may be left over or fail."""
    run = Cluster(seed, Bench(c.Config(max_deliveries=1000)), refusals=0.0)
    for _ in range(12):
        run.calls += 1
        run.out(run.bench.admit(f"c{run.calls}", budget_s=1e6))
    storm = (run.deliver, run.work, run.hear, run.migrate, run.die, run.give_back, run.tell, run.wait, run.redeliver)
    for _ in range(600):
        run.random.choice(storm)()
    for _ in range(20_000):
        if not run.bench.core.open_requests:
            break
        run.random.choice((run.deliver, run.work, run.work, run.tell, run.wait))()
        while run.events:
            run.out(run.bench.do(run.events.pop(0)))
    assert run.bench.core.open_requests == 0
    assert run.bench.failed == []
    assert len(run.bench.concluded) == 12
    for tokens in run.bench.delivered.values():
        assert tokens == list(range(LAST))
