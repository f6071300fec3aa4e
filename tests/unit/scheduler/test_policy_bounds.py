"""Bounds, with the production estimator: never above what a close look finds, and equal where nobody has to leave."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest

from services.scheduler.bounds import FREE, MOST_LOOKS, Bounds
from services.scheduler.choice import decide
from services.scheduler.estimate import Estimator, whereabouts
from services.scheduler.terms import Ask, Outcome, Startup
from shared.contracts.placement import ReplicaLoaded
from tests.unit.scheduler.sight import GIB, FakeView, read
from tests.unit.scheduler.test_policy_random import NOW, scene


def learned(view: FakeView, dice: random.Random) -> None:
    """The production estimator, which has seen some loads and queues."""
    estimator = Estimator()
    for id, server in sorted(view.servers.items()):
        keys = sorted(view.asks)
        queue = {f"ck-{dice.choice(keys)}": dice.randint(1, 9) * GIB} if dice.random() < 0.5 else {}
        arriving = {f"ck-{dice.choice(keys)}": dice.randint(0, 2) * GIB} if dice.random() < 0.5 else {}
        view.servers[id] = msgspec.structs.replace(
            server, ssd_queue=queue, dram_arriving=arriving, ssd_bytes_per_s=dice.uniform(1, 5) * 1e9
        )
        estimator.server_said(view.servers[id], NOW - 0.5)
    for number in range(dice.randint(0, 6)):
        tier, key = dice.choice(("dram", "ssd", "remote")), dice.choice(sorted(view.asks))
        weight = view.asks[key].need.weight_bytes
        work_s = dice.uniform(0.1, 2)
        report = ReplicaLoaded(
            replica_id=f"old{number}", deployment=key, worker_id="", server_id=dice.choice(sorted(view.servers)),
            checkpoint_id=f"ck-{key}", tier=tier, weight_bytes=weight, total_s=9.0, move_s=dice.uniform(1, 9),
            moved_bytes=0 if tier == "dram" else weight, attach_s=work_s * dice.random(), work_s=work_s,
            device=dice.choice(("cpu", "cuda")),
        )  # fmt: skip
        estimator.loaded(report, NOW)
    view.estimator = estimator


def bounds_of(view: FakeView, ask: Ask) -> Bounds:
    """The bounds of a question."""

    def load(server_id: str, device: str) -> Startup:
        need, server = ask.need, view.servers[server_id]
        tier, missing = whereabouts(server, need.key, need.weight_bytes, peers=False)
        each = -(-need.weight_bytes // ask.devices)
        return view.estimator.startup(server_id, device, need.key, each, missing, tier, NOW)

    view.columns.refresh(view, NOW)
    return Bounds(ask, view, NOW, load)


@pytest.mark.parametrize("seed", range(60))
def test_a_bound_is_never_above_what_is_found(seed: int) -> None:
    view, ask = scene(seed)
    learned(view, random.Random(seed))
    places = {unit.id: unit for unit in bounds_of(view, ask).places()}
    found = {one.worker_id: one for one in decide(ask, view, NOW).candidates if not one.refused}
    assert [id for id in found if id not in places] == []
    for id, one in found.items():
        total_ms = round(one.startup.total_s * 1000)
        assert places[id].bound[1] <= total_ms + 1
        if places[id].state == FREE:
            assert places[id].bound[1] == pytest.approx(total_ms, abs=1)
            assert not one.room.victims


def wide(workers: int, busy: str = "") -> tuple[FakeView, Ask]:
    """A server for each worker, with SSDs of different speeds."""
    lines = ["model m weights=10", "model x weights=20"]
    for number in range(workers):
        lines.append(f"server s{number:03} ssd=m ssd-speed={1 + (number * 37 % 101) / 50}")
        lines.append(f"worker w{number:03} on=s{number:03}")
        if busy:
            lines.append(f"replica x{number:03} of=x on=w{number:03} {busy.format((number * 53) % 97 + 1)}")
    return read("\n".join([*lines, "ask m no-move"]))


@pytest.mark.parametrize("busy", ["", "idle={}", "running=1 remaining={}"])
def test_the_best_of_more_places_than_are_looked_at_is_found(busy: str) -> None:
    view, ask = wide(3 * MOST_LOOKS, busy)
    decision = decide(ask, view, NOW)
    view.changed = ([], [])
    each = [
        (chosen.startup.total_s, chosen.worker_id)
        for id in view.workers
        if (chosen := decide(about(ask, id), view, NOW).chosen) is not None
    ]
    assert decision.chosen is not None
    assert decision.chosen.startup.total_s == pytest.approx(min(each)[0], abs=0.001)
    assert decision.more == 3 * MOST_LOOKS - len(decision.candidates)
    assert len(decision.candidates) <= 16


def about(ask: Ask, id: str) -> Ask:
    """The same question about one worker."""
    return replace(ask, at=id)


def test_of_many_equal_places_the_longest_idle_leaves() -> None:
    lines = ["model m weights=10", "model x weights=20", "server a dram=m"]
    for number in range(3 * MOST_LOOKS):
        lines.append(f"worker w{number:03} on=a")
        lines.append(f"replica x{number:03} of=x on=w{number:03} idle={(number * 53) % 193 + 1}")
    view, ask = read("\n".join([*lines, "ask m"]))
    decision = decide(ask, view, NOW)
    longest = max(view.replicas.values(), key=lambda one: one.tenant.idle_s).tenant
    assert decision.outcome is Outcome.EVICT
    assert decision.chosen is not None
    assert decision.chosen.room.stops == (longest.replica_id,)


def test_a_reason_is_one_sentence() -> None:
    view, ask = wide(2, "idle={}")
    assert decide(ask, view, NOW).reason == "w001 can have it soonest, in 6.3 s from ssd, once x001 leaves."
    view, ask = wide(2, "running=0 young idle={}")
    assert decide(ask, view, NOW).reason == "There is no place for it now; w001: memory is 8 GiB short."
    view, ask = read("model m weights=80\nserver a\nworker a0 on=a\nask m")
    told = "It fits nowhere, even if everything else left; a0 needs 81 GiB, the worker has 24 GiB."
    assert decide(ask, view, NOW).reason == told
