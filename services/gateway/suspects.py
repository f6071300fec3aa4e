"""Requests that may be killing their workers. Pure.

A worker that dies takes every request with it that it ran, and one of them may be why. So losses are counted: owners
in a row that died (or whose engine did) within `proof_s` of their claim. An owner that lasts longer acquits the
request. Who has lost `SUSPECT_LOSSES` owners is a suspect, and suspects of one deployment are tried one at a time:
those who only shared a worker with the guilty one are not there when it strikes again, and live. At `most` losses a
request is guilty; then the other suspects of its deployment are acquitted, for what happened to them is explained.

Drains, migrations and requests that were given back without fault are no losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SUSPECT_LOSSES: Final = 2


@dataclass(slots=True)
class _Suspicion:
    slug: str
    losses: int


@dataclass(slots=True)
class _Trial:
    request_id: str
    until: float


class Suspects:
    """The losses of open requests. Seconds are monotonic; memory is bounded by the open requests."""

    def __init__(self, *, most: int, proof_s: float) -> None:
        self._most = most
        self._proof_s = proof_s
        self._losses: dict[str, _Suspicion] = {}
        self._trials: dict[str, _Trial] = {}

    def losses(self, request_id: str) -> int:
        """Owners in a row that this request has lost shortly after their claim."""
        found = self._losses.get(request_id)
        return found.losses if found else 0

    def lost(self, slug: str, request_id: str, held_s: float) -> bool:
        """A request's owner died, `held_s` after its claim. True: the request is guilty."""
        self.stopped(slug, request_id, held_s)
        if held_s >= self._proof_s:
            return False
        found = self._losses.setdefault(request_id, _Suspicion(slug, 0))
        found.losses += 1
        if found.losses < self._most:
            return False
        for other in [key for key, suspicion in self._losses.items() if suspicion.slug == slug and key != request_id]:
            del self._losses[other]
        return True

    def stopped(self, slug: str, request_id: str, held_s: float) -> None:
        """A request's owner stopped, for whatever reason."""
        if held_s >= self._proof_s:
            self._losses.pop(request_id, None)
        trial = self._trials.get(slug)
        if trial is not None and trial.request_id == request_id:
            del self._trials[slug]

    def may_try(self, slug: str, request_id: str, now: float) -> bool:
        """Whether a request may have an owner now; a suspect that may is on trial from now on."""
        if self.losses(request_id) < SUSPECT_LOSSES:
            return True
        trial = self._trials.get(slug)
        if trial is not None and trial.request_id != request_id and now < trial.until:
            return False
        self._trials[slug] = _Trial(request_id, now + self._proof_s)
        return True

    def forget(self, slug: str, request_id: str) -> None:
        """A request has ended."""
        self._losses.pop(request_id, None)
        trial = self._trials.get(slug)
        if trial is not None and trial.request_id == request_id:
            del self._trials[slug]

    def known(self) -> list[str]:
        """Every request that something is remembered of, for invariants."""
        return [*self._losses, *(trial.request_id for trial in self._trials.values())]
