"""Import: a Hugging Face directory becomes a stored checkpoint, against what fio writes to the same disk."""

from __future__ import annotations

import time

from benchmarks.loading.bench import Options, Run, median, verdict
from benchmarks.loading.disk import GB, MIB, Ceiling, drop_page_cache, fill_page_cache
from benchmarks.loading.hearth import StoreUnderTest, highest
from benchmarks.loading.tiers import SHAPE
from benchmarks.models import generate
from benchmarks.report import range_of, show, write


def imports(options: Options) -> None:
    """Part `import`: with the source in the page cache (what was just downloaded), and from the same disk.

    The first is held against what fio writes, the second against what it writes while it reads as much.
    """
    source = generate(options.models / SHAPE, SHAPE)
    file = source / "model.safetensors"
    size = file.stat().st_size
    found: dict[str, list[Run]] = {"source in memory": [], "source on the same disk": []}
    runs = max(3, options.runs * 3 // 8)
    with StoreUnderTest(options.scratch / "import", dram_bytes=256 * MIB) as store:
        ceiling = Ceiling(store.store_dir / "checkpoints", enabled=options.fio)
        ceiling.path = store.store_dir / "ceiling"
        ceiling.way = ("4M", 8)
        for number in range(runs):
            ceiling.write_once(size)
            ceiling.copy_once(file)
            for name in found:
                if name == "source in memory":
                    fill_page_cache(file)
                else:
                    drop_page_cache(options.drop, [source])
                cpu_s = store.cpu_s()
                with highest([store.pid]) as grown:
                    start = time.perf_counter()
                    checkpoint = store.bring_in(str(source))
                    seconds = time.perf_counter() - start
                    memory = grown()
                found[name].append({"seconds": seconds, "cpu_s": store.cpu_s() - cpu_s, "grown_bytes": memory})
                store.evict(checkpoint.checkpoint_id, "ssd")
            print(f"  round {number + 1} of {runs}", flush=True)
    rows = []
    for name, taken in found.items():
        seconds = median([run["seconds"] for run in taken])
        bandwidth = size / seconds
        # From the same disk: what fio writes while it reads as much from there.
        limits = ceiling.writes if name == "source in memory" else ceiling.copies
        written = median(limits) if limits else float("nan")
        memory = max(run["grown_bytes"] for run in taken)
        rows.append(
            [
                name, range_of([run["seconds"] for run in taken]), f"{bandwidth / GB:.2f}", f"{written / GB:.2f}",
                f"{bandwidth / written:.2f}", verdict(bandwidth >= 0.7 * written) if limits else "",
                f"{memory / MIB:.0f} MiB", verdict(memory <= 1024 * MIB),
                f"{median([run['cpu_s'] for run in taken]) / (size / GB):.2f}",
            ]
        )  # fmt: skip
    show(
        f"Import, {size / GB:.2f} GB",
        ["", "import", "GB/s", "fio GB/s", "of fio", "≥ 0.7", "peak memory", "≤ 1 GiB", "CPU s per GB"],
        rows,
    )
    write("load-import", {"bytes": size, "runs": found, "fio_writes": ceiling.writes, "fio_copies": ceiling.copies})
