"""Bad input: a clear error in the right form, and nothing half-registered left behind."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.builders.cluster import Cluster
from tests.e2e.conftest import Models

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]


def refused(cluster: Cluster, name: str, source: str | Path, **spec: Any) -> tuple[int, dict[str, Any]]:
    """Deploy something that must be refused; status and error."""
    before = {d["spec"]["name"] for d in cluster.view()["deployments"]}
    status, body = cluster.call("POST", "/v1/admin/deployments", {"name": name, "source": {"url": str(source)}, **spec})
    assert status >= 400, body
    assert body["error"]["message"]
    assert {d["spec"]["name"] for d in cluster.view()["deployments"]} == before
    return status, body["error"]


def test_a_directory_that_is_none(cluster: Cluster, tmp_path: Path) -> None:
    assert refused(cluster, "bad", tmp_path / "nothing")[0] in (400, 422)
    assert refused(cluster, "bad", "relative/path")[0] in (400, 422)


def test_a_directory_without_config(cluster: Cluster, tmp_path: Path) -> None:
    assert "config.json" in refused(cluster, "bad", tmp_path)[1]["message"]


def test_a_pickle_checkpoint(cluster: Cluster, models: Models, tmp_path: Path) -> None:
    shutil.copytree(models("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    assert "pickle" in refused(cluster, "bad", tmp_path / "m")[1]["message"]


def test_a_truncated_safetensors_file(cluster: Cluster, models: Models, tmp_path: Path) -> None:
    shutil.copytree(models("llama"), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused(cluster, "bad", tmp_path / "m")[1]["message"]


def test_malformed_config(cluster: Cluster, models: Models, tmp_path: Path) -> None:
    shutil.copytree(models("llama"), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{ not json")
    assert "config.json" in refused(cluster, "bad", tmp_path / "m")[1]["message"]


def test_a_model_larger_than_the_ssd_tier(cluster: Cluster, models: Models, tmp_path: Path) -> None:
    """The header promises more than the disk holds; the file is sparse, so nothing of that size is written."""
    shutil.copytree(models("llama"), tmp_path / "m")
    rows = 2**42 // 256
    header = json.dumps({"huge": {"dtype": "F32", "shape": [rows, 64], "data_offsets": [0, rows * 256]}}).encode()
    with (tmp_path / "m" / "model.safetensors").open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + rows * 256)
    status, error = refused(cluster, "bad", tmp_path / "m")
    assert status == 413
    assert "4 TiB" in error["message"]


@pytest.mark.parametrize("name", ["../etc", "a/../b", "/a", "a//b", "", "a b", "ä"])
def test_names_that_are_none(cluster: Cluster, models: Models, name: str) -> None:
    assert refused(cluster, name, models("llama"))[0] == 400


def test_a_name_with_a_slash_is_fine(cluster: Cluster, models: Models) -> None:
    cluster.deploy("org/model:7b", models("llama"))
    assert cluster.call("POST", "/v1/completions", {"model": "org/model:7b", "prompt": "a", "max_tokens": 1})[0] == 200
    assert cluster.call("DELETE", "/v1/admin/deployments/org/model:7b")[0] in (200, 204)


@pytest.mark.parametrize(
    "spec",
    [{"max_replicas": 0}, {"min_replicas": 5, "max_replicas": 1}, {"target_concurrency": 0}, {"keep_alive_s": -1}],
)
def test_numbers_that_make_no_sense(cluster: Cluster, models: Models, spec: dict[str, Any]) -> None:
    assert refused(cluster, "bad", models("llama"), **spec)[0] == 400


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b'{"model": "m"}', 400, None),
        (b'{"model": 5, "prompt": "x"}', 400, None),
        (b'{"model": "nobody", "prompt": "x"}', 404, None),
        (b'{"model": "input", "prompt": "x", "temperature": "hot"}', 400, "temperature"),
        (b'{"model": "input", "prompt": "x", "temperature": 99}', 400, "temperature"),
        (b'{"model": "input", "prompt": "x", "max_tokens": -1}', 400, "max_tokens"),
        (b'{"model": "input", "prompt": "x", "n": 1000}', 400, "n"),
        (b'{"model": "input", "prompt": "x", "suffix": "y"}', 400, "suffix"),
        (b'{"model": "input", "prompt": "x", "nonsense": 1}', 400, "nonsense"),
        (b'{"model": "input", "prompt": [999999999]}', 400, None),
    ],
)
def test_requests_that_are_none(cluster: Cluster, models: Models, body: bytes, status: int, param: str | None) -> None:
    if not any(d["spec"]["name"] == "input" for d in cluster.view()["deployments"]):
        cluster.deploy("input", models("llama"))
    request = urllib.request.Request(cluster.url + "/v1/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(request, timeout=60):
        pass
    with caught.value as answer:
        error = json.loads(answer.read())["error"]
    assert caught.value.code == status, error
    assert error["message"]
    if param:
        assert error["param"] == param
