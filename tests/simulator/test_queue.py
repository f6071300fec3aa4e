"""The modelled work queue behaves as JetStream does; `tests/integration` holds it against a real nats-server."""

from __future__ import annotations

from shared.contracts.requests import Request, Sampling, TextPrompt
from shared.errors import Code, Failure
from simulator.kernel import Kernel
from simulator.queue import Delivery, PullRequest, WorkQueue

ACK_WAIT_S = 5.0


def request(request_id: str) -> Request:
    return Request(
        request_id=request_id,
        gateway_id="g0",
        deployment="demo",
        prompt=TextPrompt(text="a"),
        sampling=Sampling(),
        budget_s=60.0,
    )


class World:
    """A queue, and what was delivered to whom."""

    def __init__(self, limit: int = 100) -> None:
        self.kernel = Kernel()
        self.queue = WorkQueue(self.kernel, ack_wait_s=ACK_WAIT_S, limit=limit)
        self.got: list[tuple[str, Delivery]] = []
        self.expired: list[tuple[str, int]] = []
        self.gone: set[str] = set()

    def publish(self, *names: str, slug: str = "demo") -> list[int]:
        sequences = [self.queue.publish(slug, request(name)) for name in names]
        return [sequence for sequence in sequences if isinstance(sequence, int)]

    def pull(self, who: str = "w0", wanted: int = 1, *, slug: str = "demo", expires_s: float = 1000.0) -> None:
        pull = PullRequest(
            wanted=wanted,
            deliver=lambda delivery: self.got.append((who, delivery)),
            expired=lambda left: self.expired.append((who, left)),
            is_open=lambda: who not in self.gone,
        )
        self.queue.pull(slug, pull, expires_s=expires_s)

    def wait(self, seconds: float) -> None:
        self.kernel.run(self.kernel.now + seconds)

    @property
    def seen(self) -> list[tuple[str, str, int]]:
        return [(who, one.request.request_id, one.delivery) for who, one in self.got]


def test_messages_go_to_those_who_wait_in_order_and_count_from_one() -> None:
    world = World()
    world.publish("a")
    world.pull(wanted=2)
    world.publish("b", "c")
    assert world.seen == [("w0", "a", 1), ("w0", "b", 1)]
    world.pull("w1")
    assert world.seen[2:] == [("w1", "c", 1)]


def test_several_who_wait_are_served_in_turns() -> None:
    world = World()
    world.pull("w0", 3)
    world.pull("w1", 3)
    world.publish("a", "b", "c")
    assert [who for who, _ in world.got] == ["w0", "w1", "w0"]


def test_deployments_do_not_mix() -> None:
    world = World()
    world.pull()
    world.publish("a", slug="other")
    assert world.seen == []


def test_the_queue_is_bounded_per_deployment() -> None:
    world = World(limit=2)
    world.publish("a", "b")
    refused = world.queue.publish("demo", request("c"))
    assert isinstance(refused, Failure) and refused.code is Code.QUEUE_FULL
    assert world.publish("d", slug="other")


def test_what_is_not_acknowledged_is_handed_out_again_after_ack_wait() -> None:
    world = World()
    world.publish("a")
    world.pull("w0")
    world.pull("w1", 2)
    world.wait(ACK_WAIT_S - 0.1)
    assert world.seen == [("w0", "a", 1)]
    world.wait(0.2)
    assert world.seen == [("w0", "a", 1), ("w1", "a", 2)]
    world.wait(ACK_WAIT_S)
    assert world.seen[2:] == [("w1", "a", 3)]


def test_an_acknowledged_message_is_gone_for_good() -> None:
    world = World()
    world.publish("a")
    world.pull(wanted=5)
    world.queue.ack(world.got[0][1].token)
    world.wait(100.0)
    assert len(world.got) == 1
    assert world.queue.left == ()


def test_in_progress_restarts_the_wait() -> None:
    world = World()
    world.publish("a")
    world.pull(wanted=5)
    for _ in range(4):
        world.wait(ACK_WAIT_S - 1)
        world.queue.in_progress(world.got[0][1].token)
    assert len(world.got) == 1
    world.wait(ACK_WAIT_S + 0.1)
    assert len(world.got) == 2


def test_a_nak_hands_it_out_at_once_or_after_its_delay_and_before_what_is_new() -> None:
    world = World()
    world.publish("a", "b")
    world.pull()
    world.queue.nak(world.got[0][1].token)
    world.pull("w1")
    assert world.seen[1:] == [("w1", "a", 2)]
    world.queue.nak(world.got[1][1].token, 2.0)
    world.pull("w2", 2)
    assert world.seen[2:] == [("w2", "b", 1)]
    world.wait(2.1)
    assert world.seen[3:] == [("w2", "a", 3)]


def test_a_redelivery_that_nobody_waits_for_is_not_stopped_by_in_progress_but_by_an_acknowledgement() -> None:
    world = World()
    world.publish("a")
    world.pull()
    token = world.got[0][1].token
    world.wait(ACK_WAIT_S + 0.1)
    world.queue.in_progress(token)
    world.pull("w1")
    assert world.seen[1:] == [("w1", "a", 2)]
    world.wait(ACK_WAIT_S + 0.1)
    world.queue.ack(token)
    world.pull("w2")
    assert len(world.seen) == 2


def test_tokens_of_older_deliveries_act_on_the_message() -> None:
    world = World()
    world.publish("a", "b")
    world.pull(wanted=2)
    old_a, old_b = (delivery.token for _, delivery in world.got)
    world.wait(ACK_WAIT_S - 1)
    world.queue.nak(old_a)
    world.queue.nak(old_b)
    world.pull("w1", 2)
    assert world.seen[2:] == [("w1", "a", 2), ("w1", "b", 2)]
    world.queue.nak(old_a)  # it is handed out again though w1 works on it
    world.pull("w2")
    assert world.seen[4:] == [("w2", "a", 3)]
    world.queue.ack(old_b)  # it is gone though w1 works on it
    assert [name for _, name in world.queue.left] == ["a"]


def test_words_about_messages_that_are_gone_or_wait_change_nothing() -> None:
    world = World()
    (first,) = world.publish("a")
    world.pull()
    token = world.got[0][1].token
    world.queue.delete(first)
    world.queue.delete(first)
    world.queue.nak(token)
    world.queue.in_progress(token)
    world.queue.ack(token)
    world.pull("w1")
    world.wait(20.0)
    assert len(world.got) == 1
    assert not world.queue.has(first)


def test_a_pull_expires_and_says_how_many_never_came() -> None:
    world = World()
    world.publish("a")
    world.pull(wanted=3, expires_s=4.0)
    world.wait(4.1)
    world.publish("b")
    assert world.expired == [("w0", 2)]
    assert world.seen == [("w0", "a", 1)]


def test_nothing_is_handed_to_a_closed_connection() -> None:
    world = World()
    world.pull("w0")
    world.pull("w1")
    world.gone.add("w0")
    world.publish("a")
    assert world.seen == [("w1", "a", 1)]
