"""`hearth deploy` and `hearth delete`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from services.cli.client import Client, ClientError, run
from services.cli.progress import Bars
from shared.contracts.records import DeploymentRecord, DeploymentSpec
from shared.contracts.residency import Checkpoint
from shared.sizes import size

# Option → field of the spec; `source`, `revision` and `dtype` are its source.
OPTIONS: Final = {
    "min_replicas": "min_replicas",
    "max_replicas": "max_replicas",
    "target_concurrency": "target_concurrency",
    "keep_alive": "keep_alive_s",
    "adaptive_keep_alive": "adaptive_keep_alive",
    "max_context": "max_context_tokens",
    "queue_limit": "queue_limit",
    "lazy": "lazy",
    "priority": "priority",
    "devices": "devices",
    "labels": "labels",
}
SOURCE_FIELDS: Final = ("url", "revision", "dtype")


class UsageError(Exception):
    """The command line or the file does not describe a deployment; the text is a sentence for a person."""


def source_url(text: str, folder: Path) -> str:
    """The source as the store wants it: `hf:…` and URLs as they are, a directory made absolute from `folder`."""
    if text.startswith("hf:") or "://" in text:
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
        raise UsageError("`source` is a directory, hf:ORG/NAME, a URL, or a mapping with url, revision and dtype.")
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
    given = {field: options[option] for option, field in OPTIONS.items() if options.get(option) is not None}
    if "labels" in given:
        there = fields.get("labels")
        given["labels"] = (there if isinstance(there, dict) else {}) | dict(given["labels"])
    fields |= given
    if "name" not in fields:
        raise UsageError("Which name? hearth deploy NAME --source DIR|hf:ORG/NAME")
    if not source.get("url"):
        raise UsageError("From where? Add --source DIR, hf:ORG/NAME or a URL such as s3://BUCKET/MODEL")
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
    facts = described_checkpoint(record.checkpoint) if record.checkpoint else "imported on its first request"
    return f"{record.spec.name} is {record.state.value}: {facts}"


def described_checkpoint(found: Checkpoint) -> str:
    """`LlamaForCausalLM, 1.1 B parameters, bfloat16, 2.05 GiB`."""
    return f"{found.architecture}, {parameters(found.parameters)} parameters, {found.dtype}, {size(found.weight_bytes)}"


def parameters(count: int) -> str:
    """A number of parameters for people: 4.2 M, 1.1 B."""
    for unit, one in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return str(count)


async def follow(client: Client, spec: DeploymentSpec) -> DeploymentRecord:
    """Deploy, and show meanwhile how far it is."""
    with Bars(spec.name) as bars:
        async for item in client.deploy(spec):
            if isinstance(item, DeploymentRecord):
                return item
            bars.show(spec.name, item)
    raise ClientError("The gateway ended its answer before the deployment was ready.")


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
