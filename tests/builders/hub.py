"""A small Hugging Face hub on loopback, and a content network whose signed urls expire; both fail on demand."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, Final

COMMIT: Final = "c0ffee0123456789c0ffee0123456789c0ffee01"
PIECE_BYTES: Final = 64 * 1024


class FakeHub:
    """Serves a directory as repository org/name at `endpoint`; `org/gated` asks for terms, anything else is unknown.

    With `network` files come from a second port (the content network) at urls with a signature. `expire()` makes all
    signatures so far worthless. `cut_after` ends the next bodies after that many bytes each; `statuses` are answered
    instead of the next bodies; `whole` ignores ranges; `rubbish` is what the hub answers to
    everything. `asked`: (method, path, Range, Authorization) of all requests.
    """

    def __init__(self, root: Path, *, network: bool = False) -> None:
        self.root = root
        self.commit = COMMIT
        self.private_token = ""
        self.cut_after: list[int] = []
        self.statuses: list[int] = []
        self.whole = False
        self.rubbish = b""
        self.asked: list[tuple[str, str, str, str]] = []
        self.network_asked: list[tuple[str, str, str, str]] = []
        self.sent_bytes = 0
        self._signature = 1
        self._oldest_signature = 1
        self._servers = [_Server(_HubHandler, self), _Server(_NetworkHandler, self)]
        self.endpoint = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.network = f"http://127.0.0.1:{self._servers[1].server_port}" if network else ""
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in self._servers]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *_: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def expire(self) -> None:
        """No signature that was given out so far is worth anything."""
        self._oldest_signature = self._signature = self._signature + 1

    def sign(self) -> str:
        """The query of a signed url."""
        return f"signature={self._signature}"

    def is_signed(self, query: str) -> bool:
        """Whether a query has a signature that has not expired."""
        name, _, number = query.partition("=")
        return name == "signature" and int(number) >= self._oldest_signature

    def resolved(self) -> list[str]:
        """The files whose address was asked for."""
        return [path.rsplit("/", 1)[1] for method, path, _, _ in self.asked if "/resolve/" in path and method == "HEAD"]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type[_Handler], hub: FakeHub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle of an answer is what some tests are about; anything else is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def asked(self) -> tuple[str, str, str, str]:
        return self.command, self.path, self.headers.get("Range", ""), self.headers.get("Authorization", "")

    def send(self, status: int, data: bytes = b"{}", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        named = {"Content-Type": "application/json", **(headers or {})}
        for name, value in named.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        hub = self.server.hub
        if self.command == "GET" and hub.statuses:
            self.send(hub.statuses.pop(0))
            return
        data, status = path.read_bytes(), 200
        wanted = self.headers.get("Range")
        if wanted is not None and not hub.whole:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            whole, status = len(data), 206
            data = data[int(first) : int(last) + 1 if last else whole]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{whole}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "GET":
            return
        if hub.cut_after:
            data = data[: hub.cut_after.pop(0)]
            self.close_connection = True
        hub.sent_bytes += len(data)
        self.wfile.write(data)


class _HubHandler(_Handler):
    def answer(self) -> None:
        hub = self.server.hub
        hub.asked.append(self.asked())
        path = self.path.partition("?")[0]
        if hub.rubbish:
            self.send(200, hub.rubbish)
        elif "org/gated" in path:
            self.send(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif "org/name" not in path or (
            hub.private_token and self.headers.get("Authorization") != f"Bearer {hub.private_token}"
        ):
            self.send(404, headers={"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/org/name"):
            if path.endswith("/revision/nope"):
                self.send(404, headers={"X-Error-Code": "RevisionNotFound"})
                return
            names = sorted(os.listdir(hub.root))
            files = [{"rfilename": name, "size": (hub.root / name).stat().st_size} for name in names]
            files.append({"rfilename": "original/tokenizer.model", "size": 10})
            self.send(200, json.dumps({"id": "org/name", "sha": hub.commit, "siblings": files}).encode())
        else:
            file = hub.root / path.rsplit("/", 1)[1]
            if not file.exists():
                self.send(404, headers={"X-Error-Code": "EntryNotFound"})
                return
            etag = hashlib.sha256(file.read_bytes()).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit}
            if not hub.network:
                self.send_file(file, headers)
                return
            headers["Location"] = f"{hub.network}/{file.name}?{hub.sign()}"
            headers |= {"X-Linked-Size": str(file.stat().st_size), "X-Linked-Etag": f'"{etag}"'}
            self.send(302, b"", headers)


class _NetworkHandler(_Handler):
    def answer(self) -> None:
        hub = self.server.hub
        hub.network_asked.append(self.asked())
        name, _, query = self.path.partition("?")
        if not hub.is_signed(query):
            self.send(403, b"<Error>Request has expired</Error>")
            return
        self.send_file(hub.root / name.rsplit("/", 1)[1], {})
