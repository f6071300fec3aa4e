"""The words of a placement: what is asked for, who is in the way, what making room takes, what was decided. Pure.

All seconds are estimates unless they say otherwise; `now` and moments are monotonic seconds of the scheduler's clock.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.scheduler.commands import Need
from shared.errors import Failure


class Outcome(enum.StrEnum):
    """What was decided: load at once; stop idle replicas first; make room by moving, awaiting or parking what runs;
    wait until something changes; it cannot be, even if every worker were empty."""

    PLACE = "place"
    EVICT = "evict"
    MAKE_ROOM = "make_room"
    WAIT = "wait"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True, slots=True)
class Startup:
    """A startup in parts: the server's load queue, the bytes on their way, attaching, making room."""

    wait_s: float = 0.0
    move_s: float = 0.0
    attach_s: float = 0.0
    room_s: float = 0.0

    @property
    def load_s(self) -> float:
        """From the command to ready."""
        return self.wait_s + self.move_s + self.attach_s

    @property
    def total_s(self) -> float:
        """From the decision to ready. Bytes may move while room is made on the device, but not in every case (the DRAM
        pool may have to be freed first), so the parts are added."""
        return self.load_s + self.room_s


@dataclass(frozen=True, slots=True)
class Means:
    """What may be done to make room for somebody.

    `evict`: stop idle replicas; `below_min`: also those of deployments that then have fewer than their `min_replicas`;
    `move`: migrate what runs to other workers; `wait`: take no new requests and let what runs end; `park`: stop what
    runs, its requests go back to the queue with their tokens (`parkable` replicas only: see `fairness`).
    """

    evict: bool = True
    below_min: bool = True
    move: bool = True
    wait: bool = True
    park: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """One more replica is wanted.

    `owner` is for whom ("": the deployment): room that is being made for it counts as free. `at` asks about one worker
    only, `away_from` about all but one. `avoid` maps servers that have just failed to load it to how they did.
    `unwanted` are workers that are spoken for. `explain`: some more places are looked at, only to be shown.
    """

    need: Need
    devices: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    owner: str = ""
    at: str = ""
    away_from: str = ""
    avoid: Mapping[str, Failure] = field(default_factory=dict)
    unwanted: frozenset[str] = frozenset()
    means: Means = Means()
    explain: bool = True


@dataclass(frozen=True, slots=True)
class Tenant:
    """A replica that holds a worker, as one who needs its place sees it.

    `evictable`: it is idle and may be stopped now. `movable`: its requests may be migrated. `awaitable`: it may be told
    to take nothing new and to go when what runs has ended. `parkable`: it has had its turn (`fairness`). `running`
    requests of `tokens` in all (prompts and outputs) run in it; `remaining_s` until the last of them is expected to
    end, `resume_s` to recompute them elsewhere (`a·(t_in + t_out) + b`, without loading anything there). `worker_ids`
    are all its devices.
    """

    replica_id: str
    deployment: str
    worker_ids: tuple[str, ...]
    server_id: str
    memory_bytes: int
    key: str
    weight_bytes: int
    running: int = 0
    tokens: int = 0
    idle_s: float = 0.0
    evictable: bool = False
    movable: bool = False
    awaitable: bool = True
    parkable: bool = False
    below_min: bool = False
    priority: int = 0
    remaining_s: float = 0.0
    resume_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Relocation:
    """All requests of a replica go to `to_worker_id`: to its replica `to_replica_id`, or ("") to one that is loaded
    there first, in `load_s`."""

    replica_id: str
    to_worker_id: str
    to_replica_id: str = ""
    load_s: float = 0.0
    resume_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RoomPlan:
    """How room is made: replica ids, disjoint. `seconds` until all of it is there."""

    stops: tuple[str, ...] = ()
    moves: tuple[Relocation, ...] = ()
    waits: tuple[str, ...] = ()
    parks: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def victims(self) -> tuple[str, ...]:
        """Every replica that leaves, once each: the requests of one may go to several places."""
        moved = (one.replica_id for one in self.moves)
        return tuple(dict.fromkeys((*self.stops, *moved, *self.waits, *self.parks)))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place as the decision saw it: `worker_ids` of one server, the first one leads.

    `refused` is why it cannot be, "" if it can; `never`: not even if it were empty. `streams`: the checkpoint is larger
    than the server's DRAM pool; `quarantined`: the server has set its copy aside as corrupt. `tier` is where it has it.
    """

    worker_ids: tuple[str, ...]
    server_id: str
    tier: str
    startup: Startup = Startup()
    room: RoomPlan = RoomPlan()
    free_bytes: int = 0
    refused: str = ""
    never: bool = False
    streams: bool = False
    quarantined: bool = False

    @property
    def worker_id(self) -> str:
        """The one that is commanded."""
        return self.worker_ids[0]


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do for one more replica of `deployment`, and why.

    `candidates` are those that were looked at closely, the chosen one first, then the best; `more` could not have been
    better, or are as good as those. `reason` is one sentence.
    """

    deployment: str
    outcome: Outcome
    candidates: tuple[Candidate, ...] = ()
    chosen: Candidate | None = None
    more: int = 0
    reason: str = ""
