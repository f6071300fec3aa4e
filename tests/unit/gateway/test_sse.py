"""Server-sent events as bytes, and the limits of clients."""

from __future__ import annotations

import pytest

from services.gateway import sse
from services.gateway.limits import OpenRequests
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


def test_open_requests_are_bounded_and_counted_down() -> None:
    requests = OpenRequests(max_open=6, max_open_per_client=4)
    assert requests.enter("a", 1) is None
    assert requests.enter("a", 3) is None
    refused = requests.enter("a", 1)
    assert refused is not None
    assert refused.code is Code.RATE_LIMITED
    assert requests.enter("b", 2) is None
    assert requests.enter("c", 1) is not None
    requests.check()
    requests.leave("a", 3)
    assert requests.enter("c", 3) is None
    for client, count in (("a", 1), ("b", 2), ("c", 3)):
        requests.leave(client, count)
        requests.check()
    assert requests.total == 0
