"""What a store holds is listed in parts that fit into a message."""

from __future__ import annotations

import pytest

from services.store.events import ListAsked
from shared.contracts.residency import LIST_LIMIT, CheckpointList, ListCheckpoints
from tests.unit.store.desk import Desk, stored

HELD = LIST_LIMIT + 5


@pytest.fixture(scope="module")
def desk() -> Desk:
    return Desk(*(stored(f"m{number}") for number in range(HELD)), ssd_bytes=10**9)


def ids(desk: Desk, asked: ListCheckpoints) -> list[str]:
    desk.post(ListAsked(asked, "list"))
    answer = desk.last("list")
    assert isinstance(answer, CheckpointList)
    assert answer.total == HELD
    return [one.checkpoint.checkpoint_id for one in answer.checkpoints]


def test_the_parts_make_the_whole(desk: Desk) -> None:
    first, rest = ids(desk, ListCheckpoints()), ids(desk, ListCheckpoints(first=LIST_LIMIT))
    assert (len(first), len(rest)) == (LIST_LIMIT, 5)
    assert len({*first, *rest}) == HELD


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        (ListCheckpoints(first=HELD), 0),
        (ListCheckpoints(first=-3, limit=2), 2),
        (ListCheckpoints(limit=0), 1),
        (ListCheckpoints(limit=10**9), LIST_LIMIT),
        (ListCheckpoints(first=HELD - 1, limit=7), 1),
    ],
)
def test_no_part_is_larger_than_a_message(desk: Desk, asked: ListCheckpoints, count: int) -> None:
    assert len(ids(desk, asked)) == count
