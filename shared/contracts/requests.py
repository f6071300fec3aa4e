"""Requests: gateway → work queue → worker, the claim that gives ownership, and the cancel that ends it."""

from __future__ import annotations

import msgspec

from shared.errors import Failure


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Noise is a function of (`seed`, token index) only: see `services/worker/sampling`.

    `temperature` 0 means greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 mean "off". `logit_bias` maps token id to an
    addend. `stop` are strings that end the text (and are not part of it); `stop_token_ids` end it like an EOS token.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a conversation, as the model's chat template sees it."""

    role: str
    content: str
    name: str | None = None


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """A conversation; the worker applies the model's chat template."""

    messages: tuple[ChatMessage, ...]


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Plain text; tokenised as it stands, with the tokenizer's own special tokens."""

    text: str


class TokensPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """Token ids, used as they are."""

    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokensPrompt


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="request"):
    """One client completion, as it lies in the work queue of its deployment.

    A client's `n > 1` or list of prompts becomes several requests. `budget_s` is the time it may still take, counted
    from its publication. `echo` repeats the prompt's text before the completion.
    """

    request_id: str
    gateway_id: str
    deployment: str
    prompt: Prompt
    sampling: Sampling
    budget_s: float
    echo: bool = False
    traceparent: str | None = None


class Claim(msgspec.Struct, frozen=True, kw_only=True, tag="claim", omit_defaults=True):
    """A worker asks the gateway for the ownership of a request. `delivery` counts the queue's deliveries from 1.

    `token` acknowledges the queue's message, by whomsoever: with it the gateway gives a lost owner's request back.
    `sequence` says which message that is (0: not told). `after_epoch` makes it a compare-and-set: ownership is given
    only if the request's epoch is this one still, else `stale_epoch`; -1 claims in any case. `claim_id` makes it
    idempotent: the same id gets the same epoch again ("": every claim is a new one).
    """

    request_id: str
    worker_id: str
    replica_id: str
    delivery: int = 1
    token: str = ""
    sequence: int = 0
    after_epoch: int = -1
    claim_id: str = ""


class Claimed(msgspec.Struct, frozen=True, kw_only=True, tag="claimed", omit_defaults=True):
    """Ownership: only frames with this `epoch`, from index `len(token_ids)` on, are accepted from now on.

    `token_ids` are the output tokens that the client already has; `waited_s` is how long it was in the queue: since its
    publication, or since it was taken from its last owner; `budget_s` what is left of the budget.
    """

    epoch: int
    budget_s: float
    waited_s: float
    token_ids: tuple[int, ...] = ()


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag="gone"):
    """Nobody wants this request any more: acknowledge its queue message and forget it."""

    reason: str


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel", omit_defaults=True):
    """Gateway → worker: stop working on this request (at this epoch or an older one).

    With `requeue` the queue message goes back (negative acknowledgement) so that another claim can resume it. With
    `superseded` somebody else owns the request: the message is theirs and is left alone. Otherwise it is acknowledged.
    """

    request_id: str
    epoch: int
    requeue: bool = False
    superseded: bool = False


class Owned(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A request at an epoch. `index` counts the output tokens that were sent to the gateway, or have reached it."""

    request_id: str
    epoch: int
    index: int = 0


class Check(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    """Gateway → worker: I have heard nothing of these for a while; do you still run them?

    Answered with those that the worker does run. Who serves no such call any more is dead, who does not answer hangs.
    """

    requests: tuple[Owned, ...]


class Running(msgspec.Struct, frozen=True, kw_only=True, tag="running", omit_defaults=True):
    """The requests of a `Check` that run here. `index` beyond what the gateway has means that frames were lost."""

    requests: tuple[Owned, ...] = ()


class Holds(msgspec.Struct, frozen=True, kw_only=True, tag="holds"):
    """Worker → gateway, every few seconds: I run these requests of yours."""

    worker_id: str
    requests: tuple[Owned, ...]


class Unwanted(msgspec.Struct, frozen=True, kw_only=True, tag="unwanted", omit_defaults=True):
    """The requests of a `Holds` for which nobody waits (`ended`), or which somebody else owns now (`superseded`)."""

    ended: tuple[str, ...] = ()
    superseded: tuple[str, ...] = ()


class Trial(msgspec.Struct, frozen=True, kw_only=True, tag="trial", omit_defaults=True):
    """Gateway → gateways, a hint: a request that has lost several workers runs now (`on`), or does so no more.

    Suspects of one deployment (by its `slug`) are tried one at a time. `guilty`: it was this one, and the others are
    acquitted.
    """

    gateway_id: str
    slug: str
    request_id: str
    on: bool
    guilty: bool = False


class Demand(msgspec.Struct, frozen=True, kw_only=True, tag="demand", omit_defaults=True):
    """Gateway → scheduler, a hint: a request of this deployment was queued just now, or still waits.

    `waiting` of its requests at this gateway run nowhere yet, the oldest for `oldest_s` seconds (0: not said).
    """

    deployment: str
    gateway_id: str = ""
    waiting: int = 0
    oldest_s: float = 0.0


__all__ = [
    "Cancel", "ChatMessage", "ChatPrompt", "Check", "Claim", "Claimed", "Demand", "Failure", "Gone", "Holds", "Owned",
    "Prompt", "Request", "Running", "Sampling", "TextPrompt", "TokensPrompt", "Trial", "Unwanted",
]  # fmt: skip
