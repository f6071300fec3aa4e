"""`transformers serve`, measured beside Hearth. Needs `pip install "transformers[serving]"`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.builders.servers import free_port


@contextlib.contextmanager
def transformers_serve(home: Path) -> Iterator[str]:
    """The URL of a fresh server on the CPU, without a model yet; its output goes to `home`/peer.log.

    Raises RuntimeError if it does not answer within three minutes.
    """
    port = free_port()
    executable = Path(sys.executable).with_name("transformers")
    command = [str(executable), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (home / "peer.log").open("ab") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 180
        while not _answers(f"{url}/health"):
            if time.monotonic() > until or server.poll() is not None:
                raise RuntimeError(f"transformers serve does not start:\n{(home / 'peer.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False
