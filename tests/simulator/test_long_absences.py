"""A gateway that is away for much longer than anybody waits for it, with a request in the queue: the stream comes all
the same, late."""

from __future__ import annotations

import pytest

from shared.contracts.requests import Request, Sampling, TokensPrompt
from simulator.clients import Outcome
from simulator.cluster import Cluster, Shape
from simulator.engine import Speeds
from simulator.kernel import Kernel
from simulator.network import Fair

AWAY_S = 80.0


@pytest.mark.parametrize("how", ["stopped", "cut off", "cut off, packets held back"])
def test_a_request_in_the_queue_outlives_the_absence_of_its_gateway(how: str) -> None:
    kernel = Kernel()
    cluster = Cluster(kernel, Fair(), Shape())
    gateway = cluster.add_gateway("g0")
    cluster.add_worker("w0", Speeds(step_s=0.05))
    kernel.run(0.5)
    request = Request(
        request_id="q1",
        gateway_id="g0",
        deployment="demo",
        prompt=TokensPrompt(token_ids=(97,)),
        sampling=Sampling(max_tokens=20, seed=5),
        budget_s=600.0,
    )
    cluster.call("g0", "demo", request, budget_s=600.0)
    kernel.run(0.6)
    if how == "stopped":
        gateway.process.stop()
    else:
        cluster.network.cut(gateway.name, held="held" in how)
    cluster.load("w0", "demo")
    kernel.run(AWAY_S)
    if how == "stopped":
        gateway.process.resume()
    else:
        cluster.network.mend(gateway.name)
        gateway.reconnected()
    cluster.settle(("demo",))
    cluster.check_over()
    assert cluster.clients.streams["q1"].outcome is Outcome.COMPLETE
    assert kernel.now < 2 * AWAY_S
    cluster.end()
