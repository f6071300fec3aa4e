"""Small fleets by dice, with everything that may go wrong: hundreds of them, each a function of its seed.

    python -m simulator.fleet.seeds [--first 0] [--count 500] [--policy hearth]

A seed that fails is printed with the command that replays it; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from dataclasses import replace

from shared.errors import HearthError
from simulator.fleet.fleet import Fleet
from simulator.fleet.model import (
    Arrival,
    Faults,
    Hardware,
    ModelProfile,
    ModelSpec,
    Options,
    Policy,
    ServerShape,
)
from simulator.fleet.report import Report

GB = 10**9
MODELS = (
    ModelProfile(
        name="small", weight_bytes=2 * GB, kv_bytes_per_token=65_536, prefill_token_s=0.0001, step_s=0.02,
        step_request_s=0.001, attach_s=0.1,
    ),
    ModelProfile(
        name="medium", weight_bytes=13 * GB, kv_bytes_per_token=524_288, prefill_token_s=0.0003, step_s=0.03,
        step_request_s=0.001, attach_s=0.2,
    ),
    ModelProfile(
        name="large", weight_bytes=50 * GB, kv_bytes_per_token=1_376_256, prefill_token_s=0.001, step_s=0.06,
        step_request_s=0.002, attach_s=0.3,
    ),
)  # fmt: skip


def hardware(dice: random.Random) -> Hardware:
    """One to five servers, alike or not; some have too little of something."""
    shapes: list[ServerShape] = []
    first = _shape(dice)
    for _ in range(dice.choice((1, 2, 2, 3, 5))):
        shapes.append(first if dice.random() < 0.7 else _shape(dice))
    return Hardware(
        servers=tuple(shapes),
        remote_bytes_per_s=dice.choice((0.3, 1.25)) * GB,
        peers=dice.random() < 0.7,
        cold_ssd=dice.random() < 0.3,
        ssd_copies=dice.choice((0, 1, 2)),
    )


def _shape(dice: random.Random) -> ServerShape:
    return ServerShape(
        devices=dice.choice((1, 2, 4)),
        device_memory_bytes=dice.choice((60, 80)) * GB,
        dram_bytes=dice.choice((30, 64, 200)) * GB,
        ssd_bytes=dice.choice((80, 300, 2000)) * GB,
        ssd_bytes_per_s=dice.choice((2, 6)) * GB,
        network_bytes_per_s=dice.choice((0.3, 1.25)) * GB,
        device_bytes_per_s=dice.choice((10, 25)) * GB,
        device=dice.choice(("cuda", "cuda", "cpu")),
        max_replicas_per_device=dice.choice((1, 1, 2)),
        chunk_bytes=64 * 2**20,
    )


def deployments(dice: random.Random) -> list[ModelSpec]:
    """A few of them, with the operator's wishes at random."""
    return [
        ModelSpec(
            name=f"m{number}",
            model=dice.choice(MODELS),
            min_replicas=0,
            max_replicas=dice.choice((1, 1, 2, 4)),
            target_concurrency=dice.choice((1, 2, 8)),
            keep_alive_s=dice.choice((2.0, 10.0, 60.0)),
            adaptive_keep_alive=dice.random() < 0.3,
            priority=dice.choice((0, 0, 0, 1)),
        )
        for number in range(dice.choice((1, 3, 8, 16)))
    ]


def arrivals(dice: random.Random, specs: list[ModelSpec]) -> list[Arrival]:
    """Bursts and trickles."""
    found: list[Arrival] = []
    at_s, per_s = 0.0, dice.choice((0.2, 1.0, 4.0))
    for _ in range(dice.choice((20, 40, 80))):
        at_s += dice.expovariate(per_s)
        name = specs[min(len(specs) - 1, int(dice.expovariate(3.0 / len(specs))))].name
        for _ in range(dice.choice((1, 1, 1, 5))):
            found.append(Arrival(at_s, name, dice.randrange(1, 400), dice.randrange(1, 300)))
    return found


def faults(dice: random.Random, until_s: float) -> Faults:
    """In most runs a little goes wrong, in some nothing, in some a lot."""
    return Faults(
        workers_per_h=dice.choice((0, 0, 60, 300)),
        servers_per_h=dice.choice((0, 0, 30, 120)),
        leader_per_h=dice.choice((0, 0, 60, 200)),
        redis_away_per_h=dice.choice((0, 0, 60)),
        replica_failures=dice.choice((0.0, 0.0, 0.05, 0.3)),
        lost=dice.choice((0.0, 0.0, 0.02, 0.1)),
        late=dice.choice((0.0, 0.0, 0.02, 0.1)),
        late_s=dice.choice((0.1, 2.0, 6.0)),
        stale_s=dice.choice((0.0, 0.0, 2.0)),
        back_s=dice.choice((2.0, 20.0)),
        until_s=until_s,
    )


def fleet_of(seed: int, policy: str = Policy.HEARTH) -> Fleet:
    """The fleet of a seed."""
    dice = random.Random(seed)
    specs = deployments(dice)
    there = hardware(dice)
    requests = arrivals(dice, specs)
    options = Options(check_every=dice.choice((5, 20)), sample_s=5.0)
    if dice.random() < 0.1:
        options = replace(options, time_limit_s=20.0)
    trouble = faults(dice, requests[-1].at_s + dice.choice((0.0, 30.0)))
    return Fleet(there, specs, requests, policy=policy, seed=seed, faults=trouble, options=options)


def run(seed: int, policy: str = Policy.HEARTH) -> Report:
    """Live through the fleet of a seed. Raises AssertionError where an invariant breaks."""
    return fleet_of(seed, policy).run()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--policy", default=Policy.HEARTH.value, choices=[one.value for one in Policy])
    asked = parser.parse_args()
    began = time.perf_counter()
    failed = requests = complete = recoveries = 0
    for seed in range(asked.first, asked.first + asked.count):
        try:
            report = run(seed, asked.policy)
        except (ArithmeticError, AssertionError, AttributeError, HearthError, LookupError, TypeError, ValueError):
            failed += 1
            traceback.print_exc(limit=-5)
            print(
                f"seed {seed} fails: python -m simulator.fleet.seeds --first {seed} --count 1 --policy {asked.policy}"
            )
            continue
        requests += report.counters.requests
        complete += int(report.completed.sum())
        recoveries += report.counters.recoveries
    took_s = time.perf_counter() - began
    print(
        f"{asked.count} seeds, {failed} failed; {requests} requests, {complete} complete, "
        f"{recoveries} recovered from a crash; {took_s:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
