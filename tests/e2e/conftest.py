"""One real cluster for all e2e tests: two servers with a worker each, real models on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.builders.cluster import Cluster
from tests.builders.models import make_model


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, nats_url: str, redis_url: str) -> Iterator[Cluster]:
    """A running cluster."""
    with Cluster(
        tmp_path_factory.mktemp("cluster"),
        nats_url=nats_url,
        redis_url=redis_url,
        servers=2,
        env={"HEARTH_ACK_WAIT_S": "3", "HEARTH_RECORD_TTL_S": "3", "HEARTH_WORKER_MAX_REPLICAS": "4"},
    ) as running:
        yield running


Models = Callable[..., Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Makes tiny models, each once: `models("llama")`, `models("opt", seed=2)`, …"""
    home = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def model(architecture: str = "llama", **options: object) -> Path:
        key = "-".join([architecture, *(f"{name}{value}" for name, value in sorted(options.items()))])
        if key not in made:
            made[key] = make_model(home / key, architecture=architecture, **options)  # type: ignore[arg-type]
        return made[key]

    return model
