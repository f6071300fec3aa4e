"""Requests that may be killing their workers. Pure.

A worker that dies takes every request with it that it ran, and one of them may be why. So losses are counted: owners
in a row that died (or whose engine did) within `proof_s` of their claim. An owner that lasts longer acquits the
request. Who has lost `SUSPECT_LOSSES` owners is a suspect, and suspects of one deployment are tried one at a time:
those who only shared a worker with the guilty one are not there when it strikes again, and live. At `most` losses a
request is guilty; then the other suspects of its deployment are acquitted, for what happened to them is explained.

Gateways tell each other of their trials, so that they do not try two at once. Two that began at the same moment hear of
each other, and the one whose gateway's id comes later waits; such a word may be lost, and then both are tried.

Drains, migrations and requests that were given back without fault are no losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SUSPECT_LOSSES: Final = 2
MOST_DEPLOYMENTS: Final = 4096


@dataclass(slots=True)
class _Suspicion:
    slug: str
    losses: int


@dataclass(slots=True)
class _Trial:
    request_id: str
    until: float


@dataclass(frozen=True, slots=True)
class News:
    """What the other gateways should know: a suspect is tried (`on`), or no more; `guilty`: it was this one."""

    slug: str
    request_id: str
    on: bool
    guilty: bool = False


class Suspects:
    """The losses of open requests. Seconds are monotonic; memory is bounded by the open requests."""

    def __init__(self, *, most: int, proof_s: float) -> None:
        self._most = most
        self._proof_s = proof_s
        self._losses: dict[str, _Suspicion] = {}
        self._trials: dict[str, _Trial] = {}
        self._elsewhere: dict[str, dict[str, float]] = {}
        self._news: list[News] = []

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
        self._acquit(slug)
        self._news.append(News(slug, request_id, on=False, guilty=True))
        return True

    def stopped(self, slug: str, request_id: str, held_s: float) -> None:
        """A request's owner stopped, for whatever reason."""
        if held_s >= self._proof_s:
            self._losses.pop(request_id, None)
        self._end_trial(slug, request_id)

    def may_try(self, slug: str, request_id: str, now: float) -> bool:
        """Whether a request may have an owner now; a suspect that may is on trial from now on."""
        if self.losses(request_id) < SUSPECT_LOSSES:
            return True
        trial = self._trials.get(slug)
        if trial is not None and trial.request_id != request_id and now < trial.until:
            return False
        if any(now < until for until in self._elsewhere.get(slug, {}).values()):
            return False
        self._trials[slug] = _Trial(request_id, now + self._proof_s)
        self._news.append(News(slug, request_id, on=True))
        return True

    def forget(self, slug: str, request_id: str) -> None:
        """A request has ended."""
        self._losses.pop(request_id, None)
        self._end_trial(slug, request_id)

    def heard(self, gateway_id: str, slug: str, on: bool, guilty: bool, now: float) -> str | None:
        """Another gateway tries a suspect, or does so no more; it may be lost, so nothing lasts without end.

        Returns the request that is on trial here at the same time, if there is one: one of the two must wait.
        """
        elsewhere = self._elsewhere.pop(slug, {})
        elsewhere.pop(gateway_id, None)
        if on:
            elsewhere[gateway_id] = now + self._proof_s
        if guilty:
            self._acquit(slug)
        elsewhere = {one: until for one, until in elsewhere.items() if now < until}
        if elsewhere:
            self._elsewhere[slug] = elsewhere
        while len(self._elsewhere) > MOST_DEPLOYMENTS:
            del self._elsewhere[next(iter(self._elsewhere))]
        trial = self._trials.get(slug) if on else None
        return trial.request_id if trial is not None and now < trial.until else None

    def take_news(self) -> list[News]:
        """What to tell the other gateways, once."""
        news, self._news = self._news, []
        return news

    def _acquit(self, slug: str) -> None:
        for request_id in [key for key, suspicion in self._losses.items() if suspicion.slug == slug]:
            del self._losses[request_id]

    def _end_trial(self, slug: str, request_id: str) -> None:
        trial = self._trials.get(slug)
        if trial is not None and trial.request_id == request_id:
            del self._trials[slug]
            self._news.append(News(slug, request_id, on=False))

    def known(self) -> list[str]:
        """Every request that something is remembered of, for invariants."""
        return [*self._losses, *(trial.request_id for trial in self._trials.values())]
