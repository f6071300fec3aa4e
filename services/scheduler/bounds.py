"""In which order places are looked at closely: what each could be at best, for all of them at once. Pure.

A bound is never above what the close look finds, and equal to it where nobody has to leave; so whoever looks in this
order may stop as soon as the best that was found is no worse than the next bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.scheduler.columns import Bools, Floats, Ints
from services.scheduler.terms import Ask, Startup
from services.scheduler.view import TIERS, View

MOST_LOOKS: Final = 64
MOST_MS: Final = 2**40
# What has to happen in a place: nothing, an idle replica leaves, somebody who runs does; or it cannot be.
FREE, IDLE, BUSY, CLOSED = range(4)

Key = tuple[int, int, int, int, int, int, int]


def ordering(tier: int, streams: bool, replicas: int) -> int:
    """Of places that are otherwise equal: the nearer bytes, the pool that holds them, the emptier worker."""
    return ((2 * tier + streams) << 16) | min(replicas, 0xFFFF)


@dataclass(frozen=True, slots=True)
class Unit:
    """A place to be looked at: a worker, or a server where several have to work together."""

    id: str
    bound: Key


class Bounds:
    """The bounds of one question. `load(server_id, device)` is the exact start without making room."""

    def __init__(self, ask: Ask, view: View, now: float, load: Callable[[str, str], Startup]) -> None:
        columns = view.columns
        self._ask, self._view, self._columns = ask, view, columns
        self._workers = len(columns.workers)
        self._servers = len(columns.servers)
        self._at = columns.server[: self._workers]
        self._place_bytes(now)
        self._time(now, load)
        self._sort_out(now)

    # -- what is asked about ----------------------------------------------------------------------------------------

    @property
    def many(self) -> int:
        """Workers that the question is about."""
        return int(self.asked.sum())

    @property
    def hopeless(self) -> bool:
        """Whether none of them could ever take it, even if it were empty."""
        return bool(self.asked.any() and (self.never & self._ready)[self.asked].all())

    # -- parts ------------------------------------------------------------------------------------------------------

    def _rows(self, ids: Iterable[str]) -> list[int]:
        found = (self._columns.workers.get(id) for id in ids)
        return [row for row in found if row is not None]

    def _server_rows(self, ids: Iterable[str]) -> list[int]:
        found = (self._columns.servers.get(id) for id in ids)
        return [row for row in found if row is not None]

    def _place_bytes(self, now: float) -> None:
        """Per server, the tier and whether the checkpoint streams; per worker, the memory that is needed and free."""
        ask, view, columns, need = self._ask, self._view, self._columns, self._ask.need
        servers, workers = self._servers, self._workers
        on_ssd = self._server_rows(view.ssd_holders(need.key))
        in_dram = self._server_rows(view.dram_holders(need.key))
        ids = columns.servers.ids
        lent = any(columns.up[row] and view.servers[ids[row]].peer_url for row in on_ssd)
        self._tier = np.full(servers, TIERS.index("peer" if lent else "remote"), np.int64)
        self._tier[on_ssd] = TIERS.index("ssd")
        self._tier[in_dram] = TIERS.index("dram")
        chunks = columns.chunk_bytes[:servers]
        pool = (
            -(-need.weight_bytes // np.maximum(chunks, 1)) * chunks if need.weight_bytes > 0 else np.zeros_like(chunks)
        )
        capacity = columns.dram_bytes[:servers]
        self._streams: Bools = pool > capacity
        self._pool_free = columns.pool_bytes[:servers].copy()
        self._free_bytes = columns.free_bytes[:workers].copy()
        self._places = columns.places[:workers].copy()
        self._own_rooms(now)
        self._pool_short: Bools = ~self._streams & (pool > self._pool_free)
        self._pool_short[in_dram] = False
        owner = ask.owner or need.deployment
        for row in np.flatnonzero(self._pool_short & columns.up[:servers]).tolist():
            self._pool_short[row] = not view.holds(ids[row], need.key, owner)
        device_is_cpu = np.array([name == "cpu" for name in columns.devices.values] or [False])
        light = device_is_cpu[columns.device[:workers]] & ~self._streams[self._at]
        full = need.kv_bytes + need.weight_bytes
        self._bytes: Ints = np.where(light, -(-need.kv_bytes // ask.devices), -(-full // ask.devices))
        self._deep: Bools = self._streams & (capacity < np.maximum(1, chunks))

    def _own_rooms(self, now: float) -> None:
        """Room that is being made for the owner counts as free."""
        ask, view, columns = self._ask, self._view, self._columns
        owner = ask.owner or ask.need.deployment
        for id in view.rooms_of(owner):
            row, worker = columns.workers.get(id), view.workers.get(id)
            if row is None or worker is None:
                continue
            self._free_bytes[row] = worker.memory_total_bytes - view.used_bytes(id, owner)
            self._places[row] = worker.max_replicas - view.replica_count(id, owner)
            server = view.servers.get(worker.server_id)
            if server is not None:
                used = max(view.pool_used_bytes(server.server_id, owner), view.pool_leased_bytes(server.server_id, now))
                self._pool_free[self._at[row]] = server.dram_capacity_bytes - used

    def _time(self, now: float, load: Callable[[str, str], Startup]) -> None:
        """Per worker, the seconds of a start without making room."""
        columns, need, estimator = self._columns, self._ask.need, self._view.estimator
        rows = np.arange(self._servers)
        wait = np.maximum(0.0, columns.free_at[rows, self._tier] - now)
        move = need.weight_bytes * columns.byte_s[rows, self._tier]
        weight = -(-need.weight_bytes // self._ask.devices)
        devices = columns.devices.values or ["cpu"]
        of = columns.device[: self._workers]
        here = np.array([estimator.attach_s(name, need.key, weight) for name in devices])[of]
        rest = np.array([estimator.attach_rest_s(name, need.key, weight) for name in devices])[of]
        # All that is done while bytes arrive is what a load takes of which next to nothing has to.
        work = np.array([estimator.startup("", name, need.key, weight, 1, "ssd", now).attach_s for name in devices])[of]
        dram = (self._tier == TIERS.index("dram"))[self._at]
        self.load_s: Floats = np.where(dram, here, wait[self._at] + np.maximum(move[self._at] + rest, work))
        # Where it is on its way already the columns believe too much.
        exact = dict.fromkeys(columns.arriving.get(need.key, ()))
        for id in sorted(self._view.present(need.deployment)):
            worker = self._view.workers.get(id)
            if worker is not None:
                exact[worker.server_id] = None
        for id in exact:
            server_row = columns.servers.get(id)
            if server_row is None or not columns.up[server_row]:
                continue
            for row in columns.rows_on(server_row):
                self.load_s[row] = load(id, devices[columns.device[row]]).load_s

    def _sort_out(self, now: float) -> None:
        """Per worker, whether it is asked about, ready, never possible; what has to happen, and the seconds of that."""
        ask, columns, size = self._ask, self._columns, self._workers
        there = columns.there[:size]
        self.asked: Bools = there.copy()
        if ask.at and ask.devices == 1:
            self.asked[:] = False
            self.asked[self._rows((ask.at,))] = there[self._rows((ask.at,))]
        elif ask.at:
            row = columns.workers.get(ask.at)
            self.asked &= self._at == self._at[row] if row is not None else False
        self.asked[self._rows((ask.away_from,))] = False
        self._ready: Bools = columns.ready[:size] & columns.up[self._at]
        wanted = frozenset(ask.labels.items())
        fine = np.array([wanted <= frozenset(labels) for labels in columns.label_sets.values] or [True])
        self.never: Bools = (
            (self._bytes > columns.total_bytes[:size])
            | (ask.need.weight_bytes > columns.ssd_bytes[self._at])
            | self._deep[self._at]
            | ~fine[columns.labels[:size]]
        )
        if ask.devices > 1:
            self.never |= ~columns.gangs[:size]
            mates = np.bincount(self._at[self.asked & ~self.never], minlength=self._servers)
            self.never |= mates[self._at] < ask.devices
        able = self.asked & self._ready & ~self.never
        able[self._rows(self._view.present(ask.need.deployment))] = False
        able[self._rows(ask.unwanted)] = False
        for id in ask.avoid:
            row = columns.servers.get(id)
            if row is not None:
                able &= self._at != row
        self._set_states(able, now)

    def _set_states(self, able: Bools, now: float) -> None:
        columns, size, means = self._columns, self._workers, self._ask.means
        stop_s = self._view.estimator.stop_s()
        pool_short = self._pool_short[self._at]
        state = np.full(size, CLOSED, np.int64)
        if means.move or means.wait or means.park:
            soon_s = np.maximum(0.0, columns.soon_at[:size] - now)
            if means.park:
                soon_s = np.minimum(soon_s, np.where(np.isfinite(soon_s), 0.0, np.inf))
            busy = able & (np.isfinite(soon_s) | pool_short)
            state[busy] = BUSY
            room_s = np.where(pool_short, 0.0, soon_s) + stop_s
        else:
            room_s = np.zeros(size)
        bytes_left = self._free_bytes - self._bytes
        if means.evict:
            idle = (bytes_left + columns.idle_bytes[:size] >= 0) & (self._places + columns.idle_places[:size] > 0)
            idle &= able
            state[idle] = IDLE
            room_s[idle] = stop_s
        free = able & (bytes_left >= 0) & (self._places > 0) & ~pool_short
        state[free] = FREE
        room_s[free] = 0.0
        self.state: Ints = state
        self._total_ms = _milliseconds(self.load_s + room_s)
        idle_ms = np.where(pool_short, MOST_MS, _milliseconds(now - columns.idle_at[:size]))
        nearer = (2 * self._tier + self._streams)[self._at] << 16
        nearer |= np.minimum(columns.replicas[:size], 0xFFFF)
        self._order: Ints = np.where(state == IDLE, -idle_ms, nearer)
        self._aside = np.zeros(size, np.int64)
        for id in columns.quarantined.get(self._ask.need.key, ()):
            row = columns.servers.get(id)
            if row is not None:
                self._aside[self._at == row] = 1

    # -- the order --------------------------------------------------------------------------------------------------

    def places(self, many: int = MOST_LOOKS) -> list[Unit]:
        """The places that are worth a close look, best bound first, `many` at most."""
        rows = np.flatnonzero(self.state < CLOSED)
        if self._ask.devices > 1:
            return self._servers_of(rows, many)
        rows = self._first(rows, many)
        ids = self._columns.workers.ids
        return [Unit(ids[row], self._bound(row)) for row in rows.tolist()]

    def closed(self, many: int) -> list[str]:
        """Workers that were asked about and cannot be, those with the least load time first, hopeless ones last."""
        rows = np.flatnonzero(self.asked & (self.state == CLOSED))
        if len(rows) > many:
            key = self.load_s + 1e9 * self.never
            rows = rows[key[rows] <= np.partition(key[rows], many - 1)[many - 1]]
        rank = self._columns.workers.ranks()
        rows = rows[np.lexsort((rank[rows], self.load_s[rows], self.never[rows]))]
        return [self._columns.workers.ids[row] for row in rows[:many].tolist()]

    def _primary(self, rows: Ints) -> Ints:
        return (self._aside[rows] << 44) | (self._total_ms[rows] << 2) | self.state[rows]

    def _first(self, rows: Ints, many: int) -> Ints:
        """The rows with the least bounds, in their order."""
        primary = self._primary(rows)
        if len(rows) > many:
            last = np.partition(primary, many - 1)[many - 1]
            rows, primary = rows[primary <= last], primary[primary <= last]
        second = (self._order[rows] << 20) | self._columns.workers.ranks()[rows]
        if len(rows) > many:  # the last of them are equal so far
            equal = primary == primary.max()
            left = many - int((~equal).sum())
            keep = ~equal | (second <= np.partition(second[equal], left - 1)[left - 1])
            rows, primary, second = rows[keep], primary[keep], second[keep]
        return rows[np.lexsort((second, primary))]

    def _bound(self, row: int) -> Key:
        state = int(self.state[row])
        return (
            int(self._aside[row]), int(self._total_ms[row]), state, int(state > FREE), 0, int(self._order[row]),
            int(self._columns.workers.ranks()[row]),
        )  # fmt: skip

    def _servers_of(self, rows: Ints, many: int) -> list[Unit]:
        """Servers with enough workers; the bound of one is that of the last worker that it needs."""
        devices = self._ask.devices
        primary = self._primary(rows)
        rows = rows[np.lexsort((primary, self._at[rows]))]
        servers, first, counts = np.unique(self._at[rows], return_index=True, return_counts=True)
        enough = counts >= devices
        last = rows[first[enough] + devices - 1]
        ids, found = self._columns.servers.ids, []
        rank = self._columns.servers.ranks()
        for server, row in zip(servers[enough].tolist(), last.tolist(), strict=True):
            bound = self._bound(row)
            found.append(Unit(ids[server], (*bound[:3], bound[3], 0, min(bound[5], -MOST_MS), int(rank[server]))))
        return sorted(found, key=lambda unit: unit.bound)[:many]


def _milliseconds(seconds: Floats) -> Ints:
    whole: Ints = np.rint(np.minimum(seconds, 1e6) * 1000).astype(np.int64)
    return whole
