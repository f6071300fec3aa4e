"""Labels: what an operator says of a server or worker (`gpu=a40`), for deployments to choose by. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from shared.errors import Code, HearthError

MOST_LABELS: Final = 16
KEY_PATTERN: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
VALUE_PATTERN: Final = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")


def check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """The labels themselves, if they may be. Raises `HearthError` (invalid_request) with the rule that they break."""
    if len(labels) > MOST_LABELS:
        raise _bad(f"labels must not be more than {MOST_LABELS}, not {len(labels)}.")
    for key, value in labels.items():
        if not KEY_PATTERN.fullmatch(key):
            raise _bad(
                f"labels: {key[:80]!r} is no key: 1 to 63 letters, digits, '.', '_', '-' or '/', "
                "beginning and ending with a letter or digit."
            )
        if not VALUE_PATTERN.fullmatch(value):
            raise _bad(
                f"labels: {value[:80]!r} is no value of {key!r}: at most 63 letters, digits, '.', '_' or '-', "
                "beginning and ending with a letter or digit."
            )
    return labels


def parse_labels(text: str) -> dict[str, str]:
    """The labels of "k=v,k=v" ("": none). Raises `HearthError`."""
    found: dict[str, str] = {}
    for part in text.split(",") if text.strip() else ():
        key, equals, value = part.strip().partition("=")
        if not equals:
            raise _bad(f"labels: {part.strip()[:80]!r} is no KEY=VALUE.")
        if key in found:
            raise _bad(f"labels: {key[:80]!r} is there twice.")
        found[key] = value
    check_labels(found)
    return found


def labels_text(labels: Mapping[str, str]) -> str:
    """`gpu=a40, zone=b`, by key."""
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _bad(sentence: str) -> HearthError:
    return HearthError(Code.INVALID_REQUEST, sentence, param="labels")
