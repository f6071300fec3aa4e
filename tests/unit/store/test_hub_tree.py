"""The Hugging Face hub as a tree of files with ranges, against a small hub on loopback."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.store import hub_tree
from services.store.hub_tree import MOST_TRIES, HubTree
from shared.errors import Code, HearthError
from tests.builders.hub import COMMIT, FakeHub

SIZE = 700_001
CONTENT = random.Random(2).randbytes(SIZE)
TOKEN = "hf_not_a_token_of_anybody"


@pytest.fixture(params=[False, True], ids=["hub", "network"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    (tmp_path / "empty.txt").write_bytes(b"")
    with FakeHub(tmp_path, network=request.param) as server:
        yield server


def tree(hub: FakeHub, url: str = "hf:org/name", revision: str | None = None) -> HubTree:
    return HubTree(url, revision, endpoint=hub.endpoint)


def read(source: HubTree, offset: int = 0, length: int = SIZE, name: str = "model.safetensors") -> bytes:
    data = bytearray(length)
    source.read(name, offset, memoryview(data))
    return bytes(data)


def refusal(source: HubTree, offset: int = 0, length: int = SIZE, name: str = "model.safetensors") -> HearthError:
    with pytest.raises(HearthError) as refused:
        read(source, offset, length, name)
    return refused.value


def test_files_at_the_top_of_a_repository_at_one_commit(hub: FakeHub) -> None:
    source = tree(hub)
    assert (source.url, source.revision, source.remote) == ("hf:org/name", COMMIT, True)
    assert dict(source.files) == {"config.json": 2, "empty.txt": 0, "model.safetensors": SIZE}
    hub.commit = "0" * 40  # somebody pushes
    assert source.read_small("config.json", 2) == b"{}"
    assert source.read_small("empty.txt", 0) == b""
    assert read(source) == CONTENT
    assert read(source, 12345, 678) == CONTENT[12345 : 12345 + 678]
    assert all(COMMIT in path for _, path, _, _ in hub.asked if "/resolve/" in path), "never the moving branch"
    assert sorted(hub.resolved()) == ["config.json", "model.safetensors"], "an address is asked for once"


def test_the_token_goes_to_the_hub_alone(hub: FakeHub) -> None:
    hub.private_token = TOKEN
    assert read(tree(hub), 5, 10) == CONTENT[5:15]
    assert {authorization for _, _, _, authorization in hub.asked} == {f"Bearer {TOKEN}"}
    assert {authorization for _, _, _, authorization in hub.network_asked} <= {""}
    assert bool(hub.network_asked) == bool(hub.network)


@pytest.mark.parametrize(
    ("url", "revision", "code", "message"),
    [
        ("hf:org/unknown", None, Code.NOT_FOUND, "The hub has no repository org/unknown, or it is private."),
        ("hf:org/name", "nope", Code.NOT_FOUND, "org/name has no revision 'nope'."),
        ("hf:org/gated", None, Code.FORBIDDEN,
         "org/gated is gated: accept its terms on the hub and give the store a token (HF_TOKEN)."),
        ("hf:org/../name", None, Code.INVALID_REQUEST, "'hf:org/../name' is not of the form hf:ORG/NAME."),
        ("hf:org/name/more", None, Code.INVALID_REQUEST, "'hf:org/name/more' is not of the form hf:ORG/NAME."),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_a_clear_error(
    hub: FakeHub, url: str, revision: str | None, code: Code, message: str
) -> None:
    with pytest.raises(HearthError) as refused:
        tree(hub, url, revision)
    assert (refused.value.failure.code, refused.value.failure.message) == (code, message)


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with pytest.raises(HearthError, match="cannot be reached for org/name") as refused:
        HubTree("hf:org/name", endpoint="http://127.0.0.1:1")
    assert refused.value.failure.code is Code.CHECKPOINT_UNAVAILABLE


def test_a_cut_connection_costs_only_what_was_in_flight(hub: FakeHub) -> None:
    source = tree(hub)
    read(source, 0, 1)
    hub.sent_bytes = 0
    hub.cut_after = [300_000, 100_000]
    assert read(source) == CONTENT
    assert hub.sent_bytes == SIZE


def test_weak_moments_are_waited_out(hub: FakeHub) -> None:
    source = tree(hub)
    hub.statuses = [503, 429]
    assert read(source, 10, 20) == CONTENT[10:30]


def test_tries_are_bounded(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_tree, "delay_s", lambda tries, **_: 0.0)
    source = tree(hub)
    hub.statuses = [503] * 100
    failure = refusal(source).failure
    assert (failure.code, "HTTP 503" in failure.message) == (Code.CHECKPOINT_UNAVAILABLE, True)
    assert 100 - len(hub.statuses) == MOST_TRIES
    hub.statuses = []
    hub.cut_after = [1] * 100
    assert refusal(source).failure.code is Code.CHECKPOINT_UNAVAILABLE
    assert 100 - len(hub.cut_after) == MOST_TRIES


def test_an_address_that_has_expired_is_asked_for_again(hub: FakeHub) -> None:
    source = tree(hub)
    assert read(source, 0, 10) == CONTENT[:10]
    hub.expire()
    assert read(source, 10, 10) == CONTENT[10:20]
    assert read(source, 20, 10) == CONTENT[20:30]
    assert len(hub.resolved()) == (2 if hub.network else 1)
    hub.statuses = [403] * 3  # refused at a fresh address too
    failure = refusal(source, 0, 10).failure
    assert failure.code is Code.CHECKPOINT_UNAVAILABLE
    assert len(hub.statuses) == 1


def test_a_server_without_ranges_is_refused_before_its_body_is_read(hub: FakeHub) -> None:
    source = tree(hub)
    hub.whole = True
    failure = refusal(source, 10, 10).failure
    assert (failure.code, "does not serve ranges" in failure.message) == (Code.CHECKPOINT_UNAVAILABLE, True)
    hub.whole = False
    hub.statuses = [416]
    assert refusal(source, 10, 10).failure.code is Code.INVALID_CHECKPOINT


def test_a_file_that_is_another_one_than_listed(hub: FakeHub) -> None:
    source = tree(hub)
    (hub.root / "model.safetensors").write_bytes(CONTENT + b"x")
    assert refusal(source, 0, 10).failure.code is Code.CHECKPOINT_UNAVAILABLE
    (hub.root / "config.json").unlink()
    assert refusal(source, 0, 2, "config.json").failure.code is Code.NOT_FOUND


def test_bounds(hub: FakeHub) -> None:
    source = tree(hub)
    asked = len(hub.asked)
    assert refusal(source, SIZE - 1, 2).failure.code is Code.INVALID_CHECKPOINT
    assert refusal(source, 0, 1, "original/tokenizer.model").failure.code is Code.NOT_FOUND
    with pytest.raises(HearthError) as refused:
        source.read_small("model.safetensors", 100)
    assert refused.value.failure.code is Code.TOO_LARGE
    assert len(hub.asked) == asked


def test_closing_ends_what_runs(hub: FakeHub) -> None:
    source = tree(hub)
    hub.statuses = [503] * 100
    failed: list[HearthError] = []
    thread = threading.Thread(target=lambda: failed.append(refusal(source)))
    thread.start()
    while len(hub.statuses) == 100:
        threading.Event().wait(0.01)
    source.close()
    thread.join(10)
    assert [error.failure.code for error in failed] == [Code.DRAINING]
    assert refusal(source, 0, 1).failure.code is Code.DRAINING


@pytest.mark.parametrize(
    "rubbish",
    [
        b"<html>Please log in</html>",
        b"[]",
        b"7",
        b'{"id": 3, "siblings": 4}',
        b'{"id": "org/name", "siblings": [{}]}',
        b"{}",
    ],
)
def test_an_answer_that_is_none_of_the_hubs_is_the_worlds_fault(hub: FakeHub, rubbish: bytes) -> None:
    hub.rubbish = rubbish
    with pytest.raises(HearthError) as refused:
        tree(hub)
    assert refused.value.failure.code is Code.CHECKPOINT_UNAVAILABLE
    assert refused.value.failure.message.startswith("What answers for org/name is not the Hugging Face hub")
