"""A request that kills its workers ends after a bounded number of deaths, with an error that says so; those that only
shared a worker with it get their streams."""

from __future__ import annotations

import random
from functools import partial

import pytest

from shared.contracts.requests import Request, Sampling, TokensPrompt
from shared.errors import Code
from simulator.clients import Outcome
from simulator.cluster import Cluster, Shape
from simulator.engine import POISON, Speeds
from simulator.kernel import Kernel
from simulator.network import Rough

INNOCENTS = 6


def request(name: str, gateway_id: str, *prompt: int, seed: int) -> Request:
    return Request(
        request_id=name,
        gateway_id=gateway_id,
        deployment="demo",
        prompt=TokensPrompt(token_ids=prompt),
        sampling=Sampling(max_tokens=60, seed=seed),
        budget_s=300.0,
    )


@pytest.mark.parametrize("seed", range(40))
def test_poison_is_found_and_the_innocent_live(seed: int) -> None:
    dice, kernel = random.Random(seed), Kernel()
    cluster = Cluster(kernel, Rough(dice), Shape(slots=dice.choice((2, 4)), budget_s=300.0))
    speeds = Speeds(step_s=dice.choice((0.02, 0.1)))
    deaths = 0

    def start(worker_id: str) -> None:
        cluster.add_worker(worker_id, speeds)
        cluster.load(worker_id, "demo")

    def struck(worker_id: str) -> None:
        nonlocal deaths
        deaths += 1
        kernel.after(1.0, lambda: start(worker_id))

    def begin(call: Request) -> None:
        cluster.call(call.gateway_id, "demo", call)

    cluster.struck = struck
    gateways = ("g0", "g1")[: dice.choice((1, 2))]
    for gateway_id in gateways:
        cluster.add_gateway(gateway_id)
    for number in range(dice.choice((1, 2, 3))):
        start(f"w{number}")
    kernel.run(1.0)
    names = [f"q{number}" for number in range(INNOCENTS)]
    calls = [request(name, dice.choice(gateways), 97, 98, seed=1 + dice.randrange(1 << 30)) for name in names]
    calls.insert(dice.randrange(INNOCENTS), request("poison", "g0", 97, POISON, seed=1))
    for call in calls:
        kernel.after(2.0 * dice.random(), partial(begin, call))
    kernel.run(5.0)
    cluster.settle(("demo",))
    cluster.check_over()
    poison = cluster.clients.streams["poison"]
    assert poison.outcome is Outcome.FAILED
    assert poison.failure is not None and poison.failure.code is Code.WORKER_LOST
    assert deaths <= cluster.shape.max_deliveries
    outcomes = {name: cluster.clients.streams[name].outcome for name in names}
    assert set(outcomes.values()) == {Outcome.COMPLETE}, outcomes
    cluster.end()
