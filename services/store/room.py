"""How room is made, and what leaves a tier: victims, removals, quarantine. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Literal, TypeAlias

from services.store.events import (
    CheckpointQuarantined,
    CheckpointRemoved,
    Facts,
    QuarantineCheckpoint,
    RemoveCheckpoint,
    ReplyHandle,
)
from services.store.eviction import Candidate, choose_victims, ranked
from services.store.holdings import Copy, OnSsd
from services.store.tiers import Tiers
from shared.contracts.residency import Done, Extent
from shared.errors import Code, Failure

RETRY_S: Final = 1.0  # above a mark with nothing to evict, it is not worth looking again sooner

Shelf: TypeAlias = Literal["whole", "partial", "quarantined"]
# Victims before anything that is whole, whatever its use: bytes that help nobody now.
_RECENCY: Final[Mapping[Shelf, int]] = {"quarantined": -2, "partial": -1}


class Room:
    """Evicts by the policy of `eviction`, never what is leased, pinned, arriving or being read."""

    def __init__(self, tiers: Tiers, *, dram_high: float, dram_low: float, ssd_high: float, ssd_low: float) -> None:
        self._tiers = tiers
        self._dram_marks = _marks(tiers.pool_bytes, dram_high, dram_low)
        self._ssd_marks = _marks(tiers.ssd.capacity_bytes, ssd_high, ssd_low)
        self._dram_retry_at = self._ssd_retry_at = -1e9
        self._evictions: dict[str, list[ReplyHandle]] = {}  # who waits for a removal

    # -- DRAM ----------------------------------------------------------------------------------------------------

    def dram_candidates(self) -> list[Candidate[str]]:
        """The copies in the pool that may go."""
        tiers, now = self._tiers, self._tiers.out.now
        return [
            Candidate(
                key=id,
                room_bytes=copy.allocated_bytes,
                uses_per_s=tiers.uses.rate(id, now),
                bring_back_s=tiers.speeds.read_s(copy.stored.image_bytes),
                recency=copy.used,
            )
            for id, copy in tiers.dram.copies.items()
            if copy.ready and not copy.leases and tiers.pins.get(id) != "dram"
        ]

    def in_dram(self, size_bytes: int) -> tuple[Extent, ...] | Failure:
        """Extents of whole chunks for this many bytes, after evicting what it takes; none if that would not do."""
        dram, allocator = self._tiers.dram, self._tiers.dram.allocator
        extents = allocator.allocate(size_bytes)
        if extents is not None:
            return extents
        wanted = allocator.chunks_for(size_bytes) * allocator.chunk_bytes
        free = allocator.free_chunks * allocator.chunk_bytes
        candidates = self.dram_candidates()
        victims = choose_victims(candidates, wanted - free)
        if victims is None:
            unused = free + sum(one.room_bytes for one in candidates)
            return Failure(
                code=Code.NO_CAPACITY,
                message=f"The model needs {wanted} bytes of DRAM on server {self._tiers.server_id}; "
                f"{unused} are not in use.",
                retry_after_s=5.0,
            )
        for one in victims:
            self.drop_copy(dram.copies[one.key], "capacity")
        extents = allocator.allocate(size_bytes)
        assert extents is not None, "what was evicted is not free"
        return extents

    def drop_copy(self, copy: Copy, reason: str) -> None:
        """A copy that is whole is not claimed any more."""
        tiers = self._tiers
        tiers.dram.drop(copy)
        tiers.out.save_pool()
        image_bytes = copy.stored.image_bytes
        facts: Facts = {"checkpoint_id": copy.id, "tier": "dram", "image_bytes": image_bytes, "reason": reason}
        tiers.out.note("checkpoint.evicted", facts)
        tiers.out.touch()

    # -- SSD -----------------------------------------------------------------------------------------------------

    def ssd_candidate(self, id: str, on: OnSsd, shelf: Shelf) -> Candidate[tuple[Shelf, str]]:
        """A directory as the policy sees it."""
        tiers, stored = self._tiers, on.stored
        if shelf != "whole":
            return Candidate((shelf, id), stored.stored_bytes, 0.0, 0.0, _RECENCY[shelf])
        back = None if stored.source is None else tiers.speeds.import_s(stored.image_bytes, on.import_bytes_per_s)
        return Candidate((shelf, id), stored.stored_bytes, tiers.uses.rate(id, tiers.out.now), back, on.used)

    def ssd_candidates(self, keep: str = "") -> list[Candidate[tuple[Shelf, str]]]:
        """The directories that may go; `keep` stays."""
        tiers = self._tiers
        shelves: tuple[tuple[Shelf, dict[str, OnSsd]], ...] = (
            ("quarantined", tiers.ssd.quarantined),
            ("partial", tiers.ssd.partial),
            ("whole", tiers.ssd.whole),
        )
        return [
            self.ssd_candidate(id, on, shelf)
            for shelf, held in shelves
            for id, on in held.items()
            if id != keep
            and not on.readers
            and id not in tiers.ssd.going
            and (shelf != "whole" or (not tiers.leases.of_checkpoint(id) and id not in tiers.pins))
            and (shelf != "partial" or id not in tiers.pins)
        ]

    def on_ssd(self, size_bytes: int, *, keep: str = "") -> Failure | None:
        """Begin to remove what it takes for `size_bytes` to fit; nothing if that would not do."""
        ssd = self._tiers.ssd
        needed = ssd.staying_bytes + size_bytes - ssd.capacity_bytes
        if needed <= 0:
            return None
        candidates = self.ssd_candidates(keep)
        victims = choose_victims(candidates, needed)
        if victims is None:
            missing = needed - sum(one.room_bytes for one in candidates)
            return Failure(
                code=Code.NO_CAPACITY,
                message=f"The import needs {size_bytes} bytes on {self._tiers.server_id}; {missing} bytes are missing "
                "in its SSD tier and everything in it is in use.",
                retry_after_s=5.0,
            )
        for one in victims:
            self.remove(*one.key, "capacity")
        return None

    def remove(self, shelf: Shelf, id: str, reason: str) -> None:
        """A directory is not claimed any more and is going to be deleted."""
        tiers = self._tiers
        copy = tiers.dram.copies.get(id)
        if shelf == "whole" and copy is not None and copy.ready:
            self.drop_copy(copy, reason)
        on = tiers.ssd.take(getattr(tiers.ssd, shelf), id)
        self.delete(id, on.stored.directory, on.stored.stored_bytes)
        stored_bytes = on.stored.stored_bytes
        facts: Facts = {"checkpoint_id": id, "tier": "ssd", "stored_bytes": stored_bytes, "reason": reason}
        tiers.out.note("checkpoint.evicted", facts)

    def delete(self, id: str, directory: str, freed_bytes: int) -> None:
        """Delete a directory that nobody claims."""
        self._tiers.ssd.go(id, freed_bytes)
        self._tiers.out.add(RemoveCheckpoint(id, directory))
        self._tiers.out.touch()

    def removed(self, event: CheckpointRemoved) -> None:
        """It is gone: whoever waits for that hears of it."""
        if self._tiers.ssd.gone(event.checkpoint_id):
            for reply in self._evictions.pop(event.checkpoint_id, ()):
                self._tiers.out.answer(reply, event.failure if event.failure is not None else Done())
        self._tiers.out.touch()

    def answer_when_gone(self, id: str, reply: ReplyHandle) -> None:
        """Answer when all that is being removed of this checkpoint is gone; at once if nothing is."""
        if id in self._tiers.ssd.going:
            self._evictions.setdefault(id, []).append(reply)
        else:
            self._tiers.out.answer(reply, Done())

    # -- quarantine ----------------------------------------------------------------------------------------------

    def done_reading(self, on: OnSsd) -> None:
        """A job that read a directory has ended. What was condemned meanwhile goes when it was the last."""
        on.readers -= 1
        if on.condemned and not on.readers:
            self._quarantine(on)

    def condemn(self, on: OnSsd, reason: str) -> None:
        """This directory's bytes are corrupt and cannot be repaired: it is in no tier any more."""
        on.condemned = on.condemned or reason
        copy = self._tiers.dram.copies.get(on.stored.id)
        if copy is not None and copy.ready:
            self.drop_copy(copy, "corrupt")
        if not on.readers:
            self._quarantine(on)

    def _quarantine(self, on: OnSsd) -> None:
        tiers, id = self._tiers, on.stored.id
        if tiers.ssd.whole.get(id) is not on:
            return
        if id in tiers.ssd.quarantined:
            self.remove("quarantined", id, "corrupt")
        tiers.ssd.take(tiers.ssd.whole, id)
        tiers.ssd.put(replace(on.stored, quarantined=on.condemned), next(tiers.numbers))
        tiers.ssd.go(id, 0)
        tiers.out.add(QuarantineCheckpoint(id, on.stored.directory, on.condemned))
        tiers.out.note("checkpoint.quarantined", {"checkpoint_id": id, "reason": on.condemned})
        tiers.out.touch()

    def set_aside(self, event: CheckpointQuarantined) -> None:
        """A quarantined directory has its place."""
        id, ssd = event.checkpoint_id, self._tiers.ssd
        on = ssd.quarantined.get(id)
        if on is not None:
            on.stored = replace(on.stored, directory=event.directory)
        if ssd.gone(id):
            for reply in self._evictions.pop(id, ()):
                self._tiers.out.answer(reply, Done())

    # -- marks ---------------------------------------------------------------------------------------------------

    def relieve(self) -> None:
        """Above a tier's high mark: evict ahead of need down to its low mark, only what can come back."""
        tiers, now = self._tiers, self._tiers.out.now
        high, low = self._dram_marks
        if tiers.dram.used_bytes > high and now >= self._dram_retry_at:
            before = tiers.dram.used_bytes
            in_order = ranked(self.dram_candidates())
            for one in choose_victims(in_order, before - low) or in_order:
                self.drop_copy(tiers.dram.copies[one.key], "mark")
            if tiers.dram.used_bytes > high:
                self._dram_retry_at = now + RETRY_S
        high, low = self._ssd_marks
        if tiers.ssd.staying_bytes > high and now >= self._ssd_retry_at:
            directories = ranked(one for one in self.ssd_candidates() if one.bring_back_s is not None)
            for two in choose_victims(directories, tiers.ssd.staying_bytes - low) or directories:
                self.remove(*two.key, "mark")
            if tiers.ssd.staying_bytes > high:
                self._ssd_retry_at = now + RETRY_S


def _marks(capacity_bytes: int, high: float, low: float) -> tuple[int, int]:
    return int(capacity_bytes * high), int(capacity_bytes * min(high, low))
