"""Loading, part by part, against what the disk allows and against the loaders that people would use instead.

    python -m benchmarks.load [--quick] [--only ssd,dram,shapes,ladder,remote,import,device] [--peer-python PATH]

Each part prints tables with its targets and writes JSON (and, with matplotlib, a plot) below `benchmarks/results`.
Every load has a fresh process that has imported everything before the clock starts; systems take turns; the page
cache is dropped before every load from SSD (by the kernel's switch as root, else file by file). `usable`: the call has
returned and the parameters can be used. `every page read`: one byte of every 4096 has been read, too, which is when
loaders that map a file have really read it. fio's direct sequential read (or write) of the same file system is
measured in the same rounds. Peers run in `--peer-python` (this interpreter by default), for instance that of an
environment with `pip install 'hearth-serve[bench]'`; those that it lacks are reported as not installed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.loading import imports, ladder, remote, shapes, tiers
from benchmarks.loading.bench import Options
from benchmarks.loading.device import device
from benchmarks.loading.disk import how_to_drop
from benchmarks.loading.peers import LOADERS

PARTS: Final[dict[str, Callable[[Options], None]]] = {
    "ssd": tiers.cold,
    "dram": tiers.dram,
    "shapes": shapes.shapes,
    "ladder": ladder.ladder,
    "remote": remote.remote,
    "import": imports.imports,
    "device": device,
}
QUICK_PEERS: Final = ("safetensors", "fastsafetensors", "tensorizer")


def main() -> int:
    """Run the parts that were asked for; 1 if one of them could not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts (default: all)")
    parser.add_argument("--runs", type=int, default=0, help="cold loads of each loader (default 8; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer runs and peers: about three minutes")
    parser.add_argument("--scratch", type=Path, default=Path(".hearth/benchmarks"), help="keeps the generated models")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers")
    parser.add_argument("--no-peer", action="store_true", help="measure Hearth alone")
    parser.add_argument("--no-fio", action="store_true", help="do without the disk's ceiling")
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument(
        "--drop", choices=("auto", "kernel", "files"), default="auto", help="how to empty the page cache"
    )
    parser.add_argument("--device", default="cpu", help="device of the workers (cpu, cuda, cuda:N)")
    asked = parser.parse_args()
    unknown = [part for part in asked.only.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    options = Options(
        scratch=asked.scratch.resolve(),
        runs=asked.runs or (3 if asked.quick else 8),
        drop=how_to_drop(asked.drop),
        fio=not asked.no_fio,
        peer_python=asked.peer_python,
        peers=() if asked.no_peer else QUICK_PEERS if asked.quick else tuple(LOADERS),
        device=asked.device,
        plot=not asked.no_plot,
        quick=asked.quick,
    )  # fmt: skip
    options.scratch.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended then, too
    for part in asked.only.split(","):
        print(f"\n== {part}", flush=True)
        PARTS[part](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
