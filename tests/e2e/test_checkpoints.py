"""What may happen to checkpoints under a running cluster: other weights, damaged bytes, a store that dies."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.builders.cluster import Cluster
from tests.e2e.conftest import Models

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]


def complete(cluster: Cluster, model: str) -> str:
    body = {"model": model, "prompt": "one two", "max_tokens": 12, "temperature": 0}
    status, answer = cluster.call("POST", "/v1/completions", body)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


def test_deploying_again_after_the_weights_changed_serves_the_new_ones(
    cluster: Cluster, models: Models, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(models("llama", seed=21), source)
    first = cluster.deploy("changing", source, keep_alive_s=300)
    before = complete(cluster, "changing")
    assert cluster.deploy("changing", source, keep_alive_s=300) == first
    shutil.copy(models("llama", seed=22) / "model.safetensors", source)
    second = cluster.deploy("changing", source, keep_alive_s=300)
    assert second["deployment"]["checkpoint"]["checkpoint_id"] != first["deployment"]["checkpoint"]["checkpoint_id"]
    cluster.deploy("unchanging", models("llama", seed=22))
    after = complete(cluster, "changing")
    assert (after, after != before) == (complete(cluster, "unchanging"), True)


def test_damaged_bytes_on_the_ssd_are_made_anew_before_anybody_sees_them(cluster: Cluster, models: Models) -> None:
    record = cluster.deploy("damaged", models("llama", seed=23))["deployment"]
    (weights,) = cluster.home.glob(f"server-*/checkpoints/{record['checkpoint']['checkpoint_id']}/model.safetensors")
    sound = weights.read_bytes()
    with weights.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"rot")
    assert complete(cluster, "damaged")
    assert weights.read_bytes() == sound
    stores = [cluster.log(name) for name in cluster.services if name.startswith("server-")]
    assert any('"repaired_chunks": 1' in log for log in stores)


def test_a_store_may_die_while_a_stream_runs(cluster: Cluster, models: Models) -> None:
    cluster.deploy("held", models("llama", context=2048, eos=False))
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=120)
    body: dict[str, Any] = {"model": "held", "prompt": "one", "max_tokens": 1500, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    while b"data: " not in answer.readline():
        pass
    (replica,) = [one for one in cluster.view()["replicas"] if one["deployment"] == "held"]
    server = replica["server_id"]
    cluster.kill(server, signal.SIGKILL)
    cluster.processes[server].wait(60)
    cluster.start(server)
    raw = answer.read().decode()
    connection.close()
    assert raw.rstrip().endswith("data: [DONE]"), raw[-500:]
    usage = [json.loads(line[6:]).get("usage") for line in raw.splitlines() if line.startswith("data: {")]
    assert [one["completion_tokens"] for one in usage if one] == [1500]
    cluster.until(lambda: len(cluster.view()["servers"]) == 2, "the store is back")
    assert complete(cluster, "held")
    # Its pool and its leases are what they were, so the replica is, too.
    replicas = [one["replica_id"] for one in cluster.view()["replicas"] if one["deployment"] == "held"]
    assert replicas == [replica["replica_id"]]
