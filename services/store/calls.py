"""What each call asks for: which of its answers is there already, and what work brings the others. Pure."""

from __future__ import annotations

import re
from typing import Final

from services.store.chores import Chores
from services.store.events import InspectSource, ReplyHandle, SavePins, SourceInspected, peers_only
from services.store.holdings import OnSsd
from services.store.imports import RUNNING, Imports
from services.store.loads import Loads
from services.store.room import Room
from services.store.tiers import Tiers
from services.store.wants import WAITERS_LIMIT, Wants
from services.store.work import Want, WantKey, Wish
from shared.contracts.residency import (
    Acquire,
    Done,
    Evict,
    Export,
    Import,
    Inspect,
    Inspected,
    Pin,
    Prefetch,
    Source,
    Verify,
)
from shared.errors import Code, Failure

_LABEL: Final = re.compile(r"[A-Za-z0-9_-]*")
_NOWHERE: Final = Source(url="")


class Calls:
    """Takes calls; each is answered at once or becomes a want."""

    def __init__(self, tiers: Tiers, room: Room, wants: Wants, loads: Loads, imports: Imports, chores: Chores) -> None:
        self._tiers = tiers
        self._room = room
        self._wants = wants
        self._loads = loads
        self._imports = imports
        self._chores = chores
        self._inspections = 0

    # -- into DRAM -----------------------------------------------------------------------------------------------

    def acquire(self, message: Acquire, reply: ReplyHandle) -> None:
        """A lease, at once if the bytes are in DRAM."""
        failure = self._refusal(message.deployment)
        if failure is None and not message.ttl_s > 0:
            failure = Failure(code=Code.INVALID_REQUEST, message="A lease's ttl_s must be positive.", param="ttl_s")
        if failure is not None:
            self._tiers.out.answer(reply, failure)
            return
        key = ("acquire", message.holder, message.checkpoint_id, message.deployment, message.source, message.arriving)
        id = message.checkpoint_id or self._tiers.ssd.of_source(message.source)
        copy = self._tiers.dram.copies.get(id)
        if copy is not None and copy.ready and key not in self._wants.open:
            kept = self._tiers.leases.take_kept(key, message.ttl_s)
            self._tiers.out.answer(reply, kept or self._wants.grant(message, copy))
            return
        want = self._asked(key, message, message.source, id, reply)
        if want is not None and want.work is None:
            self._bring(want, id)
        elif want is not None:
            self._loads.arriving(want)

    def prefetch(self, message: Prefetch, reply: ReplyHandle) -> None:
        """A checkpoint in a tier, ahead of demand."""
        failure = self._refusal("") or _bad_tier(message.tier)
        if failure is None and not message.checkpoint_id and message.source is None:
            failure = Failure(
                code=Code.INVALID_REQUEST,
                message="A prefetch names a checkpoint or a source, or both.",
                param="checkpoint_id",
            )
        if failure is not None:
            self._tiers.out.answer(reply, failure)
            return
        ssd = self._tiers.ssd
        id = message.checkpoint_id or ssd.of_source(message.source or _NOWHERE)
        copy = self._tiers.dram.copies.get(id)
        key = ("prefetch", message.checkpoint_id, message.source, message.tier)
        there = id in ssd.whole if message.tier == "ssd" else copy is not None and copy.ready
        if there and key not in self._wants.open:
            self._tiers.out.answer(reply, Done())
            return
        want = self._asked(key, message, message.source or self._source_of(id), id, reply)
        if want is not None and want.work is None:
            self._bring(want, id)

    def _bring(self, want: Want, id: str) -> None:
        """The work that brings what is not in DRAM (or, for a prefetch to SSD, not there)."""
        on, copy = self._tiers.ssd.whole.get(id), self._tiers.dram.copies.get(id)
        self._tiers.out.touch()
        if on is not None:
            self._loads.want(want, on)
        elif copy is not None and copy.work is not None:
            want.found = "remote"
            self._loads.join(want, copy.work)
            self._loads.arriving(want)
        else:
            self._imports.want(want)

    def _source_of(self, id: str) -> Source:
        for shelf in (self._tiers.ssd.whole, self._tiers.ssd.partial, self._tiers.ssd.quarantined):
            if id in shelf:
                return shelf[id].stored.source or peers_only(id)
        return peers_only(id)

    # -- into the SSD tier ---------------------------------------------------------------------------------------

    def bring_in(self, message: Import, reply: ReplyHandle) -> None:
        """A source in the SSD tier, as it is now."""
        failure = self._refusal(message.deployment)
        if failure is not None:
            self._tiers.out.answer(reply, failure)
            return
        want = self._asked(("import", message.source), message, message.source, "", reply)
        if want is not None:
            if want.label and want.work is not None:
                want.work.labels[want.label] = None
            elif want.work is None:
                self._imports.want(want)

    def inspect(self, message: Inspect, reply: ReplyHandle) -> None:
        """A look at a source."""
        failure = self._refusal("")
        if failure is None and self._inspections >= WAITERS_LIMIT:
            failure = Failure(code=Code.QUEUE_FULL, message="Too many sources are being inspected.")
        if failure is not None:
            self._tiers.out.answer(reply, failure)
            return
        self._inspections += 1
        self._tiers.out.add(InspectSource(message.source, reply))

    def inspected(self, event: SourceInspected) -> None:
        """A look has ended well."""
        found = Inspected(architecture=event.architecture, weight_bytes=event.weight_bytes)
        self.look_ended(event.reply, self._imports.too_large(event.peak_bytes) or found)

    def look_ended(self, reply: ReplyHandle, message: Inspected | Failure) -> None:
        """A look has ended."""
        self._inspections -= 1
        self._tiers.out.answer(reply, message)

    # -- what is there -------------------------------------------------------------------------------------------

    def verify(self, message: Verify, reply: ReplyHandle) -> None:
        """Every chunk compared with its checksum."""
        on = self._stored(message.checkpoint_id, reply)
        if on is None:
            return
        want = self._asked(("verify", message.checkpoint_id), message, _NOWHERE, message.checkpoint_id, reply)
        if want is not None and want.work is None:
            self._chores.verify(want, on)

    def export(self, message: Export, reply: ReplyHandle) -> None:
        """A copy elsewhere."""
        if not message.url:
            failure = Failure(code=Code.INVALID_REQUEST, message="An export needs a url to go to.", param="url")
            self._tiers.out.answer(reply, failure)
            return
        on = self._stored(message.checkpoint_id, reply)
        if on is None:
            return
        key = ("export", message.checkpoint_id, message.url)
        want = self._asked(key, message, _NOWHERE, message.checkpoint_id, reply)
        if want is not None and want.work is None:
            self._chores.export(want, on, message.url)

    def pin(self, message: Pin, reply: ReplyHandle) -> None:
        """Never evict it from this tier; or do again."""
        tiers, id = self._tiers, message.checkpoint_id
        if not message.tier:
            if tiers.pins.pop(id, None) is not None:
                tiers.out.add(SavePins(dict(tiers.pins)))
                tiers.out.touch()
            tiers.out.answer(reply, Done())
            return
        failure = _bad_tier(message.tier)
        if failure is not None:
            tiers.out.answer(reply, failure)
            return
        on = self._stored(id, reply)
        if on is None:
            return
        if message.tier == "dram" and on.stored.image_bytes > tiers.pool_bytes:
            tiers.out.answer(reply, tiers.too_large_for_pool(on.stored.image_bytes))
            return
        if tiers.pins.get(id) != message.tier:
            tiers.pins[id] = message.tier
            tiers.out.add(SavePins(dict(tiers.pins)))
            tiers.out.touch()
            if message.tier == "dram":
                self._loads.promote(id)
        tiers.out.answer(reply, Done())

    def evict(self, message: Evict, reply: ReplyHandle) -> None:
        """Out of this tier, unless somebody needs it there."""
        tiers, id = self._tiers, message.checkpoint_id
        failure = _bad_tier(message.tier) or self._in_use(message)
        if failure is not None:
            tiers.out.answer(reply, failure)
            return
        copy = tiers.dram.copies.get(id)
        if message.tier == "dram":
            if copy is not None:
                self._room.drop_copy(copy, "asked")
            tiers.out.answer(reply, Done())
            return
        on = tiers.ssd.whole.get(id)
        if on is not None and on.readers:
            if not self._chores.evict_after_scrub(message, reply):
                tiers.out.answer(reply, _busy(id))
            return
        if id in tiers.ssd.whole:
            self._room.remove("whole", id, "asked")
        if id in tiers.ssd.partial:
            self._room.remove("partial", id, "asked")
        if id in tiers.ssd.quarantined:
            self._room.remove("quarantined", id, "asked")
        self._room.answer_when_gone(id, reply)

    def _in_use(self, message: Evict) -> Failure | None:
        tiers, id = self._tiers, message.checkpoint_id
        pinned, copy = tiers.pins.get(id, ""), tiers.dram.copies.get(id)
        if pinned == "dram" or (pinned and message.tier == "ssd"):
            return Failure(code=Code.BUSY, message=f"Checkpoint {id} is pinned in tier {pinned!r}; unpin it first.")
        arriving = copy is not None and not copy.ready
        fetched = any(job.state == RUNNING and job.checkpoint_id == id for job in self._imports.jobs.values())
        set_aside = id in tiers.ssd.quarantined and id in tiers.ssd.going
        if tiers.leases.of_checkpoint(id) or arriving or (message.tier == "ssd" and (fetched or set_aside)):
            return _busy(id)
        return None

    # -- small things --------------------------------------------------------------------------------------------

    def _asked(self, key: WantKey, message: Wish, source: Source, id: str, reply: ReplyHandle) -> Want | None:
        """The want of this call, which waits for it now; None when the call has been answered."""
        outcome = self._wants.take_outcome(key)
        if outcome is not None:
            self._tiers.out.answer(reply, outcome)
            return None
        want = self._wants.open.get(key) or self._wants.ask(key, message, source, id)
        if isinstance(want, Failure):
            self._tiers.out.answer(reply, want)
            return None
        self._wants.wait(want, message, reply)
        return want

    def _stored(self, id: str, reply: ReplyHandle) -> OnSsd | None:
        """A whole checkpoint of the SSD tier; None when the call has been answered."""
        failure = self._refusal("")
        on = self._tiers.ssd.whole.get(id)
        if failure is None and (on is None or on.condemned):
            aside = self._tiers.ssd.quarantined.get(id)
            reason = on.condemned if on is not None else aside.stored.quarantined if aside is not None else ""
            failure = Failure(code=Code.NOT_FOUND, message=f"Server {self._tiers.server_id} has no checkpoint {id}.")
            if reason:
                failure = Failure(code=Code.CHECKPOINT_CORRUPT, message=f"Checkpoint {id} is in quarantine: {reason}")
        if failure is not None:
            self._tiers.out.answer(reply, failure)
            return None
        return on

    def _refusal(self, label: str) -> Failure | None:
        if self._tiers.draining:
            return self._tiers.draining_failure()
        if not _LABEL.fullmatch(label):
            return Failure(
                code=Code.INVALID_REQUEST, message=f"{label!r} is no slug of a deployment.", param="deployment"
            )
        return None


def _bad_tier(tier: str) -> Failure | None:
    if tier in ("dram", "ssd"):
        return None
    return Failure(code=Code.INVALID_REQUEST, message=f"{tier!r} is no tier; name dram or ssd.", param="tier")


def _busy(id: str) -> Failure:
    return Failure(code=Code.BUSY, message=f"Checkpoint {id} is in use.")
