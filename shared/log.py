"""Logs: structlog, JSON when not on a terminal.

The event is a constant `noun.past_participle`, facts are keys with units.

Prompts, completions and token ids are never logged.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

import structlog

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure(service: str, id: str, *, level: str, form: str) -> None:
    """Set up logging of this process. `level` and `form` are the settings `log_level` and `log_format`."""
    if form == "auto":
        form = "console" if sys.stderr.isatty() else "json"

    def stamp(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
        # A constant of the process, not a context variable: threads log too.
        return {"service": service, "id": id, **event}

    processors: list[Any] = [
        stamp,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    if form == "json":
        processors.append(structlog.processors.JSONRenderer())
    else:
        processors.append(structlog.dev.ConsoleRenderer())
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries log through the standard library: only what matters, in the same stream.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)


def get(name: str) -> Any:
    """A logger; `name` tells the module that speaks."""
    return structlog.get_logger(module=name)
