"""`hearth settings`: every environment variable, from the one place that defines them."""

from __future__ import annotations

import argparse
import json

from shared.settings import CLI_VARIABLES, COMPOSE_VARIABLES, SERVICES, CommonSettings, fields


def table() -> dict[str, list[tuple[str, str, str]]]:
    """Group → (variable, default, description): every service, each service, the command line, compose.yaml."""
    common = {name for name, _, _ in fields(CommonSettings)}
    groups = {"every service": [(name, str(default), text) for name, default, text in fields(CommonSettings)]}
    for service, kind in SERVICES.items():
        groups[service] = [(name, str(default), text) for name, default, text in fields(kind) if name not in common]
    groups["command line"] = [(name, "", text) for name, text in CLI_VARIABLES.items()]
    groups["compose.yaml"] = [(name, "", text) for name, text in COMPOSE_VARIABLES.items()]
    return groups


def markdown() -> str:
    """The table as `docs/configuration.md` holds it."""
    lines = [
        "# Configuration",
        "",
        "Every environment variable that Hearth reads; written by `hearth settings --markdown`. A malformed value, or",
        "a `HEARTH_` variable that is not in this list, is a start-up error. Bytes may be written as 4096, 512MiB or",
        "2GB.",
    ]
    for group, found in table().items():
        lines += ["", f"## {group[0].upper()}{group[1:]}", "", "| variable | default | meaning |", "|---|---|---|"]
        lines += [f"| `{name}` | {f'`{default}`' if default else ''} | {text} |" for name, default, text in found]
    return "\n".join(lines) + "\n"


def settings(options: argparse.Namespace) -> int:
    """Print the table."""
    if options.markdown:
        print(markdown(), end="")
        return 0
    groups = table()
    if options.service:
        groups = {name: groups[name] for name in ("every service", options.service)}
    if options.json:
        rows = [
            {"group": group, "variable": name, "default": default, "description": text}
            for group, found in groups.items()
            for name, default, text in found
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    width = max(len(name) for found in groups.values() for name, _, _ in found)
    for group, found in groups.items():
        print(f"\n{group}")
        for name, default, text in found:
            print(f"  {name:{width}}  {text}" + (f"  [{default}]" if default else ""))
    return 0
