"""How fast the simulation is: many requests on a large fleet, on one core.

    python -m simulator.fleet.scale [--requests 1000000] [--servers 200] [--devices 8] [--deployments 1000] [--profile]

Requests come to deployments of unequal popularity (Zipf), at a rate that keeps most of the devices in use.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import sys
import time
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate

from services.scheduler.rules import Rules
from simulator.fleet.fleet import Fleet
from simulator.fleet.model import Arrival, Hardware, ModelProfile, ModelSpec, Options, Policy, ServerShape

GIB = 2**30


def hardware(servers: int, devices: int) -> Hardware:
    """Servers of 8 devices of 80 GB, 1 TB of DRAM, 8 TB of SSD at 12 GB/s, 100 Gb/s of network."""
    shape = ServerShape(
        devices=devices,
        device_memory_bytes=80 * GIB,
        dram_bytes=1024 * GIB,
        ssd_bytes=8 * 10**12,
        ssd_bytes_per_s=12e9,
        network_bytes_per_s=12.5e9,
        device_bytes_per_s=25e9,
    )
    return Hardware(servers=(shape,) * servers, ssd_copies=8)


def deployments(count: int) -> list[ModelSpec]:
    """A third each of 7B, 13B and 30B models in 16 bits."""
    models = [
        ModelProfile(
            name=name,
            weight_bytes=weight_bytes,
            kv_bytes_per_token=kv_bytes,
            prefill_token_s=prefill_token_s,
            step_s=step_s,
            step_request_s=0.03 * step_s,
            attach_s=0.2,
        )
        for name, weight_bytes, kv_bytes, prefill_token_s, step_s in (
            ("7b", 13_300_000_000, 524_288, 0.00008, 0.012),
            ("13b", 25_700_000_000, 819_200, 0.00015, 0.022),
            ("30b", 60_000_000_000, 1_376_256, 0.00035, 0.045),
        )
    ]
    return [
        ModelSpec(name=f"m{number:05d}", model=models[number % 3], max_replicas=16, target_concurrency=8)
        for number in range(count)
    ]


def arrivals(specs: list[ModelSpec], requests: int, per_s: float, seed: int) -> Iterator[Arrival]:
    """Poisson in time, Zipf over the deployments, lengths about those of short conversations."""
    dice = random.Random(seed)
    weights = list(accumulate(1.0 / (rank + 1) ** 0.9 for rank in range(len(specs))))
    at_s = 0.0
    for _ in range(requests):
        at_s += dice.expovariate(per_s)
        name = specs[min(len(specs) - 1, bisect(weights, dice.random() * weights[-1]))].name
        yield Arrival(at_s, name, 20 + int(dice.expovariate(1 / 180)), 10 + int(dice.expovariate(1 / 140)))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--servers", type=int, default=200)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--deployments", type=int, default=1000)
    parser.add_argument("--per-s", type=float, default=0.0, help="requests per second (0: by the number of devices)")
    parser.add_argument("--policy", default=Policy.HEARTH.value, choices=[one.value for one in Policy])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    asked = parser.parse_args()
    specs = deployments(asked.deployments)
    per_s = asked.per_s or 0.25 * asked.servers * asked.devices
    fleet = Fleet(
        hardware(asked.servers, asked.devices),
        specs,
        arrivals(specs, asked.requests, per_s, asked.seed),
        policy=asked.policy,
        seed=asked.seed,
        rules=Rules(),
        options=Options(sample_s=10.0),
    )
    profile = cProfile.Profile() if asked.profile else None
    began, began_cpu = time.perf_counter(), time.process_time()
    if profile is not None:
        profile.enable()
    report = fleet.run()
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    if profile is not None:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(40)
    print(
        json.dumps(
            {
                **report.summary(),
                "took_s": round(took_s, 1),
                "cpu_s": round(cpu_s, 1),
                "cpu_us_per_request": round(1e6 * cpu_s / max(1, asked.requests), 1),
                "events": report.counters.events,
                "core_calls": report.counters.core_calls,
            },
            indent=1,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
