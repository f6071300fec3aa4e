"""The gateway over real sockets, with a real NATS and a real Redis and a worker written by hand."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from typing import Any

import msgspec
import openai
import pytest

from services.gateway import completions
from shared.contracts.events import RecordChanged
from shared.contracts.generation import End, FinishReason, Frame, FrameBatch
from shared.contracts.records import DeploymentRecord, GatewayRecord, Phase
from shared.contracts.requests import ChatPrompt
from shared.contracts.residency import LoadProgress, Progress
from shared.errors import Code, Failure
from shared.subjects import FRAMES, LOAD_PROGRESS, RECORD_CHANGED
from tests.integration.gateway.harness import (
    CHECKPOINT,
    Cluster,
    FakeWorker,
    Work,
    answer,
    chat_body,
    cluster,
    events,
    lines,
    text_of,
    until,
)

FIVE = "the sun is a star"


async def never(worker: FakeWorker, work: Work) -> None:
    """Claims and says nothing."""


async def settled(it: Cluster) -> None:
    """Nothing lies in the queue and nothing is open."""
    await until(lambda: _empty(it))


async def _empty(it: Cluster) -> bool:
    return await it.outstanding() == 0


async def test_a_whole_answer(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        worker = await it.worker()
        status, body, headers = await it.chat(temperature=0, max_tokens=5)
        assert status == 200
        assert body["choices"][0]["message"]["content"] == FIVE
        assert body["usage"]["prompt_tokens"] == 7
        assert body["usage"]["completion_tokens"] == 5
        assert "hearth" not in body
        assert headers["x-hearth-cold"] == "true"
        assert headers["x-hearth-tier"] == "ssd"
        assert headers["x-hearth-queue-ms"] == "250.0"
        assert headers["x-hearth-request-id"] == headers["x-request-id"]
        (work,) = worker.works
        assert isinstance(work.request.prompt, ChatPrompt)
        assert work.request.sampling.temperature == 0.0
        assert work.request.gateway_id == "g1"
        assert work.claimed.epoch == 1
        assert 0 < work.claimed.budget_s <= 600
        assert {hint.deployment for hint in it.demands} <= {"m"}, "a hint unless it was claimed first"
        await settled(it)


async def test_a_stream(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker()
        async with it.post("/v1/chat/completions", chat_body(stream=True)) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            assert response.headers["x-hearth-request-id"]
            found = [line async for line in lines(response)]
        assert found[-1] == "data: [DONE]"
        assert text_of(found) == FIVE
        assert events(found)[-1]["choices"][0]["finish_reason"] == "stop"
        found = await it.stream(
            stream_options={"include_usage": True}, hearth={"ledger": True}, max_completion_tokens=2
        )
        assert text_of(found) == "the sun "
        last = events(found)[-1]
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == 9
        assert last["hearth"]["read_s"] == 0.125
        await settled(it)


async def test_the_ledger_by_header_and_the_clients_own_ids(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        worker = await it.worker()
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        headers = {"x-hearth-ledger": "1", "x-request-id": "mine-1", "traceparent": trace}
        async with it.post("/v1/chat/completions", chat_body(), headers=headers) as response:
            body = await response.json()
            assert response.headers["x-request-id"] == "mine-1"
        assert body["hearth"]["tier"] == "ssd"
        assert worker.works[0].request.traceparent == trace
        headers = {"x-request-id": "not an id!", "traceparent": "nonsense"}
        async with it.post("/v1/chat/completions", chat_body(), headers=headers) as response:
            assert response.headers["x-request-id"] == response.headers["x-hearth-request-id"]
        assert worker.works[1].request.traceparent is None


async def test_choices_and_prompts_are_requests_of_their_own(nats_url: str, redis_url: str, prefix: str) -> None:
    async def own_seed(worker: FakeWorker, work: Work) -> None:
        worker.frame(work, 0, f"{work.request.prompt.text}:{work.request.sampling.seed};")  # type: ignore[union-attr]
        worker.end(work, 1)

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker(own_seed)
        body = {"model": "m", "prompt": ["a", "b"], "n": 2, "seed": 5}
        async with it.post("/v1/completions", body) as response:
            first = [choice["text"] for choice in (await response.json())["choices"]]
        assert first[0] == "a:5;"
        assert first[2] == "b:5;"
        assert first[1].startswith("a:")
        assert first[1] != "a:5;"
        async with it.post("/v1/completions", {**body, "stream": True}) as response:
            streamed = [line async for line in lines(response)]
        texts = ["", "", "", ""]
        for event in events(streamed):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == first
        assert streamed.count("data: [DONE]") == 1
        await settled(it)


async def test_the_official_client(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.deploy("org/other:1.0", checkpoint=msgspec.structs.replace(CHECKPOINT, has_chat_template=False))
        await it.worker()
        async with openai.AsyncOpenAI(base_url=f"{it.url}/v1", api_key="none", max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == ["m", "org/other:1.0"]
            assert (await client.models.retrieve("org/other:1.0")).id == "org/other:1.0"
            chat = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hi"}], n=2, stop=["x"], user="me"
            )
            assert [choice.message.content for choice in chat.choices] == [FIVE, FIVE]
            assert chat.usage is not None
            assert chat.usage.prompt_tokens == 7
            text = ""
            stream = await client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                stream_options={"include_usage": True},
            )
            usage = None
            async for chunk in stream:
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                usage = chunk.usage or usage
            assert text == FIVE
            assert usage is not None
            assert usage.completion_tokens == 5
            completion = await client.completions.create(model="m", prompt="once", max_tokens=3)
            assert completion.choices[0].text == "the sun is "
            with pytest.raises(openai.NotFoundError) as unknown:
                await client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}])
            assert unknown.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as bad:
                await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "hi"}], temperature=9
                )
            assert bad.value.param == "temperature"
            with pytest.raises(openai.BadRequestError, match="chat template"):
                await client.chat.completions.create(
                    model="org/other:1.0", messages=[{"role": "user", "content": "hi"}]
                )
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("nobody")


async def test_a_deployment_that_is_imported_accepts_requests(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy(checkpoint=None)
        waiting = it.tasks.create_task(it.chat())
        await until(lambda: it.demands)
        await it.worker()
        status, body, _ = await waiting
        assert status == 200
        assert body["choices"][0]["message"]["content"] == FIVE


async def test_a_cold_start_streams_comments_until_tokens_come(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix, hold_headers_s=0.1) as it:
        slug = await it.deploy()
        async with it.post("/v1/chat/completions", chat_body(stream=True)) as response:
            assert response.status == 200, "the stream is open although nobody can answer yet"
            found = lines(response)
            assert await anext(found) == ": waiting"
            assert [(hint.deployment, hint.gateway_id, hint.waiting) for hint in it.demands] == [("m", "g1", 1)]
            progress = Progress(phase="reading", done_bytes=41, total_bytes=100, eta_s=3.1)
            message = LoadProgress(deployment=slug, server_id="s", progress=progress)
            it.bus.publish(LOAD_PROGRESS, message, slug=slug)
            assert await anext(found) == ": loading 41 % eta 3.1 s"
            await it.worker()
            rest = [line async for line in found]
        assert text_of(rest) == FIVE
        assert rest[-1] == "data: [DONE]"


async def test_a_stream_that_waits_is_kept_alive(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "KEEP_ALIVE_S", 0.05)
    async with cluster(nats_url, redis_url, prefix, hold_headers_s=0.01) as it:
        slug = await it.deploy()
        async with it.post("/v1/chat/completions", chat_body(stream=True)) as response:
            found = lines(response)
            assert [await anext(found) for _ in range(3)] == [": waiting"] * 3
            progress = Progress(phase="importing", done_bytes=6, total_bytes=100, eta_s=3.1)
            it.bus.publish(LOAD_PROGRESS, LoadProgress(deployment=slug, server_id="s", progress=progress), slug=slug)
            while (line := await anext(found)) != ": importing 6 % eta 3.1 s":
                assert line == ": waiting"
            assert [await anext(found) for _ in range(2)] == [": importing 6 %"] * 2, "it is no further"
        await settled(it)


async def test_an_early_failure_has_its_own_status_even_in_a_stream(nats_url: str, redis_url: str, prefix: str) -> None:
    async def too_long(worker: FakeWorker, work: Work) -> None:
        worker.end(work, 0, failure=Failure(code=Code.PROMPT_TOO_LONG, message="Too long by far.", param="messages"))

    async with cluster(nats_url, redis_url, prefix, hold_headers_s=5.0) as it:
        await it.deploy()
        await it.worker(too_long)
        for stream in (False, True):
            async with it.post("/v1/chat/completions", chat_body(stream=stream, n=2)) as response:
                assert response.status == 400
                error = (await response.json())["error"]
                assert response.headers["x-hearth-request-id"]
            assert error["code"] == "context_length_exceeded"
            assert error["message"] == "Too long by far."
        await settled(it)


async def test_a_late_failure_is_in_band_and_nothing_follows(nats_url: str, redis_url: str, prefix: str) -> None:
    broken = asyncio.Event()

    async def breaks(worker: FakeWorker, work: Work) -> None:
        worker.frame(work, 0, "the ")
        await broken.wait()
        worker.end(work, 1, failure=Failure(code=Code.OUT_OF_MEMORY, message="No memory."))

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker(breaks)
        async with it.post("/v1/chat/completions", chat_body(stream=True)) as response:
            found = lines(response)
            assert text_of([await anext(found)]) == "the "
            broken.set()
            (last,) = [line async for line in found]
        assert json.loads(last[6:])["error"]["code"] == "out_of_memory"
        status, body, headers = await it.chat()
        assert status == 503
        assert body["error"]["type"] == "server_error"
        assert headers["Retry-After"] == "1"


async def test_a_client_that_leaves_the_queue_leaves_nothing_there(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix, hold_headers_s=0.01) as it:
        await it.deploy()
        for stream in (True, False):
            waiting = it.tasks.create_task(it.http.post(it.url + "/v1/chat/completions", json=chat_body(stream=stream)))
            await until(lambda: _count(it, 1))
            if stream:
                (await waiting).close()
            else:
                waiting.cancel()
            await settled(it)


async def _count(it: Cluster, count: int) -> bool:
    return await it.outstanding() == count


async def test_a_client_that_leaves_stops_the_worker(nats_url: str, redis_url: str, prefix: str) -> None:
    async def one_word(worker: FakeWorker, work: Work) -> None:
        worker.frame(work, 0, "the ")

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        worker = await it.worker(one_word)
        async with it.post("/v1/chat/completions", chat_body(stream=True)) as response:
            assert await anext(lines(response))
        async with asyncio.timeout(60):
            cancel = await worker.cancels.get()
        assert (cancel.request_id, cancel.epoch, cancel.requeue) == (worker.works[0].request.request_id, 1, False)
        waiting = it.tasks.create_task(it.chat())
        await until(lambda: len(worker.works) == 2)
        waiting.cancel()
        async with asyncio.timeout(60):
            cancel = await worker.cancels.get()
        assert cancel.request_id == worker.works[1].request.request_id


async def test_a_dead_workers_request_is_resumed_by_another(nats_url: str, redis_url: str, prefix: str) -> None:
    async def dies(worker: FakeWorker, work: Work) -> None:
        worker.frame(work, 0, "the ")
        worker.frame(work, 1, "sun ")
        assert worker.puller is not None
        await worker.puller.close()

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        first = await it.worker(dies, slots=1)
        waiting = it.tasks.create_task(it.stream(hearth={"ledger": True}))
        await until(lambda: first.works)
        second = await it.worker(name="w2")
        found = await waiting  # the queue's ack_wait is one second here
        assert text_of(found) == FIVE
        assert second.works[0].claimed.epoch == 2
        assert second.works[0].claimed.token_ids == (0, 1)
        assert second.works[0].delivery.delivery == 2
        assert events(found)[-1]["hearth"]["recoveries"] == 1
        first.frame(first.works[0], 2, "never seen")
        await settled(it)


async def test_a_gap_is_asked_back_and_resumed(nats_url: str, redis_url: str, prefix: str) -> None:
    async def loses_one(worker: FakeWorker, work: Work) -> None:
        if work.claimed.epoch > 1:
            await answer(worker, work)
            return
        worker.frame(work, 0, "the ")
        worker.frame(work, 2, "is ")
        cancel = await worker.cancels.get()
        assert cancel.requeue
        worker.bus.nak(work.delivery.token)

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        worker = await it.worker(loses_one)
        status, body, _ = await it.chat()
        assert status == 200
        assert body["choices"][0]["message"]["content"] == FIVE
        assert worker.works[1].claimed.token_ids == (0,)
        await settled(it)


async def test_an_end_after_a_gap_is_answered_all_the_same(nats_url: str, redis_url: str, prefix: str) -> None:
    async def loses_the_last(worker: FakeWorker, work: Work) -> None:
        if work.claimed.epoch > 1:
            await answer(worker, work)
            return
        worker.frame(work, 0, "the ")
        worker.end(work, 5)

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker(loses_the_last)
        assert text_of(await it.stream()) == FIVE
        await settled(it)


async def test_a_full_queue_is_a_429_and_leaves_nothing_behind(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix, hold_headers_s=5.0) as it:
        await it.deploy(queue_limit=3)
        waiting = it.tasks.create_task(it.chat(n=2))
        await until(lambda: _count(it, 2))
        for stream in (False, True):
            status, body, headers = await it.chat(n=2, stream=stream)
            assert status == 429
            assert int(headers["Retry-After"]) >= 1
            assert body["error"]["code"] == "queue_full"
        await until(lambda: _count(it, 2))
        await it.worker()
        assert (await waiting)[0] == 200
        await settled(it)


async def test_the_streams_own_limit_is_a_429_too(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.bus.ensure_stream(limit=3, file_storage=False)
        await it.deploy()
        waiting = it.tasks.create_task(it.chat(n=2))
        await until(lambda: _count(it, 2))
        status, body, _ = await it.chat(n=2)
        assert (status, body["error"]["code"]) == (429, "queue_full")
        await until(lambda: _count(it, 2))
        await it.worker()
        assert (await waiting)[0] == 200


async def test_what_a_template_says_about_messages_is_for_the_client_and_not_for_the_log(
    nats_url: str, redis_url: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuses(worker: FakeWorker, work: Work) -> None:
        worker.end(work, 0, failure=Failure(code=Code.INVALID_REQUEST, message="It refuses 'my secret'."))

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker(refuses)
        status, body, _ = await it.chat()
        assert (status, body["error"]["message"]) == (400, "It refuses 'my secret'.")
    logged = capsys.readouterr().out
    assert "request.ended" in logged
    assert "secret" not in logged


async def test_a_prompt_that_nats_does_not_carry_is_a_413(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        sent = json.dumps(chat_body(messages=[{"role": "user", "content": "x" * (1 << 20)}])).encode()
        headers = {"Content-Type": "application/json"}
        async with it.http.post(it.url + "/v1/chat/completions", data=io.BytesIO(sent), headers=headers) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (413, "too_large")
            assert str(1 << 20) in error["message"], "the limit is named"
            assert response.headers["x-should-retry"] == "false"
        assert await it.outstanding() == 0


async def test_a_spent_budget_is_a_504(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix, request_budget_s=0.4, hold_headers_s=0.05) as it:
        await it.deploy()
        status, body, _ = await it.chat()
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        await settled(it)
        worker = await it.worker(never)
        found = await it.stream()
        assert json.loads(found[-1][6:])["error"]["code"] == "deadline_exceeded"
        async with asyncio.timeout(60):
            assert not (await worker.cancels.get()).requeue


async def test_a_deleted_deployment_ends_who_waits(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        waiting = it.tasks.create_task(it.chat())
        await until(lambda: _count(it, 1))
        await it.registry.delete(DeploymentRecord, "m")
        it.bus.publish(RECORD_CHANGED, RecordChanged(kind="deployment", id="m", deleted=True), kind="deployment")
        status, body, _ = await waiting
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert (await it.chat())[0] == 404
        await settled(it)


@pytest.mark.parametrize(
    ("body", "content_type", "status", "param"),
    [
        (b"{", "application/json", 400, None),
        (b"", "application/json", 400, None),
        (b"[1]", "application/json", 400, None),
        (b'{"model": 1}', "application/json", 400, "model"),
        (b'{"model": "m", "messages": [], "x": 1}', "application/json", 400, "x"),
        (b'{"model": "m", "messages": []}', "application/json", 400, "messages"),
        (b'{"model": "m", "messages": []}', "application/x-www-form-urlencoded", 400, None),
        (b"x" * 3000, "application/json", 413, None),
    ],
)
async def test_bad_bodies(
    nats_url: str, redis_url: str, prefix: str, body: bytes, content_type: str, status: int, param: str | None
) -> None:
    async with (
        cluster(nats_url, redis_url, prefix, max_body_bytes=2000) as it,
        it.http.post(it.url + "/v1/chat/completions", data=body, headers={"Content-Type": content_type}) as response,
    ):
        assert response.status == status
        error = (await response.json())["error"]
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (gzip.compress(b" " * 50_000_000), 413),
        (b"this is not gzip", 400),
        (gzip.compress(json.dumps(chat_body()).encode()), 200),
    ],
)
async def test_compressed_bodies_are_bounded_by_what_is_in_them(
    nats_url: str, redis_url: str, prefix: str, body: bytes, status: int
) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker()
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        async with it.http.post(it.url + "/v1/chat/completions", data=body, headers=headers) as response:
            assert response.status == status
            assert ("error" in await response.json()) == (status != 200)


async def test_our_own_fault_has_openais_form_and_does_not_end_the_gateway(
    nats_url: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker()
        with monkeypatch.context() as patched:
            patched.delattr("services.gateway.rendering.Rendering.whole")
            status, body, _ = await it.chat()
        assert (status, body["error"]["code"]) == (500, "internal")
        assert "Traceback" not in body["error"]["message"]
        assert (await it.chat())[0] == 200


async def test_paths_that_are_none_have_openais_form_too(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        async with it.http.get(it.url + "/v1/nothing") as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "not_found"
        async with it.http.get(it.url + "/v1/completions") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            assert (await response.json())["error"]["type"] == "invalid_request_error"
        async with it.http.get(it.url + "/") as response:
            assert response.status == 200
            assert "/v1/chat/completions" in await response.text()


async def test_keys(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix, api_keys="one, two") as it:
        await it.deploy()
        await it.worker()
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}):
            async with it.post("/v1/chat/completions", chat_body(), headers=headers) as response:
                assert response.status == 401
                assert (await response.json())["error"]["code"] == "invalid_api_key"
        async with it.http.get(it.url + "/v1/admin/cluster") as response:
            assert response.status == 401
        host, port = it.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"401", "a key that is no text is a wrong key"
        writer.close()
        async with it.post("/v1/chat/completions", chat_body(), headers={"Authorization": "Bearer two"}) as response:
            assert response.status == 200
        for path in ("/healthz", "/readyz", "/metrics", "/"):
            async with it.http.get(it.url + path) as response:
                assert response.status == 200


async def test_metrics_count_what_happened(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy(f"m-{prefix}")
        await it.worker(deployment=f"m-{prefix}")
        assert (await it.chat(model=f"m-{prefix}"))[0] == 200
        async with it.http.get(it.url + "/metrics") as response:
            text = await response.text()
        assert f'hearth_gateway_requests_total{{deployment="m-{prefix}",outcome="stop"}} 1.0' in text
        assert "hearth_gateway_open_requests 0.0" in text
        assert "hearth_gateway_ttft_seconds_bucket" in text


async def test_too_many_open_calls(nats_url: str, redis_url: str, prefix: str) -> None:
    async with cluster(nats_url, redis_url, prefix, max_open_requests=1) as it:
        await it.deploy()
        waiting = it.tasks.create_task(it.chat())
        await until(lambda: _count(it, 1))
        status, body, headers = await it.chat()
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert headers["Retry-After"]
        await it.worker()
        assert (await waiting)[0] == 200
        assert (await it.chat())[0] == 200


async def test_a_client_that_does_not_read_is_dropped_and_holds_nobody_up(
    nats_url: str, redis_url: str, prefix: str
) -> None:
    async def pours(worker: FakeWorker, work: Work) -> None:
        if work.request.sampling.max_tokens == 3:
            await answer(worker, work)
            return
        index = 0
        while worker.cancels.empty():
            worker.frame(work, index, "x" * 50_000)
            index += 1
            await asyncio.sleep(0.002)
        worker.bus.ack(work.delivery.token)

    async with cluster(nats_url, redis_url, prefix, stream_buffer_bytes=200_000) as it:
        await it.deploy()
        worker = await it.worker(pours)
        host, port = it.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = json.dumps(chat_body(stream=True)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        await until(lambda: worker.works)
        assert (await it.chat(max_tokens=3))[0] == 200, "others are served meanwhile"
        await until(lambda: not worker.cancels.empty())
        writer.close()
        await settled(it)


async def test_drain_lets_open_streams_finish_and_takes_no_new_ones(nats_url: str, redis_url: str, prefix: str) -> None:
    go_on = asyncio.Event()

    async def waits(worker: FakeWorker, work: Work) -> None:
        worker.frame(work, 0, "the ")
        await go_on.wait()
        worker.frame(work, 1, "sun")
        worker.end(work, 2)

    async with cluster(nats_url, redis_url, prefix, drain_s=10.0) as it:
        await it.deploy()
        await it.worker(waits)
        async with it.post("/v1/chat/completions", chat_body(stream=True)) as response:
            found = lines(response)
            first = await anext(found)
            it.stopping.set()
            await until(lambda: _draining(it))
            async with it.http.get(it.url + "/readyz") as ready:
                assert (ready.status, await ready.text()) == (503, "draining\n")
            async with it.http.get(it.url + "/healthz") as alive:
                assert alive.status == 200
            status, body, headers = await it.chat()
            assert (status, body["error"]["code"]) == (503, "draining")
            assert headers["Retry-After"]
            go_on.set()
            rest = [line async for line in found]
        assert text_of([first, *rest]) == "the sun"
        assert rest[-1] == "data: [DONE]"
        await asyncio.wait([it.gateway], timeout=10)
        assert it.gateway.done()
        assert await it.registry.get(GatewayRecord, "g1") is None


async def _draining(it: Cluster) -> bool:
    record = await it.registry.get(GatewayRecord, "g1")
    return record is not None and record.phase is Phase.DRAINING


async def test_what_does_not_finish_in_the_drain_is_told_so(nats_url: str, redis_url: str, prefix: str) -> None:
    async def one_word(worker: FakeWorker, work: Work) -> None:
        worker.frame(work, 0, "the ")

    async with cluster(nats_url, redis_url, prefix, drain_s=0.2) as it:
        await it.deploy()
        worker = await it.worker(one_word)
        async with it.post("/v1/chat/completions", chat_body(stream=True)) as response:
            found = lines(response)
            await anext(found)
            it.stopping.set()
            rest = [line async for line in found]
        assert json.loads(rest[-1][6:])["error"]["code"] == "draining"
        assert not (await worker.cancels.get()).requeue


async def test_frames_of_a_step_come_together_and_out_of_turn_batches_are_no_harm(
    nats_url: str, redis_url: str, prefix: str
) -> None:
    """One batch may carry frames and the end; a batch about nobody known is ignored."""

    async def in_one_batch(worker: FakeWorker, work: Work) -> None:
        who: dict[str, Any] = {"request_id": work.request.request_id, "epoch": work.epoch}
        items = (
            Frame(request_id="nobody", epoch=1, index=0, token_ids=(1,), text="?"),
            Frame(**who, index=0, token_ids=(1,), text="a"),
            Frame(**who, index=0, token_ids=(1,), text="a"),
            Frame(**who, index=1, token_ids=(2, 3), text="b"),
            End(**who, index=3, reason=FinishReason.LENGTH, text="c"),
            End(**who, index=3, reason=FinishReason.LENGTH, text="c"),
        )
        worker.bus.publish(FRAMES, FrameBatch(worker_id="w1", items=items), gateway_id=work.request.gateway_id)
        worker.bus.ack(work.delivery.token)

    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker(in_one_batch)
        status, body, _ = await it.chat()
        assert status == 200
        assert body["choices"][0]["message"]["content"] == "abc"
        assert body["choices"][0]["finish_reason"] == "length"
        assert text_of(await it.stream()) == "abc"
