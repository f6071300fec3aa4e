"""Chunks of an object through the store's tree against the client library's own parallel ranges, in turn.

    python -m benchmarks.ranges [--runs 7] [--bytes 1GiB] [--connections 8]

An S3-compatible server on loopback, in a process of its own, serves one object from memory with sendfile(2). Every way
fetches it in chunks of 16 MiB with the same number of connections: the tree's into their places in one buffer, as the
store's mover does; the library's are thrown away, or copied there too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import obstore
from obstore.store import S3Store

from benchmarks.report import show, write
from services.store.object_tree import ObjectTree
from services.store.remote_config import decode_remote_config
from shared.contracts.manifest import CHUNK_BYTES
from shared.settings import parse_size
from tests.builders.s3 import S3Server, pieces

URL: Final = "s3://models/one"
NAME: Final = "model.safetensors"
TREE: Final = "Hearth's tree, into place"


def measure(server: S3Server, size: int, connections: int, runs: int) -> dict[str, dict[str, list[float]]]:
    """Bytes per second and CPU seconds per GB (of this process) by way, one of each per run but the first."""
    options = decode_remote_config(json.dumps({URL: server.options}).encode()).options(URL)
    tree = ObjectTree(URL, options, connections=connections)
    store = S3Store("models", prefix="one", **server.options)
    memory = mmap.mmap(-1, size)
    memory.write(bytes(size))  # touched, as the DRAM pool is
    view = memoryview(memory)
    chunks = list(pieces(size, CHUNK_BYTES))

    def threads(fetch: Callable[[tuple[int, int]], object]) -> Callable[[], None]:
        def run() -> None:
            with ThreadPoolExecutor(connections) as pool:
                list(pool.map(fetch, chunks))

        return run

    def copied(chunk: tuple[int, int]) -> None:
        view[chunk[0] : chunk[1]] = obstore.get_range(store, NAME, start=chunk[0], end=chunk[1])

    async def tasks() -> None:
        free = asyncio.Semaphore(connections)

        async def one(chunk: tuple[int, int]) -> None:
            async with free:
                await obstore.get_range_async(store, NAME, start=chunk[0], end=chunk[1])

        async with asyncio.TaskGroup() as group:
            for chunk in chunks:
                group.create_task(one(chunk))

    ways: dict[str, Callable[[], None]] = {
        TREE: threads(lambda chunk: tree.read(NAME, chunk[0], view[chunk[0] : chunk[1]])),
        "get_range on threads": threads(lambda chunk: obstore.get_range(store, NAME, start=chunk[0], end=chunk[1])),
        "get_range on threads, copied": threads(copied),
        "get_range_async": lambda: asyncio.run(tasks()),
    }
    found: dict[str, dict[str, list[float]]] = {way: {"bytes_per_s": [], "cpu_s_per_gb": []} for way in ways}
    for number in range(runs + 1):
        for way in random.sample(sorted(ways), len(ways)):
            run = ways[way]
            cpu_s, began = _cpu_s(), time.perf_counter()
            run()
            seconds, used_s = time.perf_counter() - began, _cpu_s() - cpu_s
            if number:
                found[way]["bytes_per_s"].append(size / seconds)
                found[way]["cpu_s_per_gb"].append(used_s / size * 1e9)
    return found


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--bytes", default="1GiB")
    parser.add_argument("--connections", type=int, default=8)
    options = parser.parse_args()
    size = parse_size(options.bytes)
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    try:
        with S3Server(root) as server:
            home = server.bucket() / "one"
            home.mkdir()
            with (home / NAME).open("wb") as file:
                for start, end in pieces(size, CHUNK_BYTES):
                    file.write(os.urandom(end - start))
            found = measure(server, size, options.connections, options.runs)
    finally:
        shutil.rmtree(root)
    rows = []
    ratios = {}
    for way, values in found.items():
        # Of pairs of neighbours in time: what else runs on the machine is the same for both.
        ratio = statistics.median(
            mine / theirs for mine, theirs in zip(found[TREE]["bytes_per_s"], values["bytes_per_s"], strict=True)
        )
        ratios[way] = ratio
        rates = [value / 1e9 for value in values["bytes_per_s"]]
        rows.append(
            [
                way,
                f"{statistics.median(rates):.2f}",
                f"{min(rates):.2f} – {max(rates):.2f}",
                f"{statistics.median(values['cpu_s_per_gb']):.2f}",
                "" if way == TREE else f"{ratio:.2f}",
            ]
        )
    title = f"{size / 2**30:.2g} GiB, chunks of 16 MiB, {options.connections} connections, {options.runs} runs in turn"
    show(title, ["way", "GB/s, median", "least – most", "CPU s per GB", "tree / this way"], rows)
    write("ranges", {"bytes": size, "connections": options.connections, "ways": found, "ratios": ratios})


if __name__ == "__main__":
    main()
