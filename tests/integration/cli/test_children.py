"""Children are real processes here: restarted, given up, drained, killed, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.cli.children import Child, RotatingFile
from services.cli.cluster import ChildPlan
from services.cli.supervision import QUICK_FAILURES

STEADY = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
OBEDIENT = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', flush=True); "
    "time.sleep(600)"
)
FAILING = "import sys; print('no', flush=True); sys.exit(1)"
WORDY = "import sys; sys.stdout.write('x' * 3_000_000 + '\\nlast\\n'); sys.stdout.flush(); import time; time.sleep(600)"


class Watched:
    """A child with what it said, and a way to wait for it."""

    def __init__(self, code: str, logs: Path) -> None:
        self.lines: list[str] = []
        self.told: list[str] = []
        plan = ChildPlan("child", "worker", [sys.executable, "-c", code], dict(os.environ))
        self.child = Child(
            plan,
            logs,
            show=lambda _, text: self.lines.append(text),
            tell=lambda _, text: self.told.append(text),
            started=lambda: None,
        )

    async def until(self, count: int, text: str = "up") -> None:
        """Wait until the child has said this so often."""
        while self.lines.count(text) < count:
            await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether no such process runs (a zombie does not run)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


async def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    watched = Watched(STEADY, tmp_path)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(watched.child.run())
        await watched.until(1)
        first = watched.child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await watched.until(2)
        assert watched.child.pid != first
        assert await watched.child.stop(10.0)
    assert running.result() is None
    assert watched.told == ["ended by signal 9; starting it again in 0.2 s"]
    assert (tmp_path / "child.log").read_text() == "up\nup\n"


async def test_a_child_that_is_stopped_by_hand_is_started_again_however_often(tmp_path: Path) -> None:
    watched = Watched(OBEDIENT, tmp_path)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(watched.child.run())
        for count in range(1, QUICK_FAILURES + 2):
            await watched.until(count)
            assert watched.child.pid is not None
            os.kill(watched.child.pid, signal.SIGTERM)
        await watched.until(QUICK_FAILURES + 2)
        assert await watched.child.stop(10.0)
    assert running.result() is None
    assert watched.told == ["ended with exit code 0; starting it again in 0.2 s"] * (QUICK_FAILURES + 1)


async def test_a_child_that_cannot_live_is_given_up_and_its_log_named(tmp_path: Path) -> None:
    watched = Watched(FAILING, tmp_path)
    reason = await watched.child.run()
    assert reason is not None
    assert "given up" in reason
    assert str(tmp_path / "child.log") in reason
    assert set(watched.lines) == {"no"}


async def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    plan = ChildPlan("child", "nats", ["/nowhere/at-all"], {})
    child = Child(plan, tmp_path, show=lambda _, __: None, tell=lambda _, __: None, started=lambda: None)
    reason = await child.run()
    assert reason is not None
    assert "cannot be started" in reason


async def test_a_child_that_does_not_drain_is_killed(tmp_path: Path) -> None:
    watched = Watched(STUBBORN, tmp_path)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watched.child.run())
        await watched.until(1)
        pid = watched.child.pid
        assert pid is not None
        assert not await watched.child.stop(0.2)
    assert gone(pid)


async def test_cancelling_leaves_no_process(tmp_path: Path) -> None:
    watched = Watched(STUBBORN, tmp_path)
    pid = None
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(watched.child.run())
        await watched.until(1)
        pid = watched.child.pid
        running.cancel()
    assert pid is not None
    while not gone(pid):
        await asyncio.sleep(0.01)


async def test_endless_lines_do_not_end_the_reading(tmp_path: Path) -> None:
    watched = Watched(WORDY, tmp_path)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watched.child.run())
        await watched.until(1, "last")
        await watched.child.stop(10.0)
    assert sum(line.count("x") for line in watched.lines) == 3_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio, os, sys
from pathlib import Path
from services.cli.children import Child
from services.cli.cluster import ChildPlan
from services.cli.supervision import QUICK_FAILURES
plan = ChildPlan("child", "worker", [sys.executable, "-c", {STUBBORN!r}], dict(os.environ))
child = Child(plan, Path({str(tmp_path)!r}), show=lambda _, __: print(child.pid, flush=True), tell=print, started=int)
asyncio.run(child.run())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until_s = time.monotonic() + 30
    while not gone(pid):
        assert time.monotonic() < until_s, "the child outlived its parent"
        time.sleep(0.02)


def test_log_files_are_bounded(tmp_path: Path) -> None:
    log = RotatingFile(tmp_path / "a.log", most_bytes=100, files=3)
    for number in range(100):
        log.write(b"%08d\n" % number)
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"a.log", "a.log.1", "a.log.2"}
    assert max(sizes.values()) <= 100
    assert (tmp_path / "a.log").read_bytes().endswith(b"00000099\n")


def test_a_log_file_that_cannot_start_anew_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = RotatingFile(folder / "x.log", most_bytes=100)
    log.write(b"a" * 90 + b"\n")
    folder.rename(tmp_path / "away")
    for _ in range(3):
        log.write(b"b" * 90 + b"\n")
    (tmp_path / "away").rename(folder)
    log.write(b"c\n")
    log.close()
    assert (folder / "x.log").read_bytes().endswith(b"c\n")
