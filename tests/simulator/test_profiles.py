"""Profiles: every number says where it comes from, and what is wrong with a bad one is said in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import HearthError
from simulator.profiles.profile import Figure, names, parse, read, written

SERVER = """
[[servers]]
count = { value = 2, from = "x" }
devices = { value = 1, from = "x" }
device_memory_bytes = { value = 10, from = "x" }
dram_bytes = { value = 10, from = "x" }
ssd_bytes = { value = 10, from = "x" }
ssd_bytes_per_s = { value = 1.5, from = "x" }
network_bytes_per_s = { value = 2, from = "y" }
"""
MODEL = """
[models."a/b"]
weight_bytes = { value = 5, from = "x" }
kv_bytes_per_token = { value = 1, from = "x" }
prefill_token_s = { value = 0.1, from = "x" }
step_s = { value = 0.1, from = "x" }
"""
HEAD = 'name = "n"\nabout = "a"\n'


def test_a_profile_is_machines_and_models() -> None:
    profile = parse(HEAD + SERVER + MODEL)

    assert profile.server_count == 2
    assert profile.hardware().servers[0].ssd_bytes_per_s == 1.5
    assert profile.model("a/b").model.weight_bytes == 5
    assert profile.model("a/b").devices == 1
    assert profile.origins["servers.0.network_bytes_per_s"] == "y"


def test_machines_can_be_other_than_the_profile_has_them() -> None:
    hardware = parse(HEAD + SERVER + MODEL).hardware(servers=5, dram_bytes=7, devices=3)

    assert [one.dram_bytes for one in hardware.servers] == [7] * 5
    assert hardware.devices == 15


@pytest.mark.parametrize("name", names())
def test_the_profiles_that_come_with_hearth_are_sound_and_every_number_has_an_origin(name: str) -> None:
    profile = read(name)

    assert profile.name == name
    assert profile.hardware().devices > 0
    assert len(profile.origins) >= 10
    assert all(len(origin) > 3 for origin in profile.origins.values())
    for served in profile.models.values():
        room = served.devices * profile.kinds[0].shape.device_memory_bytes
        assert served.model.weight_bytes < room, served.model.name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name = ", "is no TOML"),
        (HEAD, "needs at least one"),
        (HEAD + SERVER + MODEL + "[extras]\n", "a part 'extras'"),
        (HEAD + SERVER + MODEL.replace("step_s", "steps_s"), "'steps_s'; known are"),
        (HEAD + SERVER + MODEL.replace('step_s = { value = 0.1, from = "x" }', ""), "step_s is missing"),
        (
            HEAD + SERVER + MODEL.replace('step_s = { value = 0.1, from = "x" }', "step_s = 0.1"),
            "step_s must be { value",
        ),
        (HEAD + SERVER + MODEL.replace('value = 5, from = "x"', 'value = 5, from = " "'), "weight_bytes.from must be"),
        (HEAD + SERVER + MODEL.replace("value = 5,", "value = 5.5,"), "weight_bytes must be a whole number"),
        (HEAD + SERVER + MODEL.replace("value = 5,", "value = -5,"), "weight_bytes must be a number from 0 on"),
        (SERVER + MODEL, "name must be a string"),
    ],
)
def test_a_bad_profile_is_told_what_is_wrong(text: str, told: str) -> None:
    with pytest.raises(HearthError, match=told):
        parse(text)


def test_an_unknown_profile_or_model_is_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(HearthError, match=r"there are .*paper-a40"):
        read("paper-a4")
    with pytest.raises(HearthError, match="cannot be read"):
        read(str(tmp_path / "none.toml"))
    with pytest.raises(HearthError, match=r"it has opt-6\.7b"):
        read("paper-a40").model("gpt-5")


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    figures = {
        "count": 1, "devices": 1, "device_memory_bytes": 48e9, "dram_bytes": 1e9, "ssd_bytes": 1e9,
        "ssd_bytes_per_s": 2.1e9, "network_bytes_per_s": 1e9,
    }  # fmt: skip
    model = {"weight_bytes": 5e8, "kv_bytes_per_token": 1024, "prefill_token_s": 1e-3, "step_s": 0.02}
    path = tmp_path / "mine.toml"
    path.write_text(
        written(
            name="mine",
            about='a "quoted" machine',
            date="2024-01-01",
            machine="one",
            server={"device": "cpu"} | {key: Figure(value, "measured") for key, value in figures.items()},
            cluster={"bus_s": Figure(0.0002, "measured: over loopback")},
            models={"small": {key: Figure(value, "measured") for key, value in model.items()}},
        )
    )

    profile = read(str(path))

    assert (profile.name, profile.about, profile.date) == ("mine", 'a "quoted" machine', "2024-01-01")
    assert profile.hardware().bus_s == 0.0002
    assert profile.hardware().servers[0].device == "cpu"
    assert profile.model("small").model.step_s == 0.02
    assert profile.origins["cluster.bus_s"] == "measured: over loopback"
