"""The store as its users see it: an object store behind it, peers, images larger than the pool, damage, death."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.builders.cluster import MIB, ROOT, Cluster
from tests.builders.s3 import SECRET_KEY, Fault, S3Server
from tests.e2e.conftest import Models
from tests.e2e.test_exactness import PROMPTS, complete, generated

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

POOL_BYTES = 4 * MIB
LEASE_TTL_S = 2.0
BOTH = ("server-1", "server-2")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("models")
        yield server


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory, nats_url: str, redis_url: str, s3: S3Server) -> Iterator[Cluster]:
    """Two servers with pools of 4 MiB that are each other's peers."""
    home = tmp_path_factory.mktemp("tiers")
    (home / "remote.json").write_text(json.dumps({"s3://": s3.options}))
    settings = {
        "HEARTH_CHUNK_BYTES": str(256 * 1024),
        "HEARTH_PEER_TOKEN": "a secret of this cluster",
        "HEARTH_REMOTE_CONFIG": str(home / "remote.json"),
        "HEARTH_SOURCES": f"{home.parent}/*,s3://models/*",
        "HEARTH_LEASE_TTL_S": str(LEASE_TTL_S),
        "HEARTH_ACK_WAIT_S": "30",
        "HEARTH_RECORD_TTL_S": "30",
        "HEARTH_FILL_BYTES_PER_S": "0",  # only what a test brings is there
    }
    with Cluster(
        home, nats_url=nats_url, redis_url=redis_url, servers=2, dram_bytes=POOL_BYTES, env=settings
    ) as running:
        running.until(lambda: len(running.view()["servers"]) == 2, "both stores are there")
        yield running


def hearth(tiers: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """What `hearth store …` prints."""
    return subprocess.run(
        [sys.executable, "-m", "services", "store", *words],
        env=os.environ | {"HEARTH_URL": tiers.url, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def said(tiers: Cluster, *words: str) -> Any:
    """What `hearth store … --json` prints; it must succeed."""
    done = hearth(tiers, *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def held(tiers: Cluster, server: str) -> dict[str, Any]:
    """What a server holds, by id."""
    status, body = tiers.get(f"/v1/admin/servers/{server}/checkpoints")
    assert status == 200, body
    return {one["checkpoint"]["checkpoint_id"]: one for one in body["data"]}


def id_of(answer: Any) -> str:
    return str(answer["deployment"]["checkpoint"]["checkpoint_id"])


def stored(tiers: Cluster, server: str, checkpoint_id: str) -> Path:
    return tiers.home / server / "checkpoints" / checkpoint_id / "model.safetensors"


def spoil(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"rot")


def restart(tiers: Cluster, env: dict[str, str]) -> None:
    """End the store of server-1 in order, and start it with these settings."""
    assert tiers.stop("server-1") == 0
    tiers.services["server-1"] = ("store", env)
    tiers.start("server-1")

    def ready() -> bool:
        return any((one["server_id"], one["phase"]) == ("server-1", "ready") for one in tiers.view()["servers"])

    tiers.until(ready, "the store is back")


def put(s3: S3Server, source: Path, name: str) -> str:
    shutil.copytree(source, s3.bucket("models") / name)
    return f"s3://models/{name}"


def leave(tiers: Cluster, deployment: str) -> None:
    """Delete a deployment and wait until nobody holds its bytes."""
    tiers.call("DELETE", f"/v1/admin/deployments/{deployment}")
    tiers.until(
        lambda: all(one["deployment"] != deployment for one in tiers.view()["replicas"]), f"{deployment} is gone"
    )


def test_every_verb_does_what_it_says(tiers: Cluster, models: Models, s3: S3Server) -> None:
    source = put(s3, models("llama", seed=31), "verbs")
    refused = hearth(tiers, "import", source)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "server-1, server-2" in refused.stderr
    found = said(tiers, "import", source, "--server", "server-1")["checkpoint"]["checkpoint_id"]
    here = ("--server", "server-1")
    assert held(tiers, "server-1")[found]["ssd_bytes"] == held(tiers, "server-1")[found]["image_bytes"]
    said(tiers, "prefetch", found[:8], *here)
    said(tiers, "pin", found[:8], *here)
    refused = hearth(tiers, "evict", found[:8], *here)
    assert (refused.returncode, "unpin it first" in refused.stderr) == (1, True)
    shown = hearth(tiers, "ls", *here)
    assert shown.returncode == 0
    assert found[:12] in shown.stdout
    assert "pinned in DRAM" in shown.stdout
    said(tiers, "unpin", found[:8], *here)
    assert said(tiers, "verify", found[:8], *here)["verified"]["repaired_chunks"] == 0
    said(tiers, "export", found[:8], "s3://models/verbs-hearth", *here)
    assert (s3.bucket("models") / "verbs-hearth" / "hearth.json").exists()
    # In Hearth's form it is the same checkpoint anywhere.
    there = said(tiers, "import", "s3://models/verbs-hearth", "--server", "server-2")
    assert there["checkpoint"]["checkpoint_id"] == found
    said(tiers, "evict", found[:8], *here, "--tier", "ssd")
    assert found not in held(tiers, "server-1")
    assert found in held(tiers, "server-2")
    for words in (("import", "s3://elsewhere/x"), ("import", "/etc"), ("export", found, "s3://elsewhere/x")):
        refused = hearth(tiers, *words, "--server", "server-2")
        assert (refused.returncode, "not among the allowed sources" in refused.stderr) == (1, True), refused.stderr
    assert all(SECRET_KEY not in tiers.log(name) for name in tiers.services)
    assert SECRET_KEY not in json.dumps(tiers.view())


def test_both_servers_serve_what_one_has_taken_from_the_bucket(tiers: Cluster, models: Models, s3: S3Server) -> None:
    directory = models("llama", hidden=128, layers=4, seed=32)
    source = put(s3, directory, "shared")
    s3.fail()
    found = id_of(tiers.deploy("shared", source, min_replicas=2, max_replicas=2))

    def ready() -> bool:
        replicas = [one for one in tiers.view()["replicas"] if one["deployment"] == "shared"]
        return {one["server_id"] for one in replicas if one["state"] == "ready"} == set(BOTH)

    tiers.until(ready, "both servers serve it")
    expected = generated(directory, PROMPTS[:4], 24)
    assert [complete(tiers, "shared", prompt) for prompt in PROMPTS[:4]] == expected
    weight_bytes = (directory / "model.safetensors").stat().st_size
    imported = [json.loads(line) for server in BOTH for line in tiers.log(server).splitlines() if found in line]
    came = sorted((one["peer_bytes"], one["remote_bytes"]) for one in imported if one["event"] == "checkpoint.imported")
    assert [peer_bytes == 0 for peer_bytes, _ in came] == [True, False]
    assert came[1][0] >= weight_bytes, "the second one took it from the first"
    assert came[1][1] == 0
    assert all(held(tiers, server)[found]["leases"] == 1 for server in BOTH)
    leave(tiers, "shared")


def test_a_model_larger_than_the_pool_streams_through_it_and_answers_exactly(tiers: Cluster, models: Models) -> None:
    directory = models("llama", hidden=256, layers=8, vocab=4096)
    found = id_of(tiers.deploy("large", directory))
    assert (directory / "model.safetensors").stat().st_size > 2 * POOL_BYTES
    assert [complete(tiers, "large", prompt) for prompt in PROMPTS[:3]] == generated(directory, PROMPTS[:3], 24)
    for server in BOTH:
        mine = held(tiers, server).get(found)
        assert mine is None or (mine.get("dram_bytes", 0), mine.get("leases", 0)) == (0, 0), "its window is free again"
    leave(tiers, "large")


def test_damaged_bytes_whose_source_is_gone_come_from_the_other_server(
    tiers: Cluster, models: Models, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(models("llama", seed=33), source)
    expected = generated(source, PROMPTS[:1], 24)[0]
    found = id_of(tiers.deploy("rotten", source))
    for server in BOTH:
        said(tiers, "prefetch", "rotten", "--server", server, "--tier", "ssd")
    tiers.until(
        lambda: all(found in one["ssd"] for one in tiers.view()["servers"]), "both stores tell that they have it"
    )
    shutil.rmtree(source)
    sound = stored(tiers, "server-1", found).read_bytes()
    spoil(stored(tiers, "server-1", found))
    verified = said(tiers, "verify", "rotten", "--server", "server-1")["verified"]
    assert verified["repaired_chunks"] == 1
    assert stored(tiers, "server-1", found).read_bytes() == sound
    # Nobody has the bytes any more: it says so, and is kept out of use.
    for server in BOTH:
        spoil(stored(tiers, server, found))
    failed = [hearth(tiers, "verify", "rotten", "--server", server) for server in BOTH]
    assert [one.returncode for one in failed] == [1, 1]
    assert all(held(tiers, server)[found]["quarantined"] for server in BOTH)
    assert "quarantined" in hearth(tiers, "ls").stdout
    # The source is back.
    shutil.copytree(models("llama", seed=33), source)
    assert complete(tiers, "rotten", PROMPTS[0]) == expected
    leave(tiers, "rotten")


def test_a_damaged_copy_that_cannot_be_repaired_is_served_from_the_other_server(
    tiers: Cluster, models: Models, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(models("llama", seed=34), source)
    expected = generated(source, PROMPTS[:1], 24)[0]
    found = id_of(tiers.deploy("elsewhere", source))
    for server in BOTH:
        said(tiers, "prefetch", "elsewhere", "--server", server, "--tier", "ssd")
    # server-1 cannot ask its peer any more.
    _, env = tiers.services["server-1"]
    restart(tiers, env | {"HEARTH_PEER_TOKEN": "another secret"})
    shutil.rmtree(source)
    spoil(stored(tiers, "server-1", found))
    for server in BOTH:
        said(tiers, "evict", "elsewhere", "--server", server, "--tier", "dram")
    assert complete(tiers, "elsewhere", PROMPTS[0]) == expected
    failed = hearth(tiers, "prefetch", "elsewhere", "--server", "server-1")
    assert failed.returncode == 1
    assert held(tiers, "server-1")[found]["quarantined"]
    leave(tiers, "elsewhere")
    restart(tiers, env)


def test_a_store_may_die_while_it_brings_a_model(tiers: Cluster, models: Models, s3: S3Server) -> None:
    directory = models("llama", hidden=128, layers=4, seed=35)
    source = put(s3, directory, "slow")
    tiers.deploy("slow", source, lazy=True)
    s3.fail(Fault("slow", times=-1, least_bytes=1000, bytes_per_s=200_000))
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(complete(tiers, "slow", PROMPTS[0])))
    asking.start()

    def loading() -> str:
        return next((str(one["server_id"]) for one in tiers.view()["replicas"] if one["deployment"] == "slow"), "")

    def moving() -> bool:
        return any(entry.sent_bytes > 0 for entry in s3.served("GET", "slow/model.safetensors"))

    tiers.until(lambda: bool(loading()) and moving(), "its bytes are on their way")
    victim = loading()
    tiers.kill(victim)
    tiers.processes[victim].wait(60)
    s3.fail()
    tiers.start(victim)
    asking.join(120)
    assert answers == generated(directory, PROMPTS[:1], 24)
    leave(tiers, "slow")


def test_a_worker_that_stands_still_for_longer_than_its_lease_says_nothing_from_foreign_bytes(
    tiers: Cluster, models: Models
) -> None:
    """SIGSTOP in the middle of a stream until the store has put other models over its bytes, then SIGCONT."""
    tiers.deploy("stopped", models("llama", context=2048, eos=False, seed=36))
    body: dict[str, Any] = {"model": "stopped", "prompt": PROMPTS[0], "max_tokens": 700, "temperature": 1.0, "seed": 3}
    undisturbed = complete(tiers, "stopped", PROMPTS[0], max_tokens=700, temperature=1.0, seed=3)
    (replica,) = [one for one in tiers.view()["replicas"] if one["deployment"] == "stopped"]
    server, worker, found = replica["server_id"], replica["worker_id"], replica["checkpoint_id"]
    others = [id_of(tiers.deploy(f"filler-{n}", models("llama", hidden=128, layers=4, seed=40 + n))) for n in range(3)]
    connection = http.client.HTTPConnection("127.0.0.1", tiers.port, timeout=120)
    connection.request(
        "POST", "/v1/completions", json.dumps(body | {"stream": True}), {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    text = ""
    while len(text) < 20:
        text += text_of(answer.readline())
    tiers.kill(worker, signal.SIGSTOP)
    try:

        def evicted() -> bool:
            status, _ = tiers.call("DELETE", f"/v1/admin/servers/{server}/checkpoints/{found}?tier=dram")
            return status == 200

        tiers.until(evicted, "the lease is over")
        for one in others:
            said(tiers, "prefetch", one, "--server", server)
    finally:
        tiers.kill(worker, signal.SIGCONT)
    for line in answer:
        text += text_of(line)
    connection.close()
    assert text == undisturbed
    assert "dropped the lease" in tiers.log(worker)
    for name in ("stopped", "filler-0", "filler-1", "filler-2"):
        leave(tiers, name)


def text_of(line: bytes) -> str:
    """The text in a line of an answer."""
    if not line.startswith(b"data: {"):
        return ""
    event = json.loads(line[6:])
    assert "error" not in event, event
    return str(event["choices"][0]["text"])
