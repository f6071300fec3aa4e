"""Somebody who waits for room. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Deferral:
    """A deployment that waits for room: since which state of the picture, and when to try again.

    `kinds` are the reasons, roughly: the log wants to know when they change, and until `explained_until` they are not
    asked for anew. Once something may have made room it is
    tried again from `again_at` on, and at `latest_at` whatever has happened.
    """

    kinds: str
    releases: int
    again_at: float
    latest_at: float
    explained_until: float
