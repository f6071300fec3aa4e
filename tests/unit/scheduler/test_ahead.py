"""Copies ahead of demand: what is worth having where, and when nothing may be moved."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from services.scheduler.ahead import Ahead, AheadRules, Prefetching, Prospect
from shared.contracts.records import Phase, ServerRecord
from tests.unit.scheduler import picture

MIB = picture.MIB
RULES = AheadRules(bytes_per_s=10 * MIB, fill_bytes_per_s=0.0)
FILLING = AheadRules(bytes_per_s=10 * MIB, fill_bytes_per_s=100 * MIB)

# A load of 100 MiB: from DRAM 0.1 s, SSD 1 s, a peer 2 s, the source 10 s.
SPEEDS = {"dram": 1000 * MIB, "ssd": 100 * MIB, "peer": 50 * MIB, "remote": 10 * MIB}


@dataclass
class Sight:
    """A view that tests fill in."""

    records: list[ServerRecord]
    prospects: list[Prospect]
    waiting: bool = False
    busy_with: Mapping[str, float] = field(default_factory=dict)
    loads_on: Sequence[str] = ()
    holds: Sequence[tuple[str, str]] = ()
    unable: Sequence[tuple[str, str]] = ()

    @property
    def servers(self) -> Mapping[str, ServerRecord]:
        return {one.server_id: one for one in self.records}

    def deployments(self) -> Sequence[str]:
        return [one.deployment for one in self.prospects]

    def prospect(self, deployment: str) -> Prospect | None:
        return next((one for one in self.prospects if one.deployment == deployment), None)

    def owner(self, key: str) -> Prospect | None:
        return next((one for one in self.prospects if one.key == key), None)

    def dram_holders(self, key: str) -> Sequence[str]:
        return [one.server_id for one in self.records if key in one.dram]

    def ssd_holders(self, key: str) -> Sequence[str]:
        return [one.server_id for one in self.records if key in one.ssd]

    def load_s(self, server_id: str, tier: str, key: str, weight_bytes: int) -> float:
        return weight_bytes / SPEEDS[tier]

    def able(self, deployment: str, server_id: str) -> bool:
        return (deployment, server_id) not in self.unable

    def busy(self, server_id: str) -> float:
        return self.busy_with.get(server_id, 0.0)

    def loading(self, server_id: str) -> bool:
        return server_id in self.loads_on

    def held(self, server_id: str, key: str) -> bool:
        return (server_id, key) in self.holds


def prospect(name: str, probability: float = 0.5, *, mib: float = 100, **fields: object) -> Prospect:
    return Prospect(name, f"ck-{name}", int(mib * MIB), probability, **fields)  # type: ignore[arg-type]


def server(id: str = "a", *, pool: float = 1000, used: float = 0, pinned: str = "", **fields: object) -> ServerRecord:
    record = picture.server(id, pool=pool, **fields)  # type: ignore[arg-type]
    taken = int(used * MIB) or sum(record.dram.values())
    return msgspec.structs.replace(record, dram_used_bytes=taken, pinned={pinned: "dram"} if pinned else {})


def brief(plans: Sequence[Prefetching]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    return [(one.server_id, one.key, one.tier, one.evicts) for one in plans]


def test_what_is_on_ssd_and_likely_is_promoted() -> None:
    sight = Sight([server(ssd={"ck-m": 100})], [prospect("m")])
    plans = Ahead(RULES).plan(0.0, sight)
    assert brief(plans) == [("a", "ck-m", "dram", ())]
    assert plans[0].saves_s == pytest.approx(0.5 * (1.0 - 0.1))


def test_nothing_is_moved_while_somebody_waits() -> None:
    sight = Sight([server(ssd={"ck-m": 100})], [prospect("m")], waiting=True)
    ahead = Ahead(RULES)
    assert ahead.plan(0.0, sight) == []
    sight.waiting = False
    assert len(ahead.plan(1.0, sight)) == 1


@pytest.mark.parametrize("why", ["loads", "commanded", "queued", "budget", "unlikely", "quarantined", "draining"])
def test_nothing_is_moved_where_it_would_be_in_the_way_or_in_vain(why: str) -> None:
    record = server(ssd={"ck-m": 100}, loads=int(why == "loads"), quarantined=["ck-m"] if why == "quarantined" else [])
    record = msgspec.structs.replace(
        record,
        load_queue_bytes=int(why == "queued"),
        phase=Phase.DRAINING if why == "draining" else Phase.READY,
    )
    sight = Sight([record], [prospect("m", 0.001 if why == "unlikely" else 0.5)])
    if why == "commanded":
        sight.loads_on = ["a"]
    rules = AheadRules(bytes_per_s=0.0) if why == "budget" else RULES
    assert Ahead(rules).plan(0.0, sight) == []


def test_the_most_seconds_per_byte_come_first_and_one_at_a_time_per_server() -> None:
    sight = Sight(
        [server(ssd={"ck-large": 400, "ck-small": 100})], [prospect("large", 0.5, mib=400), prospect("small", 0.6)]
    )
    ahead = Ahead(RULES)
    assert brief(ahead.plan(0.0, sight)) == [("a", "ck-small", "dram", ())]
    assert ahead.plan(1.0, sight) == []
    assert ahead.under_way == [("a", "ck-small", "dram")]


def test_the_budget_spaces_copies_out() -> None:
    sight = Sight([server(ssd={"ck-m": 100, "ck-n": 100})], [prospect("m"), prospect("n")])
    ahead = Ahead(RULES)
    (first,) = ahead.plan(0.0, sight)
    ahead.done("a", first.key, "dram", 1.0)
    sight.records = [server(ssd={"ck-m": 100, "ck-n": 100}, dram={"ck-m": 100})]
    assert ahead.plan(9.9, sight) == [], "100 MiB at 10 MiB/s take ten seconds of the budget"
    assert [one.key for one in ahead.plan(10.0, sight)] == ["ck-n"]
    assert (ahead.counts.begun, ahead.counts.done, ahead.counts.moved_bytes) == (2, 1, 100 * MIB)


def test_nothing_is_done_twice() -> None:
    sight = Sight([server(ssd={"ck-m": 100})], [prospect("m")])
    ahead = Ahead(AheadRules(fill_bytes_per_s=0.0, bytes_per_s=1e12))
    assert len(ahead.plan(0.0, sight)) == 1
    assert ahead.plan(1.0, sight) == []
    ahead.done("a", "ck-m", "dram", 2.0)
    assert ahead.plan(3.0, sight) == [], "the server's record may not show it yet"
    sight.records = [server(ssd={"ck-m": 100}, dram={"ck-m": 100})]
    assert ahead.plan(60.0, sight) == []


def test_what_is_arriving_already_is_not_brought() -> None:
    record = msgspec.structs.replace(server(ssd={"ck-m": 100}), dram_arriving={"ck-m": 5})
    assert Ahead(RULES).plan(0.0, Sight([record], [prospect("m")])) == []


def test_a_refusal_is_taken_for_an_answer_and_each_one_longer() -> None:
    sight = Sight([server(ssd={"ck-m": 100})], [prospect("m")])
    ahead, waits, now = Ahead(AheadRules(fill_bytes_per_s=0.0, bytes_per_s=1e12)), [], 0.0
    for _ in range(3):
        while not ahead.plan(now, sight):
            now += 1.0
        waits.append(now)
        ahead.refused("a", "ck-m", "dram", now)
    assert waits == [0.0, 10.0, 30.0]
    assert ahead.counts.refused == 3


def test_a_copy_of_which_nothing_is_heard_is_forgotten_as_is_a_server_that_is_gone() -> None:
    sight = Sight([server(ssd={"ck-m": 100})], [prospect("m")])
    ahead = Ahead(AheadRules(fill_bytes_per_s=0.0, bytes_per_s=1e12, lost_s=50.0))
    ahead.plan(0.0, sight)
    assert ahead.plan(49.0, sight) == []
    assert len(ahead.plan(50.0, sight)) == 1
    ahead.server_gone("a")
    assert ahead.under_way == []


def test_what_is_worth_less_goes_and_what_is_worth_more_stays() -> None:
    full = server(pool=200, ssd={"ck-m": 100, "ck-cold": 100, "ck-hot": 100}, dram={"ck-cold": 100, "ck-hot": 100})
    cold, hot = prospect("cold", 0.01), prospect("hot", 0.9)
    assert brief(Ahead(RULES).plan(0.0, Sight([full], [prospect("m"), cold, hot]))) == [
        ("a", "ck-m", "dram", ("ck-cold",))
    ]
    assert Ahead(RULES).plan(0.0, Sight([full], [prospect("m"), prospect("cold", 0.6), hot])) == []
    nearly = prospect("cold", 0.4)
    assert Ahead(RULES).plan(0.0, Sight([full], [prospect("m"), nearly, hot])) == [], "not for so little more"


def test_what_is_pinned_or_held_by_a_replica_or_leased_is_not_in_anybodys_way() -> None:
    def plan(pool: float = 100, used: float = 0, holds: Sequence[tuple[str, str]] = (), **fields: object) -> int:
        record = server(pool=pool, used=used, ssd={"ck-m": 100, "ck-cold": 100}, dram={"ck-cold": 100}, **fields)  # type: ignore[arg-type]
        return len(Ahead(RULES).plan(0.0, Sight([record], [prospect("m"), prospect("cold", 0.01)], holds=holds)))

    assert plan() == 1
    assert plan(pinned="ck-cold") == 0
    assert plan(holds=[("a", "ck-cold")]) == 0
    assert plan(leased=100) == 0
    assert plan(pool=50, used=50) == 0, "it would not fit an empty pool"


def test_a_second_copy_is_made_where_the_holder_is_busy_and_not_where_it_is_free() -> None:
    holder, other = server("a", ssd={"ck-m": 100}, dram={"ck-m": 100}), server("b")
    free = Sight([holder, other], [prospect("m")])
    assert Ahead(RULES).plan(0.0, free) == []
    busy = Sight([holder, other], [prospect("m")], busy_with={"a": 0.8})
    (plan,) = Ahead(RULES).plan(0.0, busy)
    assert (plan.server_id, plan.tier) == ("b", "dram")
    assert plan.saves_s == pytest.approx(0.5 * 0.8 * (2.0 - 0.1))


def test_a_bursty_deployment_of_several_replicas_gets_a_second_copy_though_its_holder_is_free() -> None:
    holder, other = server("a", ssd={"ck-m": 100}, dram={"ck-m": 100}), server("b")
    bursty = prospect("m", burstiness=8.0, several=True)
    (plan,) = Ahead(RULES).plan(0.0, Sight([holder, other], [bursty]))
    assert plan.server_id == "b"
    assert Ahead(RULES).plan(0.0, Sight([holder, other], [prospect("m", burstiness=8.0)])) == []


def test_where_dram_is_full_of_better_a_copy_on_ssd_is_made() -> None:
    full = server("b", pool=100, dram={"ck-hot": 100}, ssd={"ck-hot": 100})
    hot = prospect("hot", 1.0)
    sight = Sight([server("a", pool=1, ssd={"ck-m": 100}), full], [prospect("m"), hot], busy_with={"a": 0.9})
    assert brief(Ahead(RULES).plan(0.0, sight)) == [("b", "ck-m", "ssd", ())]
    assert Ahead(RULES).plan(0.0, Sight([full], [prospect("m"), hot], unable=[("m", "b")])) == []


def test_room_on_an_ssd_is_not_made_ahead_of_demand() -> None:
    assert Ahead(RULES).plan(0.0, Sight([server("a", ssd_free=50)], [prospect("m")])) == []


def test_every_deployment_has_its_turn() -> None:
    prospects = [prospect(f"m{number}", 0.0) for number in range(10)] + [prospect("last")]
    sight = Sight([server(ssd={"ck-last": 100})], prospects)
    ahead = Ahead(AheadRules(fill_bytes_per_s=0.0, deployments=4))
    assert sum(len(ahead.plan(float(now), sight)) for now in range(6)) == 1
    sight.prospects.insert(0, prospect("first"))
    sight.records = [server(ssd={"ck-first": 100})]
    assert len(Ahead(AheadRules(fill_bytes_per_s=0.0, deployments=4)).plan(0.0, sight)) == 1


@pytest.mark.parametrize("seed", range(6))
def test_it_comes_to_rest_and_never_lowers_what_all_copies_are_worth(seed: int) -> None:
    """With nothing changing, copies stop after a while, and each one raised the value of what is in DRAM."""
    dice = random.Random(seed)
    prospects = [prospect(f"m{number}", dice.random(), mib=dice.choice([50, 100, 200])) for number in range(12)]
    on_ssd = {one.key: one.weight_bytes / MIB for one in prospects}
    records = {id: server(id, pool=400, ssd=on_ssd) for id in ("a", "b", "c")}
    busy = {id: 0.5 * dice.random() for id in records}
    ahead, now, moved, last = Ahead(AheadRules(fill_bytes_per_s=0.0, bytes_per_s=1e12)), 0.0, 0, -1.0
    for _ in range(80):
        sight = Sight(list(records.values()), prospects, busy_with=busy)
        for plan in ahead.plan(now, sight):
            old = records[plan.server_id]
            assert plan.saves_s > 0.0
            dram = {key: size for key, size in old.dram.items() if key not in plan.evicts}
            dram[plan.key] = plan.weight_bytes
            assert sum(dram.values()) <= old.dram_capacity_bytes
            records[plan.server_id] = msgspec.structs.replace(old, dram=dram, dram_used_bytes=sum(dram.values()))
            ahead.done(plan.server_id, plan.key, plan.tier, now)
            moved, last = moved + 1, now
        now += 10.0
    assert moved >= 8
    assert last < 600.0, "it keeps swapping copies"


def test_free_dram_is_filled_from_the_ssd_beside_it_with_whatever_is_deployed() -> None:
    sight = Sight([server(ssd={"ck-m": 100})], [prospect("m", 0.0)])
    assert Ahead(RULES).plan(0.0, sight) == []
    assert brief(Ahead(FILLING).plan(0.0, sight)) == [("a", "ck-m", "dram", ())]


def test_dram_is_filled_with_the_likeliest_first_and_then_with_what_nobody_has_in_dram() -> None:
    on_ssd = {"ck-m": 100, "ck-n": 100, "ck-o": 100}
    sight = Sight([server(ssd=on_ssd)], [prospect("m", 0.0), prospect("n", 0.002), prospect("o", 0.0)])
    assert [one.key for one in Ahead(FILLING).plan(0.0, sight)] == ["ck-n"]
    elsewhere = server("b", pool=100, dram={"ck-m": 100}, ssd={"ck-m": 100})
    sight = Sight([server(ssd=on_ssd), elsewhere], [prospect("m", 0.0), prospect("o", 0.0)])
    assert [one.key for one in Ahead(FILLING).plan(0.0, sight)] == ["ck-o"]


def test_nothing_goes_and_nothing_is_sent_or_written_to_fill_dram() -> None:
    full = server(pool=150, ssd={"ck-m": 100, "ck-n": 100}, dram={"ck-n": 100})
    assert Ahead(FILLING).plan(0.0, Sight([full], [prospect("m", 0.0), prospect("n", 0.0)])) == []
    far = Sight([server("a"), server("b", ssd={"ck-m": 100}, dram={"ck-m": 100})], [prospect("m", 0.0)])
    assert Ahead(FILLING).plan(0.0, far) == []


def test_filling_has_its_own_budget_and_stops_while_somebody_waits() -> None:
    sight = Sight([server(ssd={"ck-m": 100, "ck-n": 100})], [prospect("m", 0.0), prospect("n", 0.0)], waiting=True)
    ahead = Ahead(FILLING)
    assert ahead.plan(0.0, sight) == []
    sight.waiting = False
    (first,) = ahead.plan(1.0, sight)
    ahead.done("a", first.key, "dram", 1.5)
    sight.records = [server(ssd={"ck-m": 100, "ck-n": 100}, dram={first.key: 100})]
    assert ahead.plan(1.9, sight) == [], "100 MiB at 100 MiB/s take a second of the budget"
    assert len(ahead.plan(2.0, sight)) == 1


def test_dram_is_not_filled_again_with_what_has_just_left_it() -> None:
    there, gone = server(ssd={"ck-m": 100}, dram={"ck-m": 100}), server(ssd={"ck-m": 100})
    sight, ahead = Sight([there], [prospect("m", 0.0)]), Ahead(FILLING)
    assert ahead.plan(0.0, sight) == []
    sight.records = [gone]
    assert ahead.plan(1.0, sight) == []
    assert ahead.plan(599.0, sight) == []
    assert len(ahead.plan(601.0, sight)) == 1
