"""Who leads: the state machine of a lease in the registry and of the term that fences it. Pure.

One scheduler at a time holds the lease. It commands only until `ttl_s − margin_s` after the moment at which it *asked*
for the lease or its renewal, on its own monotonic clock: the registry cannot have begun to count earlier than that, so
nobody else can have the lease before. No wall clock and no clock of another machine is ever compared with. Should a
clock or a network be worse than `margin_s` allows for, the term decides: it only grows, every command carries it, and
whoever has heard of a higher one refuses (`shared.fence`).

A leader that cannot renew pauses: it keeps its picture, commands nothing, and goes on when it has the lease again, if
nobody else led meanwhile (its new term follows its last one). Otherwise it steps down, and its picture goes.

After the registry was away, or has lost what it held, records have expired that are only about to be written again;
whoever has the lease then waits `settle_s` before it leads, so that it does not place anew what is there.

After Gray and Cheriton, "Leases" (1989); the term is the fencing token of Kleppmann, "How to do distributed locking".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, assert_never

# A registry that has forgotten its terms goes on so far above the highest that whoever asks has heard of: others may
# have had a few that it has not heard of yet.
FORGOTTEN: Final = 1000


@dataclass(frozen=True, slots=True)
class LeaseRules:
    """Seconds. `ttl_s`: how long a lease lasts; `margin_s`: so much earlier its holder stops to command; `renew_s`:
    between two renewals, or two looks of a standby. A registry that was silent for `away_s` may have lost records,
    which are all written again within `settle_s`. `announce_s`: between two announcements of who leads."""

    ttl_s: float = 1.5
    renew_s: float = 0.4
    margin_s: float = 0.3
    away_s: float = 1.0
    settle_s: float = 2.0
    announce_s: float = 5.0


# -- events --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Won:
    """The lease is ours as of what was asked at `asked_at`, under a term that nobody had before."""

    term: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class Taken:
    """Somebody else holds the lease under this term, for `left_s` more unless it is renewed."""

    term: int
    left_s: float


@dataclass(frozen=True, slots=True)
class Kept:
    """The lease was still ours and lasts anew as of what was asked at `asked_at`."""

    term: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class Lost:
    """The lease of this term is not ours any more."""

    term: int


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The registry did not answer."""


@dataclass(frozen=True, slots=True)
class Heard:
    """Somebody has heard of this term; `rival`: another scheduler says that it leads under it."""

    term: int
    rival: bool = False


@dataclass(frozen=True, slots=True)
class Hinted:
    """Some scheduler's record changed: the lease may be free."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """This scheduler ends."""


@dataclass(frozen=True, slots=True)
class Released:
    """The lease was given back, if it was ours."""


Event = Won | Taken | Kept | Lost | Unanswered | Heard | Hinted | StopAsked | Released

# -- actions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Acquire:
    """Take the lease if nobody has it, under a term above `at_least` (by `FORGOTTEN` if the registry knows none)."""

    at_least: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class Renew:
    """Have the lease of this term last anew."""

    term: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class Release:
    """Give the lease of this term back."""

    term: int


@dataclass(frozen=True, slots=True)
class Lead:
    """Begin to lead, with a fresh picture."""

    term: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Command nothing, but keep the picture."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on, under this term."""

    term: int


@dataclass(frozen=True, slots=True)
class StepDown:
    """Lead no longer: the picture goes."""


@dataclass(frozen=True, slots=True)
class StandBy:
    """Somebody else leads: this scheduler is ready to follow. Said once."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell everybody who leads."""

    term: int


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing is held any more."""


Action = Acquire | Renew | Release | Lead | Pause | Resume | StepDown | StandBy | Announce | Ended

# Actions that take time and come back as an event; the others are carried out at once and in order.
LONG = (Acquire, Renew, Release)


class Leadership:
    """The machine. `term` is that of the lease while it is held, else 0; `known` the highest that was ever heard of."""

    def __init__(self, rules: LeaseRules) -> None:
        assert 0 < rules.margin_s < rules.ttl_s
        assert rules.renew_s < rules.ttl_s - rules.margin_s
        self.rules = rules
        self.term = 0
        self.known = 0
        self.leads = False
        self.paused = False
        self._until = -math.inf  # commands are allowed until then
        self._led_term = 0  # the last term under which the picture was kept up
        self._asking = False
        self._ask_at = -math.inf
        self._answered_at: float | None = None
        self._settled_at = -math.inf
        self._bereft = False  # the lease vanished: the registry lost it, or was away
        self._announce_at = math.inf
        self._stood_by = False
        self._silent = False  # the registry did not answer when it was last asked
        self._stopping = False
        self._releasing = False
        self._ended = False
        self._wake = -math.inf

    # -- the machine ---------------------------------------------------------------------------------------------

    def handle(self, event: Event | None, now: float) -> list[Action]:
        """Take an event, or time; say what is wanted."""
        out: list[Action] = []
        if event is not None:
            self._take(event, now, out)
        if self._stopping:
            self._end(out)
        else:
            self._go_on(now, out)
        return out

    def deadline(self) -> float | None:
        """When time alone changes something."""
        return None if self._wake == math.inf else self._wake

    def may_command(self, now: float) -> bool:
        """Whether nobody else can have the lease at this moment."""
        return self.leads and not self.paused and self.term > 0 and now < self._until

    def check(self) -> None:
        """Every invariant."""
        assert self.term <= self.known
        assert not self.paused or self.leads, "paused without having led"
        assert not self.may_command(self._until), "commands without a lease"
        assert not (self.leads and not self.paused) or self.term > 0, "leads without a term"

    # -- events --------------------------------------------------------------------------------------------------

    def _take(self, event: Event, now: float, out: list[Action]) -> None:
        match event:
            case Won():
                self._answered(now)
                self._won(event, now, out)
            case Kept():
                self._answered(now)
                if event.term == self.term:
                    self._lasts(event.asked_at)
            case Taken():
                self._answered(now)
                self._taken(event, now, out)
            case Lost():
                self._answered(now)
                self._ask_at = now
                if event.term == self.term:
                    # It should have lasted: the registry has lost it, and records as well.
                    self._bereft = now < self._until + self.rules.margin_s
                    self._give_up()
            case Unanswered():
                self._asking, self._silent = False, True
                self._ask_at = now + self.rules.renew_s / 2
                if self._releasing:
                    self._give_up()  # it expires by itself
            case Heard():
                self._heard(event, now, out)
            case Hinted():
                if not self.term:
                    self._ask_at = min(self._ask_at, now)
            case StopAsked():
                self._stopping = True
            case Released():
                self._asking = False
                self._give_up()
            case _:
                assert_never(event)

    def _answered(self, now: float) -> None:
        if self._silent and self._answered_at is not None and now - self._answered_at > self.rules.away_s:
            self._settled_at = now + self.rules.settle_s
        self._asking, self._silent, self._answered_at = False, False, now

    def _won(self, event: Won, now: float, out: list[Action]) -> None:
        if event.term <= self.known and not self._stopping:
            self._ask_at = now  # a higher one was heard of meanwhile; what was won is won again above it
            return
        if self.leads and event.term not in (self._led_term + 1, self._led_term + FORGOTTEN + 1):
            self._step_down(out)  # somebody else led in between: the picture may be wrong
        if self._bereft:
            self._bereft = False
            self._settled_at = max(self._settled_at, now + self.rules.settle_s)
        self.term = event.term
        self.known = max(self.known, event.term)
        self._lasts(event.asked_at)

    def _lasts(self, asked_at: float) -> None:
        self._until = max(self._until, asked_at + self.rules.ttl_s - self.rules.margin_s)
        self._ask_at = asked_at + self.rules.renew_s

    def _taken(self, event: Taken, now: float, out: list[Action]) -> None:
        self._give_up()
        self.known = max(self.known, event.term)
        self._bereft = False
        self._ask_at = now + max(0.005, min(event.left_s, self.rules.renew_s))
        self._step_down(out)
        if not self._stood_by and not self._stopping:
            self._stood_by = True
            out.append(StandBy())

    def _heard(self, event: Heard, now: float, out: list[Action]) -> None:
        above = event.term > self.term or (event.rival and event.term == self.term)
        self.known = max(self.known, event.term)
        if self.term and above:
            self._give_up()
            self._ask_at = now
            self._step_down(out)

    def _give_up(self) -> None:
        self.term, self._until = 0, -math.inf

    def _step_down(self, out: list[Action]) -> None:
        if self.leads:
            self.leads = self.paused = False
            out.append(StepDown())

    # -- what follows ----------------------------------------------------------------------------------------------

    def _go_on(self, now: float, out: list[Action]) -> None:
        holds = self.term > 0 and now < self._until
        if self.leads and not self.paused and not holds:
            self.paused = True
            out.append(Pause())
        elif holds and now >= self._settled_at and (self.paused or not self.leads):
            out.append(Resume(self.term) if self.leads else Lead(self.term))
            self.leads, self.paused, self._led_term = True, False, self.term
            self._announce_at = now
        if self.leads and not self.paused and now >= self._announce_at:
            self._announce_at = now + self.rules.announce_s
            out.append(Announce(self.term))
        if not self._asking and now >= self._ask_at:
            self._asking = True
            out.append(Renew(self.term, now) if self.term else Acquire(self.known, now))
        self._wake = self._next(now)

    def _next(self, now: float) -> float:
        times = [math.inf if self._asking else self._ask_at]
        if self.leads and not self.paused:
            times += [self._until, self._announce_at]
        elif self.term and now < self._settled_at:
            times.append(self._settled_at)
        return min(times)

    def _end(self, out: list[Action]) -> None:
        self._wake = math.inf
        self._step_down(out)
        if self._asking or self._ended:
            return
        if self.term:
            self._asking = self._releasing = True
            out.append(Release(self.term))
        else:
            self._ended = True
            out.append(Ended())
