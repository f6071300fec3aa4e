"""Server-sent events as bytes, and the limits of clients."""

from __future__ import annotations

import pytest

from services.gateway import sse
from services.gateway.limits import OpenCalls
from shared.contracts.residency import Progress
from shared.errors import Code


def test_events_and_comments() -> None:
    assert sse.data(b'{"a":1}') == b'data: {"a":1}\n\n'
    assert sse.DONE == b"data: [DONE]\n\n"
    assert sse.comment("loading 41 %") == b": loading 41 %\n\n"


def test_a_comment_cannot_smuggle_an_event() -> None:
    assert sse.comment("a\ndata: x\r\n\r\nb").count(b"\n") == 2


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (Progress(phase="reading", done_bytes=41, total_bytes=100, eta_s=3.14), "loading 41 % eta 3.1 s"),
        (Progress(phase="reading", done_bytes=41, total_bytes=100), "loading 41 %"),
        (Progress(phase="reading", done_bytes=101, total_bytes=100, eta_s=-1.0), "loading 100 % eta 0.0 s"),
        (Progress(phase="importing"), "importing"),
        (Progress(phase="queued"), "waiting for a load"),
        (Progress(phase="attaching", done_bytes=1, total_bytes=1), "attaching 100 %"),
        (Progress(phase="something new"), "something new"),
    ],
)
def test_progress_for_a_person(progress: Progress, words: str) -> None:
    assert sse.describe(progress) == words


def test_open_calls_are_bounded_and_counted_down() -> None:
    calls = OpenCalls(max_open=3, max_open_per_client=2)
    assert calls.enter("a") is None
    assert calls.enter("a") is None
    refused = calls.enter("a")
    assert refused is not None
    assert refused.code is Code.RATE_LIMITED
    assert calls.enter("b") is None
    assert calls.enter("c") is not None
    calls.check()
    calls.leave("a")
    assert calls.enter("c") is None
    for client in "abc":
        calls.leave(client)
        calls.check()
    assert calls.total == 0
