"""`x-hearth-info`: what clients hear about their own requests, through the official `openai` client."""

from __future__ import annotations

import dataclasses
from typing import Any

import openai
import pytest

from shared.contracts.generation import End, FinishReason, Ledger, Usage
from shared.contracts.requests import Claim, Claimed
from shared.subjects import CLAIM
from tests.integration.gateway.harness import FakeWorker, Work, chat_body, cluster

TOLD = Ledger(cold=True, tier="ssd", queue_s=0.25, rounds=3, ssd_bytes=7)
ASK = {"x-hearth-info": "true"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


async def moved(worker: FakeWorker, work: Work) -> None:
    """A token here, the next one and the end by another worker, which claims the request in between."""
    worker.frame(work, 0, "sun")
    await worker.bus.flush()  # a call would overtake it
    claim = Claim(
        request_id=work.request.request_id, worker_id="w2", replica_id="r2", token=work.delivery.token,
        after_epoch=work.epoch, claim_id=f"{work.request.request_id}-moved",
    )  # fmt: skip
    claimed = await worker.bus.call(CLAIM, claim, gateway_id=work.request.gateway_id)
    assert isinstance(claimed, Claimed)
    there = dataclasses.replace(worker, name="w2")
    mine = Work(work.delivery, work.request, claimed)
    there.frame(mine, 1, "rise")
    usage = Usage(prompt_tokens=7, completion_tokens=2)
    end = End(
        request_id=work.request.request_id, epoch=claimed.epoch, index=2, reason=FinishReason.STOP, usage=usage,
        ledger=TOLD,
    )  # fmt: skip
    there.send(mine, end)
    there.bus.ack(work.delivery.token)


async def test_the_openai_client_passes_it_through(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        worker = await it.worker(moved)
        async with openai.AsyncOpenAI(base_url=f"{it.url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(**CHAT, extra_headers=ASK)
            assert answer.model_extra is not None
            hearth = answer.model_extra["hearth"]
            assert hearth["request_id"] == worker.works[-1].request.request_id
            assert (hearth["cold"], hearth["tier"], hearth["ssd_bytes"]) == (True, "ssd", 7)
            assert [hearth[name] for name in ("migrations", "rounds", "recoveries")] == [1, 3, 0]
            assert hearth["pause_s"] > 0

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
        await it.worker(moved)
        async with it.post("/v1/chat/completions", chat_body()) as response:
            await response.read()
            names = ("migrations", "rounds", "recoveries")
            assert [response.headers[f"x-hearth-{name}"] for name in names] == ["1", "3", "0"]
            assert float(response.headers["x-hearth-pause-ms"]) >= 0
