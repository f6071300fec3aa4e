"""Checkpoints ahead of demand: what is brought into DRAM or onto an SSD before anybody asks for it. Pure.

A copy is worth the waiting that it saves. If deployment m is asked for within the horizon, and needs a load then, with
probability p, its request waits for the first server on which it can start at once, in the order of their load times

    E = Σ_j t_j (1 - b_j) Π_{i<j} b_i  +  t_far Π_j b_j

where t_j is the load time from where server j has the checkpoint, b_j the probability that none of its devices can take
a newcomer, and t_far the load on a server that has nothing of it. One more copy on server x is worth p·(E - E with it)
seconds. So a first copy near a free device is worth much, a second one as much as the first one's devices are busy, and
a third little. A bursty deployment that may have several replicas needs several places at once: its holders count as
busier, by half of the probability that the next request belongs to the same burst (that of a two-phase hyperexponential
process with balanced means and the same coefficient of variation c: √((c²-1)/(c²+1)) more than chance).

Copies are brought in order of seconds saved per byte, each only if it saves more than what has to go for it, by a
margin. Nothing is begun while anybody waits, nor on a server that loads; one copy at a time per server, and on average
no more bytes per second than the operator's budget. Costs are bounded: a look takes the next few deployments in turn,
and of each only the nearest holders and a few places.

Free DRAM is of no use. So where nothing has to go for it and nothing is written or sent, from a server's own SSD into
its own free DRAM, whatever is deployed is brought, the likeliest first, within a budget of its own: also what was never
asked for, whose first request is as good as any other. What has left a DRAM is not brought back so for a while: the
room was needed, or an operator did not want it there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol, TypeVar

from services.scheduler.view import pool_bytes
from shared.backoff import delay_s
from shared.contracts.records import Phase, ServerRecord
from shared.contracts.residency import Source

DRAM: Final = "dram"
SSD: Final = "ssd"
PEER: Final = "peer"
FAR: Final = "remote"
REMEMBERED: Final = 4096  # refusals and ends

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class AheadRules:
    """`bytes_per_s`: what a server may move ahead of demand, averaged over copies (0: nothing). `fill_bytes_per_s`:
    what it may read from its own SSD into free DRAM (0: only what is worth it by itself). `margin`: by how much a copy
    must be worth more than what goes for it. `least_s`: expected seconds saved, below which nothing is moved.
    `deployments` and `servers`: looked at per look; `holders` and `places`: per deployment. `most`: copies under way in
    all. `refill_s`: how long DRAM is not filled again with what has left it. `settle_s`: until a server's record shows
    what was brought. `lost_s`: a copy of which nothing is heard is over.
    """

    bytes_per_s: float = 100e6
    fill_bytes_per_s: float = 1e9
    margin: float = 0.5
    least_s: float = 0.01
    deployments: int = 8
    servers: int = 64
    holders: int = 4
    places: int = 2
    most: int = 16
    refill_s: float = 600.0
    settle_s: float = 5.0
    lost_s: float = 900.0
    first_backoff_s: float = 10.0
    most_backoff_s: float = 900.0


@dataclass(frozen=True, slots=True)
class Prospect:
    """A checkpoint that may be asked for. `probability`: that it is, within the horizon, and has to be loaded then.

    `burstiness` is the coefficient of variation of the times between its requests; `several`: it may have more than one
    replica.
    """

    deployment: str
    key: str
    weight_bytes: int
    probability: float
    burstiness: float = 1.0
    several: bool = False
    source: Source | None = None


class AheadView(Protocol):
    """What is known at this moment."""

    @property
    def servers(self) -> Mapping[str, ServerRecord]:
        """All servers, by id."""

    @property
    def waiting(self) -> bool:
        """Whether any request waits for a replica."""

    def deployments(self) -> Sequence[str]:
        """Those that may be asked for, the likeliest first as far as is known (`Arrivals.recent`)."""

    def prospect(self, deployment: str) -> Prospect | None:
        """What is expected of this one; None: it needs no copy (its checkpoint is unknown, it is going)."""

    def owner(self, key: str) -> Prospect | None:
        """The same of the deployment whose checkpoint this is; None: nobody will ask for it."""

    def dram_holders(self, key: str) -> Sequence[str]:
        """Servers that have the whole checkpoint in DRAM."""

    def ssd_holders(self, key: str) -> Sequence[str]:
        """Servers that have the whole checkpoint on SSD."""

    def able(self, deployment: str, server_id: str) -> bool:
        """Whether a worker of this server could run this deployment if it were empty."""

    def load_s(self, server_id: str, tier: str, key: str, weight_bytes: int) -> float:
        """A load on this server from that tier, with nobody before it."""

    def busy(self, server_id: str) -> float:
        """The probability that none of its devices can take a newcomer at once."""

    def loading(self, server_id: str) -> bool:
        """Whether a load is queued, runs or was commanded there."""

    def held(self, server_id: str, key: str) -> bool:
        """Whether a replica keeps this checkpoint in the server's DRAM."""


@dataclass(frozen=True, slots=True)
class Prefetching:
    """Bring this checkpoint there. `evicts` are to leave its DRAM first. `saves_s` is what that is expected to save."""

    server_id: str
    key: str
    source: Source | None
    tier: str
    deployment: str
    weight_bytes: int
    evicts: tuple[str, ...] = ()
    saves_s: float = 0.0


@dataclass
class AheadCounts:
    """Totals since the start."""

    begun: int = 0
    done: int = 0
    refused: int = 0
    moved_bytes: int = 0


@dataclass(slots=True)
class _UnderWay:
    """A copy that was asked for."""

    key: str
    tier: str
    weight_bytes: int
    until: float


@dataclass(slots=True)
class _Look:
    """One look: the view, what was reckoned in it already, and places for what is nowhere near, best first."""

    view: AheadView
    now: float
    residents: dict[str, list[tuple[float, str, int]]] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)

    def rank(self, id: str) -> tuple[float, int, str]:
        """Less is better: free devices, free DRAM."""
        return (self.view.busy(id), -_free_bytes(self.view.servers[id]), id)


class Ahead:
    """Plans copies; whoever carries them out says what became of them."""

    def __init__(self, rules: AheadRules | None = None) -> None:
        self.rules = rules or AheadRules()
        self.counts = AheadCounts()
        self._under_way: dict[str, _UnderWay] = {}
        self._not_before: dict[str, float] = {}  # server → when its budget allows the next
        self._settling: dict[tuple[str, str], float] = {}  # server, key → until when nothing is brought there
        self._refusals: dict[tuple[str, str], tuple[int, float]] = {}  # how often in a row, until when
        self._held: dict[tuple[str, str], float] = {}  # server, key → when it was last seen in that DRAM
        self._looks = 0

    @property
    def under_way(self) -> list[tuple[str, str, str]]:
        """Server, checkpoint and tier of every copy that was asked for and has not ended."""
        return [(id, one.key, one.tier) for id, one in self._under_way.items()]

    def done(self, server_id: str, key: str, tier: str, now: float) -> None:
        """It is there."""
        one = self._end(server_id, key)
        if one is not None:
            self.counts.done += 1
            self.counts.moved_bytes += one.weight_bytes
        self._refusals.pop((server_id, key), None)
        _remember(self._settling, (server_id, key), now + self.rules.settle_s)

    def refused(self, server_id: str, key: str, tier: str, now: float) -> None:
        """It could not be brought there; it is tried again later, each time twice as late."""
        self._end(server_id, key)
        self.counts.refused += 1
        tries = self._refusals.get((server_id, key), (0, 0.0))[0] + 1
        rules = self.rules
        wait_s = delay_s(tries, first_s=rules.first_backoff_s, most_s=rules.most_backoff_s)
        _remember(self._refusals, (server_id, key), (tries, now + wait_s))
        # Whatever was wrong may be the server's: it is left alone for a moment as well.
        self._not_before[server_id] = max(self._not_before.get(server_id, now), now + rules.first_backoff_s)

    def server_gone(self, server_id: str) -> None:
        """Nothing is under way there any more."""
        self._under_way.pop(server_id, None)
        self._not_before.pop(server_id, None)

    def plan(self, now: float, view: AheadView) -> list[Prefetching]:
        """What to begin now, the most worthwhile first, at most one per server. It counts as begun."""
        self._expire(now)
        names = view.deployments()
        if (
            view.waiting
            or self.rules.bytes_per_s <= 0.0
            or not names
            or not view.servers
            or len(self._under_way) >= self.rules.most
        ):
            return []
        self._looks += 1
        look = _Look(view, now)
        look.places = self._places(look)
        prospects = [one for name in self._turn(names) if (one := view.prospect(name)) and one.weight_bytes > 0]
        found = [option for one in prospects if one.probability > 0.0 for option in self._options(look, one)]
        found.sort(key=lambda one: (-one[0], one[1].server_id, one[1].key))
        begun = self._begin([one for _, one in found], now, self.rules.bytes_per_s)
        if self.rules.fill_bytes_per_s > 0.0:
            fillings = [option for one in prospects for option in self._fillings(look, one)]
            fillings.sort(key=lambda one: (-one[0], one[1], one[2].server_id, one[2].key))
            begun += self._begin([one for _, _, one in fillings], now, self.rules.fill_bytes_per_s)
        return begun

    # -- what could be done --------------------------------------------------------------------------------------

    def _places(self, look: _Look) -> list[str]:
        """Servers of this look that may begin something: those with free devices, then with free DRAM, first."""
        ids = list(look.view.servers)
        able = [id for id in self._slice(ids, self.rules.servers) if self._may_begin(look, id)]
        return sorted(able, key=look.rank)

    def _may_begin(self, look: _Look, id: str) -> bool:
        record = look.view.servers.get(id)
        return (
            record is not None
            and record.phase is Phase.READY
            and id not in self._under_way
            and self._not_before.get(id, look.now) <= look.now
            and record.loads == 0
            and record.load_queue_bytes == 0
            and not look.view.loading(id)
        )

    def _turn(self, names: Sequence[str]) -> list[str]:
        """The deployments that are looked at now: the first ones always, the others in turn."""
        first = names[: self.rules.deployments // 2]
        return [*first, *self._slice(names[len(first) :], self.rules.deployments - len(first))]

    def _slice(self, ids: Sequence[str], count: int) -> list[str]:
        """So many of them, others with every look."""
        if len(ids) <= count:
            return list(ids)
        begin = self._looks * count
        return [ids[(begin + number) % len(ids)] for number in range(count)]

    def _options(self, look: _Look, prospect: Prospect) -> list[tuple[float, Prefetching]]:
        """What could be done for this one, with its worth per byte; the best few places."""
        view, rules = look.view, self.rules
        key = prospect.key
        if self._on_its_way(key):
            return []  # one after the other: what the next one is worth depends on where this one ends
        in_dram, on_ssd = frozenset(view.dram_holders(key)), frozenset(view.ssd_holders(key))
        near = self._near(look, key, in_dram)
        fresh = (id for id in look.places if id not in on_ssd and id not in in_dram)
        found: list[tuple[float, Prefetching]] = []
        for id in (*near[: rules.places], *islice(fresh, rules.places)):
            if not self._may_bring(look, prospect, id):
                continue
            record = view.servers[id]
            ssd_free = record.ssd_capacity_bytes - record.ssd_used_bytes
            if id not in on_ssd and prospect.weight_bytes > ssd_free:
                continue  # room on an SSD is not made ahead of demand: bytes there are the dearest to bring back
            for tier in (DRAM,) if id in on_ssd else (DRAM, SSD):
                option = self._option(look, prospect, id, tier)
                if option is not None:
                    found.append((option.saves_s / prospect.weight_bytes, option))
        return found

    def _fillings(self, look: _Look, prospect: Prospect) -> list[tuple[float, int, Prefetching]]:
        """Where this one would fill free DRAM from the SSD beside it, with how likely it is asked for and how many
        have it in DRAM already; the best few places."""
        view, key = look.view, prospect.key
        in_dram = view.dram_holders(key)
        for id in self._slice(in_dram, 8 * self.rules.places):
            _remember(self._held, (id, key), look.now)
        if self._on_its_way(key):
            return []
        places = [
            id
            for id in self._near(look, key, frozenset(in_dram))
            if self._may_bring(look, prospect, id)
            and (id, key) not in self._held
            and _missing_bytes(view.servers[id], prospect) <= 0
        ]
        return [
            (
                prospect.probability,
                len(in_dram),
                _copy(prospect, id, DRAM, saves_s=self._worth(look, prospect, id, DRAM)),
            )
            for id in places[: self.rules.places]
        ]

    def _on_its_way(self, key: str) -> bool:
        return any(one.key == key for one in self._under_way.values())

    def _near(self, look: _Look, key: str, in_dram: frozenset[str]) -> list[str]:
        """Servers that have it on SSD only and may begin something, best first; some of them in each look."""
        holders = self._slice(look.view.ssd_holders(key), 8 * self.rules.places)
        return sorted((id for id in holders if id not in in_dram and self._may_begin(look, id)), key=look.rank)

    def _may_bring(self, look: _Look, prospect: Prospect, id: str) -> bool:
        """Whether this one could be used there, is not there nearly, and was not refused lately."""
        key, now, record = prospect.key, look.now, look.view.servers[id]
        return (
            look.view.able(prospect.deployment, id)
            and self._settling.get((id, key), now) <= now
            and self._refusals.get((id, key), (0, now))[1] <= now
            and key not in record.dram_arriving
            and key not in record.ssd_arriving
            and key not in record.quarantined
        )

    def _option(self, look: _Look, prospect: Prospect, server_id: str, tier: str) -> Prefetching | None:
        """This copy, if it is worth having and more than what has to go for it."""
        gain_s = self._worth(look, prospect, server_id, tier)
        if gain_s < self.rules.least_s:
            return None
        evicts, loss_s = ((), 0.0) if tier == SSD else self._room(look, prospect, server_id, gain_s)
        if evicts is None or gain_s - loss_s < self.rules.least_s or gain_s < (1.0 + self.rules.margin) * loss_s:
            return None
        return _copy(prospect, server_id, tier, saves_s=gain_s - loss_s, evicts=evicts)

    def _room(
        self, look: _Look, prospect: Prospect, server_id: str, gain_s: float
    ) -> tuple[tuple[str, ...] | None, float]:
        """What has to leave the DRAM of this server, the least worth per byte first, and what that loses. None: there
        is no room, or none that is worth less."""
        record = look.view.servers[server_id]
        missing = _missing_bytes(record, prospect)
        if missing <= 0:
            return (), 0.0
        if missing > record.dram_used_bytes - record.leased_bytes:
            return None, 0.0
        evicts: list[str] = []
        loss_s = 0.0
        for per_byte_s, key, size_bytes in self._residents(look, server_id):
            evicts.append(key)
            loss_s += per_byte_s * size_bytes
            missing -= size_bytes
            if loss_s > gain_s:
                return None, loss_s
            if missing <= 0:
                return tuple(evicts), loss_s
        return None, loss_s

    def _residents(self, look: _Look, server_id: str) -> list[tuple[float, str, int]]:
        """What could leave the DRAM of this server: its worth per byte, the least first, its key and bytes."""
        known = look.residents.get(server_id)
        if known is None:
            record = look.view.servers[server_id]
            free = (
                (key, size_bytes)
                for key, size_bytes in record.dram.items()
                if record.pinned.get(key) != DRAM
                and key not in record.dram_arriving
                and not look.view.held(server_id, key)
            )
            known = look.residents[server_id] = sorted(
                (self._kept_worth(look, server_id, key) / max(1, size_bytes), key, size_bytes)
                for key, size_bytes in free
            )
        return known

    # -- what it is worth ----------------------------------------------------------------------------------------

    def _worth(self, look: _Look, prospect: Prospect, server_id: str, tier: str) -> float:
        """Expected seconds of waiting that one more copy saves: p·(E - E with it)."""
        holders = self._holders(look, prospect)
        better = dict(holders)
        seconds = look.view.load_s(server_id, tier, prospect.key, prospect.weight_bytes)
        better[server_id] = min(seconds, better.get(server_id, math.inf))
        return prospect.probability * max(
            0.0, self._expected_s(look, prospect, holders) - self._expected_s(look, prospect, better)
        )

    def _kept_worth(self, look: _Look, server_id: str, key: str) -> float:
        """Expected seconds of waiting that the copy in this server's DRAM saves as against having it where it is
        besides."""
        prospect = look.view.owner(key)
        if prospect is None or prospect.probability <= 0.0:
            return 0.0
        holders = self._holders(look, prospect, include=server_id)
        without = dict(holders)
        del without[server_id]
        if server_id in look.view.ssd_holders(key):
            without[server_id] = look.view.load_s(server_id, SSD, key, prospect.weight_bytes)
        return prospect.probability * max(
            0.0, self._expected_s(look, prospect, without) - self._expected_s(look, prospect, holders)
        )

    def _holders(self, look: _Look, prospect: Prospect, include: str = "") -> dict[str, float]:
        """Load times on the nearest servers that have it, `include` among them (which has it in DRAM)."""
        view, key = look.view, prospect.key
        found: dict[str, float] = {}
        if include:
            found[include] = view.load_s(include, DRAM, key, prospect.weight_bytes)
        for tier, holders in ((DRAM, view.dram_holders(key)), (SSD, view.ssd_holders(key))):
            for id in holders:
                if len(found) >= self.rules.holders:
                    return found
                if id not in found and id in view.servers and view.able(prospect.deployment, id):
                    found[id] = view.load_s(id, tier, key, prospect.weight_bytes)
        return found

    def _expected_s(self, look: _Look, prospect: Prospect, holders: dict[str, float]) -> float:
        """E: the wait of the next request, if it needs a load."""
        excess = max(0.0, prospect.burstiness**2 - 1.0)
        burst = 0.5 * math.sqrt(excess / (excess + 2.0)) if prospect.several else 0.0
        expected_s, all_busy = 0.0, 1.0
        for id in sorted(holders, key=lambda one: (holders[one], one)):
            busy = 1.0 - (1.0 - look.view.busy(id)) * (1.0 - burst)
            expected_s += holders[id] * (1.0 - busy) * all_busy
            all_busy *= busy
        far_s = self._far_s(look, prospect)
        return expected_s + all_busy * max(far_s, *holders.values()) if holders else far_s

    def _far_s(self, look: _Look, prospect: Prospect) -> float:
        """A load on a server that has nothing of it: any of those looked at."""
        tier = PEER if look.view.ssd_holders(prospect.key) else FAR
        id = look.places[0] if look.places else next(iter(look.view.servers))
        return look.view.load_s(id, tier, prospect.key, prospect.weight_bytes)

    # -- what is under way ---------------------------------------------------------------------------------------

    def _begin(self, options: Sequence[Prefetching], now: float, bytes_per_s: float) -> list[Prefetching]:
        begun: list[Prefetching] = []
        for one in options:
            if len(self._under_way) >= self.rules.most:
                break
            if one.server_id in self._under_way or self._on_its_way(one.key):
                continue
            begun.append(one)
            self.counts.begun += 1
            self._under_way[one.server_id] = _UnderWay(one.key, one.tier, one.weight_bytes, now + self.rules.lost_s)
            self._not_before[one.server_id] = now + one.weight_bytes / bytes_per_s
        return begun

    def _end(self, server_id: str, key: str) -> _UnderWay | None:
        one = self._under_way.get(server_id)
        if one is None or one.key != key:
            return None
        del self._under_way[server_id]
        return one

    def _expire(self, now: float) -> None:
        self._under_way = {id: one for id, one in self._under_way.items() if one.until > now}
        self._settling = {pair: until for pair, until in self._settling.items() if until > now}
        self._held = {pair: at for pair, at in self._held.items() if at + self.rules.refill_s > now}
        # A refusal is remembered for as long again, so that the next one waits longer.
        self._refusals = {
            pair: (tries, until)
            for pair, (tries, until) in self._refusals.items()
            if until + self.rules.most_backoff_s > now
        }
        self._not_before = {id: until for id, until in self._not_before.items() if until > now}


def _free_bytes(record: ServerRecord) -> int:
    return record.dram_capacity_bytes - record.dram_used_bytes


def _missing_bytes(record: ServerRecord, prospect: Prospect) -> int:
    """What has to leave the server's DRAM for it; 0 or less: nothing."""
    return pool_bytes(record, prospect.key, prospect.weight_bytes) - _free_bytes(record)


def _copy(
    prospect: Prospect, server_id: str, tier: str, *, saves_s: float, evicts: tuple[str, ...] = ()
) -> Prefetching:
    return Prefetching(
        server_id=server_id,
        key=prospect.key,
        source=prospect.source,
        tier=tier,
        deployment=prospect.deployment,
        weight_bytes=prospect.weight_bytes,
        evicts=evicts,
        saves_s=saves_s,
    )


def _remember(memory: dict[tuple[str, str], V], key: tuple[str, str], value: V) -> None:
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > REMEMBERED:
        del memory[next(iter(memory))]
