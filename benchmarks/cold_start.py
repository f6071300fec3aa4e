"""HTTP request → first token of a model that no worker has, by the tier in which its checkpoint lies.

    python -m benchmarks.cold_start [--scratch DIR] [--shape llama-1.1b] [--runs 5] [--no-peer]

Every start is split by its own ledger: queue, decision, bytes, attach, prefill. In the same run `transformers serve`
loads the same model on its first request (a fresh server process each time, its start not counted), with a cold and
with a warm page cache, and answers a second, warm request. That part needs `pip install "transformers[serving]"`. Page
caches are dropped before every start from SSD: by the kernel's switch as root, else file by file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.harness import cluster
from benchmarks.models import generate
from benchmarks.peer import transformers_serve
from benchmarks.report import publish, spread
from shared.bus import Bus
from shared.contracts.residency import Evict
from shared.errors import Code, HearthError
from shared.subjects import EVICT
from tests.builders.cluster import MIB, Cluster

PARTS = ("total_s", "queue_s", "decision_s", "import_s", "read_s", "attach_s", "prefill_s", "other_than_prefill_s")
PROMPT = "The hearth keeps the fire, and the fire keeps the house warm through the long night. " * 2


def drop_page_cache(directory: Path) -> None:
    """Have the next read come from the disk."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except PermissionError:
        for path in directory.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_token(url: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Seconds to the first token of a streamed call, and the ledger (if it carries one)."""
    request = urllib.request.Request(
        url, json.dumps(body | {"stream": True}).encode(), {"Content-Type": "application/json"}
    )
    start, first = time.perf_counter(), 0.0
    ledger: dict[str, Any] = {}
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event))
            choice = (event.get("choices") or [{}])[0]
            if not first and (choice.get("text") or (choice.get("delta") or {}).get("content")):
                first = time.perf_counter() - start
            ledger = event.get("hearth") or ledger
    return first or time.perf_counter() - start, ledger


def until_gone(running: Cluster, name: str) -> None:
    """Wait until no replica of this deployment is left."""
    running.until(
        lambda: not [r for r in running.view()["replicas"] if r["deployment"] == name], "the replica left", 120
    )


async def evict(running: Cluster, nats_url: str, checkpoint_id: str, tier: str) -> None:
    """Take the checkpoint out of a tier; the lease of the last replica may still be on its way back."""
    async with Bus.connect(nats_url, name="benchmark", prefix=running.prefix) as bus:
        for _ in range(100):
            try:
                await bus.call(EVICT, Evict(checkpoint_id=checkpoint_id, tier=tier), server_id="server-1")
                return
            except HearthError as error:
                if error.failure.code is not Code.BUSY:
                    raise
                await asyncio.sleep(0.1)
    raise RuntimeError("the checkpoint stays leased")


def hearth(home: Path, source: Path, runs: int, dram_bytes: int) -> dict[str, Any]:
    """Cold starts from DRAM, SSD and the source; a warm request for comparison."""
    figures: dict[str, Any] = {}
    env = {"HEARTH_TORCH_THREADS": "0", "HEARTH_FILL_BYTES_PER_S": "0"}  # what is evicted stays away
    with cluster(home, dram_bytes=dram_bytes, env=env) as running:
        record = running.deploy("m", source, keep_alive_s=0.5, target_concurrency=4)
        checkpoint_id = running.view()["deployments"][0]["checkpoint"]["checkpoint_id"]
        assert record
        nats_url = running.nats_url
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 2, "temperature": 0, "hearth": {"ledger": True}}
        url = f"{running.url}/v1/completions"
        first_token(url, body)

        def prepare(tier: str) -> None:
            until_gone(running, "m")
            if tier == "ssd":
                asyncio.run(evict(running, nats_url, checkpoint_id, "dram"))
            elif tier == "remote":
                asyncio.run(evict(running, nats_url, checkpoint_id, "ssd"))
            if tier != "dram":
                drop_page_cache(home)

        for tier in ("dram", "ssd", "remote"):
            starts: list[dict[str, float]] = []
            for _ in range(runs if tier != "remote" else min(runs, 3)):
                prepare(tier)
                total_s, ledger = first_token(url, body)
                if ledger.get("tier") != tier:
                    raise RuntimeError(f"wanted a start from {tier}, got {ledger}")
                starts.append(
                    {
                        "total_s": total_s,
                        "other_than_prefill_s": total_s - ledger["prefill_s"],
                        **{part: float(ledger.get(part, 0.0)) for part in PARTS[1:-1]},
                    }
                )
            figures[tier] = {part: spread([start[part] for start in starts]) for part in PARTS}
        until_gone(running, "m")
        first_token(url, body)
        warm = [first_token(url, body | {"prompt": f"{n} {PROMPT}"})[0] for n in range(runs)]
        figures["warm"] = {"total_s": spread(warm)}
    return figures


def peer(home: Path, source: Path, runs: int) -> dict[str, Any]:
    """`transformers serve`: first request of a fresh server with a cold and a warm page cache, then a warm request."""
    cold: list[float] = []
    cached: list[float] = []
    warm: list[float] = []
    for run in range(runs):
        for caches, times in ((True, cold), (False, cached)):
            with transformers_serve(home) as server:
                if caches:
                    drop_page_cache(source)
                body = {"model": str(source), "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
                url = f"{server}/v1/completions"
                times.append(first_token(url, body)[0])
                warm.append(first_token(url, body | {"prompt": f"{run} {PROMPT}"})[0])
    return {"cold": spread(cold), "page_cache_warm": spread(cached), "warm": spread(warm)}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="keeps the generated model between runs")
    parser.add_argument("--shape", default="llama-1.1b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        home = Path(temporary)
        source = generate((options.scratch or home) / options.shape, options.shape, "bfloat16")
        size = (source / "model.safetensors").stat().st_size
        figures: dict[str, Any] = {
            "model_bytes": size,
            "hearth": hearth(home / "hearth", source, options.runs, size + 512 * MIB),
        }
        if not options.no_peer:
            figures["transformers_serve"] = peer(home, source, min(options.runs, 3))
    names = {"dram": "in DRAM", "ssd": "on SSD", "remote": "not imported"}
    rows = [
        [f"Hearth, {names[tier]}", *(f"{figures['hearth'][tier][part]['median'] * 1000:.0f}" for part in PARTS)]
        for tier in names
    ]
    rows.append(
        ["Hearth, warm", f"{figures['hearth']['warm']['total_s']['median'] * 1000:.0f}", *[""] * (len(PARTS) - 1)]
    )
    for key, label in (
        ("cold", "first request"),
        ("page_cache_warm", "first request, page cache warm"),
        ("warm", "warm"),
    ):
        if "transformers_serve" in figures:
            rows.append(
                [
                    f"transformers serve, {label}",
                    f"{figures['transformers_serve'][key]['median'] * 1000:.0f}",
                    *[""] * (len(PARTS) - 1),
                ]
            )
    columns = [
        "median ms to the first token",
        "total",
        "queue",
        "decision",
        "import",
        "read",
        "attach",
        "prefill",
        "all but prefill",
    ]
    publish("cold_start", f"Cold start of {options.shape}, {size / 1e9:.2f} GB", columns, rows, figures)


if __name__ == "__main__":
    main()
