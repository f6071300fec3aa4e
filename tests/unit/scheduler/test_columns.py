"""The columns after any number of changes are those that would be written from the picture as it is."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest

from services.scheduler.columns import Columns
from shared.contracts.records import Phase
from tests.unit.scheduler.sight import FakeView, read

NOW = 1000.0
WORDS = """
model m weights=6 slots=4
model x weights=4 slots=4
server a dram=m ssd=x zone:west
server b ssd=m,x quarantined=x
server c arriving=m:2
worker a0 on=a memory=40
worker a1 on=a memory=40 gpu:h200
worker b0 on=b memory=40 device=cpu
worker c0 on=c memory=40 gangs
replica x1 of=x on=a0 idle=7
replica x2 of=x on=b0 running=2 remaining=4 resume=1 parkable
replica m1 of=m on=a1 running=1 remaining=3 resume=5
ask m
"""


def rows(columns: Columns) -> dict[str, dict[str, object]]:
    """Every row by the id that stands there, classes and row numbers as what they stand for."""
    found: dict[str, dict[str, object]] = {}
    for row, id in enumerate(columns.workers.ids):
        if id:
            found[id] = {name: getattr(columns, name)[row].item() for name in columns.OF_WORKERS}
            found[id]["device"] = columns.devices.values[columns.device[row]]
            found[id]["server"] = columns.servers.ids[columns.server[row]]
            up = columns.up[columns.server[row]]
            found[id]["labels"] = columns.label_sets.values[columns.labels[row]] if up else "unknown"
            assert columns.workers.get(id) == row
    for row, id in enumerate(columns.servers.ids):
        if id and columns.up[row]:
            found[id] = {name: getattr(columns, name)[row].tolist() for name in columns.OF_SERVERS}
    return found


def indices(columns: Columns) -> list[dict[str, list[str]]]:
    """Which servers are written down for which checkpoint, in the order of ids."""
    return [
        {key: sorted(holders) for key, holders in sorted(index.items())}
        for index in (columns.arriving, columns.quarantined)
    ]


def change(view: FakeView, whole: FakeView, dice: random.Random) -> None:
    """One thing happens."""
    server = dice.choice(sorted(whole.servers))
    worker = dice.choice(sorted(whole.workers))
    workers, servers = [worker], [server]
    match dice.randrange(7):
        case 0:
            view.workers.pop(worker, None)
        case 1:
            view.workers[worker] = whole.workers[worker]
        case 2:
            view.servers.pop(server, None)
        case 3:
            labels = dice.choice(({}, {"zone": "east"}, {"zone": "west"}))
            record = whole.servers[server]
            quarantined = dice.choice(({}, record.quarantined, {"ck-m": "bad"}))
            arriving = dice.choice(({}, {"ck-x": 0}, {"ck-m": 9}))
            view.servers[server] = msgspec.structs.replace(
                record, labels=labels, quarantined=quarantined, dram_arriving=arriving
            )
        case 4:
            phase = dice.choice((Phase.READY, Phase.DRAINING))
            view.workers[worker] = msgspec.structs.replace(whole.workers[worker], phase=phase)
        case 5:
            id = dice.choice(sorted(whole.replicas))
            view.replicas.pop(id, None)
            workers = list(whole.replicas[id].tenant.worker_ids)
        case _:
            id = dice.choice(sorted(whole.replicas))
            held = whole.replicas[id]
            view.replicas[id] = replace(held, tenant=replace(held.tenant, running=dice.randint(0, 3)))
            workers = list(held.tenant.worker_ids)
    servers += [whole.workers[id].server_id for id in workers]
    view.changed = (workers, [id for id in servers if id in view.servers or id in whole.servers])


@pytest.mark.parametrize("seed", range(20))
def test_only_what_has_changed_is_written_and_nothing_is_missed(seed: int) -> None:
    dice = random.Random(seed)
    view, whole = read(WORDS)[0], read(WORDS)[0]
    view.columns.refresh(view, NOW)
    for _ in range(40):
        change(view, whole, dice)
        known = {id: record for id, record in view.servers.items() if id in whole.servers}
        view.columns.refresh(view, NOW)
        anew = Columns()
        view.changed = (sorted(view.workers), sorted(known))
        anew.refresh(view, NOW)
        assert rows(view.columns) == rows(anew)
        assert indices(view.columns) == indices(anew)


def test_rows_are_reused() -> None:
    view, _ = read(WORDS)
    view.columns.refresh(view, NOW)
    many = len(view.columns.workers)
    for number in range(100):
        view.workers = {
            f"a{number}": msgspec.structs.replace(one, worker_id=f"a{number}", server_id=f"s{number}")
            for one in list(view.workers.values())[:1]
        }
        view.changed = ([f"a{number - 1}", f"a{number}"], [])
        view.columns.refresh(view, NOW)
    assert len(view.columns.workers) <= many + 2
    assert len(view.columns.servers) <= 5


def test_columns_grow_with_the_cluster() -> None:
    view, _ = read(WORDS)
    one, server = view.workers["a0"], view.servers["a"]
    view.servers = {f"s{n:03}": msgspec.structs.replace(server, server_id=f"s{n:03}") for n in range(150)}
    view.workers = {
        f"w{n:03}": msgspec.structs.replace(one, worker_id=f"w{n:03}", server_id=f"s{n:03}") for n in range(150)
    }
    view.columns.refresh(view, NOW)
    row = view.columns.workers.get("w149")
    assert row is not None
    assert view.columns.total_bytes[row] == one.memory_total_bytes
    assert view.columns.servers.ids[view.columns.server[row]] == "s149"


def test_labels_that_nobody_has_any_more_are_forgotten() -> None:
    view, _ = read(WORDS)
    view.columns.refresh(view, NOW)
    for number in range(1000):
        view.workers["a0"] = msgspec.structs.replace(view.workers["a0"], labels={"seen": str(number)})
        view.changed = (["a0"], [])
        view.columns.refresh(view, NOW)
    assert len(view.columns.label_sets.values) <= 300
    row, other = view.columns.workers.get("a0"), view.columns.workers.get("a1")
    assert row is not None and other is not None
    assert ("seen", "999") in view.columns.label_sets.values[view.columns.labels[row]]
    assert ("gpu", "h200") in view.columns.label_sets.values[view.columns.labels[other]]


def test_ranks_follow_the_order_of_ids() -> None:
    view, _ = read(WORDS)
    view.columns.refresh(view, NOW)
    ids = view.columns.workers.ids
    ranks = view.columns.workers.ranks()
    assert sorted(ids) == [ids[row] for row in ranks.argsort()]
