"""The command lines of nats-server and redis-server, with the real programs."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.cli import servers


def obtained(name: str, tmp_path: Path) -> servers.Program:
    program = servers.find(name, tmp_path / "programs")
    assert program is not None, f"{name} is missing; ./hearth test gets it"
    return program


def until(answers: Callable[[str], bool], url: str) -> None:
    for _ in range(300):
        if answers(url):
            return
        time.sleep(0.05)
    pytest.fail(f"nobody answers at {url}")


@pytest.mark.parametrize("name", ["nats-server", "redis-server"])
def test_a_server_answers_on_loopback_and_keeps_its_data_in_its_directory(name: str, tmp_path: Path) -> None:
    home, port = tmp_path / "with a space", servers.free_port()
    make, answers, url = {
        "nats-server": (servers.nats_command, servers.nats_answers, f"nats://127.0.0.1:{port}"),
        "redis-server": (servers.redis_command, servers.redis_answers, f"redis://127.0.0.1:{port}/0"),
    }[name]
    program = obtained(name, tmp_path)
    assert not answers(url)
    command = make(program, port, home)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **program.environment()})
    try:
        until(answers, url)
        assert any(path.name in {"jetstream", "appendonlydir"} for path in home.iterdir())
    finally:
        process.terminate()
        process.wait(30)


def test_silence_and_nonsense_are_no_answer(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        assert not servers.nats_answers(f"nats://127.0.0.1:{port}", timeout_s=0.1)
        assert not servers.redis_answers(f"redis://127.0.0.1:{port}/0", timeout_s=0.1)
    assert not servers.nats_answers("nats://127.0.0.1:notaport")


def test_without_any_package_manager_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(servers, "ELSEWHERE", ())
    with pytest.raises(servers.ServersError) as refused:
        servers.obtain(("nats-server", "redis-server"), tmp_path / "programs", lambda _: None)
    text = str(refused.value)
    assert "neither apt-get nor brew" in text
    assert "apt install nats-server redis-server" in text
    assert "HEARTH_NATS_URL and HEARTH_REDIS_URL" in text


def test_unpacked_programs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "programs" / "root" / "usr" / "sbin"
    folder.mkdir(parents=True)
    program = folder / "nats-server"
    program.write_text("#!/bin/sh\nexit 0\n")
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setattr(servers, "ELSEWHERE", ())
    assert servers.find("nats-server", tmp_path / "programs") is None
    program.chmod(0o755)
    found = servers.find("nats-server", tmp_path / "programs")
    assert found is not None
    assert found.path == program
