"""What must not be left when everything has ended: requests, slots, KV blocks, leases, migrations, queue messages."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from typing import Any

from shared.bus import Bus
from tests.builders.cluster import Cluster
from tests.builders.fleet import Fleet


def metrics_of(fleet: Fleet, worker: str) -> dict[str, float]:
    """The metrics of a worker: name with labels → value."""
    own = fleet.services[worker][1]
    url = f"http://{own['HEARTH_METRICS_HOST']}:{own['HEARTH_METRICS_PORT']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:\{[^}]*\})?) ([-+0-9.e]+)$", text, re.M)}


def queued(cluster: Cluster) -> dict[str, int]:
    """The messages that lie in the work queue, by subject: waiting or not acknowledged."""

    async def look() -> dict[str, int]:
        async with Bus.connect(cluster.nats_url, name="test", prefix=cluster.prefix) as bus:
            state = (await bus.client.jetstream().stream_info(bus.stream, subjects_filter=">")).state
            return dict(state.subjects or {})

    return asyncio.run(look())


def remains(fleet: Fleet) -> list[str]:
    """Everything that is left, one sentence each."""
    view: dict[str, Any] = fleet.view()
    found = []
    for replica in view.get("replicas", []):
        if replica.get("running"):
            found.append(f"{replica['replica_id']} on {replica['worker_id']} runs {replica['running']}")
        if replica["state"] != "ready":
            found.append(f"{replica['replica_id']} on {replica['worker_id']} is {replica['state']}")
    for worker in view.get("workers", []):
        if worker.get("migrations"):
            found.append(f"{worker['worker_id']} has {len(worker['migrations'])} migrations in flight")
        if worker.get("incoming"):
            found.append(f"{worker['worker_id']} has {worker['incoming']} migrations coming in")
    for gateway in view.get("gateways", []):
        if gateway.get("open_requests"):
            found.append(f"{gateway['gateway_id']} has {gateway['open_requests']} open requests")
    for name, depth in (view.get("queue_depths") or {}).items():
        if depth:
            found.append(f"the queue of {name} holds {depth}")
    for subject, count in queued(fleet).items():
        if count:
            found.append(f"{subject} holds {count} messages")
    found += [f"{one['request_id']} runs on {one['worker_id']}" for one in fleet.requests()]
    used = {(replica["server_id"], replica["checkpoint_id"]) for replica in view.get("replicas", [])}
    for server in view.get("servers", []):
        if server["leased_bytes"] and not any(owner == server["server_id"] for owner, _ in used):
            found.append(f"{server['server_id']} has {server['leased_bytes']} leased bytes and no replica")
    for worker in fleet.named("worker"):
        if fleet.running(worker):
            found += [
                f"{worker}: {name} is {value:.0f}"
                for name, value in metrics_of(fleet, worker).items()
                if name.startswith(("hearth_worker_kv_used", "hearth_worker_requests_running")) and value
            ]
    return found


def until_nothing_remains(fleet: Fleet, timeout_s: float = 120.0) -> None:
    """Wait for it. Raises AssertionError that names what is left."""
    left: list[str] = []

    def clean() -> bool:
        left[:] = remains(fleet)
        return not left

    try:
        fleet.until(clean, "nothing is left", timeout_s)
    except AssertionError as error:
        raise AssertionError(f"{error}: " + "; ".join(left)) from None
