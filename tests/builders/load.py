"""Clients that never rest: each streams one call after the other through some gateway and checks what it heard."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.builders.streams import Ask, Heard, Stream, Twins

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "frequency_penalty": 0.3, "repetition_penalty": 1.05}
# What a client may be told instead of getting a stream, while servers are away: come back later.
BUSY = (0, 429, 503)


def make_calls(model: str, dice: random.Random, count: int, tokens: tuple[int, int]) -> list[Ask]:
    """Calls of all kinds: greedy, sampled, with penalties, log probabilities, stop strings, several choices, chats."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        SAMPLED,
        {"temperature": 0, "logprobs": 2},
        SAMPLED | {"n": 2},
        SAMPLED | {"stop": ["zz", "qq"]},
        {"temperature": 0.7, "presence_penalty": 0.5, "path": "/v1/chat/completions"},
    ]
    return [
        Ask.of(
            model,
            f"{dice.choice(['The hearth keeps the fire', 'Größe, 你好', 'Привет', '🔥'])} number {number}",
            max_tokens=dice.randrange(*tokens),
            seed=number,
            **kinds[number % len(kinds)],
        )
        for number in range(count)
    ]


@dataclass(frozen=True)
class Outcome:
    """How one call went. `gateway` served it; `difference` is "" if it said exactly what it should."""

    ask: Ask
    gateway: str
    heard: Heard
    difference: str


class Load:
    """`clients` threads. `outcomes` grows; `stop()` lets the last streams end."""

    def __init__(
        self,
        urls: dict[str, str],
        calls: list[Ask],
        twins: Twins,
        *,
        clients: int,
        seed: int,
        usable: Callable[[str], bool],
        timeout_s: float,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._urls, self._calls, self._twins, self._usable = urls, calls, twins, usable
        self._timeout_s = timeout_s
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._open: dict[int, Stream] = {}
        self._threads = [
            threading.Thread(target=self._client, args=(number, random.Random(f"{seed} {number}")), daemon=True)
            for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _client(self, number: int, dice: random.Random) -> None:
        while not self._over.is_set():
            gateway = dice.choice([name for name in self._urls if self._usable(name)] or list(self._urls))
            ask = dice.choice(self._calls)
            stream = Stream(self._urls[gateway], ask, timeout_s=self._timeout_s)
            with self._lock:
                self._open[number] = stream
            heard = stream.wait(None)
            with self._lock:
                del self._open[number]
                self.outcomes.append(Outcome(ask, gateway, heard, heard.differs(self._twins.of(ask))))
            if heard.status in BUSY:
                time.sleep(0.3)

    def open(self) -> list[Stream]:
        """The streams of this moment."""
        with self._lock:
            return list(self._open.values())

    def stop(self) -> None:
        """No new calls; wait for the open ones."""
        self._over.set()
        for thread in self._threads:
            thread.join(self._timeout_s + 30)
            assert not thread.is_alive(), "a client hangs"
