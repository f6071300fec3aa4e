"""When the registry and the queues are looked at, and the records that hints speak of. Pure."""

from __future__ import annotations

import math
from typing import Final

from services.scheduler.cluster import Cluster
from services.scheduler.events import Action, EnsureQueues, Note, ReadQueues, ReadRecord, ReadRegistry, RecordHinted
from services.scheduler.rules import Rules
from shared.errors import Failure

# Records whose changes the picture follows; the others are nobody's business here.
FOLLOWED: Final = frozenset({"server", "worker", "replica"})


class Looks:
    """One look of each kind at a time. Moments are monotonic seconds; `wake` is when the next is due."""

    def __init__(self, rules: Rules, cluster: Cluster) -> None:
        self.wake = -math.inf
        self._rules = rules
        self._cluster = cluster
        self._registry_due = -math.inf
        self._registry_asked = False
        self._queues_due = -math.inf
        self._queues_asked = False
        self._queues_asked_at = -math.inf
        self._ensure_due = -math.inf
        self._ensuring = False
        self._reading: dict[tuple[str, str], bool] = {}
        self._unreachable: dict[str, str] = {}

    def step(self, now: float, out: list[Action], *, oriented: bool) -> None:
        """Ask for what is due. Before the first picture is complete (`oriented`) only the registry is looked at."""
        rules = self._rules
        if self._registry_due <= now and not self._registry_asked:
            self._registry_asked, self._registry_due = True, now + rules.look_interval_s
            out.append(ReadRegistry(now))
        self.wake = math.inf if self._registry_asked else self._registry_due
        if not oriented:
            return
        if self._queues_due <= now and not self._queues_asked:
            self._queues_asked, self._queues_asked_at = True, now
            self._queues_due = now + rules.look_interval_s
            out.append(ReadQueues(now))
        if self._ensure_due <= now and not self._ensuring:
            self._ensuring, self._ensure_due = True, now + rules.queues_interval_s
            slugs = tuple(record.slug for _, record in sorted(self._cluster.deployments.items()))
            out.append(EnsureQueues(slugs))
        if not self._queues_asked:
            self.wake = min(self.wake, self._queues_due)
        if not self._ensuring:
            self.wake = min(self.wake, self._ensure_due)

    # -- what came of it -----------------------------------------------------------------------------------------

    def registry_read(self, out: list[Action]) -> None:
        """The registry answered."""
        self._registry_asked = False
        self._reached("registry", out)

    def registry_unread(self, failure: Failure, out: list[Action]) -> None:
        """The registry did not answer."""
        self._registry_asked = False
        self._missed("registry", failure, out)

    def queues_read(self, out: list[Action]) -> None:
        """The queues answered."""
        self._queues_asked = False
        self._reached("queues", out)

    def queues_unread(self, failure: Failure, now: float, out: list[Action]) -> None:
        """The queues did not answer: perhaps they are gone."""
        self._queues_asked = False
        self._missed("queues", failure, out)
        self._ensure_due = min(self._ensure_due, now + self._rules.look_interval_s)

    def queues_ensured(self) -> None:
        """The stream and the queues are there."""
        self._ensuring = False

    def queues_unensured(self, failure: Failure, now: float, out: list[Action]) -> None:
        """They could not be made sure of."""
        self._ensuring = False
        self._missed("queues", failure, out)
        self._ensure_due = now + self._rules.look_interval_s

    def _missed(self, what: str, failure: Failure, out: list[Action]) -> None:
        if what not in self._unreachable:
            out.append(Note("look.failed", {"what": what, "reason": failure.message}))
        self._unreachable[what] = failure.message

    def _reached(self, what: str, out: list[Action]) -> None:
        if self._unreachable.pop(what, None) is not None:
            out.append(Note("look.recovered", {"what": what}))

    # -- when to look --------------------------------------------------------------------------------------------

    def all_soon(self, now: float) -> None:
        """Whatever was heard last may be old: look at everything."""
        self._registry_due = self._queues_due = self._ensure_due = now

    def begin(self, now: float) -> None:
        """The first picture is complete: the queues are next."""
        self._queues_due = self._ensure_due = now

    def queues_soon(self, at: float) -> None:
        """Have the queues read at `at`, but not more often than every `quick_look_s`."""
        self._queues_due = min(self._queues_due, max(at, self._queues_asked_at + self._rules.quick_look_s))
        if not self._queues_asked:
            self.wake = min(self.wake, self._queues_due)

    def queues_again(self) -> None:
        """Somebody waits: the queues know first who is idle by now."""
        self.queues_soon(self._queues_asked_at + 0.25 * self._rules.look_interval_s)

    # -- single records ------------------------------------------------------------------------------------------

    def hinted(self, event: RecordHinted, out: list[Action]) -> None:
        """A record is said to have changed: read it, once at a time."""
        key = (event.kind, event.id)
        if key in self._reading:
            self._reading[key] = True  # it changed again while it was being read
        else:
            self._reading[key] = False
            out.append(ReadRecord(event.kind, event.id))

    def dropped(self, kind: str, id: str) -> None:
        """A record is gone, or could not be read: what is being read of it is void."""
        self._reading.pop((kind, id), None)

    def record_read(self, kind: str, id: str, out: list[Action]) -> bool:
        """A record was read; False if it was deleted meanwhile, and what was read is older than that."""
        key = (kind, id)
        again = self._reading.pop(key, None)
        if again is None:
            return False
        if again:
            self._reading[key] = False
            out.append(ReadRecord(kind, id))
        return True
