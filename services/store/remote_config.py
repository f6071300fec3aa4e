"""What the operator says about object stores: options by the beginning of a url, with secrets that are never shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec

from services.store.sources import OBJECT_SCHEMES, is_under, kind, normalise
from shared.errors import Code, HearthError

VARIABLE: Final = "HEARTH_REMOTE_CONFIG"
LIMIT_BYTES: Final = 2**20
CLIENT: Final = "client_options"
_ENDPOINT: Final = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[A-Za-z0-9._~/-]*)?")


@dataclass(frozen=True, slots=True)
class ObjectOptions:
    """What one object store is told: `store` are obstore's options of its kind, `client` those of its HTTP client."""

    store: Mapping[str, Any] = field(default_factory=dict, repr=False)
    client: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """Options by the beginning of a url. Its `repr` shows no option: they hold secrets."""

    by_start: Mapping[str, ObjectOptions] = field(default_factory=dict, repr=False)

    def options(self, url: str) -> ObjectOptions:
        """The options of the longest beginning under which a normalised url lies; none if there is no such."""
        starts = [start for start in self.by_start if is_under(url, start)]
        return self.by_start[max(starts, key=len)] if starts else ObjectOptions()


def read_remote_config(path: str) -> RemoteConfig:
    """The file that `HEARTH_REMOTE_CONFIG` names ("" for none). Raises `invalid_request` with the fault, no content."""
    if not path:
        return RemoteConfig()
    try:
        with Path(path).open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise _fault(f"{path} cannot be read: {error.strerror or type(error).__name__}") from error
    if len(data) > LIMIT_BYTES:
        raise _fault(f"{path} has more than {LIMIT_BYTES} bytes")
    return decode_remote_config(data)


def decode_remote_config(data: bytes) -> RemoteConfig:
    """`{"s3://bucket": {option: value, …, "client_options": {…}}, "s3://": {…}}`. Raises `invalid_request`."""
    try:
        table = msgspec.json.decode(
            data, type=dict[str, dict[str, str | int | bool | dict[str, str | int | bool | dict[str, str]]]]
        )
    except msgspec.MsgspecError:
        # msgspec's text may quote what is wrong, which may be a secret.
        raise _fault("the file is not JSON of the form {url: {option: value}}") from None
    by_start: dict[str, ObjectOptions] = {}
    for start, options in table.items():
        client = options.pop(CLIENT, {})
        if not isinstance(client, dict) or any(isinstance(value, dict) for value in options.values()):
            raise _fault(f"the options of {start[:200]!r} are not values by name, with {CLIENT} as the one table")
        for name, value in options.items():
            # The library does not survive an endpoint that is no url.
            if ("endpoint" in name or name.endswith("url")) and not _ENDPOINT.fullmatch(str(value)):
                raise _fault(f"the option {name[:64]!r} of {start[:200]!r} is not of the form https://HOST:PORT/PATH")
        by_start[_start(start)] = ObjectOptions(store=MappingProxyType(options), client=MappingProxyType(client))
    return RemoteConfig(MappingProxyType(by_start))


def _start(start: str) -> str:
    if start in {f"{scheme}://" for scheme in OBJECT_SCHEMES}:
        return start
    try:
        if kind(start) == "object":
            return normalise(start)
    except HearthError as error:
        raise _fault(error.failure.message.rstrip(".")) from None
    raise _fault(f"{start[:200]!r} is no url of an object store")


def _fault(reason: str) -> HearthError:
    return HearthError(Code.INVALID_REQUEST, f"{VARIABLE}: {reason}.")
