"""Drains, reliefs and moves, one sentence of behaviour per file: a picture, what happens, and what is commanded.

The format: `slots N max N` describes deployment m; `WORKER RUNNING` is a worker with a ready replica of m (-1: without
one), with the words `loading`, `old` (an old revision), `drains`; `migrating IDS FROM TO` are migrations in a record.
Then `relief WORKER N` or `move WORDS` may happen. Below `----` stands what is commanded and told within `after` s.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from services.scheduler.events import CommandLoad, CommandMigrate, CommandStop, Note
from shared.contracts.records import Phase, ReplicaState
from shared.errors import Failure
from tests.unit.scheduler import picture
from tests.unit.scheduler.depot import Depot

SCENARIOS = sorted((Path(__file__).parent / "moves").glob("*.txt"))
TOLD = frozenset({"move.deferred", "replica.wanted"})


def happened(text: str) -> str:
    """What one scenario leads to, as text."""
    desk, answers, started = Depot(), list[object](), False
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        verb, *words = line.split()
        if verb == "slots":
            slots, most = int(words[0]), int(words[2])
            spec = picture.spec("m", target_concurrency=slots, max_replicas=most)
            desk.add(picture.deployment(spec, picture.checkpoint(kv=100 / slots)))
            continue
        if verb not in ("relief", "move", "migrating", "after"):
            place(desk, verb, words)
            continue
        if verb == "migrating":
            desk.shown(words[1], *words[0].split(","), to=words[2])
            continue
        if not started:
            running = sum(one.running for one in desk.replicas.values())
            desk.depths[desk.deployments["m"].slug] = running
            desk.start()
            started = True
        if verb == "relief":
            desk.relief(words[0], int(words[1]))
        elif verb == "move":
            fields: dict[str, object] = dict(word.split("=") for word in words)
            if "most" in fields:
                fields["most"] = int(str(fields["most"]))
            answers = desk.ask(wait_s=60.0, **fields)
        else:
            desk.wait(float(words[0]))
            desk.answers()
    return as_text(desk, answers)


def place(desk: Depot, on: str, words: list[str]) -> None:
    """A worker and its replica."""
    desk.running(**{on: int(words[0])})
    id = f"p{on}"
    if "drains" in words:
        desk.workers[on] = msgspec.structs.replace(desk.workers[on], phase=Phase.DRAINING)
    if id in desk.replicas:
        state = ReplicaState.LOADING if "loading" in words else ReplicaState.READY
        if "drains" in words or "old" in words:
            state = ReplicaState.DRAINING
        changes: dict[str, object] = {"state": state} | ({"revision": "older"} if "old" in words else {})
        desk.replicas[id] = msgspec.structs.replace(desk.replicas[id], **changes)


def as_text(desk: Depot, answers: list[object]) -> str:
    """Commands, what is told about what waits, and the answer, in order."""
    lines = []
    for one in desk.out:
        match one:
            case CommandMigrate():
                what = ",".join(one.message.request_ids) or str(one.message.most)
                lines.append(f"migrate {what} {one.worker_id} → {one.message.to_worker_id} ({one.message.reason})")
            case CommandLoad():
                lines.append(f"load on {one.worker_id}")
            case CommandStop():
                lines.append(f"stop {one.message.replica_id} ({one.message.reason})")
            case Note() if one.name in TOLD:
                lines.append(f"{one.name}: {one.facts['reasons']}")
            case _:
                pass
    for answer in answers:
        lines.append(f"answer {answer.code}: {answer.message}" if isinstance(answer, Failure) else f"answer {answer}")
    return "\n".join(lines)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    question, _, expected = path.read_text().partition("----\n")
    assert question.startswith("# "), "the first line says what the scenario shows"
    assert happened(question) == expected.rstrip("\n")


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 12
