"""The side of a worker that is measured: lease → parameters of a model, in a process of its own, without an engine.

    python -m benchmarks.loading.attach --nats URL --prefix PREFIX [--server-id ID] [--device DEVICE]

It warms up as a worker does, prints a line of JSON (`ready`) and answers each line of JSON on standard input with one:
`{"do": "load", …}` acquires a checkpoint and attaches it, `prepare` maps the store's
segment, `touch` reads one byte of every 4096 of the parameters, `memory` tells this process's sizes, `release` gives
the lease back.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.loading.disk import pss_bytes, status_bytes
from benchmarks.loading.peers import tensors_of, touch
from services.worker.attach import attach, bytes_at, fill, read_files, skeleton, tensors
from services.worker.loader import TorchLoader
from services.worker.loader_memory import Image
from services.worker.loader_transfer import in_memory
from services.worker.ports import UNWATCHED
from shared.bus import Bus
from shared.contracts.residency import Acquire, Lease, Release, Source
from shared.subjects import ACQUIRE, RELEASE


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Attacher:
    """One worker's loader and its bus, and what they hold."""

    def __init__(self, bus: Bus, server_id: str, device: str) -> None:
        self._bus = bus
        self._server_id = server_id
        self._loader = TorchLoader(device=device)
        self._loader.warm_up()
        # Asked once, ahead of need, as a worker does: Python starts a program to find out about the processor, and
        # that would wait for the disk behind the load.
        self._on_cpu = self._loader.device.device == "cpu"
        self._held: tuple[Lease, Any, Image] | None = None

    def prepare(self, segment: str) -> dict[str, Any]:
        """Map the store's segment ahead of need, as a worker does when it hears of it."""
        start = time.perf_counter()
        self._loader.prepare(segment)
        return {"seconds": time.perf_counter() - start}

    async def load(
        self,
        checkpoint_id: str,
        source: str,
        wait_s: float = 5.0,
        arriving: bool = True,
        tensors_first: bool = False,
    ) -> dict[str, Any]:
        """Acquire and attach; seconds since the call.

        With `tensors_first` nothing of the model is made before all its tensors are there, as a loader of tensors does.
        """
        cpu_s, start = _cpu_s(), time.perf_counter()
        lease = await self._acquire(checkpoint_id, source, wait_s, arriving)
        leased_s = time.perf_counter() - start
        early: dict[str, float] = {}
        if tensors_first:
            count = self._tensors(lease)
            early = {"arrived_s": time.perf_counter() - start, "tensors": count}
        model, image, times = self._attach(lease)
        model_s = time.perf_counter() - start
        self._held = (lease, model, image)
        return {
            "tier": lease.tier, "arriving": lease.arrival is not None, "leased_s": leased_s, "model_s": model_s,
            "times": times, "read_s": lease.read_s, "import_s": lease.import_s, "cpu_s": _cpu_s() - cpu_s,
            "extent_bytes": sum(extent.length for extent in lease.extents), "extents": len(lease.extents),
            "checkpoint_id": lease.checkpoint.checkpoint_id, "bytes": lease.checkpoint.weight_bytes, **early,
        }  # fmt: skip

    def _tensors(self, lease: Lease) -> int:
        """Views on all tensors, every byte there; how many."""
        image, placed = in_memory(lease, self._loader._mappings, UNWATCHED)
        files = read_files(Path(lease.directory))
        found = tensors(files.manifest, bytes_at(placed.address, placed.size_bytes))
        placed.wait()
        count = len(found)
        del found
        self._loader._mappings.release(image)
        return count

    def _attach(self, lease: Lease) -> tuple[Any, Image, dict[str, float]]:
        if self._on_cpu:
            attached = attach(lease, self._loader._mappings)
            return attached.model, attached.image, dataclasses.asdict(attached.times)
        # As `TorchLoader.load` does it, without tokenizer and engine.
        import torch

        device = self._loader._device
        with torch.cuda.device(device):
            image, placed, buffer = self._loader._place(lease, UNWATCHED)
            files = read_files(Path(lease.directory))
            views = tensors(files.manifest, buffer)
            model = fill(skeleton(files), views, files, device, placed.wait)
            placed.wait()
        return model, image, {"waited_s": placed.waited_s}

    async def _acquire(self, checkpoint_id: str, source: str, wait_s: float, arriving: bool) -> Lease:
        message = Acquire(
            checkpoint_id=checkpoint_id, source=Source(url=source), holder="benchmark", ttl_s=60.0, wait_s=wait_s,
            arriving=arriving,
        )  # fmt: skip
        while True:
            answer = await self._bus.call(ACQUIRE, message, extra_s=wait_s, server_id=self._server_id)
            if isinstance(answer, Lease):
                return answer

    def touch(self) -> dict[str, Any]:
        """Seconds to read one byte of every page of every tensor."""
        assert self._held is not None
        start, cpu_s = time.perf_counter(), _cpu_s()
        _, size = touch(tensors_of(self._held[1]))
        return {"touch_s": time.perf_counter() - start, "touch_cpu_s": _cpu_s() - cpu_s, "bytes": size}

    def memory(self) -> dict[str, Any]:
        """This process's sizes in bytes."""
        pid = os.getpid()
        return {"pss_bytes": pss_bytes(pid), "anon_bytes": status_bytes(pid, "RssAnon"), "pid": pid}

    async def release(self) -> dict[str, Any]:
        """Give everything back."""
        if self._held is not None:
            lease, model, image = self._held
            self._held = None
            del model
            gc.collect()
            self._loader._mappings.release(image)
            self._bus.publish(RELEASE, Release(holder="benchmark", lease_id=lease.lease_id), server_id=self._server_id)
            await self._bus.flush()
        return {}


async def serve(options: argparse.Namespace) -> None:
    """Answer standard input until it ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=out, flush=True)

    async with Bus.connect(options.nats, name="attach", prefix=options.prefix) as bus:
        attacher = Attacher(bus, options.server_id, options.device)
        say(ready=True, pid=os.getpid())
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            order = json.loads(line)
            match order.pop("do"):
                case "load":
                    say(**await attacher.load(**order))
                case "prepare":
                    say(**attacher.prepare(**order))
                case "touch":
                    say(**attacher.touch())
                case "memory":
                    say(**attacher.memory())
                case "release":
                    say(**await attacher.release())
        await attacher.release()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nats", required=True)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--server-id", default="server-1")
    parser.add_argument("--device", default="cpu")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
