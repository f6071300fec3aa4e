"""What the core has decided for one call and its HTTP handler has not taken yet. Bounded in bytes."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable

from services.gateway.core import Conclude, Deliver, Fail, Inform
from shared.errors import Code, Failure
from shared.sizes import size

Piece = Deliver | Conclude | Fail | Inform
_PIECE_BYTES = 128  # what a piece costs besides its text


class CallBuffer:
    """One producer (the core's shell), one consumer (the handler), both on the loop's thread.

    `put` never waits: a client that reads slowly must not hold up the others. Beyond `limit_bytes` it says no, and
    `overflow` is called, once, which tears the connection down; without it the handler finds a failure at the end.
    """

    def __init__(self, call_id: str, *, choices: int, limit_bytes: int) -> None:
        self.call_id = call_id
        self.over = False
        self.overflow: Callable[[], None] | None = None
        self._open_choices = choices
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._overflown = False
        self._pieces: collections.deque[Piece] = collections.deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, piece: Piece) -> bool:
        """Add a piece; False when the consumer is too far behind (and from then on)."""
        if self._overflown:
            return False
        taken = True
        if isinstance(piece, Deliver):
            self._bytes += _PIECE_BYTES + len(piece.frame.text) + 64 * len(piece.frame.logprobs)
            if self._bytes > self._limit_bytes:
                self._overflown = True
                if self.overflow is not None:
                    self.overflow()
                    return False
                message = f"The answer does not fit the gateway's buffer of {size(self._limit_bytes)}."
                piece, taken, self.over = Fail(self.call_id, Failure(code=Code.TOO_LARGE, message=message)), False, True
        elif isinstance(piece, Conclude):
            self._open_choices -= 1
            self.over = self.over or self._open_choices == 0
        elif isinstance(piece, Fail):
            self.over = True
        self._pieces.append(piece)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return taken

    async def take(self, timeout_s: float | None = None) -> list[Piece]:
        """Everything there is, as soon as there is something; empty after `timeout_s` without."""
        if not self._pieces:
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            timer = None if timeout_s is None else loop.call_later(timeout_s, _release, waiter)
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        pieces = list(self._pieces)
        self._pieces.clear()
        self._bytes = 0
        return pieces


def _release(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
