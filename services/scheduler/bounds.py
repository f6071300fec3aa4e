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
DRAM: Final = TIERS.index("dram")
# What has to happen in a place: nothing, an idle replica leaves, somebody who runs does.
FREE, IDLE, BUSY = range(3)

Key = tuple[int, int, int, int, int, int, int]


def ordering(tier: int, streams: bool, replicas: int) -> int:
    """Of places that are otherwise equal: the nearer bytes, the pool that holds them, the emptier worker."""
    return ((2 * tier + streams) << 16) | min(replicas, 0xFFFF)


@dataclass(frozen=True, slots=True)
class Unit:
    """A place to be looked at: a worker, or a server where several have to work together."""

    id: str
    bound: Key

    @property
    def state(self) -> int:
        """What has to happen there, at least."""
        return self.bound[2]


class Bounds:
    """The bounds of one question. `load(server_id, device)` is the exact start without making room.

    What is the same for all workers of a server is worked out per server, and what is the same for all of a server
    with one kind of device, per pair of the two.
    """

    def __init__(self, ask: Ask, view: View, now: float, load: Callable[[str, str], Startup]) -> None:
        columns = view.columns
        self._ask, self._view, self._columns, self._now = ask, view, columns, now
        self._workers, self._servers = len(columns.workers), len(columns.servers)
        self._at = columns.server[: self._workers]
        self._device = columns.device[: self._workers]
        self._devices = columns.devices.values or ["cpu"]
        self._present = self._rows(sorted(view.present(ask.need.deployment)))
        self._free_bytes = columns.free_bytes[: self._workers]
        self._places = columns.places[: self._workers]
        self._pool_free = columns.pool_bytes[: self._servers]
        self._give_own_room()
        self._look_at_servers()
        self._time(load)
        self.asked = self._asked()
        self._sort_out()

    # -- what is asked about ----------------------------------------------------------------------------------------

    @property
    def many(self) -> int:
        """Workers that the question is about."""
        return int(self.asked.sum())

    @property
    def hopeless(self) -> bool:
        """Whether none of them could ever take it, even if it were empty."""
        never = self._never() & self._columns.ready[: self._workers] & self._columns.up[self._at]
        return bool(self.asked.any() and never[self.asked].all())

    @property
    def idle(self) -> bool:
        """Whether anybody who runs nothing is in the way."""
        return bool(len(self._short_rows)) or bool((self._columns.idle_places[self._open] > 0).any())

    def places(self, many: int = MOST_LOOKS) -> list[Unit]:
        """The places that are worth a close look, best bound first, `many` at most."""
        if self._ask.devices > 1:
            return self._servers_of(many)
        chosen, second = self._first(many)
        rows, primary, state = self._open[chosen], self._primary[chosen], self._state[chosen]
        ids = self._columns.workers.ids
        every = (rows.tolist(), primary.tolist(), state.tolist(), second.tolist())
        return [
            Unit(ids[row], (first >> 44, (first >> 2) & 0x3FFFFFFFFFF, what, int(what > FREE), 0, *_apart(then, what)))
            for row, first, what, then in zip(*every, strict=True)
        ]

    def closed(self, many: int) -> list[str]:
        """Workers that were asked about and cannot be, those with the least load time first, hopeless ones last."""
        columns, never = self._columns, self._never()
        shut, looked_at = self.asked.copy(), self._open
        if self._ask.devices > 1:  # where too few are open, none is looked at
            mates = np.bincount(self._at[looked_at], minlength=self._servers)
            looked_at = looked_at[mates[self._at[looked_at]] >= self._ask.devices]
        shut[looked_at] = False
        rows = np.flatnonzero(shut)
        key = self.load_s[rows] + 1e9 * never[rows]
        if len(rows) > many:
            rows = rows[key <= np.partition(key, many - 1)[many - 1]]
        rank = columns.workers.ranks()
        rows = rows[np.lexsort((rank[rows], self.load_s[rows], never[rows]))]
        return [columns.workers.ids[row] for row in rows[:many].tolist()]

    # -- per server ---------------------------------------------------------------------------------------------------

    def _rows(self, ids: Iterable[str]) -> list[int]:
        found = (self._columns.workers.get(id) for id in ids)
        return [row for row in found if row is not None]

    def _server_rows(self, ids: Iterable[str]) -> list[int]:
        found = (self._columns.servers.get(id) for id in ids)
        return [row for row in found if row is not None]

    def _give_own_room(self) -> None:
        """Room that is being made for the owner counts as free."""
        ask, view, columns = self._ask, self._view, self._columns
        owner = ask.owner or ask.need.deployment
        rooms = view.rooms_of(owner)
        if not rooms:
            return
        self._free_bytes, self._places = self._free_bytes.copy(), self._places.copy()
        self._pool_free = self._pool_free.copy()
        for id in rooms:
            row, worker = columns.workers.get(id), view.workers.get(id)
            if row is None or worker is None:
                continue
            self._free_bytes[row] = worker.memory_total_bytes - view.used_bytes(id, but_for=owner)
            self._places[row] = worker.max_replicas - view.replica_count(id, but_for=owner)
            server = view.servers.get(worker.server_id)
            if server is not None:
                used = view.pool_used_bytes(server.server_id, self._now, but_for=owner)
                self._pool_free[self._at[row]] = server.dram_capacity_bytes - used

    def _look_at_servers(self) -> None:
        """The tier, whether it streams, whether the pool is short; the memory that each kind of device needs."""
        ask, view, columns, need = self._ask, self._view, self._columns, self._ask.need
        ids, size = columns.servers.ids, self._servers
        on_ssd = self._server_rows(view.ssd_holders(need.key, need.weight_bytes))
        in_dram = self._server_rows(view.dram_holders(need.key, need.weight_bytes))
        lent = any(columns.up[row] and view.servers[ids[row]].peer_url for row in on_ssd)
        self._tier = np.full(size, TIERS.index("peer" if lent else "remote"), np.int64)
        self._tier[on_ssd] = TIERS.index("ssd")
        self._tier[in_dram] = DRAM
        chunks, capacity = columns.chunk_bytes[:size], columns.dram_bytes[:size]
        pool = -(-max(0, need.weight_bytes) // np.maximum(chunks, 1)) * chunks
        self._streams: Bools = pool > capacity
        self._pool_short: Bools = ~self._streams & (pool > self._pool_free)
        self._pool_short[in_dram] = False
        owner = ask.owner or need.deployment
        for row in np.flatnonzero(self._pool_short & columns.up[:size]).tolist():
            self._pool_short[row] = not view.holds(ids[row], need.key, but_for=owner)
        light = -(-need.kv_bytes // ask.devices)
        full = -(-(need.kv_bytes + need.weight_bytes) // ask.devices)
        by_device = [np.where(self._streams, full, light if name == "cpu" else full) for name in self._devices]
        self._bytes: Ints = np.stack(by_device, axis=1)[self._at, self._device]
        deep = self._streams & (capacity < np.maximum(1, chunks))
        self._small: Bools = deep | (need.weight_bytes > columns.ssd_bytes[:size])

    def _time(self, load: Callable[[str, str], Startup]) -> None:
        """Per worker, the seconds of a start without making room."""
        columns, need, estimator = self._columns, self._ask.need, self._view.estimator
        rows = np.arange(self._servers)
        wait = np.maximum(0.0, columns.free_at[rows, self._tier] - self._now)
        move = columns.latency_s[rows, self._tier] + need.weight_bytes * columns.byte_s[rows, self._tier]
        beside = np.maximum(0.0, columns.beside_at[rows, self._tier] - self._now)
        move, slow = move + columns.share[rows, self._tier] * beside, columns.slow[rows]
        weight = -(-need.weight_bytes // self._ask.devices)
        by_device = []
        for name in self._devices:
            here = estimator.attach_s(name, need.key, weight)
            rest = estimator.attach_rest_s(name, need.key, weight)
            # All of the work that is done while bytes arrive: what a load takes for which next to nothing has to.
            least = estimator.startup("", name, need.key, weight, 1, "ssd", self._now)
            work = least.attach_s + least.move_s if least.attach_s > rest else rest
            moved = wait + np.maximum(move + slow * rest, slow * work)
            by_device.append(np.where(self._tier == DRAM, slow * here, moved))
        load_s = np.stack(by_device, axis=1)
        # Where it is on its way already the columns believe too much.
        exact = dict.fromkeys(columns.arriving.get(need.key, ()))
        exact.update(dict.fromkeys(columns.servers.ids[self._at[row]] for row in self._present))
        for id in exact:
            row = columns.servers.get(id)
            if row is not None and columns.up[row]:
                for device, name in enumerate(self._devices):
                    load_s[row, device] = load(id, name).load_s
        self.load_s: Floats = load_s[self._at, self._device]

    # -- per worker ---------------------------------------------------------------------------------------------------

    def _asked(self) -> Bools:
        """The workers that the question is about."""
        ask, columns = self._ask, self._columns
        there = columns.there[: self._workers]
        asked = there.copy()
        if ask.at:
            row = columns.workers.get(ask.at)
            asked[:] = False
            if row is not None:
                mates = self._at == self._at[row] if ask.devices > 1 else np.arange(self._workers) == row
                asked = there & mates
        asked[self._rows((ask.away_from,))] = False
        return asked

    def _labelled(self) -> Bools:
        wanted = frozenset(self._ask.labels.items())
        fine = np.array([wanted <= frozenset(labels) for labels in self._columns.label_sets.values] or [True])
        return np.asarray(fine[self._columns.labels[: self._workers]], np.bool_)

    def _never(self) -> Bools:
        """Workers that could not take it even if they were empty."""
        columns, size = self._columns, self._workers
        never: Bools = (self._bytes > columns.total_bytes[:size]) | self._small[self._at] | ~self._labelled()
        if self._ask.devices > 1:
            never |= ~columns.gangs[:size]
            mates = np.bincount(self._at[self.asked & ~never], minlength=self._servers)
            never |= mates[self._at] < self._ask.devices
        return never

    def _sort_out(self) -> None:
        """The workers that may be possible, what has to happen there, and their bounds."""
        ask, columns, size, means = self._ask, self._columns, self._workers, self._ask.means
        up = columns.up[: self._servers] & ~self._small
        up[self._server_rows(ask.avoid)] = False
        able = self.asked & columns.ready[:size] & up[self._at] & (self._bytes <= columns.total_bytes[:size])
        if ask.labels:
            able &= self._labelled()
        if ask.devices > 1:
            able &= columns.gangs[:size]
        able[self._present] = False
        able[self._rows(sorted(ask.unwanted))] = False
        left = self._free_bytes - self._bytes
        free = able & (left >= 0) & (self._places > 0)
        some_short = bool(self._pool_short.any())
        pool_short = self._pool_short[self._at] if some_short else np.zeros(0, np.bool_)
        if some_short:
            free &= ~pool_short
        rest = able & ~free
        groups = [(FREE, np.flatnonzero(free))]
        if means.evict:
            idle = rest & (left + columns.idle_bytes[:size] >= 0) & (self._places + columns.idle_places[:size] > 0)
            groups.append((IDLE, np.flatnonzero(idle)))
            rest &= ~idle
        if means.move or means.wait or means.park:
            busy = columns.ends_at[:size] < np.inf
            if some_short:
                busy |= pool_short
            groups.append((BUSY, np.flatnonzero(rest & busy)))
        self._short_rows = pool_short
        self._open: Ints = np.concatenate([rows for _, rows in groups])
        self._state: Ints = np.repeat([what for what, _ in groups], [len(rows) for _, rows in groups])
        self._primary = self._bound_ms() << 2 | self._state
        aside = self._server_rows(columns.quarantined.get(ask.need.key, ()))
        if aside:
            self._primary += np.isin(self._at[self._open], aside).astype(np.int64) << 44

    def _bound_ms(self) -> Ints:
        rows, state, columns = self._open, self._state, self._columns
        seconds = self.load_s[rows] + np.where(state == FREE, 0.0, self._view.estimator.stop_s())
        means = self._ask.means
        if not means.park:
            busy = np.flatnonzero(state == BUSY)
            soon_s = np.full(len(busy), np.inf)
            if means.wait:
                soon_s = np.maximum(0.0, columns.ends_at[rows[busy]] - self._now)
            if means.move:
                soon_s = np.minimum(soon_s, columns.resume_s[rows[busy]])
            if len(self._short_rows):
                soon_s[self._short_rows[rows[busy]]] = 0.0
            seconds[busy] += soon_s
        return _milliseconds(seconds)

    # -- the order --------------------------------------------------------------------------------------------------

    def _second(self, chosen: Ints) -> Ints:
        """What decides between equal bounds, and then the order of ids, in one number."""
        rows, state, columns = self._open[chosen], self._state[chosen], self._columns
        nearer = (2 * self._tier + self._streams)[self._at[rows]] << 16
        nearer |= np.minimum(columns.replicas[rows], 0xFFFF)
        idle_ms = _milliseconds(self._now - columns.idle_at[rows])
        if len(self._short_rows):
            idle_ms[self._short_rows[rows]] = MOST_MS  # those near it may have been idle for longer
        order = np.where(state == IDLE, -idle_ms, nearer)
        return np.asarray((order << 20) | columns.workers.ranks()[rows], np.int64)

    def _first(self, many: int) -> tuple[Ints, Ints]:
        """Which of the open rows have the least bounds, in their order, and what decided between equal ones."""
        primary = self._primary
        chosen = np.arange(len(primary))
        if len(primary) > many:
            chosen = np.flatnonzero(primary <= np.partition(primary, many - 1)[many - 1])
        second = self._second(chosen)
        if len(chosen) > many:  # the last of them are equal so far
            equal = primary[chosen] == primary[chosen].max()
            left = many - int((~equal).sum())
            keep = ~equal | (second <= np.partition(second[equal], left - 1)[left - 1])
            chosen, second = chosen[keep], second[keep]
        sort = np.lexsort((second, primary[chosen]))
        return chosen[sort], second[sort]

    def _servers_of(self, many: int) -> list[Unit]:
        """Servers with enough workers; the bound of one is that of the last worker that it needs."""
        at = self._at[self._open]
        order = np.lexsort((self._primary, at))
        servers, first, counts = np.unique(at[order], return_index=True, return_counts=True)
        enough = counts >= self._ask.devices
        last = order[first[enough] + self._ask.devices - 1]
        ids, rank = self._columns.servers.ids, self._columns.servers.ranks()
        every = (servers[enough].tolist(), self._primary[last].tolist(), self._state[last].tolist())
        found = [
            Unit(ids[row], (key >> 44, (key >> 2) & 0x3FFFFFFFFFF, what, int(what > FREE), 0, -MOST_MS, int(rank[row])))
            for row, key, what in zip(*every, strict=True)
        ]
        return sorted(found, key=lambda unit: unit.bound)[:many]


def _apart(second: int, state: int) -> tuple[int, int]:
    """The two parts of what `_second` has put together; nothing is known of who would have to leave."""
    return (second >> 20 if state < BUSY else -MOST_MS), second & 0xFFFFF


def _milliseconds(seconds: Floats) -> Ints:
    whole: Ints = np.rint(np.minimum(seconds, 1e6) * 1000).astype(np.int64)
    return whole
