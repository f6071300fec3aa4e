"""Live migration by tokens, as two small machines: the source's and the destination's. Pure.

The protocol is that of ServerlessLLM (Fu et al., OSDI 2024, section 5): the destination prefills what the source has
generated so far while the source goes on; the gap that came up meanwhile is sent in further rounds, until another round
would not make it smaller; then the source stops, and the destination claims the request and goes on.

What may happen in which state, and what follows, stands in two tables, `SOURCE` and `DESTINATION`; the state diagrams
of docs/migration.md are drawn from them, and the tests walk through every row. A pair that a table does not hold is a
late, doubled or lost message: it changes nothing. The effects are carried out by `outgoing.py` and `incoming.py`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared.contracts.migration import RoundDone

# A gap shrinks by the ratio of prefill to decode speed in every round; one that has not converged by then will not.
MOST_ROUNDS: Final = 8


class SourceState(enum.StrEnum):
    """Where the source of a migration is.

    In `QUEUED` it waits for its turn: a destination prefills for few at a time. In `LAST_TOKEN` it emits one more
    token, so that it stops just after one and not in the middle of a step. In `HANDOVER` and `RECLAIM` it is frozen: it
    computes, and emits nothing.
    """

    QUEUED = "queued"
    ROUND = "round"
    LAST_TOKEN = "last token"
    HANDOVER = "handover"
    RECLAIM = "reclaim"
    COMMITTED = "committed"
    ABORTED = "aborted"
    ENDED = "ended"


class SourceInput(enum.StrEnum):
    """What may happen to the source."""

    TURN = "its turn"
    ROUND_PENDING = "round pending"
    ROUND_DONE_FAR = "round done, gap still shrinks"
    ROUND_DONE_NEAR = "round done, gap small"
    ROUND_FAILED = "round failed"
    TOKEN_SENT = "token sent, or none comes"
    HANDED_OVER = "handed over"
    HAND_OVER_FAILED = "hand-over refused or unanswered"
    RECLAIMED = "claim granted"
    SUPERSEDED = "claim stale"
    OVER = "request over"


class SourceEffect(enum.StrEnum):
    """What follows."""

    SEND_ROUND = "send round"
    ASK_AGAIN = "wait on"
    FREEZE = "freeze"
    HAND_OVER = "hand over"
    RECLAIM = "claim back"
    THAW = "thaw"
    ABANDON = "abandon"
    LET_GO = "let go"
    TELL = "tell"


_S, _SI, _SE = SourceState, SourceInput, SourceEffect
SOURCE_BEGIN: Final[tuple[SourceState, tuple[SourceEffect, ...]]] = (SourceState.QUEUED, ())
SOURCE_FINAL: Final = frozenset({SourceState.COMMITTED, SourceState.ABORTED, SourceState.ENDED})
SOURCE_FROZEN: Final = frozenset({SourceState.HANDOVER, SourceState.RECLAIM})
SOURCE: Final[Mapping[tuple[SourceState, SourceInput], tuple[SourceState, tuple[SourceEffect, ...]]]] = {
    (_S.QUEUED, _SI.TURN): (_S.ROUND, (_SE.SEND_ROUND,)),
    (_S.QUEUED, _SI.OVER): (_S.ENDED, (_SE.TELL,)),
    (_S.ROUND, _SI.ROUND_PENDING): (_S.ROUND, (_SE.ASK_AGAIN,)),
    (_S.ROUND, _SI.ROUND_DONE_FAR): (_S.ROUND, (_SE.SEND_ROUND,)),
    (_S.ROUND, _SI.ROUND_DONE_NEAR): (_S.LAST_TOKEN, ()),
    (_S.ROUND, _SI.ROUND_FAILED): (_S.ABORTED, (_SE.ABANDON, _SE.TELL)),
    (_S.ROUND, _SI.OVER): (_S.ENDED, (_SE.ABANDON, _SE.TELL)),
    (_S.LAST_TOKEN, _SI.TOKEN_SENT): (_S.HANDOVER, (_SE.FREEZE, _SE.HAND_OVER)),
    (_S.LAST_TOKEN, _SI.OVER): (_S.ENDED, (_SE.ABANDON, _SE.TELL)),
    (_S.HANDOVER, _SI.HANDED_OVER): (_S.COMMITTED, (_SE.LET_GO, _SE.TELL)),
    (_S.HANDOVER, _SI.HAND_OVER_FAILED): (_S.RECLAIM, (_SE.RECLAIM,)),
    # The gateway refuses what the source sent before it froze, as the destination's claim was faster than its answer.
    (_S.HANDOVER, _SI.SUPERSEDED): (_S.COMMITTED, (_SE.LET_GO, _SE.TELL)),
    (_S.HANDOVER, _SI.OVER): (_S.ENDED, (_SE.ABANDON, _SE.TELL)),
    (_S.RECLAIM, _SI.RECLAIMED): (_S.ABORTED, (_SE.THAW, _SE.ABANDON, _SE.TELL)),
    (_S.RECLAIM, _SI.SUPERSEDED): (_S.COMMITTED, (_SE.LET_GO, _SE.TELL)),
    (_S.RECLAIM, _SI.OVER): (_S.ENDED, (_SE.ABANDON, _SE.TELL)),
}


class DestinationState(enum.StrEnum):
    """Where the destination of a migration is. Until `OWNER` it emits nothing."""

    PREFILL = "prefill"
    WAITING = "waiting"
    CLAIMING = "claiming"
    OWNER = "owner"
    GONE = "gone"


class DestinationInput(enum.StrEnum):
    """What may happen to the destination. `LEAVING`: its replica leaves, or its engine died."""

    ROUND = "round"
    PREFILLED = "prefilled"
    PREFILL_FAILED = "prefill failed"
    HAND_OVER = "hand over"
    CLAIMED = "claim granted"
    REFUSED = "claim refused"
    ABANDONED = "abandoned"
    EXPIRED = "source silent"
    LEAVING = "replica leaves"


class DestinationEffect(enum.StrEnum):
    """What follows."""

    PREFILL = "prefill"
    STOP_PREFILL = "stop prefill"
    ANSWER_ROUND = "answer round"
    REFUSE_ROUND = "refuse round"
    CLAIM = "claim"
    BEGIN = "begin to emit"
    ANSWER_HAND_OVER = "answer hand-over"
    REFUSE_HAND_OVER = "refuse hand-over"
    FREE = "free the slot"


_D, _DI, _DE = DestinationState, DestinationInput, DestinationEffect
DESTINATION_BEGIN: Final = (DestinationState.PREFILL, (DestinationEffect.PREFILL,))
DESTINATION_FINAL: Final = frozenset({DestinationState.OWNER, DestinationState.GONE})
DESTINATION: Final[
    Mapping[tuple[DestinationState, DestinationInput], tuple[DestinationState, tuple[DestinationEffect, ...]]]
] = {
    (_D.PREFILL, _DI.PREFILLED): (_D.WAITING, (_DE.ANSWER_ROUND,)),
    (_D.PREFILL, _DI.PREFILL_FAILED): (_D.GONE, (_DE.REFUSE_ROUND, _DE.FREE)),
    # The answer to a round was lost on its way and the source went on: its word is newer than what is being prefilled.
    (_D.PREFILL, _DI.ROUND): (_D.PREFILL, (_DE.STOP_PREFILL, _DE.PREFILL)),
    (_D.PREFILL, _DI.HAND_OVER): (_D.CLAIMING, (_DE.STOP_PREFILL, _DE.CLAIM)),
    (_D.PREFILL, _DI.ABANDONED): (_D.GONE, (_DE.STOP_PREFILL, _DE.FREE)),
    (_D.PREFILL, _DI.EXPIRED): (_D.GONE, (_DE.STOP_PREFILL, _DE.FREE)),
    (_D.PREFILL, _DI.LEAVING): (_D.GONE, (_DE.STOP_PREFILL, _DE.REFUSE_ROUND, _DE.FREE)),
    (_D.WAITING, _DI.ROUND): (_D.PREFILL, (_DE.PREFILL,)),
    (_D.WAITING, _DI.HAND_OVER): (_D.CLAIMING, (_DE.CLAIM,)),
    (_D.WAITING, _DI.ABANDONED): (_D.GONE, (_DE.FREE,)),
    (_D.WAITING, _DI.EXPIRED): (_D.GONE, (_DE.FREE,)),
    (_D.WAITING, _DI.LEAVING): (_D.GONE, (_DE.FREE,)),
    # Abandoned, expired or leaving while the claim is on its way: its answer says who owns the request.
    (_D.CLAIMING, _DI.CLAIMED): (_D.OWNER, (_DE.BEGIN, _DE.ANSWER_HAND_OVER)),
    (_D.CLAIMING, _DI.REFUSED): (_D.GONE, (_DE.REFUSE_HAND_OVER, _DE.FREE)),
}


@dataclass(slots=True)
class Convergence:
    """What the rounds so far have shown of the destination, and whether another one would pay.

    Seconds, all measured: `token_s` to prefill one token, `step_s` a decode step, `fixed_s` what a round takes besides
    (the bus, and the wait for the step under way).
    """

    token_s: float = 0.0
    step_s: float = 0.0
    fixed_s: float = 0.0
    rounds: int = 0
    _most_tokens: int = 0

    def observe(self, done: RoundDone, elapsed_s: float) -> None:
        """A round has ended, `elapsed_s` after it was sent."""
        self.rounds += 1
        self.step_s = done.step_s or self.step_s
        self.fixed_s = max(0.0, elapsed_s - done.prefill_s - done.step_s)
        # The speed of the largest round: a small one measures a forward pass, not the tokens in it.
        if done.prefilled_tokens >= self._most_tokens:
            self._most_tokens = done.prefilled_tokens
            self.token_s = done.prefill_s / max(1, done.prefilled_tokens)

    def pause_s(self, gap_tokens: int) -> float:
        """What a client would wait if the source stopped now: the hand-over, and a step that prefills the gap, too."""
        return self.fixed_s + self.step_s + gap_tokens * self.token_s

    def near(self, gap_tokens: int, token_interval_s: float) -> bool:
        """Whether the source should stop now, with `gap_tokens` that the destination does not have.

        `token_interval_s` is the source's own time per token for this request. While a further round prefills the gap,
        the source makes the next one; unless that shortens the pause by at least half a token's time, the round is not
        worth its compute.
        """
        if self.rounds >= MOST_ROUNDS or token_interval_s <= 0:
            return True
        next_gap = math.ceil(self.pause_s(gap_tokens) / token_interval_s)
        if next_gap >= gap_tokens:
            return True
        return self.pause_s(gap_tokens) - self.pause_s(next_gap) < token_interval_s / 2
