"""docs/migration.md shows the machines as they are."""

from __future__ import annotations

import enum
from pathlib import Path

import pytest

from services.worker.diagram import diagrams, draw, redraw
from services.worker.migration import DESTINATION, SOURCE

DOCUMENT = Path(__file__).parents[3] / "docs" / "migration.md"


class State(enum.StrEnum):
    OPEN = "open"
    SHUT = "shut"


class Input(enum.StrEnum):
    KEY = "key turned"
    PUSH = "pushed"


class Effect(enum.StrEnum):
    CLICK = "click"
    CREAK = "creak"


def test_a_row_of_a_table_is_an_arrow() -> None:
    drawn = draw(
        (State.OPEN, (Effect.CREAK,)),
        {
            (State.OPEN, Input.PUSH): (State.OPEN, (Effect.CREAK, Effect.CLICK)),
            (State.OPEN, Input.KEY): (State.SHUT, (Effect.CLICK,)),
        },
        {State.SHUT},
    )

    assert drawn.splitlines() == [
        "stateDiagram-v2",
        "    [*] --> OPEN: creak",
        "    OPEN --> OPEN: pushed / creak, click",
        "    OPEN --> SHUT: key turned / click",
        "    SHUT --> [*]",
    ]


def test_every_row_of_both_machines_is_drawn() -> None:
    drawn = diagrams()

    assert sum(" --> " in line for line in drawn["source diagram"].splitlines()) == len(SOURCE) + 1 + 3
    assert sum(" --> " in line for line in drawn["destination diagram"].splitlines()) == len(DESTINATION) + 1 + 2


def test_a_document_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="source diagram"):
        redraw("# No marks here\n")


def test_the_document_shows_what_the_tables_say() -> None:
    written = DOCUMENT.read_text(encoding="utf-8")

    assert written == redraw(written), "draw it anew: python -m services.worker.diagram < docs/migration.md > drawn.md"
