"""A request's tokens → its text: detokenising, stop strings, limits, and the frames and the end that the gateway gets.

Everything here is a function of the tokens alone. So a worker that takes over a request replays the tokens that the
client has (the last of them: see `replayed_from`), drops the text that they release (it was delivered with them), and
goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from services.worker.ports import PositionLogprobs, TextStream, Tokenizer
from shared.contracts.generation import End, FinishReason, Frame, Ledger, Logprobs, TokenLogprob, Usage
from shared.contracts.requests import Request, TextPrompt
from shared.errors import Code, Failure

REPLAYED_TOKENS: Final = 128  # of a request that is taken over, at least, if it has so many
REPLACEMENT: Final = "\ufffd"


class StopScan:
    """Finds stop strings in a text that comes in pieces; holds back the end of a piece that may begin one.

    The stop that *ends* first wins, the longest of those that end together: the only rule under which the result does
    not depend on where the pieces are cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops: Final = tuple(dict.fromkeys(stop for stop in stops if stop))
        self.longest: Final = max(map(len, self._stops), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certainly not part of a stop string; after a stop was found, nothing more."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        first: tuple[int, int, str] | None = None
        for stop in self._stops:
            begin = text.find(stop)
            if begin >= 0 and (first is None or (begin + len(stop), begin) < first[:2]):
                first = (begin + len(stop), begin, stop)
        if first is not None:
            self._held, self.found = "", first[2]
            return text[: first[1]]
        held = self._beginning_of_a_stop(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _beginning_of_a_stop(self, text: str) -> int:
        for length in range(min(self.longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class Generation:
    """The output of one request at one epoch.

    `so_far` are the output tokens that the client already has; `limit_tokens` bounds all output tokens (the request's
    max_tokens and what the prompt leaves of the context). `echo_text` precedes the text of the first token. `output`
    are all output tokens, those of earlier owners included.
    """

    def __init__(
        self,
        *,
        request: Request,
        epoch: int,
        tokenizer: Tokenizer,
        prompt_tokens: int,
        limit_tokens: int,
        so_far: Sequence[int] = (),
        echo_text: str = "",
    ) -> None:
        sampling = request.sampling
        self.request_id: Final = request.request_id
        self.epoch = epoch  # changes only if its owner has to claim it anew
        self.prompt_tokens: Final = prompt_tokens
        self.finished: FinishReason | None = None
        self.index = 0
        self._limit_tokens: Final = limit_tokens
        self._tokenizer: Final = tokenizer
        self._stream: Final[TextStream] = tokenizer.stream()
        self._scan: Final = StopScan(sampling.stop)
        eos = frozenset[int]() if sampling.ignore_eos else tokenizer.eos_token_ids
        self._ending: Final = eos | frozenset(sampling.stop_token_ids)
        self.output: list[int] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._text = echo_text
        if limit_tokens <= 0:
            self.finished = FinishReason.LENGTH
        for token_id in so_far[replayed_from(tokenizer, so_far, self._scan.longest) :]:
            self.push(token_id)
        if so_far:  # delivered already, the echo with the first of them
            self._token_ids, self._text = [], ""
            self.index = len(so_far)  # all of them, even if an earlier owner's limit was larger than ours
            self.output = [*so_far]
        self.resumed_tokens: Final = len(so_far)

    def push(self, token_id: int, logprobs: PositionLogprobs | None = None) -> None:
        """Take the next token. After the end (`finished`) further ones are ignored."""
        if self.finished is not None:
            return
        self._token_ids.append(token_id)
        self.output.append(token_id)
        self.index += 1
        if logprobs is not None:
            self._logprobs.append(self._named(token_id, logprobs))
        if token_id in self._ending:  # ends the text and is no part of it
            self.finished = FinishReason.STOP
            return
        self._text += self._scan.push(self._stream.push(token_id))
        if self._scan.found is not None:
            self.finished = FinishReason.STOP
        elif self.index >= self._limit_tokens:
            self.finished = FinishReason.LENGTH

    @property
    def left_tokens(self) -> int:
        """The most tokens that may still come."""
        return 0 if self.finished is not None else max(0, self._limit_tokens - self.index)

    @property
    def emitted(self) -> int:
        """Output tokens that frames have carried: all but those that came since the last one."""
        return self.index - len(self._token_ids)

    def frame(self) -> Frame | None:
        """What came since the last frame; None if no token did."""
        if not self._token_ids:
            return None
        frame = Frame(
            request_id=self.request_id,
            epoch=self.epoch,
            index=self.index - len(self._token_ids),
            token_ids=tuple(self._token_ids),
            text=self._text,
            logprobs=tuple(self._logprobs),
        )
        self._token_ids, self._text, self._logprobs = [], "", []
        return frame

    def end(self, reason: FinishReason, *, ledger: Ledger, cached_tokens: int = 0) -> End:
        """The end, with the text that was held back. Take the last `frame` before."""
        text = self._text
        if self._scan.found is None:
            text += self._scan.push(self._stream.finish())
            text += self._scan.finish()
        return End(
            request_id=self.request_id,
            epoch=self.epoch,
            index=self.index,
            reason=FinishReason.STOP if self._scan.found is not None else reason,
            text=text,
            stop=self._scan.found,
            usage=self.usage(cached_tokens),
            ledger=ledger,
        )

    def failed(self, failure: Failure, *, ledger: Ledger) -> End:
        """The end by a failure, after what frames have carried."""
        return End(
            request_id=self.request_id,
            epoch=self.epoch,
            index=self.emitted,
            failure=failure,
            usage=self.usage(),
            ledger=ledger,
        )

    def usage(self, cached_tokens: int = 0) -> Usage:
        """Tokens so far; those of earlier owners of the request count too."""
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.index, cached_tokens=cached_tokens)

    def _named(self, token_id: int, logprobs: PositionLogprobs) -> Logprobs:
        text_of = self._tokenizer.text_of
        return Logprobs(
            chosen=TokenLogprob(token_id=token_id, text=text_of(token_id), logprob=logprobs.chosen),
            top=tuple(TokenLogprob(token_id=id, text=text_of(id), logprob=value) for id, value in logprobs.top),
        )


def replayed_from(tokenizer: Tokenizer, token_ids: Sequence[int], longest_stop: int) -> int:
    """The index from which on a replay of `token_ids` leads to the same state as one from the beginning.

    All of them would keep the worker's loop, and whoever waits for the request, busy for 10 µs a token. What a
    detokeniser holds back is forgotten after two tokens in a row that are whole characters by themselves; what a scan
    for stop strings (of at most `longest_stop` characters) holds back is shorter than a stop string.
    """
    begin = len(token_ids)
    while begin > 0:
        begin = max(0, begin - REPLAYED_TOKENS)
        if len(tokenizer.decode(token_ids[begin:])) >= 4 * longest_stop:  # more than enough, whatever is left of bytes
            break
    while begin > 0 and not all(_whole(tokenizer, token_id) for token_id in token_ids[begin : begin + 2]):
        begin -= 1
    return begin


def _whole(tokenizer: Tokenizer, token_id: int) -> bool:
    text = tokenizer.decode([token_id])
    return text != "" and REPLACEMENT not in text


def encode(request: Request, tokenizer: Tokenizer) -> tuple[tuple[int, ...], str]:
    """Token ids of the prompt, and the text that precedes the completion. Raises like `Tokenizer.encode_prompt`."""
    token_ids = tuple(tokenizer.encode_prompt(request.prompt))
    if not request.echo:
        return token_ids, ""
    if isinstance(request.prompt, TextPrompt):
        return token_ids, request.prompt.text
    return token_ids, tokenizer.decode(token_ids)


def limit_tokens(request: Request, *, prompt_tokens: int, max_context_tokens: int) -> int | Failure:
    """How many output tokens the request may have, or why it cannot have any."""
    room = max_context_tokens - prompt_tokens
    if room <= 0:
        return Failure(
            code=Code.PROMPT_TOO_LONG,
            message=(
                f"The prompt has {prompt_tokens} tokens; model {request.deployment} takes at most "
                f"{max_context_tokens} tokens including the completion."
            ),
        )
    asked = request.sampling.max_tokens
    return room if asked is None else min(asked, room)
