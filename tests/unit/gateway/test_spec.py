"""A deployment's options, as they come in JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.gateway.admin import check_spec, read_spec
from shared.contracts.records import DeploymentSpec
from shared.errors import Code, HearthError

SPEC = {"name": "org/m", "source": {"url": "/models/m"}}


def read(**more: Any) -> DeploymentSpec:
    return check_spec(read_spec(json.dumps({**SPEC, **more}).encode()))


def test_what_is_not_said_is_the_default() -> None:
    spec = read()
    assert (spec.priority, spec.devices, spec.labels, spec.adaptive_keep_alive) == (0, 1, {}, False)


def test_what_is_said_is_taken() -> None:
    spec = read(priority=-7, devices=4, labels={"gpu": "a40", "example.com/rack": ""}, adaptive_keep_alive=True)
    assert (spec.priority, spec.devices, spec.adaptive_keep_alive) == (-7, 4, True)
    assert spec.labels == {"gpu": "a40", "example.com/rack": ""}


@pytest.mark.parametrize(
    ("change", "param", "sentence"),
    [
        ({"priority": 101}, "priority", "between -100 and 100, not 101"),
        ({"priority": -101}, "priority", "between -100 and 100"),
        ({"priority": "high"}, "priority", "int"),
        ({"priority": 1.5}, "priority", "int"),
        ({"devices": 0}, "devices", "between 1 and 64, not 0"),
        ({"devices": 65}, "devices", "between 1 and 64"),
        ({"labels": "gpu=a40"}, "labels", "object"),
        ({"labels": ["gpu"]}, "labels", "object"),
        ({"labels": {"gpu": 1}}, "labels", "str"),
        ({"labels": {"": "x"}}, "labels", "'' is no key"),
        ({"labels": {"a": "b c"}}, "labels", "'b c' is no value of 'a'"),
        ({"labels": {f"k{number}": "" for number in range(17)}}, "labels", "not be more than 16, not 17"),
        ({"adaptive_keep_alive": "yes"}, "adaptive_keep_alive", "bool"),
        ({"label": {"a": "b"}}, "label", "Unknown field"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], param: str, sentence: str) -> None:
    with pytest.raises(HearthError) as caught:
        read(**change)
    failure = caught.value.failure
    assert failure.code is Code.INVALID_REQUEST
    assert (failure.param or "").startswith(param)
    assert sentence in failure.message
