"""The plan of `hearth up`: processes, environments, and what is refused beforehand."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from services.cli.cluster import ChildPlan, DataDir, Plan, UpError, Wish, check_port, dram_default, make, memory_bytes
from services.cli.servers import Program, free_port, nats_command, redis_command
from services.cli.up import STOP_ORDER, banner

PROGRAMS = {"nats-server": Program(Path("/bin/nats-server")), "redis-server": Program(Path("/bin/redis-server"))}


def plan_of(
    tmp_path: Path, environ: dict[str, str] | None = None, *, servers: int = 1, workers_per_server: int = 1
) -> Plan:
    wish = Wish(
        data_dir=tmp_path, port=free_port(), dram_bytes=2**20, servers=servers, workers_per_server=workers_per_server
    )
    return make(wish, PROGRAMS, environ or {})


def by_name(plan: Plan) -> dict[str, ChildPlan]:
    return {child.name: child for child in [*plan.infrastructure, *plan.services]}


def test_one_of_everything(tmp_path: Path) -> None:
    children = by_name(plan_of(tmp_path))
    assert list(children) == ["nats", "redis", "server-1", "worker-1", "scheduler", "gateway"]
    assert {child.kind for child in children.values()} == {kind for kinds in STOP_ORDER for kind in kinds}


def test_schedulers_beyond_the_first_stand_by_under_names_of_their_own(tmp_path: Path) -> None:
    wish = Wish(data_dir=tmp_path, port=free_port(), dram_bytes=2**20, schedulers=3)
    plan = make(wish, PROGRAMS, {})
    found = {
        child.name: child.environment["HEARTH_SCHEDULER_ID"] for child in plan.services if child.kind == "scheduler"
    }
    assert found == {"scheduler": "scheduler-1", "scheduler-2": "scheduler-2", "scheduler-3": "scheduler-3"}


def test_servers_have_directories_and_ids_of_their_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, servers=2, workers_per_server=2)
    children = by_name(plan)
    workers = {name: child.environment for name, child in children.items() if child.kind == "worker"}
    assert {name: found["HEARTH_SERVER_ID"] for name, found in workers.items()} == {
        "worker-1": "server-1",
        "worker-2": "server-1",
        "worker-3": "server-2",
        "worker-4": "server-2",
    }
    stores = [child.environment for child in children.values() if child.kind == "store"]
    for variable in ("HEARTH_SERVER_ID", "HEARTH_STORE_DIR", "HEARTH_SHM_DIR"):
        assert len({environment[variable] for environment in stores}) == 2
    assert sum(int(environment["HEARTH_SSD_BYTES"]) for environment in stores) < shutil.disk_usage(tmp_path).free
    assert {Path(environment["HEARTH_STORE_DIR"]) for environment in stores} <= set(plan.directories)
    assert not plan.shm_dir.exists()


def test_the_users_settings_reach_the_services_but_not_those_of_single_processes(tmp_path: Path) -> None:
    environ = {"HEARTH_ENGINE": "null", "HEARTH_SERVER_ID": "mine", "HEARTH_METRICS_PORT": "9", "PATH": "/bin"}
    worker = by_name(plan_of(tmp_path, environ))["worker-1"].environment
    assert worker["HEARTH_ENGINE"] == "null" and worker["PATH"] == "/bin"
    assert worker["HEARTH_SERVER_ID"] == "server-1" and "HEARTH_METRICS_PORT" not in worker


def test_settings_that_do_not_count_are_told(tmp_path: Path) -> None:
    assert plan_of(tmp_path, {"HEARTH_NATS_URL": "nats://there:1", "HEARTH_DRAIN_S": "5"}).notes == []
    (note,) = plan_of(tmp_path, {"HEARTH_DRAM_BYTES": "4096", "HEARTH_HTTP_PORT": "81"}).notes
    assert note.startswith("HEARTH_DRAM_BYTES, HEARTH_HTTP_PORT do not count here")


def test_the_stores_share_a_secret_that_nobody_else_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, servers=2)
    children = [*plan.infrastructure, *plan.services]
    tokens = [child.environment["HEARTH_PEER_TOKEN"] for child in children if child.kind == "store"]
    assert len(tokens) == 2 and len(set(tokens)) == 1 and len(tokens[0]) >= 32
    assert all(tokens[0] not in " ".join(child.command) for child in children)
    assert not any("HEARTH_PEER_TOKEN" in child.environment for child in children if child.kind != "store")
    assert tokens[0] not in banner(plan, ["m"], ready_s=1.0)
    assert plan_of(tmp_path).services[0].environment["HEARTH_PEER_TOKEN"] != tokens[0], "made up afresh"


def test_a_secret_of_the_operators_own_is_used(tmp_path: Path) -> None:
    for variable in ("HEARTH_PEER_TOKEN", "HEARTH_PEER_TOKEN_FILE"):
        plan = plan_of(tmp_path, {variable: "mine"})
        found = by_name(plan)
        secrets = {name: value for name, value in found["server-1"].environment.items() if "PEER_TOKEN" in name}
        assert secrets == {variable: "mine"}
        assert variable not in found["gateway"].environment and variable not in found["nats"].environment
        assert plan.notes == []


def test_pools_do_not_outlive_the_cluster(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"HEARTH_KEEP_POOL": "1"})
    store = by_name(plan)["server-1"].environment
    assert store["HEARTH_KEEP_POOL"] == "0"
    assert Path(store["HEARTH_SHM_DIR"]).parent == plan.shm_dir, "what a killed store left goes with the directory"


def test_workers_of_one_machine_share_its_memory(tmp_path: Path) -> None:
    cpu = {"HEARTH_DEVICE": "cpu"}
    memory = [
        int(child.environment["HEARTH_WORKER_MEMORY_BYTES"])
        for child in plan_of(tmp_path, cpu, servers=2, workers_per_server=4).services
        if child.kind == "worker"
    ]
    assert len(memory) == 8
    assert sum(memory) <= memory_bytes() // 4
    own = by_name(plan_of(tmp_path, {**cpu, "HEARTH_WORKER_MEMORY_BYTES": "5"}))["worker-1"].environment
    assert own["HEARTH_WORKER_MEMORY_BYTES"] == "5"


def test_servers_that_already_run_are_used(tmp_path: Path) -> None:
    environ = {"HEARTH_NATS_URL": "nats://there:1", "HEARTH_REDIS_URL": "redis://there:2/0"}
    plan = make(Wish(data_dir=tmp_path, port=free_port(), dram_bytes=2**20), {}, environ)
    assert plan.infrastructure == []
    assert all(child.environment["HEARTH_NATS_URL"] == "nats://there:1" for child in plan.services)


def test_settings_that_a_service_would_refuse_are_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(UpError, match="HEARTH_DRAIN_S"):
        plan_of(tmp_path, {"HEARTH_DRAIN_S": "soon"})
    with pytest.raises(UpError, match="HEARTH_ENGIEN is not a setting"):
        plan_of(tmp_path, {"HEARTH_ENGIEN": "null"})


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UpError, match=f"Port {port} .* is taken by another program; choose another with --port"):
            check_port("127.0.0.1", port, "--port")
    check_port("127.0.0.1", port, "--port")


def test_a_data_directory_belongs_to_one(tmp_path: Path) -> None:
    first = DataDir(tmp_path / "data")
    with pytest.raises(UpError, match="in use by another"):
        DataDir(tmp_path / "data")
    first.close()
    DataDir(tmp_path / "data").close()


def test_a_data_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UpError, match="cannot be used as data directory"):
        DataDir(tmp_path / "file" / "data")


@pytest.mark.parametrize(
    ("memory", "servers", "expected"),
    [(64 * 2**30, 1, 2**30), (4 * 2**30, 1, 2**29), (8 * 2**30, 4, 2**28), (2**28, 8, 64 * 2**20)],
)
def test_the_dram_tier_is_modest(memory: int, servers: int, expected: int) -> None:
    assert dram_default(memory, servers) == expected


def test_server_command_lines_listen_on_loopback_and_keep_their_data(tmp_path: Path) -> None:
    home = tmp_path / "with space"
    command = nats_command(PROGRAMS["nats-server"], 4711, home)
    config = Path(command[2]).read_text()
    assert 'host: "127.0.0.1"' in config and "port: 4711" in config and f'store_dir: "{home}"' in config
    redis = redis_command(PROGRAMS["redis-server"], 4712, home)
    pairs = dict(zip(redis[1::2], redis[2::2], strict=True))
    assert pairs["--bind"] == "127.0.0.1" and pairs["--appendonly"] == "yes" and pairs["--dir"] == str(home)


def test_unpacked_programs_bring_their_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/already")
    assert Program(Path("/x")).environment() == {}
    assert Program(Path("/x"), (Path("/a"), Path("/b"))).environment() == {
        "LD_LIBRARY_PATH": os.pathsep.join(["/a", "/b", "/already"])
    }


def test_the_banner_has_lines_to_paste(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    text = banner(plan, ["another", "demo"], ready_s=1.0)
    assert f"curl -N {plan.url}/v1/chat/completions" in text
    assert '"model": "demo"' in text and f'base_url="{plan.url}/v1"' in text
    assert f"hearth deploy NAME --source DIR|hf:ORG/NAME --url {plan.url}" in banner(plan, [], ready_s=1.0)
    # An apostrophe would end the shell's quotes round the body.
    assert text.split("-d '")[1].split("\n")[0].count("'") == 1
