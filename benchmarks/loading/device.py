"""DRAM → accelerator and SSD → accelerator, against a plain copy from pinned memory, where there is a device."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Final

from benchmarks.loading.bench import Options, Run, bring_in, gb_s, hearth_load, median, verdict
from benchmarks.loading.disk import GB, Ceiling
from benchmarks.loading.hearth import StoreUnderTest
from benchmarks.loading.tiers import POOL_BYTES, SHAPE
from benchmarks.models import generate
from benchmarks.report import range_of, show, write

# Bandwidth of a plain copy from pinned memory, in a process of its own: the benchmark itself never touches the device.
_PLAIN: Final = """
import json, sys, torch
if not torch.cuda.is_available():
    print(json.dumps({"device": None})); sys.exit()
name, size = sys.argv[1], int(sys.argv[2])
torch.cuda.set_device(name)
source = torch.empty(size, dtype=torch.uint8, pin_memory=True).fill_(1)
target = torch.empty(size, dtype=torch.uint8, device=name)
found = []
for _ in range(6):
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record(); target.copy_(source, non_blocking=True); last.record(); torch.cuda.synchronize()
    found.append(size / first.elapsed_time(last) * 1000)
print(json.dumps({"device": torch.cuda.get_device_name(name), "plain": found[1:]}))
"""


def plain_copy(device: str, size: int) -> dict[str, Any]:
    """Bytes per second of a plain copy from pinned memory, several times; `device` None where there is none."""
    name = device if device.startswith("cuda:") else "cuda:0"
    done = subprocess.run([sys.executable, "-c", _PLAIN, name, str(size)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"device": None, "reason": (done.stderr.strip().splitlines() or ["?"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def device(options: Options) -> None:
    """Part `device`."""
    plain = plain_copy(options.device, 2 * GB)
    if plain["device"] is None:
        print(f"no device: {plain.get('reason', 'torch finds no CUDA device')}")
        write("load-device", {"device": None})
        return
    options = options.on(options.device if options.device.startswith("cuda") else "cuda:0")
    source = generate(options.models / SHAPE, SHAPE)
    with StoreUnderTest(options.scratch / "device", dram_bytes=POOL_BYTES) as store:
        stored = bring_in(store, source)
        ceiling = Ceiling(stored.file, enabled=options.fio)
        ceiling.choose()
        found: dict[str, list[Run]] = {"SSD → GPU": [], "DRAM → GPU": []}
        for _ in range(options.runs):
            ceiling.read_once()
            for name in found:
                found[name].append(hearth_load(options, stored, cold=name.startswith("SSD")))
    size, copied = stored.weight_bytes, median(plain["plain"])
    rows = []
    for name, runs in found.items():
        seconds = median([run["model_s"] for run in runs])
        limit = copied if name.startswith("DRAM") or not ceiling.reads else min(copied, median(ceiling.reads))
        ratio = size / seconds / limit
        rows.append(
            [
                name, range_of([run["model_s"] for run in runs]), f"{size / seconds / GB:.2f}", f"{limit / GB:.2f}",
                f"{ratio:.2f}", verdict(ratio >= 0.9),
            ]
        )  # fmt: skip
    show(
        f"To the accelerator ({plain['device']}), plain pinned copy {gb_s(copied, 1)}",
        ["", "usable", "GB/s", "limit GB/s", "of the limit", "≥ 0.9"],
        rows,
    )
    write("load-device", plain | {"runs": found, "weight_bytes": size, "fio": {"reads": ceiling.reads}})
