"""The ladder of the ServerlessLLM paper on one file: by tensor → bulk → pool → direct → threads → pipeline."""

from __future__ import annotations

import sys
from typing import Final

from benchmarks.loading.bench import (
    HEARTH,
    Options,
    Run,
    Stored,
    bring_in,
    hearth_load,
    make_sure_cold,
    median,
    of_ceiling,
    rounds,
)
from benchmarks.loading.disk import GB, Ceiling, drop_page_cache
from benchmarks.loading.hearth import Child, StoreUnderTest
from benchmarks.loading.ladder_step import STEPS
from benchmarks.loading.tiers import POOL_BYTES, SHAPE
from benchmarks.models import generate
from benchmarks.plots import bars
from benchmarks.report import range_of, show, write

WHAT: Final = {
    "tensor": "read by tensor, page cache",
    "bulk": "bulk: 16 MiB pieces, whatever lies in them",
    "pool": "into memory touched beforehand",
    "direct": "direct I/O",
    "threads": "4 threads",
    HEARTH: "pipeline: Hearth, attached while chunks arrive and are verified",
}


def ladder(options: Options) -> None:
    """Part `ladder`."""
    source = generate(options.models / SHAPE, SHAPE)
    with StoreUnderTest(options.scratch / "ladder", dram_bytes=POOL_BYTES) as store:
        stored = bring_in(store, source)
        ceiling = Ceiling(stored.file, enabled=options.fio)
        ceiling.choose()
        found: dict[str, list[Run]] = {name: [] for name in (*STEPS, HEARTH)}

        def one(name: str) -> None:
            found[name].append(
                hearth_load(options, stored, cold=True) if name == HEARTH else _step(options, stored, name)
            )

        rounds(max(3, options.runs * 5 // 8), list(found), one, ceiling.read_once)
    size, rows, before = stored.weight_bytes, [], 0.0
    for name, runs in found.items():
        seconds = median([run["usable_s"] for run in runs])
        cpu = median([run["usable_cpu_s"] if name == HEARTH else run["cpu_s"] for run in runs])
        rows.append(
            [
                WHAT[name], range_of([run["usable_s"] for run in runs]), f"{size / seconds / GB:.2f}",
                of_ceiling(size / seconds, ceiling), f"{cpu / (size / GB):.3f}",
                f"{before / seconds:.2f}×" if before else "",
            ]
        )  # fmt: skip
        before = seconds
    title = (
        f"The ladder: {size / GB:.2f} GB, cold page cache (dropped: {options.drop}), attached at the end of each step"
    )
    show(title, ["step", "usable", "GB/s", "of fio", "CPU s per GB", "against the step before"], rows)
    write("load-ladder", {"weight_bytes": size, "runs": found, "fio": {"reads": ceiling.reads, "way": ceiling.way}})
    if options.plot:
        bars(
            "load-ladder",
            "The ladder of loading: cold SSD → usable parameters",
            "seconds (median; every run as a tick)",
            {
                (HEARTH + ": pipeline" if name == HEARTH else WHAT[name]): [r["usable_s"] for r in runs]
                for name, runs in found.items()
            },
            line=size / median(ceiling.reads) if ceiling.reads else None,
            line_name="fio, direct sequential read",
        )


def _step(options: Options, stored: Stored, name: str) -> Run:
    drop_page_cache(options.drop, [stored.directory])
    command = [sys.executable, "-m", "benchmarks.loading.ladder_step", name, str(stored.directory)]
    with Child(command, options.scratch / "ladder.log") as child:
        make_sure_cold(stored.file)
        return child.ask("go")
