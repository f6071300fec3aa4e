"""What a new load would wait for on a server: the two lanes of its store, and what has been commanded since. Pure.

A store reads one image after another from its SSD, and brings one after another from elsewhere; the two go on side by
side, and share disk and processors. Loads that users wait for go before all others, so only they count. What the
store's record does not show yet, but was commanded, is a promise: it counts until the record shows it, or what it was
for is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from shared.contracts.records import ServerRecord

PROMISE_S: Final = 10.0  # a command that shows no effect by then is forgotten
UNSEEN_S: Final = 2.0  # by then the record shows a load whose checkpoint is not known here


@dataclass(slots=True)
class Promise:
    """A load that was commanded at `at`; `key` is its checkpoint ("": not known yet), `seen` in the store's record."""

    key: str
    bytes: int
    tier: str
    at: float
    seen: bool = False


@dataclass(slots=True)
class Lanes:
    """The lanes of one server. Lane "ssd" and lane "import" map checkpoint id → bytes to move, in order; `tiers` has
    from where those come that were commanded here."""

    said_at: float = 0.0
    queues: dict[str, dict[str, int]] = field(default_factory=dict)
    arriving: dict[str, int] = field(default_factory=dict)
    promises: dict[str, Promise] = field(default_factory=dict)
    tiers: dict[str, str] = field(default_factory=dict)

    def said(self, record: ServerRecord, now: float) -> None:
        """What the store says now."""
        self.said_at = now
        self.queues = {"ssd": record.ssd_queue, "import": record.import_queue}
        self.arriving = record.dram_arriving
        if self.tiers:
            expected = {one.key for one in self.promises.values()}
            lanes = (record.ssd_queue, record.import_queue)
            self.tiers = {
                key: tier for key, tier in self.tiers.items() if key in expected or any(key in queue for queue in lanes)
            }
        if not self.promises:
            return
        for id, one in list(self.promises.items()):
            if one.key in record.ssd_queue or one.key in record.import_queue:
                one.seen = True
            elif one.seen or (one.key and one.key in record.dram) or (not one.key and now - one.at > UNSEEN_S):
                del self.promises[id]  # its bytes are there, or will not come

    def promise(self, replica_id: str, key: str, size_bytes: int, tier: str, now: float) -> None:
        """A load was commanded."""
        self.promises = {id: one for id, one in self.promises.items() if now - one.at <= PROMISE_S or one.seen}
        shown = any(key in queue for queue in self.queues.values())
        self.promises[replica_id] = Promise(key, size_bytes, tier, now, seen=shown)
        if key:
            self.tiers[key] = tier

    def ahead(self, lane: str, now: float, key: str = "") -> tuple[dict[str, int], list[Promise]]:
        """What this lane has yet to move before a new load begins: bytes by checkpoint, by the store's last word, and
        promises, oldest first. A load of checkpoint `key` that stands in the lane waits for what stands before it only.
        """
        shown: dict[str, int] = {}
        for id, size_bytes in self.queues.get(lane, {}).items():
            if id == key:
                return shown, []
            shown[id] = size_bytes
        unseen: dict[str, Promise] = {}
        for id, one in self.promises.items():
            if one.seen or lane_of(one.tier) != lane or now - one.at > PROMISE_S or (key and one.key == key):
                continue
            unseen.setdefault(one.key or id, one)
        return shown, list(unseen.values())

    def tier_of(self, key: str, default: str) -> str:
        """From where a checkpoint in a lane comes, as it was commanded."""
        return self.tiers.get(key, default)


def lane_of(tier: str) -> str:
    """The lane that a load from this tier takes."""
    return "ssd" if tier == "ssd" else "import"


def other_lane(tier: str) -> str:
    """The lane beside that."""
    return "import" if tier == "ssd" else "ssd"
