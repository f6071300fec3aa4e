"""The registry: Redis, typed. The only importer of `redis`. What is true about the cluster is here; the bus only hints.

Each record has exactly one writer; all but deployments vanish when their writer's heartbeat stops.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, TypeVar, cast

import msgspec
import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
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


def record_kind(kind: type) -> str:
    """The name of a kind of record, as in keys and `RecordChanged.kind`."""
    return KINDS[kind]


def record_id(record: Record) -> str:
    """The id of a record within its kind."""
    if isinstance(record, DeploymentRecord):
        return record.spec.name
    return cast(str, getattr(record, f"{KINDS[type(record)]}_id"))


class Registry:
    """A connection to Redis. Use `Registry.connect`. Every method raises `HearthError` (unavailable) without Redis."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._redis = client
        self._root = f"{prefix}:hearth" if prefix else "hearth"

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
        """Every record of a kind, ordered by id."""
        with _redis_errors():
            keys = sorted(
                [key async for key in self._redis.scan_iter(match=f"{self._root}:{KINDS[kind]}:*", count=1000)]
            )
            values = await self._redis.mget(keys) if keys else []
        return [codec.decode(cast(bytes, data), kind) for data in values if data is not None]

    async def delete(self, kind: type, id: str) -> None:
        """Remove a record; fine if it is gone."""
        with _redis_errors():
            await self._redis.delete(self._key(kind, id))

    async def view(self) -> ClusterView:
        """Everything that the registry holds (queue depths are the bus's)."""
        return ClusterView(
            servers=tuple(await self.all(ServerRecord)),
            workers=tuple(await self.all(WorkerRecord)),
            replicas=tuple(await self.all(ReplicaRecord)),
            deployments=tuple(await self.all(DeploymentRecord)),
            gateways=tuple(await self.all(GatewayRecord)),
            schedulers=tuple(await self.all(SchedulerRecord)),
        )


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
