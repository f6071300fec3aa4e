"""Log lines for people."""

from __future__ import annotations

import json

import pytest

from services.cli.logview import LEVELS, Line, read, render, wanted

RECORD = {
    "service": "worker",
    "id": "worker-1",
    "module": "worker",
    "event": "replica.loaded",
    "level": "info",
    "timestamp": "2026-01-02T03:04:05.5+00:00",
    "deployment": "demo",
    "read_s": 0.31234,
    "weight_bytes": 12 * 2**20,
    "warm": False,
    "nothing": None,
}


def test_a_record_becomes_one_aligned_line() -> None:
    line = read(json.dumps(RECORD), 0.0)
    assert line.at_s == pytest.approx(1767323045.5)
    text = render("worker-1", line, colour=False)
    assert text.endswith(" worker-1     replica.loaded  deployment=demo read_s=0.312 weight_bytes=12MiB warm=no")
    assert "nothing" not in text and "module" not in text


def test_what_is_no_record_is_kept_as_it_is() -> None:
    for text in ("Traceback (most recent call last):", "{not json", '{"a": 1}', "[1]"):
        assert read(text, 7.0) == Line(7.0, LEVELS["info"], text, {})


def test_a_record_without_time_gets_the_time_it_came() -> None:
    assert read('{"event": "a.b", "timestamp": "yesterday"}', 7.0).at_s == 7.0


def test_exceptions_are_shown_below_their_line() -> None:
    line = read(json.dumps({"event": "service.crashed", "level": "error", "exception": "one\ntwo"}), 0.0)
    assert render("x", line, colour=False).splitlines()[1:] == ["    one", "    two"]


def test_values_with_spaces_are_quoted_and_long_ones_cut() -> None:
    line = read(json.dumps({"event": "a.b", "why": "no room", "long": "x" * 5000}), 0.0)
    text = render("x", line, colour=False)
    assert 'why="no room"' in text
    assert len(text) < 300 and text.endswith("…")


@pytest.mark.parametrize(
    ("event", "level", "plain", "verbose", "shown"),
    [
        ("replica.loaded", "info", False, False, True),
        ("replica.looked", "debug", False, False, False),
        ("replica.looked", "debug", False, True, True),
        ("service.ready", "info", False, False, False),
        ("service.ready", "warning", False, False, True),
        ("anything", "info", True, False, False),
        ("anything", "info", True, True, True),
    ],
)
def test_what_a_person_wants_to_see(event: str, level: str, plain: bool, verbose: bool, shown: bool) -> None:
    assert wanted(Line(0.0, LEVELS[level], event, {}), plain=plain, verbose=verbose) is shown


def test_colours_are_escape_sequences_round_the_same_words() -> None:
    import re

    line = read(json.dumps(RECORD), 0.0)
    painted = render("worker-1", line, colour=True)
    assert painted != render("worker-1", line, colour=False)
    assert re.sub(r"\x1b\[\d+m", "", painted) == render("worker-1", line, colour=False)
