"""Cold starts, keep-alive, eviction, clients that leave, restarts: what a person lives through."""

from __future__ import annotations

import http.client
import json
import signal
from typing import Any

import pytest

from tests.builders.cluster import Cluster
from tests.e2e.conftest import Models

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]


def open_stream(
    cluster: Cluster, body: dict[str, Any], path: str = "/v1/completions"
) -> tuple[http.client.HTTPConnection, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=120)
    headers = {"Content-Type": "application/json", "x-hearth-ledger": "1"}
    connection.request("POST", path, json.dumps(body | {"stream": True}), headers)
    return connection, connection.getresponse()


def replicas_of(cluster: Cluster, deployment: str) -> list[Any]:
    return [replica for replica in cluster.view()["replicas"] if replica["deployment"] == deployment]


def test_a_cold_stream_opens_at_once_and_ends_with_its_ledger(cluster: Cluster, models: Models) -> None:
    cluster.deploy("cold", models("llama", hidden=256, layers=8, vocab=4096), keep_alive_s=300)
    connection, answer = open_stream(cluster, {"model": "cold", "prompt": "one two", "max_tokens": 8, "temperature": 0})
    assert answer.status == 200
    assert answer.getheader("Content-Type").startswith("text/event-stream")
    raw = answer.read().decode()
    connection.close()
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    assert raw.rstrip().endswith("data: [DONE]")
    ledger = next(event["hearth"] for event in events if event.get("hearth"))
    assert ledger["cold"] is True
    # "remote" if the server that imported it was full of other tests' models: the other one imports it as well.
    assert ledger["tier"] in ("ssd", "dram", "remote")
    assert (ledger["import_s"] > 0) == (ledger["tier"] == "remote")
    assert ledger["attach_s"] > 0
    # What follows is warm.
    status, body = cluster.call(
        "POST", "/v1/completions", {"model": "cold", "prompt": "x", "max_tokens": 2, "hearth": {"ledger": True}}
    )
    assert status == 200, body
    assert body["hearth"]["cold"] is False


def test_what_lies_on_an_ssd_comes_into_free_dram_before_anybody_asks_for_it(cluster: Cluster, models: Models) -> None:
    answer = cluster.deploy("unasked", models("llama", seed=41))
    checkpoint_id = answer["deployment"]["checkpoint"]["checkpoint_id"]
    order = {"tier": "ssd", "source": answer["deployment"]["spec"]["source"]}
    for server in ("server-1", "server-2"):
        path = f"/v1/admin/servers/{server}/checkpoints/{checkpoint_id}/prefetch"
        status, body = cluster.call("POST", path, order)
        assert status == 200, body

    def holders() -> int:
        return sum(checkpoint_id in server["dram"] for server in cluster.view()["servers"])

    cluster.until(lambda: holders() == 2, "both servers have it in DRAM")
    assert not replicas_of(cluster, "unasked")


def test_an_idle_replica_leaves_after_its_keep_alive_and_comes_back(cluster: Cluster, models: Models) -> None:
    cluster.deploy("brief", models("llama"), keep_alive_s=0.5)
    body = {"model": "brief", "prompt": "one", "max_tokens": 4, "temperature": 0}
    status, first = cluster.call("POST", "/v1/completions", body)
    assert status == 200, first
    cluster.until(lambda: not replicas_of(cluster, "brief"), "the replica left")
    status, again = cluster.call("POST", "/v1/completions", body | {"hearth": {"ledger": True}})
    assert status == 200, again
    assert again["choices"] == first["choices"]
    assert again["hearth"]["tier"] == "dram"


def test_more_models_than_room_take_turns(cluster: Cluster, models: Models) -> None:
    """Four replicas per worker, two workers, ten models with a long keep-alive: the idle are evicted."""
    for number in range(10):
        cluster.deploy(f"crowd-{number}", models("llama", seed=number), keep_alive_s=300)
    for _ in range(2):
        for number in range(10):
            status, body = cluster.call(
                "POST", "/v1/completions", {"model": f"crowd-{number}", "prompt": "a", "max_tokens": 3}
            )
            assert status == 200, body
    assert len(cluster.view()["replicas"]) <= 8
    for number in range(10):
        assert cluster.call("DELETE", f"/v1/admin/deployments/crowd-{number}")[0] in (200, 204)


def test_a_client_that_leaves_frees_everything(cluster: Cluster, models: Models) -> None:
    cluster.deploy("left", models("llama", context=2048, eos=False))
    for _ in range(4):
        connection, answer = open_stream(cluster, {"model": "left", "prompt": "one", "max_tokens": 1900})
        while b"data: " not in answer.readline():
            pass
        connection.close()
        answer.close()
    cluster.until(cluster.idle, "nothing runs for clients that left")


def test_a_client_that_leaves_during_the_cold_start_takes_its_request_along(cluster: Cluster, models: Models) -> None:
    cluster.deploy("early", models("llama", hidden=256, layers=8, vocab=4096, seed=3), keep_alive_s=1)
    connection, answer = open_stream(cluster, {"model": "early", "prompt": "one", "max_tokens": 500})
    connection.close()
    answer.close()
    cluster.until(cluster.idle, "the queue is empty again")


def test_a_deleted_deployment_is_unknown_and_its_replicas_leave(cluster: Cluster, models: Models) -> None:
    cluster.deploy("gone", models("llama"), keep_alive_s=300)
    assert cluster.call("POST", "/v1/completions", {"model": "gone", "prompt": "a", "max_tokens": 1})[0] == 200
    assert cluster.call("DELETE", "/v1/admin/deployments/gone")[0] in (200, 204)
    cluster.until(lambda: not replicas_of(cluster, "gone"), "its replicas left")
    status, body = cluster.call("POST", "/v1/completions", {"model": "gone", "prompt": "a"})
    assert status == 404
    assert body["error"]["code"] == "model_not_found"


def test_the_scheduler_may_die_while_streams_run(cluster: Cluster, models: Models) -> None:
    cluster.deploy("steady", models("llama", context=2048, eos=False))
    connection, answer = open_stream(cluster, {"model": "steady", "prompt": "one", "max_tokens": 400})
    while b"data: " not in answer.readline():
        pass
    cluster.kill("scheduler", signal.SIGKILL)
    assert answer.read().decode().rstrip().endswith("data: [DONE]")
    connection.close()
    cluster.processes["scheduler"].wait(60)
    cluster.start("scheduler")
    cluster.until(lambda: len(cluster.view()["schedulers"]) == 1, "the scheduler is back")
    status, body = cluster.call("POST", "/v1/completions", {"model": "steady", "prompt": "one", "max_tokens": 2})
    assert status == 200, body
