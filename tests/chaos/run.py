"""One chaos run: a fleet, clients that never rest, faults by seed, and what must hold in the end."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.builders.fleet import Fleet
from tests.builders.load import Load, make_calls
from tests.builders.models import make_model
from tests.builders.remains import until_nothing_remains
from tests.builders.streams import Twins
from tests.chaos.injector import Injector
from tests.chaos.plan import faults
from tests.chaos.report import Report

CALLS = 24
TAIL_LINES = 25
CLIENT_TIMEOUT_S = 180.0
MOST_FAILURES = 20  # then it is clear, and the run ends


def tails(fleet: Fleet) -> str:
    """The last words of every process, those of NATS and Redis last."""
    names = sorted(fleet.services, key=lambda name: fleet.services[name][0] in ("nats", "redis"))
    parts = [f"--- {name}\n" + "\n".join(fleet.log(name).splitlines()[-TAIL_LINES:]) for name in names]
    return "\n".join(parts)


def tracebacks(fleet: Fleet) -> list[str]:
    """The services that logged one: none of these faults should surprise anybody."""
    return [
        f"a traceback in {name}.log"
        for name in fleet.services
        if "Traceback (most recent call last)" in fleet.log(name)
    ]


def run(
    home: Path,
    *,
    seed: int,
    seconds: float,
    every_s: float = 3.0,
    clients: int = 12,
    at_once: int = 2,
    tokens: tuple[int, int] = (100, 800),
) -> tuple[Report, str]:
    """The report, and the tails of the logs if it has failures. `every_s`: mean seconds between two faults."""
    report = Report(seed)
    if (home / "fleet").exists():
        raise FileExistsError(f"{home} holds an earlier run; its logs would be taken for this one's")
    dice = random.Random(seed)
    model = make_model(home / "model", context=2048, eos=False)
    with Fleet(home / "fleet", servers=2, workers=2, gateways=2) as fleet:
        fleet.deploy("long", model, min_replicas=4, max_replicas=4, keep_alive_s=600)
        fleet.until(fleet.spread, "every worker has a replica", 60)
        calls = make_calls("long", dice, CALLS, tokens)
        twins = Twins(fleet.url)
        twins.learn(calls)
        names = {kind: fleet.named(kind) for kind in ("worker", "store", "scheduler", "gateway", "nats", "redis")}
        # The two need each other: clients ask which gateways are well, faults which streams they hit.
        loads: list[Load] = []
        injector = Injector(fleet, faults(seed, names, every_s), lambda: loads[0].open(), seed=seed, at_once=at_once)
        load = Load(
            fleet.urls, calls, twins, clients=clients, seed=seed, usable=injector.usable, timeout_s=CLIENT_TIMEOUT_S
        )
        loads.append(load)
        began = time.monotonic()

        def hopeless() -> bool:
            wrong = [
                one
                for one in list(load.outcomes)
                if one.difference
                and not one.heard.refused
                and one.heard.status != 0
                and not injector.was_killed(one.gateway, one.heard.opened_at, one.heard.ended_at)
            ]
            return len(wrong) + len(injector.complaints) >= MOST_FAILURES

        try:
            injector.run(seconds, over=hopeless)
            load.stop()
            report.seconds = time.monotonic() - began
            fleet.mend()
            until_nothing_remains(fleet, 120)
        except AssertionError as error:
            report.failures.append(str(error))
        for outcome in load.outcomes:
            heard = outcome.heard
            killed = injector.was_killed(outcome.gateway, heard.opened_at, heard.ended_at)
            report.add_outcome(outcome, gateway_killed=killed)
        report.add_faults(injector.happened)
        report.failures += injector.complaints + tracebacks(fleet)
        report.history = [
            f"{one.began - began:7.2f} s {one.fault.kind} {one.fault.victim} "
            f"until {one.undone - began:.2f} s {one.result}".rstrip()
            for one in injector.happened
        ]
        if report.failures:
            return report, "\n".join([*report.history, tails(fleet)])
    return report, ""
