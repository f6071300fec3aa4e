"""`hearth up` as a person uses it: the whole cluster with an engine that costs nothing, Ctrl-C, kill -9, and again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from services.cli.servers import free_port

pytestmark = pytest.mark.timeout(300)

READY_S: Final = 120.0
END_S: Final = 60.0


class Up:
    """A running `hearth up` and what it printed."""

    def __init__(self, data_dir: Path, port: int, *options: str, cwd: Path) -> None:
        self.data_dir = data_dir
        self.url = f"http://127.0.0.1:{port}"
        self.output = cwd / "output"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEARTH_")}
        command = [sys.executable, "-P", "-m", "services", "up", "--port", str(port), "--data-dir", str(data_dir)]
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--dram", "64MiB", *options],
                env={**environment, "HEARTH_ENGINE": "null", "HEARTH_DRAIN_S": "5"},
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd,
            )

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.output.read_text()

    def until(self, text: str, seconds: float = READY_S) -> None:
        """Wait until it has printed this."""
        deadline_s = time.monotonic() + seconds
        while text not in self.text:
            assert self.process.poll() is None, f"hearth up ended: {self.text}"
            assert time.monotonic() < deadline_s, f"no {text!r} in: {self.text}"
            time.sleep(0.05)

    def children(self) -> dict[str, int]:
        """Name → process id."""
        found: dict[str, int] = json.loads((self.data_dir / "up.json").read_text())["children"]
        return found

    def verb(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run another verb against it."""
        command = [sys.executable, "-P", "-m", "services", *arguments, "--url", self.url]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def running(pid: int) -> bool:
    """Whether this process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def variables(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def gone(pids: list[int]) -> None:
    """Wait until none of them runs."""
    deadline_s = time.monotonic() + END_S
    while left := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < deadline_s, f"still running: {left}"
        time.sleep(0.05)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A directory with a space in its name. Children of an `up` that is still there afterwards are ended with it."""
    path = Path(tempfile.mkdtemp(prefix="hearth up "))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.torch
@pytest.mark.slow
def test_up_answers_survives_and_drains(home: Path) -> None:
    port, data_dir = free_port(), home / "the data"
    up = Up(data_dir, port, cwd=home)
    try:
        up.until("Ctrl-C stops it.")
        assert f"Hearth answers at {up.url}" in up.text
        children = up.children()
        assert set(children) == {"nats", "redis", "server-1", "worker-1", "scheduler", "gateway"}

        # A second one on the same data or the same port is refused before it starts anything.
        for options, says in (
            (["--data-dir", str(data_dir), "--port", str(free_port())], "in use by another"),
            (["--data-dir", str(home / "other"), "--port", str(port)], f"Port {port} on 127.0.0.1 is taken"),
        ):
            second = subprocess.run(
                [sys.executable, "-P", "-m", "services", "up", *options],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert second.returncode == 1
            assert says in second.stderr

        # A child that is killed comes back, and the gateway with it.
        os.kill(children["scheduler"], signal.SIGKILL)
        up.until("ended by signal 9")
        deadline_s = time.monotonic() + END_S
        while up.children().get("scheduler") in {None, children["scheduler"]}:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)

        view = up.verb("ps", "--json")
        assert view.returncode == 0, view.stderr
        assert [record["worker_id"] for record in json.loads(view.stdout)["workers"]] == ["worker-1"]
        unknown = up.verb("chat", "nobody", stdin="Hello\n")
        assert (unknown.returncode, "nobody" in unknown.stderr) == (1, True)
        assert up.verb("delete", "nobody").returncode == 1

        # Stores share a secret, which nobody else sees.
        token = variables(children["server-1"])["HEARTH_PEER_TOKEN"]
        assert "HEARTH_PEER_TOKEN" not in variables(children["worker-1"]) | variables(children["nats"])
        assert token not in up.text
        assert not any(token in path.read_text() for path in (data_dir / "logs").iterdir())

        # A store that was killed has left its pool behind; with the cluster it goes.
        pids = list(up.children().values())
        shm = Path(variables(children["server-1"])["HEARTH_SHM_DIR"])
        os.kill(children["server-1"], signal.SIGKILL)
        assert list(shm.glob("hearth-*"))
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(END_S) == 0, up.text
        gone(pids)
        assert not shm.parent.exists()
        assert "stopped" in up.text.splitlines()[-1]
        assert "was killed" not in up.text
        assert not (data_dir / "up.json").exists()
    finally:
        up.process.kill()
        up.process.wait()

    # Killed without a chance to clean up: nobody is left behind, and the same data can be used at once.
    again = Up(data_dir, port, cwd=home)
    try:
        again.until("Ctrl-C stops it.")
        pids = list(again.children().values())
        again.process.kill()
        again.process.wait()
        gone(pids)
        third = Up(data_dir, port, cwd=home)
        try:
            third.until("Ctrl-C stops it.")
            pids = list(third.children().values())
            third.process.send_signal(signal.SIGINT)
            third.process.send_signal(signal.SIGINT)
            third.process.wait(END_S)
            gone(pids)
        finally:
            third.process.kill()
            third.process.wait()
    finally:
        again.process.kill()
        again.process.wait()


def test_a_cluster_whose_servers_do_not_answer_is_told(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEARTH_")}
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "services",
            "up",
            "--port",
            str(free_port()),
            "--data-dir",
            str(tmp_path / "data"),
        ],
        env={
            **environment,
            "HEARTH_NATS_URL": f"nats://127.0.0.1:{free_port()}",
            "HEARTH_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "No NATS server answers" in done.stdout
    assert "HEARTH_NATS_URL names it" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_setting_that_nobody_knows_is_told_before_anything_starts(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "services",
            "up",
            "--port",
            str(free_port()),
            "--data-dir",
            str(tmp_path / "data"),
        ],
        env={**os.environ, "HEARTH_ENGIEN": "null"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "HEARTH_ENGIEN is not a setting of Hearth" in done.stderr
    assert not list((tmp_path / "data").glob("nats/jetstream*"))
