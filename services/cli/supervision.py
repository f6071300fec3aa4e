"""When a child of `hearth up` ends: start it again, later, or give up. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shared.backoff import delay_s

# A run shorter than this is a quick failure: starting again does not help by itself.
QUICK_S: Final = 20.0
QUICK_FAILURES: Final = 5
FIRST_DELAY_S: Final = 0.2
MOST_DELAY_S: Final = 5.0
# Exit codes that mean "configured wrongly": another try cannot end differently.
HOPELESS: Final = frozenset({2})


@dataclass(frozen=True)
class StartAgain:
    """Start the child again after this many seconds."""

    after_s: float


@dataclass(frozen=True)
class GiveUp:
    """Starting it again will not help; `reason` is half a sentence for a person."""

    reason: str


class Supervision:
    """The history of one child."""

    def __init__(self) -> None:
        self._quick_failures = 0
        self.restarts = 0

    def ended(self, code: int, ran_s: float) -> StartAgain | GiveUp:
        """The child ended by itself with this exit code (negative: the signal) after running this many seconds.

        A child that ran well for `QUICK_S` has proved itself, and its earlier failures are forgotten. One that ends in
        order was told to, by hand (a rolling restart), which is no failure.
        """
        self._quick_failures = self._quick_failures + 1 if ran_s < QUICK_S and code != 0 else 0
        if code in HOPELESS:
            return GiveUp("it refuses its settings")
        if self._quick_failures >= QUICK_FAILURES:
            return GiveUp(
                f"it ended {self._quick_failures} times within {QUICK_S:.0f} s of its start, last {how(code)}"
            )
        self.restarts += 1
        return StartAgain(delay_s(max(1, self._quick_failures), first_s=FIRST_DELAY_S, most_s=MOST_DELAY_S))


def how(code: int) -> str:
    """How a process ended, in words: "with exit code 1", "by signal 9"."""
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"
