"""The operator's paths, with a scheduler written by hand."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import pytest

from shared.bus import Reply
from shared.contracts.events import RecordChanged
from shared.contracts.placement import Delete, Deploy, Deployed, Deploying
from shared.contracts.records import ClusterView, DeploymentRecord, DeploymentSpec, DeploymentState
from shared.contracts.residency import Done, Progress, Source
from shared.errors import Code, Failure
from shared.slug import slug
from shared.subjects import DELETE, DEPLOY, RECORD_CHANGED
from tests.integration.gateway.harness import CHECKPOINT, Cluster, cluster

SPEC = {"name": "org/m", "source": {"url": "/models/m"}}
Answer = Deploying | Deployed | Failure


def deployed(name: str = "org/m") -> Deployed:
    return Deployed(
        record=DeploymentRecord(
            spec=DeploymentSpec(name=name, source=Source(url="/models/m")),
            slug=slug(name),
            revision="1",
            state=DeploymentState.READY,
            created_at_s=1.0,
            checkpoint=CHECKPOINT,
        )
    )


HALF = Deploying(progress=Progress(phase="importing", done_bytes=50, total_bytes=100))


class Scheduler:
    """Gives the answers that the test wrote down, one after another."""

    def __init__(self, it: Cluster, answers: list[Answer]) -> None:
        self._it = it
        self._answers = answers
        self.specs: list[DeploymentSpec] = []
        self.deleted: list[str] = []

    async def start(self) -> Scheduler:
        await self._it.bus.serve(DEPLOY, self._deploy)
        await self._it.bus.serve(DELETE, self._delete)
        await self._it.bus.flush()
        return self

    def _deploy(self, message: Deploy, reply: Reply[Deploying | Deployed]) -> None:
        self.specs.append(message.spec)
        answer = self._answers.pop(0)
        if isinstance(answer, Deployed):
            self._it.tasks.create_task(self._put(answer, reply))
        else:
            reply(answer)

    async def _put(self, answer: Deployed, reply: Reply[Deploying | Deployed]) -> None:
        await self._it.registry.put(answer.record, ttl_s=None)
        reply(answer)

    def _delete(self, message: Delete, reply: Reply[Done]) -> None:
        if message.deployment == "org/m":
            self.deleted.append(message.deployment)
            self._it.tasks.create_task(self._remove(message.deployment, reply))
        else:
            reply(Failure(code=Code.UNKNOWN_MODEL, message=f"No deployment is called {message.deployment!r}."))

    async def _remove(self, name: str, reply: Reply[Done]) -> None:
        await self._it.registry.delete(DeploymentRecord, name)
        reply(Done())


async def test_deploy_list_get_delete(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        scheduler = await Scheduler(it, [HALF, deployed()]).start()
        body = {**SPEC, "min_replicas": 1, "keep_alive_s": 5, "source": {"url": "hf:org/m", "dtype": "bfloat16"}}
        async with it.post("/v1/admin/deployments", body) as response:
            assert response.status == 200, await response.text()
            assert (await response.json())["deployment"]["spec"]["name"] == "org/m"
        assert scheduler.specs[1].source == Source(url="hf:org/m", dtype="bfloat16")
        assert scheduler.specs[1].min_replicas == 1
        async with it.http.get(it.url + "/v1/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["org/m"]
        async with it.http.get(it.url + "/v1/admin/deployments") as response:
            (listed,) = (await response.json())["data"]
            assert listed["checkpoint"]["checkpoint_id"] == "c1"
        for path in ("org/m", "org%2Fm"):
            async with it.http.get(f"{it.url}/v1/admin/deployments/{path}") as response:
                assert (await response.json())["deployment"]["spec"]["name"] == "org/m"
        async with it.http.get(it.url + "/v1/admin/cluster") as response:
            view = await response.json()
        assert [record["gateway_id"] for record in view["gateways"]] == ["g1"]
        assert view["queue_depths"] == {"org/m": 0}
        assert view["workers"] == [], "every field is there"
        assert view["deployments"][0]["spec"]["min_replicas"] == 0
        assert msgspec.convert(view, ClusterView).gateways[0].gateway_id == "g1"
        async with it.http.delete(it.url + "/v1/admin/deployments/org%2Fm") as response:
            assert (response.status, await response.json()) == (200, {"deleted": "org/m"})
        assert scheduler.deleted == ["org/m"]
        async with it.http.get(it.url + "/v1/admin/deployments/org/m") as response:
            assert response.status == 404
        async with it.http.delete(it.url + "/v1/admin/deployments/nobody") as response:
            assert response.status == 404


async def test_a_deletion_outlives_a_leader(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.admin.DELETE", dataclasses.replace(DELETE, timeout_s=0.3))
    monkeypatch.setattr("services.gateway.patience.AGAIN_S", 0.05)
    lost = Failure(code=Code.UNAVAILABLE, message="The scheduler has lost the registry (Redis).")
    unknown = Failure(code=Code.UNKNOWN_MODEL, message="There is no deployment.")
    asked: list[str] = []

    def delete(message: Delete, reply: Reply[Done]) -> None:
        asked.append(message.deployment)
        answers = {"paused": [lost, Done()], "stopped": [None, unknown], "unknown": [lost, unknown]}
        answer = answers[message.deployment][asked.count(message.deployment) - 1]
        if answer is not None:  # or it was carried out, and whoever did it has died
            reply(answer)

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.bus.serve(DELETE, delete)
        await it.bus.flush()
        found = {}
        for name in ("paused", "stopped", "unknown"):
            async with it.http.delete(f"{it.url}/v1/admin/deployments/{name}") as response:
                found[name] = response.status
        assert found == {"paused": 200, "stopped": 200, "unknown": 404}
        assert len(asked) == 6


async def test_many_looks_at_once_while_deployments_come_and_go(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:

        async def listed() -> int:
            async with it.http.get(it.url + "/v1/admin/deployments") as response:
                return response.status

        for number in range(5):
            await it.deploy(f"m{number}")
            looks = [it.tasks.create_task(listed()) for _ in range(10)]
            await it.registry.delete(DeploymentRecord, f"m{number}")
            message = RecordChanged(kind="deployment", id=f"m{number}", deleted=True)
            it.bus.publish(RECORD_CHANGED, message, kind="deployment")
            looks += [it.tasks.create_task(listed()) for _ in range(10)]
            assert [await look for look in looks] == [200] * 20
        assert not it.gateway.done()


async def test_progress_by_lines(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        broken = Failure(code=Code.INVALID_CHECKPOINT, message="The file is cut off.")
        await Scheduler(it, [HALF, HALF, deployed(), HALF, broken, broken]).start()
        headers = {"Accept": "application/x-ndjson"}
        async with it.post("/v1/admin/deployments", SPEC, headers=headers) as response:
            found = [json.loads(line) async for line in response.content]
        assert found[0]["progress"]["phase"] == "importing"
        assert found[0]["progress"]["done_bytes"] == 50
        assert [next(iter(line)) for line in found] == ["progress", "progress", "deployment"]
        async with it.post("/v1/admin/deployments", SPEC, headers=headers) as response:
            found = [json.loads(line) async for line in response.content]
        assert found[-1]["error"]["message"] == "The file is cut off."
        async with it.post("/v1/admin/deployments", SPEC, headers=headers) as response:
            assert response.status == 422, "a refusal at once has its own status"
            assert (await response.json())["error"]["code"] == "invalid_checkpoint"


async def test_no_scheduler(nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.patience.AWAY_S", 0.5)
    async with cluster(nats_url, redis_url, prefix) as it:
        async with it.post("/v1/admin/deployments", SPEC) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "unavailable"
        async with it.http.delete(it.url + "/v1/admin/deployments/m") as response:
            assert response.status == 503


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"name": "../m"}, "name"),
        ({"name": "a//b"}, "name"),
        ({"name": "/a"}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": ""}, "name"),
        ({"name": 5}, "name"),
        ({"source": {"url": ""}}, "source.url"),
        ({"source": {"url": "relative/path"}}, "source.url"),
        ({"source": {"url": "/x", "dtype": "int4"}}, "source.dtype"),
        ({"source": {"url": "/x", "format": "gguf"}}, "source.format"),
        ({"source": {}}, "source.url"),
        ({"source": None}, "source"),
        ({"min_replicas": -1}, "min_replicas"),
        ({"min_replicas": 2, "max_replicas": 1}, "min_replicas"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"target_concurrency": 0}, "target_concurrency"),
        ({"queue_limit": 0}, "queue_limit"),
        ({"keep_alive_s": -1}, "keep_alive_s"),
        ({"max_context_tokens": 1}, "max_context_tokens"),
        ({"keepalive_s": 5}, "keepalive_s"),
    ],
)
async def test_a_spec_that_makes_no_sense_does_not_reach_the_scheduler(
    nats_url: str, redis_url: str, prefix: str, change: dict[str, Any], param: str
) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        scheduler = await Scheduler(it, []).start()
        async with it.post("/v1/admin/deployments", {**SPEC, **change}) as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] == param
        assert scheduler.specs == []
