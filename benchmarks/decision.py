"""How long a decision about placement takes: production `decide` over a picture of a large cluster.

    python -m benchmarks.decision [--decisions 300] [--brief] [--json] [--seed 1]

The cluster: SERVERS × DEVICES devices of 80 GB, DEPLOYMENTS deployments of 6 to 60 GB; each checkpoint is on the SSD of
three servers and in the DRAM of one. Three states of it: `cold`, where 30 % of the devices are free; `evict`, where all
are taken and half of the replicas idle; `saturated`, where everything runs a request. Before every decision the records
of some workers and servers change, as they do in a second of a busy cluster; writing them into the columns is part of
the time. What is timed is `decide` alone, with the production estimator, for deployments drawn at random: the seconds
of the processor, as a decision waits for nothing, and for comparison those of the clock, which on a machine that does
other things at the same time are more. A second table has the same for the whole of `Core.handle` of a hint of demand
(`benchmarks.handling`).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.report import percentile, show, write
from services.scheduler.choice import decide
from services.scheduler.columns import Columns
from services.scheduler.commands import Need
from services.scheduler.estimate import Estimator
from services.scheduler.terms import Ask, Tenant
from shared.contracts.records import Phase, ServerRecord, WorkerRecord

GB: Final = 10**9
WEIGHTS_GB: Final = (6, 13, 16, 26, 28, 47, 60)
SHAPES: Final = ((4, 4, 56), (1000, 8, 10_000))  # servers, devices of each, deployments
STATES: Final = {"cold": (0.3, 0.35), "evict": (0.0, 0.5), "saturated": (0.0, 0.0)}  # free devices, idle replicas
CHANGED_WORKERS: Final = 64
CHANGED_SERVERS: Final = 8


@dataclass
class Picture:
    """A cluster in dictionaries, with the sums that a decision asks for. One replica per device at most."""

    servers: dict[str, ServerRecord] = field(default_factory=dict)
    workers: dict[str, WorkerRecord] = field(default_factory=dict)
    asks: dict[str, Ask] = field(default_factory=dict)
    on: dict[str, Tenant] = field(default_factory=dict)
    of: dict[str, list[Tenant]] = field(default_factory=dict)
    of_server: dict[str, list[str]] = field(default_factory=dict)
    in_dram: dict[str, list[str]] = field(default_factory=dict)
    on_ssd: dict[str, list[str]] = field(default_factory=dict)
    estimator: Estimator = field(default_factory=Estimator)
    columns: Columns = field(default_factory=Columns)
    changed: tuple[list[str], list[str]] = ([], [])

    def changed_workers(self) -> Iterable[str]:
        return self.changed[0]

    def changed_servers(self) -> Iterable[str]:
        return self.changed[1]

    def workers_on(self, server_id: str) -> Sequence[str]:
        return self.of_server[server_id]

    def used_bytes(self, worker_id: str, *, but_for: str = "") -> int:
        tenant = self.on.get(worker_id)
        return tenant.memory_bytes if tenant is not None else 0

    def replica_count(self, worker_id: str, *, but_for: str = "") -> int:
        return int(worker_id in self.on)

    def pool_used_bytes(self, server_id: str, now: float, *, but_for: str = "") -> int:
        return 0

    def pool_freed_bytes(self, server_id: str, replica_ids: Sequence[str]) -> int:
        return 0

    def holds(self, server_id: str, key: str, *, but_for: str = "") -> bool:
        return False

    def dram_holders(self, key: str, weight_bytes: int = 1) -> Sequence[str]:
        return self.in_dram.get(key, ())

    def ssd_holders(self, key: str, weight_bytes: int = 1) -> Sequence[str]:
        return self.on_ssd.get(key, ())

    def sketch(self, worker_id: str) -> Sequence[Tenant]:
        """See `View`."""
        return self.tenants(worker_id)

    def tenants(self, worker_id: str) -> Sequence[Tenant]:
        tenant = self.on.get(worker_id)
        return (tenant,) if tenant is not None else ()

    def present(self, deployment: str) -> frozenset[str]:
        return frozenset(one.worker_ids[0] for one in self.of.get(deployment, ()))

    def rooms_of(self, owner: str) -> Sequence[str]:
        return ()

    def destinations(self, tenant: Tenant) -> Sequence[tuple[str, str, int]]:
        return [
            (one.worker_ids[0], one.replica_id, max(0, 8 - one.running))
            for one in self.of.get(tenant.deployment, ())
            if one.replica_id != tenant.replica_id
        ]

    def ask_of(self, deployment: str) -> Ask | None:
        return self.asks[deployment]


def picture(shape: tuple[int, int, int], state: str, seed: int) -> Picture:
    """A cluster of this shape in this state."""
    servers, devices, deployments = shape
    free, idle = STATES[state]
    dice = random.Random(f"{shape}/{state}/{seed}")
    found = Picture()
    residency: dict[str, tuple[dict[str, int], dict[str, int]]] = {f"s{n:04}": ({}, {}) for n in range(servers)}
    for number in range(deployments):
        weight = dice.choice(WEIGHTS_GB) * GB
        need = Need(f"m{number}", f"ck{number}", weight, 8 * GB)
        found.asks[need.deployment] = Ask(need)
        homes = dice.sample(sorted(residency), min(3, servers))
        for id in homes:
            residency[id][1][need.key] = weight
        residency[homes[0]][0][need.key] = weight
        found.on_ssd[need.key] = sorted(homes)
        found.in_dram[need.key] = [homes[0]]
    for id, (dram, ssd) in residency.items():
        found.servers[id] = _server(id, dram, ssd, dice)
        found.estimator.server_said(found.servers[id], 0.0)
        for number in range(devices):
            _put_worker(found, id, f"{id}-{number}", free, idle, dice)
    found.changed = (sorted(found.workers), sorted(found.servers))
    return found


def _server(id: str, dram: Mapping[str, int], ssd: Mapping[str, int], dice: random.Random) -> ServerRecord:
    return ServerRecord(
        server_id=id, phase=Phase.READY, host=id, pid=1,
        dram_capacity_bytes=1000 * GB, dram_used_bytes=0, leased_bytes=0,
        ssd_capacity_bytes=16_000 * GB, ssd_used_bytes=0,
        dram=dict(dram), ssd=dict(ssd), chunk_bytes=16 << 20, peer_url=f"http://{id}",
        ssd_bytes_per_s=dice.uniform(3, 7) * GB, peer_bytes_per_s=dice.uniform(1, 3) * GB,
        remote_bytes_per_s=dice.uniform(0.3, 1) * GB,
        ssd_queue={"other": dice.choice((0, 0, 20)) * GB},
    )  # fmt: skip


def _put_worker(found: Picture, server_id: str, id: str, free: float, idle: float, dice: random.Random) -> None:
    found.of_server.setdefault(server_id, []).append(id)
    found.workers[id] = WorkerRecord(
        worker_id=id, server_id=server_id, phase=Phase.READY, pid=1, device="cuda", device_name="",
        memory_total_bytes=80 * GB, memory_used_bytes=0, max_replicas=8,
    )  # fmt: skip
    if dice.random() < free:
        return
    need = found.asks[dice.choice(list(found.asks))].need
    running = 0 if dice.random() < idle else dice.randint(1, 6)
    tenant = Tenant(
        replica_id=f"r-{id}", deployment=need.deployment, worker_ids=(id,), server_id=server_id,
        memory_bytes=80 * GB - dice.randint(0, 4) * GB, key=need.key, weight_bytes=need.weight_bytes,
        running=running, tokens=400 * running, idle_s=dice.uniform(1, 60), evictable=running == 0,
        movable=running > 0, remaining_s=dice.uniform(1, 40), resume_s=0.1 + 0.4 * running,
    )  # fmt: skip
    found.on[id] = tenant
    found.of.setdefault(need.deployment, []).append(tenant)


def measure(shape: tuple[int, int, int], state: str, decisions: int, seed: int, explain: bool = True) -> dict[str, Any]:
    """Milliseconds per decision, and what was decided."""
    view, dice = picture(shape, state, seed), random.Random(seed)
    workers, servers, names = sorted(view.workers), sorted(view.servers), sorted(view.asks)
    began = time.perf_counter()
    view.columns.refresh(view, 0.0)
    first_ms = (time.perf_counter() - began) * 1000
    outcomes: dict[str, int] = {}
    took: list[float] = []
    wall: list[float] = []
    for number in range(decisions):
        view.changed = (
            dice.sample(workers, min(CHANGED_WORKERS, len(workers))),
            dice.sample(servers, min(CHANGED_SERVERS, len(servers))),
        )
        ask, now = view.asks[dice.choice(names)], 1.0 + 0.01 * number
        began, began_wall = time.thread_time(), time.perf_counter()
        decision = decide(ask, view, now, explain=explain)
        took.append((time.thread_time() - began) * 1000)
        wall.append((time.perf_counter() - began_wall) * 1000)
        outcomes[decision.outcome.value] = outcomes.get(decision.outcome.value, 0) + 1
    return {
        "servers": shape[0], "devices": shape[0] * shape[1], "deployments": shape[2], "state": state,
        "explained": explain, "decisions": decisions, "median_ms": percentile(took, 50), "p99_ms": percentile(took, 99),
        "most_ms": max(took), "wall_median_ms": percentile(wall, 50), "wall_p99_ms": percentile(wall, 99),
        "first_refresh_ms": first_ms, "outcomes": outcomes,
    }  # fmt: skip


def _show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    show(
        title,
        ("cluster", "deployments", "state", "median", "P99", "most", "clock: median", "P99", "outcomes"),
        [
            (
                f"{one['servers']} × {one['devices'] // one['servers']}",
                str(one["deployments"]),
                one["state"],
                f"{one['median_ms']:.2f} ms",
                f"{one['p99_ms']:.2f} ms",
                f"{one['most_ms']:.2f} ms",
                f"{one['wall_median_ms']:.2f} ms",
                f"{one['wall_p99_ms']:.2f} ms",
                ", ".join(f"{count} {name}" for name, count in sorted(one["outcomes"].items())),
            )
            for one in rows
        ],
    )


def main() -> None:
    """Measure all shapes and states."""
    from benchmarks.handling import measure_handling  # which builds on this module

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="write results/decision.json")
    parser.add_argument("--brief", action="store_true", help="without looking at places that are only shown")
    given = parser.parse_args()
    found = [
        measure(shape, state, given.decisions, given.seed, explain=not given.brief)
        for shape in SHAPES
        for state in STATES
    ]
    _show("A decision", found)
    whole = [measure_handling(shape, state, given.decisions, given.seed) for shape in SHAPES for state in STATES]
    _show("A hint of demand, the whole of Core.handle", whole)
    if given.json:
        write(
            "decision",
            {"rows": found, "handling": whole, "changed_workers": CHANGED_WORKERS, "changed_servers": CHANGED_SERVERS},
        )


if __name__ == "__main__":
    main()
