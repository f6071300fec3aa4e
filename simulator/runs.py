"""One run from words to figures: profile + workload + deployments + policy + seed; several of them on two processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final

import msgspec

from shared.errors import Code, HearthError
from simulator.fleet.fleet import Fleet
from simulator.fleet.model import Faults, Hardware, ModelSpec, Options, Policy
from simulator.profiles.profile import DEFAULT, Profile, ServedModel, read
from simulator.report.figures import Figures, of
from simulator.workload.named import NAMES, Wish, make
from simulator.workload.trace import Realised, Trace

MOST_PROCESSES: Final = 2
MOST_DEPLOYMENTS: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that a run is a function of.

    `deployments` is a number (of `model`, or of the profile's first) or a list such as "opt-6.7b:32,opt-13b:16". A
    user's trace brings its own deployments: each runs the profile's model of its name (up to a slash), else `model`.
    What is None or "" is as the profile has it. `max_replicas` 0 is as many as there are devices for. Requests of the
    first `warm_up_s` seconds are served but not counted.
    """

    profile: str = DEFAULT
    wish: Wish = field(default_factory=Wish)
    deployments: str = "32"
    model: str = ""
    policy: str = Policy.HEARTH.value
    seed: int = 1
    servers: int | None = None
    devices: int = 0
    dram_bytes: int | None = None
    ssd_bytes: int | None = None
    target_concurrency: int = 4
    max_replicas: int = 0
    keep_alive_s: float = 60.0
    adaptive_keep_alive: bool = False
    time_limit_s: float = 300.0
    warm_up_s: float = 0.0
    sample_s: float = 10.0
    faults: Faults = field(default_factory=Faults)


@dataclass(frozen=True)
class World:
    """What a setting means: machines, deployments, requests."""

    profile: Profile
    hardware: Hardware
    specs: tuple[ModelSpec, ...]
    trace: Trace


@dataclass(frozen=True)
class Run:
    """A setting, what the workload really was, and what came of it."""

    setting: Setting
    figures: Figures
    realised: Realised
    trace_digest: str


@lru_cache(maxsize=8)
def profile_of(name: str) -> Profile:
    """A profile, read once."""
    return read(name)


def world(setting: Setting) -> World:
    """Raises HearthError: INVALID_REQUEST for what cannot be."""
    profile = profile_of(setting.profile)
    hardware = profile.hardware(
        servers=setting.servers,
        dram_bytes=setting.dram_bytes,
        ssd_bytes=setting.ssd_bytes,
        devices=setting.devices,
    )
    own = setting.wish.workload not in NAMES
    if own:
        trace = make(setting.wish, (), setting.seed)
        served = [_served_as(name, setting, profile) for name in trace.names]
        names = list(trace.names)
    else:
        named = list(deployments(setting.deployments, setting.model, profile))
        names, served = [name for name, _ in named], [model for _, model in named]
        trace = make(setting.wish, names, setting.seed)
    specs = tuple(_spec(name, model, setting, hardware) for name, model in zip(names, served, strict=True))
    return World(profile, hardware, specs, trace.for_models(specs))


def deployments(text: str, model: str, profile: Profile) -> Iterator[tuple[str, ServedModel]]:
    """(name, model) of every deployment that `text` asks for. Raises HearthError: INVALID_REQUEST."""
    total = 0
    for part in text.split(","):
        name, colon, number = part.strip().rpartition(":")
        if not colon:
            name = model or next(iter(profile.models))
        if not number.isdigit() or int(number) < 1:
            raise HearthError(
                Code.INVALID_REQUEST,
                f"{part!r} is neither a number of deployments nor MODEL:NUMBER, such as opt-13b:16.",
            )
        total += int(number)
        if total > MOST_DEPLOYMENTS:
            raise HearthError(Code.INVALID_REQUEST, f"More than {MOST_DEPLOYMENTS} deployments are too many.")
        served = profile.model(name)
        width = len(str(int(number) - 1))
        for index in range(int(number)):
            yield f"{name}-{index:0{width}}", served


def _served_as(name: str, setting: Setting, profile: Profile) -> ServedModel:
    known = name.split("/")[0]
    if known in profile.models:
        return profile.models[known]
    if setting.model:
        return profile.model(setting.model)
    raise HearthError(
        Code.INVALID_REQUEST,
        f"The trace's model {name!r} is none of the profile's ({', '.join(profile.models)}); say with --model which "
        "one stands for it.",
    )


def _spec(name: str, served: ServedModel, setting: Setting, hardware: Hardware) -> ModelSpec:
    places = sum(shape.devices // served.devices for shape in hardware.servers)
    if not places:
        raise HearthError(Code.INVALID_REQUEST, f"{name} needs {served.devices} devices, and no server has so many.")
    return ModelSpec(
        name=name,
        model=served.model,
        devices=served.devices,
        max_replicas=setting.max_replicas or places,
        target_concurrency=setting.target_concurrency,
        keep_alive_s=setting.keep_alive_s,
        adaptive_keep_alive=setting.adaptive_keep_alive,
    )


def run(setting: Setting) -> Run:
    """From words to figures. Raises what `world` raises, and `HearthError` if nothing would be counted."""
    duration_s = setting.wish.duration_s
    if duration_s is not None and setting.warm_up_s >= duration_s:
        raise HearthError(Code.INVALID_REQUEST, "The warm-up is as long as the workload: nothing would be counted.")
    made = world(setting)
    options = Options(time_limit_s=setting.time_limit_s, sample_s=setting.sample_s)
    fleet = Fleet(
        made.hardware,
        made.specs,
        made.trace.arrivals(),
        policy=Policy(setting.policy),
        seed=setting.seed,
        faults=setting.faults,
        options=options,
    )
    report = fleet.run()
    figures = of(report, made.hardware, made.specs, time_limit_s=setting.time_limit_s, warm_up_s=setting.warm_up_s)
    return Run(setting, figures, made.trace.realised(), made.trace.digest)


def run_all(settings: Sequence[Setting], *, processes: int = 1) -> Iterator[Run]:
    """The runs in the order of their settings, as they end; at most two processes. Raises what `run` raises."""
    processes = max(1, min(processes, MOST_PROCESSES, len(settings)))
    if processes == 1:
        yield from map(run, settings)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run, settings)


def with_seeds(setting: Setting, count: int) -> list[Setting]:
    """The same with so many seeds, from its own on."""
    return [replace(setting, seed=setting.seed + index) for index in range(count)]


def described(setting: Setting) -> dict[str, Any]:
    """A setting for JSON."""
    found: dict[str, Any] = msgspec.to_builtins(setting)
    return found
