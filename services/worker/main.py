"""The worker's wiring: settings → log → clients → the heavy imports, on a thread → subscriptions → ready."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from services.worker.core import WorkerCore
from services.worker.ports import DeviceFacts, Loader
from services.worker.run import Limits
from services.worker.service import Leases, NoLeases, StoreLeases, WorkerShell
from shared.lifecycle import Context, run
from shared.settings import WorkerSettings

# The engine's thread and the event loop share the interpreter: a loop that has a token to send waits for at most this
# long (CPython's default is 5 ms) until a computing thread lets go.
SWITCH_INTERVAL_S: Final = 0.0001
DRAM_SHARE: Final = 1 / 8
DEVICE_SHARE: Final = 0.9


def warm_loader(settings: WorkerSettings) -> Loader:
    """The loader that the settings ask for, warmed up. Blocks for as long as importing torch takes."""
    loader: Loader
    if settings.engine == "null":
        from services.worker.null_engine import NullLoader

        loader = NullLoader()
    else:
        from services.worker.loader import TorchLoader

        loader = TorchLoader(device=settings.device, torch_threads=settings.torch_threads)
    loader.warm_up()
    return loader


def memory_total_bytes(settings: WorkerSettings, device: DeviceFacts) -> int:
    """What replicas may take of the device."""
    if settings.worker_memory_bytes:
        return settings.worker_memory_bytes
    return int(device.memory_bytes * (DRAM_SHARE if device.device == "cpu" else DEVICE_SHARE))


async def serve(context: Context[WorkerSettings]) -> None:
    """A worker's whole service, from warming up to drained."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    threads = ThreadPoolExecutor(1, thread_name_prefix="warm-up")
    loop = asyncio.get_running_loop()
    try:
        loader = await loop.run_in_executor(threads, warm_loader, context.settings)
        await work(context, loader, NoLeases() if context.settings.engine == "null" else StoreLeases(context))
        await loop.run_in_executor(threads, loader.close)
    finally:
        threads.shutdown(wait=False)


async def work(context: Context[WorkerSettings], loader: Loader, leases: Leases, *, check: bool = False) -> None:
    """Serve with this warm loader until the context is stopping. `check`: assert the core's invariants (tests)."""
    settings, device = context.settings, loader.device
    limits = Limits(
        worker_id=context.id,
        server_id=settings.server_id,
        memory_total_bytes=memory_total_bytes(settings, device),
        weights_on_device=device.device != "cpu",
        max_replicas=settings.worker_max_replicas,
        lease_ttl_s=settings.lease_ttl_s,
        ack_wait_s=settings.ack_wait_s,
        max_deliveries=settings.max_deliveries,
        drain_s=settings.drain_s,
        kv_bytes_max=settings.kv_bytes_max,
        hold_s=settings.hold_s,
        gateway_lost_s=settings.gateway_lost_s,
        engine="" if settings.engine in ("auto", "null") else settings.engine,
    )
    core = WorkerCore(limits)
    await WorkerShell(context, core, loader=loader, leases=leases, device=device, check=check).serve()


def main() -> int:
    """`hearth worker`; its exit code."""
    return run("worker", WorkerSettings, serve)


if __name__ == "__main__":
    sys.exit(main())
