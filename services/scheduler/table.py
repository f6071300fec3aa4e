"""A dictionary that tells of every change, so that what is derived from it never has to be worked out anew; and an
index. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, overload

V = TypeVar("V")
D = TypeVar("D")
_NOTHING: Any = object()


class Table(dict[str, V]):
    """`changed(key, old, new)` is called after every change; None stands for "not there".

    Only single entries are changed: what would change many at once is not there.
    """

    def __init__(self, changed: Callable[[str, V | None, V | None], None]) -> None:
        super().__init__()
        self._changed = changed

    def __setitem__(self, key: str, value: V) -> None:
        old = self.get(key)
        super().__setitem__(key, value)
        self._changed(key, old, value)

    def __delitem__(self, key: str) -> None:
        old = super().pop(key)
        self._changed(key, old, None)

    @overload
    def pop(self, key: str, /) -> V: ...
    @overload
    def pop(self, key: str, default: V, /) -> V: ...
    @overload
    def pop(self, key: str, default: D, /) -> V | D: ...
    def pop(self, key: str, default: Any = _NOTHING, /) -> Any:
        """As of a dictionary."""
        if key not in self:
            if default is _NOTHING:
                raise KeyError(key)
            return default
        old = super().pop(key)
        self._changed(key, old, None)
        return old

    def clear(self) -> NoReturn:
        """Not there."""
        raise NotImplementedError

    def popitem(self) -> NoReturn:
        """Not there."""
        raise NotImplementedError

    def setdefault(self, *_: Any) -> NoReturn:
        """Not there."""
        raise NotImplementedError

    def update(self, *_: Any, **__: Any) -> NoReturn:
        """Not there."""
        raise NotImplementedError


class Groups:
    """Ids by group, in the order in which they came."""

    def __init__(self) -> None:
        self._ids: dict[str, dict[str, None]] = {}

    def add(self, group: str, id: str) -> None:
        """It belongs to this group, too."""
        self._ids.setdefault(group, {})[id] = None

    def drop(self, group: str, id: str) -> None:
        """It does not belong to this group any more."""
        ids = self._ids.get(group)
        if ids is not None:
            ids.pop(id, None)
            if not ids:
                del self._ids[group]

    def of(self, group: str) -> Sequence[str]:
        """The ids of a group, sorted."""
        ids = self._ids.get(group)
        return sorted(ids) if ids else ()

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)
