"""The numbers of the scheduler. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.scheduler.ahead import AheadRules
from services.scheduler.fairness import FairnessRules


@dataclass(frozen=True, slots=True)
class Rules:
    """The numbers of the scheduler; seconds and bytes.

    `queues_interval_s`: between two makings sure of all queues. `quick_look_s`: how soon the queues are read again
    after a hint that might ask for more replicas. `command_s`: a command without visible effect is forgotten after it.
    `min_ready_s`: a replica younger than this that has answered nobody yet is not evicted. `stop_retry_s`: after a
    refused stop. `first_backoff_s`, `most_backoff_s`, `most_failures`: see `Trouble`. `patience_s`: how long a model
    for which no server is large enough may wait for one before its requests fail. `word_s`: how long the word of a
    worker is waited for when a replica went away while loading. `forget_s`: how long old failures are remembered.
    `silence_s`: how long a worker at which nobody answers is left alone, unless it speaks before; by then the record of
    one that died is gone.

    Moves: `move_load_s` is how long a destination may be looked for and loaded, `move_migrate_s` how long the
    migrations may take once the last has been asked for; `move_patience_s`: how long a free slot, or room for a
    destination, is waited for; `move_retry_s`: between two tries of what was refused; `move_lost_s`: after it a
    migration that the source's record does not show is over. `relief_pause_s`: between two moves that relieve one
    replica; `relief_extra_s`: how long one more replica is wanted because of a relief that found no place.
    `migrates`: what runs may be moved to make room for others. `fairness`, `ahead`: see there.
    """

    look_interval_s: float = 1.0
    queues_interval_s: float = 30.0
    quick_look_s: float = 0.1
    command_s: float = 10.0
    min_ready_s: float = 1.0
    stop_retry_s: float = 1.0
    silence_s: float = 2.5
    first_backoff_s: float = 1.0
    most_backoff_s: float = 60.0
    most_failures: int = 3
    patience_s: float = 10.0
    word_s: float = 0.5
    forget_s: float = 600.0
    kv_bytes_max: int = 256 * 2**20
    move_load_s: float = 120.0
    move_migrate_s: float = 120.0
    move_patience_s: float = 10.0
    move_retry_s: float = 1.0
    move_lost_s: float = 5.0
    relief_pause_s: float = 3.0
    relief_extra_s: float = 30.0
    most_moves: int = 256
    migrates: bool = True
    fairness: FairnessRules = field(default_factory=FairnessRules)
    ahead: AheadRules = field(default_factory=AheadRules)
