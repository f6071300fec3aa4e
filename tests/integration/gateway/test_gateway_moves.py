"""The paths of running requests and of draining, with workers and a scheduler written by hand."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from shared.bus import Reply, Subscription
from shared.contracts.migration import (
    Drain,
    ListRequests,
    MigrationEnded,
    MigrationOutcome,
    MigrationReason,
    Move,
    Moved,
    Moving,
    RequestList,
    RunningRequest,
)
from shared.contracts.records import Phase, ReplicaRecord, ReplicaState, WorkerRecord
from shared.contracts.residency import Done
from shared.errors import Code, Failure
from shared.subjects import DRAIN, LIST_REQUESTS, MOVE
from tests.integration.gateway.harness import Cluster, cluster, until
from tests.integration.gateway.test_gateway_stores import Store, lines_of, refused

LINES = {"Accept": "application/x-ndjson"}
REQUESTS = "/v1/admin/requests"


def running(request_id: str, worker_id: str, **more: Any) -> RunningRequest:
    return RunningRequest(
        request_id=request_id, gateway_id="g1", deployment="m", worker_id=worker_id, replica_id="r1",
        **{"state": "decode", "epoch": 1, **more},
    )  # fmt: skip


def ended(outcome: MigrationOutcome = MigrationOutcome.COMMITTED, **more: Any) -> MigrationEnded:
    return MigrationEnded(
        migration_id="x", request_id="a", deployment="m", source_worker_id="w1", destination_worker_id="w2",
        reason=MigrationReason.OPERATOR, outcome=outcome, rounds=2, tokens=40, gap_tokens=3, **more,
    )  # fmt: skip


@dataclass
class Worker:
    """A record, and what a worker answers to the operator."""

    it: Cluster
    worker_id: str
    server_id: str = "s1"
    phase: Phase = Phase.READY
    runs: list[RunningRequest] = field(default_factory=list)
    refuses: Failure | None = None
    orders: list[bool] = field(default_factory=list)
    replica: bool = False
    incoming: int = 0
    subscriptions: list[Subscription] = field(default_factory=list)

    async def start(self) -> Worker:
        await self.write()
        bus, me = self.it.bus, self.worker_id
        self.subscriptions.append(await bus.serve(LIST_REQUESTS, self._list, worker_id=me))
        self.subscriptions.append(await bus.serve(DRAIN, self._drain, worker_id=me))
        await bus.flush()
        return self

    async def stop(self) -> None:
        for subscription in self.subscriptions:
            await subscription.close()
        await self.it.bus.flush()
        self.subscriptions.clear()

    async def write(self) -> None:
        record = WorkerRecord(
            worker_id=self.worker_id, server_id=self.server_id, phase=self.phase, pid=1, device="cpu", device_name="",
            memory_total_bytes=1, memory_used_bytes=0, max_replicas=1, incoming=self.incoming,
        )  # fmt: skip
        await self.it.registry.put(record, ttl_s=None)
        if self.replica:
            await self.it.registry.put(self._replica(), ttl_s=None)
        else:
            await self.it.registry.delete(ReplicaRecord, f"r-{self.worker_id}")

    def _replica(self) -> ReplicaRecord:
        return ReplicaRecord(
            replica_id=f"r-{self.worker_id}", worker_id=self.worker_id, server_id=self.server_id, deployment="m",
            revision="1", checkpoint_id="c1", state=ReplicaState.DRAINING, slots=8, running=len(self.runs),
        )  # fmt: skip

    def _list(self, _: ListRequests, reply: Reply[RequestList]) -> None:
        reply(RequestList(requests=tuple(self.runs)))

    def _drain(self, message: Drain, reply: Reply[Done]) -> None:
        if self.refuses is not None:
            reply(self.refuses)
            return
        self.orders.append(message.on)
        self.phase = Phase.DRAINING if message.on else Phase.READY
        self.it.tasks.create_task(self._obey(reply))

    async def _obey(self, reply: Reply[Done]) -> None:
        await self.write()
        reply(Done())


@dataclass
class Scheduler:
    """Gives the answers that the test wrote down, the last one for ever; keeps what it was asked."""

    it: Cluster
    answers: list[Moving | Moved | Failure] = field(default_factory=list)
    asked: list[Move] = field(default_factory=list)
    subscription: Subscription | None = None

    async def start(self) -> Scheduler:
        self.subscription = await self.it.bus.serve(MOVE, self._move)
        await self.it.bus.flush()
        return self

    async def stop(self) -> None:
        assert self.subscription is not None
        await self.subscription.close()
        await self.it.bus.flush()

    def _move(self, message: Move, reply: Reply[Moving | Moved]) -> None:
        self.asked.append(message)
        reply(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])


async def post(it: Cluster, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    async with it.post(path, body) as response:
        return response.status, await response.json()


# -- what runs --------------------------------------------------------------------------------------------------------


async def test_what_runs_everywhere_oldest_first(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1", running_s=1.0, completion_tokens=5)]).start()
        leaving = [running("b", "w2", running_s=9.0, migrating_to="w1"), running("c", "w2", running_s=0.5)]
        await Worker(it, "w2", phase=Phase.DRAINING, runs=leaving).start()
        await Worker(it, "w3", phase=Phase.STARTING, runs=[running("d", "w3")]).start()
        await (await Worker(it, "w4").start()).stop()
        async with it.http.get(it.url + REQUESTS) as response:
            assert response.status == 200
            answer = await response.json()
        assert [(one["request_id"], one["worker_id"]) for one in answer["data"]] == [
            ("b", "w2"), ("a", "w1"), ("c", "w2"),
        ]  # fmt: skip
        assert answer["data"][0]["migrating_to"] == "w1"
        assert answer["data"][1]["migrating_to"] == "", "every field is there"
        assert answer["silent"] == ["w4"]


async def test_more_workers_than_are_asked_at_once(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.moves.AT_ONCE", 2)
    async with cluster(nats_url, redis_url, prefix) as it:
        for number in range(7):
            await Worker(it, f"w{number}", runs=[running(f"q{number}", f"w{number}")]).start()
        async with it.http.get(it.url + REQUESTS) as response:
            answer = await response.json()
        assert sorted(one["request_id"] for one in answer["data"]) == [f"q{number}" for number in range(7)]
        assert answer["silent"] == []


# -- migrate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "to"), [({"to": "w2"}, "w2"), ({"to": None}, ""), (None, "")])
async def test_a_migration_is_followed_to_its_end(
    nats_url: str, redis_url: str, prefix: str, body: Any, to: str
) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1"), running("b", "w1")]).start()
        await Worker(it, "w2").start()
        scheduler = await Scheduler(it).start()
        steps = [Moving(phase="loading", to_worker_id="w2"), Moving(phase="migrating", open_requests=1)]
        scheduler.answers = [*steps, Moved(ended=(ended(wire_bytes=900, total_s=0.5, frozen_s=0.01),))]
        found = await lines_of(it, f"{REQUESTS}/a/migrate", body)
        assert [next(iter(line)) for line in found] == ["moving", "moving", "migrated"]
        assert found[0]["moving"] | {"type": ""} == {
            "type": "", "phase": "loading", "open_requests": 0, "to_worker_id": "w2",
        }  # fmt: skip
        last = found[-1]["migrated"]
        assert (last["outcome"], last["rounds"], last["frozen_s"], last["failure"]) == ("committed", 2, 0.01, None)
        assert len({move.move_id for move in scheduler.asked}) == 1, "one move, asked for again"
        move = scheduler.asked[0]
        assert (move.from_worker_id, move.request_ids, move.to_worker_id) == ("w1", ("a",), to)
        assert (move.reason, move.replica_id, move.most) == (MigrationReason.OPERATOR, "r1", 0)
        scheduler.answers = [steps[0], Moved(ended=(ended(),))]
        status, answer = await post(it, f"{REQUESTS}/a/migrate", body)
        assert (status, answer["migrated"]["outcome"]) == (200, "committed")


async def test_a_request_that_ended_on_the_way_did_not_fail(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1")]).start()
        scheduler = await Scheduler(it, [Moved(ended=(ended(MigrationOutcome.ENDED),))]).start()
        status, answer = await post(it, f"{REQUESTS}/a/migrate")
        assert (status, answer["migrated"]["outcome"]) == (200, "ended")
        scheduler.answers = [Moved()]
        status, error = await refused(it, "POST", f"{REQUESTS}/a/migrate")
        assert (status, error["message"]) == (404, "Request 'a' was over before it could move.")


async def test_a_migration_that_was_given_up_is_an_error(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1")]).start()
        full = Failure(code=Code.NO_CAPACITY, message="The replica has no slot.", retry_after_s=7.0)
        moving = Moving(phase="migrating")
        scheduler = await Scheduler(it, [Moved(ended=(ended(MigrationOutcome.ABORTED, failure=full),))]).start()
        async with it.post(f"{REQUESTS}/a/migrate", None) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (503, "no_capacity")
            assert response.headers["Retry-After"] == "7"
            assert error["message"] == "Request 'a' did not move and goes on at w1: The replica has no slot."
        scheduler.answers = [moving, Moved(ended=(ended(MigrationOutcome.ABORTED),))]
        *_, last = await lines_of(it, f"{REQUESTS}/a/migrate")
        assert last["error"]["code"] == "busy", "no reason was given, but it goes on where it was"
        scheduler.answers = [moving, Moved(failure=full)]
        *_, last = await lines_of(it, f"{REQUESTS}/a/migrate")
        assert last["error"]["message"] == "Request 'a' did not move: The replica has no slot."
        late = Failure(code=Code.UNAVAILABLE, message="The move is not over after 120 s.")
        scheduler.answers = [moving, late]
        *_, last = await lines_of(it, f"{REQUESTS}/a/migrate")
        assert last["error"]["message"] == "The move is not over after 120 s.", "a word of the scheduler's is an answer"
        scheduler.answers = [Failure(code=Code.NO_CAPACITY, message="No other worker has room.")]
        status, error = await refused(it, "POST", f"{REQUESTS}/a/migrate", {})
        assert (status, error["message"]) == (503, "No other worker has room.")


@pytest.mark.parametrize(
    ("request_id", "body", "status", "code", "param", "says"),
    [
        ("a", {"to": "w1"}, 400, "invalid_request", "to", "Request 'a' runs at w1 already."),
        ("a", {"to": ""}, 404, "not_found", "to", "No worker is called ''; there are: w1, w2, w3, w4."),
        ("a", {"to": "w9"}, 404, "not_found", "to", "No worker is called 'w9'; there are: w1, w2, w3, w4."),
        ("a", {"to": "w3"}, 409, "conflict", "to", "Worker w3 is draining; it takes no work."),
        ("a", {"to": "w4"}, 409, "conflict", "to", "Worker w4 is starting; it takes no work."),
        ("a", {"to": 5}, 400, "invalid_request", "to", "to: Expected str | null, got int."),
        ("a", {"where": "w2"}, 400, "invalid_request", "where", "where: Object contains unknown field where."),
        ("a", [], 400, "invalid_request", None, "Expected object, got array."),
        ("b", {}, 409, "conflict", "request", "Request 'b' is on its way to w2 already."),
        ("z", {}, 404, "not_found", "request", "No worker runs a request 'z'."),
        ("z" * 500, {}, 404, "not_found", "request", f"No worker runs a request '{'z' * 64}'."),
    ],
)
async def test_what_cannot_move_does_not_reach_the_scheduler(
    nats_url: str, redis_url: str, prefix: str,
    request_id: str, body: Any, status: int, code: str, param: str | None, says: str,
) -> None:  # fmt: skip
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1"), running("b", "w1", migrating_to="w2")]).start()
        await Worker(it, "w2").start()
        await Worker(it, "w3", phase=Phase.DRAINING).start()
        await Worker(it, "w4", phase=Phase.STARTING).start()
        scheduler = await Scheduler(it, [Moved()]).start()
        found, error = await refused(it, "POST", f"{REQUESTS}/{request_id}/migrate", body)
        assert (found, error["code"], error["param"], error["message"]) == (status, code, param, says)
        assert scheduler.asked == []


async def test_a_request_may_be_where_nobody_answers(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1").start()
        await (await Worker(it, "w2").start()).stop()
        status, error = await refused(it, "POST", f"{REQUESTS}/a/migrate")
        assert (status, error["code"]) == (503, "unavailable")
        assert error["message"] == "No worker that answers runs a request 'a', and these do not answer: w2."


async def test_the_newer_owner_is_the_source(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1", epoch=2)]).start()
        await Worker(it, "w2", runs=[running("a", "w2", epoch=3)]).start()
        scheduler = await Scheduler(it, [Moved(ended=(ended(),))]).start()
        assert (await post(it, f"{REQUESTS}/a/migrate", {"to": "w1"}))[0] == 200
        assert scheduler.asked[0].from_worker_id == "w2"


async def test_a_scheduler_that_is_away(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.patience.AWAY_S", 0.5)
    monkeypatch.setattr("services.gateway.moves.POLL_S", 0.1)
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1")]).start()
        status, error = await refused(it, "POST", f"{REQUESTS}/a/migrate")
        assert (status, error["code"], error["message"]) == (503, "unavailable", "The scheduler does not answer.")
        scheduler = await Scheduler(it, [Moving(phase="loading")]).start()
        async with it.post(f"{REQUESTS}/a/migrate", None, headers=LINES) as response:
            await response.content.readline()
            await scheduler.stop()
            *_, last = [json.loads(line) async for line in response.content]
        assert last["error"]["message"] == "The scheduler does not answer."


async def test_a_move_outlives_a_restart_of_the_scheduler(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.moves.POLL_S", 0.1)
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1")]).start()
        scheduler = await Scheduler(it, [Moving(phase="loading")]).start()
        async with it.post(f"{REQUESTS}/a/migrate", None, headers=LINES) as response:
            await response.content.readline()
            scheduler.answers = [
                Failure(code=Code.DRAINING, message="The scheduler is shutting down."),
                Failure(code=Code.UNAVAILABLE, message="The scheduler is starting.", retry_after_s=1.0),
            ]
            await until(lambda: len(scheduler.answers) == 1 and len(scheduler.asked) >= 4)
            await scheduler.stop()
            await asyncio.sleep(0.3)
            scheduler.answers = [Moved(ended=(ended(),))]
            await scheduler.start()
            *_, last = [json.loads(line) async for line in response.content]
        assert last["migrated"]["outcome"] == "committed"


async def test_a_migration_that_never_ends_is_left(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.moves.POLL_S", 0.05)
    async with cluster(nats_url, redis_url, prefix, request_budget_s=0.3) as it:
        await Worker(it, "w1", runs=[running("a", "w1")]).start()
        await Scheduler(it, [Moving(phase="loading")]).start()
        status, error = await refused(it, "POST", f"{REQUESTS}/a/migrate")
        assert (status, error["code"], error["message"]) == (504, "deadline_exceeded", "Request 'a' is still loading.")


# -- drain ------------------------------------------------------------------------------------------------------------


async def test_a_drain_ends_when_nothing_is_left(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        worker = await Worker(it, "w1", runs=[running("a", "w1")], replica=True, incoming=1).start()
        async with it.post("/v1/admin/workers/w1/drain", None, headers=LINES) as response:
            assert response.status == 200
            first = json.loads(await response.content.readline())
            worker.runs.clear()
            await worker.write()
            second = json.loads(await response.content.readline())
            worker.replica, worker.incoming = False, 0
            await worker.write()
            *_, last = [json.loads(line) async for line in response.content]
        assert first == {
            "draining": [{"worker_id": "w1", "phase": "draining", "requests": 1, "incoming": 1, "replicas": 1}]
        }
        assert (second["draining"][0]["requests"], second["draining"][0]["replicas"]) == (0, 1)
        assert last == {"drained": ["w1"]}
        assert worker.orders == [True]
        assert await post(it, "/v1/admin/workers/w1/drain", {"on": False}) == (200, {"undrained": ["w1"]})
        assert worker.orders == [True, False]


async def test_a_server_drains_with_all_its_workers(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        here = [await Worker(it, name).start() for name in ("w1", "w2")]
        other = await Worker(it, "w3", server_id="s2").start()
        await Store(it, "s3").start()
        assert await post(it, "/v1/admin/servers/s1/drain") == (200, {"drained": ["w1", "w2"]})
        assert [worker.orders for worker in here] == [[True], [True]]
        assert other.orders == []
        assert await post(it, "/v1/admin/servers/s3/drain") == (200, {"drained": []}), "a server without workers"


async def test_who_does_not_wait_hears_what_is_left(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1")]).start()
        status, answer = await post(it, "/v1/admin/workers/w1/drain", {"wait_s": 0})
        assert (status, answer["draining"][0]["requests"]) == (200, 1)


async def test_a_drain_that_takes_too_long_says_what_is_left(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        runs = [running("a", "w1"), running("b", "w1")]
        worker = await Worker(it, "w1", runs=runs, replica=True).start()
        await Worker(it, "w2").start()
        status, error = await refused(it, "POST", "/v1/admin/servers/s1/drain", {"wait_s": 0.2})
        assert (status, error["code"]) == (504, "deadline_exceeded")
        says = "After 0.2 s there is still something on w1 (2 requests, 1 replica); they go on draining."
        assert error["message"] == says
        assert worker.phase is Phase.DRAINING


async def test_a_worker_that_comes_back_is_told_again(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.moves.POLL_S", 0.1)
    async with cluster(nats_url, redis_url, prefix) as it:
        worker = await Worker(it, "w1", runs=[running("a", "w1")]).start()
        async with it.post("/v1/admin/workers/w1/drain", None, headers=LINES) as response:
            await response.content.readline()
            worker.phase, worker.runs = Phase.READY, []
            await worker.write()
            await until(lambda: len(worker.orders) > 1)
            *_, last = [json.loads(line) async for line in response.content]
        assert last == {"drained": ["w1"]}
        assert set(worker.orders) == {True}


async def test_a_worker_that_dies_while_it_drains_is_empty(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.moves.POLL_S", 0.1)
    async with cluster(nats_url, redis_url, prefix) as it:
        worker = await Worker(it, "w1", runs=[running("a", "w1")]).start()
        dead = await Worker(it, "w2").start()
        await dead.stop()
        drain = it.tasks.create_task(lines_of(it, "/v1/admin/servers/s1/drain"))
        await until(lambda: worker.orders)
        await asyncio.sleep(0.3)
        assert not drain.done(), "w2 may only be slow"
        await it.registry.delete(WorkerRecord, "w2")
        await asyncio.sleep(0.3)
        assert not drain.done(), "w1 runs a request"
        await worker.stop()
        await it.registry.delete(WorkerRecord, "w1")
        *lines, last = await drain
        assert [left["phase"] for left in lines[0]["draining"]] == ["draining", ""]
        assert last == {"drained": ["w1", "w2"]}


async def test_what_a_silent_worker_runs_is_in_its_records(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        worker = await Worker(it, "w1", runs=[running("a", "w1")], replica=True, phase=Phase.DRAINING).start()
        await worker.stop()
        await it.bus.serve(DRAIN, lambda _, reply: reply(Done()), worker_id="w1")
        await it.bus.flush()
        status, answer = await post(it, "/v1/admin/workers/w1/drain", {"wait_s": 0})
        left = {"worker_id": "w1", "phase": "draining", "requests": 1, "incoming": 0, "replicas": 1}
        assert (status, answer) == (200, {"draining": [left]})


async def test_a_worker_that_does_not_answer(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.patience.AWAY_S", 0.3)
    monkeypatch.setattr("services.gateway.moves.POLL_S", 0.1)
    async with cluster(nats_url, redis_url, prefix) as it:
        await (await Worker(it, "w1").start()).stop()
        stubborn = await Worker(it, "w2").start()
        stubborn.refuses = Failure(code=Code.CONFLICT, message="This worker stops.")
        for body in ({"on": True}, {"on": False}):
            status, error = await refused(it, "POST", "/v1/admin/workers/w1/drain", body)
            assert (status, error["code"], error["message"]) == (503, "unavailable", "Worker w1 does not answer.")
        status, error = await refused(it, "POST", "/v1/admin/workers/w2/drain", {"on": False})
        assert (status, error["message"]) == (409, "This worker stops.")


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "says"),
    [
        ("workers/w9", None, 404, "worker", "No worker is called 'w9'; there are: w1."),
        ("servers/s9", None, 404, "server", "No server is called 's9'; there are: s1."),
        ("workers/w1", {"on": "yes"}, 400, "on", "on: Expected bool, got str."),
        ("workers/w1", {"off": True}, 400, "off", "off: Object contains unknown field off."),
        ("workers/w1", {"wait_s": -1}, 400, "wait_s", "wait_s must be between 0 and 86400 seconds."),
        ("servers/s1", {"wait_s": 1e9}, 400, "wait_s", "wait_s must be between 0 and 86400 seconds."),
    ],
)
async def test_a_drain_that_makes_no_sense_reaches_nobody(
    nats_url: str, redis_url: str, prefix: str, path: str, body: Any, status: int, param: str, says: str
) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        worker = await Worker(it, "w1").start()
        found, error = await refused(it, "POST", f"/v1/admin/{path}/drain", body)
        assert (found, error["param"], error["message"]) == (status, param, says)
        assert worker.orders == []


async def test_the_paths_need_the_key(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix, api_keys="one") as it:
        paths = ("workers/w1/drain", "servers/s1/drain", "requests/a/migrate")
        for method, path in (("GET", REQUESTS), *(("POST", f"/v1/admin/{path}") for path in paths)):
            assert (await refused(it, method, path))[0] == 401


def test_every_answer_has_every_field() -> None:
    from services.gateway.answers import encode
    from services.gateway.moves import MigratedLine

    decoded = json.loads(encode(MigratedLine(ended())))["migrated"]
    assert msgspec.convert(decoded, MigrationEnded) == ended()
