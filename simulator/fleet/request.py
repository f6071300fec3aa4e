"""A request while it is open, and the columns into which its ledger goes when it is over. Pure."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from simulator.fleet.report import TIERS, Ledgers, Outcome

if TYPE_CHECKING:
    from simulator.fleet.migration import Migration
    from simulator.fleet.replica import Replica

NAN: Final = math.nan
DOUBLES: Final = (
    "arrived_s", "startup_s", "ttft_s", "total_s", "queue_s", "decide_s", "room_s", "load_queue_s", "move_s",
    "attach_s", "prefill_s", "decode_s", "pause_s",
)  # fmt: skip
LONGS: Final = ("deployment", "prompt_tokens", "output_tokens")
SHORTS: Final = ("migrations", "parks", "recoveries")


class Request:
    """`tokens` are the output tokens that its client has; `replica` runs it, `slot` orders what the replica runs.

    `waits_since` is since when it waits in the queue (now, or the last time). `from_step`, `from_tokens`: it has been
    decoding since that step of its replica, from that many tokens on.
    """

    __slots__ = (
        "arrived_s", "attach_s", "decide_s", "decoding", "deployment", "ended", "from_step", "from_tokens", "index",
        "load_queue_s", "migration", "migrations", "move_s", "output_tokens", "parks", "pause_s", "prefill_s",
        "prompt_tokens", "queue_s", "recoveries", "replica", "room_s", "slot", "startup_s", "tier", "tokens", "ttft_s",
        "waiting", "waits_since",
    )  # fmt: skip

    def __init__(self, index: int, deployment: str, prompt_tokens: int, output_tokens: int, now: float) -> None:
        self.index = index
        self.deployment = deployment
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.arrived_s = self.waits_since = now
        self.replica: Replica | None = None
        self.migration: Migration | None = None
        self.ended = self.decoding = self.waiting = False
        self.tokens = self.slot = self.from_tokens = 0
        self.from_step = 0.0
        self.startup_s = self.ttft_s = NAN
        self.queue_s = self.decide_s = self.room_s = self.load_queue_s = self.move_s = self.attach_s = 0.0
        self.prefill_s = self.pause_s = 0.0
        self.tier = self.migrations = self.parks = self.recoveries = 0

    @property
    def begun(self) -> bool:
        """Whether its first prefill has."""
        return self.startup_s == self.startup_s

    @property
    def id(self) -> str:
        """Its name on the bus."""
        return f"q{self.index}"


class Columns:
    """Ledgers under way: a row per request, written when it ends, and put into the order of arrival at the end."""

    def __init__(self, deployments: dict[str, int]) -> None:
        self._deployments: Final = deployments
        self._over: Final = bytearray()  # by request
        self._doubles: Final = array("d")  # rows of `DOUBLES`
        self._longs: Final = array("i")  # rows of the request's number, `LONGS`, `SHORTS`, outcome and tier

    def __len__(self) -> int:
        return len(self._over)

    def open(self) -> int:
        """The number of a request that has arrived."""
        self._over.append(0)
        return len(self._over) - 1

    def close(self, one: Request, outcome: Outcome, now: float) -> None:
        """It is over. Raises AssertionError if it was before."""
        assert not self._over[one.index], f"request {one.id} ends twice"
        self._over[one.index] = 1
        total_s = now - one.arrived_s
        decode_s = max(0.0, total_s - one.startup_s - one.prefill_s - one.pause_s) if one.begun else NAN
        self._doubles.extend(
            (
                one.arrived_s, one.startup_s, one.ttft_s, total_s, one.queue_s, one.decide_s, one.room_s,
                one.load_queue_s, one.move_s, one.attach_s, one.prefill_s, decode_s, one.pause_s,
            )
        )  # fmt: skip
        self._longs.extend(
            (
                one.index, self._deployments[one.deployment], one.prompt_tokens, one.output_tokens,
                one.migrations, one.parks, one.recoveries, outcome, one.tier,
            )
        )  # fmt: skip

    def open_rows(self) -> list[int]:
        """Requests that have not ended."""
        return [index for index, over in enumerate(self._over) if not over]

    def ledgers(self) -> Ledgers:
        """All of them that have ended."""
        doubles = np.array(self._doubles, dtype=np.float64).reshape(-1, len(DOUBLES))
        longs = np.array(self._longs, dtype=np.int32).reshape(-1, 3 + len(LONGS) + len(SHORTS))
        order = np.argsort(longs[:, 0])
        columns: dict[str, Any] = {name: doubles[order, at] for at, name in enumerate(DOUBLES)}
        columns |= {name: longs[order, at] for at, name in enumerate(LONGS, start=1)}
        columns |= {name: longs[order, at].astype(np.int16) for at, name in enumerate(SHORTS, start=1 + len(LONGS))}
        return Ledgers(**columns, outcome=longs[order, -2].astype(np.int8), tier=longs[order, -1].astype(np.int8))


def tier_index(tier: str) -> int:
    """As `Ledgers.tier` says it."""
    return TIERS.index(tier) if tier in TIERS else 0
