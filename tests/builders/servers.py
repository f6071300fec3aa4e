"""Real nats-server and redis-server on loopback, each on a free port with a directory of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path


def free_port() -> int:
    """A loopback port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def binary(name: str) -> str:
    """The path of a server. Raises RuntimeError if it is missing: tests fail then, they are not skipped."""
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is missing; `./hearth test` installs it")
    return found


def start(command: list[str], port: int, home: Path, host: str = "127.0.0.1") -> subprocess.Popen[bytes]:
    """A server that listens on `port`; its output is in `home`. Raises RuntimeError with that output otherwise."""
    output = home / f"{Path(command[0]).name}.log"
    with output.open("ab") as out:
        process = subprocess.Popen(command, cwd=home, stdout=out, stderr=subprocess.STDOUT)
    for _ in range(400):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return process
        time.sleep(0.025)
    raise RuntimeError(f"{command[0]} does not start: {output.read_text()}")


def start_nats(home: Path, port: int | None = None, host: str = "127.0.0.1") -> tuple[subprocess.Popen[bytes], str]:
    """nats-server with JetStream; the process and its URL."""
    port = port or free_port()
    command = [binary("nats-server"), "-a", host, "-p", str(port), "-js", "-sd", str(home)]
    return start(command, port, home, host), f"nats://{host}:{port}"


def start_redis(home: Path, port: int | None = None, host: str = "127.0.0.1") -> tuple[subprocess.Popen[bytes], str]:
    """redis-server with an append-only file; the process and its URL."""
    port = port or free_port()
    command = [binary("redis-server"), "--bind", host, "--port", str(port), "--dir", str(home)]
    command += ["--save", "", "--appendonly", "yes"]
    if host != "127.0.0.1":
        command += ["--protected-mode", "no"]  # a bridge of the test's own
    return start(command, port, home, host), f"redis://{host}:{port}/0"
