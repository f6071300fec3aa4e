"""The tables of `hearth ps`."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from services.cli.ps import residency, tables
from shared.contracts.migration import MigrationInFlight, MigrationReason
from shared.contracts.records import (
    ClusterView,
    DeploymentRecord,
    DeploymentSpec,
    DeploymentState,
    Phase,
    ReplicaRecord,
    ReplicaState,
    SchedulerRecord,
    ServerRecord,
    WorkerRecord,
)
from shared.contracts.residency import Checkpoint, Progress, Source
from shared.errors import Code, Failure

CHECKPOINT = Checkpoint(
    checkpoint_id="c1", architecture="LlamaForCausalLM", weight_bytes=12 * 2**20, parameters=4_200_000, dtype="float32",
    max_context_tokens=2048, kv_bytes_per_token=1024, vocab_tokens=4096, has_chat_template=True,
)  # fmt: skip


def server(number: int, *, ssd: dict[str, int], dram: dict[str, int] | None = None) -> ServerRecord:
    return ServerRecord(
        server_id=f"server-{number}", phase=Phase.READY, host="h", pid=1, dram_capacity_bytes=2**30, dram_used_bytes=0,
        leased_bytes=0, ssd_capacity_bytes=2**40, ssd_used_bytes=12 * 2**20, dram=dram or {}, ssd=ssd,
    )  # fmt: skip


def deployment(name: str, checkpoint: Checkpoint | None = CHECKPOINT) -> DeploymentRecord:
    return DeploymentRecord(
        spec=DeploymentSpec(name=name, source=Source(url="/m")), slug=name, revision="r", state=DeploymentState.READY,
        created_at_s=0.0, checkpoint=checkpoint,
    )  # fmt: skip


def shown(view: ClusterView) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(tables(view))
    return out.getvalue()


def test_everything_fits_into_100_columns() -> None:
    view = ClusterView(
        servers=(server(1, dram={"c1": 1}, ssd={"c1": 1}), server(2, ssd={"c1": 1})),
        workers=(
            WorkerRecord(
                worker_id="worker-1", server_id="server-1", phase=Phase.READY, pid=1, device="cuda:0",
                device_name="A GPU with a very long name of its own that never ends", memory_total_bytes=2**36,
                memory_used_bytes=2**30, max_replicas=8,
            ),
        ),
        replicas=(
            ReplicaRecord(
                replica_id="demo-1a2b3c", worker_id="worker-1", server_id="server-1", deployment="demo", revision="r",
                checkpoint_id="c1", state=ReplicaState.LOADING, slots=16,
                load=Progress(phase="reading", done_bytes=2**20, total_bytes=2**22),
            ),
        ),
        deployments=(deployment("demo"), deployment("lazy/one", None)),
        queue_depths={"demo": 7},
    )  # fmt: skip
    text = shown(view)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "reading 1 MiB of 4 MiB" in text
    assert "not imported" in text and "nowhere yet" in text
    rows = [line for line in text.splitlines() if line.startswith("demo ")]
    assert len(rows) == 1 and "4.2 M float32, 12 MiB" in rows[0] and " 7 " in rows[0]


def moving(request_id: str, state: str = "handover") -> MigrationInFlight:
    return MigrationInFlight(
        migration_id="m", request_id=request_id, deployment="demo", destination_worker_id="worker-12",
        reason=MigrationReason.KV_MEMORY, state=state, rounds=3, tokens=12_345, gap_tokens=123, running_s=12.5,
    )  # fmt: skip


def test_migrations_in_flight_have_a_table_of_their_own() -> None:
    busy = WorkerRecord(
        worker_id="worker-11", server_id="server-1", phase=Phase.DRAINING, pid=4_194_304, device="cuda:0",
        device_name="A GPU with a very long name of its own", memory_total_bytes=2**36, memory_used_bytes=2**30,
        max_replicas=8, migrations=(moving(f"{'ab' * 12}-15"), moving("x", "round")),
    )  # fmt: skip
    idle = msgspec.structs.replace(busy, worker_id="worker-2", phase=Phase.READY, migrations=())
    text = shown(ClusterView(workers=(busy, idle)))
    assert max(map(len, text.splitlines())) <= 100
    rows = [line.split() for line in text.splitlines()]
    assert [f"{'ab' * 12}-15", "worker-11", "→", "worker-12", "kv_memory", "handover", "3", "12345", "123", "12",
            "s"] in rows  # fmt: skip
    assert ["x", "worker-11", "→", "worker-12", "kv_memory", "round", "3", "12345", "123", "12", "s"] in rows
    assert ["worker-11", "server-1", "draining", "4194304"] in [row[:4] for row in rows]
    assert "migrations" not in shown(ClusterView(workers=(idle,)))


def test_what_is_asked_for_beyond_the_usual_and_the_labels_that_answer_it_are_noted() -> None:
    spec = msgspec.structs.replace(
        deployment("m").spec, priority=5, labels={"gpu": "a40"}, devices=2, adaptive_keep_alive=True
    )
    worker = WorkerRecord(
        worker_id="w1", server_id="server-1", phase=Phase.READY, pid=1, device="cuda:0", device_name="", gangs=True,
        memory_total_bytes=1, memory_used_bytes=0, max_replicas=1, labels={"gpu": "a40", "zone": "b"},
    )  # fmt: skip
    text = shown(
        ClusterView(
            deployments=(msgspec.structs.replace(deployment("m"), spec=spec), deployment("n")),
            workers=(worker, msgspec.structs.replace(worker, worker_id="w2", labels={}, gangs=False)),
            servers=(msgspec.structs.replace(server(1, ssd={}), labels={"rack": "7"}),),
        )
    )
    assert "m: priority 5 · only gpu=a40 · 2 devices each · adaptive keep-alive up to 1 min\n" in text
    assert "w1: gpu=a40, zone=b · shares replicas\n" in text
    assert "server-1: rack=7\n" in text
    assert "n: " not in text
    assert "w2: " not in text


def test_nothing_is_said_in_words() -> None:
    text = shown(ClusterView())
    assert all(words in text for words in ("no deployments", "no replicas", "no workers", "no servers"))


def test_residency_names_the_fastest_tier_first() -> None:
    view = ClusterView(servers=(server(2, ssd={"c1": 1}), server(1, dram={"c1": 1}, ssd={"c1": 1})))
    assert residency(view, deployment("demo")) == "DRAM server-1 · SSD server-1, server-2"
    assert residency(ClusterView(), deployment("demo")) == "nowhere"
    arriving = msgspec.structs.replace(server(1, ssd={"c1": 2**20}), dram_arriving={"c1": 3 * 2**20})
    assert residency(ClusterView(servers=(arriving,)), deployment("demo")) == "DRAM server-1 25 % · SSD server-1"


def test_a_server_says_what_moves_and_what_stays() -> None:
    busy = msgspec.structs.replace(
        server(1, ssd={"c1": 2**20}), dram_used_bytes=1023 * 2**20, leased_bytes=1023 * 2**20,
        ssd_used_bytes=1023 * 2**30, loads=2, load_queue_bytes=3 * 2**30, load_drain_s=2.5,
        ssd_bytes_per_s=1.95 * 2**30, peer_bytes_per_s=1023.0 * 2**20, remote_bytes_per_s=120.0 * 2**20,
        dram_arriving={"c1": 3 * 2**20}, ssd_arriving={"f" * 32: 2**30}, pinned={"c1": "dram"},
        quarantined={"e" * 32: "chunk 3 is corrupt"},
    )  # fmt: skip
    text = shown(ClusterView(servers=(busy, server(2, ssd={})), deployments=(deployment("demo"),)))
    assert max(map(len, text.splitlines())) <= 100
    rows = [line.split() for line in text.splitlines() if line.startswith("server-1 ")]
    assert rows[0][:2] == ["server-1", "ready"]
    assert " ".join(rows[0]).endswith("1023 MiB 1023 GiB/1 TiB 1.95 GiB/s 1023 MiB/s 120 MiB/s")
    assert [line.rstrip() for line in text.splitlines() if line.startswith("server-1:")] == [
        "server-1: 2 loads, 3 GiB left to move, done in 2.5 s",
        "server-1: c1 (demo) is arriving in DRAM: 3 MiB of 12 MiB (25 %)",
        "server-1: ffffffffffff is arriving in SSD: 1 GiB",
        "server-1: pinned: c1 (demo) in DRAM",
        "server-1: eeeeeeeeeeee is quarantined: chunk 3 is corrupt",
    ]
    assert "server-2:" not in text


def test_many_pins_are_counted() -> None:
    pinned = msgspec.structs.replace(server(1, ssd={}), pinned={f"{number:032}": "ssd" for number in range(20)})
    text = shown(ClusterView(servers=(pinned,)))
    assert "and 12 more" in text.replace("\n", " ")


def test_a_deployment_that_cannot_be_loaded_says_why() -> None:
    failure = Failure(code=Code.OUT_OF_MEMORY, message="There is no room for its KV cache.")
    text = shown(ClusterView(deployments=(msgspec.structs.replace(deployment("m"), failure=failure),)))
    assert "failing" in text
    assert "m: There is no room for its KV cache." in text


def scheduler(number: int, term: int = 0) -> SchedulerRecord:
    return SchedulerRecord(scheduler_id=f"scheduler-{number}", phase=Phase.READY, pid=number, term=term)


def test_who_leads_comes_first_with_its_term() -> None:
    lines = shown(ClusterView(schedulers=(scheduler(1), scheduler(2, term=7)))).splitlines()
    rows = [line.split() for line in lines if line.startswith("scheduler-")]
    assert rows == [["scheduler-2", "ready", "2", "leads", "7"], ["scheduler-1", "ready", "1", "stands", "by", "–"]]
    assert "no scheduler leads" not in "".join(lines)


@pytest.mark.parametrize("schedulers", [(), (scheduler(1),)])
def test_that_nobody_leads_is_said(schedulers: tuple[SchedulerRecord, ...]) -> None:
    assert "no scheduler leads" in shown(ClusterView(schedulers=schedulers))
