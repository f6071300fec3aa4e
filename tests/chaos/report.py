"""What a chaos run has shown, as a table for people and as JSON for machines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.builders.load import BUSY, Outcome
from tests.chaos.injector import MIGRATE, Happened

SETTLE_S = 1.0  # what was on its way when the fault came still arrives within this


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value with at least `part` of all at or below it; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)] if ordered else 0.0


@dataclass
class Report:
    """`failures` are what must not be, each in a sentence; without any the run has passed."""

    seed: int
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, dict[str, float]] = field(default_factory=dict)
    migrations: Counter[str] = field(default_factory=Counter)
    history: list[str] = field(default_factory=list)

    def add_outcome(self, outcome: Outcome, *, gateway_killed: bool) -> None:
        """One call of a client."""
        heard = outcome.heard
        if not outcome.difference:
            self.counts["exact"] += 1
            self.counts["recovered"] += heard.hearth.get("recoveries", 0) > 0
            self.counts["migrated"] += heard.hearth.get("migrations", 0) > 0
            self.counts["recoveries"] += heard.hearth.get("recoveries", 0)
            self.counts["migrations"] += heard.hearth.get("migrations", 0)
        elif gateway_killed:
            self.counts["lost with their gateway"] += 1
        elif heard.refused and heard.status in BUSY:
            self.counts["refused, come back later"] += 1
        elif heard.status == 0 and not heard.times:
            self.counts["could not connect"] += 1
        else:
            self.counts["wrong"] += 1
            self.failures.append(
                f"request {heard.request_id} by {outcome.gateway}, {len(heard.times)} events: {outcome.difference}"
            )

    def add_faults(self, happened: Sequence[Happened]) -> None:
        """What was done, and what the streams that it hit noticed of it."""
        gaps: dict[str, list[float]] = defaultdict(list)
        times: Counter[str] = Counter()
        for one in happened:
            if one.fault.kind == MIGRATE:
                self.migrations[one.result or "unanswered"] += 1
                continue
            name = f"{one.fault.kind} {one.fault.service}"
            times[name] += 1
            for stream in one.hit:
                gap = stream.heard.gap_s(one.began, one.began + SETTLE_S)
                if gap > 0:
                    gaps[name].append(gap)
        for name in sorted(times):
            found = gaps[name]
            self.faults[name] = {
                "times": times[name],
                "streams": len(found),
                "gap_p50_s": round(percentile(found, 0.5), 3),
                "gap_p99_s": round(percentile(found, 0.99), 3),
                "gap_max_s": round(max(found, default=0.0), 3),
            }

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "passed": not self.failures,
            "failures": self.failures,
            "counts": dict(self.counts),
            "faults": self.faults,
            "migrations": dict(self.migrations),
            "history": self.history,
        }

    def as_table(self) -> str:
        """For people."""
        lines = [f"seed {self.seed}, {self.seconds:.0f} s", "", "| fault | times | streams hit | gap P50 | P99 | max |"]
        lines.append("|---|---:|---:|---:|---:|---:|")
        for name, row in self.faults.items():
            lines.append(
                f"| {name} | {row['times']:.0f} | {row['streams']:.0f} | {row['gap_p50_s']:.2f} s "
                f"| {row['gap_p99_s']:.2f} s | {row['gap_max_s']:.2f} s |"
            )
        lines += ["", "streams: " + ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))]
        lines.append("migrations asked for: " + ", ".join(f"{n} {name}" for name, n in sorted(self.migrations.items())))
        lines += ["", *(f"FAILED: {failure}" for failure in self.failures)]
        return "\n".join(lines).rstrip()
