"""Opens whatever a source's url names, if the operator allows it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from services.store.hub_tree import HubTree
from services.store.local import LocalTree, absolute_directory
from services.store.object_tree import ObjectTree
from services.store.object_writer import ObjectWriter
from services.store.objects import open_directory_store, open_store
from services.store.ports import SourceTree
from services.store.remote_config import RemoteConfig
from services.store.sources import check_allowed, check_resolved, kind, normalise, parse_patterns
from shared.errors import Code, HearthError

ALL: Final = ("/*", "hf:*", "s3://*", "gs://*", "az://*", "https://*", "http://*")


@dataclass(frozen=True, slots=True)
class TreeConfig:
    """What the operator says about sources: the allowed ones, options of object stores, connections to each."""

    patterns: tuple[str, ...] = ALL
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    connections: int = 8
    hub_endpoint: str | None = None

    @classmethod
    def of(cls, sources: str, remote: RemoteConfig, *, connections: int, hub_endpoint: str | None = None) -> TreeConfig:
        """From the settings `HEARTH_SOURCES` and `HEARTH_FETCH_CONNECTIONS`. Raises `invalid_request`."""
        return cls(parse_patterns(sources), remote, connections, hub_endpoint)


def open_tree(url: str, revision: str | None, config: TreeConfig) -> SourceTree:
    """The files of a source at a revision (None: as it is now). Blocks.

    Raises `invalid_request` for a url that is none, `forbidden` for one that the operator does not allow, `not_found`
    for a revision that the source does not have (any more), and whatever opening it raises.
    """
    asked = normalise(url)
    check_allowed(asked, config.patterns)
    which = kind(asked)
    if which == "hub":
        return HubTree(asked, revision, endpoint=config.hub_endpoint, connections=config.connections)
    if which == "directory":
        check_resolved(asked, os.path.realpath(asked), config.patterns)
    tree: SourceTree
    if which == "directory":
        tree = LocalTree(absolute_directory(asked))
    else:
        tree = ObjectTree(asked, config.remote.options(asked), connections=config.connections)
    if revision is not None and revision != tree.revision:
        now = tree.revision
        tree.close()
        raise HearthError(Code.NOT_FOUND, f"{tree.url} has no revision {revision!r}; it is at {now} now.")
    return tree


def open_writer(url: str, config: TreeConfig, *, progressed: Callable[[int], None] | None = None) -> ObjectWriter:
    """Where an export goes: a directory of this server (made if missing) or of an object store. Blocks.

    The same list rules as for sources: what may not be read may not be written. Raises `invalid_request`, `forbidden`,
    `unsupported` for the hub and for web servers.
    """
    asked = normalise(url)
    which = kind(asked)
    if which == "hub" or asked.startswith(("http://", "https://")):
        raise HearthError(Code.UNSUPPORTED, f"{asked} takes no exports; give a directory, s3://, gs:// or az://.")
    check_allowed(asked, config.patterns)
    if which == "directory":
        check_resolved(asked, os.path.realpath(asked), config.patterns)
        return ObjectWriter(asked, open_directory_store(asked), directory=Path(asked), progressed=progressed)
    options = config.remote.options(asked)
    store = open_store(asked, options, connections=config.connections, uploading=True)
    return ObjectWriter(asked, store, progressed=progressed)
