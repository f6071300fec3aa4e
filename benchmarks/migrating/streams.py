"""Streamed completions of a running cluster, with the time of every event."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

import aiohttp

from benchmarks.migrating.gaps import Event, read_event

FIRST_PLAIN_ID = 300  # below are bytes and special tokens; above, every token has a text of its own


def client() -> aiohttp.ClientSession:
    """A client that opens as many connections as it is asked to."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None))


def prompt(tokens: int, vocab: int, seed: str) -> list[int]:
    """Token ids that no other seed shares a beginning with: no prefix of one is in a KV cache because of another."""
    chosen = random.Random(seed)
    return [chosen.randrange(FIRST_PLAIN_ID, vocab) for _ in range(tokens)]


class Stream:
    """One streamed completion: `times` (monotonic seconds) and `counts` (tokens) of its events, and how it ended."""

    def __init__(self, url: str, model: str, token_ids: list[int], max_tokens: int) -> None:
        self._url = f"{url}/v1/completions"
        self._body: dict[str, Any] = {
            "model": model,
            "prompt": token_ids,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": True,
            "hearth": {"ledger": True},
        }
        self.prompt_tokens = len(token_ids)
        self.max_tokens = max_tokens
        self.request_id = ""
        self.began_s = 0.0
        self.times: list[float] = []
        self.tokens = 0
        self.finish = ""
        self.error = ""
        self.ledger: dict[str, Any] = {}
        self.over = False
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def begin(self, session: aiohttp.ClientSession, tasks: asyncio.TaskGroup) -> Stream:
        """Ask for it."""
        self._task = tasks.create_task(self._run(session))
        return self

    async def _run(self, session: aiohttp.ClientSession) -> None:
        self.began_s = time.perf_counter()
        try:
            async with session.post(self._url, json=self._body) as answer:
                self.request_id = answer.headers.get("x-hearth-request-id", "")
                if answer.status != 200:
                    self.error = f"{answer.status} {(await answer.text())[:300]}"
                    return
                async for line in answer.content:
                    event = read_event(line)
                    if event is not None and self._take(event, time.perf_counter()):
                        return
            self.error = "the stream broke off"
        except aiohttp.ClientError as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.over = True
            self._news.set()

    def _take(self, event: Event, now: float) -> bool:
        if event.tokens:
            self.times.append(now)
            self.tokens += event.tokens
        self.finish = event.finish or self.finish
        self.ledger = event.ledger or self.ledger
        self.error = event.error or self.error
        self._news.set()
        return event.done or bool(event.error)

    async def until(self, tokens: int, timeout_s: float = 120.0) -> None:
        """Wait for so many tokens in all. Raises RuntimeError when it ends, fails or stands still before."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.tokens < tokens:
                    if self.over:
                        raise RuntimeError(f"a stream ended after {self.tokens} tokens: {self.error or self.finish}")
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise RuntimeError(f"a stream stands at {self.tokens} of {tokens} tokens") from None

    async def ended(self, timeout_s: float = 300.0) -> Stream:
        """Wait for its end, whatever it is."""
        async with asyncio.timeout(timeout_s):
            while not self.over:
                self._news.clear()
                await self._news.wait()
        return self

    @property
    def whole(self) -> bool:
        """Whether it ended in order, with every token."""
        return self.over and not self.error and self.finish == "length" and self.tokens == self.max_tokens

    async def close(self) -> None:
        """Leave, as a client that goes away does."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
