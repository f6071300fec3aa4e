"""A profile: servers, network and models as numbers, each with its origin. Read from TOML, and written as TOML.

    name = "my-machines"
    about = "one sentence"

    [[servers]]                                   # each kind of server
    count = { value = 4, from = "ours" }
    devices = { value = 4, from = "ours" }        # and every other field of `fleet.model.ServerShape`

    [cluster]                                     # fields of `fleet.model.Hardware`
    remote_bytes_per_s = { value = 1.25e9, from = "10 Gb/s" }

    [models."opt-6.7b"]                           # fields of `fleet.model.ModelProfile`, and `devices` for one replica
    weight_bytes = { value = 13.3e9, from = "paper" }

A number without an origin is refused, a field that is not known as well. Names (`device`, `device_name`,
`architecture`, `labels`) are plain strings; what is left out has the default of its class.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, get_type_hints

from shared.errors import Code, HearthError
from simulator.fleet.model import Hardware, ModelProfile, ServerShape

DEFAULT: Final = "paper-a40"
MOST_SERVERS: Final = 100_000
_TOP: Final = frozenset({"name", "about", "date", "machine", "servers", "cluster", "models"})
_REQUIRED: Final = dataclasses.MISSING


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and where it comes from ("paper, section 4", "datasheet: …", "derived: …", "measured by …")."""

    value: float
    origin: str


@dataclass(frozen=True, slots=True)
class ServerKind:
    """So many servers of one shape."""

    count: int
    shape: ServerShape


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model, and how many devices one replica of it needs."""

    model: ModelProfile
    devices: int = 1


@dataclass(frozen=True)
class Profile:
    """See the module. `origins` has the origin of every number by its path, such as "models.opt-6.7b.step_s"."""

    name: str
    about: str
    kinds: tuple[ServerKind, ...]
    cluster: Mapping[str, Any]
    models: Mapping[str, ServedModel]
    origins: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    machine: str = ""

    @property
    def server_count(self) -> int:
        """Servers of all kinds."""
        return sum(kind.count for kind in self.kinds)

    def hardware(
        self,
        *,
        servers: int | None = None,
        dram_bytes: int | None = None,
        ssd_bytes: int | None = None,
        devices: int = 0,
    ) -> Hardware:
        """The machines, some of it otherwise than the profile has it (`devices` per server, 0: as it has them).

        With `servers` there are so many of the first kind. Raises HearthError: INVALID_REQUEST.
        """
        kinds = self.kinds if servers is None else (dataclasses.replace(self.kinds[0], count=servers),)
        changed: dict[str, Any] = {}
        for name, number in (("dram_bytes", dram_bytes), ("ssd_bytes", ssd_bytes), ("devices", devices or None)):
            if number is not None:
                changed[name] = number
        shapes = [dataclasses.replace(kind.shape, **changed) for kind in kinds for _ in range(kind.count)]
        if not 0 < len(shapes) <= MOST_SERVERS:
            raise HearthError(Code.INVALID_REQUEST, f"A fleet has 1 to {MOST_SERVERS} servers, not {len(shapes)}.")
        return Hardware(servers=tuple(shapes), **dict(self.cluster))

    def model(self, name: str) -> ServedModel:
        """Raises HearthError: INVALID_REQUEST with the names there are."""
        if name not in self.models:
            known = ", ".join(self.models)
            raise HearthError(Code.INVALID_REQUEST, f"The profile {self.name} has no model {name!r}; it has {known}.")
        return self.models[name]


def names() -> list[str]:
    """The profiles that come with Hearth."""
    folder = files("simulator").joinpath("profiles")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read(name_or_path: str) -> Profile:
    """A profile that comes with Hearth, by its name, or one from a file. Raises HearthError: INVALID_REQUEST."""
    path = Path(name_or_path)
    try:
        if name_or_path in names():
            text = files("simulator").joinpath("profiles", f"{name_or_path}.toml").read_text(encoding="utf-8")
        elif path.suffix or path.exists():
            text = path.read_text(encoding="utf-8")
        else:
            known = ", ".join(names())
            raise HearthError(
                Code.INVALID_REQUEST,
                f"There is no profile {name_or_path!r}; there are {known}, or a file that hearth profile wrote.",
            )
    except (OSError, UnicodeDecodeError) as error:
        raise HearthError(Code.INVALID_REQUEST, f"The profile {name_or_path} cannot be read ({error}).") from error
    return parse(text, name_or_path)


def parse(text: str, whence: str = "the profile") -> Profile:
    """Raises HearthError: INVALID_REQUEST, which says what is wrong where."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise HearthError(Code.INVALID_REQUEST, f"{whence} is no TOML: {error}.") from error
    return _Reader(whence).profile(table)


class _Reader:
    """Turns tables into the words of a fleet, and remembers where each number comes from."""

    def __init__(self, whence: str) -> None:
        self._whence = whence
        self.origins: dict[str, str] = {}

    def profile(self, table: dict[str, Any]) -> Profile:
        """The whole of it."""
        for key in table:
            if key not in _TOP:
                raise self._wrong(f"has a part {key!r}, which no profile has")
        kinds = [self._kind(f"servers.{index}", one) for index, one in enumerate(table.get("servers") or [])]
        models = {name: self._model(f"models.{name}", one) for name, one in (table.get("models") or {}).items()}
        if not kinds or not models:
            raise self._wrong("needs at least one [[servers]] and one [models.NAME]")
        cluster = self._fields("cluster", table.get("cluster") or {}, Hardware, without=("servers",))
        return Profile(
            name=self._string("name", table.get("name")),
            about=self._string("about", table.get("about")),
            kinds=tuple(kinds),
            cluster=cluster,
            models=models,
            origins=self.origins,
            date=str(table.get("date", "")),
            machine=str(table.get("machine", "")),
        )

    def _kind(self, path: str, table: Any) -> ServerKind:
        table = self._table(path, table)
        count = self._number(f"{path}.count", table.pop("count", None), int)
        shape = ServerShape(**self._fields(path, table, ServerShape))
        return ServerKind(int(count), shape)

    def _model(self, path: str, table: Any) -> ServedModel:
        table = self._table(path, table)
        devices = table.pop("devices", None)
        needed = 1 if devices is None else int(self._number(f"{path}.devices", devices, int))
        named = {"name": path.removeprefix("models."), **self._fields(path, table, ModelProfile, without=("name",))}
        return ServedModel(ModelProfile(**named), needed)

    def _fields(self, path: str, table: Any, kind: type, without: tuple[str, ...] = ()) -> dict[str, Any]:
        table = self._table(path, table)
        hints = get_type_hints(kind)
        known = {one.name: one for one in dataclasses.fields(kind) if one.name not in without}
        found: dict[str, Any] = {}
        for name, given in table.items():
            if name not in known:
                raise self._wrong(f"{path} has {name!r}; known are {', '.join(known)}")
            found[name] = self._value(f"{path}.{name}", given, hints[name])
        for name, one in known.items():
            if (
                name not in found
                and one.default is _REQUIRED
                and one.default_factory is _REQUIRED
                and path != "cluster"
            ):
                raise self._wrong(f"{path}.{name} is missing")
        return found

    def _value(self, path: str, given: Any, kind: Any) -> Any:
        if kind in (int, float):
            return self._number(path, given, kind)
        if kind is bool:
            if not isinstance(given, bool):
                raise self._wrong(f"{path} must be true or false")
            return given
        if kind is str:
            return self._string(path, given)
        return {str(key): self._string(f"{path}.{key}", one) for key, one in self._table(path, given).items()}

    def _number(self, path: str, given: Any, kind: type) -> float:
        if not isinstance(given, dict) or set(given) != {"value", "from"}:
            raise self._wrong(f'{path} must be {{ value = NUMBER, from = "where it comes from" }}')
        value, origin = given["value"], given["from"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise self._wrong(f"{path} must be a number from 0 on")
        if kind is int and value != int(value):
            raise self._wrong(f"{path} must be a whole number")
        self.origins[path] = self._string(f"{path}.from", origin)
        return int(value) if kind is int else float(value)

    def _string(self, path: str, given: Any) -> str:
        if not isinstance(given, str) or not given.strip():
            raise self._wrong(f"{path} must be a string that says something")
        return given

    def _table(self, path: str, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise self._wrong(f"{path} must be a table")
        return dict(given)

    def _wrong(self, what: str) -> HearthError:
        return HearthError(Code.INVALID_REQUEST, f"{self._whence}: {what}.")


# -- writing -----------------------------------------------------------------------------------------------------------


def written(
    *,
    name: str,
    about: str,
    date: str,
    machine: str,
    server: Mapping[str, Figure | str],
    cluster: Mapping[str, Figure],
    models: Mapping[str, Mapping[str, Figure | str]],
) -> str:
    """The text of a profile with one kind of server, which `parse` reads."""
    lines = [f"{key} = {_quoted(text)}" for key, text in (("name", name), ("about", about))]
    lines += [f"date = {_quoted(date)}", f"machine = {_quoted(machine)}", "", "[[servers]]", *_entries(server)]
    lines += ["", "[cluster]", *_entries(cluster)]
    for model, facts in models.items():
        lines += ["", f"[models.{_quoted(model)}]", *_entries(facts)]
    return "\n".join(lines) + "\n"


def _entries(facts: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} = {{ value = {_number_text(fact.value)}, from = {_quoted(fact.origin)} }}"
        if isinstance(fact, Figure)
        else f"{key} = {_quoted(fact)}"
        for key, fact in facts.items()
    ]


def _number_text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's, except that TOML has no escaped solidus and no lone surrogates, which JSON's encoder
    does not make of sound text."""
    return json.dumps(text, ensure_ascii=False)
