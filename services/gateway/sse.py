"""Server-sent events, as bytes. Pure. https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

from typing import Final

import msgspec

from shared.contracts.residency import Progress

DONE: Final = b"data: [DONE]\n\n"
WAITING: Final = b": waiting\n\n"


def data(payload: bytes) -> bytes:
    """One event that carries this payload (JSON, so without a raw line break)."""
    return b"data: " + payload + b"\n\n"


def comment(text: str) -> bytes:
    """A comment, which every client ignores. Line breaks would end it, so they become spaces."""
    return b": " + " ".join(text.splitlines()).encode() + b"\n\n"


_WORDS: Final = {
    "queued": "waiting for a load",
    "importing": "importing",
    "reading": "loading",
    "attaching": "attaching",
}


def still(progress: Progress) -> bytes:
    """The comment of somebody who has heard nothing new since: how far it was, without an ETA that has aged."""
    return comment(describe(msgspec.structs.replace(progress, eta_s=None)))


def describe(progress: Progress) -> str:
    """Progress for a person: `loading 41 % eta 3.1 s`; what is not known is left out rather than guessed."""
    parts = [_WORDS.get(progress.phase, progress.phase)]
    if progress.total_bytes > 0:
        parts.append(f"{min(100, 100 * progress.done_bytes // progress.total_bytes)} %")
    if progress.eta_s is not None:
        parts.append(f"eta {max(0.0, progress.eta_s):.1f} s")
    return " ".join(parts)
