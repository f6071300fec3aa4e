"""Log lines for people: from the JSON of a service, or whatever else a child prints, to one aligned line."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from typing import Any, Final

from shared.sizes import size

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "warn": 30, "error": 40, "critical": 50, "exception": 40}
# Facts that are shown elsewhere in the line, or that say nothing to a person.
SHOWN_ELSEWHERE: Final = frozenset({"service", "id", "module", "level", "event", "timestamp", "exception", "logger"})
# Worth a line in the log files only.
ROUTINE: Final = frozenset({"service.ready", "service.draining", "service.stopped", "request.finished"})
COLOURS: Final = (36, 35, 34, 32, 33, 96, 95, 94)
NAME_CHARACTERS: Final = 12
VALUE_CHARACTERS: Final = 200


@dataclass(frozen=True)
class Line:
    """One line of a child: when (seconds since 1970), how grave (as in `LEVELS`), what, and the facts."""

    at_s: float
    level: int
    event: str
    facts: dict[str, Any]
    exception: str = ""


def read(text: str, now_s: float) -> Line:
    """What a child printed. Text that is no log record of ours is kept as it is, at level info."""
    record: Any = None
    if text.startswith("{"):
        try:
            record = json.loads(text)
        except ValueError:
            record = None
    if not isinstance(record, dict) or "event" not in record:
        return Line(now_s, LEVELS["info"], text.rstrip(), {})
    try:
        at_s = datetime.datetime.fromisoformat(str(record.get("timestamp", ""))).timestamp()
    except ValueError:
        at_s = now_s
    return Line(
        at_s=at_s,
        level=LEVELS.get(str(record.get("level", "info")), 20),
        event=str(record["event"]),
        facts={key: value for key, value in record.items() if key not in SHOWN_ELSEWHERE},
        exception=str(record.get("exception", "")),
    )


def wanted(line: Line, *, plain: bool, verbose: bool) -> bool:
    """Whether a person watching wants to see it. `plain`: a child whose chatter (NATS, Redis) is for the log file."""
    if verbose:
        return True
    if plain:
        return False
    return line.level >= LEVELS["warning"] or (line.level >= LEVELS["info"] and line.event not in ROUTINE)


def render(name: str, line: Line, *, colour: bool) -> str:
    """`12:03:04 worker-1     replica.loaded  deployment=demo read_s=0.31`, without the end of the line."""
    clock = datetime.datetime.fromtimestamp(line.at_s).strftime("%H:%M:%S")
    facts = " ".join(f"{key}={_value(key, value)}" for key, value in line.facts.items() if value is not None)
    words = f"{line.event}  {facts}".rstrip()
    if line.exception:
        words += "".join(f"\n    {row}" for row in line.exception.splitlines())
    if not colour:
        mark = {30: "warning: ", 40: "error: ", 50: "error: "}.get(line.level, "")
        return f"{clock} {name:{NAME_CHARACTERS}} {mark}{words}"
    painted = {30: f"\x1b[33m{words}\x1b[0m", 40: f"\x1b[31m{words}\x1b[0m", 50: f"\x1b[31m{words}\x1b[0m"}
    shade = COLOURS[sum(name.encode()) % len(COLOURS)]
    return f"\x1b[2m{clock}\x1b[0m \x1b[{shade}m{name:{NAME_CHARACTERS}}\x1b[0m {painted.get(line.level, words)}"


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key.endswith("_bytes"):
        return size(value).replace(" ", "")
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > VALUE_CHARACTERS:
        text = text[: VALUE_CHARACTERS - 1] + "…"
    return json.dumps(text, ensure_ascii=False) if " " in text or text == "" else text
