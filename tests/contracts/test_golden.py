"""Golden bytes: what was once on the wire is decoded for ever.

`golden.json` holds, for every message and record, the bytes of its example when it was first committed. A message may
only gain fields with defaults, so old bytes must still decode, to the example or (where fields were added since) to the
example with those fields at their defaults. Write new messages with `python -m tests.contracts.golden`.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import msgpack
import msgspec
import pytest

from shared import codec, subjects
from shared.contracts import events, generation, migration, placement, records, requests, residency
from shared.errors import Failure
from tests.contracts.examples import EXAMPLES

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
BY_NAME = {type(example).__name__: example for example in EXAMPLES}
# Parts of others, or never on the bus by themselves.
INLINE = {"Kind", "DeploymentSpec", "ClusterView", "Parts", "CandidateView", "DecisionView"}


def wire_types() -> list[type[msgspec.Struct]]:
    found: list[type[msgspec.Struct]] = [Failure]
    for module in (requests, generation, migration, residency, placement, records, events):
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__:
                found.append(kind)
    return found


@pytest.mark.parametrize("kind", [k for k in wire_types() if k.__struct_config__.tag], ids=lambda k: k.__name__)
def test_every_tagged_message_has_an_example_with_all_fields_set(kind: type[msgspec.Struct]) -> None:
    example = BY_NAME[kind.__name__]
    for field in msgspec.structs.fields(kind):
        if not field.required and field.name not in ("usage", "ledger"):
            assert getattr(example, field.name) != field.default, field.name
            assert getattr(example, field.name) not in ({}, ()), field.name


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_message_survives_the_wire(name: str) -> None:
    example = BY_NAME[name]
    assert codec.decode(codec.encode(example), type(example)) == example


def assert_understood(decoded: object, example: object, default: object, path: str) -> None:
    """The decoded value is the example's; fields added since are at their defaults."""
    if isinstance(decoded, msgspec.Struct) and type(decoded) is type(example):
        for field in msgspec.structs.fields(type(decoded)):
            mine, theirs = getattr(decoded, field.name), getattr(example, field.name)
            default = field.default
            if field.default_factory is not msgspec.NODEFAULT:
                default = field.default_factory()
            assert_understood(mine, theirs, default, f"{path}.{field.name}")
    else:
        assert decoded in (example, default), path


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_bytes_are_still_understood(name: str) -> None:
    example = BY_NAME[name]
    assert_understood(codec.decode(bytes.fromhex(GOLDEN[name]), type(example)), example, None, name)


def test_every_message_has_golden_bytes() -> None:
    assert set(GOLDEN) == set(BY_NAME)


def test_every_conversation_carries_messages_with_golden_bytes() -> None:
    for line in subjects.CONVERSATIONS:
        kinds = (line.request, *line.replies) if isinstance(line, subjects.Endpoint) else (line.message,)
        for kind in kinds:
            assert kind.__name__ in GOLDEN


def test_unknown_fields_of_a_newer_version_are_ignored() -> None:
    data = codec.encode(requests.Demand(deployment="m"))
    wider = codec.decode_any(data) | {"added_later": 1}
    assert codec.decode(msgpack.packb(wider), requests.Demand) == requests.Demand(deployment="m")


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01\x02", codec.encode(requests.Gone(reason="x")), b"\x81\xa1a"])
def test_bytes_that_are_no_such_message_are_refused(data: bytes) -> None:
    with pytest.raises(codec.CodecError):
        codec.decode(data, requests.Claim)
