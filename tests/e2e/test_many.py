"""Hundreds of requests over more deployments than fit, cold and warm, a tenth of the clients leaving early."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import pytest

from tests.builders.cluster import Cluster
from tests.e2e.conftest import Models

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS = 32


@pytest.mark.parametrize(
    ("requests", "deployments"), [(300, 10), pytest.param(1000, 20, marks=pytest.mark.by_hand)], ids=["few", "many"]
)
async def test_every_request_ends_once_and_nothing_leaks(
    cluster: Cluster, models: Models, requests: int, deployments: int
) -> None:
    for number in range(deployments):
        cluster.deploy(f"many-{number}", models("llama", seed=number % 4), keep_alive_s=5)
    dice = random.Random(7)
    # Popular and rare models, as in life; the rare ones are cold nearly always.
    weights = [1 / (rank + 1) for rank in range(deployments)]
    plan = [
        (f"many-{dice.choices(range(deployments), weights)[0]}", dice.random() < 0.1, dice.randrange(2, 12))
        for _ in range(requests)
    ]
    outcomes: list[str] = []

    async def one(session: aiohttp.ClientSession, model: str, leaves: bool, tokens: int) -> str:
        body = {"model": model, "prompt": "one two three", "max_tokens": tokens, "stream": True, "seed": 1}
        async with session.post(f"{cluster.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return f"{answer.status} {await answer.text()}"
            ends = 0
            async for line in answer.content:
                if leaves and dice.random() < 0.5:
                    return "left"
                if line.startswith(b"data: [DONE]"):
                    ends += 1
                elif b'"error"' in line:
                    return line.decode()
            return "ended" if ends == 1 else f"{ends} ends"

    queue = list(reversed(plan))

    async def client(session: aiohttp.ClientSession) -> None:
        while queue:
            outcomes.append(await one(session, *queue.pop()))

    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:
        for _ in range(CLIENTS):
            tasks.create_task(client(session))

    assert len(outcomes) == requests
    assert {outcome for outcome in outcomes if outcome not in ("ended", "left")} == set()
    assert requests / 50 < outcomes.count("left") < requests / 5
    # Nothing is left: no queue entry, no running request, and after the keep-alive no replica and no lease.
    await asyncio.to_thread(cluster.until, cluster.idle, "no request is outstanding")
    for number in range(deployments):
        status, _ = await asyncio.to_thread(cluster.call, "DELETE", f"/v1/admin/deployments/many-{number}")
        assert status in (200, 204)

    def clean() -> bool:
        view = cluster.view()
        mine = [replica for replica in view["replicas"] if replica["deployment"].startswith("many-")]
        others = bool(view["replicas"])
        return not mine and (others or all(server["leased_bytes"] == 0 for server in view["servers"]))

    await asyncio.to_thread(cluster.until, clean, "no replica and no lease is left")
