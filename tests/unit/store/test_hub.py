"""The Hugging Face hub as a source, against a small hub on loopback that speaks the part of its HTTP that is used."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.store.hub_tree import HubTree
from services.store.ports import SourceTree
from services.store.tier import SsdTier
from shared.contracts.residency import Source
from shared.errors import Code, HearthError
from tests.unit.store.sources import an_importer, local_tree, make_source

Opens = Callable[[Source], SourceTree]
COMMIT = "c0ffee0123456789c0ffee0123456789c0ffee01"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Serves the directory `root` as repository org/name; `org/gated` asks for a token, everything else is unknown."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _serve(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if "org/gated" in path:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, body)
        elif "org/name" not in path:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif path.startswith("/api/models/org/name"):
            if path.endswith("/revision/nope"):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                return
            files = [{"rfilename": name, "size": (self.root / name).stat().st_size} for name in os.listdir(self.root)]
            files.append({"rfilename": "original/tokenizer.model", "size": 10})
            self._send(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": files}).encode(), {}, body)
        else:
            file = self.root / path.rsplit("/", 1)[1]
            if not file.exists():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            data = file.read_bytes()
            self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        wanted = self.headers.get("Range")
        if wanted is not None and status == 200:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            whole, status = len(data), 206
            data = data[int(first) : int(last) + 1 if last else whole]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{whole}"
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Opens]:
    FakeHub.root, FakeHub.asked = tmp_path / "repository", []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"

        def opened(source: Source) -> SourceTree:
            if source.url.startswith("hf:"):
                return HubTree(source.url, source.revision, endpoint=endpoint)
            return local_tree(source)

        yield opened
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("shards", [1, 3])
def test_repository_becomes_the_checkpoint_that_its_files_would_be(hub: Opens, tmp_path: Path, shards: int) -> None:
    make_source(tmp_path / "repository", shards=shards)
    (tmp_path / "repository" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "repository" / "modeling.py").write_bytes(b"x")
    tier = SsdTier(tmp_path / "store")
    with an_importer(tier, open_tree=hub) as importer:
        source = Source(url="hf:org/name")
        look = importer.look(source)
        assert (look.revision, look.architecture) == (COMMIT, "LlamaForCausalLM")
        outcome = importer.run(source, progressed=lambda done, total: None)
        local = importer.run(Source(url=str(tmp_path / "repository")), progressed=lambda done, total: None)
    assert outcome.stored.revision == COMMIT
    assert outcome.stored.image_bytes == look.image_bytes
    assert outcome.stored.stored_bytes <= look.peak_bytes
    assert local.existing
    assert local.stored.id == outcome.stored.id
    assert not [path for path in FakeHub.asked if path.endswith((".bin", ".py", "tokenizer.model"))], (
        "only what is needed is downloaded"
    )
    assert os.listdir(tier.root / "incoming") == []


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        (Source(url="hf:org/unknown"), Code.NOT_FOUND, "no repository org/unknown"),
        (Source(url="hf:org/gated"), Code.FORBIDDEN, "gated"),
        (Source(url="hf:org/name", revision="nope"), Code.NOT_FOUND, "no revision 'nope'"),
    ],
)
def test_what_the_hub_refuses_is_a_clear_error(
    hub: Opens, tmp_path: Path, source: Source, code: Code, words: str
) -> None:
    make_source(tmp_path / "repository")
    tier = SsdTier(tmp_path / "store")
    with an_importer(tier, open_tree=hub) as importer, pytest.raises(HearthError, match=words) as refused:
        importer.look(source)
    assert refused.value.failure.code is code


def test_pickles_are_refused_before_anything_is_downloaded(hub: Opens, tmp_path: Path) -> None:
    make_source(tmp_path / "repository")
    (tmp_path / "repository" / "model.safetensors").rename(tmp_path / "repository" / "pytorch_model.bin")
    tier = SsdTier(tmp_path / "store")
    with an_importer(tier, open_tree=hub) as importer, pytest.raises(HearthError, match="pickled PyTorch files"):
        importer.look(Source(url="hf:org/name"))
    assert not [path for path in FakeHub.asked if "/resolve/" in path]
