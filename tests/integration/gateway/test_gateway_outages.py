"""What happens while NATS or Redis is away, and after."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.builders.servers import start_nats, start_redis
from tests.integration.gateway.harness import Cluster, FakeWorker, Work, chat_body, cluster, lines, text_of, until


async def _ready(it: Cluster, status: int) -> bool:
    async with it.http.get(it.url + "/readyz") as response:
        return response.status == status


async def test_without_redis_known_models_are_served_and_the_gateway_is_not_ready(
    nats_url: str, tmp_path: Path, prefix: str
) -> None:
    process, redis_url = start_redis(tmp_path)
    try:
        async with cluster(nats_url, redis_url, prefix) as it:
            await it.deploy()
            await it.worker()
            process.terminate()
            process.wait(10)
            await until(lambda: _ready(it, 503))
            assert (await it.chat())[0] == 200
            status, body, _ = await it.chat(model="nobody")
            assert (status, body["error"]["code"]) == (503, "unavailable")
    finally:
        process.kill()
        process.wait(10)


async def test_a_stream_survives_the_loss_of_nats(redis_url: str, tmp_path: Path, prefix: str) -> None:
    go_on = asyncio.Event()

    async def waits(worker: FakeWorker, work: Work) -> None:
        if not work.claimed.token_ids:
            worker.frame(work, 0, "the ")
            await go_on.wait()
        worker.frame(work, 1, "sun")
        worker.end(work, 2)

    process, nats_url = start_nats(tmp_path)
    try:
        async with cluster(nats_url, redis_url, prefix) as it:
            await it.deploy()
            await it.worker(waits)
            async with it.post("/v1/chat/completions", chat_body(stream=True)) as response:
                found = lines(response)
                first = await anext(found)
                process.terminate()
                process.wait(10)
                await until(lambda: _ready(it, 503))
                status, body, _ = await it.chat()
                assert (status, body["error"]["code"]) == (503, "unavailable")
                process, _ = start_nats(tmp_path, port=int(nats_url.rsplit(":", 1)[1]))
                await until(lambda: _ready(it, 200))
                go_on.set()
                rest = [line async for line in found]
            assert text_of([first, *rest]) == "the sun"
    finally:
        process.kill()
        process.wait(10)
