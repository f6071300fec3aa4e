"""The registry: Redis, typed. The only importer of `redis`. What is true about the cluster is here; the bus only hints.

Each record has exactly one writer; all but deployments vanish when their writer's heartbeat stops. Beside the records
lie the lease of the scheduler that leads and the highest term that was ever given with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, Generic, TypeVar, cast

import msgspec
import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import RedisError

from shared import codec
from shared.contracts.records import (
    ClusterView,
    DeploymentRecord,
    GatewayRecord,
    Record,
    ReplicaRecord,
    SchedulerRecord,
    ServerRecord,
    WorkerRecord,
)
from shared.errors import Code, HearthError

T = TypeVar("T", bound=msgspec.Struct)

KINDS: Final[dict[type, str]] = {
    DeploymentRecord: "deployment",
    ServerRecord: "server",
    WorkerRecord: "worker",
    ReplicaRecord: "replica",
    GatewayRecord: "gateway",
    SchedulerRecord: "scheduler",
}


# Keys of one look and values of one read: each part takes the loop a few milliseconds, and others run in between.
SCAN_KEYS: Final = 500
READ_VALUES: Final = 200

# Keys: the lease, the highest term. Arguments: holder, milliseconds, a term that the new one must exceed, and by how
# much if the highest has been forgotten. The value of the lease is "holder term". A holder whose first call was
# answered too late for it to hear may ask again.
_ACQUIRE: Final = """
local held = redis.call('GET', KEYS[1])
if held and string.sub(held, 1, #ARGV[1] + 1) ~= ARGV[1] .. ' ' then
    return {tonumber(string.match(held, '%d+$')), redis.call('PTTL', KEYS[1])}
end
local known = redis.call('GET', KEYS[2])
local highest = math.max(tonumber(known or '0'), tonumber(ARGV[3]))
if not known and highest > 0 then highest = highest + tonumber(ARGV[4]) end
local term = string.format('%d', highest + 1)
redis.call('SET', KEYS[2], term)
redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. term, 'PX', ARGV[2])
return {tonumber(term), -1}
"""
# Key: the lease. Arguments: its value, milliseconds.
_RENEW: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
# Key: the lease. Argument: its value.
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""
# Keys: the lease, a record. Arguments: the lease's value, the record ("": delete it).
_WRITE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then redis.call('DEL', KEYS[2]) else redis.call('SET', KEYS[2], ARGV[2]) end
return 1
"""


def record_kind(kind: type) -> str:
    """The name of a kind of record, as in keys and `RecordChanged.kind`."""
    return KINDS[kind]


def record_id(record: Record) -> str:
    """The id of a record within its kind."""
    if isinstance(record, DeploymentRecord):
        return record.spec.name
    return cast(str, getattr(record, f"{KINDS[type(record)]}_id"))


class _Records(Generic[T]):
    """The records of a kind as they were decoded last. Most are the same at the next look."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._known: dict[bytes, tuple[bytes, T]] = {}

    async def read(self, found: dict[bytes, bytes]) -> list[T]:
        """All records, ordered by key, of key → bytes; those that are not in it are forgotten. Raises `CodecError`."""
        known: dict[bytes, tuple[bytes, T]] = {}
        fresh = 0
        for key in sorted(found):
            data = found[key]
            old = self._known.get(key)
            if old is None or old[0] != data:
                old = (data, codec.decode(data, self._kind))
                fresh += 1
                if fresh % READ_VALUES == 0:
                    await asyncio.sleep(0)
            known[key] = old
        self._known = known
        return [record for _, record in known.values()]


class Registry:
    """A connection to Redis. Use `Registry.connect`. Every method raises `HearthError` (unavailable) without Redis."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._redis = client
        self._root = f"{prefix}:hearth" if prefix else "hearth"
        self._records: dict[type, _Records[Any]] = {kind: _Records(kind) for kind in KINDS}
        self._write = client.register_script(_WRITE)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, url: str, *, prefix: str = "") -> AsyncIterator[Registry]:
        """A registry; connects lazily and again after every loss."""
        client = redis.Redis.from_url(
            url,
            socket_timeout=5.0,
            socket_connect_timeout=2.0,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), 4),
        )
        try:
            yield cls(client, prefix)
        finally:
            await client.aclose()

    @contextlib.asynccontextmanager
    async def lease(self, holder: str, *, ttl_s: float) -> AsyncIterator[LeaderLease]:
        """The lease of the scheduler that leads, for `holder` (no spaces; of no other process, ever).

        It has a connection of its own, which no larger answer delays, and tries nothing twice: who asks knows when.
        """
        timeout_s = ttl_s / 2
        url = self._redis.connection_pool.connection_kwargs
        pool = redis.ConnectionPool(
            connection_class=self._redis.connection_pool.connection_class,
            **(
                url | {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "retry": Retry(NoBackoff(), 0)}
            ),
        )
        client = redis.Redis.from_pool(pool)
        try:
            yield LeaderLease(client, self._root, holder, ttl_s)
        finally:
            await client.aclose()

    def _key(self, kind: type, id: str) -> str:
        return f"{self._root}:{KINDS[kind]}:{id}"

    async def ping(self) -> None:
        """Raise unless Redis answers."""
        with _redis_errors():
            await cast(Any, self._redis.ping())

    async def put(self, record: Record, *, ttl_s: float | None) -> None:
        """Write a record; it vanishes after `ttl_s` seconds unless written again (None: never)."""
        with _redis_errors():
            await self._redis.set(
                self._key(type(record), record_id(record)),
                codec.encode(record),
                px=None if ttl_s is None else int(ttl_s * 1000),
            )

    async def get(self, kind: type[T], id: str) -> T | None:
        """One record, or None."""
        with _redis_errors():
            data = await self._redis.get(self._key(kind, id))
        return None if data is None else codec.decode(cast(bytes, data), kind)

    async def all(self, kind: type[T]) -> list[T]:
        """Every record of a kind, ordered by id. Raises `CodecError` for one that cannot be read."""
        found = await self._look(f"{self._root}:{KINDS[kind]}:*")
        return cast(list[T], await self._records[kind].read(found.get(KINDS[kind], {})))

    async def _look(self, pattern: str) -> dict[str, dict[bytes, bytes]]:
        """Kind → key → bytes of all that matches."""
        found: dict[str, dict[bytes, bytes]] = {}
        start = len(self._root) + 1
        with _redis_errors():
            keys = sorted({key async for key in self._redis.scan_iter(match=pattern, count=SCAN_KEYS)})
            for first in range(0, len(keys), READ_VALUES):
                part = keys[first : first + READ_VALUES]
                for key, data in zip(part, cast(list[bytes | None], await self._redis.mget(part)), strict=True):
                    if data is not None:
                        found.setdefault(key[start:].split(b":", 1)[0].decode(), {})[key] = data
                await asyncio.sleep(0)
        return found

    async def write(self, record: DeploymentRecord, lease: str) -> None:
        """Write a record for good, if the lease still has this value (`LeaderLease.value`).

        Raises `HearthError` (stale_epoch) if not.
        """
        await self._write_if(lease, self._key(type(record), record_id(record)), codec.encode(record))

    async def erase(self, kind: type, id: str, lease: str) -> None:
        """Remove a record, fine if it is gone, if the lease still has this value.

        Raises `HearthError` (stale_epoch) if not.
        """
        await self._write_if(lease, self._key(kind, id), b"")

    async def _write_if(self, lease: str, key: str, data: bytes) -> None:
        with _redis_errors():
            done = await self._write(keys=[_lease_key(self._root), key], args=[lease, data])
        if not done:
            raise HearthError(Code.STALE_EPOCH, "Another scheduler leads, or none does.")

    async def delete(self, kind: type, id: str) -> None:
        """Remove a record; fine if it is gone."""
        with _redis_errors():
            await self._redis.delete(self._key(kind, id))

    async def view(self) -> ClusterView:
        """Everything that the registry holds (queue depths are the bus's)."""
        found = await self._look(f"{self._root}:*")

        async def records(kind: type[T]) -> tuple[T, ...]:
            return tuple(await self._records[kind].read(found.get(KINDS[kind], {})))

        return ClusterView(
            servers=await records(ServerRecord),
            workers=await records(WorkerRecord),
            replicas=await records(ReplicaRecord),
            deployments=await records(DeploymentRecord),
            gateways=await records(GatewayRecord),
            schedulers=await records(SchedulerRecord),
        )


class LeaderLease:
    """See `Registry.lease`. Every method raises `HearthError` (unavailable) if Redis does not answer within half a TTL;
    what was asked may then have been done all the same."""

    def __init__(self, client: redis.Redis, root: str, holder: str, ttl_s: float) -> None:
        assert " " not in holder
        self._holder = holder
        self._ttl_ms = int(ttl_s * 1000)
        self._lease = _lease_key(root)
        self._term = f"{root}:term"
        self._acquire = client.register_script(_ACQUIRE)
        self._renew = client.register_script(_RENEW)
        self._release = client.register_script(_RELEASE)

    def value(self, term: int) -> str:
        """What the registry holds while the holder has the lease under this term."""
        return f"{self._holder} {term}"

    async def acquire(self, at_least: int, *, forgotten: int = 0) -> tuple[int, float | None]:
        """Take the lease unless another holder has it: (a term that was never given before and is above `at_least`,
        None), or (the other's term, the seconds that its lease lasts still).

        If Redis has forgotten which terms it gave, and `at_least` > 0 says that it did, it goes on `forgotten` further.
        """
        with _redis_errors():
            term, left_ms = await self._acquire(
                keys=[self._lease, self._term], args=[self._holder, self._ttl_ms, at_least, forgotten]
            )
        return int(term), None if left_ms < 0 else left_ms / 1000

    async def renew(self, term: int) -> bool:
        """Have it last for the whole TTL again; whether the holder had it still, under this term."""
        with _redis_errors():
            return bool(await self._renew(keys=[self._lease], args=[self.value(term), self._ttl_ms]))

    async def release(self, term: int) -> bool:
        """Give it back; whether the holder had it still, under this term."""
        with _redis_errors():
            return bool(await self._release(keys=[self._lease], args=[self.value(term)]))


def _lease_key(root: str) -> str:
    return f"{root}:lease"


@contextlib.contextmanager
def _redis_errors() -> Iterator[None]:
    task = asyncio.current_task()
    cancelled_before = task.cancelling() if task else 0
    try:
        yield
    except (RedisError, OSError) as error:
        _heed_cancellation(task, cancelled_before)
        raise HearthError(Code.UNAVAILABLE, "The registry (Redis) does not answer.") from error
    _heed_cancellation(task, cancelled_before)


def _heed_cancellation(task: asyncio.Task[Any] | None, cancelled_before: int) -> None:
    """The client loses a cancellation that comes in the moment of its answer; the task would then never end."""
    if task is not None and task.cancelling() > cancelled_before:
        raise asyncio.CancelledError
