"""What can be typed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.cli.parser import SERVICES, SIMULATOR, STORE_ACTIONS, VERBS, parse


def test_every_verb_leads_to_a_function() -> None:
    import importlib

    for _, _, module, function, _ in VERBS:
        assert callable(getattr(importlib.import_module(module), function))
    for _, _, function, _ in STORE_ACTIONS:
        assert callable(getattr(importlib.import_module("services.cli.store"), function))


WRONG = (
    "", "fly", "up --port 0", "up --servers none", "up --dram much", "up --dem", "deploy -x", "chat", "store fly",
    "store import", "store pin", "migrate", "migrate a b", "drain", "drain w --timeout soon", "drain w --und",
    "requests x", "up --workers 0", "store evict c --tier tape", "store export c", "store ls --serv a",
    "deploy m --label gpu", "deploy m --label a=1,b=2", "deploy m --label =1", "deploy m --devices 0",
    "deploy m --priority high", "explain a b", "explain a --last 0", "explain a --last 65", "explain a --last many",
)  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_wrong_usage_is_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(line.split())
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name, *_ in VERBS if name not in SIMULATOR),
        *(["store", name, "--help"] for name, *_ in STORE_ACTIONS if name != "bench"),
    ],
)
def test_help_is_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().out


def test_up_takes_sizes_and_numbers() -> None:
    options = parse(["up", "--demo", "--servers", "2", "--dram", "1.5GiB", "--port", "9000"]).options
    assert (options.demo, options.servers, options.dram, options.port) == (True, 2, 1610612736, 9000)


def test_deploy_takes_labels_and_priorities() -> None:
    line = "deploy m --label gpu=a40 --label zone=b --priority -3 --devices 2 --adaptive-keep-alive"
    options = parse(line.split()).options
    assert options.labels == [("gpu", "a40"), ("zone", "b")]
    assert (options.priority, options.devices, options.adaptive_keep_alive) == (-3, 2, True)
    assert parse(["deploy", "m"]).options.adaptive_keep_alive is None


def test_workers_are_asked_for_by_either_name() -> None:
    assert parse(["up", "--workers", "2"]).options.workers_per_server == 2
    assert parse(["up", "--workers-per-server", "3"]).options.workers_per_server == 3


def test_moving_away() -> None:
    verb = parse(["migrate", "abc", "--to", "worker-2", "--url", "http://there:1"])
    assert (verb.module, verb.function) == ("services.cli.moves", "migrate")
    assert (verb.options.request, verb.options.to, verb.options.json) == ("abc", "worker-2", False)
    assert parse(["migrate", "abc"]).options.to is None
    options = parse(["drain", "worker-1"]).options
    assert (options.target, options.undo, options.timeout) == ("worker-1", False, 300.0)
    options = parse(["drain", "worker-1", "--undo", "--timeout", "5s", "--json"]).options
    assert (options.undo, options.timeout, options.json) == (True, 5.0, True)


def test_tests_options_are_pytests() -> None:
    assert parse(["test", "unit", "-k", "foo", "--maxfail=1"]).options.rest == ["unit", "-k", "foo", "--maxfail=1"]
    assert parse(["test", "-x"]).options.rest == ["-x"]


def test_the_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEARTH_URL", "http://there:1")
    assert parse(["ps"]).options.url == "http://there:1"
    assert parse(["ps", "--url", "http://here:2"]).options.url == "http://here:2"
    monkeypatch.delenv("HEARTH_URL")
    assert parse(["ps"]).options.url == "http://127.0.0.1:8080"


def test_services_are_verbs() -> None:
    for service in SERVICES:
        verb = parse([service])
        assert (verb.module, verb.options.verb) == ("services.cli.alone", service)


def test_a_store_runs_alone_or_is_worked_on() -> None:
    assert parse(["store"]).function == "alone"
    verb = parse(["store", "evict", "demo", "--tier", "ssd", "--server", "s1", "--url", "http://there:1"])
    assert (verb.module, verb.function) == ("services.cli.store", "evict")
    options = verb.options
    assert (options.action, options.checkpoint, options.tier, options.server) == ("evict", "demo", "ssd", "s1")
    assert (options.url, options.json) == ("http://there:1", False)
    assert parse(["store", "prefetch", "demo"]).options.tier == "dram"
    assert parse(["store", "import", "hf:org/m", "--dtype", "bfloat16"]).function == "bring_in"
    assert parse(["store", "export", "demo", "s3://bucket/m"]).options.to == "s3://bucket/m"


def test_the_options_of_a_bench_are_its_own() -> None:
    for rest in (["--help"], ["--size", "1GiB", "--json"], []):
        verb = parse(["store", "bench", *rest])
        assert (verb.function, verb.options.rest) == ("bench", rest)


@pytest.mark.parametrize("name", SIMULATOR)
def test_the_options_of_the_simulator_are_its_own(name: str) -> None:
    for rest in (["--help"], ["--rate", "1", "--json", "-"], []):
        verb = parse([name, *rest])
        assert (verb.module, verb.options.verb, verb.options.rest) == ("services.cli.simulate", name, rest)


GOLDEN_ACTIONS = """
    ls        list the checkpoints, and which part of them is in which tier
    import    bring a checkpoint into the SSD tier
    prefetch  bring a checkpoint into a tier ahead of demand
    pin       never evict a checkpoint
    unpin     allow a checkpoint to be evicted again
    evict     take a checkpoint out of a tier
    verify    compare every chunk with its checksum, and repair what differs
    export    copy a checkpoint somewhere else, in Hearth's form
    bench     measure this machine's disk, without a cluster
"""


def test_the_help_of_a_store_lists_its_actions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(["store", "--help"])
    assert GOLDEN_ACTIONS in capsys.readouterr().out


def test_the_parser_imports_nothing_heavy() -> None:
    code = "import sys; import services.cli.parser; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"aiohttp", "rich", "nats", "redis", "torch", "msgspec", "asyncio"}.isdisjoint(done.stdout.split())
