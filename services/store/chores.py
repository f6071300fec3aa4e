"""Verification, scrubbing and export of what the SSD tier holds, and what corrupt bytes lead to. Pure.

One verification runs at a time and one export. Scrubbing verifies every stored checkpoint once in an interval, spread
evenly over it, when no user waits for a load; an operator's verification takes its place.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Final

from services.store.events import (
    PRIORITY_OPERATOR,
    PRIORITY_SCRUB,
    ExportDone,
    ExportProgressed,
    Facts,
    ReplyHandle,
    RunExport,
    StopJob,
    VerifyCheckpoint,
    VerifyDone,
    VerifyProgressed,
)
from services.store.holdings import OnSsd
from services.store.loads import Loads
from services.store.room import Room
from services.store.sources import redact
from services.store.tiers import Tiers
from services.store.wants import Wants
from services.store.work import Want, Work
from shared.contracts.residency import Done, Evict, Verified
from shared.errors import Code

SCRUB_RETRY: Final = 0.1  # of the interval: what could not be read is tried again after this


@dataclass(slots=True, eq=False, kw_only=True)
class Chore(Work):
    """A verification (`url` is empty) or an export. A scrub that is `stopped` has to leave its place.

    `evictions` wait for its end.
    """

    on: OnSsd
    url: str = ""
    scrub: bool = False
    stopped: bool = False
    evictions: list[tuple[Evict, ReplyHandle]] = field(default_factory=list)


class Chores:
    """The queues of verifications and exports."""

    def __init__(
        self, tiers: Tiers, room: Room, wants: Wants, loads: Loads, *, scrub_interval_s: float, scrub_bytes_per_s: int
    ) -> None:
        self._tiers = tiers
        self._room = room
        self._wants = wants
        self._loads = loads
        self._scrub_interval_s = scrub_interval_s
        self._scrub_bytes_per_s = scrub_bytes_per_s
        self.verifications: dict[str, Chore] = {}  # by checkpoint id
        self.exports: dict[tuple[str, str], Chore] = {}  # by checkpoint id and url
        self._due: list[tuple[float, int, OnSsd]] = []  # a heap: when to verify again, as far as it is still there

    # -- asking --------------------------------------------------------------------------------------------------

    def verify(self, want: Want, on: OnSsd) -> None:
        """Somebody wants a checkpoint verified."""
        id = on.stored.id
        chore = self.verifications.get(id)
        if chore is None:
            chore = self.verifications[id] = self._new(on, PRIORITY_OPERATOR)
        elif chore.scrub:
            # Scrubbing is slow by design; the operator's verification begins afresh.
            self._stop(chore)
        self._wants.attach(want, chore)

    def export(self, want: Want, on: OnSsd, url: str) -> None:
        """Somebody wants a checkpoint copied elsewhere."""
        key = (on.stored.id, url)
        chore = self.exports.get(key)
        if chore is None:
            chore = self.exports[key] = self._new(on, PRIORITY_OPERATOR)
            chore.url = url
        self._wants.attach(want, chore)

    def evict_after_scrub(self, message: Evict, reply: ReplyHandle) -> bool:
        """Let the scrub of a checkpoint end before it is evicted; whether one is under way (and nothing else)."""
        chore = self.verifications.get(message.checkpoint_id)
        if chore is None or not chore.scrub or chore.wants or chore.on.readers > 1:
            return False
        self._stop(chore)
        chore.evictions.append((message, reply))
        return True

    def stored(self, on: OnSsd) -> None:
        """A checkpoint has come into the SSD tier, verified on arrival."""
        if self._scrub_interval_s:
            heapq.heappush(self._due, (self._tiers.out.now + self._scrub_interval_s, next(self._tiers.numbers), on))

    def spread(self) -> None:
        """Nobody knows when the checkpoints of an earlier life were verified: spread them over the interval."""
        every = list(self._tiers.ssd.whole.values())
        for at, on in enumerate(every, start=1) if self._scrub_interval_s else ():
            due = self._tiers.out.now + self._scrub_interval_s * at / len(every)
            heapq.heappush(self._due, (due, next(self._tiers.numbers), on))

    def _new(self, on: OnSsd, priority: int) -> Chore:
        number = next(self._tiers.numbers)
        on.readers += 1
        return Chore(
            job=f"chore-{number}",
            number=number,
            priority=priority,
            phase="reading",
            total_bytes=on.stored.image_bytes,
            on=on,
        )

    def _stop(self, chore: Chore) -> None:
        if not chore.stopped:
            chore.stopped = True
            self._tiers.out.add(StopJob(chore.job))

    # -- order ---------------------------------------------------------------------------------------------------

    def start(self, *, user_waits: bool) -> None:
        """Begin what may begin now."""
        running = next((chore for chore in self.verifications.values() if chore.begun), None)
        if running is not None and running.scrub and len(self.verifications) > 1:
            self._stop(running)
        if running is None:
            chore = min(self.verifications.values(), key=lambda one: one.rank, default=None)
            if chore is None and not user_waits:
                chore = self._next_scrub()
            if chore is not None:
                chore.started_at = self._tiers.out.now
                rate = self._scrub_bytes_per_s if chore.scrub else 0
                self._tiers.out.add(VerifyCheckpoint(chore.on.stored, chore.job, chore.priority, rate))
        if not any(chore.begun for chore in self.exports.values()):
            chore = min(self.exports.values(), key=lambda one: one.rank, default=None)
            if chore is not None:
                chore.started_at = self._tiers.out.now
                self._tiers.out.add(RunExport(chore.on.stored, chore.url, chore.job))

    def _next_scrub(self) -> Chore | None:
        whole = self._tiers.ssd.whole
        while self._due and self._due[0][0] <= self._tiers.out.now:
            _, _, on = heapq.heappop(self._due)
            if whole.get(on.stored.id) is on and not on.condemned:
                chore = self.verifications[on.stored.id] = self._new(on, PRIORITY_SCRUB)
                chore.scrub = True
                return chore
        return None

    def drop_unwanted(self) -> None:
        """What has not begun and nobody wants any more is not begun."""
        for chore in [*self.verifications.values(), *self.exports.values()]:
            if not chore.begun and not chore.wants:
                self._forget(chore)

    def drain(self) -> None:
        """No scrub is awaited any more."""
        for chore in self.verifications.values():
            for _, reply in chore.evictions:
                self._tiers.out.answer(reply, self._tiers.draining_failure())
            chore.evictions = []

    def deadline(self) -> float | None:
        """When the next scrub is due; not while it would have to wait for something else anyway."""
        if self._tiers.draining or not self._due or self._due[0][0] <= self._tiers.out.now:
            return None
        return self._due[0][0]

    # -- results -------------------------------------------------------------------------------------------------

    def verify_progressed(self, event: VerifyProgressed) -> None:
        """A verification is this far."""
        self._progressed(self.verifications.get(event.checkpoint_id), event.done_bytes)

    def export_progressed(self, event: ExportProgressed) -> None:
        """An export is this far."""
        self._progressed(self.exports.get((event.checkpoint_id, event.url)), event.done_bytes)

    def _progressed(self, chore: Chore | None, done_bytes: int) -> None:
        if chore is not None and chore.begun:
            chore.done_bytes = max(chore.done_bytes, min(done_bytes, chore.total_bytes))

    def verified(self, event: VerifyDone) -> list[tuple[Evict, ReplyHandle]]:
        """A verification has ended; the evictions that waited for that."""
        chore = self.verifications.get(event.checkpoint_id)
        if chore is None or not chore.begun:
            return []
        on, failure, evictions = chore.on, event.failure, chore.evictions
        corrupt = failure is not None and failure.code is Code.CHECKPOINT_CORRUPT
        if failure is None:
            done = Verified(chunks=event.chunks, repaired_chunks=event.repaired_chunks)
            for want in list(chore.wants.values()):
                self._wants.succeed(want, done, keep=True)
            facts: Facts = {
                "checkpoint_id": event.checkpoint_id,
                "chunks": event.chunks,
                "repaired_chunks": event.repaired_chunks,
                "scrub": chore.scrub,
            }
            self._tiers.out.note("checkpoint.verified", facts)
        elif corrupt or not chore.stopped:
            for want in list(chore.wants.values()):
                self._wants.fail(want, failure)
            facts = {"checkpoint_id": event.checkpoint_id, "code": failure.code.value, "message": failure.message}
            self._tiers.out.note("verification.failed", facts)
        if self._scrub_interval_s and not corrupt:
            wait_s = self._scrub_interval_s * (1.0 if failure is None else SCRUB_RETRY)
            if chore.scrub:
                heapq.heappush(self._due, (self._tiers.out.now + wait_s, next(self._tiers.numbers), on))
        wants = list(chore.wants.values())
        if corrupt and failure is not None:
            self._loads.refuse_queued(on, failure)
            self._room.condemn(on, failure.message)
        self._forget(chore)
        if wants:  # a scrub has made way for them
            again = self.verifications[event.checkpoint_id] = self._new(on, PRIORITY_OPERATOR)
            for want in wants:
                self._wants.attach(want, again)
        return evictions

    def exported(self, event: ExportDone) -> None:
        """An export has ended."""
        chore = self.exports.get((event.checkpoint_id, event.url))
        if chore is None or not chore.begun:
            return
        for want in list(chore.wants.values()):
            if event.failure is not None:
                self._wants.fail(want, event.failure)
            else:
                self._wants.succeed(want, Done(), keep=True)
        name = "checkpoint.exported" if event.failure is None else "export.failed"
        facts = {"checkpoint_id": event.checkpoint_id, "url": redact(event.url)}
        self._tiers.out.note(name, {**facts, "message": event.failure.message} if event.failure is not None else facts)
        self._forget(chore)

    def _forget(self, chore: Chore) -> None:
        if chore.url:
            del self.exports[(chore.on.stored.id, chore.url)]
        else:
            del self.verifications[chore.on.stored.id]
        self._room.done_reading(chore.on)

    def readers(self) -> list[OnSsd]:
        """The directories that are read or going to be, once for each time."""
        return [chore.on for chore in (*self.verifications.values(), *self.exports.values())]

    def check(self) -> None:
        """Assert that what is verified or exported is there."""
        whole = self._tiers.ssd.whole
        for chore in (*self.verifications.values(), *self.exports.values()):
            assert whole.get(chore.on.stored.id) is chore.on, "a chore about what is not on the SSD"
        assert sum(chore.begun for chore in self.verifications.values()) <= 1, "two verifications at once"
        assert sum(chore.begun for chore in self.exports.values()) <= 1, "two exports at once"
