"""Workers that die between two looks: what they were told goes elsewhere at once, and nobody is blamed for it."""

from __future__ import annotations

from services.scheduler.events import CommandLoad, LoadRefused, Note, Reconnected, RecordHinted
from shared.errors import Code, Failure
from tests.unit.scheduler import picture
from tests.unit.scheduler.desk import Desk, small

NOBODY = Failure(code=Code.UNAVAILABLE, message="Nobody serves v1.worker.a0.load.")


def two() -> tuple[Desk, CommandLoad]:
    """Two servers with a worker each; "m" was to be loaded by a0."""
    desk = small()
    desk.add(picture.server("b"), picture.worker("b0", memory=450))
    desk.wait(1.0)
    desk.queue("m", 1)
    desk.hint("m")
    load = desk.only(CommandLoad)
    assert load.worker_id == "a0"
    return desk, load


def test_a_load_that_nobody_answers_goes_to_another_worker_at_once_and_nobody_is_blamed() -> None:
    desk, load = two()
    desk.tell(LoadRefused(load.message.replica_id, NOBODY))
    assert desk.only(CommandLoad).worker_id == "b0"
    assert [one.name for one in desk.take(Note) if one.name in ("worker.silent", "replica.failed")] == ["worker.silent"]


def test_a_silent_worker_is_used_as_soon_as_it_speaks() -> None:
    desk, load = two()
    del desk.workers["b0"]
    desk.tell(RecordHinted("worker", "b0", True))
    desk.tell(LoadRefused(load.message.replica_id, NOBODY))
    desk.wait(1.5)  # looks at the registry, where its record is still
    assert desk.take(CommandLoad) == []
    desk.tell(RecordHinted("worker", "a0", False))
    assert desk.only(CommandLoad).worker_id == "a0"


def test_a_silent_worker_is_tried_again_after_a_while() -> None:
    desk, load = two()
    del desk.workers["b0"]
    desk.tell(RecordHinted("worker", "b0", True))
    desk.tell(LoadRefused(load.message.replica_id, NOBODY))
    desk.wait(desk.rules.silence_s + desk.rules.look_interval_s)
    assert desk.only(CommandLoad).worker_id == "a0"


def test_nobody_is_left_alone_after_our_own_connection_was_lost() -> None:
    desk, load = two()
    desk.tell(LoadRefused(load.message.replica_id, NOBODY))
    second = desk.only(CommandLoad)
    desk.tell(LoadRefused(second.message.replica_id, NOBODY))
    assert desk.take(CommandLoad) == []
    desk.tell(Reconnected())
    assert len(desk.take(CommandLoad)) == 1


def test_what_a_worker_had_been_told_goes_elsewhere_when_its_record_expires() -> None:
    desk, _ = two()
    del desk.workers["a0"]
    desk.wait(desk.rules.look_interval_s)
    assert desk.only(CommandLoad).worker_id == "b0"
