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
    def id(self) -> str:
        """Its name on the bus."""
        return f"q{self.index}"


class Columns:
    """Ledgers under way: a row per request, filled in when it ends."""

    def __init__(self, deployments: dict[str, int]) -> None:
        self._deployments: Final = deployments
        self._doubles: Final = {name: array("d") for name in DOUBLES}
        self._longs: Final = {name: array("i") for name in LONGS}
        self._shorts: Final = {name: array("h") for name in SHORTS}
        self._outcome: Final = array("b")
        self._tier: Final = array("b")
        self._blank: Final = [(column, 0.0 if name == "arrived_s" else NAN) for name, column in self._doubles.items()]

    def __len__(self) -> int:
        return len(self._outcome)

    def open(self, request: Request) -> None:
        """A row for a request that has arrived."""
        for column, blank in self._blank:
            column.append(blank)
        self._doubles["arrived_s"][-1] = request.arrived_s
        longs = self._longs
        longs["deployment"].append(self._deployments[request.deployment])
        longs["prompt_tokens"].append(request.prompt_tokens)
        longs["output_tokens"].append(request.output_tokens)
        for short in self._shorts.values():
            short.append(0)
        self._outcome.append(Outcome.OPEN)
        self._tier.append(0)

    def close(self, one: Request, outcome: Outcome, now: float) -> None:
        """It is over. Raises AssertionError if it was before."""
        index, doubles, shorts = one.index, self._doubles, self._shorts
        assert self._outcome[index] == Outcome.OPEN, f"request {one.id} ends twice"
        self._outcome[index] = outcome
        self._tier[index] = one.tier
        total_s = now - one.arrived_s
        doubles["startup_s"][index] = one.startup_s
        doubles["ttft_s"][index] = one.ttft_s
        doubles["total_s"][index] = total_s
        doubles["queue_s"][index] = one.queue_s
        doubles["decide_s"][index] = one.decide_s
        doubles["room_s"][index] = one.room_s
        doubles["load_queue_s"][index] = one.load_queue_s
        doubles["move_s"][index] = one.move_s
        doubles["attach_s"][index] = one.attach_s
        doubles["prefill_s"][index] = one.prefill_s
        doubles["pause_s"][index] = one.pause_s
        if one.startup_s == one.startup_s:
            doubles["decode_s"][index] = max(0.0, total_s - one.startup_s - one.prefill_s - one.pause_s)
        shorts["migrations"][index] = one.migrations
        shorts["parks"][index] = one.parks
        shorts["recoveries"][index] = one.recoveries

    def open_rows(self) -> list[int]:
        """Requests that have not ended."""
        return [index for index, outcome in enumerate(self._outcome) if outcome == Outcome.OPEN]

    def ledgers(self) -> Ledgers:
        """All of them."""
        columns: dict[str, Any] = {name: np.array(column, dtype=np.float64) for name, column in self._doubles.items()}
        columns |= {name: np.array(column, dtype=np.int32) for name, column in self._longs.items()}
        columns |= {name: np.array(column, dtype=np.int16) for name, column in self._shorts.items()}
        return Ledgers(
            **columns,
            outcome=np.array(self._outcome, dtype=np.int8),
            tier=np.array(self._tier, dtype=np.int8),
        )


def tier_index(tier: str) -> int:
    """As `Ledgers.tier` says it."""
    return TIERS.index(tier) if tier in TIERS else 0
