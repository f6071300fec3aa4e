"""Owners that die, hang, forget or go on: over a real nats-server, with workers written by hand.

The queue's own wait for an acknowledgement is longer than a test may take: what is resumed here is resumed because the
gateway noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import REGISTRY

from shared.bus import Bus, Delivery
from shared.contracts.events import ClusterEvent
from shared.contracts.generation import FrameBatch, GivenBack
from shared.contracts.requests import Check, Claim, Claimed, Gone, Holds, Owned, Running
from shared.errors import Code, HearthError
from shared.slug import slug
from shared.subjects import CHECK, CLAIM, EVENTS, FRAMES, HOLDS
from tests.integration.gateway.harness import (
    Cluster,
    FakeWorker,
    Job,
    Work,
    answer,
    chat_body,
    cluster,
    events,
    lines,
    text_of,
    until,
)

FIVE = "the sun is a star"
LONG: dict[str, Any] = {"ack_wait_s": 60.0, "check_s": 0.1, "lost_after_s": 0.8}


@dataclass
class Worker(FakeWorker):
    """One with a connection of its own, that claims with its token and says what it runs, if it `answers`."""

    answers: bool = True
    asked: list[Check] = field(default_factory=list)
    running: dict[str, Owned] = field(default_factory=dict)
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, deployment_slug: str) -> None:
        await self.bus.serve(CHECK, self._checked, worker_id=self.name)
        await super().start(deployment_slug)

    def _checked(self, check: Check, reply: Any) -> None:
        self.asked.append(check)
        if self.answers:
            here = [self.running[one.request_id] for one in check.requests if one.request_id in self.running]
            reply(Running(requests=tuple(here)))

    async def _run(self, delivery: Delivery) -> None:
        assert self.puller is not None
        try:
            claimed = await self.claim(delivery)
        except HearthError as error:
            self.refused.append(error.failure)
            self.bus.nak(delivery.token, 0.2)
            self.puller.want(1)
            return
        if isinstance(claimed, Gone):
            self.gone.append(delivery.request.request_id)
            self.bus.ack(delivery.token)
            self.puller.want(1)
            return
        work = Work(delivery, delivery.request, claimed)
        self.works.append(work)
        self.running[work.request.request_id] = Owned(request_id=work.request.request_id, epoch=work.epoch)
        await self.job(self, work)
        self.running.pop(work.request.request_id, None)
        self.puller.want(1)

    async def claim(self, delivery: Delivery, **more: Any) -> Claimed | Gone:
        message = Claim(
            request_id=delivery.request.request_id,
            worker_id=self.name,
            replica_id="r1",
            delivery=delivery.delivery,
            token=delivery.token,
            sequence=delivery.sequence,
            **more,
        )
        return await self.bus.call(CLAIM, message, gateway_id=delivery.request.gateway_id)

    def give_back(self, work: Work, *, fault: bool = False) -> None:
        back = GivenBack(request_id=work.request.request_id, epoch=work.epoch, fault=fault)
        batch = FrameBatch(worker_id=self.name, items=(), given_back=(back,))
        self.bus.publish(FRAMES, batch, gateway_id=work.request.gateway_id)
        self.bus.nak(work.delivery.token)


@dataclass
class World:
    """A gateway, and workers that can be killed."""

    it: Cluster
    nats_url: str
    prefix: str
    told: list[ClusterEvent] = field(default_factory=list)

    async def worker(self, name: str, job: Job = answer, *, slots: int = 8) -> Worker:
        """A worker on a connection of its own; `dead.set()` cuts that."""
        ready: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self.it.tasks.create_task(self._live(name, job, slots, ready))
        return await ready

    async def _live(self, name: str, job: Job, slots: int, ready: asyncio.Future[Worker]) -> None:
        async with Bus.connect(self.nats_url, name=name, prefix=self.prefix) as bus:
            worker = Worker(bus, name, self.it.tasks, job, slots)
            await worker.start(slug("m"))
            ready.set_result(worker)
            await worker.dead.wait()

    def facts(self, event: str) -> list[dict[str, Any]]:
        """What was told about events of this name."""
        return [dict(told.facts) for told in self.told if told.event == event]


@contextlib.asynccontextmanager
async def world(nats_url: str, redis_url: str, prefix: str, **settings: Any) -> AsyncIterator[World]:
    async with cluster(nats_url, redis_url, prefix, **{**LONG, **settings}) as it:
        await it.deploy(ack_wait_s=LONG["ack_wait_s"])
        here = World(it, nats_url, prefix)
        await it.bus.subscribe(EVENTS, here.told.append, service="gateway")
        await it.bus.flush()
        workers: list[Worker] = []
        make = here.worker

        async def kept(name: str, job: Job = answer, *, slots: int = 8) -> Worker:
            workers.append(await make(name, job, slots=slots))
            return workers[-1]

        here.worker = kept  # type: ignore[method-assign]
        try:
            async with asyncio.timeout(60):
                yield here
        finally:
            for worker in workers:
                worker.dead.set()


async def two_words(worker: FakeWorker, work: Work) -> None:
    """Two tokens, then silence."""
    for index, word in enumerate(("the ", "sun ")):
        worker.frame(work, index, word)
    assert isinstance(worker, Worker)
    request_id = work.request.request_id
    worker.running[request_id] = Owned(request_id=request_id, epoch=work.epoch, index=2)
    await worker.dead.wait()


async def empty(it: Cluster) -> bool:
    return await it.outstanding() == 0


async def test_a_dead_workers_requests_are_given_back_at_once(nats_url: str, redis_url: str, prefix: str) -> None:
    def counts() -> list[float]:
        recoveries = [sample("recovery_seconds_count"), sample("pause_seconds_count", how="recovery")]
        return [*recoveries, sample("recoveries_total"), lost("requests")]

    before = counts()
    async with world(nats_url, redis_url, prefix) as here:
        first = await here.worker("w1", two_words, slots=2)
        streams = [here.it.tasks.create_task(here.it.stream(hearth={"ledger": True})) for _ in range(2)]
        await until(lambda: len(first.works) == 2)
        first.dead.set()
        second = await here.worker("w2")
        for stream in streams:
            found = await stream
            assert text_of(found) == FIVE
            ledger = events(found)[-1]["hearth"]
            assert (ledger["recoveries"], ledger.get("migrations", 0)) == (1, 0)
            assert ledger["pause_s"] > 0
        assert [work.claimed.token_ids for work in second.works] == [(0, 1)] * 2
        await until(lambda: empty(here.it))
        await until(lambda: len(here.facts("request.recovered")) == 2)
        (told,) = here.facts("worker.lost")
        assert (told["worker_id"], told["requests"]) == ("w1", 2)
        assert {facts["worker_id"] for facts in here.facts("request.recovered")} == {"w2"}
    assert [new - old for new, old in zip(counts(), before, strict=True)] == [2.0] * 4


async def test_a_worker_that_hangs_loses_its_requests_and_is_told_when_it_wakes(
    nats_url: str, redis_url: str, prefix: str
) -> None:
    wake = asyncio.Event()

    async def hangs(worker: FakeWorker, work: Work) -> None:
        worker.frame(work, 0, "the ")
        await wake.wait()
        worker.frame(work, 1, "never seen")

    async with world(nats_url, redis_url, prefix) as here:
        first = await here.worker("w1", hangs, slots=1)
        first.answers = False
        waiting = here.it.tasks.create_task(here.it.stream())
        await until(lambda: first.works)
        gate = asyncio.Event()

        async def slow(worker: FakeWorker, work: Work) -> None:
            await gate.wait()
            await answer(worker, work)

        second = await here.worker("w2", slow)
        await until(lambda: second.works)
        assert first.asked
        wake.set()
        cancel = await first.cancels.get()
        assert (cancel.epoch, cancel.superseded, cancel.requeue) == (1, True, False)
        gate.set()
        assert text_of(await waiting) == FIVE
        assert here.facts("worker.lost")[0]["how"] == "silent"


async def test_a_living_worker_that_prefills_is_left_alone(nats_url: str, redis_url: str, prefix: str) -> None:
    go_on = asyncio.Event()

    async def slow(worker: FakeWorker, work: Work) -> None:
        await go_on.wait()
        await answer(worker, work)

    async with world(nats_url, redis_url, prefix, lost_after_s=0.3) as here:
        worker = await here.worker("w1", slow)
        await here.worker("w2", slow)
        waiting = here.it.tasks.create_task(here.it.stream(hearth={"ledger": True}))
        await until(lambda: len(worker.asked) >= 8 or here.facts("worker.lost"))
        go_on.set()
        found = await waiting
        assert text_of(found) == FIVE
        assert events(found)[-1]["hearth"].get("recoveries", 0) == 0


async def test_a_lost_end_is_found_out_and_the_request_published_again(
    nats_url: str, redis_url: str, prefix: str
) -> None:
    async def forgets(worker: FakeWorker, work: Work) -> None:
        worker.frame(work, 0, "the ")
        worker.bus.ack(work.delivery.token)  # its end is lost on the way

    async with world(nats_url, redis_url, prefix) as here:
        first = await here.worker("w1", forgets, slots=1)
        waiting = here.it.tasks.create_task(here.it.stream())
        await until(lambda: first.works)
        await here.worker("w2")
        first.job = answer
        assert text_of(await waiting) == FIVE
        assert here.facts("request.lost") == [{"worker_id": "w1", "how": "denied", "requests": 1}]
        await until(lambda: empty(here.it))


async def test_frames_that_are_lost_before_a_silence_are_noticed(nats_url: str, redis_url: str, prefix: str) -> None:
    async def loses(worker: FakeWorker, work: Work) -> None:
        assert isinstance(worker, Worker)
        if work.epoch > 1:
            await answer(worker, work)
            return
        request_id = work.request.request_id
        worker.frame(work, 0, "the ")
        worker.running[request_id] = Owned(request_id=request_id, epoch=1, index=4)
        cancel = await worker.cancels.get()
        assert cancel.requeue
        worker.give_back(work)

    async with world(nats_url, redis_url, prefix) as here:
        worker = await here.worker("w1", loses)
        assert text_of(await here.it.stream()) == FIVE
        assert [work.claimed.token_ids for work in worker.works] == [(), (0,)]


async def test_what_a_worker_gives_back_goes_on_elsewhere(nats_url: str, redis_url: str, prefix: str) -> None:
    async def gives_back(worker: FakeWorker, work: Work) -> None:
        assert isinstance(worker, Worker)
        worker.frame(work, 0, "the ")
        assert worker.puller is not None
        await worker.puller.close()
        worker.give_back(work)

    async with world(nats_url, redis_url, prefix) as here:
        first = await here.worker("w1", gives_back, slots=1)
        waiting = here.it.tasks.create_task(here.it.stream())
        await until(lambda: first.works)
        await here.worker("w2")
        assert text_of(await waiting) == FIVE
        assert first.cancels.empty()
        assert here.facts("worker.lost") == []


async def test_a_migration_is_a_claim_after_an_epoch(nats_url: str, redis_url: str, prefix: str) -> None:
    moved = asyncio.Event()

    async def moves(worker: FakeWorker, work: Work) -> None:
        worker.frame(work, 0, "the ")
        worker.frame(work, 1, "sun ")
        await moved.wait()

    async with world(nats_url, redis_url, prefix) as here:
        source = await here.worker("w1", moves, slots=1)
        destination = await here.worker("w2", slots=0)
        async with here.it.post("/v1/chat/completions", chat_body(stream=True, hearth={"ledger": True})) as response:
            found = lines(response)
            first = [await anext(found) for _ in range(2)]
            await until(lambda: source.works)
            (work,) = source.works
            claimed = await destination.claim(work.delivery, after_epoch=1, claim_id="m1")
            assert isinstance(claimed, Claimed)
            assert (claimed.epoch, claimed.token_ids) == (2, (0, 1))
            again = await destination.claim(work.delivery, after_epoch=1, claim_id="m1")
            assert isinstance(again, Claimed)
            assert again.epoch == 2
            with pytest.raises(HearthError) as refused:
                await source.claim(work.delivery, after_epoch=1, claim_id="m1.back")
            assert refused.value.failure.code is Code.STALE_EPOCH
            await answer(destination, Work(work.delivery, work.request, claimed))
            moved.set()
            rest = [line async for line in found]
        assert text_of([*first, *rest]) == FIVE
        ledger = events(rest)[-1]["hearth"]
        assert (ledger["migrations"], ledger.get("recoveries", 0)) == (1, 0)
        await until(lambda: empty(here.it))


async def test_what_nobody_wants_is_said_to_who_holds_it(nats_url: str, redis_url: str, prefix: str) -> None:
    async with world(nats_url, redis_url, prefix) as here:
        first = await here.worker("w1", two_words, slots=1)
        waiting = here.it.tasks.create_task(here.it.chat())
        await until(lambda: first.works)
        (work,) = first.works
        mine = Owned(request_id=work.request.request_id, epoch=1, index=2)
        nobodys = Owned(request_id="nobody", epoch=4)
        answered = await first.bus.call(HOLDS, Holds(worker_id="w1", requests=(mine, nobodys)), gateway_id="g1")
        assert (answered.ended, answered.superseded) == (("nobody",), ())
        answered = await first.bus.call(HOLDS, Holds(worker_id="w2", requests=(mine,)), gateway_id="g1")
        assert (answered.ended, answered.superseded) == ((), (work.request.request_id,))
        waiting.cancel()
        await until(lambda: empty(here.it))
        answered = await first.bus.call(HOLDS, Holds(worker_id="w1", requests=(mine,)), gateway_id="g1")
        assert answered.ended == (work.request.request_id,)


async def test_nobody_is_handed_a_request_whose_client_left_after_its_worker_died(
    nats_url: str, redis_url: str, prefix: str
) -> None:
    async with world(nats_url, redis_url, prefix, check_s=20.0) as here:
        first = await here.worker("w1", two_words, slots=1)
        waiting = here.it.tasks.create_task(here.it.chat())
        await until(lambda: first.works)
        first.dead.set()
        waiting.cancel()
        await until(lambda: empty(here.it))


async def test_a_request_that_kills_its_workers_is_stopped_and_its_neighbours_live(
    nats_url: str, redis_url: str, prefix: str
) -> None:
    dead: list[str] = []

    async def job(worker: FakeWorker, work: Work) -> None:
        assert isinstance(worker, Worker)
        if work.request.sampling.seed == 666:
            await asyncio.sleep(0.1)
            dead.append(worker.name)
            worker.dead.set()
        else:
            # Its worker dies with it twice; then it is tried without the other.
            await until(lambda: worker.dead.is_set() or work.epoch > 2)
            if not worker.dead.is_set():
                await answer(worker, work)

    lost_before = lost("owners")
    async with world(nats_url, redis_url, prefix, max_deliveries=3) as here:
        waiting = [here.it.tasks.create_task(here.it.chat(seed=seed)) for seed in (1, 666, 2)]
        for number in range(4):
            await here.worker(f"w{number}", job)
            await until(lambda: len(dead) > number or waiting[1].done())  # noqa: B023
        results = [await one for one in waiting]
        assert [status for status, _, _ in results] == [200, 502, 200]
        error = results[1][1]["error"]
        assert error["code"] == "worker_lost"
        assert "3 workers in a row ended" in error["message"]
        assert len(dead) == 3
        await until(lambda: empty(here.it))
    assert lost("owners") >= lost_before + 3


def lost(what: str) -> float:
    """All of them: one that ends just while it is asked is not unserved, but silent."""
    return sum(sample(f"lost_{what}_total", how=how) for how in ("unserved", "silent"))


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"hearth_gateway_{name}", labels) or 0.0
