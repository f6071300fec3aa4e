"""The modelled work queue and a real nats-server are told the same; they must hand out the same, in the same order.

Above all what the tokens of older deliveries do, since whoever holds one may acknowledge.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from shared.bus import Bus, Delivery
from shared.contracts.requests import Request, Sampling, TextPrompt
from simulator.kernel import Kernel
from simulator.queue import Delivery as ModelDelivery
from simulator.queue import PullRequest, WorkQueue

ACK_WAIT_S = 2.0
NEVER_S = 60.0  # for scripts in which nothing shall depend on it
STEP_S = 0.15  # between two words, so that each has arrived before the next is said

Seen = tuple[str, str, int]


@dataclass(frozen=True)
class Publish:
    name: str


@dataclass(frozen=True)
class Pull:
    who: str


@dataclass(frozen=True)
class Say:
    """An acknowledgement by the token of a delivery: "ack", "nak" or "progress"."""

    what: str
    name: str
    delivery: int
    delay_s: float = 0.0


@dataclass(frozen=True)
class Delete:
    name: str


@dataclass(frozen=True)
class Wait:
    seconds: float


Word = Publish | Pull | Say | Delete | Wait
PAST_ACK_WAIT = Wait(ACK_WAIT_S + 1.0)
SOON = Wait(2.5)
PATIENT_S = 5.0  # two of them are longer, one is not
SCRIPTS: dict[str, tuple[list[Word], list[Seen]]] = {
    "an-old-nak-hands-it-out-again": (
        [Publish("a"), Pull("w0"), Say("nak", "a", 1), Pull("w1"), Say("nak", "a", 1), Pull("w0")],
        [("w0", "a", 1), ("w1", "a", 2), ("w0", "a", 3)],
    ),
    "an-old-ack-removes-it": (
        [Publish("a"), Pull("w0"), Say("nak", "a", 1), Pull("w1"), Say("ack", "a", 1), Say("nak", "a", 2), Pull("w0")],
        [("w0", "a", 1), ("w1", "a", 2)],
    ),
    "an-old-in-progress-restarts-the-wait": (
        [
            *(Publish("a"), Pull("w0"), Say("nak", "a", 1), Pull("w1"), Pull("w0"), SOON, Say("progress", "a", 1)),
            *(SOON, Say("progress", "a", 1), Publish("b")),
        ],
        [("w0", "a", 1), ("w1", "a", 2), ("w0", "b", 1)],
    ),
    "in-progress-does-not-stop-a-redelivery-that-is-due": (
        [Publish("a"), Pull("w0"), PAST_ACK_WAIT, Say("progress", "a", 1), Pull("w1")],
        [("w0", "a", 1), ("w1", "a", 2)],
    ),
    "an-ack-stops-a-redelivery-that-is-due": (
        [Publish("a"), Pull("w0"), PAST_ACK_WAIT, Say("ack", "a", 1), Pull("w1"), Wait(0.3)],
        [("w0", "a", 1)],
    ),
    "a-nak-with-a-delay-takes-it-out-of-the-line": (
        [
            *(Publish("a"), Pull("w0"), PAST_ACK_WAIT, Say("nak", "a", 1, 1.5), Pull("w1"), Publish("b"), Pull("w2")),
            Wait(2.0),
        ],
        [("w0", "a", 1), ("w1", "b", 1), ("w2", "a", 2)],
    ),
    "what-is-deleted-is-gone": (
        [Publish("a"), Pull("w0"), Delete("a"), Say("nak", "a", 1), Pull("w1"), Wait(0.3)],
        [("w0", "a", 1)],
    ),
    "redeliveries-go-first": (
        [Publish("a"), Publish("b"), Pull("w0"), Say("nak", "a", 1), Pull("w1"), Pull("w2")],
        [("w0", "a", 1), ("w1", "a", 2), ("w2", "b", 1)],
    ),
    "the-second-nak-in-a-row-changes-nothing": (
        [Publish("a"), Pull("w0"), Say("nak", "a", 1), Say("nak", "a", 1), Pull("w1"), Pull("w2"), Wait(0.3)],
        [("w0", "a", 1), ("w1", "a", 2)],
    ),
}


def request(name: str) -> Request:
    return Request(
        request_id=name,
        gateway_id="g0",
        deployment="demo",
        prompt=TextPrompt(text="a"),
        sampling=Sampling(),
        budget_s=60.0,
    )


def ack_wait_s(script: list[Word]) -> float:
    if SOON in script:
        return PATIENT_S
    return ACK_WAIT_S if PAST_ACK_WAIT in script else NEVER_S


def in_the_model(script: list[Word]) -> list[Seen]:
    kernel = Kernel()
    queue = WorkQueue(kernel, ack_wait_s=ack_wait_s(script))
    seen, tokens, sequences = list[Seen](), dict[tuple[str, int], str](), dict[str, int]()

    def pull(who: str) -> None:
        def deliver(delivery: ModelDelivery) -> None:
            name = delivery.request.request_id
            seen.append((who, name, delivery.delivery))
            tokens[name, delivery.delivery] = delivery.token

        one = PullRequest(wanted=1, deliver=deliver, expired=lambda left: None, is_open=lambda: True)
        queue.pull("demo", one, expires_s=100.0)

    for word in script:
        match word:
            case Publish(name=name):
                sequence = queue.publish("demo", request(name))
                assert isinstance(sequence, int)
                sequences[name] = sequence
            case Pull(who=who):
                pull(who)
            case Say(what=what, name=name, delivery=delivery, delay_s=delay_s):
                token = tokens[name, delivery]
                if what == "ack":
                    queue.ack(token)
                elif what == "nak":
                    queue.nak(token, delay_s)
                else:
                    queue.in_progress(token)
            case Delete(name=name):
                queue.delete(sequences[name])
            case Wait(seconds=seconds):
                kernel.run(kernel.now + seconds)
        kernel.run(kernel.now + STEP_S)
    return seen


async def in_nats(bus: Bus, slug: str, script: list[Word]) -> list[Seen]:
    seen, tokens, sequences = list[Seen](), dict[tuple[str, int], str](), dict[str, int]()
    await bus.ensure_queue(slug, ack_wait_s=ack_wait_s(script))

    def arrived(who: str, delivery: Delivery) -> None:
        name = delivery.request.request_id
        seen.append((who, name, delivery.delivery))
        tokens[name, delivery.delivery] = delivery.token

    for word in script:
        match word:
            case Publish(name=name):
                sequences[name] = await bus.enqueue(slug, request(name))
            case Pull(who=who):
                puller = await bus.pull(slug, lambda delivery, who=who: arrived(who, delivery))  # type: ignore[misc]
                puller.want(1)
            case Say(what=what, name=name, delivery=delivery, delay_s=delay_s):
                token = tokens[name, delivery]
                if what == "ack":
                    bus.ack(token)
                elif what == "nak":
                    bus.nak(token, delay_s)
                else:
                    bus.in_progress(token)
            case Delete(name=name):
                await bus.unqueue(sequences[name])
            case Wait(seconds=seconds):
                await asyncio.sleep(seconds)
        await bus.flush()
        await asyncio.sleep(STEP_S)
    return seen


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_model_hands_out_what_is_expected(name: str) -> None:
    script, right = SCRIPTS[name]
    assert in_the_model(script) == right


async def test_nats_hands_out_the_same(bus: Bus) -> None:
    await bus.ensure_stream(file_storage=False)
    async with asyncio.TaskGroup() as tasks:
        running = {name: tasks.create_task(in_nats(bus, name, script)) for name, (script, _) in SCRIPTS.items()}
    right = {name: seen for name, (_, seen) in SCRIPTS.items()}
    assert {name: task.result() for name, task in running.items()} == right
