"""From what a person asks for to a workload: "gamma with CV 8, 0.8 requests a second, GSM8K-like lengths". By seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from shared.errors import Code, HearthError
from simulator.workload import popularity
from simulator.workload.arrivals import MINUTE_S, Times, check_count, gamma, in_minutes, poisson
from simulator.workload.files import LLM, lengths, minute_counts, own_trace, recorded
from simulator.workload.trace import Trace, merged

GENERATED: Final = ("gamma", "poisson")
FUNCTIONS: Final = "azure-functions"
NAMES: Final = (*GENERATED, FUNCTIONS, *LLM)
DURATION_S: Final = 3600.0
RATE: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked for. `workload` is one of `NAMES` or the path of a user's CSV file.

    `rate` is requests per second over all deployments (None: 1 for generated workloads, what was recorded for traces);
    `duration_s` cuts (None: an hour, or all of a recorded LLM trace or a user's file). `cv` is gamma's. `popularity` is
    "uniform", "zipf:EXPONENT" or "azure" (functions, by their calls a day). `lengths` is "" for the workload's own.
    `from_s` is where in the day of the functions it begins.
    """

    workload: str = "gamma"
    rate: float | None = None
    duration_s: float | None = None
    cv: float = 8.0
    popularity: str = "zipf:1"
    lengths: str = ""
    from_s: float = 0.0


def make(wish: Wish, names: Sequence[str], seed: int) -> Trace:
    """The workload for deployments of these names. A user's trace brings its own names. Raises HearthError:
    INVALID_REQUEST."""
    if wish.rate is not None and not 0 < wish.rate < float("inf"):
        raise HearthError(Code.INVALID_REQUEST, "The rate is requests per second, above 0.")
    if wish.duration_s is not None and not 0 < wish.duration_s < float("inf"):
        raise HearthError(Code.INVALID_REQUEST, "The duration is seconds, above 0.")
    if wish.workload in GENERATED:
        return _generated(wish, names, seed)
    if wish.workload == FUNCTIONS:
        return _functions(wish, names, seed)
    if wish.workload in LLM:
        return _llm(wish, names, seed)
    path = Path(wish.workload)
    if not path.suffix and not path.exists():
        known = ", ".join(NAMES)
        raise HearthError(
            Code.INVALID_REQUEST, f"There is no workload {wish.workload!r}; there are {known}, or a CSV file's path."
        )
    return cut(faster(own_trace(path), wish.rate), wish.duration_s)


def shares(text: str, count: int, generator: np.random.Generator) -> popularity.Shares:
    """The parts that `text` asks for, dealt out at random: which deployment is popular says nothing about its model."""
    kind, _, number = text.partition(":")
    if kind == "uniform" and not number:
        return popularity.uniform(count)
    if kind == "azure" and not number:
        found = popularity.by_counts(count, minute_counts().sum(axis=1))
    elif kind == "zipf":
        try:
            found = popularity.zipf(count, float(number or 1))
        except ValueError:
            raise HearthError(Code.INVALID_REQUEST, f"{number!r} is no Zipf exponent.") from None
    else:
        raise HearthError(
            Code.INVALID_REQUEST, f"There is no popularity {text!r}; there are uniform, zipf:EXPONENT and azure."
        )
    return found[generator.permutation(count)]


def _generated(wish: Wish, names: Sequence[str], seed: int) -> Trace:
    rate, duration_s = wish.rate or RATE, wish.duration_s or DURATION_S
    parts = shares(wish.popularity, len(names), _dice(seed, "popularity"))
    times: list[Times] = []
    for index, part in enumerate(parts.tolist()):
        dice = _dice(seed, "arrivals", index)
        times.append(
            poisson(rate * part, duration_s, dice)
            if wish.workload == "poisson"
            else gamma(rate * part, wish.cv, duration_s, dice)
        )
    what = "Poisson" if wish.workload == "poisson" else f"gamma, CV {wish.cv:g}"
    about = f"{what}, {rate:g} requests/s, popularity {wish.popularity}"
    return _with_lengths(wish, names, seed, times, duration_s, about)


def _functions(wish: Wish, names: Sequence[str], seed: int) -> Trace:
    table = minute_counts()
    first = int(wish.from_s // MINUTE_S)
    minutes = int(-(-(wish.duration_s or DURATION_S) // MINUTE_S))
    if first + minutes > table.shape[1]:
        raise HearthError(
            Code.INVALID_REQUEST, f"The functions were recorded for {table.shape[1]} minutes, not longer."
        )
    chosen = popularity.functions_of(len(names), table.sum(axis=1))
    window = table[chosen, first : first + minutes]
    calls = int(window.sum())
    if not calls:
        raise HearthError(Code.INVALID_REQUEST, "The chosen functions were not called in this time.")
    factor = 1.0 if wish.rate is None else wish.rate * minutes * MINUTE_S / calls
    check_count(calls * factor)
    order = _dice(seed, "popularity").permutation(len(names))
    times = [in_minutes(window[row], _dice(seed, "arrivals", row), factor=factor) for row in order.tolist()]
    about = f"Azure Functions 2019, from minute {first}, counts × {factor:.3g}"
    return _with_lengths(wish, names, seed, times, minutes * MINUTE_S, about)


def _with_lengths(
    wish: Wish, names: Sequence[str], seed: int, times: Sequence[Times], duration_s: float, about: str
) -> Trace:
    drawn_from = wish.lengths or "gsm8k"
    pairs = lengths(drawn_from).draw(sum(len(one) for one in times), _dice(seed, "lengths"))
    return merged(wish.workload, f"{about}, lengths {drawn_from}", duration_s, names, times, *pairs)


def _llm(wish: Wish, names: Sequence[str], seed: int) -> Trace:
    at_s, prompts, outputs = recorded(wish.workload)
    if wish.lengths:
        prompts, outputs = lengths(wish.lengths).draw(len(at_s), _dice(seed, "lengths"))
    parts = shares(wish.popularity, len(names), _dice(seed, "popularity"))
    whose = _dice(seed, "deployments").choice(len(names), size=len(at_s), p=parts).astype(np.int32)
    duration_s = float(at_s[-1]) * len(at_s) / (len(at_s) - 1)
    about = f"Azure LLM 2023, popularity {wish.popularity}, lengths {wish.lengths or 'its own'}"
    whole = Trace(wish.workload, about, duration_s, tuple(names), at_s, whose, prompts, outputs)
    return cut(faster(whole, wish.rate), wish.duration_s)


def faster(trace: Trace, rate: float | None) -> Trace:
    """The same requests with all times stretched so that their mean rate is this one: the CV stays."""
    if rate is None or not trace.duration_s:
        return trace
    factor = len(trace) / trace.duration_s / rate
    about = f"{trace.about}, time × {factor:.3g}"
    return Trace(
        trace.name,
        about,
        trace.duration_s * factor,
        trace.names,
        trace.at_s * factor,
        trace.deployment,
        trace.prompt_tokens,
        trace.output_tokens,
    )


def cut(trace: Trace, duration_s: float | None) -> Trace:
    """Only what comes before this second."""
    if duration_s is None or duration_s >= trace.duration_s:
        return trace
    kept = int(np.searchsorted(trace.at_s, duration_s))
    return Trace(
        trace.name,
        trace.about,
        duration_s,
        trace.names,
        trace.at_s[:kept],
        trace.deployment[:kept],
        trace.prompt_tokens[:kept],
        trace.output_tokens[:kept],
    )


def _dice(seed: int, what: str, index: int = 0) -> np.random.Generator:
    """A stream of its own for everything that is drawn: more deployments do not change what the others get."""
    return np.random.default_rng([seed, *what.encode(), index])
