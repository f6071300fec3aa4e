"""`hearth deploy` and `hearth delete`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from services.cli.client import Client, ClientError, run
from shared.contracts.records import DeploymentRecord, DeploymentSpec
from shared.contracts.residency import Progress
from shared.sizes import size

# Option → field of the spec; `source`, `revision` and `dtype` are its source.
OPTIONS: Final = {
    "min_replicas": "min_replicas",
    "max_replicas": "max_replicas",
    "target_concurrency": "target_concurrency",
    "keep_alive": "keep_alive_s",
    "max_context": "max_context_tokens",
    "queue_limit": "queue_limit",
    "lazy": "lazy",
}
SOURCE_FIELDS: Final = ("url", "revision", "dtype")


class UsageError(Exception):
    """The command line or the file does not describe a deployment; the text is a sentence for a person."""


def source_url(text: str, folder: Path) -> str:
    """The source as the store wants it: `hf:…` as it is, a directory made absolute from `folder`."""
    if text.startswith("hf:"):
        return text
    path = Path(text).expanduser()
    return str((path if path.is_absolute() else folder / path).absolute())


def spec_of(options: Mapping[str, Any], document: object, folder: Path, here: Path) -> DeploymentSpec:
    """The deployment from the options over the document of a file (None: there is no file).

    Relative directories in the file are relative to it (`folder`), those of options to the working directory (`here`).
    """
    if document is None:
        fields: dict[str, Any] = {}
    elif isinstance(document, dict):
        fields = {str(key): value for key, value in document.items()}
    else:
        raise UsageError("The file does not hold a deployment (a mapping with name, source, …).")
    source = fields.pop("source", {})
    source = {"url": source} if isinstance(source, str) else source
    if not isinstance(source, dict):
        raise UsageError("`source` is a directory, hf:ORG/NAME, or a mapping with url, revision and dtype.")
    # A file may use the words of the options as well as those of the contract: `keep_alive` or `keep_alive_s`.
    source |= {name: fields.pop(name) for name in ("revision", "dtype") if name in fields}
    fields = {OPTIONS.get(key, key): value for key, value in fields.items()}
    known = set(DeploymentSpec.__struct_fields__)
    if unknown := sorted(set(fields) - known) + sorted(f"source.{key}" for key in set(source) - set(SOURCE_FIELDS)):
        words = sorted({"name", "source", "revision", "dtype", *OPTIONS})
        raise UsageError(f"{', '.join(unknown)}: no such field; a deployment has {', '.join(words)}.")
    if isinstance(source.get("url"), str):
        source = {**source, "url": source_url(source["url"], folder)}
    if options.get("source"):
        source = {**source, "url": source_url(options["source"], here)}
    source |= {name: options[name] for name in ("revision", "dtype") if options.get(name) is not None}
    if options.get("name"):
        fields["name"] = options["name"]
    fields |= {field: options[option] for option, field in OPTIONS.items() if options.get(option) is not None}
    if "name" not in fields:
        raise UsageError("Which name? hearth deploy NAME --source DIR|hf:ORG/NAME")
    if not source.get("url"):
        raise UsageError("From where? Add --source DIR or --source hf:ORG/NAME")
    try:
        return msgspec.convert({**fields, "source": source}, DeploymentSpec)
    except msgspec.ValidationError as error:
        raise UsageError(f"{error}.") from error


def _document(name: str) -> tuple[object, Path]:
    import yaml

    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is no YAML: {' '.join(str(error).split())}.") from error
    if document is None:
        raise UsageError(f"{name} is empty.")
    return document, Path.cwd() if name == "-" else Path(name).absolute().parent


def described(record: DeploymentRecord) -> str:
    """One line about a deployment that was just made."""
    found = record.checkpoint
    facts = (
        f"{found.architecture}, {parameters(found.parameters)} parameters, {found.dtype}, {size(found.weight_bytes)}"
        if found
        else "imported on its first request"
    )
    return f"{record.spec.name} is {record.state.value}: {facts}"


def parameters(count: int) -> str:
    """A number of parameters for people: 4.2 M, 1.1 B."""
    for unit, one in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return str(count)


async def follow(client: Client, spec: DeploymentSpec) -> DeploymentRecord:
    """Deploy, with a progress bar on a terminal and a line per phase elsewhere (on standard error)."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    phase = ""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{spec.name}: asking", total=None, amount="")
        async for item in client.deploy(spec):
            if isinstance(item, DeploymentRecord):
                return item
            bar.update(
                task,
                description=f"{spec.name}: {item.phase}",
                total=item.total_bytes or None,
                completed=item.done_bytes,
                amount=amount(item),
            )
            if not console.is_terminal and item.phase != phase:
                phase = item.phase
                print(f"{spec.name}: {phase}", file=sys.stderr, flush=True)
    raise ClientError("The gateway ended its answer before the deployment was ready.")


def amount(progress: Progress) -> str:
    """`12MiB of 40MiB, 3 s left`; what is not known is left out."""
    if not progress.total_bytes:
        return ""
    text = f"{size(progress.done_bytes)} of {size(progress.total_bytes)}"
    return text if progress.eta_s is None else f"{text}, {progress.eta_s:.0f} s left"


def deploy(options: argparse.Namespace) -> int:
    """Run `hearth deploy`."""
    try:
        document, folder = _document(options.file) if options.file else (None, Path.cwd())
        spec = spec_of(vars(options), document, folder, Path.cwd())
    except UsageError as error:
        print(f"hearth deploy: {error}", file=sys.stderr)
        return 2

    async def work() -> int:
        async with Client(options.url) as client:
            record = await follow(client, spec)
        print(msgspec.json.encode(record).decode() if options.json else described(record))
        return 0

    return run(work())


def delete(options: argparse.Namespace) -> int:
    """Run `hearth delete`."""

    async def work() -> int:
        async with Client(options.url) as client:
            answer = await client.delete(options.name)
        print(msgspec.json.encode(answer).decode() if options.json else f"{options.name} is deleted")
        return 0

    return run(work())
