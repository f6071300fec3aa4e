"""Settings: every variable known, typed, described; a typo is an error."""

from __future__ import annotations

import pytest

from shared.settings import (
    SERVICES,
    GatewaySettings,
    SettingsError,
    StoreSettings,
    WorkerSettings,
    fields,
    load,
    parse_size,
)


def test_defaults_without_environment() -> None:
    settings = load(GatewaySettings, {})
    assert settings.http_port == 8080
    assert settings.nats_url.startswith("nats://")


def test_values_are_converted_to_their_types() -> None:
    settings = load(
        StoreSettings,
        {"HEARTH_DRAM_BYTES": "1024", "HEARTH_VERIFY_LOADS": "false", "HEARTH_SERVER_ID": "a1", "PATH": "x"},
    )
    assert (settings.dram_bytes, settings.verify_loads, settings.own_id) == (1024, False, "a1")


def test_bytes_may_have_units() -> None:
    settings = load(StoreSettings, {"HEARTH_DRAM_BYTES": "1.5GiB", "HEARTH_SSD_BYTES": "20GB"})
    assert (settings.dram_bytes, settings.ssd_bytes) == (3 * 2**29, 20 * 10**9)
    with pytest.raises(SettingsError, match=r"HEARTH_DRAM_BYTES='much' is malformed: 'much' is no size"):
        load(StoreSettings, {"HEARTH_DRAM_BYTES": "much"})


def test_labels_are_checked_where_they_are_read() -> None:
    for kind in (WorkerSettings, StoreSettings):
        assert load(kind, {"HEARTH_LABELS": "gpu=a40,zone=b"}) == kind(labels="gpu=a40,zone=b")
        with pytest.raises(SettingsError, match="HEARTH_LABELS='gpu' is malformed: labels: 'gpu' is no KEY=VALUE"):
            load(kind, {"HEARTH_LABELS": "gpu"})


def test_every_fault_is_named() -> None:
    with pytest.raises(SettingsError) as caught:
        load(
            GatewaySettings,
            {"HEARTH_HTTP_PORT": "99999", "HEARTH_HTTP_PROT": "1", "HEARTH_LOG_LEVEL": "loud", "HEARTH_DRAIN_S": "-1"},
        )
    text = str(caught.value)
    for name in ("HEARTH_HTTP_PORT", "HEARTH_HTTP_PROT", "HEARTH_LOG_LEVEL", "HEARTH_DRAIN_S"):
        assert name in text


def test_an_id_must_fit_into_a_subject() -> None:
    with pytest.raises(SettingsError):
        load(WorkerSettings, {"HEARTH_WORKER_ID": "a.b"})


def test_the_settings_of_other_services_are_known() -> None:
    assert load(GatewaySettings, {"HEARTH_DRAM_BYTES": "1", "HEARTH_DEVICE": "cpu"}) == GatewaySettings()


def test_every_setting_is_described() -> None:
    for kind in SERVICES.values():
        for name, _, description in fields(kind):
            assert description, name


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("1KiB", 1024),
        ("512MiB", 2**29),
        ("2G", 2**31),
        ("1GB", 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("7b", 7),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1", "1 apple", "1.2.3M"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_size(text)
