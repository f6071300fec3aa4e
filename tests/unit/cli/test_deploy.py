"""From options and files to a deployment."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.deploy import UsageError, parameters, spec_of
from shared.contracts.records import DeploymentSpec
from shared.contracts.residency import Source

HERE = Path("/here")
FOLDER = Path("/folder")


def test_options_alone() -> None:
    options = {
        "name": "m", "source": "models/m", "dtype": "bfloat16", "revision": None, "min_replicas": 1, "max_replicas": 3,
        "target_concurrency": 4, "keep_alive": 5.0, "max_context": 128, "queue_limit": 9, "lazy": True,
    }  # fmt: skip
    assert spec_of(options, None, HERE, HERE) == DeploymentSpec(
        name="m", source=Source(url="/here/models/m", dtype="bfloat16"), min_replicas=1, max_replicas=3,
        target_concurrency=4, keep_alive_s=5.0, max_context_tokens=128, queue_limit=9, lazy=True,
    )  # fmt: skip


def test_options_that_were_not_given_leave_the_defaults() -> None:
    spec = spec_of({"name": "m", "source": "hf:org/name", "lazy": None, "keep_alive": None}, None, HERE, HERE)
    assert spec == DeploymentSpec(name="m", source=Source(url="hf:org/name"))


def test_a_file_with_directories_relative_to_it() -> None:
    document = {"name": "m", "source": "model", "keep_alive_s": 3}
    assert spec_of({}, document, FOLDER, HERE) == DeploymentSpec(
        name="m", source=Source(url="/folder/model"), keep_alive_s=3.0
    )


def test_a_file_with_the_words_of_the_options() -> None:
    document = {
        "name": "m", "source": "hf:org/name", "revision": "main", "dtype": "bfloat16", "keep_alive": 5,
        "max_context": 128, "min_replicas": 0,
    }  # fmt: skip
    assert spec_of({}, document, FOLDER, HERE) == DeploymentSpec(
        name="m", source=Source(url="hf:org/name", revision="main", dtype="bfloat16"), keep_alive_s=5.0,
        max_context_tokens=128,
    )  # fmt: skip


def test_options_go_over_the_file() -> None:
    document = {"name": "m", "source": {"url": "model", "dtype": "float16"}, "max_replicas": 2}
    spec = spec_of({"name": "other", "source": "model", "max_replicas": 5}, document, FOLDER, HERE)
    assert spec == DeploymentSpec(name="other", source=Source(url="/here/model", dtype="float16"), max_replicas=5)


def test_where_and_how_it_runs() -> None:
    options = {
        "name": "m", "source": "/m", "priority": -3, "devices": 2, "adaptive_keep_alive": True,
        "labels": [("gpu", "a40"), ("zone", "b")],
    }  # fmt: skip
    assert spec_of(options, None, HERE, HERE) == DeploymentSpec(
        name="m", source=Source(url="/m"), priority=-3, devices=2, adaptive_keep_alive=True,
        labels={"gpu": "a40", "zone": "b"},
    )  # fmt: skip
    document = {"name": "m", "source": "/m", "labels": {"gpu": "h100", "rack": "1"}, "priority": 4}
    spec = spec_of({"labels": [("gpu", "a40")]}, document, FOLDER, HERE)
    assert (spec.labels, spec.priority) == ({"gpu": "a40", "rack": "1"}, 4), "labels are added to those of the file"


def test_home_and_absolute_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of-me")
    assert spec_of({"name": "m", "source": "~/m"}, None, HERE, HERE).source.url == "/home-of-me/m"
    assert spec_of({"name": "m", "source": "/m"}, None, HERE, HERE).source.url == "/m"


def test_urls_are_left_as_they_are() -> None:
    for url in ("s3://bucket/m", "https://host/m", "file:///m"):
        assert spec_of({"name": "m", "source": url}, None, HERE, HERE).source.url == url


@pytest.mark.parametrize(
    ("options", "document", "says"),
    [
        ({}, None, "Which name"),
        ({"name": "m"}, None, "--source"),
        ({}, ["m"], "mapping"),
        ({}, {"name": "m", "source": "x", "keepalive": 3}, "keepalive: no such field"),
        ({}, {"name": "m", "source": {"url": "x", "branch": "y"}}, "source.branch: no such field"),
        ({}, {"name": "m", "source": 3}, "`source` is"),
        ({}, {"name": "m", "source": {"url": 3}}, "source.url"),
        ({}, {"name": "m", "source": "x", "max_replicas": "many"}, "max_replicas"),
        ({}, {"name": 7, "source": "x"}, "name"),
        ({}, {"name": "m", "source": "x", "labels": {"rack": 1}}, "labels"),
        ({}, {"name": "m", "source": "x", "labels": ["a=b"]}, "labels"),
        ({}, {"name": "m", "source": "x", "label": {"a": "b"}}, "label: no such field"),
    ],
)
def test_what_is_no_deployment_is_told(options: dict[str, object], document: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        spec_of(options, document, FOLDER, HERE)


def test_numbers_of_parameters() -> None:
    assert [parameters(count) for count in (17, 4_200_000, 1_100_000_000)] == ["17", "4.2 M", "1.1 B"]
