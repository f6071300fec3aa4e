"""`hearth profile`: measures this machine and writes it as a profile for `hearth simulate` and `hearth plan`.

Measured: reading the SSD tier as a store does, copies to the device, attaching, prefill and decode of two models that
it makes itself, and (with --nats) the way of a message. What cannot be measured by one machine alone is assumed, and
says so; speeds of larger models are the straight line through the two that were measured. It takes about a minute;
nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from services.store.bench import bench
from shared.bus import Bus
from shared.errors import Code, HearthError
from shared.settings import StoreSettings, load
from shared.sizes import rate, size
from simulator.options import size_of
from simulator.profiles.profile import Figure, parse, written
from simulator.report.tables import show

if TYPE_CHECKING:
    from services.worker.engine_bench import DeviceFound, ModelFound

READ_BYTES: Final = 1 << 30
NETWORK_BYTES_PER_S: Final = 1.25e9
MESSAGES: Final = 200
# Larger models whose speeds are derived: parameters, layers, bytes of keys and values per token (their configs).
LARGER: Final = {
    "llama-1.1b": (1_100_048_384, 22, 2 * 22 * 4 * 64 * 2),
    "llama-8b": (8_030_261_248, 32, 2 * 32 * 8 * 128 * 2),
    "llama-70b": (70_553_706_496, 80, 2 * 80 * 8 * 128 * 2),
}
BYTES_PER_PARAMETER: Final = 2


def options(parser: argparse.ArgumentParser) -> None:
    """What `hearth profile` takes."""
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where the profile goes (profile-HOST.toml; - : print it)"
    )
    parser.add_argument("--name", help="what it is called (the host's name)")
    parser.add_argument(
        "--dir", help="directory of the SSD tier (HEARTH_STORE_DIR if it is there, else this directory)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--devices", metavar="N", type=int, default=1, help="of this kind in a server (%(default)s)")
    parser.add_argument("--servers", metavar="N", type=int, default=1, help="how many such machines (%(default)s)")
    parser.add_argument("--dram", metavar="SIZE", type=size_of, help="DRAM pool of a server (half of the memory)")
    parser.add_argument("--ssd", metavar="SIZE", type=size_of, help="SSD tier (the file system)")
    parser.add_argument("--network", metavar="SIZE", type=size_of, help="bytes per second of the NIC (its link speed)")
    parser.add_argument("--nats", metavar="URL", help="measure the way of a message through this NATS server")


def profile(chosen: argparse.Namespace) -> int:
    """Measure and write; the exit code. Raises HearthError."""
    if chosen.devices < 1 or chosen.servers < 1:
        raise HearthError(Code.INVALID_REQUEST, "A profile has at least one server with one device.")
    settings = load(StoreSettings)
    named = Path(chosen.dir or settings.store_dir)
    directory = named if chosen.dir or named.is_dir() else Path.cwd()
    device, models = _engine(chosen.device)
    device_name = device.device_name if device.device != "cpu" else processor()
    _say("the SSD tier")
    disk = bench(directory, shm=Path(settings.shm_dir), settings=settings, size_bytes=READ_BYTES)
    by = f"measured by hearth profile, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    host = platform.node().split(".")[0] or "machine"
    text = written(
        name=chosen.name or host,
        about=f"{device_name}, measured by hearth profile; larger models are derived",
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        machine=f"{device_name}, {os.cpu_count()} cores, {size(psutil.virtual_memory().total)} of memory",
        server=_server(chosen, device, device_name, disk, directory, by),
        cluster=_cluster(chosen, by),
        models=_models(models, device, device_name, by),
    )
    found = parse(text, "what was measured")  # it can be read again, or is not written
    if chosen.output == "-":
        print(text, end="")
        return 0
    path = Path(chosen.output or f"profile-{host}.toml")
    path.write_text(text, encoding="utf-8")
    shape = found.kinds[0].shape
    rows = [["SSD → DRAM", rate(shape.ssd_bytes_per_s)], ["NIC", rate(shape.network_bytes_per_s)]]
    if shape.device != "cpu":
        rows.append(["DRAM → device", rate(shape.device_bytes_per_s)])
    for name, served in found.models.items():
        model = served.model
        speeds = f"{1 / model.prefill_token_s:.0f} tokens/s prefill, {model.step_s * 1000:.1f} ms per decode step"
        rows.append([f"{name} ({size(model.weight_bytes)})", f"{speeds}, attach {model.attach_s * 1000:.0f} ms"])
    show(device_name, ["", "measured or derived"], rows)
    print(f"written: {path}; use it with hearth simulate --profile {path}")
    return 0


def _engine(device: str) -> tuple[DeviceFound, list[ModelFound]]:
    _say("torch")
    try:
        from services.worker.engine_bench import measure
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in {"services", "shared", "simulator"}:
            raise
        raise HearthError(
            Code.UNAVAILABLE,
            f"Prefill and decode are measured with the engine, and {missing} is not installed here; "
            "pip install -e '.[worker]' does that.",
        ) from error
    return measure(device, _say)


def _server(
    chosen: argparse.Namespace, device: DeviceFound, device_name: str, disk: Mapping[str, Any], directory: Path, by: str
) -> dict[str, Figure | str]:
    memory = psutil.virtual_memory().total
    on_gpu = device.device != "cpu"
    dram = Figure(chosen.dram, "as asked for") if chosen.dram else Figure(memory // 2, "assumed: half of the memory")
    file_system = os.statvfs(directory)
    ssd = (
        Figure(chosen.ssd, "as asked for")
        if chosen.ssd
        else Figure(file_system.f_blocks * file_system.f_frsize, f"the file system ({disk['filesystem']})")
    )
    found: dict[str, Figure | str] = {
        "device": "cuda" if on_gpu else "cpu",
        "device_name": device_name,
        "count": Figure(chosen.servers, "as asked for"),
        "devices": Figure(chosen.devices, "as asked for"),
        # On the CPU parameters are views on the DRAM pool; what a worker itself needs is mostly KV cache.
        "device_memory_bytes": Figure(device.memory_bytes, "free memory of the device" if on_gpu else "the memory"),
        "dram_bytes": dram,
        "ssd_bytes": ssd,
        "ssd_bytes_per_s": Figure(
            float(disk["measured_gb_per_s"]) * 1e9, f"{by}: verified direct reads with the store's own setting"
        ),
        "network_bytes_per_s": _network(chosen.network),
    }
    if on_gpu:
        found["device_bytes_per_s"] = Figure(device.copy_bytes_per_s, f"{by}: copies from pinned memory")
    return found


def processor() -> str:
    """The name of this machine's processor, as far as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "a processor"


def _network(asked: int | None) -> Figure:
    if asked:
        return Figure(asked, "as asked for")
    speeds = [
        (one.speed, name) for name, one in sorted(psutil.net_if_stats().items()) if one.isup and 0 < one.speed < 65535
    ]
    if not speeds:
        return Figure(NETWORK_BYTES_PER_S, "assumed: 10 Gb/s, the kernel does not say")
    mbit, name = max(speeds)
    return Figure(mbit * 1e6 / 8, f"link speed of {name} as the kernel has it: {mbit} Mb/s")


def _cluster(chosen: argparse.Namespace, by: str) -> dict[str, Figure]:
    nic = _network(chosen.network)
    found = {"remote_bytes_per_s": Figure(nic.value, f"assumed: an object store that fills the NIC ({nic.origin})")}
    if chosen.nats:
        _say("the bus")
        seconds = asyncio.run(_message_s(chosen.nats))
        found["bus_s"] = Figure(seconds, f"{by}: half a ping through NATS, times two hops")
    return found


async def _message_s(url: str) -> float:
    """Seconds from one process to another: to the server and on, which is as long as to the server and back."""
    times = []
    async with Bus.connect(url, name="profile", wait_s=3.0) as bus:
        for _ in range(MESSAGES):
            began = time.perf_counter()
            await bus.flush()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


# -- speeds of models --------------------------------------------------------------------------------------------------


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(y at 0, slope) through two points; through 0 and the second one where noise would make either negative."""
    slope = (ys[1] - ys[0]) / (xs[1] - xs[0])
    start = ys[0] - slope * xs[0]
    return (start, slope) if slope > 0 and start >= 0 else (0.0, ys[1] / xs[1])


def _models(
    models: Sequence[ModelFound], device: DeviceFound, device_name: str, by: str
) -> dict[str, dict[str, Figure | str]]:
    found: dict[str, dict[str, Figure | str]] = {}
    speeds = [_speeds(model) for model in models]
    for model, speed in zip(models, speeds, strict=True):
        found[f"generated-{model.parameters / 1e6:.0f}m"] = {
            "architecture": "LlamaForCausalLM",
            "weight_bytes": Figure(model.weight_bytes, "the generated model"),
            "kv_bytes_per_token": Figure(model.kv_bytes_per_token, "the generated model's config"),
            **{key: Figure(value, f"{by}: bfloat16, {device_name}") for key, value in speed.items()},
        }
    sizes = [float(model.parameters) for model in models]
    layers = [float(model.layers) for model in models]
    for name, (parameters, depth, kv_bytes) in LARGER.items():
        if BYTES_PER_PARAMETER * parameters > device.memory_bytes:
            continue
        facts: dict[str, Figure | str] = {
            "architecture": "LlamaForCausalLM",
            "weight_bytes": Figure(BYTES_PER_PARAMETER * parameters, "its parameters in bfloat16"),
            "kv_bytes_per_token": Figure(kv_bytes, "its config"),
        }
        for key in speeds[0]:
            xs, x, what = (layers, depth, "layers") if key == "attach_s" else (sizes, parameters, "parameters")
            start, slope = line(xs, [speed[key] for speed in speeds])
            facts[key] = Figure(start + slope * x, f"derived: the line through the generated models, by {what}")
        found[name] = facts
    return found


def _speeds(model: ModelFound) -> dict[str, float]:
    prefill_s, prefill_token_s = line(list(map(float, model.prefill)), list(model.prefill.values()))
    batches = list(model.decode)
    more = (model.decode[batches[1]] - model.decode[batches[0]]) / (batches[1] - batches[0])
    return {
        "prefill_s": prefill_s,
        "prefill_token_s": prefill_token_s,
        "step_s": model.decode[batches[0]],
        "step_request_s": max(0.0, more),
        "attach_s": model.attach_s,
    }


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Kmeasuring {text}", end="", file=sys.stderr, flush=True)
