"""What the core decided and the handler has not taken yet: bounded, and nobody waits for what will never come."""

from __future__ import annotations

from services.gateway.buffer import CallBuffer
from services.gateway.core import Deliver, Fail
from shared.contracts.generation import Frame
from shared.errors import Code


def deliver(text: str) -> Deliver:
    return Deliver("a", 0, Frame(request_id="a", epoch=1, index=0, token_ids=(1,), text=text), None)


async def test_a_handler_that_cannot_tear_a_connection_down_is_told_that_the_answer_is_too_large() -> None:
    buffer = CallBuffer("a", choices=1, limit_bytes=1000)
    assert buffer.put(deliver("x" * 800))
    assert not buffer.put(deliver("y" * 800))
    assert buffer.over
    first, last = await buffer.take()
    assert first == deliver("x" * 800)
    assert isinstance(last, Fail)
    assert last.failure.code is Code.TOO_LARGE
    assert not buffer.put(deliver("z")), "nothing follows a failure"


async def test_a_connection_is_torn_down_once() -> None:
    torn: list[bool] = []
    buffer = CallBuffer("a", choices=1, limit_bytes=1000)
    buffer.overflow = lambda: torn.append(True)
    for _ in range(3):
        buffer.put(deliver("x" * 800))
    assert torn == [True]
