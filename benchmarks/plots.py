"""Pictures of what the benchmarks measured, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'hearth-serve[bench]')")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def bars(
    name: str,
    title: str,
    unit: str,
    runs: Mapping[str, Sequence[float]],
    *,
    line: float | None = None,
    line_name: str = "",
) -> Path | None:
    """One horizontal bar per name: the median, with every run as a dot; a line across all for a ceiling or target."""
    pyplot = _pyplot()
    kept = {label: sorted(values) for label, values in runs.items() if values}
    if pyplot is None or not kept:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(kept) + 1.6))
    for place, (label, values) in enumerate(reversed(kept.items())):
        middle = values[len(values) // 2] if len(values) % 2 else sum(values[len(values) // 2 - 1 :][:2]) / 2
        axes.barh(place, middle, color="#c8502d" if label.startswith("Hearth") else "#9aa5b1")
        axes.plot(values, [place] * len(values), "|", color="black", markersize=7)
    axes.set_yticks(range(len(kept)), list(reversed(kept)))
    if line is not None:
        axes.axvline(line, color="#2d6cc8", linestyle="--", label=line_name)
        axes.legend(loc="lower right")
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontsize=10)
    return _save(pyplot, figure, name)


def lines(
    name: str,
    title: str,
    across: str,
    up: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    logarithmic: bool = False,
) -> Path | None:
    """One curve per name."""
    pyplot = _pyplot()
    if pyplot is None:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for label, points in curves.items():
        style = {"linewidth": 2.5} if label.startswith("Hearth") else {"linewidth": 1.2}
        axes.plot(*zip(*points, strict=True), marker="o", label=label, **style)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend()
    return _save(pyplot, figure, name)


def _save(pyplot: Any, figure: Any, name: str) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.png"
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"drawn: {path}")
    return path
