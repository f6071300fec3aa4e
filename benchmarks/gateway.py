"""What Hearth adds to the engine: latency, throughput, the control plane's part of a cold start.

    python -m benchmarks.gateway [--scratch DIR] [--only warm,throughput,control,streams]

* warm: time to first token through HTTP against the engine's own, driven directly in this process, and against
  `transformers serve` (needs `pip install "transformers[serving]"`; `--no-peer` leaves it out), in turn.
* throughput: requests per second through one gateway with an engine that costs nothing.
* control: HTTP request → first token of a model that no worker has, with an engine and a loader that cost nothing:
  demand, decision, load command, replica ready, pull, claim, frame.
* streams: 32 concurrent streams of a generated 125 M-parameter model, tokens per second through HTTP against the engine
  driven directly with the same prompts, alternating.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from tokenizers import Tokenizer

from benchmarks.harness import cluster
from benchmarks.models import generate
from benchmarks.peer import transformers_serve
from benchmarks.report import ms, publish, spread
from services.worker.ports import EngineEvent, SequenceEnd, StepToken
from shared.contracts.requests import Sampling
from tests.builders.cluster import MIB, Cluster

DEMO = Path(__file__).parent.parent / "examples" / "demo-model" / "model"
SETTLE_S = 0.5
PROMPT = [5 + n % 200 for n in range(32)]


class Direct:
    """The engine in this process, without anything around it."""

    def __init__(self, directory: Path, slots: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from services.worker.engine import make_engine

        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval().requires_grad_(False)
        self._waiting: dict[str, tuple[int, threading.Event, list[float]]] = {}
        self._engine, _ = make_engine(
            model,
            engine="batching",
            kv_bytes=512 * MIB,
            slots=slots,
            max_context_tokens=1024,
            eos_token_ids=(),
            sink=self._sink,
        )

    def _sink(self, events: Sequence[EngineEvent]) -> None:
        now = time.perf_counter()
        for event in events:
            if isinstance(event, StepToken):
                self._waiting[event.sequence_id][2].append(now)
            elif isinstance(event, SequenceEnd):
                self._waiting[event.sequence_id][1].set()

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, float, int]:
        """(seconds to the first token, seconds in all, tokens) of these prompts submitted at once."""
        start = time.perf_counter()
        for number, prompt in enumerate(prompts):
            id = f"d{number}"
            self._waiting[id] = (number, threading.Event(), [])
            self._engine.submit(id, prompt, first_index=0, max_new_tokens=tokens, sampling=Sampling(temperature=0))
        stamps: list[float] = []
        for number in range(len(prompts)):
            _, done, times = self._waiting[f"d{number}"]
            done.wait()
            stamps += times
        return min(stamps) - start, max(stamps) - start, len(stamps)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()


async def stream(
    session: aiohttp.ClientSession, url: str, model: str, prompt: list[int] | str, tokens: int
) -> tuple[float, float]:
    """(seconds to the first token, seconds in all) of one streamed completion. Raises RuntimeError on any error."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    start, first = time.perf_counter(), 0.0
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(await answer.text())
        async for line in answer.content:
            if line.startswith(b"data: [DONE]"):
                return first - start, time.perf_counter() - start
            if line.startswith(b"data: "):
                if b'"error"' in line:
                    raise RuntimeError(line.decode())
                first = first or time.perf_counter()
    if not first:
        raise RuntimeError("the stream ended without a token")
    return first - start, time.perf_counter() - start  # transformers serve sends no [DONE] here


def session() -> aiohttp.ClientSession:
    """A client that opens as many connections as it is asked to."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300))


async def warm(running: Cluster, direct: Direct, peer: str | None, source: Path, runs: int) -> dict[str, Any]:
    """Time to first token: HTTP and direct in turn, the peer in turn with ten of them.

    The model speaks, so its first token is not held back. Before and after the peer's turn the processor gets time to
    settle: OpenMP's threads spin on after their work.
    """
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    # They begin differently, so that no prefix is shared.
    texts = [
        f"{number} and {number} more foxes went into the dark forest. Once upon a time" for number in range(runs + 10)
    ]
    through, own, other = [], [], []
    async with session() as client:
        for first in range(0, len(texts), 10):
            turn = texts[first : first + 10]
            for text in turn:
                prompt = tokenizer.encode(text).ids
                through.append((await stream(client, running.url, "demo", prompt, 2))[0])
                own.append((await asyncio.to_thread(direct.run, [prompt], 2))[0])
            if peer is not None:
                await asyncio.sleep(SETTLE_S)
                other += [(await stream(client, peer, str(source), text, 2))[0] for text in turn]
                await asyncio.sleep(SETTLE_S)
    del through[:10], own[:10], other[:10]  # the first turn warms up
    base = statistics.median(own)
    found = {"http_s": spread(through), "engine_s": spread(own), "overhead_s": spread([one - base for one in through])}
    return found | ({"transformers_serve_s": spread(other)} if peer is not None else {})


async def throughput(running: Cluster, requests: int, clients: int) -> dict[str, Any]:
    """Requests per second with `clients` connections, one token each."""
    left = requests
    times: list[float] = []

    async def one(client: aiohttp.ClientSession) -> None:
        nonlocal left
        body = json.dumps({"model": "null", "prompt": [1, 2, 3], "max_tokens": 1}).encode()
        while left > 0:
            left -= 1
            start = time.perf_counter()
            async with client.post(
                f"{running.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
            ) as answer:
                await answer.read()
                if answer.status != 200:
                    raise RuntimeError(await answer.text())
            times.append(time.perf_counter() - start)

    async with session() as client:
        await stream(client, running.url, "null", PROMPT, 1)
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(one(client))
        took = time.perf_counter() - start
    return {"requests_per_s": len(times) / took, "clients": clients, "latency_s": spread(times)}


async def control(running: Cluster, source: Path, runs: int) -> dict[str, Any]:
    """First request of a fresh deployment, its name and queue existing, no worker having it."""
    parts: list[dict[str, float]] = []
    async with session() as client:
        for number in range(runs):
            name = f"fresh-{number}"
            await asyncio.to_thread(running.deploy, name, source, lazy=True, keep_alive_s=300)
            body = {"model": name, "prompt": [1, 2, 3], "max_tokens": 1, "hearth": {"ledger": True}}
            start = time.perf_counter()
            async with client.post(f"{running.url}/v1/completions", json=body) as answer:
                found = await answer.json()
                took = time.perf_counter() - start
            if answer.status != 200:
                raise RuntimeError(str(found))
            if not found["hearth"].get("cold"):
                raise RuntimeError(f"not a cold start: {found['hearth']}")
            parts.append(
                {"total_s": took, "queue_s": found["hearth"]["queue_s"], "decision_s": found["hearth"]["decision_s"]}
            )
            await asyncio.to_thread(running.call, "DELETE", f"/v1/admin/deployments/{name}")
    return {key: spread([part[key] for part in parts]) for key in parts[0]}


async def streams(running: Cluster, direct: Direct, count: int, tokens: int, runs: int) -> dict[str, Any]:
    """Tokens per second of `count` concurrent streams, HTTP and direct in turn."""
    through, own = [], []
    async with session() as client:
        for run in range(runs + 1):
            prompts = [[9 + (number + 37 * run) % 200, *PROMPT[1:]] for number in range(count)]
            start = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for prompt in prompts:
                    tasks.create_task(stream(client, running.url, "medium", prompt, tokens))
            http_s = time.perf_counter() - start
            _, direct_s, made = await asyncio.to_thread(direct.run, prompts, tokens)
            if run:  # the first of each warms up
                through.append(count * tokens / http_s)
                own.append(made / direct_s)
    return {
        "http_tokens_per_s": spread(through),
        "engine_tokens_per_s": spread(own),
        "ratio": spread([a / b for a, b in zip(through, own, strict=True)]),
        "streams": count,
        "tokens_each": tokens,
    }


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="keeps the generated models between runs")
    parser.add_argument("--only", default="warm,throughput,control,streams")
    parser.add_argument("--runs", type=int, default=200, help="requests of the warm part")
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    only = options.only.split(",")
    figures: dict[str, Any] = {}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        models = options.scratch or home / "models"
        small = generate(models / "llama-3m", "llama-3m", "float32")
        if {"throughput", "control"} & set(only):
            with cluster(home / "null", env={"HEARTH_ENGINE": "null", "HEARTH_WORKER_MAX_REPLICAS": "64"}) as running:
                if "throughput" in only:
                    running.deploy("null", small, lazy=True, keep_alive_s=300, target_concurrency=64)
                    figures["throughput"] = found = asyncio.run(throughput(running, 2000, 16))
                    rows.append(["requests/s, engine that costs nothing", f"{found['requests_per_s']:.0f}", "> 200"])
                if "control" in only:
                    figures["control"] = found = asyncio.run(control(running, small, 30))
                    rows.append(["cold start of the control plane, median", ms(found["total_s"]["median"]), "≤ 50 ms"])
                    rows.append(["  of which demand → load commanded", ms(found["decision_s"]["median"]), ""])
        if "warm" in only:
            with cluster(home / "warm") as running:
                running.deploy("demo", DEMO, keep_alive_s=300)
                direct = Direct(DEMO, 16)
                serving = contextlib.nullcontext(None) if options.no_peer else transformers_serve(home)
                with serving as peer:
                    figures["warm"] = found = asyncio.run(warm(running, direct, peer, DEMO, options.runs))
                direct.close()
                rows.append(["warm TTFT through HTTP, median", ms(found["http_s"]["median"]), ""])
                rows.append(["the engine's own TTFT, median", ms(found["engine_s"]["median"]), ""])
                rows.append(["difference, median", ms(found["overhead_s"]["median"]), "≤ 5 ms"])
                rows.append(["difference, P99", ms(found["overhead_s"]["p99"]), "≤ 25 ms"])
                if "transformers_serve_s" in found:
                    rows.append(["transformers serve, median", ms(found["transformers_serve_s"]["median"]), ""])
        if "streams" in only:
            medium = generate(models / "llama-125m", "llama-125m", "float32")
            with cluster(home / "streams", dram_bytes=1024 * MIB) as running:
                running.deploy("medium", medium, keep_alive_s=300, target_concurrency=32, max_context_tokens=1024)
                direct = Direct(medium, 32)
                figures["streams"] = found = asyncio.run(streams(running, direct, 32, 48, 3))
                direct.close()
                rows.append(
                    ["32 streams of 125 M through HTTP, tokens/s", f"{found['http_tokens_per_s']['median']:.0f}", ""]
                )
                rows.append(
                    ["the engine driven directly, tokens/s", f"{found['engine_tokens_per_s']['median']:.0f}", ""]
                )
                rows.append(["ratio, median of pairs", f"{found['ratio']['median']:.3f}", "≥ 0.9"])
    publish("gateway", "What Hearth adds to the engine", ["quantity", "measured", "target"], rows, figures)


if __name__ == "__main__":
    main()
