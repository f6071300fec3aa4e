"""A running request moves to another worker, and its client cannot tell."""

from __future__ import annotations

import concurrent.futures
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.builders.fleet import Fleet
from tests.builders.remains import until_nothing_remains
from tests.builders.streams import Ask, Stream, Twins
from tests.e2e.conftest import Models
from tests.e2e.test_recovery import SAMPLED, asks, begin, check, owned

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]

CHAT = "/v1/chat/completions"
WORKERS = ("worker-1-1", "worker-1-2", "worker-2-1", "worker-2-2")


def migrate(fleet: Fleet, request_id: str, to: str, gateway: str = "gateway") -> tuple[int, Any]:
    """Ask for it and wait for its end: status and body."""
    body = {"to": to}
    return fleet.call("POST", f"/v1/admin/requests/{request_id}/migrate", body, timeout_s=100, gateway=gateway)


def ids_of(fleet: Fleet, stream: Stream) -> dict[str, str]:
    """The requests of a call that run now, and where."""
    running = fleet.requests()
    return {
        one["request_id"]: one["worker_id"] for one in running if one["request_id"].startswith(stream.heard.request_id)
    }


def other(worker: str, steps: int = 1) -> str:
    """Another worker."""
    return WORKERS[(WORKERS.index(worker) + steps) % len(WORKERS)]


def stop_string(twins: Twins, ask: dict[str, Any]) -> str:
    """A few characters that an undisturbed stream says for the first time in its later part."""
    text = twins.of(Ask.of(**ask)).choices[0].text
    for at in range(len(text) * 2 // 3, len(text) - 4):
        if text.index(text[at : at + 4]) == at and text[at : at + 4].isprintable():
            return text[at : at + 4]
    raise AssertionError("the text repeats itself")


def in_flight(fleet: Fleet, request_id: str) -> bool:
    """Whether the request is in a migration right now."""
    return any(one["request_id"] == request_id and one.get("migrating_to") for one in fleet.requests())


@pytest.fixture
def background() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """Calls that take their time."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        yield pool


def test_everything_that_a_request_is_moves_with_it(fleet: Fleet, twins: Twins) -> None:
    """Greedy and sampled, penalties, log probabilities, stop strings, two choices, half characters, chats."""
    sampled: dict[str, Any] = {"model": "long", "prompt": "Once upon", "max_tokens": 700, "seed": 11, **SAMPLED}
    # The bytes of é, ü, … in any order: whole characters, halves and what is none at all.
    accents = {str(token): 60 for token in range(5 + 94, 512)}
    calls = {
        "greedy": Ask.of("long", "The hearth", max_tokens=700, temperature=0),
        "sampled with penalties": Ask.of(**sampled),
        "log probabilities": Ask.of("long", "A model is", max_tokens=500, temperature=0.8, seed=3, logprobs=3),
        "a stop string": Ask.of(**sampled, stop=[stop_string(twins, sampled), "never said"]),
        "two choices": Ask.of("long", "one two three", max_tokens=500, temperature=1.0, seed=5, n=2),
        "bytes": Ask.of("long", "Größe, 你好, 🔥", max_tokens=500, temperature=1.0, seed=7, logit_bias=accents),
        "a chat": Ask.of("long", "Привет, 🔥", max_tokens=500, seed=9, path=CHAT, logprobs=True, top_logprobs=2),
        "echo": Ask.of("long", "naïve, déjà vu", max_tokens=500, temperature=0, echo=True),
    }
    twins.learn(list(calls.values()))
    streams = dict(zip(calls, begin(fleet, list(calls.values())), strict=True))
    moved = dict.fromkeys(calls, 0)
    for _ in range(2):
        for name, stream in streams.items():
            for request_id, worker in ids_of(fleet, stream).items():
                status, body = migrate(fleet, request_id, other(worker))
                assert status == 200 or stream.ended or status == 404, (name, status, body)
                moved[name] += status == 200 and body["migrated"]["outcome"] == "committed"
    differences = {name: stream.wait().differs(twins.of(stream.ask)) for name, stream in streams.items()}
    assert {name: difference for name, difference in differences.items() if difference} == {}
    assert all(moved.values()), moved
    assert streams["a stop string"].heard.choices[0].finish_reason == "stop"
    for name, stream in streams.items():
        said = stream.heard.hearth
        ledgers = said.get("ledgers", [said])
        assert sum(ledger["migrations"] for ledger in ledgers) == moved[name], name
        assert all(ledger["rounds"] >= ledger["migrations"] for ledger in ledgers), name
        assert sum(ledger["pause_s"] for ledger in ledgers) > 0, name
        assert sum(ledger["recoveries"] for ledger in ledgers) == 0, name


def test_migrations_in_both_directions_at_once(
    fleet: Fleet, twins: Twins, background: concurrent.futures.ThreadPoolExecutor
) -> None:
    calls = asks(12, 600)
    twins.learn(calls)
    streams = begin(fleet, calls)
    pair = sorted(owned(fleet, streams).items(), key=lambda found: -len(found[1]))[:2]
    (left, from_left), (right, from_right) = pair
    moves = [(stream, right) for stream in from_left] + [(stream, left) for stream in from_right]
    answers = list(background.map(lambda move: migrate(fleet, move[0].heard.request_id, move[1]), moves))
    check(streams, twins)
    committed = [body["migrated"]["outcome"] == "committed" for status, body in answers if status == 200]
    assert sum(committed) >= 2, answers
    until_nothing_remains(fleet)


def begin_a_slow_one(
    fleet: Fleet, twins: Twins, background: concurrent.futures.ThreadPoolExecutor
) -> tuple[Stream, str, str, concurrent.futures.Future[tuple[int, Any]]]:
    """A stream whose migration is under way and cannot go on, as its destination is stopped: stream, source,
    destination, and the answer to come."""
    for seed in range(1, 5):
        call = Ask.of("long", "A long story", max_tokens=1900, temperature=1.0, seed=seed)
        twins.learn([call])
        stream = begin(fleet, [call])[0]
        request_id = stream.heard.request_id
        source = fleet.owner_of(request_id)
        destination = other(source, 2)
        fleet.kill(destination, signal.SIGSTOP)
        answer = background.submit(migrate, fleet, request_id, destination)
        fleet.until(lambda: in_flight(fleet, request_id) or stream.ended or answer.done(), "the migration has begun")  # noqa: B023
        if in_flight(fleet, request_id) and not stream.ended:
            return stream, source, destination, answer
        fleet.kill(destination, signal.SIGCONT)  # the stream was faster: another one
        check([stream], twins)
        answer.result()
        fleet.mend()
    raise AssertionError("every stream was over before its migration had begun")


def test_a_dead_destination_leaves_the_request_where_it_was(
    fleet: Fleet, twins: Twins, background: concurrent.futures.ThreadPoolExecutor
) -> None:
    stream, source, destination, answer = begin_a_slow_one(fleet, twins, background)
    # The source goes on while it waits for its destination.
    stream.until_events(len(stream.heard.times) + 30)
    assert fleet.owner_of(stream.heard.request_id) == source
    fleet.kill(destination)
    check([stream], twins)
    assert (stream.heard.hearth["migrations"], stream.heard.hearth["recoveries"]) == (0, 0)
    status, body = answer.result()
    if status == 200:  # the stream was over before its source had given the destination up
        assert body["migrated"]["outcome"] in ("ended", "aborted"), body
    else:
        assert body["error"]["message"]


def test_a_dead_source_costs_a_recovery_and_nothing_else(
    fleet: Fleet, twins: Twins, background: concurrent.futures.ThreadPoolExecutor
) -> None:
    stream, source, destination, answer = begin_a_slow_one(fleet, twins, background)
    fleet.kill(source)
    fleet.kill(destination, signal.SIGCONT)
    check([stream], twins)
    assert stream.heard.hearth["recoveries"] == 1
    answer.result()
    fleet.mend()
    until_nothing_remains(fleet)


def test_a_client_that_leaves_ends_the_migration(
    fleet: Fleet, twins: Twins, background: concurrent.futures.ThreadPoolExecutor
) -> None:
    stream, _, destination, answer = begin_a_slow_one(fleet, twins, background)
    stream.leave()
    fleet.kill(destination, signal.SIGCONT)
    answer.result()
    until_nothing_remains(fleet)


def test_the_destination_loads_the_model_first(fleet: Fleet, models: Models, tmp_path: Path) -> None:
    fleet.deploy("single", models("llama", context=2048, eos=False, seed=5), max_replicas=2, keep_alive_s=600)
    call = Ask.of("single", "Once", max_tokens=1900, temperature=1.0, seed=2)
    expected = Stream(fleet.url, call).wait()
    stream = begin(fleet, [call])[0]
    source = fleet.owner_of(stream.heard.request_id)
    holders = {one["worker_id"] for one in fleet.view()["replicas"] if one["deployment"] == "single"}
    to = next(worker for worker in WORKERS if worker not in holders)
    done = fleet.hearth("migrate", stream.heard.request_id, "--to", to, "--json")
    assert done.returncode == 0, done.stderr
    assert stream.wait().differs(expected) == ""
    assert stream.heard.hearth["migrations"] == 1
    assert source in holders
    fleet.call("DELETE", "/v1/admin/deployments/single")
    fleet.until(lambda: all(one["deployment"] != "single" for one in fleet.view()["replicas"]), "its replicas are gone")


def test_what_cannot_be_is_said_clearly(fleet: Fleet, twins: Twins) -> None:
    call = asks(1, 1900)[0]
    stream = begin(fleet, [call])[0]
    request_id = stream.heard.request_id
    source = fleet.owner_of(request_id)
    for target, to, status, words in (
        ("nobody-knows-it", other(source), 404, "nobody-knows-it"),
        (request_id, "worker-9-9", 404, "worker-2-1"),
        (request_id, source, 400, "already"),
    ):
        answer = migrate(fleet, target, to)
        assert (answer[0], words in answer[1]["error"]["message"]) == (status, True), answer
    refused = fleet.hearth("migrate", request_id, "--to", "worker-9-9")
    assert (refused.returncode, "worker-2-1" in refused.stderr) == (1, True), refused
    stream.leave()
    until_nothing_remains(fleet)
