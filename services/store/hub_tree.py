"""A repository of the Hugging Face hub as a source: its files at one commit, and ranges of them.

Nothing is downloaded to disk. A file's own address is resolved once (the hub answers with a signed url of its content
network, where it has one) and again when that has expired; the token goes to the hub alone. Which token: what
huggingface_hub finds, HF_TOKEN or `hf auth login`.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, cast
from urllib.parse import urlsplit

from huggingface_hub import HfApi, errors, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import disable_progress_bars

from services.store.sources import HUB, repository
from shared.backoff import delay_s
from shared.errors import Code, HearthError

TIMEOUT_S: Final = 10.0  # silence of a server
MOST_TRIES: Final = 6  # in a row without a piece arriving
PROGRESS_BYTES: Final = 256 * 1024
MOST_FILES: Final = 20_000
_EXPIRED: Final = frozenset({400, 401, 403, 404, 410})  # what content networks answer to a signature of yesterday
_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
# The HTTP library's, whichever this version of huggingface_hub uses.
_TransportError: Final = cast(type[Exception], errors.HTTPError)  # type: ignore[attr-defined]


class HubTree:
    """`SourceTree` over the files at the top of a repository (`services/store/ports.py`). Thread-safe.

    `url` is hf:ORG/NAME, `revision` a branch, tag or commit (None: the default branch); it is pinned to the commit that
    it is now. `endpoint` None is huggingface_hub's own setting. At most `connections` ranges are in flight at once.
    """

    def __init__(
        self, url: str, revision: str | None = None, *, endpoint: str | None = None, connections: int = 8
    ) -> None:
        disable_progress_bars()  # a service's output is its log
        self._repository = repository(url)
        self._api = HfApi(endpoint=endpoint)
        self._stop = threading.Event()
        self._free = threading.BoundedSemaphore(connections)
        self._places: dict[str, str] = {}
        with _clear_errors(self._repository, revision), _expected_answers(self._repository):
            info = self._api.model_info(self._repository, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
            if not isinstance(info.sha, str) or not info.sha:
                raise ValueError("no commit")
            self._commit = info.sha
            files = {str(file.rfilename): int(file.size or 0) for file in info.siblings or ()}
        top = {name: size for name, size in sorted(files.items()) if name and "/" not in name and "\\" not in name}
        if len(top) > MOST_FILES:
            raise HearthError(Code.TOO_LARGE, f"{self._repository} has {len(top)} files, more than {MOST_FILES}.")
        self._files = MappingProxyType(top)

    @property
    def url(self) -> str:
        """hf:ORG/NAME."""
        return HUB + self._repository

    @property
    def revision(self) -> str:
        """The commit."""
        return self._commit

    @property
    def files(self) -> Mapping[str, int]:
        """Name → bytes of the files at the top of the repository."""
        return self._files

    @property
    def remote(self) -> bool:
        """Whether its bytes come over a network."""
        return True

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill the whole of `into` from byte `offset` of a file."""
        size = self._size(name)
        target = into.cast("B")
        end = offset + len(target)
        if offset < 0 or end > size:
            raise HearthError(Code.INVALID_CHECKPOINT, f"{self._named(name)} has {size} bytes, not {end}.")
        at, tries, resolved = offset, 0, False
        while at < end:
            began = at
            with self._free, _clear_errors(self._repository, self._commit):
                place = self._place(name)
                try:
                    for piece in self._stream(name, place, at, end):
                        if len(piece) > end - at:
                            raise self._bad_server(name, "sends more than was asked for")
                        target[at - offset : at - offset + len(piece)] = piece
                        at += len(piece)
                        self._check_stop()
                    failure: Exception | None = None
                except errors.HfHubHTTPError as error:
                    status = getattr(error.response, "status_code", 0)
                    if status in _EXPIRED and not resolved:
                        # Once per range: what is refused at a fresh address is refused.
                        resolved = True
                        self._places.pop(name, None)
                        continue
                    if status == 416:
                        raise HearthError(
                            Code.INVALID_CHECKPOINT, f"{self._named(name)} is shorter than it was."
                        ) from None
                    if status not in _PASSING:
                        raise
                    failure = error
                except _TransportError as error:
                    failure = error
                if at == end:
                    return
                tries = 1 if at - began >= PROGRESS_BYTES else tries + 1
                resolved = resolved and at == began
                if tries >= MOST_TRIES:
                    raise failure or self._bad_server(name, "ends its answers early")
            self._stop.wait(delay_s(tries, first_s=0.2, most_s=10.0) * random.uniform(0.5, 1.5))
            self._check_stop()

    def read_small(self, name: str, limit_bytes: int) -> bytes:
        """A whole file. Raises `too_large` above the limit."""
        size = self._size(name)
        if size > limit_bytes:
            raise HearthError(Code.TOO_LARGE, f"{self._named(name)} has {size} bytes, more than {limit_bytes}.")
        data = bytearray(size)
        if size:
            self.read(name, 0, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """End what runs at its next piece with `draining`; the connections are huggingface_hub's and stay."""
        self._stop.set()

    def _place(self, name: str) -> str:
        """The address of a file's bytes, as the hub gives it now or gave it before."""
        place = self._places.get(name)
        if place is None:
            url = hf_hub_url(self._repository, name, revision=self._commit, endpoint=self._api.endpoint)
            with _expected_answers(self._repository):
                found = get_hf_file_metadata(url, timeout=TIMEOUT_S, endpoint=self._api.endpoint, retry_on_errors=True)
                _origin(found.location)
            if found.size is not None and found.size != self._files[name]:
                raise self._bad_server(name, f"says {found.size} bytes and {self._files[name]} bytes")
            place = self._places[name] = found.location
        return place

    def _stream(self, name: str, place: str, at: int, end: int) -> Iterator[bytes]:
        # The token is for the hub alone: the content network's urls carry their own signature.
        token = None if _origin(place) == _origin(self._api.endpoint) else False
        headers = build_hf_headers(token=token) | {"Range": f"bytes={at}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", place, headers=headers, timeout=TIMEOUT_S) as response:
            hf_raise_for_status(response)
            found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status_code != 206 or found is None:
                raise self._bad_server(name, "does not serve ranges, which Hearth needs")
            if (int(found[1]), int(found[2])) != (at, end - 1) or found[3] not in {"*", str(self._files[name])}:
                raise self._bad_server(name, "answers with other ranges")
            yield from response.iter_raw()

    def _size(self, name: str) -> int:
        self._check_stop()
        size = self._files.get(name)
        if size is None:
            raise HearthError(Code.NOT_FOUND, f"{self._repository} has no file {name[:200]!r}.")
        return size

    def _bad_server(self, name: str, does: str) -> HearthError:
        return HearthError(Code.CHECKPOINT_UNAVAILABLE, f"{self._named(name)}: its server {does}.")

    def _named(self, name: str) -> str:
        return f"{self.url}/{name[:200]}"

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise HearthError(Code.DRAINING, "The store is shutting down.")


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port


@contextmanager
def _clear_errors(repository: str, revision: str | None) -> Iterator[None]:
    """huggingface_hub's errors as Hearth's, one sentence each."""
    try:
        yield
    except errors.GatedRepoError as error:
        message = f"{repository} is gated: accept its terms on the hub and give the store a token (HF_TOKEN)."
        raise HearthError(Code.FORBIDDEN, message) from error
    except errors.RepositoryNotFoundError as error:
        message = f"The hub has no repository {repository}, or it is private."
        raise HearthError(Code.NOT_FOUND, message) from error
    except errors.RevisionNotFoundError as error:
        raise HearthError(Code.NOT_FOUND, f"{repository} has no revision {revision!r}.") from error
    except errors.EntryNotFoundError as error:
        raise HearthError(Code.NOT_FOUND, f"A file of {repository} is not there any more.") from error
    except errors.HFValidationError as error:
        raise HearthError(Code.INVALID_REQUEST, f"{repository!r} is no name of a repository.") from error
    except (_TransportError, OSError) as error:
        message = f"The Hugging Face hub cannot be reached for {repository} ({_reason(error)})."
        raise HearthError(Code.CHECKPOINT_UNAVAILABLE, message) from error


@contextmanager
def _expected_answers(repository: str) -> Iterator[None]:
    """What huggingface_hub trips over in an answer that is none of the hub's: a proxy's page, half a mirror."""
    try:
        yield
    except (errors.HFValidationError, OSError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"What answers for {repository} is not the Hugging Face hub ({type(error).__name__})."
        raise HearthError(Code.CHECKPOINT_UNAVAILABLE, message) from error


def _reason(error: Exception) -> str:
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return f"HTTP {status}" if status is not None else type(error).__name__
