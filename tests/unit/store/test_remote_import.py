"""Imports from the hub, object stores and web servers: the same checkpoint as from a directory, or a clear refusal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.store.ports import SourceTree
from services.store.remote_config import decode_remote_config
from services.store.tier import SsdTier
from services.store.trees import TreeConfig, open_tree
from shared.contracts.residency import Source
from shared.errors import Code, HearthError
from tests.builders.hub import COMMIT, FakeHub
from tests.builders.s3 import Fault, S3Server
from tests.unit.store.sources import LLAMA, Tensors, an_importer, make_source

CHUNK_BYTES = 2**20
LARGE: Tensors = {**LLAMA, "model.embed_tokens.weight": ("F32", (64, 32 * 1024)), "lm_head.weight": ("F32", (64, 8192))}
Opens = Callable[[Source], SourceTree]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def s3(server: S3Server) -> S3Server:
    server.fail()
    shutil.rmtree(server.bucket("models"))
    return server


@pytest.fixture
def repository(s3: S3Server) -> Path:
    made = s3.bucket("models") / "repository"
    made.mkdir()
    return made


@pytest.fixture
def hub(repository: Path, s3: S3Server) -> Iterator[FakeHub]:
    with FakeHub(repository, network=True) as server:
        yield server


@pytest.fixture
def opens(s3: S3Server, hub: FakeHub) -> Opens:
    options = {"s3://models": s3.options, s3.endpoint: {"client_options": {"allow_http": True}}}
    remote = decode_remote_config(json.dumps(options).encode())
    sources = f"{s3.root}/*,hf:org/*,s3://models/*,{s3.endpoint}/models/*"
    config = TreeConfig.of(sources, remote, connections=4, hub_endpoint=hub.endpoint)
    return lambda source: open_tree(source.url, source.revision, config)


def url_of(kind: str, s3: S3Server) -> str:
    return {"hub": "hf:org/name", "s3": "s3://models/repository", "web": f"{s3.endpoint}/models/repository"}[kind]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["hub", "s3", "web"])
def test_a_remote_source_becomes_the_checkpoint_that_its_files_would_be(
    opens: Opens, s3: S3Server, hub: FakeHub, repository: Path, tmp_path: Path, kind: str, shards: int
) -> None:
    make_source(repository, shards=shards)
    (repository / "pytorch_model.bin").write_bytes(b"x")
    (repository / "modeling.py").write_bytes(b"x")
    tier = SsdTier(tmp_path / "store")
    with an_importer(tier, open_tree=opens) as importer:
        source = Source(url=url_of(kind, s3))
        look = importer.look(source)
        assert look.architecture == "LlamaForCausalLM"
        assert (look.revision == COMMIT) == (kind == "hub")
        s3.fail(Fault("cut", times=3, key="safetensors", fraction=0.5), Fault("status", times=2, key="safetensors"))
        outcome = importer.run(source, progressed=lambda done, total: None)
        local = importer.run(Source(url=str(repository)), progressed=lambda done, total: None)
    assert outcome.stored.revision == look.revision
    assert outcome.stored.image_bytes == look.image_bytes
    assert outcome.stored.stored_bytes <= look.peak_bytes
    assert local.existing
    assert local.stored.id == outcome.stored.id
    fetched = [path for _, path, _, _ in hub.asked + hub.network_asked] + [one.key for one in s3.served("GET")]
    assert not [path for path in fetched if path.endswith((".bin", ".py", "tokenizer.model"))], (
        "only what is needed is downloaded"
    )
    assert os.listdir(tier.root / "incoming") == []


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        (Source(url="hf:org/unknown"), Code.NOT_FOUND, "no repository org/unknown"),
        (Source(url="hf:org/gated"), Code.FORBIDDEN, "gated"),
        (Source(url="hf:org/name", revision="nope"), Code.NOT_FOUND, "no revision 'nope'"),
        (Source(url="hf:other/name"), Code.FORBIDDEN, r"not among the allowed sources \(HEARTH_SOURCES\)"),
        (Source(url="s3://models/nothing"), Code.NOT_FOUND, "has no files"),
        (Source(url="s3://models/repository", revision="nope"), Code.NOT_FOUND, "no revision 'nope'"),
        (Source(url="s3://models/a/../repository"), Code.INVALID_REQUEST, r"\. or \.\."),
        (Source(url="s3://other/repository"), Code.FORBIDDEN, "not among the allowed sources"),
    ],
)
def test_what_is_refused_is_a_clear_error(
    opens: Opens, repository: Path, tmp_path: Path, source: Source, code: Code, words: str
) -> None:
    make_source(repository)
    tier = SsdTier(tmp_path / "store")
    with an_importer(tier, open_tree=opens) as importer, pytest.raises(HearthError, match=words) as refused:
        importer.look(source)
    assert refused.value.failure.code is code


@pytest.mark.parametrize("kind", ["hub", "s3", "web"])
def test_pickles_are_refused_before_anything_is_downloaded(
    opens: Opens, s3: S3Server, hub: FakeHub, repository: Path, tmp_path: Path, kind: str
) -> None:
    make_source(repository)
    (repository / "model.safetensors").rename(repository / "pytorch_model.bin")
    tier = SsdTier(tmp_path / "store")
    with an_importer(tier, open_tree=opens) as importer, pytest.raises(HearthError, match="pickled PyTorch files"):
        importer.look(Source(url=url_of(kind, s3)))
    assert "pytorch_model.bin" not in hub.resolved()
    assert [one for one in s3.served("GET") if "pytorch_model.bin" in one.key] == []


@pytest.mark.parametrize("kind", ["s3", "web"])
def test_a_checkpoint_in_hearths_form_comes_back_as_it_was_exported(
    opens: Opens, s3: S3Server, repository: Path, tmp_path: Path, kind: str
) -> None:
    make_source(tmp_path / "source", LARGE)
    first, second = SsdTier(tmp_path / "first"), SsdTier(tmp_path / "second")
    with an_importer(first, chunk_bytes=CHUNK_BYTES) as importer:
        stored = importer.run(Source(url=str(tmp_path / "source")), progressed=lambda done, total: None).stored
    for path in Path(stored.directory).iterdir():
        (repository / path.name).write_bytes(path.read_bytes())
    weights = sum((repository / path.name).stat().st_size for path in repository.glob("*.safetensors"))
    # Every second connection is cut at half of its range, and servers of object stores have weak moments.
    cuts = [Fault("cut", key=".safetensors", fraction=0.5, skip=2 * number) for number in range(3)]
    s3.fail(*cuts, Fault("status", times=2, key=".safetensors"))
    with an_importer(second, open_tree=opens, chunk_bytes=CHUNK_BYTES) as importer:
        outcome = importer.run(Source(url=url_of(kind, s3)), progressed=lambda done, total: None)
    assert outcome.stored.id == stored.id
    assert outcome.remote_bytes >= weights
    for path in Path(stored.directory).iterdir():
        if path.name != "hearth.json":
            assert (Path(outcome.stored.directory) / path.name).read_bytes() == path.read_bytes()
    slack = len(cuts) * 256 * 1024 + 2 * 64 * 1024
    assert s3.sent_bytes(".safetensors") <= weights + slack, "what was in flight, and nothing more, was sent twice"
