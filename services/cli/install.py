"""The first start: makes `.venv` and installs Hearth with its pinned versions.

Run by the launcher with the system's own Python, so it needs nothing but the standard library. One installation runs
at a time (a lock that the kernel frees when its holder dies); a broken or interrupted one is repaired by the next
start, because the stamp that the launcher compares is written last.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

# What `./hearth test` needs on top of what `./hearth` needs.
EXTRAS: Final = {"run": "store,worker", "test": "store,worker,dev"}
TORCH: Final = "torch~=2.13.0"
LOG_LINES_SHOWN: Final = 12

# What pip's output says about a failure, most telling first, and what to do about it.
CAUSES: Final = (
    (r"No space left on device", "The disk is full: free some space (torch alone needs 1 to 6 GB)."),
    (
        r"Read-only file system|Permission denied",
        "Something could not be written: check who owns the project's directory and pip's cache.",
    ),
    (
        r"Temporary failure in name resolution|Name or service not known|nodename nor servname|NewConnectionError"
        r"|Network is unreachable|ConnectTimeout|Connection refused|Max retries exceeded|ProxyError|ReadTimeout",
        "The package index cannot be reached: connect this machine to the network, or name a mirror in pip's settings.",
    ),
    (
        r"No matching distribution found|ResolutionImpossible",
        "A pinned package does not exist for this machine or this Python (Hearth runs on Python 3.11 to 3.14).",
    ),
)


class InstallError(Exception):
    """The installation cannot go on; the text is one sentence for a person."""


def cause_of(output: str) -> str:
    """One sentence on why pip failed, from what it printed."""
    for pattern, sentence in CAUSES:
        if re.search(pattern, output):
            return sentence
    return "pip failed; its output above says why."


def missing_module(version: tuple[int, int], has: Callable[[str], bool]) -> str | None:
    """A sentence if this Python cannot make virtual environments (Debian and Ubuntu package that apart), else None."""
    if has("venv") and has("ensurepip"):
        return None
    major, minor = version
    return (
        f"Python {major}.{minor} here cannot make virtual environments (its venv module is missing): install it "
        f"(Debian, Ubuntu: apt install python{major}.{minor}-venv) and run the same command again."
    )


class Progress:
    """One line that is rewritten on a terminal; one line per step elsewhere."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._started_s = time.monotonic()
        self._step = ""

    def step(self, text: str) -> None:
        """A new step has begun."""
        self._step = text
        if self._terminal:
            self.detail("")
        else:
            print(f"hearth: {text}", file=self._out, flush=True)

    def detail(self, text: str) -> None:
        """What the step is doing now."""
        if self._terminal:
            line = f"hearth: {self._step} ({time.monotonic() - self._started_s:.0f} s) {text}"
            width = shutil.get_terminal_size().columns
            self._out.write("\r\x1b[K" + line[: width - 1])
            self._out.flush()

    def end(self, text: str) -> None:
        """The last words."""
        if self._terminal:
            self._out.write("\r\x1b[K")
        print(f"hearth: {text}", file=self._out, flush=True)


@contextmanager
def only_one(venv: Path, progress: Progress) -> Iterator[int]:
    """Holds the lock of this environment; gives its descriptor, for children that must hold it as well."""
    handle = os.open(venv / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.step("another start is installing; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def interesting(line: str) -> str:
    """The part of a line of pip's output that is worth showing while it runs, else an empty string."""
    match = re.match(
        r"\s*(?:(Collecting|Installing collected packages)\b|(Downloading|Using cached) (\S+?)( \([^)]*\))?\s*$)", line
    )
    if match is None:
        return ""
    if match[1] == "Collecting":
        return line.strip().lower().split(" (from")[0]
    if match[1]:
        return "unpacking"
    name = "-".join(match[3].rsplit("/", 1)[-1].split("-")[:2])
    return f"{match[2].lower()} {name}{match[4] or ''}"


def run(command: list[str], log: IO[str], lock: int, progress: Progress) -> None:
    """Runs a command with its output in the log. Raises `InstallError` with its last lines shown."""
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    recent: list[str] = []
    # The child holds the lock as well: if this process is killed, nobody else installs before the child has ended.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=(lock,),
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            log.write(line)
            log.flush()
            recent = [*recent, line.rstrip()][-60:]
            if detail := interesting(line):
                progress.detail(detail)
    if child.returncode != 0:
        progress.end(f"this failed: {command[0]} … (all of its output: {log.name})")
        for line in recent[-LOG_LINES_SHOWN:]:
            print(f"    {line}", file=sys.stderr)
        raise InstallError(cause_of("\n".join(recent)))


def works(python: Path) -> bool:
    """Whether this environment's Python starts and has pip."""
    try:
        return subprocess.run([python, "-c", "import pip._internal"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def install(root: Path, set_name: str, stamp: str) -> None:
    """Makes the environment of `root` fit for `set_name` ("run" or "test") and stamps it."""
    progress = Progress(sys.stderr)
    venv = root / ".venv"
    python = venv / "bin" / "python"
    try:
        venv.mkdir(exist_ok=True)
        if not os.access(venv, os.W_OK):
            raise PermissionError(13, "not writable")
        with only_one(venv, progress) as lock:
            if (venv / f"stamp-{set_name}").is_file() and (venv / f"stamp-{set_name}").read_text().rstrip(
                "\n"
            ) == stamp:
                progress.end("installed by the other start.")
                return
            with (venv / "install.log").open("w") as log:
                _install(root, set_name, python, log, lock, progress)
            names = ("run", "test") if set_name == "test" else ("run",)
            for name in names:
                (venv / f"stamp-{name}").write_text(stamp + "\n")
            progress.end("installed.")
    except OSError as error:
        progress.end("the installation stopped.")
        raise InstallError(f"{error.filename or venv}: {(error.strerror or str(error)).lower()}.") from error


def _install(root: Path, set_name: str, python: Path, log: IO[str], lock: int, progress: Progress) -> None:
    fresh = not works(python)
    if fresh:
        if sentence := missing_module(sys.version_info[:2], lambda name: importlib.util.find_spec(name) is not None):
            raise InstallError(sentence)
        progress.step(f"first start: making {root.name}/.venv; everything stays in this directory, once, some minutes")
        for left in python.parent.parent.iterdir():
            if left.name not in {"lock", "install.log"}:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        run([sys.executable, "-m", "venv", str(python.parent.parent)], log, lock, progress)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    pinned = ["-c", str(root / "constraints.txt")]
    # First and alone: a resolver that may weigh torch against something else can fetch several of its gigabytes.
    progress.step("installing torch (0.2 to 3 GB)" if fresh else "pins have changed: bringing .venv up to date")
    run([*pip, *pinned, TORCH], log, lock, progress)
    progress.step("installing Hearth and what it needs" + (" to be tested" if set_name == "test" else ""))
    run([*pip, *pinned, "-e", f"{root}[{EXTRAS[set_name]}]"], log, lock, progress)


def main() -> int:
    """`install.py ROOT run|test STAMP`."""
    root, set_name, stamp = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    try:
        install(root, set_name, stamp)
    except InstallError as error:
        print(f"hearth: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nhearth: interrupted; the next start goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
