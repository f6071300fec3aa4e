"""Who decides in a run: the production core as it is, or with another strategy; and what its servers keep. Pure."""

from __future__ import annotations

import dataclasses
import math

from services.scheduler.core import Core
from services.scheduler.rules import Rules
from simulator.fleet.baselines import Decide, RandomChoice, Shepherd, least_loaded
from simulator.fleet.model import Hardware, Policy
from simulator.kernel import Dice


def prepared(policy: Policy, hardware: Hardware) -> tuple[Hardware, str]:
    """The hardware as this policy finds it, and the tier in which its servers keep checkpoints ("": in none).

    Ray Serve downloads what it serves, to every server anew; with a local cache it finds on the SSD what it has had
    before. Neither knows of peers, or keeps anything in DRAM.
    """
    if policy in (Policy.RAY_SERVE, Policy.RAY_SERVE_CACHED):
        cold = dataclasses.replace(hardware, cold_ssd=True, peers=False)
        return cold, "" if policy is Policy.RAY_SERVE else "ssd"
    return hardware, "dram"


def core_of(policy: Policy, rules: Rules, term: int, dice: Dice) -> Core:
    """A scheduler's core that decides by this policy.

    The baselines have no time slices and bring nothing ahead of demand: these are Hearth's own ideas.
    """
    instance = f"l{term}x"
    if policy is Policy.HEARTH:
        return Core(rules, instance=instance)
    if policy is Policy.NO_MIGRATION:
        return Core(dataclasses.replace(rules, migrates=False), instance=instance)
    reactive = dataclasses.replace(rules, ahead=dataclasses.replace(rules.ahead, bytes_per_s=0.0))
    if policy is Policy.NO_PREFETCH:
        return Core(reactive, instance=instance)
    fairness = dataclasses.replace(rules.fairness, start_within_s=math.inf)
    plain = dataclasses.replace(reactive, migrates=False, fairness=fairness)
    return Core(plain, instance=instance, decide=_strategy(policy, dice))


def _strategy(policy: Policy, dice: Dice) -> Decide:
    match policy:
        case Policy.RANDOM:
            return RandomChoice(dice)
        case Policy.SHEPHERD:
            return Shepherd()
        case _:
            return least_loaded
