"""The store's core against a model of the world: calls in any order, work that ends in any order and any way.

The model knows what no part of the core knows: what really lies in each chunk of the pool and on the disk, and which
leases their holders believe in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.store.allocator import Allocator
from services.store.events import (
    LONG,
    AcquireAsked,
    Action,
    AdvanceWindow,
    Answer,
    BusBack,
    BusLost,
    CheckpointQuarantined,
    CheckpointRemoved,
    ClearBoard,
    ConsumedHeard,
    DrainAsked,
    Event,
    EvictAsked,
    ExportAsked,
    ExportDone,
    ExportProgressed,
    ImportAsked,
    ImportDone,
    ImportFailed,
    ImportOpened,
    ImportPlanned,
    ImportProgressed,
    InspectAsked,
    InspectFailed,
    InspectSource,
    ListAsked,
    PinAsked,
    PlanImport,
    PrefetchAsked,
    QuarantineCheckpoint,
    ReadDone,
    ReadFailed,
    ReadImage,
    ReadProgressed,
    ReleaseAsked,
    RemoveCheckpoint,
    RenewAsked,
    RunExport,
    RunImport,
    SavePins,
    SavePool,
    SetPriority,
    SourceInspected,
    StopJob,
    StoredCheckpoint,
    VerifyAsked,
    VerifyCheckpoint,
    VerifyDone,
    VerifyProgressed,
)
from services.store.pool_state import PoolState, decode_state, encode_state
from services.store.residency import Residency
from shared.contracts.records import Phase
from shared.contracts.residency import (
    Acquire,
    CheckpointList,
    Consumed,
    Evict,
    Export,
    Extent,
    Import,
    Inspect,
    Lease,
    ListCheckpoints,
    Pin,
    Prefetch,
    Release,
    Renew,
    Renewed,
    Source,
    Verify,
)
from shared.errors import Code, Failure
from tests.unit.store.desk import CHUNK, stored

POOL_CHUNKS = 8
NAMES = [f"m{number}" for number in range(6)]
SIZES = {"m0": 1, "m1": 2, "m2": 3, "m3": 5, "m4": 8, "m5": 12}  # chunks; m5 is larger than the pool
HEARTH_FORM = ("m1", "m3", "m5")  # their id is known before their bytes are here
COPIES = {"copy-of-m2": "m2", "copy-of-m3": "m3"}  # other places with the same checkpoints
PLACES = [*NAMES, *COPIES]
CORRUPT = Failure(code=Code.CHECKPOINT_CORRUPT, message="chunk 0 differs")
UNAVAILABLE = Failure(code=Code.CHECKPOINT_UNAVAILABLE, message="input/output error")
CANCELLED = Failure(code=Code.CANCELLED, message="stopped")

names, places, holders = st.sampled_from(NAMES), st.sampled_from(PLACES), st.sampled_from(["w1", "w2", "w3"])
waits, ttls = st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([0.5, 5.0, 60.0])


@dataclass(eq=False)
class Belief:
    """A lease as its holder sees it: good until `until`, unless the bytes that it waited for did not come."""

    lease: Lease
    holder: str
    ttl_s: float
    until: float


def checkpoint_of(place: str) -> str:
    return COPIES.get(place, place)


def chunks_of(extents: tuple[Extent, ...]) -> list[int]:
    """The chunks of the pool, a started one included."""
    return [at for one in extents for at in range(one.offset // CHUNK, -(-(one.offset + one.length) // CHUNK))]


class Store(RuleBasedStateMachine):
    """The rules."""

    @initialize(
        known=st.sets(names, max_size=3),
        ssd_chunks=st.sampled_from([15, 24, 60]),
        marks=st.booleans(),
        scrubs=st.booleans(),
        board=st.booleans(),
    )
    def begin(self, known: set[str], ssd_chunks: int, marks: bool, scrubs: bool, board: bool) -> None:
        self.now = 1000.0
        self.ssd_bytes = ssd_chunks * CHUNK
        self.more: dict[str, Any] = {"board_offset": POOL_CHUNKS * CHUNK if board else 0}
        if marks:
            self.more |= {"dram_high": 0.8, "dram_low": 0.5, "ssd_high": 0.9, "ssd_low": 0.6}
        if scrubs:
            self.more |= {"scrub_interval_s": 50.0, "scrub_bytes_per_s": 1000}
        self.calls = 0
        self.awaited: dict[str, Callable[[Any], None] | None] = {}
        self.work: list[Action] = []
        self.stopped: set[str] = set()
        self.beliefs: list[Belief] = []
        self.pins: dict[str, str] = {}
        self.saved: PoolState | None = None
        self.bus_lost = self.draining = False
        self.bus_back_at = 0.0
        # What is really there.
        self.disk: dict[str, StoredCheckpoint] = {}  # by directory
        for name in sorted(known):
            whole = stored(name, SIZES[name])
            if sum(one.stored_bytes for one in self.disk.values()) + whole.stored_bytes <= self.ssd_bytes:
                self.disk[whole.directory] = whole
        self.pool: dict[int, tuple[str, int]] = {}  # chunk → (checkpoint, which of its chunks), verified
        self.board: dict[int, bool] = {}  # chunk → whether it was cleared since it was last written to
        self.tags: set[int] = set()
        self.live()

    def live(self) -> None:
        self.core = Residency(
            server_id="s1",
            nonce="n",
            segment="/dev/shm/x",
            allocator=Allocator(chunk_bytes=CHUNK, chunk_count=POOL_CHUNKS),
            ssd_capacity_bytes=self.ssd_bytes,
            stored=list(self.disk.values()),
            restored=self.saved,
            pins=self.pins,
            **self.more,
        )
        self.post(None)

    # -- the shell -----------------------------------------------------------------------------------------------

    def post(self, event: Event | None) -> None:
        actions = self.core.handle(event, self.now)
        self.core.check()
        for index, action in enumerate(actions):
            match action:
                case SavePool(state):
                    assert index == 0
                    self.saved = decode_state(encode_state(state))
                    self.examine_state(state)
                case ClearBoard(extents):
                    for chunk in chunks_of(extents):
                        self.board[chunk] = True
                case Answer(reply, message):
                    self.answered(reply, message)
                case StopJob(job):
                    self.stopped.add(job)
                    assert any(getattr(one, "job", "") == job for one in self.work), "what does not run is stopped"
                case SetPriority(job) | AdvanceWindow(job):
                    assert any(getattr(one, "job", "") == job for one in self.work), "what does not run is changed"
                case SavePins(pins):
                    self.pins = dict(pins)
                case _ if isinstance(action, LONG):
                    self.begins(action)

    def begins(self, action: Action) -> None:
        self.work.append(action)
        if isinstance(action, ReadImage | RunImport):
            chunks = chunks_of(action.extents)
            assert len(chunks) == len(set(chunks))
            if chunks:
                assert action.tag not in self.tags, "a tag is used again"
                self.tags.add(action.tag)
                if self.saved is not None:
                    assert self.saved.next_tag > action.tag, "the next life could use this tag again"
            for chunk in chunks:
                assert self.board.pop(chunk, False), "a chunk is written to whose word was not cleared"
                self.pool.pop(chunk, None)
            for belief in self.believed():
                own = belief.lease.arrival is not None and belief.lease.arrival.tag == action.tag
                assert own or not set(chunks) & set(chunks_of(belief.lease.extents)), "leased bytes are overwritten"
            if self.saved is not None:
                for copy in self.saved.copies:
                    assert not set(chunks) & set(chunks_of(copy.extents)), "the next life would believe these bytes"
        if isinstance(action, ReadImage) and not action.window_chunks:
            assert len(chunks_of(action.extents)) * CHUNK >= action.stored.image_bytes

    def answered(self, reply: str, message: Any) -> None:
        assert reply in self.awaited, "a call is answered twice, or was never made"
        react = self.awaited.pop(reply)
        if react is not None:
            react(message)

    def ask(self, event: Callable[[str], Event], react: Callable[[Any], None] | None = None) -> None:
        self.calls += 1
        reply = f"c{self.calls}"
        self.awaited[reply] = react
        self.post(event(reply))

    def believed(self) -> list[Belief]:
        """Leases that their holders may rely on now."""
        return [one for one in self.beliefs if self.bus_lost or one.until > self.now]

    def leased(self, holder: str, ttl_s: float, lease: Any) -> None:
        if isinstance(lease, Lease):
            self.beliefs.append(Belief(lease, holder, ttl_s, self.now + ttl_s))
            if lease.arrival is None:
                self.examine(lease)

    def examine(self, lease: Lease) -> None:
        id = lease.checkpoint.checkpoint_id
        there = [self.pool.get(chunk) for chunk in chunks_of(lease.extents)]
        assert there == [(id, number) for number in range(SIZES[id])], "leased bytes are not what they should be"
        assert sum(one.length for one in lease.extents) == SIZES[id] * CHUNK

    def examine_state(self, state: PoolState) -> None:
        for copy in state.copies:
            there = [self.pool.get(chunk) for chunk in chunks_of(copy.extents)]
            assert there == [(copy.checkpoint_id, number) for number in range(SIZES[copy.checkpoint_id])]

    # -- calls ---------------------------------------------------------------------------------------------------

    @rule(place=places, holder=holders, wait_s=waits, ttl_s=ttls, by=st.sampled_from("isx"), arriving=st.booleans())
    def acquire(self, place: str, holder: str, wait_s: float, ttl_s: float, by: str, arriving: bool) -> None:
        id = {"i": checkpoint_of(place), "s": "", "x": "other"}[by]
        message = Acquire(checkpoint_id=id, source=Source(url=place), holder=holder, ttl_s=ttl_s, wait_s=wait_s,
                          deployment="d", arriving=arriving)  # fmt: skip
        self.ask(lambda reply: AcquireAsked(message, reply), lambda lease: self.leased(holder, ttl_s, lease))

    @rule(place=places, wait_s=waits)
    def bring_in(self, place: str, wait_s: float) -> None:
        self.ask(lambda reply: ImportAsked(Import(source=Source(url=place), wait_s=wait_s), reply))

    @rule(place=places, wait_s=waits, tier=st.sampled_from(["ssd", "dram"]), by=st.sampled_from("isb"))
    def prefetch(self, place: str, wait_s: float, tier: str, by: str) -> None:
        id = checkpoint_of(place) if by in "ib" else ""
        source = Source(url=place) if by in "sb" else None
        message = Prefetch(checkpoint_id=id, source=source, tier=tier, wait_s=wait_s)
        self.ask(lambda reply: PrefetchAsked(message, reply))

    @rule(name=names, tier=st.sampled_from(["", "", "ssd", "dram"]))
    def pin(self, name: str, tier: str) -> None:
        self.ask(lambda reply: PinAsked(Pin(checkpoint_id=name, tier=tier), reply))

    @rule(name=names, wait_s=waits)
    def verify(self, name: str, wait_s: float) -> None:
        self.ask(lambda reply: VerifyAsked(Verify(checkpoint_id=name, wait_s=wait_s), reply))

    @rule(name=names, wait_s=waits)
    def export(self, name: str, wait_s: float) -> None:
        self.ask(lambda reply: ExportAsked(Export(checkpoint_id=name, url="s3://b/x", wait_s=wait_s), reply))

    @rule(name=names, tier=st.sampled_from(["ssd", "dram"]))
    def evict(self, name: str, tier: str) -> None:
        self.ask(lambda reply: EvictAsked(Evict(checkpoint_id=name, tier=tier), reply))

    @rule(place=places)
    def inspect(self, place: str) -> None:
        self.ask(lambda reply: InspectAsked(Inspect(source=Source(url=place)), reply))

    @rule()
    def look(self) -> None:
        def react(held: CheckpointList) -> None:
            ids = [one.checkpoint.checkpoint_id for one in held.checkpoints]
            assert len(ids) == len(set(ids))

        self.ask(lambda reply: ListAsked(ListCheckpoints(), reply), react)

    @precondition(lambda self: self.beliefs)
    @rule(data=st.data(), holder=holders, ttl_s=ttls)
    def renew(self, data: st.DataObject, holder: str, ttl_s: float) -> None:
        asked = data.draw(st.lists(st.sampled_from(self.beliefs), min_size=1, max_size=3, unique=True))
        expected = [one for one in self.believed() if one in asked and one.holder == holder]

        def react(message: Renewed) -> None:
            for one in asked:
                if one.lease.lease_id in message.unknown:
                    assert one not in expected, "a lease is denied to its holder"
                else:
                    assert one.holder == holder, "a lease is renewed for somebody else"
                    one.ttl_s, one.until = ttl_s, self.now + ttl_s

        message = Renew(holder=holder, lease_ids=tuple(one.lease.lease_id for one in asked), ttl_s=ttl_s)
        self.ask(lambda reply: RenewAsked(message, reply), react)

    @precondition(lambda self: self.beliefs)
    @rule(data=st.data(), holder=holders)
    def release(self, data: st.DataObject, holder: str) -> None:
        belief = data.draw(st.sampled_from(self.beliefs))
        if belief.holder == holder:
            self.beliefs.remove(belief)
        self.post(ReleaseAsked(Release(holder=holder, lease_id=belief.lease.lease_id)))

    @precondition(lambda self: self.beliefs)
    @rule(data=st.data(), chunks=st.integers(0, 20))
    def consume(self, data: st.DataObject, chunks: int) -> None:
        belief = data.draw(st.sampled_from(self.beliefs))
        self.post(ConsumedHeard(Consumed(holder=belief.holder, lease_id=belief.lease.lease_id, chunks=chunks)))

    # -- what usually happens, at once: so that tiers are full and leases alive when something unusual does -----------

    @rule(place=places, holder=holders, ttl_s=st.sampled_from([5.0, 60.0]), arriving=st.booleans())
    def get(self, place: str, holder: str, ttl_s: float, arriving: bool) -> None:
        self.acquire(place, holder, 3.0, ttl_s, "i", arriving)
        self.finish()

    @rule(tier=st.sampled_from(["ssd", "dram"]), place=places)
    def have(self, tier: str, place: str) -> None:
        self.prefetch(place, 3.0, tier, "b")
        self.finish()

    @rule(name=names)
    def rot(self, name: str) -> None:
        """A checkpoint on the disk turns out to be corrupt."""
        self.verify(name, 3.0)
        for action in list(self.work):
            if isinstance(action, VerifyCheckpoint) and action.stored.id == name:
                self.carry_out(action, 0)

    get_more = get
    get_much_more = get
    have_more = have

    @rule()
    def finish(self) -> None:
        for _ in range(20):
            if not self.work:
                break
            self.carry_out(self.work[0], 5)

    # -- time and connections ------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.01, 0.3, 2.0, 8.0]))
    def wait(self, seconds: float) -> None:
        end, wakes = self.now + seconds, 0
        while (deadline := self.core.deadline()) is not None and deadline <= end:
            assert deadline > self.now or wakes < 200, "the core asks for a moment that has passed"
            wakes += 1
            self.now = max(self.now, deadline)
            self.post(None)
        self.now = end
        self.post(None)

    @rule()
    def bus(self) -> None:
        if self.bus_lost:
            for one in self.beliefs:
                if one.until > self.lost_at:
                    one.until = max(one.until, self.now + one.ttl_s)
        else:
            self.lost_at = self.now
            self.beliefs = self.believed()
        self.bus_lost = not self.bus_lost
        self.post(BusLost() if self.bus_lost else BusBack())

    @precondition(lambda self: not self.draining)
    @rule(ends=st.integers(0, 30))
    def drain(self, ends: int) -> None:
        if ends == 0:
            self.draining = True
            self.post(DrainAsked())

    @rule(kill=st.booleans())
    def restart(self, kill: bool) -> None:
        """The store's process ends and comes back: disk, pool and the pool's state are what is left."""
        if not kill:
            self.post(DrainAsked())
            assert not [reply for reply, react in self.awaited.items() if not self.is_work(reply)]
        self.awaited.clear()
        self.work.clear()
        self.stopped.clear()
        self.bus_lost = self.draining = False
        self.disk = {place: one for place, one in self.disk.items() if "incoming" not in place}
        kept = {one.lease.lease_id for one in self.saved.leases} if self.saved is not None else set()
        self.beliefs = [one for one in self.believed() if one.lease.lease_id in kept]
        for one in self.beliefs:
            # The new life gives everybody the time of a renewal, if it still has the checkpoint.
            one.until = self.now + one.ttl_s
        whole = {one.id for one in self.disk.values() if one.arrived_bytes is None and not one.quarantined}
        self.beliefs = [one for one in self.beliefs if one.lease.checkpoint.checkpoint_id in whole]
        self.live()

    def is_work(self, reply: str) -> bool:
        """Calls that end with work that goes on while draining: looks at sources, removals."""
        looks = [one.reply for one in self.work if isinstance(one, InspectSource)]
        return reply in looks or any(isinstance(one, RemoveCheckpoint | VerifyCheckpoint) for one in self.work)

    # -- work ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.work)
    @rule(data=st.data(), luck=st.integers(0, 9))
    def go_on(self, data: st.DataObject, luck: int) -> None:
        """Some piece of work takes a step, ends well, or ends badly."""
        action = data.draw(st.sampled_from(self.work))
        self.carry_out(action, luck)

    go_on_more = go_on
    go_on_and_on = go_on

    def carry_out(self, action: Action, luck: int) -> None:
        if luck == 9 and self.step(action):
            return
        self.work.remove(action)
        stopped = getattr(action, "job", "") in self.stopped
        match action:
            case InspectSource(place, reply):
                bad = luck == 0
                self.post(InspectFailed(reply, UNAVAILABLE) if bad else SourceInspected(reply, "A", 1, CHUNK, CHUNK))
            case PlanImport(place):
                self.plan(place, luck)
            case RunImport(place):
                self.run_import(action, place, luck)
            case ReadImage():
                self.read(action, luck, stopped)
            case VerifyCheckpoint(one):
                assert one.directory in self.disk, "what is not there is verified"
                failure = CANCELLED if stopped else {0: CORRUPT, 1: UNAVAILABLE}.get(luck)
                self.post(VerifyDone(one.id, SIZES[one.id], 0, failure))
            case RunExport(one, url):
                assert one.directory in self.disk, "what is not there is exported"
                self.post(ExportDone(one.id, url, UNAVAILABLE if luck == 0 else None))
            case QuarantineCheckpoint(id, directory, reason):
                one = self.disk.pop(directory)
                place = f"/quarantine/{id}"
                self.disk[place] = replace(one, directory=place, quarantined=reason)
                self.post(CheckpointQuarantined(id, place))
            case RemoveCheckpoint(id, directory):
                self.disk.pop(directory, None)
                self.post(CheckpointRemoved(id))
            case SavePins():
                pass

    def step(self, action: Action) -> bool:
        match action:
            case ReadImage(one):
                self.post(ReadProgressed(action.job, one.image_bytes // 2))
            case RunImport(place):
                id = checkpoint_of(place.url) if place.url in PLACES else place.url.removeprefix("peer:")
                if id in SIZES:
                    self.post(ImportOpened(place, stored(id, SIZES[id], source=Source(url=id))))
                self.post(ImportProgressed(place, CHUNK, SIZES.get(id, 1) * CHUNK))
            case VerifyCheckpoint(one):
                self.post(VerifyProgressed(one.id, CHUNK))
            case RunExport(one, url):
                self.post(ExportProgressed(one.id, url, CHUNK))
            case _:
                return False
        return True

    def plan(self, place: Source, luck: int) -> None:
        id = checkpoint_of(place.url) if place.url in PLACES else place.url.removeprefix("peer:")
        if luck == 0 or id not in SIZES:
            self.post(ImportFailed(place, UNAVAILABLE))
            return
        whole = stored(id, SIZES[id])
        if id in HEARTH_FORM:
            arrived = next((one.arrived_bytes or 0 for one in self.disk.values() if one.id == id), 0)
            self.post(ImportPlanned(place, "r1", whole.image_bytes, whole.stored_bytes, id, arrived))
        else:
            # A conversion: its id is not known, and its size only roughly.
            self.post(ImportPlanned(place, f"r{luck % 2}", whole.image_bytes + CHUNK, whole.stored_bytes + CHUNK))

    def run_import(self, action: RunImport, place: Source, luck: int) -> None:
        id = checkpoint_of(place.url) if place.url in PLACES else place.url.removeprefix("peer:")
        whole = stored(id, SIZES[id], source=Source(url=id))
        there = self.disk.get(whole.directory)
        existing = there is not None and there.arrived_bytes is None
        if luck in (0, 1):
            kept = None
            self.failed(action.tag)
            if id in HEARTH_FORM and not existing:
                self.disk.pop(whole.directory, None)
                if luck == 0:
                    kept = replace(whole, arrived_bytes=CHUNK // 2, stored_bytes=CHUNK)
                    self.disk[whole.directory] = kept
            self.post(ImportFailed(place, UNAVAILABLE, kept))
            return
        self.disk.setdefault(whole.directory, whole)
        if not existing:
            self.disk[whole.directory] = whole
        in_dram = bool(action.extents) and luck != 2
        if in_dram:
            self.fill(id, action.extents)
        else:
            self.failed(action.tag)
        self.post(ImportDone(place, whole, 2**20, 1.0, existing=existing, in_dram=in_dram, peer_bytes=luck % 2 * 2**21))

    def read(self, action: ReadImage, luck: int, stopped: bool) -> None:
        one = action.stored
        assert self.disk[one.directory].arrived_bytes is None, "what is not there is read"
        if stopped and luck < 8:
            self.failed(action.tag)
            self.post(ReadFailed(action.job, CANCELLED))
        elif luck in (0, 1):
            self.failed(action.tag)
            self.post(ReadFailed(action.job, CORRUPT if luck == 0 else UNAVAILABLE))
        else:
            if not action.window_chunks:
                self.fill(one.id, action.extents)
            self.post(ReadDone(action.job, 0.1, waited_s=0.05))

    def fill(self, id: str, extents: tuple[Extent, ...]) -> None:
        for number, chunk in enumerate(chunks_of(extents)[: SIZES[id]]):
            self.pool[chunk] = (id, number)

    def failed(self, tag: int) -> None:
        """The board says so: whoever waited for these bytes knows that its lease is void."""
        if tag:
            early = [one for one in self.beliefs if one.lease.arrival is not None and one.lease.arrival.tag == tag]
            self.beliefs = [one for one in self.beliefs if one not in early]

    # -- what must always be so ----------------------------------------------------------------------------------

    @invariant()
    def disk_has_what_is_claimed(self) -> None:
        if not hasattr(self, "core"):
            return
        record = self.core.record(Phase.READY, host="h", pid=1)
        whole = {one.id for one in self.disk.values() if one.arrived_bytes is None and not one.quarantined}
        assert set(record.ssd) <= whole
        assert set(record.dram) <= set(record.ssd)
        assert sum(one.stored_bytes for one in self.disk.values()) <= self.ssd_bytes, "the disk is fuller than allowed"
        assert record.ssd_used_bytes <= self.ssd_bytes
        assert record.dram_used_bytes <= POOL_CHUNKS * CHUNK
        assert record.leased_bytes <= record.dram_used_bytes

    @invariant()
    def leased_bytes_stay(self) -> None:
        if hasattr(self, "core"):
            for one in self.believed():
                if one.lease.arrival is None:
                    self.examine(one.lease)

    def teardown(self) -> None:
        """Everything ends; nothing is left over."""
        if not hasattr(self, "core"):
            return
        if self.bus_lost:
            self.bus()
        self.post(PinAsked(Pin(checkpoint_id="m0"), self.reply()))
        for name in NAMES:
            self.post(PinAsked(Pin(checkpoint_id=name), self.reply()))
        for _ in range(300):
            self.wait(1.0)
            while self.work:
                self.carry_out(self.work[0], 5)
        assert not self.awaited, "calls were never answered"
        record = self.core.record(Phase.READY, host="h", pid=1)
        assert (record.loads, record.leased_bytes, self.core.lease_count) == (0, 0, 0)
        assert (record.dram_arriving, record.load_queue_bytes) == ({}, 0)
        assert record.dram_used_bytes == sum(record.dram.values())
        assert record.ssd_used_bytes == sum(one.stored_bytes for one in self.disk.values())
        if "scrub_interval_s" not in self.more:
            assert self.core.deadline() is None

    def reply(self) -> str:
        self.calls += 1
        self.awaited[f"c{self.calls}"] = None
        return f"c{self.calls}"


Store.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestStore = Store.TestCase
