"""Object stores as obstore opens them, and what their errors mean in Hearth's words, without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from obstore import exceptions
from obstore.store import AzureStore, GCSStore, HTTPStore, LocalStore, S3Store

from services.store.remote_config import CLIENT, ObjectOptions
from services.store.remote_config import VARIABLE as CONFIG_VARIABLE
from services.store.sources import redact, split_object
from shared.errors import Code, HearthError

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 15.0  # silence of a server in the middle of a body, or before an answer
UPLOAD_TIMEOUT_S: Final = 120.0  # a part of an upload is answered when all of it has arrived
REQUEST_TIMEOUT_S: Final = 600.0  # a whole request; slow is not broken, silence is
# Of the library itself, for requests that fail before their body and for bodies cut in the middle.
RETRY: Final[RetryConfig] = {
    "max_retries": 3,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
    "retry_timeout": timedelta(seconds=60),
}
_ALLOW_HTTP: Final = f'allow it in {CONFIG_VARIABLE}: "{CLIENT}": {{"allow_http": true}}'
_STATUS: Final = re.compile(r"status code: (\d{3})")


def open_store(url: str, options: ObjectOptions, *, connections: int, uploading: bool = False) -> ObjectStore:
    """The object store of a *normalised* url, with the url's path as its root. Connects to nothing yet.

    What `options` do not say, obstore reads from the environment (AWS_*, GOOGLE_*, AZURE_*). Raises `invalid_request`
    for options that the store does not know, and `forbidden` for http:// that nobody allowed.
    """
    scheme, authority, path = split_object(url)
    limits = {
        "connect_timeout": f"{CONNECT_TIMEOUT_S:.0f}s",
        "read_timeout": f"{UPLOAD_TIMEOUT_S if uploading else READ_TIMEOUT_S:.0f}s",
        "timeout": f"{REQUEST_TIMEOUT_S:.0f}s",
        "pool_max_idle_per_host": str(connections),
    }
    common: dict[str, Any] = dict(options.store)
    if options.client or scheme in {"http", "https"}:
        common["client_options"] = {**limits, **options.client}
    else:
        common = {
            **limits,
            **common,
        }  # beside `client_options`, the environment's (AWS_ALLOW_HTTP, …) would not be read
    if scheme == "http" and options.client.get("allow_http") is not True:
        raise HearthError(Code.FORBIDDEN, f"{redact(url)} is not encrypted; {_ALLOW_HTTP}.")
    try:
        return _open(scheme, authority, path, url, common)
    except (exceptions.BaseError, ValueError, TypeError) as error:
        # The library's text names the option, and for some the value too, which may be a secret.
        key = re.search(r"(?:Configuration key: '|Invalid key: )(\w{1,64})", str(error))
        if key is not None:
            reason = f"there is no option {key[1]!r}"
        elif "Account must be specified" in str(error):
            reason = "the option account_name is missing"
        else:
            reason = "an option here, or a variable of the environment in its place, has a value that cannot be"
        raise HearthError(Code.INVALID_REQUEST, f"{CONFIG_VARIABLE} for {redact(url)}: {reason}.") from None


def _open(scheme: str, authority: str, path: str, url: str, options: dict[str, Any]) -> ObjectStore:
    if scheme in {"http", "https"}:
        client = options.pop("client_options")
        if options:
            raise exceptions.UnknownConfigurationKeyError(f"Configuration key: '{min(options)}'")
        return HTTPStore(url, client_options=client, retry_config=RETRY)
    kinds: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    opened: ObjectStore = kinds[scheme](authority, **{**options, "prefix": path or None, "retry_config": RETRY})
    return opened


def open_directory_store(directory: str) -> ObjectStore:
    """A local directory as an object store, made if it is missing. Raises `checkpoint_unavailable`."""
    try:
        return LocalStore(directory, mkdir=True)
    except (exceptions.BaseError, OSError, ValueError) as error:
        raise _unavailable(directory, f"cannot be made ({type(error).__name__})") from error


@contextmanager
def object_errors(what: str) -> Iterator[None]:
    """obstore's errors as Hearth's: one sentence that begins with `what`, a redacted url, and quotes nothing."""
    try:
        yield
    except (exceptions.BaseError, OSError, ValueError) as error:
        raise translated(error, what) from None  # the cause's text has urls with signatures


def translated(error: Exception, what: str) -> HearthError:
    """An error of obstore in Hearth's words."""
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return HearthError(Code.NOT_FOUND, f"{what} is not there.")
    if isinstance(error, exceptions.PermissionDeniedError):
        return _forbidden(what)
    if isinstance(error, exceptions.UnauthenticatedError):
        return _unauthenticated(what)
    if isinstance(error, exceptions.PreconditionError):
        return changed(what)
    if isinstance(error, exceptions.NotSupportedError):
        return HearthError(Code.UNSUPPORTED, f"{what}: its server does not know this operation.")
    if isinstance(error, exceptions.InvalidPathError | ValueError):
        return HearthError(Code.INVALID_REQUEST, f"{what} has a name that object stores do not take.")
    if isinstance(error, PermissionError):
        return HearthError(Code.FORBIDDEN, f"{what}: the permissions of the file system do not allow this.")
    return _generic(text, what, type(error).__name__)


def _generic(text: str, what: str, name: str) -> HearthError:
    """The errors that the library does not tell apart, by the parts of its text that say which they are."""
    if "non-partial response" in text:
        return HearthError(Code.INVALID_CHECKPOINT, f"{what}: its server does not serve ranges, which Hearth needs.")
    if "redirect without LOCATION" in text:
        return _unavailable(what, "lies in another region than the one configured")
    # Credentials come before statuses: what failed is the request for them.
    if "169.254.169.254" in text or "redential" in text or "metadata.google.internal" in text or "fd00:ec2" in text:
        return _unauthenticated(what)
    if "os error 28" in text or "os error 122" in text:
        return HearthError(Code.NO_CAPACITY, f"{what}: the disk is full.")
    status = _STATUS.search(text)
    if status is not None:
        number = int(status[1])
        if number == 401:
            return _unauthenticated(what)
        if number == 403:
            return _forbidden(what)
        if number == 404:
            return HearthError(Code.NOT_FOUND, f"{what} is not there.")
        if number == 412:
            return changed(what)
        if number == 416:
            return HearthError(Code.INVALID_CHECKPOINT, f"{what} is shorter than it was.")
        return _unavailable(what, f"cannot be used now: its server answered {number}")
    if "builder error" in text:
        # No client was made: the url is http:// and that is not allowed.
        return HearthError(Code.FORBIDDEN, f"{what}: its endpoint is not encrypted; {_ALLOW_HTTP}.")
    if "kind: Timeout" in text or "TimedOut" in text or "timed out" in text:
        return _unavailable(what, "cannot be used now: its server is silent")
    if "kind: Connect" in text or "error sending request" in text:
        return _unavailable(what, "cannot be reached")
    if "body error" in text or "Interrupted" in text:
        return _unavailable(what, "cannot be read: the connection was cut again and again")
    return _unavailable(what, f"cannot be used now ({name})")


def changed(what: str) -> HearthError:
    """The object is another one than when the tree was opened."""
    return HearthError(Code.CHECKPOINT_UNAVAILABLE, f"{what} changed while it was read; try again.")


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed in a moment: the connection or the server failed, not the request."""
    if not isinstance(error, exceptions.GenericError | exceptions.JoinError):
        return False
    status = _STATUS.search(str(error))
    return translated(error, "").failure.code is Code.CHECKPOINT_UNAVAILABLE and (
        status is None or int(status[1]) in {408, 429} or int(status[1]) >= 500
    )


def _unavailable(what: str, reason: str) -> HearthError:
    return HearthError(Code.CHECKPOINT_UNAVAILABLE, f"{what} {reason}.")


def _forbidden(what: str) -> HearthError:
    return HearthError(Code.FORBIDDEN, f"{what}: the store's credentials do not allow this.")


def _unauthenticated(what: str) -> HearthError:
    message = f"{what}: its server asks for credentials; give them by the environment or in {CONFIG_VARIABLE}."
    return HearthError(Code.UNAUTHENTICATED, message)
