"""What a stream's times say: gaps between its events, the pause within a window, and what is compared with it. Pure.

Times are seconds of one monotonic clock. An event of a stream carries one token or, rarely, more; what a client
notices are the gaps between events.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from benchmarks.report import percentile

DONE: Final = b"[DONE]"
DECODE_STEPS: Final = 3  # of the bound: prefill of the last gap and so many decode steps
NOTICED_S: Final = 0.05  # of the other bound: one inter-token time and this


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a server-sent stream: how many tokens it brought, and what else it said.

    `error` is the error's text, "" without one; `finish` the finish reason, "" before the end; `ledger` Hearth's own
    part.
    """

    tokens: int = 0
    error: str = ""
    finish: str = ""
    ledger: dict[str, Any] = field(default_factory=dict)
    done: bool = False


def read_event(line: bytes) -> Event | None:
    """The event in one line of a completion's stream that asks for `logprobs`; None for comments and empty lines.

    With log probabilities every token makes an event, even one that ends in the middle of a character.
    """
    if not line.startswith(b"data:"):
        return None
    data = line[5:].strip()
    if data == DONE:
        return Event(done=True)
    body = json.loads(data)
    if "error" in body:
        return Event(error=str(body["error"].get("message", body["error"])))
    choice = (body.get("choices") or [{}])[0]
    logprobs = choice.get("logprobs") or {}
    return Event(
        tokens=len(logprobs.get("tokens") or ()),
        finish=choice.get("finish_reason") or "",
        ledger=body.get("hearth") or {},
    )


@dataclass(frozen=True, slots=True)
class Gap:
    """The time between two events."""

    begin_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """How long nothing came."""
        return self.end_s - self.begin_s


def gaps(times: Sequence[float]) -> list[Gap]:
    """The gaps between these times."""
    return [Gap(begin, end) for begin, end in pairwise(times)]


def within(found: Sequence[Gap], begin_s: float, end_s: float) -> list[Gap]:
    """The gaps that lie at least partly between these times."""
    return [gap for gap in found if gap.end_s > begin_s and gap.begin_s < end_s]


def undisturbed(found: Sequence[Gap], begin_s: float, end_s: float) -> list[Gap]:
    """The gaps that lie wholly outside these times."""
    return [gap for gap in found if gap.end_s <= begin_s or gap.begin_s >= end_s]


def pause_s(times: Sequence[float], begin_s: float, end_s: float) -> float:
    """The largest gap at least partly between these times; one that begins at `end_s` belongs to it.

    Raises ValueError if there is none: the stream had ended, or had not begun.
    """
    touched = [gap for gap in gaps(times) if gap.end_s > begin_s and gap.begin_s <= end_s]
    if not touched:
        raise ValueError("no two events of the stream surround that time")
    return max(gap.length_s for gap in touched)


def next_after(times: Sequence[float], at_s: float) -> float:
    """The first time after `at_s`; `at_s` itself if there is none."""
    return next((time for time in times if time > at_s), at_s)


@dataclass(frozen=True, slots=True)
class Moved:
    """One migration as its client and its source saw it.

    `pause_s` is the largest gap from the command to the first token at the destination, `handover_s` the gap over which
    the owner changed. `own_s` are the same stream's gaps before the command and after the destination's first token.
    `asked_s` is the time from the call to the news of its end, `ttft_s` that to the stream's first token.
    """

    rounds: int
    tokens: int
    gap_tokens: int
    wire_bytes: int
    total_s: float
    frozen_s: float
    pause_s: float
    handover_s: float
    own_s: tuple[float, ...]
    asked_s: float = 0.0
    ttft_s: float = 0.0
    prompt_tokens: int = 0


def bound_s(gap_tokens: int, token_s: float, step_s: float) -> float:
    """What a pause may be: the prefill of the last gap (one forward pass at least) and three decode steps."""
    return max(step_s, gap_tokens * token_s) + DECODE_STEPS * step_s


def transfer_s(tokens: int, kv_bytes_per_token: int, bits_per_s: float) -> float:
    """What sending the KV cache of so many tokens would take, computed from its size alone."""
    return tokens * kv_bytes_per_token * 8 / bits_per_s


def kv_bytes_per_token(shape: dict[str, Any], value_bytes: int) -> int:
    """Keys and values of one token over all layers of a Llama of this shape."""
    head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    return int(2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * value_bytes)


def prefill_token_s(moves: Sequence[Moved], least_tokens: int = 500) -> float:
    """Seconds to prefill a token, from the first tokens of streams with prompts of at least `least_tokens`.

    Shorter prompts measure queue, claim and forward pass rather than the tokens; they count if there are no others.
    """
    long = [move for move in moves if move.prompt_tokens >= least_tokens] or list(moves)
    return statistics.median(move.ttft_s / move.prompt_tokens for move in long)


def summary(moves: Sequence[Moved], token_s: float) -> dict[str, Any]:
    """What the migrations of one context length come to; medians, and the P99 of the streams' own gaps.

    `token_s` is the time to prefill one token.
    """
    own = [gap for move in moves for gap in move.own_s]
    step_s = statistics.median(own)
    pauses = [move.pause_s for move in moves]
    # Each move against its own bound: the last gap differs from move to move.
    bounds = [bound_s(move.gap_tokens, token_s, step_s) for move in moves]
    return {
        "runs": len(moves),
        "rounds": statistics.median(move.rounds for move in moves),
        "gap_tokens": statistics.median(move.gap_tokens for move in moves),
        "wire_bytes": statistics.median(move.wire_bytes for move in moves),
        "total_s": statistics.median(move.total_s for move in moves),
        "asked_s": statistics.median(move.asked_s for move in moves),
        "frozen_s": statistics.median(move.frozen_s for move in moves),
        "pause_s": statistics.median(pauses),
        "pause_most_s": max(pauses),
        "handover_s": statistics.median(move.handover_s for move in moves),
        "own_p50_s": step_s,
        "own_p99_s": percentile(own, 99),
        "bound_s": statistics.median(bounds),
        "within_bound": sum(pause <= bound for pause, bound in zip(pauses, bounds, strict=True)),
        "over_own_s": statistics.median(pauses) - step_s,
    }


def targets(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(what, measured, target) of the targets, the worst context length each; at most the target is met."""
    pauses = [one["pause_s"] for one in summaries]
    handovers = [one["handover_s"] for one in summaries]
    return [
        (
            "pause ÷ (prefill of the last gap + 3 decode steps), worst median",
            max(one["pause_s"] / one["bound_s"] for one in summaries),
            1.0,
        ),
        (
            "pause ÷ (one inter-token time + 50 ms), worst median",
            max(one["pause_s"] / (one["own_p50_s"] + NOTICED_S) for one in summaries),
            1.0,
        ),
        ("largest ÷ smallest median pause over context lengths", max(pauses) / min(pauses), 1.25),
        # A long migration has more gaps of the ordinary kind in it, the largest of which counts as its pause above.
        (
            "largest ÷ smallest median gap of the hand-over over context lengths",
            max(handovers) / min(handovers),
            1.25,
        ),
    ]
