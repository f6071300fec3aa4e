"""The picture in columns, for bounds over all workers at once: arrays over workers and servers, rows reused. Pure.

A decision about thousands of workers cannot look at each of them closely. What a close look could find at best is
computed here for all; only rows whose worker or server has changed are written anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.scheduler.terms import Tenant
from services.scheduler.view import TIERS, View, labels_of
from shared.contracts.records import Phase

FIRST_ROWS: Final = 64
MOST_UNUSED: Final = 256  # sets of labels that are remembered though nobody has them

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Rows:
    """Which id stands in which row; rows of what is gone are given to who comes next."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._ranks: Ints | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def get(self, id: str) -> int | None:
        """Its row, if it has one."""
        return self._rows.get(id)

    def add(self, id: str) -> int:
        """Its row, a new one if it has none."""
        row = self._rows.get(id)
        if row is not None:
            return row
        self._ranks = None
        if self._free:
            row = self._free.pop()
            self.ids[row] = id
        else:
            row = len(self.ids)
            self.ids.append(id)
        self._rows[id] = row
        return row

    def remove(self, id: str) -> int | None:
        """Free its row."""
        row = self._rows.pop(id, None)
        if row is not None:
            self.ids[row] = ""
            self._free.append(row)
            self._ranks = None
        return row

    def ranks(self) -> Ints:
        """Per row, the place of its id in the order of ids."""
        if self._ranks is None:
            order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
            self._ranks = np.empty(len(self.ids), np.int64)
            self._ranks[order] = np.arange(len(order))
        return self._ranks


T = TypeVar("T")


class Classes(Generic[T]):
    """Small numbers for values of which there are few: kinds of device, sets of labels."""

    def __init__(self) -> None:
        self.values: list[T] = []
        self._numbers: dict[T, int] = {}

    def number(self, value: T) -> int:
        """The number of a value."""
        found = self._numbers.get(value)
        if found is None:
            found = self._numbers[value] = len(self.values)
            self.values.append(value)
        return found


def _grown(column: NDArray, rows: int) -> NDArray:  # type: ignore[type-arg]
    wider = np.zeros((max(FIRST_ROWS, 2 * rows), *column.shape[1:]), column.dtype)
    wider[: len(column)] = column
    return wider


class Columns:
    """See the module. Bytes, counts, and monotonic seconds (`_at`).

    Per worker: `there`, `ready`, `gangs`, `device` and `labels` (classes), `server` (row), `total_bytes`, `free_bytes`,
    `places` (replicas that it could still have), `replicas`; of its tenants that run nothing, `idle_bytes` and
    `idle_places` together, `idle_at`, since when the one that is idle longest is; of those that run something,
    `ends_at`, when the first is expected to end, `resume_s` of the one that is moved soonest (both infinite without
    one), and `parkable`.

    Per server: `up`, `dram_bytes` and `ssd_bytes` (capacities), `chunk_bytes`, `pool_bytes` (free for good), and per
    tier `free_at` (of the lane of the load queue), `latency_s`, `byte_s` (seconds per byte), `beside_at` (until when
    the other lane is busy) and `share` (of that time, by which a load is held up); `slow`: how many times as long as
    elsewhere a worker's own work takes. `arriving` and
    `quarantined` map checkpoints to the servers where they are on their way (or wait for it), or set aside.
    """

    def __init__(self) -> None:
        self.workers = Rows()
        self.servers = Rows()
        self.devices: Classes[str] = Classes()
        self.label_sets: Classes[tuple[tuple[str, str], ...]] = Classes()
        self.arriving: dict[str, dict[str, None]] = {}
        self.quarantined: dict[str, dict[str, None]] = {}
        self._noted: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._server_labels: dict[str, Mapping[str, str]] = {}
        self._labelled: dict[int, tuple[str, Mapping[str, str], Mapping[str, str]]] = {}  # by row of the worker
        for name in ("there", "ready", "gangs", "parkable", "up"):
            setattr(self, name, np.zeros(FIRST_ROWS, np.bool_))
        for name in (
            "device", "labels", "server", "total_bytes", "free_bytes", "places", "replicas", "idle_bytes",
            "idle_places", "dram_bytes", "ssd_bytes", "chunk_bytes", "pool_bytes",
        ):  # fmt: skip
            setattr(self, name, np.zeros(FIRST_ROWS, np.int64))
        for name in ("idle_at", "ends_at", "resume_s"):
            setattr(self, name, np.zeros(FIRST_ROWS, np.float64))
        self.free_at: Floats = np.zeros((FIRST_ROWS, len(TIERS)))
        self.byte_s: Floats = np.zeros((FIRST_ROWS, len(TIERS)))
        self.latency_s: Floats = np.zeros((FIRST_ROWS, len(TIERS)))
        self.beside_at: Floats = np.zeros((FIRST_ROWS, len(TIERS)))
        self.share: Floats = np.zeros((FIRST_ROWS, len(TIERS)))
        self.slow: Floats = np.ones(FIRST_ROWS)

    there: Bools
    ready: Bools
    gangs: Bools
    parkable: Bools
    up: Bools
    device: Ints
    labels: Ints
    server: Ints
    total_bytes: Ints
    free_bytes: Ints
    places: Ints
    replicas: Ints
    idle_bytes: Ints
    idle_places: Ints
    dram_bytes: Ints
    ssd_bytes: Ints
    chunk_bytes: Ints
    pool_bytes: Ints
    idle_at: Floats
    ends_at: Floats
    resume_s: Floats

    OF_WORKERS: Final = (
        "there", "ready", "gangs", "parkable", "device", "labels", "server", "total_bytes", "free_bytes", "places",
        "replicas", "idle_bytes", "idle_places", "idle_at", "ends_at", "resume_s",
    )  # fmt: skip
    OF_SERVERS: Final = (
        "up", "dram_bytes", "ssd_bytes", "chunk_bytes", "pool_bytes", "free_at", "byte_s", "latency_s", "beside_at",
        "share", "slow",
    )  # fmt: skip

    def refresh(self, view: View, now: float) -> None:
        """Write the rows of what has changed since the last time."""
        for id in view.changed_servers():
            self._put_server(id, view, now)
        for id in view.changed_workers():
            self._put_worker(id, view, now)

    def rows_on(self, server_row: int) -> list[int]:
        """Rows of the workers of a server, in the order of their ids."""
        size = len(self.workers)
        rows = np.flatnonzero((self.server[:size] == server_row) & self.there[:size]).tolist()
        return sorted(rows, key=self.workers.ids.__getitem__)

    # -- rows --------------------------------------------------------------------------------------------------------

    def _server_row(self, id: str) -> int:
        row = self.servers.add(id)
        if row >= len(self.up):
            for name in self.OF_SERVERS:
                setattr(self, name, _grown(getattr(self, name), row))
        return row

    def _worker_row(self, id: str) -> int:
        row = self.workers.add(id)
        if row >= len(self.there):
            for name in self.OF_WORKERS:
                setattr(self, name, _grown(getattr(self, name), row))
        return row

    def _put_server(self, id: str, view: View, now: float) -> None:
        record = view.servers.get(id)
        if record is None:
            self._note(id, (), ())
            self._noted.pop(id, None)
            self._server_labels.pop(id, None)
            gone = self.servers.get(id)
            if gone is not None:
                self.up[gone] = False
                self._drop_server(gone)
            return
        row = self._server_row(id)
        arriving = {**record.dram_arriving, **record.ssd_arriving, **record.ssd_queue, **record.import_queue}
        self._note(id, tuple(arriving), tuple(record.quarantined))
        self.up[row] = record.phase is Phase.READY
        self.dram_bytes[row] = record.dram_capacity_bytes
        self.ssd_bytes[row] = record.ssd_capacity_bytes
        self.chunk_bytes[row] = max(1, record.chunk_bytes)
        self.pool_bytes[row] = record.dram_capacity_bytes - view.pool_used_bytes(id, now)
        for tier, name in enumerate(TIERS):
            self.free_at[row, tier] = now + view.estimator.wait_s(id, name, now)
            self.byte_s[row, tier] = 1.0 / view.estimator.bandwidth(id, name)
            self.latency_s[row, tier] = view.estimator.latency_s(id, name)
            self.beside_at[row, tier] = now + view.estimator.beside_s(id, name, now)
            self.share[row, tier] = view.estimator.share(name)
        self.slow[row] = view.estimator.slowdown(id)
        if self._server_labels.get(id) != record.labels:
            self._server_labels[id] = dict(record.labels)
            for worker_row in self.rows_on(row):
                self._put_labels(worker_row, view)

    def _drop_server(self, row: int) -> None:
        """A server that is gone keeps its row as long as workers point at it."""
        id = self.servers.ids[row]
        if id not in self._server_labels and not self.rows_on(row):
            self.servers.remove(id)

    def _note(self, id: str, arriving: tuple[str, ...], quarantined: tuple[str, ...]) -> None:
        before = self._noted.get(id, ((), ()))
        if before == (arriving, quarantined):
            return
        self._noted[id] = (arriving, quarantined)
        for index, old, new in ((self.arriving, before[0], arriving), (self.quarantined, before[1], quarantined)):
            for key in old:
                holders = index.get(key, {})
                holders.pop(id, None)
                if not holders:
                    index.pop(key, None)
            for key in new:
                index.setdefault(key, {})[id] = None

    def _put_worker(self, id: str, view: View, now: float) -> None:
        record = view.workers.get(id)
        if record is None:
            gone = self.workers.remove(id)
            if gone is not None:
                self.there[gone] = False
                self._drop_server(int(self.server[gone]))
            return
        row = self._worker_row(id)
        self.there[row] = True
        self.ready[row] = record.phase is Phase.READY
        self.gangs[row] = record.gangs
        self.device[row] = self.devices.number(record.device)
        self.server[row] = self._server_row(record.server_id)
        self.total_bytes[row] = record.memory_total_bytes
        self.free_bytes[row] = record.memory_total_bytes - view.used_bytes(id)
        replicas = view.replica_count(id)
        self.places[row] = record.max_replicas - replicas
        self.replicas[row] = replicas
        self._put_labels(row, view)
        self._put_tenants(row, view.sketch(id), now)

    def _put_labels(self, row: int, view: View) -> None:
        worker = view.workers.get(self.workers.ids[row])
        server = view.servers.get(worker.server_id) if worker is not None else None
        if worker is None or server is None:
            return
        said = (worker.device, worker.labels, server.labels)
        if self._labelled.get(row) != said:
            self._labelled[row] = said
            self.labels[row] = self.label_sets.number(tuple(sorted(labels_of(server, worker).items())))
            if len(self.label_sets.values) > max(MOST_UNUSED, 2 * len(self.workers)):
                self._renumber()

    def _renumber(self) -> None:
        """Forget the sets of labels that nobody has any more."""
        before, self.label_sets = self.label_sets.values, Classes()
        for row in np.flatnonzero(self.there).tolist():
            self.labels[row] = self.label_sets.number(before[self.labels[row]])

    def _put_tenants(self, row: int, tenants: Sequence[Tenant], now: float) -> None:
        idle_bytes, idle_places, idle_s, parkable = 0, 0, 0.0, False
        ends_s = resume_s = math.inf
        for one in tenants:
            if one.running > 0:
                ends_s = min(ends_s, one.remaining_s)
                if one.movable:
                    resume_s = min(resume_s, one.resume_s)
                parkable = parkable or one.parkable
            else:
                idle_bytes += one.memory_bytes
                idle_places += 1
                idle_s = max(idle_s, one.idle_s)
        self.idle_bytes[row] = idle_bytes
        self.idle_places[row] = idle_places
        self.idle_at[row] = now - idle_s
        self.ends_at[row] = now + ends_s
        self.resume_s[row] = resume_s
        self.parkable[row] = parkable
