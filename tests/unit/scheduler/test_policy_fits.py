"""What fits where if everything else left: for deployments that are asked for, and failures that are told."""

from __future__ import annotations

from services.scheduler.fits import able_servers, too_large
from services.scheduler.view import tier_of
from shared.errors import Code
from tests.unit.scheduler.sight import read


def test_able_servers_have_enough_ready_workers_that_are_large_enough() -> None:
    view, ask = read(
        """
        model m weights=20 zone:west
        server a zone:west
        server b zone:west
        server c phase=draining zone:west
        server d
        worker a0 on=a memory=16
        worker b0 on=b gangs
        worker b1 on=b gangs
        worker b2 on=b phase=draining gangs
        worker c0 on=c
        worker d0 on=d memory=80
        ask m
        """
    )
    assert able_servers(ask.need, view) == ["b", "d"]
    assert able_servers(ask.need, view, ask.labels) == ["b"]
    assert able_servers(ask.need, view, devices=2) == ["b"]
    assert able_servers(ask.need, view, devices=3) == []


def test_too_large_says_what_is_needed_and_what_there_is() -> None:
    view, ask = read("model m weights=40 kv=4\nserver a\nworker a0 on=a\nworker a1 on=a memory=16\nask m")
    failure = too_large(ask.need, view)
    assert failure is not None
    assert failure.code is Code.TOO_LARGE
    assert failure.message == (
        "A replica needs 44 GiB, 4 GiB of it for the KV cache; the largest worker has 24 GiB. "
        "A shorter context needs less."
    )
    assert too_large(ask.need, view, devices=2) is None


def test_too_large_for_every_disk() -> None:
    view, ask = read("model m weights=40\nserver a ssd-size=30\nserver b ssd-size=20\nworker a0 on=a memory=80\nask m")
    failure = too_large(ask.need, view)
    assert failure is not None
    assert failure.message == "The model needs 40 GiB of SSD; the largest tier has 30 GiB."


def test_nothing_is_too_large_as_long_as_nobody_is_there_to_be_asked() -> None:
    view, ask = read("model m weights=4000\nserver a phase=starting\nworker a0 on=a\nask m")
    assert too_large(ask.need, view) is None
    assert able_servers(ask.need, view) == []


def test_a_tier_counts_when_it_has_the_whole_checkpoint() -> None:
    view, ask = read("model m weights=4\nserver a ssd=m\nserver b dram=m ssd=m\nserver c arriving=m:3\nask m")
    assert [tier_of(view.servers[id], ask.need) for id in "abc"] == ["ssd", "dram", "remote"]
