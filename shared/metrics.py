"""Prometheus metrics: the buckets in one place, and the endpoint of services that have no HTTP of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prometheus_client import REGISTRY, Gauge, generate_latest, start_http_server
from prometheus_client.exposition import CONTENT_TYPE_LATEST

# Seconds. From a warm token (ms) to the import of a large checkpoint (minutes).
LATENCY_BUCKETS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

# What a health check looks at on services without HTTP of their own.
READY: Final = Gauge("hearth_ready", "1 while this service takes work, 0 while it starts or drains")


def text() -> bytes:
    """All metrics of this process in Prometheus' text format."""
    return generate_latest(REGISTRY)


def serve(port: int, host: str) -> Callable[[], None]:
    """Answer /metrics on a thread of its own; returns what stops it. Raises OSError if the port is taken."""
    server, thread = start_http_server(port, addr=host)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)

    return stop
