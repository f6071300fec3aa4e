"""How long things will take, learnt from how long they took. Pure.

A startup is `wait + move + attach (+ making room)`: the time in the lane of the store's queue, the bytes that are not
there yet at the bandwidth of the slowest tier on the way, and what the worker does besides. That is the estimate of
ServerlessLLM (Fu et al., OSDI 2024, section 6), with one more part: their loading time is `q + n / b`, while here the
worker's own work is not small against it. The tiers are pipelined, so a bandwidth is that of the whole way, learnt from
whole transfers. The cost of recomputing a running request elsewhere is theirs, too: `a · (t_in + t_out) + b`.

Most of the worker's work needs no bytes: it is done while they arrive. So attaching has two figures, the `whole` of it
and the `rest` after the last byte; a startup takes `wait + max(move + rest, whole)`.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeVar

from services.scheduler.crowd import Crowd, Slowdown
from services.scheduler.lanes import Lanes, lane_of, other_lane
from services.scheduler.learning import Fit, Level, Straight
from services.scheduler.terms import Startup
from shared.contracts.migration import MigrationEnded, MigrationOutcome
from shared.contracts.placement import ReplicaLoaded
from shared.contracts.records import ReplicaRecord, ReplicaState, ServerRecord

K = TypeVar("K")
V = TypeVar("V")

MOVING_TIERS: Final = ("ssd", "peer", "remote")
TOLD_CHANGE: Final = 0.05  # what servers that were never measured share is changed when it has moved by this much
REMEMBERED: Final = 65536  # replicas, checkpoints per device kind, pairs of workers: the oldest are forgotten
LEAST_SECONDS_PER_BYTE: Final = 1e-13  # nothing is faster
OUTPUT_KEPT: Final = 0.99  # of the weight of earlier requests, for every one that ends
RESUME_SCALE_TOKENS: Final = 1000.0
SCALE_BYTES: Final = float(1 << 30)
KNOWN_LOADS: Final = 3  # of all servers from one tier, after which their line is believed of another one
EULER_GAMMA: Final = 0.5772156649
BEGINS_S: Final = 1.0  # that a new replica has been idle, by when its record would show what it runs
SHARE: Final = 0.5  # of the time that the other lane is busy, by which a load is held up, before it was measured
MOST_SHARE: Final = 1.5
SHARE_WEIGHT: Final = 0.2  # of the newest figure
TELLING: Final = 0.2  # the other lane's work says something if it is so large a part of the load's own
WAITED: Final = 1.02  # move + attach this many times all of the work: the worker has waited for bytes
# What a request that has generated more than the average is still expected to generate, in averages: none if all are
# of one length, one if lengths are exponential; what people ask for is between the two.
LEFT_BEYOND_AVERAGE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Priors:
    """What is believed before anything was measured: an ordinary NVMe disk, 10 Gb/s between servers, 2 to the source.

    `bytes_per_s` is by tier ("dram": copies within memory, which no load waits for), `latency_s` what goes before the
    first byte. Attaching takes `attach_s` and a
    second per `attach_bytes_per_s`, by kind of device. A request resumes in `resume_token_s` per token and `resume_s`.
    """

    bytes_per_s: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType({"dram": 1e10, "ssd": 1e9, "peer": 5e8, "remote": 2e8})
    )
    latency_s: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType({"ssd": 0.01, "peer": 0.05, "remote": 0.1})
    )
    attach_s: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({"cpu": 0.2, "cuda": 0.5}))
    attach_bytes_per_s: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType({"cpu": 5e10, "cuda": 1e10})
    )
    attach_rest: float = 0.5
    stop_s: float = 0.1
    resume_token_s: float = 1e-3
    resume_s: float = 0.1
    step_s: float = 0.05
    output_tokens: float = 128.0


@dataclass(slots=True)
class _Server:
    """What is known of one server: seconds of moving bytes, by tier, as its loads have shown (`own`), and seconds per
    byte as its store has measured (`said`)."""

    lanes: Lanes = field(default_factory=Lanes)
    own: dict[str, Fit] = field(default_factory=dict)
    said: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Commanded:
    """A load under way: for how long the other lane was busy when it was commanded, seconds."""

    server_id: str
    beside_s: float = 0.0


@dataclass(slots=True)
class _Usual:
    """What work takes by itself. Where it never was by itself (`alone`) yet, the best guess at that."""

    level: Level = field(default_factory=Level)
    alone: bool = False

    @property
    def value(self) -> float | None:
        """Seconds; None before the first figure."""
        return self.level.value


@dataclass(slots=True)
class _Attaching:
    """Of one checkpoint on one kind of device, seconds: `whole` of the work, from DRAM; `work` (on devices with memory
    of their own) all but the copies, which follow the bytes as they come; `rest`: after the last byte."""

    whole: _Usual = field(default_factory=_Usual)
    work: _Usual = field(default_factory=_Usual)
    rest: _Usual = field(default_factory=_Usual)


@dataclass(slots=True)
class _Deployment:
    """What requests of one deployment are like. `tokens` of requests that have ended were not counted yet."""

    resume: Fit
    tokens: float = 0.0
    sum_tokens: float = 0.0
    sum_requests: float = 0.0
    step: Level = field(default_factory=Level)
    prefill_token: Level = field(default_factory=Level)


@dataclass(slots=True)
class _Counted:
    """What a replica had counted when it was last heard of."""

    through: int
    ended_tokens: int


class Estimator:
    """Learns from what is said; answers in seconds, never negative. `now` is the scheduler's monotonic second."""

    def __init__(self, priors: Priors | None = None) -> None:
        self.priors: Final = priors or Priors()
        self._servers: dict[str, _Server] = {}
        self._shared = {
            tier: Straight(1.0 / self.priors.bytes_per_s[tier], self.priors.latency_s[tier]) for tier in MOVING_TIERS
        }
        self._common = {tier: Fit(line, SCALE_BYTES) for tier, line in self._shared.items()}
        self._attaching: collections.OrderedDict[tuple[str, str], _Attaching] = collections.OrderedDict()
        self._attach_fits: dict[str, Fit] = {}
        self._fits_alone: dict[str, None] = {}  # kinds of device of which loads beside nobody are known
        self._rests: dict[str, Level] = {}
        self._stop = Level(self.priors.stop_s)
        self._deployments: dict[str, _Deployment] = {}
        self._resume = Fit(Straight(self.priors.resume_token_s, self.priors.resume_s), RESUME_SCALE_TOKENS)
        self._counted: collections.OrderedDict[str, _Counted] = collections.OrderedDict()
        self._migrated_at: collections.OrderedDict[tuple[str, str], float] = collections.OrderedDict()
        self._promised_on: dict[str, str] = {}
        self._commanded: collections.OrderedDict[str, _Commanded] = collections.OrderedDict()
        self.crowd: Final = Crowd()
        self._slow = Slowdown()
        self._shares = dict.fromkeys(MOVING_TIERS, SHARE)
        self._shared_loads = dict.fromkeys(MOVING_TIERS, 0)

    # -- what is heard ---------------------------------------------------------------------------------------------

    def server_said(self, record: ServerRecord, now: float) -> None:
        """A server's record was read."""
        server = self._server(record.server_id)
        server.lanes.said(record, now)
        for tier, bytes_per_s in (
            ("ssd", record.ssd_bytes_per_s),
            ("peer", record.peer_bytes_per_s),
            ("remote", record.remote_bytes_per_s),
        ):
            if bytes_per_s is not None and bytes_per_s > 0:
                server.said[tier] = 1.0 / bytes_per_s

    def replica_said(self, record: ReplicaRecord, now: float) -> None:
        """A replica's record was read."""
        self._follow_promise(record)
        deployment = self._deployment(record.deployment)
        if record.step_s is not None and record.step_s > 0:
            deployment.step.learn(record.step_s)
        if record.prefill_token_s is not None and record.prefill_token_s > 0:
            deployment.prefill_token.learn(record.prefill_token_s)
        self._count(record, deployment)
        loads = record.state is ReplicaState.LOADING
        # One that has just been loaded is about to run what it was loaded for: its record says so later.
        begins = record.state is ReplicaState.READY and not record.finished_requests and record.idle_s < BEGINS_S
        if loads or begins or record.running > 0:
            self.crowd.joins(record.server_id, record.replica_id, loads=loads)
        else:
            self.crowd.leaves(record.replica_id)

    def loaded(self, report: ReplicaLoaded, now: float) -> tuple[str, ...]:
        """A load has ended well: the servers whose bandwidths are estimated otherwise now, by id."""
        others = self.crowd.leaves(report.replica_id)
        commanded = self._commanded.get(report.replica_id)
        self.settled(report.replica_id)
        self._learn_attach(report, others)
        changed = {report.server_id: None}
        tier = report.tier
        if report.moved_bytes <= 0 or report.move_s <= 0 or tier not in MOVING_TIERS:
            return tuple(changed)
        move_s = self._learn_share(report, commanded.beside_s if commanded is not None else 0.0)
        if move_s is None:
            return tuple(changed)
        server = self._server(report.server_id)
        if tier not in server.own:
            server.own[tier] = Fit(self._belief(report.server_id, tier), SCALE_BYTES)
        server.own[tier].learn(report.moved_bytes, move_s)
        common = self._common[tier]
        common.learn(report.moved_bytes, move_s)
        if _differs(common.line, self._shared[tier]):
            self._shared[tier] = common.line
            unmeasured = (id for id, one in self._servers.items() if tier not in one.own and tier not in one.said)
            changed.update(dict.fromkeys(unmeasured))
        return tuple(sorted(changed))

    def migrated(self, ended: MigrationEnded, now: float) -> None:
        """A migration has ended. Those of one source to one destination go one after another."""
        pair = (ended.source_worker_id, ended.destination_worker_id)
        before = self._migrated_at.get(pair)
        _put(self._migrated_at, pair, now)
        if ended.outcome is not MigrationOutcome.COMMITTED or ended.tokens <= 0 or ended.total_s <= 0:
            return
        own_s = ended.total_s if before is None else max(0.0, min(ended.total_s, now - before))
        self._resume.learn(ended.tokens, own_s)
        self._deployment(ended.deployment).resume.learn(ended.tokens, own_s)

    def stopped(self, seconds: float) -> None:
        """A replica that ran nothing was gone so long after it was told to stop."""
        if seconds >= 0:
            self._stop.learn(seconds)

    def promised(
        self, server_id: str, replica_id: str, missing_bytes: int, tier: str, now: float, key: str = ""
    ) -> None:
        """A load was commanded that the server's record cannot show yet; `key` is its checkpoint, if known."""
        self.settled(replica_id)
        beside_s = self._lane_s(server_id, other_lane(tier), now) if missing_bytes > 0 else 0.0
        _put(self._commanded, replica_id, _Commanded(server_id, beside_s))
        self.crowd.joins(server_id, replica_id, loads=True)
        if missing_bytes > 0 and tier in MOVING_TIERS:
            self._server(server_id).lanes.promise(replica_id, key, missing_bytes, tier, now)
            self._promised_on[replica_id] = server_id
            while len(self._promised_on) > REMEMBERED:
                self._arrived(next(iter(self._promised_on)))

    def settled(self, replica_id: str) -> None:
        """A load is over, one way or another, or its replica is gone."""
        self.crowd.leaves(replica_id)
        self._commanded.pop(replica_id, None)
        self._arrived(replica_id)

    def _arrived(self, replica_id: str) -> None:
        """Its bytes are there, or will not come."""
        server = self._servers.get(self._promised_on.pop(replica_id, ""))
        if server is not None:
            server.lanes.promises.pop(replica_id, None)

    def forget_server(self, server_id: str) -> None:
        """This server is gone."""
        server = self._servers.pop(server_id, None)
        for replica_id in server.lanes.promises if server is not None else ():
            self._promised_on.pop(replica_id, None)
        self.crowd.forget_server(server_id)
        self._slow.servers.pop(server_id, None)

    def forget_deployment(self, name: str) -> None:
        """This deployment is gone."""
        self._deployments.pop(name, None)

    # -- bytes -----------------------------------------------------------------------------------------------------

    def seconds_per_byte(self, server_id: str, tier: str) -> float:
        """Of the whole way from `tier` to this server's DRAM: as its own loads have shown, else as its store has
        measured, else as those of all servers have shown."""
        return max(LEAST_SECONDS_PER_BYTE, self._moving(server_id, tier).slope)

    def latency_s(self, server_id: str, tier: str) -> float:
        """What a load from `tier` takes before its bytes flow, the queue aside."""
        return self._moving(server_id, tier).base

    def bandwidth(self, server_id: str, tier: str) -> float:
        """Bytes per second of the slowest tier on the way from `tier` to this server's DRAM."""
        return 1.0 / self.seconds_per_byte(server_id, tier)

    def wait_s(self, server_id: str, tier: str, now: float, key: str = "") -> float:
        """Seconds until a new load from `tier` (of checkpoint `key`, if it may stand in the queue already) begins."""
        if tier not in MOVING_TIERS:
            return 0.0
        latency_s = self.latency_s(server_id, tier) if tier != "ssd" else 0.0
        # A source is looked at while others go first.
        return max(0.0, self._lane_s(server_id, lane_of(tier), now, key, latency_s) - latency_s)

    def beside_s(self, server_id: str, tier: str, now: float) -> float:
        """Seconds for which the other lane of the store will be busy; a load is held up by `share` of them."""
        return self._lane_s(server_id, other_lane(tier), now) if tier in MOVING_TIERS else 0.0

    def share(self, tier: str) -> float:
        """By what part of the other lane's time a load from this tier is held up."""
        return self._shares.get(tier, 0.0)

    def slowdown(self, server_id: str) -> float:
        """How many times as long as elsewhere a worker's own work takes on this server at present, at least 1."""
        return self._slow.of_server(server_id)

    def _lane_s(self, server_id: str, lane: str, now: float, key: str = "", ready_s: float = 0.0) -> float:
        """Seconds until a lane has done what it has to do before a load that can begin in `ready_s`."""
        server = self._servers.get(server_id)
        if server is None:
            return 0.0
        lanes, end = server.lanes, -math.inf
        shown, unseen = lanes.ahead(lane, now, key)
        usual = "ssd" if lane == "ssd" else "remote"
        for id, size_bytes in shown.items():
            one_s = size_bytes * self.seconds_per_byte(server_id, lanes.tier_of(id, usual))
            end = max(end, lanes.said_at) + one_s
        for one in unseen:
            latency_s = self.latency_s(server_id, one.tier)
            if lane == "import" and one.at + latency_s > now + ready_s > now:
                continue  # whoever is ready first goes first
            end = max(end, one.at) + self._move_s(server_id, one.tier, one.bytes)
        return max(0.0, end - now)

    # -- the worker's part -----------------------------------------------------------------------------------------

    def attach_s(self, device: str, key: str, weight_bytes: int) -> float:
        """All of the worker's work to attach a checkpoint that is in DRAM."""
        kind = _kind(device)
        known = self._attaching.get((kind, key))
        if known is not None and known.whole.value is not None:
            return known.whole.value
        believed = self._attach_fit(kind).line.at(weight_bytes)
        return believed if known is None or known.work.value is None else max(known.work.value, believed)

    def attach_rest_s(self, device: str, key: str, weight_bytes: int) -> float:
        """What is left of it when the last byte arrives, at least: a load takes `wait + max(move + rest, attach)`."""
        kind = _kind(device)
        work_s = self._work_s(kind, key, weight_bytes)
        known = self._attaching.get((kind, key))
        if known is not None and known.rest.value is not None:
            return min(work_s, known.rest.value)
        part = self._rests[kind].value if kind in self._rests else None
        return work_s * min(1.0, self.priors.attach_rest if part is None else part)

    def startup(
        self,
        server_id: str,
        device: str,
        key: str,
        weight_bytes: int,
        missing_bytes: int,
        tier: str,
        now: float,
        room_s: float = 0.0,
    ) -> Startup:
        """The start of a replica here. `missing_bytes` of `weight_bytes` are not in this server's DRAM; `tier` is where
        they come from. What is on its way already has nobody in front of it."""
        others, mine = self.crowd.others(server_id), self._slow.of_server(server_id)
        whole = mine * self._slow.of_others(others, "whole")
        if missing_bytes <= 0 or tier not in MOVING_TIERS:
            return Startup(attach_s=whole * self.attach_s(device, key, weight_bytes), room_s=room_s)
        server = self._servers.get(server_id)
        arriving = server is not None and key in server.lanes.arriving
        move_s = self._move_s(server_id, tier, missing_bytes)
        move_s += self._shares[tier] * self.beside_s(server_id, tier, now)
        work_s = mine * self._slow.of_others(others, "work") * self._work_s(_kind(device), key, weight_bytes)
        rest_s = mine * self._slow.of_others(others, "rest") * self.attach_rest_s(device, key, weight_bytes)
        return Startup(
            wait_s=0.0 if arriving else self.wait_s(server_id, tier, now, key),
            move_s=move_s,
            attach_s=max(rest_s, work_s - move_s),
            room_s=room_s,
        )

    # -- those who run ---------------------------------------------------------------------------------------------

    def stop_s(self) -> float:
        """From the command to stop a replica that runs nothing until it is gone."""
        assert self._stop.value is not None
        return self._stop.value

    def mean_output_tokens(self, deployment: str) -> float:
        """Tokens that a request of this deployment generates; what is believed before counts as one request."""
        known, prior = self._deployments.get(deployment), self.priors.output_tokens
        if known is None:
            return prior
        return (known.sum_tokens + prior) / (known.sum_requests + 1.0)

    def remaining_s(self, replica: ReplicaRecord) -> float:
        """Until the last of its running requests is expected to end; 0 if nothing runs.

        Of n requests of random (exponential) length the last one ends after 1 + 1/2 + … + 1/n times as long as one.
        """
        if replica.running <= 0:
            return 0.0
        average = self.mean_output_tokens(replica.deployment)
        made = replica.output_tokens / replica.running
        left = max(average - made, LEFT_BEYOND_AVERAGE * average) * _harmonic(replica.running)
        if replica.left_tokens > 0:
            left = min(left, replica.left_tokens)
        return left * self._step_s(replica)

    def resume_s(self, replica: ReplicaRecord) -> float:
        """To recompute all its running requests elsewhere, one after another; 0 if nothing runs."""
        if replica.running <= 0:
            return 0.0
        line = self.resume_line(replica.deployment)
        return line.slope * replica.context_tokens + line.base * replica.running

    def resume_line(self, deployment: str) -> Straight:
        """`a` (slope) and `b` (base) of `resume = a · (t_in + t_out) + b` for one request of this deployment."""
        known = self._deployments.get(deployment)
        if known is None:
            return self._resume.line
        common = self._resume.line
        slope = known.prefill_token.value
        known.resume.believe(Straight(common.slope if slope is None else slope, common.base))
        return known.resume.line

    # -- inside ----------------------------------------------------------------------------------------------------

    def _server(self, server_id: str) -> _Server:
        return self._servers.setdefault(server_id, _Server())

    def _moving(self, server_id: str, tier: str) -> Straight:
        """Seconds over bytes."""
        if tier not in MOVING_TIERS:
            return Straight(1.0 / self.priors.bytes_per_s["dram"], 0.0)
        server, shared = self._servers.get(server_id), self._shared[tier]
        if server is not None and tier in server.own:
            return server.own[tier].line
        if server is not None and tier in server.said:
            return Straight(server.said[tier], shared.base)
        return shared

    def _belief(self, server_id: str, tier: str) -> Straight:
        """What is believed of a server before its first load: what its store has measured is a rate of whole transfers,
        latency included. After a small one that is far from what a large one gets, so others' loads say more."""
        return self._shared[tier] if self._common[tier].points >= KNOWN_LOADS else self._moving(server_id, tier)

    def _move_s(self, server_id: str, tier: str, size_bytes: int) -> float:
        return self.latency_s(server_id, tier) + size_bytes * self.seconds_per_byte(server_id, tier)

    def _deployment(self, name: str) -> _Deployment:
        known = self._deployments.get(name)
        if known is None:
            known = self._deployments[name] = _Deployment(Fit(self._resume.line, RESUME_SCALE_TOKENS))
            while len(self._deployments) > REMEMBERED:
                del self._deployments[next(iter(self._deployments))]
        return known

    def _attach_fit(self, kind: str) -> Fit:
        fit = self._attach_fits.get(kind)
        if fit is None:
            priors = self.priors
            base = priors.attach_s.get(kind, priors.attach_s["cpu"])
            bytes_per_s = priors.attach_bytes_per_s.get(kind, priors.attach_bytes_per_s["cpu"])
            fit = self._attach_fits[kind] = Fit(Straight(1.0 / bytes_per_s, base), SCALE_BYTES)
        return fit

    def _learn_share(self, report: ReplicaLoaded, beside_s: float) -> float | None:
        """What moving the bytes would have taken without the other lane (None: too little of it was its own)."""
        if beside_s <= 0.0:
            return report.move_s
        tier = report.tier
        own_s = self._move_s(report.server_id, tier, report.moved_bytes)
        if beside_s >= TELLING * own_s:
            share = min(max(0.0, (report.move_s - own_s) / beside_s), MOST_SHARE)
            self._shared_loads[tier] += 1
            weight = max(SHARE_WEIGHT, 1.0 / (1 + self._shared_loads[tier]))  # what is believed counts as one figure
            self._shares[tier] += weight * (share - self._shares[tier])
        own_s = report.move_s - self._shares[tier] * beside_s
        return own_s if own_s >= report.move_s / 2 else None

    def _learn_attach(self, report: ReplicaLoaded, others: int) -> None:
        kind, moved = _kind(report.device), report.moved_bytes > 0
        known = self._attaching.get((kind, report.checkpoint_id)) or self._unknown(kind, report.weight_bytes)
        _put(self._attaching, (kind, report.checkpoint_id), known)
        if not moved:
            self._work_took(known.whole, report, others, "whole", report.attach_s)
            return
        work_s = max(report.work_s, report.attach_s)
        self._work_took(known.work, report, others, "work", work_s)
        if report.move_s + report.attach_s > WAITED * work_s:  # bytes were waited for: nothing else was left to do
            self._work_took(known.rest, report, others, "rest", report.attach_s)
            if work_s > 0 and (others == 0 or kind not in self._rests):
                self._rests.setdefault(kind, Level()).learn(report.attach_s / work_s)
        elif known.rest.value is not None and report.attach_s < known.rest.value:
            known.rest.level = Level(report.attach_s)  # what is left after the last byte is never less than the rest

    def _unknown(self, kind: str, weight_bytes: int) -> _Attaching:
        """What is believed of a checkpoint before its first load: what others have shown counts as a figure."""
        fit = self._attach_fits.get(kind)
        known = fit is not None and fit.points >= KNOWN_LOADS
        return _Attaching(_Usual(Level(fit.line.at(weight_bytes)), alone=True)) if fit and known else _Attaching()

    def _work_took(self, known: _Usual, report: ReplicaLoaded, others: int, part: str, took_s: float) -> None:
        """A part of a worker's work took so long. What it takes by itself is learnt where it was by itself."""
        took_s /= self._slow.learn(report.server_id, others, part, took_s, known.value)
        alone = others == 0
        if alone and not known.alone:
            known.level, known.alone = Level(), True
        if alone or not known.alone:
            known.level.learn(took_s)
        kind = _kind(report.device)
        if part != "whole":
            return
        if alone and kind not in self._fits_alone:
            self._fits_alone[kind] = None
            self._attach_fits.pop(kind, None)
        if alone or kind not in self._fits_alone:
            self._attach_fit(kind).learn(report.weight_bytes, took_s)

    def _work_s(self, kind: str, key: str, weight_bytes: int) -> float:
        """All of the worker's work while bytes arrive."""
        known = self._attaching.get((kind, key))
        if known is not None and known.work.value is not None:
            return known.work.value
        return self.attach_s(kind, key, weight_bytes)

    def _step_s(self, replica: ReplicaRecord) -> float:
        if replica.step_s is not None and replica.step_s > 0:
            return replica.step_s
        known = self._deployments.get(replica.deployment)
        return self.priors.step_s if known is None or known.step.value is None else known.step.value

    def _count(self, record: ReplicaRecord, deployment: _Deployment) -> None:
        """Output tokens per request that went on to its end. What one that was cut short had generated counts, the
        request does not: how long it would have been is not known (the likeliest mean of exponential lengths of which
        some are only known in part). What a migrating request has generated is added at its source and taken away at
        its destination."""
        before = self._counted.get(record.replica_id)
        ended_tokens = record.generated_tokens - record.output_tokens
        deployment.tokens += ended_tokens - (before.ended_tokens if before else 0)
        all_through = record.finished_requests - record.cut_requests
        through = all_through - (before.through if before else 0)
        if through > 0:
            kept = OUTPUT_KEPT**through
            deployment.sum_requests = kept * deployment.sum_requests + through
            deployment.sum_tokens = kept * deployment.sum_tokens + max(0.0, deployment.tokens)
            deployment.tokens = min(0.0, deployment.tokens)
        _put(self._counted, record.replica_id, _Counted(all_through, ended_tokens))

    def _follow_promise(self, record: ReplicaRecord) -> None:
        server = self._servers.get(self._promised_on.get(record.replica_id, ""))
        if server is None:
            return
        attaching = record.load is not None and record.load.phase == "attaching"
        if record.state is not ReplicaState.LOADING or attaching:
            self._arrived(record.replica_id)
            return
        promise = server.lanes.promises.get(record.replica_id)
        if promise is not None and not promise.key:
            promise.key = record.checkpoint_id


def whereabouts(record: ServerRecord, key: str, weight_bytes: int, *, peers: bool) -> tuple[str, int]:
    """From which tier a server would load a checkpoint, and how many of its bytes are not in its DRAM.

    `peers`: another server could give it. What is arriving counts as far as it has arrived.
    """
    if record.dram.get(key, 0) >= max(1, weight_bytes):
        return "dram", 0
    elsewhere = "peer" if peers else "remote"
    arrived = record.dram_arriving.get(key, 0)
    if record.ssd.get(key, 0) >= max(1, weight_bytes):
        return "ssd", max(0, weight_bytes - arrived)
    return elsewhere, max(0, weight_bytes - max(arrived, record.ssd_arriving.get(key, 0)))


def _put(kept: collections.OrderedDict[K, V], key: K, value: V) -> None:
    """Remember; forget the oldest of too many."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > REMEMBERED:
        kept.popitem(last=False)


def _differs(one: Straight, other: Straight) -> bool:
    """Whether it makes a difference to loads, small or large."""
    pairs = ((one.at(size), other.at(size)) for size in (SCALE_BYTES / 8, 64 * SCALE_BYTES))
    return any(abs(mine - theirs) > TOLD_CHANGE * theirs for mine, theirs in pairs)


def _kind(device: str) -> str:
    """ "cpu", "cuda"."""
    return device.partition(":")[0] or "cpu"


def _harmonic(count: int) -> float:
    """1 + 1/2 + … + 1/count, within 1 % (Euler, Maclaurin)."""
    return math.log(count) + EULER_GAMMA + 0.5 / count - 1.0 / (12.0 * count * count)
