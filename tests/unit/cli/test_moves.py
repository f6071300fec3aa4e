"""`hearth requests|migrate|drain`: who is meant, and how it is shown."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from services.cli.client import ClientError, DrainingWorker
from services.cli.moves import drain_meant, left_words, meant, moved_words, moving_words, requests_meant, requests_table
from shared.contracts.migration import MigrationEnded, MigrationOutcome, MigrationReason, Moving, RunningRequest
from shared.contracts.records import ClusterView, Phase, WorkerRecord
from tests.unit.cli.test_ps import server

CALL = "0123456789abcdef01234567"


def worker(worker_id: str, server_id: str = "server-1") -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id, server_id=server_id, phase=Phase.READY, pid=1, device="cpu", device_name="",
        memory_total_bytes=1, memory_used_bytes=0, max_replicas=1,
    )  # fmt: skip


def ended(**more: Any) -> MigrationEnded:
    fields = {
        "migration_id": "m", "request_id": "r1", "deployment": "demo", "source_worker_id": "worker-1",
        "destination_worker_id": "worker-2", "reason": MigrationReason.OPERATOR,
        "outcome": MigrationOutcome.COMMITTED, "rounds": 3, "tokens": 412, "gap_tokens": 5, "wire_bytes": 3 * 1024,
        "total_s": 0.25, "frozen_s": 0.0123, **more,
    }  # fmt: skip
    return MigrationEnded(**fields)


def test_an_id_may_be_cut_short_as_long_as_it_is_clear() -> None:
    ids = [f"{CALL}-0", f"{CALL}-1", "fff", "worker-1", "worker-10"]
    assert meant("ff", ids, "request", "x") == "fff"
    assert meant(f"{CALL}-1", ids, "request", "x") == f"{CALL}-1"
    assert meant("worker-1", ids, "worker", "x") == "worker-1", "an id itself goes before one that begins so"
    with pytest.raises(ClientError, match="'0123' could be 2 of them: 0123456789abcdef01234567-0, "):
        meant("0123", ids, "request", "x")
    for text in ("zzz", ""):
        with pytest.raises(ClientError, match=f"No request has an id that begins with '{text}'; look there"):
            meant(text, ids, "request", "look there")


def test_the_beginning_of_a_call_means_all_its_choices() -> None:
    ids = [f"{CALL}-0", f"{CALL}-1", f"{CALL}-10", "0124", "fff"]
    assert requests_meant("0123", ids) == requests_meant(CALL, ids) == [f"{CALL}-0", f"{CALL}-1", f"{CALL}-10"]
    assert requests_meant(f"{CALL}-1", ids) == [f"{CALL}-1"]
    assert requests_meant("f", ids) == ["fff"]
    with pytest.raises(ClientError, match="'012' could be 4 of them: 0124, 0123456789abcdef01234567-0, "):
        requests_meant("012", ids)
    for text in ("zzz", ""):
        with pytest.raises(ClientError, match=f"No running request has an id that begins with '{text}'; hearth req"):
            requests_meant(text, ids)


def test_what_drains_is_a_worker_or_a_server() -> None:
    view = ClusterView(workers=(worker("worker-1"), worker("w2", "server-2")), servers=(server(1, ssd={}),))
    assert drain_meant("worker-1", view) == ("workers", "worker-1")
    assert drain_meant("wor", view) == ("workers", "worker-1")
    assert drain_meant("server-1", view) == ("servers", "server-1")
    assert drain_meant("server-2", view) == ("servers", "server-2"), "its store is away"
    with pytest.raises(ClientError, match="could be 2 of them: w2, worker-1"):
        drain_meant("w", view)
    with pytest.raises(ClientError, match="there are: w2, worker-1, server-1, server-2"):
        drain_meant("x", view)
    with pytest.raises(ClientError, match="none runs"):
        drain_meant("x", ClusterView())


def shown(running: list[RunningRequest]) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=100).print(requests_table(running))
    return out.getvalue().splitlines()


def test_running_requests_fit_into_100_columns() -> None:
    long = RunningRequest(
        request_id=f"{CALL}-15", gateway_id="gateway-1", deployment="demo", worker_id="worker-1", replica_id="r",
        state="claiming", epoch=3, prompt_tokens=4000, completion_tokens=1234, running_s=125.0,
        migrating_to="worker-12",
    )  # fmt: skip
    short = RunningRequest(
        request_id=CALL, gateway_id="gateway-1", deployment="demo", worker_id="worker-1", replica_id="r", state="decode"
    )
    lines = shown([long, short])
    assert max(map(len, lines)) <= 100
    assert len(lines) == 4, "a title, a header, and a line for each"
    assert lines[2].split() == [
        f"{CALL}-15", "demo", "worker-1", "claiming", "4000", "1234", "125", "s", "worker-12",
    ]  # fmt: skip
    assert lines[3].split()[-1] == "–"
    assert shown([]) == ["no request runs"]


def test_how_a_migration_ended_in_words() -> None:
    assert moved_words(ended()) == (
        "r1 moved from worker-1 to worker-2: 3 rounds, 412 tokens (5 of them after the last round), 3 KiB; "
        "frozen for 12.3 ms of 250 ms"
    )
    assert "1 round," in moved_words(ended(rounds=1))
    over = ended(outcome=MigrationOutcome.ENDED)
    assert moved_words(over) == "r1 was over before it had moved to worker-2"


def test_how_far_it_is_in_words() -> None:
    assert moving_words(Moving(phase="placing")) == "placing"
    assert moving_words(Moving(phase="loading", to_worker_id="worker-2")) == "loading at worker-2"
    assert moving_words(Moving(phase="migrating", to_worker_id="worker-2")) == "migrating to worker-2"


def test_what_is_left_in_words() -> None:
    left = DrainingWorker(worker_id="w", phase="draining", requests=1, incoming=1, replicas=1)
    assert left_words(left) == "2 requests, 1 replica left"
    assert left_words(DrainingWorker(worker_id="w", phase="draining", requests=1, replicas=0)) == (
        "1 request, 0 replicas left"
    )
    assert left_words(DrainingWorker(worker_id="w", phase="", requests=0, replicas=0)) == "has ended"
