"""Whether startups take what was estimated, and what moving a stream out of the way brings.

    python -m benchmarks.placement [--quick | --full] [--json] [--into docs/placement.md]
    python -m benchmarks.placement --only estimates | moving

Two servers with two workers each, engine on the CPU, generated models of 53 MB to 1.2 GB, everything over HTTP.

* estimates: loads in random order from DRAM, SSD, the other server and the source, alone, several at once on a server,
  and beside running streams. The estimate of every decision is compared with what `/v1/admin/explain` says that the
  load took.
* moving: a model that only server A has in its DRAM is asked for while long streams run on both of A's workers; time to
  its first token with migration and without it (`HEARTH_MIGRATE_FOR_PLACEMENT`), in turn, and the gaps of the stream
  that moved.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.migrating.tables import markdown, put
from benchmarks.models import generate, generate_streamed
from benchmarks.placing import estimates, paying
from benchmarks.placing.stage import servers, stage
from benchmarks.report import machine, show, write
from tests.builders.cluster import MIB

SHAPES: Final = ("llama-26m", "llama-100m", "llama-250m", "llama-600m")
QUICK_SHAPES: Final = SHAPES[:2]
SIZE_BYTES: Final = {"llama-26m": 53e6, "llama-100m": 205e6, "llama-250m": 491e6, "llama-600m": 1216e6}
POOL_EXTRA_BYTES: Final = 320 * MIB
LEARNING: Final = 16
Table = tuple[str, tuple[str, ...], list[list[str]]]
TEXTS: Final = {
    "estimates": """\
**Measured** (`python -m benchmarks.placement --only estimates`): {loads} loads of models of {sizes} on two servers
with two workers each, everything on one machine with {cores} cores and one disk, in random order; load average
{load_average:.0f} at the end. Errors are
|estimate − startup| / startup. *Of its likes*: how far loads that did not wait were from the median of all others of
the same model from the same tier, which is what even somebody would be off who knew everything but what else the
machine does.""",
    "moving": """\
**Moving pays** (`python -m benchmarks.placement --only moving`): the wanted model of {size} is in the DRAM of server A
only, a long stream runs on each of A's two workers, B's two are free, and B has the model of the streams in its DRAM.
One cluster with migration and one without, in turn, {runs} times each. *Gap* is the largest gap of the stream that
moved from the newcomer's request on; *own P99* are its gaps before.""",
}


def make(models: Path, shapes: tuple[str, ...]) -> None:
    """Generate the models (once)."""
    for shape in shapes:
        generate_streamed(models / shape, shape)
    generate(models / estimates.BUSY_SHAPE, estimates.BUSY_SHAPE, "float32")


async def measure_estimates(
    home: Path, models: Path, options: argparse.Namespace
) -> tuple[list[Table], dict[str, Any]]:
    """The estimator against real loads."""
    shapes = QUICK_SHAPES if options.quick else SHAPES
    rounds = options.rounds or (8 if options.quick else 120 if options.full else 60)
    pool_bytes = int(sum(SIZE_BYTES[shape] for shape in shapes)) + POOL_EXTRA_BYTES
    env = {"HEARTH_PEER_TOKEN": "benchmark", "HEARTH_WORKER_MEMORY_BYTES": str(4 << 30)}
    with servers(home) as urls:
        async with stage(home / "cluster", urls, dram_bytes=pool_bytes, env=env) as found:
            figures = await estimates.measure(found, shapes, models, rounds, options.seed, options.limit_s)
    loads = figures["loads"]
    learning = min(LEARNING, len(loads) // 3)
    figures["learning"] = learning
    tables: list[Table] = [
        ("Startup estimates", estimates.COLUMNS, estimates.rows(loads, learning)),
        (
            "Estimate − actual by part, medians in % of the startup",
            estimates.PART_COLUMNS,
            estimates.part_rows(loads, learning),
        ),
    ]
    return tables, figures


async def measure_moving(home: Path, models: Path, options: argparse.Namespace) -> tuple[list[Table], dict[str, Any]]:
    """Migration against none."""
    shape = "llama-100m" if options.quick else "llama-600m"
    runs = options.runs or (1 if options.quick else 8 if options.full else 5)
    pool_bytes = int(SIZE_BYTES[shape]) + POOL_EXTRA_BYTES
    with servers(home) as urls:
        figures = await paying.measure(home, urls, models, shape, runs, pool_bytes)
    return [("Migration against none", paying.COLUMNS, paying.rows(figures))], figures | {"runs": runs}


def text_of(name: str, tables: list[Table], figures: dict[str, Any]) -> str:
    """What stands in the document."""
    found = machine()
    if name == "estimates":
        sizes = ", ".join(f"{SIZE_BYTES[one['shape']] / 1e6:.0f} MB" for one in _one_of_each(figures["loads"]))
        above = TEXTS[name].format(
            loads=len(figures["loads"]), sizes=sizes, cores=found["cores"], load_average=found["load_average"][0]
        )
    else:
        above = TEXTS[name].format(size=f"{SIZE_BYTES[figures['shape']] / 1e9:.1f} GB", runs=figures["runs"])
    return "\n\n".join([above, *(markdown(columns, rows) for _, columns, rows in tables)])


def _one_of_each(loads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = {one["shape"]: one for one in loads}
    return sorted(kept.values(), key=lambda one: SIZE_BYTES[one["shape"]])


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a smoke run of a minute or two; its figures mean little")
    size.add_argument("--full", action="store_true", help="twice as many loads and runs")
    parser.add_argument("--only", choices=("estimates", "moving"), help="one of the two parts")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of loads (default 60)")
    parser.add_argument("--runs", type=int, default=0, help="repetitions with and without migration (default 5)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=1200.0, help="seconds after which no further round is begun")
    parser.add_argument("--scratch", type=Path, help="keeps the generated models between runs")
    parser.add_argument("--home", type=Path, help="an empty directory that keeps the clusters' logs")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, too")
    parser.add_argument("--into", type=Path, help="a document whose marked parts are replaced by the tables")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = options.home or Path(temporary)
        models = options.scratch or home / "models"
        make(models, QUICK_SHAPES if options.quick else SHAPES)
        for name, part in (("estimates", measure_estimates), ("moving", measure_moving)):
            if options.only in (None, name):
                tables, figures = asyncio.run(part(home / name, models, options))
                report(name, tables, figures, options)
    return 0


def report(name: str, tables: list[Table], figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Print, and write where it was asked for."""
    for title, columns, rows in tables:
        show(title, columns, rows)
    if options.json:
        print(json.dumps(figures, indent=1))
    if not options.quick:
        write(f"placement-{name}", figures)
    if options.into:
        document = options.into.read_text(encoding="utf-8")
        marked = put(document, f"figures of placement: {name}", text_of(name, tables, figures))
        options.into.write_text(marked, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
