"""Limits: how large, how many, how long. Pure; the numbers come from the settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.errors import Code, Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every bound of one client call.

    `max_requests` bounds choices × prompts. `max_prompt_chars` is a cheap first bound on a prompt (characters of all
    its texts, or token ids); the true one is the model's context, which the worker checks in tokens.
    """

    max_choices: int = 16
    max_requests: int = 64
    max_messages: int = 4096
    max_prompt_chars: int = 4 * 1024 * 1024
    max_tokens: int = 1 << 20
    max_stop: int = 16
    max_stop_chars: int = 512
    max_logit_bias: int = 1024
    max_stop_token_ids: int = 64
    max_logprobs: int = 20
    max_name_chars: int = 256


@dataclass(slots=True)
class OpenRequests:
    """Counts open requests, of everybody and of each client. A bound of 0 means no bound."""

    max_open: int
    max_open_per_client: int
    total: int = 0
    _by_client: dict[str, int] = field(default_factory=dict)

    def enter(self, client: str, count: int) -> Failure | None:
        """Count `count` more requests of this client, or say why not."""
        if self.max_open and self.total + count > self.max_open:
            return Failure(
                code=Code.RATE_LIMITED,
                message=f"This gateway already has its limit of {self.max_open} open requests.",
                retry_after_s=1.0,
            )
        mine = self._by_client.get(client, 0)
        if self.max_open_per_client and mine + count > self.max_open_per_client:
            return Failure(
                code=Code.RATE_LIMITED,
                message=f"This client already has its limit of {self.max_open_per_client} open requests.",
                retry_after_s=1.0,
            )
        self._by_client[client] = mine + count
        self.total += count
        return None

    def leave(self, client: str, count: int) -> None:
        """That many requests of this client are over."""
        mine = self._by_client[client] - count
        if mine:
            self._by_client[client] = mine
        else:
            del self._by_client[client]
        self.total -= count

    def check(self) -> None:
        """The sum is the sum of the parts; nobody is kept at zero."""
        assert self.total == sum(self._by_client.values())
        assert all(count > 0 for count in self._by_client.values())
