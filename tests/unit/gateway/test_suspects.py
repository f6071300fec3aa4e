"""Requests that kill their workers are found out; those who only stood by live."""

from __future__ import annotations

import pytest

from services.gateway import core as c
from services.gateway.suspects import Suspects
from shared.contracts.requests import Claim, Claimed, Trial
from shared.errors import Code, Failure
from tests.unit.gateway.bench import CONFIG, Bench, only


def test_a_request_that_kills_its_workers_fails_and_says_so() -> None:
    bench = Bench()
    bench.begin()
    for delivery in range(1, CONFIG.max_deliveries):
        bench.kill(f"w{delivery}")
        assert bench.own(worker=f"w{delivery + 1}", delivery=delivery + 1, sequence=17) == delivery + 1
    out = bench.kill(f"w{CONFIG.max_deliveries}")
    assert only(out, c.Unqueue) == [c.Unqueue(17)]
    assert only(out, c.GiveBack) == []
    ((_, failure),) = bench.failed
    assert failure.code is Code.WORKER_LOST
    assert failure.message.startswith(f"{CONFIG.max_deliveries} workers in a row ended")


def test_an_engine_that_dies_counts_and_a_drain_does_not() -> None:
    bench = Bench()
    bench.begin()
    for delivery in range(1, 50):
        bench.give_back(epoch=delivery)
        bench.own(delivery=delivery + 1, sequence=17)
    assert not bench.failed
    for delivery in range(50, 50 + CONFIG.max_deliveries):
        out = bench.give_back(epoch=delivery, fault=True)
        assert only(out, c.OwnerLost) == [c.OwnerLost("w1", "fault", 1)]
        bench.claim(delivery=delivery + 1, sequence=17)
    assert bench.failed[0][1].code is Code.WORKER_LOST


def test_an_owner_that_lasts_acquits_the_request() -> None:
    bench = Bench()
    bench.admit(budget_s=1000.0)
    bench.own(sequence=17)
    epoch = 1
    for _ in range(10):
        for _ in range(CONFIG.max_deliveries - 1):
            bench.give_back(epoch=epoch, fault=True)
            epoch = bench.own(delivery=epoch + 1, sequence=17)
        bench.now += CONFIG.proof_s
        bench.give_back(epoch=epoch, fault=True)
        epoch = bench.own(delivery=epoch + 1, sequence=17)
    assert not bench.failed


def test_a_source_that_goes_on_has_had_the_request_all_the_time() -> None:
    bench = Bench()
    bench.begin()
    bench.now = CONFIG.proof_s / 2
    bench.claim(after_epoch=1, claim_id="back", token="a.1")
    bench.now = CONFIG.proof_s
    bench.give_back(epoch=2, fault=True)
    assert bench.core._suspects.losses("a") == 0


def test_migrations_are_no_losses_and_last_as_long_as_they_last() -> None:
    bench = Bench()
    bench.begin()
    for epoch in range(1, 30):
        bench.claim(worker=f"w{epoch % 3}", after_epoch=epoch, claim_id=f"m{epoch}", token="a.1")
    assert not bench.failed
    bench.give_back(epoch=30, fault=True)
    assert bench.core._suspects.losses("a") == 1
    bench.own(delivery=2, sequence=17)
    bench.now = CONFIG.proof_s
    bench.claim(worker="w5", after_epoch=31, claim_id="m31")
    assert bench.core._suspects.losses("a") == 0, "it was not the request"


def test_other_gateways_hear_of_trials() -> None:
    bench = Bench()
    bench.begin()
    bench.give_back(epoch=1, fault=True)
    bench.own(delivery=2, sequence=17)
    assert only(bench.give_back(epoch=2, fault=True), c.TellTrial) == []
    claim = Claim(request_id="a", worker_id="w1", replica_id="r", delivery=3, token="t", sequence=17)
    out = bench.do(c.ClaimAsked(claim, lambda _: None))
    assert only(out, c.TellTrial) == [c.TellTrial("m-1", "a", on=True, guilty=False)]
    out = bench.give_back(epoch=3, fault=True)
    assert only(out, c.TellTrial) == [
        c.TellTrial("m-1", "a", on=False, guilty=False),
        c.TellTrial("m-1", "a", on=False, guilty=True),
    ]


def test_what_another_gateway_tries_keeps_ours_waiting() -> None:
    bench = Bench()
    bench.begin()
    bench.give_back(epoch=1, fault=True)
    bench.do(c.TrialHeard(Trial(gateway_id="g2", slug="m-1", request_id="x", on=True)))
    bench.own(delivery=2, sequence=17)
    bench.give_back(epoch=2, fault=True)
    answer = bench.claim(delivery=3, sequence=17, token="t")
    assert isinstance(answer, Failure)
    assert answer.code is Code.BUSY
    bench.do(c.TrialHeard(Trial(gateway_id="g2", slug="m-1", request_id="x", on=False, guilty=True)))
    assert bench.own(delivery=4, sequence=17) == 3


@pytest.mark.parametrize(("other", "waits"), [("a1", True), ("z1", False)])
def test_of_two_trials_that_began_at_the_same_moment_one_waits(other: str, waits: bool) -> None:
    bench = Bench()
    bench.begin()
    bench.give_back(epoch=1, fault=True)
    bench.own(delivery=2, sequence=17)
    bench.give_back(epoch=2, fault=True)
    assert bench.own(delivery=3, sequence=17) == 3
    out = bench.do(c.TrialHeard(Trial(gateway_id=other, slug="m-1", request_id="x", on=True)))
    asked_back = [action.cancel.requeue for action in only(out, c.CancelWork)]
    assert asked_back == ([True] if waits else [])


def test_the_innocent_live_and_the_guilty_is_found() -> None:
    """Eight requests share their workers; one kills every worker that takes it, half a second after."""
    bench = Bench(c.Config(max_deliveries=5))
    names = [f"r{number}" for number in range(8)]
    guilty = names[5]
    deliveries = dict.fromkeys(names, 0)
    epochs: dict[str, int] = {}
    dead = 0
    for number, name in enumerate(names):
        bench.admit(name, budget_s=600.0)
        bench.do(c.Published(name, 0, number + 1))
    waiting = list(names)
    owners: dict[str, str] = {}
    running: dict[str, int] = {}
    while guilty not in [call_id for call_id, _ in bench.failed]:
        assert bench.now < 300.0
        for name in list(waiting):
            deliveries[name] += 1
            token, worker = f"{name}.{deliveries[name]}", f"w{dead}"
            answer = bench.claim(name, worker, deliveries[name], token=token, sequence=names.index(name) + 1)
            if isinstance(answer, Claimed):
                waiting.remove(name)
                owners[name], epochs[name] = worker, answer.epoch
                running.setdefault(name, 0)
            else:
                assert isinstance(answer, Failure)
                assert answer.code is Code.BUSY
        if guilty in owners:
            out = bench.kill(f"w{dead}")
            dead += 1
            waiting += [give.token.split(".")[0] for give in only(out, c.GiveBack)]
            owners.clear()
        else:
            bench.now += 1.0
            for name, worker in owners.items():
                bench.frame(running[name], name, epoch=epochs[name], worker=worker)
                running[name] += 1
    assert dead == 5
    assert [call_id for call_id, _ in bench.failed] == [guilty]
    for name in names:
        if name in waiting:
            deliveries[name] += 1
            assert bench.own(name, "w9", deliveries[name], sequence=names.index(name) + 1)
    assert bench.core.open_requests == 7


def test_suspects_are_tried_one_at_a_time_and_per_deployment() -> None:
    suspects = Suspects(most=5, proof_s=10.0)
    for request_id in ("a", "b"):
        assert suspects.may_try("m", request_id, 0.0)
        assert not suspects.lost("m", request_id, 1.0)
        assert not suspects.lost("m", request_id, 1.0)
    suspects.lost("other", "x", 1.0)
    suspects.lost("other", "x", 1.0)
    assert suspects.may_try("m", "a", 1.0)
    assert suspects.may_try("m", "a", 1.0)
    assert not suspects.may_try("m", "b", 2.0)
    assert suspects.may_try("other", "x", 2.0)
    assert suspects.may_try("m", "c", 2.0), "no suspect"
    assert suspects.may_try("m", "b", 11.0), "the first has lasted"
    assert not suspects.may_try("m", "a", 12.0)
    suspects.stopped("m", "b", 2.0)
    assert suspects.may_try("m", "a", 12.0)
    suspects.forget("m", "a")
    assert suspects.may_try("m", "b", 13.0)
    assert suspects.losses("a") == 0


def test_gateways_do_not_try_two_suspects_at_once() -> None:
    here, there = (Suspects(most=4, proof_s=10.0) for _ in range(2))

    def tell(now: float) -> None:
        for sender, receiver, name in ((here, there, "g1"), (there, here, "g2")):
            for news in sender.take_news():
                receiver.heard(name, news.slug, news.on, news.guilty, now)

    for suspects, request_id in ((here, "a"), (there, "b"), (there, "c")):
        suspects.lost("m", request_id, 1.0)
        suspects.lost("m", request_id, 1.0)
    assert here.may_try("m", "a", 0.0)
    tell(0.0)
    assert not there.may_try("m", "b", 1.0)
    here.stopped("m", "a", 1.0)
    tell(1.0)
    assert there.may_try("m", "b", 1.0)
    tell(1.0)
    assert not here.may_try("m", "a", 10.9)
    assert here.may_try("m", "a", 11.0), "whoever tells of a trial may die: it counts no longer than it takes"
    assert not there.lost("m", "b", 1.0)
    assert there.lost("m", "b", 1.0)
    tell(12.0)
    assert (here.losses("a"), there.losses("c")) == (0, 0), "all are acquitted when the guilty one is found"
    assert here._elsewhere == {}


def test_when_the_guilty_one_is_found_the_others_are_acquitted() -> None:
    suspects = Suspects(most=3, proof_s=10.0)
    for _ in range(2):
        suspects.lost("m", "a", 1.0)
        suspects.lost("m", "b", 1.0)
        suspects.lost("other", "x", 1.0)
    assert suspects.lost("m", "a", 1.0)
    assert (suspects.losses("b"), suspects.losses("x")) == (0, 2)
    suspects.forget("m", "a")
    suspects.forget("other", "x")
    assert suspects.known() == []
