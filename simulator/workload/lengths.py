"""How long prompts and outputs are, in tokens. Pure.

Real pairs of (prompt, output), drawn with replacement, so that what goes together stays together:

* **GSM8K-like**: questions and answers of GSM8K's test set. Their tokens are counted without a tokenizer (`tokens`):
  a word is one token per begun 8 letters, a number one per begun 3 digits, every other visible character one. The
  calculator's annotations (`<<48/2=24>>`), which no model writes, are left out.
* **ShareGPT-like**: context and generated tokens of the Azure LLM inference trace 2023 of a chat service. ShareGPT has
  no clear licence; this trace plays its role.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import Code, HearthError

Tokens = NDArray[np.int32]
_PIECES: Final = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")
_ANNOTATION: Final = re.compile(r"<<[^>]*>>")
_LETTERS: Final = 8
_DIGITS: Final = 3


def tokens(text: str) -> int:
    """About how many tokens a byte-pair tokenizer makes of an English text; at least 1."""
    count = 0
    for piece in _PIECES.findall(text):
        if piece[0].isdigit():
            count += -(-len(piece) // _DIGITS)
        elif piece[0].isalpha():
            count += -(-len(piece) // _LETTERS)
        else:
            count += 1
    return max(1, count)


@dataclass(frozen=True)
class Lengths:
    """Pairs that lengths are drawn from. `prompt_tokens` and `output_tokens` have the same number of entries."""

    name: str
    prompt_tokens: Tokens
    output_tokens: Tokens

    def __post_init__(self) -> None:
        if len(self.prompt_tokens) == 0 or len(self.prompt_tokens) != len(self.output_tokens):
            raise HearthError(Code.INVALID_REQUEST, f"The lengths {self.name} have no pairs of prompt and output.")

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Tokens, Tokens]:
        """So many pairs, with replacement."""
        chosen = generator.integers(0, len(self.prompt_tokens), count)
        return self.prompt_tokens[chosen], self.output_tokens[chosen]


def questions_and_answers(name: str, rows: Iterable[Any]) -> Lengths:
    """Rows with "question" and "answer", as GSM8K has them."""
    pairs = [(tokens(row["question"]), tokens(_ANNOTATION.sub("", row["answer"]))) for row in rows]
    prompts, outputs = zip(*pairs, strict=True) if pairs else ((), ())
    return Lengths(name, np.array(prompts, dtype=np.int32), np.array(outputs, dtype=np.int32))


def within(prompt_tokens: Tokens, output_tokens: Tokens, max_context_tokens: Tokens) -> tuple[Tokens, Tokens]:
    """What fits each request's model: outputs are cut to half of the context, then prompts to what they leave.

    Every prompt and every output keeps at least one token.
    """
    outputs = np.clip(output_tokens, 1, np.maximum(1, max_context_tokens // 2))
    prompts = np.clip(prompt_tokens, 1, np.maximum(1, max_context_tokens - outputs))
    return prompts.astype(np.int32), outputs.astype(np.int32)
