"""Which server and which checkpoint somebody means, and how what a store holds is shown."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from services.cli.checkpoints import Meant, arrived, checkpoint_meant, held_table, servers_meant, shortened
from services.cli.client import ClientError
from shared.contracts.records import ClusterView
from shared.contracts.residency import HeldCheckpoint, Source
from tests.unit.cli.test_ps import CHECKPOINT, deployment, server

A, AB, B = "a" * 32, "ab" + "c" * 30, "b" * 32


def named(name: str, checkpoint_id: str | None) -> object:
    found = None if checkpoint_id is None else msgspec.structs.replace(CHECKPOINT, checkpoint_id=checkpoint_id)
    return deployment(name, found)


VIEW = ClusterView(
    servers=(server(2, ssd={B: 1}), server(1, ssd={A: 1, AB: 1})),
    deployments=(named("demo", AB), named("lazy", None), named("aa", B)),  # type: ignore[arg-type]
)
ONE = ClusterView(servers=VIEW.servers[1:])


def test_the_only_server_needs_no_name() -> None:
    assert [record.server_id for record in servers_meant(None, ONE, everywhere=False)] == ["server-1"]


@pytest.mark.parametrize(
    ("asked", "view", "everywhere", "says"),
    [
        (None, ClusterView(), False, r"No store runs\."),
        (None, VIEW, False, r"Which server\? Name one of server-1, server-2 with --server\."),
        (None, VIEW, True, r"with --server \(or --server all\)\."),
        ("server-9", VIEW, True, r"No server is called 'server-9'; there are: server-1, server-2\."),
        ("all", VIEW, False, r"No server is called 'all'; there are: server-1, server-2\."),
    ],
)
def test_otherwise_the_servers_are_listed(asked: str | None, view: ClusterView, everywhere: bool, says: str) -> None:
    with pytest.raises(ClientError, match=says):
        servers_meant(asked, view, everywhere=everywhere)


def test_a_server_by_name_and_all_of_them() -> None:
    assert [record.server_id for record in servers_meant("server-2", VIEW, everywhere=False)] == ["server-2"]
    assert [record.server_id for record in servers_meant("all", VIEW, everywhere=True)] == ["server-1", "server-2"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("demo", Meant(AB, "demo", Source(url="/m"))),
        ("aa", Meant(B, "aa", Source(url="/m"))),  # a name goes before the beginning of an id
        (A, Meant(A, A[:12])),
        ("aaa", Meant(A, A[:12])),
        ("ab", Meant(AB, AB[:12], Source(url="/m"))),
        (B[:5], Meant(B, B[:12], Source(url="/m"))),  # of a deployment, though this server has nothing of it
    ],
)
def test_a_checkpoint_by_name_id_or_the_beginning_of_one(text: str, found: Meant) -> None:
    assert checkpoint_meant(text, VIEW, VIEW.servers[1:]) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a", "'a' could be 2 checkpoints: aaaaaaaaaaaa, abcccccccccc"),
        ("f", "no checkpoint of server-1 has an id that begins so"),
        ("", "No deployment is called ''"),
        ("lazy", "lazy has not been imported yet; hearth store import /m does that"),
    ],
)
def test_what_is_not_clear_is_said(text: str, says: str) -> None:
    with pytest.raises(ClientError, match=says):
        checkpoint_meant(text, VIEW, VIEW.servers[1:])


def test_what_is_on_its_way_or_quarantined_can_be_named() -> None:
    arriving = msgspec.structs.replace(server(1, ssd={}), ssd_arriving={A: 1}, quarantined={B: "its bytes are gone"})
    view = ClusterView(servers=(arriving,))
    assert [checkpoint_meant(text, view, view.servers).checkpoint_id for text in ("a", "b")] == [A, B]


def shown(*held: HeldCheckpoint, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(held_table(server(1, ssd={}), held, VIEW.deployments, width))
    return out.getvalue()


HELD = HeldCheckpoint(
    checkpoint=msgspec.structs.replace(CHECKPOINT, checkpoint_id=AB), image_bytes=12 * 2**20, dram_bytes=12 * 2**20,
    ssd_bytes=5 * 2**20, leases=2, uses_per_hour=31.24, idle_s=42.0, bring_back_s=0.006,
    source=Source(url="/" + "x" * 100 + "/model"), pinned="ssd",
)  # fmt: skip


def test_a_checkpoint_in_two_lines() -> None:
    text = shown(HELD)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "server-1: 1 checkpoint · DRAM 0 B of 1 GiB · SSD 12 MiB of 1 TiB"
    assert lines[1].split() == ["id", "model", "size", "dram", "ssd", "leases", "uses/h", "idle", "back", "in"]
    assert lines[2].split() == [
        "abcccccccccc", "Llama", "float32", "12", "MiB", "100", "%", "41", "%", "2", "31.2", "42", "s", "6", "ms"
    ]  # fmt: skip
    assert lines[3].strip().endswith("xxx/model · demo · pinned in SSD")


def test_on_a_narrow_terminal_the_least_interesting_columns_are_left_out() -> None:
    long = msgspec.structs.replace(HELD, idle_s=115.0, uses_per_hour=0.678, source=None)
    lines = shown(long, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["id", "model", "size", "dram", "ssd", "leases", "idle", "back", "in"]
    assert lines[2].endswith("6 ms")


def test_one_that_is_quarantined_says_why() -> None:
    held = msgspec.structs.replace(HELD, quarantined="chunk 3 is corrupt", pinned="", idle_s=None, bring_back_s=None)
    lines = shown(held, width=160).splitlines()
    assert lines[4].strip() == "quarantined: chunk 3 is corrupt"
    assert lines[2].rstrip().endswith("–")


def test_nothing_is_said_in_words() -> None:
    assert "nothing yet (hearth store import" in shown()


def test_parts_and_sources() -> None:
    assert [arrived(done, 1000) for done in (0, 1, 999, 1000)] == ["–", "0 %", "99 %", "100 %"]
    assert shortened("hf:org/m") == "hf:org/m"
    assert shortened("/a/b/c/d", 5) == "…/c/d"
