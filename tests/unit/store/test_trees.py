"""Which reader a source's url gets, and that the operator's list is asked first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.store.object_tree import ObjectTree
from services.store.remote_config import decode_remote_config
from services.store.trees import TreeConfig, open_tree, open_writer
from shared.errors import Code, HearthError
from tests.builders.hub import COMMIT, FakeHub
from tests.builders.s3 import S3Server
from tests.unit.store.sources import make_source


def config(sources: str, s3: S3Server | None = None, hub: FakeHub | None = None) -> TreeConfig:
    table = {"s3://": s3.options} if s3 else {}
    remote = decode_remote_config(json.dumps(table).encode())
    return TreeConfig.of(sources, remote, connections=2, hub_endpoint=hub.endpoint if hub else None)


def test_each_kind_of_source_is_opened(tmp_path: Path) -> None:
    with S3Server(tmp_path) as s3, FakeHub(tmp_path / "models" / "a") as hub:
        make_source(s3.bucket() / "a")
        trees = config(f"{tmp_path}/*,s3://models/*,hf:org/*,http://127.0.0.1/*", s3, hub)
        names = {path.name for path in (tmp_path / "models" / "a").iterdir()}
        opened = [
            open_tree(url, None, trees)
            for url in (f"{tmp_path}/models/a/", f"file://{tmp_path}/models//a", "s3://models/a/", "hf:org/name")
        ]
        for tree in opened:
            assert set(tree.files) == names
            assert tree.read_small("tokenizer.json", 100) == b'{"version": "1.0"}'
        assert [tree.url for tree in opened[1:]] == [f"{tmp_path}/models/a", "s3://models/a", "hf:org/name"]
        assert [tree.remote for tree in opened] == [False, False, True, True]
        assert opened[0].revision == opened[1].revision
        assert open_tree("hf:org/name", COMMIT, trees).revision == COMMIT
        for tree in opened:
            assert open_tree(tree.url, tree.revision, trees).revision == tree.revision
            tree.close()
            with pytest.raises(HearthError) as refused:
                tree.read_small("tokenizer.json", 100)
            assert refused.value.failure.code is Code.DRAINING
        for url in (f"{tmp_path}/models/a", "s3://models/a"):
            with pytest.raises(HearthError, match="has no revision 'old'; it is at") as refused:
                open_tree(url, "old", trees)
            assert refused.value.failure.code is Code.NOT_FOUND


@pytest.mark.parametrize("url", ["s3://other/a", "hf:other/name", "https://host/a", "/etc", "s3://models"])
def test_what_is_not_on_the_list_is_not_even_asked_for(url: str, tmp_path: Path) -> None:
    trees = config(f"{tmp_path}/*,s3://models/*,hf:org/*")
    for opening in (lambda: open_tree(url, None, trees), lambda: open_writer(url, trees)):
        with pytest.raises(HearthError) as refused:
            opening()
        assert refused.value.failure.code in {Code.FORBIDDEN, Code.UNSUPPORTED}
    with pytest.raises(HearthError, match=r"is not among the allowed sources \(HEARTH_SOURCES\)"):
        open_tree(url, None, trees)


def test_a_link_that_leaves_the_allowed_directories_is_refused(tmp_path: Path) -> None:
    make_source(tmp_path / "outside" / "a")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a").symlink_to(tmp_path / "outside" / "a")
    (tmp_path / "inside" / "up").symlink_to(tmp_path / "outside")
    trees = config(f"{tmp_path}/inside/*")
    for url in (f"{tmp_path}/inside/a", f"{tmp_path}/inside/up/a"):
        with pytest.raises(HearthError, match="leads to a directory that is not among") as refused:
            open_tree(url, None, trees)
        assert refused.value.failure.code is Code.FORBIDDEN
        with pytest.raises(HearthError, match="leads to a directory"):
            open_writer(url, trees)
    assert open_tree(f"{tmp_path}/inside/a", None, config(f"{tmp_path}/*")).files
    with pytest.raises(HearthError, match="does not exist on this server"):
        open_tree(f"{tmp_path}/inside/nothing", None, trees)


def test_an_export_can_be_opened_as_a_source(tmp_path: Path) -> None:
    with S3Server(tmp_path / "s3") as s3:
        s3.bucket()
        trees = config(f"{tmp_path}/*,s3://models/*", s3)
        for url in (f"{tmp_path}/out", "s3://models/out"):
            writer = open_writer(url, trees)
            writer.put("hearth.json", b"{}")
            writer.put("config.json", b"[]")
            assert set(open_tree(url, None, trees).files) == {"config.json"}
            writer.finish()
            assert open_tree(url, None, trees).read_small("hearth.json", 2) == b"{}"
        assert isinstance(open_tree("s3://models/out", None, trees), ObjectTree)
    for url in ("hf:org/name", "https://host/a"):
        with pytest.raises(HearthError, match="takes no exports") as refused:
            open_writer(url, trees)
        assert refused.value.failure.code is Code.UNSUPPORTED
