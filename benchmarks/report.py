"""What every benchmark prints and writes: figures with the machine they were measured on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import psutil
from rich.console import Console
from rich.table import Table

RESULTS: Final = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Facts about where this runs."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "nats-py", "aiohttp")},
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, -(-int(len(ranked) * percent) // 100) - 1))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, P99, least and most."""
    return {
        "median": statistics.median(values),
        "p99": percentile(values, 99),
        "least": min(values),
        "most": max(values),
        "runs": len(values),
    }


def publish(
    name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], figures: dict[str, Any]
) -> None:
    """Print the table and write `results/NAME.json` with all figures and the machine."""
    show(title, columns, rows)
    write(name, figures)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write `results/NAME.json` with all figures and the machine; its path."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), "figures": figures}, indent=1) + "\n")
    print(f"written: {path}")
    return path


def range_of(values: Sequence[float], unit: str = "s", digits: int = 3) -> str:
    """Median and, in brackets, least and most."""
    return (
        f"{statistics.median(values):.{digits}f} {unit} ({min(values):.{digits}f}–{max(values):.{digits}f})"
        if values
        else "–"
    )


def ms(seconds: float) -> str:
    """Seconds as text in milliseconds."""
    return f"{seconds * 1000:.1f} ms"
