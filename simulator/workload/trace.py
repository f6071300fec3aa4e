"""A workload in columns: one entry per request, in the order of arrival; and what it really was. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import Code, HearthError
from simulator.fleet.model import Arrival, ModelSpec
from simulator.workload.lengths import within

Times = NDArray[np.float64]
Counts = NDArray[np.int32]


@dataclass(frozen=True)
class Realised:
    """What was really drawn. Rates are requests per second over `duration_s`.

    `cv` is the coefficient of variation of the intervals of one deployment (mean over deployments with at least three
    requests, weighted by their intervals), `cv_all` that of the whole stream; NaN where there is too little.
    """

    requests: int
    duration_s: float
    rate: float
    cv: float
    cv_all: float
    deployments_used: int
    busiest_share: float
    prompt_tokens_mean: float
    output_tokens_mean: float


@dataclass(frozen=True)
class Trace:
    """See the module. `deployment` indexes `names`; `duration_s` is the time that was drawn for, about which `name`
    and `about` tell people."""

    name: str
    about: str
    duration_s: float
    names: tuple[str, ...]
    at_s: Times
    deployment: Counts
    prompt_tokens: Counts
    output_tokens: Counts

    def __len__(self) -> int:
        return len(self.at_s)

    def for_models(self, specs: Sequence[ModelSpec]) -> Trace:
        """The same with lengths that fit the deployments' models, called as they are. Raises HearthError:
        INVALID_REQUEST for another number of deployments."""
        if len(specs) != len(self.names):
            raise HearthError(
                Code.INVALID_REQUEST, f"The workload has {len(self.names)} deployments, the fleet {len(specs)}."
            )
        context = np.array([spec.model.max_context_tokens for spec in specs], dtype=np.int32)
        prompts, outputs = within(self.prompt_tokens, self.output_tokens, context[self.deployment])
        names = tuple(spec.name for spec in specs)
        return Trace(self.name, self.about, self.duration_s, names, self.at_s, self.deployment, prompts, outputs)

    def arrivals(self) -> Iterator[Arrival]:
        """One by one, as the fleet takes them."""
        columns = (
            self.at_s.tolist(),
            self.deployment.tolist(),
            self.prompt_tokens.tolist(),
            self.output_tokens.tolist(),
        )
        for at_s, deployment, prompt_tokens, output_tokens in zip(*columns, strict=True):
            yield Arrival(at_s, self.names[deployment], prompt_tokens, output_tokens)

    @property
    def digest(self) -> str:
        """The same for two workloads that are the same to the bit."""
        found = hashlib.blake2b("\n".join(self.names).encode(), digest_size=16)
        for column in (self.at_s, self.deployment, self.prompt_tokens, self.output_tokens):
            found.update(np.ascontiguousarray(column).tobytes())
        return found.hexdigest()

    def realised(self) -> Realised:
        """What was really drawn."""
        counts = np.bincount(self.deployment, minlength=len(self.names))
        intervals, weighted = 0, 0.0
        for index in np.flatnonzero(counts >= 3).tolist():
            gaps = np.diff(self.at_s[self.deployment == index])
            if (cv := variation(gaps)) == cv:
                intervals += len(gaps)
                weighted += cv * len(gaps)
        count = len(self)
        return Realised(
            requests=count,
            duration_s=self.duration_s,
            rate=count / self.duration_s if self.duration_s else 0.0,
            cv=weighted / intervals if intervals else float("nan"),
            cv_all=variation(np.diff(self.at_s)),
            deployments_used=int((counts > 0).sum()),
            busiest_share=float(counts.max() / count) if count else 0.0,
            prompt_tokens_mean=float(self.prompt_tokens.mean()) if count else 0.0,
            output_tokens_mean=float(self.output_tokens.mean()) if count else 0.0,
        )


def variation(intervals: Times) -> float:
    """The coefficient of variation; NaN for fewer than two intervals or only zeros."""
    if len(intervals) < 2 or not intervals.mean() > 0:
        return float("nan")
    return float(intervals.std() / intervals.mean())


def merged(
    name: str,
    about: str,
    duration_s: float,
    names: Sequence[str],
    times: Sequence[Times],
    prompt_tokens: Counts,
    output_tokens: Counts,
) -> Trace:
    """One process per deployment, put in the order of time (at the same time: of deployments). The lengths belong to
    the requests in that order."""
    at_s = np.concatenate(list(times)) if times else np.zeros(0)
    whose = np.repeat(np.arange(len(times), dtype=np.int32), [len(one) for one in times])
    order = np.argsort(at_s, kind="stable")
    return Trace(name, about, duration_s, tuple(names), at_s[order], whose[order], prompt_tokens, output_tokens)
