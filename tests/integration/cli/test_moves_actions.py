"""`hearth requests|migrate|drain|ps` against a real gateway, with workers and a scheduler written by hand."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import pytest

from services.cli.parser import parse
from shared.contracts.migration import MigrationInFlight, MigrationOutcome, MigrationReason, Moved, Moving
from shared.contracts.records import Phase, WorkerRecord
from shared.errors import Code, Failure
from tests.integration.gateway.harness import Cluster, cluster, until
from tests.integration.gateway.test_gateway_moves import Scheduler, Worker, ended, running

Capture = pytest.CaptureFixture[str]


async def hearth(it: Cluster, *arguments: str) -> int:
    """Run the command line on a thread of its own, as it has an event loop of its own; its exit code."""
    return await asyncio.to_thread(parse([*arguments, "--url", it.url]).run)


async def test_the_requests_that_run(nats_url: str, redis_url: str, prefix: str, capsys: Capture) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        assert await hearth(it, "requests") == 0
        assert "no request runs" in capsys.readouterr().out
        runs = [running("abc", "w1", completion_tokens=7, migrating_to="w2"), running("abd", "w1")]
        await Worker(it, "w1", runs=runs).start()
        assert await hearth(it, "requests") == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["abc", "m", "w1", "decode", "0", "7", "0", "s", "w2"] in rows
        await (await Worker(it, "w2").start()).stop()
        assert await hearth(it, "requests", "--json") == 1
        shown = capsys.readouterr()
        answer = json.loads(shown.out)
        assert ([one["request_id"] for one in answer["data"]], answer["silent"]) == (["abc", "abd"], ["w2"])
        assert "hearth: w2 does not answer." in shown.err


async def test_a_migration(nats_url: str, redis_url: str, prefix: str, capsys: Capture) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1"), running("b", "w1")]).start()
        await Worker(it, "other").start()
        scheduler = await Scheduler(it).start()
        last = Moved(ended=(ended(total_s=0.5, frozen_s=0.01, wire_bytes=2048),))
        loading = Moving(phase="loading", to_worker_id="other")
        scheduler.answers = [loading, loading, Moving(phase="migrating", to_worker_id="other"), last]
        assert await hearth(it, "migrate", "a", "--to", "oth") == 0
        shown = capsys.readouterr()
        assert shown.err == "a: loading at other\na: migrating to other\n"
        assert shown.out.splitlines()[-1] == (
            "a moved from w1 to w2: 2 rounds, 40 tokens (3 of them after the last round), 2 KiB; "
            "frozen for 10.0 ms of 500 ms"
        )
        assert (scheduler.asked[0].to_worker_id, scheduler.asked[0].request_ids) == ("other", ("a",))
        scheduler.answers = [last]
        assert await hearth(it, "migrate", "a", "--json") == 0
        assert json.loads(capsys.readouterr().out)["rounds"] == 2
        assert scheduler.asked[-1].to_worker_id == ""


async def test_the_choices_of_a_call_move_together(nats_url: str, redis_url: str, prefix: str, capsys: Capture) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a-0", "w1"), running("a-1", "w1"), running("b", "w1")]).start()
        scheduler = await Scheduler(it, [Failure(code=Code.NO_CAPACITY, message="There is no slot.")]).start()
        assert await hearth(it, "migrate", "a") == 1
        assert sorted(one.request_ids for one in scheduler.asked) == [("a-0",), ("a-1",)]
        says = [f"hearth: a-{index}: There is no slot." for index in (0, 1)]
        assert sorted(capsys.readouterr().err.splitlines()) == says
        assert await hearth(it, "migrate", "a", "--to", "w1") == 1
        says = [f"hearth: Request 'a-{index}' runs at w1 already." for index in (0, 1)]
        assert sorted(capsys.readouterr().err.splitlines()) == says


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["z"], "hearth: No running request has an id that begins with 'z'; hearth requests lists them.\n"),
        (["a", "--to", "z"], "hearth: No worker has an id that begins with 'z'; there are: other, w1.\n"),
        (["a", "--to", "w1"], "hearth: Request 'a' runs at w1 already.\n"),
        (["a"], "hearth: Request 'a' did not move and goes on at w1: There is no slot.\n"),
        (["b"], "hearth: The scheduler does not answer.\n"),
    ],
)
async def test_a_migration_that_cannot_be(
    nats_url: str, redis_url: str, prefix: str, capsys: Capture, arguments: list[str], says: str
) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1"), running("b", "w1")]).start()
        await Worker(it, "other").start()
        full = Failure(code=Code.NO_CAPACITY, message="There is no slot.")
        moving = Moving(phase="migrating")
        if arguments != ["b"]:
            aborted = Moved(ended=(ended(MigrationOutcome.ABORTED, failure=full),))
            await Scheduler(it, [moving, aborted]).start()
        assert await hearth(it, "migrate", *arguments) == 1
        assert capsys.readouterr().err.endswith(says)


async def test_a_drain_and_its_undoing(nats_url: str, redis_url: str, prefix: str, capsys: Capture) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        worker = await Worker(it, "w1", runs=[running("a", "w1")], replica=True).start()
        draining = it.tasks.create_task(hearth(it, "drain", "w"))
        await until(lambda: worker.phase is Phase.DRAINING)
        await asyncio.sleep(0.7)
        worker.runs, worker.replica = [], False
        await worker.write()
        assert await draining == 0
        shown = capsys.readouterr()
        assert shown.out.endswith("w1 is drained: nothing runs there\n")
        assert shown.err == "w1: 1 request, 1 replica left\n"
        assert await hearth(it, "drain", "s1", "--json") == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"drained": ["w1"]}
        assert await hearth(it, "drain", "w1", "--undo") == 0
        assert capsys.readouterr().out.endswith("w1 takes work again\n")
        assert worker.orders == [True, True, False]


async def test_a_drain_that_takes_too_long(nats_url: str, redis_url: str, prefix: str, capsys: Capture) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1")]).start()
        assert await hearth(it, "drain", "w1", "--timeout", "0.3") == 1
        says = "hearth: After 0.3 s there is still something on w1 (1 request, 0 replicas); they go on draining.\n"
        assert capsys.readouterr().err.endswith(says)
        assert await hearth(it, "drain", "w1", "--timeout", "0") == 0
        assert capsys.readouterr().out.endswith("w1 is draining; hearth drain w1 --undo takes that back\n")
        assert await hearth(it, "drain", "nobody") == 1
        says = "hearth: No worker or server has an id that begins with 'nobody'; there are: w1, s1.\n"
        assert capsys.readouterr().err == says


@pytest.mark.parametrize(
    ("arguments", "shows", "says"),
    [
        (["drain", "w1"], b"w1: 1 request", b"w1 goes on draining; hearth drain w1 --undo takes that back."),
        (["migrate", "a"], b"a: loading", b"a goes on moving; hearth requests shows what runs where."),
    ],
)
async def test_ctrl_c_leaves_the_work_running_and_says_so(
    nats_url: str, redis_url: str, prefix: str, arguments: list[str], shows: bytes, says: bytes
) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await Worker(it, "w1", runs=[running("a", "w1")]).start()
        await Scheduler(it, [Moving(phase="loading")]).start()
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-P", "-m", "services", *arguments, "--url", it.url],
            env={name: value for name, value in os.environ.items() if not name.startswith("HEARTH_")},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Whoever runs the tests in the background may have it ignored, which is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stderr is not None
        assert shows in await process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
        assert (process.returncode, out, err) == (130, b"", b"hearth: " + says + b"\n")


async def test_ps_shows_what_drains_and_what_moves(nats_url: str, redis_url: str, prefix: str, capsys: Capture) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        moving = MigrationInFlight(
            migration_id="m", request_id="abc", deployment="m", destination_worker_id="w2",
            reason=MigrationReason.DRAIN, state="round", rounds=2, tokens=120, gap_tokens=4, running_s=0.25,
        )  # fmt: skip
        record = WorkerRecord(
            worker_id="w1", server_id="s1", phase=Phase.DRAINING, pid=77, device="cpu", device_name="",
            memory_total_bytes=1, memory_used_bytes=0, max_replicas=1, migrations=(moving,),
        )  # fmt: skip
        await it.registry.put(record, ttl_s=None)
        assert await hearth(it, "ps") == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["abc", "w1", "→", "w2", "drain", "round", "2", "120", "4", "250", "ms"] in rows
        assert ["w1", "s1", "draining", "77", "cpu"] in [row[:5] for row in rows]
