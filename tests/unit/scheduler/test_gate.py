"""A core that is held decides nothing; what happened meanwhile is handled in order when it goes on."""

from __future__ import annotations

from services.scheduler.events import CommandLoad, DemandHinted, LoadRefused, Reconnected
from services.scheduler.gate import Gate
from shared.errors import Code, Failure
from tests.unit.scheduler import picture
from tests.unit.scheduler.desk import small

REFUSED = Failure(code=Code.NO_CAPACITY, message="Full.")


def test_time_stands_still_for_a_core_that_is_held() -> None:
    desk = small()
    desk.add(picture.server("b"), picture.worker("b0", memory=450))
    desk.wait(1.0)
    gate = Gate(desk.core)
    [load] = [one for one in gate.handle(DemandHinted("m", desk.now), desk.now) if isinstance(one, CommandLoad)]
    assert gate.deadline() is not None
    gate.hold()
    assert gate.deadline() is None
    late = desk.now + 5.0  # the command is not forgotten, nobody is blamed, and nothing is asked for
    assert gate.handle(LoadRefused(load.message.replica_id, REFUSED), late) == []
    assert gate.handle(None, late) == []
    assert list(desk.core.cluster.loads) == [load.message.replica_id]
    gate.go_on()
    loads = [one for one in gate.handle(Reconnected(), late) if isinstance(one, CommandLoad)]
    assert [(one.worker_id, one.message.deployment) for one in loads] == [("b0", "m")]
    assert gate.deadline() is not None
    gate.check()
