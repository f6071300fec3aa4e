"""Which checkpoints a server keeps: a day of a real serverless fleet, replayed against eviction policies.

    python -m benchmarks.eviction [--seeds 5] [--keep-alive-s 60] [--quick]

The trace is Azure Functions 2019 (`simulator/data`): 100 functions, calls per minute. Function k is model k; the calls
of a minute are spread evenly at random in it; sizes are those of common models in bfloat16 (1 to 60 GB), drawn by
seed. A call of a model whose last call is less than a keep-alive ago finds a running replica; any other one is a
*start*, which acquires the checkpoint: from DRAM at no cost, from the SSD in bytes ÷ bandwidth, from its source first
where the SSD tier does not hold it. Loads stand in one queue for the disk and one for each kind of source (an object
store; for `--hub-part` of the models a slower hub); a copy that is being read stays. Both tiers begin empty, and the
first `--warm-up-h` hours are replayed but not counted.

Policies decide what leaves DRAM and SSD: LRU; LFU (all uses ever); GDSF (Cherkasova 1998); Hearth's own
(`services/store/eviction.py`, the production code); and, for comparison, an offline one that sees the future: it
evicts what has the least cost ÷ (bytes × seconds until the next start). For equal costs per byte that is Belady's rule
(the furthest next use goes); with sizes and costs that differ the optimum is NP-hard, so this is a bound in practice,
not in theory.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

from benchmarks.plots import lines
from benchmarks.report import percentile, show, write
from services.store.eviction import HALF_LIFE_S, Candidate, Uses, choose_victims
from simulator.workload.files import minute_counts

GB: Final = 10**9
DAY_S: Final = 86400.0
# Billions of bytes in bfloat16 of models that people serve, and how often one is drawn: 0.5B … 30B parameters.
SIZES: Final = {1.0: 2, 2.2: 2, 3.1: 3, 6.2: 4, 13.5: 4, 16.1: 6, 28.0: 3, 47.0: 1, 61.0: 2}


# -- the workload ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A checkpoint: its bytes, and how fast its source gives them."""

    size_bytes: int
    source_bytes_per_s: float


def counts() -> list[list[int]]:
    """Calls per function and minute."""
    found: list[list[int]] = minute_counts().tolist()
    return found


def starts(table: Sequence[Sequence[int]], keep_alive_s: float, seed: int) -> list[tuple[float, int]]:
    """(seconds, model) of every call that finds no running replica, in order."""
    found: list[tuple[float, int]] = []
    for model, minutes in enumerate(table):
        generator = random.Random(f"{seed}/{model}")
        last = -math.inf
        for minute, calls in enumerate(minutes):
            for at in sorted(generator.uniform(60.0 * minute, 60.0 * (minute + 1)) for _ in range(calls)):
                if at - last > keep_alive_s:
                    found.append((at, model))
                last = at
    return sorted(found)


def models(number: int, seed: int, *, remote: float, hub: float, hub_part: float) -> list[Model]:
    """Sizes and sources by seed."""
    generator = random.Random(f"models/{seed}")
    sizes = generator.choices([int(size * GB) for size in SIZES], list(SIZES.values()), k=number)
    return [Model(size, hub if generator.random() < hub_part else remote) for size in sizes]


# -- policies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A copy that may go: which, how large, and what bringing it back would cost."""

    model: int
    size_bytes: int
    back_s: float


class Policy(Protocol):
    """Chooses what leaves a tier. One object per tier."""

    def used(self, held: Held, now: float, next_s: float) -> None:
        """A start of this model now, which the tier holds from now on; the next one is at `next_s`."""

    def choose(self, candidates: Sequence[Held], needed: int, now: float) -> list[int] | None:
        """Who goes so that this many bytes become free; None if all would not do."""


@dataclass
class Ranked:
    """Evicts what has the least value until there is room."""

    value: Callable[[Held, float], float]
    note: Callable[[Held, float, float], None]
    evicted: Callable[[float], None] = lambda value: None

    def used(self, held: Held, now: float, next_s: float) -> None:
        """See `Policy`."""
        self.note(held, now, next_s)

    def choose(self, candidates: Sequence[Held], needed: int, now: float) -> list[int] | None:
        """See `Policy`."""
        victims, freed = [], 0
        for held in sorted(candidates, key=lambda held: (self.value(held, now), held.model)):
            if freed >= needed:
                break
            victims.append(held.model)
            freed += held.size_bytes
            self.evicted(self.value(held, now))
        return victims if freed >= needed else None


def lru() -> Policy:
    """The least recently used go first."""
    last: dict[int, float] = {}
    return Ranked(lambda held, _: last.get(held.model, 0.0), lambda held, now, _: last.__setitem__(held.model, now))


def lfu() -> Policy:
    """The least used go first, of equals the least recently used."""
    uses: dict[int, float] = {}

    def note(held: Held, now: float, _: float) -> None:
        uses[held.model] = math.floor(uses.get(held.model, 0.0)) + 1 + now / (DAY_S * 10)

    return Ranked(lambda held, _: uses.get(held.model, 0.0), note)


def gdsf() -> Policy:
    """GreedyDual-Size-Frequency: clock + uses × cost ÷ size, the clock being the value of the last victim."""
    clock = 0.0
    uses: dict[int, int] = {}
    values: dict[int, float] = {}

    def note(held: Held, _: float, __: float) -> None:
        uses[held.model] = uses.get(held.model, 0) + 1
        values[held.model] = clock + uses[held.model] * held.back_s / held.size_bytes

    def evicted(value: float) -> None:
        nonlocal clock
        clock = max(clock, value)

    return Ranked(lambda held, _: values.get(held.model, 0.0), note, evicted)


def offline() -> Policy:
    """Sees the future: the least cost per byte and second until the next start goes first."""
    following: dict[int, float] = {}

    def value(held: Held, now: float) -> float:
        wait_s = max(1e-9, following.get(held.model, math.inf) - now)
        return held.back_s / held.size_bytes / wait_s

    return Ranked(value, lambda held, _, next_s: following.__setitem__(held.model, next_s))


@dataclass
class Hearth:
    """The production policy with the books that the store keeps: one for both tiers."""

    uses: Uses[int] = field(default_factory=Uses)
    order: dict[int, int] = field(default_factory=dict)
    count: int = 0

    def used(self, held: Held, now: float, next_s: float) -> None:
        """See `Policy`."""
        self.uses.record(held.model, now)
        self.count += 1
        self.order[held.model] = self.count

    def choose(self, candidates: Sequence[Held], needed: int, now: float) -> list[int] | None:
        """See `Policy`."""
        rows = [
            Candidate(
                one.model, one.size_bytes, self.uses.rate(one.model, now), one.back_s, self.order.get(one.model, 0)
            )
            for one in candidates
        ]
        chosen = choose_victims(rows, needed)
        return None if chosen is None else [one.key for one in chosen]


@dataclass
class HearthSsd:
    """The same books, for the SSD tier: a use is counted once."""

    books: Hearth

    def used(self, held: Held, now: float, next_s: float) -> None:
        """See `Policy`."""

    def choose(self, candidates: Sequence[Held], needed: int, now: float) -> list[int] | None:
        """See `Policy`."""
        return self.books.choose(candidates, needed, now)


def hearth(half_life_s: float = HALF_LIFE_S) -> tuple[Policy, Policy]:
    """For DRAM and SSD."""
    books = Hearth(Uses(half_life_s))
    return books, HearthSsd(books)


POLICIES: Final[dict[str, Callable[[], tuple[Policy, Policy]]]] = {
    "LRU": lambda: (lru(), lru()),
    "LFU": lambda: (lfu(), lfu()),
    "GDSF": lambda: (gdsf(), gdsf()),
    "Hearth": hearth,
    "offline (sees the future)": lambda: (offline(), offline()),
}


# -- the replay --------------------------------------------------------------------------------------------------------


@dataclass
class Tier:
    """One tier of the server: what it holds, and until when a copy is busy arriving."""

    capacity_bytes: int
    policy: Policy
    back_s: Callable[[int], float]
    sizes: Sequence[int]
    ready: dict[int, float] = field(default_factory=dict)
    used_bytes: int = 0

    def held(self, model: int) -> Held:
        """As policies see it."""
        return Held(model, self.sizes[model], self.back_s(model))

    def make_room(self, model: int, now: float, keep: Iterable[int] = ()) -> tuple[float, list[int]]:
        """Take room for a model; (when it is there, who left). What still arrives is waited for if it must be."""
        size, kept, at = self.sizes[model], set(keep), now
        while True:
            needed = size - (self.capacity_bytes - self.used_bytes)
            if needed <= 0:
                return at, []
            candidates = [self.held(one) for one, ready in self.ready.items() if ready <= at and one not in kept]
            victims = self.policy.choose(candidates, needed, at)
            if victims is not None:
                for one in victims:
                    self.drop(one)
                return at, victims
            at = min(ready for ready in self.ready.values() if ready > at)

    def put(self, model: int, ready: float) -> None:
        """The model is held from now on, and whole from `ready` on."""
        self.ready[model] = ready
        self.used_bytes += self.sizes[model]

    def drop(self, model: int) -> None:
        """It is not held any more."""
        if self.ready.pop(model, None) is not None:
            self.used_bytes -= self.sizes[model]


@dataclass
class Tally:
    """What a replay came to."""

    waits_s: list[float] = field(default_factory=list)
    dram_hits: int = 0
    ssd_hits: int = 0
    ssd_bytes: int = 0
    remote_bytes: int = 0
    moving_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """For table and JSON."""
        number = len(self.waits_s)
        return {
            "starts": number,
            "dram_hit_rate": self.dram_hits / number,
            "ssd_hit_rate": self.ssd_hits / number,
            "ssd_read_bytes": self.ssd_bytes,
            "remote_bytes": self.remote_bytes,
            "moving_s": self.moving_s,
            "waited_s": sum(self.waits_s),
            "mean_wait_s": statistics.fmean(self.waits_s),
            "p99_wait_s": percentile(self.waits_s, 99),
        }


def replay(
    trace: Sequence[tuple[float, int]],
    fleet: Sequence[Model],
    make: Callable[[], tuple[Policy, Policy]],
    *,
    dram_bytes: int,
    ssd_bytes: int,
    ssd_bytes_per_s: float,
    warm_up_s: float = 0.0,
) -> Tally:
    """One server, one day. The SSD tier holds whatever DRAM holds; both begin empty."""
    sizes = [model.size_bytes for model in fleet]
    for_dram, for_ssd = make()
    ssd = Tier(ssd_bytes, for_ssd, lambda model: sizes[model] / fleet[model].source_bytes_per_s, sizes)
    dram = Tier(dram_bytes, for_dram, lambda model: sizes[model] / ssd_bytes_per_s, sizes)
    following = _following(trace)
    tally, before = Tally(), Tally()
    disk_free, source_free = 0.0, dict.fromkeys((model.source_bytes_per_s for model in fleet), 0.0)
    for (now, model), next_s in zip(trace, following, strict=True):
        count = tally if now >= warm_up_s else before
        at, moving_s, size = now, 0.0, sizes[model]
        if model in dram.ready:
            at = max(at, dram.ready[model])
            count.dram_hits += 1
        elif model in ssd.ready:
            at, _ = dram.make_room(model, max(at, ssd.ready[model]))
            moving_s = size / ssd_bytes_per_s
            at = disk_free = max(at, disk_free) + moving_s
            count.ssd_hits += 1
            count.ssd_bytes += size
            dram.put(model, at)
        else:
            at, victims = ssd.make_room(model, at)
            for one in victims:
                dram.drop(one)
            at, _ = dram.make_room(model, at)
            # Fetched through DRAM: written to the SSD beside, not read again.
            source = fleet[model].source_bytes_per_s
            moving_s = size / source
            at = source_free[source] = max(at, source_free[source]) + moving_s
            count.remote_bytes += size
            ssd.put(model, at)
            dram.put(model, at)
        for tier in (dram, ssd):
            tier.policy.used(tier.held(model), now, next_s)
        count.waits_s.append(at - now)
        count.moving_s += moving_s
    return tally


def _following(trace: Sequence[tuple[float, int]]) -> list[float]:
    """For every start, when the same model starts next."""
    found = [math.inf] * len(trace)
    seen: dict[int, float] = {}
    for place in range(len(trace) - 1, -1, -1):
        at, model = trace[place]
        found[place] = seen.get(model, math.inf)
        seen[model] = at
    return found


def _row(ssd_gb: float, dram_gb: float, name: str, mean: dict[str, float], least: dict[str, float]) -> list[str]:
    return [
        f"{ssd_gb:.0f}",
        f"{dram_gb:.0f}",
        name,
        f"{mean['dram_hit_rate']:.3f}",
        f"{mean['dram_hit_rate'] + mean['ssd_hit_rate']:.3f}",
        f"{mean['ssd_read_bytes'] / GB / 1000:.1f}",
        f"{mean['remote_bytes'] / GB / 1000:.2f}",
        f"{mean['mean_wait_s']:.2f}",
        f"{mean['p99_wait_s']:.1f}",
        f"{mean['waited_s'] / least['waited_s']:.3f}",
        f"{mean['moving_s'] / least['moving_s']:.3f}",
    ]


def main() -> None:
    """Replay every policy at every size; table, JSON, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="draws of arrivals, sizes and sources")
    parser.add_argument("--quick", action="store_true", help="one draw")
    parser.add_argument("--keep-alive-s", type=float, default=60.0, help="how long a replica outlives its last call")
    parser.add_argument(
        "--ssd-gb-per-s", type=float, default=6.0, help="bandwidth of the disk (default: one NVMe drive)"
    )
    parser.add_argument("--remote-gb-per-s", type=float, default=1.25, help="of the object store (default: 10 Gb/s)")
    parser.add_argument("--hub-gb-per-s", type=float, default=0.4, help="of the slow sources")
    parser.add_argument("--warm-up-h", type=float, default=2.0, help="hours that are replayed but not counted")
    parser.add_argument("--hub-part", type=float, default=0.2, help="part of the models that come from there")
    parser.add_argument("--dram-gb", default="64,128,256,512", help="sizes of the DRAM pool")
    parser.add_argument("--ssd-gb", default="512,1024,4096", help="capacities of the SSD tier")
    parser.add_argument("--half-lives-s", default="", help="further half-lives of Hearth's policy, to compare")
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args()
    policies = dict(POLICIES)
    for half_life in filter(None, options.half_lives_s.split(",")):
        policies[f"Hearth, half-life {half_life} s"] = partial(hearth, float(half_life))
    seeds = range(1 if options.quick else options.seeds)
    table = counts()
    draws = [
        (
            starts(table, options.keep_alive_s, seed),
            models(
                len(table), seed, remote=options.remote_gb_per_s * GB, hub=options.hub_gb_per_s * GB,
                hub_part=options.hub_part,
            ),
        )
        for seed in seeds
    ]  # fmt: skip
    total = statistics.fmean(sum(model.size_bytes for model in fleet) for _, fleet in draws)
    number = statistics.fmean(len(trace) for trace, _ in draws)
    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for ssd_gb in [float(size) for size in options.ssd_gb.split(",")]:
        for dram_gb in [float(size) for size in options.dram_gb.split(",")]:
            means: dict[str, dict[str, float]] = {}
            for name, make in policies.items():
                found = [
                    replay(
                        trace, fleet, make, dram_bytes=int(dram_gb * GB), ssd_bytes=int(ssd_gb * GB),
                        ssd_bytes_per_s=options.ssd_gb_per_s * GB,
                        warm_up_s=3600 * options.warm_up_h,
                    ).figures()
                    for trace, fleet in draws
                ]  # fmt: skip
                means[name] = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
                figures.append(
                    {"policy": name, "dram_gb": dram_gb, "ssd_gb": ssd_gb, "mean": means[name], "seeds": found}
                )
                curves.setdefault(f"{ssd_gb:.0f}", {}).setdefault(name, []).append(
                    (dram_gb, means[name]["mean_wait_s"])
                )
            for name, mean in means.items():
                rows.append(_row(ssd_gb, dram_gb, name, mean, means["LRU"]))
    show(
        f"A day of {len(table)} models ({total / GB:.0f} GB), {number:.0f} starts, mean of {len(draws)} draws",
        [
            "SSD GB", "DRAM GB", "policy", "in DRAM", "on server", "TB from SSD", "TB remote", "mean wait s",
            "P99 wait s", "waited ÷ LRU", "moving ÷ LRU",
        ],
        rows,
    )  # fmt: skip
    write("eviction", {"options": vars(options), "total_bytes": total, "starts": number, "replays": figures})
    if not options.no_plot:
        for capacity, named in curves.items():
            lines(
                f"eviction-{capacity}",
                f"Mean wait of a start, SSD tier of {capacity} GB for {total / GB:.0f} GB of models",
                "DRAM pool, GB",
                "seconds",
                named,
            )


if __name__ == "__main__":
    main()
