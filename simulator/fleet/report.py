"""What a run was: a ledger per request in columns, counters, accesses of DRAM, and utilisation over time. Pure."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

F8 = NDArray[np.float64]
I4 = NDArray[np.int32]


class Outcome(enum.IntEnum):
    """How a request ended."""

    OPEN = 0
    COMPLETE = 1
    TIMED_OUT = 2
    REFUSED = 3
    FAILED = 4


TIERS = ("", "dram", "ssd", "peer", "remote")  # the index is `Ledgers.tier`; "": it met a replica that was ready


@dataclass(slots=True)
class Ledgers:
    """One entry per request, in the order of arrival. Seconds; NaN where it does not apply.

    `startup_s` is from the arrival until the prefill of its first token begins; `ttft_s` until its end; `total_s` until
    the last token (or the failure). Where the start went: `queue_s` waiting for a slot of a replica that was ready, or
    for a place at all, `decide_s` from the hint to the command of the load it waited for, `room_s` making room for
    that, `load_queue_s` in the store's queue, `move_s` the bytes' way, `attach_s`. `prefill_s` is all of its prefills,
    `decode_s` its decoding, `pause_s` the pauses of migrations and recoveries. `tier` is where the load that it waited
    for found the checkpoint (`TIERS`).
    """

    arrived_s: F8
    deployment: I4
    prompt_tokens: I4
    output_tokens: I4
    outcome: NDArray[np.int8]
    startup_s: F8
    ttft_s: F8
    total_s: F8
    queue_s: F8
    decide_s: F8
    room_s: F8
    load_queue_s: F8
    move_s: F8
    attach_s: F8
    prefill_s: F8
    decode_s: F8
    pause_s: F8
    tier: NDArray[np.int8]
    migrations: NDArray[np.int16]
    parks: NDArray[np.int16]
    recoveries: NDArray[np.int16]

    def digest(self) -> str:
        """The same for two runs with the same ledgers, to the bit."""
        found = hashlib.blake2b(digest_size=16)
        for name in self.__slots__:
            found.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return found.hexdigest()


class Access(enum.IntEnum):
    """What a replica's load met in its server's DRAM."""

    HIT = 0
    MISS = 1


@dataclass(frozen=True, slots=True)
class Accesses:
    """The loads in their order: server, deployment and whether its checkpoint was in DRAM, for an offline optimum."""

    at_s: F8
    server: I4
    deployment: I4
    hit: NDArray[np.bool_]

    @property
    def hit_rate(self) -> float:
        """Hits of all accesses (NaN without any)."""
        return float(self.hit.mean()) if len(self.hit) else float("nan")


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Samples over time. `state` has a row per sample and a column per device: 0 empty, 1 loading, 2 ready and idle,
    3 running; `waiting` are requests in all queues, `running` those that run."""

    at_s: F8
    state: NDArray[np.int8]
    waiting: I4
    running: I4

    def share(self, state: int = 3) -> F8:
        """The share of devices in this state, per sample."""
        found: F8 = (self.state == state).mean(axis=1) if self.state.size else np.zeros(0)
        return found


@dataclass(frozen=True, slots=True)
class Load:
    """One load of a replica that became ready: what was estimated (None: the core does not say) and what it took."""

    at_s: float
    server: int
    deployment: int
    tier: str
    total_s: float
    estimated_s: float | None = None


@dataclass(slots=True)
class Counters:
    """Totals. `loads` by the tier in which the checkpoint was found; `swaps` are loads onto a device for which somebody
    else had to leave; `events` are those of the kernel; `core_calls` of the scheduler's core."""

    requests: int = 0
    loads: dict[str, int] = field(default_factory=dict)
    failed_loads: int = 0
    evictions: int = 0
    swaps: int = 0
    moves_committed: int = 0
    moves_aborted: int = 0
    migration_rounds: int = 0
    parks: int = 0
    stops: int = 0
    recoveries: int = 0
    prefetches: int = 0
    hints_lost: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    events: int = 0
    core_calls: int = 0

    @property
    def swaps_per_request(self) -> float:
        """Of those that arrived."""
        return self.swaps / max(1, self.requests)


@dataclass(frozen=True, slots=True)
class Report:
    """See the module. `deployments` and `servers` name the indices; `virtual_s` is how long the run was.

    `estimates` has a row per start that the scheduler had estimated: seconds as estimated, and as they were.
    """

    policy: str
    seed: int
    deployments: tuple[str, ...]
    servers: tuple[str, ...]
    ledgers: Ledgers
    counters: Counters
    accesses: Accesses
    utilisation: Utilisation
    loads: tuple[Load, ...]
    estimates: F8
    virtual_s: float
    digest: str

    @property
    def completed(self) -> NDArray[np.bool_]:
        """Which requests ended well."""
        found: NDArray[np.bool_] = self.ledgers.outcome == Outcome.COMPLETE
        return found

    def startup(self, *, limit_s: float = 300.0) -> F8:
        """Startup seconds of all requests; one that never started counts with the time limit."""
        found: F8 = np.where(np.isnan(self.ledgers.startup_s), limit_s, self.ledgers.startup_s)
        return found

    def summary(self) -> Mapping[str, Any]:
        """A few figures."""
        startup = self.startup()
        done = self.completed
        count = len(startup)

        def at(q: float) -> float:
            return float(np.percentile(startup, q)) if count else float("nan")

        return {
            "policy": self.policy,
            "seed": self.seed,
            "requests": count,
            "complete": int(done.sum()),
            "failed": int(count - done.sum()),
            "startup_mean_s": float(startup.mean()) if count else float("nan"),
            "startup_p50_s": at(50),
            "startup_p95_s": at(95),
            "startup_p99_s": at(99),
            "dram_hit_rate": self.accesses.hit_rate,
            "loads": dict(sorted(self.counters.loads.items())),
            "swaps_per_request": self.counters.swaps_per_request,
            "moves": self.counters.moves_committed,
            "parks": self.counters.parks,
            "virtual_s": self.virtual_s,
            "digest": self.digest,
        }
