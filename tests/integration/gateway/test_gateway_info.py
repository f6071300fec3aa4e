"""`x-hearth-info`: what clients hear about their own requests, through the official `openai` client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from shared.contracts.generation import End, FinishReason, Ledger, Usage
from tests.integration.gateway.harness import FakeWorker, Work, chat_body, cluster

MOVED = Ledger(cold=True, tier="ssd", queue_s=0.25, migrations=1, rounds=3, recoveries=1, pause_s=0.02, ssd_bytes=7)
ASK = {"x-hearth-info": "true"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


async def job(worker: FakeWorker, work: Work) -> None:
    worker.frame(work, 0, "sun")
    usage = Usage(prompt_tokens=7, completion_tokens=1)
    end = End(
        request_id=work.request.request_id, epoch=work.epoch, index=1, reason=FinishReason.STOP, usage=usage,
        ledger=MOVED,
    )  # fmt: skip
    worker.send(work, end)
    worker.bus.ack(work.delivery.token)


async def test_the_openai_client_passes_it_through(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        worker = await it.worker(job)
        async with openai.AsyncOpenAI(base_url=f"{it.url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(**CHAT, extra_headers=ASK)
            assert answer.model_extra is not None
            hearth = answer.model_extra["hearth"]
            assert hearth["request_id"] == worker.works[-1].request.request_id
            assert (hearth["cold"], hearth["tier"], hearth["ssd_bytes"]) == (True, "ssd", 7)
            counts = [hearth[name] for name in ("migrations", "rounds", "recoveries", "pause_s")]
            assert counts == [1, 3, 1, 0.02]

            plain = await client.chat.completions.create(**CHAT)
            assert "hearth" not in (plain.model_extra or {})

            streaming: tuple[dict[str, Any], ...] = ({}, {"stream_options": {"include_usage": True}})
            for options in streaming:
                extras: list[dict[str, Any]] = []
                chunks = await client.chat.completions.create(**CHAT, **options, stream=True, extra_headers=ASK)
                async for chunk in chunks:
                    extras.append((chunk.model_extra or {}).get("hearth", {}))
                assert extras[:-1] == [{}] * (len(extras) - 1)
                assert extras[-1]["migrations"] == 1
            text = await client.completions.create(model="m", prompt="x", n=2, extra_headers=ASK)
            assert text.model_extra is not None
            asked = {work.request.request_id for work in worker.works[-2:]}
            assert {one["request_id"] for one in text.model_extra["hearth"]["ledgers"]} == asked

            silent = await client.completions.create(model="m", prompt="x", extra_headers={"x-hearth-info": "no"})
            assert "hearth" not in (silent.model_extra or {})
            with pytest.raises(openai.BadRequestError, match="The header x-hearth-info must be true or false"):
                await client.completions.create(model="m", prompt="x", extra_headers={"x-hearth-info": "maybe"})


async def test_the_headers_of_a_plain_answer_count_what_happened(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker(job)
        async with it.post("/v1/chat/completions", chat_body()) as response:
            await response.read()
            names = ("migrations", "rounds", "recoveries", "pause-ms")
            assert [response.headers[f"x-hearth-{name}"] for name in names] == ["1", "3", "1", "20.0"]
