"""SSD → usable parameters and DRAM → usable parameters, Hearth and its peers in turn."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.loading.bench import (
    HEARTH,
    LAZY,
    Options,
    Run,
    Stored,
    bring_in,
    gb_s,
    hearth_load,
    median,
    of_ceiling,
    peer_directory,
    peer_load,
    prepare_peers,
    rounds,
    there_cpu_s,
    there_s,
    verdict,
)
from benchmarks.loading.disk import GB, MIB, Ceiling, available_bytes, fill_page_cache
from benchmarks.loading.hearth import StoreUnderTest
from benchmarks.models import generate, generate_streamed
from benchmarks.plots import bars
from benchmarks.report import ms, range_of, show, write

SHAPE = "llama-1.1b"
POOL_BYTES = 2304 * MIB
LARGE_POOL_BYTES = 9216 * MIB
# What the larger model takes besides its pool: a worker, the store, the servers.
LARGE_REST_BYTES = 3072 * MIB


def _peer_rows(options: Options, plain: Stored, small: Stored) -> tuple[dict[str, Any], dict[str, str]]:
    """Directories of the peers and who of them is missing."""
    places = {"plain": peer_directory(options, plain, SHAPE), "small": peer_directory(options, small, "llama-3m")}
    return places, prepare_peers(options, list(places.values()))


def cold(options: Options) -> None:
    """Part `ssd`: nothing in the page cache."""
    source = generate(options.models / SHAPE, SHAPE)
    tiny = generate(options.models / "llama-3m", "llama-3m")
    with StoreUnderTest(options.scratch / "ssd", dram_bytes=POOL_BYTES) as store:
        small, plain = bring_in(store, tiny), bring_in(store, source)
        ceiling = Ceiling(plain.file, enabled=options.fio)
        ceiling.choose()
        places, missing = _peer_rows(options, plain, small)
        found: dict[str, list[Run]] = {HEARTH: [], **{name: [] for name in options.peers if name not in missing}}

        def one(name: str) -> None:
            if name == HEARTH:
                found[HEARTH].append(hearth_load(options, plain, cold=True))
            elif name not in missing:
                run = peer_load(options, name, places["plain"], places["small"], cold=True)
                if "missing" in run:
                    missing[name] = run["missing"]
                else:
                    found[name].append(run)

        rounds(options.runs, list(found), one, ceiling.read_once)
    size = plain.weight_bytes
    rows = _rows(found, missing, size, ceiling)
    show(
        f"SSD → usable parameters, cold page cache (dropped: {options.drop}), {size / GB:.2f} GB, n = {options.runs}; "
        f"fio {'–' if not ceiling.reads else range_of([one / GB for one in ceiling.reads], 'GB/s', 2)}",
        ["loader", "usable", "every page read", "GB/s", "of fio", "CPU s per GB", "memory per model"],
        rows,
    )
    targets = _cold_targets(found, size, ceiling)
    show("SSD → usable parameters: targets", ["target", "measured", ""], targets)
    figures = {
        "weight_bytes": size,
        "drop": options.drop,
        "fio": {"scan": ceiling.scan, "way": ceiling.way, "reads": ceiling.reads},
        "runs": found,
        "not_installed": missing,
        "targets": targets,
    }
    write("load-ssd", figures)
    if options.plot:
        fastest = size / median(ceiling.reads) if ceiling.reads else None
        bars(
            "load-ssd",
            f"SSD → usable parameters, {size / GB:.1f} GB, cold page cache",
            "seconds until every byte was read (median; every run as a tick)",
            {name: [there_s(name, run) for run in runs] for name, runs in found.items()},
            line=fastest,
            line_name="fio, direct sequential read",
        )


def _rows(
    found: Mapping[str, Sequence[Run]], missing: Mapping[str, str], size: int, ceiling: Ceiling
) -> list[list[str]]:
    rows = []
    ranked = sorted((name for name in found if found[name]), key=lambda name: _middle(name, found[name]))
    for name in ranked:
        runs = found[name]
        seconds = _middle(name, runs)
        cached = median([run["cached_bytes"] for run in runs]) / size
        beside = f" + {cached:.2f} cache" if cached > 0.05 and name not in LAZY else ""
        rows.append(
            [
                name,
                range_of([run["usable_s"] for run in runs]) + (" *" if name in LAZY else ""),
                range_of([run["touched_s"] for run in runs]),
                f"{size / seconds / GB:.2f}",
                of_ceiling(size / seconds, ceiling),
                f"{median([there_cpu_s(name, run) for run in runs]) / (size / GB):.3f}",
                f"{median([run['peak_bytes'] for run in runs]) / size:.2f}{beside}",
            ]
        )
    rows += [[name, "not installed", "", "", "", "", ""] for name in missing]
    if any(name in LAZY for name in ranked):
        rows.append(["* reads when a page is first used: bandwidth is that of reading every page", *[""] * 6])
    return rows


def _middle(name: str, runs: Sequence[Run]) -> float:
    return median([there_s(name, run) for run in runs])


def _cold_targets(found: Mapping[str, Sequence[Run]], size: int, ceiling: Ceiling) -> list[list[str]]:
    own = found[HEARTH]
    seconds = _middle(HEARTH, own)
    rows: list[list[str]] = []
    if ceiling.reads:
        ratio = size / seconds / median(ceiling.reads)
        rows.append(["≥ 0.95 of fio's direct sequential read", f"{ratio:.3f}", verdict(ratio >= 0.95)])
    others = {name: runs for name, runs in found.items() if name != HEARTH and runs}
    if others:
        best = min(others, key=lambda name: _middle(name, others[name]))
        behind = _middle(best, others[best])
        touched = median([run["touched_s"] for run in own])
        other = min(median([run["touched_s"] for run in runs]) for runs in others.values())
        rows.append([f"ahead of every peer (best: {best})", f"{behind / seconds:.2f}×", verdict(seconds < behind)])
        rows.append(["ahead of every peer, every page read", f"{other / touched:.2f}×", verdict(touched < other)])
        cpu = median([there_cpu_s(HEARTH, run) for run in own])
        lightest = min(others, key=lambda name: median([there_cpu_s(name, run) for run in others[name]]))
        least = median([there_cpu_s(lightest, run) for run in others[lightest]])
        rows.append(
            [f"CPU seconds ≤ half of the best peer's ({lightest})", f"{cpu / least:.2f}", verdict(cpu <= least / 2)]
        )
    if others.get("from_pretrained"):
        ratio = _middle("from_pretrained", others["from_pretrained"]) / seconds
        rows.append(["from_pretrained ≥ 2.5× slower", f"{ratio:.2f}×", verdict(ratio >= 2.5)])
    memory = median([run["peak_bytes"] for run in own]) / size
    rows.append(["resident memory ≤ 1.1 × the model", f"{memory:.3f}", verdict(memory <= 1.1)])
    return rows


# -- DRAM --------------------------------------------------------------------------------------------------------------


def dram(options: Options) -> None:
    """Part `dram`: the checkpoint lies in the pool, the peers' files in the page cache."""
    source = generate(options.models / SHAPE, SHAPE)
    tiny = generate(options.models / "llama-3m", "llama-3m")
    figures: dict[str, Any] = {}
    rows: list[list[str]] = []
    targets: list[list[str]] = []
    with StoreUnderTest(options.scratch / "dram", dram_bytes=POOL_BYTES) as store:
        small, plain = bring_in(store, tiny), bring_in(store, source)
        places, missing = _peer_rows(options, plain, small)
        found: dict[str, list[Run]] = {HEARTH: [], **{name: [] for name in options.peers if name not in missing}}
        with store.worker(options.device) as worker:
            _load(worker, plain)
            worker.ask({"do": "release"})

        def one(name: str) -> None:
            if name == HEARTH:
                found[HEARTH].append(hearth_load(options, plain, cold=False))
            elif name not in missing:
                for path in places["plain"].iterdir():
                    if path.suffix[1:] == {"tensorizer": "tensors"}.get(
                        name, "pt" if "torch" in name else "safetensors"
                    ):
                        fill_page_cache(path)
                run = peer_load(options, name, places["plain"], places["small"], cold=False)
                if "missing" in run:
                    missing[name] = run["missing"]
                else:
                    found[name].append(run)

        rounds(max(3, options.runs // 2), list(found), one, lambda: None)
        size = plain.weight_bytes
        for name in sorted(
            (name for name in found if found[name]), key=lambda name: median([r["touched_s"] for r in found[name]])
        ):
            runs = found[name]
            rows.append(
                [
                    name, range_of([1000 * run["usable_s"] for run in runs], "ms", 1),
                    range_of([1000 * run["touched_s"] for run in runs], "ms", 1),
                    f"{median([run['peak_bytes'] for run in runs]) / size:.2f}",
                ]
            )  # fmt: skip
        rows += [[name, "not installed", "", ""] for name in missing]
        figures |= {"weight_bytes": size, "runs": found, "not_installed": missing}
        attach_s = median([run["model_s"] for run in found[HEARTH]])
        targets.append(["usable ≤ 60 ms", ms(attach_s), verdict(attach_s <= 0.060)])
        figures["second_replica"] = second = _second_replica(options, plain)
        grown = second["grown_bytes"] / size
        text = f"{second['grown_bytes'] / MIB:.1f} MiB = {grown:.4f} of the model"
        targets.append(["a second replica adds no resident memory (PSS)", text, verdict(grown < 0.01)])
        figures["restarts"] = restarts = _restarts(options, plain)
        for what, run in restarts.items():
            met = run["tier"] == "dram"
            targets.append(
                [f"the copy survives {what}", f"from {run['tier']}, usable after {ms(run['model_s'])}", verdict(met)]
            )
    figures["large"], large = _large(options, attach_s)
    targets += large
    show(
        f"DRAM → usable parameters, {size / GB:.2f} GB",
        ["loader", "usable", "every page read", "memory per model"],
        rows,
    )
    show("DRAM → usable parameters: targets", ["target", "measured", ""], targets)
    write("load-dram", figures | {"targets": targets})
    if options.plot:
        bars(
            "load-dram",
            f"DRAM → usable parameters, {size / GB:.1f} GB",
            "milliseconds until every page was read (median; every run as a tick)",
            {name: [1000 * run["touched_s"] for run in runs] for name, runs in found.items()},
        )


def _load(worker: Any, stored: Stored) -> Run:
    run: Run = worker.ask({"do": "load", "checkpoint_id": stored.checkpoint_id, "source": stored.source})
    return run


def _second_replica(options: Options, stored: Stored) -> dict[str, float]:
    """How much the PSS of store and workers together grows when a second worker attaches the same checkpoint."""
    with stored.store.worker(options.device) as one, stored.store.worker(options.device) as two:
        processes = [one, two]
        _load(one, stored)
        one.ask({"do": "touch"})

        def together() -> int:
            return stored.store.pss_bytes() + sum(int(one.ask({"do": "memory"})["pss_bytes"]) for one in processes)

        before = together()
        run = _load(two, stored)
        two.ask({"do": "touch"})
        after = together()
        for process in processes:
            process.ask({"do": "release"})
    return {"grown_bytes": after - before, "model_s": run["model_s"], "before_bytes": before, "after_bytes": after}


def _restarts(options: Options, stored: Stored) -> dict[str, Run]:
    """Loads after the death of a worker that held the copy, and after an orderly end and a death of the store."""
    store, found = stored.store, {}
    worker = store.worker(options.device)
    _load(worker, stored)
    worker.close(signal.SIGKILL)
    with store.worker(options.device) as fresh:
        found["a killed worker"] = _load(fresh, stored)
        fresh.ask({"do": "release"})
    for what, number in (("a stopped store", signal.SIGTERM), ("a killed store", signal.SIGKILL)):
        with store.worker(options.device) as fresh:
            store.stop(number)
            start_s = store.start()
            found[what] = _load(fresh, stored) | {"store_start_s": start_s}
            fresh.ask({"do": "release"})
        time.sleep(0.2)
    return found


def _large(options: Options, plain_s: float) -> tuple[dict[str, Any], list[list[str]]]:
    """The same for a model four times as large with as many layers."""
    wanted = "≤ 1.2 × that for a model four times as large"
    needed = LARGE_POOL_BYTES + LARGE_REST_BYTES
    if available_bytes() < needed:
        reason = f"skipped: {needed / GB:.1f} GB of memory are needed, {available_bytes() / GB:.1f} GB are there"
        return {"skipped": reason}, [[wanted, reason, ""]]
    source = generate_streamed(options.models / "llama-4.4b", "llama-4.4b")
    runs: list[Run] = []
    with StoreUnderTest(options.scratch / "large", dram_bytes=LARGE_POOL_BYTES) as store:
        stored = bring_in(store, source)
        with store.worker(options.device) as worker:
            first = _load(worker, stored)
            worker.ask({"do": "release"})
        for _ in range(max(3, options.runs // 2)):
            runs.append(hearth_load(options, stored, cold=False))
    seconds = median([run["model_s"] for run in runs])
    figures = {"weight_bytes": stored.weight_bytes, "runs": runs, "first": first, "ratio": seconds / plain_s}
    text = f"{seconds / plain_s:.2f} ({ms(seconds)}; from SSD before: {gb_s(stored.weight_bytes, first['model_s'])})"
    return figures, [[wanted, text, verdict(seconds <= 1.2 * plain_s)]]
