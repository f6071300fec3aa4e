"""Generation: worker → gateway. Tokens in order, then exactly one end."""

from __future__ import annotations

import enum

import msgspec

from shared.errors import Failure


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A token with its log probability (natural logarithm)."""

    token_id: int
    text: str
    logprob: float


class Logprobs(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Log probabilities of one position: the chosen token and the most likely alternatives, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


class FinishReason(enum.StrEnum):
    """Why a request's text is complete."""

    STOP = "stop"
    LENGTH = "length"


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts of one request. `cached_tokens` is the part of the prompt whose KV cache was reused."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Ledger(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the time of a request went; seconds and bytes, all measured.

    `queue_s` is the time in the queue, publication → claim; of a request that came back there (it was parked, or its
    worker was lost) all its waits together. It contains the cold start if there was one (`cold`): `decision_s` (demand
    seen → load commanded), `import_s` (source → SSD), `read_s` (SSD → DRAM), `attach_s` (DRAM → usable parameters,
    engine ready). `tier` names the tier in which the load found the checkpoint: "accelerator" (warm), "dram", "ssd",
    "remote". Then `prefill_s` (claim → first token) and `decode_s` (first → last token).

    A request that moved counts its `migrations` and their `rounds`, one that lost its worker its `recoveries`;
    `pause_s` is the longest time between two tokens over which its owner changed.
    """

    cold: bool = False
    tier: str = "accelerator"
    queue_s: float = 0.0
    decision_s: float = 0.0
    import_s: float = 0.0
    read_s: float = 0.0
    attach_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    remote_bytes: int = 0
    ssd_bytes: int = 0
    dram_bytes: int = 0
    migrations: int = 0
    recoveries: int = 0
    rounds: int = 0
    pause_s: float = 0.0


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag="frame", omit_defaults=True):
    """Tokens of one request from one step.

    `index` is the position of the first of `token_ids` among the request's output tokens. `text` is the text that
    these tokens released; it may be empty (half a character, the possible beginning of a stop string).
    """

    request_id: str
    epoch: int
    index: int
    token_ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[Logprobs, ...] = ()


class End(msgspec.Struct, frozen=True, kw_only=True, tag="end", omit_defaults=True):
    """The end of a request: either `reason` or `failure`.

    `index` counts all its output tokens; `text` is what was held back until now.
    """

    request_id: str
    epoch: int
    index: int
    reason: FinishReason | None = None
    failure: Failure | None = None
    text: str = ""
    stop: str | None = None
    usage: Usage = Usage()
    ledger: Ledger = Ledger()


class GivenBack(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The owner of a request (at `epoch`) stops and gives it back to the queue.

    `fault`: its engine died or ran out of memory, which counts against the request; else (a drain, a lost lease) it
    does not.
    """

    request_id: str
    epoch: int
    fault: bool


class FrameBatch(msgspec.Struct, frozen=True, kw_only=True, tag="frames", omit_defaults=True):
    """What one worker has for one gateway after one decode step, in order; `given_back` comes after all `items`."""

    worker_id: str
    items: tuple[Frame | End, ...]
    given_back: tuple[GivenBack, ...] = ()
