"""The numbers of the gateway's core. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Seconds and counts.

    `max_deliveries`: owners that a request may lose in a row within `proof_s` of their claim; `max_recoveries`: how
    often one request is resumed in its life, for whatever reason; `max_republished`: how often in a row, without a
    token, its end may be lost. `check_s`, `lost_after_s`, `quiet_s`: see `watch`. `settle_s`: how long after the bus
    came back others may still be on their way, and after a claim its answer. `reclaim_s`: how long an interrupted
    request waits for its next claim until its message is looked for, at first; `reclaim_most_s` at most; `queued_s` and
    `queued_most_s` the same for one that is in the queue, where waiting is the normal thing.
    `patience_s`: how long a stream that has begun and lost its owner outlives a passing failure of its deployment.
    `demand_s`: how often the scheduler is told of requests that run nowhere; `demand_over_s`: how soon that none does.
    """

    max_deliveries: int = 5
    max_recoveries: int = 100
    max_republished: int = 3
    proof_s: float = 10.0
    check_s: float = 0.5
    lost_after_s: float = 3.0
    quiet_s: float = 60.0
    settle_s: float = 2.0
    reclaim_s: float = 2.0
    reclaim_most_s: float = 10.0
    queued_s: float = 5.0
    queued_most_s: float = 60.0
    patience_s: float = 60.0
    remind_s: float = 0.5
    inform_s: float = 0.2
    progress_fresh_s: float = 2.0
    hint_s: float = 0.01
    demand_s: float = 1.0
    demand_over_s: float = 0.05
