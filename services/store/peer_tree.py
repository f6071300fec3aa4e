"""Another store's checkpoint as a source tree: ranges over HTTP, straight into the buffers where the bytes shall lie.

`http.client` and not a library: it reads from the socket into a given buffer, without a copy and without the
interpreter's lock, and says every status and header, which routing needs.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Final
from urllib.parse import quote, urlsplit

from services.store.manifest import MANIFEST_LIMIT_BYTES
from shared.contracts.manifest import MANIFEST_NAME, Manifest
from shared.errors import Code, Failure, HearthError

CONNECT_S: Final = 3.0
STALL_S: Final = 10.0  # without a byte, a connection is lost
SOON_S: Final = 5.0
ANSWER_S: Final = 3.0  # for what is small
_STEP_BYTES: Final = 2**20  # between two looks whether the fetch was stopped
_TRIES: Final = 3  # of one range; each goes on where the one before was cut off
_RETRY_AFTER_LIMIT_S: Final = 10.0
_ERROR_LIMIT_BYTES: Final = 4096


class NotYet(HearthError):
    """The peer is fetching the checkpoint itself and does not have these bytes yet."""

    def __init__(self, url: str) -> None:
        super().__init__(Code.BUSY, f"{url} does not have these bytes yet.")


def _never() -> bool:
    return False


class PeerTree:
    """Checkpoint `checkpoint_id` of the store at `url`: a `SourceTree`, for any number of threads.

    Raises `HearthError` like every tree; besides `NotYet`, and `busy` with `retry_after_s` when the peer serves as many
    as it may. `stopped` is asked now and then, and ends a read as cancelled.
    """

    def __init__(
        self,
        url: str,
        token: str,
        checkpoint_id: str,
        manifest: Manifest | None = None,
        *,
        stopped: Callable[[], bool] = _never,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HearthError(Code.INVALID_REQUEST, f"A peer's url begins with http:// or https://, not {url[:100]!r}.")
        self._url = url
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port
        self._root = f"{parts.path.rstrip('/')}/v1/checkpoints/{checkpoint_id}"
        self._headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"}
        self._id = checkpoint_id
        self._manifest = manifest
        self._stopped = stopped
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    # -- a source tree -----------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The peer's url."""
        return self._url

    @property
    def revision(self) -> str:
        """The checkpoint's id, which names its content."""
        return self._id

    @property
    def files(self) -> Mapping[str, int]:
        """The weight files (the small files' sizes are not known before they are here)."""
        return {file.name: file.bytes for file in self._manifest.files} if self._manifest is not None else {}

    @property
    def remote(self) -> bool:
        """Its bytes come over a network."""
        return True

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` from byte `offset` of a weight file."""
        self.read_when_there(name, offset, into, wait_s=0.0)

    def read_soon(self, name: str, offset: int, into: memoryview) -> None:
        """The same, with some patience for a peer that is fetching these bytes itself."""
        self.read_when_there(name, offset, into, wait_s=SOON_S)

    def read_when_there(self, name: str, offset: int, into: memoryview, *, wait_s: float) -> None:
        """The same; a peer that is fetching these bytes itself is asked to wait for them for at most `wait_s`."""
        path = f"{self._root}/files/{quote(name, safe='')}" + (f"?wait_s={wait_s:.3f}" if wait_s else "")
        done = 0
        for tries in range(1, _TRIES + 1):
            first, last = offset + done, offset + len(into) - 1
            try:
                with self._answer(path, {"Range": f"bytes={first}-{last}"}, STALL_S + wait_s) as response:
                    wanted = f"bytes {first}-{last}/"
                    if response.status != HTTPStatus.PARTIAL_CONTENT or not (
                        response.headers.get("Content-Range", "").startswith(wanted)
                    ):
                        raise HearthError(Code.NOT_FOUND, f"{self._url} does not serve ranges of {name}.")
                    while done < len(into):
                        if self._stopped():
                            raise HearthError(Code.CANCELLED, "Nobody needs these bytes any more.")
                        got = response.readinto(into[done : done + _STEP_BYTES])
                        if got == 0:
                            raise ConnectionResetError("cut off")
                        done += got
                    return
            except (OSError, http.client.HTTPException) as error:
                if tries == _TRIES:
                    raise self._lost(error) from error

    def read_small(self, name: str, limit_bytes: int) -> bytes:
        """A small file, or the manifest."""
        path = f"/{MANIFEST_NAME}" if name == MANIFEST_NAME else f"/files/{quote(name, safe='')}"
        return self._small(self._root + path, limit_bytes, STALL_S)

    def arrived(self) -> bytes:
        """What the peer has: one byte per chunk, as `services.store.routes` reads them."""
        limit_bytes = len(self._manifest.chunks) if self._manifest is not None else MANIFEST_LIMIT_BYTES
        return self._small(f"{self._root}/arrived", limit_bytes, ANSWER_S)

    def close(self) -> None:
        """Close all connections; reads under way end as lost."""
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

    # -- HTTP --------------------------------------------------------------------------------------------------------

    def _small(self, path: str, limit_bytes: int, timeout_s: float) -> bytes:
        for tries in range(1, _TRIES + 1):
            try:
                with self._answer(path, {}, timeout_s) as response:
                    if response.status != HTTPStatus.OK:
                        raise HearthError(Code.NOT_FOUND, f"{self._url} does not serve {path}.")
                    if (response.length or 0) > limit_bytes:
                        raise HearthError(Code.TOO_LARGE, f"{path} of {self._url} has more than {limit_bytes} bytes.")
                    data = response.read(limit_bytes + 1)
                    if len(data) > limit_bytes:
                        raise HearthError(Code.TOO_LARGE, f"{path} of {self._url} has more than {limit_bytes} bytes.")
                    if response.length:
                        raise ConnectionResetError("cut off")
                    return data
            except (OSError, http.client.HTTPException) as error:
                if tries == _TRIES or isinstance(error, TimeoutError):
                    raise self._lost(error) from error
        raise AssertionError("not reached")

    @contextlib.contextmanager
    def _answer(self, path: str, headers: Mapping[str, str], timeout_s: float) -> Iterator[http.client.HTTPResponse]:
        """The answer to a GET on this thread's connection, which is kept only if the answer was read to its end."""
        connection = self._connection()
        kept = False
        try:
            if connection.sock is None:
                connection.timeout = CONNECT_S
                connection.connect()
            connection.sock.settimeout(timeout_s)
            connection.request("GET", path, headers={**self._headers, **headers})
            response = connection.getresponse()
            if response.status >= HTTPStatus.MULTIPLE_CHOICES:
                response.read(_ERROR_LIMIT_BYTES)
                kept = response.isclosed()
                self._refuse(response, path)
            yield response
            kept = response.isclosed() or not response.length
        finally:
            if not kept:
                connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            if self._tls is not None:
                connection = http.client.HTTPSConnection(self._host, self._port, context=self._tls)
            else:
                connection = http.client.HTTPConnection(self._host, self._port)
            self._local.connection = connection
            with self._lock:
                self._connections.append(connection)
        return connection

    def _refuse(self, response: http.client.HTTPResponse, path: str) -> None:
        """Raise what this status means."""
        match response.status:
            case HTTPStatus.TOO_EARLY:
                raise NotYet(self._url)
            case HTTPStatus.TOO_MANY_REQUESTS | HTTPStatus.SERVICE_UNAVAILABLE:
                said = response.headers.get("Retry-After", "")
                after_s = min(float(said), _RETRY_AFTER_LIMIT_S) if said.isascii() and said.isdigit() else None
                message = f"{self._url} serves as many as it can."
                raise HearthError.of(Failure(code=Code.BUSY, message=message, retry_after_s=after_s))
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                raise HearthError(Code.FORBIDDEN, f"{self._url} does not accept this store's peer token.")
            case HTTPStatus.NOT_FOUND | HTTPStatus.GONE:
                raise HearthError(Code.NOT_FOUND, f"{self._url} does not have {self._id}.")
            case status if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise HearthError(Code.CHECKPOINT_UNAVAILABLE, f"{self._url} failed with HTTP status {status}.")
            case status:
                raise HearthError(Code.NOT_FOUND, f"{self._url} answers {path} with HTTP status {status}.")

    def _lost(self, error: OSError | http.client.HTTPException) -> HearthError:
        what = "did not answer in time" if isinstance(error, TimeoutError) else f"was lost ({type(error).__name__})"
        return HearthError(Code.CHECKPOINT_UNAVAILABLE, f"The peer {self._url} {what}.")
