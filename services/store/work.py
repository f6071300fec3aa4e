"""What callers want, and the pieces of work that bring it. Pure; types and how far they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, TypeAlias

from services.store.events import PRIORITY_OPERATOR, PRIORITY_PREFETCH, PRIORITY_USER, Message, ReplyHandle
from shared.contracts.residency import Acquire, Export, Import, Prefetch, Progress, Source, Verify

PROGRESS_INTERVAL_S: Final = 0.1  # between two progress hints of one piece of work
ETA_AFTER_S: Final = 0.05  # an estimate stands on at least this much time and two chunks of this work's own bytes

WantKey: TypeAlias = tuple[object, ...]
Wish: TypeAlias = Acquire | Import | Prefetch | Verify | Export


@dataclass(slots=True)
class Waiter:
    """A call that is open: a long poll that hears something at `deadline` at the latest."""

    reply: ReplyHandle
    deadline: float


@dataclass(slots=True, eq=False)
class Want:
    """Equal calls that have not had their result yet. Either `work` brings it, or it is the `outcome`.

    Several callers may wait with equal messages (two replicas of one deployment in one worker). A want without waiters
    is between two polls until `lapses_at`. `found` is the tier where an acquire found its checkpoint. Of its bytes
    `there_bytes` were there when it was asked for (`asked_at`); `begun_at` is when the first of its works moved any.
    """

    key: WantKey
    message: Wish
    source: Source
    checkpoint_id: str = ""
    asked_at: float = 0.0
    lapses_at: float = 0.0
    waiters: list[Waiter] = field(default_factory=list)
    work: Work | None = None
    outcome: Message | None = None
    found: str = "ssd"
    import_s: float = 0.0
    remote_bytes: int = 0
    read_s: float = 0.0
    begun_at: float | None = None
    there_bytes: int = 0

    @property
    def priority(self) -> int:
        """Who goes first."""
        match self.message:
            case Acquire():
                return PRIORITY_USER
            case Prefetch():
                return PRIORITY_PREFETCH
            case _:
                return PRIORITY_OPERATOR

    @property
    def in_dram(self) -> bool:
        """Whether it is about the DRAM tier."""
        return isinstance(self.message, Acquire) or (isinstance(self.message, Prefetch) and self.message.tier == "dram")

    @property
    def arriving(self) -> bool:
        """Whether a lease on bytes that are still on their way will do."""
        return isinstance(self.message, Acquire) and self.message.arriving

    @property
    def label(self) -> str:
        """The deployment whose clients hear of the progress, or ""."""
        return self.message.deployment if isinstance(self.message, Acquire | Import) else ""


@dataclass(slots=True, eq=False)
class Work:
    """A piece of work, queued or under way: who wants it and how far it is. `number` is the order of arrival.

    `prepared_s` of its own went before its first byte: a look at the source.
    """

    job: str
    number: int
    priority: int
    phase: str
    total_bytes: int = 0
    done_bytes: int = 0
    started_at: float | None = None
    prepared_s: float = 0.0
    labels: dict[str, None] = field(default_factory=dict)
    wants: dict[WantKey, Want] = field(default_factory=dict)
    published_at: float = -1e9

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts work into the order in which it begins."""
        return (self.priority, self.number)

    @property
    def begun(self) -> bool:
        """Whether bytes move."""
        return self.started_at is not None

    @property
    def left_bytes(self) -> int:
        """What it has yet to move, as far as known."""
        return max(0, self.total_bytes - self.done_bytes)

    def progress(self, now: float, chunk_bytes: int) -> Progress:
        """How far it is; an estimate only from this work's own bytes, and only from enough of them."""
        if self.started_at is None:
            return Progress(phase="queued", total_bytes=self.total_bytes)
        eta_s: float | None = None
        seconds = now - self.started_at
        if self.done_bytes >= 2 * chunk_bytes and seconds >= ETA_AFTER_S:
            eta_s = max(0, self.total_bytes - self.done_bytes) * seconds / self.done_bytes
        return Progress(phase=self.phase, done_bytes=self.done_bytes, total_bytes=self.total_bytes, eta_s=eta_s)
