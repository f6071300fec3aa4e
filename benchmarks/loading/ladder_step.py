"""One step of the ladder in a process of its own: read a stored checkpoint in one way, then attach it.

    python -m benchmarks.loading.ladder_step STEP CHECKPOINT_DIRECTORY [--threads N] [--block BYTES]

Imports, makes the pool if the step has one, prints a line of JSON (`ready`), waits for a line, reads and attaches,
prints a line of JSON. Each step changes one thing of the step before it:

* `tensor`: every tensor into memory of its own, through the page cache
* `bulk`: pieces of the file, whatever tensors lie in them, into one new block of memory, through the page cache
* `pool`: into memory that was there and touched before
* `direct`: past the page cache (O_DIRECT)
* `threads`: by several threads
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

from services.worker.attach import CPU, DTYPES, bytes_at, fill, read_files, skeleton, tensors
from services.worker.loader import TorchLoader
from shared.contracts.manifest import PAGE_BYTES, Manifest

STEPS: Final = ("tensor", "bulk", "pool", "direct", "threads")


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def by_tensor(directory: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Every tensor on its own."""
    files = [os.open(directory / file.name, os.O_RDONLY) for file in manifest.files]
    found: dict[str, torch.Tensor] = {}
    for name, entry in manifest.tensors.items():
        tensor = torch.empty(entry.bytes, dtype=torch.uint8)
        view = memoryview(tensor.numpy()).cast("B")
        got = 0
        while got < entry.bytes:
            got += os.preadv(files[entry.file], [view[got:]], entry.offset + got)
        found[name] = tensor.view(DTYPES[entry.dtype]).view(entry.shape)
    for file in files:
        os.close(file)
    return found


def in_pieces(path: Path, into: memoryview, *, direct: bool, threads: int, block_bytes: int) -> None:
    """A file, piece by piece, into page-aligned memory that is as long as the padded file."""
    size = path.stat().st_size
    file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))

    def read(start: int) -> None:
        end = min(start + block_bytes, size)
        at = start
        while at < end:  # a direct read of the tail is short, and ends the loop
            stop = -(-end // PAGE_BYTES) * PAGE_BYTES if direct else end
            at += os.preadv(file, [into[at:stop]], at)

    starts = range(0, size, block_bytes)
    if threads == 1:
        for start in starts:
            read(start)
    else:
        with ThreadPoolExecutor(threads) as executor:
            list(executor.map(read, starts))
    os.close(file)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--block", type=int, default=16 << 20)
    options = parser.parse_args()
    step, directory = options.step, options.directory
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=out, flush=True)

    TorchLoader(device="cpu").warm_up()
    files = read_files(directory)
    path, size = directory / files.manifest.files[0].name, files.manifest.image_bytes()
    memory: mmap.mmap | None = None
    if step in ("pool", "direct", "threads"):
        memory = mmap.mmap(-1, size)
        memory.madvise(mmap.MADV_HUGEPAGE)
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0, size)
    say(ready=True)
    if not sys.stdin.readline():
        return
    cpu_s, start = _cpu_s(), time.perf_counter()
    if step == "tensor":
        views = by_tensor(directory, files.manifest)
    else:
        memory = memory or mmap.mmap(-1, size)
        direct, threads = step in ("direct", "threads"), options.threads if step == "threads" else 1
        in_pieces(path, memoryview(memory), direct=direct, threads=threads, block_bytes=options.block)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        views = tensors(files.manifest, bytes_at(address, size))
    read_s = time.perf_counter() - start
    model = fill(skeleton(files), views, files, CPU)
    say(read_s=read_s, usable_s=time.perf_counter() - start, cpu_s=_cpu_s() - cpu_s, tensors=len(views))
    sys.stdin.read()
    del model
    out.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
