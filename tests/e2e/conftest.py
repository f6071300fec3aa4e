"""Real clusters for all e2e tests, real models on the CPU: one to use, and a larger one to hurt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.builders.cluster import Cluster
from tests.builders.fleet import Fleet
from tests.builders.models import make_model
from tests.builders.remains import until_nothing_remains
from tests.builders.streams import Twins


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def hurt(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Iterator[Fleet]:
    """Two servers with two workers each, two gateways, two schedulers; "long" has a replica on every worker."""
    env = {"HEARTH_MAX_DELIVERIES": "3"}
    with Fleet(tmp_path_factory.mktemp("fleet"), servers=2, workers=2, gateways=2, schedulers=2, env=env) as running:
        spec = {"min_replicas": 4, "max_replicas": 4, "keep_alive_s": 600}
        running.deploy("long", models("llama", context=2048, eos=False), **spec)
        yield running


@pytest.fixture
def fleet(hurt: Fleet) -> Iterator[Fleet]:
    """`hurt`, whole and idle before the test, and again after it: what a test breaks it leaves to be found here."""
    hurt.mend()
    yield hurt
    hurt.mend()
    until_nothing_remains(hurt)


@pytest.fixture(scope="package")
def twins(hurt: Fleet) -> Twins:
    """What each call to `hurt` says when nobody disturbs it."""
    return Twins(hurt.url)
