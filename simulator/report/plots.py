"""Pictures of runs, where matplotlib is installed: startup times, utilisation over time, where the time went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]
MISSING: Final = "matplotlib is not installed (pip install 'hearth-serve[bench]')"
_LEAST_S: Final = 0.001


def startup_cdf(path: Path, title: str, startups: Mapping[str, Curve]) -> Path | None:
    """The part of the requests that had started after so many seconds; one curve per policy."""

    def draw(axes: Any) -> None:
        for label, values in startups.items():
            ranked = np.sort(np.maximum(values, _LEAST_S))
            axes.step(ranked, np.arange(1, len(ranked) + 1) / len(ranked), where="post", label=label, **_style(label))
        axes.set_xscale("log")
        axes.set_xlabel("startup, seconds")
        axes.set_ylabel("part of the requests")
        axes.legend(loc="lower right", fontsize=8)

    return _picture(path, title, draw)


def utilisation(path: Path, title: str, shares: Mapping[str, tuple[Curve, Curve]]) -> Path | None:
    """The share of devices that run requests, over time; one curve per policy."""

    def draw(axes: Any) -> None:
        for label, (at_s, share) in shares.items():
            axes.plot(at_s / 60.0, share, label=label, **_style(label))
        axes.set_xlabel("minutes")
        axes.set_ylabel("devices that run requests")
        axes.set_ylim(0, 1)
        axes.legend(loc="upper right", fontsize=8)

    return _picture(path, title, draw)


def time_parts(path: Path, title: str, parts: Mapping[str, Mapping[str, float]]) -> Path | None:
    """Mean seconds of each part of a startup, stacked; one bar per policy."""

    def draw(axes: Any) -> None:
        labels = list(parts)[::-1]
        left = np.zeros(len(labels))
        for part in next(iter(parts.values()), {}):
            widths = np.array([parts[label][part] for label in labels])
            axes.barh(labels, widths, left=left, label=part)
            left += widths
        axes.set_xlabel("mean seconds per request")
        axes.legend(fontsize=8)

    return _picture(path, title, draw)


def lines(
    path: Path,
    title: str,
    across: str,
    up: str,
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    logarithmic: bool = True,
) -> Path | None:
    """One curve per name through (x, mean, half of the interval)."""

    def draw(axes: Any) -> None:
        for label, points in curves.items():
            xs, means, halves = (np.array(column) for column in zip(*points, strict=True))
            axes.errorbar(xs, means, yerr=np.nan_to_num(halves), label=label, marker="o", capsize=2, **_style(label))
        if logarithmic:
            axes.set_yscale("log")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.legend(fontsize=8)

    return _picture(path, title, draw)


def _style(label: str) -> dict[str, Any]:
    return {"linewidth": 2.5} if label == "hearth" else {"linewidth": 1.2}


def _picture(path: Path, title: str, draw: Callable[[Any], None]) -> Path | None:
    pyplot = _pyplot()
    if pyplot is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    draw(axes)
    axes.set_title(title, loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
