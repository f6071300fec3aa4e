"""The modelled bus: what it promises of NATS, and that the weather decides the rest."""

from __future__ import annotations

import random
from collections.abc import Sequence

from shared.contracts.requests import Cancel, Check, Running
from shared.errors import Code, Failure
from shared.subjects import CANCEL, CHECK
from simulator.kernel import Call, Kernel
from simulator.network import Connection, Fair, Network, Packet, Reply, Rough, Weather


class Sky:
    """The delays that a test says, one packet after the other; then fair weather."""

    def __init__(self, *plan: tuple[float, ...]) -> None:
        self._plan = list(plan)

    def delays_s(self, packet: Packet) -> Sequence[float]:
        return self._plan.pop(0) if self._plan else (0.001,)


class World:
    """A kernel, a network, and what the workers w0 and w1 heard."""

    def __init__(self, weather: Weather | None = None) -> None:
        self.kernel = Kernel()
        self.network = Network(self.kernel, weather or Fair())
        self.heard: list[tuple[str, str]] = []
        self.answers: list[tuple[Running | Failure, bool]] = []
        self.g0 = self.connect("g0")
        self.w0 = self.listen("w0")
        self.w1 = self.listen("w1")

    def connect(self, name: str) -> Connection:
        return self.network.connect(name, lambda call: call())

    def listen(self, worker_id: str) -> Connection:
        connection = self.connect(worker_id)
        connection.subscribe(CANCEL, lambda message: self.hear(worker_id, message), worker_id=worker_id)
        return connection

    def hear(self, worker_id: str, message: Cancel) -> None:
        self.heard.append((worker_id, message.request_id))

    def say(self, request_id: str, *, to: str = "w0", by: Connection | None = None) -> None:
        (by or self.g0).publish(CANCEL, Cancel(request_id=request_id, epoch=1), worker_id=to)

    def serve(self, connection: Connection, *, after_s: float = 0.0) -> None:
        def asked(message: Check, reply: Reply[Running]) -> None:
            self.kernel.after(after_s, lambda: reply(Running()))

        connection.serve(CHECK, asked, worker_id=connection.name)

    def ask(self, worker_id: str = "w0") -> None:
        self.g0.call(
            CHECK,
            Check(requests=()),
            lambda answer, unserved: self.answers.append((answer, unserved)),
            worker_id=worker_id,
        )


def test_a_message_reaches_who_subscribed_and_nobody_else() -> None:
    world = World()
    world.say("a")
    world.say("b", to="w1")
    world.say("c", to="w2")
    world.kernel.run(1.0)
    assert world.heard == [("w0", "a"), ("w1", "b")]


def test_who_listens_to_all_hears_everybody() -> None:
    world = World()
    tap = world.connect("tap")
    tap.subscribe(CANCEL, lambda message: world.hear("tap", message), worker_id="*")
    world.say("a")
    world.say("b", to="w9")
    world.kernel.run(1.0)
    assert world.heard == [("w0", "a"), ("tap", "a"), ("tap", "b")]


def test_the_order_between_two_connections_is_kept_even_if_one_message_is_late() -> None:
    world = World(Sky((0.5,), (0.001,)))
    world.say("first")
    world.say("second")
    world.kernel.run(0.4)
    assert world.heard == []
    world.kernel.run(1.0)
    assert [request_id for _, request_id in world.heard] == ["first", "second"]


def test_other_senders_overtake_who_is_late() -> None:
    world = World(Sky((0.5,), (0.001,)))
    world.say("late")
    world.say("quick", by=world.w1)
    world.kernel.run(1.0)
    assert [request_id for _, request_id in world.heard] == ["quick", "late"]


def test_messages_get_lost_and_doubled() -> None:
    world = World(Sky((), (0.001, 0.2)))
    world.say("lost")
    world.say("doubled")
    world.say("behind")
    world.kernel.run(1.0)
    assert [request_id for _, request_id in world.heard] == ["doubled", "behind", "doubled"]


def test_a_call_is_answered() -> None:
    world = World()
    world.serve(world.w0)
    world.ask()
    world.kernel.run(10.0)
    assert world.answers == [(Running(), False)]


def test_a_call_that_nobody_serves_is_told_so_at_once() -> None:
    world = World()
    world.ask("w7")
    world.kernel.run(0.1)
    ((answer, unserved),) = world.answers
    assert isinstance(answer, Failure) and answer.code is Code.UNAVAILABLE
    assert unserved


def test_a_call_whose_answer_is_late_fails_and_the_answer_is_dropped() -> None:
    world = World()
    world.serve(world.w0, after_s=CHECK.timeout_s + 1)
    world.ask()
    world.kernel.run(CHECK.timeout_s + 0.1)
    ((answer, unserved),) = world.answers
    assert isinstance(answer, Failure) and not unserved
    world.kernel.run(10.0)
    assert len(world.answers) == 1


def test_of_a_doubled_call_the_first_answer_counts() -> None:
    world = World(Sky((0.001, 0.3)))
    world.serve(world.w0)
    world.ask()
    world.kernel.run(10.0)
    assert world.answers == [(Running(), False)]


def test_who_has_closed_hears_nothing_and_serves_nothing() -> None:
    world = World()
    world.serve(world.w0)
    world.say("on its way")
    world.w0.close()
    world.say("too late")
    world.ask()
    world.kernel.run(10.0)
    assert world.heard == []
    assert [unserved for _, unserved in world.answers] == [True]


def test_a_cut_that_holds_packets_back_delivers_them_in_the_end_in_order() -> None:
    world = World()
    world.network.cut("w0", held=True)
    world.say("a")
    world.say("b")
    world.kernel.run(1.0)
    assert world.heard == []
    world.network.mend("w0")
    world.kernel.run(1.1)
    assert world.heard == [("w0", "a"), ("w0", "b")]


def test_a_cut_that_loses_packets_loses_those_on_their_way_and_questions_go_unanswered() -> None:
    world = World()
    world.serve(world.w0)
    world.say("on its way")
    world.network.cut("w0", held=False)
    world.say("during")
    world.ask()
    world.kernel.run(5.0)
    world.network.mend("w0")
    world.say("after")
    world.kernel.run(6.0)
    assert world.heard == [("w0", "after")]
    assert [unserved for _, unserved in world.answers] == [False], "as far as the others see it is there"


def test_a_process_that_takes_nothing_in_hears_everything_later() -> None:
    kernel = Kernel()
    network = Network(kernel, Fair())
    inbox, heard = list[Call](), list[str]()
    sleeper = network.connect("w0", inbox.append)
    sleeper.subscribe(CANCEL, lambda message: heard.append(message.request_id), worker_id="w0")
    network.connect("g0", lambda call: call()).publish(CANCEL, Cancel(request_id="a", epoch=1), worker_id="w0")
    kernel.run(1.0)
    assert heard == []
    for call in inbox:
        call()
    assert heard == ["a"]


def test_rough_weather_is_as_rough_as_it_says_and_calms_down() -> None:
    sky = Rough(random.Random(1), lost=0.2, doubled=0.3, late=0.1, late_s=5.0)
    packet = Packet("a", "b", "Cancel", None)
    fates = [sky.delays_s(packet) for _ in range(4000)]
    lost, doubled = sum(fate == () for fate in fates), sum(len(fate) == 2 for fate in fates)
    late = sum(len(fate) == 1 and fate[0] > 0.01 for fate in fates)
    assert 700 < lost < 900
    assert 1100 < doubled < 1300
    assert 350 < late < 450
    sky.calm()
    assert all(len(sky.delays_s(packet)) == 1 for _ in range(200))
