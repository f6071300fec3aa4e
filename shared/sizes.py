"""Sizes, rates and times for people. Pure."""

from __future__ import annotations

from typing import Final

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes in powers of 1024 with three digits: "512 B", "1.5 MiB", "12 GiB"."""
    unit = 0
    while abs(count) >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    number = f"{count:.0f}" if unit == 0 or abs(count) >= 99.5 else f"{count:.3g}"
    return f"{number} {_UNITS[unit]}"


def rate(bytes_per_s: float) -> str:
    """Bytes per second: "1.95 GiB/s"."""
    return f"{size(bytes_per_s)}/s"


def duration(seconds: float) -> str:
    """Seconds in at most two units: "60 ms", "3.1 s", "42 s", "2 min 5 s", "3 h 10 min", "4 d 2 h"."""
    if seconds < 0.9995:
        return f"{max(0.0, seconds) * 1000:.0f} ms" if seconds > 0 else "0 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for above, below, first, second in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= above:
            rest = whole % above // below
            return f"{whole // above} {first}" + (f" {rest} {second}" if rest else "")
    return f"{whole} s"
