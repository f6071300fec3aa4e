"""Hundreds of migrations at random moments in random directions: every stream is the one that nobody disturbed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import pytest

from tests.builders.fleet import Fleet
from tests.builders.load import Load, make_calls
from tests.builders.remains import until_nothing_remains
from tests.builders.streams import Twins
from tests.e2e.test_migration import WORKERS, migrate

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

CLIENTS, MOVERS = 16, 4
# A request that is over, or on its way already, when its turn comes.
TOO_LATE = ("ended", 404, 409)


class Movers:
    """Threads that move whatever runs, until `wanted` migrations were committed. `answers` counts what they heard."""

    def __init__(self, fleet: Fleet, *, wanted: int, seed: int) -> None:
        self.answers: Counter[str] = Counter()
        self.committed = 0
        self.odd: list[Any] = []
        self._fleet, self._wanted = fleet, wanted
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._move, args=(random.Random(f"{seed} {n}"),), daemon=True)
            for n in range(MOVERS)
        ]
        for thread in self._threads:
            thread.start()

    def _move(self, dice: random.Random) -> None:
        while self.committed < self._wanted and len(self.odd) < 10:
            running = [one for one in self._fleet.requests() if not one.get("migrating_to")]
            if not running:
                continue
            chosen = dice.choice(running)
            to = dice.choice([worker for worker in WORKERS if worker != chosen["worker_id"]])
            status, body = migrate(self._fleet, chosen["request_id"], to, dice.choice(["gateway", "gateway-2"]))
            outcome = body["migrated"]["outcome"] if status == 200 else status
            with self._lock:
                self.answers[str(outcome)] += 1
                self.committed += outcome == "committed"
                if outcome not in ("committed", *TOO_LATE):
                    self.odd.append((status, body))

    def wait(self, timeout_s: float) -> None:
        """Until all have been made."""
        for thread in self._threads:
            thread.join(timeout_s)
            assert not thread.is_alive(), f"only {self.committed} of {self._wanted} after {timeout_s:.0f} s"


def migrate_many(fleet: Fleet, twins: Twins, *, wanted: int, tokens: tuple[int, int], timeout_s: float) -> None:
    """The test itself."""
    calls = make_calls("long", random.Random(wanted), CLIENTS, tokens)
    twins.learn(calls)
    load = Load(fleet.urls, calls, twins, clients=CLIENTS, seed=wanted, usable=lambda _: True, timeout_s=90)
    movers = Movers(fleet, wanted=wanted, seed=wanted)
    try:
        movers.wait(timeout_s)
    finally:
        load.stop()
    assert [outcome.difference for outcome in load.outcomes if outcome.difference] == []
    assert movers.odd == [], movers.answers
    assert movers.committed >= wanted
    ledgers = [
        ledger for outcome in load.outcomes for ledger in outcome.heard.hearth.get("ledgers", [outcome.heard.hearth])
    ]
    # What clients are told agrees with what operators were told.
    assert sum(ledger["migrations"] for ledger in ledgers) == movers.committed
    assert sum(ledger["recoveries"] for ledger in ledgers) == 0
    until_nothing_remains(fleet)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sixty_migrations(fleet: Fleet, twins: Twins) -> None:
    migrate_many(fleet, twins, wanted=60, tokens=(200, 500), timeout_s=120)


@pytest.mark.by_hand
@pytest.mark.timeout(1800)
def test_five_hundred_migrations(fleet: Fleet, twins: Twins) -> None:
    migrate_many(fleet, twins, wanted=500, tokens=(200, 900), timeout_s=900)
