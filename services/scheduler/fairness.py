"""Who goes first, and who has had his turn: a bound on waiting, whatever the others do. Pure.

Deployments that want a first replica stand in line (`Line`). Where no place comes free by itself, a running replica
that has had its tenure may be *parked* for the first in line, as late as the bound allows: the requests of the parked
one go back to its queue, it joins the end of the line, and they go on later where they were. Priority decides the order
while there is slack, and never takes the slack that the others need. `docs/placement.md` states and proves the bound;
the names there are those here.

What a *place* is, the caller says: as many as can be held at once by contenders of any size (for models that fit
everywhere, the workers). Seconds are monotonic ones of the scheduler's clock.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from services.scheduler.line import Line

EPSILON_S: Final = 1e-6  # sums of floats are not exact
LOOKS: Final = 64  # closer looks at whether somebody may jump the line, in one go


@dataclass(frozen=True, slots=True)
class FairnessRules:
    """`start_within_s`: a request that heads its deployment's queue starts within it (infinite: no promise, nobody is
    parked for being late). `tenure_min_s`: nobody is parked sooner after it became ready. `turn_s`: what a turn costs
    besides the newcomer's startup (the word to the one who leaves, its last step, noticing that it has gone).
    `look_s`: a scheduler with nothing else to do looks again after it."""

    start_within_s: float = 60.0
    tenure_min_s: float = 5.0
    turn_s: float = 0.5
    look_s: float = 0.25


@dataclass(frozen=True, slots=True)
class Bound:
    """Whether W is held for the deployments that want or hold places now, whatever each of them does.

    `least_s` is the least W that would be; `held` says that `start_within_s` is not below it. `contenders` want or
    hold one of `places`; a turn is `tenure_s` after the longest of their startups, `overhead_s`. `late` of those who
    wait now cannot be served in time any more.
    """

    held: bool
    start_within_s: float
    least_s: float
    contenders: int
    places: int
    tenure_s: float
    overhead_s: float
    late: int = 0


@dataclass
class FairnessCounts:
    """Totals since the start. `turns` are replicas placed for a first in line, `parks` those that were parked, by why:
    `late` (the bound), `outranked` (a higher priority), `shared` (its deployment has others). `unpromised` deployments
    came when W could not be promised to them."""

    turns: int = 0
    parks: int = 0
    late: int = 0
    outranked: int = 0
    shared: int = 0
    unpromised: int = 0


@dataclass(slots=True)
class _Known:
    """A deployment that waits, or holds something: what its startup takes, all told, how many replicas it has, and
    whether W was promised to it when it began to wait."""

    priority: int
    startup_s: float
    held: int = 0
    promised: bool = False


@dataclass(slots=True)
class _Holder:
    """A replica with a place. It loads while `ready_at` is None."""

    name: str
    ready_at: float | None


class Fairness:
    """The order among deployments, and the tenure of replicas.

    Every call costs O(√n) at most for n deployments in line, but for `order` (O(m log m) for m names) and `bound`
    (O(n)).
    """

    def __init__(self, rules: FairnessRules) -> None:
        self.rules = rules
        self.counts = FairnessCounts()
        self._line = Line()
        self._known: dict[str, _Known] = {}
        self._startups_s = 0.0  # the sum over the known
        self._holders: dict[str, _Holder] = {}
        self._left_at: dict[str, float] = {}  # when deployments lost their last place, until they have one
        self._places = 1
        self._tenure_s = rules.tenure_min_s
        self._low = _Tenures(rules.tenure_min_s)
        self._high = _Tenures(rules.tenure_min_s)
        self._asked: tuple[str, float] | None = None
        self._answer: tuple[bool, float | None] = (False, None)
        self._suit()

    # -- what happens --------------------------------------------------------------------------------------------

    def set_places(self, places: int) -> None:
        """So many contenders can hold a place at once."""
        if max(1, places) != self._places:
            self._places = max(1, places)
            self._suit()

    def wanting(self, name: str, since: float, priority: int, startup_s: float, now: float) -> bool:
        """This deployment has had no replica and a request waiting since then; whether W was promised to it.

        Saying so again costs nothing. `startup_s` is the whole of its startup as estimated, room included; one that is
        estimated only slightly differently leaves everything as it is. Who had a place until a moment ago, or has one
        that it is leaving, waits since then, however long one of its requests has waited behind its others.
        """
        known = self._known.get(name)
        if known is not None and known.held and name not in self._line:
            self._left_at[name] = now
        since = max(since, self._left_at.get(name, -math.inf))
        turn_s = startup_s + self.rules.turn_s
        if known is not None and name in self._line:
            known.priority, self._asked = priority, None
            same = abs(turn_s - known.startup_s) <= 0.1 * known.startup_s
            if not same or self._line.since(name) != since:
                self._line.drop(name)
                self._know(name, priority, turn_s)
                self._line.put(name, since, turn_s)
                self._suit()
            return known.promised
        known = self._know(name, priority, turn_s)
        self._line.put(name, since, turn_s)
        self._suit()
        known.promised = self._slack_s(name, now)[0] >= -EPSILON_S
        self.counts.unpromised += not known.promised
        return known.promised

    def satisfied(self, name: str, now: float) -> None:
        """Nobody waits for this deployment any more, or it cannot be served whatever is done."""
        self._left_at.pop(name, None)
        self._line.drop(name)
        self._forget(name)
        self._suit()

    def placed(self, replica_id: str, name: str, priority: int, startup_s: float, now: float) -> None:
        """A replica was commanded: it holds a place from now on, and its deployment waits no more."""
        self.counts.turns += name in self._line
        self._line.drop(name)
        turn_s = startup_s + self.rules.turn_s
        self._hold(replica_id, name, priority, turn_s, None, now + turn_s)

    def ready(self, replica_id: str, name: str, now: float) -> None:
        """It answers: its tenure begins. Also for one that was never `placed`: an earlier scheduler's."""
        holder = self._holders.get(replica_id)
        if holder is not None and holder.ready_at is not None:
            return
        known = self._known.get(name)
        priority, turn_s = (known.priority, known.startup_s) if known is not None else (0, self._mean_startup_s())
        self._line.drop(name)
        self._hold(replica_id, name, priority, turn_s, now, now)

    def parked(self, replica_id: str, for_name: str, now: float) -> None:
        """It was told to go for that one; counted by why that was right."""
        why = self._why(replica_id, for_name, now)
        self.counts.parks += 1
        self.counts.late += why == "late"
        self.counts.outranked += why == "outranked"
        self.counts.shared += why == "shared"
        self.gone(replica_id, now)

    def gone(self, replica_id: str, now: float) -> None:
        """It holds its place no more."""
        holder = self._holders.pop(replica_id, None)
        if holder is None:
            return
        self._low.drop(replica_id)
        self._high.drop(replica_id)
        self._known[holder.name].held -= 1
        if not self._known[holder.name].held and holder.name not in self._line:
            self._left_at[holder.name] = now
        self._forget(holder.name)
        self._suit()

    # -- what is asked -------------------------------------------------------------------------------------------

    @property
    def tenure_s(self) -> float:
        """The tenure that equal turns of all who want or hold places come to: W·M/C less what a turn costs."""
        return self._tenure_s

    def order(self, names: Iterable[str], now: float) -> list[str]:
        """Who is served first: the higher priority as long as nobody else's bound needs the time, else the longest
        wait. Those who are not in line (they want one more replica) come last, as they were given."""
        given = list(names)
        waiting = [name for name in given if name in self._line]
        rest = [name for name in given if name not in self._line]
        by_wait = sorted(waiting, key=lambda one: (self._line.since(one), one))
        by_rank = sorted(by_wait, key=lambda one: -self._known[one].priority)
        if by_rank == by_wait:
            return by_wait + rest
        everybody_s = self._spare_s("", now)
        budget_s: dict[str, float] = {}  # of those for whom the slack of everybody was not enough
        spent_s = 0.0
        taken: dict[str, None] = {}
        ranks = iter(by_rank)
        first = next(ranks, None)
        for name in by_wait:
            # Whoever outranks the longest wait jumps the line, and pays with a turn of the slack of those before him.
            while first is not None and name not in taken and first != name:
                if first not in taken:
                    turn_s = self._turn_s(first)
                    if spent_s + turn_s > everybody_s and first not in budget_s and len(budget_s) < LOOKS:
                        budget_s[first] = self._spare_s(first, now)
                    outranks = self._known[first].priority > self._known[name].priority
                    if not outranks or spent_s + turn_s > max(everybody_s, budget_s.get(first, -math.inf)):
                        break
                    spent_s += turn_s
                    taken[first] = None
                first = next(ranks, None)
            taken.setdefault(name)
        return [*taken, *rest]

    def urgent(self, name: str, now: float) -> bool:
        """Whether somebody has to be parked now so that this one, or one behind it, starts in time."""
        return name in self._line and self._slack_s(name, now)[1] <= EPSILON_S

    def urgent_at(self, name: str, now: float) -> float | None:
        """When to look again whether this one may have somebody parked, never before that is so; None: never."""
        if name not in self._line or self.rules.start_within_s == math.inf:
            return None
        slack_s = self._slack_s(name, now)[1]
        if slack_s > EPSILON_S:
            # Places that have not had their tenure yet may make it later than that: then it is asked again.
            return now + max(slack_s, 0.04 * self.rules.look_s)
        oldest_at = self._high.oldest_at(now)
        if oldest_at is None or len(self._high) < len(self._holders):
            return now + self.rules.look_s
        short_s = (self._longest_s(self._slack_s(name, now)) or 0.0) - (now - oldest_at)
        return now + min(max(0.5 * short_s, 0.04 * self.rules.look_s), self.rules.look_s)

    def allows(self, name: str, startup_s: float, now: float) -> bool:
        """Whether a place may go to this one, in line or not, without breaking what was promised to those before it."""
        return self._spare_s(name, now) >= startup_s + self.rules.turn_s + self.rules.tenure_min_s

    def parkable(self, replica_id: str, for_name: str, now: float, *, shares: bool = True) -> bool:
        """Whether this replica may be parked now for that deployment, which is in line; only because its deployment has
        others if it `shares`."""
        why = self._why(replica_id, for_name, now)
        return why != "" and (shares or why != "shared")

    def late(self, replica_id: str, for_name: str, now: float) -> bool:
        """Whether it must be parked now for that deployment to start in time."""
        return self._why(replica_id, for_name, now) == "late"

    def slack_s(self, name: str, now: float) -> float:
        """Seconds for which nobody need be parked so that this one, and those behind it, start in time, if all turns
        are equal; infinite for one that is not in line."""
        return self._slack_s(name, now)[1] if name in self._line else math.inf

    def within_s(self, name: str, now: float) -> float:
        """Seconds within which this one starts in any case; infinite if that was not promised."""
        promised = name in self._line and self._known[name].promised
        return self._line.since(name) + self.rules.start_within_s - now if promised else math.inf

    def waiting(self, name: str) -> bool:
        """Whether this deployment is in line."""
        return name in self._line

    def bound(self, now: float) -> Bound:
        """Whether W is held, and the least that would be."""
        startups = [one.startup_s for one in self._known.values()]
        # A place that an extra replica holds is a turn as well.
        turns = sum(max(1, one.held) for one in self._known.values())
        total_s = sum(max(1, one.held) * one.startup_s for one in self._known.values())
        longest_s = max(startups, default=0.0)
        tenure_s = self.rules.tenure_min_s
        others_s = total_s - longest_s + max(0, turns - 1) * tenure_s
        least_s = others_s / self._places + longest_s
        return Bound(
            held=least_s <= self.rules.start_within_s,
            start_within_s=self.rules.start_within_s,
            least_s=least_s,
            contenders=len(startups),
            places=self._places,
            tenure_s=self._tenure_s,
            overhead_s=longest_s,
            late=sum(1 for name in self._line if self._line.since(name) + self.rules.start_within_s < now),
        )

    def check(self) -> None:
        """Invariants: sums are those of their parts; nobody is known for nothing."""
        assert math.isclose(self._startups_s, sum(one.startup_s for one in self._known.values()), abs_tol=1e-3)
        held: dict[str, int] = {}
        for holder in self._holders.values():
            held[holder.name] = held.get(holder.name, 0) + 1
        for name, known in self._known.items():
            assert known.held == held.get(name, 0), f"{name} holds {held.get(name, 0)}, not {known.held}"
            assert known.held > 0 or name in self._line, f"{name} neither waits nor holds anything"
            assert name in self._line or name not in self._left_at, f"{name} has a place again"

    # -- the arithmetic ------------------------------------------------------------------------------------------

    def _why(self, replica_id: str, for_name: str, now: float) -> str:
        """Why this replica may be parked: "late", "outranked", "shared", or "": it may not."""
        holder = self._holders.get(replica_id)
        if holder is None or holder.ready_at is None or for_name not in self._line or holder.name == for_name:
            return ""
        had_s = now - holder.ready_at + EPSILON_S
        if had_s < self.rules.tenure_min_s:
            return ""
        known, contender = self._known[holder.name], self._known[for_name]
        allowed, required_s = self._means(for_name, now)
        if not allowed:
            return ""
        if required_s is not None and had_s >= required_s:
            return "late"
        if known.priority < contender.priority:
            return "outranked"
        if known.held > 1 and had_s >= self._tenure_s and known.priority == contender.priority:
            return "shared"
        return ""

    def _means(self, name: str, now: float) -> tuple[bool, float | None]:
        """Whether this one may go before those who wait longer, and the tenure after which others are parked for it so
        that it is in time. Kept until something changes: a decision asks it of every replica in the way."""
        asked = (name, now)
        if self._asked != asked:
            allowed = self._spare_s(name, now) >= self._turn_s(name)
            self._asked, self._answer = asked, (allowed, self._longest_s(self._slack_s(name, now)))
        return self._answer

    def _spare_s(self, name: str, now: float) -> float:
        """Place-seconds that those before this one in line (not in line: all) can do without; infinite if it is first.

        Who has waited longer than was promised has none to lose, and holds nobody up.
        """
        low, _ = self._line.slack_before(name, now - self.rules.start_within_s)
        return low - self._low.left_s(now) - self._places * now

    def _longest_s(self, slack_s: tuple[float, float]) -> float | None:
        """The longest tenure that all turns could have so that this slack does not run out; None: that of equal turns.

        Slack is concave in the tenure, so the chord between the two tenures for which it is known is never too long.
        """
        low_s, high_s = slack_s
        if high_s > EPSILON_S:
            return None
        least_s = self.rules.tenure_min_s
        if low_s <= 0.0 or low_s <= high_s:
            return least_s
        return least_s + (self._tenure_s - least_s) * low_s / (low_s - min(0.0, high_s))

    def _slack_s(self, name: str, now: float) -> tuple[float, float]:
        """Seconds for which nobody need be parked, for the least tenure and for that of equal turns: the least slack of
        this one and all behind it, less what the present holders may still take, shared by the places."""
        low, high = self._line.slack(name)
        return (
            (low - self._low.left_s(now)) / self._places - now,
            (high - self._high.left_s(now)) / self._places - now,
        )

    def _turn_s(self, name: str) -> float:
        return self._known[name].startup_s + self.rules.tenure_min_s

    def _know(self, name: str, priority: int, turn_s: float) -> _Known:
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = _Known(priority, turn_s)
            self._startups_s += turn_s
        else:
            self._startups_s += turn_s - known.startup_s
            known.priority, known.startup_s = priority, turn_s
        return known

    def _forget(self, name: str) -> None:
        known = self._known.get(name)
        if known is not None and known.held == 0 and name not in self._line:
            del self._known[name]
            self._startups_s = self._startups_s - known.startup_s if self._known else 0.0

    def _hold(
        self, replica_id: str, name: str, priority: int, turn_s: float, ready_at: float | None, from_s: float
    ) -> None:
        known = self._know(name, priority, turn_s)
        self._left_at.pop(name, None)
        if replica_id not in self._holders:
            known.held += 1
        self._holders[replica_id] = _Holder(name, ready_at)
        self._low.put(replica_id, from_s)
        self._high.put(replica_id, from_s)
        self._suit()

    def _mean_startup_s(self) -> float:
        return self._startups_s / len(self._known) if self._known else self.rules.turn_s

    def _suit(self) -> None:
        """Reckon with the tenure that the present numbers come to.

        It is only taken anew when it has changed by a tenth or so: that costs O(n). Promises rest on the least tenure,
        which never changes, so they survive this one's growing and shrinking.
        """
        self._asked = None
        exact_s = self._equal_tenure_s()
        if not self._tenure_s <= exact_s <= 1.3 * self._tenure_s:
            self._tenure_s = max(self.rules.tenure_min_s, 0.9 * exact_s)
            self._high = _Tenures(self._tenure_s)
            for id, from_s in self._low.all():
                self._high.put(id, from_s)
        self._line.suit(
            places=self._places,
            within_s=self.rules.start_within_s,
            low_s=self.rules.tenure_min_s,
            high_s=self._tenure_s,
        )

    def _equal_tenure_s(self) -> float:
        """The tenure with which all who want or hold places have equal turns and are in time."""
        within_s, least_s = self.rules.start_within_s, self.rules.tenure_min_s
        if within_s == math.inf:
            return least_s
        startup_s, others = self._mean_startup_s(), max(1, len(self._known) - 1)
        return max(least_s, min(within_s, self._places * (within_s - startup_s) / others - startup_s))


class _Tenures:
    """Replicas with the moment from which their tenure counts, and how much of it all of them have left together."""

    def __init__(self, tenure_s: float) -> None:
        self._tenure_s = tenure_s
        self._from_s: dict[str, float] = {}  # all of them
        self._young: dict[str, float] = {}  # those that have some left, as far as was looked
        self._ends: list[tuple[float, str]] = []
        self._total_s = 0.0

    def __len__(self) -> int:
        """How many have some left, as of the last look."""
        return len(self._young)

    def all(self) -> list[tuple[str, float]]:
        """Every replica with the moment from which its tenure counts."""
        return list(self._from_s.items())

    def put(self, id: str, from_s: float) -> None:
        """Its tenure counts from that moment."""
        self.drop(id)
        self._from_s[id] = self._young[id] = from_s
        self._total_s += from_s
        heapq.heappush(self._ends, (from_s, id))

    def drop(self, id: str) -> None:
        """It is gone."""
        self._from_s.pop(id, None)
        self._end(id)

    def left_s(self, now: float) -> float:
        """Seconds that all of them have left together."""
        self._look(now)
        return self._total_s + len(self._young) * (self._tenure_s - now)

    def oldest_at(self, now: float) -> float | None:
        """From when the tenure counts of the one with the least left; None: nobody has some left."""
        self._look(now)
        return self._ends[0][0] if self._ends else None

    def _look(self, now: float) -> None:
        while self._ends:
            from_s, id = self._ends[0]
            live = self._young.get(id) == from_s
            if live and from_s + self._tenure_s > now:
                return
            heapq.heappop(self._ends)
            if live:
                self._end(id)

    def _end(self, id: str) -> None:
        from_s = self._young.pop(id, None)
        if from_s is not None:
            self._total_s = self._total_s - from_s if self._young else 0.0


def swaps_per_request(swaps: int, requests: int) -> float:
    """Replicas that left for another deployment's sake, per request: what thrashing would make large."""
    return swaps / requests if requests else 0.0
