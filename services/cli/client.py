"""A thin client of the gateway's HTTP API, for the verbs that talk to a running cluster."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Coroutine
from types import TracebackType
from typing import Any, Final, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from shared.contracts.generation import Ledger
from shared.contracts.migration import MigrationEnded, Moving, RunningRequest
from shared.contracts.placement import Explanation
from shared.contracts.records import ClusterView, DeploymentRecord, DeploymentSpec
from shared.contracts.residency import HeldCheckpoint, Progress, Source

T = TypeVar("T")

CONNECT_S: Final = 10.0
LINE_BYTES: Final = 4 * 2**20


class ClientError(Exception):
    """The call failed; the text is a sentence for a person, `code` the stable name of the error where there is one."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class RunningRequests(msgspec.Struct, frozen=True, kw_only=True):
    """What runs on the workers, oldest first; `silent` workers did not answer."""

    data: tuple[RunningRequest, ...]
    silent: tuple[str, ...] = ()


class DrainingWorker(msgspec.Struct, frozen=True, kw_only=True):
    """What a draining worker still has. `phase` "" is a worker that has ended."""

    worker_id: str
    phase: str
    requests: int
    replicas: int
    incoming: int = 0


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """A replica in which a request ran."""

    replica_id: str
    worker_id: str


class ExplainedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as its gateway knows it; seconds. `state` is "queued", "streaming", "interrupted" or "ended"."""

    request_id: str
    deployment: str
    state: str
    age_s: float
    ended_ago_s: float | None = None
    reason: str = ""
    error: str = ""
    queue_s: float | None = None
    ttft_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    places: tuple[Where, ...] = ()
    ledger: Ledger | None = None


class RequestExplanation(msgspec.Struct, frozen=True, kw_only=True):
    """A request, and the decisions behind it (None: the scheduler did not answer, as `error` says)."""

    gateway_id: str
    request: ExplainedRequest
    explanation: Explanation | None = None
    error: str = ""


class Client:
    """Use as an async context manager. Every method raises `ClientError`."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._key = os.environ.get("HEARTH_API_KEY", "") if key is None else key
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout, read_bufsize=LINE_BYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @contextlib.asynccontextmanager
    async def _ask(
        self, method: str, path: str, body: object = None, accept: str = "application/json"
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None, "use `async with`"
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Accept": accept} | ({} if data is None else {"Content-Type": "application/json"})
        try:
            async with self._session.request(method, self.url + path, data=data, headers=headers) as response:
                if response.status >= 400:
                    raise _refusal(response.status, await response.text(errors="replace"))
                yield response
        except aiohttp.InvalidURL as error:
            raise ClientError(f"{self.url!r} is no URL; it should look like http://127.0.0.1:8080.") from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ClientError(f"No Hearth answers at {self.url}. Start one with: hearth up") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ClientError(f"The connection to {self.url} broke ({str(error) or type(error).__name__}).") from error

    async def _decoded(self, method: str, path: str, kind: type[T] | Any) -> T:
        async with self._ask(method, path) as response:
            data = await response.read()
        try:
            answer: T = msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError as error:
            raise ClientError(f"What answers at {self.url} is no Hearth of this version ({error}).") from error
        return answer

    async def ready(self) -> bool:
        """Whether the gateway says that it can answer."""
        try:
            async with self._ask("GET", "/readyz"):
                return True
        except ClientError:
            return False

    async def cluster(self) -> ClusterView:
        """What the registry says now."""
        return await self._decoded("GET", "/v1/admin/cluster", ClusterView)

    async def deploy(self, spec: DeploymentSpec) -> AsyncIterator[Progress | DeploymentRecord]:
        """Deploy: how far it is, repeatedly, and at the end the record."""
        async for step in self._steps("/v1/admin/deployments", spec):
            if isinstance(step, Progress):
                yield step
                continue
            try:
                yield msgspec.convert({"type": "deployment_record", **step["deployment"]}, DeploymentRecord)
            except (ValueError, TypeError, KeyError) as error:
                raise ClientError(f"The gateway's answer cannot be read ({error}).") from error
            return
        raise ClientError("The gateway ended its answer before the deployment was ready.")

    async def checkpoints(self, server_id: str) -> list[HeldCheckpoint]:
        """What a store holds, the one that would be evicted last first."""
        found: _Held = await self._decoded("GET", _place(server_id), _Held)
        return found.data

    async def bring_in(self, server_id: str, source: Source) -> AsyncIterator[Progress | dict[str, Any]]:
        """Import: how far it is, repeatedly, and at the end `{"checkpoint": …}`."""
        async for step in self._steps(_place(server_id), {"source": source}):
            yield step

    async def work(
        self, server_id: str, checkpoint_id: str, verb: str, body: dict[str, Any]
    ) -> AsyncIterator[Progress | dict[str, Any]]:
        """Verify, prefetch or export: how far it is, repeatedly, and at the end what the gateway says was done."""
        async for step in self._steps(f"{_place(server_id, checkpoint_id)}/{verb}", body):
            yield step

    async def pin(self, server_id: str, checkpoint_id: str, tier: str) -> Any:
        """Never evict a checkpoint from a tier; "" unpins it."""
        async with self._ask("POST", f"{_place(server_id, checkpoint_id)}/pin", {"tier": tier}) as response:
            return json.loads(await response.read())

    async def evict(self, server_id: str, checkpoint_id: str, tier: str) -> Any:
        """Take a checkpoint out of a tier."""
        async with self._ask("DELETE", f"{_place(server_id, checkpoint_id)}?tier={tier}") as response:
            return json.loads(await response.read())

    async def requests(self) -> RunningRequests:
        """What runs on the workers now."""
        found: RunningRequests = await self._decoded("GET", "/v1/admin/requests", RunningRequests)
        return found

    async def explain(self, deployment: str, last: int) -> Explanation:
        """The last decisions about a deployment ("": about any), latest first."""
        path = "/v1/admin/explain" + (f"/{quote(deployment)}" if deployment else "")
        found: Explanation = await self._decoded("GET", f"{path}?last={last}", Explanation)
        return found

    async def explain_request(self, request_id: str, last: int) -> RequestExplanation:
        """A request of this gateway, and the decisions behind it."""
        path = f"/v1/admin/requests/{quote(request_id, safe='')}/explain?last={last}"
        found: RequestExplanation = await self._decoded("GET", path, RequestExplanation)
        return found

    async def migrate(self, request_id: str, to: str | None) -> AsyncIterator[Moving | MigrationEnded]:
        """Move a running request (`to` None: the scheduler chooses): how far it is, and at the end how it ended."""
        async for line in self._answers(f"/v1/admin/requests/{quote(request_id, safe='')}/migrate", {"to": to}):
            if "moving" in line:
                yield _converted(line["moving"], Moving, "moving")
            else:
                yield _converted(line.get("migrated"), MigrationEnded, "migration_ended")
                return

    async def drain(
        self, kind: str, id: str, *, on: bool, wait_s: float
    ) -> AsyncIterator[list[DrainingWorker] | dict[str, Any]]:
        """Let everything leave a worker or server (`kind` "workers" or "servers"), or take that back (`on` false).

        What is left, repeatedly, and at the end what the gateway says was done; without the end if `wait_s` is 0 and
        something is left.
        """
        async for line in self._answers(f"/v1/admin/{kind}/{quote(id, safe='')}/drain", {"on": on, "wait_s": wait_s}):
            if "draining" in line:
                yield _converted(line["draining"], list[DrainingWorker])
            else:
                yield line
                return

    async def _steps(self, path: str, body: object) -> AsyncIterator[Progress | dict[str, Any]]:
        """How far a long call is, repeatedly, and at the end its result."""
        async for line in self._answers(path, body):
            if "progress" not in line:
                yield line
                return
            yield _converted(line["progress"], Progress, "progress")

    async def _answers(self, path: str, body: object) -> AsyncIterator[dict[str, Any]]:
        """The lines of the answer to a long call. An error among them is raised."""
        async with self._ask("POST", path, body, "application/x-ndjson") as response:
            async for raw in _lines(response):
                try:
                    line = json.loads(raw)
                    if "error" in line:
                        raise ClientError(str(line["error"].get("message", line)), str(line["error"].get("code", "")))
                    if not isinstance(line, dict):
                        raise ValueError("a line is no object")
                except (ValueError, TypeError, AttributeError) as error:
                    raise ClientError(f"The gateway's answer cannot be read ({error}).") from error
                yield line

    async def delete(self, name: str) -> Any:
        """Remove a deployment; what the gateway answers."""
        async with self._ask("DELETE", f"/v1/admin/deployments/{quote(name, safe='')}") as response:
            data = await response.read()
        return msgspec.json.decode(data) if data else None

    async def chat(self, body: dict[str, Any]) -> AsyncIterator[tuple[str, str]]:
        """A streamed chat completion: ("text", piece), ("comment", text), ("finish", reason)."""
        request = {**body, "stream": True}
        async with self._ask("POST", "/v1/chat/completions", request, "text/event-stream") as response:
            async for raw in _lines(response):
                line = raw.decode(errors="replace").rstrip("\r\n")
                if line.startswith(":"):
                    yield "comment", line[1:].strip()
                elif line.startswith("data:"):
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    for item in _events(data):
                        yield item
        raise ClientError("The answer broke off.")


class _Held(msgspec.Struct):
    data: list[HeldCheckpoint]


def _converted(value: Any, kind: type[T] | Any, tag: str = "") -> T:
    """A part of an answer as `kind`. A gateway may leave a type tag out; the contract has one."""
    try:
        found: T = msgspec.convert({"type": tag, **value} if tag else value, kind)
    except (ValueError, TypeError) as error:
        raise ClientError(f"The gateway's answer cannot be read ({error}).") from error
    return found


def _place(server_id: str, checkpoint_id: str = "") -> str:
    place = f"/v1/admin/servers/{quote(server_id, safe='')}/checkpoints"
    return f"{place}/{quote(checkpoint_id, safe='')}" if checkpoint_id else place


def _events(data: str) -> list[tuple[str, str]]:
    try:
        event = json.loads(data)
        if "error" in event:
            raise ClientError(str(event["error"].get("message", event)), str(event["error"].get("code", "")))
        found: list[tuple[str, str]] = []
        for choice in event.get("choices", ()):
            if text := (choice.get("delta") or {}).get("content"):
                found.append(("text", text))
            if reason := choice.get("finish_reason"):
                found.append(("finish", reason))
        return found
    except (ValueError, AttributeError) as error:
        raise ClientError(f"The gateway's answer cannot be read ({error}).") from error


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    while line := await response.content.readline():
        if line.strip():
            yield line


def _refusal(status: int, text: str) -> ClientError:
    try:
        error = json.loads(text)["error"]
        return ClientError(str(error["message"]), str(error.get("code") or ""))
    except (ValueError, KeyError, TypeError):
        return ClientError(f"The gateway answers {status}: {text.strip()[:200] or 'no reason given'}")


def run(work: Coroutine[Any, Any, int]) -> int:
    """Run a verb's coroutine: its exit code, 1 with a sentence after a `ClientError`, 130 after Ctrl-C."""
    try:
        return asyncio.run(work)
    except ClientError as error:
        print(f"hearth: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
