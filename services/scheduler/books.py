"""Who holds how much of which worker and of which server's DRAM pool: sums that are kept, never added up anew. Pure.

Two kinds of entries: occupants (replicas, and loads that the registry does not show yet), and rooms that are being
made. A room holds back what the newcomer needs beyond what its victims, who are counted still, will give back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Occupant:
    """Somebody who holds `memory_bytes` of each of its workers and, with `weight_bytes` > 0, the checkpoint `key` in
    their server's DRAM pool."""

    id: str
    worker_ids: tuple[str, ...]
    server_id: str
    memory_bytes: int
    key: str
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Room:
    """Room that is being made on workers for a deployment: nobody else may take it before `expires_at`.

    `memory_bytes` are those of each worker. `owner` is for whom: the deployment, or one of its moves (`owner_of`).
    It is expected to be ready with this room at `due_at`; until `patient_until` only what would be sooner is taken
    instead. `slow`: some of the victims run something.
    """

    deployment: str
    worker_ids: tuple[str, ...]
    server_id: str
    key: str
    memory_bytes: int
    weight_bytes: int
    victims: tuple[str, ...]
    expires_at: float
    owner: str = ""
    slow: bool = False
    due_at: float = -math.inf
    patient_until: float = -math.inf


def owner_of(move_id: str) -> str:
    """The owner of room that is being made for a move; no deployment has such a name."""
    return f"={move_id}"


@dataclass(slots=True)
class _Shelf:
    """The DRAM pool of a server: key → (replicas that hold it, bytes)."""

    held: dict[str, tuple[int, int]] = field(default_factory=dict)
    pool_bytes: int = 0


@dataclass(slots=True)
class Held:
    """What the rooms of a server hold back, by worker, and in its pool; `leaving` counts the victims per key."""

    memory_bytes: dict[str, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    pool_bytes: int = 0
    keys: dict[str, None] = field(default_factory=dict)
    leaving: dict[str, int] = field(default_factory=dict)


_NO_ROOM = Held()


class Books:
    """See the module. Every question is answered in constant time where no room is being made on the server."""

    def __init__(self) -> None:
        self.occupants: dict[str, Occupant] = {}
        self._memory: dict[str, int] = {}
        self._places: dict[str, int] = {}
        self._shelves: dict[str, _Shelf] = {}
        self._rooms: dict[str, dict[str, Room]] = {}

    # -- entries -------------------------------------------------------------------------------------------------

    def put(self, one: Occupant) -> bool:
        """Count this occupant, instead of what it was; whether that changed anything."""
        old = self.occupants.get(one.id)
        if old == one:
            return False
        if old is not None:
            self._count(old, -1)
        self.occupants[one.id] = one
        self._count(one, 1)
        return True

    def drop(self, id: str) -> Occupant | None:
        """It is gone; what it was."""
        old = self.occupants.pop(id, None)
        if old is not None:
            self._count(old, -1)
        return old

    def put_room(self, owner: str, room: Room) -> None:
        """This room is being made. `weight_bytes` are what the newcomer will hold of the pool."""
        self.drop_room(owner)
        self._rooms.setdefault(room.server_id, {})[owner] = room

    def drop_room(self, owner: str) -> None:
        """It is not being made any more."""
        for server_id, rooms in self._rooms.items():
            if rooms.pop(owner, None) is not None:
                if not rooms:
                    del self._rooms[server_id]
                return

    def _count(self, one: Occupant, sign: int) -> None:
        for id in one.worker_ids:
            self._memory[id] = self._memory.get(id, 0) + sign * one.memory_bytes
            self._places[id] = self._places.get(id, 0) + sign
            if self._places[id] == 0:
                del self._places[id]
                del self._memory[id]
        if one.weight_bytes <= 0:
            return
        shelf = self._shelves.setdefault(one.server_id, _Shelf())
        count, weight = shelf.held.get(one.key, (0, 0))
        shelf.pool_bytes -= weight
        count += sign
        if count > 0:
            weight = max(weight, one.weight_bytes) if sign > 0 else weight
            shelf.held[one.key] = (count, weight)
            shelf.pool_bytes += weight
        else:
            del shelf.held[one.key]
            if not shelf.held:
                del self._shelves[one.server_id]

    # -- sums ----------------------------------------------------------------------------------------------------

    def used_bytes(self, worker_id: str, server_id: str, *, but_for: str = "") -> int:
        """Bytes of a worker that are taken or promised; `but_for` leaves out the room of that owner."""
        return self._memory.get(worker_id, 0) + self.held(server_id, but_for).memory_bytes.get(worker_id, 0)

    def places(self, worker_id: str, server_id: str, *, but_for: str = "") -> int:
        """Replicas that a worker has or is promised."""
        return self._places.get(worker_id, 0) + self.held(server_id, but_for).places.get(worker_id, 0)

    def pool_bytes(self, server_id: str, *, but_for: str = "") -> int:
        """Bytes of the server's DRAM pool that somebody holds, or is promised."""
        shelf = self._shelves.get(server_id)
        return (shelf.pool_bytes if shelf else 0) + self.held(server_id, but_for).pool_bytes

    def holds(self, server_id: str, key: str, *, but_for: str = "") -> bool:
        """Whether somebody on this server keeps the checkpoint in DRAM, and is not leaving to make room."""
        shelf = self._shelves.get(server_id)
        entry = shelf.held.get(key) if shelf else None
        return entry is not None and entry[0] > self.held(server_id, but_for).leaving.get(key, 0)

    def holders(self, server_id: str, key: str) -> int:
        """How many keep this checkpoint in the server's DRAM."""
        shelf = self._shelves.get(server_id)
        return shelf.held.get(key, (0, 0))[0] if shelf else 0

    def freed_bytes(self, server_id: str, ids: Iterable[str]) -> int:
        """Bytes of the server's DRAM pool that nobody holds any more once all of these have left."""
        leaving: dict[str, int] = {}
        for id in ids:
            one = self.occupants.get(id)
            if one is not None and one.server_id == server_id and one.weight_bytes > 0:
                leaving[one.key] = leaving.get(one.key, 0) + 1
        shelf = self._shelves.get(server_id)
        if shelf is None:
            return 0
        return sum(shelf.held[key][1] for key, count in leaving.items() if count == shelf.held[key][0])

    def held(self, server_id: str, but_for: str = "") -> Held:
        """What rooms hold back on a server."""
        rooms = self._rooms.get(server_id)
        if not rooms:
            return _NO_ROOM
        sums = Held()
        for owner in sorted(rooms):
            if owner != but_for:
                self._promise(rooms[owner], sums)
        return sums

    def _promise(self, room: Room, sums: Held) -> None:
        victims = [self.occupants[id] for id in room.victims if id in self.occupants]
        freed = 0
        for one in victims:
            if one.weight_bytes > 0 and one.server_id == room.server_id:
                gone = sums.leaving[one.key] = sums.leaving.get(one.key, 0) + 1
                if gone == self.holders(room.server_id, one.key):
                    freed += one.weight_bytes
        for id in room.worker_ids:
            given = [one for one in victims if id in one.worker_ids]
            short = room.memory_bytes - sum(one.memory_bytes for one in given)
            sums.memory_bytes[id] = sums.memory_bytes.get(id, 0) + max(0, short)
            sums.places[id] = sums.places.get(id, 0) + max(0, 1 - len(given))
        there = self.holders(room.server_id, room.key) > sums.leaving.get(room.key, 0) or room.key in sums.keys
        if not there and room.weight_bytes > freed:
            sums.pool_bytes += room.weight_bytes - freed
            sums.keys[room.key] = None

    def check(self) -> None:
        """The sums are those of the entries."""
        fresh = Books()
        for id in sorted(self.occupants):
            fresh.put(self.occupants[id])
        assert fresh._memory == self._memory, "the sums of memory are wrong"
        assert fresh._places == self._places, "the counts of replicas are wrong"
        mine = {id: {key: one[0] for key, one in shelf.held.items()} for id, shelf in self._shelves.items()}
        theirs = {id: {key: one[0] for key, one in shelf.held.items()} for id, shelf in fresh._shelves.items()}
        assert mine == theirs, "the counts of the DRAM pools are wrong"
