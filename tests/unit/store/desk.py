"""Drives the store's core by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.store.allocator import Allocator
from services.store.events import (
    LONG,
    AcquireAsked,
    Action,
    Answer,
    Event,
    Note,
    PublishProgress,
    ReadDone,
    ReadImage,
    SavePool,
    StoredCheckpoint,
    TouchRecord,
)
from services.store.pool_state import PoolState
from services.store.residency import Residency
from shared.contracts.records import Phase, ServerRecord
from shared.contracts.residency import Acquire, Checkpoint, Source

CHUNK = 4096


def source(name: str) -> Source:
    return Source(url=f"/models/{name}")


def stored(name: str, chunks: int = 1, **changes: Any) -> StoredCheckpoint:
    checkpoint = Checkpoint(
        checkpoint_id=name,
        architecture="LlamaForCausalLM",
        weight_bytes=chunks * CHUNK,
        parameters=1,
        dtype="float32",
        max_context_tokens=128,
        kv_bytes_per_token=64,
        vocab_tokens=32,
        has_chat_template=True,
    )
    whole = StoredCheckpoint(
        checkpoint=checkpoint,
        directory=f"/store/{name}",
        stored_bytes=chunks * CHUNK + 100,
        image_bytes=chunks * CHUNK,
        source=source(name),
        revision="r1",
        chunk_bytes=CHUNK,
    )
    return replace(whole, **changes)


class Desk:
    """A core with a clock, the answers by caller, and the work that is wanted and not done yet."""

    def __init__(self, *known: StoredCheckpoint, dram_chunks: int = 8, ssd_bytes: int = 1_000_000, **more: Any) -> None:
        self.now = 100.0
        more.setdefault("board_offset", dram_chunks * CHUNK)
        self.core = Residency(
            server_id="s1",
            nonce="n",
            segment="/dev/shm/x",
            segment_bytes=(dram_chunks + 1) * CHUNK,
            allocator=Allocator(chunk_bytes=CHUNK, chunk_count=dram_chunks),
            ssd_capacity_bytes=ssd_bytes,
            stored=known,
            **more,
        )
        self.answers: dict[str, list[Any]] = {}
        self.work: list[Action] = []  # what is to be done
        self.told: list[Action] = []  # what was told, but answers, progress and notes
        self.published: list[PublishProgress] = []
        self.notes: list[Note] = []
        self.saved: PoolState | None = None
        self.last_actions: list[Action] = []

    def post(self, event: Event | None) -> None:
        self.last_actions = self.core.handle(event, self.now)
        for action in self.last_actions:
            match action:
                case Answer(reply, message):
                    self.answers.setdefault(reply, []).append(message)
                case PublishProgress():
                    self.published.append(action)
                case Note():
                    self.notes.append(action)
                case SavePool(state):
                    assert action is self.last_actions[0], "the pool's state is written down before anything else"
                    self.saved = state
                case TouchRecord():
                    pass
                case _ if isinstance(action, LONG):
                    self.work.append(action)
                case _:
                    self.told.append(action)
        self.core.check()

    def after(self, seconds: float) -> None:
        """Let time pass, waking the core at each of its deadlines."""
        end = self.now + seconds
        while (deadline := self.core.deadline()) is not None and deadline <= end:
            assert deadline >= self.now or deadline == 0.0, "a deadline that does not pass"
            self.now = max(self.now, deadline)
            self.post(None)
        self.now = end
        self.post(None)

    def acquire(self, name: str, caller: str = "a", *, holder: str = "w1", wait_s: float = 1.0, ttl_s: float = 10.0,
                id: str | None = None, deployment: str = "", arriving: bool = False) -> Any:  # fmt: skip
        message = Acquire(
            checkpoint_id=name if id is None else id,
            source=source(name),
            holder=holder,
            ttl_s=ttl_s,
            wait_s=wait_s,
            deployment=deployment,
            arriving=arriving,
        )
        self.post(AcquireAsked(message, caller))
        return self.last(caller)

    def last(self, caller: str) -> Any:
        return self.answers.get(caller, [None])[-1]

    def take(self, kind: type[Any]) -> Any:
        """The oldest piece of work that is wanted; it must be of this kind."""
        action = self.work.pop(0)
        assert isinstance(action, kind), action
        return action

    def tells(self, kind: type[Any]) -> list[Any]:
        """What was told of this kind so far."""
        return [action for action in self.told if isinstance(action, kind)]

    def reading(self) -> str:
        """The job of the first read that is under way."""
        return next(action.job for action in self.work if isinstance(action, ReadImage))

    def finish_read(self, seconds: float = 0.1, **more: Any) -> ReadImage:
        action = self.take(ReadImage)
        self.post(ReadDone(action.job, seconds, **more))
        return action

    def record(self) -> ServerRecord:
        return self.core.record(Phase.READY, host="h", pid=1)
