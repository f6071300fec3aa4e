"""A view in memory, written down in a few lines; what decisions are tested with. Everything is summed up anew.

The words (sizes in GiB, speeds in GiB/s, times in seconds; what is left out has the value in brackets):

    model m weights=10 kv=[1] slots=[4] checkpoint=[its name] devices=[1] LABEL:VALUE…
    server a pool=[1000] ssd-size=[10000] chunk=[0] phase=[ready] dram=m,… ssd=m,… quarantined=m,…
             arriving=m:4 (so much of it is in DRAM) ssd-speed=[2] peer-speed=[1] remote-speed=[0.5]
             ssd-queue=[0] remote-queue=[0] peers (gives what it has to others) LABEL:VALUE…
    worker a0 on=a memory=[24] max=[8] device=[cuda] phase=[ready] gangs LABEL:VALUE…
    replica x1 of=x on=a0[,a1] idle=[0] | running=3 tokens=[100 each] remaining=[60] resume=[1]
            young (not to be evicted) fixed (not to be moved) parkable reserve (keeps a minimum up) priority=[0] loading
    room y on=a0                       room is being made there for y
    avoid a WHY                        it has just failed there
    ask m at= away_from= unwanted=a0,… priority=[0] owner= no-evict no-below-min no-move no-wait park

Stopping takes 0.1 s, attaching 0.5 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from services.scheduler.columns import Columns
from services.scheduler.commands import Need
from services.scheduler.terms import Ask, Means, Startup, Tenant
from services.scheduler.view import Estimates, memory_on, pool_bytes, streams_on
from shared.contracts.records import Phase, ServerRecord, WorkerRecord
from shared.errors import Code, Failure

GIB = 2**30


@dataclass
class Speeds:
    """What things take on a server."""

    speed: dict[str, float] = field(default_factory=dict)
    queue_s: dict[str, float] = field(default_factory=dict)
    arriving: tuple[str, ...] = ()


@dataclass
class FakeEstimates:
    """Estimates that are told."""

    of: dict[str, Speeds] = field(default_factory=dict)
    attach: float = 0.5
    stop: float = 0.1

    def bandwidth(self, server_id: str, tier: str) -> float:
        return GIB * self.of.get(server_id, Speeds()).speed.get(tier, 1.0)

    def latency_s(self, server_id: str, tier: str) -> float:
        return 0.0

    def wait_s(self, server_id: str, tier: str, now: float, key: str = "") -> float:
        return self.of.get(server_id, Speeds()).queue_s.get(tier, 0.0)

    def beside_s(self, server_id: str, tier: str, now: float) -> float:
        return 0.0

    def share(self, tier: str) -> float:
        return 0.0

    def slowdown(self, server_id: str) -> float:
        return 1.0

    def attach_s(self, device: str, key: str, weight_bytes: int) -> float:
        return self.attach

    def attach_rest_s(self, device: str, key: str, weight_bytes: int) -> float:
        return self.attach

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
        if missing_bytes <= 0 or tier == "dram":
            return Startup(attach_s=self.attach)
        wait_s = 0.0 if key in self.of.get(server_id, Speeds()).arriving else self.wait_s(server_id, tier, now)
        return Startup(wait_s, missing_bytes / self.bandwidth(server_id, tier), self.attach)

    def stop_s(self) -> float:
        return self.stop


@dataclass(frozen=True)
class Held:
    """A replica or a room, and what it holds. `loads`: it is on its way, and cannot be made to leave."""

    tenant: Tenant
    slots: int
    held_bytes: int
    loads: bool = False
    owner: str = ""


@dataclass
class FakeView:
    """See the module and `services.scheduler.view.View`."""

    servers: dict[str, ServerRecord] = field(default_factory=dict)
    workers: dict[str, WorkerRecord] = field(default_factory=dict)
    asks: dict[str, Ask] = field(default_factory=dict)
    replicas: dict[str, Held] = field(default_factory=dict)
    rooms: list[Held] = field(default_factory=list)
    estimator: Estimates = field(default_factory=FakeEstimates)
    columns: Columns = field(default_factory=Columns)
    changed: tuple[list[str], list[str]] | None = None

    def changed_workers(self) -> Iterable[str]:
        return sorted(self.workers) if self.changed is None else self.changed[0]

    def changed_servers(self) -> Iterable[str]:
        return sorted(self.servers) if self.changed is None else self.changed[1]

    def _on(self, worker_id: str, but_for: str) -> list[Held]:
        rooms = [one for one in self.rooms if one.owner != but_for]
        return [one for one in [*self.replicas.values(), *rooms] if worker_id in one.tenant.worker_ids]

    def _keys(self, server_id: str, but_for: str = "", without: Sequence[str] = ()) -> dict[str, int]:
        rooms = [one for one in self.rooms if one.owner != but_for]
        there = [one for one in [*self.replicas.values(), *rooms] if one.tenant.server_id == server_id]
        return {
            one.tenant.key: one.held_bytes for one in there if one.held_bytes and one.tenant.replica_id not in without
        }

    def workers_on(self, server_id: str) -> Sequence[str]:
        return [id for id, one in sorted(self.workers.items()) if one.server_id == server_id]

    def used_bytes(self, worker_id: str, *, but_for: str = "") -> int:
        return sum(one.tenant.memory_bytes for one in self._on(worker_id, but_for))

    def replica_count(self, worker_id: str, *, but_for: str = "") -> int:
        return len(self._on(worker_id, but_for))

    def pool_used_bytes(self, server_id: str, now: float, *, but_for: str = "") -> int:
        return max(self.servers[server_id].leased_bytes, sum(self._keys(server_id, but_for).values()))

    def pool_freed_bytes(self, server_id: str, replica_ids: Sequence[str]) -> int:
        return sum(self._keys(server_id).values()) - sum(self._keys(server_id, without=replica_ids).values())

    def holds(self, server_id: str, key: str, *, but_for: str = "") -> bool:
        return key in self._keys(server_id, but_for)

    def dram_holders(self, key: str, weight_bytes: int = 1) -> Sequence[str]:
        return [id for id, one in sorted(self.servers.items()) if one.dram.get(key, 0) >= max(1, weight_bytes)]

    def ssd_holders(self, key: str, weight_bytes: int = 1) -> Sequence[str]:
        return [id for id, one in sorted(self.servers.items()) if one.ssd.get(key, 0) >= max(1, weight_bytes)]

    def sketch(self, worker_id: str) -> Sequence[Tenant]:
        """See `View`."""
        return self.tenants(worker_id)

    def tenants(self, worker_id: str) -> Sequence[Tenant]:
        return [
            one.tenant
            for _, one in sorted(self.replicas.items())
            if worker_id in one.tenant.worker_ids and not one.loads
        ]

    def present(self, deployment: str) -> frozenset[str]:
        there = [one for one in self.replicas.values() if one.tenant.deployment == deployment]
        return frozenset(id for one in there for id in one.tenant.worker_ids)

    def rooms_of(self, owner: str) -> Sequence[str]:
        return [id for one in self.rooms if one.owner == owner for id in one.tenant.worker_ids]

    def destinations(self, tenant: Tenant) -> Sequence[tuple[str, str, int]]:
        return [
            (one.tenant.worker_ids[0], id, one.slots - one.tenant.running)
            for id, one in sorted(self.replicas.items())
            if one.tenant.deployment == tenant.deployment and id != tenant.replica_id and not one.loads
        ]

    def ask_of(self, deployment: str) -> Ask | None:
        return self.asks[deployment]


def _split(words: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """`key=value` words (a bare one is a flag), and `label:value` ones."""
    given = {key: value for key, _, value in (word.partition("=") for word in words if ":" not in word.split("=")[0])}
    labels = dict(word.split(":") for word in words if ":" in word.split("=")[0])
    return given, labels


def _bytes(given: dict[str, str], name: str, default: float = 0.0) -> int:
    return round(float(given.get(name, default)) * GIB)


def _names(given: dict[str, str], name: str) -> list[str]:
    return [one for one in given.get(name, "").split(",") if one]


def read(text: str) -> tuple[FakeView, Ask]:
    """The view and the question that a text describes."""
    view, avoid, slots = FakeView(), dict[str, Failure](), dict[str, int]()
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        verb, id, *words = line.split()
        given, labels = _split(words)
        match verb:
            case "model":
                need = Need(id, f"ck-{given.get('checkpoint', id)}", _bytes(given, "weights"), _bytes(given, "kv", 1.0))
                view.asks[id] = Ask(need, devices=int(given.get("devices", 1)), labels=labels)
                slots[id] = int(given.get("slots", 4))
            case "server":
                _server(view, id, given, labels)
            case "worker":
                view.workers[id] = WorkerRecord(
                    worker_id=id,
                    server_id=given["on"],
                    phase=Phase(given.get("phase", "ready")),
                    pid=1,
                    device=given.get("device", "cuda"),
                    device_name="",
                    memory_total_bytes=_bytes(given, "memory", 24.0),
                    memory_used_bytes=0,
                    max_replicas=int(given.get("max", 8)),
                    labels=labels,
                    gangs="gangs" in given,
                )
            case "replica":
                view.replicas[id] = _held(view, id, given, slots)
            case "room":
                view.rooms.append(replace(_held(view, f"room-{id}", {"of": id, **given}, slots), owner=id))
            case "avoid":
                avoid[id] = Failure(code=Code.CHECKPOINT_CORRUPT, message=" ".join(words))
            case "ask":
                return view, replace(_asked(view.asks[id], given), avoid=avoid)
            case _:
                raise ValueError(f"{verb} is no word of scenarios")
    raise ValueError("nothing is asked")


def _server(view: FakeView, id: str, given: dict[str, str], labels: dict[str, str]) -> None:
    keys = {name: ask.need for name, ask in view.asks.items()}

    def tier(word: str) -> dict[str, int]:
        return {keys[name].key: keys[name].weight_bytes for name in _names(given, word)}

    arriving = (part.split(":") for part in _names(given, "arriving"))
    view.servers[id] = ServerRecord(
        server_id=id,
        phase=Phase(given.get("phase", "ready")),
        host="",
        pid=1,
        dram_capacity_bytes=_bytes(given, "pool", 1000.0),
        dram_used_bytes=0,
        leased_bytes=_bytes(given, "leased"),
        ssd_capacity_bytes=_bytes(given, "ssd-size", 10_000.0),
        ssd_used_bytes=0,
        dram=tier("dram"),
        ssd=tier("ssd"),
        dram_arriving={keys[name].key: round(float(part) * GIB) for name, part in arriving},
        chunk_bytes=_bytes(given, "chunk"),
        quarantined={keys[name].key: "2 chunks differ" for name in _names(given, "quarantined")},
        peer_url="http://peer" if "peers" in given else "",
        labels=labels,
    )
    usual = {"ssd": 2.0, "peer": 1.0, "remote": 0.5}
    assert isinstance(view.estimator, FakeEstimates)
    view.estimator.of[id] = Speeds(
        {name: float(given.get(f"{name}-speed", value)) for name, value in usual.items()},
        {name: float(given.get(f"{name}-queue", 0)) for name in usual},
        tuple(view.servers[id].dram_arriving),
    )


def _held(view: FakeView, id: str, given: dict[str, str], slots: dict[str, int]) -> Held:
    ask, on = view.asks[given["of"]], tuple(given["on"].split(","))
    worker = view.workers[on[0]]
    server = view.servers[worker.server_id]
    streams = streams_on(server, ask.need.key, ask.need.weight_bytes)
    running, loads = int(given.get("running", 0)), "loading" in given
    held = 0
    if not streams and (worker.device == "cpu" or loads or id.startswith("room-")):
        held = pool_bytes(server, ask.need.key, ask.need.weight_bytes)
    tenant = Tenant(
        replica_id=id,
        deployment=ask.need.deployment,
        worker_ids=on,
        server_id=server.server_id,
        memory_bytes=memory_on(worker, ask.need, streams=streams, devices=ask.devices),
        key=ask.need.key,
        weight_bytes=ask.need.weight_bytes,
        running=running,
        tokens=int(given.get("tokens", 100 * running)),
        idle_s=float(given.get("idle", 0)),
        evictable=running == 0 and not loads and "young" not in given,
        movable=running > 0 and "fixed" not in given,
        parkable="parkable" in given,
        below_min="reserve" in given,
        priority=int(given.get("priority", 0)),
        remaining_s=float(given.get("remaining", 60)) if running else 0.0,
        resume_s=float(given.get("resume", 1)) if running else 0.0,
    )
    return Held(tenant, slots[ask.need.deployment], held, loads)


def _asked(ask: Ask, given: dict[str, str]) -> Ask:
    means = Means(
        evict="no-evict" not in given,
        below_min="no-below-min" not in given,
        move="no-move" not in given,
        wait="no-wait" not in given,
        park="park" in given,
    )
    return replace(
        ask,
        means=means,
        priority=int(given.get("priority", 0)),
        owner=given.get("owner", ""),
        at=given.get("at", ""),
        away_from=given.get("away_from", ""),
        unwanted=frozenset(_names(given, "unwanted")),
    )
