"""Where checkpoints may come from: the urls of sources in one normal form, the operator's list of patterns; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal

from shared.errors import Code, HearthError

Kind = Literal["directory", "hub", "object"]
HUB: Final = "hf:"
OBJECT_SCHEMES: Final = ("s3", "gs", "az", "https", "http")
URL_LIMIT: Final = 2048  # characters; object stores end at 1024 bytes of key, directories at 4096 bytes of path
VARIABLE: Final = "HEARTH_SOURCES"
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,95})?")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_LABEL: Final = r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?"
_HOST: Final = re.compile(rf"({_LABEL}(\.{_LABEL})*|\[[0-9a-f:.]+\])(:[0-9]{{1,5}})?")
_BUCKET: Final = re.compile(r"[a-z0-9_][a-z0-9._-]{0,254}")
_IPV4: Final = re.compile(r"(0|[1-9]\d{0,2})(\.(0|[1-9]\d{0,2})){3}")
_PORTS: Final = {"http": ":80", "https": ":443"}
_UNSEEN: Final = re.compile(r"[\x00-\x20\x7f-\xa0\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_ENCODED: Final = re.compile(r"%([0-9A-Fa-f]{2})?")
_NEVER_ENCODED: Final = frozenset(b"./\\%") | frozenset(range(0x20)) | {0x7F}
_UNRESERVED: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_~")


def kind(url: str) -> Kind:
    """What reads this source. Raises `invalid_request` for a scheme that Hearth does not know."""
    if url.startswith("/") or url.lower().startswith("file://"):
        return "directory"
    if url.startswith(HUB):
        return "hub"
    found = _SCHEME.fullmatch(url)
    if found is not None and found[1].lower() in OBJECT_SCHEMES:
        return "object"
    raise _malformed(url, "is neither an absolute directory nor hf:ORG/NAME nor an s3://, gs://, az://, https:// url")


def normalise(url: str) -> str:
    """The one form of a source's url that is compared, shown, stored and opened.

    Directories lose doubled and final slashes (`file://` becomes the plain directory); hosts are in small letters,
    without a default port or a final dot. Whatever could mean two things to two readers is refused: `.` and `..` as
    parts of a path, backslashes, invisible characters, user names and passwords, queries and fragments,
    percent-encoded dots, slashes, percent signs and control characters, hosts that are numbers in disguise.
    Normalising twice changes nothing.
    Raises `invalid_request`.
    """
    if len(url) > URL_LIMIT:
        raise _malformed(url, f"has more than {URL_LIMIT} characters")
    which = kind(url)
    if which == "hub":
        return HUB + repository(url)
    if which == "directory":
        return _directory(url)
    return _object(url)


def repository(url: str) -> str:
    """ORG/NAME of `hf:ORG/NAME`. Raises `invalid_request`."""
    name = url.removeprefix(HUB)
    if not _REPOSITORY.fullmatch(name) or ".." in name or not url.startswith(HUB):
        raise HearthError(Code.INVALID_REQUEST, f"{redact(url)!r} is not of the form hf:ORG/NAME.", param="source")
    return name


def split_object(url: str) -> tuple[str, str, str]:
    """(scheme, host or bucket, path without slashes at its ends) of a normalised url of an object store."""
    scheme, _, rest = url.partition("://")
    authority, _, path = rest.partition("/")
    return scheme, authority, path


def is_under(url: str, start: str) -> bool:
    """Whether a normalised url is `start` or lies below it; `start` ends at a part of the path, as `s3://bucket/a`."""
    return url == start or url.startswith(start if start.endswith(("/", ":")) else f"{start}/")


def allowed(url: str, patterns: Sequence[str]) -> bool:
    """Whether a *normalised* url matches one of the operator's patterns.

    A `*` at the end, after `/` or `:`, stands for everything below (`/models/*`, `s3://bucket/a/*`, `hf:*`), but not
    for the directory itself. Any other `*` stands for characters of one part of the path (`s3://team-*/models/*`).
    Without `*` a pattern is exactly one source.
    """
    return any(_compiled(pattern).fullmatch(url) for pattern in patterns)


def check_allowed(url: str, patterns: Sequence[str]) -> None:
    """Raises `forbidden` unless a *normalised* url matches one of the operator's patterns."""
    if not allowed(url, patterns):
        message = f"{redact(url)} is not among the allowed sources ({VARIABLE})."
        raise HearthError(Code.FORBIDDEN, message, param="source")


def check_resolved(url: str, resolved: str, patterns: Sequence[str]) -> None:
    """The same for a directory after its links have been followed: `resolved` is its real path.

    The caller resolves (this module touches no disk). Both must be allowed: a link inside of an allowed directory may
    not lead out of it. Raises `forbidden`.
    """
    check_allowed(url, patterns)
    if not allowed(resolved, patterns):
        message = f"{redact(url)} leads to a directory that is not among the allowed sources ({VARIABLE})."
        raise HearthError(Code.FORBIDDEN, message, param="source")


def parse_patterns(text: str) -> tuple[str, ...]:
    """The patterns in a comma-separated list. Raises `invalid_request` naming the first one that is malformed."""
    patterns = tuple(part for part in (part.strip() for part in text.split(",")) if part)
    for pattern in patterns:
        _compiled(pattern)
    return patterns


def redact(url: str) -> str:
    """A url for logs and messages, whatever somebody wrote: no user name, password, query or fragment; bounded."""
    shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", url)
    found = _SCHEME.fullmatch(shown)
    if found is not None:
        rest, after = found[2], re.search(r"[?#]", found[2])
        if "@" in rest:
            # What is a password and what a path or a query, readers disagree on: `user:a/b@host`, `user:a?b@host`.
            rest = "…" if after else rest.rpartition("@")[2]
        elif after:
            rest = rest[: after.start()]
        shown = f"{found[1].lower()}://{rest}"
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def _malformed(url: str, reason: str) -> HearthError:
    return HearthError(Code.INVALID_REQUEST, f"{redact(url)!r} {reason}.", param="source")


def _directory(url: str) -> str:
    path = url
    if not path.startswith("/"):
        path = url[len("file://") :]
        if "%" in path or "?" in path or "#" in path:
            raise _malformed(url, "holds characters that mean two things; write the directory as a plain path")
        host, slash, path = path.partition("/")
        if host not in {"", "localhost"} or not slash:
            raise _malformed(url, "names another machine; file:///DIRECTORY is on this server")
        path = f"/{path}"
    if _CONTROL.search(path):
        raise _malformed(url, "holds control characters")
    return "/" + "/".join(_parts(url, path))


def _parts(url: str, path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    if "." in parts or ".." in parts:
        raise _malformed(url, "holds . or .. as a part of its path")
    return parts


def _object(url: str) -> str:
    found = _SCHEME.fullmatch(url)
    if found is None:
        raise _malformed(url, "is no url")
    scheme, rest = found[1].lower(), found[2]
    if not rest.partition("/")[0].isascii():  # `K`.lower() is the letter k, and not everybody thinks so
        raise _malformed(url, "names no host")
    if "\\" in rest or _UNSEEN.search(rest):
        raise _malformed(url, "holds backslashes, spaces or invisible characters")
    if "?" in rest or "#" in rest:
        raise _malformed(url, "carries a query or a fragment; secrets belong into the file of HEARTH_REMOTE_CONFIG")
    authority, _, path = rest.partition("/")
    if "@" in rest:
        raise _malformed(
            url, "holds @, as if a user name or password; those belong into the file of HEARTH_REMOTE_CONFIG"
        )
    if scheme in _PORTS:
        authority = _host(url, authority.lower(), scheme)
        path = _ENCODED.sub(lambda match: _decoded(url, match), path)
    else:
        # Names of buckets are what they are: AWS has none with capitals since 2018, Google and Azure never had.
        if not _BUCKET.fullmatch(authority):
            raise _malformed(url, "names no bucket")
        if "%" in path or "*" in path:
            raise _malformed(url, "holds % or *, which object stores' clients read differently")
    if "*" in path:
        raise _malformed(url, "holds *")
    parts = _parts(url, path)
    return "/".join([f"{scheme}://{authority}", *parts])


def _host(url: str, host: str, scheme: str) -> str:
    host = host.removesuffix(_PORTS[scheme])
    name, colon, port = host.rpartition(":") if re.search(r":\d+$", host) and not host.endswith("]") else (host, "", "")
    host = f"{name.removesuffix('.')}{colon}{port}"
    if not _HOST.fullmatch(host) or (port and not 0 < int(port) < 65536):
        raise _malformed(url, "names no host")
    last = name.removesuffix(".").rpartition(".")[2]
    if re.fullmatch(r"\d+|0x[0-9a-f]*", last) and not _IPV4.fullmatch(name):
        raise _malformed(url, "names its host by a number in an unusual form")
    return host


def _decoded(url: str, match: re.Match[str]) -> str:
    """A percent-encoded byte in its one form (RFC 3986, section 6.2.2); refused where decoding changes the path."""
    if match[1] is None or int(match[1], 16) in _NEVER_ENCODED:
        raise _malformed(url, "holds a % that hides a part of the path")
    byte = int(match[1], 16)
    return chr(byte) if byte in _UNRESERVED else f"%{byte:02X}"


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression over normalised urls. Raises `invalid_request`."""
    if len(pattern) > URL_LIMIT or _CONTROL.search(pattern) or "**" in pattern:
        raise _bad_pattern(pattern, "holds **, control characters, or too much")
    deep = pattern.endswith(("/*", ":*"))
    start = pattern[:-1] if deep else pattern
    if start.lower().startswith("file://"):
        raise _bad_pattern(pattern, "shall be a plain directory such as /models/*")
    # What stands before the final * must be normal itself, or it could never match: `/models/../*`, `S3://Bucket/*`.
    sample = start.replace("*", "x")
    if sample not in {"/", HUB, *(f"{scheme}://" for scheme in OBJECT_SCHEMES)}:
        if sample.startswith(HUB) and deep:
            sample += "x"
        try:
            expected = normalise(sample)
        except HearthError as error:
            raise _bad_pattern(
                pattern, error.failure.message.partition("' ")[2].rstrip(".") or "is no source"
            ) from None
        if expected != (sample.removesuffix("/") if deep else sample):
            raise _bad_pattern(pattern, f"shall be written as {expected}{'/*' if deep else ''}")
        scheme, found, rest = start.partition("://")
        if found and scheme in _PORTS and rest.partition("/")[0].endswith("*"):
            raise _bad_pattern(pattern, "lets its host end in anything; write https://HOST/*")
    middle = "[^/]*".join(re.escape(part) for part in start.split("*"))
    return re.compile(middle + (".+" if deep else ""), re.DOTALL)


def _bad_pattern(pattern: str, reason: str) -> HearthError:
    return HearthError(Code.INVALID_REQUEST, f"The pattern {redact(pattern)!r} of {VARIABLE} {reason}.")
