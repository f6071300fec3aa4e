"""Who else is at work on a server, and how much longer a worker's own work takes beside them. Pure.

Attaching a checkpoint is work for processors. What else they do shows in two ways: some of it is known (loads under
way on the same server, replicas that run something), the rest shows in the loads that have just ended there.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Final

from services.scheduler.learning import Level

MOST: Final = 4  # others, beyond which it is taken to be no worse
REMEMBERED: Final = 65536  # replicas; the oldest are forgotten
PARTS: Final = ("whole", "work", "rest")


@dataclass(slots=True)
class _One:
    """A replica that loads or runs. `most` are the others that were at work beside it at any moment."""

    server_id: str
    loads: bool
    most: int = 0


class Crowd:
    """Loads under way and replicas that run something, by server."""

    def __init__(self) -> None:
        self._all: collections.OrderedDict[str, _One] = collections.OrderedDict()
        self._at: dict[str, dict[str, _One]] = {}

    def joins(self, server_id: str, replica_id: str, *, loads: bool) -> None:
        """It is at work from now on."""
        known = self._all.get(replica_id)
        if known is not None and known.server_id == server_id:
            known.loads = loads
            return
        self.leaves(replica_id)
        here = self._at.setdefault(server_id, {})
        here[replica_id] = self._all[replica_id] = _One(server_id, loads)
        for one in here.values():
            one.most = max(one.most, len(here) - 1)
        while len(self._all) > REMEMBERED:
            self.leaves(next(iter(self._all)))

    def leaves(self, replica_id: str) -> int:
        """It is at work no longer; how many others there were at most, if it was loading."""
        one = self._all.pop(replica_id, None)
        if one is None:
            return 0
        here = self._at[one.server_id]
        del here[replica_id]
        if not here:
            del self._at[one.server_id]
        return one.most if one.loads else 0

    def others(self, server_id: str) -> int:
        """How many are at work there."""
        return len(self._at.get(server_id, ()))

    def forget_server(self, server_id: str) -> None:
        """This server is gone."""
        for replica_id in list(self._at.get(server_id, ())):
            self.leaves(replica_id)


def _alone() -> dict[str, list[Level]]:
    return {part: [Level() for _ in range(MOST)] for part in PARTS}


@dataclass(slots=True)
class Slowdown:
    """How many times as long as on a server that does nothing else work takes; never less than once.

    The factor is that of the server, as its last loads have shown, times that of the number of others, which is alike
    on all servers; for all of the work when nothing is waited for ("whole"), the work besides moving bytes ("work") and
    what is left of it after the last byte ("rest").
    """

    servers: dict[str, Level] = field(default_factory=dict)
    beside: dict[str, list[Level]] = field(default_factory=_alone)

    def of_server(self, server_id: str) -> float:
        """Of this server at present, whoever else is known to be at work there."""
        known = self.servers.get(server_id)
        return 1.0 if known is None or known.value is None else max(1.0, known.value)

    def of_others(self, others: int, part: str) -> float:
        """Beside so many others that are at work."""
        for level in reversed(self.beside[part][: min(others, MOST)]):
            if level.value is not None:  # beside more it is no better than beside fewer
                return max(1.0, level.value)
        return 1.0

    def learn(self, server_id: str, others: int, part: str, took_s: float, usual_s: float | None) -> float:
        """Work there took so long; elsewhere, with nobody beside it, it takes `usual_s` (None: not known yet). How many
        times as long it took by what is known of the server and its others."""
        mine, theirs = self.of_server(server_id), self.of_others(others, part)
        if usual_s is not None and usual_s > 0.0:
            times = took_s / usual_s
            if others > 0:
                self.beside[part][min(others, MOST) - 1].learn(max(1.0, times / mine))
            else:
                self.servers.setdefault(server_id, Level(1.0)).learn(max(1.0, times))
        return mine * theirs
