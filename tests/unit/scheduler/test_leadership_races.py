"""Several schedulers, one registry, and a network and clocks that are as bad as may be: never two leaders at once.

Every scheduler has a clock of its own that began anywhere and runs up to 5 % too fast or too slow. Calls take any time,
are lost on the way there or back, or arrive after their caller has given up and asked anew. The registry stops for
seconds, and comes back empty; schedulers are killed, and stop for seconds.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import pytest

from services.scheduler import leadership as lead
from services.scheduler.leadership import Leadership, LeaseRules

RULES = LeaseRules()
CALL_S = RULES.ttl_s / 2  # a caller gives up after that


class World:
    """Virtual time, the registry, the schedulers."""

    def __init__(self, seed: int, *, loses_data: bool) -> None:
        self.dice = random.Random(seed)
        self.now = 0.0
        self.holder, self.lease_term, self.expires_at, self.highest = "", 0, 0.0, 0
        self.stopped_until = 0.0
        self.loses_data = loses_data
        self.fence = 0  # of a worker that hears every command
        self.obeyed: list[tuple[float, int, str]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.peers = [Peer(self, n) for n in range(3)]

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), what))

    def run(self, seconds: float) -> None:
        self.after(self.dice.uniform(0, 4), self.harm)
        for peer in self.peers:
            self.after(self.dice.uniform(0, 1), peer.wake)
        while self._events[0][0] < seconds:
            self.now, _, what = heapq.heappop(self._events)
            what()
            self.look()

    def look(self) -> None:
        leaders = [peer for peer in self.peers if peer.commands()]
        if not self.loses_data:
            assert len(leaders) <= 1, f"{[peer.name for peer in leaders]} lead at {self.now:.3f}"
        for peer in leaders:
            if peer.machine.term >= self.fence:
                self.fence = peer.machine.term
                self.obeyed.append((self.now, self.fence, peer.name))
            else:
                peer.hear(lead.Heard(self.fence))

    def harm(self) -> None:
        """Something bad happens; and again later."""
        self.after(self.dice.uniform(0.5, 6), self.harm)
        victim = self.dice.choice(self.peers)
        match self.dice.randrange(4):
            case 0:
                self.stopped_until = self.now + self.dice.uniform(0.1, 6)
                if self.loses_data:
                    self.holder, self.highest = "", 0
            case 1:
                victim.stopped_until = self.now + self.dice.uniform(0.1, 4)
            case 2:
                victim.begin(self.dice.uniform(0.5, 3))
            case 3:
                victim.deaf_until = self.now + self.dice.uniform(0.1, 4)

    # -- the registry, as its scripts have it

    def serve(self, peer: Peer, action: lead.Action) -> lead.Event:
        if self.now >= self.expires_at:
            self.holder = ""
        match action:
            case lead.Acquire():
                if self.holder not in ("", peer.name):
                    return lead.Taken(self.lease_term, self.expires_at - self.now)
                forgotten = lead.FORGOTTEN if self.highest == 0 and action.at_least else 0
                self.highest = max(self.highest, action.at_least) + forgotten + 1
                self.holder, self.lease_term, self.expires_at = peer.name, self.highest, self.now + RULES.ttl_s
                return lead.Won(self.highest, action.asked_at)
            case lead.Renew():
                if (self.holder, self.lease_term) != (peer.name, action.term):
                    return lead.Lost(action.term)
                self.expires_at = self.now + RULES.ttl_s
                return lead.Kept(action.term, action.asked_at)
            case _:
                raise AssertionError(action)


class Peer:
    """A scheduler in its process."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number, self.life = world, number, 0
        self.stopped_until = self.deaf_until = 0.0
        self.begin(0.0)

    def begin(self, after_s: float) -> None:
        """It is killed, and started again after a while."""
        self.life += 1
        self.name = f"s{self.number}-{self.life}"
        self.machine = Leadership(RULES)
        self.stopped_until = self.world.now + after_s
        self.rate = self.world.dice.uniform(0.95, 1.05)
        self.offset = self.world.dice.uniform(-1e6, 1e6)
        if self.life > 1:
            self.world.after(after_s, self.wake)

    def clock(self) -> float:
        return self.offset + self.rate * self.world.now

    def commands(self) -> bool:
        return self.world.now >= self.stopped_until and self.machine.may_command(self.clock())

    def hear(self, event: lead.Event | None) -> None:
        now = self.clock()
        due = self.machine.deadline()
        if event is not None and due is not None and due <= now:  # as the driver has it: a due timer goes first
            self._carry_out(self.machine.handle(None, now))
        self._carry_out(self.machine.handle(event, now))
        self.machine.check()

    def wake(self) -> None:
        """Its loop runs; and will when it next has to."""
        life = self.life
        if self.world.now < self.stopped_until:
            self.world.after(self.stopped_until - self.world.now, lambda: self.wake() if life == self.life else None)
            return
        now, due = self.clock(), self.machine.deadline()
        if due is not None and due <= now:
            self.hear(None)
        self.world.after(0.05, lambda: self.wake() if life == self.life else None)

    def _carry_out(self, actions: list[lead.Action]) -> None:
        for action in actions:
            if isinstance(action, lead.LONG):
                self._call(action)
            elif isinstance(action, lead.Announce):
                for other in self.world.peers:
                    if other is not self and self.world.dice.random() < 0.7:
                        self._later(other, lead.Heard(action.term, rival=True))

    def _later(self, other: Peer, event: lead.Event) -> None:
        life = other.life
        self.world.after(self.world.dice.uniform(0.001, 0.1), lambda: other.hear(event) if other.life == life else None)

    def _call(self, action: lead.Action) -> None:
        """A call: there, back; the caller gives up after `CALL_S`, whatever becomes of what it asked."""
        world, life, name = self.world, self.life, self.name
        answered = False
        holder = Caller(name)

        def answer(event: lead.Event) -> None:
            nonlocal answered
            if answered or life != self.life:
                return
            if world.now < self.stopped_until:
                world.after(self.stopped_until - world.now, lambda: answer(event))
                return
            answered = True
            self.hear(event)

        def arrive() -> None:
            if world.now < world.stopped_until:
                world.after(world.stopped_until - world.now + 0.001, arrive)
                return
            event = world.serve(holder, action)  # type: ignore[arg-type]
            if world.now >= self.deaf_until:
                world.after(way(), lambda: answer(event))

        def way() -> float:
            return world.dice.choice((0.0005, 0.002, 0.05, 0.4))

        if world.now >= self.deaf_until:
            world.after(way(), arrive)
        world.after(CALL_S, lambda: answer(lead.Unanswered()))


class Caller:
    """What the registry knows of whoever calls."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize("seed", range(12))
def test_nobody_leads_while_another_one_does(seed: int) -> None:
    world = World(seed, loses_data=False)
    world.run(300.0)
    assert len({name for _, _, name in world.obeyed}) > 3, "leadership hardly ever changed"


@pytest.mark.parametrize("seed", range(6))
def test_terms_grow_even_if_the_registry_forgets_them(seed: int) -> None:
    world = World(1000 + seed, loses_data=True)
    world.run(300.0)
    terms = [term for _, term, _ in world.obeyed]
    assert terms == sorted(terms)
    assert len(frozenset((term, name) for _, term, name in world.obeyed)) == len(frozenset(terms)), "two of one term"
    assert max(at for at, _, _ in world.obeyed) > 250.0, "in the end nobody is obeyed any more"
