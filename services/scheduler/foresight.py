"""What is brought near before anybody asks for it: the planner of `ahead`, carried out. Pure."""

from __future__ import annotations

from services.scheduler.ahead import Ahead, AheadRules
from services.scheduler.arrivals import Arrivals
from services.scheduler.cluster import Cluster
from services.scheduler.estimate import Estimator
from services.scheduler.events import Action, CommandPrefetch, Fact, Note, PrefetchDone, PrefetchRefused
from services.scheduler.figures import Tally
from services.scheduler.outlook import Outlook
from shared.contracts.residency import Prefetch


class Foresight:
    """Commands copies ahead of demand, and hears what became of them."""

    def __init__(
        self, rules: AheadRules, cluster: Cluster, estimator: Estimator, arrivals: Arrivals, tally: Tally
    ) -> None:
        self.ahead = Ahead(rules)
        self._cluster = cluster
        self._estimator = estimator
        self._arrivals = arrivals
        self._tally = tally

    def look(self, now: float, out: list[Action], *, waiting: bool) -> None:
        """Bring near what will be asked for, as long as nobody is `waiting` for a replica."""
        outlook = Outlook(self._cluster, self._arrivals, self._estimator, now, waiting)
        for one in self.ahead.plan(now, outlook):
            message = Prefetch(checkpoint_id=one.key, source=one.source, tier=one.tier)
            out.append(CommandPrefetch(one.server_id, message))
            self._tally.prefetched(one.tier)
            facts: dict[str, Fact] = {
                "deployment": one.deployment,
                "server_id": one.server_id,
                "tier": one.tier,
                "weight_bytes": one.weight_bytes,
                "saves_s": round(one.saves_s, 4),
            }
            out.append(Note("checkpoint.prefetched", facts))

    def heard(self, event: PrefetchDone | PrefetchRefused, now: float) -> None:
        """A copy is there, or will not be."""
        if isinstance(event, PrefetchDone):
            self.ahead.done(event.server_id, event.checkpoint_id, event.tier, now)
        else:
            self.ahead.refused(event.server_id, event.checkpoint_id, event.tier, now)

    def server_gone(self, server_id: str) -> None:
        """Nothing is under way there any more."""
        self.ahead.server_gone(server_id)
