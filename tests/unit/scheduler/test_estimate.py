"""Estimates: what is believed before anything was measured, what is learnt, what a load waits for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.estimate import Estimator, Priors, whereabouts
from services.scheduler.lanes import PROMISE_S, UNSEEN_S
from services.scheduler.terms import Startup
from shared.contracts.migration import MigrationEnded, MigrationOutcome, MigrationReason
from shared.contracts.placement import ReplicaLoaded
from shared.contracts.records import Phase, ReplicaRecord, ReplicaState, ServerRecord
from shared.contracts.residency import Progress

GIB = 1 << 30
MIB = 1 << 20


def server(id: str = "s1", **changes: Any) -> ServerRecord:
    first = ServerRecord(
        server_id=id,
        phase=Phase.READY,
        host="h",
        pid=1,
        dram_capacity_bytes=64 * GIB,
        dram_used_bytes=0,
        leased_bytes=0,
        ssd_capacity_bytes=512 * GIB,
        ssd_used_bytes=0,
    )
    return msgspec.structs.replace(first, **changes)


def replica(id: str = "r1", **changes: Any) -> ReplicaRecord:
    first = ReplicaRecord(
        replica_id=id,
        worker_id="w1",
        server_id="s1",
        deployment="demo",
        revision="v",
        checkpoint_id="c1",
        state=ReplicaState.READY,
        slots=4,
    )
    return msgspec.structs.replace(first, **changes)


def load(tier: str = "ssd", *, wait_s: float = 0.0, move_s: float = 0.0, moved_bytes: int = 0, attach_s: float = 0.5,
         **changes: Any) -> ReplicaLoaded:  # fmt: skip
    first = ReplicaLoaded(
        replica_id="r1",
        deployment="demo",
        worker_id="w1",
        server_id="s1",
        checkpoint_id="c1",
        tier=tier,
        weight_bytes=GIB,
        total_s=wait_s + move_s + attach_s,
        wait_s=wait_s,
        move_s=move_s,
        moved_bytes=moved_bytes,
        attach_s=attach_s,
        work_s=attach_s,
        device="cpu",
    )
    return msgspec.structs.replace(first, **changes)


def moved(size_bytes: int, bytes_per_s: float, tier: str = "ssd", **changes: Any) -> ReplicaLoaded:
    return load(tier, move_s=size_bytes / bytes_per_s, moved_bytes=size_bytes, **changes)


def migration(tokens: int, total_s: float, **changes: Any) -> MigrationEnded:
    first = MigrationEnded(
        migration_id="m",
        request_id="q",
        deployment="demo",
        source_worker_id="w1",
        destination_worker_id="w2",
        reason=MigrationReason.PLACEMENT,
        outcome=MigrationOutcome.COMMITTED,
        tokens=tokens,
        total_s=total_s,
    )
    return msgspec.structs.replace(first, **changes)


# -- before anything was measured


def test_before_any_measurement_it_says_what_is_believed() -> None:
    priors = Priors()
    estimator = Estimator(priors)
    assert estimator.bandwidth("nobody", "ssd") == pytest.approx(priors.bytes_per_s["ssd"])
    assert estimator.bandwidth("nobody", "remote") == pytest.approx(priors.bytes_per_s["remote"])
    assert estimator.wait_s("nobody", "ssd", 0.0) == 0.0
    assert estimator.attach_s("cpu", "c1", 0) == pytest.approx(priors.attach_s["cpu"])
    assert estimator.stop_s() == priors.stop_s
    assert estimator.mean_output_tokens("demo") == priors.output_tokens
    assert estimator.resume_s(replica(running=1, context_tokens=1000)) == pytest.approx(
        1000 * priors.resume_token_s + priors.resume_s
    )
    assert estimator.remaining_s(replica()) == estimator.resume_s(replica()) == 0.0


def test_priors_are_ordered_like_the_tiers() -> None:
    estimator = Estimator(Priors())
    speeds = [estimator.bandwidth("s1", tier) for tier in ("dram", "ssd", "peer", "remote")]
    assert speeds == sorted(speeds, reverse=True)


# -- bandwidths


def test_a_changed_bandwidth_is_believed_within_a_few_loads() -> None:
    estimator = Estimator(Priors())
    for _ in range(5):
        estimator.loaded(moved(GIB, 4e9), 0.0)
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(4e9, rel=0.05)
    for _ in range(4):
        estimator.loaded(moved(GIB, 1e9), 0.0)
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(1e9, rel=0.15)


@pytest.mark.parametrize("odd_bytes_per_s", [1e8, 8e10])
def test_one_outlier_changes_little(odd_bytes_per_s: float) -> None:
    estimator = Estimator(Priors())
    for _ in range(5):
        estimator.loaded(moved(GIB, 2e9), 0.0)
    estimator.loaded(moved(GIB, odd_bytes_per_s), 0.0)
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(2e9, rel=0.35)
    for _ in range(3):
        estimator.loaded(moved(GIB, 2e9), 0.0)
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(2e9, rel=0.1)


def test_tiny_loads_do_not_spoil_it() -> None:
    estimator = Estimator(Priors())
    for _ in range(5):
        estimator.loaded(moved(GIB, 2e9), 0.0)
    for _ in range(3):
        estimator.loaded(moved(100_000, 2e6), 0.0)  # 50 ms of latency
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(2e9, rel=0.15)
    assert estimator.latency_s("s1", "ssd") == pytest.approx(0.05, rel=0.3)
    assert large_load_s(estimator) == pytest.approx(GIB / 2e9, rel=0.05)


def large_load_s(estimator: Estimator, server_id: str = "s1") -> float:
    return estimator.startup(server_id, "cpu", "c1", GIB, GIB, "ssd", 0.0).move_s


def test_a_tiny_first_load_says_nothing_of_the_bandwidth() -> None:
    estimator = Estimator(Priors())
    estimator.loaded(moved(100_000, 1e7), 0.0)
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(1e9, rel=0.1)
    estimator.loaded(moved(GIB, 3e9, server_id="s2"), 0.0)
    assert large_load_s(estimator, "s2") == pytest.approx(GIB / 3e9, rel=0.2), "one large load says a lot"


def test_what_goes_before_the_first_byte_is_told_from_the_bandwidth() -> None:
    estimator = Estimator(Priors())
    for number in range(12):
        size = (50 * MIB, GIB)[number % 2]
        estimator.loaded(load("peer", move_s=0.5 + size / 1e9, moved_bytes=size), 0.0)
    assert estimator.bandwidth("s1", "peer") == pytest.approx(1e9, rel=0.1)
    assert estimator.latency_s("s1", "peer") == pytest.approx(0.5, rel=0.1)


def test_a_server_that_was_never_measured_is_believed_to_be_like_the_others() -> None:
    estimator = Estimator(Priors())
    for id in ("s1", "s2", "s3"):
        estimator.server_said(server(id), 0.0)
    changed = [estimator.loaded(moved(GIB, 4e9), 0.0) for _ in range(6)]
    assert changed[0] == ("s1", "s2", "s3")
    assert changed[-1] == ("s1",), "the others' estimate hardly moves any more"
    assert estimator.bandwidth("s2", "ssd") == pytest.approx(4e9, rel=0.1)
    assert estimator.bandwidth("s2", "remote") == pytest.approx(2e8)
    estimator.loaded(moved(GIB, 1e9, server_id="s2"), 0.0)
    assert estimator.bandwidth("s2", "ssd") < 2e9


def test_what_a_store_has_measured_counts_until_loads_have_shown_it() -> None:
    estimator = Estimator(Priors())
    estimator.server_said(server(ssd_bytes_per_s=5e9), 0.0)
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(5e9)
    estimator.loaded(moved(GIB, 4e9, server_id="s2"), 0.0)
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(5e9)
    for _ in range(5):
        estimator.loaded(moved(GIB, 3e9), 0.0)
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(3e9, rel=0.1)
    for _ in range(5):
        estimator.loaded(moved(GIB, 9e9, server_id="s2"), 0.0)
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(3e9, rel=0.1)
    estimator.forget_server("s1")
    assert estimator.bandwidth("s1", "ssd") == estimator.bandwidth("nobody", "ssd") > 5e9


def test_a_small_slow_transfer_says_little_of_a_server_when_others_are_known() -> None:
    """A store's rate of a small transfer is mostly latency."""
    estimator = Estimator()
    for size_bytes in (50 * MIB, 500 * MIB, GIB):
        estimator.loaded(moved(size_bytes, 1e9, "remote"), 0.0)
    estimator.server_said(server("s2", remote_bytes_per_s=8e7), 0.0)
    estimator.loaded(moved(50 * MIB, 8e7, "remote", server_id="s2"), 0.0)
    assert estimator.bandwidth("s2", "remote") > 1.5e8


def test_a_load_from_dram_says_nothing_of_bandwidths() -> None:
    estimator = Estimator(Priors())
    estimator.loaded(load("dram"), 0.0)
    assert estimator.bandwidth("s1", "ssd") == pytest.approx(1e9)


# -- the queue


def test_a_load_waits_for_those_that_are_queued_in_its_lane() -> None:
    estimator = Estimator(Priors())
    estimator.server_said(server(ssd_bytes_per_s=1e9, ssd_queue={"a": 2 * 10**9, "b": 10**9}), 10.0)
    assert estimator.wait_s("s1", "ssd", 10.0) == pytest.approx(3.0)
    assert estimator.wait_s("s1", "ssd", 11.0) == pytest.approx(2.0), "time passes"
    assert estimator.wait_s("s1", "ssd", 20.0) == 0.0
    assert estimator.wait_s("s1", "remote", 10.0) == estimator.wait_s("s1", "dram", 10.0) == 0.0
    assert estimator.wait_s("s1", "ssd", 10.0, key="b") == pytest.approx(2.0), "what stands behind it is no matter"
    estimator.server_said(server(remote_bytes_per_s=1e8, import_queue={"c": 10**8}), 20.0)
    assert (estimator.wait_s("s1", "ssd", 20.0), estimator.wait_s("s1", "remote", 20.0)) == (
        0.0,
        pytest.approx(1.0 - Priors().latency_s["remote"]),
    ), "the source is looked at meanwhile"


def test_commanded_loads_count_until_the_record_shows_them_and_then_once() -> None:
    estimator = Estimator(Priors())
    estimator.server_said(server(ssd_bytes_per_s=1e9), 0.0)
    estimator.promised("s1", "r1", 10**9, "ssd", 0.0)
    estimator.promised("s1", "r2", 2 * 10**9, "ssd", 0.0, "c2")
    assert estimator.wait_s("s1", "ssd", 0.0) == pytest.approx(3.0, rel=0.01)
    # The first one's record tells which checkpoint it is; the store's shows that one.
    estimator.replica_said(replica("r1", state=ReplicaState.LOADING, load=Progress(phase="queued")), 0.1)
    estimator.server_said(server(ssd_bytes_per_s=1e9, ssd_queue={"c1": 10**9}, dram_arriving={"c1": 0}), 0.1)
    assert estimator.wait_s("s1", "ssd", 0.1) == pytest.approx(3.0, rel=0.01)
    estimator.server_said(server(ssd_bytes_per_s=1e9, ssd_queue={"c1": 5 * 10**8, "c2": 2 * 10**9}), 0.6)
    assert estimator.wait_s("s1", "ssd", 0.6) == pytest.approx(2.5)
    # The first is in DRAM: its bytes are not taken for some that have yet to come.
    estimator.server_said(server(ssd_bytes_per_s=1e9, ssd_queue={"c2": 2 * 10**9}, dram={"c1": 10**9}), 1.1)
    assert estimator.wait_s("s1", "ssd", 1.1) == pytest.approx(2.0)
    estimator.settled("r2")
    estimator.server_said(server(ssd_bytes_per_s=1e9), 3.1)
    assert estimator.wait_s("s1", "ssd", 3.1) == 0.0


def test_a_load_that_was_too_quick_for_the_record_is_not_waited_for() -> None:
    estimator = Estimator(Priors())
    estimator.promised("s1", "r1", 10**9, "ssd", 0.0, "c1")
    estimator.server_said(server(ssd_bytes_per_s=1e9, dram={"c1": 10**9}), 0.5)
    assert estimator.wait_s("s1", "ssd", 0.5) == 0.0


@pytest.mark.parametrize("how", ["loaded", "settled", "ready", "attaching", "forgotten", "late", "never seen"])
def test_a_promise_ends(how: str) -> None:
    estimator = Estimator(Priors())
    estimator.promised("s1", "r1", 10**9, "ssd", 0.0)
    now = 1.0
    match how:
        case "loaded":
            estimator.loaded(load("dram"), now)
        case "settled":
            estimator.settled("r1")
        case "ready":
            estimator.replica_said(replica("r1"), now)
        case "attaching":
            loading = replica("r1", state=ReplicaState.LOADING, load=Progress(phase="attaching"))
            estimator.replica_said(loading, now)
        case "forgotten":
            estimator.forget_server("s1")
        case "late":
            now = PROMISE_S + 0.1
        case "never seen":
            now = UNSEEN_S + 0.1
            estimator.server_said(server(), now)
    assert estimator.wait_s("s1", "ssd", now) == 0.0


def test_two_loads_of_one_checkpoint_move_it_once() -> None:
    estimator = Estimator(Priors())
    estimator.server_said(server(ssd_bytes_per_s=1e9), 0.0)
    for id in ("r1", "r2"):
        estimator.promised("s1", id, 10**9, "ssd", 0.0, "c1")
    assert estimator.wait_s("s1", "ssd", 0.0) == pytest.approx(1.0, rel=0.02)
    assert estimator.wait_s("s1", "ssd", 0.0, key="c1") == 0.0


# -- attaching


def test_attaching_is_learnt_for_each_checkpoint_and_the_others_follow_a_line() -> None:
    estimator = Estimator(Priors())
    for key, weight, seconds in (("small", GIB, 1.0), ("large", 9 * GIB, 5.0)) * 10:
        estimator.loaded(load("dram", checkpoint_id=key, weight_bytes=weight, attach_s=seconds, device="cuda:1"), 0.0)
    assert estimator.attach_s("cuda:0", "small", GIB) == pytest.approx(1.0)
    assert estimator.attach_s("cuda:0", "large", 9 * GIB) == pytest.approx(5.0)
    assert estimator.attach_s("cuda:0", "unknown", 5 * GIB) == pytest.approx(3.0, rel=0.15)
    assert estimator.attach_s("cpu", "small", GIB) < 0.5, "another kind of device"


def test_work_that_is_done_while_bytes_arrive_is_not_added() -> None:
    estimator = Estimator(Priors())
    for _ in range(8):  # 0.8 s of work, 0.2 s of it after the last byte
        report = moved(2 * 10**9, 1e9, attach_s=0.2, work_s=0.8, total_s=2.2)
        estimator.loaded(report, 0.0)
    slow = estimator.startup("s1", "cpu", "c1", 2 * 10**9, 2 * 10**9, "ssd", 0.0)
    assert (slow.move_s, slow.attach_s) == (pytest.approx(2.0, rel=0.05), pytest.approx(0.2))
    quick = estimator.startup("s1", "cpu", "c1", 2 * 10**9, 10**8, "ssd", 0.0)
    assert quick.total_s == pytest.approx(0.8), "the work is what takes longest"
    assert estimator.startup("s1", "cpu", "c1", 2 * 10**9, 0, "dram", 0.0).total_s == pytest.approx(0.8)
    assert estimator.attach_rest_s("cpu", "c1", 2 * 10**9) == pytest.approx(0.2)


def test_a_start_is_the_sum_of_its_parts() -> None:
    estimator = Estimator(Priors())
    estimator.server_said(server(ssd_bytes_per_s=1e9, ssd_queue={"other": 10**9}), 0.0)
    estimator.loaded(load("dram", attach_s=0.5), 0.0)
    start = estimator.startup("s1", "cpu", "c1", 4 * 10**9, 4 * 10**9, "ssd", 0.0, room_s=2.0)
    assert (start.wait_s, start.room_s) == (pytest.approx(1.0), 2.0)
    assert start.move_s == pytest.approx(4.0, rel=0.01)
    assert 0.0 < start.attach_s < 0.5
    assert start.total_s == pytest.approx(start.wait_s + start.move_s + start.attach_s + start.room_s)
    assert estimator.startup("s1", "cpu", "c1", 4 * 10**9, 0, "dram", 0.0) == Startup(attach_s=0.5)


def test_what_is_arriving_has_nobody_in_front_of_it() -> None:
    estimator = Estimator(Priors())
    estimator.server_said(server(ssd_queue={"other": 10**9}, dram_arriving={"c1": 10**9}), 0.0)
    assert estimator.startup("s1", "cpu", "c1", 4 * 10**9, 3 * 10**9, "ssd", 0.0).wait_s == 0.0


@pytest.mark.parametrize(
    ("changes", "peers", "found"),
    [
        ({"dram": {"c1": 100}, "ssd": {"c1": 100}}, True, ("dram", 0)),
        ({"ssd": {"c1": 100}}, True, ("ssd", 100)),
        ({"ssd": {"c1": 100}, "dram_arriving": {"c1": 30}}, True, ("ssd", 70)),
        ({"dram_arriving": {"c1": 30}, "ssd_arriving": {"c1": 20}}, False, ("remote", 70)),
        ({"ssd_arriving": {"c1": 20}}, True, ("peer", 80)),
        ({}, True, ("peer", 100)),
        ({}, False, ("remote", 100)),
    ],
)
def test_where_the_bytes_are(changes: dict[str, Any], peers: bool, found: tuple[str, int]) -> None:
    assert whereabouts(server(**changes), "c1", 100, peers=peers) == found


# -- requests


def test_the_mean_output_follows_what_has_ended() -> None:
    estimator = Estimator(Priors())
    for number in range(1, 60):
        # Two run all the time, with 10 tokens so far in all: those belong to nobody who has ended.
        estimator.replica_said(
            replica(finished_requests=number, generated_tokens=50 * number + 10, running=2, output_tokens=10), 0.0
        )
    assert estimator.mean_output_tokens("demo") == pytest.approx(50, rel=0.05)
    estimator.forget_deployment("demo")
    assert estimator.mean_output_tokens("demo") == Priors().output_tokens


def test_a_request_that_was_cut_short_does_not_say_that_requests_are_short() -> None:
    estimator = Estimator(Priors())
    for number in range(1, 40):  # two of three are cancelled after 20 tokens of 100
        estimator.replica_said(
            replica(finished_requests=3 * number, cut_requests=2 * number, generated_tokens=140 * number), 0.0
        )
    assert estimator.mean_output_tokens("demo") > 100


def test_a_request_that_migrates_is_counted_where_it_ends() -> None:
    estimator = Estimator(Priors())
    for number in range(200):
        source, destination = f"a{number}", f"b{number}"
        # It has made 30 tokens here and leaves; there it makes 20 more and ends.
        estimator.replica_said(replica(source, running=1, generated_tokens=30, output_tokens=30), 0.0)
        estimator.replica_said(replica(destination, running=1, generated_tokens=0, output_tokens=30), 0.0)
        estimator.replica_said(replica(source, generated_tokens=30), 0.0)
        estimator.replica_said(replica(destination, finished_requests=1, generated_tokens=20), 0.0)
    assert estimator.mean_output_tokens("demo") == pytest.approx(50, rel=0.05)


def test_what_remains_is_what_requests_like_these_still_generate() -> None:
    estimator = Estimator(Priors(output_tokens=100.0))
    fresh = replica(running=1, output_tokens=0, left_tokens=1000, step_s=0.1)
    assert estimator.remaining_s(fresh) == pytest.approx(10.0, rel=0.01)
    assert estimator.remaining_s(replica(running=1, output_tokens=30, step_s=0.1)) == pytest.approx(7.0, rel=0.01)
    late = replica(running=1, output_tokens=500, left_tokens=1000, step_s=0.1)
    assert 0.0 < estimator.remaining_s(late) < 10.0, "one that is longer than the average ends some time"
    several = replica(running=4, output_tokens=0, left_tokens=1000, step_s=0.1)
    assert estimator.remaining_s(several) > estimator.remaining_s(fresh), "the last of several"
    short = replica(running=4, output_tokens=0, left_tokens=7, step_s=0.1)
    assert estimator.remaining_s(short) == pytest.approx(0.7)


def test_resuming_is_learnt_from_migrations() -> None:
    estimator = Estimator(Priors())
    for number in range(20):
        tokens = (200, 2000)[number % 2]
        estimator.migrated(migration(tokens, 0.3 + 0.002 * tokens), 100.0 * number)
    line = estimator.resume_line("demo")
    assert (line.slope, line.base) == (pytest.approx(0.002, rel=0.1), pytest.approx(0.3, rel=0.3))
    running = replica(running=2, context_tokens=3000)
    assert estimator.resume_s(running) == pytest.approx(2 * line.base + 3000 * line.slope)
    assert estimator.resume_line("other").slope == pytest.approx(0.002, rel=0.1), "others are believed to be alike"


def test_requests_that_migrate_one_after_another_do_not_each_take_all_of_it() -> None:
    estimator = Estimator(Priors())
    for batch in range(10):
        for number in range(1, 5):  # all four are commanded at once; each takes 1 s
            estimator.migrated(migration(500, float(number)), 100.0 * batch + number)
    assert estimator.resume_line("demo").at(500) == pytest.approx(1.0, rel=0.1)


def test_migrations_that_fail_say_nothing() -> None:
    estimator = Estimator(Priors())
    before = estimator.resume_line("demo")
    estimator.migrated(migration(500, 60.0, outcome=MigrationOutcome.ABORTED), 0.0)
    assert estimator.resume_line("demo") == before


def test_measured_prefills_say_what_a_token_costs() -> None:
    estimator = Estimator(Priors())
    estimator.replica_said(replica(prefill_token_s=0.01), 0.0)
    assert estimator.resume_line("demo").slope == pytest.approx(0.01, rel=0.01)
    assert estimator.resume_line("other").slope == pytest.approx(Priors().resume_token_s, rel=0.01)


def test_stops_are_learnt() -> None:
    estimator = Estimator(Priors())
    for _ in range(12):
        estimator.stopped(0.4)
    assert estimator.stop_s() == pytest.approx(0.4, rel=0.1)


# -- whatever is said


SECONDS = st.floats(min_value=0.0, max_value=1e4)
BYTES = st.integers(min_value=0, max_value=10**12)
LOADS = st.builds(
    lambda tier, wait_s, move_s, moved_bytes, attach_s, work_s, weight, device: load(
        tier, wait_s=wait_s, move_s=move_s, moved_bytes=moved_bytes, attach_s=attach_s, work_s=work_s,
        weight_bytes=weight, device=device,
    ),
    st.sampled_from(["dram", "ssd", "peer", "remote"]), SECONDS, SECONDS, BYTES, SECONDS, SECONDS, BYTES,
    st.sampled_from(["cpu", "cuda:0", ""]),
)  # fmt: skip
MIGRATIONS = st.builds(migration, st.integers(min_value=0, max_value=10**6), SECONDS)
REPLICAS = st.builds(
    lambda running, context, output, left, finished, generated, step_s: replica(
        running=running, context_tokens=context, output_tokens=output, left_tokens=left, finished_requests=finished,
        generated_tokens=generated, step_s=step_s,
    ),
    *[st.integers(min_value=0, max_value=10**6)] * 6, st.none() | SECONDS,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    said=st.lists(LOADS | MIGRATIONS | REPLICAS, max_size=12),
    record=REPLICAS,
    sizes=st.tuples(BYTES, BYTES),
    device=st.sampled_from(["cpu", "cuda:1"]),
    tier=st.sampled_from(["ssd", "peer", "remote"]),
)
def test_whatever_is_said_no_estimate_is_negative_and_more_bytes_take_no_less(
    said: list[ReplicaLoaded | MigrationEnded | ReplicaRecord],
    record: ReplicaRecord,
    sizes: tuple[int, int],
    device: str,
    tier: str,
) -> None:
    estimator = Estimator(Priors())
    for now, one in enumerate(said):
        if isinstance(one, ReplicaLoaded):
            estimator.loaded(one, float(now))
        elif isinstance(one, MigrationEnded):
            estimator.migrated(one, float(now))
        else:
            estimator.replica_said(one, float(now))
    less, more = 1 + min(sizes), 1 + max(sizes)
    for key in ("c1", "unknown"):
        few = estimator.startup("s1", device, key, more, less, tier, 0.0)
        many = estimator.startup("s1", device, key, more, more, tier, 0.0)
        assert min(few.wait_s, few.move_s, few.attach_s) >= 0.0
        assert few.total_s <= many.total_s * (1 + 1e-9)
        assert estimator.attach_s(device, "unknown", less) <= estimator.attach_s(device, "unknown", more)
        assert estimator.attach_rest_s(device, key, more) >= 0.0
    assert estimator.bandwidth("s1", tier) > 0.0
    assert estimator.latency_s("s1", tier) >= 0.0
    assert estimator.remaining_s(record) >= 0.0
    assert estimator.resume_s(record) >= 0.0
    assert estimator.mean_output_tokens("demo") >= 0.0
