"""What can be typed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.cli.parser import SERVICES, VERBS, parse


def test_every_verb_leads_to_a_function() -> None:
    import importlib

    for _, _, module, function, _ in VERBS:
        assert callable(getattr(importlib.import_module(module), function))


WRONG = ("", "fly", "up --port 0", "up --servers none", "up --dram much", "up --dem", "deploy -x", "chat")


@pytest.mark.parametrize("line", WRONG)
def test_wrong_usage_is_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(line.split())
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name, *_ in VERBS)])
def test_help_is_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().out


def test_up_takes_sizes_and_numbers() -> None:
    options = parse(["up", "--demo", "--servers", "2", "--dram", "1.5GiB", "--port", "9000"]).options
    assert (options.demo, options.servers, options.dram, options.port) == (True, 2, 1610612736, 9000)


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


def test_the_parser_imports_nothing_heavy() -> None:
    code = "import sys; import services.cli.parser; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"aiohttp", "rich", "nats", "redis", "torch", "msgspec", "asyncio"}.isdisjoint(done.stdout.split())
