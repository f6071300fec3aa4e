"""nats-server and redis-server: where they are, how to get them, how to start them, and whether they answer.

Used by `hearth up` and by the tests. Getting them means: the package manager as root; as anybody else on Debian and
Ubuntu the same packages, downloaded and unpacked below the data directory; Homebrew on macOS.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

# Debian's redis-server package holds only a service file and a link: the program is in redis-tools, under another name.
DEBIAN_PACKAGES: Final = {"nats-server": "nats-server", "redis-server": "redis-tools"}
DEBIAN_LIBRARIES: Final = ("libjemalloc2", "liblzf1", "libatomic1", "liblua5.1-0")
ROOT_PACKAGES: Final = {"nats-server": "nats-server", "redis-server": "redis-server"}
BREW_FORMULAE: Final = {"nats-server": "nats-server", "redis-server": "redis"}
ELSEWHERE: Final = ("/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/opt/homebrew/bin", "/opt/homebrew/sbin")
INSTALL_S: Final = 600.0
# Larger than the gateway's largest body, so that a request that was admitted fits into a message.
NATS_MAX_PAYLOAD_BYTES: Final = 8 * 2**20

Say = Callable[[str], None]


class ServersError(Exception):
    """A server program cannot be had; the text is one or two sentences for a person."""


@dataclass(frozen=True)
class Program:
    """A program and the directories in which its libraries lie (empty: the system's)."""

    path: Path
    libraries: tuple[Path, ...] = ()

    def environment(self) -> dict[str, str]:
        """What must be in the environment of this program, on top of everything else."""
        if not self.libraries:
            return {}
        already = os.environ.get("LD_LIBRARY_PATH")
        return {"LD_LIBRARY_PATH": os.pathsep.join([*map(str, self.libraries), *([already] if already else [])])}

    def runs(self) -> bool:
        """Whether it starts at all (its libraries are there)."""
        try:
            done = subprocess.run(
                [self.path, "--version"],
                env={**os.environ, **self.environment()},
                capture_output=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0


def free_port() -> int:
    """A loopback port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find(name: str, programs_dir: Path) -> Program | None:
    """The program on the PATH, in the usual places, or among those unpacked earlier below `programs_dir`."""
    if found := shutil.which(name) or shutil.which(name, path=os.pathsep.join(ELSEWHERE)):
        return Program(Path(found))
    unpacked = programs_dir.absolute() / "root"
    for folder in ("usr/bin", "usr/sbin"):
        if (path := unpacked / folder / name).is_file():
            program = Program(path, tuple(_library_dirs(unpacked)))
            if program.runs():
                return program
    return None


def obtain(names: Iterable[str], programs_dir: Path, say: Say) -> dict[str, Program]:
    """Every named program, got if missing. Raises `ServersError` saying what to install when it cannot be got."""
    found = {name: find(name, programs_dir) for name in names}
    missing = [name for name, program in found.items() if program is None]
    if missing:
        _get(missing, programs_dir, say)
        found |= {name: find(name, programs_dir) for name in missing}
    have = {name: program for name, program in found.items() if program is not None}
    if len(have) < len(found):
        raise ServersError(_advice([name for name in found if name not in have], "they are not there after all"))
    return have


def _advice(missing: list[str], why: str) -> str:
    names = " and ".join(missing)
    packages = " ".join(ROOT_PACKAGES[name] for name in missing)
    variables = " and ".join(f"HEARTH_{name.split('-', maxsplit=1)[0].upper()}_URL" for name in missing)
    return (
        f"{names} missing, and could not be installed ({why}). "
        f"Install {'it' if len(missing) == 1 else 'them'} (Debian, Ubuntu: apt install {packages}; macOS: brew install "
        f"{' '.join(BREW_FORMULAE[name] for name in missing)}), or set {variables} to running servers."
    )


def _get(missing: list[str], programs_dir: Path, say: Say) -> None:
    names = " and ".join(missing)
    if shutil.which("apt-get") and os.geteuid() == 0:
        packages = [ROOT_PACKAGES[name] for name in missing]
        say(f"{names} missing: installing {' '.join(packages)} with apt-get")
        environment = {"DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
        if _run(install, environment) is not None:
            _must(["apt-get", "update", "-qq"], missing, environment)
            _must(install, missing, environment)
    elif shutil.which("apt-get") and shutil.which("dpkg-deb"):
        packages = [DEBIAN_PACKAGES[name] for name in missing]
        say(f"{names} missing: unpacking the packages {' '.join(packages)} below {programs_dir}")
        _unpack(packages, missing, programs_dir)
    elif sys.platform == "darwin" and shutil.which("brew"):
        formulae = [BREW_FORMULAE[name] for name in missing]
        say(f"{names} missing: installing {' '.join(formulae)} with brew")
        _must(["brew", "install", "--quiet", *formulae], missing, {"HOMEBREW_NO_AUTO_UPDATE": "1"})
    else:
        raise ServersError(_advice(missing, "this machine has neither apt-get nor brew"))


def _run(command: list[str], environment: dict[str, str], folder: Path | None = None) -> str | None:
    """None if the command succeeds, else the last line that it printed."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=INSTALL_S,
            check=False,
        )
    except OSError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {INSTALL_S:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if lines else f"{command[0]} ended with exit code {done.returncode}"


def _must(command: list[str], missing: list[str], environment: dict[str, str], folder: Path | None = None) -> None:
    why = _run(command, environment, folder)
    if why is not None:
        raise ServersError(_advice(missing, f"{command[0]} says: {why}"))


def _unpack(packages: list[str], missing: list[str], programs_dir: Path) -> None:
    """Debian packages without root: apt with lists and cache of its own, then `dpkg-deb -x`."""
    home = programs_dir.absolute()
    try:
        for folder in ("apt/lists/partial", "apt/archives/partial", "root"):
            (home / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServersError(_advice(missing, f"{home} cannot be written: {error.strerror}")) from error
    # A file, because apt splits the values of -o at spaces, and a path may have some.
    config = home / "apt" / "apt.conf"
    config.write_text(
        "".join(
            f"{key} {json.dumps(str(value))};\n"
            for key, value in {
                "Dir::State::lists": home / "apt" / "lists",
                "Dir::Cache": home / "apt",
                "Dir::Cache::archives": home / "apt" / "archives",
                "Debug::NoLocking": "true",
                "APT::Sandbox::User": "",
                "APT::Install-Recommends": "false",
            }.items()
        )
    )
    environment = {"APT_CONFIG": str(config)}
    _must(["apt-get", "update", "-qq"], missing, environment)
    # The packages themselves, even if dpkg believes that they are installed; then their missing dependencies.
    _must(["apt-get", "download", "-qq", *packages], missing, environment, home / "apt" / "archives")
    if _run(["apt-get", "install", "-y", "-qq", "--download-only", *packages], environment) is not None:
        # dpkg's own picture is broken (half-installed packages), which without root nobody can mend: guess.
        for library in DEBIAN_LIBRARIES:
            _run(["apt-get", "download", "-qq", library], environment, home / "apt" / "archives")
    archives = sorted((home / "apt" / "archives").glob("*.deb"))
    for archive in archives:
        _must(["dpkg-deb", "-x", str(archive), str(home / "root")], missing, {})
    check_rdb = home / "root" / "usr" / "bin" / "redis-check-rdb"
    if "redis-server" in missing and check_rdb.is_file():
        # One program with several names; under this one it is the server.
        shutil.copy2(check_rdb, check_rdb.with_name("redis-server"))
    shutil.rmtree(home / "apt", ignore_errors=True)


def _library_dirs(unpacked: Path) -> list[Path]:
    return sorted({path.parent for path in (unpacked / "usr" / "lib").rglob("*.so*")} | _lib_of(unpacked / "lib"))


def _lib_of(folder: Path) -> set[Path]:
    return {path.parent for path in folder.rglob("*.so*")} if folder.is_dir() else set()


def nats_command(program: Program, port: int, home: Path) -> list[str]:
    """The command line of a NATS server with JetStream on loopback; its data and its configuration go to `home`."""
    home.mkdir(parents=True, exist_ok=True)
    config = home / "nats.conf"
    config.write_text(
        "# Written by hearth up.\n"
        'host: "127.0.0.1"\n'
        f"port: {port}\n"
        f"max_payload: {NATS_MAX_PAYLOAD_BYTES}\n"
        f"jetstream {{ store_dir: {json.dumps(str(home.absolute()))} }}\n"
    )
    return [str(program.path), "-c", str(config)]


def redis_command(program: Program, port: int, home: Path) -> list[str]:
    """The command line of a Redis server on loopback that keeps what it was told in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(home.absolute()),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "daemonize": "no",
        "maxmemory-policy": "noeviction",
    }
    return [str(program.path), *(word for key, value in options.items() for word in (f"--{key}", value))]


def nats_answers(url: str, timeout_s: float = 1.0) -> bool:
    """Whether a NATS server answers there: it speaks first, with INFO."""
    return _answer(url, 4222, b"", timeout_s).startswith(b"INFO ")


def redis_answers(url: str, timeout_s: float = 1.0) -> bool:
    """Whether a Redis server that has loaded its data answers there (or one that wants a password)."""
    return _answer(url, 6379, b"PING\r\n", timeout_s).startswith((b"+PONG", b"-NOAUTH"))


def _answer(url: str, default_port: int, say: bytes, timeout_s: float) -> bytes:
    parts = urlsplit(url if "://" in url else f"//{url}")
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or default_port), timeout_s) as link:
            if say:
                link.sendall(say)
            return link.recv(256)
    except (OSError, ValueError):
        return b""
