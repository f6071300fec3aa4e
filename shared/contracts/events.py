"""Events: what happened in the cluster, for people and other programs. Hints: nothing in Hearth depends on one."""

from __future__ import annotations

import msgspec


class ClusterEvent(msgspec.Struct, frozen=True, kw_only=True, tag="event", omit_defaults=True):
    """One thing that happened. `event` is the log's constant `noun.past_participle`; `facts` its keys with units."""

    event: str
    service: str
    at_s: float
    facts: dict[str, str | int | float | bool | None] = {}


class RecordChanged(msgspec.Struct, frozen=True, kw_only=True, tag="record_changed"):
    """A registry record changed (`deleted`: went away): whoever keeps a picture reads it again."""

    kind: str
    id: str
    deleted: bool = False
