"""What the long actions of the store end in, with an importer that does what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from services.store import events as e
from services.store.effects import Effects, Means
from services.store.export import Exporter
from services.store.importer import Importer, Look, Outcome
from services.store.mover import Mover
from services.store.peers import PeerDirectory
from services.store.tier import SsdTier
from services.store.trees import TreeConfig
from shared.contracts.residency import Source
from shared.errors import Code
from tests.unit.store.desk import stored

SOURCE = Source(url="/models/m")


class NoRegistry:
    """A registry in which nobody is."""

    async def all(self, kind: type) -> list[Any]:
        return []


class SaidImporter:
    """An importer that returns or raises what it is told."""

    def __init__(self, run: Callable[[], Outcome]) -> None:
        self._run = run

    def run(self, source: Source, **options: Any) -> Outcome:
        return self._run()

    def look(self, source: Source, checkpoint_id: str = "", peers: tuple[object, ...] = ()) -> Look:
        raise AssertionError("nobody looks here")

    def close(self) -> None:
        pass


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[SsdTier]:
    made = SsdTier(tmp_path / "store")
    yield made
    made.close()


def ends_in(
    tier: SsdTier, run: Callable[[], Outcome], *actions: e.Action, closed: bool = False
) -> list[e.Event | None]:
    """The events of these actions, one after another; with `closed` the store has begun to end before them."""

    async def go() -> list[e.Event | None]:
        disk, net = Mover(None, threads=1, name="disk"), Mover(None, threads=1, name="net")
        means = Means(
            tier=tier,
            disk=disk,
            net=net,
            importer=cast(Importer, SaidImporter(run)),
            exporter=Exporter(tier.root, disk, TreeConfig()),
            peers=PeerDirectory(cast(Any, NoRegistry()), "s1"),
            block_bytes=4096,
            verify_loads=True,
        )
        effects = Effects(means, post=lambda event: None, warn=lambda event, reason: None)
        if closed:
            await effects.close()
        found = [await effects.do(action) for action in actions]
        if not closed:
            await effects.close()
        return found

    return asyncio.run(go())


def test_the_time_that_an_import_stood_behind_others_is_told(tier: SsdTier) -> None:
    outcome = Outcome(stored=stored("c1", 4), existing=False, remote_bytes=7, seconds=9.0, moved_bytes=5, waited_s=6.0)
    (event,) = ends_in(tier, lambda: outcome, e.RunImport(SOURCE, "r1", "import-1", 1))
    assert isinstance(event, e.ImportDone)
    assert (event.seconds, event.waited_s, event.moved_bytes, event.remote_bytes) == (9.0, 6.0, 5, 7)


def test_what_is_wanted_while_the_store_ends_is_refused_and_no_crash(tier: SsdTier) -> None:
    def nothing() -> Outcome:
        raise AssertionError("nothing runs any more")

    imported, read, aside, removed, pinned = ends_in(
        tier,
        nothing,
        e.RunImport(SOURCE, "r1", "import-1", 1),
        e.ReadImage(stored("c1", 1), (), "load-1", 1, 1),
        e.QuarantineCheckpoint("c1", "/store/c1", "corrupt"),
        e.RemoveCheckpoint("c1", "/store/c1"),
        e.SavePins({"c1": "ssd"}),
        closed=True,
    )
    assert isinstance(imported, e.ImportFailed) and imported.failure.code is Code.DRAINING
    assert isinstance(read, e.ReadFailed) and read.failure.code is Code.DRAINING
    assert isinstance(aside, e.CheckpointQuarantined)
    assert isinstance(removed, e.CheckpointRemoved) and removed.failure is not None
    assert pinned is None
