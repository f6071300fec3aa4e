"""From a setting to machines, deployments and requests; the experiments have their places in the document."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shared.errors import HearthError
from simulator.experiments import EXPERIMENTS, MODELS, PAPER, Scale
from simulator.fleet.model import Policy
from simulator.profiles.profile import read
from simulator.report.tables import put
from simulator.runs import Setting, deployments, run, run_all, with_seeds, world
from simulator.simulate import digest
from simulator.workload.named import Wish

PLACEMENT = Path(__file__).parents[2] / "docs" / "placement.md"


def test_deployments_are_a_number_or_a_list_of_models() -> None:
    profile = read("paper-a40")

    some = [(name, served.model.name) for name, served in deployments("opt-13b:2,opt-30b:1", "", profile)]

    assert some == [("opt-13b-0", "opt-13b"), ("opt-13b-1", "opt-13b"), ("opt-30b-0", "opt-30b")]
    assert [name for name, _ in deployments("11", "opt-30b", profile)][::10] == ["opt-30b-00", "opt-30b-10"]
    assert next(deployments("1", "", profile))[0] == "opt-6.7b-0"


def test_a_deployment_may_have_as_many_replicas_as_there_are_places_for() -> None:
    setting = Setting(wish=Wish(duration_s=60.0), deployments="opt-6.7b:1,opt-30b:1", servers=3, devices=5)

    specs = world(setting).specs

    assert [(spec.devices, spec.max_replicas) for spec in specs] == [(1, 15), (2, 6)]


def test_a_users_deployments_run_the_model_of_their_name_or_the_one_that_stands_for_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("at_s,model,prompt_tokens,output_tokens\n1,opt-13b/support,5,6\n2,ours,5,6\n")
    setting = Setting(wish=Wish(workload=str(path)), model="opt-30b")

    specs = world(setting).specs

    assert [(spec.name, spec.model.name, spec.devices) for spec in specs] == [
        ("opt-13b/support", "opt-13b", 1),
        ("ours", "opt-30b", 2),
    ]
    with pytest.raises(HearthError, match="'ours' is none of the profile's"):
        world(dataclasses.replace(setting, model=""))


def test_all_policies_of_a_seed_meet_the_same_requests() -> None:
    base = Setting(wish=Wish(rate=0.5, duration_s=60.0), deployments="4", servers=1)
    settings = [dataclasses.replace(base, policy=policy.value) for policy in (Policy.HEARTH, Policy.RAY_SERVE)]

    hearth, ray = run_all(settings)

    assert hearth.trace_digest == ray.trace_digest
    assert hearth.figures.numbers["requests"] == ray.figures.numbers["requests"] > 0
    assert digest([hearth]) != digest([ray])


def test_seeds_follow_each_other() -> None:
    assert [one.seed for one in with_seeds(Setting(seed=5), 3)] == [5, 6, 7]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_its_place_in_the_document(experiment: str) -> None:
    document = PLACEMENT.read_text(encoding="utf-8")

    assert "A TABLE" in put(document, f"experiment {experiment}", "A TABLE")


def test_the_papers_fleet_is_the_papers() -> None:
    counts = [
        len(world(dataclasses.replace(PAPER, deployments=one, wish=Wish(duration_s=60.0))).specs) for one in MODELS
    ]
    hardware = world(PAPER).hardware

    assert counts == [32, 16, 8]
    assert (len(hardware.servers), hardware.devices) == (4, 16)


def test_a_warm_up_that_leaves_nothing_to_count_is_refused() -> None:
    setting = Setting(wish=Wish(rate=1.0, duration_s=60.0), warm_up_s=60.0)
    with pytest.raises(HearthError, match="nothing would be counted"):
        run(setting)


def test_half_of_a_generated_workload_is_counted_however_long_it_is() -> None:
    assert Scale(duration_s=1800.0).warm_up_s == 900.0
    assert Scale(duration_s=300.0, quick=True).warm_up_s == 0.0
