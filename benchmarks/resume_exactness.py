"""How often a stream that was resumed differs from the undisturbed one: prefill and decode round differently.

    python -m benchmarks.resume_exactness [--streams 200] [--tokens 16] [--models DIR]

A stream that moves to another worker, or that another worker takes over, is prefilled there: the keys and values of its
tokens come out of one large matrix product instead of many small ones. In exact arithmetic they are the same. Here they
are added up in another order, and where the last bits decide between two tokens, the stream goes another way from there
on (it is then as good a sample as the undisturbed one, but another one).

Half of the streams are greedy, half sampled (temperature 1, top-p 0.95, a frequency penalty). All of them are generated
together, then each is resumed at a token drawn at random, again all of them together, in an engine that has not seen
them. "Other batch" is the control: some of the streams from their beginning, 16 at a time; nothing is resumed there.

The models have random weights, so that the best tokens lie closer together than those of a model that has learnt
something: real ones differ less often. `margin` says how close: the median distance, in natural logarithms, between the
two likeliest tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from benchmarks.models import SHAPES, generate
from benchmarks.report import publish
from services.worker.engine import BatchingStepper
from services.worker.engine_thread import Submission
from services.worker.ports import SequenceEnd, StepToken
from shared.contracts.requests import Sampling

SHAPES_HERE: Final = ("llama-3m", "llama-125m")
DTYPES: Final = ("bfloat16", "float32")
KINDS: Final = ("greedy", "sampled")
CONTROL_SLOTS: Final = 16
CONTROL_STREAMS: Final = 64  # so many of the streams are generated once more in small batches


@dataclass(slots=True)
class Stream:
    """One stream: what goes in, and what comes out undisturbed, in another batch, and resumed at `cut`."""

    kind: str
    prompt: list[int]
    sampling: Sampling
    cut: int
    undisturbed: list[int] = field(default_factory=list)
    control: list[int] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


def streams_of(count: int, tokens: int, vocab: int, seed: int = 0) -> list[Stream]:
    """Prompts of 8 to 40 tokens; greedy and sampled in turn."""
    chance = random.Random(seed)
    streams = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        streams.append(
            Stream(
                kind=kind,
                prompt=[chance.randrange(5, vocab) for _ in range(chance.randrange(8, 41))],
                sampling=Sampling(temperature=0.0, ignore_eos=True, logprobs=2)
                if kind == "greedy"
                else Sampling(seed=number, top_p=0.95, frequency_penalty=0.2, ignore_eos=True, logprobs=2),
                cut=chance.randrange(1, tokens),
            )
        )
    return streams


def run(
    model: Any, parts: Sequence[tuple[Stream, int]], tokens: int, slots: int
) -> list[tuple[list[int], list[float]]]:
    """The tokens from index `first` on of each (stream, first), and the margins; `slots` sequences at a time."""
    stepper = BatchingStepper(model, kv_bytes=1 << 30, slots=slots, max_context_tokens=64 + tokens)
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in parts]
    for number, (stream, first) in enumerate(parts):
        so_far = [*stream.prompt, *stream.undisturbed[:first]]
        stepper.add(Submission(str(number), so_far, first, tokens - first, stream.sampling, frozenset()))
    ended = 0
    while ended < len(parts):
        for event in stepper.step():
            if isinstance(event, StepToken):
                made, margins = found[int(event.sequence_id)]
                made.append(event.token_id)
                if event.logprobs is not None:
                    best, second = event.logprobs.top[:2]
                    margins.append(best[1] - second[1])
            ended += isinstance(event, SequenceEnd)
    stepper.close()
    return found


def measure(model: Any, streams: list[Stream], tokens: int) -> None:
    """Fill in what comes out of every stream."""
    slots = min(len(streams), 128)
    for stream, (made, margins) in zip(streams, run(model, [(one, 0) for one in streams], tokens, slots), strict=True):
        stream.undisturbed, stream.margins = made, margins
    again = streams[:CONTROL_STREAMS]
    for stream, (made, _) in zip(again, run(model, [(one, 0) for one in again], tokens, CONTROL_SLOTS), strict=True):
        stream.control = made
    parts = [(one, one.cut) for one in streams]
    for stream, (made, _) in zip(streams, run(model, parts, tokens, slots), strict=True):
        stream.resumed = [*stream.undisturbed[: stream.cut], *made]


def figures_of(streams: Sequence[Stream]) -> dict[str, Any]:
    """What the table and the JSON say about these streams."""
    differ = [one for one in streams if one.resumed != one.undisturbed]
    controls = [one for one in streams if one.control]
    later = sum(len(one.undisturbed) - one.cut for one in streams)
    return {
        "streams": len(streams),
        "resumed_differ": len(differ),
        "tokens_after_resuming": later,
        "tokens_to_first_difference": [
            next(at for at, (a, b) in enumerate(zip(one.undisturbed, one.resumed, strict=True)) if a != b) - one.cut
            for one in differ
        ],
        "control_streams": len(controls),
        "control_differ": sum(one.control != one.undisturbed for one in controls),
        "control_tokens": sum(len(one.undisturbed) for one in controls),
        "margin_median": statistics.median(value for one in streams for value in one.margins),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--streams", type=int, default=200, help="per model and precision (default: 200)")
    parser.add_argument("--tokens", type=int, default=16, help="of each stream (default: 16)")
    parser.add_argument("--models", type=Path, help="where the models are kept (default: a directory for this run)")
    options = parser.parse_args()
    rows, figures = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for shape in SHAPES_HERE:
            for dtype in DTYPES:
                began = time.monotonic()
                directory = generate((options.models or Path(temporary)) / f"{shape}-{dtype}", shape, dtype)
                model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
                streams = streams_of(options.streams, options.tokens, SHAPES[shape]["vocab_size"])
                measure(model, streams, options.tokens)
                elapsed_s = time.monotonic() - began
                for kind in KINDS:
                    found = figures_of([one for one in streams if one.kind == kind])
                    figures.append({"model": shape, "dtype": dtype, "kind": kind, "elapsed_s": elapsed_s} | found)
                    rows.append(row_of(shape, dtype, kind, found))
                    print(*rows[-1], sep="  ", flush=True)
    columns = [
        "model", "dtype", "streams", "resumed, differ", "per 1,000", "other batch, differ", "per 1,000", "margin",
    ]  # fmt: skip
    title = f"Streams of {options.tokens} tokens, CPU"
    publish("resume_exactness", title, columns, rows, {"tokens": options.tokens, "rows": figures})


def row_of(shape: str, dtype: str, kind: str, found: dict[str, Any]) -> list[str]:
    """One row of the table."""
    return [
        shape,
        dtype,
        f"{found['streams']} {kind}",
        f"{found['resumed_differ']} ({found['resumed_differ'] / max(1, found['streams']):.1%})",
        f"{1000 * found['resumed_differ'] / max(1, found['tokens_after_resuming']):.2f}",
        f"{found['control_differ']} of {found['control_streams']}",
        f"{1000 * found['control_differ'] / max(1, found['control_tokens']):.2f}",
        f"{found['margin_median']:.3f}",
    ]


if __name__ == "__main__":
    main()
