"""Command-line options that several of the simulator's verbs share, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from shared.errors import Code, HearthError
from shared.settings import SettingsError, parse_size
from simulator.fleet.model import Faults, Policy
from simulator.profiles.profile import DEFAULT
from simulator.runs import MOST_PROCESSES, Setting
from simulator.workload.named import NAMES, Wish

ALL: Final = "all"
ADAPTIVE: Final = "adaptive"
# What `--faults` brings, per hour over the whole fleet.
TROUBLE: Final = Faults(
    workers_per_h=6.0,
    servers_per_h=2.0,
    leader_per_h=4.0,
    redis_away_per_h=2.0,
    replica_failures=0.02,
    lost=0.01,
    late=0.02,
    stale_s=1.0,
)


def world_options(parser: argparse.ArgumentParser) -> None:
    """Machines and deployments."""
    parser.add_argument(
        "--profile", metavar="NAME|FILE", default=DEFAULT, help="machines and models (%(default)s): docs/simulator.md"
    )
    parser.add_argument(
        "--deployments",
        metavar="N|LIST",
        default="32",
        help="how many, or such as opt-6.7b:32,opt-13b:16 (%(default)s)",
    )
    parser.add_argument("--model", metavar="NAME", default="", help="the model of all of them (the profile's first)")
    parser.add_argument("--devices", metavar="N", type=positive, default=0, help="devices per server (the profile's)")
    parser.add_argument("--ssd", metavar="SIZE", type=size_of, help="SSD tier per server, such as 2TiB (the profile's)")
    parser.add_argument(
        "--concurrency",
        metavar="N",
        type=positive,
        default=4,
        help="requests that a replica runs at once (%(default)s)",
    )
    parser.add_argument(
        "--max-replicas", metavar="N", type=positive, default=0, help="of one deployment (as many as devices)"
    )
    parser.add_argument(
        "--keep-alive", metavar="SECONDS|adaptive", default="60", help="how long an idle replica stays (%(default)s)"
    )
    parser.add_argument(
        "--time-limit", metavar="SECONDS", type=_seconds, default=300.0, help="a request fails after that (%(default)s)"
    )


def workload_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Who asks for what and when; the workload itself is the option `name`."""
    parser.add_argument(
        name, dest="workload", metavar="NAME|FILE", default="gamma",
        help=f"{', '.join(NAMES)}, or a CSV file at_s,model,prompt_tokens,output_tokens (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--rate", metavar="R", type=float, help="requests per second (1; traces: as recorded)")
    parser.add_argument("--duration", metavar="SECONDS", type=_seconds, help="of the workload (3600; LLM traces: all)")
    parser.add_argument("--cv", metavar="X", type=float, default=8.0, help="of gamma's intervals (%(default)s)")
    parser.add_argument(
        "--warm-up", metavar="SECONDS", type=_seconds, default=0.0, help="requests of that time are not counted (0)"
    )
    parser.add_argument(
        "--popularity", metavar="P", default="zipf:1", help="uniform, zipf:EXPONENT or azure (%(default)s)"
    )
    parser.add_argument("--lengths", metavar="L", default="", help="gsm8k, sharegpt, azure-code, azure-conv (its own)")
    parser.add_argument("--from", dest="from_s", metavar="SECONDS", type=_seconds, default=0.0, help="into the day (0)")


def run_options(parser: argparse.ArgumentParser, seeds: int) -> None:
    """Seeds and processes."""
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="the first seed (%(default)s)")
    parser.add_argument("--seeds", metavar="N", type=positive, default=seeds, help="how many (%(default)s)")
    parser.add_argument(
        "--processes", metavar="N", type=positive, default=1,
        help=f"runs at the same time, at most {MOST_PROCESSES} (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--faults", action="store_true", help="with crashes, lost and late messages, stale records")
    parser.add_argument(
        "--json", metavar="FILE", help="write everything as JSON (- : to standard output, nothing else)"
    )


def setting_of(options: argparse.Namespace) -> Setting:
    """The setting that was asked for. Raises HearthError: INVALID_REQUEST."""
    adaptive = options.keep_alive == ADAPTIVE
    try:
        keep_alive_s = Setting.keep_alive_s if adaptive else _seconds(options.keep_alive)
    except argparse.ArgumentTypeError as error:
        raise HearthError(Code.INVALID_REQUEST, f"--keep-alive: {error}.") from error
    if options.seed < 0:
        raise HearthError(Code.INVALID_REQUEST, "A seed is a whole number from 0 on.")
    return Setting(
        profile=options.profile,
        wish=Wish(
            workload=options.workload,
            rate=options.rate,
            duration_s=options.duration,
            cv=options.cv,
            popularity=options.popularity,
            lengths=options.lengths,
            from_s=options.from_s,
        ),
        deployments=options.deployments,
        model=options.model,
        seed=options.seed,
        devices=options.devices,
        ssd_bytes=options.ssd,
        target_concurrency=options.concurrency,
        max_replicas=options.max_replicas,
        keep_alive_s=keep_alive_s,
        adaptive_keep_alive=adaptive,
        time_limit_s=options.time_limit,
        warm_up_s=options.warm_up,
        faults=TROUBLE if options.faults else Faults(),
    )


def policies(text: str) -> Sequence[str]:
    """The policies of a list, or all. Raises HearthError: INVALID_REQUEST."""
    known = [policy.value for policy in Policy]
    chosen = known if text == ALL else [one.strip() for one in text.split(",")]
    for one in chosen:
        if one not in known:
            raise HearthError(
                Code.INVALID_REQUEST, f"There is no policy {one!r}; there are {', '.join(known)}, or all."
            )
    return chosen


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text.removesuffix("s"))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return number


def size_of(text: str) -> int:
    """Bytes from a text such as 256GiB, for argparse."""
    try:
        return parse_size(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
