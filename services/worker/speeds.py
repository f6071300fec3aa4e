"""How fast a replica works, as measured from what runs in it, and how much that is. Pure.

For the scheduler, which weighs what it would cost to move its requests or to wait for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STEP_WEIGHT: Final = 0.05  # of the newest interval between two tokens of a request, of which every step brings several
PREFILL_KEEP: Final = 0.9  # of what is known of prefills, when another one has been measured


@dataclass(frozen=True, slots=True)
class RunningTokens:
    """Tokens of all requests that run in a replica: prompts and outputs, outputs alone, and the most that any of them
    may still generate."""

    context_tokens: int = 0
    output_tokens: int = 0
    left_tokens: int = 0


NOTHING_RUNS: Final = RunningTokens()


class Speeds:
    """Seconds of a decode step, and of the prefill of a token; None before the first one."""

    def __init__(self) -> None:
        self.step_s: float | None = None
        self._tokens_seconds = 0.0
        self._tokens_squared = 0.0

    @property
    def prefill_token_s(self) -> float | None:
        """By least squares through the origin: a short prefill measures a forward pass, not the tokens in it."""
        return self._tokens_seconds / self._tokens_squared if self._tokens_squared else None

    def stepped(self, seconds: float) -> None:
        """So long did a request wait for its next token."""
        self.step_s = seconds if self.step_s is None else self.step_s + STEP_WEIGHT * (seconds - self.step_s)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """So many tokens were computed before the first new one came, `seconds` after they were submitted."""
        if tokens <= 0 or seconds <= 0:
            return
        self._tokens_seconds = PREFILL_KEEP * self._tokens_seconds + tokens * seconds
        self._tokens_squared = PREFILL_KEEP * self._tokens_squared + tokens * tokens
