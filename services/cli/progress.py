"""How far long work is: bars with bytes per second and what is left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import Any, Final

from shared.contracts.residency import Progress
from shared.sizes import duration, rate, size

WINDOW_S: Final = 8.0
# Shorter than this, two looks say nothing about a speed.
LEAST_SPAN_S: Final = 0.2
# Without a terminal: a line for every tenth, but at least one in so many seconds.
LINE_PARTS: Final = 10
LINE_S: Final = 10.0


def amount(progress: Progress) -> str:
    """`12 MiB of 40 MiB, 3.2 s left`; what is not known is left out."""
    if not progress.total_bytes:
        return ""
    text = f"{size(progress.done_bytes)} of {size(progress.total_bytes)}"
    return text if progress.eta_s is None else f"{text}, {duration(progress.eta_s)} left"


def percent(done: int, total: int) -> str:
    """`43 %`: 100 only when everything is there."""
    return f"{min(100, 100 * done // total)} %" if total > 0 else ""


class Meter:
    """Bytes per second from the looks of the last seconds. Time is an argument."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()
        self._work = ("", 0)

    def speed(self, progress: Progress, at_s: float) -> float | None:
        """After this look; None while nothing is known. Another phase or another total begins anew."""
        work = (progress.phase, progress.total_bytes)
        if work != self._work or (self._looks and progress.done_bytes < self._looks[-1][1]):
            self._work = work
            self._looks.clear()
        self._looks.append((at_s, progress.done_bytes))
        while at_s - self._looks[0][0] > WINDOW_S:
            self._looks.popleft()
        first_s, first_bytes = self._looks[0]
        moved_bytes, span_s = progress.done_bytes - first_bytes, at_s - first_s
        return moved_bytes / span_s if span_s >= LEAST_SPAN_S and moved_bytes > 0 else None


def detailed(progress: Progress, speed: float | None) -> str:
    """`12 MiB of 40 MiB (30 %), 1.2 GiB/s, 3.2 s left`; what is not known is left out."""
    if not progress.total_bytes:
        return ""
    done = percent(progress.done_bytes, progress.total_bytes)
    parts = [f"{size(progress.done_bytes)} of {size(progress.total_bytes)} ({done})"]
    left_s = progress.eta_s
    if speed is not None:
        parts.append(rate(speed))
        left_s = (progress.total_bytes - progress.done_bytes) / speed if left_s is None else left_s
    if left_s is not None:
        parts.append(f"{duration(left_s)} left")
    return ", ".join(parts)


class Bars:
    """One bar or row of lines per name, on standard error. Use as a context manager."""

    def __init__(self, *names: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        console = Console(stderr=True)
        self._terminal = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[amount]}"))
        self._rich = RichProgress(*columns, console=console, transient=True, disable=not self._terminal)
        self._tasks: dict[str, Any] = {}
        self._meters = {name: Meter() for name in names}
        self._said: dict[str, tuple[str, int, float]] = {}
        for name in names:
            self._tasks[name] = self._rich.add_task(f"{name}: asking", total=None, amount="")

    def __enter__(self) -> Bars:
        self._rich.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.__exit__(kind, error, trace)

    def show(self, name: str, progress: Progress) -> None:
        """This is how far it is now."""
        now_s = time.monotonic()
        text = detailed(progress, self._meters[name].speed(progress, now_s))
        if self._terminal:
            total = progress.total_bytes or None
            self._rich.update(
                self._tasks[name],
                description=f"{name}: {progress.phase}",
                total=total,
                completed=progress.done_bytes,
                amount=text,
            )
            return
        part = LINE_PARTS * progress.done_bytes // progress.total_bytes if progress.total_bytes else 0
        phase, said_part, said_s = self._said.get(name, ("", 0, 0.0))
        if phase != progress.phase or part > said_part or now_s - said_s > LINE_S:
            self._said[name] = (progress.phase, part, now_s)
            print(f"{name}: {progress.phase} {text}".rstrip(), file=sys.stderr, flush=True)

    def end(self, name: str) -> None:
        """Nothing more will come for this one."""
        self._rich.remove_task(self._tasks[name])
