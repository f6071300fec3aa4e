"""Nothing outlives a test: a small process that ends what the test started when the test dies, however it dies.

It hears over a pipe what was started; when the pipe ends it kills those processes (if they are still the same ones)
and removes network links and files. Run as a script it is that process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO


def started_at(pid: int) -> str:
    """When a process began, in the kernel's ticks, so that a number that was given out again is not mistaken; or ""."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


class Warden:
    """The test's side. Use as a context manager, or `close()` it when everything was ended in order."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C for the test is not for it
        )

    def guard(self, process: subprocess.Popen[bytes]) -> None:
        """Kill this process at the end, if it runs still."""
        self._tell(f"process {process.pid} {started_at(process.pid)}")

    def remove(self, *command: str) -> None:
        """Run this command at the end; nobody asks whether it succeeded. No argument may hold a space."""
        self._tell("command " + " ".join(command))

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End now what is left."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(30)

    def __enter__(self) -> Warden:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _watch(pipe: IO[bytes]) -> None:
    told = [line.decode().split() for line in pipe]
    for kind, *words in told:
        if kind == "process" and len(words) == 2 and started_at(int(words[0])) == words[1]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(words[0]), signal.SIGKILL)
    for kind, *words in reversed(told):
        if kind == "command":
            subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, timeout=20)


if __name__ == "__main__":
    _watch(sys.stdin.buffer)
