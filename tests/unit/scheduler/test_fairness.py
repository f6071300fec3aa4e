"""Who goes first, whose turn is over, and that nobody waits longer than was promised."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field

import pytest

from services.scheduler.fairness import Fairness, FairnessRules, swaps_per_request

# -- a model of a cluster without mercy -------------------------------------------------------------------------------


@dataclass
class Someone:
    """A deployment. Once somebody asks for it, it is never idle for `asks_s` seconds, whatever it is given."""

    name: str
    priority: int
    load_s: float
    estimate_s: float
    most: int = 1
    asks_until: float = -math.inf
    since: float | None = None
    promised: bool = False


@dataclass
class Abstract:
    """Places, deployments that never fall idle by themselves, loads that take their time; decisions by `Fairness`."""

    rules: FairnessRules
    places: int
    everyone: list[Someone]
    stop_s: float = 0.1
    fairness: Fairness = field(init=False)
    held: dict[str, tuple[str, float]] = field(default_factory=dict)  # replica → deployment, ready at
    waits: list[tuple[float, bool, str]] = field(default_factory=list)
    numbers: int = 0

    def __post_init__(self) -> None:
        self.fairness = Fairness(self.rules)
        self.fairness.set_places(self.places)

    def run(self, arrivals: list[tuple[float, str, float]], until: float) -> None:
        """Demand as (moment, deployment, for how many seconds)."""
        by_name = {one.name: one for one in self.everyone}
        events = [(at, 0, name, asks_s) for at, name, asks_s in arrivals]
        heapq.heapify(events)
        now = 0.0
        while now < until:
            while events and events[0][0] <= now:
                _, kind, name, number = heapq.heappop(events)
                if kind == 0:
                    one = by_name[name]
                    one.asks_until = max(one.asks_until, now + number)
                    heapq.heappush(events, (one.asks_until, 1, name, 0.0))
                elif kind == 2 and self.held.get(name, ("", 0.0))[1] == number:
                    self.answer(name, by_name[self.held[name][0]], now)
            for one in self.everyone:
                self.compare(one, now)
            self.serve(by_name, now, events)
            self.fairness.check()
            wakes = [self.fairness.urgent_at(one.name, now) for one in self.everyone if one.since is not None]
            following = [at for at in wakes if at is not None] + [event[0] for event in events[:1]] + [until]
            now = max(min(following), math.nextafter(now, math.inf))
        self.waits += [(now - one.since, one.promised, one.name) for one in self.everyone if one.since is not None]

    def compare(self, one: Someone, now: float) -> None:
        mine = [id for id, (name, _) in self.held.items() if name == one.name]
        if one.asks_until <= now:
            for id in mine:
                del self.held[id]
                self.fairness.gone(id, now)
            if one.since is not None:
                self.fairness.satisfied(one.name, now)
                one.since = None
        elif not mine and one.since is None:
            one.since = now
            one.promised = self.fairness.wanting(one.name, now, one.priority, one.estimate_s, now)

    def serve(self, by_name: dict[str, Someone], now: float, events: list[tuple[float, int, str, float]]) -> None:
        wanting = [one.name for one in self.everyone if one.since is not None and self.waits_still(one.name)]
        for name in self.fairness.order(wanting, now):
            stop_s = 0.0
            if len(self.held) >= self.places:
                parkable = [id for id in self.held if self.fairness.parkable(id, name, now)]
                if not parkable:
                    continue
                victim = min(parkable, key=lambda id: self.victim_key(by_name, id))
                self.fairness.parked(victim, name, now)
                del self.held[victim]
                stop_s = self.stop_s
            self.place(by_name[name], now + stop_s, now, events)
        for one in self.everyone:
            mine = sum(1 for name, _ in self.held.values() if name == one.name)
            free = len(self.held) < self.places
            if 0 < mine < one.most and free and self.fairness.allows(one.name, one.estimate_s, now):
                self.place(one, now, now, events)

    def victim_key(self, by_name: dict[str, Someone], id: str) -> tuple[int, bool, float, str]:
        """The lowest priority, one of several of its deployment, the longest turn."""
        name, ready_at = self.held[id]
        return by_name[name].priority, sum(holder == name for holder, _ in self.held.values()) < 2, ready_at, id

    def waits_still(self, name: str) -> bool:
        return all(holder != name for holder, _ in self.held.values())

    def place(self, one: Someone, begins: float, now: float, events: list[tuple[float, int, str, float]]) -> None:
        self.numbers += 1
        id, ready_at = f"r{self.numbers}", begins + one.load_s
        self.held[id] = (one.name, ready_at)
        self.fairness.placed(id, one.name, one.priority, one.estimate_s, now)
        heapq.heappush(events, (ready_at, 2, id, ready_at))

    def answer(self, id: str, one: Someone, now: float) -> None:
        self.fairness.ready(id, one.name, now)
        if one.since is not None:
            self.waits.append((now - one.since, one.promised, one.name))
            one.since = None


def world(seed: int, *, w: float | None = None, slack: float = 1.0) -> tuple[Abstract, list[tuple[float, str, float]]]:
    """A random cluster with bursts of demand that last; W is the least that can be held, times `slack`."""
    dice = random.Random(seed)
    places = dice.randint(1, 6)
    everyone = []
    for number in range(dice.randint(places + 1, 5 * places + 2)):
        load_s = dice.choice([0.5, 2.0, 5.0, 20.0]) * dice.uniform(0.5, 1.5)
        estimate_s = load_s * dice.uniform(1.0, 1.3)
        everyone.append(
            Someone(f"d{number}", dice.choice([0, 0, 0, 1, 2]), load_s, estimate_s, dice.choice([1, 1, places]))
        )
    rules = FairnessRules(tenure_min_s=dice.choice([0.5, 3.0, 10.0]), turn_s=0.3, look_s=0.2)
    if w is None:
        scout = Fairness(rules)
        scout.set_places(places)
        for one in everyone:
            # Each may hold as many places as it likes when another one comes: that is the worst case.
            for extra in range(min(one.most, places)):
                scout.placed(f"{one.name}-{extra}", one.name, 0, one.estimate_s, 0.0)
        w = slack * scout.bound(0.0).least_s
    rules = FairnessRules(start_within_s=w, tenure_min_s=rules.tenure_min_s, turn_s=0.3, look_s=0.2)
    arrivals = []
    for one in everyone:
        at = dice.expovariate(0.02)
        while at < 1500.0:
            lasts_s = dice.choice([5.0, 60.0, 2000.0]) * dice.uniform(0.5, 1.5)
            arrivals.append((at, one.name, lasts_s))
            at += dice.expovariate(0.01)
    return Abstract(rules, places, everyone), arrivals


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.by_hand) for seed in range(100, 400))]
)
def test_nobody_waits_longer_than_the_bound_where_it_can_be_held(seed: int) -> None:
    model, arrivals = world(seed)
    model.run(arrivals, 400.0)
    assert model.waits
    assert model.fairness.counts.unpromised == 0
    longest = max(model.waits)
    assert longest[0] <= model.rules.start_within_s, f"seed {seed}: {longest[2]} waited {longest[0]:.2f} s"


@pytest.mark.parametrize(
    "seed", [*range(40, 44), *(pytest.param(seed, marks=pytest.mark.by_hand) for seed in range(400, 600))]
)
def test_who_was_promised_a_start_has_it_even_where_not_everybody_can(seed: int) -> None:
    model, arrivals = world(seed, slack=0.6)
    model.run(arrivals, 400.0)
    kept = [wait for wait, promised, _ in model.waits if promised]
    assert kept
    assert max(kept) <= model.rules.start_within_s


def test_some_of_the_worlds_are_contended_and_some_cannot_promise() -> None:
    """The two tests above would prove nothing if nobody ever had to be parked, or everybody was always promised."""
    parks = unpromised = jumps = 0
    for seed in range(40, 44):
        model, arrivals = world(seed, slack=0.6)
        model.run(arrivals, 300.0)
        parks += model.fairness.counts.late
        jumps += model.fairness.counts.outranked
        unpromised += model.fairness.counts.unpromised
    assert parks > 20
    assert jumps > 0
    assert unpromised > 10


def neighbours(w: float, *, priority: int = 0) -> Abstract:
    everyone = [Someone("greedy", priority, 1.0, 1.0), Someone("meek", 0, 1.0, 1.0)]
    model = Abstract(FairnessRules(start_within_s=w, tenure_min_s=2.0), 1, everyone)
    model.run([(0.0, "greedy", 1e6), (5.0, "meek", 1e6)], 300.0)
    return model


def test_without_slices_a_busy_neighbour_starves_the_other() -> None:
    model = neighbours(math.inf)
    assert max(wait for wait, _, name in model.waits if name == "meek") == pytest.approx(295.0)


def test_with_slices_both_have_equal_turns_and_no_more_of_them_than_the_bound_asks_for() -> None:
    model = neighbours(30.0)
    assert max(model.waits)[0] <= 30.0
    waited = {name: sum(wait for wait, _, one in model.waits if one == name) for name in ("greedy", "meek")}
    assert waited["meek"] == pytest.approx(waited["greedy"], abs=35.0)
    assert model.fairness.counts.parks <= 300.0 / 25.0


def test_no_priority_starves_anybody() -> None:
    model = neighbours(30.0, priority=10)
    meek = [wait for wait, _, name in model.waits if name == "meek"]
    greedy = [wait for wait, _, name in model.waits if name == "greedy"]
    assert max(meek) <= 30.0
    assert max(greedy) < 10.0, "the higher priority is back as soon as the other has had the least tenure"
    assert model.fairness.counts.outranked > 0


# -- single answers ---------------------------------------------------------------------------------------------------


def one_place(**fields: float) -> Fairness:
    """One place, held by `a` since second 0."""
    values: dict[str, float] = {"start_within_s": 60.0, "tenure_min_s": 5.0, "turn_s": 0.0, **fields}
    fairness = Fairness(FairnessRules(**values))
    fairness.set_places(1)
    fairness.ready("ra", "a", 0.0)
    return fairness


def test_whoever_has_waited_longest_goes_first_and_priority_before_that() -> None:
    fairness = one_place()
    fairness.wanting("c", 2.0, 0, 1.0, 3.0)
    fairness.wanting("b", 1.0, 0, 1.0, 3.0)
    fairness.wanting("d", 3.0, 1, 1.0, 3.0)
    assert fairness.order(["extra", "b", "c", "d"], 3.0) == ["d", "b", "c", "extra"]


def test_priority_does_not_jump_where_the_others_have_no_time_left() -> None:
    fairness = one_place()
    fairness.wanting("b", 1.0, 0, 1.0, 3.0)
    fairness.wanting("d", 3.0, 1, 1.0, 3.0)
    assert fairness.order(["b", "d"], 52.0) == ["d", "b"]
    assert fairness.order(["b", "d"], 56.0) == ["b", "d"]
    assert fairness.allows("d", 1.0, 52.0)
    assert not fairness.allows("d", 1.0, 56.0)


def test_a_replica_is_parked_only_when_it_must_be() -> None:
    fairness = one_place()
    fairness.wanting("b", 10.0, 0, 4.0, 10.0)
    assert not fairness.parkable("ra", "b", 65.0)
    assert fairness.urgent_at("b", 65.0) == pytest.approx(66.0)
    assert fairness.parkable("ra", "b", 66.0)
    assert not fairness.parkable("ra", "a", 66.0)
    assert not fairness.parkable("nobody", "b", 66.0)


def test_nobody_is_parked_before_the_least_tenure() -> None:
    fairness = one_place()
    fairness.wanting("b", -100.0, 5, 4.0, 1.0)
    assert not fairness.parkable("ra", "b", 4.9)
    assert fairness.parkable("ra", "b", 5.0)


def test_a_loading_replica_is_not_parked() -> None:
    fairness = Fairness(FairnessRules())
    fairness.placed("ra", "a", 0, 1.0, 0.0)
    fairness.wanting("b", -1000.0, 5, 1.0, 100.0)
    assert not fairness.parkable("ra", "b", 100.0)


def test_a_higher_priority_parks_a_lower_one_after_the_least_tenure() -> None:
    fairness = one_place()
    fairness.wanting("b", 10.0, 1, 4.0, 10.0)
    assert fairness.parkable("ra", "b", 10.0)
    fairness.parked("ra", "b", 10.0)
    assert (fairness.counts.parks, fairness.counts.outranked) == (1, 1)


def two_against_none() -> Fairness:
    """ "a" has both places since 0 s, "b" wants one since 100 s."""
    fairness = Fairness(FairnessRules(start_within_s=60.0, tenure_min_s=5.0, turn_s=0.0))
    fairness.set_places(2)
    fairness.ready("a1", "a", 0.0)
    fairness.ready("a2", "a", 0.0)
    fairness.wanting("b", 100.0, 0, 4.0, 100.0)
    return fairness


def test_who_has_several_replicas_gives_one_after_its_tenure_though_nobody_is_late() -> None:
    fairness = two_against_none()
    assert not fairness.urgent("b", 100.0)
    assert fairness.parkable("a1", "b", 100.0)
    fairness.parked("a1", "b", 100.0)
    assert not fairness.parkable("a2", "b", 100.0)
    assert fairness.counts.shared == 1


def test_who_has_several_replicas_gives_none_for_the_sake_of_fewer_than_it_serves() -> None:
    fairness = two_against_none()
    assert not fairness.parkable("a1", "b", 100.0, shares=False)
    urgent_at = fairness.urgent_at("b", 100.0)
    assert urgent_at is not None
    assert fairness.parkable("a1", "b", urgent_at, shares=False)  # the bound holds all the same


def test_who_has_lost_its_place_stands_at_the_end_however_long_one_of_its_requests_has_waited() -> None:
    fairness = one_place()
    fairness.wanting("b", 50.0, 0, 4.0, 50.0)
    fairness.parked("ra", "a", 66.0)
    fairness.wanting("a", 20.0, 0, 4.0, 66.0)  # behind those who were parked with it, one waits since then
    assert fairness.order(["a", "b"], 66.0) == ["b", "a"]
    fairness.satisfied("a", 67.0)
    fairness.wanting("a", 20.0, 0, 4.0, 67.0)
    assert fairness.order(["a", "b"], 67.0) == ["a", "b"]


def test_who_leaves_its_place_stands_at_the_end_before_it_has_gone() -> None:
    fairness = one_place()
    fairness.wanting("b", 50.0, 0, 4.0, 50.0)
    fairness.wanting("a", 20.0, 0, 4.0, 60.0)  # "ra" takes nothing new: its end is awaited
    assert fairness.order(["a", "b"], 60.0) == ["b", "a"]
    fairness.gone("ra", 66.0)
    fairness.wanting("a", 20.0, 0, 4.0, 66.0)
    fairness.wanting("c", 61.0, 0, 4.0, 66.0)
    assert fairness.order(["a", "b", "c"], 66.0) == ["b", "a", "c"]


def test_tenures_are_equal_shares_of_what_the_bound_leaves() -> None:
    fairness = one_place(start_within_s=100.0)
    for name in ("b", "c"):
        fairness.wanting(name, 0.0, 0, 5.0, 0.0)
    assert fairness.tenure_s == pytest.approx(0.9 * ((100.0 - 5.0) / 2 - 5.0), rel=0.35)
    for number in range(50):
        fairness.wanting(f"d{number}", 0.0, 0, 5.0, 0.0)
    assert fairness.tenure_s == 5.0


def test_a_bound_that_cannot_be_held_is_said_with_the_least_that_could() -> None:
    fairness = one_place()
    for number in range(9):
        fairness.wanting(f"d{number}", 0.0, 0, 10.0, 0.0)
    bound = fairness.bound(0.0)
    assert not bound.held
    assert bound.least_s == pytest.approx(9 * 5.0 + 8 * 10.0 + 0.0 + 10.0)
    assert (bound.contenders, bound.places) == (10, 1)
    assert fairness.counts.unpromised > 0
    assert fairness.bound(61.0).late == 9


def test_saying_the_same_again_changes_nothing() -> None:
    fairness = one_place()
    assert [fairness.wanting("b", 10.0, 0, 4.0, now) for now in (10.0, 20.0)] == [True, True]
    fairness.satisfied("b", 21.0)
    fairness.satisfied("b", 21.0)
    fairness.gone("ra", 22.0)
    fairness.gone("ra", 22.0)
    fairness.check()
    assert fairness.urgent_at("b", 23.0) is None
    assert fairness.bound(23.0).contenders == 0


def test_the_blocks_of_the_line_agree_with_the_sum_over_everybody() -> None:
    from services.scheduler.line import Line

    dice = random.Random(3)
    line, waiting = Line(), dict[str, tuple[float, float]]()
    line.suit(places=7, within_s=60.0, low_s=1.0, high_s=4.0)
    for step in range(3000):
        name = f"d{dice.randrange(700)}"
        if name in waiting:
            del waiting[name]
            line.drop(name)
        else:
            waiting[name] = (float(dice.randrange(100)), dice.uniform(0.1, 9.0))
            line.put(name, *waiting[name])
        if step % 100 == 0 and waiting:
            names = sorted(waiting, key=lambda one: (waiting[one][0], one))
            assert list(line) == names
            start = dice.randrange(len(names))
            for tenure, got in zip((1.0, 4.0), line.slack(names[start]), strict=True):
                spent, least = 0.0, math.inf
                for number, one in enumerate(names):
                    if number >= start:
                        least = min(least, 7 * (waiting[one][0] + 60.0 - waiting[one][1]) - spent)
                    spent += waiting[one][1] + tenure
                assert got == pytest.approx(least)


def test_swaps_per_request() -> None:
    assert swaps_per_request(0, 0) == 0.0
    assert swaps_per_request(3, 12) == 0.25
