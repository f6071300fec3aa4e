"""A fleet of a few servers: what a request's life takes, to the millisecond where that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from services.scheduler.events import MoveAsked
from shared.contracts.migration import Move, Moved
from shared.errors import Code, HearthError
from simulator.fleet.fleet import Fleet
from simulator.fleet.model import Arrival, Hardware, ModelProfile, ModelSpec, Options, ServerShape
from simulator.fleet.report import TIERS, Outcome, Report

GB = 10**9
SLACK_S = 0.02  # messages on the bus, records, decisions

MODEL = ModelProfile(
    name="model", weight_bytes=12 * GB, kv_bytes_per_token=100_000, prefill_token_s=0.001, step_s=0.02,
    step_request_s=0.01, attach_s=0.5,
)  # fmt: skip
SHAPE = ServerShape(
    devices=1, device_memory_bytes=40 * GB, dram_bytes=64 * GB, ssd_bytes=500 * GB, ssd_bytes_per_s=3 * GB,
    network_bytes_per_s=1 * GB, device_bytes_per_s=12 * GB,
)  # fmt: skip


def spec(name: str = "a", **fields: object) -> ModelSpec:
    return replace(ModelSpec(name=name, model=MODEL, target_concurrency=4, keep_alive_s=5.0), **fields)  # type: ignore[arg-type]


def hardware(servers: int = 1, *, cold_ssd: bool = False, peers: bool = True, **fields: object) -> Hardware:
    shape = replace(SHAPE, **fields)  # type: ignore[arg-type]
    return Hardware(servers=(shape,) * servers, remote_bytes_per_s=0.5 * GB, cold_ssd=cold_ssd, peers=peers)


def fleet(
    arrivals: Sequence[Arrival],
    *,
    machines: Hardware | None = None,
    specs: Sequence[ModelSpec] = (),
    options: Options | None = None,
) -> Fleet:
    checked = options or Options(check_every=1, sample_s=1.0)
    return Fleet(machines or hardware(), specs or [spec()], arrivals, options=checked)


def run(arrivals: Sequence[Arrival], machines: Hardware | None = None, specs: Sequence[ModelSpec] = ()) -> Report:
    return fleet(arrivals, machines=machines, specs=specs).run()


def tiers(report: Report) -> list[str]:
    return [TIERS[one] for one in report.ledgers.tier]


def test_a_cold_start_from_the_ssd_takes_what_its_parts_take() -> None:
    report = run([Arrival(1.0, "a", 100, 51)])
    ledgers = report.ledgers
    assert ledgers.outcome.tolist() == [Outcome.COMPLETE]
    # 12 GB at 3 GB/s; what is left when the last byte has arrived goes to the device in milliseconds; 0.5 s to attach.
    assert tiers(report) == ["ssd"]
    assert ledgers.move_s[0] == pytest.approx(4.0, abs=SLACK_S)
    assert ledgers.attach_s[0] == pytest.approx(0.5, abs=SLACK_S)
    assert ledgers.startup_s[0] == pytest.approx(4.5, abs=2 * SLACK_S)
    assert ledgers.prefill_s[0] == pytest.approx(0.1, abs=1e-6)
    assert ledgers.ttft_s[0] == pytest.approx(ledgers.startup_s[0] + 0.1, abs=SLACK_S)
    assert ledgers.decode_s[0] == pytest.approx(50 * 0.02, abs=1e-6)


def test_the_second_cold_start_comes_from_dram() -> None:
    report = run([Arrival(1.0, "a", 100, 2), Arrival(30.0, "a", 100, 2)])
    assert tiers(report) == ["ssd", "dram"]
    assert report.ledgers.startup_s[1] == pytest.approx(12 / 12 + 0.5, abs=2 * SLACK_S)
    assert report.accesses.hit.tolist() == [False, True]
    assert report.counters.loads == {"ssd": 1, "dram": 1}


def test_a_checkpoint_that_is_nowhere_else_comes_from_the_object_store() -> None:
    report = run([Arrival(1.0, "a", 100, 2)], hardware(cold_ssd=True))
    assert tiers(report) == ["remote"]
    assert report.ledgers.startup_s[0] == pytest.approx(12 / 0.5 + 0.5, abs=0.1)


def test_another_server_is_a_faster_source_than_the_object_store() -> None:
    machines = replace(hardware(2), ssd_copies=1)
    both = [Arrival(1.0, "a", 10, 3000), Arrival(1.0, "a", 10, 3000)]
    report = run(both, machines, [spec(target_concurrency=1, max_replicas=2)])
    assert sorted(tiers(report)) == ["peer", "ssd"]
    peer = tiers(report).index("peer")
    assert report.ledgers.move_s[peer] == pytest.approx(12.0, abs=0.3)


def test_a_warm_start_takes_a_few_messages() -> None:
    report = run([Arrival(1.0, "a", 100, 200), Arrival(7.0, "a", 100, 2)])
    assert tiers(report)[1] == ""
    assert report.ledgers.startup_s[1] < SLACK_S


def test_requests_that_decode_together_slow_each_other_down() -> None:
    report = run([Arrival(1.0, "a", 1, 101), Arrival(1.0, "a", 1, 101)])
    # Two at once: 0.03 s a step; the other one begins a prefill (1 ms) later.
    assert report.ledgers.decode_s[0] == pytest.approx(100 * 0.03, abs=0.02)


def test_a_request_waits_for_a_slot_and_the_ledger_says_so() -> None:
    report = run([Arrival(1.0, "a", 10, 101), Arrival(1.0, "a", 10, 101)], specs=[spec(target_concurrency=1)])
    first, second = report.ledgers.total_s
    assert second == pytest.approx(first + 2.01, abs=SLACK_S)
    assert report.ledgers.queue_s[1] == pytest.approx(2.01, abs=2 * SLACK_S)


def test_the_parts_of_a_start_add_up() -> None:
    specs = [spec(f"m{number}", keep_alive_s=1.0) for number in range(6)]
    arrivals = [Arrival(0.7 * number, f"m{number * 5 % 6}", 50, 40) for number in range(40)]
    ledgers = run(arrivals, hardware(2), specs).ledgers
    names = ("queue_s", "decide_s", "room_s", "load_queue_s", "move_s", "attach_s")
    parts = sum(getattr(ledgers, name) for name in names)
    assert np.abs(parts - ledgers.startup_s).max() < 1e-6
    assert (ledgers.room_s > 0).any(), "nobody had to leave: this is not the test that it should be"


def test_who_is_not_answered_in_time_fails_and_leaves_the_queue() -> None:
    options = Options(time_limit_s=3.0, check_every=1)
    report = fleet([Arrival(1.0, "a", 100, 2)], options=options).run()
    assert report.ledgers.outcome.tolist() == [Outcome.TIMED_OUT]
    assert report.ledgers.total_s[0] == pytest.approx(3.0, abs=1e-6)
    assert np.isnan(report.ledgers.startup_s[0])
    assert report.startup(limit_s=3.0).tolist() == [3.0]


def test_a_request_beyond_the_limit_of_its_queue_is_refused() -> None:
    report = run([Arrival(1.0, "a", 100, 2)] * 3, specs=[spec(queue_limit=2)])
    assert sorted(report.ledgers.outcome.tolist()) == [Outcome.COMPLETE, Outcome.COMPLETE, Outcome.REFUSED]


def test_a_running_request_moves_by_rounds_and_hardly_pauses() -> None:
    one = fleet(
        [Arrival(1.0, "a", 200, 1500)],
        machines=hardware(2),
        specs=[spec(max_replicas=2)],
        options=Options(check_every=1, sample_s=0.0),
    )
    world = one.world
    answers: list[object] = []

    def ask() -> None:
        (source,) = [worker for worker in world.workers.values() if worker.replicas]
        want = Move(move_id="x", from_worker_id=source.id, request_ids=("q0",), wait_s=60.0)
        assert world.leader is not None
        world.leader.handle(MoveAsked(want, answers.append))

    world.kernel.at(12.0, ask)
    report = one.run()
    ledgers = report.ledgers
    assert ledgers.outcome.tolist() == [Outcome.COMPLETE]
    assert ledgers.migrations.tolist() == [1]
    assert report.counters.moves_committed == 1
    assert report.counters.migration_rounds >= 2
    # The gap of the last round, a step and the hand-over's messages.
    assert 0 < ledgers.pause_s[0] < 0.2
    assert ledgers.decode_s[0] == pytest.approx(1499 * 0.02, abs=0.2)
    assert [type(one) for one in answers] == [Moved]


def test_utilisation_shows_what_devices_do() -> None:
    report = run([Arrival(1.5, "a", 100, 301)])
    states = report.utilisation.state[:, 0].tolist()
    assert states[0] == 0
    assert {1, 3} <= set(states), "it loads, and then runs"
    assert report.utilisation.share(3).max() == 1.0


@pytest.mark.parametrize(
    ("machines", "specs"),
    [
        (replace(hardware(), servers=()), [spec()]),
        (hardware(), []),
        (hardware(), [spec(), spec()]),
        (hardware(ssd_bytes_per_s=0.0), [spec()]),
        (hardware(dram_bytes=1), [spec()]),
    ],
    ids=["no servers", "no deployments", "twice", "no bandwidth", "no pool"],
)
def test_what_contradicts_itself_is_refused(machines: Hardware, specs: list[ModelSpec]) -> None:
    with pytest.raises(HearthError) as caught:
        Fleet(machines, specs, [])
    assert caught.value.failure.code is Code.INVALID_REQUEST


def test_a_request_for_what_is_not_deployed_is_refused() -> None:
    with pytest.raises(HearthError, match="not deployed"):
        run([Arrival(1.0, "b", 1, 1)])


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(HearthError, match="no policy"):
        Fleet(hardware(), [spec()], [], policy="best")
