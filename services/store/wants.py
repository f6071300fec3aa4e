"""Who waits for what, and what they are told: the long polls. Pure."""

from __future__ import annotations

import math
from typing import Any, Final

from services.store.events import Message, PublishProgress, ReplyHandle
from services.store.holdings import Copy, Stream
from services.store.leases import bounded_ttl
from services.store.tiers import Tiers
from services.store.work import PROGRESS_INTERVAL_S, Waiter, Want, WantKey, Wish, Work
from shared.contracts.residency import Acquire, Arrival, Done, Import, Imported, Lease, Prefetch, Progress, Source
from shared.errors import Code, Failure

INTEREST_S: Final = 5.0  # a caller that polls is still interested for this long after its last poll was answered
WAIT_LIMIT_S: Final = 30.0
WAITERS_LIMIT: Final = 1024  # open wants; open calls of one want; inspections


class Wants:
    """Every call is answered once: with its result, with a failure, or at its time with how far the work is."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self.open: dict[WantKey, Want] = {}
        self._look_at = math.inf  # nothing lapses before this

    # -- asking --------------------------------------------------------------------------------------------------

    def ask(self, key: WantKey, message: Wish, source: Source, checkpoint_id: str) -> Want | Failure:
        """A new want, which its caller has to give some work."""
        if len(self.open) >= WAITERS_LIMIT:
            return Failure(code=Code.QUEUE_FULL, message="Too many calls wait here.")
        now = self._tiers.out.now
        want = self.open[key] = Want(key=key, message=message, source=source, checkpoint_id=checkpoint_id, asked_at=now)
        return want

    def wait(self, want: Want, message: Wish, reply: ReplyHandle) -> None:
        """This call waits for it, unless too many do."""
        if len(want.waiters) >= WAITERS_LIMIT:
            self._tiers.out.answer(reply, Failure(code=Code.QUEUE_FULL, message="Too many calls wait here."))
            return
        want.message = message
        waiter = Waiter(reply, self._tiers.out.now + bounded_wait(message.wait_s))
        want.waiters.append(waiter)
        want.lapses_at = max(want.lapses_at, waiter.deadline + INTEREST_S)
        self._look_at = min(self._look_at, waiter.deadline)

    def attach(self, want: Want, work: Work) -> None:
        """This work is to bring it."""
        if want.work is not None:
            want.begun_at = _begun_at(want)
            want.work.wants.pop(want.key, None)
        elif work.begun:
            want.there_bytes = work.done_bytes
        want.work = work
        work.wants[want.key] = want
        if want.label:
            work.labels[want.label] = None

    def take_outcome(self, key: WantKey) -> Message | None:
        """What a want has come to while its caller was between two polls. Told once."""
        want = self.open.get(key)
        if want is None or want.outcome is None:
            return None
        del self.open[key]
        return want.outcome

    # -- answering -----------------------------------------------------------------------------------------------

    def serve(self, want: Want, copy: Copy) -> None:
        """It is in DRAM (or, for a want that takes that, arriving there)."""
        if not isinstance(want.message, Acquire):
            self._tiers.use(copy.id)  # somebody expects that it will be used
            self.succeed(want, Done())
            return
        message, now = want.message, self._tiers.out.now
        for waiter in want.waiters:
            self._tiers.out.answer(waiter.reply, self.grant(message, copy, want=want))
        if not want.waiters:
            if not copy.ready:
                return
            # Between two polls: it finds its lease at the next one.
            self.grant(message, copy, want=want, ttl_s=max(0.0, want.lapses_at - now), kept_for=want.key)
        self._close(want)

    def serve_stream(self, want: Want, waiter: Waiter, stream: Stream) -> None:
        """One of its callers streams through a window of its own."""
        assert isinstance(want.message, Acquire)
        want.waiters.remove(waiter)
        self._tiers.out.answer(waiter.reply, self.grant(want.message, stream, want=want))
        if not want.waiters:
            self._close(want)

    def succeed(self, want: Want, message: Message, *, keep: bool = False) -> None:
        """It has its result. With `keep` a caller between two polls finds it at the next one."""
        waiting = bool(want.waiters)
        for waiter in want.waiters:
            self._tiers.out.answer(waiter.reply, message)
        want.waiters = []
        if waiting or not keep:
            self._close(want)
            return
        self._close(want)
        self.open[want.key] = want
        want.outcome = message
        self._look_at = min(self._look_at, want.lapses_at)

    def fail(self, want: Want, failure: Failure) -> None:
        """It will not have its result: its callers hear why, now or when they come back."""
        self.succeed(want, failure, keep=True)

    def imported(self, want: Want) -> None:
        """What it wants is in the SSD tier, and that is all that it wants."""
        stored = self._tiers.ssd.whole[want.checkpoint_id].stored
        self._tiers.use(stored.id)
        done = Done() if isinstance(want.message, Prefetch) else Imported(checkpoint=stored.checkpoint)
        self.succeed(want, done)

    def grant(
        self,
        message: Acquire,
        on: Copy | Stream,
        *,
        want: Want | None = None,
        ttl_s: float | None = None,
        kept_for: WantKey | None = None,
    ) -> Lease:
        """A new lease on a copy or a stream; without a `want` it was there already."""
        tiers, stored = self._tiers, on.stored
        tiers.use(stored.id)
        ledger: dict[str, Any] = {"tier": "dram"}
        if want is not None:
            ledger = {
                "tier": want.found,
                "import_s": want.import_s,
                "read_s": want.read_s,
                "remote_bytes": want.remote_bytes,
                "ssd_bytes": stored.image_bytes if want.found == "ssd" or want.read_s else 0,
                **_times(want, stored.image_bytes, tiers.out.now),
            }
        lease = Lease(
            lease_id=tiers.leases.new_id(),
            checkpoint=stored.checkpoint,
            segment=tiers.segment,
            segment_bytes=tiers.segment_bytes,
            extents=on.leased_extents() if isinstance(on, Copy) else on.extents,
            directory=stored.directory,
            dram_bytes=stored.image_bytes,
            arrival=self._arrival(on),
            **ledger,
        )
        ttl_s = bounded_ttl(message.ttl_s) if ttl_s is None else ttl_s
        tiers.leases.add(lease, message.holder, ttl_s, on, kept_for=kept_for)
        tiers.out.touch()
        return lease

    def _arrival(self, on: Copy | Stream) -> Arrival | None:
        if isinstance(on, Copy) and on.ready:
            return None
        return Arrival(
            tag=on.tag,
            chunk_bytes=self._tiers.chunk_bytes,
            board_offset=self._tiers.board_offset,
            image_bytes=on.stored.image_bytes,
            window_chunks=on.window_chunks if isinstance(on, Stream) else 0,
        )

    def _close(self, want: Want) -> None:
        if want.work is not None:
            want.work.wants.pop(want.key, None)
            want.work = None
        self.open.pop(want.key, None)

    # -- time ----------------------------------------------------------------------------------------------------

    def lapse(self) -> None:
        """Polls whose time is up hear how far it is; who does not come back is forgotten."""
        now = self._tiers.out.now
        if now < self._look_at:
            return
        for want in list(self.open.values()):
            late = [waiter for waiter in want.waiters if waiter.deadline <= now]
            if late:
                want.waiters = [waiter for waiter in want.waiters if waiter.deadline > now]
                progress = self.progress(want)
                for waiter in late:
                    self._tiers.out.answer(waiter.reply, progress)
            if not want.waiters and want.lapses_at <= now:
                self._close(want)
        self._look_at = min((self._next(want) for want in self.open.values()), default=math.inf)

    def deadline(self) -> float | None:
        """When the next one is late."""
        return self._look_at if self.open else None

    def drain(self) -> None:
        """Nobody waits any more: they hear that the store is shutting down."""
        for want in list(self.open.values()):
            for waiter in want.waiters:
                self._tiers.out.answer(waiter.reply, self._tiers.draining_failure())
            want.waiters = []
            self._close(want)

    def _next(self, want: Want) -> float:
        return min((waiter.deadline for waiter in want.waiters), default=want.lapses_at)

    # -- progress ------------------------------------------------------------------------------------------------

    def progress(self, want: Want) -> Progress:
        """How far its work is."""
        if want.work is None:
            return Progress(phase="queued")
        return want.work.progress(self._tiers.out.now, self._tiers.chunk_bytes)

    def publish(self, work: Work) -> None:
        """Tell everybody who waits for the deployments of this work how far it is, now and then."""
        now = self._tiers.out.now
        if now - work.published_at < PROGRESS_INTERVAL_S:
            return
        work.published_at = now
        for label in work.labels:
            self._tiers.out.add(PublishProgress(label, work.progress(now, self._tiers.chunk_bytes)))

    def check(self) -> None:
        """Assert that every open call can end."""
        for key, want in self.open.items():
            assert want.key == key, "a want is under a wrong name"
            assert (want.work is None) == (want.outcome is not None), "a want must have either work or an outcome"
            assert want.work is None or want.work.wants.get(key) is want, "a want waits for work that does not know it"
            assert want.outcome is None or not want.waiters, "a want that is over keeps its caller waiting"
            assert self._look_at <= self._next(want), "a caller is not answered in time"


def _begun_at(want: Want) -> float | None:
    """When bytes of it first moved, or its source was looked at for that; None: not yet."""
    if want.begun_at is not None or want.work is None or want.work.started_at is None:
        return want.begun_at
    return max(want.asked_at, want.work.started_at - want.work.prepared_s)


def _times(want: Want, image_bytes: int, now: float) -> dict[str, Any]:
    """What the lease says about how its bytes come."""
    begun_at = _begun_at(want)
    begun_at = now if begun_at is None else begun_at
    return {
        "wait_s": begun_at - want.asked_at,
        "moved_s": now - begun_at,
        "moved_bytes": max(0, image_bytes - want.there_bytes),
    }


def bounded_wait(wait_s: float) -> float:
    """What a caller may ask for; NaN is no time at all."""
    return min(wait_s, WAIT_LIMIT_S) if wait_s > 0 else 0.0


def is_import(want: Want) -> bool:
    """Whether it is over as soon as the checkpoint is in the SSD tier."""
    return isinstance(want.message, Import) or (isinstance(want.message, Prefetch) and want.message.tier == "ssd")
