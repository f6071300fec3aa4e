"""How far long work is, in words."""

from __future__ import annotations

import msgspec
import pytest

from services.cli.progress import Bars, Meter, amount, detailed, percent
from shared.contracts.residency import Progress

READING = Progress(phase="reading", done_bytes=2**20, total_bytes=2**22)


def test_what_is_not_known_is_left_out() -> None:
    assert amount(Progress(phase="queued")) == detailed(Progress(phase="queued"), 5.0) == ""
    assert amount(READING) == "1 MiB of 4 MiB"
    assert amount(msgspec.structs.replace(READING, eta_s=3.2)) == "1 MiB of 4 MiB, 3.2 s left"
    assert detailed(READING, None) == "1 MiB of 4 MiB (25 %)"


def test_what_is_left_is_the_stores_word_or_follows_from_the_speed() -> None:
    assert detailed(READING, 2.0**19) == "1 MiB of 4 MiB (25 %), 512 KiB/s, 6.0 s left"
    assert detailed(msgspec.structs.replace(READING, eta_s=1.5), 2.0**19).endswith("512 KiB/s, 1.5 s left")


@pytest.mark.parametrize(
    ("done", "total", "text"), [(0, 10, "0 %"), (999, 1000, "99 %"), (10, 10, "100 %"), (11, 10, "100 %"), (3, 0, "")]
)
def test_only_everything_is_100_percent(done: int, total: int, text: str) -> None:
    assert percent(done, total) == text


def at(done: int, phase: str = "reading") -> Progress:
    return Progress(phase=phase, done_bytes=done, total_bytes=1000)


def test_a_speed_needs_two_looks_and_forgets_the_past() -> None:
    meter = Meter()
    assert meter.speed(at(0), 0.0) is None
    assert meter.speed(at(5), 0.1) is None, "too short a time"
    assert meter.speed(at(100), 1.0) == 100.0
    assert meter.speed(at(100), 8.0) == 100 / 8
    assert meter.speed(at(100), 17.0) is None, "nothing moves any more"


def test_another_phase_begins_anew() -> None:
    meter = Meter()
    meter.speed(at(0), 0.0)
    assert meter.speed(at(500), 1.0) == 500.0
    assert meter.speed(at(0, "importing"), 2.0) is None
    assert meter.speed(at(10, "importing"), 3.0) == 10.0
    assert meter.speed(at(5, "importing"), 4.0) is None, "less than before: it was begun anew"


def test_without_a_terminal_a_line_for_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars("server-1") as bars:
        for done in (0, 10, 90, 110, 120, 990):
            bars.show("server-1", at(done))
        bars.show("server-1", Progress(phase="queued"))
        bars.end("server-1")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "server-1: reading 0 B of 1000 B",
        "server-1: reading 110 B of 1000 B",
        "server-1: reading 990 B of 1000 B",
        "server-1: queued",
    ]
