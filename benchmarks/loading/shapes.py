"""Many small tensors and one huge tensor against the plain case: the time must depend on bytes, not on their shape."""

from __future__ import annotations

from benchmarks.loading.bench import (
    Options,
    Run,
    Stored,
    bring_in,
    hearth_load,
    median,
    of_ceiling,
    rounds,
    verdict,
)
from benchmarks.loading.disk import GB, Ceiling
from benchmarks.loading.hearth import StoreUnderTest
from benchmarks.loading.tiers import POOL_BYTES, SHAPE
from benchmarks.models import generate, generate_streamed
from benchmarks.report import range_of, show, write


def shapes(options: Options) -> None:
    """Part `shapes`."""
    sources = {
        "plain": generate(options.models / SHAPE, SHAPE),
        "many small tensors": generate_streamed(options.models / "moe-10k", "moe-10k"),
        "one huge tensor": generate_streamed(options.models / "huge-tensor", "huge-tensor"),
    }
    with StoreUnderTest(options.scratch / "shapes", dram_bytes=POOL_BYTES) as store:
        stored: dict[str, Stored] = {name: bring_in(store, source) for name, source in sources.items()}
        ceiling = Ceiling(stored["plain"].file, enabled=options.fio)
        ceiling.choose()
        found: dict[str, list[Run]] = {name: [] for name in stored}

        def one(name: str) -> None:
            for other in stored.values():  # the pool has room for one
                store.evict(other.checkpoint_id, "dram")
            found[name].append(hearth_load(options, stored[name], cold=True, tensors_first=True))

        rounds(max(3, options.runs * 5 // 8), list(found), one, ceiling.read_once)
    rows, bandwidths, arrived = [], {}, {}
    for name, runs in found.items():
        size = stored[name].weight_bytes
        # Bytes in DRAM, verified and mapped: what the target is about. The model on top of it costs by module.
        arrived[name] = [run["arrived_s"] for run in runs]
        bandwidths[name] = size / median(arrived[name])
        model = median([run["model_s"] for run in runs])
        ratio = bandwidths[name] / bandwidths["plain"]
        rows.append(
            [
                name, f"{size / GB:.2f} GB, {runs[0]['tensors']} tensors", range_of(arrived[name]),
                f"{bandwidths[name] / GB:.2f}", of_ceiling(bandwidths[name], ceiling), f"{ratio:.2f}",
                "" if name == "plain" else verdict(ratio >= 0.9), f"{model:.3f} s", f"{size / model / GB:.2f}",
            ]
        )  # fmt: skip
    show(
        "Shapes: SSD → parameters, cold page cache",
        ["model", "", "tensors usable", "GB/s", "of fio", "of plain", "≥ 0.9", "model usable", "GB/s"],
        rows,
    )
    write(
        "load-shapes",
        {"runs": found, "weight_bytes": {k: v.weight_bytes for k, v in stored.items()}, "fio": ceiling.reads},
    )
