"""Starts what a benchmark measures: real servers and a whole cluster on loopback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.builders.cluster import Cluster
from tests.builders.servers import start_nats, start_redis


@contextlib.contextmanager
def cluster(home: Path, **options: Any) -> Iterator[Cluster]:
    """A running cluster with servers of its own; `options` are those of `Cluster`."""
    for name in ("nats", "redis"):
        (home / name).mkdir(parents=True, exist_ok=True)
    nats, nats_url = start_nats(home / "nats")
    redis, redis_url = start_redis(home / "redis")
    try:
        with Cluster(home / "cluster", nats_url=nats_url, redis_url=redis_url, **options) as running:
            yield running
    finally:
        for process in (nats, redis):
            process.terminate()
            process.wait(10)
