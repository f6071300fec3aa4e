"""What all parts of `benchmarks/load.py` share: options, scratch directories, rounds, and the rows of their tables."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.loading import peers
from benchmarks.loading.disk import GB, Ceiling, Drop, cached_bytes, drop_page_cache
from benchmarks.loading.hearth import Child, StoreUnderTest, highest

SCRIPT: Final = Path(peers.__file__)
# These map the file and read a page when it is first used: what they return has not been read yet.
LAZY: Final = frozenset({"safetensors", "torch.load(mmap)", "from_pretrained"})
HEARTH: Final = "Hearth"
Run = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    scratch: Path
    runs: int
    drop: Drop
    fio: bool
    peer_python: str
    peers: tuple[str, ...]
    device: str
    plot: bool
    quick: bool

    @property
    def models(self) -> Path:
        """Where generated models are kept."""
        return self.scratch / "models"

    def on(self, device: str) -> Options:
        """The same with workers on another device."""
        return replace(self, device=device)


@dataclass
class Stored:
    """A model in the store under test: its checkpoint's id and directory, and what it was imported from."""

    store: StoreUnderTest
    source: str
    checkpoint_id: str
    directory: Path
    weight_bytes: int

    @property
    def file(self) -> Path:
        """Its one weight file."""
        return self.directory / "model.safetensors"


def bring_in(store: StoreUnderTest, source: Path) -> Stored:
    """Import a generated model."""
    checkpoint = store.bring_in(str(source))
    directory = store.directory_of(checkpoint.checkpoint_id)
    return Stored(store, str(source), checkpoint.checkpoint_id, directory, checkpoint.weight_bytes)


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The same names, another one first: nobody always follows the same neighbour."""
    by %= max(1, len(names))
    return [*names[by:], *names[:by]]


# -- one load each -----------------------------------------------------------------------------------------------------


def hearth_load(options: Options, stored: Stored, *, cold: bool, **order: Any) -> Run:
    """A fresh warm worker acquires and attaches; from the SSD if `cold`, else from DRAM. `order` goes to the worker."""
    store = stored.store
    if cold:
        store.evict(stored.checkpoint_id, "dram")
        drop_page_cache(options.drop, [stored.directory])
    with store.worker(options.device) as worker:
        if cold:
            make_sure_cold(stored.file)
        before = store.pss_bytes() + worker.ask({"do": "memory"})["pss_bytes"]
        store_cpu_s = store.cpu_s()
        with highest([store.pid, worker.pid]) as grown:
            asked = {"do": "load", "checkpoint_id": stored.checkpoint_id, "source": stored.source}
            run = worker.ask(asked | order)
            run["store_cpu_s"] = store.cpu_s() - store_cpu_s
            touch = worker.ask({"do": "touch"})
            run["grown_bytes"] = grown()
        run["retouch_s"] = worker.ask({"do": "touch"})["touch_s"]
        after = store.pss_bytes() + worker.ask({"do": "memory"})["pss_bytes"]
        if run["tier"] != ("ssd" if cold else "dram"):
            raise RuntimeError(f"the load came from {run['tier']}")
        run |= {
            "usable_s": run["model_s"], "touched_s": run["model_s"] + touch["touch_s"],
            "usable_cpu_s": run["cpu_s"] + run["store_cpu_s"], "pss_bytes": after - before + run["extent_bytes"],
            "peak_bytes": run["grown_bytes"] + run["extent_bytes"], "cached_bytes": cached_bytes(stored.file),
        }  # fmt: skip
        worker.ask({"do": "release"})
    return run


def peer_directory(options: Options, stored: Stored, name: str) -> Path:
    """A directory in which every loader finds the stored checkpoint's file, or its own form of it."""
    directory = options.scratch / "peers" / name
    directory.mkdir(parents=True, exist_ok=True)
    for path in stored.directory.iterdir():
        link = directory / path.name
        if path.is_file() and path.name != "hearth.json":
            link.unlink(missing_ok=True)
            link.symlink_to(path)
    return directory


def prepare_peers(options: Options, directories: Sequence[Path]) -> dict[str, str]:
    """Write what loaders with a format of their own need; the loaders that cannot run here, with the reason."""
    missing: dict[str, str] = {}
    for name in options.peers:
        kind = peers.MAKES.get(name)
        for directory in directories:
            if kind is None or (directory / f"model.{kind}").exists() or name in missing:
                continue
            done = subprocess.run(
                [options.peer_python, str(SCRIPT), "--make", kind, str(directory)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                missing[name] = (done.stderr.strip().splitlines() or ["?"])[-1]
    return missing


def peer_load(options: Options, name: str, directory: Path, small: Path, *, cold: bool) -> Run:
    """A fresh process that has imported everything loads once. `{"missing": reason}` if it cannot."""
    kind = peers.MAKES.get(name)
    file = (directory / (f"model.{kind}" if kind else "model.safetensors")).resolve()
    if cold:
        drop_page_cache(options.drop, [file])
    child = Child([options.peer_python, str(SCRIPT), name, str(directory), str(small)], options.scratch / "peers.log")
    try:
        if "missing" in child.first:
            return child.first
        if cold:
            make_sure_cold(file)
        run = child.ask("go") | {"version": child.first["version"]}
    finally:
        child.close()
    run["cached_bytes"] = cached_bytes(file)
    return run


def make_sure_cold(file: Path) -> None:
    """Whatever ran since the cache was dropped must not have read the file."""
    if cached_bytes(file) > 2**20:
        drop_page_cache("files", [file])
    left = cached_bytes(file)
    if left > 2**20:
        raise RuntimeError(f"{left} bytes of {file} stay in the page cache: who has it mapped?")


# -- what the runs come to ---------------------------------------------------------------------------------------------


def there_s(name: str, run: Run) -> float:
    """Seconds until every byte had been read: lazy loaders read when pages are touched."""
    return float(run["touched_s"] if name in LAZY else run["usable_s"])


def there_cpu_s(name: str, run: Run) -> float:
    """Processor seconds until every byte had been read, without what touching itself costs."""
    if name in LAZY:
        return float(max(run["usable_cpu_s"], run["touched_cpu_s"] - run.get("retouch_cpu_s", 0.0)))
    return float(run["usable_cpu_s"])


def median(values: Sequence[float]) -> float:
    """The median; not-a-number of nothing."""
    return statistics.median(values) if values else float("nan")


def gb_s(size_bytes: float, seconds: float) -> str:
    """A bandwidth as text."""
    return f"{size_bytes / seconds / GB:.2f} GB/s"


def of_ceiling(bandwidth: float, ceiling: Ceiling, *, writes: bool = False) -> str:
    """A bandwidth as a part of fio's median, as text."""
    known = ceiling.writes if writes else ceiling.reads
    return f"{bandwidth / median(known):.2f}" if known else "–"


def verdict(met: bool) -> str:
    """As people read it."""
    return "met" if met else "missed"


def rounds(runs: int, names: Sequence[str], one: Callable[[str], None], ceiling: Callable[[], object]) -> None:
    """Everybody once per round, in a rotating order; fio (`ceiling`) takes its turn like anybody else."""
    for number in range(runs):
        for name in rotated([*names, ""], number):
            if name:
                one(name)
            else:
                ceiling()
        print(f"  round {number + 1} of {runs}", flush=True)
