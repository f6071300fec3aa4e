"""Tables for people: on a terminal, as markdown, and between two marks of a document."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print it; all columns but the first hold numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    # Piped, rich would fold everything to 80 columns.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a document."""
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, marks, *rows))


def put(document: str, name: str, text: str) -> str:
    """The document with `text` between the marks of this name. Raises ValueError if they are not there, once each."""
    first, last = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    if document.count(first) != 1 or document.count(last) != 1 or document.index(first) > document.index(last):
        raise ValueError(f"the document needs the lines {first} and {last}, once each and in this order")
    before, rest = document.split(first)
    after = rest.split(last)[1]
    return f"{before}{first}\n{text.strip()}\n{last}{after}"
