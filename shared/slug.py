"""Names of deployments and the slugs of their queues."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from shared.errors import Code, HearthError

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


def check_name(name: str) -> str:
    """The name itself, if a deployment may have it. Raises `HearthError` (invalid_request) with the rule it breaks."""
    if not NAME_PATTERN.fullmatch(name):
        raise HearthError(
            Code.INVALID_REQUEST,
            f"{name!r} is no valid deployment name: 1 to 128 letters, digits, '.', '_', '-', ':' or '/', "
            "beginning with a letter or digit.",
            param="name",
        )
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise HearthError(
            Code.INVALID_REQUEST,
            f"{name!r} is no valid deployment name: no part between slashes may be empty, '.' or '..'.",
            param="name",
        )
    return name


def slug(name: str) -> str:
    """The id of this deployment's queue: readable, fit for a subject, and distinct for distinct names."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
