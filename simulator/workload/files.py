"""Reads the real traces that come with Hearth (`simulator/data`), and workloads that users bring.

A user's workload is a CSV file with the header `at_s,model,prompt_tokens,output_tokens` (further columns are ignored):
seconds from the beginning, the name of the deployment, tokens. The lines need not be in order of time.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import math
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import Code, HearthError
from simulator.workload.arrivals import MOST_ARRIVALS
from simulator.workload.lengths import Lengths, Tokens, questions_and_answers
from simulator.workload.trace import Times, Trace

FUNCTIONS: Final = "azure_functions_2019_100.csv.gz"
LLM: Final = {"azure-code": "azure_llm_2023_code.csv.gz", "azure-conv": "azure_llm_2023_conv.csv.gz"}
QUESTIONS: Final = "gsm8k_test.jsonl.gz"
COLUMNS: Final = ("at_s", "model", "prompt_tokens", "output_tokens")
MOST_TOKENS: Final = 10_000_000


def _text(name: str) -> str:
    return gzip.decompress(files("simulator").joinpath("data", name).read_bytes()).decode()


@cache
def minute_counts() -> NDArray[np.int64]:
    """Azure Functions 2019: one row per function, one column per minute of a day."""
    rows = csv.reader(io.StringIO(_text(FUNCTIONS)))
    next(rows)
    return np.array([[int(cell) for cell in row[3:]] for row in rows], dtype=np.int64)


@cache
def recorded(name: str) -> tuple[Times, Tokens, Tokens]:
    """Azure LLM inference 2023 ("azure-code", "azure-conv"): seconds since the first request, context and generated
    tokens."""
    rows = list(csv.DictReader(io.StringIO(_text(LLM[name]))))
    moments = [_seconds(row["TIMESTAMP"]) for row in rows]
    at_s = np.array(moments, dtype=np.float64) - min(moments)
    prompts = np.array([int(row["ContextTokens"]) for row in rows], dtype=np.int32)
    outputs = np.array([int(row["GeneratedTokens"]) for row in rows], dtype=np.int32)
    order = np.argsort(at_s, kind="stable")
    return at_s[order], prompts[order], outputs[order]


def _seconds(stamp: str) -> float:
    """`2023-11-16 18:17:03.9799600`: seven decimals are one more than `datetime` reads."""
    whole, _, fraction = stamp.partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return moment.timestamp() + float(f"0.{fraction or 0}")


@cache
def lengths(name: str) -> Lengths:
    """ "gsm8k", "sharegpt" (see `simulator.workload.lengths`), or those of a recorded LLM trace. Raises HearthError:
    INVALID_REQUEST."""
    if name == "gsm8k":
        return questions_and_answers(name, map(json.loads, _text(QUESTIONS).splitlines()))
    trace = {"sharegpt": "azure-conv"}.get(name, name)
    if trace not in LLM:
        known = ", ".join(("gsm8k", "sharegpt", *LLM))
        raise HearthError(Code.INVALID_REQUEST, f"There are no lengths {name!r}; there are {known}.")
    _, prompts, outputs = recorded(trace)
    return Lengths(name, prompts, outputs)


def own_trace(path: Path) -> Trace:
    """A user's workload. Raises HearthError: INVALID_REQUEST, which says what is wrong in which line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _own(path.name, csv.DictReader(file))
    except OSError as error:
        raise HearthError(Code.INVALID_REQUEST, f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise HearthError(Code.INVALID_REQUEST, f"{path} is no CSV file: {error}.") from error


def _own(name: str, rows: csv.DictReader[str]) -> Trace:
    missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
    if missing:
        raise HearthError(
            Code.INVALID_REQUEST, f"{name} has no column {missing[0]!r}; its first line must be {','.join(COLUMNS)}."
        )
    names: dict[str, int] = {}
    at_s: list[float] = []
    whose: list[int] = []
    tokens: list[tuple[int, int]] = []
    for row in rows:
        at = _number(row, "at_s", name, rows.line_num)
        prompt, output = (int(_number(row, column, name, rows.line_num)) for column in COLUMNS[2:])
        model = (row["model"] or "").strip()
        if not model:
            raise HearthError(Code.INVALID_REQUEST, f"{name}, line {rows.line_num}: the model is missing.")
        if not (1 <= prompt <= MOST_TOKENS and 1 <= output <= MOST_TOKENS):
            raise HearthError(Code.INVALID_REQUEST, f"{name}, line {rows.line_num}: tokens are 1 to {MOST_TOKENS}.")
        at_s.append(at)
        whose.append(names.setdefault(model, len(names)))
        tokens.append((prompt, output))
        if len(at_s) > MOST_ARRIVALS:
            raise HearthError(Code.INVALID_REQUEST, f"{name} has more than {MOST_ARRIVALS} requests.")
    if not at_s:
        raise HearthError(Code.INVALID_REQUEST, f"{name} has no requests.")
    times = np.array(at_s, dtype=np.float64)
    order = np.argsort(times, kind="stable")
    pairs = np.array(tokens, dtype=np.int32)[order]
    return Trace(
        name,
        "a user's trace",
        float(times.max()),
        tuple(names),
        times[order],
        np.array(whose, dtype=np.int32)[order],
        pairs[:, 0],
        pairs[:, 1],
    )


def _number(row: dict[str, str], column: str, name: str, line: int) -> float:
    try:
        found = float(row[column] or "")
    except (TypeError, ValueError):
        found = -1.0
    if not found >= 0 or math.isinf(found):
        raise HearthError(
            Code.INVALID_REQUEST, f"{name}, line {line}: {column} is {row[column]!r}, which is no number from 0 on."
        )
    return found
