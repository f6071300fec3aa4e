"""Explanations over HTTP, with a scheduler written by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from shared.bus import Reply
from shared.contracts.placement import CandidateView, DecisionView, Explain, Explanation, Parts
from shared.errors import Code, Failure
from shared.subjects import EXPLAIN
from tests.integration.gateway.harness import Cluster, FakeWorker, Work, answer, cluster, until

DECISION = DecisionView(
    decision_id="d1", ago_s=5.0, deployment="m", outcome="place", reason="least", replica_id="r1",
    candidates=(CandidateView(worker_ids=("w1",), server_id="s1", tier="dram", estimate=Parts(move_s=0.5)),),
    actual=Parts(move_s=0.6), actual_s=0.6,
)  # fmt: skip


class Scheduler:
    """Remembers what it was asked, and has one decision."""

    def __init__(self) -> None:
        self.asked: list[Explain] = []

    async def start(self, it: Cluster) -> Scheduler:
        await it.bus.serve(EXPLAIN, self._explain)
        await it.bus.flush()
        return self

    def _explain(self, message: Explain, reply: Reply[Explanation]) -> None:
        self.asked.append(message)
        reply(Explanation(scheduler_id="x", term=3, decisions=(DECISION,), waiting="no room", median_error=0.05))


async def get(it: Cluster, path: str) -> tuple[int, dict[str, Any]]:
    async with it.http.get(it.url + path) as response:
        return response.status, await response.json()


async def test_decisions_of_a_deployment(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy("org/m")
        scheduler = await Scheduler().start(it)
        status, body = await get(it, "/v1/admin/explain/org/m?last=3")
        assert status == 200
        assert scheduler.asked == [Explain(deployment="org/m", limit=3)]
        assert (body["term"], body["waiting"], body["median_error"], body["p95_error"]) == (3, "no room", 0.05, None)
        assert msgspec.convert(body, Explanation).decisions == (DECISION,)
        assert body["decisions"][0]["failure"] is None, "every field is there"

        status, body = await get(it, "/v1/admin/explain")
        assert (status, scheduler.asked[-1]) == (200, Explain())
        status, body = await get(it, "/v1/admin/explain/nobody")
        assert (status, body["error"]["message"]) == (404, "No deployment is called 'nobody'.")
        status, body = await get(it, "/v1/admin/explain/org/m?last=many")
        assert (status, body["error"]["param"]) == (400, "last")


async def test_a_request_while_it_waits_while_it_runs_and_after_it(nats_url: str, redis_url: str, prefix: str) -> None:
    go_on = asyncio.Event()

    async def job(worker: FakeWorker, work: Work) -> None:
        worker.frame(work, 0, "a")
        await go_on.wait()
        work.claimed = msgspec.structs.replace(work.claimed, token_ids=(0,))
        await answer(worker, work, tokens=3)

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        scheduler = await Scheduler().start(it)
        call = it.tasks.create_task(it.chat())
        await until(lambda: asyncio.sleep(0, bool(it.demands)))
        request_id = await one_request(it)
        path = f"/v1/admin/requests/{request_id}/explain"

        status, body = await get(it, path)
        assert (status, body["request"]["state"], body["request"]["places"]) == (200, "queued", [])
        assert (body["explanation"]["waiting"], scheduler.asked[-1].deployment) == ("no room", "m")

        worker = await it.worker(job)
        await until(lambda: asyncio.sleep(0, bool(worker.works)))
        status, body = await get(it, path)
        assert body["request"]["places"] == [{"replica_id": "r1", "worker_id": "w1"}]
        assert (body["request"]["ledger"], scheduler.asked[-1]) == (None, Explain(replica_id="r1", limit=1))
        assert body["explanation"]["waiting"] == ""

        go_on.set()
        await call
        status, body = await get(it, f"/v1/admin/requests/{request_id[:6]}/explain")
        assert (body["request"]["state"], body["request"]["reason"]) == ("ended", "stop")
        assert (body["request"]["ledger"]["tier"], body["request"]["ledger"]["read_s"]) == ("ssd", 0.125)
        assert [one["decision_id"] for one in body["explanation"]["decisions"]] == ["d1"]


async def one_request(it: Cluster) -> str:
    """The id of the only request that is open: no other begins with any of these."""
    found = []
    for letter in "0123456789abcdef":
        status, body = await get(it, f"/v1/admin/requests/{letter}/explain")
        if status == 200:
            found.append(body["request"]["request_id"])
    (request_id,) = found
    return str(request_id)


async def test_an_explanation_outlives_a_change_of_leader(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.patience.AGAIN_S", 0.05)
    pauses = [
        Failure(code=Code.UNAVAILABLE, message="The scheduler is starting.", retry_after_s=1.0),
        Failure(code=Code.DRAINING, message="The scheduler is shutting down."),
        Failure(code=Code.INTERNAL, message="Something is wrong."),
    ]

    def explain(message: Explain, reply: Reply[Explanation]) -> None:
        reply(pauses.pop(0) if pauses and message.deployment else Explanation(scheduler_id="s2", term=2))

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.bus.serve(EXPLAIN, explain)
        await it.bus.flush()
        status, body = await get(it, "/v1/admin/explain/m")
        assert (status, body["error"]["message"]) == (500, "Something is wrong."), "what does not pass is told at once"
        pauses += [Failure(code=Code.UNAVAILABLE, message="The scheduler is starting.", retry_after_s=1.0)] * 2
        status, body = await get(it, "/v1/admin/explain/m")
        assert (status, body["term"], pauses) == (200, 2, [])


async def test_a_gateway_tells_what_it_knows_when_the_scheduler_is_away(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.explain.TAKEOVER_S", 0.1)
    monkeypatch.setattr("services.gateway.patience.AGAIN_S", 0.05)
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker()
        _, _, headers = await it.chat()
        status, body = await get(it, f"/v1/admin/requests/{headers['x-hearth-request-id']}/explain")
        assert (status, body["explanation"], body["error"]) == (200, None, "The scheduler does not answer.")
        assert body["request"]["ledger"]["queue_s"] == 0.25
        status, body = await get(it, "/v1/admin/explain/m")
        assert (status, body["error"]["message"]) == (503, "The scheduler does not answer.")
        status, body = await get(it, "/v1/admin/requests/ffffffff/explain")
        assert status == 404
        assert body["error"]["message"].startswith("This gateway knows no request 'ffffffff'")
