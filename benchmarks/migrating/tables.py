"""Figures as rows, and as the markdown that stands in docs/migration.md between two marks. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def begin(name: str) -> str:
    """The mark before a part that a program writes; GitHub does not show it."""
    return f"<!-- begin: {name} -->"


def end(name: str) -> str:
    """The mark after it."""
    return f"<!-- end: {name} -->"


def put(document: str, name: str, text: str) -> str:
    """The document with `text` between the marks of this name. Raises ValueError if they are not there, once each."""
    first, last = begin(name), end(name)
    if document.count(first) != 1 or document.count(last) != 1 or document.index(first) > document.index(last):
        raise ValueError(f"the document needs the lines {first} and {last}, once each and in this order")
    before, rest = document.split(first)
    after = rest.split(last)[1]
    return f"{before}{first}\n{text.strip()}\n{last}{after}" if text.strip() else f"{before}{first}\n{last}{after}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, marks, *rows))


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds: one decimal below 10 ms, none above."""
    ms = seconds * 1000
    return f"{ms:.1f}" if ms < 10 else f"{ms:.0f}"


def kilobytes(size: float) -> str:
    """Bytes as kB with one decimal."""
    return f"{size / 1000:.1f}"
