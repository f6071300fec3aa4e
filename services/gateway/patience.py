"""Asking again whoever is away for a moment: a scheduler that is being restarted or about to lead, a worker that is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from shared.errors import Code, HearthError

SCHEDULER: Final = "The scheduler"
AGAIN_S: Final = 0.5  # between two calls
AWAY_S: Final = 10.0  # who restarts is back within this; the record of a dead worker is gone


def unanswered(error: HearthError) -> bool:
    """Whether these are the bus's own words: a peer that says it is unavailable has answered."""
    return error.failure.code is Code.UNAVAILABLE and error.__cause__ is not None


def away(error: HearthError) -> bool:
    """Whether somebody who is being restarted, or is about to lead, did not answer or said so (when to ask again)."""
    soon = error.failure.code is Code.UNAVAILABLE and error.failure.retry_after_s is not None
    return soon or error.failure.code is Code.DRAINING or unanswered(error)


def unavailable(error: HearthError) -> bool:
    """The same, or whoever answered says that what it needs is not there now."""
    return error.failure.code is Code.UNAVAILABLE


class Patience:
    """With one peer, `who`, over repeated calls of the same question. What is `passing` is borne for `within_s` seconds
    (None: `AWAY_S`) since the last answer."""

    def __init__(
        self, who: str, passing: Callable[[HearthError], bool] = away, *, within_s: float | None = None
    ) -> None:
        self._who = who
        self._passing = passing
        self._within_s = AWAY_S if within_s is None else within_s
        self._since: float | None = None

    async def bear(self, error: HearthError) -> None:
        """Returns when it is time to ask again. Raises the error, with the name of who did not answer instead of a
        subject's, if it does not pass or lasts too long."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if not self._passing(error) or now - self._since > self._within_s:
            raise named(error, self._who)
        await asyncio.sleep(AGAIN_S)

    def heard(self) -> None:
        """There was an answer."""
        self._since = None


def named(error: HearthError, who: str) -> HearthError:
    """The error with the name of who did not answer, instead of a subject's."""
    if not unanswered(error):
        return error
    silent = HearthError(Code.UNAVAILABLE, f"{who} does not answer.")
    silent.__cause__ = error
    return silent
