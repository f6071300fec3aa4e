"""The child processes of `hearth up`: started, watched, restarted, drained in order, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from services.cli.cluster import ChildPlan
from services.cli.supervision import GiveUp, Supervision, how

LOG_BYTES: Final = 8 * 2**20
LOG_FILES: Final = 3
LINE_BYTES: Final = 2**20
PR_SET_PDEATHSIG: Final = 1
# How long after its end a child's output may still be held open by somebody else.
OUTPUT_S: Final = 2.0
KILLED_S: Final = 5.0

Show = Callable[[ChildPlan, str], None]
Tell = Callable[[str, str], None]


class RotatingFile:
    """A log file that starts anew when it is full; the older ones are kept as NAME.1, NAME.2, …"""

    def __init__(self, path: Path, most_bytes: int = LOG_BYTES, files: int = LOG_FILES) -> None:
        self._path = path
        self._most = most_bytes
        self._files = files
        self._out: IO[bytes] = path.open("ab", buffering=0)

    def write(self, line: bytes) -> None:
        """Append a line. A full disk, or a directory that was taken away, loses log lines, not the cluster."""
        with contextlib.suppress(OSError):
            if self._out.closed:  # it could not be opened when it was to start anew
                self._out = self._path.open("ab", buffering=0)
            if self._out.tell() + len(line) > self._most:
                self._turn()
            self._out.write(line)

    def _turn(self) -> None:
        self._out.close()
        for number in range(self._files - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path if number == 1 else self._path.with_name(f"{self._path.name}.{number - 1}")
            if newer.exists():
                newer.replace(older)
        self._out = self._path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def _die_with(parent: int, libc: Any) -> Callable[[], None]:
    def before_exec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return before_exec


class Child:
    """One supervised process."""

    def __init__(self, plan: ChildPlan, logs: Path, *, show: Show, tell: Tell, started: Callable[[], None]) -> None:
        self.plan = plan
        self.log_path = logs / f"{plan.name}.log"
        self._log = RotatingFile(self.log_path)
        self._show = show
        self._tell = tell
        self._started = started
        self._supervision = Supervision()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        # Loaded before the fork: nothing may be imported between fork and exec.
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def run(self) -> str | None:
        """Keep the child running until `stop`. Returns why it was given up, or None after `stop`."""
        try:
            while not self._stopping.is_set():
                began_s = time.monotonic()
                try:
                    code = await self._life()
                except OSError as error:
                    return f"{self.plan.name} cannot be started: {error}"
                if self._stopping.is_set():
                    break
                verdict = self._supervision.ended(code, time.monotonic() - began_s)
                if isinstance(verdict, GiveUp):
                    return f"{self.plan.name} is given up: {verdict.reason}. Its log: {self.log_path}"
                self._tell(self.plan.name, f"ended {how(code)}; starting it again in {verdict.after_s:.1f} s")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), verdict.after_s)
            return None
        finally:
            self.kill()
            if self._process is not None:  # cancelled: a killed process is not gone before it has been waited for
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), KILLED_S)
            self._log.close()

    async def _life(self) -> int:
        # A session of its own: Ctrl-C in the terminal reaches `hearth up` alone, which drains in the right order.
        process = await asyncio.create_subprocess_exec(
            *self.plan.command,
            env=self.plan.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=LINE_BYTES,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid(), self._libc) if self._libc is not None else None,
        )
        self._process = process
        self._started()
        if self._stopping.is_set():  # asked to stop while it was being started
            self.terminate()
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self._read(process))
            code = await process.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(reader), OUTPUT_S)
            reader.cancel()
        return code

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readuntil(b"\n")
            except asyncio.IncompleteReadError as error:
                line = error.partial
                if not line:
                    return
            except asyncio.LimitOverrunError as error:
                line = await process.stdout.read(max(1, error.consumed))
            self._log.write(line)
            text = line.decode(errors="replace").rstrip()
            if text:
                self._show(self.plan, text)

    def terminate(self) -> None:
        """Ask the process to drain and end."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """End the process at once."""
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self, wait_s: float) -> bool:
        """Drain it for at most `wait_s`, then kill it. False if it had to be killed."""
        self._stopping.set()
        self.terminate()
        process = self._process
        if process is None or process.returncode is not None:
            return True
        try:
            await asyncio.wait_for(process.wait(), wait_s)
            return True
        except TimeoutError:
            self.kill()
            await process.wait()
            return False
