"""What can be typed: the verbs, their options, and which function runs each of them.

Only `argparse` and the standard library are imported here; a verb's own module is imported when the verb runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

VERSION: Final = "0.1.0"
DEFAULT_URL: Final = "http://127.0.0.1:8080"
SERVICES: Final = {
    "gateway": "the HTTP front: OpenAI's API, admission, the authority on what clients have been sent",
    "scheduler": "decides where models are loaded and when replicas leave",
    "worker": "owns a device and runs replicas of models",
    "store": "keeps checkpoints in the tiers of one server",
}

# Run by the package `simulator`, which reads its own options.
SIMULATOR: Final = {
    "simulate": "run a modelled fleet in virtual time: what users would see of a policy, a workload, machines",
    "plan": "find how many servers and how much DRAM a workload needs",
    "profile": "measure this machine for the simulator",
}

SOURCE_HELP: Final = (
    "a directory, hf:ORG/NAME, or a URL (s3://, gs://, az://, https://, http://, file://), "
    "in Hugging Face's form or in Hearth's"
)
DRAIN_S: Final = 300.0
MOST_DECISIONS: Final = 64
DTYPES: Final = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Verb:
    """One parsed command line: run `function` of `module` with the options."""

    module: str
    function: str
    options: argparse.Namespace

    def run(self) -> int:
        """Import the verb's module and run it; its exit code."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing.split(".")[0] in {"services", "shared"}:
                raise
            print(
                f"hearth: the Python package {missing!r} is not installed here; ./hearth installs everything, "
                "pip install -e '.[store,worker]' does as well.",
                file=sys.stderr,
            )
            return 1
        function = cast(Callable[[argparse.Namespace], int], getattr(module, self.function))
        return function(self.options)


def _size(text: str) -> int:
    from shared.settings import SettingsError, parse_size

    try:
        return parse_size(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return number


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port (1 to 65535)")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text[:-1] if text.endswith("s") else text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return number


def _last(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= MOST_DECISIONS):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {MOST_DECISIONS}")
    return int(text)


def _label(text: str) -> tuple[str, str]:
    from shared.errors import HearthError
    from shared.labels import parse_labels

    try:
        ((key, value),) = parse_labels(text).items()
    except (HearthError, ValueError) as error:
        sentence = str(error) if isinstance(error, HearthError) else f"{text!r} is not one KEY=VALUE"
        raise argparse.ArgumentTypeError(sentence) from error
    return key, value


def _client(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default=os.environ.get("HEARTH_URL") or DEFAULT_URL,
        help="the gateway (default: HEARTH_URL, else %(default)s)",
    )


def _data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        default=Path(os.environ.get("HEARTH_DATA_DIR") or ".hearth"),
        help="where the cluster keeps its data (default: HEARTH_DATA_DIR, else .hearth)",
    )


def _up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--demo", action="store_true", help="deploy the demo model, so that something answers at once")
    parser.add_argument(
        "--servers", metavar="N", type=_positive, default=1, help="servers, each with its own store (1)"
    )
    parser.add_argument(
        "--workers-per-server", "--workers", metavar="M", type=_positive, default=1, help="workers on each (1)"
    )
    parser.add_argument(
        "--schedulers", metavar="N", type=_positive, default=1, help="schedulers: one leads, the others stand by (1)"
    )
    parser.add_argument("--port", type=_port, default=8080, help="port of the HTTP API (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address of the HTTP API (%(default)s: this machine only)")
    parser.add_argument("--dram", metavar="SIZE", type=_size, help="DRAM tier of each server, such as 512MiB or 4GiB")
    parser.add_argument("--ssd", metavar="SIZE", type=_size, help="SSD tier of each server, such as 50GiB")
    parser.add_argument("--nats-port", type=_port, help="port of NATS (any free one)")
    parser.add_argument("--redis-port", type=_port, help="port of Redis (any free one)")
    parser.add_argument("--verbose", action="store_true", help="show every log line")
    _data_dir(parser)


def _deploy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="what clients will call the model")
    parser.add_argument("-f", "--file", metavar="YAML", help="read the deployment from a file (- : standard input)")
    parser.add_argument("--source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--revision", help="revision of a hub repository")
    parser.add_argument("--dtype", choices=DTYPES, help="convert the parameters")
    parser.add_argument("--min-replicas", metavar="N", type=int, help="replicas kept even when nobody asks (0)")
    parser.add_argument("--max-replicas", metavar="N", type=_positive, help="replicas at most (1)")
    parser.add_argument(
        "--target-concurrency", metavar="N", type=_positive, help="requests that one replica runs at once"
    )
    parser.add_argument("--keep-alive", metavar="SECONDS", type=_seconds, help="how long an idle replica stays (60)")
    parser.add_argument(
        "--adaptive-keep-alive",
        action="store_true",
        default=None,
        help="learn that from the times between requests; --keep-alive is then the most",
    )
    parser.add_argument(
        "--priority", metavar="N", type=int, help="where resources are short, the higher go first: -100 to 100 (0)"
    )
    parser.add_argument("--devices", metavar="N", type=_positive, help="devices of one server that a replica takes (1)")
    parser.add_argument(
        "--label",
        metavar="KEY=VALUE",
        type=_label,
        action="append",
        dest="labels",
        help="only on servers or workers that carry it (HEARTH_LABELS); may be repeated",
    )
    parser.add_argument("--max-context", metavar="TOKENS", type=_positive, help="longest prompt + answer in tokens")
    parser.add_argument("--queue-limit", metavar="N", type=_positive, help="requests outstanding at most (1024)")
    parser.add_argument("--lazy", action="store_true", default=None, help="import the model on its first request")
    parser.add_argument("--json", action="store_true", help="print the deployment as JSON")
    _client(parser)


def _ps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the cluster view as JSON")
    parser.add_argument("--watch", action="store_true", help="keep showing it until Ctrl-C")
    _client(parser)


def _requests(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    _client(parser)


def _migrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request", help="its id or the beginning of it (hearth requests); of a call with n: all")
    parser.add_argument("--to", metavar="WORKER", help="where to (the scheduler chooses)")
    parser.add_argument("--json", action="store_true", help="print how it ended as JSON")
    _client(parser)


def _drain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="WORKER|SERVER", help="its id or the beginning of it; a server: all workers")
    parser.add_argument("--undo", action="store_true", help="take work again")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=DRAIN_S,
        help=f"give up waiting after so long; 0: do not wait ({DRAIN_S:.0f})",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    _client(parser)


def _explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        metavar="DEPLOYMENT|REQUEST",
        help="a deployment's name, or a request's id or the beginning of it (the last decisions about anything)",
    )
    parser.add_argument("--last", metavar="N", type=_last, default=5, help="so many decisions, 1 to 64 (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    _client(parser)


def _delete(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="the deployment's name")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    _client(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="the deployment's name")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--max-tokens", metavar="N", type=_positive, help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    _client(parser)


def _tap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subjects", nargs="*", default=[">"], help="subjects to show, * and > as in NATS (all)")
    parser.add_argument("--payloads", action="store_true", help="show prompts, texts and tokens, which belong to users")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    _data_dir(parser)


def _test(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rest",
        nargs=argparse.REMAINDER,
        metavar="[lint|unit|contracts|simulator|integration|e2e] …",
        help="one part only (all of them); what follows goes to pytest",
    )


def _simulator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="…", help="see --help of this verb")


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("service", nargs="?", choices=tuple(SERVICES), help="only the variables of this service")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.add_argument("--markdown", action="store_true", help="print all of them as docs/configuration.md holds them")


def _tier(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--tier", choices=("dram", "ssd"), default="dram", help=f"{text} (%(default)s)")


def _on_server(parser: argparse.ArgumentParser, *, every: str = "") -> None:
    also = f", or all ({every})" if every else ""
    parser.add_argument("--server", metavar="ID", help=f"the server{also}; may be left out if there is only one")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    _client(parser)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="its id, the beginning of it, or the name of a deployment that uses it")


def _store_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=SOURCE_HELP)
    parser.add_argument("--revision", help="revision of a hub repository")
    parser.add_argument("--dtype", choices=DTYPES, help="convert the parameters")
    _on_server(parser, every="each imports for itself")


def _store_ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", metavar="ID", help="only this server (all)")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    _client(parser)


def _store_verify(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    _on_server(parser)


def _store_evict(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    _tier(parser, "where from; ssd implies dram")
    _on_server(parser)


def _store_pin(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    _tier(parser, "where to keep it; dram implies ssd")
    _on_server(parser)


def _store_prefetch(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    _tier(parser, "where to")
    _on_server(parser)


def _store_export(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    parser.add_argument("to", metavar="DIR|URL", help="an empty directory of the server, or one of an object store")
    _on_server(parser)


def _store_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="…", help="see hearth store bench --help")


STORE_ACTIONS: Final[tuple[tuple[str, str, str, Callable[[argparse.ArgumentParser], None]], ...]] = (
    ("ls", "list the checkpoints, and which part of them is in which tier", "ls", _store_ls),
    ("import", "bring a checkpoint into the SSD tier", "bring_in", _store_import),
    ("prefetch", "bring a checkpoint into a tier ahead of demand", "prefetch", _store_prefetch),
    ("pin", "never evict a checkpoint", "pin", _store_pin),
    ("unpin", "allow a checkpoint to be evicted again", "unpin", _store_verify),
    ("evict", "take a checkpoint out of a tier", "evict", _store_evict),
    ("verify", "compare every chunk with its checksum, and repair what differs", "verify", _store_verify),
    ("export", "copy a checkpoint somewhere else, in Hearth's form", "export", _store_export),
    ("bench", "measure this machine's disk, without a cluster", "bench", _store_bench),
)


def _store(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Without an action: run this service alone. With one: work on the checkpoints in the tiers of a running "
        "cluster's servers."
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", title="actions")
    for name, text, function, options in STORE_ACTIONS:
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        action.set_defaults(module="services.cli.store", function=function)
        options(action)


def _nothing(parser: argparse.ArgumentParser) -> None:
    return None


VERBS: Final[tuple[tuple[str, str, str, str, Callable[[argparse.ArgumentParser], None]], ...]] = (
    ("up", "run a whole cluster on this machine", "services.cli.up", "up", _up),
    ("deploy", "make a model answer under a name", "services.cli.deploy", "deploy", _deploy),
    ("ps", "show servers, workers, replicas, deployments and what is resident where", "services.cli.ps", "ps", _ps),
    (
        "explain",
        "show why a model was loaded where it was, or what became of a request",
        "services.cli.explain",
        "explain",
        _explain,
    ),
    ("requests", "show the requests that run, and where", "services.cli.moves", "requests", _requests),
    ("migrate", "move a running request to another worker", "services.cli.moves", "migrate", _migrate),
    ("drain", "let everything move away from a worker or server", "services.cli.moves", "drain", _drain),
    ("delete", "remove a deployment", "services.cli.deploy", "delete", _delete),
    ("chat", "talk to a deployment", "services.cli.chat", "chat", _chat),
    ("tap", "show the traffic on the bus, decoded", "services.cli.tap", "tap", _tap),
    *((name, text, "services.cli.simulate", "simulate", _simulator) for name, text in SIMULATOR.items()),
    ("test", "run the linters and the tests", "services.cli.checks", "test", _test),
    (
        "settings",
        "list every environment variable with unit and default",
        "services.cli.settings",
        "settings",
        _settings,
    ),
    *(
        (
            name,
            f"run this service alone: {text}" + ("; or work on checkpoints" if name == "store" else ""),
            "services.cli.alone",
            "alone",
            _store if name == "store" else _nothing,
        )
        for name, text in SERVICES.items()
    ),
)


def build() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="hearth",
        description="Serverless inference for large language models.",
        epilog="First steps:  hearth up --demo   and, in another terminal,   hearth chat demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hearth {VERSION}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, title="verbs")
    for name, text, module, function, options in VERBS:
        verb = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        verb.set_defaults(verb=name, module=module, function=function)
        options(verb)
    return parser


def parse(arguments: list[str]) -> Verb:
    """The verb that was typed. Exits with 2 and a usage line for a wrong one, with 0 after `--help`."""
    # argparse's REMAINDER takes options only after a positional: `hearth test -k foo` is pytest's in any case.
    if arguments[:1] == ["test"] and arguments[1:2] not in (["-h"], ["--help"]):
        options = argparse.Namespace(verb="test", rest=arguments[1:])
        return Verb("services.cli.checks", "test", options)
    if arguments[:1] and arguments[0] in SIMULATOR:
        options = argparse.Namespace(verb=arguments[0], rest=arguments[1:])
        return Verb("services.cli.simulate", "simulate", options)
    if arguments[:2] == ["store", "bench"]:
        options = argparse.Namespace(verb="store", action="bench", rest=arguments[2:])
        return Verb("services.cli.store", "bench", options)
    parsed: Any = build().parse_args(arguments)
    return Verb(parsed.module, parsed.function, parsed)
