"""What the parts of the store that move bytes promise each other. Types only; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

Progressed = Callable[[int, int], None]
"""Hears (bytes done, bytes in all), on whatever thread the bytes are moved by."""


class SourceTree(Protocol):
    """The files of a source at one revision, with random access.

    Thread-safe. Every method blocks and raises `HearthError`: checkpoint_unavailable (the world's fault, worth a
    later try), invalid_checkpoint (a file is shorter than it was), forbidden, not_found, draining.
    """

    @property
    def url(self) -> str:
        """What was asked for, without secrets."""

    @property
    def revision(self) -> str:
        """Names the content: a commit, or a fingerprint of names, sizes and versions. Equal means unchanged."""

    @property
    def files(self) -> Mapping[str, int]:
        """Name → bytes of the files that lie directly in it."""

    @property
    def remote(self) -> bool:
        """Whether its bytes come over a network."""

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill the whole of `into` from byte `offset` of a file; a range that a connection lost is asked for again."""

    def read_small(self, name: str, limit_bytes: int) -> bytes:
        """A whole file. Raises `too_large` above the limit."""

    def close(self) -> None:
        """Let go of descriptors and connections."""


class ChunkOrigin(Protocol):
    """Where the chunks of an image come from. Thread-safe."""

    def read(self, index: int, into: memoryview) -> None:
        """Fill `into` with chunk `index` of the image as it shall lie there, padding included. Raises `HearthError`."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another store that has a checkpoint, wholly or in part."""

    server_id: str
    url: str
    whole: bool
