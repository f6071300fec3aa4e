"""The fence against old leaders: whoever is commanded remembers the highest term that it has heard of.

A term comes with every command and with every announcement of a leader (`LEADING`). A command of a lower term is
refused as `stale_epoch`, and the refusal carries the highest term, so that a leader whose registry has forgotten how
far the terms had come can go beyond it. Term 0 is an operator's, and always fine. A process that starts has heard of
nothing yet: it learns with the first command or announcement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from shared.contracts.placement import Leading
from shared.errors import Code, Failure


class Command(Protocol):
    """A message that carries the term of the leader that sends it (0: an operator)."""

    @property
    def term(self) -> int:
        """The leader's term."""


C = TypeVar("C", bound=Command)
A = TypeVar("A", bound=Callable[[Failure], None])


class Fence:
    """Remembers the highest `term` and keeps lower ones out."""

    def __init__(self, name: str) -> None:
        self.term = 0
        self._name = name

    def heard(self, message: Leading) -> None:
        """Somebody leads under this term."""
        self.term = max(self.term, message.term)

    def refusal(self, term: int) -> Failure | None:
        """Why a command of this term is not obeyed; None: it is, and older ones are not from now on."""
        if 0 < term < self.term:
            message = f"Term {term} is over: {self._name} has heard of term {self.term}."
            return Failure(code=Code.STALE_EPOCH, message=message, term=self.term)
        self.term = max(self.term, term)
        return None

    def keeps(self, obey: Callable[[C, A], None]) -> Callable[[C, A], None]:
        """A handler of calls that refuses old terms and passes all else on to `obey`."""

        def handle(message: C, reply: A) -> None:
            refused = self.refusal(message.term)
            if refused is None:
                obey(message, reply)
            else:
                reply(refused)

        return handle
