"""What a client notices when its request moves, when its worker dies, and when its worker is drained.

    python -m benchmarks.migration [--quick] [--runs 8] [--contexts 100,250,500,1000,2000,4000] [--into DOCUMENT]
    python -m benchmarks.migration --recovery [--quick]
    python -m benchmarks.migration --drain [--quick]

One server, two workers with one thread each, a generated model whose decode step depends little on the context; streams
over HTTP, with the time of every token's event. Every mode prints tables, writes JSON below `benchmarks/results` and
prints the tables as markdown; `--into` writes that between the marks of docs/migration.md.

* default: a request is migrated by the operator's call, for each context length (prompt and generated tokens), while
  `--load` other streams decode at its source and at its destination. In turn with it, two naive ways: the source gives
  the request back to the queue and the destination prefills everything (the message that a gateway sends when it
  has lost frames), and nobody does anything until the request ends. Sending the KV cache instead is computed from its
  size.
* `--recovery`: the worker with most of the streams gets kill -9, and, in turn, SIGSTOP. Settings are the defaults.
* `--drain`: the worker that runs 16 long streams is drained by the operator's call.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.migrating import draining, moving, recovery
from benchmarks.migrating.gaps import transfer_s
from benchmarks.migrating.stage import Stage, stage
from benchmarks.migrating.tables import markdown, put
from benchmarks.models import generate
from benchmarks.plots import lines
from benchmarks.report import show, write

SHAPE: Final = "llama-30m-narrow"
QUICK_CONTEXTS: Final = (100, 500)
LOAD: Final = 2
Table = tuple[str, tuple[str, ...], list[list[str]]]
# What stands above the tables in the document: the heading, the command, and what the columns mean.
TEXTS: Final = {
    "migration": """\
## What a migration costs

```console
$ python -m benchmarks.migration          # tables, plot, and benchmarks/results/migration.json
```

One server with two workers of one thread each on the machine of [benchmarks.md](benchmarks.md); a generated Llama
of 30 M parameters in float32 with three wide layers, so that a decode step depends little on the context. {load}
other streams decode at the source and at the destination. Each migration is the operator's call for a stream with
a prompt of its own; {runs} per row. *Pause* is the largest gap between two events at the client from the call to
the first token at the destination, *hand-over* is the gap in which the owner changed, *own* are the gaps of the
same streams before and after. *Bound*: prefill of the last gap and three decode steps; *within* counts the
migrations whose pause was not longer than their own bound. *Total* is the source's time from the first round to
the end.""",
    "recovery": """\
## What a dead worker costs

```console
$ python -m benchmarks.migration --recovery
```

{streams} streams over two workers, default settings; the worker that runs most of them is hit, {runs} times in
each way. The pause is the largest gap of each of its streams at its client, the prefill at the other worker
included.""",
    "drain": """\
## What a drain costs

```console
$ python -m benchmarks.migration --drain
```

{streams} long streams at one worker, which is drained by the operator's call. Where the other worker does not have
the model, it is loaded there first. The pause is the largest gap of each stream during the drain, *hand-over* is
the gap in which the owner changed, *own* are the gaps outside it.""",
}


async def staged(
    home: Path, source: Path, slots: int, replicas: int, play: Callable[[Stage], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """Run one measurement on a fresh cluster."""
    async with stage(home, source, SHAPE, slots=slots, replicas=replicas) as found:
        return await play(found)


def move(home: Path, source: Path, options: argparse.Namespace) -> tuple[str, list[Table], dict[str, Any]]:
    """The default mode."""
    contexts = tuple(int(one) for one in options.contexts.split(",")) if options.contexts else moving.CONTEXTS
    if options.quick:
        contexts = QUICK_CONTEXTS
    runs = options.runs or (2 if options.quick else 8)

    def play(found: Stage) -> Awaitable[dict[str, Any]]:
        return moving.measure(found, contexts, runs, options.load, direct=options.direct, limit_s=options.limit_s)

    # One slot for the request that moves: its destination has room for it, its source, while it runs there, has none.
    found = asyncio.run(staged(home, source, options.load + 1, 2, play))
    found |= {"load_per_worker": options.load, "kv_bytes_per_token": moving.own_kv_bytes(SHAPE)}
    tables = [
        ("Migration by context length, medians", moving.COLUMNS, moving.rows(found)),
        ("The naive ways, medians", moving.NAIVE_COLUMNS, moving.naive_rows(found)),
        (
            "Sending the KV cache of Llama-2-7B instead, computed",
            moving.KV_COLUMNS,
            moving.kv_rows(found, moving.LLAMA_2_7B_KV_BYTES),
        ),
        ("Targets", ("target", "measured", "wanted", ""), moving.target_rows(found)),
    ]
    if not options.no_plot:
        plot(found["contexts"])
    return "migration", tables, found


def plot(contexts: dict[int, dict[str, Any]]) -> None:
    """The pauses over the context length."""
    curves = {
        "Hearth: pause, median": [(context, one["pause_s"] * 1000) for context, one in contexts.items()],
        "the stream's own P99 gap": [(context, one["own_p99_s"] * 1000) for context, one in contexts.items()],
        "stop and restart at the destination": [
            (context, one["restart_s"] * 1000) for context, one in contexts.items() if one["restart_s"] is not None
        ],
        "KV cache of Llama-2-7B at 10 Gb/s, computed": [
            (context, transfer_s(context, moving.LLAMA_2_7B_KV_BYTES, 1e10) * 1000) for context in contexts
        ],
    }
    lines(
        "migration",
        "What a client waits when its request moves",
        "tokens of context",
        "milliseconds",
        {name: points for name, points in curves.items() if points},
        logarithmic=True,
    )


def recover(home: Path, source: Path, options: argparse.Namespace) -> tuple[str, list[Table], dict[str, Any]]:
    """`--recovery`."""
    runs = options.runs or (1 if options.quick else 5)
    tokens = 120 if options.quick else 300

    def play(found: Stage) -> Awaitable[dict[str, Any]]:
        return recovery.measure(found, runs, options.streams or 8, tokens)

    found = asyncio.run(staged(home, source, options.streams or 8, 2, play))
    return "recovery", [("Recovery", recovery.COLUMNS, recovery.rows(found))], found


def drain(home: Path, source: Path, options: argparse.Namespace) -> tuple[str, list[Table], dict[str, Any]]:
    """`--drain`."""
    runs = options.runs or (1 if options.quick else 4)
    streams = options.streams or 16
    tokens = 300 if options.quick else 600

    def play(found: Stage) -> Awaitable[dict[str, Any]]:
        return draining.measure(found, runs, streams, tokens)

    found = asyncio.run(staged(home, source, streams, 1, play))
    return "drain", [("Drain of a worker", draining.COLUMNS, draining.rows(found))], found


def main() -> int:
    """Run one mode and report; 1 if a client saw an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--recovery", action="store_true", help="workers that die or hang")
    mode.add_argument("--drain", action="store_true", help="a worker that is emptied")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of less than a minute; its figures mean little"
    )
    parser.add_argument("--runs", type=int, default=0, help="repetitions (default 8; recovery 5, drain 4)")
    parser.add_argument("--contexts", default="", help="comma-separated context lengths in tokens")
    parser.add_argument("--limit-s", type=float, default=560.0, help="seconds after which no further run is begun")
    parser.add_argument("--load", type=int, default=LOAD, help="other streams on each worker (default mode)")
    parser.add_argument(
        "--direct", action="store_true", help="command the source itself, without gateway and scheduler"
    )
    parser.add_argument("--streams", type=int, default=0, help="streams of --recovery (8) and --drain (16)")
    parser.add_argument("--scratch", type=Path, help="keeps the generated model between runs")
    parser.add_argument("--home", type=Path, help="an empty directory that keeps the cluster's logs")
    parser.add_argument("--into", type=Path, help="a document whose marked part is replaced by the tables")
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args()
    play = recover if options.recovery else drain if options.drain else move
    with tempfile.TemporaryDirectory() as temporary:
        home = options.home or Path(temporary)
        source = generate((options.scratch or home) / SHAPE, SHAPE, "float32")
        name, tables, found = play(home, source, options)
    for title, columns, rows in tables:
        show(title, columns, rows)
    if not options.quick:
        write(name, found)
    above = TEXTS[name].format(load=options.load, runs=found["runs"], streams=found.get("streams", 0))
    text = "\n\n".join([above, *(f"{title}:\n\n{markdown(columns, rows)}" for title, columns, rows in tables)])
    print(f"\n{text}")
    if options.into:
        document = options.into.read_text(encoding="utf-8")
        options.into.write_text(put(document, f"figures of {name}", text), encoding="utf-8")
    broken = found.get("not_whole") or (recovery.broken(found) if options.recovery else [])
    for line in broken:
        print(f"a client saw: {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
