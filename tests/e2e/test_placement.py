"""Whoever is in the way moves, or is parked, and goes on exactly; why is shown, with what it was estimated to take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.builders.cluster import Cluster
from tests.builders.streams import Ask, Stream
from tests.e2e.conftest import Models

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(300)]

A, B = "worker-1-1", "worker-2-1"
ON_A = {"zone": "a"}
TOKENS = 1100


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, nats_url: str, redis_url: str) -> Iterator[Cluster]:
    """Two servers with a worker each, that has place for one model. Nothing moves ahead of demand."""
    env = {"HEARTH_WORKER_MAX_REPLICAS": "1", "HEARTH_TENURE_S": "0.5", "HEARTH_PREFETCH_BYTES_PER_S": "0"}
    running = Cluster(
        tmp_path_factory.mktemp("two"),
        nats_url=nats_url,
        redis_url=redis_url,
        servers=2,
        dram_bytes=64 << 20,
        env=env,
    )
    for server_id, zone in (("server-1", "a"), ("server-2", "b")):
        running.services[server_id][1]["HEARTH_LABELS"] = f"zone={zone}"
    with running:
        yield running


@pytest.fixture
def pair(two: Cluster) -> Iterator[Cluster]:
    """`two`, without any deployment."""
    yield two
    for record in two.view().get("deployments", []):
        two.call("DELETE", f"/v1/admin/deployments/{record['spec']['name']}")
    two.until(lambda: not two.view().get("deployments") and not two.view().get("replicas"), "all is gone", 60)


def ask(model: str, tokens: int = 4, prompt: str = "The hearth") -> Ask:
    """A greedy call."""
    return Ask.of(model, prompt, max_tokens=tokens, temperature=0)


def replicas(cluster: Cluster, name: str = "") -> list[dict[str, Any]]:
    """The replicas of a deployment, or all."""
    return [one for one in cluster.view().get("replicas", []) if name in ("", one["deployment"])]


def workers(cluster: Cluster, name: str) -> list[str]:
    """Where a deployment is ready."""
    return sorted(one["worker_id"] for one in replicas(cluster, name) if one["state"] == "ready")


def last(cluster: Cluster, name: str) -> dict[str, Any]:
    """The last decision about a deployment."""
    status, body = cluster.get(f"/v1/admin/explain/{name}?last=1")
    assert status == 200, body
    found: dict[str, Any] = (body["decisions"] or [{}])[0]
    return found


def measured(cluster: Cluster, name: str) -> dict[str, Any]:
    """The last decision about a deployment, as soon as it is known what it took."""
    cluster.until(lambda: "actual_s" in last(cluster, name), f"it is known what loading {name} took", 20)
    return last(cluster, name)


def alone(cluster: Cluster, call: Ask, *, leaves: bool = True) -> Stream:
    """A call that nobody disturbs, after which its model leaves."""
    stream = Stream(cluster.url, call)
    assert stream.wait().fault == ""
    if leaves:
        cluster.until(lambda: not replicas(cluster), "its replica has left", 30)
    return stream


def begin(cluster: Cluster, call: Ask) -> Stream:
    """A stream with its first tokens."""
    stream = Stream(cluster.url, call)
    stream.until_events(20)
    assert stream.heard.fault == ""
    return stream


def drain(cluster: Cluster, worker: str, on: bool) -> None:
    """Nothing new goes to this worker, or it does again."""
    status, body = cluster.call("POST", f"/v1/admin/workers/{worker}/drain", {"on": on, "wait_s": 20})
    assert status == 200, body
    wanted = "draining" if on else "ready"

    def so() -> bool:
        return any(one["worker_id"] == worker and one["phase"] == wanted for one in cluster.view()["workers"])

    cluster.until(so, f"{worker} is {wanted}", 20)


def test_a_stream_moves_out_of_the_way_and_its_client_cannot_tell(pair: Cluster, models: Models) -> None:
    """A has the newcomer's checkpoint, and runs a long stream; B is free."""
    pair.deploy("runs", models("llama", context=2048, eos=False, layers=4), keep_alive_s=0.5)
    pair.deploy("wanted", models("llama", seed=2), labels=ON_A, keep_alive_s=5)
    undisturbed = alone(pair, ask("wanted"))
    call = ask("runs", TOKENS)
    twin = alone(pair, call)
    drain(pair, B, True)
    stream = begin(pair, call)
    drain(pair, B, False)
    assert workers(pair, "runs") == [A]
    newcomer = Stream(pair.url, ask("wanted"))
    assert newcomer.wait().differs(undisturbed.heard) == ""
    assert workers(pair, "wanted") == [A]
    assert stream.wait().differs(twin.heard) == ""
    assert newcomer.heard.ended_at < stream.heard.ended_at
    assert (stream.heard.hearth["migrations"], stream.heard.hearth["recoveries"]) == (1, 0)

    decision = measured(pair, "wanted")
    chosen = decision["candidates"][0]
    assert (decision["outcome"], chosen["worker_ids"], chosen["tier"]) == ("move", [A], "dram")
    assert B in chosen["room"]
    assert chosen["estimate"]["room_s"] > 0
    assert decision["actual"]["room_s"] > 0
    assert decision["actual_s"] == pytest.approx(sum(decision["actual"].values()), rel=0.05)
    refused = next(one for one in decision["candidates"] if one["worker_ids"] == [B])
    assert "zone=a" in refused["refused"]
    status, about = pair.get(f"/v1/admin/requests/{newcomer.heard.request_id}/explain")
    assert status == 200, about
    assert about["explanation"]["decisions"][0]["decision_id"] == decision["decision_id"]


def test_the_urgent_go_first_and_what_is_parked_goes_on_exactly(pair: Cluster, models: Models) -> None:
    """One place for all of them: nobody can move."""
    options: dict[str, Any] = {"labels": ON_A, "keep_alive_s": 0.5}
    pair.deploy("runs", models("llama", context=2048, eos=False, layers=4), **options)
    pair.deploy("urgent", models("llama", seed=2), priority=5, **options)
    undisturbed = alone(pair, ask("urgent"))
    call = ask("runs", TOKENS)
    twin = alone(pair, call)
    stream = begin(pair, call)
    urgent = Stream(pair.url, ask("urgent"))
    assert urgent.wait().differs(undisturbed.heard) == ""
    assert not stream.ended
    assert stream.wait().differs(twin.heard) == ""
    decision = measured(pair, "urgent")
    assert decision["outcome"] == "move"
    assert "parks" in decision["candidates"][0]["room"]


def test_labels_are_honoured_and_what_nobody_carries_is_said(pair: Cluster, models: Models) -> None:
    source = models("llama", seed=2)
    for zone in ("b", "a", "b"):
        pair.deploy("here", source, labels={"zone": zone}, keep_alive_s=0.2)
        alone(pair, ask("here"))
        assert last(pair, "here")["candidates"][0]["server_id"] == {"a": "server-1", "b": "server-2"}[zone]
    pair.deploy("nowhere", source, labels={"zone": "c"})
    stream = Stream(pair.url, ask("nowhere"))
    pair.until(lambda: last(pair, "nowhere").get("outcome") == "impossible", "it is known that it fits nowhere", 20)
    assert "zone=c" in last(pair, "nowhere")["reason"]
    pair.call("DELETE", "/v1/admin/deployments/nowhere")
    assert stream.wait().fault


@pytest.mark.by_hand
def test_replicas_follow_the_load_up_and_down(pair: Cluster, models: Models) -> None:
    source = models("llama", context=2048, eos=False, layers=4)
    pair.deploy("elastic", source, max_replicas=2, target_concurrency=1, keep_alive_s=0.5)
    calls = [ask("elastic", TOKENS, prompt=f"number {number}") for number in range(2)]
    streams = [Stream(pair.url, call) for call in calls]
    pair.until(lambda: workers(pair, "elastic") == [A, B], "both workers have it", 30)
    for stream in streams:
        assert stream.wait().fault == ""
    pair.until(lambda: not replicas(pair), "nothing is left of it", 30)
