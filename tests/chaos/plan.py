"""What goes wrong when, by seed. Pure: the same seed is the same plan."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

KILL, STOP, CUT, END, DRAIN, MIGRATE = "kill", "stop", "cut", "end", "drain", "migrate"

# How long each kind of fault lasts on each kind of process, in seconds (shortest, longest), and how often it is drawn.
# All may be silent for longer than anybody waits for them.
FAULTS: Mapping[tuple[str, str], tuple[float, float, int]] = {
    (KILL, "worker"): (0.0, 4.0, 6),
    (STOP, "worker"): (1.0, 10.0, 4),
    (CUT, "worker"): (1.0, 10.0, 4),
    (END, "worker"): (0.0, 2.0, 2),
    (DRAIN, "worker"): (3.0, 12.0, 2),
    (MIGRATE, "worker"): (0.0, 0.0, 10),
    (KILL, "store"): (0.0, 4.0, 2),
    (STOP, "store"): (1.0, 8.0, 1),
    (CUT, "store"): (1.0, 8.0, 1),
    (KILL, "scheduler"): (0.0, 4.0, 2),
    (STOP, "scheduler"): (1.0, 8.0, 1),
    (CUT, "scheduler"): (1.0, 8.0, 1),
    (KILL, "gateway"): (0.0, 4.0, 2),
    (STOP, "gateway"): (0.5, 8.0, 2),
    (CUT, "gateway"): (0.5, 8.0, 2),
    (KILL, "nats"): (0.2, 3.0, 2),
    (STOP, "nats"): (0.5, 4.0, 1),
    (KILL, "redis"): (0.2, 3.0, 2),
    (STOP, "redis"): (0.5, 4.0, 1),
}


@dataclass(frozen=True)
class Fault:
    """`kind` happens to `victim`, a process of kind `service`, at `at_s` and is over `lasts_s` later."""

    at_s: float
    kind: str
    service: str
    victim: str
    lasts_s: float


def faults(seed: int, names: Mapping[str, Sequence[str]], every_s: float) -> Iterator[Fault]:
    """An endless plan: a fault every `every_s` seconds in the mean. `names`: the processes of each kind of service."""
    dice = random.Random(seed)
    kinds = [pair for pair in FAULTS if names.get(pair[1])]
    weights = [FAULTS[pair][2] for pair in kinds]
    at_s = 0.0
    while True:
        at_s += min(4 * every_s, dice.expovariate(1 / every_s))
        kind, service = dice.choices(kinds, weights)[0]
        shortest, longest, _ = FAULTS[kind, service]
        yield Fault(at_s, kind, service, dice.choice(list(names[service])), dice.uniform(shortest, longest))
