"""The bus against a real nats-server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import msgspec
import pytest

from shared.bus import Bus, Delivery, Reply, Unserved
from shared.contracts.requests import Claim, Claimed, Demand, Gone, Request, Sampling, TextPrompt
from shared.errors import Code, Failure, HearthError
from shared.subjects import CLAIM, DEMAND, SubjectError
from tests.builders.proxy import Proxy
from tests.builders.servers import start_nats


def a_request(number: int = 0) -> Request:
    return Request(
        request_id=f"r{number}",
        gateway_id="g",
        deployment="m",
        prompt=TextPrompt(text="hi"),
        sampling=Sampling(),
        budget_s=60,
    )


def a_claim() -> Claim:
    return Claim(request_id="r0", worker_id="w", replica_id="p")


async def a_queue(bus: Bus, slug: str = "m", limit: int = 100, ack_wait_s: float = 5.0) -> None:
    await bus.ensure_stream(limit=limit, file_storage=False)
    await bus.ensure_queue(slug, ack_wait_s=ack_wait_s)


async def test_topics_arrive_in_order(bus: Bus) -> None:
    seen: list[str] = []
    await bus.subscribe(DEMAND, lambda message: seen.append(message.deployment))
    await bus.flush()
    for number in range(100):
        bus.publish(DEMAND, Demand(deployment=str(number)))
    await bus.flush()
    while len(seen) < 100:
        await asyncio.sleep(0.01)
    assert seen == [str(number) for number in range(100)]


async def test_after_a_flush_every_subscription_exists_however_slow_the_network_is(
    bus: Bus, nats_url: str, prefix: str
) -> None:
    def answer(claim: Claim, reply: Reply[Claimed | Gone]) -> None:
        reply(Claimed(epoch=3, budget_s=1.0, waited_s=0.5))

    port = nats_url.rpartition(":")[2]
    with contextlib.closing(Proxy(("127.0.0.1", int(port)), lag_s=0.1)) as slow:
        async with Bus.connect(f"nats://127.0.0.1:{slow.port}", name="slow", prefix=prefix) as far:
            for number in range(3):
                await far.serve(CLAIM, answer, gateway_id=f"g{number}")
                await far.flush()
                answered = await bus.call(CLAIM, a_claim(), gateway_id=f"g{number}")
                assert isinstance(answered, Claimed)


async def test_a_flush_that_nobody_confirms_says_so(nats_url: str) -> None:
    port = nats_url.rpartition(":")[2]
    with contextlib.closing(Proxy(("127.0.0.1", int(port)))) as cut:
        async with Bus.connect(f"nats://127.0.0.1:{cut.port}", name="cut") as bus:
            cut.silence()
            with pytest.raises(HearthError) as refused:
                await bus.flush(within_s=1.5)
            assert refused.value.failure.code is Code.UNAVAILABLE
            cut.resume()
            await bus.flush()


async def test_a_call_is_answered_by_its_type(bus: Bus) -> None:
    def answer(claim: Claim, reply: Reply[Claimed | Gone]) -> None:
        reply(Claimed(epoch=3, budget_s=1.0, waited_s=0.5, token_ids=(1, 2)))

    await bus.serve(CLAIM, answer, gateway_id="g")
    await bus.flush()
    answered = await bus.call(CLAIM, a_claim(), gateway_id="g")
    assert answered == Claimed(epoch=3, budget_s=1.0, waited_s=0.5, token_ids=(1, 2))


async def test_a_failure_is_raised_at_the_caller(bus: Bus) -> None:
    def answer(claim: Claim, reply: Reply[Claimed | Gone]) -> None:
        reply(Failure(code=Code.BUSY, message="not now"))

    await bus.serve(CLAIM, answer, gateway_id="g")
    await bus.flush()
    with pytest.raises(HearthError) as caught:
        await bus.call(CLAIM, a_claim(), gateway_id="g")
    assert caught.value.failure == Failure(code=Code.BUSY, message="not now")


async def test_nobody_there_is_told_at_once(bus: Bus) -> None:
    with pytest.raises(HearthError) as caught:
        await bus.call(CLAIM, a_claim(), gateway_id="nobody")
    assert caught.value.failure.code is Code.UNAVAILABLE
    assert isinstance(caught.value, Unserved)


async def test_what_is_larger_than_a_message_may_be_is_said_at_once(bus: Bus) -> None:
    def answer(claim: Claim, reply: Reply[Claimed | Gone]) -> None:
        reply(Claimed(epoch=1, budget_s=1.0, waited_s=0.0, token_ids=tuple(range(bus.client.max_payload // 4))))

    await bus.serve(CLAIM, answer, gateway_id="g")
    await bus.flush()
    large = msgspec.structs.replace(a_claim(), claim_id="x" * bus.client.max_payload)
    for claim, what in ((large, "The call is larger"), (a_claim(), "The answer is larger")):
        with pytest.raises(HearthError, match=what) as caught:
            await bus.call(CLAIM, claim, gateway_id="g")
        assert caught.value.failure.code is Code.TOO_LARGE


async def test_a_crashing_handler_answers_internal_and_the_service_lives(bus: Bus) -> None:
    calls = 0

    def answer(claim: Claim, reply: Reply[Claimed | Gone]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyError("boom")
        reply(Gone(reason="second"))

    await bus.serve(CLAIM, answer, gateway_id="g")
    await bus.flush()
    with pytest.raises(HearthError) as caught:
        await bus.call(CLAIM, a_claim(), gateway_id="g")
    assert caught.value.failure.code is Code.INTERNAL
    assert await bus.call(CLAIM, a_claim(), gateway_id="g") == Gone(reason="second")


async def test_malformed_bytes_are_refused_with_their_path(bus: Bus) -> None:
    seen: list[Claim] = []
    await bus.serve(CLAIM, lambda claim, reply: seen.append(claim), gateway_id="g")
    await bus.flush()
    subject = f"{bus.prefix}.{CLAIM.subject(gateway_id='g')}"
    msg = await bus.client.request(subject, b"\xc1\x00", timeout=30)
    assert b"invalid_request" in msg.data
    assert seen == []


def test_ids_cannot_leave_their_place_in_a_subject() -> None:
    for bad in ("a.b", "a>", "", "a b"):
        with pytest.raises(SubjectError):
            CLAIM.subject(gateway_id=bad)


async def test_a_puller_gets_no_more_than_it_wants(bus: Bus) -> None:
    await a_queue(bus)
    for number in range(5):
        await bus.enqueue("m", a_request(number))
    came: list[Delivery] = []
    puller = await bus.pull("m", came.append)
    await asyncio.sleep(0.1)
    assert came == []
    puller.want(2)
    while len(came) < 2:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert [d.request.request_id for d in came] == ["r0", "r1"]
    assert await bus.queue_depths() == {"m": 5}
    for d in came:
        bus.ack(d.token)
    await bus.flush()
    puller.want(1)
    while len(came) < 3:
        await asyncio.sleep(0.01)
    assert (await bus.queue_depths())["m"] == 3
    await puller.close()


async def test_a_request_goes_from_queue_to_waiting_puller_without_polling(bus: Bus) -> None:
    await a_queue(bus)
    came: asyncio.Queue[Delivery] = asyncio.Queue()
    puller = await bus.pull("m", came.put_nowait)
    puller.want(16)
    await bus.flush()
    for number in range(3):
        await bus.enqueue("m", a_request(number))
        delivery = await asyncio.wait_for(came.get(), 2)
        assert delivery.request.request_id == f"r{number}"
        assert delivery.delivery == 1
        assert delivery.age_s < 2
        bus.ack(delivery.token)
    assert puller.open_wants == 13
    await puller.close()


async def test_nak_and_silence_give_a_request_to_another(bus: Bus) -> None:
    await a_queue(bus, ack_wait_s=1.0)
    sequence = await bus.enqueue("m", a_request())
    came: asyncio.Queue[Delivery] = asyncio.Queue()
    puller = await bus.pull("m", came.put_nowait)
    puller.want(3)
    first = await asyncio.wait_for(came.get(), 2)
    bus.nak(first.token)
    second = await asyncio.wait_for(came.get(), 2)
    assert (second.sequence, second.delivery) == (sequence, 2)
    third = await asyncio.wait_for(came.get(), 5)  # ack_wait passes in silence
    assert third.delivery == 3
    bus.ack(third.token)
    await bus.flush()
    await asyncio.sleep(0.05)
    assert await bus.queue_depths() == {}
    await puller.close()


async def test_in_progress_keeps_a_request(bus: Bus) -> None:
    await a_queue(bus, ack_wait_s=1.0)
    await bus.enqueue("m", a_request())
    came: list[Delivery] = []
    puller = await bus.pull("m", came.append)
    puller.want(2)
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        for delivery in came:
            bus.in_progress(delivery.token)
        await asyncio.sleep(0.2)
    assert len(came) == 1
    await puller.close()


async def test_a_closed_puller_loses_nothing(bus: Bus) -> None:
    await a_queue(bus, ack_wait_s=30.0)
    came: list[Delivery] = []
    puller = await bus.pull("m", came.append)
    puller.want(50)
    await bus.flush()
    for number in range(10):
        await bus.enqueue("m", a_request(number))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(puller.close())
        for number in range(10, 20):
            await bus.enqueue("m", a_request(number))
    taken = len(came)
    rest: list[Delivery] = []
    other = await bus.pull("m", rest.append)
    other.want(20)
    while len(rest) + taken < 20:
        await asyncio.sleep(0.01)
    assert sorted(d.request.request_id for d in came + rest) == sorted(f"r{n}" for n in range(20))
    await other.close()


async def test_a_full_queue_is_said_and_unqueue_makes_room(bus: Bus) -> None:
    await a_queue(bus, limit=2)
    first = await bus.enqueue("m", a_request(1))
    await bus.enqueue("m", a_request(2))
    with pytest.raises(HearthError) as caught:
        await bus.enqueue("m", a_request(3))
    assert caught.value.failure.code is Code.QUEUE_FULL
    await bus.unqueue(first)
    await bus.unqueue(first)  # again: fine
    await bus.enqueue("m", a_request(3))


async def test_ensure_and_delete_are_idempotent(bus: Bus) -> None:
    await a_queue(bus)
    await a_queue(bus, limit=7)  # another limit is adopted
    await bus.ensure_queue("m", ack_wait_s=9.0)
    await bus.enqueue("m", a_request())
    await bus.delete_queue("m")
    await bus.delete_queue("m")
    assert await bus.queue_depths() == {}


async def test_a_puller_finds_a_queue_that_is_made_later(bus: Bus) -> None:
    await bus.ensure_stream(file_storage=False)
    came: asyncio.Queue[Delivery] = asyncio.Queue()
    puller = await bus.pull("m", came.put_nowait)
    puller.want(1)
    await asyncio.sleep(0.2)
    await bus.ensure_queue("m", ack_wait_s=5)
    await bus.enqueue("m", a_request())
    assert (await asyncio.wait_for(came.get(), 15)).request.request_id == "r0"
    await puller.close()


async def test_a_connection_that_is_closed_for_good_ends_its_service(nats_url: str, prefix: str) -> None:
    async def serve() -> None:
        async with asyncio.timeout(20), Bus.connect(nats_url, name="test", prefix=prefix) as bus:
            # What the client does after an error of the server that it does not know how to go on from.
            await bus.client._process_err("'Unknown Protocol Operation'")
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as ended:
        await serve()
    (error,) = ended.value.exceptions
    assert isinstance(error, HearthError)
    assert error.failure.code is Code.UNAVAILABLE


async def test_a_lost_connection_is_told(tmp_path: Path) -> None:
    process, url = start_nats(tmp_path)
    lost = asyncio.Event()
    async with asyncio.timeout(30), Bus.connect(url, name="test") as bus:
        bus.on_disconnect(lost.set)
        process.kill()
        process.wait(10)
        await lost.wait()
        assert not bus.connected


async def test_what_a_killed_server_forgot_to_delete_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is killed remembers acknowledgements, not what it deleted for them among other messages."""
    monkeypatch.setattr("shared.bus.SWEEP_S", 0.05)
    monkeypatch.setattr("shared.bus.SWEEP_FOR_S", 0.0)
    process, url = start_nats(tmp_path)
    try:
        async with asyncio.timeout(60), Bus.connect(url, name="test") as bus:
            await bus.ensure_stream(limit=100)
            await bus.ensure_queue("m", ack_wait_s=1.0)
            got: list[Delivery] = []
            puller = await bus.pull("m", got.append)
            for number in range(20):
                await bus.enqueue("m", a_request(number))
            puller.want(20)
            while len(got) < 20:
                await asyncio.sleep(0.01)
            for delivery in got[1:]:
                bus.ack(delivery.token)
            while await bus.queue_depths() != {"m": 1}:
                await asyncio.sleep(0.01)
            forgotten = got[10].sequence
            await asyncio.sleep(1.0)  # the acknowledgements are on its disk
            process.kill()
            process.wait(10)
            process, _ = start_nats(tmp_path, port=int(url.rsplit(":", 1)[1]))
            del got[1:]
            puller.want(1)
            while len(got) < 2:  # the one that was not acknowledged is handed out again, and only that one
                await asyncio.sleep(0.01)
            assert got[1].request == a_request(0)
            bus.ack(got[1].token)
            while await bus.queued(forgotten):  # it is stored, and still it is gone
                await asyncio.sleep(0.01)
            assert await bus.queue_depths() != {}
            monkeypatch.setattr("shared.bus.SWEEP_FOR_S", 1000.0)
            while await bus.queue_depths():
                await asyncio.sleep(0.05)
            await puller.close()
    finally:
        process.kill()
        process.wait(10)


async def test_sweeping_leaves_alone_what_is_handed_out(
    nats_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was handed out comes again when it is not acknowledged, or given back, however often its queue is swept."""
    monkeypatch.setattr("shared.bus.SWEEP_S", 0.0)
    async with asyncio.timeout(60), Bus.connect(nats_url, name="test", prefix=prefix) as bus:
        await bus.ensure_stream(limit=100)
        await bus.ensure_queue("m", ack_wait_s=1.0)
        got: list[Delivery] = []
        puller = await bus.pull("m", got.append)
        puller.want(3)
        for number in range(3):
            await bus.enqueue("m", a_request(number))
        while len(got) < 3:
            await asyncio.sleep(0.01)
        bus.ack(got[0].token)
        while await bus.queue_depths() != {"m": 2}:
            await asyncio.sleep(0.01)
        for _ in range(3):
            await bus.queue_depths()
        bus.nak(got[1].token)
        while await bus.queue_depths() != {"m": 2}:
            await asyncio.sleep(0.01)
        puller.want(2)
        while len(got) < 5:
            await asyncio.sleep(0.01)
        again = got[3:]
        assert {delivery.sequence for delivery in again} == {got[1].sequence, got[2].sequence}
        for delivery in again:
            assert delivery.delivery == 2
            bus.ack(delivery.token)
        while await bus.queue_depths():
            await asyncio.sleep(0.01)
        await puller.close()


async def test_a_flush_outlives_the_connection_on_which_it_began(nats_url: str, prefix: str) -> None:
    port = nats_url.rpartition(":")[2]
    with contextlib.closing(Proxy(("127.0.0.1", int(port)))) as cut:
        async with Bus.connect(f"nats://127.0.0.1:{cut.port}", name="cut", prefix=prefix) as bus:
            lost = asyncio.Event()
            bus.on_disconnect(lost.set)
            cut.silence()
            async with asyncio.TaskGroup() as tasks:
                flushing = tasks.create_task(bus.flush(within_s=60.0))
                await asyncio.sleep(0.1)
                cut.sever()
                await lost.wait()
                assert not flushing.done()
                cut.resume()
