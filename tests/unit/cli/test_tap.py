"""What `hearth tap` shows, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest

from services.cli.tap import REPLIES_REMEMBERED, Decoder, nats_url_of, render, veil
from shared import codec
from shared.contracts.migration import Drain, HandOver, Round
from shared.contracts.requests import ChatMessage, ChatPrompt, Claim, Claimed, Request, Sampling

SECRET = "the secret of the house"


def request() -> Request:
    prompt = ChatPrompt(messages=(ChatMessage(role="user", content=SECRET),))
    return Request(
        request_id="r1", gateway_id="g1", deployment="demo", prompt=prompt, budget_s=9.0,
        sampling=Sampling(stop=(SECRET,)),
    )  # fmt: skip


def test_a_queued_request_without_its_words() -> None:
    shown = Decoder("", payloads=False).decode("v1.queue.demo-12345678", codec.encode(request()), "")
    assert shown is not None
    line = render(shown, 0.0)
    assert "v1.queue.demo-12345678  request " in line and 'request_id="r1"' in line
    assert SECRET not in line and "secret" not in line


def test_a_migration_without_its_words_and_tokens() -> None:
    tokens = (31337, 31338, 31339)
    told = [
        ("round", Round(
            migration_id="m1", number=1, source_worker_id="w1", replica_id="x", checkpoint_id="c1", index=0,
            token_ids=tokens, request=request(),
        )),
        ("hand_over", HandOver(
            migration_id="m1", epoch=2, token="$JS.ACK.1", sequence=1, delivery=1, index=9, token_ids=tokens,
            echo_text=SECRET,
        )),
    ]  # fmt: skip
    for verb, message in told:
        shown = Decoder("", payloads=False).decode(f"v1.worker.w2.{verb}", codec.encode(message), "_INBOX.1")
        assert shown is not None
        line = render(shown, 0.0)
        assert f"v1.worker.w2.{verb}  {verb} " in line and 'migration_id="m1"' in line
        assert "secret" not in line and "31337" not in line and 'token_ids="<3 items>"' in line


def test_every_conversation_about_a_migration_is_known() -> None:
    decoder = Decoder("p", payloads=False)
    data = codec.encode(Drain(on=True))
    for subject in (
        "scheduler.move", "scheduler.relief", "migrations.w1", "gateway.g1.holds",
        *(f"worker.w1.{verb}" for verb in ("check", "migrate", "round", "hand_over", "abandon", "drain", "requests")),
    ):  # fmt: skip
        shown = decoder.decode(f"p.v1.{subject}", data, "")
        assert shown is not None and shown["message"] == {"type": "drain", "on": True}, subject


def test_payloads_on_demand() -> None:
    shown = Decoder("", payloads=True).decode("v1.queue.demo-12345678", codec.encode(request()), "")
    assert shown is not None
    assert SECRET in render(shown, 0.0)


def test_a_reply_is_shown_with_the_call_that_it_answers() -> None:
    decoder = Decoder("p", payloads=False)
    asked = codec.encode(Claim(request_id="r1", worker_id="w1", replica_id="x1"))
    answer = codec.encode(Claimed(epoch=3, budget_s=1.0, waited_s=0.5, token_ids=(1, 2, 3)))
    assert decoder.decode("p.v1.gateway.g1.claim", asked, "_INBOX.1") is not None
    shown = decoder.decode("_INBOX.1", answer, "")
    assert shown is not None and shown["reply"] is True
    line = render(shown, 0.0)
    assert "← v1.gateway.g1.claim" in line and "epoch=3" in line and 'token_ids="<3 items>"' in line


def test_replies_to_nothing_that_was_seen_are_not_shown() -> None:
    assert Decoder("", payloads=False).decode("_INBOX.7", b"+OK", "") is None


def test_calls_are_forgotten_in_the_end() -> None:
    decoder = Decoder("", payloads=False)
    asked = codec.encode(Claim(request_id="r1", worker_id="w1", replica_id="x1"))
    for number in range(REPLIES_REMEMBERED + 1):
        decoder.decode("v1.gateway.g1.claim", asked, f"_INBOX.{number}")
    assert decoder.decode("_INBOX.0", asked, "") is None
    assert decoder.decode("_INBOX.1", asked, "") is not None


def test_unknown_and_malformed_traffic() -> None:
    decoder = Decoder("", payloads=False)
    assert decoder.decode("other.subject", b"??", "") == {"subject": "other.subject", "bytes": 2, "unknown": True}
    shown = decoder.decode("v1.scheduler.demand", b"\xc1", "")
    assert shown is not None and "malformed" in shown
    assert "1 bytes" in render(shown, 0.0)
    plain = decoder.decode("v1.scheduler.demand", msgpack.packb([1, 2]), "")
    assert plain is not None and "[1, 2]" in render(plain, 0.0)


def test_every_piece_of_user_data_is_veiled() -> None:
    value = {"items": [{"text": SECRET, "token_ids": [1], "logprobs": [[SECRET]], "index": 3}], "prompt": None}
    assert veil(value) == {
        "items": [
            {"text": f"<{len(SECRET)} characters>", "token_ids": "<1 items>", "logprobs": "<1 items>", "index": 3}
        ],
        "prompt": None,
    }


def test_where_the_bus_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEARTH_NATS_URL", raising=False)
    assert nats_url_of(tmp_path) == "nats://127.0.0.1:4222"
    (tmp_path / "up.json").write_text('{"nats_url": "nats://127.0.0.1:5"}')
    assert nats_url_of(tmp_path) == "nats://127.0.0.1:5"
    (tmp_path / "up.json").write_text("{")
    assert nats_url_of(tmp_path) == "nats://127.0.0.1:4222"
    monkeypatch.setenv("HEARTH_NATS_URL", "nats://there:1")
    assert nats_url_of(tmp_path) == "nats://there:1"
