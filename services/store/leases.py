"""Who has been promised which bytes, and until when. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from services.store.events import StopJob
from services.store.holdings import Copy, DramHoldings, Stream
from services.store.outbox import Outbox
from services.store.pool_state import LeaseState
from shared.contracts.residency import Lease, Release, Renew, Renewed

TTL_LIMIT_S: Final = 3600.0
EXPIRIES_SPARE: Final = 1024  # entries of leases that have ended, before they are thrown out all at once


@dataclass(slots=True, eq=False)
class Held:
    """A lease that is alive, on a copy in the pool or on a stream through it.

    `kept_for` is the caller that it was made for while it was between two polls.
    """

    lease: Lease
    holder: str
    ttl_s: float
    expires_at: float
    on: Copy | Stream
    state: LeaseState
    kept_for: Hashable = None


class Leases:
    """Every answer is a lease of its own: a holder's replicas release theirs one by one, and one whose answer was lost
    is never renewed and expires."""

    def __init__(self, out: Outbox, dram: DramHoldings, nonce: str) -> None:
        self._out = out
        self._dram = dram
        self._nonce = nonce
        self.alive: dict[str, Held] = {}
        self.next_lease = 1
        self._kept: dict[Hashable, str] = {}
        self._of: dict[str, int] = {}  # checkpoint id → leases
        self._expiries: list[tuple[float, str]] = []  # a heap; an entry may be too early, never too late
        self._bus_lost = False

    # -- coming and going ----------------------------------------------------------------------------------------

    def new_id(self) -> str:
        """An id that no lease of any life ever had."""
        self.next_lease += 1
        return f"{self._nonce}-{self.next_lease - 1}"

    def add(self, lease: Lease, holder: str, ttl_s: float, on: Copy | Stream, *, kept_for: Hashable = None) -> None:
        """A lease is granted (or was, in an earlier life)."""
        expires_at = self._out.now + ttl_s
        self.alive[lease.lease_id] = Held(lease, holder, ttl_s, expires_at, on, _state(lease, holder, ttl_s), kept_for)
        self._of[on.stored.id] = self._of.get(on.stored.id, 0) + 1
        if isinstance(on, Copy):
            on.leases += 1
        if kept_for is not None:
            self._kept[kept_for] = lease.lease_id
        heapq.heappush(self._expiries, (expires_at, lease.lease_id))
        if len(self._expiries) > 2 * len(self.alive) + EXPIRIES_SPARE:
            self._expiries = [(held.expires_at, lease_id) for lease_id, held in self.alive.items()]
            heapq.heapify(self._expiries)
        self._changed()

    def take_kept(self, caller: Hashable, ttl_s: float) -> Lease | None:
        """The lease that was made for this caller while it was between two polls."""
        held = self.alive.get(self._kept.pop(caller, ""))
        if held is None:
            return None
        held.kept_for = None
        self._keep(held, ttl_s)
        return held.lease

    def renew(self, message: Renew) -> Renewed:
        """Keep those that this holder has; which ones it has not."""
        unknown: list[str] = []
        for lease_id in message.lease_ids:
            held = self.alive.get(lease_id)
            if held is None or held.holder != message.holder:
                unknown.append(lease_id)
            else:
                self._keep(held, message.ttl_s)
        return Renewed(unknown=tuple(unknown))

    def release(self, message: Release) -> bool:
        """The holder needs it no more; whether it had it."""
        held = self.alive.get(message.lease_id)
        if held is None or held.holder != message.holder:
            return False
        self.end(message.lease_id)
        return True

    def end(self, lease_id: str) -> Held:
        """It is void from now on: the bytes may go, once no thread writes to them."""
        held = self.alive.pop(lease_id)
        if held.kept_for is not None and self._kept.get(held.kept_for) == lease_id:
            del self._kept[held.kept_for]
        id = held.on.stored.id
        self._of[id] -= 1
        if not self._of[id]:
            del self._of[id]
        if isinstance(held.on, Copy):
            held.on.leases -= 1
            if held.on.doomed and not held.on.leases:
                self._dram.drop(held.on)
        else:
            held.on.leased = False
            if held.on.running:
                self._out.add(StopJob(held.on.job))
            self._dram.free_stream(held.on)
        self._changed()
        self._out.touch()
        return held

    def void(self, on: Copy | Stream) -> None:
        """The bytes will not come: nobody holds a lease on them any more."""
        for lease_id in [lease_id for lease_id, held in self.alive.items() if held.on is on]:
            self.end(lease_id)

    def of_checkpoint(self, checkpoint_id: str) -> int:
        """Leases on it."""
        return self._of.get(checkpoint_id, 0)

    # -- time ----------------------------------------------------------------------------------------------------

    def bus_lost(self) -> None:
        """Holders cannot renew, and may well use the bytes all the same: nothing expires meanwhile."""
        self._bus_lost = True

    def bus_back(self) -> None:
        """Everybody has the time of a renewal from now on."""
        self._bus_lost = False
        for held in self.alive.values():
            held.expires_at = max(held.expires_at, self._out.now + held.ttl_s)

    def expire(self) -> None:
        """End those whose time is over."""
        while self._expiries and self._expiries[0][0] <= self._out.now and not self._bus_lost:
            _, lease_id = heapq.heappop(self._expiries)
            held = self.alive.get(lease_id)
            if held is None:
                continue
            if held.expires_at > self._out.now:
                heapq.heappush(self._expiries, (held.expires_at, lease_id))
                continue
            self.end(lease_id)
            facts = {"lease_id": lease_id, "holder": held.holder, "checkpoint_id": held.on.stored.id}
            self._out.note("lease.expired", facts)

    def deadline(self) -> float | None:
        """When the next one may expire."""
        if self._bus_lost:
            return None
        while self._expiries and self._expiries[0][1] not in self.alive:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def _keep(self, held: Held, ttl_s: float) -> None:
        ttl_s = bounded_ttl(ttl_s)
        expires_at = self._out.now + ttl_s
        if expires_at < held.expires_at:
            heapq.heappush(self._expiries, (expires_at, held.lease.lease_id))
        held.expires_at = expires_at
        if ttl_s != held.ttl_s:
            held.ttl_s = ttl_s
            held.state = _state(held.lease, held.holder, ttl_s)
            self._changed()

    # -- the next life -------------------------------------------------------------------------------------------

    def states(self) -> tuple[LeaseState, ...]:
        """The leases on copies. What streams through a window is of no use to a next life."""
        return tuple([held.state for held in self.alive.values() if type(held.on) is Copy])

    def restore(self, one: LeaseState, segment: str) -> None:
        """Take over a lease of an earlier life, if its bytes are where it says."""
        id, extents = one.lease.checkpoint.checkpoint_id, one.lease.extents
        claimed = self._dram.copies.get(id)
        for copy in (*([claimed] if claimed is not None else []), *self._dram.doomed.values()):
            if copy.id == id and copy.ready and copy.leased_extents() == extents and one.lease.segment == segment:
                self.add(one.lease, one.holder, bounded_ttl(one.ttl_s), copy)
                return

    def _changed(self) -> None:
        self._out.save_pool()

    def check(self) -> None:
        """Assert that every lease is on bytes that are where it says."""
        counts: dict[str, int] = {}
        per_copy: dict[int, int] = {}
        for lease_id, held in self.alive.items():
            assert held.lease.lease_id == lease_id, "a lease is under a wrong name"
            assert held.lease.checkpoint.checkpoint_id == held.on.stored.id, (
                f"lease {lease_id} is on another checkpoint"
            )
            counts[held.on.stored.id] = counts.get(held.on.stored.id, 0) + 1
            if isinstance(held.on, Stream):
                assert self._dram.streams.get(held.on.job) is held.on, f"the window of lease {lease_id} is gone"
                assert held.on.leased and held.lease.arrival is not None, f"lease {lease_id} has no window"
                assert held.lease.extents == held.on.extents, f"lease {lease_id} is elsewhere"
                continue
            copy = held.on
            per_copy[copy.tag] = per_copy.get(copy.tag, 0) + 1
            alive = self._dram.doomed.get(copy.tag) if copy.doomed else self._dram.copies.get(copy.id)
            assert alive is copy, f"the bytes of lease {lease_id} are gone"
            early = held.lease.arrival is not None and held.lease.arrival.tag == copy.tag
            assert copy.ready or not copy.doomed, f"lease {lease_id} is on bytes that will not come"
            assert copy.ready or early, f"lease {lease_id} is on bytes that are not verified"
            assert copy.leased_extents() == held.lease.extents, f"lease {lease_id} is elsewhere"
        assert counts == self._of, "leases per checkpoint are miscounted"
        for copy in (*self._dram.copies.values(), *self._dram.doomed.values()):
            assert copy.leases == per_copy.get(copy.tag, 0), "leases per copy are miscounted"
        for stream in self._dram.streams.values():
            held_by = [held for held in self.alive.values() if held.on is stream]
            assert len(held_by) == int(stream.leased), "a window has no lease, or several"
        for caller, lease_id in self._kept.items():
            assert lease_id in self.alive, "a lease that does not exist is kept for somebody"
            assert self.alive[lease_id].kept_for == caller, "a lease is kept for two"


def bounded_ttl(ttl_s: float) -> float:
    """What a caller may ask for. NaN and less than nothing is no time at all."""
    return min(ttl_s, TTL_LIMIT_S) if ttl_s > 0 else 0.0


def _state(lease: Lease, holder: str, ttl_s: float) -> LeaseState:
    return LeaseState(lease=lease, holder=holder, ttl_s=ttl_s)
