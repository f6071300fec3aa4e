"""Text to token ids and back, with the checkpoint's own tokenizer and chat template (no remote code)."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Final

from services.worker.ports import TextStream
from shared.contracts.requests import ChatPrompt, Prompt, TextPrompt
from shared.errors import Code, HearthError

REPLACEMENT: Final = "\ufffd"
# A character has at most four bytes, and no token less than one: what is still no character after so many tokens will
# never be one, and is told as it is (a model may well write broken UTF-8), but for its last character.
PENDING_TOKENS: Final = 8
MOST_PENDING_TOKENS: Final = 256  # bounds the work on a model that writes nothing but broken UTF-8
KEPT_TOKENIZERS: Final = 8  # tokenizers that stay in memory for the next cold start of the same checkpoint

_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model",
    "vocab.json", "merges.txt", "generation_config.json", "config.json",
)  # fmt: skip


class _LibraryRefuses:
    """Within it, what the tokenizers library raises becomes a `HearthError`: it raises `Exception` itself, no subclass,
    which would end the worker if it went on. Everything else goes on."""

    def __init__(self, code: Code, message: str, param: str | None = None) -> None:
        self._refusal = HearthError(code, message, param=param)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is Exception:
            raise self._refusal from error


class ModelTokenizer:
    """A `Tokenizer` (see `services/worker/ports.py`) over transformers' fast tokenizers.

    The Rust tokenizer behind it is used directly: transformers' own call sets truncation on it, which is not
    thread-safe.
    """

    def __init__(self, tokenizer: Any, *, vocab_tokens: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._vocab_tokens = vocab_tokens
        self._eos_token_ids = frozenset(eos_token_ids)

    @property
    def has_chat_template(self) -> bool:
        """See `Tokenizer`."""
        return bool(self._tokenizer.chat_template)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `Tokenizer`."""
        return self._eos_token_ids

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """See `Tokenizer`."""
        if isinstance(prompt, ChatPrompt):
            token_ids = self._encode(self._render(prompt), special=False)
        elif isinstance(prompt, TextPrompt):
            token_ids = self._encode(prompt.text, special=True)
        else:
            token_ids = list(prompt.token_ids)
        if not token_ids:
            raise HearthError(Code.INVALID_REQUEST, "The prompt is empty.", param="prompt")
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_tokens:
            raise HearthError(
                Code.INVALID_REQUEST,
                f"The prompt has a token id outside the vocabulary of {self._vocab_tokens} tokens.",
                param="prompt",
            )
        return token_ids

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """See `Tokenizer`."""
        return _Stream(self._backend, skip_special)

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See `Tokenizer`."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special))

    def text_of(self, token_id: int) -> str:
        """See `Tokenizer`."""
        return str(self._backend.decode([token_id], skip_special_tokens=False))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        with _LibraryRefuses(Code.INVALID_REQUEST, "The model's tokenizer has no tokens for this prompt.", "prompt"):
            return list(self._backend.encode(text, add_special_tokens=special).ids)

    def _render(self, prompt: ChatPrompt) -> str:
        import jinja2

        if not self.has_chat_template:
            raise HearthError(Code.UNSUPPORTED, "This model has no chat template; use completions with a text prompt.")
        messages = [
            {"role": message.role, "content": message.content} | ({"name": message.name} if message.name else {})
            for message in prompt.messages
        ]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (jinja2.TemplateError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            # What a template raises about roles and their order is written for whoever wrote the messages.
            reason = str(error) if isinstance(error, jinja2.TemplateError) else type(error).__name__
            raise HearthError(
                Code.INVALID_REQUEST, f"The model's chat template refuses these messages: {reason}", param="messages"
            ) from error


class _Stream:
    """Incremental decoding by two offsets, as vLLM and text-generation-inference do it.

    `tokenizers.DecodeStream` does the same, but it raises or falls silent for good on broken UTF-8, and cannot tell
    what it holds back.
    """

    def __init__(self, backend: Any, skip_special: bool) -> None:
        self._decode = backend.decode
        self._skip_special = skip_special
        self._token_ids: list[int] = []  # from the beginning of the last piece told; the tokens before do not matter
        self._told = 0  # how many of them have been told
        self._told_text = ""

    def push(self, token_id: int) -> str:
        """See `TextStream`."""
        self._token_ids.append(token_id)
        text = self._decode(self._token_ids, skip_special_tokens=self._skip_special)
        pending = len(self._token_ids) - self._told
        if not text.endswith(REPLACEMENT) or pending >= MOST_PENDING_TOKENS:
            return self._tell(text)
        if pending < PENDING_TOKENS:
            return ""
        # Broken UTF-8. Its last character may still become one; what stands before it is not going to change.
        new = text[len(self._told_text) : -1]
        self._told_text += new
        return str(new)

    def finish(self) -> str:
        """See `TextStream`."""
        if len(self._token_ids) == self._told:
            return ""
        return self._tell(self._decode(self._token_ids, skip_special_tokens=self._skip_special))

    def _tell(self, text: str) -> str:
        new = str(text[len(self._told_text) :])
        if new:
            self._token_ids = self._token_ids[self._told :]
            self._told_text = self._decode(self._token_ids, skip_special_tokens=self._skip_special)
        else:  # a token without text (a special one) leaves no trace, so that a run of them costs nothing
            del self._token_ids[self._told :]
        self._told = len(self._token_ids)
        return new


class Tokenizers:
    """Loads tokenizers from checkpoint directories and keeps the last few. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[Any, ...], ModelTokenizer] = OrderedDict()

    def load(self, directory: Path, config: Any) -> ModelTokenizer:
        """The tokenizer of a checkpoint; `config` is the model's. Raises HearthError: UNSUPPORTED, or
        INVALID_CHECKPOINT."""
        key = (str(directory), *(_stamp(directory / name) for name in _FILES))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        tokenizer = _load(directory, config)
        with self._lock:
            self._kept[key] = tokenizer
            while len(self._kept) > KEPT_TOKENIZERS:
                self._kept.popitem(last=False)
        return tokenizer


def _load(directory: Path, config: Any) -> ModelTokenizer:
    from transformers import AutoTokenizer

    try:
        with _LibraryRefuses(Code.UNSUPPORTED, "The checkpoint's tokenizer.json is not of a kind that is known here."):
            tokenizer = AutoTokenizer.from_pretrained(
                directory, config=config, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise HearthError(
            Code.UNSUPPORTED, f"The checkpoint's tokenizer cannot be loaded ({type(error).__name__})."
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise HearthError(
            Code.UNSUPPORTED, "The checkpoint has no tokenizer.json and none can be made from its tokenizer."
        )
    vocab_tokens = int(config.get_text_config().vocab_size)
    return ModelTokenizer(
        tokenizer, vocab_tokens=vocab_tokens, eos_token_ids=eos_token_ids(directory, config, tokenizer)
    )


def eos_token_ids(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a sequence: generation_config.json's, else config.json's; and the tokenizer's own.

    transformers' `generate()` stops at the first two only. The tokenizer's EOS is added because chat models exist whose
    config names the base model's. Raises HearthError: INVALID_CHECKPOINT.
    """
    named: Any = None
    path = directory / "generation_config.json"
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise HearthError(Code.INVALID_CHECKPOINT, "generation_config.json is no JSON object.") from error
    if named is None:
        named = getattr(config.get_text_config(), "eos_token_id", None)
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise HearthError(
            Code.INVALID_CHECKPOINT, "The checkpoint's eos_token_id is neither a token id nor a list of them."
        )
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*ids, *own])


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
