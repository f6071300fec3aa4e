"""Remote → usable parameters: an S3-compatible server on loopback, against the client library's own parallel ranges."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.loading.bench import Options, Run, bring_in, median, verdict
from benchmarks.loading.disk import GB, MIB, Ceiling, fill_page_cache
from benchmarks.loading.hearth import StoreUnderTest
from benchmarks.loading.tiers import POOL_BYTES, SHAPE
from benchmarks.models import generate
from benchmarks.report import range_of, show, write
from tests.builders.s3 import Fault, S3Server

BUCKET: Final = "models"
CONNECTIONS: Final = 8
CHUNK_BYTES: Final = 16 * MIB


def _publish(source: Path, bucket: Path, name: str) -> int:
    """The files of a directory as objects (by hard links), in the page cache; bytes of the weights."""
    target = bucket / name
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file():
            place = target / path.name
            place.unlink(missing_ok=True)
            os.link(path, place)
    fill_page_cache(target / "model.safetensors")
    return (target / "model.safetensors").stat().st_size


def remote(options: Options) -> None:
    """Part `remote`."""
    source = generate(options.models / SHAPE, SHAPE)
    home = options.scratch / "remote"
    home.mkdir(parents=True, exist_ok=True)
    with S3Server(home / "s3") as server:
        bucket = server.bucket(BUCKET)
        with StoreUnderTest(home / "maker", dram_bytes=64 * MIB) as maker:
            made = bring_in(maker, source)
            size = _publish(made.directory, bucket, "hearth")
        config = home / "remote.json"
        config.write_text(json.dumps({f"s3://{BUCKET}": server.options}))
        config.chmod(0o600)
        env = {"HEARTH_REMOTE_CONFIG": str(config), "HEARTH_FETCH_CONNECTIONS": str(CONNECTIONS)}
        plain: list[float] = []
        found: list[Run] = []
        url = f"s3://{BUCKET}/hearth"
        with StoreUnderTest(home / "store", dram_bytes=POOL_BYTES, env=env) as store:
            ceiling = Ceiling(store.store_dir / "ceiling", enabled=options.fio, way=("4M", 8))
            runs = max(3, options.runs * 3 // 8)
            for number in range(runs):
                ceiling.write_once(size)
                plain.append(_plain(server))
                found.append(_fetch(options, store, made.checkpoint_id, url))
                store.evict(made.checkpoint_id, "ssd")
                print(f"  round {number + 1} of {runs}", flush=True)
            figures: dict[str, Any] = {
                "cut": _cut(options, store, server, made.checkpoint_id, url),
                "killed": _killed(options, store, server, made.checkpoint_id, url),
            }
    seconds, network_s = median([run["model_s"] for run in found]), median(plain)
    disk_s = size / median(ceiling.writes) if ceiling.writes else 0.0
    fetch = size / seconds
    rows = [
        ["obstore, plain parallel ranges", range_of(plain), f"{size / network_s / GB:.2f} GB/s", ""],
        [
            "Hearth: remote → SSD and DRAM → usable", range_of([run["model_s"] for run in found]),
            f"{fetch / GB:.2f} GB/s", "",
        ],
        ["fio writes", f"{disk_s:.3f} s", f"{size / disk_s / GB:.2f} GB/s" if disk_s else "–", ""],
        ["of the plain ranges", f"{network_s / seconds:.2f}", "≥ 0.9", verdict(network_s / seconds >= 0.9)],
        [
            "usable ÷ max(network time, disk time)", f"{seconds / max(network_s, disk_s):.2f}", "≤ 1.1",
            verdict(seconds <= 1.1 * max(network_s, disk_s)),
        ],
    ]  # fmt: skip
    flight = CONNECTIONS * CHUNK_BYTES
    for run in figures.values():
        again = run["again_bytes"] = run["served_bytes"] - size
        met = verdict(again <= flight) if "cut" in run["what"] else ""
        text = f"{flight / MIB:.0f} MiB were in flight"
        rows.append([f"bytes served again, {run['what']}", f"{again / MIB:.0f} MiB", text, met])
    show(
        f"Remote (S3 on loopback), {size / GB:.2f} GB in Hearth's form, {CONNECTIONS} connections",
        ["", "measured", "", ""],
        rows,
    )
    write("load-remote", {"bytes": size, "plain_s": plain, "runs": found, "fio_writes": ceiling.writes, **figures})


def _plain(server: S3Server) -> float:
    command = [sys.executable, "-m", "benchmarks.loading.remote_plain", json.dumps(server.options), BUCKET]
    command += ["hearth/model.safetensors", str(CONNECTIONS), str(CHUNK_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"plain ranges failed: {done.stderr[-1000:]}")
    return float(json.loads(done.stdout)["seconds"])


def _fetch(options: Options, store: StoreUnderTest, checkpoint_id: str, url: str) -> Run:
    with store.worker(options.device) as worker:
        cpu_s = store.cpu_s()
        run: Run = worker.ask({"do": "load", "checkpoint_id": checkpoint_id, "source": url})
        run["store_cpu_s"] = store.cpu_s() - cpu_s
        worker.ask({"do": "release"})
    if run["tier"] != "remote":
        raise RuntimeError(f"the load came from {run['tier']}")
    return run


def _halfway(server: S3Server, then: Callable[[], object]) -> threading.Thread:
    """Call `then` when half of the object has been served."""
    size = (server.root / BUCKET / "hearth" / "model.safetensors").stat().st_size
    server.fail()

    def watch() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if server.sent_bytes("model.safetensors") >= size // 2:
                then()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def _cut(options: Options, store: StoreUnderTest, server: S3Server, checkpoint_id: str, url: str) -> dict[str, Any]:
    """At half of the bytes, the next answer on every connection breaks off in its middle."""

    def cut() -> None:
        fault = Fault(kind="cut", times=CONNECTIONS, key="model.safetensors", fraction=0.5, least_bytes=MIB)
        server.control(faults=[vars(fault)])

    watch = _halfway(server, cut)
    run = _fetch(options, store, checkpoint_id, url)
    watch.join()
    served = server.sent_bytes("model.safetensors")
    server.fail()
    store.evict(checkpoint_id, "ssd")
    return {"what": "all connections cut at 50 %", "served_bytes": served, "model_s": run["model_s"]}


def _killed(options: Options, store: StoreUnderTest, server: S3Server, checkpoint_id: str, url: str) -> dict[str, Any]:
    """At half of the bytes the store is killed; a new one goes on."""
    killed = threading.Event()

    def kill() -> None:
        store.stop(signal.SIGKILL)
        killed.set()

    watch = _halfway(server, kill)
    worker = store.worker(options.device)
    worker.tell({"do": "load", "checkpoint_id": checkpoint_id, "source": url})
    met = killed.wait(120)
    worker.close(signal.SIGKILL)
    watch.join()
    if not met:
        raise RuntimeError("half of the object was never served")
    store.start()
    run = _fetch(options, store, checkpoint_id, url)
    served = server.sent_bytes("model.safetensors")
    return {"what": "store killed at 50 % and started anew", "served_bytes": served, "model_s": run["model_s"]}
