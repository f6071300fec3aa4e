"""An S3-compatible server on loopback that serves a directory fast and fails on demand; for tests and benchmarks.

A process of its own: `python -m tests.builders.s3 DIRECTORY` prints its port. Objects are the files below
`DIRECTORY/BUCKET/`, so what a test writes there is in the bucket, and what was put lies there to be looked at.
Path-style requests only; signatures are not verified, at most required to be there. `http://…/BUCKET/KEY` is a plain
web server with ranges at the same time.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from aiohttp import web

ACCESS_KEY: Final = "AKIDEXAMPLE0HEARTH"
SECRET_KEY: Final = "not-a-secret-of-anybody-0123456789abcdef"
PIECE_BYTES: Final = 256 * 1024
CONTROL: Final = "-control"


@dataclass
class Fault:
    """What goes wrong, `times` times (-1: always), for the GETs of keys that contain `key` and ask for `least_bytes`.

    The first `skip` of them go well.

    `kind`: "cut" (the connection ends after `after_bytes`, or after `fraction` of the body), "status" (an answer with
    `status` instead), "slow" (`bytes_per_s`), "stall" (silence for `seconds` after `after_bytes`), "whole" (Range is
    ignored), "unconditional" (If-Match is ignored, as simple servers do), "change" (the object's last byte and time
    change before it is served).
    """

    kind: str
    times: int = 1
    skip: int = 0
    key: str = ""
    least_bytes: int = 0
    after_bytes: int = 0
    fraction: float = 0.0
    status: int = 503
    bytes_per_s: int = 0
    seconds: float = 0.0


@dataclass
class Served:
    """One answer: what was asked for, and how many bytes of the body were handed to the connection."""

    method: str
    key: str
    start: int
    end: int
    sent_bytes: int
    status: int
    authorized: bool


@dataclass
class State:
    """What the server process knows besides its files."""

    root: Path
    faults: list[Fault] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    uploads: dict[str, Path] = field(default_factory=dict)
    authorization: bool = False
    most_open: int = 0
    open: int = 0

    def take(self, kind: str, key: str, asked_bytes: int) -> Fault | None:
        """The first fault of this kind that applies, used up once."""
        for fault in self.faults:
            if fault.kind == kind and fault.times != 0 and fault.key in key and asked_bytes >= fault.least_bytes:
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1 if fault.times > 0 else 0
                return fault
        return None


STATE: Final = web.AppKey("state", State)


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"  # as web.FileResponse has it


def _range(request: web.Request) -> slice:
    azure = request.headers.get("x-ms-range")
    if azure is None:
        return request.http_range
    first, _, last = azure.removeprefix("bytes=").partition("-")
    return slice(int(first), int(last) + 1 if last else None)


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(os.stat(path).st_mode)
    except OSError:
        return False


def _error(status: int, code: str) -> web.Response:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}.</Message></Error>'
    return web.Response(status=status, text=body, content_type="application/xml")


def _xml(body: str) -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?>{body}'
    return web.Response(text=text, content_type="application/xml")


async def _object(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    bucket, _, key = request.path.lstrip("/").partition("/")
    authorized = "Authorization" in request.headers or "X-Amz-Signature" in request.query
    entry = Served(request.method, key, 0, 0, 0, 0, authorized)
    state.served.append(entry)
    if state.authorization and not authorized:
        entry.status = 403
        return _error(403, "AccessDenied")
    state.open += 1
    state.most_open = max(state.most_open, state.open)
    try:
        response = await _answer(request, state, state.root / bucket, key, entry)
    finally:
        state.open -= 1
    entry.status = response.status
    return response


async def _answer(request: web.Request, state: State, bucket: Path, key: str, entry: Served) -> web.StreamResponse:
    query = request.query
    if not _is(bucket, stat.S_ISDIR):
        return _error(404, "NoSuchBucket")
    if not key:
        if request.method == "GET" and ("list-type" in query or query.get("comp") == "list"):
            fault = state.take("status", "?list", 0)
            if fault:
                return _error(fault.status, "InternalError")
            return _list(bucket, query) if "list-type" in query else _azure_list(bucket, query)
        if request.method == "POST" and "delete" in query:
            return _delete_many(bucket, await request.read())
        return _error(400, "InvalidRequest")
    path = bucket / key
    if ".." in Path(key).parts:
        return _error(400, "InvalidRequest")
    if request.method in {"GET", "HEAD"}:
        if not _is(path, stat.S_ISREG):
            return _error(404, "NoSuchKey")
        return await _get(request, state, path, entry)
    if request.method == "DELETE":
        if "uploadId" in query:
            shutil.rmtree(state.uploads.pop(query["uploadId"]))
        else:
            path.unlink(missing_ok=True)
        return web.Response(status=204)
    if request.method == "PUT":
        fault = state.take("status", f"PUT {key}", 0)
        if fault is not None:
            return _error(fault.status, "InternalError")
        if "comp" in query:
            return await _azure_put(request, state, path, entry)
        number = query.get("partNumber")
        target = path if number is None else state.uploads[query["uploadId"]] / f"{int(number):06}"
        return await _put(request, target, entry)
    if request.method == "POST" and "uploads" in query:
        upload = uuid.uuid4().hex
        state.uploads[upload] = state.root / ".uploads" / upload
        state.uploads[upload].mkdir(parents=True)
        return _xml(
            f"<InitiateMultipartUploadResult><Bucket>{bucket.name}</Bucket><Key>{escape(key)}</Key>"
            f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
        )
    if request.method == "POST" and "uploadId" in query:
        parts = state.uploads.pop(query["uploadId"])
        await asyncio.get_running_loop().run_in_executor(None, _join, parts, path)
        return _xml(
            f"<CompleteMultipartUploadResult><Bucket>{bucket.name}</Bucket><Key>{escape(key)}</Key>"
            f"<ETag>&quot;{_etag(path.stat())}&quot;</ETag></CompleteMultipartUploadResult>"
        )
    return _error(405, "MethodNotAllowed")


def _join(parts: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = parts / "whole"
    with whole.open("wb") as out:
        for part in sorted(one for one in parts.iterdir() if one.name != "whole"):
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, out, 2**20)
    whole.replace(path)
    shutil.rmtree(parts)


async def _put(request: web.Request, path: Path, entry: Served) -> web.Response:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, temporary = hashlib.md5(usedforsecurity=False), path.with_name(f".{uuid.uuid4().hex}")
    with temporary.open("wb") as out:
        async for piece in request.content.iter_chunked(PIECE_BYTES):
            digest.update(piece)
            out.write(piece)
            entry.end += len(piece)
    temporary.replace(path)
    return web.Response(headers={"ETag": f'"{digest.hexdigest()}"'})


async def _get(request: web.Request, state: State, path: Path, entry: Served) -> web.StreamResponse:
    key = entry.key
    asked = _range(request)
    size = os.stat(path).st_size
    start = asked.start or 0
    end = min(size, asked.stop if asked.stop is not None else size)
    if start < 0:
        start, end = max(0, size + start), size
    entry.start, entry.end = start, end
    least = end - start
    if request.method == "GET" and state.take("change", key, least):
        with path.open("r+b") as file:
            file.seek(size - 1)
            last = file.read(1)
            file.seek(size - 1)
            file.write(bytes([last[0] ^ 1]))
    status = os.stat(path)
    fault = state.take("status", key, least)
    if fault is not None:
        return _error(fault.status, "InternalError")
    wanted = request.headers.get("If-Match")
    if wanted and f'"{_etag(status)}"' != wanted and not state.take("unconditional", key, least):
        return _error(412, "PreconditionFailed")
    headers = {"ETag": f'"{_etag(status)}"', "Last-Modified": formatdate(status.st_mtime, usegmt=True)}
    if request.method == "HEAD":
        return web.Response(headers={**headers, "Content-Length": str(size), "Accept-Ranges": "bytes"})
    if state.take("whole", key, least):
        start, end, ranged = 0, size, False
    else:
        ranged = "Range" in request.headers
    if start >= size and size > 0:
        return _error(416, "InvalidRange")
    cut, slow, stall = (state.take(kind, key, least) for kind in ("cut", "slow", "stall"))
    if not (cut or slow or stall or not ranged):
        entry.sent_bytes = end - start
        return web.FileResponse(path)  # with the same ETag; ranges and zero-copy by sendfile(2)
    response = web.StreamResponse(status=206 if ranged else 200, headers=headers)
    if ranged:
        response.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    response.content_length = end - start
    await response.prepare(request)
    most = end - start
    if cut is not None:
        most = cut.after_bytes or int(cut.fraction * most)
    with path.open("rb") as file:
        file.seek(start)
        while entry.sent_bytes < most:
            if stall is not None and entry.sent_bytes >= stall.after_bytes:
                await asyncio.sleep(stall.seconds)
                stall = None
            piece = file.read(min(PIECE_BYTES, most - entry.sent_bytes))
            if slow is not None:
                await asyncio.sleep(len(piece) / slow.bytes_per_s)
            with contextlib.suppress(ConnectionResetError):
                await response.write(piece)
            entry.sent_bytes += len(piece)
    if cut is not None and request.transport is not None:
        while request.transport.get_write_buffer_size():  # what was "sent" reaches the client, then nothing does
            await asyncio.sleep(0.001)
        request.transport.close()
    return response


async def _azure_put(request: web.Request, state: State, path: Path, entry: Served) -> web.Response:
    """Azure's way to put in parts: blocks by their ids, then the list of ids."""
    parts = state.root / ".uploads" / hashlib.sha256(str(path).encode()).hexdigest()
    parts.mkdir(parents=True, exist_ok=True)
    if request.query["comp"] == "block":
        await _put(request, parts / request.query["blockid"].encode().hex(), entry)
        return web.Response(status=201)
    wanted = [found.text or "" for found in ElementTree.fromstring(await request.read())]
    for number, block in enumerate(wanted):
        (parts / block.encode().hex()).rename(parts / f"{number:06}")
    await asyncio.get_running_loop().run_in_executor(None, _join, parts, path)
    return web.Response(status=201, headers={"ETag": f'"{_etag(os.stat(path))}"'})


def _azure_list(container: Path, query: Any) -> web.Response:
    blobs = []
    for path in sorted(one for one in container.rglob("*") if one.is_file()):
        key, status = path.relative_to(container).as_posix(), path.stat()
        if key.startswith(query.get("prefix", "")):
            blobs.append(
                f"<Blob><Name>{escape(key)}</Name><Properties><Content-Length>{status.st_size}</Content-Length>"
                f"<Last-Modified>{formatdate(status.st_mtime, usegmt=True)}</Last-Modified><Etag>{_etag(status)}</Etag>"
                "<Content-Type>application/octet-stream</Content-Type><ResourceType>file</ResourceType></Properties></Blob>"
            )
    return _xml(f"<EnumerationResults><Blobs>{''.join(blobs)}</Blobs><NextMarker /></EnumerationResults>")


def _list(bucket: Path, query: Any) -> web.Response:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token") or query.get("start-after", "")
    most = int(query.get("max-keys", "1000"))
    keys = sorted(path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file())
    contents: list[str] = []
    folders: list[str] = []
    last, truncated = "", False
    for key in keys:
        if not key.startswith(prefix) or key <= after:
            continue
        if len(contents) + len(folders) >= most:
            truncated = True
            break
        last = key
        folder, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        if found:
            if f"{prefix}{folder}{delimiter}" not in folders:
                folders.append(f"{prefix}{folder}{delimiter}")
            continue
        status = (bucket / key).stat()
        when = formatdate(status.st_mtime, usegmt=True)
        contents.append(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_iso(status.st_mtime)}</LastModified>"
            f"<ETag>&quot;{_etag(status)}&quot;</ETag><Size>{status.st_size}</Size>"
            f"<StorageClass>STANDARD</StorageClass></Contents><!-- {when} -->"
        )
    more = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if truncated else ""
    return _xml(
        f"<ListBucketResult><Name>{bucket.name}</Name><Prefix>{escape(prefix)}</Prefix>"
        f"<KeyCount>{len(contents) + len(folders)}</KeyCount><MaxKeys>{most}</MaxKeys>"
        f"<IsTruncated>{str(truncated).lower()}</IsTruncated>{more}{''.join(contents)}"
        + "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        + "</ListBucketResult>"
    )


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _delete_many(bucket: Path, body: bytes) -> web.Response:
    keys = [found.text or "" for found in ElementTree.fromstring(body).iter() if found.tag.endswith("Key")]
    for key in keys:
        (bucket / key).unlink(missing_ok=True)
    return _xml(
        "<DeleteResult>" + "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys) + "</DeleteResult>"
    )


async def _control(request: web.Request) -> web.Response:
    state = request.app[STATE]
    if request.method == "POST":
        wanted = await request.json()
        state.authorization = bool(wanted.get("authorization", state.authorization))
        state.faults = [Fault(**fault) for fault in wanted["faults"]] if "faults" in wanted else state.faults
        if wanted.get("forget"):
            state.served, state.most_open = [], 0
    return web.json_response({"served": [asdict(one) for one in state.served], "most_open": state.most_open})


async def _serve(root: Path) -> None:
    app = web.Application(client_max_size=2**40)
    app[STATE] = State(root)
    app.router.add_route("*", f"/{CONTROL}", _control)
    app.router.add_route("*", "/{path:.*}", _object)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    loop = asyncio.get_running_loop()
    # The parent's end of stdin closes with it, however it dies.
    await loop.run_in_executor(None, sys.stdin.buffer.read)
    os._exit(0)


class S3Server:
    """The server in a process of its own, serving `root`; a context manager."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.builders.s3", str(root)]
        where = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(command, cwd=where, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the S3 server does not start")
        self.endpoint = f"http://127.0.0.1:{int(line)}"

    def __enter__(self) -> S3Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()

    @property
    def options(self) -> dict[str, Any]:
        """What a client is told to reach it, as it stands in `HEARTH_REMOTE_CONFIG`."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            "region": "us-east-1",
            "client_options": {"allow_http": True},
        }

    @property
    def google_options(self) -> dict[str, Any]:
        """The same for gs:// urls: Google's XML interface is S3's in all that matters here."""
        return {"base_url": self.endpoint, "bearer_token": SECRET_KEY, "client_options": {"allow_http": True}}

    @property
    def azure_options(self) -> dict[str, Any]:
        """The same for az:// urls; a bucket is a container."""
        key = base64.b64encode(SECRET_KEY.encode()).decode()
        table = {"account_name": "hearth", "account_key": key, "endpoint": self.endpoint}
        return {**table, "client_options": {"allow_http": True}}

    def bucket(self, name: str = "models") -> Path:
        """The directory that is a bucket, made if it is missing."""
        (self.root / name).mkdir(exist_ok=True)
        return self.root / name

    def control(self, **wanted: Any) -> dict[str, Any]:
        """Set faults and what is required; what has been served."""
        request = urllib.request.Request(
            f"{self.endpoint}/{CONTROL}",
            data=json.dumps(wanted).encode() if wanted else None,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            told = json.loads(answer.read())
        assert isinstance(told, dict)
        return told

    def fail(self, *faults: Fault) -> None:
        """Let these go wrong from now on, and no others; what was served is forgotten."""
        self.control(faults=[asdict(fault) for fault in faults], forget=True)

    def served(self, method: str = "GET", key: str = "") -> list[Served]:
        """The answers so far to requests of this method for keys that contain `key`."""
        told = [Served(**one) for one in self.control()["served"]]
        return [one for one in told if one.method == method and key in one.key]

    def sent_bytes(self, key: str = "") -> int:
        """Bytes of bodies that left the server for objects whose key contains `key`."""
        return sum(one.sent_bytes for one in self.served("GET", key))

    def ranges(self, key: str = "") -> Iterator[tuple[int, int]]:
        """(first byte, bytes sent) of every GET of such an object."""
        return ((one.start, one.sent_bytes) for one in self.served("GET", key))


def pieces(total_bytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces that cover `total_bytes`; the last may be short."""
    for start in itertools.count(0, piece_bytes):
        if start >= total_bytes:
            return
        yield start, min(total_bytes, start + piece_bytes)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
