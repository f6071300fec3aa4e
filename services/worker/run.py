"""What a worker knows about one request, and what it may do at all. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.worker.generation import Generation
from services.worker.ports import SequenceEnd
from services.worker.replica import Replica
from shared.contracts.generation import Ledger
from shared.contracts.requests import Cancel, Claim, Claimed, Request

if TYPE_CHECKING:
    from services.worker.incoming import Landing
    from services.worker.outgoing import Departure


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this worker may do, from its settings and its device. `engine` is "" unless its operator insists on one."""

    worker_id: str
    server_id: str
    memory_total_bytes: int
    weights_on_device: bool
    max_replicas: int
    lease_ttl_s: float
    ack_wait_s: float
    max_deliveries: int
    drain_s: float
    kv_bytes_max: int
    hold_s: float = 2.0
    gateway_lost_s: float = 5.0
    engine: str = ""


class RunState(enum.Enum):
    """How far a request is in this worker."""

    CLAIMING = "claiming"
    TOKENISING = "tokenising"
    RUNNING = "running"


@dataclass(slots=True)
class Run:
    """One request in this worker: a delivery of the queue, or (`landing`) what another worker hands over.

    `prompt_ids` and `echo_text` are known once it is tokenised. While it is `frozen` nothing of it is emitted: its
    tokens pile up in `generation`, and what else happens is kept for the thaw (`ended`: the engine's end of it,
    `doomed`: it must be given back instead, with `fault` or not). `budget_ends_at` is a monotonic second.
    """

    request: Request
    token: str
    delivery: int
    replica: Replica
    sequence: int = 0
    state: RunState = RunState.CLAIMING
    tries: int = 0
    retry_at: float | None = None
    asked_at: float = 0.0
    claimed: Claimed | None = None
    claimed_at: float = 0.0
    budget_ends_at: float = 0.0
    cancelled: Cancel | None = None
    ledger: Ledger = field(default_factory=Ledger)
    generation: Generation | None = None
    sequence_id: str = ""
    first_token_at: float | None = None
    last_token_at: float = 0.0
    submitted_at: float = 0.0
    token_interval_s: float = 0.0
    prompt_ids: tuple[int, ...] = ()
    echo_text: str = ""
    departure: Departure | None = None
    landing: Landing | None = None
    frozen: bool = False
    ended: SequenceEnd | None = None
    doomed: bool = False
    fault: bool = False

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def epoch(self) -> int:
        """The epoch of its claim; -1 before."""
        return self.claimed.epoch if self.claimed else -1

    @property
    def emitted_tokens(self) -> int:
        """Output tokens that its gateway has been sent, by this worker and those before it."""
        if self.generation is not None:
            return self.generation.emitted
        return len(self.claimed.token_ids) if self.claimed else 0

    def claim(self, worker_id: str, *, after_epoch: int, claim_id: str) -> Claim:
        """What its gateway is asked, to own it."""
        return Claim(
            request_id=self.request_id,
            worker_id=worker_id,
            replica_id=self.replica.id,
            delivery=self.delivery,
            token=self.token,
            sequence=self.sequence,
            after_epoch=after_epoch,
            claim_id=claim_id,
        )

    def own(self, claimed: Claimed, now: float) -> None:
        """Its gateway has given it to this worker, or left it here at a new epoch."""
        if self.claimed is None:
            self.claimed_at = now
        self.claimed, self.budget_ends_at = claimed, now + claimed.budget_s

    def token_came(self, now: float) -> None:
        """The engine has made one more token."""
        if self.first_token_at is None:
            self.first_token_at = now
        else:
            passed_s = now - self.last_token_at
            self.replica.speeds.stepped(passed_s)
            # Recent steps count most: the batch around it changes.
            self.token_interval_s = 0.8 * self.token_interval_s + 0.2 * passed_s if self.token_interval_s else passed_s
        self.last_token_at = now

    def sequence_ended(self, cached_tokens: int) -> None:
        """Its engine is done with it: the prefill was that of all tokens but these, and of none generated here."""
        if self.generation is not None and self.first_token_at is not None:
            computed = len(self.prompt_ids) + self.generation.resumed_tokens - cached_tokens
            self.replica.speeds.prefilled(computed, self.first_token_at - self.submitted_at)
