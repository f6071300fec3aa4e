"""Placement, one sentence of behaviour per file: a picture, a question, and the decision with its reasons.

The format: lines `server|worker|deployment|replica|load|room|avoid …` describe the picture (sizes in MiB, times in
seconds), `decide NAME` asks; below `----` stands the decision.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from services.scheduler import autoscale, policy
from services.scheduler.books import Room
from services.scheduler.cluster import Cluster, PendingLoad, PendingStop
from shared.contracts.records import Phase, ReplicaState
from shared.errors import Code, Failure
from tests.unit.scheduler import picture

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
NOW = 1000.0


def fields_of(words: list[str]) -> dict[str, str]:
    """`key=value` words; a bare word is a flag."""
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def tier(text: str, cluster: Cluster) -> dict[str, float]:
    """ "m,x:60": the whole checkpoint of deployment m, 60 MiB of x's; by checkpoint id."""
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, present = part.partition(":")
        facts = cluster.deployments[name].checkpoint
        assert facts is not None
        found[facts.checkpoint_id] = float(present) if present else facts.weight_bytes / picture.MIB
    return found


def decide(text: str) -> str:
    """The decision of one scenario as text."""
    cluster = Cluster(kv_bytes_max=2**40)
    avoid: dict[str, Failure] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        verb, id, *words = line.split()
        given = fields_of(words)
        match verb:
            case "deployment":
                facts = picture.checkpoint(
                    f"ck-{given.get('checkpoint', id)}", weights=float(given["weights"]), kv=float(given["kv"])
                )
                spec = picture.spec(
                    id, min_replicas=int(given.get("min", 0)), max_replicas=int(given.get("max", 1)), keep_alive_s=600.0
                )
                cluster.deployments[id] = picture.deployment(spec, facts)
                cluster.depths[id] = int(given.get("outstanding", 0))
            case "server":
                record = picture.server(
                    id,
                    pool=float(given["pool"]),
                    leased=float(given.get("leased", 0)),
                    dram=tier(given.get("dram", ""), cluster),
                    ssd=tier(given.get("ssd", ""), cluster),
                    loads=int(given.get("loads", 0)),
                    phase=Phase(given.get("phase", "ready")),
                    chunk=float(given.get("chunk", 0)),
                    ssd_free=float(given.get("disk", 10_000)),
                    quarantined=tuple(filter(None, given.get("quarantined", "").split(","))),
                )
                cluster.put(record, NOW)
            case "worker":
                cluster.put(
                    picture.worker(
                        id,
                        on=given["on"],
                        memory=float(given["memory"]),
                        max_replicas=int(given.get("max", 8)),
                        device=given.get("device", "cpu"),
                        phase=Phase(given.get("phase", "ready")),
                    ),
                    NOW,
                )
            case "replica":
                of = cluster.deployments[given["of"]]
                cluster.put(
                    picture.replica(
                        id,
                        of,
                        given["on"],
                        state=ReplicaState(given.get("state", "ready")),
                        running=int(given.get("running", 0)),
                        idle_s=float(given.get("idle", 0)),
                        memory=float(given.get("memory", 0)),
                        finished=int(given.get("finished", 0)),
                    ),
                    NOW,
                )
                cluster.ready_at[id] = NOW - float(given.get("age", 3600))
                if "stopping" in given:
                    cluster.stops[id] = PendingStop(id, of.spec.name, given["on"], "evicted", False, False, NOW + 10)
            case "load" | "room":
                name = given.get("of", id)
                need = cluster.need(cluster.deployments[name])
                on = cluster.workers[given["on"]]
                held = (need.key, cluster.memory_bytes(need, on), need.weight_bytes)
                if verb == "load":
                    cluster.loads[id] = PendingLoad(
                        id, name, cluster.deployments[name].revision, on.worker_id, on.server_id, *held, NOW + 10
                    )
                else:
                    victims = tuple(given["victims"].split(","))
                    cluster.rooms[name] = Room(name, (on.worker_id,), on.server_id, *held, victims, NOW + 10)
            case "avoid":
                avoid[id] = Failure(code=Code.CHECKPOINT_CORRUPT, message=" ".join(words))
            case "decide":
                idle = autoscale.victims(cluster, id, NOW, min_ready_s=1.0)
                decision = policy.decide(cluster.need(cluster.deployments[id]), cluster, idle, NOW, avoid=avoid)
                return as_text(decision)
            case _:
                raise ValueError(f"{verb} is no word of scenarios")
    raise ValueError("the scenario asks nothing")


def as_text(decision: policy.Decision) -> str:
    """The outcome, then every candidate, the chosen one first."""
    head = decision.outcome.value
    if decision.outcome is policy.Outcome.EVICT and decision.chosen is not None:
        head += f" {', '.join(one.replica_id for one in decision.victims)} for {decision.chosen.worker_id}"
    elif decision.chosen is not None:
        head += f" on {decision.chosen.worker_id}"
    rest = [one for one in decision.candidates if one is not decision.chosen]
    lines = [one.text() for one in ([decision.chosen] if decision.chosen else []) + rest]
    return "\n".join([head, *(f"  {line}" for line in lines)])


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    question, _, expected = path.read_text().partition("----\n")
    assert question.startswith("# "), "the first line says what the scenario shows"
    assert decide(question) == expected.rstrip("\n")


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 12
