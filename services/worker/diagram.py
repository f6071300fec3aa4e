"""The state diagrams of docs/migration.md, drawn from the transition tables. Pure.

    python -m services.worker.diagram < docs/migration.md > drawn.md

copies the document with the diagrams as the tables give them now; a test holds the document to it.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Final, TypeVar

from services.worker import migration

_FENCE: Final = "```"
S = TypeVar("S", bound=enum.StrEnum)
H = TypeVar("H", bound=enum.StrEnum)
E = TypeVar("E", bound=enum.StrEnum)


def draw(begin: tuple[S, Sequence[E]], table: Mapping[tuple[S, H], tuple[S, Sequence[E]]], final: Collection[S]) -> str:
    """A Mermaid state diagram: an arrow per row of the table, labelled "input / effects"."""
    first, effects = begin
    lines = ["stateDiagram-v2", _arrow("[*]", first.name, "", effects)]
    lines += [
        _arrow(state.name, after.name, happened, effects) for (state, happened), (after, effects) in table.items()
    ]
    lines += [_arrow(state.name, "[*]", "", ()) for state in sorted(final)]
    return "\n".join(lines)


def _arrow(before: str, after: str, happened: str, effects: Sequence[enum.StrEnum]) -> str:
    label = " / ".join(part for part in (happened, ", ".join(effects)) if part)
    return f"    {before} --> {after}" + (f": {label}" if label else "")


def diagrams() -> dict[str, str]:
    """The Mermaid text of each machine, by the name that its marks in the document carry."""
    return {
        "source diagram": draw(migration.SOURCE_BEGIN, migration.SOURCE, migration.SOURCE_FINAL),
        "destination diagram": draw(migration.DESTINATION_BEGIN, migration.DESTINATION, migration.DESTINATION_FINAL),
    }


def redraw(document: str) -> str:
    """The document with the diagrams between their marks. Raises ValueError if a mark is missing or there twice."""
    for name, text in diagrams().items():
        first, last = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if document.count(first) != 1 or document.count(last) != 1:
            raise ValueError(f"the document needs the lines {first} and {last}, once each")
        before, rest = document.split(first)
        document = f"{before}{first}\n{_FENCE}mermaid\n{text}\n{_FENCE}\n{last}{rest.split(last)[1]}"
    return document


if __name__ == "__main__":
    sys.stdout.write(redraw(sys.stdin.read()))
