"""Serves this store's checkpoints to other stores over HTTP: manifest, small files, ranges of the weight files.

GET /v1/checkpoints/{id}/hearth.json       the manifest
GET /v1/checkpoints/{id}/files/{name}      a file of the manifest; ranges of weight files go out by sendfile
GET /v1/checkpoints/{id}/arrived           one byte per chunk: 1 here, 2 on its way from the origin, 0 neither

A checkpoint that is arriving is served as far as its chunks are here and verified; for others the answer is 425, with
`?wait_s=` only after so long a wait. Without the cluster's token nothing is served; what is in quarantine never is.
429 with Retry-After: as many transfers as may be run already.

The server has a thread and an event loop of its own: `sendfile` waits for the disk where the page cache has not got the
bytes, and the store's own loop must not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import platform
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.typedefs import Handler

from services.store.arriving import Arriving
from services.store.manifest import decode_stored
from services.store.routes import HERE
from services.store.tier import SsdTier
from shared.contracts.manifest import MANIFEST_NAME, Manifest
from shared.errors import Code, HearthError

TRANSFERS: Final = 32  # at once; more would only share the same disk and network
WAITERS: Final = 1024
WAIT_LIMIT_S: Final = 10.0
RETRY_AFTER_S: Final = 1
_MANIFESTS: Final = 64
_ID: Final = re.compile(r"[0-9a-f]{32}")
_WILDCARDS: Final = ("0.0.0.0", "::", "")
_SLOWEST_BYTES_PER_S: Final = 10**5
_LEAST_S: Final = 30.0


def read_token(token: str, token_file: str) -> str:
    """The secret of the stores, from the setting or its file; "" if there is none. Raises `invalid_request`."""
    if token or not token_file:
        return token
    try:
        token = Path(token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        message = f"The peer token cannot be read from {token_file}: {type(error).__name__}."
        raise HearthError(Code.INVALID_REQUEST, message) from error
    if not token:
        raise HearthError(Code.INVALID_REQUEST, f"{token_file} is empty: it should hold the peer token.")
    return token


class PeerServer:
    """Serves a tier at `host`:`port` (0: any free port) to whoever has the token, `transfers` ranges at once."""

    def __init__(self, tier: SsdTier, *, token: str, host: str, port: int, transfers: int = TRANSFERS) -> None:
        if not token:
            raise ValueError("without a token nothing is served")
        self._tier = tier
        self._secret = f"Bearer {token}".encode()
        self._host = host
        self._port = port
        self._limit = transfers
        self._under_way = 0
        self._waiting = 0
        self._manifests: OrderedDict[str, tuple[int, Manifest]] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._live, name="peer-server", daemon=True)
        self.served_bytes = 0

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> str:
        """Listen; the url. Raises `HearthError` (unavailable) when the address cannot be used."""
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            message = f"Peers cannot be served at {self._host}:{self._port}: {self._error.strerror or self._error}."
            raise HearthError(Code.UNAVAILABLE, message) from self._error
        host = platform.node() if self._host in _WILDCARDS else self._host
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    def close(self) -> None:
        """End at once; transfers under way are cut off, and their peers go on elsewhere."""
        if self._loop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _live(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(4, thread_name_prefix="peer-files"))
        app = web.Application(middlewares=[self._authenticated], client_max_size=1)
        app.router.add_get("/v1/checkpoints/{id}/hearth.json", self._manifest_asked)
        app.router.add_get("/v1/checkpoints/{id}/arrived", self._arrived_asked)
        app.router.add_get("/v1/checkpoints/{id}/files/{name}", self._file_asked)
        # Without cancellation a peer that leaves is noticed only at the end of its wait.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, self._host or None, self._port)
            try:
                await site.start()
            except OSError as error:
                self._error = error
                return
            self._port = runner.addresses[0][1]
            self._ready.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()

    # -- requests ------------------------------------------------------------------------------------------------------

    @web.middleware
    async def _authenticated(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._secret):
            return web.Response(status=401, text="The peer token is missing or wrong.\n")
        return await handler(request)

    async def _manifest_asked(self, request: web.Request) -> web.StreamResponse:
        directory, _, _ = await self._checkpoint(request)
        return web.FileResponse(directory / MANIFEST_NAME, headers={"Content-Type": "application/json"})

    async def _arrived_asked(self, request: web.Request) -> web.StreamResponse:
        _, manifest, arriving = await self._checkpoint(request)
        marks = bytes([HERE]) * len(manifest.chunks) if arriving is None else arriving.arrived()
        return web.Response(body=marks, content_type="application/octet-stream")

    async def _file_asked(self, request: web.Request) -> web.StreamResponse:
        directory, manifest, arriving = await self._checkpoint(request)
        name = request.match_info["name"]
        if name in manifest.small_files:
            return web.FileResponse(directory / name)
        number = next((number for number, file in enumerate(manifest.files) if file.name == name), None)
        if number is None:
            raise web.HTTPNotFound(text="The checkpoint has no such file.\n")
        start, stop = _range(request, manifest.files[number].bytes)
        if arriving is not None:
            at = manifest.starts()[number]
            chunks = (at + start) // manifest.chunk_bytes, (at + stop - 1) // manifest.chunk_bytes
            await self._arrival(arriving, *chunks, wait_s=_wait_s(request))
        return _Transfer(self, directory / name, start, stop)

    async def _checkpoint(self, request: web.Request) -> tuple[Path, Manifest, Arriving | None]:
        """Where the checkpoint that is asked for lies, and its arrival if it is not whole."""
        id = request.match_info["id"]
        if _ID.fullmatch(id) is None:
            raise web.HTTPNotFound(text="That is no id of a checkpoint.\n")
        try:
            return await asyncio.get_running_loop().run_in_executor(None, self._look, id)
        except (HearthError, OSError):
            raise web.HTTPNotFound(text="The checkpoint is not here.\n") from None

    def _look(self, id: str) -> tuple[Path, Manifest, Arriving | None]:
        arriving = self._tier.arriving(id)
        if arriving is not None:
            return arriving.directory, arriving.manifest, arriving
        directory = self._tier.whole(id)
        if directory is None:
            raise HearthError(Code.NOT_FOUND)
        # A checkpoint never changes: the same directory entry is the same manifest.
        inode = (directory / MANIFEST_NAME).stat().st_ino
        known = self._manifests.get(id)
        if known is None or known[0] != inode:
            known = inode, decode_stored((directory / MANIFEST_NAME).read_bytes())
            self._manifests[id] = known
            while len(self._manifests) > _MANIFESTS:
                self._manifests.popitem(last=False)
        return directory, known[1], None

    async def _arrival(self, arriving: Arriving, first: int, last: int, *, wait_s: float) -> None:
        """Return when these chunks are here. Raises the answer 425 when they are not within `wait_s`."""
        if arriving.has(first, last):
            return
        if wait_s > 0 and self._waiting < WAITERS:
            news = asyncio.Event()
            loop = asyncio.get_running_loop()

            def tell() -> None:
                with contextlib.suppress(RuntimeError):  # the server has ended
                    loop.call_soon_threadsafe(news.set)

            self._waiting += 1
            try:
                with arriving.heard(tell), contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        while not arriving.has(first, last) and not arriving.over:
                            await news.wait()
                            news.clear()
            finally:
                self._waiting -= 1
        if not arriving.has(first, last):
            raise _TooEarly(text="These chunks have not arrived yet.\n")


class _TooEarly(web.HTTPException):
    status_code = 425


class _Transfer(web.FileResponse):
    """A range of a weight file. It is counted while it is sent, and refused when too many are."""

    def __init__(self, server: PeerServer, path: Path, start: int, stop: int) -> None:
        super().__init__(path)
        self._server = server
        self._where = path
        self._begin, self._end = start, stop

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the range."""
        server, length = self._server, self._end - self._begin
        if server._under_way >= server._limit:
            self.set_status(429)
            self.headers["Retry-After"] = str(RETRY_AFTER_S)
            self.content_length = 0
            return await web.StreamResponse.prepare(self, request)
        server._under_way += 1
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, _read_ahead, self._where, self._begin, length)
            # A peer that reads nothing may not hold its place for ever.
            async with asyncio.timeout(_LEAST_S + length / _SLOWEST_BYTES_PER_S):
                writer = await super().prepare(request)
            server.served_bytes += length
            return writer
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the peer reads too slowly") from None
        finally:
            server._under_way -= 1


def _read_ahead(path: Path, start: int, length: int) -> None:
    """Have the kernel read a range now, so that `sendfile` seldom waits for it."""
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, start, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def _range(request: web.Request, file_bytes: int) -> tuple[int, int]:
    """First and last + 1 byte of what is asked for. Raises the answer 416."""
    try:
        asked = request.http_range
    except ValueError:
        raise web.HTTPRequestRangeNotSatisfiable from None
    start = asked.start or 0
    stop = file_bytes if asked.stop is None else min(asked.stop, file_bytes)
    if start < 0:
        start, stop = max(0, file_bytes + start), file_bytes
    if not 0 <= start < stop:
        raise web.HTTPRequestRangeNotSatisfiable
    return start, stop


def _wait_s(request: web.Request) -> float:
    try:
        wait_s = float(request.query.get("wait_s", "0"))
    except ValueError:
        raise web.HTTPBadRequest(text="wait_s is no number.\n") from None
    return min(wait_s, WAIT_LIMIT_S) if wait_s > 0 else 0.0  # also for what is not a number at all


__all__ = ["PeerServer", "read_token"]
