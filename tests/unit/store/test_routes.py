"""Which source for which chunk: the rules one by one, and many servers together in virtual time."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import pytest

from services.store.ports import Peer
from services.store.routes import COMING, HERE, ORIGIN, GiveUp, Patience, Pause, Routes, Take, Trouble
from shared.errors import Code, Failure

MIB = 2**20
LOST = Failure(code=Code.CHECKPOINT_UNAVAILABLE, message="The connection was lost.")
WRONG = Failure(code=Code.CHECKPOINT_CORRUPT, message="Chunk 0 does not match its checksum.")


def routes(own: str = "a", chunks: int = 16, *, origin: bool = True, settle_s: float = 0.0) -> Routes:
    return Routes(own, [MIB] * chunks, origin=origin, now=0.0, patience=Patience(settle_s=settle_s))


def peer(id: str, *, whole: bool) -> Peer:
    return Peer(id, f"http://{id}", whole)


# -- a simulation: every server runs the production routes; bandwidth is shared fairly --------------------------------


@dataclass
class Flow:
    """A transfer under way; `source` and `target` are servers, or the origin."""

    source: str
    target: int
    chunk: int
    left: float


@dataclass
class Server:
    """A server that fetches, with `threads` threads."""

    routes: Routes
    has: bytearray
    busy: int = 0
    began: float = 0.0
    done_s: float | None = None
    failure: Failure | None = None
    dies_at: float = float("inf")
    dead: bool = False


@dataclass
class World:
    """`servers` start together and fetch `chunks` chunks of 16 MiB each."""

    servers: int
    chunks: int
    origin_bytes_per_s: float
    link_bytes_per_s: float = 1.25e9
    threads: int = 8
    registry_s: float = 0.2  # how old what a server knows of the others may be
    scout_s: float = 0.25
    origin: bool = True
    whole_peers: int = 0
    dies: dict[int, float] = field(default_factory=dict)
    start_s: float = 0.1  # between one server's start and the next one's
    chunk_bytes: int = 16 * MIB
    now: float = 0.0
    origin_bytes: float = 0.0

    def run(self, limit_s: float = 3600.0) -> None:
        self.all = []
        self.seeds = [f"seed-{number}" for number in range(self.whole_peers)]
        self.flows: list[Flow] = []
        self.polls: list[tuple[int, str, int, float]] = []  # (target, source, chunk, until)
        self.events: list[tuple[float, int, str, int, int]] = []
        self.number = 0
        for one in range(self.servers):
            at = one * self.start_s
            table = Routes(f"s{one:02}", [self.chunk_bytes] * self.chunks, origin=self.origin, now=at)
            self.all.append(Server(table, bytearray(self.chunks), began=at, dies_at=self.dies.get(one, float("inf"))))
            self._at(at, "start", one)
            if one in self.dies:
                self._at(self.dies[one], "die", one)
        while any(not one.dead and one.done_s is None and one.failure is None for one in self.all):
            assert self.now < limit_s, "deadlock"
            self._step()

    def _at(self, when: float, kind: str, server: int, chunk: int = -1) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, kind, server, chunk))

    def _rates(self) -> list[float]:
        ups: dict[str, int] = {}
        downs: dict[int, int] = {}
        for flow in self.flows:
            ups[flow.source] = ups.get(flow.source, 0) + 1
            downs[flow.target] = downs.get(flow.target, 0) + 1
        return [
            min(
                (self.origin_bytes_per_s if flow.source == ORIGIN else self.link_bytes_per_s) / ups[flow.source],
                self.link_bytes_per_s / downs[flow.target],
            )
            for flow in self.flows
        ]

    def _step(self) -> None:
        rates = self._rates()
        finish = min((self.now + flow.left / rate for flow, rate in zip(self.flows, rates, strict=True)), default=1e18)
        until = min([finish, *(poll[3] for poll in self.polls), self.events[0][0] if self.events else 1e18])
        for flow, rate in zip(self.flows, rates, strict=True):
            flow.left -= rate * (until - self.now)
            if flow.source == ORIGIN:
                self.origin_bytes += rate * (until - self.now)
        self.now = until
        for flow in [flow for flow in self.flows if flow.left < 1.0]:
            self.flows.remove(flow)
            self._arrived(flow.target, flow.chunk)
        for poll in [poll for poll in self.polls if poll[3] <= self.now]:
            self.polls.remove(poll)
            self._lost(poll[0], poll[2], Trouble.NOT_YET)
        while self.events and self.events[0][0] <= self.now:
            _, _, kind, one, chunk = heapq.heappop(self.events)
            getattr(self, f"_on_{kind}")(one, chunk)

    def _on_start(self, one: int, _: int) -> None:
        self._on_view(one, _)
        for _thread in range(self.threads):
            self._on_work(one)

    def _on_view(self, one: int, _: int) -> None:
        """What the registry said a moment ago, and what the peers that are fetching have."""
        server = self.all[one]
        if server.dead or server.done_s is not None:
            return
        known = [peer(id, whole=True) for id in self.seeds]
        for number, other in enumerate(self.all):
            if number != one and other.began + self.registry_s <= self.now and self.now < other.dies_at + 5.0:
                known.append(peer(f"s{number:02}", whole=other.done_s is not None))
        server.routes.peers_are(known, self.now)
        for number, other in enumerate(self.all):
            if number != one and not other.dead:
                has = bytearray(other.has)
                for chunk in other.routes.coming():
                    has[chunk] = has[chunk] or COMING
                server.routes.peer_has(f"s{number:02}", bytes(has), self.now)
        self._at(self.now + self.scout_s, "view", one)

    def _on_die(self, one: int, _: int) -> None:
        self.all[one].dead = True
        self.flows = [flow for flow in self.flows if flow.target != one]
        self.polls = [poll for poll in self.polls if poll[0] != one]
        for flow in [flow for flow in self.flows if flow.source == f"s{one:02}"]:
            self.flows.remove(flow)
            self._lost(flow.target, flow.chunk, Trouble.LOST)
        for poll in [poll for poll in self.polls if poll[1] == f"s{one:02}"]:
            self.polls.remove(poll)
            self._lost(poll[0], poll[2], Trouble.LOST)

    def _on_route(self, one: int, chunk: int) -> None:
        server = self.all[one]
        if server.dead:
            return
        match server.routes.route(chunk, self.now):
            case Pause(wait_s):
                assert wait_s > 0
                self._at(self.now + wait_s, "route", one, chunk)
            case GiveUp(failure):
                server.failure = failure
            case Take(source, wait_s):
                if source == ORIGIN or source in self.seeds:
                    self.flows.append(Flow(source, one, chunk, self.chunk_bytes))
                    return
                other = self.all[int(source[1:])]
                if other.dead:
                    self._lost(one, chunk, Trouble.LOST)
                elif other.has[chunk]:
                    self.flows.append(Flow(source, one, chunk, self.chunk_bytes))
                elif wait_s:
                    self.polls.append((one, source, chunk, self.now + wait_s))
                else:
                    self._lost(one, chunk, Trouble.NOT_YET)

    def _lost(self, one: int, chunk: int, trouble: Trouble) -> None:
        self.all[one].routes.failed(chunk, trouble, LOST, self.now)
        self._at(self.now + 0.001, "route", one, chunk)

    def _on_work(self, one: int, _: int = -1) -> None:
        server = self.all[one]
        if server.dead or server.done_s is not None:
            return
        chunk = server.routes.pick(self.now)
        if chunk is not None:
            self._on_route(one, chunk)
        else:
            self._at(self.now + 0.02, "work", one)

    def _arrived(self, one: int, chunk: int) -> None:
        server = self.all[one]
        server.routes.arrived(chunk, self.now)
        assert not server.has[chunk], "a chunk was fetched twice by one server"
        server.has[chunk] = 1
        for poll in [poll for poll in self.polls if poll[1] == f"s{one:02}" and poll[2] == chunk]:
            self.polls.remove(poll)
            self.flows.append(Flow(poll[1], poll[0], chunk, self.chunk_bytes))
        if all(server.has):
            server.done_s = self.now
        self._on_work(one)

    @property
    def model_bytes(self) -> float:
        return self.chunks * self.chunk_bytes

    @property
    def finished_s(self) -> float:
        return max(one.done_s - one.began for one in self.all if one.done_s is not None)


@pytest.mark.parametrize(
    ("servers", "chunks", "origin_bytes_per_s", "start_s"),
    [
        (1, 132, 1e9, 0.0), (2, 132, 1e9, 0.0), (4, 132, 0.3e9, 0.02), (4, 132, 1e9, 0.1), (8, 132, 0.1e9, 0.0),
        (8, 132, 0.3e9, 0.02), (16, 132, 1e9, 0.0), (16, 132, 1e9, 0.1), (16, 264, 2e9, 0.02),
    ],
)  # fmt: skip
def test_servers_that_start_together_form_a_chain(
    servers: int, chunks: int, origin_bytes_per_s: float, start_s: float
) -> None:
    world = World(servers, chunks=chunks, origin_bytes_per_s=origin_bytes_per_s, start_s=start_s)
    world.run()
    assert all(one.done_s is not None for one in world.all)
    ideal_s = world.model_bytes / min(world.origin_bytes_per_s, world.link_bytes_per_s)
    assert world.origin_bytes <= 1.3 * world.model_bytes
    assert world.finished_s <= 1.8 * ideal_s  # all from the origin would take `servers` times as long


def test_a_server_alone_takes_all_at_the_speed_of_the_origin() -> None:
    world = World(1, chunks=64, origin_bytes_per_s=1e9)
    world.run()
    assert world.origin_bytes == pytest.approx(world.model_bytes)
    assert world.finished_s == pytest.approx(world.model_bytes / 1e9, rel=0.01)


@pytest.mark.parametrize("victims", [{3: 0.7}, {0: 0.3, 1: 0.9, 2: 1.5}, dict.fromkeys(range(1, 8), 1.0)])
def test_servers_that_die_delay_the_others_a_little(victims: dict[int, float]) -> None:
    world = World(8, chunks=132, origin_bytes_per_s=0.5e9, dies=victims)
    world.run()
    assert [one.done_s is not None for one in world.all] == [number not in victims for number in range(8)]
    assert world.finished_s <= 2.5 * world.model_bytes / world.origin_bytes_per_s


def test_without_an_origin_everything_comes_from_the_peers() -> None:
    world = World(4, chunks=64, origin_bytes_per_s=1e9, origin=False, whole_peers=2)
    world.run()
    assert world.origin_bytes == 0
    assert all(one.done_s is not None for one in world.all)


def test_whole_peers_spare_a_slow_origin() -> None:
    world = World(4, chunks=132, origin_bytes_per_s=0.1e9, whole_peers=1)
    world.run()
    assert world.origin_bytes <= 0.3 * world.model_bytes
    assert world.finished_s <= 0.3 * world.model_bytes / world.origin_bytes_per_s


def test_servers_that_only_have_each_other_give_up() -> None:
    world = World(3, chunks=16, origin_bytes_per_s=1e9, origin=False)
    world.run()
    assert all(one.failure is not None and one.failure.kind.retryable for one in world.all)
    assert world.now < 300.0


# -- the rules one by one ----------------------------------------------------------------------------------------------


def test_alone_with_an_origin_chunks_come_in_order() -> None:
    table = routes()
    assert [table.pick(0.0) for _ in range(4)] == [0, 1, 2, 3]
    assert table.route(0, 0.0) == Take(ORIGIN)
    assert table.coming() == [0]
    assert table.arrived(0, 1.0) == ORIGIN
    assert table.coming() == []
    assert table.bytes_by_source == {ORIGIN: MIB}


def test_of_those_that_have_it_the_one_that_delivers_first() -> None:
    table = routes()
    table.peers_are([peer("b", whole=True)], 0.0)
    assert table.route(0, 0.0) == Take("b")  # nothing is known: others before the origin
    table.arrived(0, 0.1)
    assert table.source_bytes_per_s("b") == pytest.approx(MIB / 0.1)
    table.route(1, 0.1)
    assert table.route(2, 0.1) == Take(ORIGIN)  # b is busy, and the origin may be as fast
    table.arrived(2, 0.11)
    table.arrived(1, 0.2)
    taken = [table.route(index, 0.2) for index in range(3, 9)]
    assert taken[0] == Take(ORIGIN)  # ten times as fast as b
    assert taken.count(Take(ORIGIN)) > taken.count(Take("b"))


def owner_of(table: Routes, ids: tuple[str, ...], chunks: int) -> dict[int, str]:
    """Whom the routes of server "a" wait for, per chunk."""
    owners = {}
    for index in range(chunks):
        match table.route(index, 0.0):
            case Take(source, wait_s):
                owners[index] = "a" if source == ORIGIN else source
                assert (wait_s > 0) == (source != ORIGIN)
            case decision:
                raise AssertionError(decision)
    assert set(owners.values()) == set(ids)
    return owners


def test_every_chunk_has_one_owner_whom_all_agree_on() -> None:
    ids = ("a", "b", "c", "d")
    tables = {id: routes(id, 64) for id in ids}
    for id, table in tables.items():
        table.peers_are([peer(other, whole=False) for other in ids if other != id], 0.0)
    mine = {
        id: {index for index in range(64) if table.route(index, 0.0) == Take(ORIGIN)} for id, table in tables.items()
    }
    assert sorted(index for owned in mine.values() for index in owned) == list(range(64))
    assert all(len(owned) > 4 for owned in mine.values())


def test_one_server_more_moves_only_its_own_part() -> None:
    few, many = routes(chunks=64), routes(chunks=64)
    few.peers_are([peer("b", whole=False)], 0.0)
    many.peers_are([peer("b", whole=False), peer("c", whole=False)], 0.0)
    before, after = owner_of(few, ("a", "b"), 64), owner_of(many, ("a", "b", "c"), 64)
    assert all(after[index] in (before[index], "c") for index in range(64))


def theirs(table: Routes, own: str = "a", chunks: int = 16) -> int:
    """A chunk that somebody else owns."""
    return next(index for index in range(chunks) if table._line(index)[0] != own)


def test_who_waits_helps_himself_after_a_while() -> None:
    table = routes()
    table.peers_are([peer("b", whole=False)], 0.0)
    index = theirs(table)
    first = table.route(index, 0.0)
    assert first == Take("b", 2.0)
    table.failed(index, Trouble.NOT_YET, LOST, 2.0)
    assert table.route(index, 2.1) == Take(ORIGIN)


def test_he_waits_longer_when_seeds_are_slow_for_himself() -> None:
    table = routes()
    table.peers_are([peer("b", whole=False)], 0.0)
    mine = next(index for index in range(16) if table._line(index)[0] == "a")
    assert table.route(mine, 0.0) == Take(ORIGIN)  # and takes long
    index = theirs(table)
    table.route(index, 1.0)
    table.failed(index, Trouble.NOT_YET, LOST, 3.0)
    assert table.route(index, 3.5) == Take("b", 2.0)


def test_a_chunk_that_another_one_is_taking_already_is_waited_for() -> None:
    table = routes()
    table.peers_are([peer("b", whole=False)], 0.0)
    mine = next(index for index in range(16) if table._line(index)[0] == "a")
    table.peer_has("b", bytes(COMING if index == mine else 0 for index in range(16)), 0.0)
    assert table.route(mine, 0.0) == Take("b", 2.0)


def test_what_a_peer_that_fetches_has_is_taken_at_once() -> None:
    table = routes()
    table.peers_are([peer("b", whole=False)], 0.0)
    index = theirs(table)
    table.peer_has("b", bytes(HERE if number == index else 0 for number in range(16)), 0.0)
    assert table.route(index, 0.0) == Take("b")


def test_a_liar_is_banned_for_good() -> None:
    table = routes()
    table.peers_are([peer("b", whole=True)], 0.0)
    assert table.route(0, 0.0) == Take("b")
    table.failed(0, Trouble.CORRUPT, WRONG, 0.1)
    table.peers_are([], 1.0)
    table.peers_are([peer("b", whole=True)], 2.0)
    assert table.route(0, 100.0) == Take(ORIGIN)
    assert table.banned() == {"b": WRONG}
    assert not table.worth_asking("b", 100.0)


def test_a_chunk_that_is_corrupt_at_the_origin_spoils_only_itself() -> None:
    table = routes()
    for _ in range(2):
        assert table.route(0, 0.0) == Take(ORIGIN)
        table.failed(0, Trouble.CORRUPT, WRONG, 0.0)
    assert table.route(0, 0.0) == GiveUp(WRONG)
    assert table.route(1, 0.0) == Take(ORIGIN)
    table.peers_are([peer("b", whole=True)], 0.0)
    assert table.route(0, 0.0) == Take("b")


def test_a_source_that_fails_is_left_alone_for_longer_and_longer() -> None:
    table = routes()
    now, pauses = 0.0, []
    for _ in range(5):
        assert table.route(0, now) == Take(ORIGIN)
        table.failed(0, Trouble.LOST, LOST, now)
        began = now
        while isinstance(decision := table.route(0, now), Pause):
            now += decision.wait_s
        table.failed(0, Trouble.BUSY, LOST, now)
        now += 0.3
        pauses.append(now - began)
    assert pauses == sorted(pauses)
    assert pauses[-1] > 3 * pauses[0]


def test_failures_at_the_same_time_count_as_one() -> None:
    table = routes()
    for index in range(8):
        table.route(index, 0.0)
    for index in range(8):
        table.failed(index, Trouble.LOST, LOST, 1.0)
    assert isinstance(table.route(0, 1.1), Pause)
    assert table.route(0, 1.3) == Take(ORIGIN)


def test_without_progress_the_fetch_is_given_up() -> None:
    table = routes()
    now = 0.0
    while not isinstance(decision := table.route(0, now), GiveUp):
        if isinstance(decision, Pause):
            now += decision.wait_s
        else:
            table.failed(0, Trouble.LOST, LOST, now)
    assert 60.0 < now < 75.0
    assert decision.failure == LOST


def test_a_refusal_is_final() -> None:
    table = routes()
    refusal = Failure(code=Code.FORBIDDEN, message="No.")
    table.route(0, 0.0)
    table.failed(0, Trouble.REFUSED, refusal, 0.0)
    assert table.route(1, 0.0) == GiveUp(refusal)


def test_a_peer_that_is_busy_is_asked_again_when_it_said() -> None:
    table = routes(origin=False)
    table.peers_are([peer("b", whole=True)], 0.0)
    table.route(0, 0.0)
    table.failed(0, Trouble.BUSY, Failure(code=Code.BUSY, message="Busy.", retry_after_s=3.0), 0.0)
    assert isinstance(table.route(0, 2.9), Pause)
    assert table.route(0, 3.0) == Take("b")


def test_before_others_are_known_seeds_are_used_sparingly_and_not_by_all_alike() -> None:
    starts = set()
    for number in range(8):
        table = routes(f"s{number}", 64, settle_s=0.5)
        first = table.pick(0.0)
        assert first is not None
        table.route(first, 0.0)
        second = table.pick(0.0)
        assert second is not None
        table.route(second, 0.0)
        assert table.pick(0.0) is None
        assert table.pick(0.6) is not None
        starts.add(first)
    assert len(starts) > 4


def test_every_chunk_is_picked_once() -> None:
    table = routes(chunks=40)
    table.chosen(7)
    table.kept(9, 0.0)
    picked = []
    while (index := table.pick(0.0)) is not None:
        picked.append(index)
        assert table.route(index, 0.0) == Take(ORIGIN)
        table.arrived(index, 0.0)
    assert picked == [index for index in range(40) if index not in (7, 9)]
