"""One request that migrates once, in fair weather but for what a plan says: which packet is lost, doubled or late, and
who dies when. Every packet of a run has a number, so a plan can be made for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.contracts.migration import Migrate, MigrationOutcome
from shared.contracts.requests import Request, Sampling, TokensPrompt
from simulator.clients import Outcome, Stream
from simulator.cluster import Cluster, Shape
from simulator.engine import EOS, Speeds, token_at
from simulator.kernel import Kernel
from simulator.network import Packet

DELAY_S = 0.002
PROMPT = tuple(range(40, 70))
OUTPUT_TOKENS = 60
SEED = next(seed for seed in range(1, 1000) if EOS not in [token_at(seed, index) for index in range(OUTPUT_TOKENS)])
LATE_S = 4.0  # beyond every timeout of the protocol

# What is said in a migration, and in what may follow from one that goes wrong.
KINDS = frozenset(
    (
        *("Migrate", "Migrating", "Round", "RoundPending", "RoundDone", "HandOver", "HandedOver", "AbandonRound"),
        *("MigrationEnded", "Claim", "Claimed", "Gone", "Failure", "FrameBatch", "Cancel", "Ack", "Nak", "InProgress"),
        *("Check", "Running", "Holds", "Unwanted"),
    )
)
# Of these only some are tried: there is one per decode step, and what happens to them is the same.
MANY = {"FrameBatch": 5, "InProgress": 2}


@dataclass
class Sent:
    """A packet of an undisturbed run: its number, kind, and the ids of the processes at its ends."""

    number: int
    kind: str
    source: str
    target: str
    at: float


@dataclass
class Plan:
    """What happens to the packets with these numbers: the delays of their copies, and what is done as they are sent."""

    delays_s: dict[int, tuple[float, ...]] = field(default_factory=dict)
    actions: dict[int, Callable[[], None]] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    kernel: Kernel | None = None


class Planned:
    """Weather by plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._count = -1

    def delays_s(self, packet: Packet) -> Sequence[float]:
        self._count += 1
        number, plan = self._count, self.plan
        assert plan.kernel is not None
        names = (packet.source.split("#")[0], packet.target.split("#")[0])
        plan.sent.append(Sent(number, packet.kind, *names, plan.kernel.now))
        if number in plan.actions:
            plan.actions[number]()
        return plan.delays_s.get(number, (DELAY_S,))


class OneMigration:
    """A gateway, the source w0 that runs the request, and the destination w1."""

    def __init__(self, plan: Plan | None = None, trace: Callable[[str], None] | None = None) -> None:
        self.plan = plan or Plan()
        self.kernel = self.plan.kernel = Kernel(trace)
        self.cluster = Cluster(self.kernel, Planned(self.plan), Shape())
        self.begins_at = 0

    def run(self) -> Stream:
        """Live through it, check that nothing is left over; the stream."""
        kernel, cluster = self.kernel, self.cluster
        speeds = Speeds(step_s=0.05, prefill_token_s=0.01, slice_tokens=64)
        cluster.add_gateway("g0")
        cluster.add_worker("w0", speeds)
        cluster.load("w0", "demo")
        kernel.run(1.0)
        request = Request(
            request_id="q1",
            gateway_id="g0",
            deployment="demo",
            prompt=TokensPrompt(token_ids=PROMPT),
            sampling=Sampling(max_tokens=OUTPUT_TOKENS, seed=SEED),
            budget_s=120.0,
        )
        cluster.call("g0", "demo", request)
        kernel.run(1.5)
        cluster.add_worker("w1", speeds)
        to_replica_id = cluster.load("w1", "demo")
        kernel.run(2.0)
        self.begins_at = len(self.plan.sent)
        cluster.migrate(Migrate(to_worker_id="w1", to_replica_id=to_replica_id, request_ids=("q1",)), "w0")
        kernel.run(12.0)
        for worker_id, worker in list(cluster.workers.items()):
            if not worker.process.alive:
                cluster.add_worker(worker_id, speeds)
                cluster.load(worker_id, "demo")
        cluster.settle(("demo",))
        cluster.check_over()
        cluster.end()
        return cluster.clients.streams["q1"]

    @property
    def outcomes(self) -> list[MigrationOutcome]:
        """How the migrations of the run ended."""
        return [message.outcome for message in self.cluster.migrations_ended]

    def steps(self, kinds: frozenset[str] = KINDS, *, after: int = -1) -> list[Sent]:
        """The packets of these kinds from the command to migrate on (or after a number), of many alike only some."""
        first = max(self.begins_at, after + 1)
        packets = [one for one in self.plan.sent[first:] if one.kind in kinds]
        return [one for one in packets if self._is_tried(one, packets)]

    def _is_tried(self, one: Sent, packets: list[Sent]) -> bool:
        most = MANY.get(one.kind)
        if most is None:
            return True
        alike = [other.number for other in packets if other.kind == one.kind]
        return alike.index(one.number) % max(1, len(alike) // most) == 0

    def kill(self, who: str) -> None:
        """A process dies, if it lives."""
        if who in self.cluster.gateways:
            if self.cluster.gateways[who].process.alive:
                self.cluster.kill_gateway(who)
        elif who in self.cluster.workers and self.cluster.workers[who].process.alive:
            self.cluster.kill_worker(who)


def complete(stream: Stream) -> bool:
    """Whether the client got everything (that it was right, and once, is asserted as it arrives)."""
    return stream.outcome is Outcome.COMPLETE
