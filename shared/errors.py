"""The one table of errors: code, HTTP status, whether a retry may help, and one sentence.

An error crosses the bus as `Failure` (code + sentence), never as a traceback or a class name. The OpenAI error body
is derived from this table by the gateway. Three kinds: the caller's fault (never retry), the world's fault (retry
elsewhere or later), our fault (500).
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec


class Code(enum.StrEnum):
    """Every way in which Hearth can fail, by its stable name on the wire."""

    INVALID_REQUEST = "invalid_request"
    PROMPT_TOO_LONG = "prompt_too_long"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    UNKNOWN_MODEL = "unknown_model"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    TOO_LARGE = "too_large"
    UNSUPPORTED = "unsupported"
    INVALID_CHECKPOINT = "invalid_checkpoint"
    RATE_LIMITED = "rate_limited"
    QUEUE_FULL = "queue_full"
    NO_CAPACITY = "no_capacity"
    UNAVAILABLE = "unavailable"
    DRAINING = "draining"
    BUSY = "busy"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CHECKPOINT_UNAVAILABLE = "checkpoint_unavailable"
    CHECKPOINT_CORRUPT = "checkpoint_corrupt"
    OUT_OF_MEMORY = "out_of_memory"
    WORKER_LOST = "worker_lost"
    STALE_EPOCH = "stale_epoch"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table. `status` is HTTP's; `retryable` says whether the same call may succeed later."""

    status: int
    retryable: bool
    sentence: str


def _row(status: int, retryable: bool, sentence: str) -> Kind:
    return Kind(status=status, retryable=retryable, sentence=sentence)


TABLE: Final[dict[Code, Kind]] = {
    Code.INVALID_REQUEST: _row(400, False, "The request is malformed."),
    Code.PROMPT_TOO_LONG: _row(400, False, "The prompt does not fit into the model's context."),
    Code.UNAUTHENTICATED: _row(401, False, "The request carries no valid credentials."),
    Code.FORBIDDEN: _row(403, False, "The credentials do not allow this."),
    Code.UNKNOWN_MODEL: _row(404, False, "No deployment has this name."),
    Code.NOT_FOUND: _row(404, False, "There is nothing here."),
    Code.CONFLICT: _row(409, False, "Something else of this name exists or is being changed."),
    Code.TOO_LARGE: _row(413, False, "This is larger than the limit."),
    Code.UNSUPPORTED: _row(422, False, "This model or option cannot be served."),
    Code.INVALID_CHECKPOINT: _row(422, False, "The source is not a checkpoint that can be imported."),
    Code.RATE_LIMITED: _row(429, True, "Too many requests."),
    Code.QUEUE_FULL: _row(429, True, "The queue of this deployment is full."),
    Code.NO_CAPACITY: _row(503, True, "No server has room for this model."),
    Code.UNAVAILABLE: _row(503, True, "A part of the system cannot be reached."),
    Code.DRAINING: _row(503, True, "This part of the system is shutting down."),
    Code.BUSY: _row(503, True, "This is in use."),
    Code.DEADLINE_EXCEEDED: _row(504, True, "The request did not finish within its time."),
    Code.CHECKPOINT_UNAVAILABLE: _row(503, True, "The checkpoint cannot be read."),
    Code.CHECKPOINT_CORRUPT: _row(503, True, "The checkpoint's bytes do not match their checksums."),
    Code.OUT_OF_MEMORY: _row(503, True, "There is not enough memory."),
    Code.WORKER_LOST: _row(502, True, "The worker was lost and the request could not be resumed."),
    Code.STALE_EPOCH: _row(500, False, "An old owner of a request, or an old leader, spoke."),
    Code.CANCELLED: _row(499, False, "The client left."),
    Code.INTERNAL: _row(500, True, "Hearth failed; this is our fault."),
}


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure", omit_defaults=True):
    """A failure as data: what crosses the bus and what cores decide on.

    `message` is one sentence for a person; `param` names the offending field where there is one; `retry_after_s` is
    a hint in seconds for retryable failures; `term`, with `stale_epoch`, the highest term of a leader that whoever
    refuses has heard of.
    """

    code: Code
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    term: int = 0

    @property
    def kind(self) -> Kind:
        """The row of `TABLE` for this code."""
        return TABLE[self.code]


class HearthError(Exception):
    """A `Failure` travelling up a call stack inside one process."""

    def __init__(self, code: Code, message: str | None = None, *, param: str | None = None) -> None:
        self.failure = Failure(code=code, message=message or TABLE[code].sentence, param=param)
        super().__init__(self.failure.message)

    @classmethod
    def of(cls, failure: Failure) -> HearthError:
        """The exception that carries exactly this failure."""
        error = cls(failure.code, failure.message, param=failure.param)
        error.failure = failure
        return error
