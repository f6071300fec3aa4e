"""A directory of an object store (S3, GCS, Azure) or of a web server as a source: its files, and ranges of them.

A range comes as a stream of pieces that are copied to their place one by one: nothing is kept twice, and a connection
that breaks loses the piece in flight, not the range (measured against one answer per range: as fast, see
docs/remote.md). obstore itself asks again for what a body lacks; what it gives up on is asked for again here.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import obstore
from obstore import exceptions

from services.store.model_config import weight_map_of
from services.store.objects import changed, is_passing, object_errors, open_store, translated
from services.store.remote_config import ObjectOptions
from services.store.source_model import INDEX, SINGLE, SMALL_FILES
from services.store.sources import redact, split_object
from shared.backoff import delay_s
from shared.contracts.manifest import MANIFEST_NAME, decode_manifest
from shared.errors import Code, HearthError
from shared.sizes import size

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore

PIECE_BYTES: Final = 2**20  # what is lost when obstore gives up on a body; larger ones are no faster
MOST_TRIES: Final = 5  # in a row without a piece arriving, each of them with obstore's own retries
MOST_FILES: Final = 20_000
PAGE_FILES: Final = 1000
INDEX_LIMIT_BYTES: Final = 64 * 2**20
# Web servers do not list directories, so these are asked for by name; the patterns' usual names stand for them.
_USUAL: Final = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "qwen.tiktoken", "tiktoken.model")
# Only there to be refused with the reason.
_REFUSED: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.safetensors")
_NAME: Final = re.compile(r"[^/\\\0\x00-\x1f]{1,255}")


@dataclass(frozen=True, slots=True)
class _Entry:
    """An object as it was when the tree was opened. `etag` is without quotes, "" if unknown."""

    size_bytes: int
    etag: str
    modified_s: int


class ObjectTree:
    """`SourceTree` over one directory (`services/store/ports.py`). Thread-safe; every method blocks.

    `url` is normalised. At most `connections` ranges are in flight at once. Raises what `SourceTree` says, and
    `unauthenticated`; errors name the url without secrets.
    """

    def __init__(
        self, url: str, options: ObjectOptions | None = None, *, connections: int = 8, store: ObjectStore | None = None
    ) -> None:
        self._url = url
        self._shown = redact(url)
        self._stop = threading.Event()
        self._free = threading.BoundedSemaphore(connections)
        self._connections = connections
        self._store = (
            store if store is not None else open_store(url, options or ObjectOptions(), connections=connections)
        )
        self._scheme = split_object(url)[0]
        self._etags: dict[str, str] = {}  # as the server writes them, learnt with the first range of each object
        self._entries = self._look()
        self._files = MappingProxyType({name: entry.size_bytes for name, entry in self._entries.items()})
        self._revision = _fingerprint(self._entries)

    @property
    def url(self) -> str:
        """What was asked for, without secrets."""
        return self._shown

    @property
    def revision(self) -> str:
        """A fingerprint of names, sizes and etags (or times, where a server has none)."""
        return self._revision

    @property
    def files(self) -> Mapping[str, int]:
        """Name → bytes of the objects that lie directly in it."""
        return self._files

    @property
    def remote(self) -> bool:
        """Whether its bytes come over a network."""
        return True

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill the whole of `into` from byte `offset` of an object."""
        entry = self._entry(name)
        target = into.cast("B")
        end = offset + len(target)
        if offset < 0 or end > entry.size_bytes:
            raise HearthError(Code.INVALID_CHECKPOINT, f"{self._named(name)} has {entry.size_bytes} bytes, not {end}.")
        at, tries = offset, 0
        while at < end:
            began = at
            failure: Exception | None = None
            with self._free:
                self._check_stop()
                try:
                    result = self._get(name, entry, at, end)
                    for piece in result.stream(min_chunk_size=PIECE_BYTES):
                        if len(piece) > end - at:
                            raise self._over(name)
                        target[at - offset : at - offset + len(piece)] = piece
                        at += len(piece)
                        self._check_stop()
                except (exceptions.BaseError, OSError, ValueError) as error:
                    failure = error
            if at == end:
                return
            tries = 1 if at - began >= PIECE_BYTES else tries + 1
            if failure is not None and not self._may_pass(name, failure):
                raise translated(failure, self._named(name)) from None
            if tries >= MOST_TRIES:
                if failure is not None:
                    raise translated(failure, self._named(name)) from None
                message = f"{self._named(name)} cannot be read: its server ends its answers early."
                raise HearthError(Code.CHECKPOINT_UNAVAILABLE, message)
            # Jitter: eight connections that one server cut must not come back in one instant.
            self._stop.wait(delay_s(tries, first_s=0.1, most_s=5.0) * random.uniform(0.5, 1.5))

    def read_small(self, name: str, limit_bytes: int) -> bytes:
        """A whole object. Raises `too_large` above the limit."""
        size_bytes = self._entry(name).size_bytes
        if size_bytes > limit_bytes:
            message = f"{self._named(name)} has {size(size_bytes)}, more than {size(limit_bytes)}."
            raise HearthError(Code.TOO_LARGE, message)
        data = bytearray(size_bytes)
        if size_bytes:
            self.read(name, 0, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """End what runs at its next piece with `draining`; nothing can be read afterwards."""
        self._stop.set()

    def _get(self, name: str, entry: _Entry, at: int, end: int) -> GetResult:
        """A stream of bytes at … end of the very object that the tree was opened with."""
        options: GetOptions = {"range": (at, end)}
        etag = self._etags.get(name, "")
        if etag and not etag.startswith("W/"):  # If-Match compares strongly: a weak one never matches
            options["if_match"] = etag
        result = obstore.get(self._store, name, options=options)
        found = _entry_of(result.meta)
        if result.range != (at, end):
            raise HearthError(Code.INVALID_CHECKPOINT, f"{self._named(name)}: its server answers with other ranges.")
        if found.size_bytes != entry.size_bytes or self._differs(found, entry):
            raise changed(self._named(name))
        self._etags.setdefault(name, result.meta["e_tag"] or "")
        return result

    def _differs(self, found: _Entry, entry: _Entry) -> bool:
        if found.etag and entry.etag and found.etag == entry.etag:
            return False
        if self._scheme == "gs" or not (found.etag and entry.etag):
            # Google's listings may write an etag in another way than its answers do; the times agree to the second.
            return found.modified_s != entry.modified_s
        return True

    def _may_pass(self, name: str, failure: Exception) -> bool:
        if isinstance(failure, exceptions.PreconditionError):
            # obstore resumes with If-Match even for a weak etag, which a strict server never matches.
            return self._etags.get(name, "").startswith("W/")
        return is_passing(failure)

    def _look(self) -> dict[str, _Entry]:
        found = self._by_name() if self._scheme in {"http", "https"} else self._listed()
        if not found:
            raise HearthError(Code.NOT_FOUND, f"{self._shown} has no files.")
        return found

    def _listed(self) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        folders: set[str] = set()
        seen = 0
        with object_errors(self._shown):
            # With what lies deeper, because this listing can be ended: one without would bring millions of names first.
            for page in obstore.list(self._store, chunk_size=PAGE_FILES):
                self._check_stop()
                seen += len(page)
                if seen > MOST_FILES:
                    message = f"{self._shown} has more than {MOST_FILES} files in it and below it."
                    raise HearthError(Code.TOO_LARGE, message)
                for one in page:
                    name, deeper, _ = one["path"].partition("/")
                    if deeper:
                        folders.add(name)
                    elif _NAME.fullmatch(name):
                        entries[name] = _entry_of(one)
        # Some programs mark a folder by an empty object of its name.
        return {name: entries[name] for name in sorted(entries) if name not in folders}

    def _by_name(self) -> dict[str, _Entry]:
        """What a web server has of the names that a checkpoint can consist of."""
        with ThreadPoolExecutor(self._connections, thread_name_prefix="look") as pool:
            first = self._ask(pool, (MANIFEST_NAME, "config.json"))
            if "config.json" not in first and MANIFEST_NAME not in first:
                message = f"{self._shown} has neither {MANIFEST_NAME} nor config.json; web servers list no directories."
                raise HearthError(Code.NOT_FOUND, message)
            if MANIFEST_NAME in first:
                return first | self._ask(pool, self._of_manifest(first))
            names = {name for name in SMALL_FILES if "*" not in name} | {SINGLE, INDEX, *_USUAL, *_REFUSED}
            found = first | self._ask(pool, sorted(names - {"config.json"}))
            if SINGLE not in found and INDEX in found:
                shards = sorted(set(weight_map_of(self._small(INDEX, found[INDEX])).values()))
                if len(shards) > MOST_FILES:
                    raise HearthError(Code.TOO_LARGE, f"{INDEX} names {len(shards)} files, more than {MOST_FILES}.")
                # What is no name of a file beside it is left out here, and refused by whoever reads the index.
                found |= self._ask(pool, [name for name in shards if _NAME.fullmatch(name) and name.strip(".")])
            return dict(sorted(found.items()))

    def _of_manifest(self, first: Mapping[str, _Entry]) -> list[str]:
        try:
            manifest = decode_manifest(self._small(MANIFEST_NAME, first[MANIFEST_NAME]))
        except ValueError:
            return []  # whoever reads it refuses it with the reason
        names = {file.name for file in manifest.files} | set(manifest.small_files) | {INDEX}
        return sorted(name for name in names if _NAME.fullmatch(name) and name.strip("."))[:MOST_FILES]

    def _small(self, name: str, entry: _Entry) -> bytes:
        if entry.size_bytes > INDEX_LIMIT_BYTES:
            raise HearthError(Code.TOO_LARGE, f"{self._named(name)} has more than {size(INDEX_LIMIT_BYTES)}.")
        with object_errors(self._named(name)):
            return bytes(self._get(name, entry, 0, entry.size_bytes).bytes()) if entry.size_bytes else b""

    def _ask(self, pool: ThreadPoolExecutor, names: Iterable[str]) -> dict[str, _Entry]:
        wanted = list(names)
        return {name: entry for name, entry in zip(wanted, pool.map(self._head, wanted), strict=True) if entry}

    def _head(self, name: str) -> _Entry | None:
        """An object by its name, or None. Raises what the server refuses."""
        self._check_stop()
        try:
            return _entry_of(obstore.head(self._store, name))
        except FileNotFoundError:
            return None
        except exceptions.PermissionDeniedError as error:
            # Buckets behind https:// answer so for what is not there; config.json decides whether it is meant.
            if name == "config.json":
                raise translated(error, self._named(name)) from None
            return None
        except exceptions.GenericError as error:
            if is_passing(error) and not _no_head(error):
                raise translated(error, self._named(name)) from None
        # A server that knows no HEAD, or answers it without a length: the first byte tells the size as well.
        try:
            return _entry_of(obstore.get(self._store, name, options={"range": (0, 1)}).meta)
        except FileNotFoundError:
            return None
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise translated(error, self._named(name)) from None

    def _entry(self, name: str) -> _Entry:
        self._check_stop()
        entry = self._entries.get(name)
        if entry is None:
            raise HearthError(Code.NOT_FOUND, f"{self._named(name)} is not there.")
        return entry

    def _over(self, name: str) -> HearthError:
        return HearthError(Code.INVALID_CHECKPOINT, f"{self._named(name)}: its server sends more than was asked for.")

    def _named(self, name: str) -> str:
        return redact(f"{self._shown}/{name}")

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise HearthError(Code.DRAINING, "The store is shutting down.")


def _no_head(error: Exception) -> bool:
    return any(f"status code: {status}" in str(error) for status in (405, 501))


def _entry_of(meta: ObjectMeta | Mapping[str, Any]) -> _Entry:
    etag = (meta["e_tag"] or "").removeprefix("W/").strip('"')
    modified = meta["last_modified"]
    return _Entry(int(meta["size"]), etag, int(modified.timestamp()) if isinstance(modified, datetime) else 0)


def _fingerprint(entries: Mapping[str, _Entry]) -> str:
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        digest.update(f"{name}\0{entry.size_bytes} {entry.etag or entry.modified_s}\n".encode())
    return digest.hexdigest()[:32]
