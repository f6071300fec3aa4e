"""Whether the owners of requests are alive: who is asked when, and who is lost. Pure.

An owner sends a frame per step. After `check_s` without one for a request its worker is asked (`Check`); whatever a
worker says is a sign of life. One that has not answered for `lost_after_s` hangs or is cut off. A request that nobody
has vouched for during `quiet_s` is lost although its worker speaks: a worker that refuses to answer cannot keep it.

A worker whose claims carry no token cannot be asked (it is older than the question); for it only `quiet_s` holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.gateway.ownership import Live


@dataclass(slots=True)
class Owner:
    """A worker that owns requests. Monotonic seconds; `asked_at` is None while no question is on its way."""

    worker_id: str
    check_at: float
    open: dict[str, Live] = field(default_factory=dict)
    asked_at: float | None = None
    unanswered_since: float | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What looking at an owner has shown: it is `lost` altogether, or the `quiet` are, and `ask` about the others."""

    lost: bool = False
    quiet: tuple[Live, ...] = ()
    ask: tuple[Live, ...] = ()


class Watch:
    """Owners by worker id. `Owner.check_at` is when the core shall `look` again."""

    def __init__(self, *, check_s: float, lost_after_s: float, quiet_s: float) -> None:
        self._check_s = check_s
        self._lost_after_s = lost_after_s
        self._quiet_s = quiet_s
        self.owners: dict[str, Owner] = {}

    def add(self, live: Live, now: float) -> Owner | None:
        """A request has an owner from now on. Returns an owner that was not watched yet."""
        live.heard_at = now
        owner = self.owners.get(live.worker_id)
        fresh = None
        if owner is None:
            owner = fresh = self.owners[live.worker_id] = Owner(live.worker_id, now + self._check_s)
        owner.open[live.request_id] = live
        owner.unanswered_since = None
        return fresh

    def remove(self, live: Live) -> None:
        """A request is not with its owner any more."""
        owner = self.owners.get(live.worker_id)
        if owner is not None and owner.open.pop(live.request_id, None) is not None and not owner.open:
            del self.owners[live.worker_id]

    def alive(self, worker_id: str) -> None:
        """This worker has said something."""
        owner = self.owners.get(worker_id)
        if owner is not None:
            owner.unanswered_since = None

    def look(self, owner: Owner, now: float) -> Look:
        """What `check_at` has shown; sets the next one. What `ask` names counts as asked."""
        since = owner.unanswered_since
        if since is not None and now - since >= self._lost_after_s:
            return Look(lost=True)
        quiet = tuple(live for live in owner.open.values() if now - live.heard_at >= self._quiet_s)
        ask: tuple[Live, ...] = ()
        silent = [live for live in owner.open.values() if live.token and now - live.heard_at >= self._check_s]
        if owner.asked_at is None and silent:
            ask = tuple(live for live in silent if live not in quiet)
        if ask:
            owner.asked_at = now
            if since is None:
                since = owner.unanswered_since = now
        # Without a silent request the next one may be silent `check_s` after the earliest of the last frames.
        heard = [live.heard_at + (self._check_s if live.token else self._quiet_s) for live in owner.open.values()]
        owner.check_at = max(now + self._check_s / 2, min(heard)) if not silent else now + self._check_s
        if since is not None:
            owner.check_at = max(now + self._check_s / 10, min(owner.check_at, since + self._lost_after_s))
        return Look(quiet=quiet, ask=ask)

    def begin_anew(self, now: float, at: float) -> list[Owner]:
        """Forget every silence until now; look at everybody at second `at`. Returns all owners."""
        for owner in self.owners.values():
            owner.asked_at = owner.unanswered_since = None
            owner.check_at = at
            for live in owner.open.values():
                live.heard_at = now
                live.ahead = False
        return list(self.owners.values())

    def check(self) -> None:
        """Assert every invariant."""
        for worker_id, owner in self.owners.items():
            assert owner.worker_id == worker_id
            assert owner.open, "a worker without requests is not watched"
            assert all(live.worker_id == worker_id for live in owner.open.values())
