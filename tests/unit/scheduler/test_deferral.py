"""Who waits for room is asked about when something useful came free, and now and then; nobody is forgotten."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from services.scheduler import choice
from services.scheduler.cluster import Cluster
from services.scheduler.core import Core
from services.scheduler.deferral import DISTURB_S, FIRST, MOST_IDLE_LOOKS, MOST_RELEASES, RETRY_S, Deferrals
from services.scheduler.events import CommandLoad, CommandStop
from services.scheduler.fairness import Fairness, FairnessRules
from services.scheduler.releases import Releases
from services.scheduler.rules import Rules
from services.scheduler.terms import Ask, Decision
from services.scheduler.view import View
from shared.contracts.placement import LoadReplica
from shared.contracts.records import ReplicaState
from tests.unit.scheduler import picture
from tests.unit.scheduler.desk import Desk

LOOK_S = 1.0
BEHIND = FIRST + 1


class Waiting:
    """Deferrals of a cluster with workers, of which `useful` could serve anybody."""

    def __init__(self, useful: tuple[str, ...] = (), start_within_s: float = 1000.0) -> None:
        self.cluster = Cluster(kv_bytes_max=1)
        for id in ("a0", "b0"):
            self.cluster.workers[id] = picture.worker(id)
        self.fairness = Fairness(FairnessRules(start_within_s=start_within_s))
        self.useful = useful
        self.asked: list[tuple[str, ...]] = []
        self.all = Deferrals(Rules(look_interval_s=LOOK_S), self.cluster, self.fairness, self.frees)

    def frees(self, name: str, ids: Sequence[str], now: float) -> bool:
        self.asked.append(tuple(ids))
        return any(id in self.useful for id in ids)

    def put(self, name: str, now: float, latest_at: float = math.inf) -> None:
        self.all.put(name, now, latest_at=latest_at)


def test_what_came_free_elsewhere_wakes_nobody() -> None:
    it = Waiting(useful=("b0",))
    it.put("m", 100.0)
    it.cluster.releases.put(("a0",))
    assert not it.all.due("m", BEHIND, 100.2)
    assert it.asked == [("a0",)]
    assert not it.all.due("m", BEHIND, 100.25)
    assert it.asked == [("a0",)], "the same release is looked at once"
    it.cluster.releases.put(("b0",))
    assert it.all.due("m", BEHIND, 100.4)


def test_the_first_in_line_know_at_once_and_the_others_a_moment_later() -> None:
    it = Waiting(useful=("a0",))
    it.put("m", 100.0)
    it.cluster.releases.put(("a0",))
    assert it.all.due("m", FIRST - 1, 100.01)
    assert not it.all.due("m", BEHIND, 100.01)
    assert it.all.wake == pytest.approx(100.0 + RETRY_S)
    assert it.all.due("m", BEHIND, 100.0 + RETRY_S)


def test_the_first_in_line_look_for_room_to_be_made_soon_after_anything_was_given_back() -> None:
    it = Waiting()
    it.put("m", 100.1)
    assert not it.all.due("m", 0, 100.1 + DISTURB_S)
    it.cluster.releases.put(("a0",))
    assert not it.all.due("m", 0, 100.2)
    assert it.all.wake == pytest.approx(100.1 + DISTURB_S)
    assert it.all.due("m", 0, 100.1 + DISTURB_S)


def test_whoever_is_behind_is_asked_about_ever_less_often_but_is_never_forgotten() -> None:
    it = Waiting()
    now, waits = 100.0, list[float]()
    it.put("m", now)
    for _ in range(8):
        before = now
        while not it.all.due("m", BEHIND, now):
            assert now < it.all.wake < math.inf
            now, it.all.wake = it.all.wake, math.inf
        waits.append(now - before)
        it.put("m", now)
    assert waits == sorted(waits)
    assert waits[0] == LOOK_S
    assert waits[-1] == MOST_IDLE_LOOKS * LOOK_S


def test_where_the_bound_is_at_stake_everybody_is_asked_about_at_every_look() -> None:
    it = Waiting(start_within_s=5.0)
    for number in range(4):
        it.fairness.wanting(f"d{number}", 90.0, 0, 5.0, 100.0)
    for _ in range(MOST_IDLE_LOOKS):
        it.put("d3", 100.0)
    assert not it.all.due("d3", BEHIND, 100.5)
    assert it.all.due("d3", BEHIND, 100.0 + LOOK_S)


def test_room_that_was_lost_and_a_moment_that_was_named_are_reasons_to_decide_anew() -> None:
    it = Waiting()
    it.put("m", 100.0, latest_at=100.3)
    assert not it.all.due("m", BEHIND, 100.2)
    assert it.all.due("m", BEHIND, 100.3)
    it.all.put("m", 100.4, latest_at=math.inf, roomed=True)
    assert it.all.due("m", BEHIND, 100.4)


def test_after_very_many_releases_it_is_decided_anew() -> None:
    releases = Releases()
    for number in range(MOST_RELEASES + 1):
        releases.put((f"w{number}", "w0"))
    assert releases.since(0, MOST_RELEASES) is None
    assert releases.since(2, MOST_RELEASES) == ["w0", *(f"w{number}" for number in range(MOST_RELEASES, 1, -1))]
    assert releases.since(releases.count, MOST_RELEASES) == []
    releases.forget("w0")
    assert len(releases) == MOST_RELEASES


class Counting:
    """The production policy, and how often it was asked."""

    def __init__(self) -> None:
        self.decisions = 0

    def __call__(self, ask: Ask, view: View, now: float) -> Decision:
        self.decisions += 1
        return choice.decide(ask, view, now)


def crowd(
    many: int, *, places: int = 2, start_within_s: float = 60.0, seed: int = 1
) -> tuple[Counting, dict[str, float], int]:
    """`many` deployments are asked once each, at random moments, for requests of random lengths; places are few.

    How often it was decided, how long each waited for its replica to be ready, and the commands to load.
    """
    dice, policy = random.Random(seed), Counting()
    names = [f"d{number:02}" for number in range(many)]
    desk = Desk(
        rules=Rules(fairness=FairnessRules(start_within_s=start_within_s)),
        deployments={name: picture.deployment(picture.spec(name), picture.checkpoint(f"ck-{name}")) for name in names},
        servers={"a": picture.server("a", pool=100_000)},
        workers={f"a{number}": picture.worker(f"a{number}", max_replicas=1) for number in range(places)},
    )
    desk.core = Core(desk.rules, instance="t", decide=policy)
    desk.start()
    arrives = {name: desk.now + dice.uniform(0.0, 5.0) for name in names}
    waited: dict[str, float] = {}
    ends: list[tuple[float, LoadReplica, str]] = []
    loads = 0
    while len(waited) < many or ends:
        for name in [one for one in names if one in arrives and arrives[one] <= desk.now and one not in waited]:
            desk.queue(name, 1)
            desk.hint(name)
        for at, message, worker_id in [one for one in ends if one[0] <= desk.now]:
            ends.remove((at, message, worker_id))
            desk.queue(message.deployment, 0)
            desk.shows(message, worker_id, ReplicaState.READY, finished_requests=1)
        for stop in desk.take(CommandStop):
            desk.gone(stop.message.replica_id)
        for load in desk.take(CommandLoad):
            loads += 1
            desk.shows(load.message, load.worker_id, ReplicaState.READY, running=1)
            waited[load.message.deployment] = desk.now - arrives[load.message.deployment]
            ends.append((desk.now + dice.uniform(0.5, 4.0), load.message, load.worker_id))
        desk.wait(0.25)
        assert desk.now < 2000.0, f"seed {seed}: {sorted(frozenset(names) - frozenset(waited))} wait for ever"
    return policy, waited, loads


@pytest.mark.parametrize("seed", [0, 4])
def test_everybody_of_a_crowd_is_served_in_few_decisions(seed: int) -> None:
    policy, waited, loads = crowd(8, seed=seed)
    assert len(waited) == 8
    assert max(waited.values()) <= 60.0
    assert policy.decisions <= 10 * loads
